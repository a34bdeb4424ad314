"""The ingest stage between a source and a log that can be made to fail at any point."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable
from typing import Any

import msgspec
import pytest

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.kafka_log import LogRecord
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.engine.columns import Block
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import Restoration
from stream_xp.engine.snapshot_log import Manifest, WholeSnapshot
from stream_xp.engine.state import PartitionState
from stream_xp.errors import ConfigError, DependencyError, StateError
from stream_xp.services import ingest as module
from stream_xp.services.ingest import Ingest
from stream_xp.settings import Settings

LATENESS_MS = 1_000
T = 1_000_000
SPEC = msgspec.convert(
    {
        "experiment": "exp",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
        "metrics": [
            {
                "key": "click",
                "kind": "conversion",
                "role": "primary",
                "direction": "increase",
                "attribution_window": "1s",
            }
        ],
    },
    ExperimentSpec,
)


class Log:
    """A broker's topics as lists; `failing` names topics whose writes are never acknowledged."""

    def __init__(self) -> None:
        self.topics: dict[str, list[LogRecord]] = {}
        self.starts = {"xp.exposures": 0, "xp.rewards": 0}
        self.failing: set[str] = set()
        self.order: list[str] = []

    async def send(
        self, topic: str, *, key: bytes, value: bytes | None, partition: int | None = None
    ) -> Awaitable[Any]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if topic in self.failing:
            future.set_exception(DependencyError(f"{topic} is not written"))
            future.exception()  # seen, so that only those who await it hear of it
            return future
        held = self.topics.setdefault(topic, [])
        held.append(LogRecord(partition or 0, len(held), T, key, value))
        self.order.append(topic)
        future.set_result(None)
        return future

    async def durable(self, sent: list[Awaitable[Any]], topic: str) -> None:
        await asyncio.gather(*sent)

    async def read_all(self, settings: Settings, topic: str, partitions: list[int]) -> list[LogRecord]:
        await asyncio.sleep(0)
        return [record for record in self.topics.get(topic, []) if record.partition in partitions]

    async def log_starts(self, settings: Settings, topics: list[str], partition: int) -> dict[str, int]:
        return {topic: self.starts[topic] for topic in topics}

    def statistics(self) -> list[PartitionStatistics]:
        records = self.topics.get("xp.stats", [])
        return [msgspec.json.decode(record.value or b"", type=PartitionStatistics) for record in records]


class Consumer:
    """The consumer's side: what was asked of it."""

    def __init__(self) -> None:
        self.seeks: list[tuple[str, int, int]] = []
        self.commits: dict[tuple[str, int], int] = {}
        self.ends: dict[str, tuple[int, int]] = {}

    async def seek(self, topic: str, partition: int, offset: int) -> None:
        self.seeks.append((topic, partition, offset))

    def end(self, topic: str, partition: int) -> tuple[int, int] | None:
        return self.ends.get(topic)

    def durable(self, topic: str, partition: int, offset: int) -> None:
        self.commits[topic, partition] = offset


class Specs:
    """One experiment, in force from the beginning; `covered` can be made to wait."""

    def __init__(self) -> None:
        record = ExperimentRecord(
            spec=SPEC,
            epochs=(WeightEpoch(epoch=0, weights=SPEC.weights, effective_ms=0),),
            design_hash=SPEC.design_hash(),
        )
        self.registry = Registry([Entry(offset=0, experiment="exp", in_force_ms=0, record=record)])
        self.covered = asyncio.Event()
        self.covered.set()

    async def cover(self, log_ms: int, *, fetched_ns: int | None = None) -> None:
        await self.covered.wait()


class Parts:
    """An ingest stage and everything around it."""

    def __init__(self, log: Log, **changed: Any) -> None:
        self.log, self.source, self.specs, self.clock = log, Consumer(), Specs(), ManualClock(T)
        self.ingest = Ingest(
            Settings(
                **{
                    "allowed_lateness_ms": LATENESS_MS,
                    "flush_interval_ms": 1,
                    "snapshot_interval_ms": 1,
                    **changed,
                }
            ),
            experiments=self.specs,  # type: ignore[arg-type]
            source=self.source,
            writer=log,  # type: ignore[arg-type]
            clock=self.clock,
            stats_partitions=1,
        )

    def state(self, partition: int = 0) -> Any:
        return self.ingest._tasks[partition].state


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(module, "read_all", log.read_all)
    monkeypatch.setattr(module, "log_starts", log.log_starts)
    return log


