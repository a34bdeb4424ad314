"""Which spans the stages tell of: one for a piece of work, with what its definition names, and never a unit."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from stream_xp.domain.telemetry import Telemetry
from stream_xp.domain.tracing import NO_SPAN, SPANS, Attributes, Span, SpanName, Tracer
from stream_xp.errors import ConfigError
from stream_xp.services.decide.look import Watched
from stream_xp.services.decide.spans import about_evaluation
from stream_xp.services.tracing import tracer_of
from stream_xp.services.worker import Worker
from stream_xp.settings import Settings
from tests.unit.services.decide_world import EVEN, MISMATCH, Specs, look, stage, statistics
from tests.unit.services.decide_world import Log as DecideLog
from tests.unit.services.ingest_world import Log, Parts, exposures


class Noted(Span):
    def __init__(self, told: Told, name: SpanName, each: Sequence[Attributes]) -> None:
        self.told, self.name, self.each = told, name, [dict(one) for one in each]

    def note(self, attributes: Attributes) -> None:
        for one in self.each:
            one.update(attributes)

    def __enter__(self) -> Self:
        self.told.open.append(self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.told.open.pop()
        around = self.told.open[-1] if self.told.open else None
        self.told.ended += [(self.name, around, one) for one in self.each]


class Told(Tracer):
    """Keeps each span with the name of the one around it."""

    def __init__(self) -> None:
        self.open: list[SpanName] = []
        self.ended: list[tuple[SpanName, SpanName | None, dict[str, Any]]] = []

    def span(self, name: SpanName, attributes: Attributes = {}) -> Span:  # noqa: B006 (not changed)
        return Noted(self, name, [attributes])

    def spans(self, name: SpanName, each: Sequence[Attributes]) -> Span:
        return Noted(self, name, each)

    def of(self, name: SpanName) -> list[dict[str, Any]]:
        return [about for found, _, about in self.ended if found == name]

    def order(self) -> list[tuple[SpanName, SpanName | None]]:
        return [(name, around) for name, around, _ in self.ended]

    def check(self) -> None:
        """Every attribute is one that its span may have, and none names a unit (`u` and a number here)."""
        for name, _, about in self.ended:
            assert set(about) <= set(SPANS[name].attributes), name
            for value in about.values():
                texts = value if isinstance(value, tuple) else (value,)
                assert not any(str(text).startswith("u") and str(text)[1:].isdigit() for text in texts)


def told(parts: Parts) -> Told:
    tracer = Told()
    parts.ingest._tracer = tracer
    return tracer


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


@pytest.fixture
def decide_log(monkeypatch: pytest.MonkeyPatch) -> DecideLog:
    log = DecideLog()
    log.serve(monkeypatch)
    return log


def test_a_block_has_one_span_that_says_what_is_new_in_it(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        tracer = told(parts)
        await parts.ingest.on_block(exposures(0, 5, bad=frozenset({4})))
        await parts.ingest.on_block(exposures(0, 5))
        await parts.ingest.on_block(exposures(3, 4))
        first, second = tracer.of(SpanName.BLOCK)
        where = {"messaging.destination.name": "xp.exposures", "messaging.destination.partition.id": "0"}
        assert first == {
            **where,
            "messaging.batch.message_count": 5,
            "streamxp.offset.first": 0,
            "streamxp.offset.last": 4,
            "streamxp.dead_letters": 1,
        }
        assert second == {
            **where,
            "messaging.batch.message_count": 2,
            "streamxp.offset.first": 5,
            "streamxp.offset.last": 6,
            "streamxp.dead_letters": 0,
        }
        tracer.check()

    asyncio.run(scenario())


def test_a_block_of_markers_alone_has_no_offsets(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        tracer = told(parts)
        await parts.ingest.on_block(exposures(0, 0)._replace(next_offset=3))
        (about,) = tracer.of(SpanName.BLOCK)
        assert about["messaging.batch.message_count"] == 0
        assert not {"streamxp.offset.first", "streamxp.offset.last"} & set(about)

    asyncio.run(scenario())


def test_a_flush_has_its_snapshots_inside_and_nothing_without_a_partition(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        tracer = told(parts)
        await parts.ingest.flush()
        assert tracer.ended == []
        await parts.ingest.on_block(exposures(0, 5))
        await parts.ingest.flush()
        assert tracer.order() == [
            (SpanName.LOAD, None),
            (SpanName.BLOCK, None),
            (SpanName.SNAPSHOT, SpanName.FLUSH),
            (SpanName.FLUSH, None),
        ]
        assert tracer.of(SpanName.FLUSH) == [{"streamxp.partitions": 1, "streamxp.statistics": 1}]
        (snapshot,) = tracer.of(SpanName.SNAPSHOT)
        pages = log.topics["xp.state"][:-1]
        assert snapshot["streamxp.pages"] == len(pages) > 0
        assert snapshot["streamxp.bytes"] == sum(len(page.value or b"") for page in pages)
        assert (snapshot["streamxp.partition"], snapshot["streamxp.units"]) == (0, 5)
        tracer.check()

    asyncio.run(scenario())


def test_a_load_says_whether_there_was_a_snapshot(log: Log) -> None:
    async def scenario() -> None:
        for expected in (
            {"streamxp.partition": 0, "streamxp.snapshot": False, "streamxp.units": 0},
            {"streamxp.partition": 0, "streamxp.snapshot": True, "streamxp.units": 5},
        ):
            parts = Parts(log)
            tracer = told(parts)
            await parts.ingest.load([0])
            assert tracer.of(SpanName.LOAD) == [expected]
            await parts.ingest.on_block(exposures(0, 5))
            await parts.ingest.close()

    asyncio.run(scenario())


def test_a_decision_and_what_follows_have_spans_that_name_the_signal(decide_log: DecideLog) -> None:
    async def scenario() -> None:
        tracer = Told()
        decide = stage(decide_log, Specs(1), tracer=tracer)
        await look(decide, statistics(400, **EVEN))
        assert tracer.of(SpanName.SIGNAL) == []
        await look(decide, statistics(800, **MISMATCH))
        (signal,) = decide_log.signals()
        version = {"streamxp.experiment": "exp", "streamxp.version": 1, "streamxp.signal.id": signal.id}
        assert tracer.of(SpanName.SIGNAL) == [
            {**version, "streamxp.action": "stop", "streamxp.proposed": False}
        ]
        assert tracer.of(SpanName.WEIGHT_EPOCH) == [{**version, "streamxp.weight_epoch": 1}]
        (config,) = (about for about in tracer.of(SpanName.CONFIG) if "streamxp.signal.id" in about)
        assert config == {
            **version,
            "streamxp.config_version": decide_log.configs()[-1].config_version,
            "streamxp.status": "stopped",
        }
        assert {around for name, around in tracer.order() if name != SpanName.EVALUATE} == {SpanName.EVALUATE}
        assert tracer.of(SpanName.EVALUATE)[0] == {
            "streamxp.experiments": 1,
            "streamxp.experiment.names": ("exp",),
        }
        tracer.check()

    asyncio.run(scenario())


def test_an_evaluation_of_nothing_has_no_span(decide_log: DecideLog) -> None:
    async def scenario() -> None:
        tracer = Told()
        decide = stage(decide_log, Specs(1), tracer=tracer)
        await decide.evaluate()
        assert tracer.ended == []

    asyncio.run(scenario())


def test_an_evaluation_names_no_more_experiments_than_it_may() -> None:
    many = [Watched(f"exp-{n}") for n in range(50)]
    about = about_evaluation(many)
    assert about["streamxp.experiments"] == 50
    assert about["streamxp.experiment.names"] == tuple(f"exp-{n}" for n in range(20))


def test_without_an_endpoint_nothing_is_recorded_and_the_package_is_not_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_the_extra(monkeypatch)
    tracer = tracer_of(Settings(), Telemetry())
    assert type(tracer) is Tracer
    assert tracer.span(SpanName.BLOCK) is tracer.spans(SpanName.SIGNAL, [{}]) is NO_SPAN


def test_an_endpoint_without_the_extra_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_the_extra(monkeypatch)

    async def scenario() -> None:
        with pytest.raises(ConfigError, match=r"STREAM_XP_TRACES_ENDPOINT .*pip install 'stream-xp\[otel\]'"):
            Worker(Settings(traces_endpoint="http://127.0.0.1:4318"))

    asyncio.run(scenario())


def without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "stream_xp.adapters.otlp_traces", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)


@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        ("TRACES_ENDPOINT", "collector:4318", "STREAM_XP_TRACES_ENDPOINT: .*regex"),
        ("TRACES_ENDPOINT", "ftp://collector", "STREAM_XP_TRACES_ENDPOINT: .*regex"),
        ("TRACES_ENDPOINT", "http://collector/v1/traces?key=1", "STREAM_XP_TRACES_ENDPOINT: .*regex"),
        ("TRACES_SAMPLE_RATIO", "1.1", "STREAM_XP_TRACES_SAMPLE_RATIO: .*<= 1"),
        ("TRACES_SAMPLE_RATIO", "-0.1", "STREAM_XP_TRACES_SAMPLE_RATIO: .*>= 0"),
        ("TRACES_SERVICE_NAME", "a b", "STREAM_XP_TRACES_SERVICE_NAME: .*regex"),
    ],
)
def test_settings_that_are_refused(variable: str, value: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Settings.load({f"STREAM_XP_{variable}": value})


def test_a_password_in_the_endpoint_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="must hold no user name or password") as refused:
        Settings.load({"STREAM_XP_TRACES_ENDPOINT": "https://kim:geheim@collector:4318"})
    assert "geheim" not in str(refused.value)


def test_endpoints_that_are_taken() -> None:
    for endpoint in ("http://collector:4318", "https://otel.example.com/v1/traces", "http://[::1]:4318/"):
        assert Settings.load({"STREAM_XP_TRACES_ENDPOINT": endpoint}).traces_endpoint == endpoint


def test_the_operations_page_names_every_span_and_attribute_and_the_defaults() -> None:
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text().split("## Traces", 1)[1]
    rows = {}
    for line in text.split("\n## ", 1)[0].splitlines():
        if line.startswith("| `"):
            name, _, attributes = (cell.strip() for cell in line.split("|")[1:-1])
            rows[name.strip("`")] = tuple(re.findall(r"`([^`]+)`", attributes))
    assert rows == {name.value: found.attributes for name, found in SPANS.items()}
    always = {name.value for name, found in SPANS.items() if found.always}
    kept = text.split("Those with a ", 1)[1].split(" are always kept", 1)[0]
    assert set(re.findall(r"`([^`]+)`", kept)) == always
    settings = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text()
    assert f"| `STREAM_XP_TRACES_SAMPLE_RATIO` | `{Settings().traces_sample_ratio}` |" in settings
    assert f"| `STREAM_XP_TRACES_SERVICE_NAME` | `{Settings().traces_service_name}` |" in settings
