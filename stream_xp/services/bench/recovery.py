"""`bench recovery`: what unit rows take, what snapshots cost beside ingest, and how long a restart takes.

One partition. Its units, with a reward each, are put into the state at once; then traffic is decoded, joined and
counted, with a snapshot whenever a worker that reads without end would write one. Each size runs in a process of
its own.
"""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from stream_xp.adapters.kafka_admin import connect, create_topics, declared_topics
from stream_xp.adapters.kafka_log import LogWriter, read_all
from stream_xp.domain.codec import Limits
from stream_xp.engine import kernels
from stream_xp.engine.columns import (
    NO_EXPERIMENT,
    Block,
    ExposureColumns,
    RewardColumns,
    exposure_columns,
    hashes,
    reward_columns,
)
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot_log import KeyedRecord, SnapshotReader, SnapshotWriter
from stream_xp.engine.state import EXPOSURES, MAX_UNITS, REWARDS, PartitionState
from stream_xp.errors import DependencyError, StateError
from stream_xp.services.bench.load import ARMS, EXPERIMENTS, EXPOSURE_SHARE, METRICS, experiment_records
from stream_xp.services.ingest import PAGES_IN_FLIGHT, SNAPSHOT_SHARE, restored
from stream_xp.settings import ENVIRONMENT_PREFIX, Settings

LATENESS_MS = 2_000
ROUND_MS = 2_000
"""Event time of a round."""
RECENT_SHARE = 0.05
_WINDOW = "7d"
_FILL_SPAN_MS = 86_400_000
_START_MS = 1_700_000_000_000
_BLOCK = 50_000
_CHILD_DEADLINE_S = 3_600
_TICK_S = 0.001
Int64 = npt.NDArray[np.int64]


