"""Follows topics in a thread of its own: everything from their beginning, then what comes, without an end."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final, Self

from kafka import TopicPartition

from stream_xp.adapters.topic_reader import TopicRecord, open_consumer
from stream_xp.services.sessions import Sessions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from stream_xp.adapters.clock import Clock
    from stream_xp.settings import Settings

log = logging.getLogger(__name__)

POLL_MS: Final = 100
FETCH_WAIT_MS: Final = 50
CHECK_S: Final = 1.0
"""How often the ends of the topics are asked for: an answer is the sign that the broker is there."""
ASK_TIMEOUT_MS: Final = 5_000
JOIN_S: Final = 15.0


class Follower:
    """Reads topics and hands each record over, until it is left.

    ::

        with Follower(settings, ("results", "signals"), view.take, clock=clock) as follower:
            ...

    When a broker does not answer, it is asked again for ever, from where reading stood; `read_ms` then stands still.

    Args:
        settings: brokers and prefix.
        names: topics, without the prefix.
        take: told of each record, with the name of its topic; called in the thread of the follower.
        clock: for `read_ms`.

    Attributes:
        read_ms: wall time at which the topics were last asked for their ends, if all of them have been read to these;
            None before the first time.
        progress_ms: when something was read last, or the topics were at their end; the start before that.
        records: how many were handed over.
    """

    def __init__(
        self,
        settings: Settings,
        names: Sequence[str],
        take: Callable[[str, TopicRecord], None],
        *,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._names = {settings.topic(name): name for name in names}
        self._take = take
        self._clock = clock
        self._positions: dict[TopicPartition, int] = {}
        self._sessions = Sessions(
            "stream-xp-follower",
            connect=lambda: open_consumer(settings, fetch_max_wait_ms=FETCH_WAIT_MS),
            work=self._follow,
            interrupted=lambda error: log.warning("reading the topics failed, it is tried again: %s", error),
            ended=lambda error: log.error("reading the topics ended: %s", error),
        )
        self._stopped = self._sessions.stopped
        self.read_ms: int | None = None
        self.progress_ms = clock.now_ms()
        self.records = 0

    def __enter__(self) -> Self:
        self._sessions.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sessions.stop()
        self._sessions.join(JOIN_S)

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread; None while it goes on."""
        return self._sessions.failure

    def wait(self, timeout_s: float) -> bool:
        """Wait until the topics have been read to their end once; whether they were.

        Raises:
            StreamXpError: the thread ended; see `failure`.
        """
        deadline_s = time.monotonic() + timeout_s
        while self.read_ms is None and self.failure is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        if self.failure is not None:
            raise self.failure
        return self.read_ms is not None

    def _follow(self, consumer: Any) -> None:
        partitions = self._assign(consumer)
        asked: tuple[int, dict[TopicPartition, int]] | None = None
        next_s = 0.0
        while not self._stopped.is_set():
            if partitions:
                self._hand_over(consumer.poll(POLL_MS))
            else:
                self._stopped.wait(POLL_MS / 1000)
            if asked is None and time.monotonic() >= next_s:
                next_s = time.monotonic() + CHECK_S
                if len({partition.topic for partition in partitions}) < len(self._names):
                    partitions = self._assign(consumer)
                asked = self._ask(consumer, partitions)
            # What was asked for is kept until it is reached, or a busy topic would never be read to its end.
            if asked is not None and _reached(consumer, asked[1]):
                self.read_ms = self.progress_ms = asked[0]
                asked = None

    def _ask(self, consumer: Any, partitions: list[TopicPartition]) -> tuple[int, dict[TopicPartition, int]]:
        now_ms = self._clock.now_ms()
        ends = consumer.end_offsets(partitions, timeout_ms=ASK_TIMEOUT_MS) if partitions else {}
        return now_ms, ends

    def _assign(self, consumer: Any) -> list[TopicPartition]:
        partitions = []
        for topic in self._names:
            numbers = sorted(consumer.partitions_for_topic(topic) or ())
            # On the embedded broker a topic appears with its first record.
            if not numbers and self._settings.broker != "embedded":
                raise self._settings.missing_topic(topic)
            partitions += [TopicPartition(topic, number) for number in numbers]
        if partitions:
            consumer.assign(partitions)
            for partition in partitions:
                if partition in self._positions:
                    consumer.seek(partition, self._positions[partition])
                else:
                    consumer.seek_to_beginning(partition)
        return partitions

    def _hand_over(self, batches: dict[TopicPartition, list[Any]]) -> None:
        if batches:
            self.progress_ms = self._clock.now_ms()
        for partition, records in batches.items():
            for record in records:
                self._take(self._names[partition.topic], TopicRecord.of(record))
                self._positions[partition] = record.offset + 1
                self.records += 1


def _reached(consumer: Any, ends: dict[TopicPartition, int]) -> bool:
    # The consumer's own position: it also goes past what compaction has left no record of.
    return all(consumer.position(one, timeout_ms=ASK_TIMEOUT_MS) >= end for one, end in ends.items())
