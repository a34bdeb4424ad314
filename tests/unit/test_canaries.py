"""Canaries: one for each internal of a pinned dependency that the engine relies on, and for defects it avoids.

A canary that fails after an upgrade says what to look at before the pin moves.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
import time
import tomllib
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faust
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from aiokafka.errors import IllegalStateError, KafkaError
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from faust.transport import consumer as stock
from faust.transport.drivers import aiokafka as driver
from faust.transport.producer import ProducerBuffer
from faust.types.tuples import TP
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from mode import Service
from mode.threads import WorkerThread

from stream_xp.adapters import faust_transport
from stream_xp.adapters.faust_transport import BlockConsumer, BlockRecords, as_blocks, create_app
from stream_xp.engine.columns import Block
from stream_xp.errors import ConfigError
from stream_xp.settings import Settings

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
PINNED = ("faust-streaming", "aiokafka", "mode-streaming", "kafka-python")
AT = TP("xp.exposures", 3)


def parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@pytest.mark.parametrize("package", PINNED)
def test_the_installed_version_is_the_pinned_one(package: str) -> None:
    dependencies = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    assert f"{package}=={version(package)}" in dependencies


# aiokafka: how fetched partitions are read ------------------------------------------------------------


@pytest.fixture
def stock_records() -> Any:
    """aiokafka's own class, whether or not the hook is installed in this process."""
    return faust_transport._STOCK_PARTITION_RECORDS


def batch(values: list[bytes], base_offset: int = 0) -> bytes:
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1_000_000)
    for at, value in enumerate(values):
        builder.append(at, timestamp=1_000 + at, key=b"k", value=value, headers=[("h", b"1")])
    raw = builder.build()
    return base_offset.to_bytes(8, "big") + bytes(raw)[8:]


def read(reader: Any, raw: bytes, fetch_offset: int, deserializer: Any = None) -> Any:
    return reader(
        TopicPartition(*AT),
        MemoryRecords(raw),
        [],
        fetch_offset,
        None,
        deserializer,
        True,
        "read_uncommitted",
    )


def test_partition_records_take_the_arguments_that_the_hook_passes_on(stock_records: Any) -> None:
    assert parameters(stock_records.__init__) == faust_transport._PARTITION_RECORDS_ARGUMENTS
    assert parameters(stock_records._consumer_record) == ("self", "tp", "record")
    assert inspect.isgeneratorfunction(stock_records._unpack_records)


def test_the_hook_refuses_another_aiokafka(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        faust_transport, "_STOCK_PARTITION_RECORDS", SimpleNamespace(__init__=lambda self: None)
    )
    with pytest.raises(ConfigError, match="install the pinned version"):
        faust_transport.install_block_hook()


def test_the_fetcher_finds_the_reader_by_its_name_in_the_module() -> None:
    source = inspect.getsource(fetcher.Fetcher._proc_fetch_request)
    assert re.search(r"partition_records = PartitionRecords\(", source)


def test_partition_records_keep_position_and_deserializer(stock_records: Any) -> None:
    records = read(stock_records, batch([b"a", b"b"], base_offset=7), 7)
    assert records.next_fetch_offset == 7
    assert [record.offset for record in records] == [7, 8]
    assert records.next_fetch_offset == 9
    assert read(stock_records, b"", 0, as_blocks)._value_deserializer is as_blocks


def test_a_block_holds_what_the_stock_reader_yields(stock_records: Any) -> None:
    raw = batch([b"a", b"b", b"c"], base_offset=4)
    stock_found = list(read(stock_records, raw, 5))
    before_ns = time.monotonic_ns()
    (block,) = read(BlockRecords, raw, 5, as_blocks)
    assert before_ns <= block.fetched_ns <= time.monotonic_ns()
    assert (block.topic, block.partition, block.fetch_offset, block.next_offset) == ("xp.exposures", 3, 5, 7)
    assert block.offsets == [record.offset for record in stock_found] == [5, 6]
    assert block.timestamps_ms == [record.timestamp for record in stock_found]
    assert block.keys == [record.key for record in stock_found]
    assert block.values == [record.value for record in stock_found]
    assert [tuple(headers) for headers in block.headers] == [record.headers for record in stock_found]


def test_a_consumer_without_the_mark_is_served_as_ever(stock_records: Any) -> None:
    raw = batch([b"a", b"b"])
    assert list(read(BlockRecords, raw, 0)) == list(read(stock_records, raw, 0))


class _Assignment:
    """An assignment with one position, as FetchResult uses it."""

    def __init__(self, position: int) -> None:
        self.active, self.position, self.has_valid_position, self.paused = True, position, True, False

    def state_value(self, tp: TopicPartition) -> Any:
        return self

    def consumed_to(self, position: int) -> None:
        self.position = position


