"""People: what they order on the topic of signals, and what counts of all that is said there.

`Ruling` is a small model of its own of what docs/decisions.md says, for worlds whose experiments have neither a ramp
nor an allocation. It knows the topic whole and in order; the workers read it late, and in parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple, TypeAlias

from stream_xp.domain.decision import Action, Decision, RolloutStatus, Signal
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal

Version: TypeAlias = tuple[str, int]
ARMS = ("a", "b", "c")
_REPEATED = 0.15


class Concluded(NamedTuple):
    """A stop or ship, and the id of the record that said it first."""

    decision: Decision
    id: str


@dataclass(frozen=True)
class Ruling:
    """What is in force of one version after some records of the topic of signals.

    Attributes:
        latched: the stop or ship; `proposed`: the one that waits for a person.
        since: the newest reset that took something back.
        demand: id of the record that the newest weights follow.
    """

    latched: Concluded | None = None
    proposed: Concluded | None = None
    paused: bool = False
    since: str | None = None
    demand: str | None = None

    @property
    def status(self) -> RolloutStatus:
        """What a config says of it."""
        if self.latched is None:
            return RolloutStatus.RUNNING
        stopped = self.latched.decision.action is Action.STOP
        return RolloutStatus.STOPPED if stopped else RolloutStatus.SHIPPED

    def after(self, record: Signal | OrderSignal) -> Ruling:
        """The ruling with one more record; the same where it changes nothing."""
        if isinstance(record, OrderSignal):
            return self._ordered(record.id, record.data)
        decided = Concluded(record.data.decision, record.id)
        if record.data.since != self.since or self.latched is not None:
            return self
        if not record.data.proposed:
            return self._concluded(decided)
        return self if self.paused or self.proposed is not None else replace(self, proposed=decided)

    def _concluded(self, by: Concluded) -> Ruling:
        return replace(self, latched=by, proposed=None, demand=by.id)

    def _ordered(self, order_id: str, order: Order) -> Ruling:
        match order.action:
            case OperatorAction.PAUSE | OperatorAction.RESUME:
                return replace(self, paused=order.action is OperatorAction.PAUSE)
            case OperatorAction.APPROVE | OperatorAction.REJECT:
                return self._answered(order)
            case OperatorAction.RESET:
                return self._reset(order_id, order)
        words = f"{order.actor}: {order.reason}"
        if self.latched is not None:
            return self
        if order.action is OperatorAction.STOP:
            return self._concluded(Concluded(Decision(action=Action.STOP, reason=words), order_id))
        if order.arm not in ARMS:
            return self
        return self._concluded(Concluded(Decision(action=Action.SHIP, reason=words, arm=order.arm), order_id))

    def _answered(self, order: Order) -> Ruling:
        if self.proposed is None or self.proposed.id != order.signal_id:
            return self
        if order.action is OperatorAction.APPROVE:
            return self._concluded(self.proposed)
        return replace(self, proposed=None)

    def _reset(self, order_id: str, order: Order) -> Ruling:
        held = self.latched or self.proposed
        if held is None or order.signal_id not in (None, held.id):
            return self
        demand = self.demand if self.latched is None else order_id
        return replace(self, latched=None, proposed=None, since=order_id, demand=demand)


class People:
    """Who give orders: mostly such as fit what is in force, now and then one of before, or one for nobody.

    `asked`: conclusions are proposed to them, so they conclude little by themselves.
    """

    def __init__(self, rng: Random, *, asked: bool) -> None:
        self._rng, self._asked = rng, asked
        self._said: list[OrderSignal] = []

    def order(self, rulings: dict[Version, Ruling]) -> OrderSignal:
        """The next order, given what is in force on the topic."""
        rng = self._rng
        if self._said and rng.random() < _REPEATED:
            return rng.choice(self._said)
        version = rng.choice([("one", 1), ("one", 1), ("one", 2), ("two", 1)])
        ruling = rulings.get(version, Ruling())
        return self._make(version, OperatorAction(rng.choice(self._fitting(ruling))), ruling)

    def change_their_minds(self) -> tuple[OrderSignal, OrderSignal]:
        """A stop and its reset: what was decided before them does not count after them."""
        version = self._rng.choice([("one", 1), ("one", 2)])
        stop = self._make(version, OperatorAction.STOP, Ruling())
        return stop, self._make(version, OperatorAction.RESET, Ruling())

    def _make(self, version: Version, action: OperatorAction, ruling: Ruling) -> OrderSignal:
        rng, held = self._rng, ruling.latched or ruling.proposed
        answers = action in (OperatorAction.APPROVE, OperatorAction.REJECT)
        names = answers or (action is OperatorAction.RESET and rng.random() < 0.5)
        order = Order(
            experiment=version[0],
            version=version[1],
            action=action,
            actor="somebody",
            reason=f"reason {len(self._said)}",
            arm=rng.choice([*ARMS, "no such"]) if action is OperatorAction.SHIP else None,
            signal_id=held.id if names and held is not None else "another" if answers else None,
        )
        made = OrderSignal(
            id=f"order-{len(self._said)}", source="people", subject=order.experiment, time="now", data=order
        )
        self._said.append(made)
        return made

    def _fitting(self, ruling: Ruling) -> list[str]:
        always = ["resume", "resume", "reset"]
        if not self._asked:
            always += ["pause", "stop"]
        if ruling.latched is not None:
            return [*always, "reset", "reset", "reset"]
        if ruling.proposed is not None:
            return [*always, "approve", "approve", "approve", "reject", "reject"]
        return [*always, "approve"] if self._asked else [*always, "approve", "ship"]
