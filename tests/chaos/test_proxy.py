"""The proxy itself, in front of a server that sends everything back."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from broker.proxy import Proxy, Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

SILENT_S = 0.3
"""How long nothing must come where nothing may come; longer only makes the test slower."""


@pytest.fixture
def echo_port() -> Iterator[int]:
    """The port of a server that sends back what it gets, piece by piece."""
    server = socket.create_server(("127.0.0.1", 0))
    open_now: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(65_536):
                connection.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                open_now.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    for connection in open_now:
        connection.close()


@pytest.fixture
def proxy(echo_port: int) -> Iterator[Proxy]:
    with Proxy(echo_port, seed=1) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def read_exactly(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        data = connection.recv(size - len(got))
        assert data, f"the connection ended after {len(got)} of {size} bytes"
        got += data
    return got


def comes_within(connection: socket.socket, seconds: float) -> bytes | None:
    """What comes, b"" at the end of the connection, None where nothing comes."""
    connection.settimeout(seconds)
    try:
        return connection.recv(65_536)
    except TimeoutError:
        return None


SHAPES = {
    "as it is": Shape(),
    "latency": Shape(latency_ms=5),
    "jitter": Shape(latency_ms=1, jitter_ms=10),
    "slices": Shape(slice_bytes=7),
    "slow": Shape(bytes_per_s=2_000_000),
    "all": Shape(latency_ms=1, jitter_ms=3, slice_bytes=1_000, bytes_per_s=2_000_000),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_byte_comes_through_in_order(proxy: Proxy, shape: Shape) -> None:
    proxy.shape = shape
    sent = bytes(range(256)) * (4 if shape.slice_bytes == 7 else 400)
    with connect(proxy) as connection:
        threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
        assert read_exactly(connection, len(sent)) == sent


def test_latency_holds_a_piece_back_in_both_directions(proxy: Proxy) -> None:
    proxy.shape = Shape(latency_ms=SILENT_S * 1000)
    with connect(proxy) as connection:
        connection.sendall(b"x")
        assert comes_within(connection, SILENT_S) is None
        connection.settimeout(10)
        assert read_exactly(connection, 1) == b"x"


def test_a_stall_is_half_open_and_nothing_of_it_is_lost(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"before")
        assert read_exactly(connection, 6) == b"before"
        proxy.stall()
        connection.sendall(b"during")
        assert comes_within(connection, SILENT_S) is None
        with connect(proxy) as another:
            another.sendall(b"new")
            assert comes_within(another, SILENT_S) is None
            proxy.resume()
            another.settimeout(10)
            assert read_exactly(another, 3) == b"new"
        connection.settimeout(10)
        assert read_exactly(connection, 6) == b"during"


def test_a_reset_cuts_what_is_open_and_only_that(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"x")
        assert read_exactly(connection, 1) == b"x"
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxy) as connection:
        connection.sendall(b"y")
        assert read_exactly(connection, 1) == b"y"


def test_new_connections_are_dropped_and_old_ones_go_on(proxy: Proxy) -> None:
    with connect(proxy) as old:
        old.sendall(b"x")
        assert read_exactly(old, 1) == b"x"
        proxy.refuse()
        with contextlib.suppress(ConnectionResetError), connect(proxy) as new:
            assert comes_within(new, 10) == b""
        old.sendall(b"y")
        assert read_exactly(old, 1) == b"y"
        proxy.heal()
        with connect(proxy) as new:
            new.sendall(b"z")
            assert read_exactly(new, 1) == b"z"


def test_an_upstream_that_is_away_ends_the_connection(echo_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with Proxy(port) as proxy, contextlib.suppress(ConnectionResetError):
        with connect(proxy) as connection:
            assert comes_within(connection, 10) == b""
        proxy.upstream_port = echo_port
        with connect(proxy) as connection:
            connection.sendall(b"x")
            assert read_exactly(connection, 1) == b"x"


def test_the_end_of_one_direction_leaves_the_other_open(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert read_exactly(connection, 10) == b"last words"
        assert comes_within(connection, 10) == b""
