"""P(best) and P(second) against closed forms, another integrator, draws with their error, and extremes."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special
from scipy import stats as distributions

from stream_xp.domain.experiment import Direction
from stream_xp.engine.allocation import best
from stream_xp.engine.allocation.best import MAX_ARMS, ranking
from stream_xp.engine.allocation.posterior import BetaPosterior, StudentPosterior

NORMAL = math.inf


def beta(*shapes):
    a, b = np.array(shapes, dtype=float).T
    return BetaPosterior(a, b)


def student(*arms):
    location, scale, degrees = np.array(arms, dtype=float).T
    return StudentPosterior(location, scale, degrees)


def test_the_rule_is_exact_for_polynomials():
    for power in range(0, 23, 2):
        assert (best._KRONROD * best._NODES**power).sum() == pytest.approx(2 / (power + 1), abs=1e-15)
    for power in range(0, 13, 2):
        assert (best._GAUSS * best._NODES**power).sum() == pytest.approx(2 / (power + 1), abs=1e-15)


@pytest.mark.parametrize("gap", [0.0, 0.1, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 50.0])
def test_two_normal_arms_are_the_normal_of_their_difference(gap, scale):
    got = ranking(student((5.0, 1.0, NORMAL), (5.0 + gap, scale, NORMAL)))
    sure = special.ndtr(gap / math.hypot(1.0, scale))
    assert got.best == pytest.approx([1 - sure, sure], abs=1e-9)
    assert got.second == pytest.approx([sure, 1 - sure], abs=1e-9)


@pytest.mark.parametrize("arms", [2, 3, 10, MAX_ARMS])
@pytest.mark.parametrize("family", [beta, student], ids=["beta", "student"])
def test_equal_arms_share_every_rank(family, arms):
    one = (1.0, 1.0) if family is beta else (0.3, 2.0, 5.0)
    got = ranking(family(*[one] * arms))
    assert got.best == pytest.approx([1 / arms] * arms, abs=1e-10)
    assert got.second == pytest.approx([1 / arms] * arms, abs=1e-10)


@pytest.mark.parametrize("arms", [3, 7, 20])
def test_a_second_unit_among_uniform_arms(arms):
    # Beta(2, 1) is the larger of two uniforms: this arm holds two of arms + 1 exchangeable ones.
    got = ranking(beta((2, 1), *[(1, 1)] * (arms - 1)))
    assert got.best[0] == pytest.approx(2 / (arms + 1), abs=1e-10)
    # It is second if one of the others is the largest and one of its two comes next.
    second = (arms - 1) / (arms + 1) * 2 / arms
    assert got.second[0] == pytest.approx(second, abs=1e-10)


def rates_by_sum(a, b, c, d):
    """P(Beta(a, b) > Beta(c, d)) for whole a: a finite sum, Gelman-free and integral-free."""
    i = np.arange(a)
    logs = special.betaln(c + i, b + d) - np.log(b + i) - special.betaln(1 + i, b) - special.betaln(c, d)
    return float(np.exp(logs).sum())


@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [(1, 1, 1, 1), (3, 40, 5, 41), (120, 900, 100, 910), (900, 90, 950, 70), (5, 1, 1, 900)],
)
def test_two_rates_are_the_known_sum(a, b, c, d):
    got = ranking(beta((a, b), (c, d)))
    assert got.best[0] == pytest.approx(rates_by_sum(a, b, c, d), abs=1e-9)


@pytest.mark.parametrize(
    "shapes",
    [
        ((11, 90), (13, 100), (9, 100), (0.5, 0.5)),
        ((0.05, 0.3), (0.3, 0.1), (2, 5)),
        ((1000, 9000), (1100, 9000), (500, 5000), (3, 20)),
    ],
    ids=["mixed", "weak", "large"],
)
def test_rates_are_the_integrals(shapes):
    """Each integral by scipy's own adaptive routine, in probability space: no code in common."""
    arms = [distributions.beta(*shape) for shape in shapes]
    got = ranking(beta(*shapes))
    for i, arm in enumerate(arms):
        others = [other for j, other in enumerate(arms) if j != i]

        def wins(u, arm=arm, others=others):
            x = arm.ppf(u)
            return math.prod(other.cdf(x) for other in others)

        def comes_second(u, arm=arm, others=others):
            below = [other.cdf(arm.ppf(u)) for other in others]
            return sum((1 - f) * math.prod(below[:j] + below[j + 1 :]) for j, f in enumerate(below))

        for found, curve in ((got.best, wins), (got.second, comes_second)):
            expected, error = integrate.quad(curve, 0, 1, limit=500, epsabs=1e-9)
            assert found[i] == pytest.approx(expected, abs=max(1e-7, 3 * error))


