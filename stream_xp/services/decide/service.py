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
import itertools
import time
from collections.abc import Iterable, Sequence

import msgspec
import structlog

from stream_xp import __version__
from stream_xp.adapters.clock import Clock
from stream_xp.adapters.kafka_log import LogWriter
from stream_xp.domain.decision import Action, Decision, LookTaken, MonitorResult, Result
from stream_xp.domain.statistics import add_outcomes
from stream_xp.domain.telemetry import ExperimentReport, Telemetry
from stream_xp.domain.tracing import SpanName, Tracer
from stream_xp.engine.columns import Block
from stream_xp.engine.conclusion import guarantee, looked
from stream_xp.engine.evaluate import Evaluation, evaluate_all
from stream_xp.engine.latches import Latches, decision_state, latches
from stream_xp.engine.monitors import with_monitors
from stream_xp.engine.standing import Standing
from stream_xp.engine.steering import Allocator, Seen, Steering, rollout_state, steer
from stream_xp.engine.weights_by_policy import weights_by_policy
from stream_xp.services.decide.buried import Buried
from stream_xp.services.decide.chain import Chain
from stream_xp.services.decide.heard import Heard
from stream_xp.services.decide.look import Conclusion, Look, Version, Watched
from stream_xp.services.decide.records import statistics_or_none
from stream_xp.services.decide.signals import signal_of
from stream_xp.services.decide.source_partitions import (
    SPREAD_MS,
    apart,
    beside,
    least_watermark,
    offsets_of,
    old_from,
    runtime,
)
from stream_xp.services.decide.spans import about_evaluation, about_signal
from stream_xp.services.decide.topics import Topics
from stream_xp.services.experiments import Experiments
from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

