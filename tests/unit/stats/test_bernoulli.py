from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats.bernoulli import (
    BetaPrior,
    TunedPrior,
    bernoulli_bounds,
    bernoulli_log_e,
    bernoulli_pair_bound,
    bernoulli_pair_log_e,
)

TUNED = TunedPrior(1000, 0.05)
FLAT = BetaPrior(1.0, 1.0)
SIDES = ("both", "above", "below")
PRIOR = st.one_of(
    st.builds(TunedPrior, st.floats(0.1, 1e6), st.sampled_from([0.001, 0.05, 0.3])),
    st.builds(BetaPrior, st.floats(0.01, 1e3), st.floats(0.01, 1e3)),
)


def shape(prior, m):
    """The beta mixture in exact arithmetic."""
    if isinstance(prior, BetaPrior):
        return mpmath.mpf(prior.a), mpmath.mpf(prior.b)
    level = -2 * mpmath.log(mpmath.mpf(prior.alpha))
    rho = m * (1 - m) * prior.t_opt / (level + mpmath.log(1 + level))
    r = max(rho - m * (1 - m), m * (1 - m) / 1000)
    return r / (1 - m), r / m


def exact_two_sided(n, s, m, prior):
    with mpmath.workdps(50):
        m = mpmath.mpf(m)
        a, b = shape(prior, m)

        def log_beta(x, y):
            return mpmath.loggamma(x) + mpmath.loggamma(y) - mpmath.loggamma(x + y)

        likelihood = s * mpmath.log(m) + (n - s) * mpmath.log(1 - m)
        return float(log_beta(a + s, b + n - s) - log_beta(a, b) - likelihood)


def exact_above(n, s, m, prior):
    """The mixture over rates above m by brute force: two integrals over the log odds ratio of q and m."""
    with mpmath.workdps(30):
        m = mpmath.mpf(m)
        a, b = shape(prior, m)

        def log_integral(a, b):
            def height(t):
                return a * t - (a + b) * mpmath.log(1 - m + m * mpmath.exp(t))

            mode = max(mpmath.log(a / b) - mpmath.log(m / (1 - m)), mpmath.mpf(0))
            share = m * mpmath.exp(mode) / (1 - m + m * mpmath.exp(mode))
            width = 1 / mpmath.sqrt((a + b) * share * (1 - share))
            ends = [0, *(mode + k * width for k in (-8, -4, -2, -1, 0, 1, 2, 4, 8) if mode + k * width > 0)]
            ends += [ends[-1] + k for k in (1, 4, 16, 64, 256, 1024, 8192, 10**6)]
            top = height(mode)
            return top + mpmath.log(mpmath.quad(lambda t: mpmath.exp(height(t) - top), ends))

        return float(log_integral(a + s, b + n - s) - log_integral(a, b))


