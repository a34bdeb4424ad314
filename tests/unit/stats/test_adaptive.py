from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats.adaptive import (
    NO_OUTCOMES,
    Effect,
    aipw,
    aipw_estimate,
    aipw_running,
    delayed_effect,
    delayed_one_sided,
    effect_evidence,
    effect_one_sided,
    stratified,
    stratified_effect,
)
from stream_xp.stats.mean_difference import (
    NO_VARIANCE,
    TOO_FEW_UNITS,
    Stratum,
    guarded_variance,
    mean_difference,
    summarise,
)
from stream_xp.stats.moments import Moments
from stream_xp.stats.normal_mixture import Undetermined, one_sided_rho2, tuned_rho2
from stream_xp.stats.propensity_sums import PropensitySums, RunningAipw, inverse_weight

ALPHA = 0.05
RHO2 = tuned_rho2(1000, ALPHA)
SIDED = one_sided_rho2(1000, ALPHA)


def logged(seed, n=400, *, arms=2, shift=3):
    """(arm, value, propensities) of n units with propensities of their own."""
    rng = np.random.default_rng(seed)
    propensities = rng.dirichlet(np.full(arms, 3.0), n) * 0.7 + 0.3 / arms
    chosen = np.array([rng.choice(arms, p=p) for p in propensities])
    values = rng.integers(0, 20, n) + shift * (chosen == 1)
    return chosen, values, propensities


def sums_of(chosen, values, propensities, arm):
    own = chosen == arm
    return PropensitySums.from_units(
        values[own].tolist(), propensities[own, arm].tolist(), elsewhere=propensities[~own, arm].tolist()
    )


def plain_aipw(chosen, values, propensities, *, scale, centres):
    inverse = np.vectorize(inverse_weight)(propensities) / 2**24
    y = values * scale
    psi = np.full(len(y), centres[1] - centres[0])
    for arm, sign in ((0, -1), (1, 1)):
        psi = psi + sign * np.where(chosen == arm, (y - centres[arm]) * inverse[:, arm], 0.0)
    pooled = y[chosen <= 1].var(ddof=1)
    model = sum(
        float(guarded_variance(y[chosen == a].var(ddof=1), pooled, degrees=(chosen == a).sum() - 1))
        * inverse[:, a].sum()
        for a in (0, 1)
    )
    n = len(y)
    return psi.mean(), max((psi**2).sum() - psi.sum() ** 2 / n, model) / n**2


@pytest.mark.parametrize("arms", [2, 3])
@pytest.mark.parametrize("centres", [(0.0, 0.0), (1.0, 1.25), (50.0, -3.0)])
def test_scores_follow_the_formula(arms, centres):
    data = logged(3, arms=arms)
    control, treatment = (sums_of(*data, arm) for arm in (0, 1))
    got = aipw(control, treatment, scale=0.1, control_centre=centres[0], treatment_centre=centres[1])
    assert (got.estimate, got.variance) == pytest.approx(
        plain_aipw(*data, scale=0.1, centres=centres), rel=1e-9
    )
    assert got.n == 400


def test_a_good_centre_narrows_and_none_biases():
    data = logged(4, n=3000)
    control, treatment = (sums_of(*data, arm) for arm in (0, 1))
    plain = aipw(control, treatment, scale=1.0)
    centred = aipw(control, treatment, scale=1.0, control_centre=9.5, treatment_centre=12.5)
    assert centred.variance < 0.6 * plain.variance
    assert centred.estimate == pytest.approx(3.0, abs=4 * math.sqrt(centred.variance))
    assert plain.estimate == pytest.approx(3.0, abs=4 * math.sqrt(plain.variance))


