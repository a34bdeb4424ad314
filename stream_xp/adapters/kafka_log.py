"""Reading and writing of the service's own topics from the worker's event loop, on aiokafka."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Generator, Sequence
from typing import Any, NamedTuple

import aiokafka
from aiokafka.errors import KafkaError

from stream_xp.errors import DependencyError
from stream_xp.settings import Settings

_READ_DEADLINE_S = 60.0
_SEND_DEADLINE_S = 30.0


class LogRecord(NamedTuple):
    """One record of a topic of ours."""

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None


class LogWriter:
    """An idempotent producer with acks=all. A write that is not acknowledged in time is a DependencyError."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: Any = None

    async def start(self) -> None:
        """Connect."""
        self._producer = aiokafka.AIOKafkaProducer(
            **self._settings.aiokafka_options(),
            acks="all",
            enable_idempotence=True,
            linger_ms=2,
            max_request_size=2 * 1024 * 1024,
            # A batch is in flight at a time: pages of a snapshot go several to a batch, not each on its own.
            max_batch_size=1024 * 1024,
            compression_type=None,
        )
        await _started(self._producer, "connect a producer", _SEND_DEADLINE_S)

    async def stop(self) -> None:
        """Wait for what is under way and disconnect."""
        if self._producer is not None:
            await self._producer.stop()

    async def send(
        self, topic: str, *, key: bytes, value: bytes | None, partition: int | None = None
    ) -> Awaitable[Any]:
        """Queue a record; await the result to know that the broker has it."""
        future: Awaitable[Any] = await _reached(
            self._producer.send(topic, value=value, key=key, partition=partition),
            f"queue for {topic}",
            _SEND_DEADLINE_S,
        )
        return future

    async def durable(self, sent: Sequence[Awaitable[Any]], topic: str) -> None:
        """Wait until the broker has every record sent."""
        if sent:
            await _reached(asyncio.gather(*sent), f"write to {topic}", _SEND_DEADLINE_S)

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has."""
        found = await _reached(self._producer.partitions_for(topic), f"look up {topic}", _SEND_DEADLINE_S)
        return len(found)


class Reading:
    """Every record of some partitions of a topic, up to their end when reading begins.

    `await` gives them as one list, `async for` in batches as they come.

    Raises:
        DependencyError: the broker did not answer in time.
    """

    def __init__(self, settings: Settings, topic: str, partitions: Sequence[int]) -> None:
        self._settings = settings
        self._topic = topic
        self._partitions = partitions

    def __await__(self) -> Generator[Any, None, list[LogRecord]]:
        return self._whole().__await__()

    async def __aiter__(self) -> AsyncIterator[list[LogRecord]]:
        topic = self._topic
        async with _consumer(self._settings) as consumer:
            assigned = await _assign(consumer, topic, self._partitions)
            ends = await _reached(
                consumer.end_offsets(assigned), f"look up the end of {topic}", _READ_DEADLINE_S
            )
            starts = await _reached(
                consumer.beginning_offsets(assigned), f"look up the start of {topic}", _READ_DEADLINE_S
            )
            open_ends = {tp: end for tp, end in ends.items() if end > starts[tp]}
            while open_ends:
                yield await _reached(_next_batch(consumer, open_ends), f"read {topic}", _READ_DEADLINE_S)

    async def _whole(self) -> list[LogRecord]:
        return [record async for batch in self for record in batch]


def read_all(settings: Settings, topic: str, partitions: Sequence[int]) -> Reading:
    """Every record of some partitions of a topic, up to their end now: to be awaited, or iterated over."""
    return Reading(settings, topic, partitions)


async def _next_batch(consumer: Any, open_ends: dict[Any, int]) -> list[LogRecord]:
    """The next records of partitions that are not read to their ends; takes those that are from `open_ends`."""
    records: list[LogRecord] = []
    while open_ends and not records:
        for tp, batch in (await consumer.getmany(*open_ends, timeout_ms=200)).items():
            records += [_record(record) for record in batch if record.offset < open_ends[tp]]
        for tp in list(open_ends):
            if await consumer.position(tp) >= open_ends[tp]:
                del open_ends[tp]
    return records


async def log_starts(settings: Settings, topics: Sequence[str], partition: int) -> dict[str, int]:
    """The first offset that the broker still has of one partition of each topic."""
    async with _consumer(settings) as consumer:
        wanted = [aiokafka.TopicPartition(topic, partition) for topic in topics]
        starts = await _reached(
            consumer.beginning_offsets(wanted), "look up the start of the log", _READ_DEADLINE_S
        )
    return {tp.topic: int(start) for tp, start in starts.items()}


class LogTail:
    """Follows all partitions of a topic from their beginning."""

    def __init__(self, settings: Settings, topic: str, partitions: Sequence[int]) -> None:
        self._settings = settings
        self._topic = topic
        self._partitions = partitions
        self._context = contextlib.AsyncExitStack()
        self._consumer: Any = None
        self._assigned: list[Any] = []

    async def start(self) -> None:
        """Connect and go to the beginning."""
        self._consumer = await self._context.enter_async_context(_consumer(self._settings))
        self._assigned = await _assign(self._consumer, self._topic, self._partitions)

    async def stop(self) -> None:
        """Disconnect."""
        await self._context.aclose()

    async def poll(self) -> tuple[list[LogRecord], bool]:
        """What is new, and whether the end was reached."""
        ends = await _reached(
            self._consumer.end_offsets(self._assigned), f"look up the end of {self._topic}", _READ_DEADLINE_S
        )
        return await _reached(self._read(ends), f"read {self._topic}", _READ_DEADLINE_S)  # type: ignore[no-any-return]

    async def _read(self, ends: dict[Any, int]) -> tuple[list[LogRecord], bool]:
        if await self._stands_at(ends):
            # Whoever waits to hear that there is nothing new must not wait for something new.
            return [], True
        batches = await self._consumer.getmany(*self._assigned, timeout_ms=50)
        records = [_record(record) for batch in batches.values() for record in batch]
        return records, await self._stands_at(ends)

    async def _stands_at(self, ends: dict[Any, int]) -> bool:
        return all([await self._consumer.position(tp) >= ends[tp] for tp in self._assigned])


@contextlib.asynccontextmanager
async def _consumer(settings: Settings) -> AsyncIterator[Any]:
    consumer = aiokafka.AIOKafkaConsumer(
        **settings.aiokafka_options(),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
        max_partition_fetch_bytes=8 * 1024 * 1024,
    )
    await _started(consumer, "connect a consumer", _READ_DEADLINE_S)
    try:
        yield consumer
    finally:
        await consumer.stop()


async def _assign(consumer: Any, topic: str, partitions: Sequence[int]) -> list[Any]:
    assigned = [aiokafka.TopicPartition(topic, partition) for partition in partitions]
    consumer.assign(assigned)
    # An explicit seek: without a group the position would otherwise be looked up lazily, fetch by fetch.
    await _reached(consumer.seek_to_beginning(*assigned), f"go to the start of {topic}", _READ_DEADLINE_S)
    return assigned


def _record(record: Any) -> LogRecord:
    return LogRecord(record.partition, record.offset, record.timestamp, record.key, record.value)


async def _started(client: Any, what: str, deadline_s: float) -> None:
    try:
        await _reached(client.start(), what, deadline_s)
    except BaseException:
        await client.stop()
        raise


async def _reached(call: Awaitable[Any], what: str, deadline_s: float) -> Any:
    try:
        return await asyncio.wait_for(call, deadline_s)
    except TimeoutError as error:
        raise DependencyError(f"broker did not {what} within {deadline_s:g} s") from error
    except KafkaError as error:
        raise DependencyError(f"broker failed to {what}: {error}") from error
