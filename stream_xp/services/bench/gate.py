"""How long a gate takes to answer: requests at a steady rate over open connections, while a worker ingests.

Each request has a time at which it is due, whether or not the one before it was answered; it is measured from then on,
so that a server that stops for a moment cannot hide the requests that would have come meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, Self
from urllib.parse import urlsplit

import msgspec

from stream_xp.adapters.embedded_broker import EmbeddedBroker
from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.errors import DependencyError
from stream_xp.services.publish import plan_application, publish
from stream_xp.settings import Settings

START_S: Final = 120.0
WARM_UP_S: Final = 1.0
PATH: Final = "/api/v1/experiments/bench/analysis"
_SPEC: Final = {
    "experiment": "bench",
    "owner": "bench",
    "hypothesis": "the gate answers in time",
    "unit": "request",
    "planned_sample": 100_000,
    "arms": [{"key": "stable", "weight": 0.5, "control": True}, {"key": "canary", "weight": 0.5}],
    "metrics": [
        {
            "key": "errors",
            "kind": "conversion",
            "attribution_window": "1s",
            "role": "guardrail",
            "direction": "decrease",
            "margin": {"absolute": 0.05},
        }
    ],
}


class GateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of the requests.

    Attributes:
        rate: wanted, requests per second; answered_per_s: reached.
        p50_ms, p99_ms, max_ms: from when a request was due to its last byte.
        statuses: of HTTP, as text, to how many; `lost`: connections that broke.
        events: sent to the worker meanwhile; 0 where another service was asked.
    """

    rate: float
    connections: int
    seconds: float
    answered_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    statuses: dict[str, int]
    events: int


def bench_gate(
    *, url: str | None, rate: float, connections: int, seconds: float, events_per_s: int
) -> GateReport:
    """Ask a gate at a steady rate.

    Args:
        url: what is asked, with http://; None for a worker and an API of its own, on an embedded broker.
        rate: requests per second, over all connections.
        connections: open ones.
        seconds: how long.
        events_per_s: exposures that are sent meanwhile, where it is a worker of its own.

    Raises:
        DependencyError: a process did not start, or no request was answered.
    """
    with contextlib.ExitStack() as stack:
        sender = None
        if url is None:
            url, sender = stack.enter_context(_service(events_per_s))
        asyncio.run(_ask(url, rate, connections, WARM_UP_S))
        before, started_s = 0 if sender is None else sender.sent, time.monotonic()
        took_s, statuses = asyncio.run(_ask(url, rate, connections, seconds))
        passed_s = time.monotonic() - started_s
        events = 0 if sender is None else sender.sent - before
    if not took_s:
        raise DependencyError(f"{url} answered nothing")
    took_s.sort()
    return GateReport(
        rate=rate,
        connections=connections,
        seconds=seconds,
        answered_per_s=len(took_s) / passed_s,
        p50_ms=1000 * took_s[len(took_s) // 2],
        p99_ms=1000 * took_s[min(len(took_s) - 1, (99 * len(took_s)) // 100)],
        max_ms=1000 * took_s[-1],
        statuses=dict(statuses),
        events=events,
    )


async def _ask(url: str, rate: float, connections: int, seconds: float) -> tuple[list[float], Counter[str]]:
    """Seconds of each answer, and how many of each status."""
    took_s: list[float] = []
    statuses: Counter[str] = Counter()
    start_s = time.perf_counter() + 0.1
    gap_s = connections / rate
    each = max(1, round(seconds / gap_s))
    await asyncio.gather(
        *(
            _connection(
                url,
                start_s=start_s + gap_s * at / connections,
                gap_s=gap_s,
                count=each,
                took_s=took_s,
                statuses=statuses,
            )
            for at in range(connections)
        )
    )
    return took_s, statuses


async def _connection(
    url: str,
    *,
    start_s: float,
    gap_s: float,
    count: int,
    took_s: list[float],
    statuses: Counter[str],
) -> None:
    parts = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    except OSError:
        statuses["lost"] += count
        return
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    request = f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    try:
        for number in range(count):
            due_s = start_s + number * gap_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            writer.write(request)
            status = await _answer(reader)
            took_s.append(time.perf_counter() - due_s)
            statuses[status] += 1
    except (OSError, asyncio.IncompleteReadError):
        statuses["lost"] += 1
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> str:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = next(line.partition(":")[2] for line in head.split("\r\n") if line.startswith("content-length:"))
    await reader.readexactly(int(length))
    return head.split(" ", 2)[1]


# --- a service of its own ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _service(events_per_s: int) -> Iterator[tuple[str, _Sender]]:
    """The address of a gate, and what sends events to its worker."""
    with EmbeddedBroker() as broker:
        settings = Settings(
            bootstrap=broker.bootstrap, broker="embedded", allowed_lateness_ms=1_000, activation_delay_ms=500
        )
        for topic in declared_topics(settings):
            broker.create_topic(topic.name, topic.partitions)
        spec = msgspec.convert(_SPEC, ExperimentSpec)
        publish(settings, plan_application(settings, spec, now_ms=_now_ms()))
        port = _free_port()
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("STREAM_XP_")
        } | {
            "STREAM_XP_BOOTSTRAP": broker.bootstrap,
            "STREAM_XP_BROKER": "embedded",
            "STREAM_XP_ALLOWED_LATENESS_MS": "1000",
            "STREAM_XP_ACTIVATION_DELAY_MS": "500",
            "STREAM_XP_API_PORT": str(port),
        }
        with (
            _child("worker", environment),
            _child("api", environment),
            _Sender(settings, events_per_s) as sender,
        ):
            url = f"http://127.0.0.1:{port}{PATH}"
            _await_result(url)
            yield url, sender


@contextlib.contextmanager
def _child(command: str, environment: dict[str, str]) -> Iterator[None]:
    arguments = [sys.executable, "-m", "stream_xp", command, "--log-level", "ERROR"]
    with subprocess.Popen(arguments, env=environment) as child:  # noqa: S603 (this program)
        try:
            yield
        finally:
            child.terminate()


def _await_result(url: str) -> None:
    """Wait until the gate has evidence to show."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, DependencyError):
            if b'"look":0' not in asyncio.run(_once(url.replace("/analysis", "/gate"))):
                return
        time.sleep(0.2)
    raise DependencyError(f"no result came within {START_S:.0f} s")


async def _once(url: str) -> bytes:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
    body = await reader.read()
    writer.close()
    return body


class _Sender:
    """Sends exposures in a thread, at a steady rate."""

    def __init__(self, settings: Settings, events_per_s: int) -> None:
        self._settings = settings
        self._gap_s = 0.05
        self._batch = max(1, round(events_per_s * self._gap_s))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="bench-sender", daemon=True)
        self.sent = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10.0)

    def _main(self) -> None:
        topic = self._settings.topic("exposures")
        with TopicWriter(self._settings) as writer:
            while not self._stop.wait(self._gap_s):
                for number in range(self.sent, self.sent + self._batch):
                    writer.send(
                        topic, key=f"u{number}".encode(), value=msgspec.json.encode(_exposure(number))
                    )
                self.sent += self._batch


def _exposure(number: int) -> dict[str, Any]:
    return {
        "id": f"e{number}",
        "source": "/bench",
        "time": _now_ms(),
        "unit": f"u{number}",
        "experiment": "bench",
        "arm": ("stable", "canary")[number % 2],
        "weight_epoch": 0,
    }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
