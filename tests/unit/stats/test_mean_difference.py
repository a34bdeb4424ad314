from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import (
    EMPTY,
    ArmMeans,
    Evidence,
    Moments,
    Stratum,
    Undetermined,
    fieller_bounds,
    guarded_variance,
    log_e_one_sided,
    mean_difference,
    one_sided_rho2,
    one_sided_test,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
    relative_lift,
    summarise,
    tuned_rho2,
)
from stream_xp.stats.batch import MeansArrays, excess_arrays
from stream_xp.stats.mean_difference import (
    NO_VARIANCE,
    TOO_FEW_UNITS,
    UNBOUNDED_LIFT,
    relative_lift_delta,
)

ALPHA = 0.05
RHO2 = tuned_rho2(1000, ALPHA)
SIDED = one_sided_rho2(1000, ALPHA)
ARM = st.lists(st.integers(-(10**6), 10**6), min_size=25, max_size=40)
MEANS = st.builds(
    ArmMeans,
    control_mean=st.floats(-100, 100).filter(lambda m: abs(m) > 1e-3),
    treatment_mean=st.floats(-100, 100),
    control_variance=st.floats(1e-6, 1e3),
    treatment_variance=st.floats(1e-6, 1e3),
    n=st.integers(50, 10**9),
)


def stratum(control, treatment):
    return Stratum(Moments.from_values(control), Moments.from_values(treatment))


def one_sided(means, **changes):
    arguments = {"margin": 0.0, "margin_kind": "absolute", "side": "above", "alpha": ALPHA, "rho2": SIDED}
    return one_sided_test(means, **(arguments | changes))


def strata_of(seed, sizes, *, shift=0):
    rng = np.random.default_rng(seed)
    return [
        stratum(rng.integers(0, 1000, c).tolist(), (rng.integers(0, 1000, t) + shift).tolist())
        for c, t in sizes
    ]


# ---- summarise ---------------------------------------------------------------------------------------


def plain_guard(own, pooled, degrees):
    return max(own, (degrees * own + 200 * pooled) / (degrees + 200))


@settings(deadline=None)
@given(ARM, ARM)
def test_one_epoch_is_exactly_the_guarded_two_sample_summary(control, treatment):
    one = stratum(control, treatment)
    means = summarise([one], scale=0.01)
    both = one.control + one.treatment
    if both.variance(0.01) == 0:
        assert means == Undetermined(NO_VARIANCE)
        return
    pooled = both.variance(0.01)
    for mean, variance, arm in (
        (means.control_mean, means.control_variance, one.control),
        (means.treatment_mean, means.treatment_variance, one.treatment),
    ):
        assert mean == arm.mean(0.01)
        assert variance == plain_guard(arm.variance(0.01), pooled, arm.n - 1) / arm.n
    assert means.n == both.n


@pytest.mark.parametrize("growth", [1, 6])
def test_strata_follow_the_formula(variance_of_mean, growth):
    rng = np.random.default_rng(1)
    sizes = [(300, 20), (150, 150), (90, 10)]
    strata = [
        stratum(*((rng.standard_normal(n) * 40 * growth**e).round().astype(int).tolist() for n in pair))
        for e, pair in enumerate(sizes)
    ]
    means = summarise(strata, scale=0.5)
    both = [e.control + e.treatment for e in strata]
    total = sum(m.n for m in both)
    pooled = sum(map(squares, both)) / (total - 3)
    for name in ("control", "treatment"):
        arms = [getattr(e, name) for e in strata]
        degrees = sum(m.n - 1 for m in arms)
        own = sum(map(squares, arms)) / degrees
        mean = sum(Fraction(m.n * a.s, a.n) for m, a in zip(both, arms, strict=True)) / total
        variance = variance_of_mean(
            [m.n for m in arms],
            [m.n for m in both],
            own=[*map(squares, arms)],
            both=[*map(squares, both)],
            unit=float(max(own, (degrees * own + 200 * pooled) / (degrees + 200))),
        )
        assert getattr(means, f"{name}_mean") == pytest.approx(float(mean * Fraction(1, 2)), rel=1e-12)
        assert getattr(means, f"{name}_variance") == pytest.approx(variance / 4, rel=1e-12)


def squares(moments):
    return Fraction(moments.n * moments.q - moments.s**2, moments.n)


