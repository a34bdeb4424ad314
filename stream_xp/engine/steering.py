"""What moves an experiment: from evidence and standing to a decision, the weight epoch and the config that follow."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

from stream_xp.domain.assignment import layer_config, uniform_share
from stream_xp.domain.decision import (
    Action,
    ConfigRecord,
    Decision,
    LookTaken,
    RolloutState,
    RolloutStatus,
)
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.operator import OperatorAction
from stream_xp.domain.rollout import Allocation, Mode, Policy
from stream_xp.domain.statistics import ExperimentStatistics
from stream_xp.domain.statistics_size import most_epochs
from stream_xp.engine.conclusion import futility, harmed_arms, invalid, ship
from stream_xp.engine.evaluate import Evaluation
from stream_xp.engine.policy import hold, stop
from stream_xp.engine.ramp import Step, ramp_step
from stream_xp.engine.standing import Demand, Standing

MAX_EPOCHS = 1000
"""Weight epochs of one version, if its statistics have room for so many (`most_epochs`): each is a stratum to test."""
MAX_EPOCH_BYTES = 500_000
"""Of all weight epochs of one version together, about: half of what a record of their topic may have."""
RESERVED_EPOCHS = 10
"""Of them, those that only a conclusion or a person's order may take; at most a quarter, at least one."""


class Seen(NamedTuple):
    """What is known of an experiment at one look, in the time of its data.

    Attributes:
        watermark_ms: the least of its source partitions; None before each has one.
        runtime_ms: that watermark minus the first exposure.
        looks: of a group sequential rule, those taken, this one included.
    """

    statistics: ExperimentStatistics
    watermark_ms: int | None
    runtime_ms: int
    looks: tuple[LookTaken, ...] = ()


class Wanted(NamedTuple):
    """What a policy of weights answers.

    Attributes:
        weights: arm key to share; None where they stay.
        contexts: as in `WeightEpoch`.
        reason: why, in a sentence.
    """

    weights: dict[str, float] | None
    contexts: dict[str, dict[str, float]]
    reason: str


class Allocator(Protocol):
    """The door to the policies of weights: a pure function of its arguments."""

    def __call__(
        self, record: ExperimentRecord, statistics: ExperimentStatistics, evaluation: Evaluation
    ) -> Wanted:
        """The weights that follow the evidence, or why they stay."""


def weights_stay(
    record: ExperimentRecord,  # noqa: ARG001 (the shape of an allocator)
    statistics: ExperimentStatistics,  # noqa: ARG001
    evaluation: Evaluation,  # noqa: ARG001
) -> Wanted:
    """The allocator of a service that has none: weights stay as the file says."""
    return Wanted(None, {}, "this service moves no weights")


class Steering(NamedTuple):
    """The decision at one look.

    Attributes:
        decision: the one in force, or the one to be signalled.
        proposed: a person must approve it: it is signalled as proposed, and until then it is a hold.
        step: where the ramp stands.
        waits: why ramp and weights stay as they are, in a sentence each.
    """

    decision: Decision
    proposed: bool = False
    step: Step = Step(None)
    waits: tuple[str, ...] = ()


