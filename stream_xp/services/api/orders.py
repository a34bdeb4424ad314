"""What may be written through the API: the orders of people, and of alerts that act as guardrails."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import msgspec
import structlog

from stream_xp.domain.operator import OperatorAction, OrderSignal
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.api.guard import Refused, plain
from stream_xp.services.operate import Call, Placed, place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stream_xp.adapters.clock import Clock
    from stream_xp.services.api.view import View
    from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

AT_ONCE: Final = 2
"""Orders that are written at once; each reads topics, in a thread of its own."""
WAITING: Final = 8
"""Orders that may wait; further ones are told to come again."""
ALERTMANAGER: Final = "alertmanager"
"""The actor of what an alert orders."""
MAX_ALERTS: Final = 10_000
MAX_ALERTS_BYTES: Final = 8_388_608
"""Alertmanager gives up what is refused with 4xx: a group of many alerts must not lose the one that matters."""
_AT_A_TIME: Final = 100
"""Alerts that are looked at before whoever waits for a gate has its turn."""


class OrderRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person wants.

    Attributes:
        reason: why, in a sentence; shown wherever the order is.
        actor: who, beside the name of the token; absent: that name alone.
        arm: of a ship; absent: the only treatment.
        stage: of set-stage, from 0.
        signal: of approve, reject and reset, the beginning of the signal's id.
    """

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    actor: Annotated[str, msgspec.Meta(min_length=1, max_length=90)] | None = None
    arm: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] | None = None
    stage: Annotated[int, msgspec.Meta(ge=0, le=19)] | None = None
    signal: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] | None = None


class OrderPlaced(msgspec.Struct, frozen=True, kw_only=True):
    """An order that stands on `xp.signals`; the worker that owns the experiment enacts it."""

    order: OrderSignal


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """One alert of a group."""

    status: str
    labels: dict[str, str] = {}
    starts_at: str = msgspec.field(default="", name="startsAt")
    fingerprint: str = ""


class AlertGroup(msgspec.Struct, frozen=True, kw_only=True):
    """What Alertmanager sends to a webhook receiver, version 4."""

    alerts: Annotated[tuple[Alert, ...], msgspec.Meta(max_length=MAX_ALERTS)]
    version: str = "4"
    status: str = ""


class AlertOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one alert.

    Attributes:
        did: `ordered`; `known`, it was ordered before; or `nothing`, with the reason.
    """

    fingerprint: str
    did: str
    reason: str = ""
    order_id: str = ""


class AlertsTaken(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the alerts of a group, in their order."""

    alerts: tuple[AlertOutcome, ...]


class Place(Protocol):
    """`services.operate.place`, or what stands in for it."""

    def __call__(self, settings: Settings, call: Call, *, now_ms: int, nonce: str) -> Placed:
        """Write an order."""


