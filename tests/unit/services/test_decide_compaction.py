"""A refused record that came last: compaction would keep it, and lose the one that everybody goes by."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from stream_xp.domain.experiment import ExperimentRecord, Status, WeightEpoch
from stream_xp.engine.registry import Entry, Registry
from tests.unit.services.decide_world import Log, T, block, settle, stage
from tests.unit.services.test_decide_rollout import Applied, World, experiment, order, statistics


class Compacted(Log):
    """Keeps the keys and tombstones of `xp.experiments` too."""

    def __init__(self) -> None:
        super().__init__()
        self.tombstones = 0

    async def send(self, topic: str, *, key: bytes, value: bytes | None) -> Any:
        assert key == b"exp"
        if value is None:
            self.tombstones += 1
            return asyncio.sleep(0)
        return await super().send(topic, key=key, value=value)

    def left(self) -> ExperimentRecord:
        """What compaction leaves under the experiment's key."""
        return self.records()[-1]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Compacted:
    log = Compacted()
    log.serve(monkeypatch)
    return log


def another_epoch(record: ExperimentRecord) -> ExperimentRecord:
    """What a worker that lost its partitions writes: the epoch that another one wrote first, with other weights."""
    epochs = (*record.epochs[:1], WeightEpoch(epoch=1, weights={"a": 0.9, "b": 0.1}, effective_ms=9))
    return msgspec.structs.replace(record, epochs=epochs)


def another_design(record: ExperimentRecord) -> ExperimentRecord:
    """What a hand can write."""
    spec = msgspec.structs.replace(record.spec, alpha=0.2)
    return msgspec.structs.replace(record, spec=spec, design_hash=spec.design_hash())


def too_few_epochs(record: ExperimentRecord) -> ExperimentRecord:
    return msgspec.structs.replace(record, epochs=record.epochs[:1])


@pytest.mark.parametrize("made", [another_epoch, another_design, too_few_epochs])
def test_the_owner_writes_the_record_in_force_again(log: Compacted, made: Any) -> None:
    async def scenario() -> None:
        world = World(log, experiment())
        decide = world.worker()
        await world.say(decide, order("stop", "o1"))
        await world.look(decide)
        (in_force,) = log.records()
        log.append("xp.experiments", msgspec.json.encode(made(in_force)))
        assert log.left() != in_force
        for _ in range(3):
            await world.look(decide)
        assert log.left() == in_force
        # Once, and nothing else follows from it: it is read back as the record that it is.
        assert len(log.records()) == 3
        assert len(log.configs()) == 1
        assert log.registries[0].newest("exp", 1) == in_force
        # Who reads only what compaction leaves goes by the same record.
        (one,) = [e for e in log.entries() if e.record == log.left() and e.offset == 102]
        assert Registry([one]).newest("exp", 1) == in_force

    asyncio.run(scenario())


def test_every_weight_epoch_is_in_it(log: Compacted) -> None:
    """Also where the newest record that counts archives the experiment and lacks the newest epoch."""

    async def scenario() -> None:
        world = World(log, experiment())
        decide = world.worker()
        await world.say(decide, order("stop", "o1"))
        await world.look(decide)
        (in_force,) = log.records()
        over = msgspec.structs.replace(world.record, status=Status.ARCHIVED)
        for record in (over, another_design(in_force)):
            log.append("xp.experiments", msgspec.json.encode(record))
        await world.look(decide)
        assert log.left() == msgspec.structs.replace(over, epochs=in_force.epochs)

    asyncio.run(scenario())


def test_a_tombstone_is_written_again_as_one(log: Compacted) -> None:
    """Or the experiment would begin anew from the refused record."""

    async def scenario() -> None:
        record = experiment()
        decide = stage(log, Applied(record))  # type: ignore[arg-type]
        registry = log.registries[0]
        registry.add([Entry(offset=2, experiment="exp", in_force_ms=2, record=None)])
        (refused,) = registry.add([Entry(offset=3, experiment="exp", in_force_ms=3, record=record)])
        assert refused.rule.startswith("version 1 has ended")
        await decide.on_block(block(statistics(record, 400)))
        await settle(decide)
        assert (log.tombstones, log.records()) == (1, [])

    asyncio.run(scenario())


def test_it_is_tried_again_until_it_is_read_back(log: Compacted, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        record = experiment()
        decide = stage(log, Applied(record))  # type: ignore[arg-type]
        await decide.on_block(block(statistics(record, 400)))
        log.append("xp.experiments", msgspec.json.encode(another_design(record)))
        log.registries.clear()  # nothing is read back
        for _ in range(3):
            await decide.evaluate()
        assert [one.design_hash == record.design_hash for one in log.records()] == [False, True]
        monkeypatch.setattr(decide._clock, "now_ms", lambda: T + 10_000)
        await decide.evaluate()
        assert len(log.records()) == 3

    asyncio.run(scenario())


def test_who_does_not_own_an_experiment_writes_nothing(log: Compacted) -> None:
    async def scenario() -> None:
        record = experiment()
        decide = stage(log, Applied(record))  # type: ignore[arg-type]
        log.append("xp.experiments", msgspec.json.encode(another_design(record)))
        await settle(decide)
        assert len(log.records()) == 1

    asyncio.run(scenario())


def test_a_newer_record_that_counts_buries_the_refused_one_by_itself() -> None:
    record = experiment()
    registry = Registry([Entry(offset=1, experiment="exp", in_force_ms=1, record=record)])
    refused = Entry(offset=2, experiment="exp", in_force_ms=2, record=another_design(record))
    assert len(registry.add([refused])) == 1
    assert [entry.offset for entry in registry.buried()] == [1]
    assert registry.add([Entry(offset=3, experiment="exp", in_force_ms=3, record=record)]) == []
    assert registry.buried() == []
