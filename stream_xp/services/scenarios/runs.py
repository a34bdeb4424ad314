"""Many runs of one scenario through the real engine: evaluation, steering, standing, weight epochs and config."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from stream_xp.domain.decision import Action, ConfigRecord, Decision, LookTaken, MetricResult, MetricState
from stream_xp.domain.experiment import OTHER, Direction, ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.operator import OperatorAction, Order
from stream_xp.domain.publication import next_config, next_record
from stream_xp.engine.conclusion import looked
from stream_xp.engine.evaluate import Evaluation, evaluate_all
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
from stream_xp.services.scenarios.scenario import Change, World
from stream_xp.services.scenarios.world import Drawn, Floats, Ints, Stretch

_SOURCE = "simulate"
_ACTIONS = (Action.STOP, Action.SHIP)


class RunOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one run; times in milliseconds from its begin.

    Attributes:
        action: the conclusion; None if there was none by the horizon.
        ended_ms: when it was decided.
        onset_ms: when an arm began to be worse in a guardrail; None if none did.
        harmed: units exposed to an arm that was worse in a guardrail, until the conclusion.
        erred: an effect was claimed that is not there, or on the wrong side.
        stage: of the ramp, at the end.
        epochs: weight epochs.
        regret, uniform_regret: of the metric that is to grow or shrink, what its exposed units lost against the best
            arm of their context, with the weights there were and with equal ones.
        best_at_end: the best arm had the most weight in every context.
        naive: by comparison, when its test rejected (None if it did not) and the units harmed until then.
    """

    action: Action | None
    arm: str | None
    metric: str | None
    ended_ms: int | None
    onset_ms: float | None
    harmed: float
    erred: bool
    stage: int | None
    epochs: int
    regret: float
    uniform_regret: float
    best_at_end: bool
    naive: dict[str, tuple[int | None, float]]


@dataclass(slots=True)
class _Run:
    """One run, as the decide stage holds it."""

    record: ExperimentRecord
    config: ConfigRecord
    said: list[Said] = field(default_factory=list)
    standing: Standing = NOTHING_SAID
    looks: tuple[LookTaken, ...] = ()
    ended_ms: int | None = None
    harmed: float = 0.0
    erred: bool = False

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
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.number,)))
        return _Simulation(self.world, self.runs, rng).outcomes()


class _Simulation:
    """A chunk of runs, look after look."""

    def __init__(self, world: World, runs: int, rng: np.random.Generator) -> None:
        self._world, self._spec, self._scenario = world, world.spec, world.scenario
        self._drawn = Drawn(world, runs, rng)
        self._naive = Naive(world, runs)
        record = next_record(None, world.spec, effective_ms=0)
        self._runs = [_Run(record, next_config(None, record)) for _ in range(runs)]
        self._regret, self._uniform = np.zeros(runs), np.zeros(runs)
        self._wanted = _wanted_metric(world.spec)
        self._concluded = np.full(runs, -1)
        """Number of the arm that all units get after a conclusion."""
        self._to_horizon = bool(self._scenario.comparisons)
        for at, run in enumerate(self._runs):
            self._follow(at, run.config, 0)

    def outcomes(self) -> list[RunOutcome]:
        """Run to the horizon, or until all have ended and nothing is compared with them."""
        looks_ms = duration_ms(self._scenario.looks)
        for look in range(1, self._world.looks + 1):
            for span in self._drawn.stretches(look):
                self._lose(self._drawn.draw(span), span)
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
            run = self._runs[at]
            run.looks = looked(self._spec, evaluation, run.looks)
            first_ms = one.first_exposure_ms
            runtime_ms = 0 if first_ms is None else max(0, now_ms - first_ms)
            seen = Seen(one, watermark_ms=now_ms, runtime_ms=runtime_ms, looks=run.looks)
            steering = steer(run.record, run.standing, evaluation, seen, allocator=weights_by_policy)
            run.erred = run.erred or _erred(self._world, evaluation)
            self._conclude(run, steering, now_ms)
            self._move(at, run, now_ms)
        self._naive.look(self._drawn, now_ms)
        for change in self._scenario.changes:
            if duration_ms(change.at) == now_ms:
                self._change(change, now_ms)

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
        run.ended_ms, run.harmed = now_ms, float(self._drawn.harmed[at])
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
        index, good = self._wanted
        means = good * self._drawn.truths.means(index, at_ms)
        return np.asarray(means.max(axis=2, keepdims=True) - means)

    def _lose(self, units: Ints, span: Stretch) -> None:
        gaps = self._gaps(span.middle_ms)
        in_context = units.sum(axis=2)
        self._uniform += (in_context * gaps.mean(axis=2)).sum(axis=1)
        after = np.take_along_axis(gaps, np.maximum(self._concluded, 0)[:, None, None], axis=2)[:, :, 0]
        lost = np.where(self._concluded[:, None] < 0, (units * gaps).sum(axis=2), in_context * after)
        self._regret += lost.sum(axis=1)

    def _best_at_end(self, at: int, gaps: Floats) -> bool:
        concluded = self._concluded[at]
        weights = self._drawn.weights(at)
        chosen = np.full(len(weights), concluded) if concluded >= 0 else weights.argmax(axis=1)
        return bool((gaps[at][np.arange(len(weights)), chosen] <= 1e-12).all())

    def _outcome(self, at: int) -> RunOutcome:
        run, decision = self._runs[at], self._runs[at].conclusion
        horizon_ms = duration_ms(self._scenario.horizon)
        onset_ms = float(self._drawn.truths.onset_ms()[at])
        return RunOutcome(
            action=None if decision is None else decision.action,
            arm=None if decision is None else decision.arm,
            metric=None if decision is None else decision.metric,
            ended_ms=run.ended_ms,
            onset_ms=onset_ms if np.isfinite(onset_ms) else None,
            harmed=float(self._drawn.harmed[at]) if run.ended_ms is None else run.harmed,
            erred=run.erred,
            stage=stage_of(self._spec, _last_open(run.record)),
            epochs=len(run.record.epochs),
            regret=float(self._regret[at]),
            uniform_regret=float(self._uniform[at]),
            best_at_end=self._best_at_end(at, self._gaps(horizon_ms)),
            naive=self._naive.of_run(at, self._drawn),
        )


def _last_open(record: ExperimentRecord) -> WeightEpoch:
    return next(epoch for epoch in reversed(record.epochs) if not epoch.final)


def _wanted_metric(spec: ExperimentSpec) -> tuple[int, float]:
    """The metric that traffic is to follow, and 1 or -1 as it is to grow or shrink."""
    keys = [metric.key for metric in spec.metrics]
    followed = spec.allocation.metric if spec.allocation else (spec.primaries or spec.metrics)[0].key
    index = keys.index(followed)
    return index, 1.0 if spec.metrics[index].direction is Direction.INCREASE else -1.0


def _erred(world: World, evaluation: Evaluation) -> bool:
    """Whether an effect is claimed that is not there, or on the wrong side in every context."""
    claimed = (MetricState.BETTER, MetricState.WORSE, MetricState.HARMED)
    return any(one.state in claimed and not _true(world, one) for one in evaluation.metrics)


def _true(world: World, claim: MetricResult) -> bool:
    contexts = world.scenario.contexts
    direction = next(metric.direction for metric in world.spec.metrics if metric.key == claim.metric)
    multiples = world.scenario.truths[claim.metric].multiples(
        claim.arm, list(contexts.shares) if contexts else [OTHER]
    )
    more = (claim.state is MetricState.BETTER) == (direction is Direction.INCREASE)
    return any(times > 1.0 if more else times < 1.0 for times in multiples)