def test_partitions_merge_and_units_of_the_metric_do_not_matter():
    data = logged(5)
    half = [np.arange(400) % 2 == i for i in (0, 1)]
    whole = [sums_of(*data, arm) for arm in (0, 1)]
    parts = [
        sum((sums_of(*(d[h] for d in data), arm) for h in half), PropensitySums.empty()) for arm in (0, 1)
    ]
    assert aipw(*whole, scale=1.0) == aipw(*parts, scale=1.0)
    pence, pounds = aipw(*whole, scale=1.0), aipw(*whole, scale=0.01)
    assert pounds.estimate == pytest.approx(pence.estimate / 100)
    assert pounds.variance == pytest.approx(pence.variance / 1e4)


def test_running_scores():
    chosen, values, propensities = logged(6)
    units = [(bool(a), int(y), float(p[1])) for a, y, p in zip(chosen, values, propensities, strict=True)]
    sums = RunningAipw.empty()
    psi, inverses = [], np.zeros(2)
    for start in range(0, 400, 50):
        before = [sums.control, sums.treatment]
        centres = [m.s / m.n if m.n else 0.0 for m in before]
        for treated, y, p in units[start : start + 50]:
            pull = (y - centres[treated]) / (p if treated else 1 - p)
            psi.append(centres[1] - centres[0] + (pull if treated else -pull))
            inverses += [1 / (1 - p), 1 / p]
        sums = sums.observed(units[start : start + 50])
    got = aipw_running(sums, scale=0.5)
    y = values * 0.5
    pooled = y.var(ddof=1)
    own = [
        float(guarded_variance(y[chosen == a].var(ddof=1), pooled, degrees=(chosen == a).sum() - 1))
        for a in (0, 1)
    ]
    scores = np.array(psi) * 0.5
    direct = aipw_estimate(
        n=400,
        psi=scores.sum(),
        psi_squares=(scores**2).sum(),
        control_inverse=inverses[0],
        treatment_inverse=inverses[1],
        control_variance=own[0],
        treatment_variance=own[1],
    )
    assert (got.estimate, got.variance) == pytest.approx(direct, rel=1e-6)


def test_sums_broadcast():
    estimate, variance = aipw_estimate(
        n=np.array([100, 200]),
        psi=np.array([[1.0], [2.0], [3.0]]),
        psi_squares=50.0,
        control_inverse=500.0,
        treatment_inverse=500.0,
        control_variance=0.0,
        treatment_variance=1.0,
    )
    assert estimate.shape == variance.shape == (3, 2)
    assert variance[0, 0] == pytest.approx(500 / 100**2)


def test_undetermined_scores():
    few = [PropensitySums.from_epoch(Moments(24, 24, 48), propensity=0.5, units=48)] * 2
    assert aipw(*few, scale=1.0) == Undetermined(TOO_FEW_UNITS)
    same = [PropensitySums.from_epoch(Moments(30, 30, 30), propensity=0.5, units=60)] * 2
    assert aipw(*same, scale=1.0) == Undetermined(NO_VARIANCE)
    assert aipw_running(RunningAipw.empty(), scale=1.0) == Undetermined(TOO_FEW_UNITS)
    apart = [PropensitySums.from_epoch(Moments(30, s, s), propensity=0.5, units=60) for s in (0, 30)]
    assert isinstance(aipw(*apart, scale=1.0), Effect)
    centred = aipw(*apart, scale=1.0, treatment_centre=1.0, guard=False)
    assert centred == Undetermined(NO_VARIANCE)


def test_a_trillion_units():
    n, big = 10**12, 10**15
    arm = PropensitySums.from_epoch(Moments(n, n * big, n * (big * big + 10**6)), propensity=0.5, units=2 * n)
    effect = aipw(arm, arm, scale=1e-3, control_centre=1e12, treatment_centre=1e12)
    assert effect.estimate == 0.0
    assert effect.variance == pytest.approx(4 * 1e6 * 1e-6 / (2 * n), rel=1e-6)


# ---- epochs ------------------------------------------------------------------------------------------


def strata_of(seed, sizes):
    rng = np.random.default_rng(seed)
    return [
        Stratum(*(Moments.from_values(rng.integers(0, 1000, n).tolist()) for n in pair)) for pair in sizes
    ]


