"""Where an experiment version stands after all that was said of it: a fold of its signals and orders.

One partition of ``xp.signals`` holds all of an experiment, so their order there is the order in which they count.
Nothing here looks at a clock or at evidence: whoever folds the same records comes to the same standing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from stream_xp.domain.decision import Action, Decision, Signal
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal


class Said(NamedTuple):
    """One record of ``xp.signals``, without the evidence that it carries.

    Attributes:
        source, id: its identity; a repeat counts once.
        said_ms: when, epoch milliseconds; shown, and nothing depends on it.
        decision: of the service; `order`: of a person; one of the two.
        proposed: the decision waits for a person.
        since: the newest reset that the service knew of.
        epochs: how many weight epochs it knew of; None in signals that did not say so.
    """

    source: str
    id: str
    experiment: str
    version: int
    said_ms: int = 0
    decision: Decision | None = None
    proposed: bool = False
    since: str | None = None
    epochs: int | None = None
    order: Order | None = None


def said(record: Signal | OrderSignal) -> Said:
    """What a record of ``xp.signals`` says."""
    if isinstance(record, OrderSignal):
        order = record.data
        return Said(record.source, record.id, order.experiment, order.version, order=order)
    data, result = record.data, record.data.result
    return Said(
        record.source,
        record.id,
        result.experiment,
        result.version,
        said_ms=result.evaluated_ms,
        decision=data.decision,
        proposed=data.proposed,
        since=data.since,
        epochs=result.weight_epochs,
    )


class Latch(NamedTuple):
    """A stop or ship in force; `signal_id` is the record that a weight epoch names."""

    decision: Decision
    signal_id: str


class Demand(NamedTuple):
    """What a record of ``xp.signals`` asks of the weights; the weight epoch that answers it names `signal_id`.

    Attributes:
        action: a stop or ship, an advance or allocation, or the order reset or set_stage.
        decision: what is asked for; None of an order.
        stage: where the ramp goes; None where it stays.
        undone: of a reset, whether it took a stop back.
        epochs: of an advance or allocation, the number of weight epochs it was decided on.
    """

    action: Action | OperatorAction
    signal_id: str
    decision: Decision | None = None
    stage: int | None = None
    undone: bool = False
    epochs: int | None = None


class Ignored(NamedTuple):
    """A record that changed nothing, and why."""

    source: str
    id: str
    rule: str


@dataclass(frozen=True, slots=True)
class Standing:
    """One experiment version after a prefix of its signals.

    Attributes:
        latched: the stop or ship in force.
        proposed: the stop or ship that waits for a person.
        paused: the order that holds the ramp and the weights.
        since: id of the newest reset.
        opened: id of the newest resume or reset: a person has looked at what the monitors say, and opens their latches.
        demand: the newest record that a weight epoch must answer, other than an advance or an allocation.
        move: the newest advance or allocation after it.
        rejected: what a person has refused, and the order: action, arm and the words.
        approved: the order that answered the proposal in force.
        ignored: records that changed nothing.
    """

    latched: Latch | None = None
    proposed: Latch | None = None
    paused: Order | None = None
    since: str | None = None
    opened: str | None = None
    demand: Demand | None = None
    move: Demand | None = None
    rejected: tuple[tuple[Action, str | None, str], ...] = ()
    approved: Order | None = None
    ignored: tuple[Ignored, ...] = ()


NOTHING_SAID = Standing()


def standing(spec: ExperimentSpec, records: Iterable[Said]) -> Standing:
    """Fold the records of an experiment version, in the order of their partition; those of others are passed over."""
    seen: set[tuple[str, str]] = set()
    found = NOTHING_SAID
    for one in records:
        of_version = (one.experiment, one.version) == (spec.experiment, spec.version)
        if of_version and (one.source, one.id) not in seen:
            seen.add((one.source, one.id))
            found = _after(spec, found, one)
    return found


def _after(spec: ExperimentSpec, now: Standing, one: Said) -> Standing:
    if one.order is not None:
        after = _ordered(spec, now, one, one.order)
    elif one.decision is not None:
        after = _decided(spec, now, one, one.decision)
    else:
        after = "it says nothing"
    if isinstance(after, str):
        return replace(now, ignored=(*now.ignored, Ignored(one.source, one.id, after)))
    return after


# --- decisions of the service ----------------------------------------------------------------------------


def _decided(spec: ExperimentSpec, now: Standing, one: Said, decision: Decision) -> Standing | str:
    if decision.action is Action.HOLD:
        return "a hold changes nothing"
    if one.since != now.since:
        return "it was decided before the newest reset"
    if now.latched is not None:
        return _latched(now.latched)
    if decision.action in (Action.STOP, Action.SHIP):
        return _concluded(spec, now, one, decision)
    wrong = "the experiment is paused" if now.paused is not None else _not_a_move(spec, decision)
    if wrong is not None:
        return wrong
    demand = Demand(decision.action, one.id, decision, stage=decision.stage, epochs=one.epochs)
    return replace(now, move=demand)


def _not_a_move(spec: ExperimentSpec, decision: Decision) -> str | None:
    """Why no weight epoch can follow from an advance or allocation; None if one can."""
    if decision.action is Action.ADVANCE:
        return _no_stage(spec, decision.stage)
    for weights in (decision.weights or {}, *decision.contexts.values()):
        if set(weights) != set(spec.weights):
            return "weights must name every arm"
        # Not a number is no share either.
        if abs(math.fsum(weights.values()) - 1.0) > 1e-9 or not all(0 <= w <= 1 for w in weights.values()):
            return "weights must be shares that sum to 1"
    return None


def _no_stage(spec: ExperimentSpec, stage: int | None) -> str | None:
    if spec.ramp is None:
        return "the experiment has no ramp"
    if stage is None or not 0 <= stage < len(spec.ramp.stages):
        return f"the ramp has the stages 0 to {len(spec.ramp.stages) - 1}"
    return None


def _concluded(spec: ExperimentSpec, now: Standing, one: Said, decision: Decision) -> Standing | str:
    if decision.action is Action.SHIP and decision.arm not in spec.weights:
        return f"{decision.arm!r} is no arm"
    if not one.proposed:
        return _latch(now, Latch(decision, one.id))
    if now.paused is not None:
        return "the experiment is paused"
    if now.proposed is not None:
        return f"signal {now.proposed.signal_id} waits already"
    return replace(now, proposed=Latch(decision, one.id))


def _latched(latch: Latch) -> str:
    return f"a {latch.decision.action} is in force; a reset must come first"


def _latch(now: Standing, latch: Latch, *, approved: Order | None = None) -> Standing:
    demand = Demand(latch.decision.action, latch.signal_id, latch.decision)
    return replace(now, latched=latch, proposed=None, demand=demand, move=None, approved=approved)


# --- orders of a person ----------------------------------------------------------------------------------


def _ordered(spec: ExperimentSpec, now: Standing, one: Said, order: Order) -> Standing | str:
    if order.action is OperatorAction.RESET:
        return _reset(now, one, order)
    if order.action in (OperatorAction.PAUSE, OperatorAction.RESUME):
        return _held(now, one, order)
    if order.action in (OperatorAction.APPROVE, OperatorAction.REJECT):
        return _answered(now, order)
    if now.latched is not None:
        return _latched(now.latched)
    act = _staged if order.action is OperatorAction.SET_STAGE else _by_hand
    return act(spec, now, one, order)


def _held(now: Standing, one: Said, order: Order) -> Standing | str:
    if order.action is OperatorAction.RESUME:
        return replace(now, paused=None, opened=one.id) if now.paused is not None else "it is not paused"
    return replace(now, paused=order) if now.paused is None else "it is paused already"


def _by_hand(spec: ExperimentSpec, now: Standing, one: Said, order: Order) -> Standing | str:
    stopped = order.action is OperatorAction.STOP
    if not stopped and order.arm not in spec.weights:
        return f"{order.arm!r} is no arm"
    decision = Decision(
        action=Action.STOP if stopped else Action.SHIP,
        reason=f"{order.actor}: {order.reason}",
        arm=None if stopped else order.arm,
    )
    return _latch(now, Latch(decision, one.id))


def _staged(spec: ExperimentSpec, now: Standing, one: Said, order: Order) -> Standing | str:
    wrong = _no_stage(spec, order.stage)
    if wrong is not None:
        return wrong
    demand = Demand(OperatorAction.SET_STAGE, one.id, stage=order.stage)
    return replace(now, demand=demand, move=None, proposed=None)


def _answered(now: Standing, order: Order) -> Standing | str:
    proposed = now.proposed
    if proposed is None or proposed.signal_id != order.signal_id:
        return f"no proposal {order.signal_id!r} waits"
    if order.action is OperatorAction.APPROVE:
        return _latch(now, proposed, approved=order)
    refused = (proposed.decision.action, proposed.decision.arm, f"{order.actor}: {order.reason}")
    return replace(now, proposed=None, rejected=(*now.rejected, refused))


def _reset(now: Standing, one: Said, order: Order) -> Standing | str:
    if order.monitors:
        return replace(now, opened=one.id)
    held = now.latched or now.proposed
    if held is None:
        return "there is no stop, ship or proposal to take back"
    if order.signal_id not in (None, held.signal_id):
        return f"{order.signal_id!r} is not in force, {held.signal_id!r} is"
    demand = now.demand
    if now.latched is not None:
        undone = now.latched.decision.action is Action.STOP
        demand = Demand(OperatorAction.RESET, one.id, undone=undone)
    return replace(
        now,
        latched=None,
        proposed=None,
        approved=None,
        rejected=(),
        since=one.id,
        opened=one.id,
        demand=demand,
        move=None,
    )


__all__ = ["NOTHING_SAID", "Demand", "Ignored", "Latch", "Said", "Standing", "said", "standing"]
