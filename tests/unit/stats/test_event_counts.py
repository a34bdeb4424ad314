from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats.event_counts import NO_EVENTS, EventCounts, event_counts, event_counts_by_epoch
from stream_xp.stats.normal_mixture import Undetermined
from stream_xp.stats.sample_ratio import sample_ratio_dirichlet, sample_ratio_log_e

ALPHA = 0.05
RAMP = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]]
COUNT = st.integers(0, 10**7)


def exact_pair(counts, weights, k, delta):
    """The Dirichlet mixture of two arms against a log rate ratio, by the reference formula."""
    with mpmath.workdps(50):
        rho = [mpmath.mpf(w) for w in weights]
        rho = [r / sum(rho) for r in rho]
        odds = [rho[0], rho[1] * mpmath.exp(delta)]
        null = [v / sum(odds) for v in odds]

        def log_beta(x):
            return sum(mpmath.loggamma(v) for v in x) - mpmath.loggamma(sum(x))

        after = log_beta([k * r + int(c) for r, c in zip(rho, counts, strict=True)])
        terms = sum(int(c) * mpmath.log(p) for c, p in zip(counts, null, strict=True))
        return float(after - log_beta([k * r for r in rho]) - terms)


def exact_tilt(counts, weights, sd, delta):
    with mpmath.workdps(25):

        def height(d):
            total = mpmath.mpf(0)
            for c, w in zip(counts, weights, strict=True):
                total += int(c[1]) * d - int(sum(c)) * mpmath.log(w[0] + w[1] * mpmath.exp(d))
            return total

        points = [-8 * sd + 2 * sd * i for i in range(9)]
        area = mpmath.quad(lambda d: mpmath.exp(height(d) - height(delta) - d * d / (2 * sd * sd)), points)
        return float(mpmath.log(area / (sd * mpmath.sqrt(2 * mpmath.pi))))


@pytest.mark.parametrize("k", [2.0, 100.0])
@pytest.mark.parametrize(
    "counts", [(3, 9), (0, 7), (400, 300), (10**6, 10**6 + 5000), (5 * 10**11, 5 * 10**11 + 10**7)], ids=str
)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1)])
def test_dirichlet_against_its_formula_and_dual_to_its_sequence(counts, weights, k):
    result = event_counts(counts, weights, alpha=ALPHA, concentration=k)
    assert isinstance(result, EventCounts)
    assert result.log_e == result.arm_log_e
    assert result.log_e == pytest.approx(exact_pair(counts, weights, k, 0), rel=1e-9, abs=1e-8)
    assert result.lower < result.upper
    for bound in (result.lower, result.upper):
        if math.isfinite(bound):
            at = exact_pair(counts, weights, k, mpmath.mpf(bound))
            assert at == pytest.approx(math.log(20), abs=1e-7 if max(counts) > 10**9 else 1e-9)
    rejected = result.log_e >= math.log(20)
    assert rejected == (not result.lower <= 0 <= result.upper)


def test_the_estimate_is_the_ratio_of_rates():
    result = event_counts([30, 40], [0.6, 0.4], alpha=ALPHA)
    assert result.estimate == pytest.approx(math.log((40 / 0.4) / (30 / 0.6)), rel=1e-12)
    assert result.p_always_valid == min(1.0, math.exp(-result.log_e))


@settings(deadline=None, max_examples=60)
@given(COUNT, COUNT, st.sampled_from([0.5, 0.1, 0.999]), st.sampled_from([0.001, 0.05, 0.9]))
def test_both_sequences_hold_their_estimate_and_mirror(a, b, share, alpha):
    for function, wrap in ((event_counts, lambda v: v), (event_counts_by_epoch, lambda v: [v])):
        here = function(wrap([a, b]), wrap([1 - share, share]), alpha=alpha)
        there = function(wrap([b, a]), wrap([share, 1 - share]), alpha=alpha)
        if isinstance(here, Undetermined):
            assert there == here == Undetermined(NO_EVENTS)
            assert a == b == 0
            continue
        assert here.lower <= here.estimate <= here.upper
        assert here.log_e == pytest.approx(there.log_e, rel=1e-6, abs=1e-9)
        got = (-there.upper, -there.estimate, -there.lower)
        assert (here.lower, here.estimate, here.upper) == pytest.approx(got, rel=1e-6, abs=1e-9)
        if abs(here.arm_log_e + math.log(alpha)) > 1e-9:
            assert (here.arm_log_e >= -math.log(alpha)) == (not here.lower <= 0 <= here.upper)


