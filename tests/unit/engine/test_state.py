"""The state of a partition: exact at the extremes, the same however it grew, whole after a snapshot."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import MAX_STEPS, ExperimentRecord, ExperimentSpec, Metric, WeightEpoch
from stream_xp.domain.statistics import Rules
from stream_xp.engine import kernels
from stream_xp.engine.columns import Block, ExposureColumns, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot, parts_of, state_of
from stream_xp.engine.snapshot_log import KeyedRecord, whole_snapshots
from stream_xp.engine.state import EXPOSURES, REWARDS, SPARE_SHARE, PartitionState, _wide
from stream_xp.errors import ConfigError, StateError
from stream_xp.services.oracle.recompute import histogram_bin
from stream_xp.stats.log_histogram import bin_of

T = 1_000_000
WINDOW_MS = 1_000
LATENESS_MS = 1_000


def spec(
    experiment: str, version: int = 1, *metrics: dict[str, Any], bound: float = 10.0, **fields: Any
) -> ExperimentSpec:
    common = {"role": "secondary", "direction": "increase", "attribution_window": "1s", "event": "order"}
    return msgspec.convert(
        {
            "experiment": experiment,
            "version": version,
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
            "metrics": [
                {
                    **common,
                    "key": "click",
                    "kind": "conversion",
                    "role": "primary",
                    "event": f"{experiment}-click",
                },
                {**common, "key": "sum", "kind": "mean", "bound": bound},
                {**common, "key": "max", "kind": "mean", "bound": bound, "aggregation": "max"},
                {**common, "key": "last", "kind": "mean", "bound": bound, "aggregation": "last"},
                *({**common, **metric} for metric in metrics),
            ],
            "segments": {"device": ["ios"]} if version == 1 else {},
            **fields,
        },
        ExperimentSpec,
    )


def entry(offset: int, design: ExperimentSpec, *, epochs: int = 1) -> Entry:
    record = ExperimentRecord(
        spec=design,
        epochs=tuple(WeightEpoch(epoch=at, weights=design.weights, effective_ms=at) for at in range(epochs)),
        design_hash=design.design_hash(),
    )
    return Entry(offset=offset, experiment=design.experiment, in_force_ms=0, record=record)


def block(topic: str, first: int, events: list[dict[str, Any]]) -> Block:
    n = len(events)
    return Block(
        topic,
        0,
        first,
        first + n,
        list(range(first, first + n)),
        [event["time"] for event in events],
        [event["unit"].encode() for event in events],
        [json.dumps(event).encode() for event in events],
        [()] * n,
    )


def expose(state: PartitionState, first: int, events: list[dict[str, Any]]) -> None:
    columns, letters = exposure_columns(
        block(EXPOSURES, first, events), state.registry, floor_ms=state.log_ms(EXPOSURES), limits=Limits()
    )
    assert letters == []
    state.apply_exposures(columns, next_offset=first + len(events))


def reward(state: PartitionState, first: int, events: list[dict[str, Any]]) -> None:
    columns, letters = reward_columns(
        block(REWARDS, first, events), state.registry, floor_ms=state.log_ms(REWARDS), limits=Limits()
    )
    assert letters == []
    state.apply_rewards(columns, next_offset=first + len(events))


def exposure_of(n: int, experiment: str = "one", **fields: Any) -> dict[str, Any]:
    return {
        "id": f"{experiment}{n}",
        "time": T,
        "experiment": experiment,
        "unit": f"u{n}",
        "arm": "ab"[n % 2],
        **fields,
    }


def reward_of(n: int, value: float, metric: str = "order") -> dict[str, Any]:
    return {"id": f"{metric}{n}", "time": T + 1 + n % 7, "unit": f"u{n}", "metric": metric, "value": value}


def canonical(state: PartitionState) -> dict[tuple[str, int], bytes]:
    return {
        (slot.experiment, slot.version): state.statistics(slot).canonical() for slot in state.registry.slots
    }


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


COMMON = {"role": "secondary", "direction": "decrease", "attribution_window": "1s"}
LATENCY = {**COMMON, "key": "wait", "kind": "latency", "event": "wait", "scale": 1.0, "bound": 1e6}
COUNT = {**COMMON, "key": "errors", "kind": "count", "event": "error"}
KINDS: list[dict[str, Any]] = [
    LATENCY,
    COUNT,
    {**LATENCY, "key": "slowest", "aggregation": "max", "attribution_window": "2s"},
    {**LATENCY, "key": "newest", "aggregation": "last"},
    {**COUNT, "key": "all", "aggregation": "sum"},
    {
        **COMMON,
        "key": "ratio",
        "kind": "ratio",
        "event": "order",
        "bound": 100,
        "denominator": {"event": "wait", "bound": 1e6},
    },
    {**COMMON, "key": "adjusted", "kind": "mean", "event": "order", "bound": 100, "adjustment": "cuped"},
]
COVARIATE = {"scale": 1.0, "bound": 50.0}


def kinds_state() -> PartitionState:
    registry = Registry([entry(0, spec("one", 1, *KINDS, covariate=COVARIATE), epochs=2)])
    return PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)


def bins(state: PartitionState, metric: str = "wait") -> dict[str, dict[int, int]]:
    rows = state.statistics(state.registry.slots[0]).histograms
    return {row.arm: dict(row.bins) for row in rows if (row.metric, row.segment) == (metric, "")}


def events(state: PartitionState) -> dict[str, tuple[int, int]]:
    rows = state.statistics(state.registry.slots[0]).events
    return {row.arm: (row.units, row.events) for row in rows if row.segment == ""}


@pytest.mark.parametrize("seed", range(5))
def test_of_events_at_the_same_time_the_first_offset_is_first(seed: int) -> None:
    state = kinds_state()
    expose(state, 0, [exposure_of(n) for n in range(100)])
    draw = random.Random(seed)
    places = [n for n in range(100) for _ in range(6)]
    draw.shuffle(places)
    sent = [
        {**reward_of(n, draw.randrange(1_000), "wait"), "id": str(at), "time": T + draw.randrange(1, 4)}
        for at, n in enumerate(places)
    ]
    reward(state, 0, sent)
    state.advance(T + LATENESS_MS + 10)
    first: dict[str, tuple[int, int, int]] = {}
    for offset, event in enumerate(sent):
        mine = (event["time"], offset, event["value"])
        first[event["unit"]] = min(mine, first.get(event["unit"], mine))
    wanted = {
        arm: Counter(bin_of(value) for unit, (_, _, value) in first.items() if int(unit[1:]) % 2 == at)
        for at, arm in enumerate("ab")
    }
    assert bins(state) == wanted


def test_an_event_counts_once_it_is_settled_and_a_crossover_takes_it_back() -> None:
    state = kinds_state()
    expose(state, 0, [exposure_of(n) for n in range(4)])
    sent = [{**reward_of(n, 70.0, kind), "time": T + 5} for n in (0, 1) for kind in ("wait", "error")]
    sent += [{**reward_of(0, 1.0, "error"), "id": "more", "time": T + 6}]
    reward(state, 0, sent)
    state.advance(T + LATENESS_MS + 5)
    assert (bins(state), events(state)) == ({}, {})
    assert state.take_dirty()
    state.advance(T + LATENESS_MS + 6)
    assert [slot.experiment for slot in state.take_dirty()] == ["one"]
    assert (bins(state), events(state)) == ({"a": {67: 1}, "b": {67: 1}}, {"a": (1, 1), "b": (1, 1)})
    state.advance(T + LATENESS_MS + 7)
    assert events(state) == {"a": (1, 2), "b": (1, 1)}
    expose(state, 4, [{**exposure_of(0), "id": "x", "arm": "b", "time": T + 500}])
    assert (bins(state), events(state)) == ({"b": {67: 1}}, {"b": (1, 1)})
    # What else happens to the crossover counts no more.
    reward(
        state,
        5,
        [{**reward_of(0, 3.0, kind), "id": f"late {kind}", "time": T + 600} for kind in ("wait", "error")],
    )
    state.advance(T + 60_000)
    assert (bins(state), events(state)) == ({"b": {67: 1}}, {"b": (1, 1)})
    assert bins(state, "slowest") == {"b": {67: 1}}


def test_a_unit_that_nothing_matures_of_waits_for_nothing() -> None:
    registry = Registry([entry(0, spec("one"))])
    design = msgspec.structs.replace(
        registry.slots[0].spec, metrics=tuple(msgspec.convert([LATENCY, COUNT], list[Metric])), version=2
    )
    registry.add([entry(1, design)])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
    expose(state, 0, [exposure_of(n) for n in range(50)])
    assert int(state.arrays["scalars"][kernels.DUE]) == 0
    reward(state, 0, [reward_of(n, 9.0, "wait") for n in range(50)])
    state.advance(T + 60_000)
    (row,) = [
        one for one in state.statistics(registry.slots[1]).histograms if (one.arm, one.segment) == ("a", "")
    ]
    assert row.bins == ((9, 25),)
    assert again(state).statistics(registry.slots[1]) == state.statistics(registry.slots[1])


def test_what_uses_no_newer_kind_takes_no_more_memory() -> None:
    """Words of values per unit and words of a cell, as they were: any, sum, max and last; five to a cell."""
    state = PartitionState(0, Registry([entry(0, spec("one"))]), allowed_lateness_ms=LATENESS_MS)
    assert state._layout.slots["width"][0] == 1 + 1 + 2 + 3
    assert len(state.arrays["moments"]) == 4 * 2 * 3 * 5
    assert kernels.ROW.itemsize == 40
    unused = spec("one", 1, covariate=COVARIATE)
    state = PartitionState(0, Registry([entry(0, unused)]), allowed_lateness_ms=LATENESS_MS)
    assert state._layout.slots["width"][0] == 1 + 1 + 2 + 3
    # first + 1, count, max, last, count, two sums; sum; covariate
    assert kinds_state()._layout.slots["width"][0] == 7 + 1 + 1 + 2 + 3 + 1 + 2 + 1 + 1


# Growing ------------------------------------------------------------------------------------------------


def grown(units: int, sizes: list[int], *, snapshots: bool = False) -> PartitionState:
    registry = Registry([entry(0, spec("one")), entry(1, spec("two"))])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
    for topic, apply, make in (
        (EXPOSURES, expose, lambda n: exposure_of(n, "one" if n % 3 else "two")),
        (REWARDS, reward, lambda n: reward_of(n, n % 19 - 9.0)),
    ):
        at = 0
        for size in sizes:
            apply(state, at, [make(n) for n in range(at, min(at + size, units))])
            at += size
            if snapshots:
                state = decode_snapshot(encode_snapshot(state), Registry(), allowed_lateness_ms=LATENESS_MS)
        assert state.progress[topic].next_offset == units
    state.advance(T + WINDOW_MS + LATENESS_MS)
    return state


def test_many_small_blocks_come_to_the_bytes_of_one_large_block() -> None:
    units = 100_000
    one = grown(units, [units])
    draw = random.Random(9)
    sizes: list[int] = []
    while sum(sizes) < units:
        sizes.append(min(draw.choice([1, 15, 16, 17, 500, 2_000, 4_096]), units - sum(sizes)))
    many = grown(units, sizes)
    assert one.units == many.units == units
    assert canonical(one) == canonical(many)
    for topic in (EXPOSURES, REWARDS):
        assert one.outcomes(topic) == many.outcomes(topic)
        assert many.outcomes(topic).conserved()
    total = sum(
        sum(cell.n for cell in one.statistics(slot).moments if cell.segment == "")
        for slot in one.registry.slots
    )
    assert total == 4 * units


def test_a_row_takes_at_most_64_bytes_beyond_its_values() -> None:
    """Row, due queue and hash table together, at every size: each grows at another time."""
    registry = Registry([entry(0, spec("one"))])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
    worst = 0.0
    for first in range(0, 200_000, 2_000):
        n = 2_000
        fresh = np.random.default_rng(first).integers(-(2**63), 2**63 - 1, (n, 2))
        state.apply_exposures(columns_of(first, fresh), next_offset=first + n)
        used = (
            kernels.ROW.itemsize * state.units + kernels.TIMED.itemsize * state.arrays["scalars"][kernels.DUE]
        )
        worst = max(worst, (used + state.arrays["lookup"].nbytes) / state.units)
        assert state.units <= 0.6 * len(state.arrays["lookup"])
    assert state.units == 200_000
    assert 50 < worst <= 64


def columns_of(first: int, unit: kernels.Int64) -> ExposureColumns:
    """Exposures of these units in the first slot, all at one time."""
    n = len(unit)
    zeros = np.zeros(n, np.int64)
    at = np.full(n, T, np.int64)
    return ExposureColumns(
        offset=np.arange(first, first + n),
        log_ms=at,
        time_ms=at,
        unit=unit,
        event_id=unit,
        slot=zeros,
        arm=zeros,
        epoch=zeros,
        segment=zeros,
        covariate=zeros,
    )


@pytest.mark.parametrize("time_ms", [0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**33) - 5, 2**46, -(2**47)])
def test_a_time_fits_in_its_two_fields(time_ms: int) -> None:
    state = PartitionState(0, Registry([entry(0, spec("one"))]), allowed_lateness_ms=LATENESS_MS)
    kernels._set_t0_ms(state._state(), 3, time_ms)
    assert kernels._t0_ms(state._state(), 3) == time_ms


def test_what_a_row_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = PartitionState(0, Registry([entry(0, spec("one"))]), allowed_lateness_ms=LATENESS_MS)
    monkeypatch.setattr(kernels, "MAX_ROWS", 3)
    with pytest.raises(StateError, match="partition 0: 4 rows with 28 words of values are more than"):
        expose(state, 0, [exposure_of(n) for n in range(4)])
    monkeypatch.setattr(kernels, "MAX_SLOTS", 1)
    with pytest.raises(ConfigError, match="2 versions of experiments are more than the 1"):
        PartitionState(0, Registry([entry(0, spec("one")), entry(1, spec("two"))]), allowed_lateness_ms=0)
    monkeypatch.setattr(kernels, "MAX_EPOCHS", 1)
    with pytest.raises(ConfigError, match="one version 1 has more than 1 weight epochs"):
        PartitionState(0, Registry([entry(0, spec("one"), epochs=2)]), allowed_lateness_ms=0)


def test_growing_through_snapshots_changes_nothing() -> None:
    sizes = [1, 2, 13, 16, 100, 368]
    assert canonical(grown(500, sizes, snapshots=True)) == canonical(grown(500, [500]))


# Rows of versions that have ended ------------------------------------------------------------------------


def ended_at(offset: int, experiment: str, in_force_ms: int) -> Entry:
    return Entry(offset=offset, experiment=experiment, in_force_ms=in_force_ms, record=None)


def at(events: list[dict[str, Any]], time_ms: int) -> list[dict[str, Any]]:
    return [{**event, "time": time_ms, "id": f"{event['id']}@{time_ms}"} for event in events]


def test_rows_are_given_up_when_both_logs_and_the_last_window_are_past_the_end() -> None:
    last_ms = T + WINDOW_MS + LATENESS_MS
    for end_ms, given_up_at in ((T + 10, last_ms), (last_ms + 500, last_ms + 500)):
        registry = Registry([entry(0, spec("one")), entry(1, spec("two")), ended_at(2, "one", end_ms)])
        state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
        expose(state, 0, [exposure_of(n) for n in range(40)])
        before = state.statistics(registry.slots[0]).units
        for step, (now_ms, held) in enumerate([(given_up_at - 1, 40 + 1), (given_up_at, 2)]):
            expose(state, 40 + step, at([exposure_of(50 + step, "two")], now_ms))
            # One log alone does not do.
            assert state.units == 40 + step + 1
            reward(state, step, at([reward_of(99, 1.0)], now_ms))
            assert state.units == held
        assert state.statistics(registry.slots[0]).units == before
        assert go_on_from(again(state)) == go_on_from(state)


def go_on_from(state: PartitionState) -> dict[tuple[str, int], bytes]:
    state.advance(T + 10**6)
    return canonical(state)


def test_the_place_of_rows_that_were_given_up_is_used_again() -> None:
    registry = Registry([entry(0, spec("one")), entry(1, spec("two")), ended_at(2, "one", T + 10)])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
    expose(state, 0, [exposure_of(n, "one") for n in range(1_000)])
    late_ms = T + WINDOW_MS + LATENESS_MS
    expose(state, 1_000, at([exposure_of(n, "two") for n in range(10)], late_ms))
    reward(state, 0, at([reward_of(n, 2.0) for n in range(10)], late_ms))
    assert state.units == 10
    sizes = {name: len(state.arrays[name]) for name in ("rows", "values", "lookup", "due")}
    expose(state, 1_010, at([exposure_of(n, "two") for n in range(10, 900)], late_ms + 1))
    assert {name: len(state.arrays[name]) for name in sizes} == sizes
    reward(state, 10, at([reward_of(n, 2.0) for n in range(900)], late_ms + 1))
    state.advance(late_ms * 2)
    for slot, units in zip(registry.slots, (1_000, 900), strict=True):
        assert sum(row.units for row in state.statistics(slot).units if row.segment == "") == units
    (sums, *_) = [cell for cell in state.statistics(registry.slots[1]).moments if cell.segment == ""]
    assert sums.n > 0


def test_few_rows_are_not_worth_moving_the_others() -> None:
    registry = Registry([entry(0, spec("one")), entry(1, spec("two")), ended_at(2, "one", T + 10)])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
    expose(state, 0, [exposure_of(n, "one") for n in range(10)])
    expose(state, 10, [exposure_of(n, "two") for n in range(71)])
    late_ms = T + WINDOW_MS + LATENESS_MS
    expose(state, 81, at([exposure_of(0, "two")], late_ms))
    reward(state, 0, at([reward_of(0, 2.0)], late_ms))
    assert state.units == 81
    registry.add([ended_at(3, "two", T + 20)])
    late_ms += WINDOW_MS + LATENESS_MS
    expose(state, 82, at([exposure_of(0, "three")], late_ms))
    reward(state, 1, at([reward_of(2, 2.0)], late_ms))
    assert state.units == 0


# The bound of units ---------------------------------------------------------------------------------------


def bounded(max_units: int) -> PartitionState:
    registry = Registry([entry(0, spec("one")), entry(1, spec("two"))])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS, max_units=max_units)
    expose(state, 0, [exposure_of(n) for n in range(5)])
    return state


def test_past_the_bound_units_are_refused_and_that_is_said() -> None:
    state = bounded(3)
    one, two = state.registry.slots
    assert state.outcomes(EXPOSURES).over_limit == state.statistics(one).over_limit == 2
    assert state.statistics(two).over_limit == 0
    assert state.take_dirty() == [one]
    # Those that are held go on: again, and in another arm. Another experiment has a bound of its own.
    more = [exposure_of(0), exposure_of(1, arm="b" if exposure_of(1)["arm"] == "a" else "a"), exposure_of(4)]
    expose(state, 5, [{**event, "id": f"more{at}"} for at, event in enumerate(more)])
    expose(state, 8, [exposure_of(n, "two") for n in range(3)])
    outcomes = state.outcomes(EXPOSURES)
    assert (outcomes.counted, outcomes.crossover, outcomes.over_limit) == (3 + 3, 2, 3)
    assert outcomes.conserved()
    assert state.take_dirty() == [one, two]
    assert state.record(one).statistics.over_limit == 3


@pytest.mark.parametrize(
    ("made_with", "read_with", "allowed"),
    [(5, 6, True), (9, 5, True), (9, 4, False), (4, 5, False), (4, 4, True), (4, 3, False)],
)
def test_the_bound_may_change_while_nothing_shows(made_with: int, read_with: int, *, allowed: bool) -> None:
    snapshot = encode_snapshot(bounded(made_with))
    if allowed:
        state = decode_snapshot(snapshot, Registry(), allowed_lateness_ms=LATENESS_MS, max_units=read_with)
        assert canonical(state) == canonical(bounded(read_with))
    else:
        with pytest.raises(ConfigError, match=f"max_units={made_with}, the setting is {read_with}"):
            decode_snapshot(snapshot, Registry(), allowed_lateness_ms=LATENESS_MS, max_units=read_with)


# Snapshots --------------------------------------------------------------------------------------------


RULES = Rules(
    activation_delay_ms=5_000, future_tolerance_ms=300_000, max_record_bytes=65_536, max_units=20_000_000
)


@pytest.fixture(scope="module")
def held() -> PartitionState:
    """A state with something in every array: open windows, waiting rewards, crossovers, segments, two epochs."""
    design = spec("one", 1, *KINDS, covariate=COVARIATE)
    registry = Registry([entry(0, design, epochs=2), entry(1, spec("two")), entry(2, spec("two", 2))])
    state = PartitionState(3, registry, allowed_lateness_ms=LATENESS_MS, rules=RULES)
    seen = [
        exposure_of(n, weight_epoch=n % 2, segments={"device": ["ios", "tv"][n % 3 % 2]}, covariate=n % 9)
        for n in range(60)
    ]
    seen += [exposure_of(n, "two") for n in range(20)] + [{**exposure_of(4, arm="b"), "id": "crossed"}]
    seen += [{**exposure_of(n), "time": T + 1_200, "id": f"again{n}"} for n in range(5)]
    expose(state, 0, seen)
    reward(state, 0, [reward_of(n, 1.5) for n in range(70)])
    reward(state, 70, [reward_of(n, n * 1.5, "wait") for n in range(50)])
    reward(state, 120, [reward_of(n, 1.0, "error") for n in range(50)])
    waiting = [
        reward_of(n, 2.0, metric) for n in range(100, 109) for metric in ("order", "one-click", "wait")
    ]
    waiting += [{**reward_of(n, 3.0), "experiment": "one"} for n in range(109, 115)]
    reward(state, 170, [{**event, "time": T + 1_100} for event in waiting])
    state.behind[REWARDS] = [7, 9]
    return state


def assert_same(one: PartitionState, other: PartitionState) -> None:
    assert one.partition == other.partition
    assert (one.progress, one.behind, one.watermark_ms) == (other.progress, other.behind, other.watermark_ms)
    for slot in one.registry.slots:
        again = other.registry.slot(slot.experiment, slot.version)
        assert one.record(slot) == other.record(again)


def go_on(state: PartitionState) -> dict[tuple[str, int], bytes]:
    """Statistics after more has come: units that rewards waited for, rewards of open units, and every end."""
    units = [{**exposure_of(n), "time": T + 1_050} for n in range(99, 120)]
    expose(state, state.progress[EXPOSURES].next_offset or 0, units)
    more = [{**reward_of(n, 2.5), "id": f"more{n}", "time": T + 999} for n in range(50)]
    reward(state, state.progress[REWARDS].next_offset or 0, more)
    state.advance(T + 60_000)
    return canonical(state)


def again(state: PartitionState, registry: Registry | None = None) -> PartitionState:
    return decode_snapshot(
        encode_snapshot(state), registry or Registry(), allowed_lateness_ms=state.allowed_lateness_ms
    )


def test_a_snapshot_holds_everything_the_fold_needs(held: PartitionState) -> None:
    assert_same(held, again(held))
    wanted = go_on(again(held))
    assert go_on(again(again(held))) == wanted != canonical(held)
    assert held.outcomes(REWARDS).waiting > 0
    found = go_on(again(held))["one", 1]
    assert all(f'"{table}":[[' in found.decode() for table in ("moments", "products", "events", "histograms"))
    assert held.statistics(held.registry.slots[0]).crossover_units == 1


def test_a_snapshot_does_not_change_what_it_is_made_of(held: PartitionState) -> None:
    before = canonical(held)
    encode_snapshot(held)
    assert canonical(held) == before


def test_slots_and_events_are_renumbered_to_those_of_the_process(held: PartitionState) -> None:
    entries = {at.offset: at for at in held.registry.entries}
    zero = entry(9, spec("zero"))
    process = Registry()
    for known in (zero, entries[1], entries[2]):
        process.add([known])
    other = again(held, process)
    assert [slot.experiment for slot in other.registry.slots] == ["zero", "two", "two", "one"]
    assert list(other.registry.events) != list(held.registry.events)
    assert_same(held, other)
    straight = again(held)
    straight.registry.add([zero])
    assert go_on(other) == go_on(straight)


def test_a_snapshot_brings_versions_that_the_topic_no_longer_has(held: PartitionState) -> None:
    # The topic of specs is compacted: of two versions only the newest is there.
    process = Registry([entry(2, spec("two", 2))])
    assert_same(held, again(held, process))


def test_every_damage_of_a_snapshot_is_an_error_of_state(held: PartitionState) -> None:
    whole = encode_snapshot(held)
    draw = random.Random(11)
    places = [*range(24), *(draw.randrange(24, len(whole)) for _ in range(300)), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        with pytest.raises(StateError):
            decode_snapshot(bytes(damaged), Registry(), allowed_lateness_ms=LATENESS_MS)


@pytest.mark.parametrize("cut", [0, 3, 23, 24, 100, -1])
def test_a_snapshot_that_was_cut_is_an_error_of_state(held: PartitionState, cut: int) -> None:
    with pytest.raises(StateError):
        decode_snapshot(encode_snapshot(held)[:cut], Registry(), allowed_lateness_ms=LATENESS_MS)


def test_bytes_behind_a_snapshot_are_an_error_of_state(held: PartitionState) -> None:
    with pytest.raises(StateError):
        decode_snapshot(encode_snapshot(held) + b"x", Registry(), allowed_lateness_ms=LATENESS_MS)


def test_the_first_block_after_a_restore_moves_nothing_large(held: PartitionState) -> None:
    """It is applied on the event loop; the restore is not."""
    expose(held, 86, [exposure_of(n, time=T + 1_250) for n in range(100, 500)])
    state = again(held)
    before = {name: state.arrays[name] for name in ("rows", "values", "due", "lookup")}
    spare = state.units // SPARE_SHARE
    expose(state, 486, [exposure_of(n, time=T + 1_250) for n in range(600, 600 + spare)])
    assert state.units == held.units + spare
    assert [name for name, array in before.items() if state.arrays[name] is not array] == []


def test_another_schema_refuses_to_start(held: PartitionState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_xp.engine.snapshot.SCHEMA", 99)
    other = encode_snapshot(held)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="schema 99, this version reads schema 4: go back to the version"):
        decode_snapshot(other, Registry(), allowed_lateness_ms=LATENESS_MS)


def test_another_lateness_refuses_to_start(held: PartitionState) -> None:
    with pytest.raises(ConfigError, match="set it back, or start under a new prefix"):
        decode_snapshot(encode_snapshot(held), Registry(), allowed_lateness_ms=LATENESS_MS + 1)


@pytest.mark.parametrize("name", ["activation_delay_ms", "future_tolerance_ms", "max_record_bytes"])
def test_another_rule_of_outcomes_refuses_to_start(name: str) -> None:
    rules = Rules(activation_delay_ms=1, future_tolerance_ms=2, max_record_bytes=3, max_units=4)
    state = PartitionState(3, Registry([entry(0, spec("one"))]), allowed_lateness_ms=0, rules=rules)
    snapshot = encode_snapshot(state)
    assert decode_snapshot(snapshot, Registry(), allowed_lateness_ms=0, rules=rules).rules == rules
    # The bound of units may change while nothing shows.
    decode_snapshot(
        snapshot, Registry(), allowed_lateness_ms=0, rules=msgspec.structs.replace(rules, max_units=9)
    )
    other = msgspec.structs.replace(rules, **{name: 7})
    wanted = rf"partition 3: .* made with {name}={getattr(rules, name)}, the setting is 7; .* set it back"
    with pytest.raises(ConfigError, match=wanted):
        decode_snapshot(snapshot, Registry(), allowed_lateness_ms=0, rules=other)


def epoch_1_of(weight: float) -> Entry:
    found = entry(7, spec("one"), epochs=2)
    assert found.record is not None
    first, second = found.record.epochs
    other = msgspec.structs.replace(second, weights={"a": weight, "b": 1 - weight})
    return msgspec.structs.replace(found, record=msgspec.structs.replace(found.record, epochs=(first, other)))


@pytest.mark.parametrize(
    ("made", "now", "what"),
    [
        (entry(0, spec("one")), entry(7, spec("one", bound=9.0)), "design"),
        (epoch_1_of(0.9), epoch_1_of(0.8), "weight epochs"),
        (entry(0, spec("one"), epochs=3), epoch_1_of(0.8), "weight epochs"),
    ],
)
def test_another_record_of_the_same_version_refuses_to_start(made: Entry, now: Entry, what: str) -> None:
    """What compaction left can be another record than the one that the state was counted under."""
    snapshot = encode_snapshot(PartitionState(3, Registry([made]), allowed_lateness_ms=0))
    wanted = f"partition 3: the snapshot was made with another {what} of one version 1 than"
    with pytest.raises(ConfigError, match=wanted):
        decode_snapshot(snapshot, Registry([now]), allowed_lateness_ms=0)


@pytest.mark.parametrize("epochs", [(1, 3), (3, 1), (2, 2)])
def test_more_weight_epochs_on_either_side_are_no_other_ones(epochs: tuple[int, int]) -> None:
    made, now = (entry(at, spec("one"), epochs=n) for at, n in enumerate(epochs))
    snapshot = encode_snapshot(PartitionState(3, Registry([made]), allowed_lateness_ms=0))
    found = decode_snapshot(snapshot, Registry([now]), allowed_lateness_ms=0)
    assert len(found.registry.slot("one", 1).epochs) == max(epochs)


def test_the_specs_of_a_snapshot_grow_with_their_epochs_not_with_the_square_of_them() -> None:
    def head(changes: int) -> tuple[Registry, int]:
        registry = Registry()
        for n in range(changes):
            registry.add([entry(n, spec("one"), epochs=n + 1)])
        state = PartitionState(0, registry, allowed_lateness_ms=0)
        return registry, len(parts_of(state)["head"])

    registry, size = head(200)
    assert size < 2.5 * head(100)[1]
    found = again(PartitionState(0, registry, allowed_lateness_ms=0)).registry
    assert found.entries == registry.entries
    # Nor does memory: what a record repeats is held once.
    first = {id(found.entries[at].record.epochs[0]) for at in (0, 99, 199)}  # type: ignore[union-attr]
    assert len(first) == 1


def test_specs_that_share_little_are_kept_whole() -> None:
    one = entry(0, spec("one"), epochs=3)
    assert one.record is not None
    prose = msgspec.structs.replace(one.record.spec, owner="another")
    renamed = Entry(
        offset=2, experiment="one", in_force_ms=5, record=msgspec.structs.replace(one.record, spec=prose)
    )
    gone = Entry(offset=3, experiment="one", in_force_ms=9, record=None)
    registry = Registry([one, renamed, gone, entry(4, spec("one", 2))])
    found = again(PartitionState(0, registry, allowed_lateness_ms=0)).registry
    assert found.entries == [one, renamed, gone, entry(4, spec("one", 2))]


def test_the_hash_covers_the_packed_body_and_the_schema(held: PartitionState) -> None:
    whole = encode_snapshot(held)
    _, schema, size, digest = struct.unpack_from("<4sIQQ", whole)
    assert size == len(whole) - 24
    assert digest == xxhash.xxh3_64_intdigest(whole[24:], seed=schema)


def test_offsets_that_were_applied_are_not_applied_again(held: PartitionState) -> None:
    with pytest.raises(StateError, match="is already applied"):
        expose(again(held), 3, [exposure_of(500)])


def test_a_snapshot_of_this_schema_is_read_as_it_was_written() -> None:
    """A file from the day the schema was made: a change of what is written needs a new number, or must read it."""
    golden = json.loads((Path(__file__).parents[2] / "golden" / "state" / "schema4.json").read_text())
    records = [KeyedRecord(one["key"].encode(), base64.b64decode(one["value"])) for one in golden["records"]]
    (whole,) = whole_snapshots(3, records)
    state = state_of(whole.parts(), Registry(), allowed_lateness_ms=LATENESS_MS, rules=RULES)
    for found, wanted in ((canonical(state), "statistics"), (go_on(state), "later")):
        assert {f"{name}/{version}": raw.decode() for (name, version), raw in found.items()} == golden[wanted]
