"""Spans by OTLP/HTTP to a collector; needs the extra `otel`.

What a worker does only appends to a queue with a bound. A thread of its own makes OpenTelemetry's spans of what is in
it and sends them, so a collector that is slow or away costs spans, which are counted, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import requests
import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace as otel_trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from stream_xp import __version__
from stream_xp.domain.telemetry import Telemetry
from stream_xp.domain.tracing import NO_ATTRIBUTES, SPANS, Attributes, Delivery, Span, SpanName, Tracer
from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

QUEUED_SPANS: Final = 2_048
"""Spans that wait to be sent; a trace that does not fit in is dropped."""
SENT_SPANS: Final = 512
"""Spans of one request, at most; but a trace is never parted."""
PAUSE_S: Final = 1.0
"""How long spans are gathered before they are sent."""
TIMEOUT_S: Final = 3.0
"""For one request, repeats included."""
STOP_S: Final = 0.6
GIVE_UP_S: Final = 0.2
_LIMIT: Final = 128
_EXPORTER_LOGGER: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"

_CURRENT: ContextVar[_Recorded | None] = ContextVar("stream_xp_span", default=None)
_words = threading.local()


def _hear(record: logging.LogRecord) -> bool:
    """Keep what the exporter says to the thread that asked it: that is said once, not every second."""
    heard: list[str] | None = getattr(_words, "heard", None)
    if heard is None:
        return True
    heard.append(record.getMessage())
    return False


class _Recorded:
    """A span as the worker leaves it behind: plain values, from which the sending thread makes the real one."""

    __slots__ = ("attributes", "began_ns", "children", "ended_ns", "error", "name")

    def __init__(self, name: SpanName, attributes: Attributes) -> None:
        self.name = name
        self.attributes = dict(attributes)
        self.began_ns = 0
        self.ended_ns = 0
        self.error: str | None = None
        self.children: list[_Recorded] = []

    def walk(self) -> Iterator[_Recorded]:
        """This span and all inside it."""
        yield self
        for child in self.children:
            yield from child.walk()


class _Recording(Span):
    """One piece of work, and the spans that tell of it."""

    __slots__ = ("_began_s", "_inside", "_spans", "_token", "_tracer")

    def __init__(self, tracer: OtlpTracer, spans: Sequence[_Recorded]) -> None:
        self._tracer = tracer
        self._spans = spans
        self._inside: _Recorded | None = None
        self._token: Token[_Recorded | None] | None = None
        self._began_s = 0.0

    def note(self, attributes: Attributes) -> None:
        for span in self._spans:
            span.attributes.update(attributes)

    def __enter__(self) -> Self:
        self._inside = _CURRENT.get()
        if self._spans:
            # Of several beside each other the last one stands for all of them.
            self._token = _CURRENT.set(self._spans[-1])
        began_ns, self._began_s = time.time_ns(), time.perf_counter()
        for span in self._spans:
            span.began_ns = began_ns
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            # A task that is thrown away ends in the context of whoever throws it away.
            with contextlib.suppress(ValueError):
                _CURRENT.reset(self._token)
        # By the clock that never goes back, so that no span ends before it began.
        took_ns = round((time.perf_counter() - self._began_s) * 1e9)
        inside = self._inside
        for span in self._spans:
            span.ended_ns = span.began_ns + took_ns
            # The text of an error may hold what a producer sent; its class does not.
            span.error = None if kind is None else kind.__name__
            if inside is None or inside.ended_ns:
                self._tracer.take(span)
            else:
                inside.children.append(span)


class _Gathered(SpanProcessor):
    """The spans that the provider has ended since they were last taken."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self._spans.append(span)

    def taken(self) -> list[ReadableSpan]:
        """Give them away."""
        spans, self._spans = self._spans, []
        return spans