@pytest.mark.parametrize("counts", [[[30, 9], [11, 4], [20, 31]], [[0, 3], [0, 0], [0, 5]]], ids=str)
def test_tilt_is_its_integral_and_dual_to_its_sequence(counts):
    result = event_counts_by_epoch(counts, RAMP, alpha=ALPHA)
    assert result.log_e == pytest.approx(exact_tilt(counts, RAMP, 0.2, 0), rel=1e-9, abs=1e-10)
    for bound in (result.lower, result.upper):
        if math.isfinite(bound):
            assert exact_tilt(counts, RAMP, 0.2, bound) == pytest.approx(math.log(20), abs=1e-8)


def test_the_estimate_over_epochs_solves_the_likelihood_equation():
    counts = np.array([[30, 9], [11, 4], [20, 31]])
    d = event_counts_by_epoch(counts, RAMP, alpha=ALPHA).estimate
    odds = np.array(RAMP) * np.exp([0.0, d])
    expected = counts.sum(axis=1) * odds[:, 1] / odds.sum(axis=1)
    assert counts[:, 1].sum() == pytest.approx(expected.sum(), rel=1e-12)


@pytest.mark.parametrize("control", [0, 1, 2])
def test_three_arms_are_compared_with_the_control_in_pairs(control):
    counts, weights = np.array([40, 25, 70]), np.array([0.5, 0.2, 0.3])
    result = event_counts(counts, weights, alpha=ALPHA, control=control)
    assert result.log_e == pytest.approx(sample_ratio_dirichlet(counts, weights).log_e, rel=1e-12)
    others = [arm for arm in range(3) if arm != control]
    tilted = event_counts_by_epoch([counts], [weights], alpha=ALPHA, control=control)
    assert tilted.log_e == pytest.approx(float(sample_ratio_log_e([counts], [weights], sd=0.2)), rel=1e-12)
    for at, arm in enumerate(others):
        pair = weights[[control, arm]] / weights[[control, arm]].sum()
        for table, one in (
            (result, event_counts(counts[[control, arm]], pair, alpha=ALPHA)),
            (tilted, event_counts_by_epoch([counts[[control, arm]]], [pair], alpha=ALPHA)),
        ):
            assert table.arm_log_e[at] == pytest.approx(one.log_e, rel=1e-9)
            got = (table.lower[at], table.estimate[at], table.upper[at])
            assert got == pytest.approx((one.lower, one.estimate, one.upper), rel=1e-8)


def test_many_looks_at_once():
    looks = np.array([[[3, 9, 2], [40, 25, 70]], [[0, 0, 7], [0, 0, 0]]])
    table = event_counts(looks, [0.5, 0.2, 0.3], alpha=ALPHA)
    assert np.shape(table.log_e) == (2, 2)
    assert np.shape(table.lower) == (2, 2, 2)
    assert table.determined.tolist() == [[[True, True], [True, True]], [[False, True], [False, False]]]
    assert (table.lower[1, 1].tolist(), table.upper[1, 1].tolist()) == ([-math.inf] * 2, [math.inf] * 2)
    assert (table.estimate[1, 0, 0], table.estimate[1, 0, 1]) == (0.0, math.inf)
    assert (table.log_e[1, 1], table.arm_log_e[1, 0, 0]) == (0.0, 0.0)
    one = event_counts(looks[0, 1], [0.5, 0.2, 0.3], alpha=ALPHA)
    assert table.lower[0, 1] == pytest.approx(one.lower, rel=1e-9)
    assert table.log_e[0, 1] == pytest.approx(one.log_e, rel=1e-12)
    pairs = event_counts(looks[..., :2], [0.6, 0.4], alpha=ALPHA)
    assert np.shape(pairs.lower) == (2, 2)