def steer(
    record: ExperimentRecord,
    standing: Standing,
    evaluation: Evaluation,
    seen: Seen,
    *,
    allocator: Allocator = weights_stay,
) -> Steering:
    """The decision at this look.

    In the order of precedence:

    1. a stop or ship in force stays;
    2. stop: harm or a wrong sample ratio is proven; neither a pause nor a mode holds it back. Where weights follow a
       policy and another treatment is left, an arm that harms is closed instead: it gets no more units;
    3. hold: the data are invalid, a person holds the experiment or has been asked, or weights are on their way;
    4. advance: the next stage of the ramp is due;
    5. ship, then stop for futility; in the mode `approve` both are proposed, and not again after a refusal;
    6. allocate: the policy wants other weights, the last change is an interval old.

    Args:
        record: the newest record of the experiment.
        standing: what was said of this version.
        evaluation: its evidence.
        seen: the rest of what is known.
        allocator: the policies of weights.
    """
    spec = record.spec
    if standing.latched is not None:
        return Steering(standing.latched.decision)
    step = ramp_step(
        record,
        evaluation,
        seen.statistics,
        watermark_ms=seen.watermark_ms,
        paused=standing.paused is not None,
    )
    held = _held(record, standing, evaluation)
    protecting = stop(evaluation)
    if protecting is not None and not _closed_already(record, standing, evaluation):
        closing = None if held else _closing(record, evaluation, seen, allocator)
        return Steering(closing or protecting, step=step)
    if held is None:
        return _moving(record, standing, evaluation, seen, step=step, allocator=allocator)
    shown = hold(spec, evaluation, seen.runtime_ms, looks=seen.looks)
    reason = shown.reason if invalid(evaluation) else held
    return Steering(_hold(reason), step=step, waits=tuple(dict.fromkeys((*step.waits, held))))


def closed_arms(record: ExperimentRecord) -> frozenset[str]:
    """The treatments that get no units, in no context: once closed they stay so until a person applies other weights.

    Harm that was proven can fall below its threshold again as open units mature, and decisions latch.
    """
    newest = record.epochs[-1]
    return frozenset(
        arm.key
        for arm in record.spec.treatments
        if _without(frozenset((arm.key,)), newest.weights, newest.contexts)
    )


def _closable(record: ExperimentRecord, evaluation: Evaluation) -> frozenset[str]:
    """The arms that harm, where they can be closed and the experiment go on without them; else none."""
    spec = record.spec
    adaptive = spec.allocation is not None and spec.allocation.policy is not Policy.FIXED
    mismatch = evaluation.sample_ratio is not None and evaluation.sample_ratio.mismatch
    harmed = harmed_arms(evaluation)
    left = {arm.key for arm in spec.treatments} - harmed - closed_arms(record)
    return harmed if adaptive and left and not mismatch else frozenset()


def _closed_already(record: ExperimentRecord, standing: Standing, evaluation: Evaluation) -> bool:
    """Whether all the arms that harm have no weight any more, or will have none as soon as what is owed is there."""
    harmed, owed = _closable(record, evaluation), owed_epoch(record, standing)
    if not harmed:
        return False
    newest: Decision | WeightEpoch = record.epochs[-1]
    if owed is not None and owed.decision is not None and owed.decision.weights is not None:
        newest = owed.decision
    return _without(harmed, newest.weights or {}, newest.contexts)


def _without(arms: frozenset[str], weights: dict[str, float], contexts: dict[str, dict[str, float]]) -> bool:
    return all(one.get(arm, 0.0) == 0.0 for one in (weights, *contexts.values()) for arm in arms)


def _closing(
    record: ExperimentRecord, evaluation: Evaluation, seen: Seen, allocator: Allocator
) -> Decision | None:
    """The allocation that closes the arms that harm; None where it cannot, and all must stop."""
    harmed = _closable(record, evaluation)
    if not harmed or _full(record) is not None:
        return None
    wanted = allocator(record, seen.statistics, evaluation)
    if wanted.weights is None or not _without(harmed, wanted.weights, wanted.contexts):
        return None
    listed = ", ".join(sorted(harmed))
    return Decision(
        action=Action.ALLOCATE,
        reason=f"harm is proven, no more units for {listed}; {wanted.reason}",
        weights=wanted.weights,
        contexts=wanted.contexts,
    )