@pytest.mark.parametrize("prior", [TUNED, FLAT, BetaPrior(0.01, 30.0), TunedPrior(0.5, 0.05)], ids=str)
@pytest.mark.parametrize(
    ("n", "s", "m"),
    [
        (1, 0, 0.5),
        (10, 10, 0.2),
        (1000, 10, 0.02),
        (1000, 10, 1e-6),
        (10**6, 500_100, 0.5),
        (10**6, 3.25, 1e-5),
        (10**12, 10**12 // 2 + 10**6, 0.5),
        (10**12, 10**12 // 3, 0.5),
        (10**12, 0, 1e-12),
        (10**12, 10**12, 0.999999),
    ],
)
def test_the_two_sided_mixture_is_the_ratio_of_beta_functions(n, s, m, prior):
    got = bernoulli_log_e(n, s, mean=m, prior=prior)
    assert isinstance(got, float)
    assert got == pytest.approx(exact_two_sided(n, s, m, prior), rel=1e-10, abs=1e-8)


@pytest.mark.parametrize("prior", [TUNED, FLAT, BetaPrior(0.3, 30.0)], ids=str)
@pytest.mark.parametrize(
    ("n", "s", "m"),
    [
        (1, 0, 0.5),
        (10, 10, 0.2),
        (1000, 10, 0.02),
        (1000, 40, 0.02),
        (1000, 1, 0.9),
        (10**6, 500_100, 0.5),
        (10**6, 400_000, 0.5),
        (10**6, 3.25, 1e-5),
        (10**12, 10**12 // 2 + 10**6, 0.5),
    ],
)
def test_the_one_sided_mixture_is_its_integral(n, s, m, prior):
    want = exact_above(n, s, m, prior)
    assert bernoulli_log_e(n, s, mean=m, prior=prior, side="above") == pytest.approx(want, rel=1e-8, abs=1e-7)
    mirrored = BetaPrior(prior.b, prior.a) if isinstance(prior, BetaPrior) else prior
    below = bernoulli_log_e(n, n - s, mean=1 - m, prior=mirrored, side="below")
    assert below == pytest.approx(want, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("prior", [TUNED, FLAT], ids=str)
def test_every_next_unit_keeps_the_mean_of_the_e_value(prior, side):
    # A martingale at the null; one-sided a supermartingale on the null's side.
    m = 0.13
    for n, s in ((0, 0), (5, 1), (40, 9)):
        now, hit, miss = (
            math.exp(bernoulli_log_e(a, b, mean=m, prior=prior, side=side))
            for a, b in ((n, s), (n + 1, s + 1), (n + 1, s))
        )
        assert m * hit + (1 - m) * miss == pytest.approx(now, rel=1e-12)
        if side != "both":
            other = m - 0.05 if side == "above" else m + 0.05
            assert other * hit + (1 - other) * miss < now
        # A value between 0 and 1 has a smaller e-value than the 0s and 1s with the same mean.
        half = math.exp(bernoulli_log_e(n + 1, s + 0.5, mean=m, prior=prior, side=side))
        assert half <= 0.5 * (hit + miss)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 10**9), st.floats(0, 1), PRIOR, st.sampled_from(SIDES), st.sampled_from([0.001, 0.05, 0.5])
)
def test_bounds_are_dual_to_the_test(n, share, prior, side, alpha):
    s = float(round(n * share))
    lower, upper = bernoulli_bounds(n, s, alpha=alpha, prior=prior, side=side)
    assert 0 <= lower <= s / n <= upper <= 1
    threshold = -math.log(alpha)
    for bound, outwards in ((lower, -1), (upper, 1)):
        if 1e-12 < bound < 1 - 1e-12:
            at = bernoulli_log_e(n, s, mean=bound, prior=prior, side=side)
            # A bound close to 0 or 1 is no more exact than a float next to it can be.
            rounding = n * 2**-52 / min(bound, 1 - bound)
            assert at == pytest.approx(threshold, abs=1e-7 + rounding)
        for odds in (1e-6, 0.1, 1.0, 5.0):
            for sign in (1, -1):
                if not 1e-9 < bound < 1 - 1e-9:
                    continue
                log_odds = math.log(bound / (1 - bound)) + sign * outwards * odds
                m = 1 / (1 + math.exp(-log_odds))
                if sign < 0 and not lower < m < upper:
                    continue
                rejected = bernoulli_log_e(n, s, mean=m, prior=prior, side=side) >= threshold
                assert rejected == (not lower <= m <= upper)


@pytest.mark.parametrize("side", SIDES)
def test_arrays_are_the_scalars(side):
    n, s = np.array([[0, 10, 10], [10**6, 10**12, 7]]), np.array([[0, 0, 10], [3, 10**11, 4]])
    lower, upper = bernoulli_bounds(n, s, alpha=0.05, prior=TUNED, side=side)
    log_e = bernoulli_log_e(n, s, mean=0.3, prior=TUNED, side=side)
    assert lower.shape == upper.shape == log_e.shape == (2, 3)
    for at in np.ndindex(2, 3):
        one = bernoulli_bounds(int(n[at]), int(s[at]), alpha=0.05, prior=TUNED, side=side)
        assert (lower[at], upper[at]) == pytest.approx(one, rel=1e-9)
        assert log_e[at] == pytest.approx(
            bernoulli_log_e(int(n[at]), int(s[at]), mean=0.3, prior=TUNED, side=side), rel=1e-12, abs=1e-12
        )


def test_nothing_seen_says_nothing():
    assert bernoulli_bounds(0, 0, alpha=0.05, prior=TUNED) == (0.0, 1.0)
    assert bernoulli_log_e(0, 0, mean=0.5, prior=TUNED) == 0.0
    assert bernoulli_pair_log_e([0, 0], [0, 0], margin=0.1, side="above") == pytest.approx(0.0, abs=1e-12)
    assert bernoulli_pair_bound([0, 0], [0, 0], alpha=0.05, side="above") == -1.0
    assert bernoulli_pair_bound([0, 0], [0, 0], alpha=0.05, side="below") == 1.0


def test_no_failure_bounds_the_rate():
    lower, upper = bernoulli_bounds(10_000, 0, alpha=0.05, prior=FLAT)
    assert lower == 0.0
    # With a flat mixture e = 1/((n + 1)(1 - m)^n).
    assert upper == pytest.approx(1 - (0.05 / 10_001) ** (1 / 10_000), rel=1e-9)


def test_known_value():
    # ln B(8, 94)/B(1, 1) - 7 ln .1 - 93 ln .9, by hand.
    want = math.lgamma(8) + math.lgamma(94) - math.lgamma(102) - 7 * math.log(0.1) - 93 * math.log(0.9)
    assert bernoulli_log_e(100, 7, mean=0.1, prior=FLAT) == pytest.approx(want, rel=1e-12)


# ---- pairs -------------------------------------------------------------------------------------------

TILTS = [2.0**k for k in range(-7, 4)]


def upper_process(n, s, m):
    logs = [t * s - n * mpmath.log(1 - m + m * mpmath.exp(t)) for t in TILTS]
    if s == n:
        logs.append(-s * mpmath.log(m))
    return sum(mpmath.exp(v) for v in logs) / (len(TILTS) + 1)


def brute_force(units, successes, margin):
    """The least average over a fine grid of the nuisance rate."""
    (n0, n1), (s0, s1) = units, successes
    low, high = max(0.0, -margin), min(1.0, 1.0 - margin)
    best = mpmath.inf
    for k in range(301):
        at = mpmath.mpf(k) / 300
        x = low + (high - low) * at**3
        y = min(max(x + margin, mpmath.mpf(10) ** -60), 1)
        e1 = upper_process(n1, s1, y)
        e0 = upper_process(n0, n0 - s0, max(1 - x, mpmath.mpf(10) ** -60))
        best = min(best, e1 + e0 + e1 * e0)
    return float(mpmath.log(best / 3))


@pytest.mark.parametrize(
    ("units", "successes", "margin"),
    [
        ((400, 400), (0, 0), -0.01),
        ((400, 400), (0, 0), 0.01),
        ((50, 400), (3, 90), 0.05),
        ((1000, 1000), (100, 180), 0.02),
        ((300, 30), (300, 30), -0.1),
        ((30, 30), (0, 30), 0.2),
        ((0, 200), (0, 150), 0.3),
    ],
)
def test_the_pair_takes_the_least_favourable_rate(units, successes, margin):
    got = bernoulli_pair_log_e(units, successes, margin=margin, side="above")
    least = brute_force(units, successes, margin)
    assert got <= least + 1e-9
    assert got == pytest.approx(least, abs=0.2)


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.floats(-1, 1),
    st.floats(0, 1),
)
def test_no_rate_is_less_favourable(units, shares, margin, x):
    # The e-value of a pair is at most the average at any rate that the null hypothesis allows.
    n0, n1 = units
    s0, s1 = (float(math.floor(n * share)) for n, share in zip(units, shares, strict=True))
    low, high = max(0.0, -margin), min(1.0, 1.0 - margin)
    x = low + (high - low) * x
    with mpmath.workdps(30):
        y, rest = (max(mpmath.mpf(v), mpmath.mpf(10) ** -400) for v in (x + margin, 1 - x))
        e1, e0 = upper_process(n1, s1, min(y, 1)), upper_process(n0, n0 - s0, rest)
        anywhere = float(mpmath.log((e1 + e0 + e1 * e0) / 3))
    got = bernoulli_pair_log_e((n0, n1), (s0, s1), margin=margin, side="above")
    assert got <= anywhere + 1e-6 * max(1.0, abs(anywhere))


@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.2])
def test_the_pair_is_an_e_value(margin):
    # The mean over all outcomes of a small experiment, at the edge of the null hypothesis and inside it.
    n0, n1 = 4, 5
    table = {
        (s0, s1): math.exp(bernoulli_pair_log_e((n0, n1), (s0, s1), margin=margin, side="above"))
        for s0, s1 in itertools.product(range(n0 + 1), range(n1 + 1))
    }
    for x in np.linspace(max(0.0, -margin), min(1.0, 1.0 - margin), 9):
        for theta in (x + margin, max(0.0, x + margin - 0.1)):
            mean = sum(
                e
                * math.comb(n0, s0) * x**s0 * (1 - x) ** (n0 - s0)
                * math.comb(n1, s1) * theta**s1 * (1 - theta) ** (n1 - s1)
                for (s0, s1), e in table.items()
            )  # fmt: skip
            assert mean <= 1 + 1e-12


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.sampled_from(["above", "below"]),
    st.sampled_from([0.001, 0.05, 0.5]),
)
def test_the_bound_of_a_pair_is_dual_to_its_test(units, shares, side, alpha):
    successes = [float(round(n * share)) for n, share in zip(units, shares, strict=True)]
    bound = bernoulli_pair_bound(units, successes, alpha=alpha, side=side)
    threshold = -math.log(alpha)
    assert -1 <= bound <= 1
    if abs(bound) < 1:
        at = bernoulli_pair_log_e(units, successes, margin=bound, side=side)
        assert at == pytest.approx(threshold, abs=1e-7)
    for step in (1e-6, 1e-3, 0.1):
        for sign in (1, -1):
            margin = bound + sign * step
            if abs(margin) > 1:
                continue
            rejected = bernoulli_pair_log_e(units, successes, margin=margin, side=side) >= threshold
            assert rejected == (margin < bound if side == "above" else margin > bound)


