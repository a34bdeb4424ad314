"""Many runs of one scenario through the real engine: evaluation, steering, standing, weight epochs and config."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from stream_xp.domain.decision import (
    Action,
    ConfigRecord,
    Decision,
    LookTaken,
    MetricResult,
    MetricState,
    MonitorResult,
)
from stream_xp.domain.experiment import ExperimentRecord, WeightEpoch
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.operator import OperatorAction, Order
from stream_xp.domain.publication import next_config, next_record
from stream_xp.domain.rollout import Policy
from stream_xp.domain.statistics import ALL, ExperimentStatistics, Outcomes
from stream_xp.engine.conclusion import looked
from stream_xp.engine.evaluate import Evaluation, evaluate_all
from stream_xp.engine.monitors import Beside, with_monitors
from stream_xp.engine.policy import stop
from stream_xp.engine.ramp import stage_of
from stream_xp.engine.standing import NOTHING_SAID, Said, Standing, standing
from stream_xp.engine.steering import (
    Seen,
    Steering,
    config_after,
    config_is_due,
    epoch_after,
    owed_epoch,
    steer,
)
from stream_xp.engine.weights_by_policy import weights_by_policy
from stream_xp.services.scenarios.naive import Naive
from stream_xp.services.scenarios.scenario import Change, Comparison, World
from stream_xp.services.scenarios.truths import (
    TINY,
    Floats,
    Ints,
    followed_metric,
    margin,
    oriented,
    tolerated,
)
from stream_xp.services.scenarios.world import Drawn, Stretch

_SOURCE = "simulate"
_ACTIONS = (Action.STOP, Action.SHIP)


class RunOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one run; times in milliseconds from its begin.

    Attributes:
        action: the conclusion; None if there was none by the horizon.
        ended_ms: when it was decided.
        onset_ms: when the first arm began to harm; None if none did.
        false_stop: a stop for harm of an arm that did no harm yet, or for a sample ratio, which is never wrong here.
        futile: a stop for futility.
        harmed: units that got an arm while it harmed, after a ship all units of the arm that shipped.
        erred: an effect or harm was called proven that is not true of the units counted by then.
        unsafe: a guardrail was called safe while the units counted by then were harmed by its margin or more.
        stage: of the ramp, at the end.
        epochs: weight epochs.
        regret, uniform_regret: of the metric that is to grow or shrink, what its exposed units lost against the best
            arm of their context, with the weights there were and with equal ones.
        on_best: share of the units that got the best arm of their context.
        on_best_at_end: the same of the weights at the end.
        best_at_end: the best arm had the most weight in every context.
        shipped_best: a ship of the arm that is best over all contexts.
        context_free: regret and `on_best` of a run that knows no contexts.
        suspected: the sample ratio was off at some look, among the units counted by then.
        naive: by comparison, when its test rejected (None if it did not) and the units harmed until then.
    """

    action: Action | None
    arm: str | None
    metric: str | None
    ended_ms: int | None
    onset_ms: float | None
    false_stop: bool
    futile: bool
    harmed: float
    erred: bool
    unsafe: bool
    stage: int | None
    epochs: int
    regret: float
    uniform_regret: float
    on_best: float
    on_best_at_end: float
    best_at_end: bool
    shipped_best: bool
    suspected: bool
    naive: dict[str, tuple[int | None, float]]
    context_free: tuple[float, float] | None = None


@dataclass(slots=True)
class _Run:
    """One run, as the decide stage holds it."""

    record: ExperimentRecord
    config: ConfigRecord
    said: list[Said] = field(default_factory=list)
    standing: Standing = NOTHING_SAID
    looks: tuple[LookTaken, ...] = ()
    monitors: tuple[MonitorResult, ...] = ()
    ended_ms: int | None = None
    futile: bool = False
    erred: bool = False
    unsafe: bool = False
    suspected: bool = False

    @property
    def conclusion(self) -> Decision | None:
        """The stop or ship in force."""
        return None if self.standing.latched is None else self.standing.latched.decision