@pytest.mark.parametrize(
    "arms",
    [
        ((0, 1, 3), (1, 0.1, 1), (0.5, 2, 200), (-3, 1, NORMAL)),
        ((0, 1, 1), (0, 1, 1), (5, 3, 2)),
        ((0, 1e-3, 4), (0.001, 1.0, 4), (0, 1e3, NORMAL)),
    ],
    ids=["mixed", "heavy", "scales"],
)
def test_means_are_the_draws_within_their_error(arms):
    draws = 200_000
    rng = np.random.default_rng(7)
    x = np.array(
        [
            m + s * (rng.standard_normal(draws) if math.isinf(v) else rng.standard_t(v, draws))
            for m, s, v in arms
        ]
    )
    order = np.argsort(x, axis=0)
    got = ranking(student(*arms))
    for found, row in ((got.best, order[-1]), (got.second, order[-2])):
        share = np.bincount(row, minlength=len(arms)) / draws
        error = np.sqrt(found * (1 - found) / draws)
        assert (np.abs(found - share) <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("degrees", [1.0, 7.0, 1e4])
def test_one_student_arm_against_a_known_value(degrees):
    got = ranking(student((0.7, 2.0, degrees), (0.0, 1e-9, NORMAL)))
    assert got.best[0] == pytest.approx(special.stdtr(degrees, 0.35), abs=1e-8)


def test_near_one_a_rate_keeps_its_digits():
    # The distance to 1 is Gamma(1) against Gamma(2), both over 1e12: P(Gamma(1) < Gamma(2)) = 3/4.
    got = ranking(beta((1e12, 1), (1e12, 2), (5, 3)))
    assert got.best == pytest.approx([0.75, 0.25, 0.0], abs=1e-9)
    mirrored = ranking(beta((1, 1e12), (2, 1e12), (3, 5)), Direction.DECREASE)
    assert mirrored.best == pytest.approx(got.best, abs=1e-12)


@pytest.mark.parametrize("n", [1e6, 1e9, 1e12])
def test_huge_counts_are_normal(n):
    p = 0.1 + np.array([0.0, 1.0, -0.5, 2.0]) * math.sqrt(0.09 / n)
    got = ranking(beta(*zip(n * p, n * (1 - p), strict=True)))
    sd = np.sqrt(p * (1 - p) / n)
    normal = ranking(StudentPosterior(p, sd, np.full(4, NORMAL)))
    assert got.best == pytest.approx(normal.best, abs=0.3 / math.sqrt(n) + 1e-7)


def test_a_rare_rate_of_many_units_beside_a_weak_one():
    # Here scipy 1.17 gives a quantile of Beta(1000, 132578329) at 1e-11 that lies above its mean.
    got = ranking(beta((3.02, 1), (1000, 132578329)))
    assert got.best == pytest.approx([1.0, 0.0], abs=1e-12)


def test_odds_beyond_what_a_float_holds():
    # Beta(s, s) with tiny s is a coin between 0 and 1, on log odds of about 1/s.
    got = ranking(beta((1e-4, 1e-4), (1e-4, 1e-4), (50, 50)))
    # The arm in the middle is best where both coins fell on 0.
    assert got.best == pytest.approx([0.375, 0.375, 0.25], abs=1e-4)


def test_far_apart_arms_are_certain():
    got = ranking(beta((10, 1e9), (1e9, 10), (1e8, 1e9)))
    assert got.best == pytest.approx([0, 1, 0], abs=1e-12)
    assert got.second == pytest.approx([0, 0, 1], abs=1e-12)
    lone = ranking(student((-1e9, 1.0, NORMAL), (1e9, 1e-5, 3.0)))
    assert lone.best == pytest.approx([0.0, 1.0], abs=1e-12)
    assert lone.second == pytest.approx([1.0, 0.0], abs=1e-12)


def test_what_a_float_cannot_tell_apart_is_no_answer():
    with pytest.raises(ArithmeticError, match="sum to"):
        ranking(student((-1e300, 1.0, NORMAL), (1e300, 1e-5, 3.0)))


def test_a_single_arm_is_best():
    assert ranking(beta((3, 4))).best.tolist() == [1.0]
    assert ranking(beta((3, 4))).second.tolist() == [0.0]


def test_more_arms_are_refused():
    with pytest.raises(ValueError, match="at most 64 arms"):
        ranking(beta(*[(1, 1)] * 65))


shapes = st.floats(0.05, 1e10, allow_nan=False)
arms = st.lists(st.tuples(shapes, shapes), min_size=2, max_size=6)
means = st.lists(
    st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([1.0, 3.0, 30.0, 1e4, NORMAL])),
    min_size=2,
    max_size=6,
)


