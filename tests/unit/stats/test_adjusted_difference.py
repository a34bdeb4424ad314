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
    one_sided_test,
    relative_lift,
    summarise,
    tuned_rho2,
)
from stream_xp.stats.adjusted_difference import (
    CovariateSummary,
    ancova,
    ancova_arrays,
    ancova_of,
    cuped,
    cuped_arrays,
    cuped_of,
    cuped_of_summaries,
)
from stream_xp.stats.batch import CrossArrays
from stream_xp.stats.cross_moments import CrossMoments, CrossStratum
from stream_xp.stats.mean_difference import NO_VARIANCE, TOO_FEW_UNITS

ALPHA = 0.05
RHO2 = tuned_rho2(1000, ALPHA)
ONES = {"scale_x": 1.0, "scale_y": 1.0}
BOTH = pytest.mark.parametrize("adjust", [cuped, ancova])


def data(seed, sizes, *, slopes=(2.0, 2.0), shift=0.0):
    """Integer (x, y) of both arms in each epoch."""
    rng = np.random.default_rng(seed)
    epochs = []
    for e, pair in enumerate(sizes):
        arms = []
        for arm, n in enumerate(pair):
            x = rng.integers(0, 200, n) + 1000 * e
            y = np.rint(slopes[arm] * x + rng.normal(0, 60, n) + 300 * e + shift * arm).astype(int)
            arms.append((x, y))
        epochs.append(arms)
    return epochs


def strata_of(epochs):
    return [
        CrossStratum(*(CrossMoments.from_pairs(zip(x.tolist(), y.tolist(), strict=True)) for x, y in arms))
        for arms in epochs
    ]


def residuals(x, y, epochs, *, slope):
    """Deviations of y - slope * x from its mean in each epoch."""
    value = y - slope * x
    return np.concatenate([value[epochs == e] - value[epochs == e].mean() for e in np.unique(epochs)])


def columns(epochs, arm):
    parts = [arms[a] for arms in epochs for a in ((0, 1) if arm is None else (arm,))]
    label = [
        e for e, arms in enumerate(epochs) for a in ((0, 1) if arm is None else (arm,)) for _ in arms[a][0]
    ]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]), np.array(label)


def within_slope(epochs, arm):
    x, y, label = columns(epochs, arm)
    dx, dy = residuals(x, x, label, slope=0.0), residuals(x, y, label, slope=0.0)
    return (dx @ dy) / (dx @ dx)


def squares_of_epochs(epochs, arm, slope):
    return [(residuals(*columns([arms], arm), slope=slope) ** 2).sum() for arms in epochs]


def expected_means(epochs, variance_of_mean, *, slopes, spent):
    """The adjusted means, straight from the units."""
    sizes = np.array([[len(x) for x, _ in arms] for arms in epochs])
    total, parts = sizes.sum(), len(epochs)
    weights = sizes.sum(axis=1) / total
    x, y, label = columns(epochs, None)
    pooled = (residuals(x, y, label, slope=slopes[2]) ** 2).sum() / (total - parts - spent)
    error = math.sqrt((residuals(x, x, label, slope=0.0) ** 2).sum() / (total - parts) / total)
    out = {"n": total}
    for arm, name in enumerate(("control", "treatment")):
        own_x, own_y, own = columns(epochs, arm)
        degrees = sizes[:, arm].sum() - parts - spent
        spread = (residuals(own_x, own_y, own, slope=slopes[arm]) ** 2).sum() / degrees
        unit = guarded_variance(spread, pooled, degrees=degrees)
        level = [
            arms[arm][1].mean()
            - slopes[arm] * (arms[arm][0].mean() - np.concatenate([arms[0][0], arms[1][0]]).mean())
            for arms in epochs
        ]
        out[f"{name}_mean"] = weights @ np.array(level)
        out[f"{name}_variance"] = variance_of_mean(
            sizes[:, arm],
            sizes.sum(axis=1),
            own=squares_of_epochs(epochs, arm, slopes[arm]),
            both=squares_of_epochs(epochs, None, slopes[2]),
            unit=float(unit),
            spent=spent,
        )
        out[f"{name}_loading"] = slopes[arm] * error
    return out