def test_a_spread_that_grows_after_an_arm_got_its_units_is_seen():
    # Nearly all of treatment's units come early, its few late ones carry most of the variance of its mean.
    rng = np.random.default_rng(5)
    sizes, sds = [(500, 500), (950, 50)], (10, 100)
    strata = [
        stratum(*((rng.standard_normal(n) * sd).round().astype(int).tolist() for n in pair))
        for sd, pair in zip(sds, sizes, strict=True)
    ]
    means = summarise(strata, scale=1.0)
    true = sum(0.25 * sd**2 / n for sd, (_, n) in zip(sds, sizes, strict=True))
    pooled_over_epochs = 0.25 * (500 * 10**2 + 50 * 100**2) / 550 * (1 / 500 + 1 / 50)
    assert pooled_over_epochs < 0.3 * true
    assert 0.7 * true < means.treatment_variance < 1.5 * true


@settings(deadline=None)
@given(st.permutations(range(4)))
def test_the_order_of_epochs_does_not_matter(order):
    strata = strata_of(2, [(40, 30), (5, 60), (7, 7), (100, 3)])
    assert summarise([strata[i] for i in order], scale=0.1) == summarise(strata, scale=0.1)


def test_partitions_merge_before_the_summary():
    halves = strata_of(3, [(40, 30), (50, 60)])
    whole = Stratum(halves[0].control + halves[1].control, halves[0].treatment + halves[1].treatment)
    swapped = Stratum(halves[1].control + halves[0].control, halves[1].treatment + halves[0].treatment)
    assert summarise([whole], scale=1.0) == summarise([swapped], scale=1.0)


def test_epochs_with_an_empty_arm_are_skipped():
    strata = strata_of(4, [(40, 30)])
    idle = Stratum(Moments.from_values([5] * 9), EMPTY)
    assert summarise([idle, *strata, Stratum(EMPTY, EMPTY)], scale=1.0) == summarise(strata, scale=1.0)


def test_stratification_removes_simpsons_paradox():
    low, high = [0, 1] * 50, [100, 101] * 50
    strata = [stratum(low * 9, low), stratum(high, high * 9)]
    means = summarise(strata, scale=1.0)
    assert means.treatment_mean == pytest.approx(means.control_mean, abs=1e-12)
    pooled = Stratum(strata[0].control + strata[1].control, strata[0].treatment + strata[1].treatment)
    confounded = summarise([pooled], scale=1.0)
    assert confounded.treatment_mean - confounded.control_mean > 50


@pytest.mark.parametrize(
    ("sizes", "enough"),
    [
        ([(25, 25)], True),
        ([(24, 400)], False),
        ([(400, 24)], False),
        ([(20, 400), (7, 400)], True),
        ([(20, 400), (6, 400)], False),
        ([], False),
    ],
)
def test_nothing_is_reported_before_25(sizes, enough):
    result = summarise(strata_of(5, sizes), scale=1.0)
    assert isinstance(result, ArmMeans) if enough else result == Undetermined(TOO_FEW_UNITS)


def test_no_variance_is_undetermined():
    assert summarise([stratum([3] * 30, [3] * 30)], scale=1.0) == Undetermined(NO_VARIANCE)
    apart = [stratum([0] * 30, [1] * 30)]
    assert isinstance(summarise(apart, scale=1.0), ArmMeans)
    assert summarise(apart, scale=1.0, guard=False) == Undetermined(NO_VARIANCE)


def test_the_guard_only_widens():
    strata = strata_of(6, [(3000, 40)])
    on, off = (summarise(strata, scale=1.0, guard=g) for g in (True, False))
    assert on.control_variance >= off.control_variance
    assert on.treatment_variance >= off.treatment_variance
    assert off.treatment_variance == strata[0].treatment.variance(1.0) / 40


def test_guard_formula():
    assert guarded_variance(1.0, 4.0, degrees=50) == (50 * 1 + 200 * 4) / 250
    assert guarded_variance(5.0, 4.0, degrees=50) == 5.0
    assert guarded_variance(np.array([1.0, 5.0]), 4.0, degrees=50).tolist() == [3.4, 5.0]


def test_a_trillion_units_of_large_values():
    n, big = 10**12, 10**15
    arm = Moments(n, n * big, n * (big * big + 10**6))
    means = summarise([Stratum(arm, arm)], scale=1e-3)
    assert means.control_variance == pytest.approx(1e6 * 1e-6 / n, rel=1e-9)
    assert mean_difference(means, alpha=ALPHA, rho2=RHO2).estimate == 0.0


