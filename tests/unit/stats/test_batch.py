from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import (
    EMPTY,
    ArmMeans,
    Moments,
    Stratum,
    Undetermined,
    mean_difference,
    one_sided_rho2,
    one_sided_test,
    p_always_valid,
    relative_lift,
    summarise,
    tuned_rho2,
)
from stream_xp.stats.batch import (
    REASONS,
    ArmSummary,
    CrossArrays,
    MomentArrays,
    arm_means_of,
    mean_difference_arrays,
    means_of_summaries,
    one_sided_test_arrays,
    relative_lift_arrays,
    relative_lift_delta_arrays,
    rounded_moments,
    sum_over_epochs,
    summarise_arrays,
)
from stream_xp.stats.cross_moments import CrossMoments
from stream_xp.stats.mean_difference import relative_lift_delta

ALPHA = 0.05
RHO2 = tuned_rho2(1000, ALPHA)
SIDED = one_sided_rho2(1000, ALPHA)

VALUES = st.one_of(
    st.lists(st.integers(0, 1), max_size=60),
    st.lists(st.integers(-(10**6), 10**6), max_size=60),
    st.lists(st.integers(10**15, 10**15 + 50), max_size=40),
    st.lists(st.integers(-(10**25), 10**25), max_size=40),
)
EPOCHS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=4)


def strata_of(epochs):
    return [Stratum(Moments.from_values(c), Moments.from_values(t)) for c, t in epochs]


def arrays_of(comparisons):
    """Comparisons, each a list of strata, padded to one number of epochs."""
    longest = max(len(strata) for strata in comparisons)
    shape = (len(comparisons), longest)
    empty = Stratum(EMPTY, EMPTY)
    rows = [e for strata in comparisons for e in [*strata, *[empty] * (longest - len(strata))]]
    return MomentArrays.of([e.control for e in rows], shape), MomentArrays.of(
        [e.treatment for e in rows], shape
    )


def close(one, other):
    if isinstance(one, Undetermined) or isinstance(other, Undetermined):
        return one == other
    return one.n == other.n and all(
        getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-14, abs=1e-14 * size)
        for name in ("estimate", "lower", "upper", "log_e")
        for size in [max(1.0, *(abs(v) for v in (one.lower, one.upper) if math.isfinite(v)))]
    )


# ---- the same function as the scalar one --------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(EPOCHS, min_size=1, max_size=3), st.booleans(), st.sampled_from([1.0, 0.01, 1e-6]))
def test_summaries_agree_with_the_scalar_function(comparisons, guard, scale):
    strata = [strata_of(epochs) for epochs in comparisons]
    means = summarise_arrays(*arrays_of(strata), scale=scale, guard=guard)
    for i, one in enumerate(strata):
        expected, found = summarise(one, scale=scale, guard=guard), means.at(i)
        if isinstance(expected, Undetermined):
            assert found == expected
            continue
        assert found.n == expected.n
        if sum(bool(e.control.n and e.treatment.n) for e in one) == 1:
            assert found == expected
        size = max(abs(expected.control_mean), abs(expected.treatment_mean))
        for name in ("control_mean", "treatment_mean"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-14, abs=1e-14 * size)
        for name in ("control_variance", "treatment_variance"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-14)


def many_means(seed=1):
    rng = np.random.default_rng(seed)
    comparisons = []
    for epochs in (1, 2, 3, 1):
        sizes = rng.integers(10, 200, (epochs, 2))
        comparisons.append(
            [
                Stratum(*(Moments.from_values(rng.integers(-20, 60, n).tolist()) for n in pair))
                for pair in sizes.tolist()
            ]
        )
    comparisons.append([Stratum(Moments.from_values([5] * 40), Moments.from_values([5] * 40))])
    comparisons.append([Stratum(Moments.from_values([5] * 4), EMPTY)])
    comparisons.append([Stratum(*(Moments.from_values(rng.integers(-9, 10, 80).tolist()) for _ in "ab"))])
    means = summarise_arrays(*arrays_of(comparisons), scale=0.5)
    return means, [summarise(strata, scale=0.5) for strata in comparisons]


