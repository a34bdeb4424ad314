from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats._boundaries import gamma_exponential_boundary, tuned_rho
from stream_xp.stats.betting import LogCapital, betting_bounds, betting_log_e
from stream_xp.stats.bounded_mean import (
    CONSTRUCTIONS,
    NO_VALUES,
    BoundedMean,
    bounded_mean,
    bounded_mean_log_e,
    hoeffding_bounds,
    hoeffding_log_e,
)
from stream_xp.stats.empirical_bernstein import (
    EmpiricalBernstein,
    empirical_bernstein_bounds,
    empirical_bernstein_log_e,
    empirical_bernstein_rho,
)
from stream_xp.stats.normal_mixture import Undetermined, tuned_rho2
from stream_xp.stats.off_policy import NO_UNITS, OffPolicyValue, off_policy_log_e, off_policy_value

SIDES = ("both", "above", "below")
UNIT = st.lists(st.floats(0, 1), max_size=40)
SOME = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def bets_by_loop(values, alpha):
    """The bets of Waudby-Smith and Ramdas (2024), value by value."""
    bets, total, squares = [], 0.5, 0.25
    for t, x in enumerate(values, start=1):
        bets.append(math.sqrt(2 * math.log(1 / alpha) / (t * math.log(1 + t) * (squares / t))))
        total += x
        squares += (x - total / (t + 1)) ** 2
    return bets


def capitals_by_loop(values, m, alpha):
    plus = minus = 0.0
    for x, bet in zip(values, bets_by_loop(values, alpha), strict=True):
        plus += math.log1p(min(bet, 0.5 / m if m else math.inf) * (x - m))
        minus += math.log1p(-min(bet, 0.5 / (1 - m) if m < 1 else math.inf) * (x - m))
    return plus, minus


@pytest.fixture(scope="module")
def skewed():
    return np.random.default_rng(7).beta(1, 9, 600)


def test_hoeffding_is_the_normal_mixture_of_the_largest_variance(skewed):
    found = bounded_mean(skewed, construction="hoeffding", alpha=0.05, n_star=400)
    k = 600 * tuned_rho2(400, 0.05)
    radius = math.sqrt((1 + 1 / k) * (math.log1p(k) + 2 * math.log(20)) / (4 * 600))
    assert found.upper == pytest.approx(skewed.mean() + radius, rel=1e-12)
    assert found.lower == pytest.approx(max(skewed.mean() - radius, 0.0), rel=1e-12)


def test_empirical_bernstein_from_the_formula(skewed):
    found = bounded_mean(skewed, construction="empirical_bernstein", alpha=0.05, n_star=320)
    centres = np.concatenate([[0.5], np.cumsum(skewed)[:-1] / np.arange(1, 600)])
    v = ((skewed - centres) ** 2).sum()
    radius = gamma_exponential_boundary(v, rho=tuned_rho(20, 0.05), alpha=np.asarray(0.025)) / 600
    assert (found.lower, found.upper) == pytest.approx(
        (skewed.mean() - radius, skewed.mean() + radius), abs=1e-9
    )


def test_betting_from_a_plain_loop(skewed):
    for m in (0.0, 0.03, 0.1, 0.6, 1.0):
        plus, minus = capitals_by_loop(skewed, m, 0.025)
        assert betting_log_e(skewed, m, alpha=0.05) == pytest.approx(max(plus, minus) - math.log(2), abs=1e-9)
        assert betting_log_e(skewed, m, alpha=0.025, side="above") == pytest.approx(plus, abs=1e-9)
        assert betting_log_e(skewed, m, alpha=0.025, side="below") == pytest.approx(minus, abs=1e-9)


def test_adapting_to_the_variance_pays(skewed):
    widths = [
        (r := bounded_mean(skewed, construction=c, n_star=600)).upper - r.lower
        for c in ("betting", "empirical_bernstein", "hoeffding")
    ]
    assert widths == sorted(widths)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.parametrize("side", SIDES)
def test_the_bounds_are_the_roots_of_the_log_e(construction, side, skewed):
    options = {"construction": construction, "side": side, "lower_bound": -2, "upper_bound": 3, "alpha": 0.1}
    found = bounded_mean(5 * skewed - 2, **options)
    ends = [end for end in (found.lower, found.upper) if -2 < end < 3]
    assert len(ends) == (2 if side == "both" and construction != "hoeffding" else len(ends))
    for end in ends:
        assert bounded_mean_log_e(5 * skewed - 2, end, **options) == pytest.approx(math.log(10), abs=1e-8)


