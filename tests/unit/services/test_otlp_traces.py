"""Spans on their way to a collector, and what becomes of them where there is none."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

from broker.otlp_receiver import Receiver
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from stream_xp import __version__
from stream_xp.adapters import otlp_traces as module
from stream_xp.adapters.otlp_traces import QUEUED_SPANS, OtlpTracer, url_of
from stream_xp.domain.telemetry import Telemetry
from stream_xp.domain.tracing import Delivery, SpanName
from stream_xp.settings import Settings

DEADLINE_S = 30.0
"""For whatever machine; everything ends as soon as it is done."""


class Counted(Telemetry):
    def __init__(self) -> None:
        self.spans: Counter[Delivery] = Counter()
        self._lock = threading.Lock()

    def spans_ended(self, delivery: Delivery, spans: int) -> None:
        with self._lock:
            self.spans[delivery] += spans


class Blocked(SpanExporter):
    """A collector that takes a request and never answers, until it is given up."""

    def __init__(self) -> None:
        self.asked, self.given_up = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.given_up.wait(DEADLINE_S)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.given_up.set()


class Broken(SpanExporter):
    """Raises, then works."""

    def __init__(self) -> None:
        self.calls = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("out of order")
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


Made = Callable[..., OtlpTracer]


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def made(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """Make tracers that are stopped at the end, and that do not gather for long."""
    monkeypatch.setattr(module, "PAUSE_S", 0.05)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tracers = []

    def make(
        url: str = "http://127.0.0.1:9", exporter: SpanExporter | None = None, **more: Any
    ) -> OtlpTracer:
        settings = Settings(traces_endpoint=url, **more)
        tracers.append(OtlpTracer(settings, counted, exporter=exporter))
        return tracers[-1]

    yield make
    for tracer in tracers:
        tracer.stop()
    gc.collect()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def closed_port() -> str:
    with Receiver() as receiver:
        return receiver.url


def test_a_trace_comes_whole_with_names_ids_and_attributes(made: Made, counted: Counted) -> None:
    with Receiver() as receiver:
        tracer = made(receiver.url, traces_service_name="xp-eu", group_id="g", prefix="eu.")
        with tracer.span(SpanName.EVALUATE, {"streamxp.experiment.names": ("exp",)}) as outer:
            with tracer.spans(SpanName.SIGNAL, [{"streamxp.signal.id": one} for one in "ab"]):
                time.sleep(0.002)
            with tracer.spans(SpanName.CONFIG, []):
                pass
            outer.note({"streamxp.experiments": 1})
        until(lambda: counted.spans[Delivery.DELIVERED] == 3)
        by_name = {(one.name, one.attributes.get("streamxp.signal.id")): one for one in receiver.spans}
        root = by_name["evaluate", None]
        signals = [by_name["write signal", one] for one in "ab"]
        assert len(by_name) == 3
        assert root.parent_id == b""
        assert root.attributes == {"streamxp.experiment.names": ["exp"], "streamxp.experiments": 1}
        assert {one.parent_id for one in signals} == {root.span_id}
        assert {one.trace_id for one in signals} == {root.trace_id}
        assert len({one.span_id for one in (root, *signals)}) == 3
        assert root.took_ns >= signals[0].took_ns >= 2_000_000
        resource = {
            "service.name": "xp-eu",
            "service.version": __version__,
            "messaging.consumer.group.name": "g",
            "streamxp.prefix": "eu.",
            "streamxp.roles": ["ingest", "decide"],
        }
        assert resource.items() <= root.resource.items()
        assert set(receiver.paths) == {"/v1/traces"}
        assert receiver.headers[0]["content-type"] == "application/x-protobuf"
        assert counted.spans == {Delivery.DELIVERED: 3}


def test_traces_beside_each_other_do_not_mix(made: Made) -> None:
    exporter = InMemorySpanExporter()
    tracer = made(exporter=exporter)

    async def one(name: SpanName, inner: SpanName) -> None:
        with tracer.span(name):
            await asyncio.sleep(0.001)
            with tracer.span(inner):
                await asyncio.sleep(0.001)

    async def scenario() -> None:
        await asyncio.gather(
            one(SpanName.FLUSH, SpanName.SNAPSHOT),
            one(SpanName.EVALUATE, SpanName.SIGNAL),
            one(SpanName.LOAD, SpanName.BLOCK),
        )

    asyncio.run(scenario())
    tracer.stop()
    spans = {span.context.span_id: span for span in exporter.get_finished_spans()}
    around = {span.name: spans[span.parent.span_id].name for span in spans.values() if span.parent}
    assert around == {"write snapshot": "flush", "write signal": "evaluate", "ingest block": "load partition"}
    assert len({span.context.trace_id for span in spans.values()}) == 3


def test_a_span_that_ends_after_the_one_around_it_is_a_trace_of_its_own(made: Made) -> None:
    exporter = InMemorySpanExporter()
    tracer = made(exporter=exporter)

    async def scenario() -> None:
        async def later() -> None:
            with tracer.span(SpanName.LOAD):
                await asyncio.sleep(0.01)

        with tracer.span(SpanName.FLUSH):
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        await task

    asyncio.run(scenario())
    tracer.stop()
    assert {span.name: span.parent for span in exporter.get_finished_spans()} == {
        "flush": None,
        "load partition": None,
    }


def test_a_failure_shows_its_class_and_not_what_it_says(made: Made) -> None:
    with Receiver() as receiver:
        tracer = made(receiver.url)
        with pytest.raises(ValueError, match="unit-7"), tracer.span(SpanName.BLOCK):
            raise ValueError("unit-7 is wrong")
        until(lambda: len(receiver.spans) == 1)
        (span,) = receiver.spans
        assert span.attributes == {"error.type": "ValueError"}
        assert span.status == 2
        assert b"unit-7" not in receiver.requests[0].SerializeToString()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_share_of_traces_is_kept_and_all_with_a_decision(
    made: Made, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draws = iter([0.1, 0.9, 0.3, 0.2999] if seed == 1 else [0.9, 0.9, 0.0, 0.9])
    monkeypatch.setattr(module.random, "random", lambda: next(draws))
    exporter = InMemorySpanExporter()
    tracer = made(exporter=exporter, traces_sample_ratio=0.3)
    for n in range(4):
        with tracer.span(SpanName.FLUSH, {"streamxp.partitions": n}), tracer.span(SpanName.SNAPSHOT):
            pass
    with tracer.span(SpanName.EVALUATE), tracer.spans(SpanName.SIGNAL, [{}]):
        pass
    with tracer.span(SpanName.LOAD):
        pass
    tracer.stop()
    spans = exporter.get_finished_spans()
    kept = [span.attributes["streamxp.partitions"] for span in spans if span.name == "flush"]
    assert kept == ([0, 3] if seed == 1 else [2])
    # A trace is kept whole or not at all.
    assert sum(span.name == "write snapshot" for span in spans) == len(kept)
    assert {"evaluate", "write signal", "load partition"} <= {span.name for span in spans}


def test_of_none_only_what_is_always_kept_remains(made: Made) -> None:
    exporter = InMemorySpanExporter()
    tracer = made(exporter=exporter, traces_sample_ratio=0.0)
    for name in (SpanName.BLOCK, SpanName.EVALUATE, SpanName.LOAD):
        with tracer.span(name):
            pass
    tracer.stop()
    assert [span.name for span in exporter.get_finished_spans()] == ["load partition"]


def test_a_collector_that_hangs_holds_nobody_up_and_what_has_no_room_is_counted(
    made: Made, counted: Counted
) -> None:
    exporter = Blocked()
    tracer = made(exporter=exporter)
    with tracer.span(SpanName.FLUSH):
        pass
    assert exporter.asked.wait(DEADLINE_S)
    for _ in range(QUEUED_SPANS + 100):
        with tracer.span(SpanName.FLUSH):
            pass
    # The thread that sends is still held: all of this went on without it.
    assert not exporter.given_up.is_set()
    assert counted.spans == {Delivery.DROPPED: 100}
    tracer.stop()
    assert exporter.given_up.is_set()
    until(lambda: counted.spans.total() == QUEUED_SPANS + 101)
    assert counted.spans[Delivery.DELIVERED] == 0
    with tracer.span(SpanName.FLUSH):
        pass
    assert counted.spans.total() == QUEUED_SPANS + 102


def test_a_trace_larger_than_the_queue_has_it_to_itself(made: Made, counted: Counted) -> None:
    exporter = InMemorySpanExporter()
    tracer = made(exporter=exporter)
    with tracer.span(SpanName.EVALUATE), tracer.spans(SpanName.SIGNAL, [{}] * (QUEUED_SPANS + 1)):
        pass
    tracer.stop()
    assert counted.spans == {Delivery.DELIVERED: QUEUED_SPANS + 2}


def test_no_collector_is_said_once_and_again_when_it_is_back(made: Made, counted: Counted) -> None:
    with capture_logs() as logs, Receiver(status=404) as receiver:
        tracer = made(receiver.url)

        def send() -> None:
            before = counted.spans.total()
            with tracer.span(SpanName.FLUSH):
                pass
            until(lambda: counted.spans.total() == before + 1)

        send()
        send()
        receiver.status = 200
        send()
        send()
    assert counted.spans == {Delivery.FAILED: 2, Delivery.DELIVERED: 2}
    told = [(one["log_level"], one["event"]) for one in logs]
    assert told == [
        ("info", "traces sent"),
        ("warning", "traces cannot be delivered; the worker goes on"),
        ("info", "traces are delivered again"),
    ]
    assert "404" in logs[1]["error"]
    assert logs[1]["endpoint"] == f"{receiver.url}/v1/traces"


def test_a_dead_port_costs_spans_and_the_exporter_does_not_log_each(
    made: Made, counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    with capture_logs() as logs, caplog.at_level(logging.DEBUG, logger="opentelemetry"):
        tracer = made(closed_port())
        for expected in (1, 2):
            with tracer.span(SpanName.FLUSH):
                pass
            until(lambda expected=expected: counted.spans[Delivery.FAILED] == expected)
    assert [one["event"] for one in logs] == ["traces sent", "traces cannot be delivered; the worker goes on"]
    assert "refused" in logs[1]["error"]
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []
    assert counted.spans == {Delivery.FAILED: 2}


def test_an_exporter_that_raises_does_not_end_the_thread(made: Made, counted: Counted) -> None:
    tracer = made(exporter=Broken())
    with capture_logs() as logs:
        for expected in (1, 2):
            with tracer.span(SpanName.FLUSH):
                pass
            until(lambda expected=expected: counted.spans.total() == expected)
    assert counted.spans == {Delivery.FAILED: 1, Delivery.DELIVERED: 1}
    assert logs[0]["error"] == "RuntimeError: out of order"


def test_what_is_queued_is_sent_on_stopping(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Receiver() as receiver:
        tracer = OtlpTracer(Settings(traces_endpoint=receiver.url), counted)
        with tracer.span(SpanName.FLUSH):
            pass
        tracer.stop()
        tracer.stop()
        until(lambda: counted.spans.total() == 1)
    gc.collect()


def test_of_the_environment_only_credentials_count(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": closed_port(),
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": closed_port(),
        "OTEL_EXPORTER_OTLP_TIMEOUT": "no number",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20geheim",
        "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER": "none_such",
        "OTEL_SERVICE_NAME": "another",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=another,team=a",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "0",
        "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with Receiver() as receiver:
        tracer = made(receiver.url)
        with tracer.span(SpanName.BLOCK, {"messaging.destination.name": "xp.exposures"}):
            pass
        until(lambda: len(receiver.spans) == 1)
        (span,) = receiver.spans
        assert span.attributes == {"messaging.destination.name": "xp.exposures"}
        assert span.resource["service.name"] == "stream-xp"
        assert "team" not in span.resource
        assert receiver.headers[0]["content-encoding"] == "gzip"
        assert receiver.headers[0]["authorization"] == "Bearer geheim"


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
        ("https://c/ingest", "https://c/ingest"),
    ],
)
def test_where_spans_are_sent(endpoint: str, url: str) -> None:
    assert url_of(endpoint) == url


def test_the_operations_page_says_the_bounds() -> None:
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    assert f"at most {module.QUEUED_SPANS:,}, and" in text
    assert f"up to {module.SENT_SPANS} at once every second" in text
    assert module.PAUSE_S == 1.0
    assert f"one request may take {module.TIMEOUT_S:g} s" in text
    assert module.STOP_S + module.GIVE_UP_S < 1.0


def test_opentelemetry_can_be_turned_off(
    made: Made, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    exporter = Broken()
    tracer = made(exporter=exporter)
    with tracer.span(SpanName.LOAD):
        pass
    tracer.stop()
    assert (exporter.calls, counted.spans.total()) == (0, 0)
