from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import (
    ArmMeans,
    Stratum,
    Undetermined,
    guarded_variance,
    mean_difference,
    relative_lift,
    summarise,
    tuned_rho2,
)
from stream_xp.stats.batch import DENOMINATOR_NEAR_ZERO, CrossArrays
from stream_xp.stats.cross_moments import CrossMoments, CrossStratum
from stream_xp.stats.mean_difference import NO_VARIANCE, TOO_FEW_UNITS, relative_lift_delta
from stream_xp.stats.ratio_difference import (
    SEPARATION,
    RatioSummary,
    ratio_equality_arrays,
    ratio_equality_means,
    ratio_equality_of,
    ratio_means,
    ratio_means_arrays,
    ratio_means_of,
    ratio_means_of_summaries,
)

ALPHA = 0.05
RHO2 = tuned_rho2(1000, ALPHA)
ONES = {"scale_x": 1.0, "scale_y": 1.0}
BOTH = pytest.mark.parametrize("means_of", [ratio_means, ratio_equality_means])


def data(seed, sizes, *, ratios=(0.3, 0.3), sparse=0.0):
    """Integer (denominator, numerator) of both arms in each epoch."""
    rng = np.random.default_rng(seed)
    epochs = []
    for e, pair in enumerate(sizes):
        arms = []
        for arm, n in enumerate(pair):
            d = rng.poisson(4 + 3 * e, n) * (rng.random(n) >= sparse)
            arms.append((d, rng.binomial(d, ratios[arm] * (1 + 0.3 * e))))
        epochs.append(arms)
    return epochs


def strata_of(epochs):
    return [
        CrossStratum(*(CrossMoments.from_pairs(zip(d.tolist(), m.tolist(), strict=True)) for d, m in arms))
        for arms in epochs
    ]


def spread(d, m, ratio):
    value = m - ratio * d
    return ((value - value.mean()) ** 2).sum()


def both(arms):
    return [np.concatenate([arms[0][i], arms[1][i]]) for i in (0, 1)]


def units_of(epochs, ratios):
    """Guarded variance of one unit's linearised value in each arm."""
    total, parts = sum(len(d) for arms in epochs for d, _ in arms), len(epochs)
    pooled = sum(spread(*both(arms), ratios[2]) for arms in epochs) / (total - parts)
    units = []
    for arm in (0, 1):
        degrees = sum(len(arms[arm][0]) for arms in epochs) - parts
        own = sum(spread(*arms[arm], ratios[arm]) for arms in epochs) / degrees
        units.append(float(guarded_variance(own, pooled, degrees=degrees)))
    return units


def stratified(epochs, arm, column):
    sizes = np.array([sum(len(d) for d, _ in arms) for arms in epochs])
    return float(sizes / sizes.sum() @ np.array([arms[arm][column].mean() for arms in epochs]))


def rows(epochs, ratios, arm):
    """Arguments of `variance_of_mean` for an arm."""
    return {
        "n": [len(arms[arm][0]) for arms in epochs],
        "sizes": [sum(len(d) for d, _ in arms) for arms in epochs],
        "own": [spread(*arms[arm], ratios[arm]) for arms in epochs],
        "both": [spread(*both(arms), ratios[2]) for arms in epochs],
        "unit": units_of(epochs, ratios)[arm],
    }


# ---- formulas ----------------------------------------------------------------------------------------

SIZES = pytest.mark.parametrize("sizes", [[(300, 40)], [(300, 20), (150, 150), (10, 90)]])


@SIZES
def test_ratios_follow_the_formula(variance_of_mean, sizes):
    epochs = data(1, sizes, ratios=(0.3, 0.35))
    found = ratio_means(strata_of(epochs), **ONES)
    bottoms = [stratified(epochs, arm, 0) for arm in (0, 1)]
    ratios = [stratified(epochs, arm, 1) / bottoms[arm] for arm in (0, 1)]
    columns = [np.concatenate([both(arms)[i] for arms in epochs]) for i in (0, 1)]
    ratios.append(columns[1].sum() / columns[0].sum())
    assert found.control_mean == pytest.approx(ratios[0], rel=1e-13)
    assert found.treatment_mean == pytest.approx(ratios[1], rel=1e-13)
    for arm, name in enumerate(("control_variance", "treatment_variance")):
        expected = variance_of_mean(**rows(epochs, ratios, arm)) / bottoms[arm] ** 2
        assert getattr(found, name) == pytest.approx(expected, rel=1e-11)


