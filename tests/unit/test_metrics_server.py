"""The scrape endpoint, and clients that want to keep it busy."""

from __future__ import annotations

import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from stream_xp.adapters.prometheus import MetricsServer
from stream_xp.adapters.prometheus import server as module

DEADLINE_S = 30.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsServer]:
    monkeypatch.setattr(module, "DEADLINE_S", 0.3)
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 4)
    registry = CollectorRegistry()
    Gauge("alive", "Whether it is.", registry=registry).set(1)
    served = MetricsServer(registry, host="127.0.0.1", port=0)
    yield served
    served.stop()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S)


def scraped(server: MetricsServer) -> str:
    """The series, as soon as there is room for one who asks."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{server.port}/metrics", timeout=DEADLINE_S
            ) as answer:
                return str(answer.read().decode())
        except OSError:
            assert time.monotonic() < deadline_s, "nobody can scrape any more"
            time.sleep(0.05)


def test_a_client_that_sends_byte_by_byte_is_cut_off(server: MetricsServer) -> None:
    with connect(server) as link:
        link.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        link.settimeout(0.05)
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            assert time.monotonic() < deadline_s, "it is held for ever"
            try:
                link.sendall(b"x")
                if link.recv(4096) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert "alive 1.0" in scraped(server)


def test_a_crowd_of_connections_takes_no_thread_each_and_scrapes_go_on(server: MetricsServer) -> None:
    before = threading.active_count()
    crowd = [connect(server) for _ in range(60)]
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while threading.active_count() == before:
            assert time.monotonic() < deadline_s
        most = 0
        for _ in range(20):
            most = max(most, threading.active_count())
            time.sleep(0.01)
        # Of each connection that is served, a thread and the timer of its deadline.
        assert most <= before + 2 * 4
        assert "alive 1.0" in scraped(server)
    finally:
        for link in crowd:
            link.close()


def test_a_client_that_has_gone_is_no_line_on_standard_error(
    server: MetricsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(4):
        with connect(server) as link:
            # Closing it sends a reset.
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            link.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            time.sleep(0.05)
    assert "alive 1.0" in scraped(server)
    assert capfd.readouterr().err == ""