# ---- difference and lift -----------------------------------------------------------------------------


@settings(deadline=None)
@given(MEANS)
def test_difference_is_the_kernel_and_dual_to_its_test(means):
    evidence = mean_difference(means, alpha=ALPHA, rho2=RHO2)
    half = math.sqrt(means.control_variance + means.treatment_variance) * radius_multiplier_two_sided(
        means.n * RHO2, ALPHA
    )
    assert evidence.estimate == means.treatment_mean - means.control_mean
    assert (evidence.lower, evidence.upper) == (evidence.estimate - half, evidence.estimate + half)
    if abs(abs(evidence.estimate) - half) > 1e-9 * half:
        outside = not evidence.lower <= 0 <= evidence.upper
        assert (evidence.log_e >= math.log(1 / ALPHA)) == outside


@settings(deadline=None)
@given(MEANS)
def test_swapping_the_arms_mirrors_the_difference(means):
    swapped = ArmMeans(
        means.treatment_mean, means.control_mean, means.treatment_variance, means.control_variance, means.n
    )
    here, there = (mean_difference(m, alpha=ALPHA, rho2=RHO2) for m in (means, swapped))
    assert (there.estimate, there.lower, there.upper) == (-here.estimate, -here.upper, -here.lower)
    assert there.log_e == here.log_e


@settings(deadline=None)
@given(MEANS)
def test_lift_holds_exactly_the_ratios_that_are_not_rejected(means):
    evidence = relative_lift(means, alpha=ALPHA, rho2=RHO2)
    c = radius_multiplier_two_sided(means.n * RHO2, ALPHA)
    if isinstance(evidence, Undetermined):
        assert evidence.reason == UNBOUNDED_LIFT
        assert abs(means.control_mean) <= c * math.sqrt(means.control_variance) * (1 + 1e-9)
        return
    assert evidence.lower < evidence.estimate < evidence.upper
    size = abs(means.control_mean)
    slack = 1e-6 * (evidence.upper - evidence.lower)
    for lift, inside in (
        (evidence.lower - slack, False),
        (evidence.lower + slack, True),
        (evidence.upper - slack, True),
        (evidence.upper + slack, False),
    ):
        excess = means.treatment_mean - means.control_mean - lift * size
        factor = 1 + lift * math.copysign(1, means.control_mean)
        variance = means.treatment_variance + factor**2 * means.control_variance
        assert (excess**2 <= c**2 * variance) == inside


@settings(deadline=None)
@given(MEANS)
def test_lift_and_difference_agree_on_sign_and_evidence(means):
    lift = relative_lift(means, alpha=ALPHA, rho2=RHO2)
    if isinstance(lift, Undetermined):
        return
    difference = mean_difference(means, alpha=ALPHA, rho2=RHO2)
    assert lift.log_e == difference.log_e
    assert math.copysign(1, lift.estimate) == math.copysign(1, difference.estimate)
    if abs(difference.log_e - math.log(1 / ALPHA)) > 1e-6:
        assert (lift.lower > 0) == (difference.lower > 0)
        assert (lift.upper < 0) == (difference.upper < 0)


@settings(deadline=None)
@given(MEANS)
def test_mirroring_the_metric_mirrors_the_lift(means):
    mirrored = replace(means, control_mean=-means.control_mean, treatment_mean=-means.treatment_mean)
    here, there = (relative_lift(m, alpha=ALPHA, rho2=RHO2) for m in (means, mirrored))
    if isinstance(here, Undetermined):
        assert there == here
        return
    assert (there.estimate, there.lower, there.upper) == (-here.estimate, -here.upper, -here.lower)


def test_lift_does_not_depend_on_the_unit_of_the_metric():
    strata = strata_of(7, [(400, 300)], shift=50)
    pence, pounds = (relative_lift(summarise(strata, scale=s), alpha=ALPHA, rho2=RHO2) for s in (1.0, 0.01))
    assert (pence.lower, pence.upper) == pytest.approx((pounds.lower, pounds.upper), rel=1e-12)


@pytest.mark.parametrize("control_mean", [0.0, 1e-3, 1e-320, -1e-3])
def test_a_control_mean_near_zero_leaves_the_lift_undetermined(control_mean):
    means = ArmMeans(control_mean, 1.0, 0.01, 0.01, 1000)
    assert relative_lift(means, alpha=ALPHA, rho2=RHO2) == Undetermined(UNBOUNDED_LIFT)


