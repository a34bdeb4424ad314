"""The ingest stage: blocks, holes, quiet partitions, and writes that fail."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from stream_xp.engine.columns import Block
from stream_xp.errors import DependencyError, StateError
from stream_xp.services import ingest as module
from stream_xp.settings import Settings
from tests.unit.services.ingest_world import Log, Parts, T, exposures, units


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


def test_a_block_is_applied_skipped_or_cut_to_what_is_new(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4))
        await parts.ingest.on_block(exposures(0, 4))
        await parts.ingest.on_block(exposures(1, 2))
        assert units(parts) == 4
        await parts.ingest.on_block(exposures(2, 5))
        assert units(parts) == 7
        assert parts.state().outcomes("exposures").read == 7
        assert parts.state().outcomes("exposures").duplicate == 0
        assert parts.source.seeks == []

    asyncio.run(scenario())


def test_after_a_hole_nothing_is_applied_but_sought(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        await parts.ingest.on_block(exposures(5, 2))
        assert parts.source.seeks == [("xp.exposures", 0, 2)]
        assert (units(parts), parts.ingest.holes) == (2, 1)
        await parts.ingest.on_block(exposures(2, 5))
        assert units(parts) == 7
        # A later hole at another place is sought again: only one that stays is an error.
        await parts.ingest.on_block(exposures(9, 1))
        assert parts.source.seeks[-1] == ("xp.exposures", 0, 7)

    asyncio.run(scenario())


def test_a_hole_that_a_seek_does_not_close_is_an_error_of_state(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(5, 2))
        await parts.ingest.on_block(exposures(5, 2))

    with pytest.raises(StateError, match="asked for offset 0 twice and got 5"):
        asyncio.run(scenario())


def test_a_block_from_before_a_rebalance_is_no_answer_to_a_seek(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        held = exposures(5, 2)._replace(fetched_ns=time.monotonic_ns())
        parts.ingest.drop()
        # The state is behind: the snapshot of what was committed is damaged.
        await parts.ingest.on_block(held)
        assert (parts.ingest.partitions, parts.source.seeks) == ([], [])
        again = exposures(5, 2)._replace(fetched_ns=time.monotonic_ns())
        for block in (again, held):
            await parts.ingest.on_block(block)
        assert parts.source.seeks == [("xp.exposures", 0, 0)]
        await parts.ingest.on_block(exposures(0, 7)._replace(fetched_ns=time.monotonic_ns()))
        assert units(parts) == 7

    asyncio.run(scenario())


def test_what_was_fetched_before_a_seek_is_no_answer_to_it(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        early = exposures(5, 2)._replace(fetched_ns=time.monotonic_ns())
        for block in (early, early, exposures(7, 2)._replace(fetched_ns=time.monotonic_ns() - 10**9)):
            await parts.ingest.on_block(block)
        assert (parts.source.seeks, parts.ingest.holes) == ([("xp.exposures", 0, 0)], 1)
        with pytest.raises(StateError, match="asked for offset 0 twice and got 5"):
            await parts.ingest.on_block(exposures(5, 2)._replace(fetched_ns=time.monotonic_ns()))

    asyncio.run(scenario())


def test_blocks_that_came_with_an_assignment_are_kept(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        parts.ingest.drop()
        block = exposures(0, 2)._replace(fetched_ns=time.monotonic_ns())
        parts.ingest.drop(left=False)
        await parts.ingest.on_block(block)
        assert units(parts) == 2

    asyncio.run(scenario())


def test_a_log_that_was_cut_below_what_is_wanted_is_an_error_of_state(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        log.starts["xp.exposures"] = 5
        await parts.ingest.on_block(exposures(5, 2))

    with pytest.raises(StateError, match="the log starts at 5, but 2 is the next offset"):
        asyncio.run(scenario())


def test_a_log_that_was_cut_is_no_error_of_whom_the_partition_left_meanwhile(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next owner may have counted what retention has deleted since."""

    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        log.starts["xp.exposures"] = 5
        log_starts = module.log_starts

        async def leave_meanwhile(*args: Any) -> dict[str, int]:
            parts.ingest.drop()
            return await log_starts(*args)

        monkeypatch.setattr(module, "log_starts", leave_meanwhile)
        await parts.ingest.on_block(exposures(5, 2))
        assert (parts.ingest.partitions, parts.source.seeks) == ([], [])

    asyncio.run(scenario())


def test_a_log_that_begins_late_is_taken_from_its_beginning(log: Log) -> None:
    async def scenario() -> None:
        log.starts["xp.exposures"] = 5
        parts = Parts(log)
        await parts.ingest.on_block(exposures(5, 2))
        assert parts.state().progress["exposures"].first_offset == 5

    asyncio.run(scenario())


def test_offsets_may_be_committed_only_once_the_snapshot_and_its_dead_letters_are_durable(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4, bad=frozenset({2})))
        assert parts.source.commits == {}
        await parts.ingest.flush()
        assert parts.source.commits == {("xp.exposures", 0): 4, ("xp.rewards", 0): 0}
        assert log.order[:2] == ["xp.deadletter", "xp.stats"]
        assert set(log.order[2:]) == {"xp.state"}
        (letter,) = log.topics["xp.deadletter"]
        assert letter.key == b"xp.exposures/0/2"

    asyncio.run(scenario())


