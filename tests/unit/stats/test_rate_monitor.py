from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stream_xp.stats.rate_monitor import (
    ODDS,
    START,
    detector_log,
    detector_step,
    rate_detector,
    records_to_detect,
)


def spelled_out(records, bad, p):
    """The mean over alternatives of the sum, over all starts, of n times the likelihood ratio since that start."""
    total = 0.0
    for odds in ODDS:
        q = p * odds / (1 - p + p * odds)
        ratios = [(q / p) ** s * ((1 - q) / (1 - p)) ** (n - s) for n, s in zip(records, bad, strict=True)]
        total += sum(n * math.prod(ratios[i:]) for i, n in enumerate(records))
    return total / len(ODDS)


def test_it_is_the_sum_over_starts():
    records, bad = [3, 0, 10, 7, 1], [0, 0, 4, 1, 1]
    got = rate_detector(records, bad, threshold=0.05)
    for t in range(5):
        assert math.exp(got[t]) == pytest.approx(spelled_out(records[: t + 1], bad[: t + 1], 0.05), rel=1e-12)


@pytest.mark.parametrize(("rate", "compare"), [(0.2, 0), (0.1, -1)])
def test_its_mean_is_the_number_of_records(rate, compare):
    mean = 0.0
    for outcomes in itertools.product((0, 1), repeat=8):
        chance = math.prod(rate if x else 1 - rate for x in outcomes)
        bad = [sum(outcomes[:3]), sum(outcomes[3:4]), sum(outcomes[4:])]
        mean += chance * math.exp(rate_detector([3, 1, 4], bad, threshold=0.2)[-1])
    assert mean == pytest.approx(8, rel=1e-12) if compare == 0 else mean < 8


def test_steps_arrays_and_empty_buckets():
    rng = np.random.default_rng(1)
    n = rng.integers(0, 50, (3, 20))
    s = rng.binomial(n, 0.02)
    got = rate_detector(n, s, threshold=[0.01, 0.02, 0.05])
    one = rate_detector(n[1], s[1], threshold=0.02)
    assert got[1] == pytest.approx(one, rel=1e-13)
    state = detector_step(START, 40, 3, threshold=0.02)
    assert (detector_step(state, 0, 0, threshold=0.02) == state).all()
    assert detector_log(START) == -math.inf
    assert rate_detector([0, 0], [0, 0], threshold=0.5).tolist() == [-math.inf] * 2
    assert np.isfinite(rate_detector([10**9, 10**9], [10**9, 0], threshold=1e-6)).all()


# ---- run length and delay -----------------------------------------------------------------------------


def first_alarm(rates, p, run_length, *, paths, per_bucket=50, seed=1):
    """Records until the alarm; all of them where there is none."""
    rng = np.random.default_rng(seed)
    n = np.full((paths, len(rates)), per_bucket)
    alarms = rate_detector(n, rng.binomial(n, rates), threshold=p) >= math.log(run_length)
    at = np.where(alarms.any(axis=1), alarms.argmax(axis=1) + 1, len(rates))
    return at * per_bucket, alarms.any(axis=1)


def test_false_alarms_take_the_run_length():
    # Records are cut off at 20 times the run length, which makes the mean smaller.
    at, _ = first_alarm(np.full(800, 0.02), 0.02, 2000.0, paths=400)
    assert at.mean() >= 2000  # 7,400 +- 320 in 400 paths
    _, early = first_alarm(np.full(40, 0.02), 0.02, 40_000.0, paths=2000, seed=2)
    assert early.mean() <= 2000 / 40_000  # 0.009 in 4,000 paths
    at, ever = first_alarm(np.full(800, 0.01), 0.02, 2000.0, paths=100, seed=3)
    assert ever.mean() < 0.1


@pytest.mark.parametrize(("rate", "odds"), [(0.1, 5), (0.5, 50)])
def test_a_rise_after_a_long_time_is_found_soon(rate, odds):
    healthy = 400
    rates = np.concatenate([np.full(healthy, 0.01), np.full(60, rate)])
    at, ever = first_alarm(rates, 0.02, 1e6, paths=200, seed=4)
    assert ever.all()
    assert (at > 50 * healthy).all()
    delay = np.median(at - 50 * healthy)
    assert delay <= 50 + records_to_detect(rate, threshold=0.02, run_length=1e6)
    since_ever = (0.01 * healthy * 50 + rate * delay) / (50 * healthy + delay)
    assert since_ever < 0.02  # since ever the rate is still in order


def test_what_cannot_be_found():
    assert records_to_detect(0.02, threshold=0.02, run_length=1e4) == math.inf
    assert records_to_detect(0.1, threshold=0.02, run_length=1e6) == pytest.approx(
        math.log(6e6) / (0.1 * math.log(4) - math.log(1.06)), rel=1e-9
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate_detector([1], [2], threshold=0.1), "bad must not exceed records"),
        (lambda: rate_detector(1, 0, threshold=0.1), "records must end in an axis"),
        (lambda: rate_detector([1.5], [0], threshold=0.1), "records must be integers"),
        (lambda: rate_detector([1], [0], threshold=0.0), "threshold must lie strictly"),
        (lambda: detector_step([0.0], 1, 0, threshold=0.1), "state must end in an axis of 6"),
        (lambda: detector_step([math.nan] * 6, 1, 0, threshold=0.1), "state must end in an axis of 6"),
        (lambda: records_to_detect(0.5, threshold=0.1, run_length=0.0), "run_length must be greater than 0"),
        (lambda: records_to_detect(1.0, threshold=0.1, run_length=5.0), "rate must lie strictly"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
