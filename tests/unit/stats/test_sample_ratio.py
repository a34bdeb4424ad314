from __future__ import annotations

import math
import time

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import (
    SampleRatio,
    Undetermined,
    sample_ratio,
    sample_ratio_dirichlet,
    sample_ratio_log_e,
)
from stream_xp.stats._dirichlet import stirling_rest
from stream_xp.stats.sample_ratio import (
    NO_UNITS,
    sample_ratio_dirichlet_log_e,
    sample_ratio_log_odds,
    sample_shares,
)

PAIR = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]]
TRIPLE = [[0.3, 0.3, 0.4], [0.1, 0.2, 0.7]]


def exact_tilt(counts, weights, arm):
    """The tilt integral of one arm in 40 digits, with the mode found by bisection."""
    n = [int(row[arm]) for row in counts]
    totals = [int(sum(row)) for row in counts]
    rho = [mpmath.mpf(row[arm]) for row in weights]

    def height(d):
        terms = (
            a * d - t * mpmath.log(1 - r + r * mpmath.exp(d)) for a, t, r in zip(n, totals, rho, strict=True)
        )
        return sum(terms) - 50 * d * d

    def slope(d):
        shares = [r * mpmath.exp(d) / (1 - r + r * mpmath.exp(d)) for r in rho]
        return sum(a - t * p for a, t, p in zip(n, totals, shares, strict=True)) - 100 * d

    low, high = mpmath.mpf(-60), mpmath.mpf(60)
    for _ in range(150):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    shares = [r * mpmath.exp(low) / (1 - r + r * mpmath.exp(low)) for r in rho]
    width = 1 / mpmath.sqrt(100 + sum(t * p * (1 - p) for t, p in zip(totals, shares, strict=True)))
    top = height(low)
    points = [-40, -20, -10, -5, 0, 5, 10, 20, 40]
    area = mpmath.quad(lambda u: mpmath.exp(height(low + width * u) - top), points)
    return top + mpmath.log(area * width * 10 / mpmath.sqrt(2 * mpmath.pi))


def exact(counts, weights):
    arms = 1 if len(weights[0]) == 2 else len(weights[0])
    with mpmath.workdps(40):
        logs = [exact_tilt(counts, weights, arm) for arm in range(arms)]
        top = max(logs)
        return float(top + mpmath.log(sum(mpmath.exp(v - top) for v in logs) / arms))


def drawn(n, weights, *, shift, seed=0):
    rng = np.random.default_rng(seed)
    odds = np.array(weights) * np.exp(shift * np.arange(len(weights[0])))
    return np.array([rng.multinomial(n, row / row.sum()) for row in odds])


@pytest.mark.parametrize("n", [10**2, 10**4, 10**6, 10**9])
@pytest.mark.parametrize("shift", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("weights", [PAIR, TRIPLE, [[0.98, 0.02]]], ids=["pair", "triple", "small"])
def test_the_quadrature_is_exact_at_every_size(n, shift, weights):
    counts = drawn(n, weights, shift=shift)
    assert float(sample_ratio_log_e(counts, weights)) == pytest.approx(
        exact(counts, weights), rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ([[0, 10**12]], [[1 - 1e-6, 1e-6]]),
        ([[10**12, 0]], [[1e-12, 1 - 1e-12]]),
        ([[10**12, 0]], [[0.5, 0.5]]),
        ([[1, 0]], [[0.5, 0.5]]),
        ([[3, 900]], [[0.9, 0.1]]),
        ([[700, 2], [5, 5]], [[0.2, 0.8], [0.5, 0.5]]),
    ],
)
def test_gross_mismatch_stays_finite_and_exact(counts, weights):
    assert float(sample_ratio_log_e(counts, weights)) == pytest.approx(
        exact(counts, weights), rel=1e-6, abs=1e-12
    )


def test_the_tilt_mixture_is_a_martingale_of_the_next_unit():
    counts = np.array([[31, 5], [12, 9]])
    weights = PAIR[:2]
    now = math.exp(float(sample_ratio_log_e(counts, weights)))
    for epoch in range(2):
        after = 0.0
        for arm in range(2):
            more = counts.copy()
            more[epoch, arm] += 1
            after += weights[epoch][arm] * math.exp(float(sample_ratio_log_e(more, weights)))
        assert after == pytest.approx(now, rel=1e-12)