def test_fieller_bounds_broadcast_and_are_never_nan():
    lower, upper, bounded = fieller_bounds(
        control_mean=np.array([0.0, 1.0, -1.0, 1e-320, 1e300]),
        control_variance=np.array([[0.01], [0.0]]),
        treatment_mean=1.0,
        treatment_variance=0.01,
        multiplier=3.0,
    )
    assert lower.shape == upper.shape == bounded.shape == (2, 5)
    assert not np.isnan(lower).any()
    assert not np.isnan(upper).any()
    assert bounded.tolist() == [[False, True, True, False, True], [False, True, True, False, True]]
    assert (np.isfinite(lower) == bounded).all()


# ---- one-sided tests ---------------------------------------------------------------------------------


def test_absolute_margin_is_taken_off_the_effect():
    means = ArmMeans(10.0, 10.5, 0.01, 0.02, 1000)
    evidence = one_sided(means, margin=-0.25)
    radius = math.sqrt(0.03) * radius_multiplier_one_sided(1000 * SIDED, ALPHA)
    assert evidence == Evidence(0.75, 0.75 - radius, math.inf, evidence.log_e, 1000)


def test_relative_margin_is_the_linear_combination_with_its_own_variance():
    means = ArmMeans(10.0, 10.5, 0.01, 0.02, 1000)
    evidence = one_sided(means, margin=0.02, margin_kind="relative", side="below")
    radius = math.sqrt(0.02 + 1.02**2 * 0.01) * radius_multiplier_one_sided(1000 * SIDED, ALPHA)
    assert evidence.estimate == pytest.approx(10.5 - 1.02 * 10.0, rel=1e-12)
    assert (evidence.lower, evidence.upper) == (-math.inf, pytest.approx(evidence.estimate + radius))


@pytest.mark.parametrize("margin", [0.5, -0.5])
def test_relative_margin_of_a_control_mean_of_0_has_the_larger_variance(margin):
    means = ArmMeans(0.0, 1.0, 0.04, 0.09, 1000)
    found = one_sided(means, margin=margin, margin_kind="relative")
    se = math.sqrt(0.09 + 1.5**2 * 0.04)
    assert found.log_e == pytest.approx(log_e_one_sided(1.0 / se, 1000 * SIDED), rel=1e-12)
    arrays = MeansArrays(*(np.array([v]) for v in (0.0, 1.0, 0.04, 0.09, 1000.0)), np.zeros(1, np.int8))
    excess, variance = excess_arrays(arrays, margin=margin, margin_kind="relative")
    assert (excess[0], variance[0]) == (1.0, pytest.approx(se**2))


def test_relative_margin_of_a_negative_mean_is_a_share_of_its_size():
    # Profit falls from -10.0 to -10.5: 5 % of its size, beyond a margin of 2 % below.
    evidence = one_sided(
        ArmMeans(-10.0, -10.5, 1e-4, 1e-4, 1000), margin=-0.02, margin_kind="relative", side="below"
    )
    assert evidence.estimate == pytest.approx(-0.3)
    assert evidence.upper < 0
    assert evidence.log_e > math.log(1 / ALPHA)
    factor = 1.02
    radius = math.sqrt(1e-4 + factor**2 * 1e-4) * radius_multiplier_one_sided(1000 * SIDED, ALPHA)
    assert evidence.upper == pytest.approx(evidence.estimate + radius)


@settings(deadline=None)
@given(
    MEANS,
    st.floats(-0.9, 3.0),
    st.sampled_from(["absolute", "relative"]),
    st.sampled_from(["above", "below"]),
)
def test_one_sided_tests_are_dual_to_their_sequences(means, margin, kind, side):
    evidence = one_sided(means, margin=margin, margin_kind=kind, side=side)
    bound = evidence.lower if side == "above" else -evidence.upper
    if abs(bound) > 1e-7 * abs(bound - abs(evidence.estimate)):
        assert (evidence.log_e >= math.log(1 / ALPHA)) == (bound > 0)


