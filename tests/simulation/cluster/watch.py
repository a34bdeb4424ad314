"""What must hold at every moment, looked at where it happens.

Faults are collected, not raised: most of this runs inside of a node, whose worker would take an exception for its own.
"""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import msgspec
from faust.types.tuples import TP

from stream_xp.adapters.kafka_log import LogWriter
from stream_xp.domain.decision import Action, ConfigRecord, Result, Signal
from stream_xp.domain.operator import OrderSignal
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.engine.columns import Block
from stream_xp.engine.snapshot_log import SnapshotReader
from stream_xp.errors import StateError
from stream_xp.services.experiments import Experiments
from stream_xp.services.ingest import Ingest
from tests.simulation.cluster.clients import Write
from tests.simulation.cluster.log import Record
from tests.simulation.cluster.loop import VirtualLoop
from tests.simulation.cluster.node import NodeClock
from tests.simulation.cluster.orders import Ruling, Version

SOURCES = ("xp.exposures", "xp.rewards")
_FAR = 10**9
_COLUMNS = ("offset", "timestamp_ms", "key", "value")


class BrokenError(AssertionError):
    """An invariant does not hold."""


class Loaded(NamedTuple):
    """What a worker that started now would find: where it goes on, and the statistics it would publish."""

    following: dict[str, int]
    statistics: dict[tuple[str, int], PartitionStatistics]


