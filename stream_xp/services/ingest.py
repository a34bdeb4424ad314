"""The ingest stage: blocks of exposures and rewards in, snapshots and statistics out.

Per source partition one `PartitionTask` owns one `PartitionState`. What it promises rests on three rules:
the offsets lie inside the snapshot; a block is applied only where the last one ended (skip, apply, or seek
back); offsets are given to be committed only when a snapshot that covers them is durable.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import structlog

from stream_xp.adapters.clock import Clock
from stream_xp.adapters.kafka_log import LogRecord, LogWriter, log_starts, read_all
from stream_xp.domain.codec import Limits
from stream_xp.domain.dead_letter import DeadLetter, dead_letter_key
from stream_xp.domain.statistics import PartitionStatistics, Rules
from stream_xp.domain.telemetry import Telemetry
from stream_xp.domain.tracing import Attributes, Span, SpanName, Tracer
from stream_xp.engine.columns import (
    Block,
    ExposureColumns,
    RewardColumns,
    exposure_columns,
    reward_columns,
)
from stream_xp.engine.kernels import NEVER
from stream_xp.engine.registry import Registry, Slot
from stream_xp.engine.snapshot import Restoration
from stream_xp.engine.snapshot_log import KeyedRecord, SnapshotReader, SnapshotWriter, WholeSnapshot
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import DependencyError, StateError
from stream_xp.services.block_report import block_report, partition_report
from stream_xp.services.experiments import Experiments
from stream_xp.services.partitioning import partition_of
from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

SNAPSHOT_SHARE = 20
"""A partition's next snapshot waits at least this many times as long as its last one took, and as the work took that
the last ones of all partitions were.

So the work is about 5 % of the time of a worker in steady state, however many partitions it has.
"""
PAGES_IN_FLIGHT = 16
"""Pages of a snapshot that are sent before the first of them must be acknowledged."""
OWN_SNAPSHOTS = 2
"""Whole snapshots of its own that a worker has before it deletes what its predecessors left on the state topic."""
QUIET_FLUSHES = 4
"""Statistics that did not change are published again every so many flushes while offsets move on."""
STALL_S = 60.0
"""A partition with more to read that applies nothing for so long ends the worker."""
ASK_S = 10.0
"""It is asked for again after so long: a state that goes on before the committed offset gets no block to say so."""


class Source(Protocol):
    """The consumer side of the transport, as the ingest stage needs it."""

    async def seek(self, topic: str, partition: int, offset: int) -> None:
        """Read this partition from `offset` on."""

    def end(self, topic: str, partition: int) -> tuple[int, int] | None:
        """End offset of the partition and the wall time it was seen, None before the first answer."""

    def durable(self, topic: str, partition: int, offset: int) -> None:
        """Everything below `offset` is covered by a snapshot and may be committed."""


class Sought(NamedTuple):
    """A seek that no block has answered yet: where the block stood that was too far on, and when it was done."""

    found: int
    done_ns: int


class PartitionTask:
    """One source partition: its state, and what of it is not yet published or durable."""

    def __init__(self, state: PartitionState, *, starts: dict[str, int], left: Iterable[bytes] = ()) -> None:
        self.state = state
        self.starts = starts
        self.snapshots = SnapshotWriter(
            state.partition, writer=secrets.token_hex(8), seed=secrets.randbits(63)
        )
        # In one order in every process, so that a simulated schedule is the same one wherever it runs.
        self.left = sorted(left)
        self.lock = asyncio.Lock()
        self.dead_letters: list[Awaitable[Any]] = []
        self.changed: dict[int, Slot] = {}
        self.published: dict[int, PartitionStatistics] = {}
        self.flushes = 0
        self.snapshot_at: tuple[int, int] | None = None
        self.snapshot_watermark_ms: int | None = None
        self.covered_ms: int | None = None
        self.next_snapshot = 0.0
        self.snapshot_work_s = 0.0
        self.sought: dict[str, Sought] = {}
        self.advanced: dict[str, tuple[int, float]] = {}
        self.asked: dict[str, int] = {}

    def next_offset(self, topic: str) -> int:
        """The offset this topic's partition must go on at."""
        following = self.state.progress[topic].next_offset
        return self.starts[topic] if following is None else following

    def position(self) -> tuple[int, int]:
        """The next offset of both topics."""
        return self.next_offset(EXPOSURES), self.next_offset(REWARDS)


