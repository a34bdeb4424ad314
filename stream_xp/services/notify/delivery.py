"""One message to one target: when it is tried, when again, and when it is given up."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from stream_xp.adapters.webhook import Answer, signed_headers
from stream_xp.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stream_xp.adapters.clock import Clock
    from stream_xp.adapters.prometheus import Deliveries
    from stream_xp.services.notify.message import Message
    from stream_xp.services.notify.targets import Target

log = structlog.get_logger(__name__)

MAX_TRIES: Final = 8
FIRST_WAIT_S: Final = 7.0
"""Doubled after each try: 7 waits add up to 889 s, give or take the jitter."""
JITTER: Final = 0.25
MAX_WAIT_S: Final = 600.0
"""No wait is longer, whatever a target asks for."""
_TEMPORARY: Final = frozenset({408, 429})


class Posts(Protocol):
    """What sends a body."""

    def post(self, body: bytes, headers: Mapping[str, str], *, now: dt.datetime) -> Answer:
        """Post a body; raises DependencyError where there is no answer."""
        ...


class Fate(StrEnum):
    """What became of a message."""

    WAITING = "waiting"
    TAKEN = "taken"
    GIVEN_UP = "given_up"


def may_be_temporary(status: int) -> bool:
    """Whether the same message may be taken later: after 408, 429 and what is the server's own fault."""
    return status in _TEMPORARY or 500 <= status <= 599


def wait_s(tries: int, *, chance: float, asked_s: float | None = None) -> float:
    """Seconds until the next try.

    Args:
        tries: how many there were, from 1.
        chance: from 0 to 1, where in the jitter it falls, so that many targets do not come back at once.
        asked_s: what the target asked for; a shorter wish than our own wait has no effect.
    """
    own: float = FIRST_WAIT_S * 2.0 ** (tries - 1) * (1 + JITTER * (2 * chance - 1))
    return min(MAX_WAIT_S, max(own, asked_s or 0.0))


class Delivery:
    """The tries of one message to one target.

    Args:
        target: whom it is for.
        message: what is sent, the same every time; the timestamp and with it the signature are new each time.
        sender: posts it.
        clock: wall clock, for timestamps and for when the next try is due.
        chance: gives numbers from 0 to 1.
        deliveries: told what became of it.

    Attributes:
        due_ms: wall time of the next try.
        tries: how many there were.
    """

    def __init__(
        self,
        target: Target,
        message: Message,
        *,
        sender: Posts,
        clock: Clock,
        chance: Callable[[], float],
        deliveries: Deliveries,
    ) -> None:
        self._target = target
        self._message = message
        self._sender = sender
        self._clock = clock
        self._chance = chance
        self._deliveries = deliveries
        self.tries = 0
        self.due_ms = 0

    def attempt(self) -> Fate:
        """Try once."""
        now_ms = self._clock.now_ms()
        self.tries += 1
        headers = {"Content-Type": self._message.content_type} | signed_headers(
            self._message.body,
            message_id=self._message.id,
            timestamp_s=now_ms // 1000,
            keys=self._target.keys,
        )
        try:
            answer = self._sender.post(
                self._message.body, headers, now=dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)
            )
        except DependencyError as error:
            return self._failed(str(error), again=True)
        if 200 <= answer.status <= 299:
            return self._taken()
        return self._failed(
            f"status {answer.status}", again=may_be_temporary(answer.status), asked_s=answer.retry_after_s
        )

    def _taken(self) -> Fate:
        self._deliveries.delivered(self._target.name)
        self._deliveries.waiting(self._target.name, waits=False)
        log.info("message taken", target=self._target.name, id=self._message.id, tries=self.tries)
        return Fate.TAKEN

    def _failed(self, why: str, *, again: bool, asked_s: float | None = None) -> Fate:
        about = {"target": self._target.name, "id": self._message.id, "why": why, "tries": self.tries}
        self._deliveries.failed(self._target.name)
        if not again or self.tries >= MAX_TRIES:
            self._deliveries.given_up(self._target.name)
            self._deliveries.waiting(self._target.name, waits=False)
            log.error("message given up", **about)
            return Fate.GIVEN_UP
        wait = wait_s(self.tries, chance=self._chance(), asked_s=asked_s)
        self.due_ms = self._clock.now_ms() + round(wait * 1000)
        self._deliveries.waiting(self._target.name, waits=True)
        log.warning("message failed, it is tried again", **about, wait_s=round(wait, 1))
        return Fate.WAITING
