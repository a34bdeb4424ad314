"""Reads a topic from its beginning: up to where it ends now, then on as it grows, if wanted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from stream_xp.errors import ConfigError, DependencyError
from stream_xp.link import check_link, hint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from stream_xp.settings import Settings

CONNECT_TIMEOUT_MS: Final = 10_000
REQUEST_TIMEOUT_MS: Final = 20_000
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
        self._consumer = _connect(self._settings)
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

    def newest_by_key(self) -> dict[bytes, TopicRecord]:
        """Return the newest record of each key; a key whose newest value is null is left out."""
        newest: dict[bytes, TopicRecord] = {}
        for record in self.backlog():
            if record.key is None:
                continue
            if record.value is None:
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
            raise ConfigError(
                f"topic {self._topic} does not exist at {self._settings.bootstrap}{self._settings.account_note()}; "
                "`stream-xp topics create` makes it, --prefix chooses another"
            )

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
                yield TopicRecord(
                    topic=record.topic,
                    partition=record.partition,
                    offset=record.offset,
                    log_time_ms=record.timestamp,
                    key=record.key,
                    value=record.value,
                    headers=tuple(record.headers or ()),
                )

    def _failure(self, error: KafkaError) -> DependencyError:
        return DependencyError(f"reading {self._topic} at {self._settings.bootstrap} failed: {error}")

    def _close(self) -> None:
        self._consumer.close(autocommit=False)


def _connect(settings: Settings) -> Any:
    check_link(settings)
    try:
        return KafkaConsumer(
            **settings.kafka_python_options(),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
    except (KafkaError, OSError) as error:
        raise DependencyError(
            f"no broker answered at {settings.bootstrap} within {CONNECT_TIMEOUT_MS} ms: {error}{hint(settings)}"
        ) from error
