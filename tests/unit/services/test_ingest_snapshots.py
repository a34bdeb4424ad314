"""How the ingest stage writes snapshots, and what it takes of those it finds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

import msgspec
import pytest

from stream_xp.engine.registry import Entry
from stream_xp.engine.snapshot import Restoration
from stream_xp.engine.snapshot_log import Manifest, WholeSnapshot
from stream_xp.engine.state import PartitionState
from stream_xp.errors import ConfigError, StateError
from stream_xp.services import ingest as module
from tests.unit.services.ingest_world import LATENESS_MS, SPEC, Log, Parts, T, exposures, record_of, units


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


def another_spec(name: str) -> Entry:
    record = record_of(msgspec.structs.replace(SPEC, experiment=name))
    return Entry(offset=1, experiment=name, in_force_ms=T, record=record)


def test_a_restart_goes_on_at_the_newest_snapshot(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 6))
        await first.ingest.flush()
        await first.ingest.on_block(exposures(6, 2))
        second = Parts(log)
        await second.ingest.load([0])
        assert second.state().progress["exposures"].applied_offset == 5
        await second.ingest.on_block(exposures(0, 8))
        assert units(second) == 8
        assert second.state().outcomes("exposures").read == 8
        # The snapshot that was loaded is not written over by the next one.
        before = {record.key for record in log.topics["xp.state"]}
        written = len(log.topics["xp.state"])
        await second.ingest.flush()
        assert before.isdisjoint(record.key for record in log.topics["xp.state"][written:])

    asyncio.run(scenario())


def test_a_damaged_snapshot_is_passed_over_for_the_one_before(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        for offset in (0, 4):
            await first.ingest.on_block(exposures(offset, 4))
            await first.ingest.flush()
            first.ingest._tasks[0].next_snapshot = 0.0
        state = log.topics["xp.state"]
        # Of the pages of the second snapshot; the first has its own keys, and stays.
        newest = max(at for at, record in enumerate(state) if b"/rows." in (record.key or b""))
        value = bytearray(state[newest].value or b"")
        value[-1] ^= 1
        state[newest] = state[newest]._replace(value=bytes(value))
        second = Parts(log)
        await second.ingest.load([0])
        assert second.state().progress["exposures"].applied_offset == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("owner", "name"),
    [(WholeSnapshot, "parts"), (Restoration, "__init__"), (PartitionState, "restore")],
    ids=["pages", "arrays", "tables"],
)
def test_while_a_snapshot_is_restored_the_loop_and_other_partitions_go_on(
    log: Log, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    real, entered, gate = getattr(owner, name), threading.Event(), threading.Event()

    def held_up(self: Any, *args: Any) -> Any:
        entered.set()
        # On the event loop nobody could open the gate.
        assert gate.wait(30), "the event loop stands still"
        return real(self, *args)

    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 6))
        await first.ingest.flush()
        monkeypatch.setattr(owner, name, held_up)
        second = Parts(log)
        loading = asyncio.create_task(second.ingest.load([0]))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        # Partition 1 is empty. It is read while partition 0 is restored, and brings a spec that nobody knew.
        await second.ingest.on_block(exposures(0, 3)._replace(partition=1))
        assert second.ingest.partitions == [1]
        second.specs.registry.add([another_spec("other")])
        gate.set()
        await loading
        assert second.ingest.partitions == [0, 1]
        await second.ingest.on_block(exposures(6, 2))
        assert (second.state().units, second.state(1).units) == (8, 3)

    asyncio.run(scenario())


def test_without_a_whole_snapshot_a_log_cut_since_counting_began_is_an_error_of_state(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        pages = [record for record in log.topics["xp.state"] if record.key.count(b"/") == 2]
        log.topics["xp.state"] = [record for record in log.topics["xp.state"] if record not in pages[:1]]
        await Parts(log).ingest.load([0])  # from the beginning of the log, which is all there
        log.starts["xp.exposures"] = 2
        with pytest.raises(
            StateError, match=r"xp\.exposures 0: no whole snapshot .* starts at 2.* began at 0"
        ):
            await Parts(log).ingest.load([0])

    asyncio.run(scenario())


def test_what_a_damaged_snapshot_counted_of_one_topic_is_asked_of_a_snapshot_without_it(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        log.topics["xp.state"] = [
            record._replace(value=b"?") if record.key.count(b"/") == 2 else record
            for record in log.topics["xp.state"]
        ]
        # Counts again from the beginning, and writes a snapshot before it has any exposure.
        second = Parts(log)
        await second.ingest.on_block(exposures(0, 5, topic="xp.rewards"))
        await second.ingest.close()
        log.starts["xp.exposures"] = 2
        with pytest.raises(StateError, match=r"xp\.exposures 0: no whole snapshot .* began at 0"):
            await Parts(log).ingest.load([0])

    asyncio.run(scenario())


def test_with_only_a_damaged_manifest_a_log_that_was_cut_is_an_error_of_state(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        log.topics["xp.state"] = [
            record._replace(value=b"?") if record.key.count(b"/") == 1 else record
            for record in log.topics["xp.state"]
        ]
        await Parts(log).ingest.load([0])  # from the beginning of the log, which is all there
        log.starts["xp.exposures"] = 2
        with pytest.raises(StateError, match=r"partition 0: .* do not say where counting began"):
            await Parts(log).ingest.load([0])

    asyncio.run(scenario())


def test_a_damaged_manifest_beside_one_without_a_topic_is_an_error_where_that_topic_was_cut(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        log.topics["xp.state"] = [
            record._replace(value=b"?") if record.key.count(b"/") == 1 else record
            for record in log.topics["xp.state"]
        ]
        # Begins anew, and writes a snapshot that can be read and has no exposure yet.
        second = Parts(log)
        await second.ingest.on_block(exposures(0, 5, topic="xp.rewards"))
        await second.ingest.close()
        third = Parts(log)
        await third.ingest.load([0])  # nothing is cut: the exposures are all there to be counted
        assert third.state().progress["rewards"].next_offset == 5
        assert third.state().progress["exposures"].next_offset is None
        log.starts["xp.exposures"] = 2
        with pytest.raises(StateError, match=r"partition 0: .* do not say where counting began"):
            await Parts(log).ingest.load([0])

    asyncio.run(scenario())


@pytest.mark.parametrize("counted", [0, 2], ids=["nothing of a topic", "less of a topic"])
def test_of_two_owners_snapshots_the_one_is_taken_after_which_the_log_goes_on(log: Log, counted: int) -> None:
    async def scenario() -> None:
        early, late = Parts(log), Parts(log)
        for owner in (early, late):
            await owner.ingest.on_block(exposures(0, counted))
        # Neither knows of the other: one covers more of the exposures, the other one more altogether.
        await early.ingest.on_block(exposures(counted, 4))
        await late.ingest.on_block(exposures(0, 9, topic="xp.rewards"))
        await early.ingest.close()
        await late.ingest.close()
        third = Parts(log)
        await third.ingest.load([0])
        assert third.ingest._tasks[0].position() == (counted, 9)
        # What the first one let be committed is deleted.
        log.starts["xp.exposures"] = counted + 4
        fourth = Parts(log)
        await fourth.ingest.load([0])
        assert fourth.ingest._tasks[0].position() == (counted + 4, 0)
        # Now neither of them can go on: the one that covers more is what the error speaks of.
        log.starts["xp.rewards"] = 1
        with pytest.raises(StateError, match=r"xp\.exposures 0: .*the log starts at 4|starts at 6, but 2 is"):
            await Parts(log).ingest.on_block(exposures(counted + 4, 1))

    asyncio.run(scenario())


def test_a_snapshot_brings_the_specs_that_its_loader_has_not_read_yet(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        newer = msgspec.structs.replace(SPEC, version=2)
        first.specs.registry.add(
            [Entry(offset=1, experiment="exp", in_force_ms=T + 2, record=record_of(newer))]
        )
        await first.ingest.on_block(exposures(0, 6))
        await first.ingest.close()
        log.starts["xp.exposures"] = 6
        second = Parts(log)
        await second.ingest.load([0])
        assert [slot.version for slot in second.specs.registry.slots] == [1, 2]
        counted = [second.state().statistics(slot).units for slot in second.specs.registry.slots]
        assert [sum(row.units for row in rows) for rows in counted] == [2, 4]

    asyncio.run(scenario())


def test_offsets_of_a_snapshot_that_was_not_committed_are_committed_by_whoever_loads_it(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 3))
        await first.ingest.close()
        second = Parts(log)
        await second.ingest.load([0])
        assert second.source.commits == {("xp.exposures", 0): 3, ("xp.rewards", 0): 0}

    asyncio.run(scenario())


def test_a_snapshot_of_another_lateness_refuses_to_start(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 4))
        await first.ingest.close()
        await Parts(log, allowed_lateness_ms=LATENESS_MS + 1).ingest.load([0])

    with pytest.raises(ConfigError, match="allowed_lateness_ms=1000, the setting is 1001"):
        asyncio.run(scenario())


@pytest.mark.parametrize("name", ["activation_delay_ms", "future_tolerance_ms", "max_record_bytes"])
def test_a_snapshot_of_other_rules_refuses_to_start(log: Log, name: str) -> None:
    async def scenario() -> None:
        first = Parts(log, **{name: 4_321})
        await first.ingest.on_block(exposures(0, 4))
        await first.ingest.close()
        await Parts(log, **{name: 4_321}).ingest.load([0])
        await Parts(log, **{name: 4_322}).ingest.load([0])

    with pytest.raises(ConfigError, match=f"{name}=4321, the setting is 4322"):
        asyncio.run(scenario())


def test_the_manifest_is_the_last_record_of_a_snapshot(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4))
        await parts.ingest.close()
        *pages, last = log.topics["xp.state"]
        manifest = msgspec.json.decode(last.value or b"", type=Manifest)
        assert len(pages) == sum(part.count for part in manifest.parts.values())
        assert manifest.exposures.applied_offset == 3
        assert parts.ingest.partitions == []

    asyncio.run(scenario())


def test_the_next_snapshot_writes_what_changed(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4))
        await parts.ingest.flush()
        first = len(log.topics["xp.state"])
        parts.ingest._tasks[0].next_snapshot = 0.0
        await parts.ingest.on_block(exposures(4, 1, bad=frozenset({4})))
        await parts.ingest.flush()
        written = [record.key or b"" for record in log.topics["xp.state"][first:]]
        # A record that was refused changes no unit: the outcomes, the offsets and the manifest are all there is.
        assert [key.split(b"/")[-1] for key in written[:-1]] == [b"tail.0.1"]

    asyncio.run(scenario())


def test_snapshots_of_all_partitions_together_have_one_share_of_the_time(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        now_s, send, durable = 0.0, log.send, log.durable

        async def working(topic: str, **record: Any) -> Awaitable[Any]:
            nonlocal now_s
            now_s += 1.0 if topic == "xp.state" else 0.0
            return await send(topic, **record)

        async def waiting(sent: list[Awaitable[Any]], topic: str) -> None:
            nonlocal now_s
            now_s += 1_000.0
            await durable(sent, topic)

        monkeypatch.setattr(log, "send", working)
        monkeypatch.setattr(log, "durable", waiting)
        monkeypatch.setattr(module, "_elapsed_s", lambda: now_s)
        parts = Parts(log)
        for partition in (0, 1):
            await parts.ingest.on_block(exposures(0, 4)._replace(partition=partition))
        first, second = parts.ingest._tasks[0], parts.ingest._tasks[1]
        await parts.ingest.flush()
        # The first ones are complete: no later one takes as long.
        assert first.snapshot_work_s == second.snapshot_work_s == 0.0
        written = len(log.topics["xp.state"])
        for task in (first, second):
            await parts.ingest.on_block(exposures(4, 4)._replace(partition=task.state.partition))
            task.next_snapshot = 0.0
        began_s = asyncio.get_running_loop().time()
        await parts.ingest.flush()
        states = [record for record in log.topics["xp.state"][written:] if record.value is not None]
        # A second for each record, and nothing for waiting or for what predecessors left.
        assert first.snapshot_work_s == second.snapshot_work_s == len(states) / 2 > 1
        # The second one knows of both.
        share_s = module.SNAPSHOT_SHARE * len(states) / 2
        assert began_s + share_s <= first.next_snapshot < began_s + 1.5 * share_s
        assert began_s + 2 * share_s <= second.next_snapshot < began_s + 2.5 * share_s

    asyncio.run(scenario())


def test_what_predecessors_left_is_deleted_once_two_snapshots_of_ones_own_are_whole(log: Log) -> None:
    async def scenario() -> None:
        first = Parts(log)
        await first.ingest.on_block(exposures(0, 4))
        await first.ingest.close()
        left = {record.key for record in log.topics["xp.state"]}
        second = Parts(log)
        await second.ingest.load([0])
        for offset, deleted in ((4, set()), (8, left), (12, left)):
            await second.ingest.on_block(exposures(offset, 4))
            second.ingest._tasks[0].next_snapshot = 0.0
            await second.ingest.flush()
            gone = [record.key for record in log.topics["xp.state"] if record.value is None]
            assert (set(gone), len(gone)) == (deleted, len(deleted))
        third = Parts(log)
        await third.ingest.load([0])
        assert third.state().progress["exposures"].applied_offset == 15

    asyncio.run(scenario())


def test_a_worker_that_wakes_up_late_spoils_no_snapshot_of_its_successor(log: Log) -> None:
    async def scenario() -> None:
        zombie = Parts(log)
        await zombie.ingest.on_block(exposures(0, 4))
        await zombie.ingest.flush()
        owner = Parts(log)
        await owner.ingest.on_block(exposures(0, 20))
        for offset in (20, 24, 28):
            owner.ingest._tasks[0].next_snapshot = 0.0
            await owner.ingest.flush()
            await owner.ingest.on_block(exposures(offset, 4))
            zombie.ingest._tasks[0].next_snapshot = 0.0
            await zombie.ingest.on_block(exposures(4 + offset - 20, 4))
            await zombie.ingest.flush()
        third = Parts(log)
        await third.ingest.load([0])
        assert third.state().progress["exposures"].applied_offset == 27
        assert units(third) == 28

    asyncio.run(scenario())


def test_a_snapshot_of_another_schema_refuses_to_start(log: Log) -> None:
    async def scenario() -> None:
        old = b'{"snapshot_id":"aa","partition":0,"chunks":1,"size_bytes":9,"turn":0,"schema":1}'
        await log.send("xp.state", key=b"0/0", value=old, partition=0)
        await Parts(log).ingest.load([0])

    with pytest.raises(ConfigError, match="schema 2, this version reads schema 4"):
        asyncio.run(scenario())


def test_specs_that_came_since_the_last_record_are_in_the_snapshot(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        await parts.ingest.on_block(exposures(0, 4))
        # Another partition's block made the worker read it.
        parts.specs.registry.add([another_spec("later")])
        await parts.ingest.flush()
        second = Parts(log)
        await second.ingest.load([0])
        assert second.state().progress["exposures"].applied_offset == 3

    asyncio.run(scenario())


def test_the_bound_of_units_is_that_of_the_settings_and_is_recorded(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log, max_units=3)
        await parts.ingest.on_block(exposures(0, 5))
        await parts.ingest.close()
        newest = log.statistics()[-1]
        assert newest.rules is not None
        assert (newest.rules.max_units, newest.statistics.over_limit) == (3, 2)
        assert newest.exposure_outcomes.over_limit == 2
        await Parts(log, max_units=4).ingest.load([0])

    with pytest.raises(ConfigError, match="max_units=3, the setting is 4"):
        asyncio.run(scenario())