@settings(deadline=None)
@given(MEANS, st.floats(-0.9, 0.9), st.sampled_from(["absolute", "relative"]))
def test_mirroring_metric_and_margin_swaps_the_sides(means, margin, kind):
    mirrored = replace(means, control_mean=-means.control_mean, treatment_mean=-means.treatment_mean)
    above = one_sided(means, margin=margin, margin_kind=kind, side="above")
    below = one_sided(mirrored, margin=-margin, margin_kind=kind, side="below")
    assert (below.estimate, below.upper) == (-above.estimate, -above.lower)
    assert below.log_e == above.log_e


def test_the_four_usual_choices_point_the_right_way():
    better = ArmMeans(10.0, 11.0, 1e-3, 1e-3, 5000)
    worse = ArmMeans(10.0, 9.0, 1e-3, 1e-3, 5000)
    threshold = math.log(1 / ALPHA)
    # Larger is better: no worse than 2 %, then harm beyond 2 %.
    assert one_sided(better, margin=-0.02, margin_kind="relative", side="above").log_e > threshold
    assert one_sided(worse, margin=-0.02, margin_kind="relative", side="above").log_e < 0
    assert one_sided(worse, margin=-0.02, margin_kind="relative", side="below").log_e > threshold
    assert one_sided(better, margin=-0.02, margin_kind="relative", side="below").log_e < 0
    # Smaller is better: the same two.
    assert one_sided(worse, margin=0.02, margin_kind="relative", side="below").log_e > threshold
    assert one_sided(better, margin=0.02, margin_kind="relative", side="above").log_e > threshold


# ---- arguments ---------------------------------------------------------------------------------------

