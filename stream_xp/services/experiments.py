"""Specs in force, followed from their compacted topic."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import structlog

from stream_xp.adapters.kafka_log import LogRecord, LogTail
from stream_xp.domain.codec import decode_experiment
from stream_xp.engine.kernels import NEVER
from stream_xp.engine.registry import Entry, Registry
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

_POLL_S = 0.1
_COVER_DEADLINE_S = 60.0


class Experiments:
    """The registry, kept up to date.

    A spec governs events appended `activation_delay_ms` after it. So when such an event can be read, the spec can be
    read too: a read of the topic that began after the event was here, and came to the end that it found, knows every
    spec that can govern it. `cover` waits for such a read. No clock is compared with another one.

    For most events it does not wait: that read also knows every spec appended before the newest event seen by then,
    so those appended up to half an activation delay after that event are covered by it. The other half is for what
    the clocks of brokers are apart, and for the time until a record that was appended can be read.
    """

    def __init__(self, settings: Settings) -> None:
        self.registry = Registry()
        self._settings = settings
        self._tail = LogTail(settings, settings.topic("experiments"), [0])
        self._log_ms = 0
        self._seen_ms = NEVER
        self._read_ns = -1
        self._read_for_ms = NEVER
        self._wanted = asyncio.Event()
        self._progress = asyncio.Condition()

    async def start(self) -> None:
        """Connect and read all that is there."""
        await self._tail.start()
        while self._read_ns < 0:
            await self._read()

    async def follow(self) -> None:
        """Read on for ever: now and then, and at once where somebody waits."""
        while True:
            if await self._read():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wanted.wait(), _POLL_S)

    async def stop(self) -> None:
        """Disconnect."""
        await self._tail.stop()

    async def cover(self, log_ms: int, *, fetched_ns: int | None = None) -> None:
        """Wait until every spec that can govern an event is known.

        Args:
            log_ms: its log time; of several events the newest one's.
            fetched_ns: monotonic clock of this process when they were here; now, if it is not known.

        Raises:
            DependencyError: the topic could not be read to its end in time.
        """
        here_ns = time.monotonic_ns() if fetched_ns is None else fetched_ns
        self._seen_ms = max(self._seen_ms, log_ms)
        if self._covers(log_ms, here_ns):
            return
        self._wanted.set()
        try:
            async with asyncio.timeout(_COVER_DEADLINE_S), self._progress:
                await self._progress.wait_for(lambda: self._covers(log_ms, here_ns))
        except TimeoutError as error:
            raise DependencyError(
                f"{self._settings.topic('experiments')} could not be read to its end within {_COVER_DEADLINE_S:g} s, "
                "and events wait for their specs"
            ) from error

    def _covers(self, log_ms: int, here_ns: int) -> bool:
        return here_ns < self._read_ns or log_ms <= self._read_for_ms + self._settings.clocks_apart_ms

    async def _read(self) -> bool:
        """Take in what is new; whether the end was reached."""
        self._wanted.clear()
        began_ns, seen_ms = time.monotonic_ns(), self._seen_ms
        records, at_end = await self._tail.poll()
        entries = [entry for record in records if (entry := self._entry(record)) is not None]
        for refused in self.registry.add(entries):
            log.error(
                "experiment record refused",
                **self._place(refused.entry.experiment, refused.entry.offset),
                error=refused.rule,
            )
        if at_end:
            async with self._progress:
                self._read_ns, self._read_for_ms = began_ns, seen_ms
                self._progress.notify_all()
        return at_end

    def _place(self, experiment: str, offset: int) -> dict[str, Any]:
        """What a log line says of a record; the key only of an experiment that is known.

        The key of an event that strayed to this topic is a unit, and no unit is ever logged.
        """
        known = any(entry.experiment == experiment for entry in self.registry.entries)
        place = {"topic": self._settings.topic("experiments"), "partition": 0, "offset": offset}
        return {"experiment": experiment, **place} if known else place

    def _entry(self, record: LogRecord) -> Entry | None:
        """The entry of one record; one that cannot be read is reported, and the last good spec stays in force."""
        self._log_ms = max(self._log_ms, record.timestamp_ms)
        if not record.key:
            log.error("experiment record without a key", **self._place("", record.offset))
            return None
        experiment = record.key.decode(errors="replace")
        try:
            spec = None if record.value is None else decode_experiment(experiment, record.value)
        except ConfigError as error:
            place = self._place(experiment, record.offset)
            text = str(error)
            if "experiment" not in place:
                text = text.removeprefix(f"experiment record of {experiment}: ")
            log.error("experiment record refused", **place, error=text)
            return None
        return Entry(
            offset=record.offset,
            experiment=experiment,
            in_force_ms=self._log_ms + self._settings.activation_delay_ms,
            record=spec,
        )