def test_a_fetch_result_of_one_block_moves_the_position_past_all_its_records() -> None:
    async def drained() -> tuple[list[Any], int]:
        assignment = _Assignment(5)
        records = read(BlockRecords, batch([b"a", b"b", b"c"], base_offset=5), 5, as_blocks)
        result = FetchResult(
            TopicPartition(*AT), assignment=assignment, partition_records=records, backoff=0.1
        )
        return result.getall(None), assignment.position

    blocks, position = asyncio.run(drained())
    assert len(blocks) == 1
    assert position == 8


def test_the_consumer_tells_ends_and_when_it_heard_of_them() -> None:
    for name in ("highwater", "last_poll_timestamp"):
        assert parameters(getattr(AIOKafkaConsumer, name)) == ("self", "partition")
    answer = inspect.getsource(fetcher.Fetcher._proc_fetch_request)
    # Both are set together, from the wall clock, when an answer came: FaustSource.end depends on it.
    assert "now_ms = int(1000 * time.time())" in answer
    assert answer.index("tp_state.highwater = highwater") < answer.index("tp_state.timestamp = now_ms")


def test_a_seek_in_a_partition_that_left_is_an_illegal_state() -> None:
    assert issubclass(IllegalStateError, KafkaError)

    async def seek() -> None:
        state = SubscriptionState()
        state.assign_from_user([TopicPartition("t", 0)])
        state.seek(TopicPartition("t", 1), 0)

    with pytest.raises(IllegalStateError):
        asyncio.run(seek())


def test_a_seek_to_committed_leaves_what_was_never_committed() -> None:
    # Why BlockConsumer.seek_to_committed seeks those to their beginning.
    source = inspect.getsource(AIOKafkaConsumer.seek_to_committed)
    assert "if offset and offset > 0:" in source
    assert parameters(stock.ThreadDelegateConsumer.seek_to_committed) == ("self",)
    assert "await self.seek_to_committed()" in inspect.getsource(stock.Consumer.perform_seek)
    assert "await self.perform_seek()" in inspect.getsource(stock.Consumer.getmany)


@pytest.mark.parametrize("members", range(1, 8))
@pytest.mark.parametrize("partitions", [1, 4, 5, 12])
def test_ranges_keep_equal_partitions_of_equally_partitioned_topics_together(
    members: int, partitions: int
) -> None:
    topics = ["xp.exposures", "xp.rewards"]
    cluster = SimpleNamespace(partitions_for_topic=lambda topic: set(range(partitions)))
    metadata = {f"member-{n}": ConsumerProtocolMemberMetadata(0, topics, b"") for n in range(members)}
    assigned = RangePartitionAssignor.assign(cluster, metadata)
    seen = []
    for assignment in assigned.values():
        held = dict(assignment.assignment)
        assert sorted(held.get("xp.exposures", [])) == sorted(held.get("xp.rewards", []))
        seen += held.get("xp.exposures", [])
    assert sorted(seen) == list(range(partitions))


def test_the_producer_takes_our_options() -> None:
    assert {"acks", "enable_idempotence", "linger_ms", "max_request_size", "compression_type"} <= set(
        parameters(AIOKafkaProducer.__init__)
    )


# Faust: what the transport overrides -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "method", "expected"),
    [
        (stock.Consumer, "_new_offset", ("self", "tp")),
        (stock.Consumer, "_filter_tps_with_pending_acks", ("self", "topics")),
        (stock.Consumer, "_add_gap", ("self", "tp", "offset_from", "offset_to")),
        (stock.Consumer, "on_partitions_revoked", ("self", "revoked")),
        (stock.ThreadDelegateConsumer, "seek_wait", ("self", "partitions")),
        (driver.Consumer, "_to_message", ("self", "tp", "record")),
        (driver.Consumer, "_new_consumer_thread", ("self",)),
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer", ("self", "transport")),
        (faust.App, "_create_directories", ("self",)),
    ],
)
def test_what_is_overridden_is_there(owner: Any, method: str, expected: tuple[str, ...]) -> None:
    assert parameters(getattr(owner, method)) == expected


def test_commits_go_through_what_is_overridden() -> None:
    assert "self._filter_tps_with_pending_acks(topics)" in inspect.getsource(stock.Consumer.force_commit)
    assert "self._new_offset(tp)" in inspect.getsource(stock.Consumer._filter_committable_offsets)
    assert "self._consumer = self._create_consumer(" in inspect.getsource(
        driver.AIOKafkaConsumerThread.on_start
    )
    assert "_create_worker_consumer(" in inspect.getsource(driver.AIOKafkaConsumerThread._create_consumer)


def test_messages_are_dropped_by_their_offset_alone() -> None:
    # A block's offset is its last record's: one that begins before the sought offset still gets through.
    assert "if r_offset is None or offset >= r_offset" in inspect.getsource(stock.Consumer._drain_messages)


def test_a_crash_can_be_seen_from_outside() -> None:
    service = Service()
    assert service.should_stop is False
    service._crash(ValueError("gone"))
    assert service.should_stop is True
    assert isinstance(service.crash_reason, ValueError)


