"""A worker on the embedded broker that sends its spans to a receiver on loopback, or to nobody."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

from embedded_world import apply, settings_with_topics, until
from otlp_receiver import Got, Receiver
from worker_process import now_ms

from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.tracing import SPANS
from stream_xp.services.evidence import read_signals
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

UNITS = 400
DESIGN = {
    "experiment": "checkout",
    "owner": "tests",
    "hypothesis": "the canary is as good",
    "unit": "request",
    "planned_sample": 4000,
    "arms": [{"key": "stable", "weight": 0.5, "control": True}, {"key": "canary", "weight": 0.5}],
    "metrics": [
        {
            "key": "errors",
            "kind": "conversion",
            "attribution_window": "100ms",
            "role": "primary",
            "direction": "decrease",
        },
    ],
}


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return settings_with_topics(embedded_broker, allowed_lateness_ms=10_000)


def decide_something(settings: Settings, worker: WorkerThread) -> None:
    """All units in one arm: a sample-ratio mismatch, which stops the experiment."""
    apply(settings, DESIGN)
    time.sleep(1.0)  # the spec must govern before its first exposure
    with TopicWriter(settings) as writer:
        for n in range(UNITS):
            event = {
                "id": f"secret-event-{n}",
                "time": now_ms(),
                "unit": f"secret-unit-{n}",
                "experiment": "checkout",
                "arm": "canary",
            }
            key, value = f"secret-unit-{n}".encode(), msgspec.json.encode(event)
            writer.send(settings.topic("exposures"), key=key, value=value)
    until(lambda: bool(list(read_signals(settings))), worker=worker)


def of(spans: list[Got], name: str) -> list[Got]:
    return [span for span in spans if span.name == name]


def test_what_a_worker_does_comes_as_spans_and_names_no_unit(settings: Settings) -> None:
    with Receiver() as receiver:
        traced = msgspec.structs.replace(settings, traces_endpoint=receiver.url)
        with WorkerThread(traced) as worker:
            decide_something(settings, worker)
            until(lambda: bool(of(receiver.spans, "write config")), worker=worker)
            blocks = worker.worker.ingest.records
        spans = receiver.spans
        requests = b"".join(request.SerializeToString() for request in receiver.requests)
    assert b"secret" not in requests
    assert {span.name for span in spans} == {name.value for name in SPANS}
    for span in spans:
        allowed = {str(key) for name, found in SPANS.items() if name == span.name for key in found.attributes}
        assert set(span.attributes) <= allowed
    # Every record is in one span, and there are spans of blocks, not of events.
    taken = of(spans, "ingest block")
    assert sum(span.attributes["messaging.batch.message_count"] for span in taken) == blocks == UNITS
    assert len(taken) < UNITS / 4
    assert {span.attributes["streamxp.partition"] for span in of(spans, "load partition")} == {0, 1}
    (signal,) = of(spans, "write signal")
    assert signal.attributes["streamxp.action"] == "stop"
    (evaluation,) = (span for span in spans if span.span_id == signal.parent_id)
    assert (evaluation.name, evaluation.trace_id) == ("evaluate", signal.trace_id)
    assert evaluation.attributes["streamxp.experiment.names"] == ["checkout"]
    followed = [*of(spans, "write weight epoch"), *of(spans, "write config")]
    named = {span.attributes.get("streamxp.signal.id") for span in followed}
    assert named == {signal.attributes["streamxp.signal.id"]}


def test_without_a_collector_a_worker_decides_all_the_same_and_ends_in_time(settings: Settings) -> None:
    with Receiver() as gone:
        nobody = gone.url
    with WorkerThread(msgspec.structs.replace(settings, traces_endpoint=nobody)) as worker:
        decide_something(settings, worker)
        until(lambda: _spans(worker, "failed") > 0, worker=worker)
        found = worker.worker
    assert found.written
    assert _spans(worker, "delivered") == 0


def _spans(worker: WorkerThread, delivery: str) -> float:
    (family,) = [one for one in worker.worker.metrics.collect() if one.name == "streamxp_trace_spans"]
    return next(one.value for one in family.samples if one.labels["delivery"] == delivery)
