"""What the stages tell: per block and partition, without a word for what they do not know."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import numpy as np
import pytest

from stream_xp.adapters.prometheus import Metrics
from stream_xp.domain.codec import Limits
from stream_xp.domain.decision import Action
from stream_xp.domain.experiment import ExperimentRecord, Status, WeightEpoch
from stream_xp.domain.metric_defs import DecisionState
from stream_xp.domain.telemetry import BlockReport, ExperimentReport, PartitionReport, Telemetry
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.services.block_report import SAMPLE, block_report
from stream_xp.settings import ROLES
from tests.unit.services.decide_world import EVEN, MISMATCH, Specs, block, look, spec, stage, statistics
from tests.unit.services.decide_world import Log as DecideLog
from tests.unit.services.ingest_world import Log, Parts, T, exposures


class Listener(Telemetry):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.blocks: list[BlockReport] = []
        self.partitions: list[PartitionReport] = []
        self.reports: list[ExperimentReport] = []
        self.calls: list[Any] = []

    def block_applied(self, report: BlockReport) -> None:
        self.blocks.append(report)

    def partition_flushed(self, report: PartitionReport) -> None:
        self.partitions.append(report)

    def experiments_evaluated(self, reports: Any) -> None:
        self.reports += reports

    def decided(self, action: Action, *, at_ms: int, first_exposure_ms: int | None) -> None:
        self.calls.append((action, at_ms, first_exposure_ms))

    def hole_found(self, topic: str) -> None:
        self.calls.append(("hole", topic))

    def snapshot_written(self, *, took_s: float) -> None:
        self.calls.append("snapshot")

    def flushed(self, *, took_s: float, at_ms: int) -> None:
        self.calls.append("flushed")

    def partitions_left(self) -> None:
        self.calls.append("partitions left")

    def experiments_left(self) -> None:
        self.calls.append("experiments left")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


@pytest.fixture
def decide_log(monkeypatch: pytest.MonkeyPatch) -> DecideLog:
    log = DecideLog()
    log.serve(monkeypatch)
    return log


def heard(parts: Parts) -> Listener:
    listener = Listener()
    parts.ingest._telemetry = listener
    return listener


# --- the ingest stage ------------------------------------------------------------------------------------------


def test_a_block_is_told_once_with_its_letters_and_exposures(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        listener = heard(parts)
        await parts.ingest.on_block(exposures(0, 5, bad=frozenset({4})))
        await parts.ingest.on_block(exposures(0, 5))
        (told,) = listener.blocks
        assert told.topic == "exposures"
        assert told.exposures == {("exp", "a"): 2, ("exp", "b"): 2}
        assert told.dead_letters == {"invalid_json": 1}
        assert told.lags_ms == [0, 0, 0, 0]

    asyncio.run(scenario())


def test_a_flush_tells_where_each_partition_stands(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        listener = heard(parts)
        await parts.ingest.on_block(exposures(0, 5))
        parts.source.ends = {"xp.exposures": (9, T)}
        await parts.ingest.flush()
        loaded, told = listener.partitions
        # What is new is counted from here.
        assert loaded.outcomes["exposures"].read == 0
        assert (told.partition, told.units) == (0, 5)
        assert told.applied == {"exposures": 4, "rewards": -1}
        assert told.lags == {"exposures": 4}
        assert told.outcomes["exposures"].counted == 5
        assert told.watermark_ms is None
        assert told.covered_ms == T
        assert listener.calls == ["snapshot", "flushed"]

    asyncio.run(scenario())


def test_a_snapshot_that_is_not_due_leaves_the_time_at_which_all_was_covered(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log, snapshot_interval_ms=3_600_000)
        listener = heard(parts)
        await parts.ingest.on_block(exposures(0, 5))
        await parts.ingest.flush()
        parts.clock.advance_to(T + 500)
        await parts.ingest.on_block(exposures(5, 5))
        await parts.ingest.flush()
        assert [told.covered_ms for told in listener.partitions] == [T, T, T]

    asyncio.run(scenario())


def test_holes_and_leaving_are_told(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        listener = heard(parts)
        await parts.ingest.on_block(exposures(0, 2))
        await parts.ingest.on_block(exposures(5, 2))
        parts.ingest.drop()
        assert listener.calls == [("hole", "exposures"), "partitions left"]

    asyncio.run(scenario())


def test_of_a_large_block_a_sample_of_lags_is_told(log: Log) -> None:
    columns, letters = exposure_columns(
        exposures(0, 1_000), Parts(log).specs.registry, floor_ms=0, limits=Limits()
    )
    told = block_report("exposures", columns, letters, Parts(log).specs.registry)
    assert SAMPLE // 2 < len(told.lags_ms) <= SAMPLE
    assert sum(told.exposures.values()) == 1_000


@pytest.mark.parametrize("topic", ["exposures", "rewards"])
def test_a_block_without_records_is_told_as_one(log: Log, topic: str) -> None:
    empty = exposures(0, 0, topic=f"xp.{topic}")
    registry = Parts(log).specs.registry
    columns = exposure_columns if topic == "exposures" else reward_columns
    told = block_report(topic, *columns(empty, registry, floor_ms=0, limits=Limits()), registry)
    assert told == BlockReport(topic, [], {}, {})


def test_lags_of_rewards_leave_out_what_was_dead_lettered(log: Log) -> None:
    bodies = [{"id": "1", "time": T - 70, "unit": "u", "metric": "click"}, {"id": "2"}]
    values = [json.dumps(body).encode() for body in bodies]
    rewards = Block("xp.rewards", 0, 0, 2, [0, 1], [T, T], [b"u", b"u"], values, [()] * 2)
    registry = Parts(log).specs.registry
    columns, letters = reward_columns(rewards, registry, floor_ms=0, limits=Limits())
    told = block_report("rewards", columns, letters, registry)
    assert told.lags_ms == [70]
    assert told.dead_letters == {"invalid_field": 1}


def test_versions_of_an_experiment_are_counted_together(log: Log) -> None:
    registry = Parts(log).specs.registry
    columns, letters = exposure_columns(exposures(0, 4), registry, floor_ms=0, limits=Limits())
    (first,) = registry.entries
    assert first.record is not None
    newer = spec(2)
    record = ExperimentRecord(
        spec=newer,
        epochs=(WeightEpoch(epoch=0, weights=newer.weights, effective_ms=0),),
        design_hash=newer.design_hash(),
    )
    registry.add([Entry(offset=9, experiment="exp", in_force_ms=T, record=record)])
    columns.slot[2:] = registry.slot("exp", 2).index
    told = block_report("exposures", columns, letters, registry)
    assert told.exposures == {("exp", "a"): 2, ("exp", "b"): 2}


def test_a_hundred_thousand_random_ids_in_events_change_no_series_count(log: Log) -> None:
    registry = Parts(log).specs.registry
    metrics = Metrics(ROLES, source_partitions=1, max_series=1_000)
    metrics.registered(registry.unarchived(), owned=["exp"])

    def series() -> int:
        return sum(len(family.samples) for family in metrics.collect())

    before, draw = series(), np.random.default_rng(1)
    for first in range(0, 100_000, 10_000):
        bodies = [
            {
                "id": str(n),
                "time": T,
                "unit": "u",
                "experiment": "exp" if n % 2 else f"e{draw.integers(2**60)}",
                "arm": f"a{draw.integers(2**60)}",
            }
            for n in range(first, first + 10_000)
        ]
        values = [json.dumps(body).encode() for body in bodies]
        hostile = Block(
            "xp.exposures", 0, 0, 10_000, range(10_000), [T] * 10_000, [b"u"] * 10_000, values, [()] * 10_000
        )
        columns, letters = exposure_columns(hostile, registry, floor_ms=0, limits=Limits())
        report = block_report("exposures", columns, letters, registry)
        assert report.exposures == {}
        assert report.dead_letters == {"unknown_arm": 5_000}
        metrics.block_applied(report)
    assert series() == before


def test_experiments_are_listed_until_they_are_archived(log: Log) -> None:
    registry = Parts(log).specs.registry
    (record,) = registry.unarchived()
    assert record.spec.experiment == "exp"
    archived = msgspec.structs.replace(record, status=Status.ARCHIVED)
    for gone in (archived, None):
        registry = Parts(log).specs.registry
        registry.add([Entry(offset=5, experiment="exp", in_force_ms=T, record=gone)])
        assert registry.unarchived() == []
    assert Registry().unarchived() == []


# --- the decide stage ------------------------------------------------------------------------------------------


def test_an_evaluation_tells_results_decisions_and_leaving(decide_log: DecideLog) -> None:
    async def scenario() -> None:
        listener = Listener()
        decide = stage(decide_log, Specs(1), telemetry=listener)
        await look(decide, statistics(400, **EVEN))
        assert [(one.state, one.mismatch) for one in listener.reports] == [(DecisionState.RUNNING, False)]
        await look(decide, statistics(800, **MISMATCH))
        assert listener.calls == [(Action.STOP, T, T)]
        assert (listener.reports[-1].state, listener.reports[-1].mismatch) == (DecisionState.STOPPED, True)
        # The mismatch was proven, whatever later evidence says.
        await look(decide, statistics(900, a=450, b=450))
        newest = listener.reports[-1]
        assert newest.result.sample_ratio is not None
        assert not newest.result.sample_ratio.mismatch
        assert newest.mismatch
        await decide.drop()
        assert listener.calls[-1] == "experiments left"

    asyncio.run(scenario())


def test_what_is_told_is_what_stands_on_the_topic(decide_log: DecideLog) -> None:
    async def scenario() -> None:
        listener = Listener()
        decide = stage(decide_log, Specs(1), telemetry=listener)
        await decide.on_block(block(statistics(400, **MISMATCH)))
        await decide.evaluate()
        # Of the very look that decides, not of the one after it.
        assert listener.reports[-1].state is DecisionState.STOPPED
        assert listener.reports[-1].result == decide_log.results()[-1]

    asyncio.run(scenario())


def test_no_event_is_left_out_of_the_count_however_often_a_partition_comes_and_goes(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        metrics = Metrics(ROLES, source_partitions=1, max_series=1_000)
        parts.ingest._telemetry = metrics
        for first in (0, 5):
            await parts.ingest.on_block(exposures(first, 5))
            await parts.ingest.close()
        await parts.ingest.on_block(exposures(10, 5))
        await parts.ingest.flush()
        (events,) = [family for family in metrics.collect() if family.name == "streamxp_events"]
        counted = {(one.labels["topic"], one.labels["result"]): one.value for one in events.samples}
        assert counted["exposures", "counted"] == 15
        assert sum(counted.values()) == 15

    asyncio.run(scenario())
