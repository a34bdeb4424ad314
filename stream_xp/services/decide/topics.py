"""The topics of the service as the decide stage reads and writes them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import msgspec
import structlog

from stream_xp.adapters.kafka_log import LogRecord, LogTail, LogWriter, read_all
from stream_xp.services.decide.records import Own, own_or_none
from stream_xp.settings import Settings

READ_BACK_MS = 10_000
"""How long a record that was written may be on its way back before it is written again."""


class Topics:
    """Topics by their short names.

    Args:
        partitions: number of partitions per topic.
    """

    def __init__(self, settings: Settings, *, writer: LogWriter, partitions: dict[str, int]) -> None:
        self._settings = settings
        self._writer = writer
        self._partitions = partitions

    async def write(self, topic: str, records: Sequence[tuple[str, msgspec.Struct | None]]) -> None:
        """Send records in order, each under its key, and wait until the broker has all of them."""
        name = self._settings.topic(topic)
        sent = [
            await self._writer.send(
                name, key=key.encode(), value=None if record is None else msgspec.json.encode(record)
            )
            for key, record in records
        ]
        await self._writer.durable(sent, name)

    async def records(self, topic: str, partitions: Sequence[int]) -> list[LogRecord]:
        """Every record with a value."""
        records = await read_all(self._settings, self._settings.topic(topic), partitions)
        return [record for record in records if record.value is not None]

    async def own(self, topic: str, kind: type[Own]) -> list[Own]:
        """Every record of a topic of ours; what is none is reported and left out, as if it were not there."""
        found = []
        for record in await self.records(topic, range(self._partitions[topic])):
            with self.place(topic, record):
                own = own_or_none(record.value or b"", kind)
            if own is not None:
                found.append(own)
        return found

    def tail(self, topic: str) -> LogTail:
        """All partitions of a topic, to be read on and on."""
        return LogTail(self._settings, self._settings.topic(topic), range(self._partitions[topic]))

    def place(self, topic: str, record: LogRecord) -> AbstractContextManager[None]:
        """Have whatever is logged in the block name the record that it is about."""
        return structlog.contextvars.bound_contextvars(
            topic=self._settings.topic(topic), partition=record.partition, offset=record.offset
        )
