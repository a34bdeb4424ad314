"""Settled units do not depend on when an arm is counted, and are told again byte for byte after a restart."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import msgspec
from hypothesis import given, settings

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState

LATENESS_MS = 50
SPAN_MS = 300
START_MS = 1_000
ARMS = ("a", "b")
LIMITS = Limits(record_bytes=2000, future_ms=0)


def _record() -> ExperimentRecord:
    metric = {"key": "m", "kind": "conversion", "role": "primary", "direction": "increase"}
    spec = msgspec.convert(
        {
            "experiment": "e",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": [{"key": arm, "weight": 0.5, "control": arm == "a"} for arm in ARMS],
            "metrics": [metric | {"attribution_window": "1s"}],
        },
        ExperimentSpec,
    )
    epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
    return ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())


def _state() -> PartitionState:
    entry = Entry(offset=0, experiment="e", in_force_ms=0, record=_record())
    return PartitionState(0, Registry([entry]), allowed_lateness_ms=LATENESS_MS)


def _block(topic, offset, log_ms, event):
    key = event["unit"].encode()
    return Block(topic, 0, offset, offset + 1, [offset], [log_ms], [key], [json.dumps(event).encode()], [()])


def _exposed(state, offset, log_ms, arm, time_ms, unit) -> None:
    event = {"id": str(offset), "time": time_ms, "experiment": "e", "unit": unit, "arm": arm}
    columns, letters = exposure_columns(
        _block(EXPOSURES, offset, log_ms, event),
        state.registry,
        floor_ms=state.log_ms(EXPOSURES),
        limits=LIMITS,
    )
    assert letters == []
    state.apply_exposures(columns, next_offset=offset + 1)


def _ticked(state, offset, log_ms) -> None:
    """A reward that concerns nobody, so that the other topic comes as far."""
    event = {"id": str(offset), "time": log_ms, "unit": "nobody", "metric": "m"}
    columns, _ = reward_columns(
        _block(REWARDS, offset, log_ms, event), state.registry, floor_ms=state.log_ms(REWARDS), limits=LIMITS
    )
    state.apply_rewards(columns, next_offset=offset + 1)


def _settled(state) -> dict[str, int]:
    rows = state.statistics(state.registry.slots[0]).units
    return {arm: sum(row.settled for row in rows if row.arm == arm) for arm in ARMS}


# Event time, arm, unit, and by how much its record is appended later.
exposures = st.lists(
    st.tuples(st.integers(0, SPAN_MS), st.sampled_from(ARMS), st.integers(0, LATENESS_MS)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(exposures, st.sampled_from([0, LATENESS_MS]), st.integers(0, 40))
def test_they_are_those_of_before_the_watermark_by_the_lateness_however_late_an_arm_is(events, lag_ms, crash):
    """Each unit has one exposure; all of arm b are appended as late as they may be, or as they come."""
    state = _state()
    log = sorted(
        (START_MS + at + (lag_ms if arm == "b" and lag_ms else delay), START_MS + at, arm, f"u{n}")
        for n, (at, arm, delay) in enumerate(events)
    )
    for offset, (log_ms, time_ms, arm, unit) in enumerate(log):
        _exposed(state, offset, log_ms, arm, time_ms, unit)
        _ticked(state, offset, log_ms)
        if offset == crash:
            state = decode_snapshot(encode_snapshot(state), Registry(), allowed_lateness_ms=LATENESS_MS)
        # Of all units, those that the log has not come to yet included.
        passed = [arm for _, time_ms, arm, _ in log if time_ms + LATENESS_MS < state.watermark_ms]
        assert _settled(state) == {arm: passed.count(arm) for arm in ARMS}
    assert state.outcomes(EXPOSURES).counted == len(events)


@settings(max_examples=200, deadline=None)
@given(exposures, st.integers(1, 5))
def test_a_settled_unit_stays_so_as_long_as_it_is_one(events, units):
    """Units with several exposures, in one arm or in two: settled units go down with crossovers alone."""
    state, before, crossed = _state(), {"a": 0, "b": 0}, 0
    log = sorted(
        (START_MS + at + delay, START_MS + at, arm, f"u{n % units}")
        for n, (at, arm, delay) in enumerate(events)
    )
    for offset, (log_ms, time_ms, arm, unit) in enumerate(log):
        _exposed(state, offset, log_ms, arm, time_ms, unit)
        _ticked(state, offset, log_ms)
        found = state.statistics(state.registry.slots[0])
        assert all(0 <= row.settled <= row.units for row in found.units)
        now, lost = _settled(state), found.crossover_units - crossed
        assert sum(now.values()) >= sum(before.values()) - lost
        before, crossed = now, found.crossover_units