class Watch:
    """What was seen so far.

    Attributes:
        broken: what does not hold.
        commits: (sequence, topic partition, offset), for the order of commits and dead letters.
        spoilt: source partitions of which a snapshot was damaged: a worker may go on at an older one.
        vanished: those of which a snapshot was taken away without a trace.
        shortened: those of which records were deleted; `cut`: above what is durable.
        kept: of each topic partition that was cut so, what was committed at that time.
        forked: those with a snapshot of a former owner that the owner need not know of.
        replayed: those that a worker who loads them at the end counts again from damage on.
        late_signals: (experiment, version) with a signal of a former owner that the owner need not know of.
        rulings: what is in force of each version after all that stands on the topic of signals.
        taken_back: versions of which a person took something back.
        published, results, signals, orders, configs: decoded as they came, with who wrote them.
    """

    def __init__(self, world: Any) -> None:
        self._world = world
        self._rng = Random(world.seed)
        self.names: list[str] = []
        self.broken: list[str] = []
        self.commits: list[tuple[int, TP, int]] = []
        self.spoilt: set[int] = set()
        self.vanished: set[int] = set()
        self.shortened: set[int] = set()
        self.cut: set[int] = set()
        self.kept: dict[TP, int] = {}
        self.forked: set[int] = set()
        self.replayed: set[int] = set()
        self.late_signals: set[Version] = set()
        self.rulings: dict[Version, Ruling] = {}
        self.taken_back: set[Version] = set()
        self.orders: list[OrderSignal] = []
        self._ruled: dict[Version, list[Ruling]] = {}
        self._said: set[tuple[str, str]] = set()
        self._unread: set[Version] = set()
        self._began: dict[tuple[str, int], int] = {}
        self.probe_share = 0.1
        self.published: list[PartitionStatistics] = []
        self.results: list[tuple[str, int, Result]] = []
        self.signals: list[Signal] = []
        self.configs: list[ConfigRecord] = []
        self._due: list[tuple[TP, int]] = []
        self._loaded: dict[int, tuple[tuple[int, ...], Loaded]] = {}
        self._reached: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def stands_still(self) -> bool:
        """Whether a partition cannot go on, for want of records: cut above what is durable, or that was damaged."""
        return bool(self.cut or self.shortened & self.spoilt)

    def check(self) -> None:
        """Raise what does not hold; called after every step."""
        due, self._due = self._due, []
        for tp, offset in due:
            self._check_durable(tp, offset)
        if self.broken:
            raise BrokenError("; ".join(self.broken))

    def fail(self, invariant: str, text: str) -> None:
        """Something does not hold."""
        self._world.note(f"{invariant} BROKEN: {text}")
        self.broken.append(f"{invariant}: {text}")

    # --- offsets ----------------------------------------------------------------------------------------------

    def declared(self, node: Any, tp: TP, offset: int) -> None:
        """A worker says that everything below `offset` is durable (I3, I4)."""
        self._rises("durable offset", (node.name, node.life, tp), (offset,))
        if self._rng.random() < self.probe_share:
            self._due.append((tp, offset))

    def committed(self, node: Any, tp: TP, offset: int) -> None:
        """The group has a new offset (I3)."""
        self.commits.append((self._world.log.tick(), tp, offset))
        if self._rng.random() < self.probe_share:
            self._due.append((tp, offset))

    def sought(self, node: Any, tp: TP, offset: int) -> None:
        """A worker wants an offset: one of this generation never one below what is committed (I3).

        Excluded are partitions with a late snapshot (`World.is_late`): of two snapshots of which neither covers the
        other the one that covers more is taken, which may be further back in one topic; and damaged ones.
        """
        current = node in self._world.members and node.generation == self._world.generation
        committed = self._world.committed.get(tp, 0)
        sure = tp.partition not in self.spoilt | self.forked
        if current and not node.told and sure and offset < committed:
            self.fail("I3", f"{node.name} wants {tp.topic}/{tp.partition} {offset}, committed is {committed}")

    def _check_durable(self, tp: TP, offset: int) -> None:
        if tp.partition in self.spoilt | self.forked | self.cut:
            return
        following = self.loaded(tp.partition).following[tp.topic]
        if following < offset:
            self.fail(
                "I3", f"{tp.topic}/{tp.partition}: {offset} is said to be durable, a load has {following}"
            )

    def loaded(self, partition: int) -> Loaded:
        """What `load_now` gives; what was loaded before must be the same, where nothing that it reads has changed."""
        topics = self._world.log.topics
        read = (topics["xp.experiments"][0], *(topics[name][partition] for name in ("xp.state", *SOURCES)))
        as_of = tuple(one.changes for one in read)
        found = load_now(self._world, partition)
        before, held = self._loaded.get(partition, (as_of, found))
        if before == as_of and held != found:
            self.fail("I13", f"partition {partition} loads differently each time: {held}, then {found}")
        self._loaded[partition] = (as_of, found)
        return found

    def _rises(self, what: str, key: tuple[Any, ...], reached: tuple[int, ...]) -> None:
        before = self._reached.get((what, key))
        if before is not None and reached < before:
            self.fail("I4", f"{what} of {key} went from {before} to {reached}")
        self._reached[what, key] = reached

    # --- records ----------------------------------------------------------------------------------------------

    def appended(self, write: Write, record: Record) -> None:
        """A node's record is on the log: it can be decoded, and follows from what was there."""
        if record.value is None:
            return
        if write.topic == "xp.state" and self._world.is_late(write):
            self.forked.add(write.partition)
        writer = (record.writer, write.life)
        try:
            if write.topic == "xp.stats":
                self._take_statistics(writer, _decoded(record.value, PartitionStatistics))
            elif write.topic == "xp.results":
                self._take_result(writer, _decoded(record.value, Result))
            elif write.topic == "xp.signals":
                self._take_signal(_decoded(record.value, Signal), late=self._world.is_late(write))
            elif write.topic == "xp.config":
                self._take_config(_decoded(record.value, ConfigRecord))
        except msgspec.MsgspecError as error:
            self.fail("I8", f"{write.topic}: {error}: {record.value!r}")

    def _take_statistics(self, writer: tuple[str, int], record: PartitionStatistics) -> None:
        if writer[0] != "a dead node":
            key = (*writer, record.experiment, record.version, record.partition)
            self._rises("published position", key, record.position())
        for name, outcomes, progress in (
            ("exposures", record.exposure_outcomes, record.exposures),
            ("rewards", record.reward_outcomes, record.rewards),
        ):
            read = 0
            if progress.first_offset is not None and progress.applied_offset is not None:
                read = progress.applied_offset + 1 - progress.first_offset
            self._check_beginning(name, record.partition, progress.first_offset)
            if not outcomes.conserved() or outcomes.read != read:
                self.fail("I1", f"{name} of {record.partition}: {outcomes} of {read} records")
        self.published.append(record)

    def _check_beginning(self, name: str, partition: int, first: int | None) -> None:
        """I2: nobody begins anew behind records that are gone, once a snapshot had counted them.

        Excluded is what cannot be known: that there was a snapshot of which nothing is left.
        """
        if first is None:
            return
        began = self._began.setdefault((name, partition), first)
        # What is committed since a cut may have been counted anew, from where the log began then.
        committed = self._world.committed_at(f"xp.{name}", partition)
        counted = self.kept.get(TP(f"xp.{name}", partition), committed) > began
        if first != began and partition not in self.vanished and (counted or partition not in self.cut):
            self.fail("I2", f"{name} {partition}: counted from {began}, and now from {first}")
        self._began[name, partition] = first

    def _take_result(self, writer: tuple[str, int], result: Result) -> None:
        for name, life, earlier in reversed(self.results):
            if (name, life) == writer and (earlier.experiment, earlier.version) == (
                result.experiment,
                result.version,
            ):
                moved = earlier.decision.action is not Action.HOLD and earlier.decision != result.decision
                if moved and (result.experiment, result.version) not in self.taken_back:
                    self.fail("I10", f"{result.experiment}: {earlier.decision} became {result.decision}")
                break
        self.results.append((*writer, result))

    def _take_signal(self, signal: Signal, *, late: bool) -> None:
        """I9, I10: it says what its result says, and of each version only one counts until it is taken back.

        Whoever has an experiment has read all that was said before it decides, but not a signal of a former owner or an
        order of a person that comes while it writes: after one of these it may say once what changes nothing.
        """
        version = _version(signal)
        if signal.data.decision.action is Action.HOLD or signal.data.decision != signal.data.result.decision:
            self.fail("I9", f"signal {signal.id} says {signal.data.decision}")
        changes = self._rule(version, signal)
        if late:
            self.late_signals.add(version)
            self._unread.add(version)
        elif changes or version in self._unread:
            self._unread.discard(version)
        else:
            self.fail("I10", f"signal {signal.id} of {version} changes nothing: {self.rulings[version]}")
        self.signals.append(signal)

    def ordered(self, order: OrderSignal) -> None:
        """A person's order is on the log."""
        version = (order.data.experiment, order.data.version)
        self.orders.append(order)
        self._unread.add(version)
        before = self.rulings.get(version, Ruling())
        if self._rule(version, order) and self.rulings[version].since != before.since:
            self.taken_back.add(version)

    def _rule(self, version: Version, record: Signal | OrderSignal) -> bool:
        """Whether a record changes what is in force; one that came before changes nothing."""
        ruled = self._ruled.setdefault(version, [Ruling()])
        before, told = ruled[-1], (record.source, record.id)
        ruled.append(before if told in self._said else before.after(record))
        self._said.add(told)
        self.rulings[version] = ruled[-1]
        return ruled[-1] is not before

    def _take_config(self, config: ConfigRecord) -> None:
        """I9, I10: it tells what was in force after some prefix of the topic of signals."""
        version = (config.experiment, config.version)
        told = (config.signal_id, config.status, config.paused)
        ruled = [(one.demand, one.status, one.paused) for one in self._ruled.get(version, ())]
        if told not in ruled:
            self.fail("I10", f"config of {version} tells {told}, in force was {ruled}")
        self.configs.append(config)

    # --- nodes ------------------------------------------------------------------------------------------------

    def ended(self, node: Any) -> None:
        """A process came to its end: only what the schedule did to it may be why."""
        error = node.error
        if error is None or type(error).__name__ in node.excused or "took more than" in str(error):
            return
        # One that is no member any more need not know that what it misses was counted by its heir, and then deleted.
        zombie = node.told or node not in self._world.members
        cut = isinstance(error, StateError) and "the log starts at" in str(error)
        if cut and (zombie or self.stands_still()):
            return
        self.fail("worker", f"{node.name} ended with {error!r}")