def floats_of(strata, scale):
    arms = [(e.control, e.treatment) for e in strata]
    counts = [[m.n for m in pair] for pair in arms]
    means = [[m.mean(scale) if m.n else math.nan for m in pair] for pair in arms]
    variances = [[m.variance(scale) if m.n > 1 else math.nan for m in pair] for pair in arms]
    return counts, means, variances


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        [(300, 20), (150, 150), (10, 90)],
        [(30, 40)],
        [(30, 40), (50, 0), (0, 0)],
        [(1, 30), (60, 1), (40, 40)],
    ],
)
def test_float_epochs_agree_with_exact_ones(sizes, guard):
    strata = strata_of(1, sizes)
    exact = summarise(strata, scale=0.5, guard=guard)
    floats = stratified(*floats_of(strata, 0.5), guard=guard)
    if isinstance(exact, Undetermined):
        assert floats == exact
        return
    for name in exact.__slots__:
        assert getattr(floats, name) == pytest.approx(getattr(exact, name), rel=1e-12)


def test_a_constant_spread_gives_one_variance_to_all_epochs():
    counts, variances = np.array([(500, 500), (950, 50)]), np.array([(100.0, 100.0), (1e4, 1e4)])
    means = np.array([(3.0, 4.0), (5.0, 5.5)])
    constant = stratified(counts, means, variances, guard=False, constant_spread=True)
    by_epoch = stratified(counts, means, variances, guard=False)
    shares = np.array([0.25 / 500 + 0.25 / 950, 0.25 / 500 + 0.25 / 50])
    within = ((counts - 1) * variances).sum(axis=0) / (counts.sum(axis=0) - 2)
    assert constant.control_variance == pytest.approx(within[0] * shares[0], rel=1e-12)
    assert constant.treatment_variance == pytest.approx(within[1] * shares[1], rel=1e-12)
    assert by_epoch.treatment_variance > 3 * constant.treatment_variance
    assert (by_epoch.control_mean, by_epoch.n) == (constant.control_mean, constant.n)
    levels = {"alpha": ALPHA, "rho2": RHO2, "guard": False}
    wide = stratified_effect(counts, means, variances, **levels)
    narrow = stratified_effect(counts, means, variances, constant_spread=True, **levels)
    assert wide.lower < narrow.lower < narrow.upper < wide.upper


@pytest.mark.parametrize("sizes", [[(24, 400)], [(20, 400), (6, 400)], [(0, 5)]])
def test_too_few_units_per_arm(sizes):
    assert stratified(*floats_of(strata_of(2, sizes), 1.0)) == Undetermined(TOO_FEW_UNITS)


def test_many_comparisons_at_once():
    batches = [[(300, 20), (150, 150)], [(25, 25), (0, 9)], [(20, 20), (3, 3)]]
    parts = [floats_of(strata_of(i, sizes), 1.0) for i, sizes in enumerate(batches)]
    counts, means, variances = (np.array([p[i] for p in parts]) for i in range(3))
    got = stratified_effect(counts, means, variances, alpha=ALPHA, rho2=RHO2)
    assert got.determined.tolist() == [True, True, False]
    assert (got.estimate[2], got.lower[2], got.upper[2], got.log_e[2]) == (0, -math.inf, math.inf, 0)
    for i in (0, 1):
        one = mean_difference(stratified(*parts[i]), alpha=ALPHA, rho2=RHO2)
        values = [got.estimate[i], got.lower[i], got.upper[i], got.log_e[i]]
        assert values == pytest.approx([one.estimate, one.lower, one.upper, one.log_e], rel=1e-12)
    same = stratified_effect(np.full((1, 2), 30), np.ones((1, 2)), np.zeros((1, 2)), alpha=ALPHA, rho2=RHO2)
    assert not same.determined
    levels = stratified_effect(counts, means, variances, alpha=np.array([[0.1], [0.01]]), rho2=RHO2)
    assert levels.lower.shape == levels.estimate.shape == levels.determined.shape == (2, 3)


