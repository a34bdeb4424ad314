"""Reads a topic from its beginning: up to where it ends now, then on as it grows, if wanted.

Every reader of kafka-python is made here, by :func:`open_consumer`: anybody with a right to write may give a header
a name that is not UTF-8, and kafka-python itself stops at such a record. It also asks for topics without a deadline.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError, KafkaError, KafkaTimeoutError
from kafka.record.default_records import DefaultRecordBatch

from stream_xp.errors import ConfigError, DependencyError
from stream_xp.link import check_link, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from stream_xp.settings import Settings

CONNECT_TIMEOUT_MS: Final = 10_000
REQUEST_TIMEOUT_MS: Final = 20_000
TOPICS_TIMEOUT_MS: Final = 20_000
"""How long a broker may take to say which topics it has."""
STALL_TIMEOUT_MS: Final = 30_000
POLL_MS: Final = 200


class TopicRecord(NamedTuple):
    """One record as the broker gave it; `log_time_ms` is its Kafka timestamp."""

    topic: str
    partition: int
    offset: int
    log_time_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]

    @classmethod
    def of(cls, record: Any) -> TopicRecord:
        """A `ConsumerRecord` of kafka-python."""
        return cls(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            log_time_ms=record.timestamp,
            key=record.key,
            value=record.value,
            headers=tuple(record.headers or ()),
        )

    @property
    def place(self) -> str:
        """Where the record stands, for messages."""
        return f"{self.topic} partition {self.partition} offset {self.offset}"


class TopicReader:
    """A reader of all partitions of one topic, without a consumer group.

    ::

        with TopicReader(settings, settings.topic("results")) as reader:
            newest = reader.newest_by_key()

    Nothing is committed, so any number of readers may look at once and none disturbs a worker.

    Args:
        settings: brokers, credentials and their kind.
        topic: full name of the topic.
        stall_timeout_ms: how long reading may go on without a record before the broker is given up.

    Raises:
        ConfigError: the broker has no such topic.
        DependencyError: no broker answered, or reading stalled.
    """

    def __init__(self, settings: Settings, topic: str, *, stall_timeout_ms: int = STALL_TIMEOUT_MS) -> None:
        self._settings = settings
        self._topic = topic
        self._stall_timeout_ms = stall_timeout_ms
        self._partitions: list[TopicPartition] = []
        self._consumer: Any = None

    def __enter__(self) -> Self:
        self._consumer = open_consumer(self._settings)
        try:
            self._assign()
            self._require_topic()
        except KafkaError as error:
            self._close()
            raise self._failure(error) from error
        except ConfigError:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def backlog(self) -> Iterator[TopicRecord]:
        """Give every record up to the end offsets of this moment, in offset order within a partition."""
        try:
            yield from self._until(self._spans())
        except KafkaError as error:
            raise self._failure(error) from error

    def newest_by_key(
        self, *, keyless: Callable[[TopicRecord], None] | None = None
    ) -> dict[bytes, TopicRecord]:
        """Return the newest record of each key; a key whose newest value is null is left out.

        Args:
            keyless: told of each record that has no key, which is left out too.
        """
        newest: dict[bytes, TopicRecord] = {}
        for record in self.backlog():
            if record.key is None:
                if keyless is not None:
                    keyless(record)
            elif record.value is None:
                newest.pop(record.key, None)
            else:
                newest[record.key] = record
        return newest

    def follow(self) -> Iterator[TopicRecord]:
        """Give records from where reading stands, forever."""
        try:
            while True:
                if not self._partitions:
                    self._await_topic()
                yield from self._poll()
        except KafkaError as error:
            raise self._failure(error) from error

    def _assign(self) -> None:
        numbers = self._consumer.partitions_for_topic(self._topic)
        self._partitions = [TopicPartition(self._topic, number) for number in sorted(numbers)]
        if self._partitions:
            self._consumer.assign(self._partitions)
            self._consumer.seek_to_beginning(*self._partitions)

    def _require_topic(self) -> None:
        # On the embedded broker a topic appears with its first record.
        if not self._partitions and self._settings.broker != "embedded":
            raise self._settings.missing_topic(self._topic)

    def _await_topic(self) -> None:
        time.sleep(POLL_MS / 1_000)
        self._assign()

    def _spans(self) -> dict[TopicPartition, tuple[int, int]]:
        """Return the first offset and the end offset of each partition."""
        if not self._partitions:
            return {}
        starts = self._consumer.beginning_offsets(self._partitions, timeout_ms=REQUEST_TIMEOUT_MS)
        ends = self._consumer.end_offsets(self._partitions, timeout_ms=REQUEST_TIMEOUT_MS)
        return {partition: (starts[partition], ends[partition]) for partition in self._partitions}

    def _until(self, spans: dict[TopicPartition, tuple[int, int]]) -> Iterator[TopicRecord]:
        deadline = self._deadline()
        unread = {partition: end for partition, (start, end) in spans.items() if start < end}
        while unread:
            for record in self._poll():
                deadline = self._deadline()
                if record.offset < spans[TopicPartition(record.topic, record.partition)][1]:
                    yield record
            unread = {partition: end for partition, end in unread.items() if self._position(partition) < end}
            if unread and time.monotonic() > deadline:
                raise DependencyError(
                    f"no record of {self._topic} came for {self._stall_timeout_ms} ms, "
                    f"and {len(unread)} partitions are not read to their end"
                )
        for partition, (_, end) in spans.items():
            # What came after the ends were taken is left for `follow`.
            self._consumer.seek(partition, end)

    def _deadline(self) -> float:
        return time.monotonic() + self._stall_timeout_ms / 1_000

    def _position(self, partition: TopicPartition) -> int:
        return int(self._consumer.position(partition, timeout_ms=REQUEST_TIMEOUT_MS))

    def _poll(self) -> Iterator[TopicRecord]:
        for records in self._consumer.poll(POLL_MS).values():
            for record in records:
                yield TopicRecord.of(record)

    def _failure(self, error: KafkaError) -> DependencyError:
        return DependencyError(f"reading {self._topic} at {self._settings.bootstrap} failed: {error}")

    def _close(self) -> None:
        self._consumer.close(autocommit=False)


def open_consumer(settings: Settings, **options: Any) -> Any:
    """Return a KafkaConsumer without a group, that reads any record; where it begins is up to the caller.

    No question to a broker is waited for without a deadline; the one for topics ends in a KafkaTimeoutError.

    Args:
        settings: brokers, credentials and their kind.
        options: further ones of KafkaConsumer, which win.

    Raises:
        ConfigError: the broker and these settings will never trust each other.
        DependencyError: no broker answered.
    """
    check_link(settings)
    try:
        consumer = _PatientConsumer(
            **{
                **settings.kafka_python_options(),
                "group_id": None,
                "enable_auto_commit": False,
                "auto_offset_reset": "earliest",
                "allow_auto_create_topics": False,
                "bootstrap_timeout_ms": CONNECT_TIMEOUT_MS,
                "request_timeout_ms": REQUEST_TIMEOUT_MS,
                **options,
            }
        )
    except (KafkaError, OSError) as error:
        raise DependencyError(
            f"no broker answered at {settings.bootstrap} within {CONNECT_TIMEOUT_MS} ms: {error}{hint(settings)}"
        ) from error
    # Of this consumer alone: others of the process are none of our business.
    consumer._fetcher.PartitionRecords = _ForgivingPartition  # noqa: SLF001 (there is no other way in)
    return consumer


class _PatientConsumer(KafkaConsumer):  # type: ignore[misc] # (kafka-python has no types)
    """A KafkaConsumer whose patience has an end, too, where it asks for the topics of a broker that has gone."""

    def _fetch_all_topic_metadata(self) -> None:
        cluster = self._cluster
        if cluster.metadata_refresh_in_progress:
            # It may not ask for all topics.
            self._await_metadata()
        before = cluster.need_all_topic_metadata
        cluster.need_all_topic_metadata = True
        try:
            self._await_metadata()
        finally:
            cluster.need_all_topic_metadata = before

    def _await_metadata(self) -> None:
        try:
            self._net.run(self._manager.wait_for, self._cluster.request_update(), TOPICS_TIMEOUT_MS)
        except KafkaTimeoutError as error:
            raise KafkaTimeoutError(
                f"no broker said within {TOPICS_TIMEOUT_MS} ms which topics there are"
            ) from error


class _ForgivingBytes(bytearray):
    """Bytes whose text may be anything: what is not UTF-8 becomes U+FFFD, as the worker reads it."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _ForgivingBytes(found) if isinstance(at, slice) else found

    def decode(self, *_: object, **__: object) -> str:
        return super().decode("utf-8", "replace")


class _ForgivingBatch(DefaultRecordBatch):  # type: ignore[misc] # (kafka-python has no types)
    """kafka-python's record batch, reading header names forgivingly from the first one that is not UTF-8."""

    __slots__ = ()

    _buffer: Any

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except CorruptRecordError as error:
            # The names are the only text of a record; every other damage stays one.
            if not isinstance(error.__context__, UnicodeDecodeError):
                raise
        self._buffer = _ForgivingBytes(self._buffer)
        return super().__next__()


class _ForgivingRecords:
    """The batches of one fetched partition, each forgiving."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def next_batch(self) -> Any:
        """Return the next batch, None after the last."""
        batch = self._stock.next_batch()
        # Batches of the older formats have no headers.
        return _ForgivingBatch(batch._buffer) if isinstance(batch, DefaultRecordBatch) else batch  # noqa: SLF001


class _ForgivingPartition(Fetcher.PartitionRecords):  # type: ignore[misc]
    """kafka-python's reader of one fetched partition, for which no header name is a reason to stop."""

    def _unpack_records(self, tp: Any, records: Any, *deserializers: Any) -> Any:
        return super()._unpack_records(tp, _ForgivingRecords(records), *deserializers)
