"""The scrape endpoint: GET /metrics, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import make_wsgi_app

from stream_xp.errors import DependencyError
from stream_xp.settings import variable_of

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
"""Connections at once; a further one is closed. A handful of Prometheus servers is many."""
DEADLINE_S = 10.0
"""From the connection to the end of the answer."""
_POLL_S = 0.05


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if there is one left."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread was to be had
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer within the deadline, however slowly the client sends or reads."""
        late = threading.Timer(DEADLINE_S, _cut, (request,))
        late.daemon = True
        try:
            late.start()
            super().process_request_thread(request, client_address)
        finally:
            late.cancel()
            self._slots.release()

    def handle_error(self, *_: Any) -> None:
        """Say nothing of a client that has gone; whoever makes many must not fill a log."""
        error = sys.exception()
        if not isinstance(error, OSError):
            log.error("a scrape failed: %r", error)


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name that the standard library calls it)
        """Say nothing: a scrape is no event."""


class MetricsServer:
    """Serves one registry in threads of its own, from construction until `stop`.

    Args:
        host: address to listen on.
        port: 0 for any that is free.

    Raises:
        DependencyError: the address cannot be listened on; names the settings.
    """

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        app = make_wsgi_app(registry)

        def metrics_only(environ: dict[str, Any], start_response: Any) -> Any:
            if environ["PATH_INFO"] != "/metrics" or environ["REQUEST_METHOD"] != "GET":
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"GET /metrics\n"]
            return app(environ, start_response)

        kind = _ServerV6 if ":" in host else _Server
        try:
            self._server = make_server(host, port, metrics_only, kind, _Handler)
        except OSError as error:
            raise DependencyError(
                f"metrics cannot be served at {host}:{port} ({error.strerror or error}): "
                f"check {variable_of('metrics_host')} and {variable_of('metrics_port')}; "
                "each worker of a machine needs a port of its own"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="stream-xp-metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests; those under way end by themselves."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