class _Prober:
    """A node that nobody sees: what it writes goes nowhere, and it waits for nothing."""

    name, alive, paused, life = "prober", True, False, 0

    def __init__(self, world: Any) -> None:
        self.world, self.clock = world, NodeClock(world, 0)
        self.written: list[Write] = []
        self.following: dict[str, int] = {}

    def accept(self, write: Write) -> None:
        self.written.append(write)
        write.future.set_result(None)

    async def seek(self, topic: str, partition: int, offset: int) -> None:
        self.following[topic] = offset

    def end(self, topic: str, partition: int) -> None:
        return None

    def durable(self, topic: str, partition: int, offset: int) -> None:
        pass


def has_lost_the_newest(world: Any, partition: int) -> bool:
    """Whether the newest snapshot on the log would be another one if nothing of them had been damaged."""
    held = world.log.topics["xp.state"][partition]
    damaged, intact = SnapshotReader(partition), SnapshotReader(partition)
    for record in held.live:
        damaged.take(record.key, record.value)
        intact.take(record.key, held.history[record.offset].value)
    newest = [[one.manifest.snapshot_id for one in reader.whole()[:1]] for reader in (damaged, intact)]
    return newest[0] != newest[1]


def load_now(world: Any, partition: int, *, replays: bool = False) -> Loaded:
    """Load a partition as a new worker would, from what is on the log now; `replays`: and then read it to its end.

    Where it would go on it says when it is given a block from far away; so nothing here knows the snapshot's format.
    """
    prober = _Prober(world)
    loop = VirtualLoop()
    loop.now_ms = world.loop.now_ms
    task = loop.start(_probe(prober, partition, replays=replays), prober)
    loop.settle()
    try:
        task.result()
    except StateError as error:
        raise BrokenError(f"I13: partition {partition} cannot be loaded and read: {error}") from error
    written = [write.value or b"" for write in prober.written if write.topic == "xp.stats"]
    records = [msgspec.json.decode(value, type=PartitionStatistics) for value in written]
    return Loaded(prober.following, {(record.experiment, record.version): record for record in records})