def test_one_epoch_unguarded_is_the_delta_method():
    (arms,) = data(2, [(200, 80)])
    found = ratio_means(strata_of([arms]), guard=False, **ONES)
    for (d, m), mean, variance in zip(
        arms,
        (found.control_mean, found.treatment_mean),
        (found.control_variance, found.treatment_variance),
        strict=True,
    ):
        cov = np.cov(m, d)
        r = m.sum() / d.sum()
        linear = cov[0, 0] - 2 * r * cov[0, 1] + r * r * cov[1, 1]
        assert mean == pytest.approx(r, rel=1e-13)
        assert variance == pytest.approx(linear / (len(d) * d.mean() ** 2), rel=1e-11)


@SIZES
def test_the_equality_test_follows_the_formula(variance_of_mean, sizes):
    epochs = data(3, sizes)
    found = ratio_equality_means(strata_of(epochs), **ONES)
    columns = [np.concatenate([both(arms)[i] for arms in epochs]) for i in (0, 1)]
    r = columns[1].sum() / columns[0].sum()
    for arm, name in enumerate(("control", "treatment")):
        mean = stratified(epochs, arm, 1) - r * stratified(epochs, arm, 0)
        assert getattr(found, f"{name}_mean") == pytest.approx(mean, rel=1e-10, abs=1e-12)
        assert getattr(found, f"{name}_variance") == pytest.approx(
            variance_of_mean(**rows(epochs, [r, r, r], arm)), rel=1e-11
        )


@BOTH
def test_a_constant_denominator_gives_the_plain_means(means_of):
    epochs = [[(np.full_like(d, 2), m) for d, m in arms] for arms in data(4, [(200, 60), (90, 90)])]
    strata = strata_of(epochs)
    plain = summarise([Stratum(e.control.moments_y, e.treatment.moments_y) for e in strata], scale=1.0)
    found = means_of(strata, **ONES)
    factor = 2.0 if means_of is ratio_means else 1.0
    difference = found.treatment_mean - found.control_mean
    assert difference * factor == pytest.approx(plain.treatment_mean - plain.control_mean, rel=1e-9)
    for name in ("control_variance", "treatment_variance"):
        assert getattr(found, name) * factor**2 == pytest.approx(getattr(plain, name), rel=1e-11)


def test_denominators_are_not_the_sample_size():
    # Each unit repeats one value many times: the variance must be that of units.
    rng = np.random.default_rng(5)
    rate = rng.integers(0, 2, 400)
    d = np.full(400, 50)
    arm = CrossMoments.from_pairs(zip(d.tolist(), (rate * 50).tolist(), strict=True))
    found = ratio_means([CrossStratum(arm, arm)], **ONES)
    assert found.control_variance == pytest.approx(0.25 / 400, rel=0.05)


# ---- what follows from ratios ------------------------------------------------------------------------


def test_difference_lift_and_delta_are_those_of_means():
    means = ratio_means(strata_of(data(6, [(4000, 4000)], ratios=(0.3, 0.36))), **ONES)
    rule = {"alpha": ALPHA, "rho2": RHO2}
    assert mean_difference(means, **rule).lower > 0
    fieller, delta = relative_lift(means, **rule), relative_lift_delta(means, **rule)
    assert fieller.lower < 0.2 < fieller.upper
    assert fieller.lower == pytest.approx(delta.lower, abs=0.02)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 0.8), ratio=st.floats(0.1, 0.9))