def _moving(
    record: ExperimentRecord,
    standing: Standing,
    evaluation: Evaluation,
    seen: Seen,
    *,
    step: Step,
    allocator: Allocator,
) -> Steering:
    """The decision where nothing holds the experiment."""
    spec, full = record.spec, _full(record)
    if step.next_stage is not None and full is None:
        return Steering(_advance(spec, step.next_stage), step=step)
    concluding = _concluding(spec, evaluation, seen, step)
    if concluding is not None:
        return _answerable(spec, standing, concluding, step)
    moved, waits = _allocation(record, evaluation, seen, allocator)
    if moved is not None:
        return Steering(moved, step=step)
    if full is not None and step.next_stage is not None:
        waits = (full, *waits)
    shown = hold(spec, evaluation, seen.runtime_ms, looks=seen.looks)
    return Steering(_hold("; ".join([shown.reason, *step.waits])), step=step, waits=(*step.waits, *waits))


def _hold(reason: str) -> Decision:
    return Decision(action=Action.HOLD, reason=reason)


def _held(record: ExperimentRecord, standing: Standing, evaluation: Evaluation) -> str | None:
    """Why nothing but a protecting stop may happen now."""
    if invalid(evaluation):
        return "the data are invalid"
    if standing.paused is not None:
        return f"paused by {standing.paused.actor}: {standing.paused.reason}"
    if standing.proposed is not None:
        decision, signal_id = standing.proposed
        return f"waits for approval of signal {signal_id}: {decision.action}, {decision.reason}"
    owed = owed_epoch(record, standing)
    if owed is None:
        return None
    if epochs_spent(record):
        return f"{_had_all(record)}: those that signal {owed.signal_id} asked for cannot follow"
    return f"the weights that signal {owed.signal_id} asked for are on their way"


def _advance(spec: ExperimentSpec, stage: int) -> Decision:
    coverage = 0.0 if spec.ramp is None else spec.ramp.stages[stage].coverage
    reason = f"every guardrail is proven non-inferior; stage {stage}, {coverage:.4g} of all units"
    return Decision(action=Action.ADVANCE, reason=reason, stage=stage)


def _concluding(spec: ExperimentSpec, evaluation: Evaluation, seen: Seen, step: Step) -> Decision | None:
    return ship(
        spec, evaluation, runtime_ms=seen.runtime_ms, looks=seen.looks, ramp_over=step.over
    ) or futility(spec, evaluation, runtime_ms=seen.runtime_ms)


def _answerable(spec: ExperimentSpec, standing: Standing, decision: Decision, step: Step) -> Steering:
    """A conclusion as the mode of the spec has it: by itself, or with a person's approval."""
    if spec.conclusion is None or spec.conclusion.mode is Mode.AUTO:
        return Steering(decision, step=step)
    refused = [words for action, arm, words in standing.rejected if (action, arm) == _what(decision)]
    if refused:
        what = " ".join(filter(None, _what(decision)))
        return Steering(_hold(f"{what} was refused by {refused[-1]}"), step=step)
    return Steering(decision, proposed=True, step=step)


def _what(decision: Decision) -> tuple[Action, str | None]:
    return decision.action, decision.arm


def _full(record: ExperimentRecord) -> str | None:
    return None if epochs_left(record) > 0 else _had_all(record)


def _had_all(record: ExperimentRecord) -> str:
    return f"version {record.spec.version} has had all its weight epochs, {len(record.epochs)}"


