from __future__ import annotations

import math
import time

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from stream_xp.stats.conversion_difference import (
    DEFAULT_GRID,
    NO_COMMON_EPOCH,
    NO_SUCCESSES,
    RARE_GRID,
    ConversionDifference,
    RateGrid,
    conversion_difference,
    conversion_log_e,
    pair_weights,
    success_ratio,
    success_ratio_log_e,
)
from stream_xp.stats.normal_mixture import Undetermined

SIDES = ("both", "above", "below")
RAMP = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]]
UNITS = [[900, 100], [700, 310], [512, 498]]
SUCCESSES = [[91, 14], [210, 102], [255, 273]]


def signed(grid, side):
    signs = {"both": (1, -1), "above": (1,), "below": (-1,)}[side]
    return [(base, sign * effect) for base in grid.bases for sign in signs for effect in grid.effects]


def exact_log_e(units, successes, weights, side, grid=DEFAULT_GRID):
    """The reference formula, point by point, in 40 digits."""
    with mpmath.workdps(40):
        logs = []
        for base, effect in signed(grid, side):
            total = mpmath.mpf(0)
            for n, s, w in zip(units, successes, weights, strict=True):
                rho = [mpmath.mpf(v) for v in w]
                odds = [base - effect * rho[1], base + effect * rho[0]]
                theta = [1 / (1 + mpmath.exp(-v)) for v in odds]
                mean = sum(r * t for r, t in zip(rho, theta, strict=True))
                for arm in range(2):
                    wins, fails = int(s[arm]), int(n[arm]) - int(s[arm])
                    total += wins * mpmath.log(theta[arm] / mean)
                    total += fails * mpmath.log((1 - theta[arm]) / (1 - mean))
            logs.append(total)
        top = max(logs)
        return float(top + mpmath.log(sum(mpmath.exp(v - top) for v in logs) / len(logs)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scale", [1, 10**9])
def test_the_log_e_value_is_the_reference_formula(side, scale):
    units, successes = np.array(UNITS) * scale, np.array(SUCCESSES) * scale
    got = float(conversion_log_e(units, successes, weights=RAMP, side=side))
    want = exact_log_e(units, successes, RAMP, side)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_the_default_grid_is_that_of_the_reference():
    points = signed(DEFAULT_GRID, "both")
    assert len(points) == 170
    assert np.allclose(DEFAULT_GRID.bases, np.linspace(-6, 2, 17))
    assert DEFAULT_GRID.effects == (0.05, 0.1, 0.25, 0.5, 1.0)
    assert RARE_GRID.bases == tuple(range(-12, 3))


@pytest.mark.parametrize("grid", [DEFAULT_GRID, RARE_GRID], ids=["default", "rare"])
def test_every_factor_has_mean_one_over_the_arm(grid):
    for share in (1e-6, 0.02, 0.3, 0.5, 0.9):
        for base, effect in signed(grid, "both"):
            theta = expit([base - effect * share, base + effect * (1 - share)])
            rho = np.array([1 - share, share])
            mean = rho @ theta
            assert rho @ (theta / mean) == pytest.approx(1.0, abs=1e-12)
            assert rho @ ((1 - theta) / (1 - mean)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("outcome", [0, 1])
def test_the_next_unit_keeps_the_mean_of_the_e_value(outcome):
    now = math.exp(float(conversion_log_e(UNITS, SUCCESSES, weights=RAMP)))
    for epoch in range(3):
        after = 0.0
        for arm in range(2):
            units, successes = np.array(UNITS), np.array(SUCCESSES)
            units[epoch, arm] += 1
            successes[epoch, arm] += outcome
            more = math.exp(float(conversion_log_e(units, successes, weights=RAMP)))
            after += RAMP[epoch][arm] * more
        assert after == pytest.approx(now, rel=1e-12)


@pytest.mark.parametrize("side", ["above", "below"])
def test_one_sided_a_worse_arm_only_lowers_the_mean(side):
    # tau are the true probabilities of the next unit; the label and the outcome are both random.
    now = math.exp(float(conversion_log_e(UNITS, SUCCESSES, weights=RAMP, side=side)))
    for tau in ((0.3, 0.3), (0.31, 0.3), (0.9, 0.2), (0.001, 0.0), (1.0, 0.999)):
        rates = tau if side == "above" else tau[::-1]
        mean = 0.0
        for arm, outcome in ((0, 0), (0, 1), (1, 0), (1, 1)):
            units, successes = np.array(UNITS), np.array(SUCCESSES)
            units[1, arm] += 1
            successes[1, arm] += outcome
            chance = RAMP[1][arm] * (rates[arm] if outcome else 1 - rates[arm])
            mean += chance * math.exp(float(conversion_log_e(units, successes, weights=RAMP, side=side)))
        if rates[0] == rates[1]:
            assert mean == pytest.approx(now, rel=1e-12)
        else:
            assert mean < now * (1 + 1e-12)


@settings(deadline=None)
@given(st.permutations(range(3)), st.sampled_from(SIDES))
def test_the_order_of_epochs_does_not_matter(order, side):
    units, successes, weights = (np.array(v)[order] for v in (UNITS, SUCCESSES, RAMP))
    got = float(conversion_log_e(units, successes, weights=weights, side=side))
    assert got == pytest.approx(float(conversion_log_e(UNITS, SUCCESSES, weights=RAMP, side=side)), rel=1e-12)


def test_swapping_the_arms_swaps_the_sides():
    flip = [np.array(v)[:, ::-1] for v in (UNITS, SUCCESSES, RAMP)]
    for side, other in zip(SIDES, ("both", "below", "above"), strict=True):
        here = float(conversion_log_e(UNITS, SUCCESSES, weights=RAMP, side=side))
        assert float(conversion_log_e(flip[0], flip[1], weights=flip[2], side=other)) == pytest.approx(here)


def test_epochs_of_equal_weights_may_be_merged_and_padding_changes_nothing():
    one = float(conversion_log_e([[90, 60]], [[9, 14]], weights=[[0.6, 0.4]]))
    two = conversion_log_e([[50, 10], [40, 50]], [[4, 4], [5, 10]], weights=[[0.6, 0.4]] * 2)
    padded = conversion_log_e([[90, 60], [0, 0]], [[9, 14], [0, 0]], weights=[[0.6, 0.4], [0.0, 0.0]])
    assert float(two) == pytest.approx(one, rel=1e-12)
    assert float(padded) == pytest.approx(one, rel=1e-12)


def test_an_epoch_with_one_arm_says_nothing():
    alone = conversion_log_e([[90, 60], [500, 0]], [[9, 14], [77, 0]], weights=[[0.6, 0.4], [1.0, 0.0]])
    assert float(alone) == pytest.approx(float(conversion_log_e([[90, 60]], [[9, 14]], weights=[[0.6, 0.4]])))


def drawn(shape, seed=0):
    rng = np.random.default_rng(seed)
    units = rng.integers(0, 3000, (*shape, 2))
    return units, rng.binomial(units, rng.uniform(0.001, 0.3, (*shape, 2)))


@pytest.mark.parametrize("weights", ["equal", "few", "all different"])
def test_many_comparisons_are_single_ones(weights):
    units, successes = drawn((6, 50, 2))
    rng = np.random.default_rng(1)
    share = {
        "equal": np.array([0.5, 0.2]),
        "few": rng.choice([0.1, 0.3, 0.5], (6, 50, 2)),
        "all different": rng.uniform(0.05, 0.95, (6, 50, 2)),
    }[weights]
    rho = np.stack((1 - share, share), axis=-1)
    table = conversion_log_e(units, successes, weights=rho)
    assert table.shape == (6, 50)
    every = np.broadcast_to(rho, (6, 50, 2, 2))
    for at in ((0, 0), (3, 17), (5, 49)):
        one = conversion_log_e(units[at], successes[at], weights=every[at])
        assert table[at] == pytest.approx(float(one), rel=1e-12)


def test_forty_thousand_comparisons_take_a_fraction_of_a_second():
    units, successes = drawn((40_000, 1))
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        conversion_log_e(units, successes, weights=[[0.5, 0.5]])
        best = min(best, time.process_time() - start)
    assert best < 1.0


def test_the_estimate_is_stratified():
    result = conversion_difference(UNITS, SUCCESSES, weights=RAMP)
    assert isinstance(result, ConversionDifference)
    sizes = [sum(row) for row in UNITS]
    differences = [s[1] / n[1] - s[0] / n[0] for n, s in zip(UNITS, SUCCESSES, strict=True)]
    assert result.estimate == pytest.approx(np.average(differences, weights=sizes), rel=1e-12)
    assert result.n == sum(sizes)
    assert result.log_e == float(conversion_log_e(UNITS, SUCCESSES, weights=RAMP))
    assert result.p_always_valid == min(1.0, math.exp(-result.log_e))


def test_no_epoch_with_both_arms_is_undetermined():
    one_armed = conversion_difference([[5, 0], [0, 0]], [[1, 0], [0, 0]], weights=[[0.5, 0.5]] * 2)
    assert one_armed == Undetermined(NO_COMMON_EPOCH)
    skipped = conversion_difference([[5, 0], [4, 4]], [[1, 0], [1, 2]], weights=[[0.5, 0.5]] * 2)
    assert (skipped.estimate, skipped.n) == (0.25, 8)


# ---- success ratio -----------------------------------------------------------------------------------

WINS = [[91, 14], [210, 102], [255, 273]]


def exact_ratio(wins, weights, null, sd, *, one_sided):
    """The mixture by brute force; the tilt of the treatment, or of its excess over the null."""
    with mpmath.workdps(20):

        def height(d):
            total = mpmath.mpf(0)
            for s, w in zip(wins, weights, strict=True):
                total += int(s[1]) * d - int(sum(s)) * mpmath.log(w[0] + w[1] * mpmath.exp(d))
            return total

        centre = null if one_sided else 0

        def integrand(u):
            return mpmath.exp(height(centre + u) - height(null) - u * u / (2 * mpmath.mpf(sd) ** 2))

        low = 0 if one_sided else -8 * sd
        points = [low + k * (8 * sd - low) / mpmath.mpf(8) for k in range(9)]
        area = mpmath.quad(integrand, points) / (sd * mpmath.sqrt(2 * mpmath.pi))
        return float(mpmath.log(area * (2 if one_sided else 1)))


@pytest.mark.parametrize("null", [0.0, math.log(1.2)])
@pytest.mark.parametrize("wins", [WINS, [[3, 0], [1, 2], [0, 4]], [[0, 5], [0, 0], [0, 2]]], ids=str)
def test_the_success_ratio_is_its_integral(wins, null):
    two = float(success_ratio_log_e(wins, RAMP, null=null))
    assert two == pytest.approx(exact_ratio(wins, RAMP, null, 1.0, one_sided=False), rel=1e-9, abs=1e-9)
    above = float(success_ratio_log_e(wins, RAMP, null=null, side="above"))
    assert above == pytest.approx(exact_ratio(wins, RAMP, null, 1.0, one_sided=True), rel=1e-9, abs=1e-9)
    flip = [np.array(v)[:, ::-1] for v in (wins, RAMP)]
    below = float(success_ratio_log_e(*flip, null=-null, side="below"))
    assert below == pytest.approx(above, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_the_next_success_keeps_the_mean_at_the_null_and_lowers_it_inside(side):
    null = 0.4
    now = math.exp(float(success_ratio_log_e(WINS, RAMP, null=null, side=side)))
    inside = {"both": (0.4,), "above": (0.4, 0.1, -2.0), "below": (0.4, 0.7, 3.0)}[side]
    for truth in inside:
        odds = np.array(RAMP[1]) * np.exp([0.0, truth])
        mean = 0.0
        for arm, chance in enumerate(odds / odds.sum()):
            more = np.array(WINS)
            more[1, arm] += 1
            mean += chance * math.exp(float(success_ratio_log_e(more, RAMP, null=null, side=side)))
        if truth == null:
            assert mean == pytest.approx(now, rel=1e-11)
        else:
            assert mean < now


COUNT = st.integers(0, 10**6)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(COUNT, COUNT), min_size=3, max_size=3),
    st.sampled_from(SIDES),
    st.sampled_from([0.001, 0.05, 0.5]),
    st.sampled_from([0.1, 0.5, 2.0]),
)
def test_the_success_ratio_is_dual_to_its_sequence(wins, side, alpha, sd):
    result = success_ratio(wins, RAMP, alpha=alpha, sd=sd, side=side)
    if isinstance(result, Undetermined):
        assert not np.any(wins)
        return
    threshold = -math.log(alpha)
    assert result.lower <= result.estimate <= result.upper
    assert result.log_e == float(success_ratio_log_e(wins, RAMP, sd=sd, side=side))
    for bound in (result.lower, result.upper):
        if abs(bound) < 100:
            at = float(success_ratio_log_e(wins, RAMP, null=bound, sd=sd, side=side))
            assert at == pytest.approx(threshold, abs=1e-8)
            for null in (bound - 0.1, bound - 1e-5, bound + 1e-5, bound + 0.1):
                log_e = float(success_ratio_log_e(wins, RAMP, null=null, sd=sd, side=side))
                assert (log_e >= threshold) == (not result.lower <= null <= result.upper)


def test_a_few_failures_in_one_arm_alone_are_harm():
    # 12 failures in treatment, none in control: at least 20 % more, but never bounded from above.
    result = success_ratio([[0, 12]], [[0.5, 0.5]], alpha=0.05, null=math.log(1.2), side="above")
    assert result.log_e >= math.log(20)
    assert result.estimate == math.inf
    assert math.log(1.2) < result.lower < math.inf
    assert result.upper == math.inf
    both = success_ratio([[12, 0]], [[0.5, 0.5]], alpha=0.05)
    assert (both.estimate, both.lower) == (-math.inf, -math.inf)
    assert math.isfinite(both.upper)
    harmless = success_ratio([[12, 0]], [[0.5, 0.5]], alpha=0.05, side="above")
    assert (harmless.lower, harmless.upper) == (-math.inf, math.inf)


def test_too_few_successes_for_a_bound_leave_it_open():
    # One success can at most multiply the odds by the prior's reach, which is no evidence at 5 %.
    result = success_ratio([[0, 1]], [[0.5, 0.5]], alpha=0.05, side="above")
    assert result.lower == -math.inf
    assert float(success_ratio_log_e([[0, 1]], [[0.5, 0.5]], null=-100.0, side="above")) < math.log(20)


def test_no_success_is_undetermined():
    assert success_ratio([[0, 0]], [[0.5, 0.5]], alpha=0.05) == Undetermined(NO_SUCCESSES)
    table = success_ratio([[[0, 0]], [[3, 9]]], [[0.5, 0.5]], alpha=0.05)
    assert table.determined.tolist() == [False, True]
    assert (table.log_e[0], table.estimate[0], table.lower[0], table.upper[0]) == (0, 0, -math.inf, math.inf)
    single = success_ratio([[3, 9]], [[0.5, 0.5]], alpha=0.05)
    assert (table.lower[1], table.upper[1]) == pytest.approx((single.lower, single.upper), rel=1e-9)
    assert table.p_always_valid.tolist() == pytest.approx([1.0, single.p_always_valid])


def test_a_trillion_successes():
    n = 5 * 10**11
    for side in SIDES:
        result = success_ratio([[n, n + 10**7]], [[0.5, 0.5]], alpha=0.05, side=side)
        assert result.estimate == pytest.approx(math.log1p(10**7 / n), rel=1e-9)
        for bound in (result.lower, result.upper):
            if math.isfinite(bound):
                at = float(success_ratio_log_e([[n, n + 10**7]], [[0.5, 0.5]], null=bound, side=side))
                assert at == pytest.approx(math.log(20), abs=1e-6)


def test_pair_weights_condition_on_the_pair():
    assert pair_weights([0.5, 0.3, 0.2], control=0, treatment=2) == pytest.approx([5 / 7, 2 / 7])
    rows = pair_weights([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], control=1, treatment=2)
    assert rows.tolist() == [pytest.approx([0.6, 0.4]), [0.0, 0.0]]


def test_nothing_depends_on_what_is_computed_with_it():
    units, successes = drawn((60, 3))
    log_e = conversion_log_e(units, successes, weights=RAMP)
    ratio = success_ratio(successes, RAMP, alpha=0.05, side="above")
    for i in range(60):
        assert log_e[i] == float(conversion_log_e(units[i], successes[i], weights=RAMP))
        one = success_ratio(successes[i], RAMP, alpha=0.05, side="above")
        assert (one.log_e, one.lower) == (ratio.log_e[i], ratio.lower[i])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conversion_log_e([[1, 1]], [[2, 0]], weights=[[0.5, 0.5]]), "successes must have the shape"),
        (
            lambda: conversion_log_e([[1, 1]], [[-1, 0]], weights=[[0.5, 0.5]]),
            "successes must not be negative",
        ),
        (lambda: conversion_log_e([[1, -1]], [[0, 0]], weights=[[0.5, 0.5]]), "units must not be negative"),
        (lambda: conversion_log_e([[1.0, 1]], [[0, 0]], weights=[[0.5, 0.5]]), "units must be integers"),
        (lambda: conversion_log_e([[2**53, 1]], [[0, 0]], weights=[[0.5, 0.5]]), r"units .* below 2\*\*53"),
        (lambda: conversion_log_e([[2**80, 1]], [[0, 0]], weights=[[0.5, 0.5]]), r"units .* below 2\*\*53"),
        (lambda: conversion_log_e([[1, 1]], [[0, 0]], weights=[[0.5, 0.4]]), "sum to 1 within 1e-9"),
        (lambda: conversion_log_e([[1, 1]], [[0, 0]], weights=[[0.5, math.nan]]), "weights must be finite"),
        (
            lambda: conversion_log_e([[1, 1]], [[0, 0]], weights=[[1.0, 0.0]]),
            "weights must be greater than 0",
        ),
        (
            lambda: conversion_log_e([[1, 1]], [[0, 0]], weights=[[0.0, 0.0]]),
            "weights must be greater than 0",
        ),
        (
            lambda: conversion_log_e([[1, 1]], [[0, 0]], weights=[0.5, 0.5]),
            "weights must have one row per epoch",
        ),
        (
            lambda: conversion_log_e([[1, 1, 1]], [[0, 0, 0]], weights=[[0.5, 0.3, 0.2]]),
            "weights must have two arms, got 3",
        ),
        (
            lambda: conversion_log_e([[1, 1]], [[0, 0]], weights=[[0.5, 0.5]], side="up"),
            "side must be 'both'",
        ),
        (
            lambda: conversion_log_e([[[1, 1]]] * 2, [[[0, 0]]] * 2, weights=[[[0.5, 0.5]]] * 3),
            "units must have a",
        ),
        (
            lambda: conversion_difference([[[1, 1]]], [[[0, 0]]], weights=[[0.5, 0.5]]),
            "units must have the shape",
        ),
        (lambda: RateGrid((), (0.1,)), "bases must not be empty"),
        (lambda: RateGrid((0.0,), ()), "effects must not be empty"),
        (lambda: RateGrid((0.0,), (-0.1,)), "effects must be greater than 0"),
        (lambda: RateGrid((math.nan,), (0.1,)), "bases must be finite"),
        (lambda: success_ratio([[1, 1]], [[0.5, 0.5]], alpha=0.0), "alpha must lie strictly between 0 and 1"),
        (lambda: success_ratio([[1, 1]], [[0.5, 0.5]], alpha=0.1, sd=0.0), "sd must be greater than 0"),
        (
            lambda: success_ratio([[1, 1]], [[0.5, 0.5]], alpha=0.1, null=101),
            r"null must lie in \[-100, 100\]",
        ),
        (lambda: success_ratio([[1, 1]], [[0.5, 0.5]], alpha=0.1, null=math.nan), "null must lie in"),
        (lambda: success_ratio([[1, 1]], [[0.5, 0.5]], alpha=0.1, side=""), "side must be"),
        (lambda: success_ratio_log_e([[1, 1, 1]], [[0.5, 0.3, 0.2]]), "weights must have two arms, got 3"),
        (lambda: success_ratio_log_e([[1.5, 1]], [[0.5, 0.5]]), "successes must be integers"),
        (
            lambda: pair_weights([0.5, 0.5], control=0, treatment=0),
            "control and treatment must be the indices",
        ),
        (
            lambda: pair_weights([0.5, 0.5], control=0, treatment=2),
            "control and treatment must be the indices",
        ),
        (lambda: pair_weights([0.5, 0.6], control=0, treatment=1), "weights must lie in"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