def test_the_equality_test_is_the_difference_near_the_null(seed, share, ratio):
    n = 2000
    sizes = [(int(n * (1 - share)), int(n * share))]
    strata = strata_of(data(seed, sizes, ratios=(ratio, ratio)))
    evidence = [
        mean_difference(means_of(strata, **ONES), alpha=ALPHA, rho2=RHO2)
        for means_of in (ratio_means, ratio_equality_means)
    ]
    z = [e.estimate / (e.upper - e.estimate) for e in evidence]
    assert z[0] == pytest.approx(z[1], abs=0.1)


@BOTH
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(3)))
def test_order_and_merging_do_not_matter(means_of, seed, order):
    strata = strata_of(data(seed, [(40, 30), (50, 60), (9, 9)]))
    assert means_of([strata[i] for i in order], **ONES) == means_of(strata, **ONES)


@BOTH
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_swapping_the_arms_mirrors_the_difference(means_of, seed):
    strata = strata_of(data(seed, [(60, 90), (70, 30)]))
    swapped = [CrossStratum(e.treatment, e.control) for e in strata]
    here, there = (mean_difference(means_of(s, **ONES), alpha=ALPHA, rho2=RHO2) for s in (strata, swapped))
    assert here.estimate == pytest.approx(-there.estimate, rel=1e-9, abs=1e-12)
    assert here.log_e == pytest.approx(there.log_e, rel=1e-9, abs=1e-9)


def test_units_of_measure_only_scale_the_ratio():
    strata = strata_of(data(7, [(60, 90), (70, 30)]))
    here, there = ratio_means(strata, **ONES), ratio_means(strata, scale_x=0.01, scale_y=10.0)
    assert there.control_mean == pytest.approx(1000 * here.control_mean, rel=1e-12)
    assert there.treatment_variance == pytest.approx(1e6 * here.treatment_variance, rel=1e-12)


# ---- undetermined ------------------------------------------------------------------------------------


@BOTH
def test_too_few_units_and_no_variance(means_of):
    assert means_of([], **ONES) == Undetermined(TOO_FEW_UNITS)
    assert means_of(strata_of(data(8, [(24, 400)])), **ONES) == Undetermined(TOO_FEW_UNITS)
    exact = [[(d + 1, 3 * (d + 1)) for d, _ in arms] for arms in data(9, [(40, 50)])]
    assert means_of(strata_of(exact), **ONES) == Undetermined(NO_VARIANCE)


def test_denominators_of_zero_have_no_ratio():
    zero = CrossMoments.from_pairs([(0, 0)] * 40)
    some = CrossMoments.from_pairs([(1, i % 2) for i in range(40)])
    for pair in ((zero, some), (some, zero), (zero, zero)):
        assert ratio_means([CrossStratum(*pair)], **ONES) == Undetermined(DENOMINATOR_NEAR_ZERO)
    assert ratio_equality_means([CrossStratum(zero, zero)], **ONES) == Undetermined(DENOMINATOR_NEAR_ZERO)


def test_a_denominator_mean_must_stand_clear_of_zero():
    rng = np.random.default_rng(10)

    def arm(units, active):
        d = [1] * active + [0] * (units - active)
        return CrossMoments.from_pairs([(x, int(x and rng.random() < 0.5)) for x in d])

    control = arm(1000, 100)
    for active in range(1, 12):
        found = ratio_means([CrossStratum(control, arm(100, active))], **ONES)
        sd = math.sqrt(100 / 1000 * 900 / 1000)
        clear = active / 100 > 1.2 * SEPARATION * sd / math.sqrt(100)
        near = active / 100 < 0.8 * SEPARATION * sd / math.sqrt(100)
        if clear:
            assert isinstance(found, ArmMeans)
        if near:
            assert found == Undetermined(DENOMINATOR_NEAR_ZERO)
        assert isinstance(ratio_equality_means([CrossStratum(control, arm(100, active))], **ONES), ArmMeans)


# ---- arrays and floats -------------------------------------------------------------------------------