GOOD = ArmMeans(1.0, 1.0, 0.1, 0.1, 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarise([], scale=0.0), "scale must lie between"),
        (lambda: guarded_variance(-1.0, 1.0, degrees=3), "variance must not be negative"),
        (lambda: guarded_variance(1.0, math.nan, degrees=3), "pooled must be finite"),
        (lambda: guarded_variance(1.0, 1.0, degrees=-1), "degrees must not be negative"),
        (lambda: mean_difference(GOOD, alpha=0.0, rho2=1.0), "alpha must lie strictly between 0 and 1"),
        (lambda: mean_difference(GOOD, alpha=0.1, rho2=0.0), "rho2 must be greater than 0"),
        (lambda: relative_lift(GOOD, alpha=2.0, rho2=1.0), "alpha must lie strictly between 0 and 1"),
        (lambda: one_sided(GOOD, margin=math.nan), "margin must be finite"),
        (lambda: one_sided(GOOD, margin=-1.0, margin_kind="relative"), "margin must be greater than -1"),
        (lambda: one_sided(GOOD, margin_kind="percent"), "margin_kind must be 'absolute' or 'relative'"),
        (lambda: one_sided(GOOD, side="up"), "side must be 'above' or 'below'"),
        (lambda: replace(GOOD, control_mean=math.nan), "control_mean must be finite"),
        (lambda: replace(GOOD, treatment_variance=-1.0), "must not be negative"),
        (lambda: replace(GOOD, control_variance=0.0, treatment_variance=0.0), "must not both be 0"),
        (lambda: replace(GOOD, n=0), "n must be at least 1"),
        (
            lambda: fieller_bounds(
                control_mean=1.0,
                control_variance=1.0,
                treatment_mean=1.0,
                treatment_variance=1.0,
                multiplier=0.0,
            ),
            "multiplier must be greater than 0",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- means that share an error -----------------------------------------------------------------------

SHARED = st.builds(
    replace,
    MEANS,
    control_loading=st.floats(-20, 20),
    treatment_loading=st.floats(-20, 20),
)


def excess_and_variance(means, lift):
    factor = 1 + lift * math.copysign(1, means.control_mean)
    shared = means.treatment_loading - factor * means.control_loading
    variance = means.treatment_variance + factor**2 * means.control_variance + shared**2
    return means.treatment_mean - factor * means.control_mean, variance


@settings(deadline=None)
@given(SHARED)
def test_a_shared_error_counts_as_it_is_loaded(means):
    difference = mean_difference(means, alpha=ALPHA, rho2=RHO2)
    half = math.sqrt(excess_and_variance(means, 0.0)[1]) * radius_multiplier_two_sided(means.n * RHO2, ALPHA)
    assert difference.upper - difference.estimate == pytest.approx(half, rel=1e-12, abs=1e-12)
    test = one_sided(means, margin=0.1, margin_kind="relative")
    excess, variance = excess_and_variance(means, 0.1)
    radius = math.sqrt(variance) * radius_multiplier_one_sided(means.n * SIDED, ALPHA)
    assert test.estimate == pytest.approx(excess, rel=1e-9, abs=1e-9)
    assert test.lower == pytest.approx(excess - radius, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(SHARED)
def test_lift_of_means_with_a_shared_error_holds_exactly_what_is_not_rejected(means):
    evidence = relative_lift(means, alpha=ALPHA, rho2=RHO2)
    c = radius_multiplier_two_sided(means.n * RHO2, ALPHA)
    noise = math.hypot(math.sqrt(means.control_variance), means.control_loading)
    if isinstance(evidence, Undetermined):
        assert abs(means.control_mean) <= c * noise * (1 + 1e-9)
        return
    slack = 1e-5 * (evidence.upper - evidence.lower)
    for lift, inside in (
        (evidence.lower - slack, False),
        (evidence.lower + slack, True),
        (evidence.upper - slack, True),
        (evidence.upper + slack, False),
    ):
        excess, variance = excess_and_variance(means, lift)
        assert (excess**2 <= c**2 * variance) == inside


def test_an_error_that_both_share_alike_is_no_error_of_the_difference():
    plain = ArmMeans(10.0, 11.0, 0.1, 0.2, 500)
    shared = replace(plain, control_loading=4.0, treatment_loading=4.0)
    rule = {"alpha": ALPHA, "rho2": RHO2}
    assert mean_difference(shared, **rule) == mean_difference(plain, **rule)
    assert relative_lift(shared, **rule) == Undetermined(UNBOUNDED_LIFT)


# ---- lift by the delta method ------------------------------------------------------------------------


@settings(deadline=None)
@given(SHARED)
def test_delta_lift_is_the_kernel_on_the_linearised_lift_and_dual(means):
    evidence = relative_lift_delta(means, alpha=ALPHA, rho2=RHO2)
    size, ratio = abs(means.control_mean), means.treatment_mean / means.control_mean
    shared = (means.treatment_loading - ratio * means.control_loading) ** 2
    variance = (
        means.treatment_variance / size**2 + means.control_variance * ratio**2 / size**2 + shared / size**2
    )
    half = math.sqrt(variance) * radius_multiplier_two_sided(means.n * RHO2, ALPHA)
    assert evidence.estimate == pytest.approx((means.treatment_mean - means.control_mean) / size, rel=1e-12)
    assert evidence.upper - evidence.lower == pytest.approx(2 * half, rel=1e-9)
    if abs(abs(evidence.estimate) - half) > 1e-9 * half:
        outside = not evidence.lower <= 0 <= evidence.upper
        assert (evidence.log_e >= math.log(1 / ALPHA)) == outside


def test_delta_and_fieller_agree_once_the_control_mean_is_certain():
    means = ArmMeans(10.0, 10.5, 1e-8, 1e-8, 10**6)
    fieller, delta = (f(means, alpha=ALPHA, rho2=RHO2) for f in (relative_lift, relative_lift_delta))
    assert (delta.lower, delta.upper) == pytest.approx((fieller.lower, fieller.upper), rel=1e-6)


@pytest.mark.parametrize("control_mean", [0.0, 5e-324, -1e-320])
def test_delta_lift_of_a_control_mean_of_zero_is_undetermined(control_mean):
    means = ArmMeans(control_mean, 1.0, 0.01, 0.01, 1000)
    assert relative_lift_delta(means, alpha=ALPHA, rho2=RHO2) == Undetermined(UNBOUNDED_LIFT)


def test_extreme_standardised_effects_saturate():
    means = ArmMeans(0.0, 1e300, 1e-320, 1e-320, 10**12)
    assert math.isfinite(mean_difference(means, alpha=ALPHA, rho2=RHO2).log_e)
    assert math.isfinite(one_sided(means, side="below").log_e)


@pytest.mark.parametrize("name", ["control_loading", "treatment_loading"])
def test_a_loading_that_is_not_finite_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        replace(GOOD, **{name: math.inf})
    with pytest.raises(ValueError, match="alpha must lie"):
        relative_lift_delta(GOOD, alpha=0.0, rho2=1.0)
    with pytest.raises(ValueError, match="rho2 must be greater than 0"):
        relative_lift_delta(replace(GOOD, control_mean=0.0), alpha=0.1, rho2=0.0)