def test_evidence_agrees_with_the_scalar_functions():
    means, scalars = many_means()
    difference = mean_difference_arrays(means, alpha=ALPHA, rho2=RHO2)
    lift = relative_lift_arrays(means, alpha=ALPHA, rho2=RHO2)
    delta = relative_lift_delta_arrays(means, alpha=ALPHA, rho2=RHO2)
    for i, one in enumerate(scalars):
        for arrays, scalar in (
            (difference, mean_difference),
            (lift, relative_lift),
            (delta, relative_lift_delta),
        ):
            expected = one if isinstance(one, Undetermined) else scalar(one, alpha=ALPHA, rho2=RHO2)
            assert close(arrays.at(i), expected)
    assert len({REASONS[code] for code in lift.reason}) == 4


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize("margin", [0.0, -0.1, 0.3])
def test_one_sided_tests_agree_with_the_scalar_function(kind, side, margin):
    means, scalars = many_means()
    found = one_sided_test_arrays(means, margin=margin, margin_kind=kind, side=side, alpha=ALPHA, rho2=SIDED)
    rule = {"margin": margin, "margin_kind": kind, "side": side, "alpha": ALPHA, "rho2": SIDED}
    for i, one in enumerate(scalars):
        expected = one if isinstance(one, Undetermined) else one_sided_test(one, **rule)
        assert close(found.at(i), expected)


def test_rules_may_differ_by_element():
    means, scalars = many_means()
    n = len(scalars)
    alphas = np.linspace(0.01, 0.2, n)
    margins = np.linspace(-0.2, 0.2, n)
    kinds = np.array(["absolute", "relative"])[np.arange(n) % 2]
    sides = np.array(["above", "above", "below"])[np.arange(n) % 3]
    rates = one_sided_rho2(1000.0, alphas)
    found = one_sided_test_arrays(
        means, margin=margins, margin_kind=kinds, side=sides, alpha=alphas, rho2=rates
    )
    for i, one in enumerate(scalars):
        if isinstance(one, Undetermined):
            continue
        expected = one_sided_test(
            one,
            margin=margins[i],
            margin_kind=str(kinds[i]),
            side=str(sides[i]),
            alpha=alphas[i],
            rho2=rates[i],
        )
        assert close(found.at(i), expected)


def test_the_mirrored_control_mean_follows_the_scalar_sign():
    for mean in (-10.0, 10.0):
        arm = ArmSummary([400, 400], [mean, -mean], [1.0, 2.0])
        means = means_of_summaries(arm, ArmSummary([400, 400], [1.02 * mean, -mean], [1.0, 2.0]))
        for margin in (0.02, -0.02):
            rule = {
                "margin": margin,
                "margin_kind": "relative",
                "side": "above",
                "alpha": ALPHA,
                "rho2": SIDED,
            }
            found = one_sided_test_arrays(means, **rule)
            assert all(close(found.at(i), one_sided_test(means.at(i), **rule)) for i in (0, 1))


def test_leading_shapes_broadcast_and_empty_ones_work():
    control = MomentArrays([[[[100]]]], [[[[500]]]], [[[[4000]]]])
    rng = np.random.default_rng(2)
    n = rng.integers(50, 90, (2, 3, 4, 1))
    treatment = MomentArrays(n, 5 * n, 60 * n)
    means = summarise_arrays(control, treatment, scale=np.array([[[1.0], [0.1], [0.01]]]))
    assert means.n.shape == (2, 3, 4)
    one = Stratum(
        Moments(100, 500, 4000), Moments(int(n[1, 2, 3, 0]), *(int(v * n[1, 2, 3, 0]) for v in (5, 60)))
    )
    assert means.at((1, 2, 3)) == summarise([one], scale=0.01)
    nothing = MomentArrays(np.zeros((0, 2), int), np.zeros((0, 2), int), np.zeros((0, 2), int))
    assert summarise_arrays(nothing, nothing, scale=1.0).n.shape == (0,)


# ---- what is undetermined ----------------------------------------------------------------------------


