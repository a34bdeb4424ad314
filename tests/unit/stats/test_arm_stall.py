from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stream_xp.stats.arm_stall import arm_stall, units_to_detect_stall

ALPHA = 0.05


def run_by_run(labels, weights, epochs=None):
    """The e-value after each unit, by its definition: capital 1/(r (r + 1)) for run r, bet on the run to go on."""
    kept, bet, run = 1.0, 0.5, 1
    out = []
    for hit, w in zip(labels, weights, strict=True):
        if hit:
            kept -= 1 / (run * (run + 1))
            run += 1
            bet = 1 / (run * (run + 1))
        else:
            bet /= 1 - w
        out.append(kept - 1 / (run * (run + 1)) + bet)
    return out


@pytest.mark.parametrize("weights", [[0.5] * 9, [0.1] * 4 + [0.3] * 3 + [0.8] * 2])
def test_its_mean_is_1_over_every_path(weights):
    total = np.zeros(len(weights))
    for labels in itertools.product((0, 1), repeat=len(weights)):
        chance = math.prod(w if hit else 1 - w for hit, w in zip(labels, weights, strict=True))
        total += chance * np.array(run_by_run(labels, weights))
    assert total == pytest.approx(np.ones(len(weights)), rel=1e-12)


def test_it_is_that_process():
    rng = np.random.default_rng(1)
    weights = [0.1] * 40 + [0.3] * 30 + [0.5] * 30
    labels = (rng.random(100) < np.array(weights)).astype(int)
    expected = run_by_run(labels, weights)
    epoch = np.repeat([0, 1, 2], [40, 30, 30])
    others, units = np.zeros(3, dtype=int), 0
    for i in range(100):
        if labels[i]:
            others[:], units = 0, units + 1
        else:
            others[epoch[i]] += 1
        got = arm_stall(others, [0.1, 0.3, 0.5], units=units)
        assert math.exp(got.log_e) == pytest.approx(expected[i], rel=1e-9)
        assert got.log_rarity == pytest.approx(
            -math.log((0.9 ** others[0]) * (0.7 ** others[1]) * 0.5 ** others[2])
        )


def test_arrays_and_edges():
    got = arm_stall([[0, 0], [10, 3]], [[0.5, 0.2], [0.0, 0.5]], units=[0, 7])
    assert got.log_e.shape == (2,)
    assert (got.log_e[0], got.log_rarity[0]) == (0, 0)
    assert got.log_rarity[1] == pytest.approx(3 * math.log(2))
    assert math.isfinite(arm_stall([10**9], [0.999], units=0).log_e)
    assert arm_stall([0], [1.0], units=5).log_rarity == 0
    assert arm_stall([5], [0.0], units=0).log_e == 0


@pytest.mark.parametrize(("weight", "units"), [(0.5, 0), (0.5, 10_000), (0.01, 300)])
def test_units_to_detect(weight, units):
    n = units_to_detect_stall(weight, alpha=ALPHA, units=units)
    assert arm_stall([n], [weight], units=units).log_e >= -math.log(ALPHA)
    assert arm_stall([n - 1], [weight], units=units).log_e < -math.log(ALPHA)


# ---- error rate and run length ------------------------------------------------------------------------


def runs(weights, paths, seed):
    """At every unit: how many others since the arm's last unit, by epoch, and the arm's units; all (paths, units)."""
    rng = np.random.default_rng(seed)
    values, epoch = np.unique(weights, return_inverse=True)
    hits = rng.random((paths, len(weights))) < weights
    at = np.arange(len(weights))
    last = np.maximum.accumulate(np.where(hits, at, -1), axis=1)
    counts = np.stack([np.concatenate(([0], np.cumsum(epoch == e))) for e in range(len(values))], axis=-1)
    return counts[at + 1] - counts[last + 1], values, hits.cumsum(axis=1)


@pytest.mark.parametrize(
    "weights",
    [np.full(20_000, 0.5), np.repeat([0.01, 0.05, 0.5], [10_000, 5000, 5000])],
    ids=["fixed", "ramp"],
)
def test_a_healthy_arm_is_left_alone_for_ever(weights):
    others, values, units = runs(weights, 300, 1)
    found = arm_stall(others, values, units=units)
    assert (found.log_e >= -math.log(ALPHA)).any(
        axis=1
    ).mean() <= ALPHA + 0.03  # 0.04 and 0.05 in 1,200 paths, error 0.006
    naive = (found.log_rarity >= -math.log(ALPHA)).any(axis=1).mean()
    assert naive == 1.0


def test_false_alarms_are_as_rare_as_asked():
    others, values, units = runs(np.full(40_000, 0.3), 100, 2)
    rarity = arm_stall(others, values, units=units).log_rarity
    for length in (100.0, 1000.0):
        ends = (rarity >= math.log(length)) & (others[..., 0] > 0)
        # Each run counts once, at the unit at which it becomes that rare.
        first = ends & ~np.concatenate([np.zeros((100, 1), dtype=bool), ends[:, :-1]], axis=1)
        assert units[:, -1].sum() / first.sum() >= 0.97 * length


def test_a_stall_is_found_at_once():
    # After 10,000 units at 50 % in each arm: some 30 units of the other arm.
    assert units_to_detect_stall(0.5, alpha=ALPHA, units=10_000) == 31
    assert units_to_detect_stall(0.05, alpha=ALPHA, units=500) == 301


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arm_stall(3, 0.5, units=0), "others and weights must end in an axis"),
        (lambda: arm_stall([-1], [0.5], units=0), "others must not be negative"),
        (lambda: arm_stall([1.5], [0.5], units=0), "others must be integers"),
        (lambda: arm_stall([1], [1.0], units=0), "weights must lie in"),
        (lambda: arm_stall([1], [-0.1], units=0), "weights must lie in"),
        (lambda: arm_stall([1], [0.5], units=-1), "units must not be negative"),
        (lambda: units_to_detect_stall(0.0, alpha=ALPHA, units=0), "weight must lie strictly"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