class Ingest:
    """All source partitions of this worker.

    Args:
        experiments: specs in force, followed from their topic.
        source: where blocks come from, for seeking and committing.
        writer: where snapshots, statistics and dead letters go.
        telemetry: who is told how it goes.
        tracer: who records the work as spans.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        experiments: Experiments,
        source: Source,
        writer: LogWriter,
        clock: Clock,
        stats_partitions: int,
        telemetry: Telemetry | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings
        self._tracer = tracer or Tracer()
        self._telemetry = telemetry or Telemetry()
        self._experiments = experiments
        self._source = source
        self._writer = writer
        self._clock = clock
        self._stats_partitions = stats_partitions
        self._tasks: dict[int, PartitionTask] = {}
        self._loading: dict[int, asyncio.Lock] = {}
        self._restoring = asyncio.Lock()
        self._drops = 0
        self._left_ns = -1
        self._limits = Limits(record_bytes=settings.max_record_bytes, future_ms=settings.future_tolerance_ms)
        self._rules = Rules(
            activation_delay_ms=settings.activation_delay_ms,
            future_tolerance_ms=settings.future_tolerance_ms,
            max_record_bytes=settings.max_record_bytes,
            max_units=settings.max_units,
        )
        self._topics = {settings.topic(EXPOSURES): EXPOSURES, settings.topic(REWARDS): REWARDS}
        self.records = 0
        self.holes = 0

    @property
    def partitions(self) -> list[int]:
        """The source partitions whose state is loaded."""
        return sorted(self._tasks)

    def stalled_s(self) -> float:
        """How long a partition that has more to read has applied nothing, seconds; the longest of all."""
        now = asyncio.get_running_loop().time()
        since = (since for task in self._tasks.values() for _, since in task.advanced.values())
        return max((now - at for at in since), default=0.0)

    async def on_block(self, block: Block) -> None:
        """Apply a block: what is applied already is skipped, and after a hole nothing is applied but sought.

        One fetched before the partitions left is of no use: all that it holds is fetched again for whoever has them.
        """
        topic = self._topics[block.topic]
        task = None if _is_before(block, self._left_ns) else await self._task(block.partition)
        if task is None:
            return
        async with task.lock:
            wanted = task.next_offset(topic)
            left = not self._owns(task) or _is_before(block, self._left_ns)
            if left or block.next_offset <= wanted:
                return
            if block.fetch_offset > wanted:
                await self._find(task, topic, block)
                return
            if block.timestamps_ms:
                newest_ms = max(block.timestamps_ms)
                log_ms = max(task.state.log_ms(topic), newest_ms)
                await self._experiments.cover(log_ms, fetched_ns=block.fetched_ns)
            if self._owns(task):
                block = block.since(wanted)
                with self._tracer.span(SpanName.BLOCK, _about(block)) as span:
                    await self._apply(task, topic, block, span)

    async def flush(self) -> None:
        """Publish what changed, and write the snapshots that are due."""
        began_s = _elapsed_s()
        if self._tasks:
            with self._tracer.span(SpanName.FLUSH) as span:
                await self._flush(span)
        self._telemetry.flushed(took_s=_elapsed_s() - began_s, at_ms=self._clock.now_ms())

    async def _flush(self, span: Span) -> None:
        tasks, written = list(self._tasks.values()), 0
        for task in tasks:
            async with task.lock:
                if self._owns(task):
                    await self._check_progress(task)
                    self._advance_quiet(task)
                    written += await self._publish(task)
                    await self._snapshot_if_due(task)
                    self._report(task)
        span.note({"streamxp.partitions": len(tasks), "streamxp.statistics": written})

    def _report(self, task: PartitionTask) -> None:
        """Tell how the partition stands, unless it left meanwhile."""
        if not self._owns(task):
            return
        if task.snapshot_at == task.position():
            task.covered_ms = self._clock.now_ms()
        following = {topic: task.next_offset(topic) for topic in (EXPOSURES, REWARDS)}
        ends = {topic: self._source.end(name, task.state.partition) for name, topic in self._topics.items()}
        known = {topic: end[0] for topic, end in ends.items() if end is not None}
        self._telemetry.partition_flushed(
            partition_report(task.state, following=following, ends=known, covered_ms=task.covered_ms)
        )

    async def close(self) -> None:
        """Publish and snapshot everything, then let go of all partitions."""
        for task in list(self._tasks.values()):
            async with task.lock:
                if self._owns(task):
                    self._advance_quiet(task)
                    await self._publish(task, everything=True)
                    await self._snapshot_if_moved(task)
                    self._report(task)
        self.drop()

    def drop(self, *, left: bool = True) -> None:
        """Forget all state: another worker may own it now, and what is durable can be loaded again.

        Args:
            left: whether the partitions leave with it; blocks of them that are still held are then not looked at.
        """
        self._tasks.clear()
        self._telemetry.partitions_left()
        self._drops += 1
        if left:
            self._left_ns = time.monotonic_ns()

    def _owns(self, task: PartitionTask) -> bool:
        """Whether the partition is still this worker's; it may have left while its lock was waited for."""
        return self._tasks.get(task.state.partition) is task

    # --- applying ---------------------------------------------------------------------------------------

    async def _apply(self, task: PartitionTask, topic: str, block: Block, span: Span) -> None:
        state = task.state
        floor_ms = state.log_ms(topic)
        registry = self._experiments.registry
        columns: ExposureColumns | RewardColumns
        if topic == EXPOSURES:
            columns, letters = exposure_columns(block, registry, floor_ms=floor_ms, limits=self._limits)
            state.apply_exposures(columns, next_offset=block.next_offset)
        else:
            columns, letters = reward_columns(block, registry, floor_ms=floor_ms, limits=self._limits)
            state.apply_rewards(columns, next_offset=block.next_offset)
        self._telemetry.block_applied(block_report(topic, columns, letters, registry))
        self.records += len(block.offsets)
        task.sought.pop(topic, None)
        span.note({"streamxp.dead_letters": len(letters)})
        for letter in letters:
            task.dead_letters.append(await self._send_dead_letter(letter))

    async def _check_progress(self, task: PartitionTask) -> None:
        """Ask again where a partition has more to read and does not go on, then end the worker: Faust says nothing."""
        now = asyncio.get_running_loop().time()
        for name, topic in self._topics.items():
            offset = task.next_offset(topic)
            end = self._source.end(name, task.state.partition)
            held, since = task.advanced.get(topic, (-1, now))
            if offset != held or (end is not None and end[0] <= offset):
                task.advanced[topic] = (offset, now)
            elif now - since > ASK_S and task.asked.get(topic) != offset:
                task.asked[topic] = offset
                log.warning("nothing comes", topic=name, partition=task.state.partition, wanted=offset)
                await self._source.seek(name, task.state.partition, offset)
            elif now - since > STALL_S:
                raise DependencyError(
                    f"{name} {task.state.partition}: nothing was applied for {STALL_S:g} s at offset {offset}, "
                    f"the end is at {'an unknown offset' if end is None else end[0]}"
                )

    async def _send_dead_letter(self, letter: DeadLetter) -> Awaitable[Any]:
        key, value = dead_letter_key(letter), msgspec.json.encode(letter)
        return await self._writer.send(self._settings.topic("deadletter"), key=key, value=value)

    async def _find(self, task: PartitionTask, topic: str, block: Block) -> None:
        """Ask for what is missing before a block, unless the block was here before that was asked for."""
        sought = task.sought.get(topic)
        if sought is None or not _is_before(block, sought.done_ns):
            await self._seek_back(task, topic, block.fetch_offset)

    async def _seek_back(self, task: PartitionTask, topic: str, found: int) -> None:
        name, partition, wanted = self._settings.topic(topic), task.state.partition, task.next_offset(topic)
        start = (await self._log_starts(partition))[topic]
        if not self._owns(task):
            return  # Whoever has it now may have counted what is missing here.
        if start > wanted:
            raise StateError(
                f"{name} {partition}: the log starts at {start}, but {wanted} is the next offset to apply; "
                "records were deleted before they were counted"
            )
        sought = task.sought.get(topic)
        if sought is not None and sought.found == found:
            raise StateError(f"{name} {partition}: asked for offset {wanted} twice and got {found}")
        self.holes += 1
        self._telemetry.hole_found(topic)
        log.warning("hole", topic=name, partition=partition, wanted=wanted, found=found)
        await self._source.seek(name, partition, wanted)
        task.sought[topic] = Sought(found, time.monotonic_ns())

    def _advance_quiet(self, task: PartitionTask) -> None:
        """Move the watermark of a partition on where nothing more is to be read, by the clock."""
        reach = [self._reach_ms(task, topic) for topic in (EXPOSURES, REWARDS)]
        watermark_ms = min(reach)
        if watermark_ms > NEVER:
            task.state.advance(watermark_ms)

    def _reach_ms(self, task: PartitionTask, topic: str) -> int:
        """Up to when everything of a topic's partition is known: its log time, or the clock where it is quiet."""
        log_ms = task.state.log_ms(topic)
        end = self._source.end(self._settings.topic(topic), task.state.partition)
        if end is None or task.next_offset(topic) < end[0]:
            return log_ms
        return max(log_ms, self._clock.quiet_ms(end[1]) - self._settings.idle_grace_ms)

    # --- loading ----------------------------------------------------------------------------------------

    async def load(self, partitions: Iterable[int]) -> None:
        """Load the state of partitions before their first record; a quiet one goes on maturing."""
        await asyncio.gather(*map(self._task, partitions))

    async def _task(self, partition: int) -> PartitionTask | None:
        """The task of a partition, loaded if need be; None if the partition left while it was loaded."""
        async with self._loading.setdefault(partition, asyncio.Lock()):
            if partition not in self._tasks:
                drops = self._drops
                with self._tracer.span(SpanName.LOAD, {"streamxp.partition": partition}) as span:
                    task = await self._load(partition, span)
                if drops != self._drops:
                    return None
                self._tasks[partition] = task
                # Whoever counts what is new has to know what was there before.
                self._report(task)
                # Whoever wrote the snapshot may have ended before it could commit, and a quiet partition gets no other.
                if any(progress.next_offset is not None for progress in task.state.progress.values()):
                    self._let_commit(task, task.position())
            return self._tasks[partition]

    async def _load(self, partition: int, span: Span) -> PartitionTask:
        reader = SnapshotReader(partition)
        async for batch in _batches(read_all(self._settings, self._settings.topic("state"), [partition])):
            for record in batch:
                reader.take(record.key, record.value)
        for name, why in reader.damaged.items():
            log.error("snapshot passed over", partition=partition, snapshot=name, error=why)
        starts = await self._log_starts(partition)
        found = await self._newest_state(partition, _continued(reader, starts))
        state = found or self._empty_state(partition)
        span.note({"streamxp.snapshot": found is not None, "streamxp.units": state.units})
        self._require_beginning(state, reader, starts)
        task = PartitionTask(state, starts=starts, left=reader.keys)
        task.snapshot_at, task.snapshot_watermark_ms = task.position(), state.watermark_ms
        log.info("partition loaded", partition=partition, units=state.units, next=task.position())
        return task

    async def _log_starts(self, partition: int) -> dict[str, int]:
        starts = await log_starts(self._settings, list(self._topics), partition)
        return {short: starts[name] for name, short in self._topics.items()}

    def _require_beginning(
        self, state: PartitionState, reader: SnapshotReader, starts: dict[str, int]
    ) -> None:
        """StateError if the log no longer has what snapshots that cannot be read had counted of a topic."""
        anew = [topic for topic, progress in state.progress.items() if progress.next_offset is None]
        unknown = [topic for topic in anew if topic not in reader.began and starts[topic]]
        if reader.unreadable and unknown:
            raise StateError(
                f"partition {state.partition}: no whole snapshot is left, its remains do not say where counting began, "
                f"and the log starts at {starts}; records may have been deleted that must be counted again"
            )
        for topic in anew:
            first = reader.began.get(topic, starts[topic])
            if starts[topic] > first:
                raise StateError(
                    f"{self._settings.topic(topic)} {state.partition}: no whole snapshot is left, and the log starts "
                    f"at {starts[topic]}, but counting began at {first}; records were deleted that must be "
                    "counted again"
                )

    async def _newest_state(self, partition: int, snapshots: list[WholeSnapshot]) -> PartitionState | None:
        settings = self._settings
        for snapshot in snapshots:
            try:
                # One at a time: another thread would take the core that heartbeats and other partitions need.
                async with self._restoring:
                    return await restored(
                        snapshot,
                        self._experiments.registry,
                        allowed_lateness_ms=settings.allowed_lateness_ms,
                        max_units=settings.max_units,
                        rules=self._rules,
                    )
            except StateError as error:
                log.error(
                    "snapshot passed over",
                    partition=partition,
                    snapshot=snapshot.manifest.snapshot_id,
                    error=str(error),
                )
        return None

    def _empty_state(self, partition: int) -> PartitionState:
        return PartitionState(
            partition,
            self._experiments.registry,
            allowed_lateness_ms=self._settings.allowed_lateness_ms,
            max_units=self._settings.max_units,
            rules=self._rules,
        )

    # --- publishing -------------------------------------------------------------------------------------

    async def _publish(self, task: PartitionTask, *, everything: bool = False) -> int:
        """Write the statistics that changed; those that did not now and then, so that readers see the offsets.

        Returns:
            How many records.
        """
        state = task.state
        task.flushes += 1
        # Kept until they are written: a flush that is given up half-way must not lose them.
        task.changed |= {slot.index: slot for slot in state.take_dirty()}
        slots = dict(task.changed)
        if everything or task.flushes % QUIET_FLUSHES == 0:
            slots |= {index: state.registry.slots[index] for index in task.published}
        records = {
            index: msgspec.structs.replace(state.record(slot), rules=self._rules)
            for index, slot in slots.items()
        }
        fresh = {index: r for index, r in records.items() if _moved(r, task.published.get(index))}
        sent = [await self._send_statistics(record) for record in fresh.values()]
        await self._writer.durable(sent, self._settings.topic("stats"))
        task.published |= fresh
        task.changed.clear()
        return len(fresh)

    async def _send_statistics(self, record: PartitionStatistics) -> Awaitable[Any]:
        return await self._writer.send(
            self._settings.topic("stats"),
            key=f"{record.experiment}/{record.partition}".encode(),
            value=msgspec.json.encode(record),
            partition=partition_of(record.experiment, self._stats_partitions),
        )

    async def _snapshot_if_due(self, task: PartitionTask) -> None:
        now = asyncio.get_running_loop().time()
        if now < task.next_snapshot or task.snapshot_at == task.position():
            return
        await self._snapshot(task)
        took_s = asyncio.get_running_loop().time() - now
        # Of the others only the work counts, not how long the broker took: that is no cost, and a slow broker would
        # make every partition wait for all.
        work_s = sum(each.snapshot_work_s for each in self._tasks.values())
        pause_s = SNAPSHOT_SHARE * max(took_s, work_s)
        task.next_snapshot = now + max(self._settings.snapshot_interval_ms / 1000, pause_s)

    async def _snapshot_if_moved(self, task: PartitionTask) -> None:
        """Write a last snapshot, also where only the watermark moved: it must not go back at the next owner."""
        if (task.snapshot_at, task.snapshot_watermark_ms) != (task.position(), task.state.watermark_ms):
            await self._snapshot(task)

    async def _snapshot(self, task: PartitionTask) -> None:
        """Write a snapshot; when it and all dead letters before it are durable, let the offsets be committed."""
        about = {"streamxp.partition": task.state.partition, "streamxp.units": task.state.units}
        with self._tracer.span(SpanName.SNAPSHOT, about) as span:
            await self._write_snapshot(task, span)

    async def _write_snapshot(self, task: PartitionTask, span: Span) -> None:
        position, watermark_ms, snapshot_s = task.position(), task.state.watermark_ms, _elapsed_s()
        snapshot = task.snapshots.begin(task.state)
        await self._writer.durable(task.dead_letters, self._settings.topic("deadletter"))
        task.dead_letters.clear()
        pages = _Counted(snapshot.pages())
        work_s = await self._write_state(task, pages)
        span.note({"streamxp.pages": pages.records, "streamxp.bytes": pages.written_bytes})
        # The manifest says that every page is there, so it is sent only when every page is.
        work_s += await self._write_state(task, [snapshot.manifest()])
        # The first one after a load is complete, and says nothing of what those after it take.
        task.snapshot_work_s = work_s if task.snapshots.number else 0.0
        task.snapshots.commit(snapshot)
        task.snapshot_at, task.snapshot_watermark_ms = position, watermark_ms
        self._telemetry.snapshot_written(took_s=_elapsed_s() - snapshot_s)
        if not self._owns(task):
            # The partition left while this was written. What stands there is true; who owns it now commits.
            return
        self._let_commit(task, position)
        if task.left and task.snapshots.number >= OWN_SNAPSHOTS:
            await self._write_state(task, [(key, None) for key in task.left])
            task.left.clear()

    def _let_commit(self, task: PartitionTask, position: tuple[int, int]) -> None:
        for topic, offset in zip((EXPOSURES, REWARDS), position, strict=True):
            self._source.durable(self._settings.topic(topic), task.state.partition, offset)

    async def _write_state(
        self, task: PartitionTask, records: Iterable[KeyedRecord | tuple[bytes, None]]
    ) -> float:
        """Write to the state topic; how many seconds that took beside waiting for the broker."""
        topic = self._settings.topic("state")
        sent: list[Awaitable[Any]] = []
        began_s, waited_s = _elapsed_s(), 0.0
        for key, value in records:
            sent.append(await self._writer.send(topic, key=key, value=value, partition=task.state.partition))
            if len(sent) == PAGES_IN_FLIGHT:
                waited_s += await self._durable(sent, topic)
                sent.clear()
        waited_s += await self._durable(sent, topic)
        return _elapsed_s() - began_s - waited_s

    async def _durable(self, sent: Sequence[Awaitable[Any]], topic: str) -> float:
        """Wait until the broker has every record sent; for how many seconds."""
        began_s = _elapsed_s()
        await self._writer.durable(sent, topic)
        return _elapsed_s() - began_s


