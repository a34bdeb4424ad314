"""Sums, products and bins of the fold are exact."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest

from stream_xp.domain.experiment import MAX_STEPS, Metric
from stream_xp.engine import kernels
from stream_xp.engine.registry import Registry
from stream_xp.engine.state import PartitionState, _wide
from stream_xp.errors import StateError
from stream_xp.services.oracle.recompute import histogram_bin
from stream_xp.stats.log_histogram import bin_of
from tests.unit.engine.state_world import (
    LATENCY,
    LATENESS_MS,
    WINDOW_MS,
    T,
    entry,
    expose,
    exposure_of,
    reward,
    reward_of,
    spec,
)

# 128-bit sums ----------------------------------------------------------------------------------------
EXTREMES = [0, 1, -1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, -(2**32) - 1, MAX_STEPS, -MAX_STEPS]
EXTREMES += [
    kernels.OVERFLOW - 1,
    1 - kernels.OVERFLOW,
    kernels.OVERFLOW,
    -kernels.OVERFLOW,
    3 * 2**59 + 12_345,
]


def moments_of(words: Any) -> tuple[int, int, int]:
    n, *rest = words.tolist()
    return n, _wide(rest[0], rest[1]), _wide(rest[2], rest[3])


def pairs_of(words: Any) -> tuple[int, ...]:
    return tuple(_wide(low, high) for low, high in words.reshape(-1, 2).tolist())


@pytest.mark.parametrize("x", EXTREMES)
def test_one_pair_goes_in_exactly_and_comes_out_without_a_trace(x: int) -> None:
    for y in EXTREMES:
        words = np.zeros(6, np.int64)
        for sign, wanted in ((1, 1), (-1, 0), (-1, -1)):
            kernels._add_products(words, 0, x, y, sign)
            assert pairs_of(words) == (wanted * x, wanted * x * x, wanted * x * y)


def test_products_of_extremes_are_those_of_python() -> None:
    draw = random.Random(12)
    words, xy = np.zeros(2, np.int64), 0
    for _ in range(20_000):
        x, y = (
            draw.choice(
                [draw.choice(EXTREMES), draw.randint(-(2**62) + 1, 2**62 - 1), draw.randint(-(2**33), 2**33)]
            )
            for _ in range(2)
        )
        sign = 1 if abs(xy + x * y) < 2**126 else -1
        kernels._add_product(words, 0, x, y, sign)
        xy += sign * x * y
        assert pairs_of(words) == (xy,)


@pytest.mark.parametrize("y", EXTREMES)
def test_one_value_goes_in_exactly_and_comes_out_without_a_trace(y: int) -> None:
    words = np.zeros(5, np.int64)
    kernels._add_moments(words, 0, y, 1)
    assert moments_of(words) == (1, y, y * y)
    kernels._add_moments(words, 0, y, -1)
    assert moments_of(words) == (0, 0, 0)
    kernels._add_moments(words, 0, y, -1)
    assert moments_of(words) == (-1, -y, -y * y)


def test_sums_of_extremes_are_those_of_python() -> None:
    draw = random.Random(7)
    words, n, s, q = np.zeros(5, np.int64), 0, 0, 0
    for _ in range(20_000):
        y = draw.choice([draw.choice(EXTREMES), draw.randint(-(2**61), 2**61), draw.randint(-(2**33), 2**33)])
        # Kept near the edge of what 128 bits hold, from both sides.
        sign = 1 if q < 2**125 else -1
        kernels._add_moments(words, 0, y, sign)
        n, s, q = n + sign, s + sign * y, q + sign * y * y
        assert moments_of(words) == (n, s, q)


def test_the_largest_values_go_through_the_fold_exactly() -> None:
    draw = random.Random(8)
    registry = Registry([entry(0, spec("one", bound=float(MAX_STEPS)))])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
    expose(state, 0, [exposure_of(n) for n in range(200)])
    values = [draw.choice([MAX_STEPS, -MAX_STEPS, MAX_STEPS - 1, 1 - MAX_STEPS, 0]) for _ in range(200)]
    reward(state, 0, [reward_of(n, float(value)) for n, value in enumerate(values)])
    state.advance(T + WINDOW_MS + LATENESS_MS)
    found = {
        (cell.metric, cell.arm): (cell.n, int(cell.s), int(cell.q))
        for cell in state.statistics(registry.slots[0]).moments
        if cell.segment == ""
    }
    for arm, rest in (("a", 0), ("b", 1)):
        mine = values[rest::2]
        wanted = (100, sum(mine), sum(value * value for value in mine))
        assert [found[metric, arm] for metric in ("sum", "max", "last")] == [wanted] * 3


def test_the_largest_pairs_go_through_the_fold_exactly() -> None:
    draw = random.Random(10)
    most = float(MAX_STEPS)
    both = {"key": "ratio", "kind": "ratio", "bound": most, "denominator": {"event": "visit", "bound": most}}
    adjusted = {"key": "adjusted", "kind": "mean", "bound": most, "adjustment": "ancova"}
    design = spec("one", 1, both, adjusted, bound=most, covariate={"scale": 1.0, "bound": most})
    state = PartitionState(0, Registry([entry(0, design)]), allowed_lateness_ms=LATENESS_MS)
    ys, xs, zs = (
        [draw.choice([MAX_STEPS, -MAX_STEPS, MAX_STEPS - 1, 1 - MAX_STEPS, 0, 1]) for _ in range(200)]
        for _ in range(3)
    )
    expose(state, 0, [exposure_of(n, covariate=float(z)) for n, z in enumerate(zs)])
    reward(state, 0, [reward_of(n, float(y)) for n, y in enumerate(ys)])
    reward(state, 200, [reward_of(n, float(x), "visit") for n, x in enumerate(xs)])
    state.advance(T + WINDOW_MS + LATENESS_MS)
    found = {
        (row.metric, row.arm): (int(row.x), int(row.xx), int(row.xy))
        for row in state.statistics(state.registry.slots[0]).products
        if row.segment == ""
    }
    for arm, rest in (("a", 0), ("b", 1)):
        for metric, seconds in (("ratio", xs), ("adjusted", zs)):
            pairs = list(zip(seconds, ys, strict=True))[rest::2]
            assert found[metric, arm] == (
                sum(x for x, _ in pairs),
                sum(x * x for x, _ in pairs),
                sum(x * y for x, y in pairs),
            )


def test_a_sum_that_leaves_its_bound_is_an_error_of_state() -> None:
    registry = Registry([entry(0, spec("one", bound=float(MAX_STEPS)))])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
    expose(state, 0, [exposure_of(0)])
    state.arrays["values"][:] = kernels.OVERFLOW - 1
    reward(state, 0, [reward_of(0, float(MAX_STEPS))])
    with pytest.raises(StateError, match="left its bound"):
        state.advance(T + WINDOW_MS + LATENESS_MS)


# Histograms and events ------------------------------------------------------------------------------------
def test_all_three_readings_of_the_bins_agree() -> None:
    draw = random.Random(13)
    values = [*range(5_000), *(2**power + more for power in range(6, 40) for more in (-1, 0, 1)), MAX_STEPS]
    values += [draw.randrange(MAX_STEPS) for _ in range(10_000)]
    for value in values:
        assert kernels._bin(value) == histogram_bin(value) == bin_of(value)


@pytest.mark.parametrize(("bound", "scale"), [(31, 1), (63, 1), (64, 1), (60, 0.001), (2.0**40, 1), (1, 0.3)])
def test_a_histogram_has_bins_up_to_the_bound_and_none_beyond(bound: float, scale: float) -> None:
    metric = msgspec.convert({**LATENCY, "bound": bound, "scale": scale}, Metric)
    assert metric.bins == bin_of(metric.max_steps) + 1
