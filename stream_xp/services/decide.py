"""The decide stage: statistics of all partitions and the orders of people in, results, signals and config out.

A record on the statistics topic is whole and cumulative, so nothing here has to be kept: the newest record of
each partition is the state. What must not be repeated is a decision; so before the first evaluation all
signals ever sent are read, and from then on every new one.

What moves an experiment is a chain: signal, experiment record with the weight epoch that names it, config. Each step
is taken only once the one before was read back from its topic, so that the order of the topic counts, not that of
this process. Whatever is missing of the chain is written at the next evaluation, by whoever is the owner then.
What is written of many experiments at one evaluation is written together: one wait for each step, not for each one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import msgspec
import structlog

from stream_xp import __version__
from stream_xp.adapters.clock import Clock
from stream_xp.adapters.kafka_log import LogRecord, LogTail, LogWriter, read_all
from stream_xp.domain.codec import decode_own
from stream_xp.domain.decision import (
    Action,
    ConfigRecord,
    Decision,
    LookTaken,
    MonitorResult,
    PartitionOffsets,
    Result,
    Signal,
    SignalData,
)
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.fit import check_fit
from stream_xp.domain.operator import OPERATOR_TYPE, OrderSignal
from stream_xp.domain.rollout import Monitors
from stream_xp.domain.statistics import (
    ExperimentStatistics,
    Outcomes,
    PartitionStatistics,
    add_outcomes,
    merge,
)
from stream_xp.domain.telemetry import ExperimentReport, Telemetry
from stream_xp.domain.tracing import SHOWN_EXPERIMENTS, Attributes, SpanName, Tracer
from stream_xp.engine.columns import Block
from stream_xp.engine.conclusion import guarantee, looked
from stream_xp.engine.evaluate import Evaluation, evaluate_all
from stream_xp.engine.latches import Latches, decision_state, latches
from stream_xp.engine.monitors import Beside, with_monitors
from stream_xp.engine.registry import FOREVER
from stream_xp.engine.stalls import DataTime
from stream_xp.engine.standing import NOTHING_SAID, Demand, Said, Standing, said, standing
from stream_xp.engine.steering import (
    Allocator,
    Seen,
    Steering,
    config_after,
    config_is_due,
    epoch_after,
    epochs_spent,
    owed_epoch,
    rollout_state,
    steer,
)
from stream_xp.engine.weights_by_policy import weights_by_policy
from stream_xp.errors import ConfigError
from stream_xp.services.experiments import Experiments
from stream_xp.settings import Settings
from stream_xp.stats import CrossMoments, Moments

log = structlog.get_logger(__name__)

SPREAD_MS = 5_000
"""Beyond the idle grace, how far the watermarks of source partitions may be apart for an arm to ship."""
_Own = TypeVar("_Own", Signal, OrderSignal, Result, ConfigRecord)
_EVALUATED_TOGETHER = 200
"""Experiments tested as one: large enough for arrays to pay, small enough to let others run in between."""
_HEAR_S = 0.05
_READ_BACK_MS = 10_000
"""How long a weight epoch that was written may be on its way back before it is written again."""
_Version: TypeAlias = tuple[str, int]
"""An experiment and its version."""


class _Look(NamedTuple):
    """One evaluation of an experiment: its newest record, and what is known of it by then."""

    watched: Watched
    record: ExperimentRecord
    parts: list[PartitionStatistics]
    statistics: ExperimentStatistics

    @property
    def version(self) -> _Version:
        """The experiment and its version."""
        return self.record.spec.experiment, self.record.spec.version


class _Conclusion(NamedTuple):
    """What one look came to."""

    look: _Look
    known: Standing
    steering: Steering
    result: Result

    @property
    def is_news(self) -> bool:
        """Whether it is to be signalled."""
        return self.known.latched is None and self.steering.decision.action is not Action.HOLD


class _Epoch(NamedTuple):
    """A weight epoch that was written and not read back: after how many others, for which signal, and when."""

    after: int
    signal_id: str
    written_ms: int


@dataclass(slots=True)
class Watched:
    """One experiment of this worker.

    Attributes:
        newest: newest statistics per source partition, of the newest version seen.
        changed: whether there is something to evaluate.
        old_from_ms: wall clock from which its data are too old, without a record that would bring a look; None where
            they are already, or nobody asks.
        fitting: those of the newest that are known to fit the spec.
    """

    experiment: str
    newest: dict[int, PartitionStatistics] = field(default_factory=dict)
    changed: bool = False
    old_from_ms: int | None = None
    fitting: dict[int, PartitionStatistics] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The newest version that has statistics."""
        return max(record.version for record in self.newest.values())

    def is_due(self, now_ms: int) -> bool:
        """Whether it is to be evaluated."""
        return self.changed or (self.old_from_ms is not None and now_ms >= self.old_from_ms)

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
        allocator: the policies of weights.
        telemetry: who is told how it goes.
        tracer: who records the work as spans.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        experiments: Experiments,
        writer: LogWriter,
        clock: Clock,
        partitions: dict[str, int],
        allocator: Allocator = weights_by_policy,
        telemetry: Telemetry | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings
        self._tracer = tracer or Tracer()
        self._telemetry = telemetry or Telemetry()
        self._experiments = experiments
        self._writer = writer
        self._clock = clock
        self._partitions = partitions
        self._watched: dict[str, Watched] = {}
        self._allocator = allocator
        self._said: dict[_Version, list[Said]] = {}
        self._standings: dict[_Version, tuple[int, Standing]] = {}
        self._epochs: dict[_Version, _Epoch] = {}
        self._restored_ms: dict[str, int] = {}
        self._tails: dict[str, LogTail] = {}
        self._primed: set[int] = set()
        self._configs: dict[str, ConfigRecord] = {}
        self._looks: dict[_Version, int] = {}
        self._taken: dict[_Version, tuple[LookTaken, ...]] = {}
        self._monitors: dict[_Version, tuple[MonitorResult, ...]] = {}
        self._latches: dict[str, Latches] = {}
        self._lock = asyncio.Lock()
        self._hearing = asyncio.Lock()
        self._heard: dict[str, Callable[[bytes], None]] = {
            "signals": self._hear_signal,
            "config": self._hear_config,
        }
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
                there = await self._records("stats", [block.partition])
                self._take(
                    [record.value for record in there],
                    partition=block.partition,
                    offsets=[record.offset for record in there],
                )
                self._primed.add(block.partition)
            self._take(block.values, partition=block.partition, offsets=block.offsets)

    async def follow(self) -> None:
        """Read what is new on the topics of signals and config, for ever; nothing before the first block has come."""
        while True:
            await self.hear()
            await asyncio.sleep(_HEAR_S)

    async def hear(self) -> None:
        """Read what stands on the topics of signals and config by now, and was not read before."""
        async with self._hearing:
            await asyncio.gather(*(self._read_on(name, tail) for name, tail in self._tails.items()))

    async def _read_on(self, name: str, tail: LogTail) -> None:
        at_end = False
        while not at_end:
            records, at_end = await tail.poll()
            for record in records:
                if record.value is not None:
                    with self._place(name, record):
                        self._heard[name](record.value)

    async def _listen(self) -> None:
        """Connect, unless it is done, and read all that stands there."""
        async with self._hearing:
            for name in self._heard.keys() - self._tails.keys():
                tail = LogTail(self._settings, self._settings.topic(name), range(self._partitions[name]))
                await tail.start()
                self._tails[name] = tail
        await self.hear()

    async def stop(self) -> None:
        """Disconnect."""
        async with self._hearing:
            while self._tails:
                await self._tails.popitem()[1].stop()

    async def evaluate(self) -> None:
        """Evaluate every experiment of which something changed, or whose data have become too old."""
        async with self._lock:
            began_s, now_ms = time.perf_counter(), self._clock.now_ms()
            changed = [watched for watched in self._watched.values() if watched.is_due(now_ms)]
            if changed:
                with self._tracer.span(SpanName.EVALUATE, _about(changed)):
                    for start in range(0, len(changed), _EVALUATED_TOGETHER):
                        await self._evaluate(changed[start : start + _EVALUATED_TOGETHER])
            await self._restore()
            took_s, now_ms = time.perf_counter() - began_s, self._clock.now_ms()
            self._telemetry.evaluated(took_s=took_s, at_ms=now_ms, experiments=len(self._watched))

    async def drop(self) -> None:
        """Forget everything: another worker may decide now. All of it is on the topics.

        A decision that is being written is waited for: the next owner reads what was decided before it decides.
        """
        async with self._lock:
            self._watched.clear()
            self._primed.clear()
            self._epochs.clear()
            self._restored_ms.clear()
            self._latches.clear()
            self._telemetry.experiments_left()

    def _take(
        self, values: Iterable[bytes | None], *, partition: int | None = None, offsets: Sequence[int] = ()
    ) -> None:
        where = {"topic": self._settings.topic("stats"), "partition": partition}
        for value, offset in itertools.zip_longest(values, offsets):
            record = None if value is None else _readable(value, {**where, "offset": offset})
            if record is not None:
                self._watched.setdefault(record.experiment, Watched(record.experiment)).take(record)

    # --- one evaluation ------------------------------------------------------------------------------------

    async def _evaluate(self, changed: Sequence[Watched]) -> None:
        """Test experiments together, then write what follows of each.

        Every signal is on the broker before the first weight epoch is sent, every weight epoch before the first config,
        every config before the first result.
        """
        looks = [look for watched in changed if (look := self._look(watched)) is not None]
        evaluations = evaluate_all([(look.record, look.statistics) for look in looks])
        conclusions = []
        for look, evaluation in zip(looks, evaluations, strict=True):
            conclusions.append(self._conclude(look, evaluation))
            # The loop also serves the consumer: with many experiments it must not wait for all of them.
            await asyncio.sleep(0)
        await self._send_signals([one for one in conclusions if one.is_news])
        await self._follow_up(looks)
        results = [self._shown(one) for one in conclusions]
        self._report(conclusions, results)
        await self._write("results", [(result.experiment, result) for result in results])

    def _report(self, conclusions: Sequence[_Conclusion], results: Sequence[Result]) -> None:
        """Tell what stands on the topics of signals by now."""
        reports = []
        for one, result in zip(conclusions, results, strict=True):
            known = self._standing(one.look.record)
            held = latches(result, known, self._latches.get(result.experiment))
            self._latches[result.experiment] = held
            state = decision_state(result, known)
            reports.append(ExperimentReport(result, state, held.breached, held.mismatch))
        self._telemetry.experiments_evaluated(reports)

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
        return _Look(watched, record, parts, merge(part.statistics for part in parts))

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

    def _conclude(self, look: _Look, evaluation: Evaluation) -> _Conclusion:
        known = self._standing(look.record)
        now_ms = self._clock.now_ms()
        evaluation = self._with_monitors(look, evaluation, known, now_ms)
        seen = self._seen(look, evaluation)
        steering = steer(look.record, known, evaluation, seen, allocator=self._allocator)
        result = self._result(look, evaluation, known, seen, steering, evaluated_ms=now_ms)
        return _Conclusion(look, known, steering, result)

    def _with_monitors(self, look: _Look, evaluation: Evaluation, known: Standing, now_ms: int) -> Evaluation:
        """The evaluation with all that holds it beside its statistics."""
        evaluation = dataclasses.replace(
            evaluation, invalid=(*evaluation.invalid, *apart(look.parts, self._spread_ms))
        )
        around = beside(look.parts, now_ms, before=self._monitors.get(look.version, ()), opened=known.opened)
        evaluation = with_monitors(look.record, look.statistics, evaluation, around)
        self._monitors[look.version] = evaluation.monitors or ()
        old_from_ms = None if known.latched is not None else old_from(look.record, look.parts)
        look.watched.old_from_ms = old_from_ms if old_from_ms is not None and now_ms < old_from_ms else None
        return evaluation

    def _shown(self, one: _Conclusion) -> Result:
        """The result with what is decided: a stop or ship that came to the topic before one's own is what counts."""
        latched = self._standing(one.look.record).latched if one.is_news else None
        if latched is not None:
            return msgspec.structs.replace(one.result, decision=latched.decision)
        if not one.steering.proposed:
            return one.result
        waiting = Decision(action=Action.HOLD, reason=f"waits for approval: {one.result.decision.reason}")
        return msgspec.structs.replace(one.result, decision=waiting)

    def _seen(self, look: _Look, evaluation: Evaluation) -> Seen:
        taken = looked(look.record.spec, evaluation, self._taken.get(look.version, ()))
        self._taken[look.version] = taken
        return Seen(
            look.statistics,
            watermark_ms=least_watermark(look.parts),
            runtime_ms=runtime(look.parts, look.statistics.first_exposure_ms),
            looks=taken,
        )

    def _result(
        self,
        look: _Look,
        evaluation: Evaluation,
        known: Standing,
        seen: Seen,
        steering: Steering,
        *,
        evaluated_ms: int,
    ) -> Result:
        record, statistics = look.record, look.statistics
        self._looks[look.version] = self._looks.get(look.version, 0) + 1
        return Result(
            experiment=record.spec.experiment,
            version=record.spec.version,
            design_hash=record.design_hash,
            statistics_hash=statistics.digest(),
            code_version=__version__,
            look=self._looks[look.version],
            offsets={str(part.partition): _offsets(part) for part in look.parts},
            runtime_ms=seen.runtime_ms,
            arms=evaluation.arms,
            crossover_units=statistics.crossover_units,
            metrics=evaluation.metrics,
            segments=evaluation.segments,
            ages=evaluation.ages,
            sample_ratio=evaluation.sample_ratio,
            invalid=evaluation.invalid,
            decision=steering.decision,
            exposure_outcomes=add_outcomes(part.exposure_outcomes for part in look.parts),
            reward_outcomes=add_outcomes(part.reward_outcomes for part in look.parts),
            evaluated_ms=evaluated_ms,
            weight_epochs=len(record.epochs),
            spread_ms=self._spread_ms,
            rollout=rollout_state(record, known, steering),
            guarantee=guarantee(record.spec),
            looks=seen.looks,
            monitors=evaluation.monitors,
            champion=record.spec.champion,
        )

    async def _send_signals(self, news: Sequence[_Conclusion]) -> None:
        """Write decisions, and read the topic: what stands there counts, in the order in which it stands there.

        Between reading the topic and writing to it another signal can have come, on its way since before its writer
        lost the experiment.
        """
        if not news:
            return
        signals = [self._signal(one) for one in news]
        with self._tracer.spans(SpanName.SIGNAL, [_about_signal(signal) for signal in signals]):
            await self._write("signals", [(signal.subject, signal) for signal in signals])
        for one in news:
            self._telemetry.decided(
                one.result.decision.action,
                at_ms=one.result.evaluated_ms,
                first_exposure_ms=one.look.statistics.first_exposure_ms,
            )
        for signal in signals:
            log.info(
                "decision",
                experiment=signal.subject,
                signal=signal.id,
                action=signal.data.decision.action,
                proposed=signal.data.proposed,
                reason=signal.data.decision.reason,
            )
        await self.hear()

    def _signal(self, one: _Conclusion) -> Signal:
        """The record of a decision; its id is derived from it, so that a repeat is recognised."""
        result, since = one.result, one.known.since
        return Signal(
            id=signal_id(result, since),
            source=f"stream-xp/{self._settings.group_id}",
            subject=result.experiment,
            time=dt.datetime.fromtimestamp(result.evaluated_ms / 1000, dt.UTC).isoformat(),
            data=SignalData(
                decision=result.decision, result=result, proposed=one.steering.proposed, since=since
            ),
        )

    # --- what follows from signals ---------------------------------------------------------------------------

    async def _follow_up(self, looks: Sequence[_Look]) -> None:
        """Take the next step of each chain from signal to config where one is missing; come back for the one after."""
        owed: list[tuple[_Look, Demand]] = []
        untold: list[ExperimentRecord] = []
        for look in looks:
            missing = self._missing(look)
            if isinstance(missing, Demand):
                owed.append((look, missing))
            elif missing is not None:
                untold.append(missing)
        await self._send_epochs(owed)
        await self._send_configs(untold)

    def _missing(self, look: _Look) -> Demand | ExperimentRecord | None:
        """The weight epoch that is asked for, or else the record whose config is missing."""
        record, heard = look.record, self._standing(look.record)
        owed = owed_epoch(record, heard)
        if owed is None and not self._is_untold(record):
            return None
        in_force = self._experiments.registry.in_force(look.version[0], FOREVER - 1)
        over = isinstance(in_force, int)
        if not isinstance(in_force, int) and in_force[0].version > look.version[1]:
            return None  # Only the newer version can move now.
        if owed is None:
            return record if not over or record.epochs[-1].final else None
        return self._ended(record, owed) if over or epochs_spent(record) else owed

    def _is_untold(self, record: ExperimentRecord) -> bool:
        """Whether applications do not know yet where all that was said has brought an experiment."""
        heard = self._standing(record)
        held = self._configs.get(record.spec.experiment)
        return owed_epoch(record, heard) is None and config_is_due(record, heard, held)

    def _ended(self, record: ExperimentRecord, owed: Demand) -> ExperimentRecord | None:
        """How an experiment ended that takes no more weight epochs: applications are told of it all the same."""
        if owed.action not in (Action.STOP, Action.SHIP):
            return None
        effective_ms = self._clock.now_ms() + self._settings.lead_ms
        last = epoch_after(record, owed, effective_ms=effective_ms)
        ended = msgspec.structs.replace(record, epochs=(*record.epochs, last))
        return ended if self._is_untold(ended) else None

    async def _send_epochs(self, owed: Sequence[tuple[_Look, Demand]]) -> None:
        """Write the weight epochs that signals ask for, but for those that are on their way back already."""
        now_ms = self._clock.now_ms()
        written: dict[_Version, _Epoch] = {}
        moved = []
        for look, demand in owed:
            look.watched.changed = True
            epoch = _Epoch(len(look.record.epochs), demand.signal_id, now_ms)
            if not self._is_on_its_way(look.version, epoch):
                written[look.version] = epoch
                after = epoch_after(look.record, demand, effective_ms=now_ms + self._settings.lead_ms)
                moved.append(msgspec.structs.replace(look.record, epochs=(*look.record.epochs, after)))
        with self._tracer.spans(SpanName.WEIGHT_EPOCH, [_about_epoch(record) for record in moved]):
            await self._write("experiments", [(record.spec.experiment, record) for record in moved])
        self._epochs |= written
        for record in moved:
            newest = record.epochs[-1]
            named = {"experiment": record.spec.experiment, "signal": newest.signal_id}
            log.info("weight epoch", **named, epoch=newest.epoch)

    def _is_on_its_way(self, version: _Version, epoch: _Epoch) -> bool:
        """Whether it was written not long ago and must be read back yet."""
        written = self._epochs.get(version)
        if written is None or (written.after, written.signal_id) != (epoch.after, epoch.signal_id):
            return False
        return epoch.written_ms < written.written_ms + _READ_BACK_MS

    async def _send_configs(self, untold: Sequence[ExperimentRecord]) -> None:
        """Write the configs that follow from the newest weight epochs, unless they are there."""
        if not untold:
            return
        # Others write configs too: `apply` gives a new experiment its first.
        await self.hear()
        configs = [self._config(record) for record in untold if self._is_untold(record)]
        with self._tracer.spans(SpanName.CONFIG, [_about_config(config) for config in configs]):
            await self._write("config", [(config.experiment, config) for config in configs])
        self._configs |= {config.experiment: config for config in configs}

    def _config(self, record: ExperimentRecord) -> ConfigRecord:
        held = self._configs.get(record.spec.experiment)
        in_force_ms = self._experiments.registry.known_from(record.spec.experiment, record.spec.version)
        return config_after(
            record,
            self._standing(record),
            config_version=1 if held is None else held.config_version + 1,
            lead_ms=self._settings.lead_ms,
            known_ms=in_force_ms + self._settings.clocks_apart_ms,
        )

    # --- what compaction would lose --------------------------------------------------------------------------

    async def _restore(self) -> None:
        """Write the record in force once more where one that was refused came after it.

        The topic is compacted: only the refused one would be left, and who reads only that would go by it.
        """
        now_ms = self._clock.now_ms()
        buried = [
            entry
            for entry in self._experiments.registry.buried()
            if entry.experiment in self._watched
            and now_ms >= self._restored_ms.get(entry.experiment, 0) + _READ_BACK_MS
        ]
        if not buried:
            return
        name = self._settings.topic("experiments")
        sent = []
        for entry in buried:
            value = None if entry.record is None else msgspec.json.encode(entry.record)
            sent.append(await self._writer.send(name, key=entry.experiment.encode(), value=value))
            log.warning(
                "experiment record written again: a refused one came after it", experiment=entry.experiment
            )
        await self._writer.durable(sent, name)
        self._restored_ms |= {entry.experiment: now_ms for entry in buried}

    # --- what was said before -------------------------------------------------------------------------------

    async def _load(self) -> None:
        """Read all that was said, the newest configs, and how many looks there were."""
        await self._listen()
        newest: dict[_Version, Result] = {}
        for result in await self._own("results", Result):
            key = (result.experiment, result.version)
            held = newest.get(key)
            if held is None or result.look >= held.look:
                newest[key] = result
        for key, result in newest.items():
            self._looks[key] = max(result.look, self._looks.get(key, 0))
            self._taken[key] = result.looks
            self._monitors[key] = result.monitors or ()

    def _hear_config(self, value: bytes) -> None:
        """Keep the newest config: not the last one, for who has lost its partitions can still write an older one."""
        config = _own_or_none(value, ConfigRecord)
        if config is None:
            return
        held = self._configs.get(config.experiment)
        if held is None or config.config_version >= held.config_version:
            self._configs[config.experiment] = config

    def _hear_signal(self, value: bytes) -> None:
        """Keep what one record of the topic of signals says; what is none is reported and left out."""
        record: Signal | OrderSignal | None
        record = (
            _own_or_none(value, OrderSignal)
            if _type_of(value) == OPERATOR_TYPE
            else _own_or_none(value, Signal)
        )
        if record is None:
            return
        one = said(record)
        key = (one.experiment, one.version)
        self._said.setdefault(key, []).append(one)
        if one.experiment in self._watched:
            self._watched[one.experiment].changed = True

    def _standing(self, record: ExperimentRecord) -> Standing:
        """Where a version stands after all that was heard of it."""
        key = (record.spec.experiment, record.spec.version)
        heard = self._said.setdefault(key, [])
        count, held = self._standings.get(key, (0, NOTHING_SAID))
        if count != len(heard):
            before, held = held, standing(record.spec, heard)
            self._standings[key] = (len(heard), held)
            for one in held.ignored[len(before.ignored) :]:
                log.warning(
                    "signal changes nothing",
                    experiment=key[0],
                    signal=one.id,
                    source=one.source,
                    rule=one.rule,
                )
        return held

    async def _own(self, topic: str, kind: type[_Own]) -> list[_Own]:
        """Every record of a topic of ours; what is none is reported and left out, as if it were not there."""
        found = []
        for record in await self._records(topic, range(self._partitions[topic])):
            with self._place(topic, record):
                own = _own_or_none(record.value or b"", kind)
            if own is not None:
                found.append(own)
        return found

    async def _records(self, topic: str, partitions: Sequence[int]) -> list[LogRecord]:
        records = await read_all(self._settings, self._settings.topic(topic), partitions)
        return [record for record in records if record.value is not None]

    def _place(self, topic: str, record: LogRecord) -> AbstractContextManager[None]:
        """Have whatever is logged in the block name the record that it is about."""
        return structlog.contextvars.bound_contextvars(
            topic=self._settings.topic(topic), partition=record.partition, offset=record.offset
        )


