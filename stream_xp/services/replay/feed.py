"""Sends rows to Kafka with the times of the file, and watches how far the service has come with them."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

import msgspec
from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from stream_xp.adapters.topic_reader import open_consumer
from stream_xp.domain.decision import Result
from stream_xp.domain.statistics import PartitionStatistics, merge
from stream_xp.errors import DependencyError
from stream_xp.link import check_link
from stream_xp.services.passed_over import PassedOver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from stream_xp.services.replay.rows import Row
    from stream_xp.settings import Settings

SOURCE: Final = "replay"
EXPOSURES: Final = "exposures"
REWARDS: Final = "rewards"
CONNECT_TIMEOUT_MS: Final = 10_000
REQUEST_TIMEOUT_MS: Final = 20_000
DELIVERY_TIMEOUT_S: Final = 60.0
STALL_TIMEOUT_S: Final = 60.0
MAX_ID: Final = 200
_LINGER_MS: Final = 20
_BATCH_BYTES: Final = 131_072
_POLL_MS: Final = 50

Record = TypeVar("Record", Result, PartitionStatistics)


class Event(NamedTuple):
    """One record to send; `time_ms` is both its event time and its Kafka timestamp."""

    topic: str
    time_ms: int
    key: bytes
    value: bytes


def events_of(row: Row, experiment: str) -> Iterator[Event]:
    """Give the exposure of a row, then its rewards.

    Ids follow from unit and time, so that a row that stands twice in the file counts once and a unit that
    comes back later does not look like a copy.
    """
    identity = f"{row.unit}@{row.time_ms}"
    exposure = {
        "id": _short(identity),
        "source": SOURCE,
        "time": row.time_ms,
        "experiment": experiment,
        "unit": row.unit,
        "arm": row.arm,
        **({"segments": dict(row.segments)} if row.segments else {}),
    }
    key = row.unit.encode()
    yield Event(EXPOSURES, row.time_ms, key, msgspec.json.encode(exposure))
    for metric, value in row.rewards:
        reward = {
            "id": _short(f"{identity}:{metric}"),
            "source": SOURCE,
            "time": row.time_ms,
            "unit": row.unit,
            "metric": metric,
            "value": value,
        }
        yield Event(REWARDS, row.time_ms, key, msgspec.json.encode(reward))


def _short(identity: str) -> str:
    return identity if len(identity) <= MAX_ID else hashlib.sha256(identity.encode()).hexdigest()


class Feed:
    """A producer that gives its records their own timestamps and knows where they came to stand."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: Any = None
        self._unacknowledged: list[tuple[str, Any]] = []
        self.newest: dict[tuple[str, int], int] = {}
        """Newest offset written, by topic (without prefix) and partition."""

    def __enter__(self) -> Self:
        check_link(self._settings)
        options = self._settings.kafka_python_options()
        try:
            self._producer = KafkaProducer(
                **options,
                acks="all",
                linger_ms=_LINGER_MS,
                batch_size=_BATCH_BYTES,
                allow_auto_create_topics=self._settings.broker == "embedded",
                bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
                max_block_ms=REQUEST_TIMEOUT_MS,
                request_timeout_ms=REQUEST_TIMEOUT_MS,
            )
        except (KafkaError, OSError) as error:
            raise DependencyError(f"no broker answered at {self._settings.bootstrap}: {error!r}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._producer.close(timeout=0 if error else DELIVERY_TIMEOUT_S)

    def partitions(self, topic: str) -> int:
        """Return how many partitions a topic (full name) has; the embedded broker makes it now."""
        try:
            found: set[int] | None = self._producer.partitions_for(topic)
        except KafkaError as error:
            raise self._failure(error) from error
        if not found:
            raise DependencyError(f"the broker has no topic {topic}")
        return len(found)

    def send(self, event: Event) -> None:
        """Queue a record."""
        try:
            future = self._producer.send(
                self._settings.topic(event.topic),
                key=event.key,
                value=event.value,
                timestamp_ms=event.time_ms,
            )
        except KafkaError as error:
            raise self._failure(error) from error
        self._unacknowledged.append((event.topic, future))

    def flush(self) -> None:
        """Wait until the broker has every queued record.

        Raises:
            DependencyError: a record was not acknowledged in time.

        """
        try:
            self._producer.flush(DELIVERY_TIMEOUT_S)
            for topic, future in self._unacknowledged:
                written = future.get(DELIVERY_TIMEOUT_S)
                at = (topic, written.partition)
                self.newest[at] = max(written.offset, self.newest.get(at, -1))
        except KafkaError as error:
            raise self._failure(error) from error
        self._unacknowledged.clear()

    def _failure(self, error: KafkaError) -> DependencyError:
        return DependencyError(f"writing to {self._settings.bootstrap} failed: {error!r}")


class Watch:
    """Follows ``xp.stats`` and ``xp.results`` of one experiment from their beginning.

    A record that is none is passed over; the log says so.

    Args:
        settings: brokers and prefix; both topics must exist.
        experiment: key of the experiment.
        still_running: called while waiting; raises if the service has failed.
        stall_timeout_s: how long nothing new may come before the wait is given up.

    """

    def __init__(
        self,
        settings: Settings,
        experiment: str,
        *,
        still_running: Callable[[], None],
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._settings = settings
        self._experiment = experiment
        self._still_running = still_running
        self._stall_timeout_s = stall_timeout_s
        self._consumer: Any = None
        self._passed_over = PassedOver()
        self._parts: dict[int, PartitionStatistics] = {}
        self.result: Result | None = None

    def __enter__(self) -> Self:
        self._consumer = open_consumer(self._settings)
        try:
            topics = [self._settings.topic("stats"), self._settings.topic("results")]
            partitions = [
                TopicPartition(topic, partition)
                for topic in topics
                for partition in self._consumer.partitions_for_topic(topic)
            ]
            self._consumer.assign(partitions)
            self._consumer.seek_to_beginning(*partitions)
        except (KafkaError, OSError) as error:
            raise DependencyError(f"no broker answered at {self._settings.bootstrap}: {error!r}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close()
        self._passed_over.tell()

    @property
    def parts(self) -> list[PartitionStatistics]:
        """The newest statistics of each source partition."""
        return [self._parts[partition] for partition in sorted(self._parts)]

    def until_applied(self, newest: dict[tuple[str, int], int]) -> None:
        """Wait until the published statistics cover these offsets."""
        self._wait(lambda: self._covers(newest), "read what was sent")

    def until_settled(self, newest: dict[tuple[str, int], int], watermark_ms: int) -> Result:
        """Wait until a result stands on all these offsets with watermarks at or past `watermark_ms`."""
        self._wait(lambda: self._settled(newest, watermark_ms), "published a result on all records")
        if self.result is None:
            raise DependencyError("the service published no result")
        return self.result

    def _covers(self, newest: dict[tuple[str, int], int]) -> bool:
        return all(self._applied(topic, partition) >= offset for (topic, partition), offset in newest.items())

    def _applied(self, topic: str, partition: int) -> int:
        part = self._parts.get(partition)
        if part is None:
            return -1
        progress = part.exposures if topic == EXPOSURES else part.rewards
        return -1 if progress.applied_offset is None else progress.applied_offset

    def _settled(self, newest: dict[tuple[str, int], int], watermark_ms: int) -> bool:
        touched = {partition for _, partition in newest}
        return (
            self._covers(newest)
            and all((self._parts[partition].watermark_ms or 0) >= watermark_ms for partition in touched)
            and self.result is not None
            and self.result.statistics_hash == merge(one.statistics for one in self.parts).digest()
            and all(self._in_result(partition) for partition in self._parts)
        )

    def _in_result(self, partition: int) -> bool:
        """Whether the newest result was computed from the newest statistics of a partition."""
        part = self._parts[partition]
        used = self.result.offsets.get(str(partition)) if self.result is not None else None
        return used is not None and (used.exposures, used.rewards, used.watermark_ms) == (
            part.exposures.applied_offset,
            part.rewards.applied_offset,
            part.watermark_ms,
        )

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._stall_timeout_s
        while not done():
            self._still_running()
            if self._poll():
                deadline = time.monotonic() + self._stall_timeout_s
            elif time.monotonic() > deadline:
                seconds = f"{self._stall_timeout_s:.0f} s"
                raise DependencyError(f"the service has not {what}: nothing new came in {seconds}")

    def _poll(self) -> bool:
        """Take in what is new; whether it changed anything."""
        try:
            polled = self._consumer.poll(_POLL_MS)
        except KafkaError as error:
            raise DependencyError(f"reading from {self._settings.bootstrap} failed: {error!r}") from error
        changed = False
        for at, records in polled.items():
            take = self._take_result if at.topic == self._settings.topic("results") else self._take_part
            for record in records:
                changed |= take(record)
        return changed

    def _read(self, record: Any, kind: type[Record]) -> Record | None:
        if not record.value:
            return None
        place = f"{record.topic} partition {record.partition} offset {record.offset}"
        return self._passed_over.decoded(record.value, kind, topic=record.topic, place=place)

    def _take_part(self, record: Any) -> bool:
        part = self._read(record, PartitionStatistics)
        if part is None or part.experiment != self._experiment:
            return False
        known = self._parts.get(part.partition)
        if known is not None and not part.newer_than(known):
            return False
        self._parts[part.partition] = part
        return True

    def _take_result(self, record: Any) -> bool:
        result = self._read(record, Result)
        if result is None or result.experiment != self._experiment:
            return False
        self.result = result
        return True


def batches(rows: Sequence[Row], sizes: Iterator[int]) -> Iterator[Sequence[Row]]:
    """Cut rows into batches of the given sizes."""
    begin = 0
    while begin < len(rows):
        end = begin + next(sizes)
        yield rows[begin:end]
        begin = end
