"""Reads what the service says while it says it, with the time at which it was seen."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from kafka import TopicPartition
from kafka.errors import KafkaError

from stream_xp.adapters.topic_reader import open_consumer
from stream_xp.errors import DependencyError

if TYPE_CHECKING:
    from types import TracebackType

    from stream_xp.settings import Settings

RESULTS: Final = "results"
SIGNALS: Final = "signals"
FETCH_WAIT_MS: Final = 20


class Seen(NamedTuple):
    """A record as a reader at the end of its topic saw it.

    Attributes:
        topic: without the prefix.
        seen_s: `time.monotonic` after reading it.
        place: topic, partition and offset, for messages.
    """

    topic: str
    value: bytes
    seen_s: float
    place: str = ""


class Tail:
    """A reader of results and signals that keeps up with them; the topics must exist.

    Raises:
        DependencyError: no broker answered.

    """

    def __init__(self, settings: Settings) -> None:
        self._names = {settings.topic(name): name for name in (RESULTS, SIGNALS)}
        self._settings = settings
        self._consumer: Any = None

    def __enter__(self) -> Self:
        # The embedded broker answers a fetch that found nothing only when this is over, not when something has come.
        self._consumer = open_consumer(self._settings, fetch_max_wait_ms=FETCH_WAIT_MS)
        try:
            partitions = [
                TopicPartition(name, number)
                for name in self._names
                for number in sorted(self._consumer.partitions_for_topic(name))
            ]
            self._consumer.assign(partitions)
            self._consumer.seek_to_beginning(*partitions)
        except (KafkaError, OSError) as error:
            raise self._failure(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close(autocommit=False)

    def poll(self, timeout_ms: int) -> list[Seen]:
        """Return what is new, as soon as something is, at the latest after the timeout."""
        try:
            polled = self._consumer.poll(timeout_ms)
        except KafkaError as error:
            raise self._failure(error) from error
        seen_s = time.monotonic()
        return [
            Seen(
                self._names[at.topic],
                record.value,
                seen_s,
                f"{at.topic} partition {at.partition} offset {record.offset}",
            )
            for at, records in polled.items()
            for record in records
            if record.value is not None
        ]

    def _failure(self, error: BaseException) -> DependencyError:
        return DependencyError(f"reading from {self._settings.bootstrap} failed: {error!r}")