def test_undetermined_elements_have_no_evidence_and_no_nan():
    means, scalars = many_means()
    lost = np.array([isinstance(one, Undetermined) for one in scalars])
    assert (means.undetermined == lost).all()
    assert np.isinf(means.control_variance[lost]).all()
    assert np.isfinite(means.control_mean).all()
    for found in (
        mean_difference_arrays(means, alpha=ALPHA, rho2=RHO2),
        relative_lift_arrays(means, alpha=ALPHA, rho2=RHO2),
        one_sided_test_arrays(
            means, margin=0.1, margin_kind="relative", side="above", alpha=ALPHA, rho2=SIDED
        ),
    ):
        gone = found.undetermined
        assert gone[lost].all()
        assert (found.log_e[gone] == 0).all()
        assert (found.lower[gone] == -np.inf).all()
        assert (found.upper[gone] == np.inf).all()
        assert (found.estimate[gone] == 0).all()
        assert (found.p_always_valid == p_always_valid(found.log_e)).all()
        assert not any(np.isnan(a).any() for a in (found.estimate, found.lower, found.upper, found.log_e))


def test_a_test_without_variance_is_undetermined():
    # Margin 100 % of a negative mean leaves the treatment mean alone, and that has no variance here.
    control = ArmSummary([100, 100], [-1.0, -1.0], [1.0, 1.0])
    treatment = ArmSummary([100, 100], [0.0, 0.0], [0.0, 1.0])
    means = means_of_summaries(control, treatment, guard=False)
    rule = {"margin": 1.0, "margin_kind": "relative", "side": "below", "alpha": ALPHA, "rho2": SIDED}
    found = one_sided_test_arrays(means, **rule)
    assert found.undetermined.tolist() == [True, False]
    assert found.at(0) == Undetermined("no unit differs from another")


# ---- exact integers ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(VALUES.filter(len), min_size=1, max_size=5))
def test_rounded_moments_are_the_nearest_floats(rows):
    moments = [Moments.from_values(values) for values in rows]
    mean, squares = rounded_moments(*([getattr(m, name) for m in moments] for name in ("n", "s", "q")))
    for i, m in enumerate(moments):
        assert mean[i] == float(Fraction(m.s, m.n))
        assert squares[i] == float(Fraction(m.n * m.q - m.s**2, m.n))


def test_numbers_do_not_depend_on_the_way_they_were_divided():
    # A huge row forces Python integers on the whole column.
    rng = np.random.default_rng(3)
    rows = [Moments.from_values(rng.integers(0, 10**6, 50).tolist()) for _ in range(8)]
    huge = Moments.from_values([10**30, 2 * 10**30] * 20)
    alone = summarise_arrays(MomentArrays.of(rows, (8, 1)), MomentArrays.of(rows[::-1], (8, 1)), scale=0.1)
    among = summarise_arrays(
        MomentArrays.of([*rows, huge], (9, 1)), MomentArrays.of([*rows[::-1], huge], (9, 1)), scale=0.1
    )
    assert all(alone.at(i) == among.at(i) for i in range(8))


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_sums_over_epochs_do_not_depend_on_their_order(terms, random):
    shuffled = random.sample(terms, len(terms))
    one, other = sum_over_epochs(np.array(terms)), sum_over_epochs(np.array(shuffled))
    assert one == other
    assert float(one) == pytest.approx(math.fsum(terms), rel=1e-15, abs=1e-12)
    assert sum_over_epochs(np.array([*terms, 0.0, 0.0])) == one


def test_a_trillion_units_stay_exact():
    n, big = 10**12, 10**9
    arm = Moments(n, n * big, n * (big * big + 10**6))
    arrays = MomentArrays.of([arm], (1, 1))
    means = summarise_arrays(arrays, arrays, scale=1e-3)
    assert means.at(0) == summarise([Stratum(arm, arm)], scale=1e-3)
    evidence = mean_difference_arrays(means, alpha=ALPHA, rho2=RHO2).at(0)
    assert evidence.estimate == 0.0
    assert math.isfinite(evidence.log_e)