_elapsed_s = time.perf_counter


class _Counted:
    """Pages on their way, and what has gone so far."""

    def __init__(self, pages: Iterable[KeyedRecord]) -> None:
        self._pages = pages
        self.records = 0
        self.written_bytes = 0

    def __iter__(self) -> Iterator[KeyedRecord]:
        for page in self._pages:
            yield page
            self.records += 1
            self.written_bytes += len(page.value)


def _about(block: Block) -> Attributes:
    """What a span says of a block: where it is, and nothing of what is in it."""
    offsets = block.offsets
    where: Attributes = {
        "messaging.destination.name": block.topic,
        "messaging.destination.partition.id": str(block.partition),
        "messaging.batch.message_count": len(offsets),
    }
    if not len(offsets):
        return where
    return {**where, "streamxp.offset.first": int(offsets[0]), "streamxp.offset.last": int(offsets[-1])}


async def restored(
    snapshot: WholeSnapshot,
    registry: Registry,
    *,
    allowed_lateness_ms: int,
    max_units: int,
    rules: Rules | None = None,
) -> PartitionState:
    """The state in a snapshot, whose pages it gives up; the event loop goes on while it is made.

    What takes long is done in a thread that holds the interpreter for no more than a page at a time. It is not shared
    with anybody before it is done, so whoever gives up waiting may forget it.

    Raises:
        StateError: the snapshot is damaged.
        ConfigError: it was made under other rules; with another bound of units only where it shows.
    """
    restoration = await asyncio.to_thread(lambda: Restoration(snapshot.parts()))
    restoration.join(registry, allowed_lateness_ms=allowed_lateness_ms, max_units=max_units, rules=rules)
    return await asyncio.to_thread(restoration.finish)