def test_the_dirichlet_mixture_is_a_martingale_of_the_next_unit():
    counts, weights = np.array([31, 5, 9]), [0.6, 0.3, 0.1]
    now = math.exp(sample_ratio_dirichlet(counts, weights).log_e)
    after = sum(
        w * math.exp(sample_ratio_dirichlet(counts + e, weights).log_e)
        for w, e in zip(weights, np.eye(3, dtype=int), strict=True)
    )
    assert after == pytest.approx(now, rel=1e-12)


@pytest.mark.parametrize("n", [1, 10**2, 10**6, 10**9])
@pytest.mark.parametrize("concentration", [2.0, 100.0, 1e4])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.98, 0.02], [0.25, 0.25, 0.5]])
def test_dirichlet_is_the_ratio_of_beta_functions(n, concentration, weights):
    counts = drawn(n, [weights], shift=0.1)[0]
    with mpmath.workdps(40):
        rho = [mpmath.mpf(w) for w in weights]
        rho = [r / sum(rho) for r in rho]

        def log_beta(a):
            return sum(mpmath.loggamma(x) for x in a) - mpmath.loggamma(sum(a))

        after = log_beta([concentration * r + int(c) for r, c in zip(rho, counts, strict=True)])
        before = log_beta([concentration * r for r in rho])
        expected = after - before - sum(int(c) * mpmath.log(r) for c, r in zip(counts, rho, strict=True))
    result = sample_ratio_dirichlet(counts, weights, concentration=concentration)
    assert result.log_e == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


def test_the_rest_of_stirlings_formula():
    x = np.array([1e-6, 0.5, 3.0, 15.9, 16.0, 16.1, 40.0, 1e4])
    with mpmath.workdps(40):
        points = [mpmath.mpf(float(v)) for v in x]
        half = mpmath.log(2 * mpmath.pi) / 2
        expected = [mpmath.loggamma(v) - (v - 0.5) * mpmath.log(v) + v - half for v in points]
    assert stirling_rest(x) == pytest.approx([float(v) for v in expected], rel=1e-11)


def test_rows_that_sum_to_one_only_within_the_tolerance_are_scaled():
    counts, weights = np.array([5 * 10**8 + 10**4, 5 * 10**8]), np.array([0.5, 0.5])
    exact = sample_ratio_dirichlet(counts, weights).log_e
    assert sample_ratio_dirichlet(counts, weights * (1 + 8e-10)).log_e == pytest.approx(exact, rel=1e-6)


@settings(deadline=None)
@given(st.permutations(range(3)))
def test_neither_the_order_of_epochs_nor_that_of_arms_matters(order):
    counts, weights = drawn(500, [*TRIPLE, [0.2, 0.2, 0.6]], shift=0.1), np.array([*TRIPLE, [0.2, 0.2, 0.6]])
    reference = float(sample_ratio_log_e(counts, weights))
    assert float(sample_ratio_log_e(counts[order], weights[order])) == pytest.approx(reference, rel=1e-10)
    assert float(sample_ratio_log_e(counts[:, order], weights[:, order])) == pytest.approx(
        reference, rel=1e-10
    )


def test_two_arms_are_one_tilt_whichever_it_is():
    counts, weights = drawn(500, PAIR, shift=0.2), np.array(PAIR)
    swapped = float(sample_ratio_log_e(counts[:, ::-1], weights[:, ::-1]))
    assert float(sample_ratio_log_e(counts, weights)) == pytest.approx(swapped, rel=1e-10)


def test_epochs_of_equal_weights_may_be_merged():
    split = sample_ratio([[60, 40], [30, 45]], [[0.6, 0.4], [0.6, 0.4]])
    merged = sample_ratio([[90, 85]], [[0.6, 0.4]])
    assert split.log_e == pytest.approx(merged.log_e, rel=1e-12)


