"""A state of one source partition, and blocks for it."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import Rules
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState

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


def events(state: PartitionState) -> dict[str, tuple[int, int]]:
    rows = state.statistics(state.registry.slots[0]).events
    return {row.arm: (row.units, row.events) for row in rows if row.segment == ""}


def at(events: list[dict[str, Any]], time_ms: int) -> list[dict[str, Any]]:
    return [{**event, "time": time_ms, "id": f"{event['id']}@{time_ms}"} for event in events]


# Snapshots --------------------------------------------------------------------------------------------
RULES = Rules(
    activation_delay_ms=5_000, future_tolerance_ms=300_000, max_record_bytes=65_536, max_units=20_000_000
)


def again(state: PartitionState, registry: Registry | None = None) -> PartitionState:
    return decode_snapshot(
        encode_snapshot(state), registry or Registry(), allowed_lateness_ms=state.allowed_lateness_ms
    )
