"""The benchmark of recovery measures what it says, at a size that takes a moment."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from click.testing import CliRunner

from stream_xp.cli.bench import bench
from stream_xp.engine.snapshot_log import KeyedRecord, SnapshotReader
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import StateError
from stream_xp.services.bench import recovery
from stream_xp.services.bench.recovery import Job, MemoryLog, RecoveryReport, Traffic, measure, table
from stream_xp.services.ingest import SNAPSHOT_SHARE, restored
from stream_xp.settings import Settings

JOB = Job(rows=3_000, events=4_000, rounds=1, interval_s=0.05)


@pytest.fixture(scope="module")
def report() -> RecoveryReport:
    return asyncio.run(measure(JOB))


def test_it_counts_the_rows_and_what_they_take(report: RecoveryReport) -> None:
    fresh, rounds = divmod(report.rows - JOB.rows, 480)  # 12 % of each round
    assert rounds == 0
    # One to warm up, one for the eager snapshot, and at least one for the paced one, of both kinds of traffic.
    assert fresh >= 6
    assert 50 < report.row_bytes <= 64
    assert report.value_bytes == 32
    assert report.other_mb > 0
    assert report.log == "in memory"


def test_what_changed_is_less_than_all_of_it(report: RecoveryReport) -> None:
    for cost in (report.recent, report.anywhere):
        assert 0 < cost.incremental_mb <= cost.full_mb
        assert cost.incremental_share == cost.incremental_s / cost.ingest_s
        assert cost.full_share == cost.full_s / cost.ingest_s
        assert cost.events % JOB.events == 0
        assert 0 < cost.eager_mb <= cost.full_mb


def test_a_snapshot_waits_as_long_as_that_of_a_worker(report: RecoveryReport) -> None:
    for cost in (report.recent, report.anywhere):
        assert cost.ingest_s >= recovery._pause_s(cost.eager_s, JOB.interval_s)
    assert recovery._pause_s(0.01, 2.0) == 2.0 - 0.01
    assert recovery._pause_s(1.0, 2.0) == SNAPSHOT_SHARE - 1.0
    assert Settings().snapshot_interval_ms / 1000 == Job(rows=1, events=1, rounds=1).interval_s


def test_the_lines_name_every_figure(report: RecoveryReport) -> None:
    lines = table([report])
    assert lines.startswith(f"{report.rows:,} rows of 20 experiments in one partition; snapshots in memory")
    for words in (
        "bytes per row",
        "events changed",
        "all of it",
        "of ingest",
        "what changed after every 4,000",
        "recovery",
        "same bytes",
        "stood still",
    ):
        assert words in lines


def test_its_traffic_is_counted_and_reaches_units_that_are_there() -> None:
    traffic = Traffic(seed=3)
    state = PartitionState(0, recovery._registry(), allowed_lateness_ms=recovery.LATENESS_MS)
    recovery.fill(state, traffic, 1_000)
    for recent in (True, False):
        for block in traffic.round(1_000, recent=recent):
            recovery._apply(state, block)
    assert state.outcomes(EXPOSURES).counted == state.units == 1_240
    rewards = state.outcomes(REWARDS)
    assert rewards.counted + rewards.waiting == rewards.read == 2_760
    # Every unit that was there from the beginning had a reward, and it was counted.
    assert rewards.counted >= 1_000
    first = state.arrays["rows"]["values"][:1_000]
    assert all(state.arrays["values"][at : at + 4].any() for at in first.tolist())


def test_a_loop_that_stands_still_is_noticed() -> None:
    async def standing(seconds: float) -> float:
        watch = recovery._Stall()
        async with watch:
            await asyncio.sleep(0.01)
            time.sleep(seconds)
        return watch.longest_s

    assert asyncio.run(standing(0.3)) > 0.29


def test_a_recovery_that_is_not_exact_fails(monkeypatch: pytest.MonkeyPatch) -> None:

    async def spoilt(*parts: Any, **settings: Any) -> PartitionState:
        state = await restored(*parts, **settings)
        state.arrays["units"][0] += 1
        return state

    monkeypatch.setattr(recovery, "restored", spoilt)
    with pytest.raises(StateError, match="what was recovered is not what was there"):
        asyncio.run(measure(JOB))


def test_a_log_in_memory_is_compacted() -> None:
    log, reader = MemoryLog(), SnapshotReader(0)
    asyncio.run(
        log.write([KeyedRecord(b"0/a/x", b"1"), KeyedRecord(b"0/b/x", b"1"), KeyedRecord(b"0/a/x", b"2")])
    )
    asyncio.run(log.read(reader))
    assert reader.keys == {b"0/a/x", b"0/b/x"}
    assert [value for _, value in log._records.items()] == [b"1", b"2"]


def test_the_command_measures_each_size_by_itself(
    monkeypatch: pytest.MonkeyPatch, report: RecoveryReport
) -> None:
    jobs: list[Job] = []

    def run_child(job: Job) -> RecoveryReport:
        jobs.append(job)
        return report

    monkeypatch.setattr(recovery, "_run_child", run_child)
    called = CliRunner().invoke(bench, ["recovery", "--rows", "2000", "--ten-million", "--rounds", "2"])
    assert called.exit_code == 0, called.output
    assert [(job.rows, job.rounds, job.bootstrap) for job in jobs] == [
        (2_000, 2, None),
        (10_000_000, 2, None),
    ]


def test_a_size_runs_in_a_process_of_its_own() -> None:
    (found,) = recovery.bench_recovery(
        [Job(rows=1_000, events=1_000, rounds=1, interval_s=0.05)], progress=lambda _: None
    )
    assert (found.rows - 1_000) % 120 == 0