@settings(deadline=None, max_examples=60)
@given(SOME, st.floats(0, 1), st.sampled_from(CONSTRUCTIONS), st.sampled_from(SIDES), st.floats(0.01, 0.49))
def test_rejecting_is_leaving_the_sequence(values, null, construction, side, alpha):
    options = {"construction": construction, "side": side, "alpha": alpha, "n_star": 20}
    found = bounded_mean(values, **options)
    if min(abs(null - found.lower), abs(null - found.upper)) > 1e-9:
        outside = not found.lower < null < found.upper
        assert (bounded_mean_log_e(values, null, **options) >= math.log(1 / alpha)) == outside


@settings(deadline=None, max_examples=30)
@given(SOME, st.sampled_from(CONSTRUCTIONS))
def test_mirrored_values_have_the_mirrored_sequence(values, construction):
    one = bounded_mean(values, construction=construction, alpha=0.3)
    two = bounded_mean([1 - v for v in values], construction=construction, alpha=0.3)
    assert (one.lower, one.upper) == pytest.approx((1 - two.upper, 1 - two.lower), abs=1e-9)


def test_without_values_nothing_is_determined():
    for construction in CONSTRUCTIONS:
        assert bounded_mean([], construction=construction) == Undetermined(NO_VALUES)
        for side in SIDES:
            log_e = bounded_mean_log_e([], 0.4, construction=construction, side=side)
            assert log_e == pytest.approx(0.0, abs=1e-12)


def test_one_value_is_reported():
    for construction in CONSTRUCTIONS:
        assert bounded_mean([1.0], construction=construction) == BoundedMean(1.0, 0.0, 1.0, 1)


@settings(deadline=None, max_examples=40)
@given(UNIT, UNIT, UNIT)
def test_statistics_merge_exactly_and_know_no_batching(a, b, c):
    for empty in (EmpiricalBernstein.empty(), LogCapital.empty(grid=8)):
        x, y, z = empty.update(a), empty.update(b), empty.update(c)
        assert (x + y) + z == x + (y + z) == z.merge(x).merge(y)
        assert x + empty == x
        one_by_one = empty.update(a)
        for value in b:
            one_by_one = one_by_one.update([value])
        assert one_by_one == empty.update(a + b) == x.update(b)


@settings(deadline=None, max_examples=30)
@given(UNIT)
def test_written_forms_round_trip(values):
    for empty in (EmpiricalBernstein.empty(), LogCapital.empty(alpha=0.01, grid=5)):
        statistic = empty.update(values)
        assert type(statistic).from_bytes(statistic.to_bytes()) == statistic
        assert type(statistic).from_json(statistic.to_json()) == statistic


def test_batches_beyond_the_block_size_change_nothing():
    values = np.random.default_rng(3).random(40_000)
    empty = EmpiricalBernstein.empty()
    assert empty.update(values) == empty.update(values[:16_385]).update(values[16_385:])


def test_partition_statistics_go_past_an_int64():
    start = EmpiricalBernstein(2**28, 2**28 * 2**35, 2**28 * 2**40)
    assert start.update([1.0, 0.0]).s == start.s + 2**36
    capital = LogCapital(0.025, 2**28, 2**28 * 2**35, 2**28 * 2**40, (5, 5), (5, 5))
    assert capital.update([0.5]).n == 2**28 + 1


@settings(deadline=None, max_examples=30)
@given(SOME, st.floats(0.02, 0.4), st.sampled_from(SIDES))
def test_the_grid_rounds_outward(values, alpha, side):
    tuned = alpha / 2 if side == "both" else alpha
    on_grid = LogCapital.empty(alpha=tuned, grid=10).update(values)
    lower, upper = on_grid.bounds(alpha=alpha, side=side)
    exact = betting_bounds(values, alpha=alpha, side=side)
    assert lower <= exact[0] + 1e-9
    assert upper >= exact[1] - 1e-9
    threshold = math.log(1 / alpha)
    for null in np.linspace(0, 1, 33):
        log_e = on_grid.log_e(null, side=side)
        assert log_e <= betting_log_e(values, null, alpha=alpha, side=side) + 1e-9
        if log_e >= threshold:
            assert null <= lower or null >= upper
    for end in (lower, upper):
        if 0 < end < 1:
            assert on_grid.log_e(end, side=side) >= threshold


def test_capitals_of_partitions_add():
    rng = np.random.default_rng(5)
    a, b = rng.random(200), rng.random(300)
    empty = LogCapital.empty(grid=4)
    both = empty.update(a) + empty.update(b)
    sums = [sum(capitals_by_loop(v, 0.25, 0.025)[i] for v in (a, b)) for i in (0, 1)]
    assert both.log_e(0.25) == pytest.approx(max(sums) - math.log(2), abs=1e-8)


