"""The logs of a worker at their most talkative: they say where a record stands, and never whose it is."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from kafka import KafkaProducer
from worker_process import SPEC, WorkerProcess, now_ms, wait_for

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.services.evidence import read_standings
from stream_xp.services.publish import plan_application, publish
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

UNIT = "canary-unit-5b1c"
"""Begins every unit id, event id and source of the run; nothing else has it."""
STRAYED = ("experiments", "stats", "signals", "config", "results", "state")


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker, tmp_path: Path) -> Settings:
    found = Settings(
        bootstrap=embedded_broker.bootstrap,
        broker="embedded",
        prefix="logs.",
        allowed_lateness_ms=300,
        activation_delay_ms=500,
        idle_grace_ms=300,
        health_file=str(tmp_path / "health"),
    )
    for topic in declared_topics(found):
        embedded_broker.create_topic(topic.name, topic.partitions)
    publish(found, plan_application(found, SPEC, now_ms=now_ms()))
    time.sleep(1.0)  # the spec must govern before its first exposure
    return found


def events() -> list[tuple[str, str, Any]]:
    """Topic, key and value of what applications send, good and bad: each kind of it with units that tell."""
    sent: list[tuple[str, str, Any]] = []
    for number in range(200):
        unit = f"{UNIT}-{number}"
        who = {"id": f"{unit}-x", "unit": unit, "time": now_ms(), "source": UNIT}
        sent.append(("exposures", unit, {**who, "experiment": "checkout", "arm": "ab"[number % 2]}))
        if number % 3 == 0:
            sent.append(("rewards", unit, {**who, "id": f"{unit}-r", "metric": "click"}))
    unit, who = f"{UNIT}-bad", {"id": f"{UNIT}-bad", "unit": f"{UNIT}-bad", "time": now_ms()}
    saw = {**who, "experiment": "checkout", "arm": "a"}
    sent += [
        ("exposures", unit, {**saw, "arm": UNIT}),
        ("exposures", unit, {**saw, "experiment": UNIT}),
        ("exposures", unit, {**saw, "time": UNIT}),
        ("exposures", unit, {**saw, "weight_epoch": 77}),
        ("exposures", f"{UNIT}-another", saw),
        ("exposures", unit, {**saw, "arm": "a", "id": f"{UNIT}-first"}),
        ("exposures", unit, {**saw, "arm": "b", "id": f"{UNIT}-crossed"}),
        ("exposures", unit, {**saw, "time": now_ms() - 10_000_000, "id": f"{UNIT}-late"}),
        ("exposures", unit, f'{{"unit": "{unit}", "id":'),
        ("exposures", unit, {**saw, "segments": {UNIT: UNIT}, "padding": UNIT * 10_000}),
        ("rewards", unit, {**who, "metric": "spend", "value": UNIT}),
        ("rewards", unit, {**who, "metric": "spend", "value": 1e300}),
        ("rewards", unit, {**who, "metric": UNIT}),
    ]
    return sent


def stray() -> list[tuple[str, str, Any]]:
    """Events, and other things with units in them, on the service's own topics."""
    event = {"id": UNIT, "unit": UNIT, "time": now_ms(), "experiment": UNIT, "arm": UNIT, "metric": UNIT}
    return [
        (topic, UNIT, value)
        for topic in STRAYED
        for value in (
            event,
            f'"{UNIT}"',
            UNIT,
            {"experiment": "checkout", "status": UNIT, "action": UNIT, "type": UNIT, "schema": UNIT},
            {"spec": {"experiment": UNIT, "arms": UNIT}},
        )
    ]


def send(settings: Settings, records: list[tuple[str, str, Any]]) -> None:
    producer = KafkaProducer(**settings.kafka_python_options())
    try:
        for topic, key, value in records:
            raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            producer.send(settings.topic(topic), key=key.encode(), value=raw).get(timeout=30)
    finally:
        producer.close()


def looks(settings: Settings) -> int:
    found = {one.result.experiment: one.result.look for one in read_standings(settings, now_ms=now_ms())}
    return found.get("checkout", 0)


def test_no_unit_is_logged_at_any_level_whatever_comes(settings: Settings, tmp_path: Path) -> None:
    with WorkerProcess(settings, tmp_path, "--log-level", "DEBUG") as worker:
        worker.wait_started()
        send(settings, events())
        wait_for(lambda: looks(settings) > 0, "a first look")
        send(settings, stray())
        wait_for(lambda: len(worker.events("experiment record refused")) >= 3, "the strays are seen")
        wait_for(lambda: len(worker.events("statistics record refused")) >= 3, "the strays are seen")
        wait_for(lambda: len(worker.events("record refused")) >= 3, "the strays are seen")
        worker.terminate()
        # Whoever comes next reads the strays from the beginning.
        with WorkerProcess(settings, tmp_path, "--log-level", "DEBUG") as heir:
            heir.wait_started()
            wait_for(lambda: bool(heir.events("experiment record refused")), "the strays are seen")
            heir.terminate()
    for log in (worker.log, heir.log):
        assert UNIT not in log, [line for line in log.splitlines() if UNIT in line]
    refused = [
        line
        for event in ("experiment record refused", "statistics record refused", "record refused")
        for line in worker.events(event)
    ]
    for line in refused:
        assert line["topic"].removeprefix("logs.") in STRAYED
        assert {"partition", "offset"} <= line.keys()
    assert {line["topic"].removeprefix("logs.") for line in refused} >= {"experiments", "stats", "signals"}
    assert all(line["level"] and line["timestamp"] and line["logger"] for line in refused)
    loaded = worker.events("partition loaded")
    assert {line["partition"] for line in loaded} == set(range(4))


def test_a_refused_record_of_a_known_experiment_is_named(settings: Settings, tmp_path: Path) -> None:
    with WorkerProcess(settings, tmp_path) as worker:
        worker.wait_started()
        send(settings, [("experiments", "checkout", {"spec": msgspec.to_builtins(SPEC) | {"arms": []}})])
        wait_for(lambda: bool(worker.events("experiment record refused")), "the record is refused")
        worker.terminate()
    (line,) = worker.events("experiment record refused")
    assert (line["experiment"], line["topic"], line["partition"]) == ("checkout", "logs.experiments", 0)
    assert (tmp_path / "health").is_file()