# ---- duality -----------------------------------------------------------------------------------------

EFFECTS = st.builds(
    Effect, estimate=st.floats(-100, 100), variance=st.floats(1e-6, 1e3), n=st.integers(50, 10**12)
)


@settings(deadline=None)
@given(EFFECTS, st.floats(-100, 100))
def test_effects_are_dual_to_their_sequences(effect, null):
    got = effect_evidence(effect, alpha=ALPHA, rho2=RHO2, null=null)
    for bound in (got.lower, got.upper):
        at = effect_evidence(effect, alpha=ALPHA, rho2=RHO2, null=bound).log_e
        assert at == pytest.approx(
            math.log(1 / ALPHA), abs=1e-9 * max(1, abs(bound) / (got.upper - got.lower))
        )
    for side in ("above", "below"):
        sided = effect_one_sided(effect, margin=null, side=side, alpha=ALPHA, rho2=SIDED)
        bound = sided.lower if side == "above" else sided.upper
        edge = effect_one_sided(effect, margin=null + bound, side=side, alpha=ALPHA, rho2=SIDED).log_e
        size = (abs(bound) + abs(null) + 1) / math.sqrt(effect.variance)
        assert edge == pytest.approx(math.log(1 / ALPHA), abs=1e-9 + 1e-12 * size)


def test_extreme_evidence_is_finite():
    got = effect_evidence(Effect(1e4, 1.0, 10**12), alpha=ALPHA, rho2=RHO2)
    assert got.log_e == pytest.approx(5e7, rel=1e-3)


DELAYED = st.lists(
    st.tuples(st.integers(0, 2), st.integers(-50, 50), st.floats(0.05, 0.9)), min_size=2, max_size=30
).filter(lambda units: any(a < 2 and y for a, y, _ in units))


def delayed_sums(units):
    def arm(a, propensity):
        own = [(y, propensity(p)) for b, y, p in units if b == a]
        other = [propensity(p) for b, _, p in units if b != a]
        return PropensitySums.from_units([y for y, _ in own], [p for _, p in own], elsewhere=other)

    return arm(0, lambda p: 1 - p), arm(1, lambda p: p)


def test_delayed_outcomes_follow_the_formula():
    units = [(0, 3, 0.4), (1, 5, 0.2), (1, 0, 0.5), (0, -2, 0.6)]
    control, treatment = delayed_sums(units)
    eta = 0.01
    got = delayed_effect(control, treatment, scale=0.5, alpha=ALPHA, eta=eta, guard=False)
    sums, spreads = [0.0, 0.0], [0.0, 0.0]
    for arm, y, p1 in units:
        p = p1 if arm else 1 - p1
        sums[arm] += 0.5 * y / p
        spreads[arm] += (1 - p) / p**2 * (0.5 * y) ** 2
    half = sum(
        math.sqrt((v * eta + 1) / eta * (math.log1p(v * eta) + 2 * math.log(2 / ALPHA))) for v in spreads
    )
    assert got.estimate == pytest.approx((sums[1] - sums[0]) / 4, rel=1e-6)
    assert got.upper - got.estimate == pytest.approx(half / 4, rel=1e-6)
    assert got.n == 4


@settings(deadline=None, max_examples=60)
@given(DELAYED, st.floats(1e-6, 10), st.floats(0.001, 0.5))
def test_delayed_evidence_is_dual(units, eta, alpha):
    control, treatment = delayed_sums(units)
    got = delayed_effect(control, treatment, scale=1.0, alpha=alpha, eta=eta, guard=False)
    for bound in (got.lower, got.upper):
        at = delayed_effect(
            control, treatment, scale=1.0, alpha=alpha, eta=eta, null=bound, guard=False
        ).log_e
        assert at == pytest.approx(math.log(1 / alpha), rel=1e-8, abs=1e-9)
    for side in ("above", "below"):
        sided = delayed_one_sided(
            control, treatment, scale=1.0, margin=0.0, side=side, alpha=alpha, eta=eta, guard=False
        )
        margin = sided.lower if side == "above" else sided.upper
        edge = delayed_one_sided(
            control, treatment, scale=1.0, margin=margin, side=side, alpha=alpha, eta=eta, guard=False
        )
        assert edge.log_e == pytest.approx(math.log(1 / alpha), rel=1e-7, abs=1e-8)