def test_experiments_may_have_their_own_weights_and_padding():
    counts = [[[3, 9], [5, 2]], [[7, 7], [0, 0]]]
    weights = [[[0.5, 0.5], [0.7, 0.3]], [[0.4, 0.6], [0.0, 0.0]]]
    table = event_counts_by_epoch(counts, weights, alpha=ALPHA)
    second = event_counts_by_epoch([[7, 7]], [[0.4, 0.6]], alpha=ALPHA)
    assert (table.lower[1], table.upper[1], table.log_e[1]) == pytest.approx(
        (second.lower, second.upper, second.log_e), rel=1e-9
    )


@pytest.mark.parametrize("arms", [2, 3])
def test_no_events_are_undetermined(arms):
    counts, weights = [0] * arms, [1.0 / arms] * arms
    assert event_counts(counts, weights, alpha=ALPHA) == Undetermined(NO_EVENTS)
    assert event_counts_by_epoch([counts], [weights], alpha=ALPHA) == Undetermined(NO_EVENTS)


def test_the_next_event_keeps_the_mean_of_the_e_value():
    counts, weights = np.array([31, 5, 9]), [0.6, 0.3, 0.1]
    for function, wrap in ((event_counts, lambda v: v), (event_counts_by_epoch, lambda v: [v])):
        now = math.exp(function(wrap(counts), wrap(weights), alpha=ALPHA).log_e)
        after = sum(
            w * math.exp(function(wrap(counts + e), wrap(weights), alpha=ALPHA).log_e)
            for w, e in zip(weights, np.eye(3, dtype=int), strict=True)
        )
        assert after == pytest.approx(now, rel=1e-11)


def test_nothing_depends_on_what_is_computed_with_it():
    counts = np.random.default_rng(4).integers(0, 10**6, (60, 3, 2))
    table = event_counts_by_epoch(counts, RAMP, alpha=ALPHA)
    plain = event_counts(counts[:, 0], RAMP[0], alpha=ALPHA)
    for i in range(60):
        one = event_counts_by_epoch(counts[i], RAMP, alpha=ALPHA)
        assert (one.log_e, one.lower, one.upper) == (table.log_e[i], table.lower[i], table.upper[i])
        one = event_counts(counts[i, 0], RAMP[0], alpha=ALPHA)
        assert (one.log_e, one.lower, one.upper) == (plain.log_e[i], plain.lower[i], plain.upper[i])


@pytest.mark.parametrize("function", ["dirichlet", "tilt"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [1, -1]}, "counts must not be negative"),
        ({"counts": [1.5, 1]}, "counts must be integers"),
        ({"counts": [1, 2**53]}, r"counts must not be negative and must be below 2\*\*53"),
        ({"counts": [1, 1, 1]}, "counts must end in the shape of weights"),
        ({"weights": [0.5, 0.6]}, "each row must sum to 1 within 1e-9"),
        ({"weights": [0.5, math.inf]}, "weights must be finite"),
        ({"weights": [1.0, 0.0]}, "weights must be greater than 0 wherever counts are"),
        ({"counts": [1], "weights": [1.0]}, "at least two arms"),
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1"),
        ({"mixture": 0.0}, "must be greater than 0"),
        ({"control": 2}, "control must be the index of one of 2 arms, got 2"),
        ({"control": -1}, "control must be the index of one of 2 arms, got -1"),
    ],
)
def test_bad_arguments_are_named(function, changes, message):
    given = {"counts": [3, 4], "weights": [0.5, 0.5], "alpha": 0.05, "mixture": 1.0, "control": 0, **changes}
    counts, weights, mixture = (given.pop(name) for name in ("counts", "weights", "mixture"))
    call = {
        "dirichlet": lambda: event_counts(counts, weights, concentration=mixture, **given),
        "tilt": lambda: event_counts_by_epoch([counts], [weights], sd=mixture, **given),
    }[function]
    with pytest.raises(ValueError, match=message):
        call()
