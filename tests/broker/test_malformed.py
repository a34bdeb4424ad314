"""Malformed records through the whole worker: each is accounted for, and the good ones around it are counted."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from worker_process import applied, ends, now_ms, outcomes, prepare, quick, records, statistics, wait_for

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.domain.dead_letter import RAW_LIMIT_BYTES
from stream_xp.errors import Reason
from stream_xp.services.oracle.service import check
from stream_xp.services.worker import WorkerThread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.slow]

ANY = {"id": "%", "time": "%", "unit": "bad"}
EXPOSURE = {**ANY, "experiment": "checkout", "arm": "a"}
REWARD = {**ANY, "metric": "click"}
WHOLE = b'{"id":"1","time":1,"unit":"bad","metric":"click"}'
BINARY = [("ce_specversion", b"1.0"), ("ce_id", b"1"), ("ce_source", b"app"), ("ce_type", b"exposure")]
STRUCTURED = [("content-type", b"application/cloudevents+json")]
YEAR_3000_MS = 32_503_680_000_000
LARGEST_BYTES = 4 * 1024 * 1024


class Bad(NamedTuple):
    """A record, and what must become of it: a reason, or the name of a counter."""

    name: str
    becomes: Reason | str
    topic: str = "exposures"
    value: bytes | dict[str, Any] | None = b""
    key: bytes | None = b"bad"
    headers: list[tuple[str, bytes]] = []  # noqa: RUF012 (never changed)


def without(event: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != field}


BAD = [
    Bad("broken JSON", Reason.INVALID_JSON, value=b'{"id": "1", "time"'),
    Bad("two values", Reason.INVALID_JSON, "rewards", b"\n".join([WHOLE, WHOLE])),
    Bad("not UTF-8", Reason.INVALID_JSON, value=b'{"id":"\xff\xfe"}'),
    Bad("a list", Reason.INVALID_FIELD, value=b"[1, 2]"),
    Bad("wrong type of arm", Reason.INVALID_FIELD, value={**EXPOSURE, "arm": 7}),
    Bad("wrong type of value", Reason.INVALID_FIELD, "rewards", {**REWARD, "value": "1"}),
    Bad("true for a number", Reason.INVALID_FIELD, "rewards", {**REWARD, "value": True}),
    Bad(
        "NaN",
        Reason.INVALID_JSON,
        "rewards",
        b'{"id":"1","time":1,"unit":"bad","metric":"click","value":NaN}',
    ),
    Bad(
        "1e999",
        Reason.INVALID_FIELD,
        "rewards",
        b'{"id":"1","time":1,"unit":"bad","metric":"click","value":1e999}',
    ),
    Bad("missing unit", Reason.INVALID_FIELD, value=without(EXPOSURE, "unit")),
    Bad("missing unit of a reward", Reason.INVALID_FIELD, "rewards", without(REWARD, "unit")),
    Bad("unknown arm", Reason.UNKNOWN_ARM, value={**EXPOSURE, "arm": "nobody"}),
    Bad("unknown weight epoch", Reason.UNKNOWN_WEIGHT_EPOCH, value={**EXPOSURE, "weight_epoch": 9}),
    Bad("2 MB", Reason.TOO_LARGE, value=b'{"id":"' + b"x" * 2_000_000 + b'"}'),
    Bad("nested 10,000 deep", Reason.INVALID_JSON, value=b'{"deep":' + b"[" * 10_000),
    Bad(
        "nested in a field",
        Reason.INVALID_JSON,
        "rewards",
        b'{"deep":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    ),
    Bad("year 3000", Reason.TIME_OUT_OF_RANGE, value={**EXPOSURE, "time": YEAR_3000_MS}),
    Bad("year 3000 as text", Reason.TIME_OUT_OF_RANGE, "rewards", {**REWARD, "time": "3000-01-01T00:00:00Z"}),
    Bad("a negative time", Reason.INVALID_FIELD, value={**EXPOSURE, "time": -1}),
    Bad("before 1970", Reason.TIME_OUT_OF_RANGE, value={**EXPOSURE, "time": "1969-12-31T00:00:00Z"}),
    Bad("empty key", Reason.MISSING_KEY, value=EXPOSURE, key=b""),
    Bad("null key", Reason.MISSING_KEY, "rewards", REWARD, key=None),
    Bad("key of another unit", Reason.KEY_MISMATCH, value=EXPOSURE, key=b"another"),
    Bad("empty value", Reason.EMPTY_VALUE, value=b""),
    Bad("null value", Reason.EMPTY_VALUE, "rewards", None),
    Bad("envelope without type", Reason.INVALID_ENVELOPE, value=EXPOSURE, headers=BINARY[:3]),
    Bad(
        "envelope 2.0",
        Reason.INVALID_ENVELOPE,
        value=EXPOSURE,
        headers=[("ce_specversion", b"2.0"), *BINARY[1:]],
    ),
    Bad("envelope without data", Reason.INVALID_ENVELOPE, value={"specversion": "1.0"}, headers=STRUCTURED),
    Bad(
        "value out of range",
        Reason.VALUE_OUT_OF_RANGE,
        "rewards",
        {**REWARD, "metric": "spend", "value": 1e5},
    ),
    Bad("unknown experiment", "unknown_experiment", value={**EXPOSURE, "experiment": "nobody"}),
    Bad("reward of one", "unknown_experiment", "rewards", {**REWARD, "experiment": "nobody"}),
    Bad("unknown metric", "unattributed", "rewards", {**REWARD, "metric": "nobody"}),
    Bad("never exposed", "unattributed", "rewards", REWARD),
    Bad("far too late", "late", value={**EXPOSURE, "time": 1}),
]


@pytest.fixture
def embedded(embedded_broker: Any, topic_prefix: str) -> Settings:
    settings = quick(embedded_broker.bootstrap, topic_prefix, broker="embedded")
    for topic in declared_topics(settings):
        embedded_broker.create_topic(topic.name, topic.partitions)
    return settings


@pytest.fixture(params=["embedded", pytest.param("apache", marks=pytest.mark.kafka)])
def settings(request: pytest.FixtureRequest, topic_prefix: str) -> Settings:
    if request.param == "embedded":
        return request.getfixturevalue("embedded")
    return quick(request.getfixturevalue("apache_kafka"), topic_prefix)


@pytest.fixture
def producer(settings: Settings) -> Iterator[KafkaProducer]:
    producer = KafkaProducer(**settings.kafka_python_options(), max_request_size=LARGEST_BYTES)
    yield producer
    producer.close()


def take_large_records(settings: Settings, topic: str) -> None:
    """A broker that lets larger records in than the topics file says, changed while the worker runs."""
    client = KafkaAdminClient(**settings.kafka_python_options())
    client.alter_configs(
        [ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(LARGEST_BYTES)})]
    )
    client.close()


def encoded(value: bytes | dict[str, Any] | None, number: int) -> bytes | None:
    if not isinstance(value, dict):
        return value
    stamped = {"id": f"bad{number}", "time": now_ms()}
    return json.dumps(
        {name: stamped[name] if field == "%" else field for name, field in value.items()}
    ).encode()


def send_good(settings: Settings, producer: KafkaProducer, first: int) -> None:
    for n in range(first, first + 100):
        unit = f"good{n}"
        event = {"time": now_ms(), "unit": unit}
        exposure = {**event, "id": f"x{n}", "experiment": "checkout", "arm": "ab"[n % 2]}
        reward = {**event, "id": f"r{n}", "metric": "click"}
        for topic, body in (("exposures", exposure), ("rewards", reward)):
            producer.send(settings.topic(topic), key=unit.encode(), value=json.dumps(body).encode())
    producer.flush()


def test_every_malformed_record_is_accounted_for(settings: Settings, producer: KafkaProducer) -> None:
    wanted_letters, places = {}, {}
    prepare(settings)
    with WorkerThread(settings) as thread:
        if settings.broker == "apache":
            take_large_records(settings, settings.topic("exposures"))
        send_good(settings, producer, 0)
        for number, bad in enumerate(BAD):
            value = encoded(bad.value, number)
            sent = producer.send(
                settings.topic(bad.topic), key=bad.key, value=value, headers=bad.headers
            ).get(30)
            place = (sent.topic, sent.partition, sent.offset)
            places[place] = bad.name
            if isinstance(bad.becomes, Reason):
                wanted_letters[place] = (bad, value)
        send_good(settings, producer, 100)
        wanted_ends = ends(settings)
        wait_for(lambda: applied(statistics(settings)) == wanted_ends, "everything is applied")
        wait_for(lambda: outcomes(statistics(settings))["rewards"].waiting == 0, "no reward waits any more")
        thread.check()
        parts = statistics(settings)
    assert_outcomes(parts)
    assert_dead_letters(settings, wanted_letters, places)
    assert check(settings).equal


def assert_outcomes(parts: list[Any]) -> None:
    for topic, found in outcomes(parts).items():
        counters: dict[str, int] = {}
        for bad in (bad for bad in BAD if bad.topic == topic):
            counter = "dead_lettered" if isinstance(bad.becomes, Reason) else str(bad.becomes)
            counters[counter] = counters.get(counter, 0) + 1
        assert found.conserved()
        assert found.read == 200 + sum(counters.values())
        assert found.counted == 200
        assert {counter: getattr(found, counter) for counter in counters} == counters


def assert_dead_letters(
    settings: Settings,
    wanted: dict[tuple[str, int, int], tuple[Bad, bytes | None]],
    places: dict[tuple[str, int, int], str],
) -> None:
    letters = records(settings, "deadletter")
    found = {(letter["topic"], letter["partition"], letter["offset"]): letter for letter in letters}
    assert len(found) == len(letters)
    assert {places[place] for place in found} == {bad.name for bad, _ in wanted.values()}
    for place, (bad, value) in wanted.items():
        letter = found[place]
        assert letter["reason"] == bad.becomes, bad.name
        assert letter["detail"]
        assert raw(letter["key"]) == bad.key
        assert raw(letter["value"]) == (None if value is None else value[:RAW_LIMIT_BYTES])
        assert letter["value_bytes"] == len(value or b"")
        assert letter["value_sha256"] == hashlib.sha256(value or b"").hexdigest()


def raw(text: str | None) -> bytes | None:
    return None if text is None else b64decode(text)
