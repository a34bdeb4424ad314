"""The benchmark of recovery measures what it says, at a size that takes a moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from click.testing import CliRunner

from stream_xp.cli.bench import bench
from stream_xp.engine.snapshot import state_of
from stream_xp.engine.snapshot_log import KeyedRecord, SnapshotReader
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import StateError
from stream_xp.services.bench import recovery
from stream_xp.services.bench.recovery import Job, MemoryLog, RecoveryReport, Traffic, measure, table

JOB = Job(rows=3_000, events=4_000, rounds=1)


@pytest.fixture(scope="module")
def report() -> RecoveryReport:
    return asyncio.run(measure(JOB))


def test_it_counts_the_rows_and_what_they_take(report: RecoveryReport) -> None:
    fresh = 480 * 4  # 12 % of each of four rounds
    assert report.rows == JOB.rows + fresh
    assert 50 < report.row_bytes <= 64
    assert report.value_bytes == 32
    assert report.other_mb > 0
    assert report.log == "in memory"


def test_what_changed_is_less_than_all_of_it(report: RecoveryReport) -> None:
    for cost in (report.recent, report.anywhere):
        assert 0 < cost.incremental_mb <= cost.full_mb
        assert cost.incremental_share == cost.incremental_s / cost.ingest_s
        assert cost.full_share == cost.full_s / cost.ingest_s


def test_the_lines_name_every_figure(report: RecoveryReport) -> None:
    lines = table([report])
    assert lines.startswith("4,920 rows of 20 experiments in one partition; snapshots in memory")
    for words in ("bytes per row", "what changed", "all of it", "of ingest", "recovery", "same bytes"):
        assert words in lines


def test_its_traffic_is_counted_and_reaches_units_that_are_there() -> None:
    traffic = Traffic(seed=3)
    state = PartitionState(0, recovery._registry(), allowed_lateness_ms=recovery.LATENESS_MS)
    for columns in traffic.fill(1_000):
        state.apply_exposures(columns, next_offset=int(columns.offset[-1]) + 1)
    for recent in (True, False):
        for block in traffic.round(1_000, recent=recent):
            recovery._apply(state, block)
    assert state.outcomes(EXPOSURES).counted == state.units == 1_240
    rewards = state.outcomes(REWARDS)
    assert rewards.counted + rewards.waiting == rewards.read == 1_760


def test_a_recovery_that_is_not_exact_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*parts: Any, **settings: Any) -> PartitionState:
        state = state_of(*parts, **settings)
        state.arrays["units"][0] += 1
        return state

    monkeypatch.setattr(recovery, "state_of", spoilt)
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
    (found,) = recovery.bench_recovery([Job(rows=1_000, events=1_000, rounds=1)], progress=lambda _: None)
    assert found.rows == 1_000 + 4 * 120
