"""One connection to the API: uvicorn's, that waits for nobody without an end and counts what it refuses by itself.

uvicorn has no limit for the time that the head of a request takes, nor for a body that comes after its answer, nor for
an answer that nobody reads, and logs each request that is no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from stream_xp.services.api.guard import PROBES, Refused, answer

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from stream_xp.services.api.guard import Refusals

MAX_CONNECTIONS: Final = 512
"""Open connections, and requests under way; more are told 503."""
REQUEST_S: Final = 10.0
"""From the first byte of a request, or the begin of a connection, to the end of its head; and for the rest of a body
whose answer is out."""
WRITE_S: Final = 30.0
"""Within so long a client takes an answer, but for what lies in buffers."""

_quiet = logging.getLogger(f"{__name__}.uvicorn")
# Its warnings are one a request, from whoever sends what is none: those are counted.
_quiet.setLevel(logging.ERROR)


class Connection(H11Protocol):
    """A connection with deadlines.

    Args:
        refusals: told of each request that is refused before the application sees it.
        given: as uvicorn gives it.
    """

    def __init__(self, *, refusals: Refusals, **given: Any) -> None:
        super().__init__(**given)
        self.logger = _quiet
        self.limit_concurrency = None
        self._served, self.app = self.app, self._within_bounds
        self._refusals = refusals
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It has sent something."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The answer is handed over."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """It reads more slowly than it is answered."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def timeout_keep_alive_handler(self) -> None:
        """It has been idle for long; what it has not read by now it has to read soon."""
        super().timeout_keep_alive_handler()
        self._expect_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; where it is a body, whoever reads that counts it."""
        if self.cycle is None or self.cycle.response_complete:
            refused = Refused(400, "bad_request", "that is no request of HTTP/1.1")
            self._refusals.note(refused, {"type": "http", "client": self.client})
        super().send_400_response(msg)

    # --- deadlines -------------------------------------------------------------------------------------------

    def _owes(self) -> bool:
        """Whether the client has something to end: a head, or a body whose answer is out.

        For a body whose answer is not out whoever reads it has a deadline.
        """
        if self.conn.their_state is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete

    def _watch(self) -> None:
        """Give what is owed a deadline, that no further byte moves."""
        if not self._owes():
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None
        elif self._reading is None:
            self._reading = self.loop.call_later(REQUEST_S, self._give_up)

    def _give_up(self) -> None:
        refused = Refused(408, "timeout", f"the request did not end within {REQUEST_S:g} s")
        self._refusals.note(refused, {"type": "http", "client": self.client})
        self.transport.abort()

    def _expect_reading(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(WRITE_S, self.transport.abort)

    # --- how many --------------------------------------------------------------------------------------------

    async def _within_bounds(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless there are too many; probes always: a process that is flooded is not one to restart."""
        most = MAX_CONNECTIONS
        if (len(self.connections) > most or len(self.tasks) > most) and scope["path"] not in PROBES:
            refused = Refused(
                503, "busy", "too many connections are open", connection="close", retry_after="1"
            )
            self._refusals.note(refused, scope)
            await answer(refused, send)
        else:
            await self._served(scope, receive, send)
