"""When an event may be applied: as soon as a read that began after it was here knows every spec."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from stream_xp.adapters.kafka_log import LogRecord
from stream_xp.errors import DependencyError
from stream_xp.services import experiments as module
from stream_xp.services.experiments import Experiments
from stream_xp.settings import Settings
from tests.unit.services.ingest_world import SPEC, record_of

T = 1_000_000
"""Half a century ago: the clock of the machine that runs this is ahead of it."""
DELAY_MS = 5_000
VALUE = msgspec.json.encode(record_of(SPEC))


class Tail:
    """The topic of experiments; a read finds its end, and then waits until it is let go on."""

    def __init__(self) -> None:
        self.records: list[LogRecord] = []
        self.position = self.reads = 0
        self.flows = asyncio.Event()
        self.flows.set()
        self.one_only = False

    def let_one_go_on(self) -> None:
        """The read that waits goes on, and the next one waits again."""
        self.one_only = True
        self.flows.set()

    async def start(self) -> None:
        pass

    async def poll(self) -> tuple[list[LogRecord], bool]:
        self.reads += 1
        end = len(self.records)
        await self.flows.wait()
        if self.one_only:
            self.one_only = False
            self.flows.clear()
        found, self.position = self.records[self.position : end], end
        return found, True

    def apply(self, *, log_ms: int) -> None:
        self.records.append(LogRecord(0, len(self.records), log_ms, b"exp", VALUE))


async def followed(tail: Tail, monkeypatch: pytest.MonkeyPatch) -> Experiments:
    """Experiments that have read all there is, and read again only where somebody waits."""
    monkeypatch.setattr(module, "LogTail", lambda *_: tail)
    monkeypatch.setattr(module, "_POLL_S", 3_600.0)
    experiments = Experiments(Settings(activation_delay_ms=DELAY_MS))
    await experiments.start()
    tail.task = asyncio.create_task(experiments.follow())  # type: ignore[attr-defined]
    await settle()
    return experiments


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def knows(experiments: Experiments) -> bool:
    return bool(experiments.registry.slots)


def test_an_event_waits_for_its_spec_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        tail = Tail()
        experiments = await followed(tail, monkeypatch)
        tail.flows.clear()
        tail.apply(log_ms=T)
        covering = asyncio.create_task(experiments.cover(T + DELAY_MS))
        await settle()
        assert not covering.done()
        tail.flows.set()
        await covering
        assert knows(experiments)

    asyncio.run(scenario())


def test_a_read_that_began_before_the_event_was_here_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        tail = Tail()
        experiments = await followed(tail, monkeypatch)
        tail.flows.clear()
        early = asyncio.create_task(experiments.cover(T))
        await settle()
        # A read is under way that has looked up the end already.
        tail.apply(log_ms=T)
        late = asyncio.create_task(experiments.cover(T + DELAY_MS))
        await settle()
        assert [early.done(), late.done()] == [False, False]
        tail.let_one_go_on()
        await early
        await settle()
        assert not knows(experiments)
        assert not late.done()
        tail.flows.set()
        await late
        assert knows(experiments)

    asyncio.run(scenario())


def test_one_read_covers_all_that_was_here_before_and_half_a_delay_of_what_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        tail = Tail()
        experiments = await followed(tail, monkeypatch)
        here_ns = time.monotonic_ns()
        await experiments.cover(T, fetched_ns=here_ns)
        reads = tail.reads
        for later_ms in (3_600_000, 24 * 3_600_000):  # history, fetched before that read began
            await experiments.cover(T + later_ms, fetched_ns=here_ns)
        assert tail.reads == reads
        # That history was seen, but not when the read began: what follows it is not covered.
        await experiments.cover(T + DELAY_MS // 2)
        assert tail.reads == reads
        await experiments.cover(T + DELAY_MS // 2 + 1)
        assert tail.reads == reads + 1

    asyncio.run(scenario())


def test_a_topic_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COVER_DEADLINE_S", 0.01)

    async def scenario() -> None:
        tail = Tail()
        experiments = await followed(tail, monkeypatch)
        tail.flows.clear()
        await experiments.cover(T)

    with pytest.raises(DependencyError, match=r"xp\.experiments could not be read to its end within 0\.01 s"):
        asyncio.run(scenario())