def test_many_looks_at_once_are_single_looks():
    looks = np.stack([drawn(n, TRIPLE, shift=0.2, seed=n) for n in (10, 100, 1000, 10**5)]).reshape(
        2, 2, 2, 3
    )
    table = sample_ratio_log_e(looks, TRIPLE)
    assert table.shape == (2, 2)
    for index in np.ndindex(2, 2):
        assert table[index] == pytest.approx(sample_ratio(looks[index], TRIPLE).log_e, rel=1e-12)


def test_shares_and_p():
    result = sample_ratio([[70, 30], [30, 170]], [[0.8, 0.2], [0.5, 0.5]])
    assert isinstance(result, SampleRatio)
    assert result.observed_shares == (1 / 3, 2 / 3)
    assert result.expected_shares == pytest.approx((0.6, 0.4))
    assert result.p_always_valid == min(1.0, math.exp(-result.log_e))
    assert result.log_e > math.log(1000)


def test_an_arm_without_weight_and_without_units_is_fine():
    two = sample_ratio([[40, 20]], [[0.6, 0.4]])
    idle = sample_ratio([[40, 20, 0]], [[0.6, 0.4, 0.0]])
    # Two of the three tilts are the pair's one; the third has nothing to tilt and stays at e = 1.
    assert idle.log_e == pytest.approx(np.logaddexp(two.log_e + math.log(2), 0.0) - math.log(3), rel=1e-9)
    assert sample_ratio([[40, 0]], [[1.0, 0.0]]).log_e == pytest.approx(0.0, abs=1e-12)
    assert sample_ratio_dirichlet([40, 20, 0], [0.6, 0.4, 0.0]) == SampleRatio(
        sample_ratio_dirichlet([40, 20], [0.6, 0.4]).log_e,
        sample_ratio_dirichlet([40, 20], [0.6, 0.4]).p_always_valid,
        (40 / 60, 20 / 60, 0.0),
        (0.6, 0.4, 0.0),
    )


