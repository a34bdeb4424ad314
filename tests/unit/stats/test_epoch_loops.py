"""Many weight epochs are summed as arrays, and every sum is to the last bit that of one epoch after the other."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.engine.evaluate import evaluate
from stream_xp.stats import conversion_difference
from stream_xp.stats.batch import sum_over_epochs
from stream_xp.stats.conversion_difference import DEFAULT_GRID, RARE_GRID, conversion_log_e
from tests.unit.stats import epoch_loops

SIZES = st.tuples(st.integers(1, 4), st.sampled_from([1, 15, 16, 17, 64, 500]))


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 30.0]))
def test_sums_of_terms_of_any_size_and_sign(size: tuple[int, int], seed: int, orders: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=size) * 10.0 ** rng.uniform(-orders, orders, size=size)
    values[rng.random(size) < 0.1] = 0.0
    values[rng.random(size) < 0.1] *= -0.0
    found, wanted = sum_over_epochs(values), epoch_loops.sum_over_epochs(values)
    assert found.tobytes() == wanted.tobytes()


def counts(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Units, successes and weights; few weights are repeated, as those of a ramp."""
    units = rng.integers(0, 10 ** rng.integers(1, 9), size=(*size, 2))
    successes = rng.binomial(units, rng.uniform(0.0, 0.3))
    share = rng.choice(rng.uniform(0.05, 0.95, size=rng.integers(1, 40)), size=size)
    return units, successes, np.stack((1.0 - share, share), axis=-1)


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**32), st.sampled_from(["both", "above", "below"]), st.booleans())
def test_mixtures_over_rates(size: tuple[int, int], seed: int, side: Any, rare: bool) -> None:
    units, successes, weights = counts(np.random.default_rng(seed), size)
    grid = RARE_GRID if rare else DEFAULT_GRID
    found = conversion_log_e(units, successes, weights=weights, side=side, grid=grid)
    observed = np.concatenate((successes, units - successes), axis=-1)
    # `epochs` scales the weights so that they sum to 1.
    wanted = epoch_loops.mixed(observed, (weights / weights.sum(axis=-1, keepdims=True))[..., 1], grid, side)
    assert found.tobytes() == wanted.tobytes()


def test_what_is_kept_of_weights_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    units, successes, weights = counts(np.random.default_rng(3), (3, 40))
    wanted = conversion_log_e(units, successes, weights=weights)
    monkeypatch.setattr(conversion_difference, "_MEMO", {})
    monkeypatch.setattr(conversion_difference, "_MEMO_ROWS", 7)
    share = np.random.default_rng(4).uniform(0.1, 0.9, size=(20, 2, 3))
    for one in share:
        few = conversion_log_e(units[:2, :3], successes[:2, :3], weights=np.stack((1 - one, one), axis=-1))
        assert np.isfinite(few).all()
        assert max(map(len, conversion_difference._MEMO.values())) <= 7
    assert conversion_log_e(units, successes, weights=weights).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("epochs", [1, 15, 16, 60])
def test_an_evaluation_has_the_same_bytes(epochs: int) -> None:
    look = epoch_loops.experiment(epochs)
    found = evaluate(*look)
    sums, mixtures = epoch_loops.as_loops()
    with sums, mixtures:
        wanted = evaluate(*look)
    for name in ("arms", "metrics", "sample_ratio"):
        assert msgspec.json.encode(getattr(found, name)) == msgspec.json.encode(getattr(wanted, name))
    assert all(metric.effect is not None for metric in found.metrics)