async def _batches(
    reading: AsyncIterable[Sequence[LogRecord]] | Awaitable[Sequence[LogRecord]],
) -> AsyncIterator[Sequence[LogRecord]]:
    """The records of a topic as they come; a log in memory gives all of them at once."""
    if isinstance(reading, AsyncIterable):
        async for batch in reading:
            yield batch
    else:
        yield await reading


def _continued(reader: SnapshotReader, starts: dict[str, int]) -> list[WholeSnapshot]:
    """The whole snapshots, those after which the log goes on before those of which something that follows is deleted.

    Of two owners that did not know of each other each may have counted more of one topic, and have let that be
    committed and so deleted: then the snapshot that covers most may be the one that nobody can go on from.
    """

    def is_cut_off(snapshot: WholeSnapshot) -> bool:
        made = {EXPOSURES: snapshot.manifest.exposures, REWARDS: snapshot.manifest.rewards}
        for topic, start in starts.items():
            following = made[topic].next_offset
            if start > (reader.began.get(topic, start) if following is None else following):
                return True
        return False

    return sorted(reader.whole(), key=is_cut_off)


def _is_before(block: Block, moment_ns: int) -> bool:
    """Whether a block was fetched before a moment of the monotonic clock, if it says when."""
    return block.fetched_ns is not None and block.fetched_ns < moment_ns


def _moved(record: PartitionStatistics, published: PartitionStatistics | None) -> bool:
    return (
        published is None
        or record.position() != published.position()
        or record.statistics != published.statistics
    )