def test_swapping_the_arms_swaps_the_sides():
    above = bernoulli_pair_log_e([300, 500], [10, 60], margin=0.03, side="above")
    assert bernoulli_pair_log_e([500, 300], [60, 10], margin=-0.03, side="below") == above
    flipped = bernoulli_pair_log_e([300, 500], [290, 440], margin=-0.03, side="below")
    assert flipped == pytest.approx(above, rel=1e-9)


def test_ten_thousand_units_without_a_failure_are_no_worse_than_one_percent():
    assert bernoulli_pair_log_e([10_000, 10_000], [0, 0], margin=0.01, side="below") > 90
    assert bernoulli_pair_bound([10_000, 10_000], [0, 0], alpha=0.05, side="below") < 6e-4
    # The fewest failure-free units that do; ln(20) / 0.01 would be 300 with the best bet known beforehand.
    proofs = [
        bernoulli_pair_log_e([n, n], [0, 0], margin=0.01, side="below") >= math.log(20) for n in (430, 600)
    ]
    assert proofs == [False, True]


def test_a_trillion_units():
    n = 10**12
    log_e = bernoulli_pair_log_e([n, n], [n // 2, n // 2], margin=0.01, side="below")
    assert math.isfinite(log_e)
    assert log_e > 1e7
    assert bernoulli_pair_bound([n, n], [n // 2, n // 2], alpha=0.05, side="below") < 0.01


def test_pairs_broadcast():
    units, successes = np.array([[300, 500], [200, 0]]), np.array([[10, 60], [1, 0]])
    table = bernoulli_pair_log_e(units, successes, margin=np.array([[0.0], [0.02], [-0.5]]), side="above")
    assert table.shape == (3, 2)
    assert table[1, 0] == pytest.approx(
        bernoulli_pair_log_e([300, 500], [10, 60], margin=0.02, side="above"), rel=1e-12
    )
    assert bernoulli_pair_bound(units, successes, alpha=0.1, side="below").shape == (2,)


def test_nothing_depends_on_what_is_computed_with_it():
    rng = np.random.default_rng(2)
    n = rng.integers(0, 10**6, (40, 2))
    s = rng.binomial(n, rng.uniform(0, 0.3, (40, 2)))
    for side in SIDES:
        log_e = bernoulli_log_e(n[:, 0], s[:, 0], mean=0.1, prior=TUNED, side=side)
        ends = np.array(bernoulli_bounds(n[:, 0], s[:, 0], alpha=0.05, prior=TUNED, side=side))
        for i in range(40):
            assert log_e[i] == bernoulli_log_e(n[i, 0], s[i, 0], mean=0.1, prior=TUNED, side=side)
            one = bernoulli_bounds(n[i, 0], s[i, 0], alpha=0.05, prior=TUNED, side=side)
            assert tuple(ends[:, i]) == one
    pairs = bernoulli_pair_log_e(n, s, margin=0.01, side="below")
    for i in range(40):
        assert pairs[i] == bernoulli_pair_log_e(n[i], s[i], margin=0.01, side="below")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bernoulli_log_e(-1, 0, mean=0.5, prior=FLAT), "n must be whole numbers"),
        (lambda: bernoulli_log_e(1.5, 0, mean=0.5, prior=FLAT), "n must be whole numbers"),
        (lambda: bernoulli_log_e(2**53, 0, mean=0.5, prior=FLAT), "n must be whole numbers"),
        (lambda: bernoulli_log_e(math.nan, 0, mean=0.5, prior=FLAT), "n must be finite"),
        (lambda: bernoulli_log_e(1, 2, mean=0.5, prior=FLAT), "successes must lie between 0 and n"),
        (lambda: bernoulli_log_e(1, -1, mean=0.5, prior=FLAT), "successes must lie between 0 and n"),
        (lambda: bernoulli_log_e(1, math.inf, mean=0.5, prior=FLAT), "successes must be finite"),
        (lambda: bernoulli_log_e(1, 1, mean=0.0, prior=FLAT), "mean must lie strictly between 0 and 1"),
        (lambda: bernoulli_log_e(1, 1, mean=1e-101, prior=FLAT), "mean must not be below 1e-100"),
        (lambda: bernoulli_log_e(1, 1, mean=0.5, prior=FLAT, side="up"), "side must be 'both', 'above' or"),
        (lambda: bernoulli_bounds(1, 1, alpha=1.0, prior=FLAT), "alpha must lie strictly between 0 and 1"),
        (lambda: bernoulli_bounds(1, 1, alpha=0.1, prior=FLAT, side=""), "side must be"),
        (lambda: BetaPrior(0.0, 1.0), "a must be greater than 0"),
        (lambda: BetaPrior(1.0, 1e7), "b must lie between 1e-6 and 1e6"),
        (lambda: TunedPrior(0.0, 0.05), "t_opt must be greater than 0"),
        (lambda: TunedPrior(1e13, 0.05), "t_opt must not be above 1e12"),
        (lambda: TunedPrior(10.0, 1.0), "alpha must lie strictly between 0 and 1"),
        (
            lambda: bernoulli_pair_log_e([1, 1], [0, 0], margin=1.5, side="above"),
            r"margin must lie in \[-1, 1\]",
        ),
        (
            lambda: bernoulli_pair_log_e([1, 1], [0, 0], margin=math.nan, side="above"),
            "margin must be finite",
        ),
        (lambda: bernoulli_pair_log_e([1, 1], [0, 0], margin=0.0, side="both"), "side must be 'above' or"),
        (lambda: bernoulli_pair_log_e([1, 1], [0, 2], margin=0.0, side="above"), "successes must lie"),
        (lambda: bernoulli_pair_log_e([1, 1, 1], [0, 0, 0], margin=0.0, side="above"), "units and successes"),
        (lambda: bernoulli_pair_log_e([1.5, 1], [0, 0], margin=0.0, side="above"), "units must be whole"),
        (lambda: bernoulli_log_e([1, 1], [1, 1, 1], mean=0.5, prior=FLAT), "successes must have a shape"),
        (lambda: bernoulli_log_e([1, 1], 1, mean=[0.5] * 3, prior=FLAT), "mean must have a shape"),
        (
            lambda: bernoulli_pair_log_e([[1, 1]] * 2, [[0, 0]] * 2, margin=[0.0] * 3, side="above"),
            "margin must have a shape",
        ),
        (lambda: bernoulli_pair_bound([1, 1], [0, 0], alpha=0.0, side="above"), "alpha must lie"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