class Orders:
    """Writes orders, a few at once: the same function as the commands of the shell.

    Args:
        settings: brokers and prefix.
        view: what the topics say.
        clock: wall clock.
        place: writes one.
    """

    def __init__(self, settings: Settings, view: View, *, clock: Clock, place: Place = place) -> None:
        self._settings = settings
        self._view = view
        self._clock = clock
        self._place = place
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0

    async def order(
        self, experiment: str, action: OperatorAction, wanted: OrderRequest, *, bearer: str, key: str | None
    ) -> OrderPlaced:
        """Write what a person wants.

        Args:
            experiment: its key.
            action: what is ordered.
            wanted: the rest.
            bearer: name of the token.
            key: of idempotency: whoever repeats a request with its key orders once.

        Raises:
            Refused: it could change nothing, there is no such experiment, or no broker takes it.
        """
        if self._view.known(experiment).record is None:
            raise Refused(404, "not_found", "there is no such experiment")
        actor = bearer if wanted.actor is None else f"{wanted.actor} (by {bearer})"
        call = Call(
            experiment=experiment,
            action=action,
            actor=actor,
            reason=wanted.reason,
            arm=wanted.arm,
            stage=wanted.stage,
            signal=wanted.signal,
        )
        nonce = secrets.token_hex(16) if key is None else f"{bearer}\0{key}"
        placed = await self._write(call, nonce)
        log.info(
            "order", experiment=experiment, action=action, actor=actor, bearer=bearer, order=placed.order.id
        )
        return OrderPlaced(order=placed.order)

    async def _write(self, call: Call, nonce: str) -> Placed:
        if self._waiting >= WAITING:
            raise Refused(429, "busy", "too many orders are on their way", retry_after="5")
        self._waiting += 1
        try:
            async with self._slots:
                return await asyncio.to_thread(
                    self._place, self._settings, call, now_ms=self._clock.now_ms(), nonce=nonce
                )
        except ConfigError as error:
            raise Refused(409, "conflict", str(error)) from error
        except DependencyError as error:
            log.error("order not written", experiment=call.experiment, action=call.action, error=str(error))
            raise Refused(503, "unavailable", "the order could not be written; try again") from error
        finally:
            self._waiting -= 1

    # --- alerts ----------------------------------------------------------------------------------------------

    async def alerts(self, group: AlertGroup, *, bearer: str) -> AlertsTaken:
        """Stop or pause the experiments that firing alerts name; each alert once, by its fingerprint and begin.

        Of the alerts of a group that want the same of one experiment the first orders it: each order reads topics.

        Raises:
            Refused: no broker takes an order; Alertmanager sends the group again.
        """
        outcomes: list[AlertOutcome] = []
        left: Counter[str] = Counter()
        asked: set[tuple[str, OperatorAction]] = set()
        for number, alert in enumerate(group.alerts):
            if number % _AT_A_TIME == _AT_A_TIME - 1:
                await asyncio.sleep(0)
            nothing = _no_order(alert) or self._unknown(alert)
            if nothing is None:
                outcomes.append(await self._alert(alert, asked, bearer))
                continue
            left[nothing] += 1
            outcomes.append(AlertOutcome(fingerprint=alert.fingerprint, did="nothing", reason=nothing))
        if left:
            # One line, however many there are: whoever makes alerts must not fill a log.
            log.warning("alerts change nothing", rules=dict(left), bearer=bearer)
        return AlertsTaken(alerts=tuple(outcomes))

    def _unknown(self, alert: Alert) -> str | None:
        told = self._view.verdict(alert.labels["experiment"])
        return told.reason if told.version == 0 else None

    async def _alert(self, alert: Alert, asked: set[tuple[str, OperatorAction]], bearer: str) -> AlertOutcome:
        """Order what an alert wants, unless it did before or one of those `asked` of its group wants the same."""
        call = _call_of(alert)
        outcome = AlertOutcome(fingerprint=alert.fingerprint, did="known")
        if self._view.has_order(call.experiment, actor=call.actor, reason=call.reason):
            return outcome
        if (call.experiment, call.action) in asked:
            return msgspec.structs.replace(outcome, did="nothing", reason=_ASKED)
        asked.add((call.experiment, call.action))
        try:
            placed = await self._write(call, f"{alert.fingerprint}\0{alert.starts_at}")
        except Refused as refused:
            if refused.reason != "conflict":
                raise
            return msgspec.structs.replace(outcome, did="nothing", reason=refused.detail)
        identity = placed.order.id
        log.info(
            "alert ordered", experiment=call.experiment, action=call.action, order=identity, bearer=bearer
        )
        return msgspec.structs.replace(outcome, did="ordered", order_id=identity)


_ASKED: Final = "an alert before it in its group wants the same of this experiment"
_ACTIONS: Final[Mapping[str, OperatorAction]] = {
    "stop": OperatorAction.STOP,
    "pause": OperatorAction.PAUSE,
}


def _no_order(alert: Alert) -> str | None:
    """Why an alert orders nothing by itself; None if it does."""
    if alert.status != "firing":
        return "it does not fire; what it ordered is taken back by a person"
    if not alert.fingerprint or not alert.starts_at:
        return "it has no fingerprint and begin"
    if "experiment" not in alert.labels:
        return "it has no label `experiment`"
    action = alert.labels.get("stream_xp_action", "stop")
    return None if action in _ACTIONS else "its label `stream_xp_action` is neither stop nor pause"


def _call_of(alert: Alert) -> Call:
    """The order of an alert; sent again, it is the same to the letter."""
    labels = alert.labels
    name = plain(labels.get("alertname", "alert"))
    since, mark = plain(alert.starts_at, most=40), plain(alert.fingerprint, most=64)
    return Call(
        experiment=labels["experiment"],
        action=_ACTIONS[labels.get("stream_xp_action", "stop")],
        actor=ALERTMANAGER,
        reason=f"{name} fires since {since} (alert {mark})",
    )
