"""The decide stage: statistics of all partitions in, results, signals and config out.

A record on the statistics topic is whole and cumulative, so nothing here has to be kept: the newest record of
each partition is the state. What must not be repeated is a decision; so before the first evaluation all
signals ever sent are read, and a signal is written before the config record that follows from it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import msgspec
import structlog

from stream_xp import __version__
from stream_xp.adapters.clock import Clock
from stream_xp.adapters.kafka_log import LogWriter, read_all
from stream_xp.domain.codec import decode_own
from stream_xp.domain.decision import (
    Action,
    ConfigRecord,
    PartitionOffsets,
    Result,
    RolloutStatus,
    Signal,
    SignalData,
)
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.fit import check_fit
from stream_xp.domain.statistics import (
    ExperimentStatistics,
    Outcomes,
    PartitionStatistics,
    add_outcomes,
    merge,
)
from stream_xp.engine.columns import Block
from stream_xp.engine.evaluate import Evaluation, evaluate_all
from stream_xp.engine.policy import config_after, decide
from stream_xp.errors import ConfigError
from stream_xp.services.experiments import Experiments
from stream_xp.settings import Settings
from stream_xp.stats import CrossMoments, Moments

log = structlog.get_logger(__name__)

SPREAD_MS = 5_000
"""Beyond the idle grace, how far the watermarks of source partitions may be apart for an arm to ship."""
_Own = TypeVar("_Own", Signal, Result, ConfigRecord)
_EVALUATED_TOGETHER = 200
"""Experiments tested as one: large enough for arrays to pay, small enough to let others run in between."""


class _Look(NamedTuple):
    """One evaluation of an experiment: its newest record, and what is known of it by then."""

    record: ExperimentRecord
    parts: list[PartitionStatistics]
    statistics: ExperimentStatistics


@dataclass(slots=True)
class Watched:
    """One experiment of this worker.

    Attributes:
        newest: newest statistics per source partition, of the newest version seen.
        changed: whether there is something to evaluate.
        fitting: those of the newest that are known to fit the spec.
    """

    experiment: str
    newest: dict[int, PartitionStatistics] = field(default_factory=dict)
    changed: bool = False
    fitting: dict[int, PartitionStatistics] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The newest version that has statistics."""
        return max(record.version for record in self.newest.values())

    def take(self, record: PartitionStatistics) -> None:
        """Keep a record if it is newer than what is held for its partition."""
        held = self.newest.get(record.partition)
        if held is None or record.newer_than(held):
            self.newest[record.partition] = record
            self.changed = True

    def current(self) -> list[PartitionStatistics]:
        """The records of the newest version, by partition."""
        version = self.version
        return [record for _, record in sorted(self.newest.items()) if record.version == version]


