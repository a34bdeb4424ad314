"""How a worker starts, ends, and tells that Faust has ended; and what its source says of ends and seeks."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import IllegalStateError
from faust.types.tuples import TP

from stream_xp.adapters.faust_transport import FaustSource
from stream_xp.errors import ConfigError, DependencyError, StateError
from stream_xp.services.worker import Worker, _cancel, run
from stream_xp.settings import Settings

AT = TP("xp.rewards", 1)


class Stages:
    """A worker of which only the frame is real: what it starts and closes is given."""

    def __init__(self, start: Any = None) -> None:
        self.ended = asyncio.Event()
        self.failure: BaseException | None = None
        self.calls: list[str] = []
        self._start = start

    async def start(self) -> None:
        self.calls.append("start")
        if self._start is not None:
            await self._start()
        self.calls.append("started")

    async def stop(self) -> None:
        self.calls.append("stop")


@pytest.mark.timeout(30)
def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    """As `asyncio.wait_for` does before Python 3.12, where what it waits for is done at the same time."""
    lost = 0

    async def goes_on() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost > 2:
                    raise

    async def scenario() -> None:
        tasks = [asyncio.create_task(goes_on()), asyncio.create_task(asyncio.sleep(60))]
        await asyncio.sleep(0)
        await _cancel(tasks)
        assert all(task.cancelled() for task in tasks)

    asyncio.run(scenario())
    assert lost == 3


def test_a_signal_while_it_starts_ends_the_start() -> None:
    async def scenario() -> list[str]:
        worker = Stages(asyncio.Event().wait)
        running = asyncio.create_task(run(worker))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        worker.ended.set()
        await asyncio.wait_for(running, 1)
        return worker.calls

    assert asyncio.run(scenario()) == ["start", "stop"]


def test_what_a_start_raises_is_raised_and_nothing_is_written_out() -> None:
    async def refuse() -> None:
        raise ConfigError("no such topic")

    async def scenario() -> Stages:
        worker = Stages(refuse)
        with pytest.raises(ConfigError, match="no such topic"):
            await run(worker)  # type: ignore[arg-type]
        return worker

    worker = asyncio.run(scenario())
    assert worker.calls == ["start", "stop"]
    assert isinstance(worker.failure, ConfigError)


def test_what_made_it_fail_is_raised_once_it_has_stopped() -> None:
    async def scenario() -> list[str]:
        worker = Stages()
        running = asyncio.create_task(run(worker, started=lambda: worker.calls.append("told")))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        worker.failure = StateError("a hole")
        worker.ended.set()
        with pytest.raises(StateError, match="a hole"):
            await running
        return worker.calls

    assert asyncio.run(scenario()) == ["start", "started", "told", "stop"]


@pytest.fixture
def worker() -> Worker:
    """A worker of which nothing is connected."""
    built = Worker.__new__(Worker)
    built.settings, built.failure, built.written = Settings(), None, False
    built._tasks = []
    return built


def test_the_end_of_faust_is_a_failure(worker: Worker) -> None:
    async def scenario() -> None:
        worker.ended = asyncio.Event()
        worker.app = SimpleNamespace(should_stop=False, crash_reason=None)
        await worker._watch_app()
        worker.app = SimpleNamespace(should_stop=True, crash_reason=ValueError("commit refused"))
        await worker._guarded(worker._watch_app())
        assert worker.ended.is_set()

    asyncio.run(scenario())
    assert isinstance(worker.failure, DependencyError)
    assert "commit refused" in str(worker.failure)


def test_an_error_in_an_agent_ends_the_worker_and_the_first_one_counts(worker: Worker) -> None:
    async def fail(error: BaseException) -> None:
        raise error

    async def scenario() -> None:
        worker.ended = asyncio.Event()
        await worker._guarded(fail(StateError("first")))
        await worker._guarded(fail(ValueError("second")))
        assert worker.ended.is_set()

    asyncio.run(scenario())
    assert str(worker.failure) == "first"


def test_what_was_loaded_since_the_revocation_is_dropped_before_partitions_are_loaded(worker: Worker) -> None:
    calls: list[str] = []

    async def forget() -> None:
        calls.append("decide dropped")

    async def load(partitions: set[int]) -> None:
        calls.append(f"loads {sorted(partitions)}")

    async def scenario() -> None:
        worker.ended = asyncio.Event()
        worker._sources = {AT.topic}
        # What was fetched since they left is of the new assignment, so only the state goes.
        worker.ingest = SimpleNamespace(load=load, drop=lambda *, left: calls.append(f"drops, {left=}"))  # type: ignore[assignment]
        worker.decide = SimpleNamespace(drop=forget)  # type: ignore[assignment]
        await worker._on_assigned(None, {AT, TP("xp.stats", 0)})
        await asyncio.gather(*worker._tasks)

    asyncio.run(scenario())
    assert calls == ["drops, left=False", "decide dropped", "loads [1]"]


@pytest.mark.parametrize("closes", [True, False], ids=["written", "not written in time"])
def test_partitions_are_handed_over_written_or_dropped(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    calls: list[str] = []

    async def close() -> None:
        if not closes:
            await asyncio.Event().wait()
        calls.append("closed")

    async def forget() -> None:
        calls.append("decide dropped")

    async def scenario() -> None:
        monkeypatch.setattr("stream_xp.services.worker._CLOSE_S", 0.02)
        worker.ended = asyncio.Event()
        worker.ingest = SimpleNamespace(close=close, drop=lambda: calls.append("ingest dropped"))  # type: ignore[assignment]
        worker.decide = SimpleNamespace(drop=forget)  # type: ignore[assignment]
        await worker._on_revoked(None, set())

    asyncio.run(scenario())
    assert calls == ["closed" if closes else "ingest dropped", "decide dropped"]
    assert worker.failure is None


def test_an_evaluation_that_cannot_be_waited_for_ends_the_worker(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its decision may yet be written, and the next owner would not have read it.
    async def done() -> None: ...

    async def hang() -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        monkeypatch.setattr("stream_xp.services.worker._CLOSE_S", 0.02)
        worker.ended = asyncio.Event()
        worker.ingest = SimpleNamespace(close=done)  # type: ignore[assignment]
        worker.decide = SimpleNamespace(drop=hang)  # type: ignore[assignment]
        await worker._on_revoked(None, set())

    asyncio.run(scenario())
    assert isinstance(worker.failure, DependencyError)


class Fetching:
    """aiokafka's consumer: an end, and when it was answered."""

    def __init__(self) -> None:
        self.end: int | None = None
        self.answered_ms: int | None = None
        self.assigned = {AT}

    def assignment(self) -> set[TP]:
        return self.assigned

    def highwater(self, tp: TP) -> int | None:
        return self.end

    def last_poll_timestamp(self, tp: TP) -> int | None:
        return self.answered_ms


