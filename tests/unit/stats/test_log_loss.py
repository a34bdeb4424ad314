from __future__ import annotations

import math

import numpy as np
import pytest

from stream_xp.stats import success_ratio_log_e
from stream_xp.stats.log_loss import log_loss

ALPHA, HALF = 0.05, [[0.5, 0.5]]


def test_it_is_the_average_of_two_label_tests():
    counts, weights = [[100, 12], [40, 3]], [[0.5, 0.5], [0.8, 0.2]]
    got = log_loss(counts, weights, largest_ratio=3.0)
    low = success_ratio_log_e(counts, weights, null=-math.log(3), side="below")
    high = success_ratio_log_e(counts, weights, null=math.log(3), side="above")
    assert (got.log_e_treatment, got.log_e_control) == (low, high)
    assert math.exp(got.log_e) == pytest.approx((math.exp(low) + math.exp(high)) / 2)


def test_either_arm_may_lose_its_log():
    lost = log_loss([[200, 10]], HALF, largest_ratio=2.0)
    turned = log_loss([[10, 200]], HALF, largest_ratio=2.0)
    assert lost.log_e == pytest.approx(float(turned.log_e))
    assert lost.log_e_treatment == pytest.approx(float(turned.log_e_control))
    assert lost.log_e > 10
    assert lost.log_e_control < 0
    assert log_loss([[0, 0]], HALF, largest_ratio=2.0).log_e == pytest.approx(0, abs=1e-12)
    # A large but declared effect is none.
    assert log_loss([[200, 110]], HALF, largest_ratio=2.0).log_e < 0


def test_a_silent_arm_is_found_within_a_few_rewards():
    n = np.arange(1, 40)
    found = log_loss(np.stack([n, 0 * n], axis=-1)[:, np.newaxis], HALF, largest_ratio=2.0).log_e
    assert n[found >= -math.log(ALPHA)][0] == 16
    canary = log_loss(
        np.stack([19 * n, 0 * n], axis=-1)[:, np.newaxis], [[0.95, 0.05]], largest_ratio=2.0
    ).log_e
    assert (canary[n * 19 < 100] < -math.log(ALPHA)).all()


def draw(ratio, *, paths, looks=40, step=200, rate=0.1, share=0.5, seed=1, sent=None):
    """Units and units with a reward, (paths, looks, 1, 2); the common rate doubles on the way."""
    rng = np.random.default_rng(seed)
    treated = rng.binomial(step, share if sent is None else sent, (paths, looks))
    units = np.stack([step - treated, treated], axis=-1)
    rates = rate * np.linspace(1, 2, looks)[:, np.newaxis] * np.array([1.0, ratio])
    return units.cumsum(axis=1)[:, :, np.newaxis], rng.binomial(units, rates).cumsum(axis=1)[:, :, np.newaxis]


@pytest.mark.parametrize(("ratio", "share"), [(0.5, 0.5), (2.0, 0.5), (0.5, 0.1), (1.0, 0.5)])
def test_ratios_up_to_the_largest_one_are_left_alone(ratio, share):
    _, events = draw(ratio, paths=400, share=share)
    errs = (
        (log_loss(events, [[1 - share, share]], largest_ratio=2.0).log_e >= -math.log(ALPHA))
        .any(axis=1)
        .mean()
    )
    assert errs <= 0.05  # 0.000 to 0.019 in 2,000 paths


def test_a_broken_assignment_is_no_loss():
    # The treatment gets 12 % instead of half of the units: the sample ratio's matter.
    units, events = draw(1.0, paths=200, sent=0.12)
    trusting = log_loss(events, HALF, largest_ratio=2.0).log_e
    robust = log_loss(events, HALF, largest_ratio=2.0, units=units).log_e
    assert (trusting >= -math.log(ALPHA)).any(axis=1).mean() > 0.99
    assert (robust >= -math.log(ALPHA)).any(axis=1).mean() <= 0.01
    units, events = draw(0.01, paths=200)
    assert (
        log_loss(events, HALF, largest_ratio=2.0, units=units).log_e[:, 5] >= -math.log(ALPHA)
    ).mean() > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"largest_ratio": 1.0}, "largest_ratio must be above 1"),
        ({"largest_ratio": math.nan}, "largest_ratio must be above 1"),
        ({"largest_ratio": 1e41}, "largest_ratio must be above 1 and at most 1e40"),
        ({"sd": 0.0}, "sd must"),
        ({"units": [[1]]}, "units must end in the shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        log_loss([[3, 4]], HALF, **({"largest_ratio": 2.0} | change))
