"""The world: a broker, a consumer group, a clock and nodes, and everything that can happen to them.

`World` has a method for each thing that can happen. The random scheduler (schedule.py) and the hypothesis machine
(test_stateful.py) only choose among them. What must hold is looked at where it happens (`Watch` in watch.py) and at the
end of a schedule (verdict.py).
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import structlog
from aiokafka.errors import KafkaTimeoutError
from faust.types.tuples import TP

from stream_xp.adapters import kafka_log
from stream_xp.domain.codec import Limits
from stream_xp.domain.operator import OrderSignal
from stream_xp.engine.columns import Block
from stream_xp.services import experiments as experiments_module
from stream_xp.services import ingest as ingest_module
from stream_xp.services import worker as worker_module
from stream_xp.services.partitioning import partition_of
from stream_xp.settings import Settings
from tests.simulation.cluster.clients import AIOKAFKA, Write
from tests.simulation.cluster.log import Log, Partition
from tests.simulation.cluster.loop import OWNER, VirtualLoop, wait_for
from tests.simulation.cluster.node import Node
from tests.simulation.cluster.orders import People
from tests.simulation.cluster.shortcuts import REPLACED, begin
from tests.simulation.cluster.traffic import (
    ACTIVATION_MS,
    CATALOGUES,
    FUTURE_MS,
    GRACE_MS,
    LATENESS_MS,
    LONGEST_WINDOW_MS,
    START_MS,
    Traffic,
)
from tests.simulation.cluster.watch import Watch

SOURCES = ("xp.exposures", "xp.rewards")
_INBOX = 4


class Owner(NamedTuple):
    """A node, and when among everything that happened on the broker it began."""

    name: str
    at: int


class World:
    """Everything outside the code under test, and the nodes that run it.

    Attributes:
        flow: share of the calls to the broker that go through at once, without the scheduler being asked.
        calm: no faults any more; every call goes through.
        group: members in the order of joining; `committed` offsets; `generation`.
        orphans: writes of nodes that died, still on their way.
        starved: the topic that the broker does not answer about for a while; `slow`: that it takes no writes to.
        owners: per source and statistics partition, who got it last, and when.
        happened, gates: lines of the trace so far, and calls of nodes to what is outside of them.
        tasks: the names under which snapshots are written: who began with each, and when.

    With `orders` there are people who order things, and in half of the worlds what is concluded is proposed to them.
    """

    def __init__(self, seed: int, *, trace: list[str] | None = None, orders: bool = False) -> None:
        self.seed, self.rng, self.trace = seed, Random(seed), trace
        begin(seed)
        self.loop = VirtualLoop()
        choose = self.rng.choice
        partitions = choose([1, 1, 2, 3])
        self.settings = Settings(
            broker="embedded",
            partitions=partitions,
            allowed_lateness_ms=LATENESS_MS,
            future_tolerance_ms=FUTURE_MS,
            activation_delay_ms=ACTIVATION_MS,
            idle_grace_ms=GRACE_MS,
            flush_interval_ms=1,
            snapshot_interval_ms=choose([1, 1, 40, 200]),
            roles=choose([("ingest",), ("ingest", "decide"), ("ingest", "decide")]),
        )
        counts = dict.fromkeys(("exposures", "rewards", "state"), partitions)
        counts |= {"experiments": 1, "stats": choose([1, 2]), "deadletter": 1}
        counts |= {"results": 1, "signals": 1, "config": 1}
        self.log = Log({f"xp.{name}": count for name, count in counts.items()})
        self.flow = choose([0.0, 0.5, 0.9])
        self.most_records = choose([1, 4, 20])
        self.skewed = choose([False, False, False, True])
        self.traffic = Traffic(self.rng)
        self.calm = False
        self.parked: list[tuple[Node, str, asyncio.Future[None]]] = []
        self.nodes: list[Node] = []
        self.members: list[Node] = []
        self.generation = 0
        self.rebalancing = False
        self.committed: dict[TP, int] = {}
        self.orphans: list[Write] = []
        self.owners: dict[TP, Owner] = {}
        self.tasks: dict[str, Owner] = {}
        self.ids = itertools.count()
        self.starved = self.slow = "nothing"
        self.happened = self.gates = 0
        self.watch = Watch(self)
        guarded = choose([False, True, True])
        # What harms, or is invalid, is stopped before anybody can be asked.
        asks = orders and not guarded
        if asks:
            self.traffic.go_well()
        self.catalogue = CATALOGUES[guarded, asks]
        self.people = People(self.rng, asked=asks) if orders else None
        self.specs(b"one", self.catalogue.record("one", 1), "in force from the beginning")
        self.loop.now_ms += ACTIVATION_MS

    # --- small things -----------------------------------------------------------------------------------------

    @property
    def now_ms(self) -> int:
        """The broker's clock."""
        return START_MS + self.loop.now_ms

    @property
    def limits(self) -> Limits:
        """As the ingest stage has them."""
        return Limits(record_bytes=self.settings.max_record_bytes, future_ms=FUTURE_MS)

    def topics(self) -> Iterator[tuple[str, list[Partition]]]:
        """Every topic with its partitions."""
        return iter(self.log.topics.items())

    def note(self, text: str) -> None:
        """Something happens, of which the trace gets a line."""
        self.happened += 1
        if self.trace is not None:
            self.trace.append(f"{self.loop.now_ms:6d} ms  {text}")

    def batch(self) -> int:
        """How many records an answer of the broker holds at most."""
        return 10_000 if self.calm else self.rng.choice([3, 50, 10_000])

    def name_task(self, node: Any, size: int) -> str:
        """A name that nobody else has, under which a node will write the snapshots of one partition."""
        name = f"{next(self.ids):0{2 * size}x}"
        self.tasks[name] = Owner(node.name, self.log.tick())
        return name

    def is_late(self, write: Write) -> bool:
        """Whether a snapshot or a signal is of somebody whose partition was given away before it is written.

        Until then a new owner finds it when it begins; afterwards it may not know of it. A snapshot is of whoever
        loaded the partition, which lives on in a worker that failed to hand over and got the partition back.
        """
        if write.topic == "xp.state":
            owner = self.owners.get(TP("xp.exposures", write.partition))
            began = self.tasks[write.key.decode().split("/")[1].partition(".")[0]]
        else:
            owner = self.owners.get(
                TP("xp.stats", partition_of(write.key.decode(), len(self.log.topics["xp.stats"])))
            )
            began = Owner(write.sender, write.sent)
        return owner is not None and (began.name != owner.name or began.at < owner.at)

    async def gate(self, label: str) -> None:
        """Where a node's code reaches the broker: here others may go first, or the node may end."""
        node = OWNER.get()
        self.gates += 1
        if not isinstance(node, Node) or self.calm:
            return
        if not label.endswith(self.starved) and self.rng.random() < self.flow:
            return
        future = self.loop.create_future()
        self.parked.append((node, label, future))
        await future

    def open_gates(self) -> list[int]:
        """Places in `parked` of those who can go on."""
        self.parked = [one for one in self.parked if one[0].alive and not one[2].done()]
        return [
            at
            for at, (node, label, _) in enumerate(self.parked)
            if not node.paused and (self.calm or not label.endswith(self.starved))
        ]

    def release(self, at: int) -> None:
        """Let one who stands at a gate go through."""
        node, label, future = self.parked.pop(at)
        self.note(f"{node.name}: {label}")
        future.set_result(None)

    def pass_time(self, step_ms: int) -> None:
        """Move all clocks on."""
        self.loop.advance(step_ms)

    def stall(self, step_ms: int) -> None:
        """Nothing runs for so long, and then everything that is due by then."""
        self.loop.leap(step_ms)

    # --- what producers do ------------------------------------------------------------------------------------

    def produce(self, topic: str, *, kind: str | None = None) -> None:
        """Append one record to a source topic."""
        key, value = self.traffic.record(topic.removeprefix("xp."), self.now_ms, kind=kind)
        partition = zlib.crc32(key) % self.settings.partitions
        stamp_ms = self.now_ms
        if self.skewed and self.rng.random() < 0.1:
            stamp_ms -= self.rng.randrange(30)
        record = self.log.append(topic, partition, key=key, value=value, now_ms=stamp_ms, writer="producer")
        self.note(f"{topic}/{partition} {record.offset}: {key!r} {value!r}"[:200])

    def change_specs(self, at: int) -> None:
        """Append a change of the topic of experiments."""
        what, key, value = self.catalogue.changes[at % len(self.catalogue.changes)]
        self.specs(key, value, what)

    def specs(self, key: bytes, value: bytes | None, what: str) -> None:
        """Append to the topic of experiments."""
        self.log.append("xp.experiments", 0, key=key, value=value, now_ms=self.now_ms, writer="user")
        self.note(f"experiments: {key!r} {what}")

    def order(self) -> None:
        """Somebody orders something, if there is anybody."""
        if self.people is not None:
            self._write_order(self.people.order(self.watch.rulings))

    def change_minds(self) -> None:
        """Somebody stops an experiment and takes it back."""
        if self.people is not None:
            for one in self.people.change_their_minds():
                self._write_order(one)

    def _write_order(self, one: OrderSignal) -> None:
        key, value = one.subject.encode(), msgspec.json.encode(one)
        partition = partition_of(one.subject, len(self.log.topics["xp.signals"]))
        self.log.append("xp.signals", partition, key=key, value=value, now_ms=self.now_ms, writer="person")
        self.note(
            f"a person: {one.id}: {one.data.action} {one.subject} {one.data.version} {one.data.signal_id}"
        )
        self.watch.ordered(one)

    def truncate(self, tp: TP, start: int) -> None:
        """Retention deletes what is below `start`; above what is committed, the partition must stand still for good."""
        self.note(f"{tp.topic}/{tp.partition} now begins at {start}")
        self.log.truncate(tp.topic, tp.partition, start)
        self.watch.shortened.add(tp.partition)
        if start > self.committed.get(tp, 0):
            self.watch.cut.add(tp.partition)
            self.watch.kept[tp] = self.committed.get(tp, 0)

    def spoil(self, partition: int, offset: int, at: int) -> None:
        """Damage a record of the state topic: a bit of it, or all of it."""
        (record,) = [r for r in self.log.topics["xp.state"][partition].live if r.offset == offset]
        value: bytes | None = None
        if record.value is not None and at < len(record.value) * 8:
            spoilt = bytearray(record.value)
            spoilt[at // 8] ^= 1 << at % 8
            value = bytes(spoilt)
        self.note(f"xp.state/{partition} {offset} {record.key!r} is {'gone' if value is None else 'damaged'}")
        self.log.spoil("xp.state", partition, offset, value)
        if value is None and is_manifest(record.key):
            self.watch.vanished.add(partition)
        self.watch.spoilt.add(partition)

    def committed_at(self, topic: str, partition: int) -> int:
        """The group's offset of a partition."""
        return self.committed.get(TP(topic, partition), 0)

    def everything_is_old(self) -> bool:
        """Whether no record's time, window or lateness is still to pass."""
        read = (one.history for name in SOURCES for one in self.log.topics[name])
        newest = max((record.timestamp_ms for records in read for record in records), default=START_MS)
        return self.now_ms - 60 > newest + FUTURE_MS + LONGEST_WINDOW_MS + LATENESS_MS + GRACE_MS + 200

    # --- what the broker does with writes ----------------------------------------------------------------------

    def pending_writes(self, *, appended: bool) -> list[tuple[Node, Write]]:
        """The next write of each queue that the broker has not taken, or not acknowledged."""
        found = []
        for node in self.nodes:
            if node.running and any(node.writes.values()):
                for (topic, _), queue in node.writes.items():
                    # The broker takes the writes of a queue in order: those that it has come first.
                    if not queue or (topic == self.slow and not appended) or queue[-1].appended > appended:
                        continue
                    waiting = queue[0] if appended else next(one for one in queue if not one.appended)
                    if waiting.appended == appended:
                        found.append((node, waiting))
        return found

    def append(self, write: Write, writer: str) -> None:
        """The broker takes a write."""
        write.appended = True
        record = self.log.append(
            write.topic, write.partition, key=write.key, value=write.value, now_ms=self.now_ms, writer=writer
        )
        self.note(f"{writer}: {write.topic}/{write.partition} {record.offset} is written: {write.key!r}")
        self.watch.appended(write, record)

    def acknowledge(self, node: Node, write: Write) -> None:
        """The node hears that the broker has a write."""
        node.writes[write.topic, write.partition].remove(write)
        if not write.future.done():
            write.future.set_result(None)

    def refuse(self, node: Node, write: Write) -> None:
        """The node hears that a write failed, and with it those behind it; the broker may have it all the same."""
        self.note(f"{node.name}: {write.topic}/{write.partition} FAILS{' though written' * write.appended}")
        node.excused.add("DependencyError")
        for one in node.writes.pop((write.topic, write.partition)):
            if not one.future.done():
                one.future.set_exception(KafkaTimeoutError())
                one.future.exception()

    def append_orphan(self, at: int) -> None:
        """A write of a node that is gone arrives."""
        self.append(self.orphans.pop(at), "a dead node")

    # --- the group --------------------------------------------------------------------------------------------

    def join(self, node: Node) -> None:
        """A node starts to consume."""
        if node in self.members or not node.alive:
            return
        self.members.append(node)
        node.consumes = node.told = node.joined = True
        self.rebalance()

    def leave(self, node: Node) -> None:
        """A node is no member any more."""
        if node.alive and node in self.members:
            self.members.remove(node)
            self.rebalance()

    def rebalance(self) -> None:
        """The coordinator asks everybody to join again."""
        if not self.rebalancing:
            self.note("a rebalance begins")
        self.rebalancing = True
        self._assign_if_joined()

    def tell(self, node: Node) -> None:
        """A node's heartbeat tells it of the rebalance, or that it is no member any more."""
        if node.told:
            return
        node.told = node.revoking = True
        self.note(f"{node.name}: hears that its partitions are revoked")
        self.loop.start(self._revoke(node), node)

    async def _revoke(self, node: Node) -> None:
        revoked = set(node.app.consumer.positions)
        # Faust empties the buffers of the agents first; what an agent has begun with goes on.
        for inbox in node.app.inboxes.values():
            while not inbox.empty():
                inbox.get_nowait()
        for handler in node.app.on_partitions_revoked:
            await handler(node.app, revoked)
        self.commit(node)
        self._forget(node)
        node.revoking, node.joined = False, True
        if node not in self.members and node.serves:
            self.members.append(node)
            self.rebalancing = True
        self._assign_if_joined()

    def _forget(self, node: Node) -> None:
        consumer = node.app.consumer
        node.life += 1
        consumer.durable.clear()
        consumer.positions.clear()
        consumer.ends.clear()
        node.serving.clear()

    def expire(self, node: Node) -> None:
        """The coordinator has not heard of a member for too long; its partitions go to others."""
        if node in self.members:
            self.note(f"{node.name}: is thrown out of the group")
            self.members.remove(node)
            # One that is about to join joins as a new member.
            node.told, node.joined = node.revoking, False
            self.rebalance()

    def _assign_if_joined(self) -> None:
        if not self.rebalancing or not all(node.told and node.joined for node in self.members):
            return
        self.rebalancing = False
        self.generation += 1
        for node in self.members:
            node.told = node.joined = False
            node.generation = self.generation
            node.life += 1
            self._assign(node)

    def _assign(self, node: Node) -> None:
        at = self.members.index(node)
        positions = node.app.consumer.positions
        for topic in (*SOURCES, *["xp.stats"] * ("decide" in self.settings.roles)):
            count, members = len(self.log.topics[topic]), len(self.members)
            share, more = divmod(count, members)
            first = at * share + min(at, more)
            for partition in range(first, first + share + (at < more)):
                tp = TP(topic, partition)
                positions[tp] = self.committed.get(tp, self.log.topics[topic][partition].start)
                self.owners[tp] = Owner(node.name, self.log.tick())
        self.note(f"{node.name}: generation {self.generation}, {sorted(positions.items())}")
        assigned = set(positions)

        async def tell() -> None:
            for handler in node.app.on_partitions_assigned:
                await handler(node.app, assigned)

        if node.alive:
            self.loop.start(tell(), node)

    def commit(self, node: Node) -> None:
        """Commit what the node says is durable; refused to one that is not of this generation."""
        if not node.alive or node not in self.members or node.generation != self.generation:
            return
        for tp, offset in node.app.consumer.durable.items():
            if self.committed.get(tp) != offset:
                self.note(f"{node.name}: commits {tp.topic}/{tp.partition} {offset}")
                self.committed[tp] = offset
                self.watch.committed(node, tp, offset)

    # --- fetching ---------------------------------------------------------------------------------------------

    def fetchable(self) -> list[tuple[Node, TP]]:
        """Who can be given what is next of a partition."""
        return [
            (node, tp)
            for node in self.nodes
            if node.serves and not node.told
            for tp in node.app.consumer.positions
            if node.app.inboxes[tp.topic].qsize() < _INBOX
        ]

    def serve(self, node: Node, tp: TP, count: int) -> None:
        """The broker answers a fetch; the answer is on its way."""
        held = self.log.topics[tp.topic][tp.partition]
        position = node.app.consumer.positions[tp]
        if position < held.start:
            position = node.app.consumer.positions[tp] = held.start
        records = held.read(position, count)
        block = None
        if records:
            block = Block(
                topic=tp.topic,
                partition=tp.partition,
                fetch_offset=position,
                next_offset=records[-1].offset + 1,
                offsets=[record.offset for record in records],
                timestamps_ms=[record.timestamp_ms for record in records],
                keys=[record.key for record in records],
                values=[record.value for record in records],
                headers=[()] * len(records),
            )
        node.serving[tp] = (position, block, held.end)

    def arrive(self, node: Node, tp: TP) -> None:
        """The answer to a fetch is here; it counts only if nobody sought in between."""
        served = node.serving.pop(tp, None)
        consumer = node.app.consumer
        if served is None or tp not in consumer.positions:
            return
        position, block, end = served
        consumer.ends[tp] = (end, node.clock.now_ms())
        if block is not None and consumer.positions[tp] == position:
            consumer.positions[tp] = block.next_offset
            self.note(f"{node.name}: gets {tp.topic}/{tp.partition} {position} to {block.next_offset - 1}")
            node.app.inboxes[tp.topic].put_nowait(block._replace(fetched_ns=self.log.tick()))

    def seek(self, node: Node, tp: TP, offset: int) -> None:
        """The worker asks for an offset."""
        self.note(f"{node.name}: seeks {tp.topic}/{tp.partition} {offset}")
        self.watch.sought(node, tp, offset)
        node.app.consumer.positions[tp] = offset

    def displace(self, node: Node, tp: TP, offset: int) -> None:
        """The consumer's position is not where it should be: too far on (a hole) or back (a repeat)."""
        self.note(f"{node.name}: position of {tp.topic}/{tp.partition} slips to {offset}")
        node.app.consumer.positions[tp] = offset
        node.excused.add("StateError")

    # --- nodes --------------------------------------------------------------------------------------------------

    def spawn(self) -> Node:
        """Start a process."""
        skew_ms = self.rng.randrange(-60, 61) if self.skewed else 0
        node = Node(self, f"node{len(self.watch.names)}", skew_ms=skew_ms)
        self.watch.names.append(node.name)
        self.nodes.append(node)
        self.note(f"{node.name}: starts, its clock {skew_ms} ms ahead")
        self.loop.start(node.main(), node)
        return node

    def crash(self, node: Node, *, lost: bool) -> None:
        """SIGKILL; what it had sent is lost, or still arrives."""
        self.note(f"{node.name}: KILLED")
        if not lost:
            self.orphans += [write for queue in node.writes.values() for write in queue if not write.appended]
        node.alive = False
        self._bury(node)

    def ended(self, node: Node) -> None:
        """A process came to its own end."""
        self.note(f"{node.name}: ends with {node.error!r}")
        self.watch.ended(node)
        self.leave(node)
        node.alive = False
        self._bury(node)

    def _bury(self, node: Node) -> None:
        self.nodes.remove(node)
        self.loop.discard(node)

    def stop(self, node: Node) -> None:
        """SIGTERM."""
        self.note(f"{node.name}: asked to stop")
        if node.worker is not None:
            node.worker.ended.set()

    def pause(self, node: Node) -> None:
        """SIGSTOP."""
        self.note(f"{node.name}: paused")
        node.paused = True
        node.excused.add("DependencyError")

    def wake(self, node: Node) -> None:
        """SIGCONT."""
        self.note(f"{node.name}: wakes")
        node.paused = False
        self.loop.resume(node)

    def flush(self, node: Node) -> None:
        """The flush timer of a node."""
        assert node.worker is not None
        node.begin("flush", node.worker.ingest.flush)

    def evaluate(self, node: Node) -> None:
        """The evaluation timer of a node."""
        assert node.worker is not None
        node.begin("evaluate", node.worker.decide.evaluate)

    def close(self) -> None:
        """End every process."""
        for node in list(self.nodes):
            node.alive = False
        self.loop.close()


def is_manifest(key: bytes | None) -> bool:
    """Whether a record of the state topic says that a snapshot is whole; the others are parts of one."""
    return key is not None and key.count(b"/") == 1


class _Drop:
    """A logger's last processor: lines go to the trace of the world whose code runs."""

    def __call__(self, logger: Any, method: str, event: dict[str, Any]) -> Any:
        node = OWNER.get()
        if isinstance(node, Node) and node.world.trace is not None:
            words = " ".join(f"{key}={value}" for key, value in event.items())
            node.world.note(f"{node.name}: {method}: {words}")
        raise structlog.DropEvent


async def _in_thread(work: Any, *args: Any) -> Any:
    """In place of a thread: others may go first before it begins and before its end is heard of."""
    node = OWNER.get()
    await node.world.gate("thread")
    given = work(*args)
    await node.world.gate("thread")
    return given


async def _at_once(work: Any) -> None:
    """In place of a thread that compiles: the kernels are compiled already."""


def _tick() -> int:
    """In place of the monotonic clock, whose only use there is to say what was before what."""
    tick: int = OWNER.get().world.log.tick()
    return tick


@contextmanager
def installed() -> Iterator[None]:
    """Put the stand-ins where the services reach the outside, for as long as worlds run."""
    replaced: list[tuple[Any, str, Any]] = [
        *REPLACED,
        (asyncio, "wait_for", wait_for),
        (asyncio, "to_thread", _in_thread),
        (kafka_log, "aiokafka", AIOKAFKA),
        (worker_module, "create_app", lambda settings, loop: OWNER.get().app),
        (worker_module, "_in_daemon_thread", _at_once),
        (worker_module, "time", SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())),
        (experiments_module, "time", SimpleNamespace(monotonic_ns=_tick)),
        (ingest_module, "time", SimpleNamespace(monotonic_ns=_tick)),
        (ingest_module, "_elapsed_s", lambda: asyncio.get_running_loop().time()),
        (secrets, "randbits", lambda bits: next(OWNER.get().world.ids)),
        (secrets, "token_hex", lambda size: OWNER.get().world.name_task(OWNER.get(), size)),
    ]
    held = [(place, name, getattr(place, name)) for place, name, _ in replaced]
    logging = structlog.get_config()
    for place, name, value in replaced:
        setattr(place, name, value)
    structlog.configure(processors=[_Drop()])
    try:
        yield
    finally:
        for place, name, value in held:
            setattr(place, name, value)
        structlog.configure(**logging)