class Decide:
    """All experiments whose statistics this worker reads.

    Args:
        partitions: number of partitions per topic name.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        experiments: Experiments,
        writer: LogWriter,
        clock: Clock,
        partitions: dict[str, int],
    ) -> None:
        self._settings = settings
        self._experiments = experiments
        self._writer = writer
        self._clock = clock
        self._partitions = partitions
        self._watched: dict[str, Watched] = {}
        self._signals: dict[tuple[str, int], Signal] = {}
        self._primed: set[int] = set()
        self._configs: dict[str, ConfigRecord] = {}
        self._looks: dict[tuple[str, int], int] = {}
        self._lock = asyncio.Lock()
        self._spread_ms = settings.idle_grace_ms + SPREAD_MS

    @property
    def experiments(self) -> list[str]:
        """The experiments this worker evaluates."""
        return sorted(self._watched)

    async def on_block(self, block: Block) -> None:
        """Keep the newest statistics of each partition of each experiment.

        Before the first block of a partition of the statistics topic all of that partition is read, so that no
        experiment is ever evaluated on a part of its source partitions.
        """
        async with self._lock:
            if not self._primed:
                await self._load()
            if block.partition not in self._primed:
                self._take(await self._values("stats", [block.partition]))
                self._primed.add(block.partition)
            self._take(block.values)

    async def evaluate(self) -> None:
        """Evaluate every experiment whose statistics changed, and write what follows."""
        async with self._lock:
            changed = [watched for watched in self._watched.values() if watched.changed]
            for start in range(0, len(changed), _EVALUATED_TOGETHER):
                await self._evaluate(changed[start : start + _EVALUATED_TOGETHER])

    async def drop(self) -> None:
        """Forget everything: another worker may decide now. All of it is on the topics.

        A decision that is being written is waited for: the next owner reads what was decided before it decides.
        """
        async with self._lock:
            self._watched.clear()
            self._primed.clear()

    def _take(self, values: Iterable[bytes | None]) -> None:
        for value in values:
            record = None if value is None else _readable(value)
            if record is not None:
                self._watched.setdefault(record.experiment, Watched(record.experiment)).take(record)

    # --- one evaluation ------------------------------------------------------------------------------------

    async def _evaluate(self, changed: Sequence[Watched]) -> None:
        """Test experiments together, then write what follows of each.

        Every signal is on the broker before the first config is sent, every config before the first result.
        """
        looks = [look for watched in changed if (look := self._look(watched)) is not None]
        evaluations = evaluate_all([(look.record, look.statistics) for look in looks])
        results = []
        for look, evaluation in zip(looks, evaluations, strict=True):
            results.append(self._result(look, evaluation))
            # The loop also serves the consumer: with many experiments it must not wait for all of them.
            await asyncio.sleep(0)
        results = await self._send_signals(results)
        await self._send_configs([look.record for look in looks])
        await self._write("results", [(result.experiment, result) for result in results])

    async def _write(self, topic: str, records: Sequence[tuple[str, msgspec.Struct]]) -> None:
        """Send records in order, each under its key, and wait until the broker has all of them."""
        name = self._settings.topic(topic)
        sent = [
            await self._writer.send(name, key=key.encode(), value=msgspec.json.encode(record))
            for key, record in records
        ]
        await self._writer.durable(sent, name)

    def _look(self, watched: Watched) -> _Look | None:
        watched.changed = False
        record = self._experiments.registry.newest(watched.experiment, watched.version)
        if record is None:
            # Another worker's statistics can be here before the spec; it is looked for again.
            watched.changed = True
            log.debug("statistics without a spec", experiment=watched.experiment, version=watched.version)
            return None
        parts = watched.current()
        if not all(self._fits(watched, part, record) for part in parts):
            return None
        return _Look(record, parts, merge(part.statistics for part in parts))

    @staticmethod
    def _fits(watched: Watched, part: PartitionStatistics, record: ExperimentRecord) -> bool:
        """Whether a partition's statistics are of this spec; without them the experiment would be another one."""
        if watched.fitting.get(part.partition) is part:
            return True
        try:
            check_fit(part.statistics, record.spec)
        except ValueError as error:
            where = {"experiment": watched.experiment, "partition": part.partition}
            log.error("statistics refused: not of this spec", **where, error=str(error))
            return False
        watched.fitting[part.partition] = part
        return True

    def _result(self, look: _Look, evaluation: Evaluation) -> Result:
        record, parts, statistics = look
        signal = self._signals.get((record.spec.experiment, record.spec.version))
        latched = None if signal is None else signal.data.decision
        evaluation = dataclasses.replace(
            evaluation, invalid=(*evaluation.invalid, *apart(parts, self._spread_ms))
        )
        runtime_ms = runtime(parts, statistics.first_exposure_ms)
        key = (record.spec.experiment, record.spec.version)
        self._looks[key] = self._looks.get(key, 0) + 1
        return Result(
            experiment=record.spec.experiment,
            version=record.spec.version,
            design_hash=record.design_hash,
            statistics_hash=statistics.digest(),
            code_version=__version__,
            look=self._looks[key],
            offsets={str(part.partition): _offsets(part) for part in parts},
            runtime_ms=runtime_ms,
            arms=evaluation.arms,
            crossover_units=statistics.crossover_units,
            metrics=evaluation.metrics,
            segments=evaluation.segments,
            sample_ratio=evaluation.sample_ratio,
            invalid=evaluation.invalid,
            decision=decide(record.spec, evaluation, runtime_ms=runtime_ms, latched=latched),
            exposure_outcomes=add_outcomes(part.exposure_outcomes for part in parts),
            reward_outcomes=add_outcomes(part.reward_outcomes for part in parts),
            evaluated_ms=self._clock.now_ms(),
            weight_epochs=len(record.epochs),
            spread_ms=self._spread_ms,
        )

    async def _send_signals(self, results: Sequence[Result]) -> list[Result]:
        """Write the decisions that are new; an id is derived from what it decides, so that a repeat is recognised.

        Returns the results with what is decided: the first signal on the topic. Between reading the topic and writing
        to it another one can have come there, on its way since before its writer lost the experiment.
        """
        new = [
            result
            for result in results
            if result.decision.action is not Action.HOLD and _version_of(result) not in self._signals
        ]
        if not new:
            return list(results)
        signals = [self._signal(result) for result in new]
        await self._write("signals", [(signal.subject, signal) for signal in signals])
        for result in new:
            log.info(
                "decision",
                experiment=result.experiment,
                action=result.decision.action,
                reason=result.decision.reason,
            )
        written = {_version_of(signal.data.result): signal for signal in signals}
        self._signals |= written | first_signals(await self._own("signals", Signal))
        return [
            msgspec.structs.replace(result, decision=self._signals[_version_of(result)].data.decision)
            if _version_of(result) in written
            else result
            for result in results
        ]

    def _signal(self, result: Result) -> Signal:
        return Signal(
            id=signal_id(result),
            source=f"stream-xp/{self._settings.group_id}",
            subject=result.experiment,
            time=dt.datetime.fromtimestamp(result.evaluated_ms / 1000, dt.UTC).isoformat(),
            data=SignalData(decision=result.decision, result=result),
        )

    async def _send_configs(self, records: Sequence[ExperimentRecord]) -> None:
        """Write the configs that follow from signals, unless they are there."""
        if not self._owed(records):
            return
        # Others write configs too: `apply` gives a new experiment its first.
        await self._load_configs()
        configs = [self._config(record, signal) for record, signal in self._owed(records)]
        await self._write("config", [(config.experiment, config) for config in configs])
        self._configs |= {config.experiment: config for config in configs}

    def _owed(self, records: Sequence[ExperimentRecord]) -> list[tuple[ExperimentRecord, Signal]]:
        """The versions that are over and whose config does not say so, each with the signal that ended it."""
        ended = [
            (record, self._signals.get((record.spec.experiment, record.spec.version))) for record in records
        ]
        return [
            (record, signal) for record, signal in ended if signal is not None and not self._follows(record)
        ]

    def _config(self, record: ExperimentRecord, signal: Signal) -> ConfigRecord:
        held = self._configs.get(record.spec.experiment)
        return config_after(
            record,
            signal.data.decision,
            config_version=1 if held is None else held.config_version + 1,
            effective_ms=signal.data.result.evaluated_ms,
            signal_id=signal.id,
        )

    # --- what was said before -------------------------------------------------------------------------------

    async def _load(self) -> None:
        """Read all signals, the newest configs, and how many looks there were."""
        self._signals = first_signals(await self._own("signals", Signal))
        await self._load_configs()
        for result in await self._own("results", Result):
            key = (result.experiment, result.version)
            self._looks[key] = max(result.look, self._looks.get(key, 0))

    async def _load_configs(self) -> None:
        # Not the last one read: a worker that has lost its partitions can still write an older one.
        configs = sorted(await self._own("config", ConfigRecord), key=lambda one: one.config_version)
        self._configs = {config.experiment: config for config in configs}

    def _follows(self, record: ExperimentRecord) -> bool:
        """Whether the config of this version says already that it is over."""
        held = self._configs.get(record.spec.experiment)
        return (
            held is not None
            and held.version == record.spec.version
            and held.status is not RolloutStatus.RUNNING
        )

    async def _own(self, topic: str, kind: type[_Own]) -> list[_Own]:
        """Every record of a topic of ours; what is none is reported and left out, as if it were not there."""
        values = await self._values(topic, range(self._partitions[topic]))
        return [record for value in values if (record := _own_or_none(topic, value, kind)) is not None]

    async def _values(self, topic: str, partitions: Sequence[int]) -> list[bytes]:
        records = await read_all(self._settings, self._settings.topic(topic), partitions)
        return [record.value for record in records if record.value is not None]