def exposures(
    first: int, count: int, *, bad: frozenset[int] = frozenset(), topic: str = "xp.exposures"
) -> Block:
    """A block of exposures of units that are named by their offsets."""
    offsets = list(range(first, first + count))
    bodies = [
        {"id": str(at), "time": T + at, "experiment": "exp", "unit": f"u{at}", "arm": "ab"[at % 2]}
        for at in offsets
    ]
    values = [
        b"{" if at in bad else json.dumps(body).encode() for at, body in zip(offsets, bodies, strict=True)
    ]
    keys = [f"u{at}".encode() for at in offsets]
    stamps = [T + at for at in offsets]
    return Block(topic, 0, first, first + count, offsets, stamps, keys, values, [()] * count)


def another_spec(registry: Registry, name: str) -> Entry:
    (entry,) = registry.entries
    assert entry.record is not None
    spec = msgspec.structs.replace(SPEC, experiment=name)
    record = msgspec.structs.replace(entry.record, spec=spec, design_hash=spec.design_hash())
    return Entry(offset=1, experiment=name, in_force_ms=T, record=record)


def units(parts: Parts) -> int:
    (slot,) = parts.specs.registry.slots
    return sum(row.units for row in parts.state().statistics(slot).units)


def test_a_block_is_applied_skipped_or_cut_to_what_is_new(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4))
        await parts.ingest.on_block(exposures(0, 4))
        await parts.ingest.on_block(exposures(1, 2))
        assert units(parts) == 4
        await parts.ingest.on_block(exposures(2, 5))
        assert units(parts) == 7
        assert parts.state().outcomes("exposures").read == 7
        assert parts.state().outcomes("exposures").duplicate == 0
        assert parts.source.seeks == []

    asyncio.run(scenario())