_EVALUATED_TOGETHER = 200
"""Experiments tested as one: large enough for arrays to pay, small enough to let others run in between."""


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
        self._registry = experiments.registry
        self._clock = clock
        self._allocator = allocator
        self._spread_ms = settings.idle_grace_ms + SPREAD_MS
        self._topics = Topics(settings, writer=writer, partitions=partitions)
        self._heard = Heard(self._topics, self._note_signal)
        self._chain = Chain(
            settings,
            topics=self._topics,
            heard=self._heard,
            registry=experiments.registry,
            clock=clock,
            tracer=self._tracer,
        )
        self._buried = Buried(self._topics, experiments.registry)
        self._watched: dict[str, Watched] = {}
        self._primed: set[int] = set()
        self._looks: dict[Version, int] = {}
        self._taken: dict[Version, tuple[LookTaken, ...]] = {}
        self._monitors: dict[Version, tuple[MonitorResult, ...]] = {}
        self._latches: dict[str, Latches] = {}
        self._lock = asyncio.Lock()

    @property
    def experiments(self) -> list[str]:
        """The experiments this worker evaluates."""
        return sorted(self._watched)

    # --- what comes in ---------------------------------------------------------------------------------------

    async def on_block(self, block: Block) -> None:
        """Keep the newest statistics of each partition of each experiment.

        Before the first block of a partition of the statistics topic all of that partition is read, so that no
        experiment is ever evaluated on a part of its source partitions.
        """
        async with self._lock:
            if not self._primed:
                await self._load()
            if block.partition not in self._primed:
                there = await self._topics.records("stats", [block.partition])
                self._take(
                    [record.value for record in there],
                    partition=block.partition,
                    offsets=[record.offset for record in there],
                )
                self._primed.add(block.partition)
            self._take(block.values, partition=block.partition, offsets=block.offsets)

    async def follow(self) -> None:
        """Read what is new on the topics of signals and config, for ever; nothing before the first block has come."""
        await self._heard.follow()

    async def hear(self) -> None:
        """Read what stands on the topics of signals and config by now, and was not read before."""
        await self._heard.hear()

    async def stop(self) -> None:
        """Disconnect."""
        await self._heard.stop()

    async def drop(self) -> None:
        """Forget everything: another worker may decide now. All of it is on the topics.

        A decision that is being written is waited for: the next owner reads what was decided before it decides.
        """
        async with self._lock:
            self._watched.clear()
            self._primed.clear()
            self._chain.drop()
            self._buried.drop()
            self._latches.clear()
            self._telemetry.experiments_left()

    def _take(
        self, values: Iterable[bytes | None], *, partition: int | None = None, offsets: Sequence[int] = ()
    ) -> None:
        where = {"topic": self._settings.topic("stats"), "partition": partition}
        for value, offset in itertools.zip_longest(values, offsets):
            record = None if value is None else statistics_or_none(value, {**where, "offset": offset})
            if record is not None:
                self._watched.setdefault(record.experiment, Watched(record.experiment)).take(record)

    def _note_signal(self, experiment: str) -> None:
        if experiment in self._watched:
            self._watched[experiment].changed = True

    async def _load(self) -> None:
        """Read all that was said, the newest configs, and how many looks there were."""
        await self._heard.listen()
        newest: dict[Version, Result] = {}
        for result in await self._topics.own("results", Result):
            key = (result.experiment, result.version)
            held = newest.get(key)
            if held is None or result.look >= held.look:
                newest[key] = result
        for key, result in newest.items():
            self._looks[key] = max(result.look, self._looks.get(key, 0))
            self._taken[key] = result.looks
            self._monitors[key] = result.monitors or ()

    # --- one evaluation ------------------------------------------------------------------------------------

    async def evaluate(self) -> None:
        """Evaluate every experiment of which something changed, or whose data have become too old."""
        async with self._lock:
            began_s, now_ms = time.perf_counter(), self._clock.now_ms()
            changed = [watched for watched in self._watched.values() if watched.is_due(now_ms)]
            if changed:
                with self._tracer.span(SpanName.EVALUATE, about_evaluation(changed)):
                    for start in range(0, len(changed), _EVALUATED_TOGETHER):
                        await self._evaluate(changed[start : start + _EVALUATED_TOGETHER])
            await self._buried.restore(self._watched, now_ms=self._clock.now_ms())
            took_s, now_ms = time.perf_counter() - began_s, self._clock.now_ms()
            self._telemetry.evaluated(took_s=took_s, at_ms=now_ms, experiments=len(self._watched))

    async def _evaluate(self, changed: Sequence[Watched]) -> None:
        """Test experiments together, then write what follows of each.

        Every signal is on the broker before the first weight epoch is sent, every weight epoch before the first config,
        every config before the first result.
        """
        looks = [look for watched in changed if (look := watched.look(self._registry)) is not None]
        evaluations = evaluate_all([(look.record, look.statistics) for look in looks])
        conclusions = []
        for look, evaluation in zip(looks, evaluations, strict=True):
            conclusions.append(self._conclude(look, evaluation))
            # The loop also serves the consumer: with many experiments it must not wait for all of them.
            await asyncio.sleep(0)
        await self._send_signals([one for one in conclusions if one.is_news])
        await self._chain.follow_up(looks)
        results = [self._shown(one) for one in conclusions]
        self._report(conclusions, results)
        await self._topics.write("results", [(result.experiment, result) for result in results])

    def _conclude(self, look: Look, evaluation: Evaluation) -> Conclusion:
        known = self._heard.standing(look.record)
        now_ms = self._clock.now_ms()
        evaluation = self._with_monitors(look, evaluation, known, now_ms)
        seen = self._seen(look, evaluation)
        steering = steer(look.record, known, evaluation, seen, allocator=self._allocator)
        result = self._result(look, evaluation, known, seen, steering, evaluated_ms=now_ms)
        return Conclusion(look, known, steering, result)

    def _with_monitors(self, look: Look, evaluation: Evaluation, known: Standing, now_ms: int) -> Evaluation:
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

    def _seen(self, look: Look, evaluation: Evaluation) -> Seen:
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
        look: Look,
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
            offsets={str(part.partition): offsets_of(part) for part in look.parts},
            runtime_ms=seen.runtime_ms,
            arms=evaluation.arms,
            crossover_units=statistics.crossover_units,
            metrics=evaluation.metrics,
            segments=evaluation.segments,
            ages=evaluation.ages,
            uniform_slice=evaluation.uniform_slice,
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

    async def _send_signals(self, news: Sequence[Conclusion]) -> None:
        """Write decisions, and read the topic: what stands there counts, in the order in which it stands there.

        Between reading the topic and writing to it another signal can have come, on its way since before its writer
        lost the experiment.
        """
        if not news:
            return
        signals = [signal_of(one, group_id=self._settings.group_id) for one in news]
        with self._tracer.spans(SpanName.SIGNAL, [about_signal(signal) for signal in signals]):
            await self._topics.write("signals", [(signal.subject, signal) for signal in signals])
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

    def _shown(self, one: Conclusion) -> Result:
        """The result with what is decided: a stop or ship that came to the topic before one's own is what counts."""
        latched = self._heard.standing(one.look.record).latched if one.is_news else None
        if latched is not None:
            return msgspec.structs.replace(one.result, decision=latched.decision)
        if not one.steering.proposed:
            return one.result
        waiting = Decision(action=Action.HOLD, reason=f"waits for approval: {one.result.decision.reason}")
        return msgspec.structs.replace(one.result, decision=waiting)

    def _report(self, conclusions: Sequence[Conclusion], results: Sequence[Result]) -> None:
        """Tell what stands on the topics of signals by now."""
        reports = []
        for one, result in zip(conclusions, results, strict=True):
            known = self._heard.standing(one.look.record)
            held = latches(result, known, self._latches.get(result.experiment))
            self._latches[result.experiment] = held
            state = decision_state(result, known)
            reports.append(ExperimentReport(result, state, held.breached, held.mismatch))
        self._telemetry.experiments_evaluated(reports)