def test_arrays_agree_with_the_scalar_functions():
    comparisons = [
        strata_of(data(s, sizes)) for s, sizes in ((1, [(50, 60), (30, 40)]), (2, [(9, 80), (70, 26)]))
    ]
    arms = [
        CrossArrays.of([getattr(e, name) for strata in comparisons for e in strata], (2, 2))
        for name in ("control", "treatment")
    ]
    for many, one in ((ratio_means_arrays, ratio_means), (ratio_equality_arrays, ratio_equality_means)):
        found = many(*arms, scale_x=[1.0, 0.5], scale_y=0.1)
        for i, scale in enumerate((1.0, 0.5)):
            assert found.at(i) == one(comparisons[i], scale_x=scale, scale_y=0.1)


def summary_of(moments):
    return RatioSummary(
        n=moments.n,
        mean_m=moments.mean_y(1.0),
        mean_d=moments.mean_x(1.0),
        var_m=moments.variance_y(1.0),
        var_d=moments.variance_x(1.0),
        cov_md=moments.covariance(**ONES),
    )


@pytest.mark.parametrize(
    ("exact", "of"), [(ratio_means, ratio_means_of), (ratio_equality_means, ratio_equality_of)]
)
@pytest.mark.parametrize("guard", [True, False])
def test_summaries_agree_with_exact_moments(exact, of, guard):
    strata = strata_of(data(13, [(200, 40), (60, 70)]))
    arms = []
    for name in ("control", "treatment"):
        rows = [summary_of(getattr(e, name)) for e in strata]
        arms.append(RatioSummary(**{f: [getattr(r, f) for r in rows] for f in RatioSummary.__slots__}))
    one = [summary_of(m) for m in (strata[0].control, strata[0].treatment)]
    for found, expected in (
        (of(*one, guard=guard), exact(strata[:1], guard=guard, **ONES)),
        (of(*arms, guard=guard, stratified=True), exact(strata, guard=guard, **ONES)),
    ):
        for name in ArmMeans.__slots__:
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-10, abs=1e-13)


def test_a_trillion_units_keep_their_digits():
    n = 10**12
    arm = CrossMoments(n, 4 * n, 2 * n, 20 * n, 8 * n, 9 * n)
    means = ratio_means([CrossStratum(arm, arm)], **ONES)
    assert means.control_mean == 0.5
    assert means.control_variance == pytest.approx((4 - 2 * 0.5 * 1 + 0.25 * 4) / 16 / n, rel=1e-9)


# ---- arguments ---------------------------------------------------------------------------------------

GOOD = {"n": 50, "mean_m": 1.0, "mean_d": 2.0, "var_m": 1.0, "var_d": 4.0, "cov_md": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": -1}, "n must not be negative"),
        ({"n": 2.5}, "n must be a whole number"),
        ({"mean_m": math.inf}, "mean_m must be finite"),
        ({"mean_d": math.nan}, "mean_d must be finite"),
        ({"var_m": -1.0}, "var_m must not be negative"),
        ({"var_d": -4.0}, "var_d must not be negative"),
        ({"cov_md": -2.1}, "cov_md must not exceed the square root"),
    ],
)
def test_bad_summaries_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RatioSummary(**(GOOD | change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ratio_means([], scale_x=0.0, scale_y=1.0), "scale_x must be greater than 0"),
        (lambda: ratio_equality_means([], scale_x=1.0, scale_y=1e101), "scale_y must lie between"),
        (
            lambda: ratio_means_of(RatioSummary(**(GOOD | {"n": 0})), RatioSummary(**GOOD)),
            "n must be at least 1",
        ),
        (
            lambda: ratio_equality_of(RatioSummary(**GOOD), RatioSummary(**(GOOD | {"n": 0}))),
            "n must be at least 1",
        ),
        (
            lambda: ratio_means_of_summaries(
                RatioSummary(**(GOOD | {"n": [1, 2]})), RatioSummary(**(GOOD | {"n": [1, 2, 3]}))
            ),
            "control and treatment must have fields whose shapes broadcast",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