def _readable(value: bytes) -> PartitionStatistics | None:
    """The record, or None where somebody else's bytes are on the topic: they must not stop every experiment."""
    try:
        record = decode_own(value, PartitionStatistics)
        _check_numbers(record)
        _check_rows(record.statistics)
    except (ConfigError, ValueError) as error:
        log.error("statistics record refused", error=str(error))
        return None
    return record


def _own_or_none(topic: str, value: bytes, kind: type[_Own]) -> _Own | None:
    try:
        record = decode_own(value, kind)
        _check_range(*_NUMBERS[kind](record))
    except (ConfigError, ValueError) as error:
        log.error("record refused", topic=topic, error=str(error))
        return None
    return record


def _check_numbers(record: PartitionStatistics) -> None:
    """Raise ValueError where a number is beyond what a partition can have counted."""
    statistics = record.statistics
    progress = (record.exposures, record.rewards)
    _check_range(
        record.version,
        record.partition,
        record.allowed_lateness_ms,
        record.watermark_ms,
        statistics.first_exposure_ms,
        *statistics.out_of_range.values(),
        *(offset for one in progress for offset in (one.first_offset, one.applied_offset)),
        *(n for outcomes in _outcomes(record) for n in msgspec.structs.astuple(outcomes)),
    )
    _check_range(
        statistics.crossover_units,
        statistics.over_limit,
        *(number for row in statistics.units for number in (row.epoch, row.units)),
        *(number for row in statistics.moments for number in (row.epoch, row.n)),
        *(number for row in statistics.events for number in (row.epoch, row.events)),
        *(number for row in statistics.histograms for pair in row.bins for number in pair),
        *(row.epoch for row in statistics.histograms),
        least=0,
        largest=_LARGEST_COUNT,
    )