class SnapshotCost(msgspec.Struct, frozen=True, kw_only=True):
    """Medians, CPU seconds of this process.

    Attributes:
        events: between two snapshots of a worker that reads without end: it writes the next one after 2 s, or
            20 times as long as the last one took if that is more. `ingest_s`: to decode, join and count them.
        incremental_s: to write what they changed. `full_s`: to write all of it, of the same state.
        incremental_share, full_share: of ingest_s.
        eager_s, eager_share, eager_mb: to write what changed after one round of events, however long the last one
            took; no worker does that where it is more than 5 %.
        incremental_mb, full_mb: written, compressed.
    """

    events: int
    ingest_s: float
    incremental_s: float
    incremental_share: float
    incremental_mb: float
    full_s: float
    full_share: float
    full_mb: float
    eager_s: float
    eager_share: float
    eager_mb: float


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """One size.

    Attributes:
        log: where the snapshots were.
        rows: (unit, experiment) pairs at the end.
        row_bytes: per row: the row, its place in the queue of what matures, its share of the hash table.
        value_bytes: per row, the values of its metrics.
        other_mb: waiting rewards and ids of duplicates.
        recent: cost with rewards of the newest units; `anywhere`: of any unit that there is.
        read_s: wall seconds to stream the state topic; `restore_s`: to make the state of it.
        stall_s: the longest that the event loop stood still meanwhile, so that nothing else could go on.
        first_block_s: to apply the next block.
        rss_mb: of the process with the whole state; peak_rss_mb: its most, with the recovered state beside it.
    """

    log: str
    rows: int
    row_bytes: float
    value_bytes: float
    other_mb: float
    events_per_round: int
    recent: SnapshotCost
    anywhere: SnapshotCost
    read_s: float
    restore_s: float
    stall_s: float
    first_block_s: float
    rss_mb: float
    peak_rss_mb: float

    @property
    def recovery_s(self) -> float:
        """From a dead worker's log to the first new count."""
        return self.read_s + self.restore_s + self.first_block_s


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one process measures.

    Attributes:
        rows: units before the traffic.
        events: of a round. `rounds`: how many snapshots of each kind the medians are of.
        interval_s: the least time between two snapshots of a worker.
        bootstrap: of the Kafka that takes the snapshots; None for a log in memory.
    """

    rows: int
    events: int
    rounds: int
    interval_s: float = 2.0
    bootstrap: str | None = None


def bench_recovery(jobs: Iterable[Job], *, progress: Callable[[str], None]) -> list[RecoveryReport]:
    """Measure each size, one process after the other."""
    reports = []
    for job in jobs:
        progress(f"{job.rows:,} rows")
        reports.append(_run_child(job))
    return reports


def _run_child(job: Job) -> RecoveryReport:
    command = [sys.executable, "-m", "stream_xp.services.bench.recovery", msgspec.json.encode(job).decode()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}
    done = subprocess.run(  # noqa: S603 (our own interpreter and module)
        command, env=environment, capture_output=True, timeout=_CHILD_DEADLINE_S, check=False
    )
    if done.returncode != 0 or not done.stdout:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise DependencyError(f"the process of {job.rows:,} rows failed: {' '.join(last)}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=RecoveryReport)


# --- where snapshots go ------------------------------------------------------------------------------------


class _StateLog(Protocol):
    """A state topic of one partition."""

    name: str

    async def write(self, records: Iterable[KeyedRecord]) -> None: ...

    async def read(self, reader: SnapshotReader) -> None: ...


class MemoryLog:
    """A compacted topic in memory: the newest value of each key, in the order of writing."""

    name = "in memory"

    def __init__(self) -> None:
        self._records: dict[bytes, bytes] = {}

    async def write(self, records: Iterable[KeyedRecord]) -> None:
        """Append."""
        for key, value in records:
            self._records.pop(key, None)
            self._records[key] = value

    async def read(self, reader: SnapshotReader) -> None:
        """Give every record to the reader."""
        for key, value in self._records.items():
            reader.take(key, value)


class _KafkaLog:
    """The state topic of a broker, under a prefix of its own."""

    def __init__(self, settings: Settings) -> None:
        self.name = f"Kafka at {settings.bootstrap}"
        self._settings = settings
        self._topic = settings.topic("state")
        self._writer = LogWriter(settings)

    async def start(self) -> None:
        with connect(self._settings) as client:
            create_topics(client, [t for t in declared_topics(self._settings) if t.name == self._topic])
        await self._writer.start()

    async def stop(self) -> None:
        await self._writer.stop()
        with connect(self._settings) as client:
            if self._topic in client.list_topics():
                client.delete_topics([self._topic])

    async def write(self, records: Iterable[KeyedRecord]) -> None:
        sent: list[Any] = []
        for key, value in records:
            sent.append(await self._writer.send(self._topic, key=key, value=value, partition=0))
            if len(sent) == PAGES_IN_FLIGHT:
                await self._writer.durable(sent, self._topic)
                sent.clear()
        await self._writer.durable(sent, self._topic)

    async def read(self, reader: SnapshotReader) -> None:
        async for batch in read_all(self._settings, self._topic, [0]):
            for record in batch:
                reader.take(record.key, record.value)


# --- traffic ---------------------------------------------------------------------------------------------


class Traffic:
    """Blocks of one partition with ever new units, and rewards of those that there are."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.units = 0
        self.offsets = {EXPOSURES: 0, REWARDS: 0}
        self.now_ms = _START_MS

    def fill(self, rows: int, codes: Mapping[str, int]) -> Iterator[ExposureColumns | RewardColumns]:
        """Exposures of new units over a day, and a reward of each, as columns: what the decoder would make of them.

        Args:
            rows: units.
            codes: of the events, in the registry.
        """
        for first in range(0, rows, _BLOCK):
            n = min(_BLOCK, rows - first)
            members = np.arange(self.units, self.units + n)
            times = _START_MS + (first + np.arange(n)) * _FILL_SPAN_MS // rows
            units = hashes([_unit(member) for member in members.tolist()])
            yield self._exposed(members, times, units)
            yield self._rewarded(members, times, units, codes)
            self.units += n
            self.now_ms = int(times[-1])

    def _exposed(self, members: Int64, times: Int64, units: Int64) -> ExposureColumns:
        zeros = np.zeros(len(members), np.int64)
        return ExposureColumns(
            offset=self._offsets(EXPOSURES, len(members)),
            log_ms=times,
            time_ms=times,
            unit=units,
            event_id=self._ids(len(members)),
            slot=members % EXPERIMENTS,
            arm=members % len(ARMS),
            epoch=zeros,
            segment=zeros,
            covariate=zeros,
        )

    def _rewarded(
        self, members: Int64, times: Int64, units: Int64, codes: Mapping[str, int]
    ) -> RewardColumns:
        table = np.array([[codes[f"{metric}-{at}"] for at in range(EXPERIMENTS)] for metric in METRICS])
        return RewardColumns(
            offset=self._offsets(REWARDS, len(members)),
            log_ms=times,
            time_ms=times,
            unit=units,
            event_id=self._ids(len(members)),
            event=table[members // EXPERIMENTS % len(METRICS), members % EXPERIMENTS],
            experiment=np.full(len(members), NO_EXPERIMENT),
            value=np.round(self._rng.lognormal(2.0, 1.0, len(members)), 15),
        )

    def _offsets(self, topic: str, n: int) -> Int64:
        self.offsets[topic] += n
        return np.arange(self.offsets[topic] - n, self.offsets[topic])

    def _ids(self, n: int) -> Int64:
        return self._rng.integers(-(2**63), 2**63 - 1, (n, 2))

    def round(self, events: int, *, recent: bool) -> list[Block]:
        """The blocks of a round of mixed traffic."""
        blocks = []
        sizes = [min(_BLOCK, events - first) for first in range(0, events, _BLOCK)]
        for n in sizes:
            exposed = max(1, int(n * EXPOSURE_SHARE))
            self.now_ms += ROUND_MS // len(sizes)
            blocks.append(self._block(EXPOSURES, [self._exposure() for _ in range(exposed)]))
            oldest = int(self.units * (1 - RECENT_SHARE)) if recent else 0
            members = self._rng.integers(oldest, self.units, n - exposed).tolist()
            values = np.round(self._rng.lognormal(2.0, 1.0, n - exposed), 15).tolist()
            rewards = [self._reward(at, *pair) for at, pair in enumerate(zip(members, values, strict=True))]
            blocks.append(self._block(REWARDS, rewards))
        return blocks

    def _exposure(self) -> tuple[bytes, dict[str, Any]]:
        member = self.units
        self.units += 1
        return _unit(member), {
            "id": f"e-{member:020d}",
            "source": "app/checkout",
            "experiment": f"bench-{member % EXPERIMENTS}",
            "arm": ARMS[member % len(ARMS)],
        }

    def _reward(self, at: int, member: int, value: float) -> tuple[bytes, dict[str, Any]]:
        return _unit(member), {
            "id": f"r-{self.offsets[REWARDS] + at:020d}",
            "source": "app/player",
            "metric": f"{METRICS[at % len(METRICS)]}-{member % EXPERIMENTS}",
            "value": value,
        }

    def _block(self, topic: str, events: list[tuple[bytes, dict[str, Any]]]) -> Block:
        first, n = self.offsets[topic], len(events)
        self.offsets[topic] += n
        keys = [key for key, _ in events]
        values = [
            msgspec.json.encode({**body, "time": self.now_ms, "unit": key.decode()}) for key, body in events
        ]
        offsets = list(range(first, first + n))
        return Block(topic, 0, first, first + n, offsets, [self.now_ms] * n, keys, values, [()] * n)


def _unit(member: int) -> bytes:
    return b"member-%016d" % member


def _registry() -> Registry:
    return Registry(
        Entry(offset=at, experiment=record.spec.experiment, in_force_ms=0, record=record)
        for at, record in enumerate(experiment_records(window=_WINDOW))
    )


def _apply(state: PartitionState, block: Block) -> None:
    registry, floor_ms = state.registry, state.log_ms(block.topic)
    if block.topic == EXPOSURES:
        exposures, _ = exposure_columns(block, registry, floor_ms=floor_ms, limits=Limits())
        state.apply_exposures(exposures, next_offset=block.next_offset)
    else:
        rewards, _ = reward_columns(block, registry, floor_ms=floor_ms, limits=Limits())
        state.apply_rewards(rewards, next_offset=block.next_offset)


# --- measuring -------------------------------------------------------------------------------------------


class _Bench:
    """One size."""

    def __init__(self, log: _StateLog) -> None:
        self.log = log
        self.traffic = Traffic(seed=1)
        self.state = PartitionState(0, _registry(), allowed_lateness_ms=LATENESS_MS)
        self.writer = _writer()

    async def run(self, job: Job) -> RecoveryReport:
        fill(self.state, self.traffic, job.rows)
        recent = await self._cost(job, recent=True)
        anywhere = await self._cost(job, recent=False)
        rows, sizes = self.state.units, _sizes(self.state)
        rss_mb = _rss_mb()
        recovery = await self._recover()
        return RecoveryReport(
            log=self.log.name,
            rows=rows,
            **sizes,
            events_per_round=job.events,
            recent=recent,
            anywhere=anywhere,
            **recovery,
            rss_mb=rss_mb,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        )

    async def _cost(self, job: Job, *, recent: bool) -> SnapshotCost:
        found: dict[str, list[Any]] = {}
        await self._ingest_and_snapshot(job, recent=recent, least_s=0.0)
        for _ in range(job.rounds):
            eager = await self._ingest_and_snapshot(job, recent=recent, least_s=0.0)
            pause_s = _pause_s(eager[2], job.interval_s)
            paced = await self._ingest_and_snapshot(job, recent=recent, least_s=pause_s)
            full_s, full_mb = await self._snapshot(_writer(), MemoryLog())
            sample = _shares(eager, "eager") | _shares(paced, "incremental")
            sample |= {"events": paced[0], "ingest_s": paced[1]}
            sample |= {"full_s": full_s, "full_mb": full_mb, "full_share": full_s / paced[1]}
            for name, value in sample.items():
                found.setdefault(name, []).append(value)
        return SnapshotCost(**{name: statistics.median_high(values) for name, values in found.items()})

    async def _ingest_and_snapshot(
        self, job: Job, *, recent: bool, least_s: float
    ) -> tuple[int, float, float, float]:
        """Rounds until ingest has taken `least_s`: events, their CPU seconds, and those and MB of a snapshot."""
        events, ingest_s = 0, 0.0
        while not events or ingest_s < least_s:
            blocks = self.traffic.round(job.events, recent=recent)
            began_s = time.process_time()
            for block in blocks:
                _apply(self.state, block)
            ingest_s += time.process_time() - began_s
            events += job.events
        return events, ingest_s, *await self._snapshot(self.writer, self.log)

    async def _snapshot(self, writer: SnapshotWriter, log: _StateLog) -> tuple[float, float]:
        """CPU seconds and megabytes of a snapshot."""
        began_s = time.process_time()
        snapshot = writer.begin(self.state)
        await log.write(snapshot.pages())
        await log.write([snapshot.manifest()])
        writer.commit(snapshot)
        return time.process_time() - began_s, snapshot.bytes_written / 1e6

    async def _recover(self) -> dict[str, float]:
        """Wall seconds to read, to restore and to apply the next block; the result must be the same bytes."""
        block = self.traffic.round(_BLOCK, recent=True)[0]
        watch = _Stall()
        times_s = [time.perf_counter()]
        reader = SnapshotReader(0)
        await self.log.read(reader)
        times_s.append(time.perf_counter())
        newest = reader.whole()[0]
        del reader
        async with watch:
            again = await restored(newest, Registry(), allowed_lateness_ms=LATENESS_MS, max_units=MAX_UNITS)
        times_s.append(time.perf_counter())
        _apply(again, block)
        times_s.append(time.perf_counter())
        _apply(self.state, block)
        for one, other in zip(self.state.registry.slots, again.registry.slots, strict=True):
            if self.state.statistics(one).canonical() != again.statistics(other).canonical():
                raise StateError(f"{one.experiment}: what was recovered is not what was there")
        names = ("read_s", "restore_s", "first_block_s")
        return {**dict(zip(names, np.diff(times_s).tolist(), strict=True)), "stall_s": watch.longest_s}


class _Stall:
    """The longest time that the event loop did not come back to a task that is always ready again."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def __aenter__(self) -> None:
        self._watching = asyncio.create_task(self._watch())
        await asyncio.sleep(0)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(2 * _TICK_S)
        self._watching.cancel()
        await asyncio.wait([self._watching])

    async def _watch(self) -> None:
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - before_s - _TICK_S)


def fill(state: PartitionState, traffic: Traffic, rows: int) -> None:
    """Put new units into a state, with a reward each."""
    for columns in traffic.fill(rows, state.registry.events):
        next_offset = int(columns.offset[-1]) + 1
        if isinstance(columns, ExposureColumns):
            state.apply_exposures(columns, next_offset=next_offset)
        else:
            state.apply_rewards(columns, next_offset=next_offset)


def _pause_s(took_s: float, interval_s: float) -> float:
    """How long a worker reads on after a snapshot: it counts from when that began."""
    return max(interval_s, SNAPSHOT_SHARE * took_s) - took_s


def _shares(measured: tuple[int, float, float, float], name: str) -> dict[str, float]:
    _, ingest_s, took_s, mb = measured
    return {f"{name}_s": took_s, f"{name}_share": took_s / ingest_s, f"{name}_mb": mb}


def _writer() -> SnapshotWriter:
    return SnapshotWriter(0, writer=secrets.token_hex(8), seed=secrets.randbits(63))


def _sizes(state: PartitionState) -> dict[str, float]:
    """Bytes that are used, and all of the hash tables; what arrays have in reserve takes no memory yet."""
    scalars, arrays = state.arrays["scalars"], state.arrays
    rows = int(scalars[kernels.ROWS])
    used = arrays["lookup"].nbytes + rows * kernels.ROW.itemsize
    used += int(scalars[kernels.FRESH] + scalars[kernels.DUE]) * kernels.TIMED.itemsize
    pool = int(scalars[kernels.POOL])
    other = pool * (kernels.REWARD.itemsize + kernels.TIMED.itemsize + 8)
    other += int(scalars[kernels.IDS_EXPOSURES] + scalars[kernels.IDS_REWARDS]) * kernels.IDENTITY.itemsize
    other += arrays["exposure_table"].nbytes + arrays["reward_table"].nbytes
    return {
        "row_bytes": used / rows,
        "value_bytes": int(scalars[kernels.VALUES]) * 8 / rows,
        "other_mb": other / 1e6,
    }


def _rss_mb() -> float:
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 (no file system path, a kernel one)
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


async def measure(job: Job) -> RecoveryReport:
    """Measure one size in this process."""
    if job.bootstrap is None:
        return await _Bench(MemoryLog()).run(job)
    prefix = f"bench-{secrets.token_hex(4)}."
    log = _KafkaLog(Settings(bootstrap=job.bootstrap, prefix=prefix, partitions=1))
    try:
        await log.start()
        return await _Bench(log).run(job)
    finally:
        await log.stop()


def table(reports: list[RecoveryReport]) -> str:
    """The reports as lines to read."""
    return "\n\n".join(_lines(report) for report in reports)


def _lines(report: RecoveryReport) -> str:
    lines = [
        f"{report.rows:,} rows of {EXPERIMENTS} experiments in one partition; snapshots {report.log}",
        (
            f"  memory    {report.row_bytes:.1f} bytes per row (row, queue, hash table) + {report.value_bytes:.0f} of "
            f"values; {report.other_mb:.0f} MB waiting rewards and ids; process {report.rss_mb:,.0f} MB"
        ),
        "  snapshot  CPU, as a worker that reads without end writes them",
    ]
    for name, cost in (("newest 5 %", report.recent), ("any unit", report.anywhere)):
        lines += [
            (
                f"    rewards of {name:10} {cost.incremental_share:.1%} of ingest: what {cost.events:,} events changed "
                f"in {cost.incremental_s:.3f} s, {cost.incremental_mb:.1f} MB; ingest {cost.ingest_s:.2f} s"
            ),
            (
                f"      all of it {cost.full_share:.1%}: {cost.full_s:.3f} s, {cost.full_mb:.1f} MB; what changed "
                f"after every {report.events_per_round:,} {cost.eager_share:.1%}: {cost.eager_s:.3f} s, "
                f"{cost.eager_mb:.1f} MB"
            ),
        ]
    lines += [
        (
            f"  recovery  {report.recovery_s:.2f} s: read {report.read_s:.2f}, restore {report.restore_s:.2f}, "
            f"first block {report.first_block_s:.2f}; same bytes; peak {report.peak_rss_mb:,.0f} MB; "
            f"while restoring the event loop stood still for {report.stall_s * 1e3:.0f} ms at most"
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    # One size: the job is the argument; prints a RecoveryReport.
    sys.stdout.buffer.write(
        msgspec.json.encode(asyncio.run(measure(msgspec.json.decode(sys.argv[1], type=Job))))
    )
