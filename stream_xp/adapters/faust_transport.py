"""Faust as transport and agent host: whole fetched blocks in, commits of durable offsets only.

Per record, Faust costs 140 to 200 µs. Here a fetched partition batch travels as one message, a
`stream_xp.engine.columns.Block`: the hook sits where aiokafka makes ConsumerRecord objects of record batches.
Of Faust's own bookkeeping nothing decides what is committed: its gap arithmetic and its acknowledgements can
commit past records that were never processed, so commits are the offsets that `Progress.durable` holds, which
the engine sets once a snapshot that covers them is on the state topic.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import struct
import time
from collections.abc import Iterator
from typing import Any

import aiokafka
import faust
from aiokafka.consumer import fetcher as aiokafka_fetcher
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import IllegalStateError
from aiokafka.record.default_records import _DefaultRecordBatchPy
from faust.transport.drivers import aiokafka as driver
from faust.types.tuples import TP, ConsumerMessage

from stream_xp.engine.columns import Block
from stream_xp.errors import ConfigError
from stream_xp.settings import Settings

_STOCK_PARTITION_RECORDS: Any = aiokafka_fetcher.PartitionRecords
_STOCK_MEMORY_RECORDS: Any = aiokafka_fetcher.MemoryRecords
_PARTITION_RECORDS_ARGUMENTS = (
    "self",
    "tp",
    "records",
    "aborted_transactions",
    "fetch_offset",
    "key_deserializer",
    "value_deserializer",
    "check_crcs",
    "isolation_level",
)
_FETCH_BYTES = 4 * 1024 * 1024
_BUFFERED_BLOCKS = 4


def as_blocks(value: Any) -> Any:
    """The value deserializer that marks a consumer as one that takes blocks; it changes nothing."""
    return value


class BlockRecords(_STOCK_PARTITION_RECORDS):
    """aiokafka's reader of one fetched partition, yielding one Block instead of a ConsumerRecord per record.

    Only for consumers made with `as_blocks`; others in the process are served as ever.
    Everything else (CRC, compression, control and aborted batches, positions) stays aiokafka's.
    """

    def _unpack_records(self) -> Iterator[Any]:
        if self._value_deserializer is not as_blocks:
            yield from super()._unpack_records()
            return
        fetch_offset = self.next_fetch_offset
        records = list(super()._unpack_records())
        if self.next_fetch_offset > fetch_offset:
            yield Block(
                topic=self._tp.topic,
                partition=self._tp.partition,
                fetch_offset=fetch_offset,
                next_offset=self.next_fetch_offset,
                offsets=[record.offset for record in records],
                timestamps_ms=[record.timestamp for record in records],
                keys=[record.key for record in records],
                values=[record.value for record in records],
                headers=[record.headers for record in records],
                fetched_ns=time.monotonic_ns(),
            )

    def _consumer_record(self, tp: Any, record: Any) -> Any:
        return record if self._value_deserializer is as_blocks else super()._consumer_record(tp, record)


class _ForgivingBytes(bytearray):
    """Bytes whose text may be anything: what is not UTF-8 becomes U+FFFD."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _ForgivingBytes(found) if isinstance(at, slice) else found

    def decode(self, *_: object, **__: object) -> str:
        return super().decode("utf-8", "replace")


class _ForgivingBatch(_DefaultRecordBatchPy):
    """aiokafka's record batch in Python, reading header names as they are."""

    _buffer: Any

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _ForgivingBytes(self._buffer)


class _Batch:
    """A record batch as aiokafka reads it, or forgivingly where a header name is not UTF-8."""

    def __init__(self, stock: Any, raw: bytes) -> None:
        self._stock = stock
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __iter__(self) -> Iterator[Any]:
        try:
            return iter(list(self._stock))
        except UnicodeDecodeError:
            return iter(_ForgivingBatch(self._raw))

    def __next__(self) -> Any:
        return next(self._stock)


class ForgivingRecords:
    """aiokafka's reader of fetched bytes, for which no header name is a reason to stop.

    A broker takes any bytes as the name of a header; aiokafka raises UnicodeDecodeError at them, which no caller
    expects: one such record would end every worker that reads its partition, again and again.
    """

    def __init__(self, raw: bytes) -> None:
        self._stock = _STOCK_MEMORY_RECORDS(raw)
        self._raw = raw
        self._at = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def next_batch(self) -> _Batch | None:
        """The next batch, None after the last."""
        stock = self._stock.next_batch()
        if stock is None:
            return None
        # Base offset and length of what follows: the same first 12 bytes in every message format.
        (size,) = struct.unpack_from(">i", self._raw, self._at + 8)
        raw = self._raw[self._at : self._at + 12 + size]
        self._at += len(raw)
        return _Batch(stock, raw)


def install_block_hook() -> None:
    """Have aiokafka deliver blocks to consumers made with `as_blocks`, and read any header name, in this process.

    Raises:
        ConfigError: aiokafka's internals are not the ones this was written for.
    """
    found = tuple(inspect.signature(_STOCK_PARTITION_RECORDS.__init__).parameters)
    if found != _PARTITION_RECORDS_ARGUMENTS or not hasattr(_STOCK_PARTITION_RECORDS, "_consumer_record"):
        raise ConfigError(
            f"aiokafka {aiokafka.__version__} reads partitions in another way; install the pinned version"
        )
    aiokafka_fetcher.PartitionRecords = BlockRecords
    aiokafka_fetcher.MemoryRecords = ForgivingRecords


class BlockConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread around an aiokafka consumer with our options."""

    async def on_thread_stop(self) -> None:
        """Stop the consumer, whatever its fetcher was doing.

        aiokafka's fetcher cancels its requests on closing and awaits them; one that stands in its pause after a
        failed fetch raises that cancellation here, in a thread that nobody waits for any more. The consumer has
        left its group by then; what is left to close are its connections.
        """
        try:
            await super().on_thread_stop()
        except asyncio.CancelledError:
            await self._consumer._client.close()  # noqa: SLF001 (the consumer counts as closed already)

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        settings: Settings = transport.settings
        # Faust without tables assigns partitions round robin over all topics, which parts exposures from
        # rewards. Ranges keep equal partition numbers of equally partitioned topics on one worker.
        self._assignor = RangePartitionAssignor
        return aiokafka.AIOKafkaConsumer(
            **settings.aiokafka_options(),
            group_id=self.app.conf.id,
            partition_assignment_strategy=[self._assignor],
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_poll_records=None,
            max_partition_fetch_bytes=_FETCH_BYTES,
            # The embedded broker holds an empty fetch for all of this time, whatever arrives meanwhile.
            fetch_max_wait_ms=100,
            session_timeout_ms=settings.session_timeout_ms,
            rebalance_timeout_ms=settings.session_timeout_ms,
            heartbeat_interval_ms=settings.session_timeout_ms // 4,
            max_poll_interval_ms=300_000,
            check_crcs=True,
            value_deserializer=as_blocks,
        )


class BlockConsumer(driver.Consumer):
    """Faust's consumer, committing what is durable.

    Attributes:
        durable: per topic partition, the offset that may be committed: everything below it is covered by a
            snapshot on the state topic.
    """

    durable: dict[TP, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.durable = {}

    def _new_consumer_thread(self) -> driver.AIOKafkaConsumerThread:
        return BlockConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def _to_message(self, tp: TP, record: Any) -> ConsumerMessage:
        if not isinstance(record, Block):
            return super()._to_message(tp, record)
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            record.next_offset - 1,
            None,
            0,
            (),
            None,
            record,
            None,
            0,
            len(record.offsets),
            tp,
            generation_id=self.app.consumer_generation_id,
        )

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Do nothing: a block has the offset of its last record, and acknowledgements commit nothing."""

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return (tp for tp in list(self.durable) if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        return self.durable.get(tp)

    async def seek_to_committed(self) -> Any:
        """Seek all partitions to their committed offset, those that have none to their beginning.

        aiokafka leaves the latter where they are. Faust throws away what was fetched while a rebalance was
        under way and relies on this seek to have it fetched again.
        """
        offsets = await super().seek_to_committed()
        uncommitted = [tp for tp, offset in offsets.items() if not offset]
        if uncommitted:
            await self._thread.seek_to_beginning(*uncommitted)
        return offsets

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Commit what became durable while the partitions were handed over, then forget it."""
        await super().on_partitions_revoked(revoked)
        await self.commit()
        for tp in revoked:
            self.durable.pop(tp, None)


class BlockTransport(driver.Transport):
    """Faust's aiokafka transport with the consumer above."""

    Consumer = BlockConsumer

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any) -> None:
        self.settings = settings
        super().__init__(*args, **kwargs)


class _App(faust.App):
    def _create_directories(self) -> None:
        """Do nothing: no state is on disk, and a worker's file system may be read-only."""


def create_app(settings: Settings, *, loop: Any = None) -> faust.App:
    """A Faust app that hosts agents and nothing else: no tables, no web server, no topic creation."""
    install_block_hook()
    app = _App(
        settings.group_id,
        **settings.faust_options(),
        loop=loop,
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        stream_buffer_maxsize=_BUFFERED_BLOCKS,
        # Nothing is lost when a rebalance does not wait for the streams: what was not applied is read again.
        stream_wait_empty=False,
        broker_commit_interval=1.0,
        broker_request_timeout=max(90.0, settings.session_timeout_ms / 1000),
        value_serializer="raw",
        key_serializer="raw",
        logging_config=None,
    )
    app.transport = BlockTransport(app.conf.broker, app, loop=loop, settings=settings)
    return app


class FaustSource:
    """What the stages need of the consumer beside its blocks: ends, starts, seeking, and what is durable."""

    def __init__(self, app: faust.App) -> None:
        self._app = app
        self._answered: dict[TP, tuple[int | None, int]] = {}

    async def seek(self, topic: str, partition: int, offset: int) -> None:
        """Read this partition from `offset` on; nothing happens if it has left this worker."""
        with contextlib.suppress(IllegalStateError):
            # In the consumer's own thread: from another one a fetch under way could set the position back.
            await self._app.consumer.seek_wait({TP(topic, partition): offset})

    def end(self, topic: str, partition: int) -> tuple[int, int] | None:
        """End offset of the partition and a wall time at which it was the end; None before two answers.

        An answer may have been long under way. The one before it was here before it was asked for, so that
        one's time is given.
        """
        consumer = self._app.consumer._thread._consumer  # noqa: SLF001 (Faust passes no time of the answer on)
        tp = TP(topic, partition)
        if consumer is None or tp not in consumer.assignment():
            self._answered.pop(tp, None)
            return None
        end, answered_ms = consumer.highwater(tp), consumer.last_poll_timestamp(tp)
        if end is None or answered_ms is None:
            return None
        before_ms, last_ms = self._answered.get(tp, (None, answered_ms))
        if answered_ms != last_ms:
            before_ms = last_ms
        self._answered[tp] = (before_ms, answered_ms)
        return None if before_ms is None else (end, before_ms)

    def durable(self, topic: str, partition: int, offset: int) -> None:
        """Everything below `offset` is covered by a snapshot and may be committed."""
        tp = TP(topic, partition)
        if tp in self._app.consumer.assignment():
            self._app.consumer.durable[tp] = offset