def test_arrays_of_statistics():
    n, total, v = np.array([0.0, 50.0, 1e12]), np.array([0.0, 20.0, 4e11]), np.array([0.0, 4.0, 1e10])
    rho = empirical_bernstein_rho(10, 0.05)
    log_e = empirical_bernstein_log_e(n, total, v, null=0.3, rho=rho)
    lower, upper = empirical_bernstein_bounds(n, total, v, alpha=0.05, rho=rho)
    assert log_e.shape == lower.shape == (3,)
    assert (log_e[0], lower[0], upper[0]) == (0.0, 0.0, 1.0)
    assert np.isfinite(log_e).all()
    assert (lower[1], upper[1]) == tuple(
        float(x) for x in empirical_bernstein_bounds(50, 20, 4, alpha=0.05, rho=rho)
    )
    assert hoeffding_log_e(n, 0.4, null=0.3, rho2=1e-3)[0] == 0.0
    low, high = hoeffding_bounds(n, 0.4, alpha=0.05, rho2=1e-3)
    assert (low[0], high[0]) == (0.0, 1.0)
    assert low[2] < 0.4 < high[2]


def off_policy_data(n=400, seed=11):
    rng = np.random.default_rng(seed)
    propensity = rng.uniform(0.05, 0.9, n)
    return rng.random(n) < propensity, propensity, rng.random(n) ** 2