def test_no_units_are_undetermined():
    assert sample_ratio([[0, 0]], [[0.5, 0.5]]) == Undetermined(NO_UNITS)
    assert sample_ratio_dirichlet([0, 0], [0.5, 0.5]) == Undetermined(NO_UNITS)
    assert sample_ratio_log_e([[0, 0]], [[0.5, 0.5]]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_ratio([[1, 1]], [[0.5, 0.4]]), "each row must sum to 1 within 1e-9"),
        (lambda: sample_ratio([[1, 1]], [[1.5, -0.5]]), r"weights must lie in \[0, 1\]"),
        (lambda: sample_ratio([[1, 1]], [[0.5, math.nan]]), "weights must be finite"),
        (lambda: sample_ratio([[1, 1]], [[1.0, 0.0]]), "weights must be greater than 0 wherever counts are"),
        (lambda: sample_ratio([[1, -1]], [[0.5, 0.5]]), "counts must not be negative"),
        (lambda: sample_ratio([[1, 2**53]], [[0.5, 0.5]]), r"below 2\*\*53"),
        (lambda: sample_ratio([[1.0, 1.0]], [[0.5, 0.5]]), "counts must be integers"),
        (lambda: sample_ratio([[1, 1, 1]], [[0.5, 0.5]]), "counts must end in the shape of weights"),
        (lambda: sample_ratio([[1, 1]] * 2, [[0.5, 0.5]]), "counts must end in the shape of weights"),
        (lambda: sample_ratio([[[1, 1]]], [[0.5, 0.5]]), r"counts must have the shape \(E, K\)"),
        (lambda: sample_ratio([[1]], [[1.0]]), "at least two arms"),
        (lambda: sample_ratio([1, 1], [0.5, 0.5]), "one row per epoch"),
        (lambda: sample_ratio([[1, 1]], [[0.5, 0.5]], sd=0.0), "sd must be greater than 0"),
        (
            lambda: sample_ratio_dirichlet([1, 1], [0.5, 0.5], concentration=0),
            "concentration must be greater than 0",
        ),
        (lambda: sample_ratio([[1, 1]], [["a", "b"]]), "weights must be numeric"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- batches, epochs of the Dirichlet mixture, effect sizes ------------------------------------------


def test_a_batch_of_experiments_with_their_own_weights():
    rng = np.random.default_rng(3)
    weights = rng.dirichlet([3.0, 2.0, 1.0], size=(4, 5, 2))
    counts = np.array([rng.multinomial(500, w) for w in weights.reshape(-1, 3)]).reshape(4, 5, 2, 3)
    tilt, dirichlet = sample_ratio_log_e(counts, weights), sample_ratio_dirichlet_log_e(counts, weights)
    shares = sample_shares(counts, weights)
    assert tilt.shape == dirichlet.shape == shares.determined.shape == (4, 5)
    for at in np.ndindex(4, 5):
        one = sample_ratio(counts[at], weights[at])
        assert tilt[at] == pytest.approx(one.log_e, rel=1e-10, abs=1e-10)
        assert dirichlet[at] == pytest.approx(
            sample_ratio_dirichlet(counts[at], weights[at]).log_e, rel=1e-12
        )
        assert shares.observed_shares[at] == pytest.approx(one.observed_shares)
        assert shares.expected_shares[at] == pytest.approx(one.expected_shares)
        assert shares.expected_counts[at].sum() == pytest.approx(1000)
        assert shares.observed_counts[at].tolist() == counts[at].sum(axis=0).tolist()


def test_padding_an_experiment_with_fewer_epochs_changes_nothing():
    counts, weights = np.array([[60, 30, 10], [0, 0, 0]]), np.array([[0.5, 0.3, 0.2], [0.0, 0.0, 0.0]])
    for function in (sample_ratio_log_e, sample_ratio_dirichlet_log_e):
        assert float(function(counts, weights)) == pytest.approx(float(function(counts[:1], weights[:1])))
    assert sample_shares(counts, weights).expected_shares.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_no_units_have_no_shares():
    shares = sample_shares([[0, 0]], [[0.5, 0.5]])
    assert not shares.determined
    assert shares.observed_shares.tolist() == shares.expected_shares.tolist() == [0.0, 0.0]


def test_epochs_of_the_dirichlet_mixture_multiply():
    counts = drawn(300, TRIPLE, shift=0.2)
    whole = sample_ratio_dirichlet(counts, TRIPLE)
    parts = [sample_ratio_dirichlet(row, w).log_e for row, w in zip(counts, TRIPLE, strict=True)]
    assert whole.log_e == pytest.approx(sum(parts), rel=1e-12)
    assert whole.expected_shares == pytest.approx(sample_ratio(counts, TRIPLE).expected_shares)


def test_a_thousand_experiments_are_fast():
    counts = np.random.default_rng(1).integers(0, 10**6, (1000, 2, 3))
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        sample_ratio_log_e(counts, TRIPLE)
        best = min(best, time.process_time() - start)
    assert best < 0.2


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(*[st.integers(0, 10**9)] * 2), min_size=3, max_size=3),
    st.sampled_from([0.001, 0.05, 0.9]),
    st.sampled_from([0.01, 0.1, 1.0]),
)
def test_the_log_odds_are_dual_to_the_tilt_mixture(counts, alpha, sd):
    result = sample_ratio_log_odds(counts, PAIR, alpha=alpha, sd=sd)
    if isinstance(result, Undetermined):
        assert result == Undetermined(NO_UNITS)
        assert not np.any(counts)
        return
    assert result.log_e == pytest.approx(float(sample_ratio_log_e(counts, PAIR, sd=sd)), rel=1e-6, abs=1e-9)
    assert result.lower <= result.estimate <= result.upper
    if abs(result.log_e + math.log(alpha)) > 1e-9:
        assert (result.log_e >= -math.log(alpha)) == (not result.lower <= 0 <= result.upper)
    # A shift of the weights by a bound moves the null there.
    for bound in (result.lower, result.upper):
        if 1e-3 < abs(bound) < 3 and np.sum(counts) < 10**6:
            with mpmath.workdps(30):
                at = log_odds_against(counts, PAIR, mpmath.mpf(bound), sd)
            assert at == pytest.approx(-math.log(alpha), abs=1e-6)