def test_after_a_hole_nothing_is_applied_but_sought(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        await parts.ingest.on_block(exposures(5, 2))
        assert parts.source.seeks == [("xp.exposures", 0, 2)]
        assert (units(parts), parts.ingest.holes) == (2, 1)
        await parts.ingest.on_block(exposures(2, 5))
        assert units(parts) == 7
        # A later hole at another place is sought again: only one that stays is an error.
        await parts.ingest.on_block(exposures(9, 1))
        assert parts.source.seeks[-1] == ("xp.exposures", 0, 7)

    asyncio.run(scenario())


def test_a_hole_that_a_seek_does_not_close_is_an_error_of_state(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(5, 2))
        await parts.ingest.on_block(exposures(5, 2))

    with pytest.raises(StateError, match="asked for offset 0 twice and got 5"):
        asyncio.run(scenario())


def test_a_block_from_before_a_rebalance_is_no_answer_to_a_seek(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        held = exposures(5, 2)._replace(fetched_ns=time.monotonic_ns())
        parts.ingest.drop()
        # The state is behind: the snapshot of what was committed is damaged.
        await parts.ingest.on_block(held)
        assert (parts.ingest.partitions, parts.source.seeks) == ([], [])
        again = exposures(5, 2)._replace(fetched_ns=time.monotonic_ns())
        for block in (again, held):
            await parts.ingest.on_block(block)
        assert parts.source.seeks == [("xp.exposures", 0, 0)]
        await parts.ingest.on_block(exposures(0, 7)._replace(fetched_ns=time.monotonic_ns()))
        assert units(parts) == 7

    asyncio.run(scenario())


def test_a_block_that_waits_for_its_state_while_the_partition_leaves_is_not_looked_at(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.load([0])
        block = exposures(0, 2)._replace(fetched_ns=time.monotonic_ns())
        async with parts.ingest._loading[0]:
            waiting = asyncio.create_task(parts.ingest.on_block(block))
            await asyncio.sleep(0)
            parts.ingest.drop()
            await asyncio.sleep(0)
        await waiting
        assert units(parts) == 0

    asyncio.run(scenario())


def test_what_was_fetched_before_a_seek_is_no_answer_to_it(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        early = exposures(5, 2)._replace(fetched_ns=time.monotonic_ns())
        for block in (early, early, exposures(7, 2)._replace(fetched_ns=time.monotonic_ns() - 10**9)):
            await parts.ingest.on_block(block)
        assert (parts.source.seeks, parts.ingest.holes) == ([("xp.exposures", 0, 0)], 1)
        with pytest.raises(StateError, match="asked for offset 0 twice and got 5"):
            await parts.ingest.on_block(exposures(5, 2)._replace(fetched_ns=time.monotonic_ns()))

    asyncio.run(scenario())


def test_blocks_that_came_with_an_assignment_are_kept(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        parts.ingest.drop()
        block = exposures(0, 2)._replace(fetched_ns=time.monotonic_ns())
        parts.ingest.drop(left=False)
        await parts.ingest.on_block(block)
        assert units(parts) == 2

    asyncio.run(scenario())


def test_a_log_that_was_cut_below_what_is_wanted_is_an_error_of_state(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        log.starts["xp.exposures"] = 5
        await parts.ingest.on_block(exposures(5, 2))

    with pytest.raises(StateError, match="the log starts at 5, but 2 is the next offset"):
        asyncio.run(scenario())


def test_a_log_that_begins_late_is_taken_from_its_beginning(log: Log) -> None:
    async def scenario() -> None:
        log.starts["xp.exposures"] = 5
        parts = Parts(log)
        await parts.ingest.on_block(exposures(5, 2))
        assert parts.state().progress["exposures"].first_offset == 5

    asyncio.run(scenario())


def test_a_restart_goes_on_at_the_newest_snapshot(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 6))
        await first.ingest.flush()
        await first.ingest.on_block(exposures(6, 2))
        second = Parts(log)
        await second.ingest.load([0])
        assert second.state().progress["exposures"].applied_offset == 5
        await second.ingest.on_block(exposures(0, 8))
        assert units(second) == 8
        assert second.state().outcomes("exposures").read == 8
        # The snapshot that was loaded is not written over by the next one.
        before = {record.key for record in log.topics["xp.state"]}
        written = len(log.topics["xp.state"])
        await second.ingest.flush()
        assert before.isdisjoint(record.key for record in log.topics["xp.state"][written:])

    asyncio.run(scenario())


def test_offsets_may_be_committed_only_once_the_snapshot_and_its_dead_letters_are_durable(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4, bad=frozenset({2})))
        assert parts.source.commits == {}
        await parts.ingest.flush()
        assert parts.source.commits == {("xp.exposures", 0): 4, ("xp.rewards", 0): 0}
        assert log.order[:2] == ["xp.deadletter", "xp.stats"]
        assert set(log.order[2:]) == {"xp.state"}
        (letter,) = log.topics["xp.deadletter"]
        assert letter.key == b"xp.exposures/0/2"

    asyncio.run(scenario())


@pytest.mark.parametrize("topic", ["xp.deadletter", "xp.stats", "xp.state"])
def test_a_write_that_fails_ends_the_flush_and_nothing_is_acknowledged(log: Log, topic: str) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        log.failing.add(topic)
        await parts.ingest.on_block(exposures(0, 4, bad=frozenset({2})))
        with pytest.raises(DependencyError, match=topic):
            await parts.ingest.flush()
        assert parts.source.commits == {}

    asyncio.run(scenario())


def test_what_a_flush_given_up_half_way_owes_is_written_by_the_next(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4, bad=frozenset({2})))
        log.failing.add("xp.stats")
        with pytest.raises(DependencyError):
            await parts.ingest.flush()
        log.failing.clear()
        await parts.ingest.close()
        assert [record.exposures.applied_offset for record in log.statistics()] == [3]
        assert parts.source.commits["xp.exposures", 0] == 4

    asyncio.run(scenario())


def test_a_dead_letter_that_failed_is_not_forgotten_by_the_next_snapshot(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        log.failing.add("xp.deadletter")
        await parts.ingest.on_block(exposures(0, 4, bad=frozenset({2})))
        for _ in range(2):
            with pytest.raises(DependencyError):
                await parts.ingest.flush()
        assert parts.source.commits == {}

    asyncio.run(scenario())


def test_a_partition_that_leaves_while_it_is_loaded_is_not_kept(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        loading = asyncio.create_task(parts.ingest.on_block(exposures(0, 2)))
        await asyncio.sleep(0)
        parts.ingest.drop()
        await loading
        assert parts.ingest.partitions == []
        await parts.ingest.load([0])
        assert parts.ingest.partitions == [0]

    asyncio.run(scenario())


def test_a_partition_that_leaves_while_a_block_waits_is_not_touched(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 1))
        left = parts.ingest._tasks[0]
        parts.specs.covered.clear()
        waiting = asyncio.create_task(parts.ingest.on_block(exposures(1, 2, bad=frozenset({2}))))
        await asyncio.sleep(0.01)
        parts.ingest.drop()
        parts.specs.covered.set()
        await waiting
        assert left.state.progress["exposures"].applied_offset == 0
        assert "xp.deadletter" not in log.topics

    asyncio.run(scenario())


def test_a_flush_under_way_writes_nothing_more_of_a_partition_that_left(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        task = parts.ingest._tasks[0]
        async with task.lock:
            flushing = asyncio.create_task(parts.ingest.flush())
            await asyncio.sleep(0.01)
            parts.ingest.drop()
        await flushing
        assert log.order == []

    asyncio.run(scenario())


def test_a_snapshot_that_ends_after_its_partition_left_acknowledges_nothing(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 5))
        send = log.send

        async def send_and_lose(topic: str, **record: Any) -> Awaitable[Any]:
            if topic == "xp.state":
                parts.ingest.drop()
            return await send(topic, **record)

        log.send = send_and_lose  # type: ignore[method-assign]
        await parts.ingest.flush()
        assert log.topics["xp.state"]
        assert parts.source.commits == {}

    asyncio.run(scenario())


def test_a_partition_that_left_is_not_written_out_at_the_close(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 5))
        async with parts.ingest._tasks[0].lock:
            closing = asyncio.ensure_future(parts.ingest.close())
            await asyncio.sleep(0)
            parts.ingest.drop()
        await closing
        assert "xp.state" not in log.topics

    asyncio.run(scenario())


def test_a_quiet_partition_matures_by_the_clock_also_after_a_restart(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log, idle_grace_ms=0)
        await first.ingest.on_block(exposures(0, 2))
        await first.ingest.on_block(Block("xp.rewards", 0, 0, 1, [0], [T], [b"x"], [b"{"], [()]))
        first.source.ends = {"xp.exposures": (2, T), "xp.rewards": (1, T)}
        first.clock.advance_to(T + 1_500)
        await first.ingest.flush()
        assert first.state().watermark_ms == T + 1_500
        written = len(log.topics["xp.state"])
        first.clock.advance_to(T + 1_800)
        await first.ingest.flush()
        # A watermark that moves alone is not worth a snapshot, until the partition is handed over.
        assert len(log.topics["xp.state"]) == written
        await first.ingest.close()
        second = Parts(log, idle_grace_ms=0)
        await second.ingest.load([0])
        # What was written last had this watermark, so the next owner does not begin behind it.
        assert second.state().watermark_ms == T + 1_800
        second.source.ends = {"xp.exposures": (2, T), "xp.rewards": (1, T)}
        second.clock.advance_to(T + 10_000)
        await second.ingest.flush()
        newest = log.statistics()[-1]
        assert sum(cell.n for cell in newest.statistics.moments) == 2
        assert newest.reward_outcomes.waiting == 0

    asyncio.run(scenario())


def test_a_partition_with_more_to_read_does_not_mature_by_the_clock(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log, idle_grace_ms=0)
        await parts.ingest.on_block(exposures(0, 2))
        parts.source.ends = {"xp.exposures": (3, T), "xp.rewards": (0, T)}
        parts.clock.advance_to(T + 10_000)
        await parts.ingest.flush()
        assert parts.state().watermark_ms is None or parts.state().watermark_ms <= T + 1

    asyncio.run(scenario())


@pytest.mark.parametrize("end", [(9, T), None], ids=["the end is ahead", "the end is not known"])
def test_a_partition_that_stalls_ends_the_worker(
    log: Log, monkeypatch: pytest.MonkeyPatch, end: tuple[int, int] | None
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "STALL_S", 0.05)
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        if end is not None:
            parts.source.ends["xp.exposures"] = end
        parts.source.ends["xp.rewards"] = (0, T)
        for offset in range(2, 6):
            await parts.ingest.flush()
            await asyncio.sleep(0.03)
            await parts.ingest.on_block(exposures(offset, 1))
        await parts.ingest.flush()
        await asyncio.sleep(0.1)
        with pytest.raises(DependencyError, match=r"xp\.exposures 0: nothing was applied for"):
            await parts.ingest.flush()

    asyncio.run(scenario())


def test_a_partition_at_its_end_may_be_quiet_for_as_long_as_it_likes(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "STALL_S", 0.02)
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        parts.source.ends = {"xp.exposures": (2, T), "xp.rewards": (0, T)}
        for _ in range(3):
            await parts.ingest.flush()
            await asyncio.sleep(0.03)

    asyncio.run(scenario())


def test_a_damaged_snapshot_is_passed_over_for_the_one_before(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        for offset in (0, 4):
            await first.ingest.on_block(exposures(offset, 4))
            await first.ingest.flush()
            first.ingest._tasks[0].next_snapshot = 0.0
        state = log.topics["xp.state"]
        # Of the pages of the second snapshot; the first has its own keys, and stays.
        newest = max(at for at, record in enumerate(state) if b"/rows." in (record.key or b""))
        value = bytearray(state[newest].value or b"")
        value[-1] ^= 1
        state[newest] = state[newest]._replace(value=bytes(value))
        second = Parts(log)
        await second.ingest.load([0])
        assert second.state().progress["exposures"].applied_offset == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("owner", "name"),
    [(WholeSnapshot, "parts"), (Restoration, "__init__"), (PartitionState, "restore")],
    ids=["pages", "arrays", "tables"],
)
def test_while_a_snapshot_is_restored_the_loop_and_other_partitions_go_on(
    log: Log, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    real, entered, gate = getattr(owner, name), threading.Event(), threading.Event()

    def held_up(self: Any, *args: Any) -> Any:
        entered.set()
        # On the event loop nobody could open the gate.
        assert gate.wait(30), "the event loop stands still"
        return real(self, *args)

    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 6))
        await first.ingest.flush()
        monkeypatch.setattr(owner, name, held_up)
        second = Parts(log)
        loading = asyncio.create_task(second.ingest.load([0]))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        # Partition 1 is empty. It is read while partition 0 is restored, and brings a spec that nobody knew.
        await second.ingest.on_block(exposures(0, 3)._replace(partition=1))
        assert second.ingest.partitions == [1]
        second.specs.registry.add([another_spec(second.specs.registry, "other")])
        gate.set()
        await loading
        assert second.ingest.partitions == [0, 1]
        await second.ingest.on_block(exposures(6, 2))
        assert (second.state().units, second.state(1).units) == (8, 3)

    asyncio.run(scenario())


def test_a_partition_that_leaves_while_it_is_restored_is_not_kept(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, entered, gate = PartitionState.restore, threading.Event(), threading.Event()

    def held_up(state: PartitionState, held: dict[str, Any]) -> None:
        entered.set()
        assert gate.wait(30), "the event loop stands still"
        real(state, held)

    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 6))
        await first.ingest.flush()
        monkeypatch.setattr(PartitionState, "restore", held_up)
        second = Parts(log)
        loading = asyncio.create_task(second.ingest.load([0]))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        second.ingest.drop()
        gate.set()
        await loading
        assert second.ingest.partitions == []
        assert second.source.commits == {}

    asyncio.run(scenario())


def test_without_a_whole_snapshot_a_log_cut_since_counting_began_is_an_error_of_state(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        pages = [record for record in log.topics["xp.state"] if record.key.count(b"/") == 2]
        log.topics["xp.state"] = [record for record in log.topics["xp.state"] if record not in pages[:1]]
        await Parts(log).ingest.load([0])  # from the beginning of the log, which is all there
        log.starts["xp.exposures"] = 2
        with pytest.raises(
            StateError, match=r"xp\.exposures 0: no whole snapshot .* starts at 2.* began at 0"
        ):
            await Parts(log).ingest.load([0])

    asyncio.run(scenario())


def test_what_a_damaged_snapshot_counted_of_one_topic_is_asked_of_a_snapshot_without_it(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        log.topics["xp.state"] = [
            record._replace(value=b"?") if record.key.count(b"/") == 2 else record
            for record in log.topics["xp.state"]
        ]
        # Counts again from the beginning, and writes a snapshot before it has any exposure.
        second = Parts(log)
        await second.ingest.on_block(exposures(0, 5, topic="xp.rewards"))
        await second.ingest.close()
        log.starts["xp.exposures"] = 2
        with pytest.raises(StateError, match=r"xp\.exposures 0: no whole snapshot .* began at 0"):
            await Parts(log).ingest.load([0])

    asyncio.run(scenario())


def test_with_only_a_damaged_manifest_a_log_that_was_cut_is_an_error_of_state(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        log.topics["xp.state"] = [
            record._replace(value=b"?") if record.key.count(b"/") == 1 else record
            for record in log.topics["xp.state"]
        ]
        await Parts(log).ingest.load([0])  # from the beginning of the log, which is all there
        log.starts["xp.exposures"] = 2
        with pytest.raises(StateError, match=r"partition 0: .* do not say where counting began"):
            await Parts(log).ingest.load([0])

    asyncio.run(scenario())


def test_a_damaged_manifest_beside_one_without_a_topic_is_an_error_where_that_topic_was_cut(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        log.topics["xp.state"] = [
            record._replace(value=b"?") if record.key.count(b"/") == 1 else record
            for record in log.topics["xp.state"]
        ]
        # Begins anew, and writes a snapshot that can be read and has no exposure yet.
        second = Parts(log)
        await second.ingest.on_block(exposures(0, 5, topic="xp.rewards"))
        await second.ingest.close()
        third = Parts(log)
        await third.ingest.load([0])  # nothing is cut: the exposures are all there to be counted
        assert third.state().progress["rewards"].next_offset == 5
        assert third.state().progress["exposures"].next_offset is None
        log.starts["xp.exposures"] = 2
        with pytest.raises(StateError, match=r"partition 0: .* do not say where counting began"):
            await Parts(log).ingest.load([0])

    asyncio.run(scenario())


@pytest.mark.parametrize("counted", [0, 2], ids=["nothing of a topic", "less of a topic"])
def test_of_two_owners_snapshots_the_one_is_taken_after_which_the_log_goes_on(log: Log, counted: int) -> None:
    async def scenario() -> None:
        early, late = Parts(log), Parts(log)
        for owner in (early, late):
            await owner.ingest.on_block(exposures(0, counted))
        # Neither knows of the other: one covers more of the exposures, the other one more altogether.
        await early.ingest.on_block(exposures(counted, 4))
        await late.ingest.on_block(exposures(0, 9, topic="xp.rewards"))
        await early.ingest.close()
        await late.ingest.close()
        third = Parts(log)
        await third.ingest.load([0])
        assert third.ingest._tasks[0].position() == (counted, 9)
        # What the first one let be committed is deleted.
        log.starts["xp.exposures"] = counted + 4
        fourth = Parts(log)
        await fourth.ingest.load([0])
        assert fourth.ingest._tasks[0].position() == (counted + 4, 0)
        # Now neither of them can go on: the one that covers more is what the error speaks of.
        log.starts["xp.rewards"] = 1
        with pytest.raises(StateError, match=r"xp\.exposures 0: .*the log starts at 4|starts at 6, but 2 is"):
            await Parts(log).ingest.on_block(exposures(counted + 4, 1))

    asyncio.run(scenario())


def test_a_snapshot_brings_the_specs_that_its_loader_has_not_read_yet(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        newer = msgspec.structs.replace(SPEC, version=2)
        first.specs.registry.add(
            [
                Entry(
                    offset=1,
                    experiment="exp",
                    in_force_ms=T + 2,
                    record=ExperimentRecord(
                        spec=newer,
                        epochs=(WeightEpoch(epoch=0, weights=newer.weights, effective_ms=0),),
                        design_hash=newer.design_hash(),
                    ),
                )
            ]
        )
        await first.ingest.on_block(exposures(0, 6))
        await first.ingest.close()
        log.starts["xp.exposures"] = 6
        second = Parts(log)
        await second.ingest.load([0])
        assert [slot.version for slot in second.specs.registry.slots] == [1, 2]
        counted = [second.state().statistics(slot).units for slot in second.specs.registry.slots]
        assert [sum(row.units for row in rows) for rows in counted] == [2, 4]

    asyncio.run(scenario())


def test_offsets_of_a_snapshot_that_was_not_committed_are_committed_by_whoever_loads_it(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        second = Parts(log)
        await second.ingest.load([0])
        assert second.source.commits == {("xp.exposures", 0): 3, ("xp.rewards", 0): 0}

    asyncio.run(scenario())


def test_what_does_not_come_is_asked_for_once(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "ASK_S", 0.0)
        parts = Parts(log)
        parts.source.ends = {"xp.exposures": (3, T), "xp.rewards": (0, T)}
        await parts.ingest.load([0])  # behind the consumer, which stands at the end and has nothing to give
        for _ in range(3):
            await parts.ingest.flush()
            await asyncio.sleep(0.001)
        assert parts.source.seeks == [("xp.exposures", 0, 0)]

    asyncio.run(scenario())


def test_a_snapshot_of_another_lateness_refuses_to_start(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 4))
        await first.ingest.close()
        await Parts(log, allowed_lateness_ms=LATENESS_MS + 1).ingest.load([0])

    with pytest.raises(ConfigError, match="allowed_lateness_ms=1000, the setting is 1001"):
        asyncio.run(scenario())


@pytest.mark.parametrize("name", ["activation_delay_ms", "future_tolerance_ms", "max_record_bytes"])
def test_a_snapshot_of_other_rules_refuses_to_start(log: Log, name: str) -> None:
    async def scenario() -> None:
        first = Parts(log, **{name: 4_321})
        await first.ingest.on_block(exposures(0, 4))
        await first.ingest.close()
        await Parts(log, **{name: 4_321}).ingest.load([0])
        await Parts(log, **{name: 4_322}).ingest.load([0])

    with pytest.raises(ConfigError, match=f"{name}=4321, the setting is 4322"):
        asyncio.run(scenario())


def test_the_manifest_is_the_last_record_of_a_snapshot(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4))
        await parts.ingest.close()
        *pages, last = log.topics["xp.state"]
        manifest = msgspec.json.decode(last.value or b"", type=Manifest)
        assert len(pages) == sum(part.count for part in manifest.parts.values())
        assert manifest.exposures.applied_offset == 3
        assert parts.ingest.partitions == []

    asyncio.run(scenario())


def test_the_next_snapshot_writes_what_changed(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4))
        await parts.ingest.flush()
        first = len(log.topics["xp.state"])
        parts.ingest._tasks[0].next_snapshot = 0.0
        await parts.ingest.on_block(exposures(4, 1, bad=frozenset({4})))
        await parts.ingest.flush()
        written = [record.key or b"" for record in log.topics["xp.state"][first:]]
        # A record that was refused changes no unit: the outcomes, the offsets and the manifest are all there is.
        assert [key.split(b"/")[-1] for key in written[:-1]] == [b"tail.0.1"]

    asyncio.run(scenario())


def test_snapshots_of_all_partitions_together_have_one_share_of_the_time(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        now_s, send, durable = 0.0, log.send, log.durable

        async def working(topic: str, **record: Any) -> Awaitable[Any]:
            nonlocal now_s
            now_s += 1.0 if topic == "xp.state" else 0.0
            return await send(topic, **record)

        async def waiting(sent: list[Awaitable[Any]], topic: str) -> None:
            nonlocal now_s
            now_s += 1_000.0
            await durable(sent, topic)

        monkeypatch.setattr(log, "send", working)
        monkeypatch.setattr(log, "durable", waiting)
        monkeypatch.setattr(module, "_elapsed_s", lambda: now_s)
        parts = Parts(log)
        for partition in (0, 1):
            await parts.ingest.on_block(exposures(0, 4)._replace(partition=partition))
        first, second = parts.ingest._tasks[0], parts.ingest._tasks[1]
        await parts.ingest.flush()
        # The first ones are complete: no later one takes as long.
        assert first.snapshot_work_s == second.snapshot_work_s == 0.0
        written = len(log.topics["xp.state"])
        for task in (first, second):
            await parts.ingest.on_block(exposures(4, 4)._replace(partition=task.state.partition))
            task.next_snapshot = 0.0
        began_s = asyncio.get_running_loop().time()
        await parts.ingest.flush()
        states = [record for record in log.topics["xp.state"][written:] if record.value is not None]
        # A second for each record, and nothing for waiting or for what predecessors left.
        assert first.snapshot_work_s == second.snapshot_work_s == len(states) / 2 > 1
        # The second one knows of both.
        share_s = module.SNAPSHOT_SHARE * len(states) / 2
        assert began_s + share_s <= first.next_snapshot < began_s + 1.5 * share_s
        assert began_s + 2 * share_s <= second.next_snapshot < began_s + 2.5 * share_s

    asyncio.run(scenario())


def test_what_predecessors_left_is_deleted_once_two_snapshots_of_ones_own_are_whole(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 4))
        await first.ingest.close()
        left = {record.key for record in log.topics["xp.state"]}
        second = Parts(log)
        await second.ingest.load([0])
        for offset, deleted in ((4, set()), (8, left), (12, left)):
            await second.ingest.on_block(exposures(offset, 4))
            second.ingest._tasks[0].next_snapshot = 0.0
            await second.ingest.flush()
            gone = [record.key for record in log.topics["xp.state"] if record.value is None]
            assert (set(gone), len(gone)) == (deleted, len(deleted))
        third = Parts(log)
        await third.ingest.load([0])
        assert third.state().progress["exposures"].applied_offset == 15

    asyncio.run(scenario())


def test_a_worker_that_wakes_up_late_spoils_no_snapshot_of_its_successor(log: Log) -> None:
    async def scenario() -> None:
        zombie = Parts(log)
        await zombie.ingest.on_block(exposures(0, 4))
        await zombie.ingest.flush()
        owner = Parts(log)
        await owner.ingest.on_block(exposures(0, 20))
        for offset in (20, 24, 28):
            owner.ingest._tasks[0].next_snapshot = 0.0
            await owner.ingest.flush()
            await owner.ingest.on_block(exposures(offset, 4))
            zombie.ingest._tasks[0].next_snapshot = 0.0
            await zombie.ingest.on_block(exposures(4 + offset - 20, 4))
            await zombie.ingest.flush()
        third = Parts(log)
        await third.ingest.load([0])
        assert third.state().progress["exposures"].applied_offset == 27
        assert units(third) == 28

    asyncio.run(scenario())


def test_a_long_topic_is_read_in_batches(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading:
        def __init__(self, settings: Settings, topic: str, partitions: list[int]) -> None:
            self.records = log.topics[topic]

        async def __aiter__(self) -> Any:
            for record in self.records:
                yield [record]

    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 4))
        await first.ingest.close()
        monkeypatch.setattr(module, "read_all", Reading)
        second = Parts(log)
        await second.ingest.load([0])
        assert second.state().progress["exposures"].applied_offset == 3

    asyncio.run(scenario())


def test_a_snapshot_of_another_schema_refuses_to_start(log: Log) -> None:
    async def scenario() -> None:
        old = b'{"snapshot_id":"aa","partition":0,"chunks":1,"size_bytes":9,"turn":0,"schema":1}'
        await log.send("xp.state", key=b"0/0", value=old, partition=0)
        await Parts(log).ingest.load([0])

    with pytest.raises(ConfigError, match="schema 2, this version reads schema 4"):
        asyncio.run(scenario())


def test_specs_that_came_since_the_last_record_are_in_the_snapshot(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4))
        # Another partition's block made the worker read it.
        parts.specs.registry.add([another_spec(parts.specs.registry, "later")])
        await parts.ingest.flush()
        second = Parts(log)
        await second.ingest.load([0])
        assert second.state().progress["exposures"].applied_offset == 3

    asyncio.run(scenario())


def test_the_bound_of_units_is_that_of_the_settings_and_is_recorded(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log, max_units=3)
        await parts.ingest.on_block(exposures(0, 5))
        await parts.ingest.close()
        newest = log.statistics()[-1]
        assert newest.rules is not None
        assert (newest.rules.max_units, newest.statistics.over_limit) == (3, 2)
        assert newest.exposure_outcomes.over_limit == 2
        await Parts(log, max_units=4).ingest.load([0])

    with pytest.raises(ConfigError, match="max_units=3, the setting is 4"):
        asyncio.run(scenario())