def test_off_policy_from_a_plain_loop():
    taken, propensity, reward = off_policy_data()
    gains = taken / propensity * reward
    losses = taken / propensity * (1 - reward)
    for null in (0.1, 0.35, 0.8):
        plus = sum(
            math.log1p(min(b, 0.5 / null) * (g - null))
            for g, b in zip(gains, bets_by_loop(gains, 0.025), strict=True)
        )
        minus = sum(
            math.log1p(min(b, 0.5 / (1 - null)) * (x - (1 - null)))
            for x, b in zip(losses, bets_by_loop(losses, 0.025), strict=True)
        )
        found = off_policy_log_e(taken, propensity, reward, null=null, alpha=0.05)
        assert found == pytest.approx(max(plus, minus) - math.log(2), abs=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_off_policy_bounds_are_the_roots_of_the_log_e(side):
    taken, propensity, reward = off_policy_data()
    found = off_policy_value(taken, propensity, reward, alpha=0.1, side=side)
    assert found.n == 400
    assert found.estimate == pytest.approx((taken / propensity * reward).mean())
    for end in (found.lower, found.upper):
        if 0 < end < 1:
            log_e = off_policy_log_e(taken, propensity, reward, null=end, alpha=0.1, side=side)
            assert log_e == pytest.approx(math.log(10), abs=1e-8)


def test_off_policy_with_certain_assignment_is_betting():
    values = np.random.default_rng(2).random(300)
    found = off_policy_value(np.full(300, True), np.ones(300), values, alpha=0.05)
    assert (found.lower, found.upper) == pytest.approx(betting_bounds(values, alpha=0.05), abs=1e-12)


def test_off_policy_extremes():
    assert off_policy_value([], [], [], alpha=0.05) == Undetermined(NO_UNITS)
    assert off_policy_log_e([], [], [], null=0.5, alpha=0.05) == 0.0
    taken = np.array([True, False, True])
    found = off_policy_value(taken, [1e-300, 0.5, 0.5], [1.0, 1.0, 0.2], alpha=0.05)
    assert isinstance(found, OffPolicyValue)
    assert math.isfinite(off_policy_log_e(taken, [1e-300, 0.5, 0.5], [1.0, 1.0, 0.2], null=0.3, alpha=0.05))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounded_mean([0.5], construction="other"), "construction must be one of"),
        (lambda: bounded_mean([1.5], construction="betting"), "values must lie between"),
        (lambda: bounded_mean([math.nan], construction="betting"), "values must be finite"),
        (lambda: bounded_mean([[0.5]], construction="betting"), "values must be one-dimensional"),
        (lambda: bounded_mean([0.5], construction="betting", upper_bound=0), "upper_bound must be greater"),
        (
            lambda: bounded_mean([0.5], construction="betting", lower_bound=-math.inf),
            "lower_bound must be finite",
        ),
        (lambda: bounded_mean([0.5], construction="betting", alpha=1), "alpha must lie strictly"),
        (lambda: bounded_mean([0.5], construction="hoeffding", n_star=0), "n_star must be greater than 0"),
        (lambda: bounded_mean([0.5], construction="betting", side="left"), "side must be"),
        (
            lambda: bounded_mean([0.5], construction="empirical_bernstein", side="above", alpha=0.6),
            "alpha must lie strictly between 0 and 0.5",
        ),
        (lambda: bounded_mean_log_e([0.5], 1.5, construction="betting"), "null must lie between"),
        (lambda: betting_log_e([0.5], 1.5, alpha=0.05), r"null must lie in \[0, 1\]"),
        (lambda: betting_bounds([0.5], alpha=0.0), "alpha must lie strictly"),
        (lambda: hoeffding_log_e(-1, 0.5, null=0.5, rho2=1), "n must not be negative"),
        (lambda: hoeffding_bounds(1, 1.5, alpha=0.05, rho2=1), r"mean must lie in \[0, 1\]"),
        (lambda: hoeffding_bounds(1, 0.5, alpha=0.05, rho2=1, side="left"), "side must be"),
        (lambda: empirical_bernstein_log_e(1, 2, 0, null=0.5, rho=1), "total must not exceed n"),
        (lambda: empirical_bernstein_log_e(1, 1, -1, null=0.5, rho=1), "v must not be negative"),
        (lambda: empirical_bernstein_log_e(1, 1, 0, null=2, rho=1), r"null must lie in \[0, 1\]"),
        (lambda: empirical_bernstein_log_e(1, 1, 0, null=0.5, rho=0), "rho must be greater than 0"),
        (lambda: empirical_bernstein_bounds(1, 1, 0, alpha=2, rho=1), "alpha must lie strictly"),
        (lambda: EmpiricalBernstein(1.0, 0, 0), "n must be a Python int"),
        (lambda: EmpiricalBernstein(-1, 0, 0), "n must not be negative"),
        (lambda: EmpiricalBernstein(0, 1, 0), "s must lie between"),
        (lambda: EmpiricalBernstein(0, 0, 1), "v must lie between"),
        (lambda: EmpiricalBernstein.empty().update([2.0]), "values must lie between"),
        (lambda: EmpiricalBernstein.from_json({"version": 3}), "version must be 1"),
        (lambda: LogCapital.empty(grid=0), "grid must be a Python int from 1"),
        (lambda: LogCapital.empty(alpha=0.0), "alpha must lie strictly"),
        (lambda: LogCapital(0.05, 0, 0, 0, (0, 0), (0,)), "plus and minus must have one log capital"),
        (lambda: LogCapital(0.05, 0.0, 0, 0, (0, 0), (0, 0)), "n, s, d, plus and minus must be Python ints"),
        (lambda: LogCapital(0.05, -1, 0, 0, (0, 0), (0, 0)), "n must not be negative"),
        (lambda: LogCapital(0.05, 0, 1, 0, (0, 0), (0, 0)), "s and d must be possible"),
        (lambda: LogCapital(0.05, 0, 0, 0, (1, 0), (0, 0)), "plus and minus must be 0 when n is 0"),
        (lambda: LogCapital.empty(grid=4).merge(LogCapital.empty(grid=5)), "other must have the same grid"),
        (lambda: LogCapital.empty().log_e(-0.1), r"null must lie in \[0, 1\]"),
        (lambda: LogCapital.from_json({"version": 2}), "version must be 1"),
        (lambda: LogCapital.from_json({"version": 1}), "alpha must be a hexadecimal float"),
        (lambda: LogCapital.from_json({"version": 1, "alpha": "0x1p-5"}), "plus must be a list of integers"),
        (
            lambda: off_policy_value([1], [0.5], [0.5], alpha=0.05),
            "taken must be a one-dimensional array of bool",
        ),
        (
            lambda: off_policy_value([True], [0.5, 0.5], [0.5], alpha=0.05),
            "propensity and reward must have the",
        ),
        (lambda: off_policy_value([True], [0.0], [0.5], alpha=0.05), "propensity must be greater than 0"),
        (lambda: off_policy_value([True], [0.5], [1.5], alpha=0.05), r"reward must lie in \[0, 1\]"),
        (lambda: off_policy_log_e([True], [0.5], [0.5], null=2, alpha=0.05), r"null must lie in \[0, 1\]"),
        (lambda: off_policy_value([True], [0.5], [0.5], alpha=0), "alpha must lie strictly"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_damaged_forms_are_refused():
    for kind, data in (
        (EmpiricalBernstein, LogCapital.empty().to_bytes()),
        (LogCapital, EmpiricalBernstein.empty().to_bytes()),
    ):
        with pytest.raises(ValueError, match="data must be a statistic of kind"):
            kind.from_bytes(data)