@pytest.mark.parametrize("topic", ["xp.deadletter", "xp.stats", "xp.state"])
def test_a_write_that_fails_ends_the_flush_and_nothing_is_acknowledged(log: Log, topic: str) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        log.failing.add(topic)
        await parts.ingest.on_block(exposures(0, 4, bad=frozenset({2})))
        with pytest.raises(DependencyError, match=topic):
            await parts.ingest.flush()
        assert parts.source.commits == {}

    asyncio.run(scenario())


def test_what_a_flush_given_up_half_way_owes_is_written_by_the_next(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4, bad=frozenset({2})))
        log.failing.add("xp.stats")
        with pytest.raises(DependencyError):
            await parts.ingest.flush()
        log.failing.clear()
        await parts.ingest.close()
        assert [record.exposures.applied_offset for record in log.statistics()] == [3]
        assert parts.source.commits["xp.exposures", 0] == 4

    asyncio.run(scenario())


def test_a_dead_letter_that_failed_is_not_forgotten_by_the_next_snapshot(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        log.failing.add("xp.deadletter")
        await parts.ingest.on_block(exposures(0, 4, bad=frozenset({2})))
        for _ in range(2):
            with pytest.raises(DependencyError):
                await parts.ingest.flush()
        assert parts.source.commits == {}

    asyncio.run(scenario())


def test_a_quiet_partition_matures_by_the_clock_also_after_a_restart(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log, idle_grace_ms=0)
        await first.ingest.on_block(exposures(0, 2))
        await first.ingest.on_block(Block("xp.rewards", 0, 0, 1, [0], [T], [b"x"], [b"{"], [()]))
        first.source.ends = {"xp.exposures": (2, T), "xp.rewards": (1, T)}
        first.clock.advance_to(T + 1_500)
        await first.ingest.flush()
        assert first.state().watermark_ms == T + 1_500
        written = len(log.topics["xp.state"])
        first.clock.advance_to(T + 1_800)
        await first.ingest.flush()
        # A watermark that moves alone is not worth a snapshot, until the partition is handed over.
        assert len(log.topics["xp.state"]) == written
        await first.ingest.close()
        second = Parts(log, idle_grace_ms=0)
        await second.ingest.load([0])
        # What was written last had this watermark, so the next owner does not begin behind it.
        assert second.state().watermark_ms == T + 1_800
        second.source.ends = {"xp.exposures": (2, T), "xp.rewards": (1, T)}
        second.clock.advance_to(T + 10_000)
        await second.ingest.flush()
        newest = log.statistics()[-1]
        assert sum(cell.n for cell in newest.statistics.moments) == 2
        assert newest.reward_outcomes.waiting == 0

    asyncio.run(scenario())


def test_a_partition_with_more_to_read_does_not_mature_by_the_clock(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log, idle_grace_ms=0)
        await parts.ingest.on_block(exposures(0, 2))
        parts.source.ends = {"xp.exposures": (3, T), "xp.rewards": (0, T)}
        parts.clock.advance_to(T + 10_000)
        await parts.ingest.flush()
        assert parts.state().watermark_ms is None or parts.state().watermark_ms <= T + 1

    asyncio.run(scenario())


@pytest.mark.parametrize("end", [(9, T), None], ids=["the end is ahead", "the end is not known"])
def test_a_partition_that_stalls_ends_the_worker(
    log: Log, monkeypatch: pytest.MonkeyPatch, end: tuple[int, int] | None
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "STALL_S", 0.05)
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        if end is not None:
            parts.source.ends["xp.exposures"] = end
        parts.source.ends["xp.rewards"] = (0, T)
        for offset in range(2, 6):
            await parts.ingest.flush()
            await asyncio.sleep(0.03)
            await parts.ingest.on_block(exposures(offset, 1))
        await parts.ingest.flush()
        await asyncio.sleep(0.1)
        with pytest.raises(DependencyError, match=r"xp\.exposures 0: nothing was applied for"):
            await parts.ingest.flush()

    asyncio.run(scenario())


def test_a_partition_at_its_end_may_be_quiet_for_as_long_as_it_likes(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "STALL_S", 0.02)
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 2))
        parts.source.ends = {"xp.exposures": (2, T), "xp.rewards": (0, T)}
        for _ in range(3):
            await parts.ingest.flush()
            await asyncio.sleep(0.03)

    asyncio.run(scenario())


def test_what_does_not_come_is_asked_for_once(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "ASK_S", 0.0)
        parts = Parts(log)
        parts.source.ends = {"xp.exposures": (3, T), "xp.rewards": (0, T)}
        await parts.ingest.load([0])  # behind the consumer, which stands at the end and has nothing to give
        for _ in range(3):
            await parts.ingest.flush()
            await asyncio.sleep(0.001)
        assert parts.source.seeks == [("xp.exposures", 0, 0)]

    asyncio.run(scenario())


def test_a_long_topic_is_read_in_batches(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading:
        def __init__(self, settings: Settings, topic: str, partitions: list[int]) -> None:
            self.records = log.topics[topic]

        async def __aiter__(self) -> Any:
            for record in self.records:
                yield [record]

    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 4))
        await first.ingest.close()
        monkeypatch.setattr(module, "read_all", Reading)
        second = Parts(log)
        await second.ingest.load([0])
        assert second.state().progress["exposures"].applied_offset == 3

    asyncio.run(scenario())
