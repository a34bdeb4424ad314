"""The proxy that stands in front of a broker which tells its own address."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from proxy import RewritingProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 240


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4) + body


@contextlib.contextmanager
def broker_that_tells_its_port(*pieces: slice) -> Iterator[int]:
    """One connection whose answer, with the port in it, comes in these pieces."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = framed(b"x127.0.0.1" + port.to_bytes(4) + b"y") * 2

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                for piece in pieces:
                    connection.recv(1)
                    connection.sendall(answer[piece])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield port
        thread.join(DEADLINE_S)


def test_the_port_is_replaced_wherever_the_answer_is_cut() -> None:
    # In the middle of the first length, of the first port, and within the second frame.
    cuts = (slice(0, 2), slice(2, 16), slice(16, 30), slice(30, None))
    with (
        broker_that_tells_its_port(*cuts) as port,
        RewritingProxy(f"127.0.0.1:{port}") as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), DEADLINE_S) as client,
    ):
        wanted = framed(b"x127.0.0.1" + proxy.port.to_bytes(4) + b"y") * 2
        client.sendall(framed(b""))
        found = b""
        while len(found) < len(wanted):
            found += client.recv(100)
        assert found == wanted
