"""The process `stream-xp api`: the reader of the topics in a thread, the server in the foreground, and what ends it."""

from __future__ import annotations

import signal
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Self, cast

import structlog
import uvicorn

from stream_xp.adapters.clock import Clock, WallClock
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.api.app import create_app
from stream_xp.services.api.connection import Connection
from stream_xp.services.api.endpoints import Api, Progress
from stream_xp.services.api.follower import Follower
from stream_xp.services.api.guard import MAX_HEADER_BYTES, Refusals, Tokens, check_names
from stream_xp.services.api.orders import Orders, Place
from stream_xp.services.api.view import TOPICS, View
from stream_xp.services.operate import place

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from starlette.types import ASGIApp

    from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

KEEP_ALIVE_S: Final = 30
DRAIN_S: Final = 3
BACKLOG: Final = 512
START_S: Final = 60.0


class Server(uvicorn.Server):
    """uvicorn, that ends when what it answers from has ended.

    Args:
        app: what answers.
        refusals: told of what is refused before `app` sees it.
        ended: whether to stop.
    """

    def __init__(
        self, app: ASGIApp, *, refusals: Refusals, ended: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=cast("type[Connection]", partial(Connection, refusals=refusals)),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        self._ended = ended

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; asked ten times a second."""
        return self._ended() or await super().on_tick(counter)


def listen(settings: Settings) -> socket.socket:
    """A socket at the address of the settings.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        return _bound(settings.api_host, settings.api_port)
    except OSError as error:
        raise ConfigError(
            f"the API cannot listen on {settings.api_host} port {settings.api_port}: {error.strerror}"
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # asyncio turns Nagle's algorithm off for sockets alone that say they are of TCP; with it, each answer to a client
    # that delays its acknowledgements would take 40 ms longer.
    taken = socket.socket(found[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(found[4])
        taken.listen(BACKLOG)
    except OSError:
        taken.close()
        raise
    return taken


class Service:
    """The parts of one API process.

    Args:
        settings: brokers, address, token and limits.
        clock: wall clock.
        place: writes an order.

    Raises:
        ConfigError: a token is none, or nobody could call it.
    """

    def __init__(self, settings: Settings, *, clock: Clock | None = None, place: Place = place) -> None:
        check_names(settings)
        clock = clock or WallClock()
        self.view = View(settings, clock=clock, read_ms=lambda: self.follower.read_ms)
        self.follower = Follower(settings, TOPICS, self.view.take, clock=clock)
        self.api = Api(
            settings=settings,
            view=self.view,
            tokens=Tokens(settings.api_token),
            orders=Orders(settings, self.view, clock=clock, place=place),
            progress=self._progress,
        )
        self.app = create_app(self.api)

    def _progress(self) -> Progress:
        follower = self.follower
        return Progress(
            follower.read_ms, follower.progress_ms, follower.records, failed=follower.failure is not None
        )


def run_until_signal(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: a setting, a topic or the address is not what it must be.
        StreamXpError: the reader of the topics has ended.
    """
    service = Service(settings)
    for one in (signal.SIGTERM, signal.SIGINT):
        # uvicorn catches them while it serves, and raises them once more when it is done: by then all is well.
        signal.signal(one, lambda *_: None)
    with listen(settings) as taken, service.follower as follower:
        host, port = taken.getsockname()[:2]
        log.info("api started", host=host, port=port, writes=bool(service.api.tokens))
        refusals = service.api.refusals
        Server(service.app, refusals=refusals, ended=lambda: follower.failure is not None).run(
            sockets=[taken]
        )
    if follower.failure is not None:
        raise follower.failure


class ServerThread:
    """A server on a free port of loopback in a thread of its own, for tests and the bench.

    Attributes:
        address: host and port.
        url: the same as a URL.
        refusals: what was refused before `app` saw it.
    """

    def __init__(self, app: ASGIApp, *, refusals: Refusals | None = None) -> None:
        self._socket = _bound("127.0.0.1", 0)
        self.refusals = refusals or Refusals()
        self._server = Server(app, refusals=self.refusals)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="stream-xp-api", daemon=True
        )
        self.address: tuple[str, int] = self._socket.getsockname()
        self.url = "http://{}:{}".format(*self.address)

    def open_connections(self) -> int:
        """How many connections are open."""
        return len(self._server.server_state.connections)

    def __enter__(self) -> Self:
        self._thread.start()
        deadline_s = time.monotonic() + START_S
        while not self._server.started:
            if time.monotonic() > deadline_s or not self._thread.is_alive():
                raise DependencyError("the server did not start")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(START_S)
        self._socket.close()
