"""The fold: rows, what grows, and what is given up."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import numpy as np
import pytest

from stream_xp.domain.experiment import Metric
from stream_xp.engine import kernels
from stream_xp.engine.columns import ExposureColumns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import ConfigError, StateError
from stream_xp.stats.log_histogram import bin_of
from tests.unit.engine.state_world import (
    COUNT,
    COVARIATE,
    KINDS,
    LATENCY,
    LATENESS_MS,
    WINDOW_MS,
    T,
    again,
    at,
    canonical,
    entry,
    events,
    expose,
    exposure_of,
    reward,
    reward_of,
    spec,
)


def kinds_state() -> PartitionState:
    registry = Registry([entry(0, spec("one", 1, *KINDS, covariate=COVARIATE), epochs=2)])
    return PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)


def bins(state: PartitionState, metric: str = "wait") -> dict[str, dict[int, int]]:
    rows = state.statistics(state.registry.slots[0]).histograms
    return {row.arm: dict(row.bins) for row in rows if (row.metric, row.segment) == (metric, "")}


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
    """Row, queue and hash table together, at every size: each grows at another time."""
    registry = Registry([entry(0, spec("one"))])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
    worst = 0.0
    for first in range(0, 200_000, 2_000):
        n = 2_000
        fresh = np.random.default_rng(first).integers(-(2**63), 2**63 - 1, (n, 2))
        state.apply_exposures(columns_of(first, fresh), next_offset=first + n)
        scalars = state.arrays["scalars"]
        waiting = scalars[kernels.FRESH] + scalars[kernels.DUE]
        used = kernels.ROW.itemsize * state.units + kernels.TIMED.itemsize * waiting
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


def test_rows_are_given_up_when_both_logs_and_the_last_window_are_past_the_end() -> None:
    last_ms = T + WINDOW_MS + LATENESS_MS
    for end_ms, given_up_at in ((T + 10, last_ms), (last_ms + 500, last_ms + 500)):
        registry = Registry([entry(0, spec("one")), entry(1, spec("two")), ended_at(2, "one", end_ms)])
        state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_MS)
        expose(state, 0, [exposure_of(n) for n in range(40)])
        before = state.statistics(registry.slots[0]).units
        assert {row.settled for row in before} == {0}
        for step, (now_ms, held) in enumerate([(given_up_at - 1, 40 + 1), (given_up_at, 2)]):
            expose(state, 40 + step, at([exposure_of(50 + step, "two")], now_ms))
            # One log alone does not do.
            assert state.units == 40 + step + 1
            reward(state, step, at([reward_of(99, 1.0)], now_ms))
            assert state.units == held
        # Nothing of a unit is left to wait for when its row is given up.
        settled = tuple(msgspec.structs.replace(row, settled=row.units) for row in before)
        assert state.statistics(registry.slots[0]).units == settled
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
