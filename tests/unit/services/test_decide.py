"""The decide stage: one decision for each version, whatever was said, lost or handed over before."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from stream_xp.domain.decision import Action, ConfigRecord, Result, RolloutStatus
from stream_xp.domain.experiment import ExperimentRecord, WeightEpoch
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.engine.registry import Entry
from stream_xp.errors import DependencyError
from stream_xp.services.decide import records
from tests.unit.services.decide_world import (
    EVEN,
    MISMATCH,
    CrashError,
    Log,
    Specs,
    T,
    block,
    entry,
    look,
    settle,
    spec,
    stage,
    statistics,
)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


def test_a_decision_is_signalled_once_and_latches(log: Log) -> None:
    async def scenario() -> None:
        decide = stage(log, Specs(1))
        await look(decide, statistics(400, **MISMATCH))
        await look(decide, statistics(900, a=450, b=450))
        (signal,) = log.signals()
        assert signal.data.decision.action is Action.STOP
        results = log.results()
        assert [result.decision for result in results] == [signal.data.decision] * len(results)
        assert [result.look for result in results] == list(range(1, len(results) + 1))
        (record,) = log.records()
        assert record.epochs[-1].final
        assert (record.epochs[-1].signal_id, record.epochs[-1].coverage) == (signal.id, 0.0)
        (config,) = log.configs()
        assert (config.status, config.signal_id) == (RolloutStatus.STOPPED, signal.id)
        assert (config.weight_epoch, config.coverage) == (1, 0.0)

    asyncio.run(scenario())


def test_without_a_decision_there_is_a_result_and_nothing_else(log: Log) -> None:
    async def scenario() -> None:
        decide = stage(log, Specs(1))
        await look(decide, statistics(400, **EVEN))
        await decide.evaluate()
        assert [result.decision.action for result in log.results()] == [Action.HOLD]
        assert (log.signals(), log.configs()) == ([], [])

    asyncio.run(scenario())


def test_what_was_signalled_before_is_not_signalled_again(log: Log) -> None:
    async def scenario() -> None:
        await look(stage(log, Specs(1)), statistics(400, **MISMATCH))
        before = dict(log.topics)
        again = stage(log, Specs(1))
        await look(again, statistics(500, a=500, b=0))
        assert log.topics["xp.signals"] == before["xp.signals"]
        assert len(log.configs()) == 1
        looks = [result.look for result in log.results()]
        assert looks == list(range(1, len(looks) + 1))

    asyncio.run(scenario())


def test_a_config_that_was_not_written_any_more_follows_its_signal(log: Log) -> None:
    async def scenario() -> None:
        await look(stage(log, Specs(1)), statistics(400, **MISMATCH))
        del log.topics["xp.config"]
        # Even though the evidence has gone since.
        await look(stage(log, Specs(1)), statistics(5_000, a=2_500, b=2_500))
        (signal,) = log.signals()
        (config,) = log.configs()
        assert (config.signal_id, config.weights) == (signal.id, {"a": 1.0, "b": 0.0})

    asyncio.run(scenario())


def test_config_versions_grow_also_past_those_of_others(log: Log) -> None:
    async def scenario() -> None:
        decide = stage(log, Specs(1))
        await look(decide, statistics(100, a=50, b=50))
        applied = ConfigRecord(
            experiment="exp",
            version=1,
            status=RolloutStatus.RUNNING,
            weights={"a": 0.5, "b": 0.5},
            weight_epoch=0,
            effective_ms=0,
            config_version=7,
        )
        log.topics["xp.config"] = [msgspec.json.encode(applied)]
        await look(decide, statistics(500, a=450, b=50))
        assert [config.config_version for config in log.configs()] == [7, 8]

    asyncio.run(scenario())


def test_a_new_version_is_decided_on_its_own_statistics(log: Log) -> None:
    async def scenario() -> None:
        decide = stage(log, Specs(1, 2))
        await look(decide, statistics(400, **MISMATCH), statistics(400, **EVEN, partition=1))
        await look(decide, statistics(500, a=60, b=60, version=2))
        newest = log.results()[-1]
        assert (newest.version, newest.decision.action) == (2, Action.HOLD)
        assert sum(arm.units for arm in newest.arms) == 120
        assert newest.look == 1
        # What is late of the old version changes nothing any more, and nothing follows from its stop.
        before = dict(log.topics)
        await look(decide, statistics(600, **MISMATCH))
        assert log.topics == before
        assert (log.configs(), log.records()) == ([], [])
        await look(decide, statistics(900, **MISMATCH, version=2))
        assert [signal.data.result.version for signal in log.signals()] == [1, 2]
        assert log.configs()[-1].version == 2

    asyncio.run(scenario())


def test_an_older_record_of_a_partition_changes_nothing(log: Log) -> None:
    async def scenario() -> None:
        decide = stage(log, Specs(1))
        await look(decide, statistics(400, **EVEN))
        await look(decide, statistics(300, **MISMATCH), statistics(400, **MISMATCH))
        assert len(log.results()) == 1

    asyncio.run(scenario())


def test_all_partitions_are_read_before_the_first_look(log: Log) -> None:
    async def scenario() -> None:
        log.topics["xp.stats"] = [statistics(400, a=0, b=400, partition=1)]
        await look(stage(log, Specs(1)), statistics(400, a=400, b=0))
        (result,) = log.results()
        assert [arm.units for arm in result.arms] == [400, 400]
        assert result.decision.action is Action.HOLD

    asyncio.run(scenario())


def test_statistics_that_are_here_before_their_spec_are_looked_at_when_it_comes(log: Log) -> None:
    async def scenario() -> None:
        specs = Specs()
        decide = stage(log, specs)
        await decide.on_block(block(statistics(400, **MISMATCH)))
        await decide.evaluate()
        assert log.results() == []
        specs.registry.add([entry(1)])
        await decide.evaluate()
        assert len(log.signals()) == 1

    asyncio.run(scenario())


def many(count: int) -> tuple[Specs, list[bytes]]:
    """Experiments that were begun at once, and statistics that end each of them."""
    specs, found = Specs(), []
    for at in range(count):
        design = spec(name=f"exp{at}")
        record = ExperimentRecord(
            spec=design,
            epochs=(WeightEpoch(epoch=0, weights=design.weights, effective_ms=0),),
            design_hash=design.design_hash(),
        )
        specs.registry.add([Entry(offset=at, experiment=design.experiment, in_force_ms=1, record=record)])
        of_one = msgspec.json.decode(statistics(400, **MISMATCH), type=PartitionStatistics)
        of_this = msgspec.structs.replace(
            of_one, experiment=design.experiment, design_hash=design.design_hash()
        )
        found.append(msgspec.json.encode(of_this))
    return specs, found


def test_what_follows_of_one_evaluation_is_written_together_step_by_step(log: Log) -> None:
    async def scenario() -> None:
        specs, found = many(5)
        await look(stage(log, specs), *found)
        # The config waits until the weight epoch was read back.
        steps = ["signals", "experiments", "results", "config", "results"]
        assert log.waits == [(f"xp.{topic}", 5) for topic in steps]
        names = [f"exp{at}" for at in range(5)]
        assert [signal.subject for signal in log.signals()] == names
        assert [record.spec.experiment for record in log.records()] == names
        assert [config.experiment for config in log.configs()] == names
        assert [result.experiment for result in log.results()] == names * 2
        ids = [signal.id for signal in log.signals()]
        assert [record.epochs[-1].signal_id for record in log.records()] == ids
        assert [config.signal_id for config in log.configs()] == ids

    asyncio.run(scenario())


STEPS = ["xp.signals", "xp.experiments", "xp.results", "xp.config"]


@pytest.mark.parametrize("failing", STEPS)
def test_nothing_follows_from_what_the_broker_does_not_have(log: Log, failing: str) -> None:
    async def scenario() -> None:
        specs, found = many(3)
        log.failing = {failing}
        with pytest.raises(DependencyError, match=failing):
            await look(stage(log, specs), *found)
        written = STEPS[: STEPS.index(failing) + 1]
        assert {topic: len(values) for topic, values in log.topics.items()} == dict.fromkeys(written, 3)
        log.failing = set()
        # What was written though nobody was told is found by the next owner, and what follows is written.
        await look(stage(log, specs), *found)
        assert [len(log.topics[name]) for name in ("xp.signals", "xp.experiments", "xp.config")] == [3, 3, 3]

    asyncio.run(scenario())


def test_handing_over_waits_for_a_decision_that_is_being_written(log: Log) -> None:
    async def scenario() -> None:
        decide = stage(log, Specs(1))
        await decide.on_block(block(statistics(400, **MISMATCH)))
        log.flows.clear()
        evaluating = asyncio.create_task(decide.evaluate())
        await asyncio.sleep(0.01)
        dropping = asyncio.create_task(decide.drop())
        await asyncio.sleep(0.01)
        assert not dropping.done()
        log.flows.set()
        await asyncio.gather(evaluating, dropping)
        assert decide.experiments == []
        await look(stage(log, Specs(1)), statistics(500, a=500, b=0))
        assert len(log.signals()) == 1

    asyncio.run(scenario())


def test_after_a_rebalance_everything_is_read_again(log: Log) -> None:
    async def scenario() -> None:
        decide = stage(log, Specs(1))
        await look(decide, statistics(400, **EVEN))
        await decide.drop()
        # Another owner decided in between.
        await look(stage(log, Specs(1)), statistics(600, a=600, b=0))
        await look(decide, statistics(700, a=700, b=0))
        assert len(log.signals()) == 1
        assert log.results()[-1].decision == log.signals()[0].data.decision

    asyncio.run(scenario())


def test_of_two_signals_the_first_counts(log: Log) -> None:
    async def scenario() -> None:
        await look(stage(log, Specs(1)), statistics(400, **MISMATCH))
        (first,) = log.signals()
        del log.topics["xp.config"], log.topics["xp.experiments"]
        log.topics["xp.signals"].append(msgspec.json.encode(msgspec.structs.replace(first, id="second")))
        await look(stage(log, Specs(1)), statistics(400, **MISMATCH))
        assert [config.signal_id for config in log.configs()] == [first.id]

    asyncio.run(scenario())


def test_two_owners_who_look_at_the_same_statistics_say_the_same_at_two_times(log: Log) -> None:
    async def scenario() -> None:
        heir = stage(log, Specs(1))
        zombie = stage(log, Specs(1))
        for owner in (heir, zombie):
            await owner.on_block(block(statistics(400, **MISMATCH)))  # reads the signals: there is none
        await heir.evaluate()
        zombie._clock.advance_to(T + 60_000)  # type: ignore[attr-defined]
        await zombie.evaluate()
        first, second = log.signals()
        assert (second.id, second.data.decision) == (first.id, first.data.decision)
        # Readers know the second by its id; it says when it was looked at, and is not the same byte for byte.
        assert second.time != first.time
        one, other = first.data.result, second.data.result
        assert (other.statistics_hash, other.metrics, other.sample_ratio) == (
            one.statistics_hash,
            one.metrics,
            one.sample_ratio,
        )

    asyncio.run(scenario())


def test_a_signal_of_a_former_owner_that_came_first_is_what_counts(log: Log) -> None:
    async def scenario() -> None:
        owner = stage(log, Specs(1))
        await owner.on_block(block(statistics(400, **MISMATCH)))  # reads the signals: there is none
        log.last_write = ("xp.signals", True)  # the former owner does not come to what follows
        with pytest.raises(CrashError):
            await look(stage(log, Specs(1)), statistics(300, a=300, b=0))
        log.last_write = None
        (first,) = log.signals()
        await owner.evaluate()
        _, second = log.signals()
        assert second.data.decision != first.data.decision
        # Even the result of this very look has the decision in force.
        assert [result.decision for result in log.results()] == [first.data.decision]
        await settle(owner)
        (record,) = log.records()
        (config,) = log.configs()
        assert (record.epochs[-1].signal_id, config.signal_id) == (first.id, first.id)
        await look(owner, statistics(900, a=450, b=450))
        assert log.results()[-1].decision == first.data.decision
        assert len(log.signals()) == 2

    asyncio.run(scenario())


def test_statistics_that_cannot_be_read_stop_no_experiment(log: Log) -> None:
    async def scenario() -> None:
        impossible = statistics(500, **EVEN).replace(
            b'"moments":[]', b'"moments":[["click","a",0,"",2,"9","1"]]'
        )
        assert impossible != statistics(500, **EVEN)
        decide = stage(log, Specs(1))
        await look(decide, b"{", b'{"experiment": 1}', impossible, statistics(400, **EVEN))
        (result,) = log.results()
        assert result.offsets["0"].exposures == 400

    asyncio.run(scenario())


def test_nothing_ships_while_source_partitions_are_far_apart(log: Log) -> None:
    def half(applied: int, partition: int) -> bytes:
        found = msgspec.json.decode(statistics(applied, a=500, b=500, partition=partition))
        found["statistics"]["moments"] = [
            ["click", "a", 0, "", 500, "50", "50"],
            ["click", "b", 0, "", 500, "250", "250"],
        ]
        return msgspec.json.encode(found)

    async def scenario() -> None:
        decide = stage(log, Specs(1))
        await look(decide, half(1_000, 0), half(100_000, 1))
        (result,) = log.results()
        assert result.decision.action is Action.HOLD
        assert result.invalid == ("the source partitions are 99.0 s apart",)
        await look(decide, half(99_000, 0))
        assert log.results()[-1].decision.action is Action.SHIP

    asyncio.run(scenario())


UNREADABLE = [b"", b"{", b"hello", b'{"schema": 2}', b'{"id":"\xff"}', b'{"x":' * 5_000, b"[" * 5_000]


def test_unreadable_records_among_what_was_said_stop_nothing_and_are_told(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(records.log, "error", lambda event, **_: told.append(event), raising=False)

    async def scenario() -> None:
        await look(stage(log, Specs(1)), statistics(400, **MISMATCH))
        for topic in ("xp.signals", "xp.results", "xp.config"):
            log.topics[topic] = [*UNREADABLE, *log.topics[topic], *UNREADABLE]
        again = stage(log, Specs(1))
        await again.on_block(block(statistics(500, a=500, b=0)))
        assert told.count("record refused") == 3 * 2 * len(UNREADABLE)
        await again.evaluate()
        results = log.topics["xp.results"]
        newest = msgspec.json.decode(results[-1], type=Result)
        assert (newest.look, newest.decision.action) == (3, Action.STOP)
        # The decision of before still stands, so none is sent again.
        assert len(log.topics["xp.signals"]) == 1 + 2 * len(UNREADABLE)

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [2**62, -5, 10**30])
def test_a_number_that_could_not_go_on_is_refused(log: Log, number: int) -> None:
    async def scenario() -> None:
        await look(stage(log, Specs(1)), statistics(400, **EVEN))
        (result,) = log.results()
        log.topics["xp.results"] = [msgspec.json.encode(msgspec.structs.replace(result, look=number))]
        await look(stage(log, Specs(1)), statistics(500, **EVEN))
        assert msgspec.json.decode(log.topics["xp.results"][-1], type=Result).look == 1

    asyncio.run(scenario())


FOREIGN = {
    "another arm": (b'["a",0,"",200,200]', b'["z",0,"",200,200]'),
    "another segment": (b'["a",0,"",200,200]', b'["a",0,"x=y",200,200]'),
    "negative units": (b'["a",0,"",200,200]', b'["a",0,"",-1,-1]'),
    "units beyond any": (b'["a",0,"",200,200]', b'["a",0,"",9007199254740993,200]'),
    "more settled units than units": (b'["a",0,"",200,200]', b'["a",0,"",200,201]'),
    "settled units below none": (b'["a",0,"",200,200]', b'["a",0,"",200,-1]'),
    "refusals below none": (b'"out_of_range":{},"over_limit":0', b'"out_of_range":{},"over_limit":-1'),
    "another metric": (b'"moments":[]', b'"moments":[["zz","a",0,"",2,"1","1"]]'),
    "a sum beyond any": (b'"moments":[]', b'"moments":[["click","a",0,"",1,"%s","%s"]]'),
    "rows of another kind": (b'"events":[]', b'"events":[["click","a",0,"",1,1]]'),
    "bins of another kind": (b'"histograms":[]', b'"histograms":[["click","a",0,"",[[1,1]]]]'),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_statistics_that_no_worker_can_have_written_are_not_evaluated(log: Log, case: str) -> None:
    old, new = FOREIGN[case]
    if b"%s" in new:
        new %= (b"9" * 200, b"9" * 400)
    good = statistics(400, **EVEN)
    assert good.count(old) == 1

    async def scenario() -> None:
        decide = stage(log, Specs(1))
        await look(decide, good.replace(old, new))
        assert log.results() == []
        await look(decide, statistics(500, **EVEN))
        assert len(log.results()) == 1

    asyncio.run(scenario())


def test_statistics_of_a_weight_epoch_that_is_not_known_yet_are_invalid_until_it_is(log: Log) -> None:
    async def scenario() -> None:
        specs = Specs(1)
        decide = stage(log, specs)
        await look(decide, statistics(400, **EVEN).replace(b',0,"",200,200]', b',1,"",200,200]'))
        assert log.results()[-1].invalid[0] == "units of an unknown weight epoch: 1"
        known = entry().record
        assert known is not None
        later = WeightEpoch(epoch=1, weights=known.spec.weights, effective_ms=1)
        newer = msgspec.structs.replace(known, epochs=(*known.epochs, later))
        specs.registry.add([Entry(offset=9, experiment="exp", in_force_ms=9, record=newer)])
        await look(decide, statistics(402, **EVEN).replace(b',0,"",200,200]', b',1,"",200,200]'))
        assert not any("weight epoch" in reason for reason in log.results()[-1].invalid)

    asyncio.run(scenario())