# ---- summaries as floats -----------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.integers(-500, 500), min_size=25, max_size=40),
    st.lists(st.integers(0, 90), min_size=25, max_size=40),
)
def test_means_of_summaries_are_those_of_the_moments(control, treatment):
    moments = [Moments.from_values(values) for values in (control, treatment)]
    arms = [ArmSummary(m.n, m.mean(1.0), m.variance(1.0)) for m in moments]
    for guard in (True, False):
        expected, found = (
            summarise([Stratum(*moments)], scale=1.0, guard=guard),
            arm_means_of(*arms, guard=guard),
        )
        if isinstance(expected, Undetermined):
            assert found == expected
            continue
        for name in ArmMeans.__slots__:
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12, abs=1e-12)


def test_stratified_summaries_are_those_of_the_moments():
    rng = np.random.default_rng(4)
    strata = [
        Stratum(*(Moments.from_values(rng.integers(0, 90, n).tolist()) for n in sizes))
        for sizes in ((40, 20), (30, 90), (1, 5))
    ]
    arms = []
    for name in ("control", "treatment"):
        parts = [getattr(e, name) for e in strata]
        variances = [m.variance(1.0) if m.n > 1 else 0.0 for m in parts]
        arms.append(ArmSummary([m.n for m in parts], [m.mean(1.0) for m in parts], variances))
    found, expected = arm_means_of(*arms, stratified=True), summarise(strata, scale=1.0)
    for name in ArmMeans.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)


def test_few_units_in_a_summary_are_undetermined():
    small, large = ArmSummary(24, 1.0, 1.0), ArmSummary(400, 1.0, 1.0)
    assert arm_means_of(small, large) == Undetermined("an arm has fewer than 25 units")
    grid = means_of_summaries(ArmSummary(np.arange(0, 100, 5), 1.0, 1.0), large)
    assert grid.undetermined.tolist() == [n < 25 for n in range(0, 100, 5)]


# ---- price -------------------------------------------------------------------------------------------


def test_sixty_thousand_comparisons_take_less_than_a_second():
    rng = np.random.default_rng(5)
    size = 60_000
    n, mean = rng.integers(1000, 10**5, (2, size, 1)), rng.integers(1, 10**4, (2, size, 1))
    s = n * mean
    arms = [MomentArrays(n[a], s[a], s[a] * mean[a] + n[a] * 999) for a in (0, 1)]
    rule = {"margin": -0.02, "margin_kind": "relative", "alpha": ALPHA, "rho2": SIDED}
    start = time.process_time()
    means = summarise_arrays(*arms, scale=0.01)
    mean_difference_arrays(means, alpha=ALPHA, rho2=RHO2)
    relative_lift_arrays(means, alpha=ALPHA, rho2=RHO2)
    for side in ("above", "below"):
        one_sided_test_arrays(means, side=side, **rule)
    # About 0.15 s on an idle core; room for a busy one.
    assert time.process_time() - start < 1.0


# ---- arguments ---------------------------------------------------------------------------------------

ONE = MomentArrays([100], [500], [4000])
MEANS = means_of_summaries(ArmSummary([100, 100], 1.0, 1.0), ArmSummary([100, 100], 2.0, 1.0))