def source_of(consumer: Any) -> FaustSource:
    return FaustSource(SimpleNamespace(consumer=consumer))


def test_an_end_is_as_old_as_the_answer_before_it() -> None:
    fetching = Fetching()
    source = source_of(SimpleNamespace(_thread=SimpleNamespace(_consumer=fetching)))
    assert source.end(*AT) is None
    fetching.end, fetching.answered_ms = 10, 1_000
    assert source.end(*AT) is None
    assert source.end(*AT) is None
    fetching.end, fetching.answered_ms = 12, 1_500
    assert source.end(*AT) == (12, 1_000)
    assert source.end(*AT) == (12, 1_000)
    # This answer may have been four seconds under way, with an end as old as that.
    fetching.answered_ms = 5_500
    assert source.end(*AT) == (12, 1_500)


def test_a_partition_that_left_and_came_back_has_no_end_yet() -> None:
    fetching = Fetching()
    source = source_of(SimpleNamespace(_thread=SimpleNamespace(_consumer=fetching)))
    for answered_ms in (1_000, 1_500):
        fetching.end, fetching.answered_ms = 10, answered_ms
        source.end(*AT)
    fetching.assigned = set()
    assert source.end(*AT) is None
    fetching.assigned, fetching.answered_ms = {AT}, 9_000
    assert source.end(*AT) is None


def test_a_seek_of_a_partition_that_left_is_no_error() -> None:
    async def scenario() -> list[Any]:
        asked: list[Any] = []

        async def seek_wait(partitions: dict[TP, int]) -> None:
            asked.append(partitions)
            raise IllegalStateError("not assigned")

        await source_of(SimpleNamespace(seek_wait=seek_wait)).seek(*AT, 5)
        return asked

    assert asyncio.run(scenario()) == [{AT: 5}]


def test_nothing_is_durable_of_a_partition_that_left() -> None:
    consumer = SimpleNamespace(durable={}, assignment=lambda: {AT})
    source = source_of(consumer)
    source.durable(*AT, 7)
    source.durable("xp.rewards", 3, 9)
    assert consumer.durable == {AT: 7}
