"""Follows the signals for one target, in a thread and a consumer group of its own."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog
from kafka import ConsumerRebalanceListener, TopicPartition
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.structs import OffsetAndMetadata

from stream_xp.adapters.topic_reader import TopicRecord, open_consumer
from stream_xp.services.evidence import Believed
from stream_xp.services.notify.delivery import Delivery, Fate
from stream_xp.services.notify.message import message
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.sessions import Sessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream_xp.adapters.clock import Clock
    from stream_xp.adapters.prometheus import Deliveries
    from stream_xp.services.notify.delivery import Posts
    from stream_xp.services.notify.targets import Target
    from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

POLL_MS: Final = 200
JOIN_POLL_MS: Final = 1_000
MAX_JOIN_POLL_MS: Final = 8_000
"""The first and the longest poll while the group is joined."""
ASK_TIMEOUT_MS: Final = 10_000
SESSION_TIMEOUT_MS: Final = 30_000
"""Longer than any attempt, in which no heartbeat may be sent."""
MAX_RECORDS: Final = 100
MAX_FETCH_BYTES: Final = 8 * 1024 * 1024


class _Assigned(ConsumerRebalanceListener):  # type: ignore[misc] # (kafka-python has no types)
    """Notes that partitions were given out anew; what follows is done outside of the call.

    It also says how long to poll. kafka-python (3.0.12) throws an answer to its join away that comes between two
    polls, and joins again, so short polls on a slow machine need not ever be let in. Each one that ends without
    having been is therefore followed by a longer one.
    """

    def __init__(self) -> None:
        self.anew = False
        self._join_poll_ms: int | None = JOIN_POLL_MS

    def on_partitions_revoked(self, revoked: Any) -> None:  # noqa: ARG002 (kafka-python's signature)
        """Wait to be let in again; what is not committed is the next owner's."""
        self._join_poll_ms = JOIN_POLL_MS

    def on_partitions_assigned(self, assigned: Any) -> None:  # noqa: ARG002 (kafka-python's signature)
        """Note it."""
        self.anew = True
        self._join_poll_ms = None

    def next_poll_ms(self) -> int:
        """How long the poll that follows may take."""
        if self._join_poll_ms is None:
            return POLL_MS
        this_ms = self._join_poll_ms
        self._join_poll_ms = min(2 * this_ms, MAX_JOIN_POLL_MS)
        return this_ms


class _Partition(NamedTuple):
    """One partition that this process owns.

    Attributes:
        believed: tells which records count; it has been told of all of them from the first one on.
        owed_from: offset of the first record that was not dealt with yet; None for a group that never was there.
        end: offset of the end when it was assigned.
    """

    believed: Believed
    owed_from: int | None
    end: int

    def owes(self, record: TopicRecord, *, began_ms: int) -> bool:
        """Whether a record is to be dealt with."""
        return record.log_time_ms >= began_ms if self.owed_from is None else record.offset >= self.owed_from


