"""The load generator on the embedded broker: what arrives is what the simulator drew, on time."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from stream_xp.adapters.load_generator import LoadGenerator, Sent
from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.domain.experiment import Arm, Direction, ExperimentSpec, Metric, MetricKind, Role
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.settings import KafkaSecurity, Secret, Settings
from stream_xp.simulator import (
    EXPOSURES,
    REWARDS,
    TOPICS,
    Chunk,
    Conversion,
    Event,
    ExperimentTraffic,
    Faults,
    Scenario,
    Since,
    Traffic,
    generate,
)

if TYPE_CHECKING:
    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = pytest.mark.broker

FAULTS = Faults(duplicated=0.02, out_of_order=0.1, late=0.01, malformed=0.02, reward_first=0.2)


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker) -> Settings:
    return Settings(bootstrap=embedded_broker.bootstrap, broker="embedded")


def a_traffic(*, units_per_s: float, duration_ms: int) -> Traffic:
    metric = Metric(
        key="click",
        kind=MetricKind.CONVERSION,
        role=Role.PRIMARY,
        direction=Direction.INCREASE,
        attribution_window="500ms",
    )
    spec = ExperimentSpec(
        experiment="aa",
        owner="team",
        hypothesis="none",
        unit="member",
        arms=(Arm(key="a", weight=0.5, control=True), Arm(key="b", weight=0.5)),
        metrics=(metric,),
        planned_sample=1_000,
    )
    half = (Since(outcome=Conversion(probability=0.5)),)
    only = ExperimentTraffic(
        spec=spec,
        units_per_s=units_per_s,
        outcomes={"click": {"a": half, "b": half}},
        reward_delay_ms=100.0,
    )
    scenario = Scenario(experiments=(only,), duration_ms=duration_ms, allowed_lateness_ms=500, faults=FAULTS)
    return generate(scenario, 1)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def test_everything_arrives_in_order_and_on_time(settings: Settings) -> None:
    traffic = a_traffic(units_per_s=2_000, duration_ms=2_000)
    start_ms = now_ms() + 100
    with LoadGenerator(settings) as generator:
        began = time.monotonic()
        assert generator.send(traffic.chunks(start_ms), start_ms=start_ms)
        took_s = time.monotonic() - began
    assert traffic.last_send_ms / 1000 <= took_s < traffic.last_send_ms / 1000 + 3
    wanted = list(traffic.events(start_ms))
    for topic in TOPICS:
        with TopicReader(settings, settings.topic(topic)) as reader:
            found = list(reader.backlog())
        records = sorted((r.log_time_ms - start_ms, r.key or b"", r.value) for r in found)
        assert records == sorted((e.send_ms, e.key or b"", e.value) for e in wanted if e.topic == topic)
        assert generator.delivered[settings.topic(topic)] == len(found) == traffic.count(topic)
        assert {r.partition for r in found} == set(range(settings.partitions))
        for partition in range(settings.partitions):
            times = [r.log_time_ms for r in found if r.partition == partition]
            assert times == sorted(times)


def test_both_topics_have_a_unit_in_the_same_partition(settings: Settings) -> None:
    traffic = a_traffic(units_per_s=500, duration_ms=500)
    with LoadGenerator(settings) as generator:
        generator.send(traffic.chunks(), start_ms=now_ms() - 10_000)
    places: dict[bytes, set[int]] = {}
    for topic in TOPICS:
        with TopicReader(settings, settings.topic(topic)) as reader:
            for record in reader.backlog():
                if record.key:
                    places.setdefault(record.key, set()).add(record.partition)
    assert len(places) > 100
    assert all(len(partitions) == 1 for partitions in places.values())


def test_samples_say_where_records_stand_and_when_they_left(settings: Settings) -> None:
    traffic = a_traffic(units_per_s=1_000, duration_ms=1_000)
    before = time.monotonic()
    # The later of the two: a pause in between must make nothing look as if it were sent early.
    start_ms = now_ms()
    with LoadGenerator(settings, sample_every=10) as generator:
        generator.send(traffic.chunks(start_ms), start_ms=start_ms)
    after = time.monotonic()
    assert len(generator.samples) == len(traffic) // 10
    assert len({sample[:3] for sample in generator.samples}) == len(generator.samples)
    times = {}
    for topic in TOPICS:
        with TopicReader(settings, settings.topic(topic)) as reader:
            for record in reader.backlog():
                times[record.topic, record.partition, record.offset] = record.log_time_ms - start_ms
    for sample in generator.samples:
        assert isinstance(sample, Sent)
        assert before <= sample.sent_s <= after
        # Never sent before it was due.
        assert sample.sent_s - before >= times[sample[:3]] / 1000 - 0.01


def test_what_is_due_already_is_sent_at_once(settings: Settings) -> None:
    traffic = a_traffic(units_per_s=20_000, duration_ms=5_000)
    chunks = list(traffic.chunks())
    began = time.monotonic()
    with LoadGenerator(settings, sample_every=1_000) as generator:
        assert generator.send(chunks, start_ms=now_ms() - 60_000)
    assert time.monotonic() - began < 30
    assert sum(generator.delivered.values()) == len(traffic)
    assert generator.behind_ms > 1_000


def test_a_stop_ends_the_sending_and_what_was_sent_is_acknowledged(settings: Settings) -> None:
    traffic = a_traffic(units_per_s=1_000, duration_ms=60_000)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    start_ms = now_ms()
    with LoadGenerator(settings) as generator:
        assert not generator.send(traffic.chunks(start_ms), start_ms=start_ms, stop=stop)
    assert now_ms() - start_ms < 5_000
    assert 0 < sum(generator.delivered.values()) < len(traffic)


def test_a_null_key_and_an_empty_value_arrive_as_such(settings: Settings) -> None:
    events = [Event(EXPOSURES, 0, None, b"a"), Event(EXPOSURES, 1, b"", b"b"), Event(EXPOSURES, 2, b"k", b"")]
    with LoadGenerator(settings) as generator:
        generator.send([Chunk(3, events)], start_ms=now_ms() - 10)
    with TopicReader(settings, settings.topic(EXPOSURES)) as reader:
        found = {(record.key, record.value) for record in reader.backlog()}
    assert found == {(None, b"a"), (b"", b"b"), (b"k", b"")}


def test_a_full_queue_makes_room(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("stream_xp.adapters.load_generator")
    plain = module._options
    monkeypatch.setattr(module, "_options", lambda s: {**plain(s), "queue.buffering.max.messages": 50})
    events = [Event(REWARDS, number, b"k", b"v") for number in range(1_000)]
    with LoadGenerator(settings) as generator:
        generator.send([Chunk(1_000, events)], start_ms=now_ms() - 2_000)
    assert sum(generator.delivered.values()) == 1_000
    offsets = [sample.offset for sample in generator.samples]
    assert offsets == list(range(1_000))


def test_a_record_that_is_not_acknowledged_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("stream_xp.adapters.load_generator")
    monkeypatch.setattr(module, "DELIVERY_TIMEOUT_S", 1.0)
    events = [Event(REWARDS, 0, b"k", b"v")]
    nobody = Settings(bootstrap="127.0.0.1:1", broker="embedded")
    with (
        pytest.raises(DependencyError, match=r"sending to 127\.0\.0\.1:1 failed"),
        LoadGenerator(nobody) as it,
    ):
        it.send([Chunk(1, events)], start_ms=now_ms() - 10)


def test_without_confluent_kafka_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(ConfigError, match=r"stream-xp\[embedded\]"):
        LoadGenerator(Settings())


def test_sampling_less_than_every_record_is_refused() -> None:
    with pytest.raises(ConfigError, match="sample_every"):
        LoadGenerator(Settings(), sample_every=0)


def test_credentials_reach_the_producer() -> None:
    security = KafkaSecurity(
        security_protocol="SASL_SSL", ssl_ca_file="ca.pem", sasl_username="me", sasl_password=Secret("word")
    )
    module = importlib.import_module("stream_xp.adapters.load_generator")
    options = module._options(Settings(bootstrap="kafka:9093", security=security))
    assert options["security.protocol"] == "SASL_SSL"
    assert options["ssl.ca.location"] == "ca.pem"
    assert (options["sasl.username"], options["sasl.password"]) == ("me", "word")
    assert "ssl.key.location" not in options