# ---- formulas ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[(300, 40)], [(300, 20), (150, 150), (10, 90)]])
def test_cuped_follows_the_formula(variance_of_mean, sizes):
    epochs = data(1, sizes, slopes=(1.5, 3.0))
    found = cuped(strata_of(epochs), **ONES)
    slope = within_slope(epochs, None)
    for name, value in expected_means(epochs, variance_of_mean, slopes=[slope] * 3, spent=0).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("sizes", [[(300, 40)], [(300, 20), (150, 150), (10, 90)]])
def test_ancova_follows_the_formula(variance_of_mean, sizes):
    epochs = data(2, sizes, slopes=(1.5, 3.0))
    found = ancova(strata_of(epochs), **ONES)
    slopes = [within_slope(epochs, arm) for arm in (0, 1, None)]
    for name, value in expected_means(epochs, variance_of_mean, slopes=slopes, spent=1).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-11)


def test_ancova_is_the_interacted_regression():
    (arms,) = data(3, [(120, 60)], slopes=(1.0, 4.0), shift=25.0)
    x, y = (np.concatenate([arms[0][i], arms[1][i]]).astype(float) for i in (0, 1))
    t = np.repeat([0.0, 1.0], [120, 60])
    centred = x - x.mean()
    design = np.column_stack([np.ones(180), t, centred, t * centred])
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    residual = y - design @ coefficients
    means = ancova(strata_of([arms]), guard=False, **ONES)
    assert means.treatment_mean - means.control_mean == pytest.approx(coefficients[1], rel=1e-10)
    expected = sum((residual[t == a] ** 2).sum() / (n - 2) / n for a, n in ((0, 120), (1, 60)))
    expected += coefficients[3] ** 2 * x.var(ddof=1) / 180
    half = (mean_difference(means, alpha=ALPHA, rho2=RHO2).upper - coefficients[1]) ** 2
    multiplier = (mean_difference(ArmMeans(0, 1, 1, 0, 180), alpha=ALPHA, rho2=RHO2).upper - 1) ** 2
    assert half / multiplier == pytest.approx(expected, rel=1e-9)


def test_cuped_is_the_difference_of_adjusted_values():
    (arms,) = data(4, [(200, 200)], shift=10.0)
    slope = within_slope([arms], None)
    raw = [arms[a][1].mean() - slope * arms[a][0].mean() for a in (0, 1)]
    means = cuped(strata_of([arms]), **ONES)
    assert means.treatment_mean - means.control_mean == pytest.approx(raw[1] - raw[0], rel=1e-9)
    assert means.control_loading == means.treatment_loading


@BOTH
def test_adjustment_narrows_what_the_covariate_explains(adjust):
    strata = strata_of(data(5, [(500, 400)]))
    plain = summarise([Stratum(e.control.moments_y, e.treatment.moments_y) for e in strata], scale=1.0)
    adjusted = adjust(strata, **ONES)
    widths = [
        evidence.upper - evidence.lower
        for evidence in (mean_difference(m, alpha=ALPHA, rho2=RHO2) for m in (plain, adjusted))
    ]
    assert widths[1] < 0.6 * widths[0]
    assert adjusted.control_mean == pytest.approx(plain.control_mean, rel=0.05)
    lift = relative_lift(adjusted, alpha=ALPHA, rho2=RHO2)
    assert lift.lower < lift.estimate < lift.upper
    rule = {"margin": -0.5, "margin_kind": "relative", "side": "above", "alpha": ALPHA, "rho2": RHO2}
    assert one_sided_test(adjusted, **rule).lower > 0


@BOTH
def test_drift_between_epochs_does_not_make_a_slope(adjust):
    # Within epochs y does not depend on x; between them both rise together.
    strata = strata_of(data(6, [(400, 40), (40, 400)], slopes=(0.0, 0.0)))
    means = adjust(strata, **ONES)
    assert abs(mean_difference(means, alpha=ALPHA, rho2=RHO2).estimate) < 30
    plain = summarise([Stratum(e.control.moments_y, e.treatment.moments_y) for e in strata], scale=1.0)
    assert means.control_mean == pytest.approx(plain.control_mean, rel=0.05)


# ---- properties --------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=25, max_size=40)