def sided(**changes):
    rule = {"margin": 0.0, "margin_kind": "absolute", "side": "above", "alpha": ALPHA, "rho2": SIDED}
    return one_sided_test_arrays(MEANS, **(rule | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MomentArrays([1.5], [1], [1]), "n must hold Python ints only"),
        (lambda: MomentArrays([1], np.array([1.0]), [1]), "s must hold whole numbers, its type is float64"),
        (lambda: MomentArrays([1], [1, 2], [1]), r"s must have the shape of n \(1,\), got \(2,\)"),
        (lambda: MomentArrays([-1], [0], [0]), "n must not be negative"),
        (lambda: MomentArrays([2**53], [0], [0]), r"n must be below 2\*\*53"),
        (lambda: MomentArrays([0], [0], [1]), "every sum must be 0 where n is 0"),
        (lambda: MomentArrays([2], [3], [4]), r"q must satisfy n\*q >= s\*s"),
        (lambda: MomentArrays([2], [3 * 10**30], [4 * 10**60]), r"q must satisfy n\*q >= s\*s"),
        (lambda: MomentArrays.of([EMPTY], (2, 1)), r"rows must fill the shape \(2, 1\), there are 1"),
        (lambda: CrossArrays([2], [3], [0], [4], [0], [0]), r"sxx must satisfy n\*sxx >= sx\*sx"),
        (lambda: CrossArrays([2], [0], [3], [0], [4], [0]), r"syy must satisfy n\*syy >= sy\*sy"),
        (lambda: CrossArrays([2], [0], [0], [2], [2], [3]), "sxy must satisfy"),
        (
            lambda: CrossArrays([2], [0], [0], [2 * 10**30], [2 * 10**30], [2 * 10**30 + 1]),
            "sxy must satisfy",
        ),
        (lambda: CrossArrays([0], [0], [0], [0], [0], [3]), "every sum must be 0 where n is 0"),
        (lambda: rounded_moments([0], [0], [0]), "n must be at least 1"),
        (lambda: rounded_moments([1], [10**400], [10**800]), "s and q must give a mean"),
        (lambda: summarise_arrays(ONE, MomentArrays([1] * 3, [0] * 3, [0] * 3), scale=0.0), "scale must be"),
        (lambda: summarise_arrays(ONE, ONE, scale=1e101), "scale must lie between"),
        (lambda: summarise_arrays(ONE, ONE, scale=[1.0, 2.0]), "scale must broadcast to the shape"),
        (
            lambda: summarise_arrays(
                MomentArrays([1, 1], [0, 0], [0, 0]), MomentArrays([1] * 3, [0] * 3, [0] * 3), scale=1.0
            ),
            "control and treatment must have shapes that broadcast",
        ),
        (
            lambda: summarise_arrays(
                *[MomentArrays(*(np.array(v, dtype=object) for v in (5, 5, 5)))] * 2, scale=1.0
            ),
            "control and treatment must end in an axis of weight epochs",
        ),
        (
            lambda: summarise_arrays(*[MomentArrays([30], [0], [10**300])] * 2, scale=1e100),
            "variance must be finite",
        ),
        (lambda: mean_difference_arrays(MEANS, alpha=1.0, rho2=1.0), "alpha must lie strictly"),
        (lambda: mean_difference_arrays(MEANS, alpha=[0.1] * 3, rho2=1.0), "alpha must broadcast"),
        (lambda: relative_lift_arrays(MEANS, alpha=0.1, rho2=0.0), "rho2 must be greater than 0"),
        (lambda: sided(margin=math.nan), "margin must be finite"),
        (lambda: sided(margin=[0.0, -1.0], margin_kind="relative"), "margin must be greater than -1"),
        (lambda: sided(margin_kind="percent"), "margin_kind must be 'absolute' or 'relative'"),
        (lambda: sided(margin_kind=1), "margin_kind must be 'absolute' or 'relative'"),
        (lambda: sided(side=["above", "up"]), "side must be 'above' or 'below'"),
        (lambda: sided(side=["above"] * 3), r"side must broadcast to the shape \(2,\)"),
        (lambda: ArmSummary(-1, 0.0, 1.0), "n must not be negative"),
        (lambda: ArmSummary(1.5, 0.0, 1.0), "n must be a whole number"),
        (lambda: ArmSummary(2.0**53, 0.0, 1.0), r"n must be below 2\*\*53"),
        (lambda: ArmSummary(10, math.nan, 1.0), "mean must be finite"),
        (lambda: ArmSummary(10, 0.0, -1.0), "variance must not be negative"),
        (lambda: arm_means_of(ArmSummary(0, 0.0, 0.0), ArmSummary(50, 0.0, 1.0)), "n must be at least 1"),
        (
            lambda: means_of_summaries(ArmSummary([1, 2], 0.0, 1.0), ArmSummary([1, 2, 3], 0.0, 1.0)),
            "control and treatment must have fields whose shapes broadcast",
        ),
        (
            lambda: means_of_summaries(ArmSummary(30, 0.0, 1.0), ArmSummary(30, 0.0, 1.0), stratified=True),
            "control and treatment must end in an axis of weight epochs",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cross_arrays_take_their_rows_from_cross_moments():
    rows = [CrossMoments.from_pairs([(i, 2 * i), (3, -i)]) for i in range(4)]
    arrays = CrossArrays.of(rows, (2, 2))
    assert [arrays.sxy[i, j] for i in (0, 1) for j in (0, 1)] == [m.sxy for m in rows]
