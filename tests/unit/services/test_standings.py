"""What `status` adds to a result: shrunk segments, and what the effects of a concluded experiment are worth."""

from __future__ import annotations

from typing import Any, Self

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.adapters.topic_reader import TopicRecord
from stream_xp.cli import main
from stream_xp.domain.decision import (
    Action,
    AgeChange,
    AgeResult,
    Evidence,
    Method,
    MetricResult,
    MetricState,
    Result,
    SegmentResult,
)
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.services import evidence
from stream_xp.services.evidence import read_standings
from stream_xp.services.memo import topics as memo_topics
from stream_xp.services.memo.record import PriorSource
from stream_xp.settings import Settings

RECORD = msgspec.json.decode((topics_dir() / "golden/experiment.v1.json").read_bytes(), type=ExperimentRecord)
RESULT = msgspec.json.decode((topics_dir() / "golden/result.v1.json").read_bytes(), type=Result)
METRIC = next(one for one in RECORD.spec.metrics if one.averaged)
ARM = RECORD.spec.treatments[0].key


def effect(estimate: float) -> MetricResult:
    interval = Evidence(estimate, estimate - 0.02, estimate + 0.02, 4.0, 0.02, 3.0)
    return MetricResult(
        METRIC.key,
        METRIC.role,
        ARM,
        MetricState.BETTER,
        Method.EXACT_THEN_ASYMPTOTIC,
        5000,
        5000,
        control_mean=0.1,
        arm_mean=0.1 + estimate,
        effect=interval,
    )


def result(name: str, estimate: float, action: Action) -> Result:
    shown = Evidence(0.3, None, None, 0.0, 1.0, 3.0)
    segments = tuple(
        SegmentResult(
            metric=METRIC.key,
            arm=ARM,
            segment=f"os={value}",
            control_units=9,
            arm_units=9,
            effect=msgspec.structs.replace(shown, estimate=mean),
            standard_error=0.1,
        )
        for value, mean in (("ios", 0.3), ("other", 0.1))
    )
    aged = AgeResult(
        metric=METRIC.key,
        arm=ARM,
        control_units=9,
        arm_units=9,
        per_ms=86_400_000,
        buckets=(),
        early=shown,
        late=msgspec.structs.replace(shown, estimate=0.1),
        change=msgspec.structs.replace(shown, log_e=7.0),
        kind=AgeChange.NOVELTY,
    )
    decision = msgspec.structs.replace(RESULT.decision, action=action)
    return msgspec.structs.replace(
        RESULT,
        experiment=name,
        version=RECORD.spec.version,
        metrics=(effect(estimate),),
        segments=segments,
        ages=(aged,),
        decision=decision,
    )


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[bytes, Any]]]:
    """Topics by name; what they hold is read by `status` and, of the past, by the memo's reader."""
    held: dict[str, list[tuple[bytes, Any]]] = {"xp.experiments": [], "xp.signals": [], "xp.results": []}

    class Reader:
        def __init__(self, settings: Settings, topic: str) -> None:
            self.records = [
                TopicRecord(topic, 0, at, 0, key, msgspec.json.encode(value), ())
                for at, (key, value) in enumerate(held[topic])
            ]

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def backlog(self) -> list[TopicRecord]:
            return self.records

        def newest_by_key(self, **_: Any) -> dict[bytes, TopicRecord]:
            return {one.key or b"": one for one in self.records}

    monkeypatch.setattr(evidence, "TopicReader", Reader)
    monkeypatch.setattr(memo_topics, "TopicReader", Reader)
    return held


def add(logs: dict[str, list[tuple[bytes, Any]]], name: str, estimate: float, action: Action) -> None:
    spec = msgspec.structs.replace(RECORD.spec, experiment=name)
    record = msgspec.structs.replace(RECORD, spec=spec, design_hash=spec.design_hash())
    logs["xp.experiments"].append((name.encode(), record))
    logs["xp.results"].append((name.encode(), result(name, estimate, action)))


def test_what_is_over_has_a_worth_learned_from_the_others(logs: dict[str, list[tuple[bytes, Any]]]) -> None:
    add(logs, "won", 0.05, Action.SHIP)
    (young,) = read_standings(Settings(), now_ms=RESULT.evaluated_ms)
    assert young.worth[0].shrunk.prior is PriorSource.DEFAULT
    for at in range(12):
        add(logs, f"past-{at:02}", 0.004 * (-1) ** at, Action.HOLD)
    found = {one.result.experiment: one for one in read_standings(Settings(), now_ms=RESULT.evaluated_ms)}
    worth = found["won"].worth[0]
    assert (worth.raw, worth.shrunk.prior, worth.shrunk.experiments) == (0.05, PriorSource.LEARNED, 12)
    assert worth.shrunk.effect is not None
    assert 0 < worth.shrunk.effect < (young.worth[0].shrunk.effect or 0.0) < 0.05
    assert found["past-00"].worth == ()
    again = read_standings(Settings(), now_ms=RESULT.evaluated_ms)
    assert again == tuple(found.values())


def test_an_experiment_whose_record_is_gone_has_no_worth(logs: dict[str, list[tuple[bytes, Any]]]) -> None:
    add(logs, "won", 0.05, Action.STOP)
    logs["xp.experiments"].clear()
    (found,) = read_standings(Settings(), now_ms=RESULT.evaluated_ms)
    assert found.worth == ()


def test_status_shows_worth_segments_and_ages(logs: dict[str, list[tuple[bytes, Any]]]) -> None:
    add(logs, "won", 0.05, Action.SHIP)
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.replace("│", " ").split())
    assert f"worth of {METRIC.key} in {ARM}: raw 0.05, shrunk 0.04" in text
    assert "(default prior, 0 past effects)" in text
    assert f"segment os=ios, {METRIC.key} in {ARM}: raw 0.3, shrunk 0.2" in text
    assert "(registered, no test)" in text
    assert f"by age, {METRIC.key} in {ARM}: NOVELTY, early 0.3, late 0.1, log_e 7.00 of 3.00" in text
    as_json = msgspec.json.decode(CliRunner().invoke(main, ["status", "--json"]).stdout)
    assert as_json[0]["worth"][0]["shrunk"]["prior"] == "default"
    assert [one["segment"] for one in as_json[0]["shrunk_segments"]] == ["os=ios", "os=other"]