@settings(deadline=None, max_examples=40)
@given(DELAYED, st.floats(0, 50), st.floats(0.01, 20))
def test_delayed_evidence_grows_with_the_distance(units, near, further):
    sums = delayed_sums(units)
    centre = delayed_effect(*sums, scale=1.0, alpha=ALPHA, eta=0.01, guard=False).estimate
    log_e = [
        delayed_effect(*sums, scale=1.0, alpha=ALPHA, eta=0.01, null=centre + d, guard=False).log_e
        for d in (near, near + further)
    ]
    assert log_e[0] <= log_e[1] + 1e-9


def test_no_outcome_yet():
    arm = PropensitySums.from_epoch(Moments(5, 0, 0), propensity=0.5, units=10)
    assert delayed_effect(arm, arm, scale=1.0, alpha=ALPHA, eta=1.0) == Undetermined(NO_OUTCOMES)
    sided = delayed_one_sided(arm, arm, scale=1.0, margin=0.0, side="above", alpha=ALPHA, eta=1.0)
    assert sided == Undetermined(NO_OUTCOMES)


def test_the_guard_of_delayed_outcomes():
    data = logged(8)
    control, treatment = (sums_of(*data, arm) for arm in (0, 1))
    eta = 1e-6
    guarded, plain = (
        delayed_effect(control, treatment, scale=1.0, alpha=ALPHA, eta=eta, guard=g) for g in (True, False)
    )
    assert guarded.estimate == plain.estimate
    assert guarded.upper >= plain.upper
    chosen, values, propensities = data
    half = 0.0
    for arm in (0, 1):
        own = chosen == arm
        p, y = propensities[own, arm], values[own].astype(float)
        square = (y**2).mean()
        shrunk = max(square, (own.sum() * square + 200 * (values**2).mean()) / (own.sum() + 200))
        v = max(((1 - p) / p**2 * y**2).sum(), shrunk * (1 / propensities[:, arm] - 1).sum())
        half += math.sqrt((v * eta + 1) / eta * (math.log1p(v * eta) + 2 * math.log(2 / ALPHA)))
    assert guarded.upper - guarded.estimate == pytest.approx(half / 400, rel=1e-6)
    few = PropensitySums.from_epoch(Moments(24, 24, 24), propensity=0.5, units=48)
    assert delayed_effect(few, few, scale=1.0, alpha=ALPHA, eta=eta) == Undetermined(TOO_FEW_UNITS)


# ---- arguments ---------------------------------------------------------------------------------------