@BOTH
@settings(deadline=None, max_examples=20)
@given(c=PAIRS, t=PAIRS, order=st.permutations(range(2)))
def test_order_and_merging_do_not_matter(adjust, c, t, order):
    one = CrossStratum(CrossMoments.from_pairs(c), CrossMoments.from_pairs(t))
    halves = CrossStratum(
        CrossMoments.from_pairs(c[:9]).merge(CrossMoments.from_pairs(c[9:])), CrossMoments.from_pairs(t)
    )
    other = CrossStratum(CrossMoments.from_pairs(t[:12]), CrossMoments.from_pairs(c[:12]))
    assert adjust([one], **ONES) == adjust([halves], **ONES)
    strata = [one, other]
    assert adjust([strata[i] for i in order], **ONES) == adjust(strata, **ONES)


@BOTH
@settings(deadline=None, max_examples=20)
@given(c=PAIRS, t=PAIRS)
def test_swapping_the_arms_mirrors_the_difference(adjust, c, t):
    arms = [CrossMoments.from_pairs(pairs) for pairs in (c, t)]
    here, there = (adjust([CrossStratum(*pair)], **ONES) for pair in (arms, arms[::-1]))
    if isinstance(here, Undetermined):
        assert there == here
        return
    a, b = (mean_difference(m, alpha=ALPHA, rho2=RHO2) for m in (here, there))
    assert a.estimate == pytest.approx(-b.estimate, rel=1e-9, abs=1e-9)
    assert a.log_e == pytest.approx(b.log_e, rel=1e-9, abs=1e-9)


@BOTH
def test_moving_and_scaling_the_covariate_changes_nothing(adjust):
    epochs = data(7, [(90, 60), (30, 80)])
    moved = [[(1000 - 3 * x, y) for x, y in arms] for arms in epochs]
    here, there = (adjust(strata_of(e), scale_x=s, scale_y=0.1) for e, s in ((epochs, 1.0), (moved, 0.01)))
    for name in ("control_mean", "treatment_mean", "control_variance", "treatment_variance"):
        assert getattr(here, name) == pytest.approx(getattr(there, name), rel=1e-10)
    assert abs(here.control_loading) == pytest.approx(abs(there.control_loading), rel=1e-10)


@BOTH
def test_a_covariate_without_variance_leaves_the_means_unadjusted(adjust):
    epochs = data(8, [(80, 60), (40, 50)])
    strata = strata_of([[(np.full_like(x, 7), y) for x, y in arms] for arms in epochs])
    plain = summarise([Stratum(e.control.moments_y, e.treatment.moments_y) for e in strata], scale=1.0)
    found = adjust(strata, **ONES)
    for name in ArmMeans.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-13)


def test_ancova_needs_a_covariate_that_varies_in_both_arms():
    (arms,) = data(9, [(80, 60)])
    strata = strata_of([[arms[0], (np.full_like(arms[1][0], 7), arms[1][1])]])
    plain = summarise([Stratum(e.control.moments_y, e.treatment.moments_y) for e in strata], scale=1.0)
    assert ancova(strata, **ONES).treatment_variance == pytest.approx(plain.treatment_variance, rel=1e-13)
    assert cuped(strata, **ONES).treatment_loading != 0


@BOTH
def test_undetermined_like_the_plain_means(adjust):
    assert adjust([], **ONES) == Undetermined(TOO_FEW_UNITS)
    assert adjust(strata_of(data(10, [(24, 400)])), **ONES) == Undetermined(TOO_FEW_UNITS)
    exact = [[(x, 3 * x + 1) for x, _ in arms] for arms in data(11, [(40, 50)])]
    assert adjust(strata_of(exact), **ONES) == Undetermined(NO_VARIANCE)


def test_a_constant_effect_on_an_exact_outcome_keeps_the_guard():
    (arms,) = data(12, [(40, 50)])
    strata = strata_of([[(arms[0][0], arms[0][0]), (arms[1][0], arms[1][0] + 5)]])
    assert cuped(strata, **ONES).control_variance > 0


# ---- arrays and floats -------------------------------------------------------------------------------