def check(posterior, mirrored, order, permuted):
    got = ranking(posterior)
    for found in (got.best, got.second):
        assert (found >= 0).all()
        assert math.fsum(found) == pytest.approx(1.0, abs=1e-9)
    # Nobody is both; with two arms one's second is the other's best.
    assert (got.best + got.second <= 1 + 1e-7).all()
    if len(got.best) == 2:
        assert got.second == pytest.approx(got.best[::-1], abs=1e-7)
    assert ranking(mirrored, Direction.DECREASE).best == pytest.approx(got.best, abs=1e-7)
    assert ranking(permuted).best == pytest.approx(got.best[order], abs=1e-7)


@settings(deadline=None, max_examples=60)
@given(arms, st.randoms(use_true_random=False))
def test_rates_rank_whatever_the_order_and_direction(shapes, random):
    order = list(range(len(shapes)))
    random.shuffle(order)
    check(beta(*shapes), beta(*[(b, a) for a, b in shapes]), order, beta(*[shapes[i] for i in order]))


@settings(deadline=None, max_examples=60)
@given(means, st.randoms(use_true_random=False))
def test_means_rank_whatever_the_order_and_direction(arms, random):
    order = list(range(len(arms)))
    random.shuffle(order)
    check(
        student(*arms), student(*[(-m, s, v) for m, s, v in arms]), order, student(*[arms[i] for i in order])
    )


@settings(deadline=None, max_examples=60)
@given(st.tuples(shapes, shapes), st.lists(st.tuples(shapes, shapes), min_size=1, max_size=4))
def test_more_conversions_never_make_an_arm_less_likely_best(arm, others):
    a, b = arm
    before = ranking(beta(arm, *others)).best[0]
    after = ranking(beta((a * 1.01 + 1, b), *others)).best[0]
    assert after >= before - 1e-7


def test_ranks_add_up_to_the_orders_of_three_uniform_differences():
    # P(a first, b second, c third) of independent exponentials' order is known: rates 1, 2, 3 for the smallest.
    # -log X of Beta(rate, 1) is Exponential(rate), so the largest X has the smallest exponential.
    rates = (1.0, 2.0, 3.0)
    expected_best, expected_second = np.zeros(3), np.zeros(3)
    for first, second, _ in permutations(range(3)):
        chance = rates[first] / 6.0 * rates[second] / (6.0 - rates[first])
        expected_best[first] += chance
        expected_second[second] += chance
    got = ranking(beta(*[(rate, 1.0) for rate in rates]))
    assert got.best == pytest.approx(expected_best, abs=1e-10)
    assert got.second == pytest.approx(expected_second, abs=1e-10)