def _about(changed: Sequence[Watched]) -> Attributes:
    names = tuple(watched.experiment for watched in changed[:SHOWN_EXPERIMENTS])
    return {"streamxp.experiments": len(changed), "streamxp.experiment.names": names}


def _about_signal(signal: Signal) -> Attributes:
    return {
        "streamxp.experiment": signal.subject,
        "streamxp.version": signal.data.result.version,
        "streamxp.signal.id": signal.id,
        "streamxp.action": signal.data.decision.action.value,
        "streamxp.proposed": signal.data.proposed,
    }


def _about_epoch(record: ExperimentRecord) -> Attributes:
    newest = record.epochs[-1]
    return {
        **_about_version(record.spec.experiment, record.spec.version, newest.signal_id),
        "streamxp.weight_epoch": newest.epoch,
    }


def _about_config(config: ConfigRecord) -> Attributes:
    return {
        **_about_version(config.experiment, config.version, config.signal_id),
        "streamxp.config_version": config.config_version,
        "streamxp.status": config.status.value,
    }


def _about_version(experiment: str, version: int, signal_id: str | None) -> Attributes:
    about: Attributes = {"streamxp.experiment": experiment, "streamxp.version": version}
    return about if signal_id is None else {**about, "streamxp.signal.id": signal_id}