class OtlpTracer(Tracer):
    """Sends spans to `settings.traces_endpoint`, which must be set.

    Of traces `traces_sample_ratio` is kept, and each that holds a span which is always kept. That is known when a
    trace ends, so none is in parts.

    Args:
        telemetry: who is told what became of spans.
        exporter: what sends them; by default OTLP/HTTP.
    """

    __slots__ = (
        "_closing",
        "_delivered",
        "_exporter",
        "_gathered",
        "_otel",
        "_queue",
        "_queued",
        "_ratio",
        "_telemetry",
        "_thread",
        "_url",
        "_wake",
    )

    def __init__(
        self, settings: Settings, telemetry: Telemetry, *, exporter: SpanExporter | None = None
    ) -> None:
        self._url = url_of(settings.traces_endpoint or "")
        self._ratio = settings.traces_sample_ratio
        self._telemetry = telemetry
        self._gathered = _Gathered()
        self._otel = _provider(settings, self._gathered).get_tracer("stream_xp", __version__)
        self._exporter = exporter or _exporter(self._url)
        self._queue: deque[_Recorded] = deque()
        self._queued = 0
        self._delivered: bool | None = None
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._send_on, name="stream-xp-traces", daemon=True)
        self._thread.start()
        log.info("traces sent", endpoint=self._url, ratio=self._ratio)

    def span(self, name: SpanName, attributes: Attributes = NO_ATTRIBUTES) -> Span:
        """Return a span inside the one around it in this task."""
        return _Recording(self, [_Recorded(name, attributes)])

    def spans(self, name: SpanName, each: Sequence[Attributes]) -> Span:
        """Return spans beside each other, inside the one around them in this task."""
        return _Recording(self, [_Recorded(name, attributes) for attributes in each])

    def take(self, root: _Recorded) -> None:
        """Queue a trace that has ended, if it is to be kept and there is room."""
        spans = list(root.walk())
        kept = any(SPANS[span.name].always for span in spans)
        if not kept and random.random() >= self._ratio:  # noqa: S311 (a sample, not a secret)
            return
        with self._wake:
            # A trace that would never fit, of very many decisions at once, has the queue to itself.
            fits = not self._closing and (not self._queue or self._queued + len(spans) <= QUEUED_SPANS)
            if fits:
                self._queue.append(root)
                self._queued += len(spans)
                if self._queued >= SENT_SPANS:
                    self._wake.notify()
        if not fits:
            self._telemetry.spans_ended(Delivery.DROPPED, len(spans))

    def stop(self) -> None:
        """Send what is queued within `STOP_S`, then give up the request under way; the rest is dropped."""
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify()
        self._thread.join(STOP_S)
        # Whatever it still waits for ends now.
        self._exporter.shutdown()
        self._thread.join(GIVE_UP_S)
        with self._wake:
            left, self._queued = self._queued, 0
            self._queue.clear()
        if left:
            self._telemetry.spans_ended(Delivery.DROPPED, left)

    # --- in the thread that sends -----------------------------------------------------------------------------

    def _send_on(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._queued >= SENT_SPANS, PAUSE_S)
                closing, traces = self._closing, self._next_traces()
            if traces:
                self._send(traces)
            elif closing:
                return

    def _next_traces(self) -> list[_Recorded]:
        traces, count = [], 0
        while self._queue and count < SENT_SPANS:
            traces.append(self._queue.popleft())
            count += sum(1 for _ in traces[-1].walk())
        self._queued -= count
        return traces

    def _send(self, traces: Sequence[_Recorded]) -> None:
        for root in traces:
            self._make(root, None)
        spans = self._gathered.taken()
        if not spans:  # OpenTelemetry is turned off.
            return
        _words.heard = []
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 (no exporter may end the thread, and so all traces)
            result = SpanExportResult.FAILURE
            _words.heard.append(f"{type(error).__name__}: {error}")
        delivered = result is SpanExportResult.SUCCESS
        self._telemetry.spans_ended(Delivery.DELIVERED if delivered else Delivery.FAILED, len(spans))
        self._tell(delivered=delivered, words=_words.heard)

    def _make(self, recorded: _Recorded, parent: otel_trace.Span | None) -> None:
        """Have OpenTelemetry make a span, and those inside it."""
        around = otel_context.Context()
        if parent is not None:
            around = otel_trace.set_span_in_context(parent, around)
        span = self._otel.start_span(
            recorded.name, context=around, attributes=recorded.attributes, start_time=recorded.began_ns
        )
        if recorded.error is not None:
            span.set_attribute("error.type", recorded.error)
            span.set_status(otel_trace.StatusCode.ERROR)
        for child in recorded.children:
            self._make(child, span)
        span.end(recorded.ended_ns)

    def _tell(self, *, delivered: bool, words: Sequence[str]) -> None:
        """Log when delivery fails, and when it goes on: not every batch."""
        if delivered == self._delivered or self._closing:
            return
        if not delivered:
            why = words[0] if words else "refused"
            log.warning("traces cannot be delivered; the worker goes on", endpoint=self._url, error=why)
        elif self._delivered is False:
            log.info("traces are delivered again", endpoint=self._url)
        self._delivered = delivered


def url_of(endpoint: str) -> str:
    """The URL that spans are sent to: that of the signal where only a host is named."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def _provider(settings: Settings, gathered: SpanProcessor) -> TracerProvider:
    """A provider that takes nothing from the environment but whether OpenTelemetry is off altogether."""
    about: dict[str, Any] = {
        "service.name": settings.traces_service_name,
        "service.version": __version__,
        "service.instance.id": f"{socket.gethostname()}-{threading.get_native_id()}",
        "messaging.consumer.group.name": settings.group_id,
        "streamxp.prefix": settings.prefix,
        "streamxp.roles": settings.roles,
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "opentelemetry",
    }
    limits = SpanLimits(
        max_attributes=_LIMIT,
        max_events=_LIMIT,
        max_links=_LIMIT,
        max_event_attributes=_LIMIT,
        max_link_attributes=_LIMIT,
        max_attribute_length=1_024,
        max_span_attributes=_LIMIT,
        max_span_attribute_length=1_024,
    )
    provider = TracerProvider(
        sampler=ALWAYS_ON, resource=Resource(about), span_limits=limits, shutdown_on_exit=False
    )
    provider.add_span_processor(gathered)
    return provider


def _exporter(url: str) -> SpanExporter:
    logger = logging.getLogger(_EXPORTER_LOGGER)
    if _hear not in logger.filters:
        logger.addFilter(_hear)
    return OTLPSpanExporter(
        endpoint=url, timeout=TIMEOUT_S, compression=Compression.Gzip, session=requests.Session()
    )
