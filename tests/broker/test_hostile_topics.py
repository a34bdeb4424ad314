"""Bytes of somebody else on the service's own topics, while it works: said, passed over, and nothing ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from kafka import KafkaProducer
from worker_process import DEADLINE_S, SPEC, now_ms, prepare, quick, wait_for

from stream_xp.adapters.kafka_admin import declared_topics, topics_dir
from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.domain.dead_letter import DeadLetter
from stream_xp.errors import Reason
from stream_xp.services.evidence import read_standings
from stream_xp.services.oracle.service import examine
from stream_xp.services.worker import WorkerThread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.slow]

HOSTILE = [b"{", b"hello", b'{"schema": 2}', b'{"spec":"\xff"}', b'{"x":' * 5_000, b"[" * 5_000, b"\x00" * 99]
OWN = ("experiments", "stats", "results", "signals", "config")


class BadName(str):
    """A header name that goes out as bytes that are no UTF-8, which a broker takes."""

    __slots__ = ()

    def encode(self, *_: object, **__: object) -> bytes:
        return b"\xff\xfe"


@pytest.fixture
def settings(embedded_broker: Any, topic_prefix: str) -> Settings:
    settings = quick(embedded_broker.bootstrap, topic_prefix, broker="embedded")
    for topic in declared_topics(settings):
        embedded_broker.create_topic(topic.name, topic.partitions)
    return settings


@pytest.fixture
def producer(settings: Settings) -> Iterator[KafkaProducer]:
    producer = KafkaProducer(**settings.kafka_python_options())
    yield producer
    producer.close(timeout=5)


def disturb(settings: Settings, producer: KafkaProducer) -> None:
    """Hostile records on every topic of ours, under the experiment's key and under none."""
    for topic in OWN:
        for value in HOSTILE:
            for key in (SPEC.experiment.encode(), b"\xff", None):
                producer.send(settings.topic(topic), key=key, value=value)
        producer.send(settings.topic(topic), key=b"x", value=b"{", headers=[(BadName("ab"), b"1")])
    producer.flush(30)


def send_units(settings: Settings, producer: KafkaProducer, units: range) -> None:
    for n in units:
        event = {
            "id": str(n),
            "time": now_ms(),
            "unit": f"u{n}",
            "experiment": SPEC.experiment,
            "arm": "ab"[n % 2],
        }
        headers = [(BadName("ab"), b"1")] if n % 10 == 0 else []
        if n % 50 == 0:
            # Each U+FFFD counts as one character, for the worker and for the oracle.
            producer.send(
                settings.topic("rewards"), key=b"u", value=b"{}", headers=[(BadName("ab"), b"1" * 16_382)]
            )
            producer.send(
                settings.topic("rewards"), key=b"u", value=b"{}", headers=[(BadName("ab"), b"1" * 16_383)]
            )
        producer.send(
            settings.topic("exposures"),
            key=f"u{n}".encode(),
            value=json.dumps(event).encode(),
            headers=headers,
        )
    producer.flush(30)


def units_in_result(settings: Settings) -> int:
    standings = read_standings(settings, now_ms=now_ms())
    return max((sum(arm.units for arm in one.result.arms) for one in standings), default=0)


def test_the_worker_goes_on_among_hostile_records(settings: Settings, producer: KafkaProducer) -> None:
    prepare(settings)
    disturb(settings, producer)
    with WorkerThread(settings) as thread:
        send_units(settings, producer, range(100))
        wait_for(lambda: units_in_result(settings) == 100, "100 units are in a result")
        disturb(settings, producer)
        send_units(settings, producer, range(100, 200))
        wait_for(lambda: units_in_result(settings) == 200, "200 units are in a result")
        thread.check()
    report = examine(settings)
    assert report.equal
    said = "{} records of {} cannot be read and were passed over, as the worker does"
    for topic in ("experiments", "stats"):
        assert said.format(2 * (3 * len(HOSTILE) + 1), settings.topic(topic)) in report.notes
    with TopicReader(settings, settings.topic("deadletter")) as reader:
        letters = [msgspec.json.decode(record.value or b"", type=DeadLetter) for record in reader.backlog()]
    assert Counter(letter.reason for letter in letters) == {Reason.TOO_LARGE: 4, Reason.INVALID_FIELD: 4}


def test_the_commands_pass_over_what_is_no_record_and_say_so(
    settings: Settings, producer: KafkaProducer
) -> None:
    signal, result = (golden(name) for name in ("signal", "result"))
    for value in (b"{", b"[", signal):
        producer.send(settings.topic("signals"), key=b"checkout-canary", value=value)
    for key, value in ((b"checkout-canary", result), (None, result), (b"\x1b[2J", b"{")):
        producer.send(settings.topic("results"), key=key, value=value, partition=0)
    producer.flush(30)
    done = command(settings, "signals", "--json")
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["specversion"] == "1.0"
    signals = settings.topic("signals")
    first, number = done.stderr.splitlines()
    assert first.startswith(f"passed over: {signals} partition ")
    assert "offset 0 is no Signal" in first
    assert number == f"passed over: 2 records of {signals} in all"
    done = command(settings, "status", "--json")
    assert [one["result"]["experiment"] for one in json.loads(done.stdout)] == ["checkout-canary"]
    results = settings.topic("results")
    lines = done.stderr.splitlines()
    assert lines[:2] == [
        f"passed over: {results} partition 0 offset 1 is without a key",
        f"passed over: 2 records of {results} in all",
    ]
    # What the effect of a stop is worth is told from all past ones, which stand on both topics.
    assert lines[2].startswith(f"passed over: {signals} partition ")
    assert lines[-1] == number
    assert all(line.startswith("passed over: ") and (signals in line or results in line) for line in lines)


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {
        "STREAM_XP_BOOTSTRAP": settings.bootstrap,
        "STREAM_XP_BROKER": "embedded",
        "STREAM_XP_PREFIX": settings.prefix,
    }
    done = subprocess.run(
        [sys.executable, "-m", "stream_xp", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def golden(name: str) -> bytes:
    return (topics_dir() / "golden" / f"{name}.v1.json").read_bytes()
