"""Reads spans of topic partitions with kafka-python: no consumer group, no commit, always with an end."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kafka import TopicPartition
from kafka.errors import KafkaError

from stream_xp.adapters.topic_reader import REQUEST_TIMEOUT_MS, open_consumer
from stream_xp.errors import DependencyError
from stream_xp.services.oracle.recompute import LoggedRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stream_xp.settings import Settings

STALL_TIMEOUT_S: Final = 30.0
TOPIC_TIMEOUT_S: Final = 5.0
"""A broker that answers knows its topics at once, but for one that is being made."""
_POLL_MS: Final = 500
_POLL_RECORDS: Final = 5_000


class LogSpanError(DependencyError):
    """The broker does not hold the records that the statistics were computed from."""


class LogTruncatedError(LogSpanError):
    """The broker no longer holds records that the statistics were computed from."""


class LogShortError(LogSpanError):
    """The broker holds fewer records than the statistics were computed from."""


class ReadStep(NamedTuple):
    """How far the reading of one topic partition has come, for a progress display."""

    topic: str
    partition: int
    done: int
    total: int


class LogReader:
    """Reads topic partitions from the log; each wait ends in a DependencyError when the broker stalls."""

    def __init__(
        self,
        consumer: Any,
        *,
        progress: Callable[[ReadStep], None] | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._consumer = consumer
        self._progress = progress or (lambda _: None)
        self._stall_timeout_s = stall_timeout_s

    def partitions(self, topic: str) -> list[int]:
        """Return the partitions of a topic.

        Raises:
            DependencyError: the broker does not know the topic.

        """
        deadline = time.monotonic() + min(TOPIC_TIMEOUT_S, self._stall_timeout_s)
        while not (found := self._consumer.partitions_for_topic(topic)):
            if time.monotonic() > deadline:
                raise DependencyError(f"the broker has no topic {topic}")
            time.sleep(0.2)
        return sorted(found)

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """Return the offset of the first record held and the offset after the last one."""
        at = TopicPartition(topic, partition)
        begin = self._consumer.beginning_offsets([at], timeout_ms=REQUEST_TIMEOUT_MS)[at]
        end = self._consumer.end_offsets([at], timeout_ms=REQUEST_TIMEOUT_MS)[at]
        return int(begin), int(end)

    def read_all(self, topic: str, partition: int) -> list[LoggedRecord]:
        """Return every record that the partition holds now."""
        begin, end = self.bounds(topic, partition)
        return self._read(topic, partition, begin, end)

    def read_after(self, topic: str, partition: int, *, last: int, most: int) -> list[LoggedRecord]:
        """Return up to about `most` records that follow offset `last`."""
        begin, end = self.bounds(topic, partition)
        return self._read(topic, partition, max(begin, last + 1), min(end, last + 1 + most))

    def read_span(self, topic: str, partition: int, *, first: int, last: int) -> list[LoggedRecord]:
        """Return the records from offset `first` to offset `last`, both inclusive.

        Raises:
            LogTruncatedError: the partition begins after `first`.
            LogShortError: the partition ends before `last`.
            DependencyError: the broker stalls.

        """
        begin, end = self.bounds(topic, partition)
        if begin > first:
            raise LogTruncatedError(
                f"{topic}[{partition}] begins at offset {begin}, but the statistics were computed from "
                f"offset {first} on: retention has removed these records, so they cannot be checked any more"
            )
        if end <= last:
            raise LogShortError(
                f"{topic}[{partition}] ends before offset {end}, but the statistics were computed up to "
                f"offset {last}: the broker has lost records, or this is another broker's topic"
            )
        return self._read(topic, partition, first, last + 1)

    def _read(self, topic: str, partition: int, begin: int, end: int) -> list[LoggedRecord]:
        at = TopicPartition(topic, partition)
        records: list[LoggedRecord] = []
        if begin >= end:
            return records
        self._consumer.assign([at])
        self._consumer.seek(at, begin)
        position, deadline = begin, time.monotonic() + self._stall_timeout_s
        while position < end:
            polled = self._consumer.poll(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS).get(at, [])
            records += [
                LoggedRecord(one.offset, one.timestamp, one.key, one.value, one.headers or ())
                for one in polled
                if one.offset < end
            ]
            # The position also passes offsets that hold no record: compacted ones, transaction markers.
            reached = self._consumer.position(at, timeout_ms=REQUEST_TIMEOUT_MS)
            if reached > position:
                position, deadline = reached, time.monotonic() + self._stall_timeout_s
                self._progress(ReadStep(topic, partition, min(position, end) - begin, end - begin))
            elif time.monotonic() > deadline:
                raise DependencyError(
                    f"{topic}[{partition}]: no record came in {self._stall_timeout_s:.0f} s, "
                    f"stuck at offset {position} of {end}"
                )
        return records


@contextmanager
def open_reader(
    settings: Settings,
    *,
    progress: Callable[[ReadStep], None] | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> Iterator[LogReader]:
    """Open a reader; what Kafka raises inside the block becomes a DependencyError."""
    # Only `seek` moves this consumer: a jump over removed records must be an error.
    consumer = open_consumer(settings, isolation_level="read_uncommitted", auto_offset_reset="none")
    try:
        yield LogReader(consumer, progress=progress, stall_timeout_s=stall_timeout_s)
    except KafkaError as error:
        raise DependencyError(f"reading from {settings.bootstrap} failed: {error!r}") from error
    finally:
        consumer.close()