def _outcomes(record: PartitionStatistics | Result) -> tuple[Outcomes, Outcomes]:
    return record.exposure_outcomes, record.reward_outcomes


_LARGEST = 2**62
_LARGEST_COUNT = 2**39
"""Units or events of a row. The tests take counts below 2**53; that many partitions can be added."""
_NUMBERS: dict[type[Any], Callable[[Any], tuple[int | None, ...]]] = {
    Result: lambda result: (result.version, result.look, result.evaluated_ms),
    Signal: lambda signal: (signal.data.result.version, signal.data.result.evaluated_ms),
    ConfigRecord: lambda config: (config.version, config.config_version, config.effective_ms),
}
"""What goes on into records of ours."""


def _check_range(*numbers: int | None, least: int = -1, largest: int = _LARGEST) -> None:
    """Raise ValueError for a number out of range; an applied offset may be the one before the first."""
    for number in numbers:
        if number is not None and not least <= number < largest:
            raise ValueError(f"a number is below {least}, or {largest} or more")


def _check_rows(statistics: ExperimentStatistics) -> None:
    """Raise ValueError where numbers are none that units could have given."""
    moments = {}
    for row in statistics.moments:
        moments[row.metric, row.arm, row.epoch, row.segment] = Moments(row.n, int(row.s), int(row.q))
    for pair in statistics.products:
        of_y = moments.get((pair.metric, pair.arm, pair.epoch, pair.segment))
        if of_y is None:
            raise ValueError("products stand without their moments")
        CrossMoments(n=of_y.n, sx=int(pair.x), sy=of_y.s, sxx=int(pair.xx), syy=of_y.q, sxy=int(pair.xy))
    for events in statistics.events:
        if not 0 <= events.units <= events.events:
            raise ValueError("there must be at least one event for each unit with events")
    for histogram in statistics.histograms:
        if any(at < 0 or count < 0 for at, count in histogram.bins):
            raise ValueError("bins and their counts must not be negative")


def _version_of(result: Result) -> tuple[str, int]:
    return result.experiment, result.version


def first_signals(signals: Iterable[Signal]) -> dict[tuple[str, int], Signal]:
    """The first stop or ship of each experiment version: decisions latch."""
    found: dict[tuple[str, int], Signal] = {}
    for signal in signals:
        if signal.data.decision.action is not Action.HOLD:
            found.setdefault((signal.data.result.experiment, signal.data.result.version), signal)
    return found


def _offsets(part: PartitionStatistics) -> PartitionOffsets:
    return PartitionOffsets(
        exposures=part.exposures.applied_offset,
        rewards=part.rewards.applied_offset,
        watermark_ms=part.watermark_ms,
        exposures_from=part.exposures.first_offset,
        rewards_from=part.rewards.first_offset,
        allowed_lateness_ms=part.allowed_lateness_ms,
        rules=part.rules,
        behind_watermark=part.behind_watermark,
    )


def apart(parts: Sequence[PartitionStatistics], spread_ms: int) -> tuple[str, ...]:
    """Why nothing may ship where the source partitions have come unequally far: units of different times.

    All partitions at one watermark are what traffic had brought by then, a path that the tests follow look
    by look. One partition an hour ahead of the others is on no such path.
    """
    watermarks = [part.watermark_ms for part in parts]
    if None in watermarks:
        return ("a source partition has no watermark yet",)
    apart_ms = max(watermarks, default=0) - min(watermarks, default=0)  # type: ignore[type-var, operator]
    return () if apart_ms <= spread_ms else (f"the source partitions are {apart_ms / 1000:.1f} s apart",)


def runtime(parts: list[PartitionStatistics], first_exposure_ms: int | None) -> int:
    """Milliseconds from the first exposure to the watermark of the partition that is furthest behind."""
    watermarks = [part.watermark_ms for part in parts if part.watermark_ms is not None]
    if first_exposure_ms is None or len(watermarks) < len(parts):
        return 0
    return max(0, min(watermarks) - first_exposure_ms)


def signal_id(result: Result) -> str:
    """Derived from experiment, version, decision and statistics: deriving the decision again gives the same id."""
    text = f"{result.experiment}\0{result.version}\0{result.decision.action}\0{result.statistics_hash}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
