"""What the embedded broker can do, and the limits that its docstring names."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from worker_process import DEADLINE_S

from stream_xp.adapters import embedded_broker as module
from stream_xp.adapters.embedded_broker import AUTO_CREATED_PARTITIONS, EmbeddedBroker
from stream_xp.adapters.kafka_admin import connect
from stream_xp.errors import ConfigError
from stream_xp.settings import Settings

pytestmark = pytest.mark.broker

AN_OLD_TIME_MS = 1_500_000_000_123


def settings_of(broker: EmbeddedBroker) -> Settings:
    return Settings(bootstrap=broker.bootstrap, broker="embedded")


def fill(settings: Settings, topic: str, *, partitions: int, each: int) -> None:
    producer = KafkaProducer(**settings.kafka_python_options())
    for number in range(partitions * each):
        producer.send(topic, value=b"%d" % number, partition=number % partitions)
    producer.flush()
    producer.close()


def test_kafka_python_keeps_key_headers_and_time(embedded_broker: EmbeddedBroker) -> None:
    options = settings_of(embedded_broker).kafka_python_options()
    producer = KafkaProducer(**options)
    sent = producer.send(
        "t", key=b"k", value=b"v", headers=[("ce_id", b"1")], timestamp_ms=AN_OLD_TIME_MS, partition=2
    ).get(DEADLINE_S)
    producer.close()
    consumer = KafkaConsumer(**options, auto_offset_reset="earliest")
    partition = TopicPartition("t", 2)
    consumer.assign([partition])
    deadline = time.monotonic() + DEADLINE_S
    records = []
    while not records and time.monotonic() < deadline:
        records = consumer.poll(200).get(partition, [])
    consumer.close()
    (record,) = records
    assert (record.offset, record.key, record.value, record.headers) == (0, b"k", b"v", [("ce_id", b"1")])
    assert (record.timestamp, record.timestamp_type) == (AN_OLD_TIME_MS, 0)
    assert sent.timestamp == 1234


def test_aiokafka_keeps_key_headers_and_time_and_commits(embedded_broker: EmbeddedBroker) -> None:
    options = settings_of(embedded_broker).aiokafka_options()

    async def main() -> None:
        async with AIOKafkaProducer(**options) as producer:
            await producer.send_and_wait(
                "t", b"v", key=b"k", headers=[("ce_id", b"1")], timestamp_ms=AN_OLD_TIME_MS, partition=1
            )
        async with AIOKafkaConsumer(
            "t", **options, group_id="g", auto_offset_reset="earliest", enable_auto_commit=False
        ) as consumer:
            record = await asyncio.wait_for(consumer.getone(), DEADLINE_S)
            await consumer.commit()
            committed = await consumer.committed(TopicPartition("t", 1))
        assert (record.key, record.value, record.headers) == (b"k", b"v", (("ce_id", b"1"),))
        assert (record.timestamp, record.timestamp_type) == (AN_OLD_TIME_MS, 0)
        assert committed == 1

    asyncio.run(main())


def test_one_member_gets_every_partition_of_its_group(embedded_broker: EmbeddedBroker) -> None:
    settings = settings_of(embedded_broker)
    embedded_broker.create_topic("six", 6)
    fill(settings, "six", partitions=6, each=10)
    consumer = KafkaConsumer(
        "six", **settings.kafka_python_options(), group_id="g", auto_offset_reset="earliest"
    )
    seen: set[tuple[int, int]] = set()
    deadline = time.monotonic() + DEADLINE_S
    while len(seen) < 60 and time.monotonic() < deadline:
        for records in consumer.poll(100).values():
            seen.update((record.partition, record.offset) for record in records)
    assert len(consumer.assignment()) == 6
    consumer.commit()
    assert {consumer.committed(partition) for partition in consumer.assignment()} == {10}
    consumer.close()
    assert len(seen) == 60


def test_partition_counts(embedded_broker: EmbeddedBroker) -> None:
    settings = settings_of(embedded_broker)
    for name, partitions in (("one", 1), ("twelve", 12)):
        embedded_broker.create_topic(name, partitions)
    producer = KafkaProducer(**settings.kafka_python_options())
    counts = {name: len(producer.partitions_for(name)) for name in ("one", "twelve", "unmentioned")}
    producer.close()
    assert counts == {"one": 1, "twelve": 12, "unmentioned": AUTO_CREATED_PARTITIONS}


def test_a_topic_is_made_once(embedded_broker: EmbeddedBroker) -> None:
    embedded_broker.create_topic("t", 2)
    with pytest.raises(ConfigError, match="topic t exists"):
        embedded_broker.create_topic("t", 2)


def test_a_partition_keeps_about_five_megabytes(embedded_broker: EmbeddedBroker) -> None:
    settings = settings_of(embedded_broker)
    producer = KafkaProducer(**settings.kafka_python_options())
    for _ in range(1_000):
        producer.send("t", value=bytes(10_000), partition=0)
    producer.flush()
    producer.close()
    consumer = KafkaConsumer(**settings.kafka_python_options())
    partition = TopicPartition("t", 0)
    start, end = consumer.beginning_offsets([partition]), consumer.end_offsets([partition])
    consumer.close()
    assert end[partition] == 1_000
    assert 4_500_000 < (end[partition] - start[partition]) * 10_000 < 5_500_000


def test_topic_administration_is_refused_in_one_sentence(embedded_broker: EmbeddedBroker) -> None:
    settings = settings_of(embedded_broker)
    with pytest.raises(ConfigError, match="no topic administration"), connect(settings):
        pass
    client = KafkaAdminClient(**settings.kafka_python_options())
    with pytest.raises(KafkaError):
        client.create_topics({"t": {"num_partitions": 1, "replication_factor": 1}})
    client.close()


def test_two_brokers_do_not_share_records_and_close_twice_is_harmless() -> None:
    with EmbeddedBroker() as first, EmbeddedBroker() as second:
        assert first.bootstrap != second.bootstrap
        first.close()
    with pytest.raises(ConfigError, match="closed"):
        first.create_topic("t", 1)


def test_without_confluent_kafka_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    monkeypatch.delitem(sys.modules, "confluent_kafka.cimpl", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'stream-xp\[embedded\]'"):
        EmbeddedBroker()


def test_a_build_that_hides_the_mock_functions_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(library: object) -> object:
        raise AttributeError("rd_kafka_mock_cluster_new")

    monkeypatch.setattr(module, "_declare", hidden)
    with EmbeddedBroker() as broker:
        broker.create_topic("four", 4)
        with pytest.raises(ConfigError, match="4 partitions only"):
            broker.create_topic("seven", 7)
        fill(settings_of(broker), "four", partitions=4, each=1)