def _readable(value: bytes, where: Mapping[str, Any]) -> PartitionStatistics | None:
    """The record, or None where somebody else's bytes are on the topic: they must not stop every experiment."""
    try:
        record = decode_own(value, PartitionStatistics)
        _check_numbers(record)
        _check_rows(record.statistics)
    except (ConfigError, ValueError) as error:
        log.error("statistics record refused", **where, error=str(error))
        return None
    return record


def _own_or_none(value: bytes, kind: type[_Own]) -> _Own | None:
    try:
        record = decode_own(value, kind)
        _check_range(*_NUMBERS[kind](record))
    except (ConfigError, ValueError) as error:
        log.error("record refused", error=str(error))
        return None
    return record


class _Typed(msgspec.Struct):
    """What tells the records of one topic apart."""

    type: str = ""


def _type_of(value: bytes) -> str | None:
    try:
        return decode_own(value, _Typed).type
    except ConfigError:
        return None


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
    OrderSignal: lambda order: (order.data.version,),
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


def least_watermark(parts: Sequence[PartitionStatistics]) -> int | None:
    """The watermark of the partition that is furthest behind; None before each has one."""
    watermarks = [part.watermark_ms for part in parts if part.watermark_ms is not None]
    return min(watermarks) if watermarks and len(watermarks) == len(parts) else None