def epochs_left(record: ExperimentRecord) -> int:
    """How many more weight epochs the ramp and the policies may begin, were they as long as the newest one."""
    by_bytes = MAX_EPOCH_BYTES // len(msgspec.json.encode(record.epochs[-1]))
    most = min(MAX_EPOCHS, by_bytes, most_epochs(record.spec))
    reserved = max(1, min(RESERVED_EPOCHS, most // 4))
    return max(0, most - reserved - len(record.epochs))


def epochs_spent(record: ExperimentRecord) -> bool:
    """Whether no weight epoch at all can follow: the engine would refuse the record."""
    return len(record.epochs) >= most_epochs(record.spec)


# --- weights -------------------------------------------------------------------------------------------------


def _allocation(
    record: ExperimentRecord, evaluation: Evaluation, seen: Seen, allocator: Allocator
) -> tuple[Decision | None, tuple[str, ...]]:
    allocation = record.spec.allocation
    if allocation is None or allocation.policy is Policy.FIXED:
        return None, ()
    why = _full(record) or _too_soon(record, allocation, seen.watermark_ms)
    if why is not None:
        return None, (why,)
    wanted = allocator(record, seen.statistics, evaluation)
    if wanted.weights is None or _in_force(record.epochs[-1], wanted):
        return None, (wanted.reason,)
    return Decision(
        action=Action.ALLOCATE, reason=wanted.reason, weights=wanted.weights, contexts=wanted.contexts
    ), ()


def _too_soon(record: ExperimentRecord, allocation: Allocation, watermark_ms: int | None) -> str | None:
    if watermark_ms is not None:
        passed_ms = watermark_ms - record.epochs[-1].effective_ms
        if passed_ms >= duration_ms(allocation.interval):
            return None
    return f"the newest weights are not {allocation.interval} of watermark time old"


def _in_force(epoch: WeightEpoch, wanted: Wanted) -> bool:
    """Whether every unit would be drawn as it is now: a context that is not named has the weights of all."""
    if wanted.weights != epoch.weights:
        return False
    values = {*epoch.contexts, *wanted.contexts}
    return all(wanted.contexts.get(value, wanted.weights) == epoch.weights_in(value) for value in values)


# --- the weight epoch that follows -----------------------------------------------------------------------------


def owed_epoch(record: ExperimentRecord, standing: Standing) -> Demand | None:
    """What was asked for and has no weight epoch yet; None if the record is up to date.

    An order or a conclusion is owed until an epoch names it. An advance or allocation is owed only right after the
    epochs that it was decided on: whoever decided on others did not know what has come since.
    """
    named = {epoch.signal_id for epoch in record.epochs}
    demand, move = standing.demand, standing.move
    if demand is not None and demand.signal_id not in named:
        return demand
    if move is not None and move.signal_id not in named and move.epochs == len(record.epochs):
        return move
    return None


def epoch_after(record: ExperimentRecord, demand: Demand, *, effective_ms: int) -> WeightEpoch:
    """The weight epoch that answers a demand.

    Stop: all units get the control. Ship: all get the winner. Reset: the weights of before go on, with the coverage
    of before after a ship, and with that of the ramp's first stage after a stop.

    Args:
        record: the experiment, with the epochs so far.
        demand: one that `owed_epoch` gave for this record.
        effective_ms: when it begins; moved to the begin of the epoch before, should that be later.

    Raises:
        ValueError: the demand names no arm, weights or stage of this experiment.
    """
    last = record.epochs[-1]
    base = next((epoch for epoch in reversed(record.epochs) if not epoch.final), last)
    fresh = msgspec.structs.replace(
        base,
        epoch=last.epoch + 1,
        effective_ms=max(effective_ms, last.effective_ms),
        final=False,
        signal_id=demand.signal_id,
    )
    if demand.action in (Action.STOP, Action.SHIP):
        return _final(record, demand, fresh)
    if demand.action is Action.ALLOCATE:
        return _allocated(demand, fresh)
    stage = 0 if demand.action is OperatorAction.RESET and demand.undone else demand.stage
    ramp = record.spec.ramp
    if stage is None or (ramp is None and demand.action is OperatorAction.RESET):
        return fresh
    if ramp is None or stage >= len(ramp.stages):
        raise ValueError(f"{record.spec.experiment} has no stage {stage}")
    return msgspec.structs.replace(fresh, coverage=ramp.stages[stage].coverage)


def _final(record: ExperimentRecord, demand: Demand, fresh: WeightEpoch) -> WeightEpoch:
    stopped = demand.action is Action.STOP
    target = record.spec.control.key if stopped else demand.decision.arm if demand.decision else None
    if target not in record.spec.weights:
        raise ValueError(f"no weights follow from {demand.action} of {target!r}")
    return msgspec.structs.replace(
        fresh,
        weights={arm.key: 1.0 if arm.key == target else 0.0 for arm in record.spec.arms},
        contexts={},
        coverage=0.0 if stopped else 1.0,
        final=True,
    )


def _allocated(demand: Demand, fresh: WeightEpoch) -> WeightEpoch:
    decision = demand.decision
    if decision is None or decision.weights is None:
        raise ValueError("an allocation has weights")
    return msgspec.structs.replace(fresh, weights=decision.weights, contexts=decision.contexts)


# --- what applications follow ----------------------------------------------------------------------------------


def config_after(
    record: ExperimentRecord,
    standing: Standing,
    *,
    config_version: int,
    lead_ms: int,
    known_ms: int = 0,
) -> ConfigRecord:
    """What applications follow after the newest weight epoch.

    Weights are followed once units that were drawn with them can be counted: an exposure that names an epoch which is
    not in force yet would be a dead letter.

    A stop or ship is followed at once, so from when its weight epoch was written and not from when that begins: it is
    there to end something. Whoever derives this config again, later or elsewhere, derives the same one.

    Args:
        record: the experiment; its newest epoch is the one in force.
        standing: what was said of it, all of which has its epoch (`owed_epoch` is None).
        config_version: of the new record.
        lead_ms: of the weight epoch, from when it was written until it begins.
        known_ms: from when exposures of the newest weight epoch are taken, by whatever clock.
    """
    epoch, latched = record.epochs[-1], standing.latched
    status = RolloutStatus.RUNNING
    if epoch.final and latched is not None:
        status = RolloutStatus.STOPPED if latched.decision.action is Action.STOP else RolloutStatus.SHIPPED
    allocation = record.spec.allocation
    return ConfigRecord(
        experiment=record.spec.experiment,
        version=record.spec.version,
        status=status,
        weights=epoch.weights,
        weight_epoch=epoch.epoch,
        effective_ms=(epoch.effective_ms - lead_ms if epoch.final else max(epoch.effective_ms, known_ms)),
        config_version=config_version,
        signal_id=epoch.signal_id,
        coverage=epoch.coverage,
        contexts=epoch.contexts,
        context=allocation.context if allocation is not None and epoch.contexts else None,
        paused=standing.paused is not None,
        layer=layer_config(record.spec.layer),
        holdout=bool(record.spec.holdout),
        program=record.spec.program,
        uniform_slice=uniform_share(record.spec, epoch),
        uniform_segment=record.spec.uniform_segment,
    )


def config_is_due(record: ExperimentRecord, standing: Standing, held: ConfigRecord | None) -> bool:
    """Whether a config is missing that follows from a signal or an order.

    What `apply` put there, and what is newer than the record, is left alone.
    """
    epoch = record.epochs[-1]
    if held is not None and (held.version, held.weight_epoch) > (record.spec.version, epoch.epoch):
        return False
    paused = standing.paused is not None
    if held is None or held.version < record.spec.version:
        return epoch.signal_id is not None or paused
    concluded = epoch.final == (held.status is not RolloutStatus.RUNNING)
    # No weight epoch is written of an experiment that is over: what follows from the next signal has the same number.
    told = held.weight_epoch == epoch.epoch and held.signal_id in (None, epoch.signal_id)
    behind = epoch.signal_id is not None and not (told and concluded)
    return behind or held.paused != paused


def rollout_state(record: ExperimentRecord, standing: Standing, steering: Steering) -> RolloutState:
    """Where the experiment stands, for its result."""
    epoch = record.epochs[-1]
    return RolloutState(
        stage=steering.step.stage,
        coverage=epoch.coverage,
        weights=epoch.weights,
        paused=standing.paused is not None,
        proposed=None if standing.proposed is None else standing.proposed.signal_id,
        epochs_left=epochs_left(record),
        waits=steering.waits,
    )