ARM = PropensitySums.from_epoch(Moments(30, 30, 60), propensity=0.5, units=60)
MORE = PropensitySums.from_epoch(Moments(30, 30, 60), propensity=0.5, units=61)
HUGE = PropensitySums.from_epoch(Moments(30, 0, 10**700), propensity=0.5, units=60)
BIG = PropensitySums.from_epoch(Moments(30, 0, 10**150), propensity=0.5, units=60)
SUMS = {
    "n": 100, "psi": 1.0, "psi_squares": 50.0, "control_inverse": 500.0, "treatment_inverse": 500.0,
    "control_variance": 1.0, "treatment_variance": 1.0,
}  # fmt: skip
TABLE = {"counts": [[30, 30]], "means": [[1.0, 2.0]], "variances": [[1.0, 1.0]]}
EFFECT = Effect(1.0, 1.0, 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aipw(ARM, MORE, scale=1.0), "control and treatment must be sums over the same units"),
        (lambda: aipw(ARM, ARM, scale=0.0), "scale must lie between"),
        (lambda: aipw(ARM, ARM, scale=1.0, control_centre=math.nan), "control_centre must be finite"),
        (lambda: aipw(ARM, ARM, scale=1e-100, treatment_centre=1e300), "treatment_centre must be a finite"),
        (lambda: aipw(HUGE, HUGE, scale=1.0), "must give"),
        (lambda: aipw_running(RunningAipw.empty(), scale=math.inf), "scale must lie between"),
        (lambda: aipw_estimate(**(SUMS | {"n": 0})), "n must be at least 1"),
        (lambda: aipw_estimate(**(SUMS | {"n": 10.5})), "n must be whole numbers"),
        (lambda: aipw_estimate(**(SUMS | {"n": 2**53})), "n must be whole numbers below"),
        (lambda: aipw_estimate(**(SUMS | {"psi": math.nan})), "psi must be finite"),
        (lambda: aipw_estimate(**(SUMS | {"psi": 100.0})), "psi_squares must satisfy"),
        (lambda: aipw_estimate(**(SUMS | {"control_inverse": 99.0})), "control_inverse must be at least n"),
        (
            lambda: aipw_estimate(**(SUMS | {"treatment_variance": -1.0})),
            "treatment_variance must not be negative",
        ),
        (lambda: stratified(**(TABLE | {"counts": [[30, -1]]})), "counts must not be negative"),
        (lambda: stratified(**(TABLE | {"counts": [[30, 0.5]]})), "counts must be whole numbers"),
        (lambda: stratified(**(TABLE | {"counts": [30, 30]})), "counts must end in the shape"),
        (lambda: stratified(**{k: [v] for k, v in TABLE.items()}), "counts must have the shape"),
        (lambda: stratified(**(TABLE | {"means": [[1.0]]})), "means must have the shape of counts"),
        (lambda: stratified(**(TABLE | {"means": [[1.0, math.nan]]})), "means must be finite"),
        (lambda: stratified(**(TABLE | {"variances": [[1.0, -1.0]]})), "variances must not be negative"),
        (lambda: stratified_effect(**TABLE, alpha=0.0, rho2=1.0), "alpha must lie strictly"),
        (lambda: stratified_effect(**TABLE, alpha=0.1, rho2=0.0), "rho2 must be greater than 0"),
        (lambda: aipw_estimate(**(SUMS | {"psi": 1e300})), "psi_squares must satisfy"),
        (lambda: stratified(**(TABLE | {"means": [[1.0, 1e200]]})), "means must be at most"),
        (
            lambda: delayed_effect(BIG, BIG, scale=1.0, alpha=0.1, eta=1.0),
            "control and treatment must give sums",
        ),
        (lambda: replace(EFFECT, variance=0.0), "variance must be greater than 0"),
        (lambda: replace(EFFECT, estimate=math.inf), "estimate must be finite"),
        (lambda: replace(EFFECT, n=0), "n must be at least 1"),
        (lambda: effect_evidence(EFFECT, alpha=1.0, rho2=1.0), "alpha must lie strictly"),
        (lambda: effect_evidence(EFFECT, alpha=0.1, rho2=1.0, null=math.nan), "null must be finite"),
        (lambda: effect_one_sided(EFFECT, margin=0.0, side="up", alpha=0.1, rho2=1.0), "side must be"),
        (
            lambda: delayed_effect(ARM, MORE, scale=1.0, alpha=0.1, eta=1.0),
            "control and treatment must be sums",
        ),
        (lambda: delayed_effect(ARM, ARM, scale=1.0, alpha=0.1, eta=0.0), "eta must be greater than 0"),
        (lambda: delayed_effect(HUGE, HUGE, scale=1.0, alpha=0.1, eta=1.0), "must give"),
        (
            lambda: delayed_one_sided(ARM, ARM, scale=1.0, margin=0.0, side="up", alpha=0.1, eta=1.0),
            "side must be",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
