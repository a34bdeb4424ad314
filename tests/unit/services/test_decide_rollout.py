"""The chain from signal to config: orders of people, ramps, crashes at every boundary, and workers that lost."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from stream_xp.domain.decision import Action, ConfigRecord, Decision, RolloutStatus, Signal, SignalData
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.domain.statistics import ArmUnits, Outcomes, PartitionStatistics, Progress, build
from stream_xp.engine import steering
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.steering import Wanted
from stream_xp.services.decide import Decide, heard
from stream_xp.services.decide.signals import signal_id
from tests.unit.services.decide_world import CrashError, Log, T, block, settle, stage

RAMP = {"stages": [{"coverage": 0.25, "minimum_units": 1000}, {"coverage": 1.0, "minimum_units": 1000}]}
PRIMARY = {
    "key": "click",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": "1s",
}
GUARD = {
    "key": "errors",
    "kind": "conversion",
    "role": "guardrail",
    "direction": "decrease",
    "attribution_window": "1s",
    "margin": {"absolute": 0.1},
}


def experiment(**fields: Any) -> ExperimentRecord:
    spec = msgspec.convert(
        {
            "experiment": "exp",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 4000,
            "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
            "metrics": [PRIMARY, GUARD],
        }
        | fields,
        ExperimentSpec,
    )
    coverage = 1.0 if spec.ramp is None else spec.ramp.stages[0].coverage
    first = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0, coverage=coverage)
    return ExperimentRecord(spec=spec, epochs=(first,), design_hash=spec.design_hash())


class Applied:
    """A registry that has the experiment."""

    def __init__(self, record: ExperimentRecord) -> None:
        self.registry = Registry([Entry(offset=1, experiment="exp", in_force_ms=1, record=record)])


def statistics(
    record: ExperimentRecord, applied: int, *, clicks: float = 0.2, errors: float = 0.1, per_arm: int = 2000
) -> bytes:
    """Equal arms in every weight epoch that is known, but for the rates of the treatment."""
    units, moments = {}, {}
    for known in record.epochs:
        epoch = known.epoch
        for arm, rates in (("a", {"click": 0.2, "errors": 0.1}), ("b", {"click": clicks, "errors": errors})):
            n = 0 if known.final else round(2 * per_arm * known.weights[arm])
            units[arm, epoch, ""] = n
            for metric, rate in rates.items():
                hits = round(rate * n)
                moments[metric, arm, epoch, ""] = (n, hits, hits)
    found = build(units=units, moments=moments, crossover_units=0, first_exposure_ms=T, out_of_range={})
    progress = Progress(first_offset=0, applied_offset=applied)
    counted = Outcomes(read=applied + 1, counted=applied + 1)
    return msgspec.json.encode(
        PartitionStatistics(
            experiment="exp",
            version=1,
            design_hash=record.design_hash,
            partition=0,
            exposures=progress,
            rewards=progress,
            watermark_ms=T + 10**7 + applied,
            allowed_lateness_ms=1,
            statistics=found,
            exposure_outcomes=counted,
            reward_outcomes=counted,
        )
    )


def order(action: str, id_: str, **fields: Any) -> bytes:
    data = Order(
        experiment="exp", version=1, action=OperatorAction(action), actor="kim", reason="because", **fields
    )
    return msgspec.json.encode(OrderSignal(id=id_, source="/people", subject="exp", time="t", data=data))


class World:
    """The topics, and who works on them."""

    def __init__(self, log: Log, record: ExperimentRecord) -> None:
        self.log, self.record, self.at = log, record, 400

    def worker(self) -> Decide:
        return stage(self.log, Applied(self.record))  # type: ignore[arg-type]

    async def look(self, decide: Decide, **rates: Any) -> None:
        """Newer statistics, and all that follows from them."""
        self.at += 1
        newest = self.log.records()[-1] if self.log.records() else self.record
        await decide.on_block(block(statistics(newest, self.at, **rates)))
        await settle(decide)

    async def say(self, decide: Decide, value: bytes) -> None:
        self.log.append("xp.signals", value)
        await decide.hear()
        await settle(decide)

    @property
    def actions(self) -> list[str]:
        """What the service has signalled, in order."""
        values = self.log.topics.get("xp.signals", [])
        return [
            msgspec.json.decode(value, type=Signal).data.decision.action
            for value in values
            if b"com.streamxp.decision" in value
        ]

    @property
    def coverages(self) -> list[float]:
        """Of the weight epochs, in order."""
        records = self.log.records()
        return [epoch.coverage for epoch in (records[-1] if records else self.record).epochs]

    @property
    def config(self) -> ConfigRecord:
        return self.log.configs()[-1]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


BETTER: dict[str, Any] = {"clicks": 0.4}
HARMED = {"errors": 0.5}


def test_a_ramp_goes_through_its_stages_and_ships(log: Log) -> None:
    async def scenario() -> None:
        world = World(log, experiment(ramp=RAMP))
        decide = world.worker()
        await world.look(decide, **BETTER)
        assert (world.actions, world.coverages) == (["advance"], [0.25, 1.0])
        assert (world.config.coverage, world.config.status) == (1.0, RolloutStatus.RUNNING)
        assert world.config.weights == {"a": 0.5, "b": 0.5}
        await world.look(decide, **BETTER)
        assert (world.actions, world.coverages) == (["advance", "ship"], [0.25, 1.0, 1.0])
        assert (world.config.weights, world.config.status) == ({"a": 0.0, "b": 1.0}, RolloutStatus.SHIPPED)
        names = [epoch.signal_id for epoch in log.records()[-1].epochs]
        assert names == [None, *(signal.id for signal in log.signals())]

    asyncio.run(scenario())


def test_harm_in_a_ramp_ends_it(log: Log) -> None:
    async def scenario() -> None:
        world = World(log, experiment(ramp=RAMP))
        decide = world.worker()
        await world.look(decide)
        await world.look(decide, **HARMED)
        assert (world.actions, world.coverages) == (["advance", "stop"], [0.25, 1.0, 0.0])
        assert world.config.weights == {"a": 1.0, "b": 0.0}
        assert (world.config.coverage, world.config.status) == (0.0, RolloutStatus.STOPPED)
        # The epoch begins when every worker knows of it, applications follow at once.
        assert world.config.effective_ms == T
        assert log.records()[-1].epochs[-1].effective_ms == T + 7_500

    asyncio.run(scenario())


def test_a_conclusion_waits_for_its_approval_and_a_stop_does_not(log: Log) -> None:
    async def scenario() -> None:
        world = World(log, experiment(conclusion={"mode": "approve"}))
        decide = world.worker()
        for _ in range(3):
            await world.look(decide, **BETTER)
        (signal,) = log.signals()
        assert signal.data.proposed
        result = log.results()[-1]
        assert result.decision.action is Action.HOLD
        assert result.decision.reason.startswith(
            f"waits for approval of signal {signal.id}: ship, b is better"
        )
        assert result.rollout is not None
        assert result.rollout.proposed == signal.id
        assert (log.records(), log.configs()) == ([], [])
        await world.say(decide, order("approve", "o1", signal_id=signal.id))
        assert world.config.signal_id == signal.id
        assert world.config.status is RolloutStatus.SHIPPED
        assert log.results()[-1].decision == signal.data.decision

    asyncio.run(scenario())


def test_harm_stops_while_an_approval_is_waited_for(log: Log) -> None:
    async def scenario() -> None:
        world = World(log, experiment(conclusion={"mode": "approve"}))
        decide = world.worker()
        await world.look(decide, **BETTER)
        await world.look(decide, **BETTER, **HARMED)
        assert world.actions == ["ship", "stop"]
        assert world.config.status is RolloutStatus.STOPPED
        await world.say(decide, order("approve", "o1", signal_id=log.signals()[0].id))
        assert world.config.status is RolloutStatus.STOPPED

    asyncio.run(scenario())


def test_what_was_refused_is_not_proposed_again(log: Log) -> None:
    async def scenario() -> None:
        world = World(log, experiment(conclusion={"mode": "approve"}))
        decide = world.worker()
        await world.look(decide, **BETTER)
        (signal,) = log.signals()
        await world.say(decide, order("reject", "o1", signal_id=signal.id))
        await world.look(decide, **BETTER)
        assert world.actions == ["ship"]
        assert log.results()[-1].decision.reason == "ship b was refused by kim: because"

    asyncio.run(scenario())


def test_orders(log: Log) -> None:
    """Pause, stage, stop, reset and ship, one after the other."""

    async def scenario() -> None:
        world = World(log, experiment(ramp=RAMP))
        decide = world.worker()
        log.append("xp.signals", order("pause", "o1"))
        await world.look(decide)
        assert (world.actions, world.config.paused) == ([], True)
        assert log.results()[-1].decision.reason == "paused by kim: because"
        await world.say(decide, order("resume", "o2"))
        assert (world.actions, world.coverages, world.config.paused) == (["advance"], [0.25, 1.0], False)
        await world.say(decide, order("set_stage", "o3", stage=0))
        assert (world.coverages, world.config.signal_id) == ([0.25, 1.0, 0.25], "o3")
        await world.say(decide, order("stop", "o4"))
        assert (world.config.status, world.config.signal_id) == (RolloutStatus.STOPPED, "o4")
        assert log.results()[-1].decision.reason == "kim: because"
        await world.say(decide, order("reset", "o5"))
        assert (world.config.status, world.config.coverage) == (RolloutStatus.RUNNING, 0.25)
        assert world.config.weights == {"a": 0.5, "b": 0.5}
        await world.say(decide, order("ship", "o6", arm="b"))
        assert (world.config.status, world.config.weights) == (RolloutStatus.SHIPPED, {"a": 0.0, "b": 1.0})
        assert [config.config_version for config in log.configs()] == list(range(1, len(log.configs()) + 1))

    asyncio.run(scenario())


def test_after_a_reset_the_same_evidence_is_another_decision(log: Log) -> None:
    async def scenario() -> None:
        world = World(log, experiment())
        decide = world.worker()
        await world.look(decide, **BETTER)
        (first,) = log.signals()
        await world.say(decide, order("reset", "o1", signal_id=first.id))
        values = [value for value in log.topics["xp.signals"] if b"decision.v1" in value]
        second = msgspec.json.decode(values[-1], type=Signal)
        assert len(values) == 2
        assert second.id != first.id
        assert second.data.since == "o1"
        assert world.config.signal_id == second.id

    asyncio.run(scenario())


def test_an_order_that_changes_nothing_is_told_once(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        heard.log, "warning", lambda event, **named: told.append(named["rule"]), raising=False
    )

    async def scenario() -> None:
        world = World(log, experiment())
        decide = world.worker()
        log.append("xp.signals", order("approve", "o1", signal_id="s"))
        for _ in range(3):
            await world.look(decide)
        assert told == ["no proposal 's' waits"]

    asyncio.run(scenario())


TOPICS = ["xp.signals", "xp.experiments", "xp.config", "xp.results"]


def outcome(world: World) -> Any:
    """What is left on the topics, whatever was written twice on the way."""
    config = msgspec.structs.replace(world.config, config_version=0)
    epochs = [(e.epoch, e.weights, e.coverage, e.final, e.signal_id) for e in world.log.records()[-1].epochs]
    return world.actions, config, epochs


@pytest.mark.parametrize("written", [False, True], ids=["lost", "written"])
@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("way", ["advance and ship", "stop", "approve"])
def test_a_crash_at_any_boundary_is_repaired_by_the_next_owner(
    monkeypatch: pytest.MonkeyPatch, way: str, topic: str, written: bool
) -> None:
    """Every write is once the last one of its worker, just before and just after it is on the broker."""
    fields = {"conclusion": {"mode": "approve"}} if way == "approve" else {"ramp": RAMP}
    rates = HARMED if way == "stop" else BETTER

    async def run(crashing: bool) -> Any:
        log = Log()
        log.serve(monkeypatch)
        world = World(log, experiment(**fields))
        decide = world.worker()
        for at in range(4):
            if way == "approve" and at == 1:
                log.append("xp.signals", order("approve", "o1", signal_id=log.signals()[0].id))
            if crashing:
                log.last_write = (topic, written)
                try:
                    await world.look(decide, **rates)
                except CrashError:
                    decide = world.worker()
                log.last_write = None
            await world.look(decide, **rates)
        return outcome(world)

    assert asyncio.run(run(crashing=True)) == asyncio.run(run(crashing=False))


def test_what_a_worker_says_that_lost_its_partitions_changes_nothing(log: Log) -> None:
    """Its advance, its ship and its allocation come after an order, or after the epochs that followed from another."""

    async def scenario() -> None:
        world = World(log, experiment(ramp=RAMP))
        decide = world.worker()
        await world.look(decide)
        assert world.coverages == [0.25, 1.0]
        advance = log.signals()[0]
        await world.say(decide, order("set_stage", "o1", stage=0))
        before = world.coverages
        await world.say(decide, order("pause", "o2"))
        # The same advance again, one that was decided on fewer epochs, and a ship of before a reset.
        stale = msgspec.structs.replace(advance, id="stale")
        await world.say(decide, msgspec.json.encode(advance))
        await world.say(decide, msgspec.json.encode(stale))
        assert world.coverages == before
        await world.say(decide, order("resume", "o3"))
        await world.say(decide, msgspec.json.encode(msgspec.structs.replace(advance, id="stale too")))
        await world.say(decide, order("stop", "o4"))
        await world.say(decide, order("reset", "o5"))
        ship = Decision(action=Action.SHIP, reason="then", arm="b")
        late = SignalData(decision=ship, result=msgspec.structs.replace(advance.data.result, decision=ship))
        await world.say(
            decide, msgspec.json.encode(msgspec.structs.replace(advance, id="late ship", data=late))
        )
        assert log.configs()[-1].status is RolloutStatus.RUNNING
        assert "late ship" not in {epoch.signal_id for epoch in log.records()[-1].epochs}

    asyncio.run(scenario())


def test_an_epoch_that_another_wrote_first_is_derived_again(log: Log) -> None:
    """`apply` can come between: the registry keeps the first record, and the writer goes on from it."""

    async def scenario() -> None:
        world = World(log, experiment())
        decide = world.worker()
        applied = WeightEpoch(epoch=1, weights={"a": 0.4, "b": 0.6}, effective_ms=7)

        def apply_first(topic: str, value: bytes) -> None:
            if topic == "xp.experiments" and not log.records():
                theirs = msgspec.structs.replace(world.record, epochs=(*world.record.epochs, applied))
                append(topic, msgspec.json.encode(theirs))
            if topic == "xp.experiments" and len(msgspec.json.decode(value)["epochs"]) == 2 and log.records():
                return  # The registry refuses it.
            append(topic, value)

        append, log.append = log.append, apply_first  # type: ignore[method-assign]
        await world.look(decide, **HARMED)
        epochs = log.records()[-1].epochs
        assert epochs[1] == applied
        assert (epochs[2].final, epochs[2].weights) == (True, {"a": 1.0, "b": 0.0})
        assert (world.config.weight_epoch, world.config.status) == (2, RolloutStatus.STOPPED)

    asyncio.run(scenario())


def test_weights_follow_the_policy(log: Log) -> None:
    async def scenario() -> None:
        allocation = {"policy": "thompson", "metric": "click", "interval": "1h"}
        world = World(log, experiment(allocation=allocation, minimum_runtime="9w"))
        wanted = Wanted({"a": 0.3, "b": 0.7}, {}, "b is better")
        decide = world.worker()
        decide._allocator = lambda *_: wanted
        await world.look(decide)
        assert world.config.weights == {"a": 0.3, "b": 0.7}
        assert [epoch.weights["b"] for epoch in log.records()[-1].epochs] == [0.5, 0.7]
        wanted = Wanted({"a": 0.2, "b": 0.8}, {}, "b is better")
        await world.look(decide)
        assert world.actions == ["allocate", "allocate"]

    asyncio.run(scenario())


def with_units(value: bytes, **units: int) -> bytes:
    """The same statistics with other numbers of units exposed."""
    part = msgspec.json.decode(value, type=PartitionStatistics)
    rows = tuple(ArmUnits(arm, 0, "", n) for arm, n in sorted(units.items()))
    return msgspec.json.encode(
        msgspec.structs.replace(part, statistics=msgspec.structs.replace(part.statistics, units=rows))
    )


def test_a_monitor_holds_also_the_next_owner_until_a_person_has_looked(log: Log) -> None:
    async def scenario() -> None:
        record = experiment()
        world = World(log, record)
        first = world.worker()
        for at, a in enumerate([2000, 2000, 2040, 2040], start=401):
            rates = BETTER if at == 404 else {}
            await first.on_block(block(with_units(statistics(record, at, **rates), a=a, b=2000)))
            await settle(first)
            assert bool(log.results()[-1].invalid) == (at == 404)
        assert log.results()[-1].decision.reason == "invalid: b gets no units: 40 in a row went to other arms"
        second = world.worker()
        await second.on_block(block(with_units(statistics(record, 405, **BETTER), a=2100, b=2060)))
        await settle(second)
        held = log.results()[-1]
        assert held.invalid == ("exposure stall of b: proven before, and nobody has resumed or reset since",)
        assert held.evaluated_ms == T
        await world.say(second, order("pause", "o1"))
        assert (log.results()[-1].invalid, world.actions) == (held.invalid, [])
        await world.say(second, order("resume", "o2"))
        assert (log.results()[-1].invalid, world.actions) == ((), ["ship"])
        assert {one.since for one in log.results()[-1].monitors or ()} == {"o2"}

    asyncio.run(scenario())


def test_data_that_are_too_old_ship_nothing(log: Log) -> None:
    async def scenario() -> None:
        record = experiment(monitors={"data_age": "1s"})
        world = World(log, record)
        decide = world.worker()
        part = msgspec.json.decode(statistics(record, 401, **BETTER), type=PartitionStatistics)
        await decide.on_block(
            block(msgspec.json.encode(msgspec.structs.replace(part, watermark_ms=T - 1001)))
        )
        await settle(decide)
        result = log.results()[-1]
        assert (result.invalid, world.actions) == (("the data are 1.0 s old, more than 1s",), [])
        assert result.monitors is not None
        assert result.monitors[1].value == 1001
        fresh = msgspec.structs.replace(part, watermark_ms=T - 1000)
        await decide.on_block(block(msgspec.json.encode(fresh)))
        await settle(decide)
        assert (log.results()[-1].invalid, world.actions) == ((), ["ship"])

    asyncio.run(scenario())


def test_data_that_stop_coming_become_too_old_without_a_record(log: Log) -> None:
    async def scenario() -> None:
        record = experiment(monitors={"data_age": "1s"})
        decide = World(log, record).worker()
        clock: Any = decide._clock
        part = msgspec.json.decode(statistics(record, 401), type=PartitionStatistics)
        await decide.on_block(block(msgspec.json.encode(msgspec.structs.replace(part, watermark_ms=T))))
        await settle(decide)
        clock.advance_to(T + 1000)
        await settle(decide)
        assert [bool(result.invalid) for result in log.results()] == [False]
        clock.advance_to(T + 1001)
        await settle(decide)
        assert [result.invalid for result in log.results()] == [(), ("the data are 1.0 s old, more than 1s",)]
        clock.advance_to(T + 6001)
        await settle(decide)
        assert len(log.results()) == 2
        # New data bring a look, and can become too old again.
        newer = msgspec.structs.replace(part, watermark_ms=clock.now_ms())
        await decide.on_block(block(msgspec.json.encode(newer)))
        await settle(decide)
        clock.advance_to(T + 7002)
        await settle(decide)
        assert [bool(result.invalid) for result in log.results()] == [False, True, False, True]

    asyncio.run(scenario())


@pytest.mark.parametrize(("monitors", "looks"), [(None, 1), ({"data_age": "1s"}, 2)])
def test_what_is_over_or_asks_for_no_age_does_not_become_too_old(
    log: Log, monitors: dict[str, str] | None, looks: int
) -> None:
    async def scenario() -> None:
        world = World(log, experiment(monitors=monitors))
        decide = world.worker()
        if monitors is not None:
            await world.look(decide, **HARMED)
            assert world.actions == ["stop"]
        await world.look(decide)
        before = len(log.results())
        decide._clock.advance_to(10**9)  # type: ignore[attr-defined]
        await settle(decide)
        assert len(log.results()) == before
        assert before >= looks

    asyncio.run(scenario())


def test_ids_tell_decisions_apart() -> None:
    record = experiment()
    log = Log()
    del log

    class Of(msgspec.Struct):
        experiment: str
        version: int
        decision: Decision
        statistics_hash: str
        weight_epochs: int

    def of(action: str, *, digest: str = "x", epochs: int = 1, since: str | None = None) -> str:
        decision = Decision(action=Action(action), reason="r")
        return signal_id(Of(record.spec.experiment, 1, decision, digest, epochs), since)  # type: ignore[arg-type]

    assert of("advance", digest="x") == of("advance", digest="y")
    assert of("stop", epochs=1) == of("stop", epochs=2)
    different = [
        of("stop"),
        of("ship"),
        of("ship", digest="y"),
        of("ship", since="o"),
        of("advance"),
        of("allocate"),
        of("advance", epochs=2),
        of("advance", since="o"),
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("archived", [True, False], ids=["archived", "tombstone"])
def test_applications_are_told_of_the_end_of_an_archived_experiment(log: Log, archived: bool) -> None:
    """No weight epoch can follow, and none is tried."""

    async def scenario() -> None:
        world = World(log, experiment())
        decide = world.worker()
        over = msgspec.structs.replace(world.record, status=Status.ARCHIVED) if archived else None
        log.registries[0].add([Entry(offset=2, experiment="exp", in_force_ms=2, record=over)])
        for _ in range(3):
            await world.look(decide, **HARMED)
        assert log.records() == []
        (config,) = log.configs()
        assert (config.status, config.weights) == (RolloutStatus.STOPPED, {"a": 1.0, "b": 0.0})

    asyncio.run(scenario())


def test_past_the_last_weight_epoch_weights_stay_and_a_stop_is_told_by_its_config(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "most_epochs", lambda _: 1)

    async def scenario() -> None:
        world = World(log, experiment(ramp=RAMP))
        decide = world.worker()
        await world.look(decide, **BETTER)
        result = log.results()[-1]
        assert (world.actions, result.decision.action) == ([], Action.HOLD)
        assert result.rollout is not None
        assert result.rollout.epochs_left == 0
        full = "version 1 has had all its weight epochs, 1"
        assert full in result.rollout.waits
        await world.say(decide, order("set_stage", "o1", stage=1))
        assert log.results()[-1].decision.reason == f"{full}: those that signal o1 asked for cannot follow"
        for _ in range(2):
            await world.look(decide, **HARMED)
        assert world.actions == ["stop"]
        assert log.records() == []
        (config,) = log.configs()
        assert (config.status, config.weights) == (RolloutStatus.STOPPED, {"a": 1.0, "b": 0.0})

    asyncio.run(scenario())


def test_the_end_of_an_experiment_is_told_that_is_archived_right_after_it(log: Log) -> None:
    """Between its last weight epoch and the config."""

    async def scenario() -> None:
        world = World(log, experiment())
        decide = world.worker()
        log.last_write = ("xp.config", False)
        with pytest.raises(CrashError):
            await world.look(decide, **HARMED)
        log.last_write = None
        (ended,) = log.records()
        again = world.worker()
        over = msgspec.structs.replace(ended, status=Status.ARCHIVED)
        log.registries[-1].add([Entry(offset=500, experiment="exp", in_force_ms=500, record=over)])
        await world.look(again, **HARMED)
        assert len(log.records()) == 1
        (config,) = log.configs()
        assert (config.status, config.weight_epoch) == (RolloutStatus.STOPPED, 1)

    asyncio.run(scenario())