def old_from(record: ExperimentRecord, parts: Sequence[PartitionStatistics]) -> int | None:
    """Wall clock from which the data of an experiment are older than it allows; None where it allows any age."""
    limit, watermark_ms = (record.spec.monitors or Monitors()).data_age, least_watermark(parts)
    return None if limit is None or watermark_ms is None else watermark_ms + duration_ms(limit) + 1


def beside(
    parts: Sequence[PartitionStatistics],
    now_ms: int,
    *,
    before: tuple[MonitorResult, ...],
    opened: str | None,
) -> Beside:
    """What monitors need to know beside the statistics; the arguments are those of `Beside`."""
    watermark_ms = least_watermark(parts)
    newest_ms = max((part.watermark_ms for part in parts if part.watermark_ms is not None), default=0)
    lateness_ms = max((part.allowed_lateness_ms for part in parts), default=0)
    return Beside(
        add_outcomes(part.exposure_outcomes for part in parts),
        add_outcomes(part.reward_outcomes for part in parts),
        # A broker's clock may be ahead of this one.
        None if watermark_ms is None else max(0, now_ms - watermark_ms),
        before,
        opened,
        None if watermark_ms is None else DataTime(watermark_ms, newest_ms, lateness_ms),
    )


def runtime(parts: Sequence[PartitionStatistics], first_exposure_ms: int | None) -> int:
    """Milliseconds from the first exposure to the watermark of the partition that is furthest behind."""
    watermark_ms = least_watermark(parts)
    return (
        0 if first_exposure_ms is None or watermark_ms is None else max(0, watermark_ms - first_exposure_ms)
    )


def signal_id(result: Result, since: str | None = None) -> str:
    """Derived from what is decided: deriving the same decision again gives the same id.

    A conclusion is told by its statistics, an advance or allocation by the weight epochs it follows on.

    Args:
        result: with the decision.
        since: the newest reset: what is decided after it is another decision than the one it took back.
    """
    moves = result.decision.action in (Action.ADVANCE, Action.ALLOCATE)
    about = str(result.weight_epochs) if moves else result.statistics_hash
    parts = [result.experiment, str(result.version), result.decision.action, about]
    text = "\0".join([*parts, *([] if since is None else [since])])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
