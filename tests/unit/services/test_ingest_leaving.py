"""Partitions that leave while something is under way with them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable
from typing import Any

import pytest

from stream_xp.engine.state import PartitionState
from tests.unit.services.ingest_world import Log, Parts, exposures, units


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


def test_a_block_that_waits_for_its_state_while_the_partition_leaves_is_not_looked_at(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.load([0])
        block = exposures(0, 2)._replace(fetched_ns=time.monotonic_ns())
        async with parts.ingest._loading[0]:
            waiting = asyncio.create_task(parts.ingest.on_block(block))
            await asyncio.sleep(0)
            parts.ingest.drop()
            await asyncio.sleep(0)
        await waiting
        assert units(parts) == 0

    asyncio.run(scenario())


def test_a_partition_that_leaves_while_it_is_loaded_is_not_kept(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        loading = asyncio.create_task(parts.ingest.on_block(exposures(0, 2)))
        await asyncio.sleep(0)
        parts.ingest.drop()
        await loading
        assert parts.ingest.partitions == []
        await parts.ingest.load([0])
        assert parts.ingest.partitions == [0]

    asyncio.run(scenario())


def test_a_partition_that_leaves_while_a_block_waits_is_not_touched(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 1))
        left = parts.ingest._tasks[0]
        parts.specs.covered.clear()
        waiting = asyncio.create_task(parts.ingest.on_block(exposures(1, 2, bad=frozenset({2}))))
        await asyncio.sleep(0.01)
        parts.ingest.drop()
        parts.specs.covered.set()
        await waiting
        assert left.state.progress["exposures"].applied_offset == 0
        assert "xp.deadletter" not in log.topics

    asyncio.run(scenario())


def test_a_flush_under_way_writes_nothing_more_of_a_partition_that_left(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        task = parts.ingest._tasks[0]
        async with task.lock:
            flushing = asyncio.create_task(parts.ingest.flush())
            await asyncio.sleep(0.01)
            parts.ingest.drop()
        await flushing
        assert log.order == []

    asyncio.run(scenario())


def test_a_snapshot_that_ends_after_its_partition_left_acknowledges_nothing(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 5))
        send = log.send

        async def send_and_lose(topic: str, **record: Any) -> Awaitable[Any]:
            if topic == "xp.state":
                parts.ingest.drop()
            return await send(topic, **record)

        log.send = send_and_lose  # type: ignore[method-assign]
        await parts.ingest.flush()
        assert log.topics["xp.state"]
        assert parts.source.commits == {}

    asyncio.run(scenario())


def test_a_partition_that_left_is_not_written_out_at_the_close(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 5))
        async with parts.ingest._tasks[0].lock:
            closing = asyncio.ensure_future(parts.ingest.close())
            await asyncio.sleep(0)
            parts.ingest.drop()
        await closing
        assert "xp.state" not in log.topics

    asyncio.run(scenario())


def test_a_partition_that_leaves_while_it_is_restored_is_not_kept(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, entered, gate = PartitionState.restore, threading.Event(), threading.Event()

    def held_up(state: PartitionState, held: dict[str, Any]) -> None:
        entered.set()
        assert gate.wait(30), "the event loop stands still"
        real(state, held)

    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 6))
        await first.ingest.flush()
        monkeypatch.setattr(PartitionState, "restore", held_up)
        second = Parts(log)
        loading = asyncio.create_task(second.ingest.load([0]))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        second.ingest.drop()
        gate.set()
        await loading
        assert second.ingest.partitions == []
        assert second.source.commits == {}

    asyncio.run(scenario())