class Courier:
    """Sends one target what it wants to know, each message after the one before.

    At least once: the offset of a signal is committed after the target has taken it, or after it was given up. Whoever
    gets a partition reads it from its beginning without sending, as far as its group has committed: only so it knows
    which decisions count (`services.evidence`). A group that never was there is sent what is appended from now on.

    Args:
        settings: brokers, prefix and group.
        target: whom it sends to.
        sender: posts to the target.
        clock: wall clock.
        chance: gives numbers from 0 to 1, for the jitter.
        deliveries: told what became of messages.

    Attributes:
        moved_ms: wall time at which it last went round.
    """

    def __init__(
        self,
        settings: Settings,
        target: Target,
        *,
        sender: Posts,
        clock: Clock,
        chance: Callable[[], float],
        deliveries: Deliveries,
    ) -> None:
        self._settings = settings
        self._target = target
        self._sender = sender
        self._clock = clock
        self._chance = chance
        self._deliveries = deliveries
        self._topic = settings.topic("signals")
        self._passed_over = PassedOver()
        self._began_ms = clock.now_ms()
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._records: deque[TopicRecord] = deque()
        self._delivery: Delivery | None = None
        self._sessions = Sessions(
            f"stream-xp-notify-{target.name}",
            connect=self._connect,
            work=self._follow,
            interrupted=self._interrupted,
            ended=self._ended,
        )
        self._stopped = self._sessions.stopped
        self.moved_ms = self._began_ms

    @property
    def group_id(self) -> str:
        """The consumer group: replicas of a target share its partitions, and other targets do not wait for it."""
        return f"{self._settings.group_id}-notify-{self._target.name}"

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread; None while it goes on."""
        return self._sessions.failure

    def start(self) -> None:
        """Begin."""
        self._sessions.start()

    def stop(self) -> None:
        """End after the attempt that is under way."""
        self._sessions.stop()

    def join(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._sessions.join(timeout_s)

    def _ended(self, error: BaseException) -> None:
        log.error("notifying ended", target=self._target.name, error=str(error))

    def _interrupted(self, error: Exception) -> None:
        log.warning("reading signals failed, it is tried again", target=self._target.name, error=str(error))

    def _connect(self) -> Any:
        self._await_topic()
        return open_consumer(
            self._settings,
            group_id=self.group_id,
            session_timeout_ms=SESSION_TIMEOUT_MS,
            heartbeat_interval_ms=SESSION_TIMEOUT_MS // 6,
            partition_assignment_strategy=[RangePartitionAssignor],
            max_poll_records=MAX_RECORDS,
            fetch_max_bytes=MAX_FETCH_BYTES,
            max_partition_fetch_bytes=MAX_FETCH_BYTES // 4,
        )

    def _await_topic(self) -> None:
        """Wait for the topic, with a consumer of its own.

        Who joins a group before it knows of the topic's partitions has to join again, for which the embedded broker
        takes a session timeout.
        """
        consumer = open_consumer(self._settings)
        try:
            while not consumer.partitions_for_topic(self._topic) and not self._stopped.wait(POLL_MS / 1000):
                # On the embedded broker a topic appears with its first record.
                if self._settings.broker != "embedded":
                    raise self._settings.missing_topic(self._topic)
                self.moved_ms = self._clock.now_ms()
        finally:
            consumer.close(autocommit=False)

    def _follow(self, consumer: Any) -> None:
        assigned = _Assigned()
        consumer.subscribe([self._topic], listener=assigned)
        self._forget()
        while not self._stopped.is_set():
            self._poll(consumer, assigned.next_poll_ms())
            if assigned.anew:
                assigned.anew = False
                self._take_over(consumer)
            self._work(consumer)
            self.moved_ms = self._clock.now_ms()

    def _forget(self) -> None:
        self._records.clear()
        self._delivery = None
        self._partitions = {}
        self._committed = {}

    def _poll(self, consumer: Any, timeout_ms: int) -> None:
        """Fetch more where there is nothing left to do; the group is kept in any case."""
        held = consumer.assignment() if self._records else ()
        consumer.pause(*held)
        for records in consumer.poll(timeout_ms).values():
            self._records.extend(TopicRecord.of(record) for record in records)
        if held:
            consumer.resume(*(set(held) & set(consumer.assignment())))

    def _take_over(self, consumer: Any) -> None:
        """Begin anew with what was assigned: somebody else may have had it in between."""
        self._forget()
        assigned = sorted(consumer.assignment())
        ends = consumer.end_offsets(assigned, timeout_ms=ASK_TIMEOUT_MS) if assigned else {}
        for partition in assigned:
            committed = consumer.committed(partition, timeout_ms=ASK_TIMEOUT_MS)
            self._partitions[partition] = _Partition(Believed(self._passed_over), committed, ends[partition])
            consumer.seek_to_beginning(partition)
        log.info(
            "partitions assigned",
            target=self._target.name,
            partitions=[partition.partition for partition in assigned],
        )

    def _work(self, consumer: Any) -> None:
        """Deal with what was fetched, as far as nothing has to wait."""
        while self._records and not self._stopped.is_set():
            record = self._records[0]
            if not self._dealt_with(record):
                return
            sent, self._delivery = self._delivery is not None, None
            self._records.popleft()
            last = not self._records or self._records[0].partition != record.partition
            if (last or sent) and self._is_owed(record):
                self._commit(consumer, TopicPartition(record.topic, record.partition), record.offset + 1)
        if not self._records:
            self._commit_starts(consumer)

    def _dealt_with(self, record: TopicRecord) -> bool:
        """Whether nothing is left to do for a record: none was wanted, or it was taken or given up."""
        if self._delivery is None:
            self._delivery = self._delivery_of(record)
        if self._delivery is None:
            return True
        if self._clock.now_ms() < self._delivery.due_ms:
            return False
        return self._delivery.attempt() is not Fate.WAITING

    def _delivery_of(self, record: TopicRecord) -> Delivery | None:
        believed = self._partitions[TopicPartition(record.topic, record.partition)].believed
        said = next(believed.of([record], None), None)
        if said is None or not self._is_owed(record) or not self._target.wants(said):
            return None
        return Delivery(
            self._target,
            message(said, self._target.format),
            sender=self._sender,
            clock=self._clock,
            chance=self._chance,
            deliveries=self._deliveries,
        )

    def _is_owed(self, record: TopicRecord) -> bool:
        held = self._partitions[TopicPartition(record.topic, record.partition)]
        return held.owes(record, began_ms=self._began_ms)

    def _commit_starts(self, consumer: Any) -> None:
        """Let a new group have an offset in partitions that had nothing to send: it has been there now.

        Not before the end: an offset in the middle of what was there before would make the rest of it news.
        """
        for partition, held in self._partitions.items():
            if held.owed_from is None and partition not in self._committed:
                position = consumer.position(partition, timeout_ms=ASK_TIMEOUT_MS)
                if position is not None and position >= held.end:
                    self._commit(consumer, partition, position)

    def _commit(self, consumer: Any, partition: TopicPartition, offset: int) -> None:
        """Commit an offset that is further than the last."""
        if offset > self._committed.get(partition, -1):
            consumer.commit({partition: OffsetAndMetadata(offset, "", -1)}, timeout_ms=ASK_TIMEOUT_MS)
            self._committed[partition] = offset