class Chunk(msgspec.Struct, frozen=True):
    """Some runs of a scenario; all that another process needs."""

    world: World
    number: int
    runs: int
    seed: int

    def run(self) -> list[RunOutcome]:
        """Simulate."""
        found = self._simulated(self.world)
        if Comparison.CONTEXT_FREE not in self.world.scenario.comparisons:
            return found
        others = self._simulated(_without_contexts(self.world))
        return [
            msgspec.structs.replace(one, context_free=(other.regret, other.on_best))
            for one, other in zip(found, others, strict=True)
        ]

    def _simulated(self, world: World) -> list[RunOutcome]:
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.number,)))
        return _Simulation(world, self.runs, rng).outcomes()


def _without_contexts(world: World) -> World:
    """The same experiment with a policy that knows no contexts."""
    if world.spec.allocation is None:
        raise ValueError("an experiment without a policy")
    allocation = msgspec.structs.replace(world.spec.allocation, policy=Policy.THOMPSON, context=None)
    spec = msgspec.structs.replace(world.spec, allocation=allocation)
    scenario = msgspec.structs.replace(world.scenario, comparisons=(Comparison.UNIFORM,))
    return msgspec.structs.replace(world, scenario=scenario, spec=spec)


class _Simulation:
    """A chunk of runs, look after look."""

    def __init__(self, world: World, runs: int, rng: np.random.Generator) -> None:
        self._spec, self._scenario, self._looks = world.spec, world.scenario, world.looks
        self._drawn = Drawn(world, runs, rng)
        self._naive = Naive(world, runs)
        record = next_record(None, world.spec, effective_ms=0)
        self._runs = [_Run(record, next_config(None, record)) for _ in range(runs)]
        self._regret, self._uniform, self._harmed = np.zeros(runs), np.zeros(runs), np.zeros(runs)
        self._on_best, self._units = np.zeros(runs), np.zeros(runs)
        self._metrics = {metric.key: (at, metric) for at, metric in enumerate(world.spec.metrics)}
        self._wanted = followed_metric(world.spec)
        self._concluded = np.full(runs, -1)
        """Number of the arm that all units get after a conclusion."""
        self._to_horizon = bool(self._scenario.comparisons)
        for at, run in enumerate(self._runs):
            self._follow(at, run.config, 0)

    def outcomes(self) -> list[RunOutcome]:
        """Run to the horizon, or until all have ended and nothing is compared with them."""
        looks_ms = duration_ms(self._scenario.looks)
        for look in range(1, self._looks + 1):
            for span in self._drawn.stretches(look):
                self._tally(self._drawn.draw(span), span)
            self._drawn.mature(look * looks_ms)
            self._look(look * looks_ms)
            if not self._to_horizon and not self._drawn.live.any():
                break
        return [self._outcome(at) for at in range(len(self._runs))]

    # --- one look --------------------------------------------------------------------------------------------

    def _look(self, now_ms: int) -> None:
        live = np.flatnonzero(self._drawn.live).tolist()
        statistics = self._drawn.statistics(live)
        looks = [(self._runs[at].record, one) for at, one in zip(live, statistics, strict=True)]
        for at, evaluation, (_, one) in zip(live, evaluate_all(looks), looks, strict=True):
            self._decide(at, evaluation, one, now_ms)
        self._naive.look(self._drawn, now_ms)
        for change in self._scenario.changes:
            if duration_ms(change.at) == now_ms:
                self._change(change, now_ms)

    def _decide(self, at: int, found: Evaluation, statistics: ExperimentStatistics, now_ms: int) -> None:
        """What the decide stage does with the evidence of one experiment."""
        run = self._runs[at]
        evaluation = with_monitors(run.record, statistics, found, _beside(run, statistics))
        run.monitors = evaluation.monitors or ()
        run.looks = looked(self._spec, evaluation, run.looks)
        ratio = evaluation.sample_ratio
        run.suspected |= ratio is not None and (ratio.counted_log_e or 0.0) >= ratio.threshold_log_e
        first_ms = statistics.first_exposure_ms
        runtime_ms = 0 if first_ms is None else max(0, now_ms - first_ms)
        seen = Seen(statistics, watermark_ms=now_ms, runtime_ms=runtime_ms, looks=run.looks)
        steering = steer(run.record, run.standing, evaluation, seen, allocator=weights_by_policy)
        for one in evaluation.metrics:
            if self._is_wrong(at, one):
                run.unsafe |= one.state is MetricState.SAFE
                run.erred |= one.state is not MetricState.SAFE
        self._conclude(run, steering, now_ms)
        if steering.decision.action is Action.STOP:
            run.futile = stop(evaluation) is None
        self._move(at, run, now_ms)

    def _conclude(self, run: _Run, steering: Steering, now_ms: int) -> None:
        """Say what was decided; a simulated person approves a proposal at once."""
        decision, spec = steering.decision, run.record.spec
        if decision.action is Action.HOLD or run.conclusion is not None:
            return
        signal_id = f"{len(run.said)}-{now_ms}"
        about = (spec.experiment, spec.version)
        sent = Said(_SOURCE, signal_id, *about, said_ms=now_ms, decision=decision, proposed=steering.proposed)
        run.said.append(sent._replace(epochs=len(run.record.epochs)))
        if steering.proposed:
            order = Order(
                experiment=spec.experiment,
                version=spec.version,
                action=OperatorAction.APPROVE,
                actor=_SOURCE,
                reason="approved in a simulation",
                signal_id=signal_id,
            )
            run.said.append(Said(_SOURCE, f"{signal_id}-approved", *about, order=order))
        run.standing = standing(spec, run.said)

    def _move(self, at: int, run: _Run, now_ms: int) -> None:
        """The chain from signal to weight epoch to config."""
        owed, delay_ms = owed_epoch(run.record, run.standing), duration_ms(self._scenario.activation)
        if owed is not None:
            epoch = epoch_after(run.record, owed, effective_ms=now_ms + delay_ms)
            run.record = msgspec.structs.replace(run.record, epochs=(*run.record.epochs, epoch))
        if config_is_due(run.record, run.standing, run.config):
            version = run.config.config_version + 1
            run.config = config_after(run.record, run.standing, config_version=version, lead_ms=delay_ms)
            if run.conclusion is None:
                self._follow(at, run.config, now_ms)
        if run.conclusion is not None:
            self._end(at, run, now_ms)

    def _follow(self, at: int, config: ConfigRecord, now_ms: int) -> None:
        self._drawn.follow(at, config, now_ms)
        stage = stage_of(self._spec, self._runs[at].record.epochs[-1])
        if stage is not None:
            self._drawn.truths.reached(at, stage, max(now_ms, config.effective_ms))

    def _end(self, at: int, run: _Run, now_ms: int) -> None:
        # What would have come without the conclusion goes on being drawn, for the comparisons.
        run.ended_ms = now_ms
        self._drawn.live[at] = False
        self._concluded[at] = int(np.argmax([run.config.weights[arm] for arm in self._drawn.truths.arms]))

    def _change(self, change: Change, now_ms: int) -> None:
        for at, run in enumerate(self._runs):
            if run.conclusion is None:
                arms = tuple(
                    msgspec.structs.replace(a, weight=change.weights[a.key]) for a in run.record.spec.arms
                )
                spec = msgspec.structs.replace(run.record.spec, arms=arms)
                effective_ms = now_ms + duration_ms(self._scenario.activation)
                run.record = next_record(run.record, spec, effective_ms=effective_ms)
                run.config = next_config(run.config, run.record)
                self._follow(at, run.config, now_ms)
            else:
                self._drawn.shadow(at, change.weights)

    # --- what is measured ------------------------------------------------------------------------------------

    def _gaps(self, at_ms: float) -> Floats:
        """What a unit loses against the best arm of its context, (runs, contexts, arms)."""
        means = self._drawn.truths.counted(self._wanted, at_ms)
        good = oriented(self._spec.metrics[self._wanted], means)
        return np.asarray(good.max(axis=2, keepdims=True) - good)

    def _tally(self, units: Ints, span: Stretch) -> None:
        """Count what the units of a stretch lost and suffered, with the arms that they really got."""
        gaps, in_context = self._gaps(span.middle_ms), units.sum(axis=2)
        self._uniform += (in_context * gaps.mean(axis=2)).sum(axis=1)
        got = units.copy()
        over = np.flatnonzero(self._concluded >= 0)
        got[over] = 0
        got[over, :, self._concluded[over]] = in_context[over]
        self._regret += (got * gaps).sum(axis=(1, 2))
        self._on_best += (got * (gaps <= TINY)).sum(axis=(1, 2))
        self._units += in_context.sum(axis=1)
        self._harmed += (got.sum(axis=1) * self._drawn.truths.harming(span.middle_ms)).sum(axis=1)

    def _is_wrong(self, at: int, claim: MetricResult) -> bool:
        """Whether something is called proven that is not true of the units counted by now."""
        index, metric = self._metrics[claim.metric]
        arm = self._drawn.truths.arms.index(claim.arm)
        difference, control = self._drawn.true_effect(index, at, arm)
        good, base = float(oriented(metric, np.array(difference))), np.array(control)
        wrong = {
            MetricState.BETTER: good <= TINY,
            MetricState.WORSE: -good <= TINY,
            MetricState.HARMED: -good <= float(tolerated(metric, base)) + TINY,
            MetricState.SAFE: -good >= float(margin(metric, base)) - TINY,
        }
        return wrong.get(claim.state, False)

    def _weights_at_end(self, at: int) -> Floats:
        """(contexts, arms)."""
        weights = self._drawn.weights(at)
        if self._concluded[at] < 0:
            return weights
        final = np.zeros_like(weights)
        final[:, self._concluded[at]] = 1.0
        return final

    def _outcome(self, at: int) -> RunOutcome:
        run, decision = self._runs[at], self._runs[at].conclusion
        truths, best = self._drawn.truths, self._gaps(duration_ms(self._scenario.horizon))[at] <= TINY
        weights, onset_ms = self._weights_at_end(at), float(truths.onset_ms[at].min())
        return RunOutcome(
            action=None if decision is None else decision.action,
            arm=None if decision is None else decision.arm,
            metric=None if decision is None else decision.metric,
            ended_ms=run.ended_ms,
            onset_ms=onset_ms if np.isfinite(onset_ms) else None,
            false_stop=self._is_false_stop(at),
            futile=run.futile,
            harmed=float(self._harmed[at]),
            erred=run.erred,
            unsafe=run.unsafe,
            stage=stage_of(self._spec, _last_open(run.record)),
            epochs=len(run.record.epochs),
            regret=float(self._regret[at]),
            uniform_regret=float(self._uniform[at]),
            on_best=float(self._on_best[at] / max(1.0, self._units[at])),
            on_best_at_end=float(truths.shares @ (weights * best).sum(axis=1)),
            best_at_end=bool(best[np.arange(len(best)), weights.argmax(axis=1)].all()),
            shipped_best=self._shipped_best(at),
            suspected=run.suspected,
            naive=self._naive.of_run(at, self._drawn),
        )

    def _is_false_stop(self, at: int) -> bool:
        run, decision = self._runs[at], self._runs[at].conclusion
        if decision is None or decision.action is not Action.STOP or run.futile or run.ended_ms is None:
            return False
        if decision.arm is None:
            return True
        truths = self._drawn.truths
        return bool(truths.onset_ms[at, truths.arms.index(decision.arm)] >= run.ended_ms)

    def _shipped_best(self, at: int) -> bool:
        decision, truths = self._runs[at].conclusion, self._drawn.truths
        if decision is None or decision.action is not Action.SHIP or decision.arm is None:
            return False
        means = truths.shares @ truths.counted(self._wanted, duration_ms(self._scenario.horizon))[at]
        good = oriented(self._spec.metrics[self._wanted], means)
        return bool(good[truths.arms.index(decision.arm)] >= good.max() - TINY)


def _beside(run: _Run, statistics: ExperimentStatistics) -> Beside:
    """What monitors know of records that all came once, in time and to the end."""
    units = sum(arm.units for arm in statistics.units if arm.segment == ALL)
    records = Outcomes(read=units, counted=units)
    return Beside(records, Outcomes(), data_age_ms=0, before=run.monitors, opened=run.standing.opened)


def _last_open(record: ExperimentRecord) -> WeightEpoch:
    return next(epoch for epoch in reversed(record.epochs) if not epoch.final)