def test_arrays_agree_with_the_scalar_functions():
    comparisons = [
        strata_of(data(s, sizes)) for s, sizes in ((1, [(50, 60), (30, 40)]), (2, [(9, 80), (70, 26)]))
    ]
    arms = [
        CrossArrays.of([getattr(e, name) for strata in comparisons for e in strata], (2, 2))
        for name in ("control", "treatment")
    ]
    for many, one in ((cuped_arrays, cuped), (ancova_arrays, ancova)):
        found = many(*arms, scale_x=[1.0, 0.5], scale_y=0.1)
        for i, scale in enumerate((1.0, 0.5)):
            assert found.at(i) == one(comparisons[i], scale_x=scale, scale_y=0.1)


def summary_of(moments):
    return CovariateSummary(
        n=moments.n,
        mean=moments.mean_y(1.0),
        variance=moments.variance_y(1.0),
        covariate_mean=moments.mean_x(1.0),
        covariate_variance=moments.variance_x(1.0),
        covariance=moments.covariance(**ONES),
    )


@pytest.mark.parametrize(("exact", "of"), [(cuped, cuped_of), (ancova, ancova_of)])
@pytest.mark.parametrize("guard", [True, False])
def test_summaries_agree_with_exact_moments(exact, of, guard):
    strata = strata_of(data(13, [(200, 40)], slopes=(1.0, 2.0)))
    arms = [summary_of(m) for m in (strata[0].control, strata[0].treatment)]
    found, expected = of(*arms, guard=guard), exact(strata, guard=guard, **ONES)
    for name in ArmMeans.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-11)


def test_stratified_summaries_agree_with_exact_moments():
    strata = strata_of(data(14, [(200, 40), (50, 70)]))
    arms = []
    for name in ("control", "treatment"):
        rows = [summary_of(getattr(e, name)) for e in strata]
        arms.append(
            CovariateSummary(**{f: [getattr(r, f) for r in rows] for f in CovariateSummary.__slots__})
        )
    for of, exact in ((cuped_of, cuped), (ancova_of, ancova)):
        found, expected = of(*arms, stratified=True), exact(strata, **ONES)
        for name in ArmMeans.__slots__:
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-11)


def test_a_trillion_units_keep_their_digits():
    n, big = 10**12, 10**9
    arm = CrossMoments(n, n * big, n * big, n * (big**2 + 100), n * (big**2 + 100), n * (big**2 + 60))
    for adjust in (cuped, ancova):
        means = adjust([CrossStratum(arm, arm)], **ONES)
        assert means.control_variance == pytest.approx((100 - 36) / n, rel=1e-9)
        assert means.control_mean == big


# ---- arguments ---------------------------------------------------------------------------------------

GOOD = {
    "n": 50,
    "mean": 1.0,
    "variance": 1.0,
    "covariate_mean": 0.0,
    "covariate_variance": 4.0,
    "covariance": 1.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": -1}, "n must not be negative"),
        ({"n": 2.5}, "n must be a whole number"),
        ({"mean": math.inf}, "mean must be finite"),
        ({"variance": -1.0}, "variance must not be negative"),
        ({"covariate_mean": math.nan}, "covariate_mean must be finite"),
        ({"covariate_variance": -4.0}, "covariate_variance must not be negative"),
        ({"covariance": 2.1}, "covariance must not exceed the square root"),
        ({"covariance": math.nan}, "covariance must be finite"),
    ],
)
def test_bad_summaries_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        CovariateSummary(**(GOOD | change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cuped([], scale_x=0.0, scale_y=1.0), "scale_x must be greater than 0"),
        (lambda: ancova([], scale_x=1.0, scale_y=1e101), "scale_y must lie between"),
        (
            lambda: cuped_of(CovariateSummary(**(GOOD | {"n": 0})), CovariateSummary(**GOOD)),
            "n must be at least",
        ),
        (
            lambda: ancova_of(CovariateSummary(**GOOD), CovariateSummary(**(GOOD | {"n": 0}))),
            "n must be at least",
        ),
        (
            lambda: cuped_of_summaries(
                CovariateSummary(**(GOOD | {"n": [1, 2]})), CovariateSummary(**(GOOD | {"n": [1, 2, 3]}))
            ),
            "control and treatment must have fields whose shapes broadcast",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