def test_the_consumer_thread_would_keep_the_process_alive() -> None:
    # Why run_until_signal has a deadline of its own.
    assert WorkerThread(SimpleNamespace()).daemon is False
    assert "is_stopped.wait()" in inspect.getsource(WorkerThread.stop)
    assert threading.Thread(daemon=True).daemon


@pytest.fixture
def app_consumer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A consumer of our app, not connected."""
    monkeypatch.chdir(tmp_path)

    with asyncio.Runner() as runner:

        async def build() -> Any:
            return create_app(Settings(), loop=asyncio.get_running_loop()).consumer

        consumer = runner.run(build())
        thread_loop = consumer._thread.thread_loop
        yield consumer
        thread_loop.close()


def test_our_consumer_is_the_one_that_faust_uses(app_consumer: Any) -> None:
    assert type(app_consumer) is BlockConsumer
    assert type(app_consumer._thread) is faust_transport.BlockConsumerThread
    assert app_consumer._thread._consumer is None
    assert app_consumer.app.conf.stream_wait_empty is False


def test_only_what_is_durable_is_committed(app_consumer: Any) -> None:
    app_consumer._acked[AT] = [1, 2, 3]
    app_consumer._acked_index[AT] = {1, 2, 3}
    assert list(app_consumer._filter_tps_with_pending_acks()) == []
    assert app_consumer._new_offset(AT) is None
    app_consumer.durable[AT] = 17
    assert list(app_consumer._filter_tps_with_pending_acks()) == [AT]
    assert list(app_consumer._filter_tps_with_pending_acks({AT.topic})) == [AT]
    assert list(app_consumer._filter_tps_with_pending_acks({"other"})) == []
    assert app_consumer._filter_committable_offsets([AT]) == {AT: 17}
    assert app_consumer._acked[AT] == []


def test_a_partition_without_a_commit_is_sought_to_its_beginning(
    app_consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Thread:
        begun: tuple[Any, ...] = ()

        async def seek_to_committed(self) -> dict[TP, int | None]:
            return {AT: None, TP("xp.rewards", 3): 5, TP("xp.stats", 0): 0}

        async def seek_to_beginning(self, *partitions: Any) -> None:
            self.begun = partitions

    thread = Thread()
    monkeypatch.setattr(app_consumer, "_thread", thread)
    asyncio.run(app_consumer.perform_seek())
    assert thread.begun == (AT, TP("xp.stats", 0))


def test_a_message_carries_the_block_and_its_last_offset(app_consumer: Any) -> None:
    block = Block(AT.topic, AT.partition, 5, 9, [5, 8], [1, 2], [b"k"] * 2, [b"v"] * 2, [()] * 2)
    message = app_consumer._to_message(AT, block)
    assert (message.offset, message.value, message.tp) == (8, block, AT)


def test_a_worker_leaves_nothing_on_disk(app_consumer: Any) -> None:
    app_consumer.app._create_directories()
    assert list(Path.cwd().iterdir()) == []


# Defects of stock Faust that the design goes around: a failure here means that one is mended -------------


class _Buffer(ProducerBuffer):
    state = "running"


def test_f1_flush_gives_up_while_messages_are_queued() -> None:
    async def flush() -> tuple[int, int]:
        buffer = _Buffer()
        buffer.app = SimpleNamespace(conf=SimpleNamespace(producer_threaded=False))
        for _ in range(10):
            buffer.put(SimpleNamespace())
        # Nothing is sent: to the end of all messages there would be no end.
        return await asyncio.wait_for(buffer.flush_atmost(10), 5), buffer.size

    assert asyncio.run(flush()) == (0, 10)


def acked(offsets: list[int], committed: int | None) -> Any:
    return SimpleNamespace(
        _acked={AT: list(offsets)},
        _acked_index={AT: set(offsets)},
        _gap=defaultdict(list),
        _committed_offset={AT: committed},
    )


def test_f3_a_commit_passes_a_record_that_is_not_acknowledged() -> None:
    assert stock.Consumer._new_offset(acked([2586, 2587, 2588, 2589], 2585), AT) == 2590
    assert stock.Consumer._new_offset(acked([3, 4, 5], None), AT) == 6


# kafka-python: the oracle, administration and the applications' side ---------------------------------------


def test_kafka_python_is_called_as_it_is_written() -> None:
    for name in ("beginning_offsets", "end_offsets"):
        assert parameters(getattr(KafkaConsumer, name)) == ("self", "partitions", "timeout_ms")
    for name in ("list_topics", "describe_topics", "create_topics", "describe_configs", "list_group_offsets"):
        assert callable(getattr(KafkaAdminClient, name))
    assert KafkaProducer.DEFAULT_CONFIG["acks"] in (-1, "all")
    assert KafkaProducer.DEFAULT_CONFIG["enable_idempotence"] is True