async def _probe(prober: _Prober, partition: int, *, replays: bool) -> None:
    settings = prober.world.settings
    writer, experiments = LogWriter(settings), Experiments(settings)
    await writer.start()
    await experiments.start()
    ingest = Ingest(
        settings,
        experiments=experiments,
        source=prober,
        writer=writer,
        clock=prober.clock,
        stats_partitions=len(prober.world.log.topics["xp.stats"]),
    )
    await ingest.load([partition])
    for topic in SOURCES * replays:
        await ingest.on_block(_everything(prober.world, topic, partition))
    for topic in SOURCES:
        await ingest.on_block(Block(topic, partition, _FAR, _FAR + 1, [], [], [], [], []))
    await ingest.flush()


def _everything(world: Any, topic: str, partition: int) -> Block:
    """All that the log has of a partition, as fetched before the specs were read."""
    held = world.log.topics[topic][partition]
    offsets, stamps, keys, values = ([getattr(one, name) for one in held.live] for name in _COLUMNS)
    headers = [()] * len(offsets)
    return Block(topic, partition, held.start, held.end, offsets, stamps, keys, values, headers, fetched_ns=0)


def _version(signal: Signal) -> tuple[str, int]:
    return signal.data.result.experiment, signal.data.result.version


def _decoded(value: bytes, kind: type[Any]) -> Any:
    """The record; I8: the decoder takes no number that is not finite, and null, as NaN is written, is no float."""
    return msgspec.json.decode(value, type=kind)