def log_odds_against(counts, weights, null, sd):
    """The mixture around 0 over the likelihood at `null`, by the trapezoid rule around the mode."""

    def height(d):
        return sum(
            int(c[1]) * d - int(sum(c)) * mpmath.log(w[0] + w[1] * mpmath.exp(d))
            for c, w in zip(counts, weights, strict=True)
        )

    def posterior(d):
        return height(d) - d * d / (2 * mpmath.mpf(sd) ** 2)

    low, high = mpmath.mpf(-40), mpmath.mpf(40)
    for _ in range(120):
        third = (high - low) / 3
        if posterior(low + third) < posterior(high - third):
            low += third
        else:
            high -= third
    step = mpmath.mpf(1e-3)
    bend = (posterior(low + step) - 2 * posterior(low) + posterior(low - step)) / -(step**2)
    width = 1 / mpmath.sqrt(bend)
    area = (
        sum(mpmath.exp(posterior(low + width * k / 4) - posterior(low)) for k in range(-80, 81)) * width / 4
    )
    return float(posterior(low) + mpmath.log(area / (sd * mpmath.sqrt(2 * mpmath.pi))) - height(null))


def test_the_log_odds_of_a_known_tilt():
    odds = np.array(PAIR) * np.exp([0.0, 0.2])
    counts = np.round(10**7 * odds / odds.sum(axis=1, keepdims=True)).astype(int)
    result = sample_ratio_log_odds(counts, PAIR, alpha=0.05)
    assert result.estimate == pytest.approx(0.2, abs=1e-6)
    assert result.lower < 0.2 < result.upper
    assert result.upper - result.lower < 0.01
    assert result.log_e == pytest.approx(float(sample_ratio_log_e(counts, PAIR)), rel=1e-9)
    table = sample_ratio_log_odds([counts, 0 * counts], PAIR, alpha=0.05)
    assert table.determined.tolist() == [True, False]
    assert (table.lower[1], table.upper[1], table.log_e[1]) == (-math.inf, math.inf, 0.0)
    assert table.lower[0] == pytest.approx(result.lower, rel=1e-9)


@pytest.mark.parametrize("epochs", [1, 3, 12])
def test_nothing_depends_on_what_is_computed_with_it(epochs):
    rng = np.random.default_rng(6)
    weights = rng.dirichlet([3.0, 2.0, 1.0], size=epochs)
    counts = rng.integers(0, 10**6, (40, epochs, 3))
    tilt, dirichlet = sample_ratio_log_e(counts, weights), sample_ratio_dirichlet_log_e(counts, weights)
    for i in range(40):
        assert tilt[i] == sample_ratio(counts[i], weights).log_e
        assert dirichlet[i] == sample_ratio_dirichlet(counts[i], weights).log_e


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sample_ratio_log_odds([[1, 1, 1]], [[0.5, 0.3, 0.2]], alpha=0.1),
            "weights must have two arms",
        ),
        (lambda: sample_ratio_log_odds([[1, 1]], [[0.5, 0.5]], alpha=0.0), "alpha must lie strictly"),
        (
            lambda: sample_ratio_log_odds([[1, 1]], [[0.5, 0.5]], alpha=0.1, sd=-1),
            "sd must be greater than 0",
        ),
        (
            lambda: sample_ratio_log_e([[1, 1]], [[0.0, 0.0]]),
            "weights must be greater than 0 wherever counts",
        ),
        (
            lambda: sample_ratio_log_e(np.ones((3, 1, 2), int), np.full((2, 1, 2), 0.5)),
            "counts must have a shape",
        ),
        (
            lambda: sample_ratio_dirichlet(np.ones((3, 1, 2), int), [[0.5, 0.5]]),
            r"counts must have the shape \(K,\)",
        ),
        (
            lambda: sample_ratio_dirichlet_log_e([[1, 1]], [[0.5, 0.5]], concentration=-1),
            "concentration must be",
        ),
        (lambda: sample_shares([[1, 1]], [[0.5, 0.4]]), "each row must sum to 1"),
        (
            lambda: sample_ratio_dirichlet([1, 1], [0.5, 0.5], concentration=1e13),
            "concentration must lie between",
        ),
        (lambda: sample_ratio([[1, 1]], [[0.5, 0.5]], sd=1e-7), "sd must lie between 1e-6 and 100"),
        (lambda: sample_ratio([[1, 2**90]], [[0.5, 0.5]]), r"below 2\*\*53"),
    ],
)
def test_bad_arguments_of_batches_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
