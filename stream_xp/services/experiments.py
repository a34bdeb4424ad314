"""Specs in force, followed from their compacted topic."""

from __future__ import annotations

import asyncio

import structlog

from stream_xp.adapters.clock import WallClock
from stream_xp.adapters.kafka_log import LogRecord, LogTail
from stream_xp.domain.codec import decode_experiment
from stream_xp.engine.registry import Entry, Registry
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

_POLL_S = 0.1
_COVER_DEADLINE_S = 60.0


class Experiments:
    """The registry, kept up to date.

    A spec governs events appended `activation_delay_ms` after it. So an event may be applied once all specs
    appended that long before it are known; `cover` waits for that, and normally does not have to.
    """

    def __init__(self, settings: Settings) -> None:
        self.registry = Registry()
        self._settings = settings
        self._wall = WallClock()
        self._tail = LogTail(settings, settings.topic("experiments"), [0])
        self._log_ms = 0
        self._known_ms = -1
        self._progress = asyncio.Condition()

    async def start(self) -> None:
        """Connect and read all that is there."""
        await self._tail.start()
        while self._known_ms < 0:
            await self._read()

    async def follow(self) -> None:
        """Read on for ever."""
        while True:
            await self._read()
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """Disconnect."""
        await self._tail.stop()

    async def cover(self, log_ms: int) -> None:
        """Wait until every spec that can govern an event of this log time is known."""
        if log_ms <= self._known_ms + self._settings.activation_delay_ms:
            return
        try:
            async with asyncio.timeout(_COVER_DEADLINE_S), self._progress:
                await self._progress.wait_for(
                    lambda: log_ms <= self._known_ms + self._settings.activation_delay_ms
                )
        except TimeoutError as error:
            raise DependencyError(
                f"the reader of {self._settings.topic('experiments')} stayed more than the activation delay behind "
                f"the events for {_COVER_DEADLINE_S:g} s"
            ) from error

    async def _read(self) -> None:
        asked_ms = self._wall.now_ms()
        records, at_end = await self._tail.poll()
        entries = [entry for record in records if (entry := self._entry(record)) is not None]
        for refused in self.registry.add(entries):
            log.error(
                "experiment record refused",
                experiment=refused.entry.experiment,
                offset=refused.entry.offset,
                error=refused.rule,
            )
        if at_end:
            async with self._progress:
                self._known_ms = max(self._known_ms, asked_ms)
                self._progress.notify_all()

    def _entry(self, record: LogRecord) -> Entry | None:
        """The entry of one record; one that cannot be read is reported, and the last good spec stays in force."""
        self._log_ms = max(self._log_ms, record.timestamp_ms)
        if not record.key:
            log.error("experiment record without a key", offset=record.offset)
            return None
        experiment = record.key.decode(errors="replace")
        try:
            spec = None if record.value is None else decode_experiment(experiment, record.value)
        except ConfigError as error:
            log.error(
                "experiment record refused", experiment=experiment, offset=record.offset, error=str(error)
            )
            return None
        return Entry(
            offset=record.offset,
            experiment=experiment,
            in_force_ms=self._log_ms + self._settings.activation_delay_ms,
            record=spec,
        )
