"""A random schedule: what happens next is drawn from the seed, then everything is let run out and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from stream_xp.services.ingest import ASK_S, STALL_S
from tests.simulation.cluster.traffic import ACTIVATION_MS
from tests.simulation.cluster.verdict import Verdict
from tests.simulation.cluster.watch import BrokenError
from tests.simulation.cluster.world import SOURCES, World, is_manifest

_T = TypeVar("_T")
_ROUNDS = 120
_ROUND_MS = 250
"""So long that a snapshot is due again."""
_MOST_NODES = 3
HAND_OVER_MS = 6_000
"""Longer than a worker tries to write out what it gives away."""
_SPOILT_AT_LAST = 0.2
_MOVING = ("xp.signals", "xp.experiments", "xp.config")
_COMPACTED = ("xp.state", "xp.stats", "xp.results", "xp.config", "xp.deadletter")


class Schedule:
    """One run of a world; the weights of what can happen are drawn first, many of them 0.

    With `hangs` writes also hang while partitions leave and come back, with `orders` people order things, also while a
    decision is under way. `steps` is drawn where it is not given.
    """

    def __init__(
        self,
        seed: int,
        *,
        trace: list[str] | None = None,
        hangs: bool = False,
        orders: bool = False,
        steps: int | None = None,
    ) -> None:
        self.world = World(seed, trace=trace, orders=orders)
        rng = self.world.rng
        drawn_steps = rng.choice([60, 150, 300])
        self.steps = drawn_steps if steps is None else steps
        usual: dict[Callable[[], None], float] = {
            self.release: 40,
            self.write: 25,
            self.fetch: 16,
            self.produce: 12,
            self.pass_time: 5,
            self.flush: 6,
            self.evaluate: 8,
            self.commit: 3,
            self.tell: 6,
            self.expire_dead: 2,
            self.spawn: 1,
        }
        faults: dict[Callable[[], None], float] = {
            self.crash: 1.2,
            self.stop: 0.4,
            self.pause: 0.8,
            self.expire: 1.0,
            self.rebalance: 1.2,
            self.displace: 1.5,
            self.refuse: 0.8,
            self.compact: 1.5,
            self.truncate: 1.0,
            self.cut: 0.1,
            self.spoil: 1.0,
            self.ruin: 0.3,
            self.change_specs: 0.7,
            self.long_silence: 0.2,
            self.starve: 0.7,
            self.outrun: 0.4,
            self.lose: 0.2,
            self.come_late: 1.2,
            self.bury: 1.0,
        }
        if hangs:
            faults[self.hang] = 1.2
        if orders:
            usual[self.order] = 5.0
        drawn = {what: weight * rng.choice([0.0, 0.5, 1.0, 3.0]) for what, weight in faults.items()}
        chosen = usual | drawn | {self.wake: 1.5, self.orphan: 2.0, self.feed: 0.7, self.go_well: 3.0}
        self._happenings, self._weights = list(chosen), list(chosen.values())
        self._faults = {what.__name__ for what in faults}
        self._done: Counter[str] = Counter()
        given = f" --steps {steps}" if steps is not None else ""
        kinds = f"--{'no-' * (not hangs)}hangs --{'no-' * (not orders)}orders"
        self._again = f"--seed {seed} {kinds}{given}"

    def run(self) -> None:
        """Everything, from start to verdict.

        Raises:
            BrokenError: something does not hold; the message says how to run the schedule again.
        """
        world = self.world
        try:
            for _ in range(world.rng.choice([1, 1, 2, 3])):
                world.spawn()
            for happening in world.rng.choices(self._happenings, self._weights, k=self.steps):
                happenings = world.happened
                happening()
                if world.happened > happenings and happening.__name__ in self._faults:
                    self._done[happening.__name__] += 1
                world.loop.settle()
                world.watch.check()
            whole = run_out(world)
            if world.rng.random() < _SPOILT_AT_LAST:
                self.spoil_at_last()
            Verdict(world).give(whole=whole)
        except BrokenError as error:
            raise BrokenError(f"{self._again}: {error}") from error
        finally:
            world.close()

    def counts(self) -> Counter[str]:
        """How much of what there was: events, effects, faults, decisions."""
        log, watch = self.world.log, self.world.watch
        counts = Counter({f"fault: {what}": times for what, times in self._done.items()})
        counts["faults"] = sum(self._done.values())
        counts["events"] = sum(len(log.history(name)) for name in SOURCES)
        counts["effect boundaries"] = self.world.gates
        counts["decisions"], counts["decisions that came late"] = len(watch.signals), len(watch.late_signals)
        counts["partitions counted again from damage on"] = len(watch.replayed)
        counts["orders"], counts["taken back"] = len(watch.orders), len(watch.taken_back)
        counts["commits"], counts["statistics"] = len(watch.commits), len(watch.published)
        return counts

    # --- what usually happens -----------------------------------------------------------------------------------

    def release(self) -> None:
        open_gates = self.world.open_gates()
        if open_gates:
            self.world.release(self.world.rng.choice(open_gates))

    def write(self) -> None:
        world = self.world
        waiting = world.pending_writes(appended=False)
        if waiting and world.rng.random() < 0.7:
            node, write = world.rng.choice(waiting)
            world.append(write, node.name)
            if world.rng.random() < 0.6:
                return
        answered = world.pending_writes(appended=True)
        if answered:
            world.acknowledge(*world.rng.choice(answered))

    def fetch(self) -> None:
        world = self.world
        found = self._one(world.fetchable())
        if found is None:
            return
        node, tp = found
        if tp not in node.serving:
            world.serve(node, tp, world.rng.randrange(1, world.most_records + 1))
        if world.rng.random() < 0.7:
            world.arrive(node, tp)

    def produce(self) -> None:
        for _ in range(self.world.rng.randrange(1, 5)):
            self.world.produce(self.world.rng.choice(SOURCES))

    def pass_time(self) -> None:
        self.world.pass_time(self.world.rng.choice([1, 5, 20, 60]))

    def flush(self) -> None:
        node = self._one([node for node in self.world.nodes if node.serves and "flush" not in node.busy])
        if node is not None:
            self.world.flush(node)

    def evaluate(self) -> None:
        node = self._one([node for node in self.world.nodes if node.serves and "evaluate" not in node.busy])
        if node is not None and "decide" in self.world.settings.roles:
            self.world.evaluate(node)

    def commit(self) -> None:
        node = self._one([node for node in self.world.nodes if node.running])
        if node is not None:
            self.world.commit(node)

    def tell(self) -> None:
        node = self._one(self._to_tell())
        if node is not None:
            self.world.tell(node)

    def _to_tell(self) -> list:
        return to_tell(self.world)

    def expire_dead(self) -> None:
        node = self._one([node for node in self.world.members if not node.alive])
        if node is not None:
            self.world.expire(node)

    def spawn(self) -> None:
        if len(self.world.nodes) < _MOST_NODES:
            self.world.spawn()

    def go_well(self) -> None:
        """For once nobody has to wait, so that there are snapshots, statistics and decisions to lose."""
        for _ in range(self.world.rng.choice([1, 1, 3])):
            for _ in range(self.world.rng.choice([0, 1, 10, 30])):
                self.world.produce(self.world.rng.choice(SOURCES))
            _round(self.world, evaluates=self.world.rng.random() < 0.7)

    def order(self) -> None:
        self.world.order()

    # --- faults ---------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        node = self._one(self.world.nodes)
        if node is not None:
            self.world.crash(node, lost=self.world.rng.random() < 0.6)

    def stop(self) -> None:
        node = self._one([node for node in self.world.nodes if node.serves])
        if node is not None:
            self.world.stop(node)

    def pause(self) -> None:
        node = self._one([node for node in self.world.nodes if node.serves])
        if node is not None:
            self.world.pause(node)

    def wake(self) -> None:
        node = self._one([node for node in self.world.nodes if node.paused])
        if node is not None:
            self.world.wake(node)

    def expire(self) -> None:
        node = self._one([node for node in self.world.members if node.paused])
        if node is not None:
            self.world.expire(node)

    def rebalance(self) -> None:
        if self.world.members:
            self.world.rebalance()

    def displace(self) -> None:
        world = self.world
        found = self._one([one for one in world.fetchable() if one[1].topic in SOURCES])
        if found is not None:
            node, tp = found
            end = world.log.topics[tp.topic][tp.partition].end
            world.displace(node, tp, world.rng.randrange(end + 1))

    def refuse(self) -> None:
        waiting = self.world.pending_writes(appended=self.world.rng.random() < 0.5)
        if waiting:
            self.world.refuse(*self.world.rng.choice(waiting))

    def orphan(self) -> None:
        come = [late for late in self.world.orphans if late.topic != self.world.slow]
        if come:
            self.world.append_orphan(self.world.orphans.index(come[0]))

    def compact(self) -> None:
        world = self.world
        topic = world.rng.choice(_COMPACTED)
        partition = world.rng.randrange(len(world.log.topics[topic]))
        end = world.log.topics[topic][partition].end
        gone = world.log.compact(topic, partition, end - world.rng.choice([0, 0, 1, 5]))
        world.note(f"compaction takes {gone} records of {topic}/{partition}")

    def truncate(self) -> None:
        """Retention takes only what is committed."""
        world = self.world
        tp = self._one(sorted(world.committed))
        if tp is not None:
            world.truncate(tp, world.rng.randrange(world.committed[tp] + 1))

    def cut(self) -> None:
        """Retention takes what was not counted yet."""
        world = self.world
        tp = self._one(sorted(world.committed))
        if tp is not None:
            end = world.log.topics[tp.topic][tp.partition].end
            if world.committed[tp] < end:
                world.truncate(tp, world.rng.randrange(world.committed[tp], end) + 1)

    def spoil(self) -> None:
        """A record of the state topic is damaged, or gone."""
        self._spoil(self.world.rng.randrange(self.world.settings.partitions))
        if self.world.rng.random() < 0.5:
            self.rebalance()

    def spoil_at_last(self) -> None:
        """The same when nobody is left to write another snapshot, where the log has all that must be read again."""
        whole = [at for at in range(self.world.settings.partitions) if at not in self.world.watch.shortened]
        partition = self._one(whole)
        if partition is not None:
            self._spoil(partition)

    def _spoil(self, partition: int) -> None:
        world = self.world
        record = self._one(world.log.topics["xp.state"][partition].live[-6:])
        if record is not None and record.value:
            world.spoil(partition, record.offset, world.rng.randrange(len(record.value) * 9))

    def ruin(self) -> None:
        """No snapshot of a partition can be read any more, and perhaps not even where counting began."""
        world = self.world
        partition = world.rng.randrange(world.settings.partitions)
        spares_manifests = world.rng.random() < 0.7
        for record in world.log.topics["xp.state"][partition].live:
            if record.value and not (spares_manifests and is_manifest(record.key)):
                world.spoil(partition, record.offset, world.rng.randrange(len(record.value) * 8))

    def change_specs(self) -> None:
        self.world.change_specs(self.world.rng.randrange(100))

    def long_silence(self) -> None:
        """Longer than any deadline of the worker."""
        for node in self.world.nodes:
            node.excused.add("DependencyError")
        self.world.stall(4_000)

    def starve(self) -> None:
        """The broker stays slow in answering about one topic."""
        self.world.starved = self.world.rng.choice(
            ["xp.experiments", "xp.experiments", "xp.state", "xp.config", "thread"]
        )
        self.world.note(f"no answers about {self.world.starved}")

    def outrun(self) -> None:
        """A spec comes into force while the readers of its topic get no answers, and events are there before it."""
        world = self.world
        world.starved = "xp.experiments"
        world.note(f"no answers about {world.starved}, and a spec comes into force")
        self.change_specs()
        world.pass_time(ACTIVATION_MS + world.rng.choice([-1, 0, 1, 10, 40]))
        for _ in range(world.rng.randrange(3, 9)):
            world.produce(world.rng.choice(SOURCES))

    def lose(self) -> None:
        """No snapshot can be read, the log no longer has what they had counted, and somebody must load a partition."""
        self.ruin()
        self.truncate()
        self.rebalance()

    def come_late(self) -> None:
        """A decision is under way while its worker loses its partitions; it comes when the next owner has begun."""
        world, rng = self.world, self.world.rng
        if "decide" not in world.settings.roles or world.slow != "nothing":
            return
        world.starved = "nothing"
        if world.watch.signals:
            # What is decided is so for good: there is more to decide of a new version.
            world.change_specs(2)
            world.pass_time(ACTIVATION_MS)
        world.slow = "xp.signals"
        world.note(f"no writes to {world.slow}")
        for _ in range(8):
            world.produce(rng.choice(SOURCES))
        # Read, settled and published, one after the other: only what was published can be evaluated.
        for evaluates in (False, False, False, True):
            _round(world, evaluates=evaluates)
        if world.people is not None:
            rng.choice([lambda: None, world.order, world.change_minds, world.change_minds])()
        node = self._one([node for node in world.nodes if node.serves and node.has_sent(world.slow)])
        if node is not None and rng.random() < 0.7:
            world.crash(node, lost=False)
        elif node is not None:
            world.pause(node)
            world.expire(node)
        if rng.random() < 0.3:
            world.slow = "nothing"
        # The next owner looks at once, or when there is more to see: only then it decides otherwise.
        later = rng.choice([0, 3, 3])
        for _ in range(later):
            world.produce(SOURCES[0])
        for at in range(later + rng.choice([1, 2])):
            _round(world, evaluates=at >= later)
        world.slow = "nothing"
        if rng.random() < 0.7:
            for late in [late for late in world.orphans if late.topic == "xp.signals"]:
                world.append_orphan(world.orphans.index(late))

    def bury(self) -> None:
        """Records are refused while nobody takes their dead letters, and then their worker dies."""
        world, rng = self.world, self.world.rng
        if world.slow != "nothing":
            return
        world.slow = "xp.deadletter"
        world.note(f"no writes to {world.slow}")
        for _ in range(4):
            world.produce(rng.choice(SOURCES), kind=rng.choice([None, "poison"]))
        _round(world, evaluates=False)
        node = self._one([node for node in world.nodes if node.has_sent(world.slow)])
        if node is not None:
            world.crash(node, lost=rng.random() < 0.7)
        world.slow = "nothing"

    def hang(self) -> None:
        """What a flush writes is not taken until its partitions have left, and come back."""
        world, rng = self.world, self.world.rng
        self.go_well()
        world.slow = rng.choice(["xp.state", "xp.stats"])
        world.note(f"no writes to {world.slow}")
        for _ in range(8):
            world.produce(rng.choice(SOURCES))
        for step in range(rng.choice([1, 2])):
            _round(world, evaluates=False)
            if step == 0:
                self.rebalance()
                for node in to_tell(world):
                    world.tell(node)
                world.stall(HAND_OVER_MS)
        if rng.random() < 0.7:
            world.slow = "nothing"

    def feed(self) -> None:
        self.world.starved = self.world.slow = "nothing"

    def _one(self, choices: Sequence[_T]) -> _T | None:
        return self.world.rng.choice(choices) if choices else None


class Kind(NamedTuple):
    """What the schedules of a run are like; where it does not say, people order in every other one, by the seed, and
    writes hang in every fourth. `steps` is drawn where it is not given.
    """

    steps: int | None = None
    hangs: bool | None = None
    orders: bool | None = None

    def schedule(self, seed: int, *, trace: list[str] | None = None) -> Schedule:
        """The schedule of a seed."""
        hangs = seed % 4 == 3 if self.hangs is None else self.hangs
        orders = seed % 2 == 1 if self.orders is None else self.orders
        return Schedule(seed, trace=trace, hangs=hangs, orders=orders, steps=self.steps)


def to_tell(world: World) -> list:
    """Nodes whose next heartbeat has news for them."""
    return [
        node
        for node in world.nodes
        if node.serves
        and node.consumes
        and not node.told
        and (world.rebalancing or node not in world.members)
    ]


def run_out(world: World) -> bool:
    """No more faults: let everything be read, settled and written, then stop everybody; whether it was possible."""
    world.calm, world.slow = True, "nothing"
    while world.orphans:
        world.append_orphan(0)
    for node in [node for node in world.nodes if node.paused]:
        world.wake(node)
    for at in range(_ROUNDS):
        _round(world, evaluates=at % 4 == 0)
        if world.watch.stands_still() and not world.nodes:
            return False
        if _is_settled(world):
            break
        if at % 20 == 9:
            world.stall(int(ASK_S * 1000) + 1_000)
        elif at % 20 == 19:
            _outwait(world)
    else:
        if world.watch.stands_still():
            return False
        raise BrokenError(f"progress: not everything was read and settled after {_ROUNDS} rounds")
    for at in range(2):
        _round(world, evaluates=at % 2 == 1)
    if world.people is not None:
        _follow_up(world)
    for node in list(world.nodes):
        world.stop(node)
    for _ in range(_ROUNDS):
        _let_go(world)
        if not world.nodes:
            return not world.watch.stands_still()
    raise BrokenError("progress: the workers do not stop")


def _follow_up(world: World) -> None:
    """Let everything follow that was ordered: weights of a reset, a decision after them, its weights, and configs."""
    said = -1
    for _ in range(_ROUNDS):
        before, said = said, sum(len(world.log.history(name)) for name in _MOVING)
        if said == before:
            return
        for _ in range(2):
            _round(world, evaluates=True)
    raise BrokenError("progress: decisions, weights and configs follow each other without an end")


def _outwait(world: World) -> None:
    """Let so much time pass that a partition which stands still, wherever it does, ends its worker."""
    for node in world.nodes:
        node.excused.add("DependencyError")
    world.stall(int(STALL_S * 1000) + 1_000)


def _round(world: World, *, evaluates: bool) -> None:
    """A bit of everything that usually happens, fairly."""
    if not world.nodes and not world.watch.stands_still():
        world.spawn()
    for node in [node for node in world.members if not node.alive]:
        world.expire(node)
    for node in to_tell(world):
        world.tell(node)
    _let_go(world)
    for node, tp in world.fetchable():
        if tp not in node.serving:
            world.serve(node, tp, 50)
        world.arrive(node, tp)
    _let_go(world)
    for node in world.nodes:
        if node.serves and not node.busy:
            world.flush(node)
    _let_go(world)
    for node in world.nodes:
        if evaluates and node.serves and not node.busy:
            world.evaluate(node)
    _let_go(world)
    for node in world.nodes:
        world.commit(node)
    # Without faults nobody waits for a moment in between, and whoever looks every so often need look but once.
    (world.stall if world.calm else world.pass_time)(700 if _is_read(world) else _ROUND_MS)


def _let_go(world: World) -> None:
    """Open every gate and answer every write until nobody waits for the broker."""
    world.loop.settle()
    while True:
        while world.open_gates():
            world.release(0)
            world.loop.settle()
        unwritten, written = world.pending_writes(appended=False), world.pending_writes(appended=True)
        for node, write in unwritten:
            world.append(write, node.name)
        for node, write in written:
            world.acknowledge(node, write)
        world.loop.settle()
        world.watch.check()
        if not (unwritten or written or world.open_gates()):
            break
    world.pass_time(1)
    world.loop.settle()


def _is_settled(world: World) -> bool:
    """Whether everything is committed and covered, and every window and wait has ended for everybody's clock."""
    done = not world.rebalancing and bool(world.members) and _is_read(world) and world.everything_is_old()
    return done and (world.watch.stands_still() or all(_is_covered(world, at) for at in world.watch.spoilt))


def _is_covered(world: World, partition: int) -> bool:
    """Whether somebody has read everything, also if a damaged snapshot made it begin before what is committed."""
    ends = tuple(world.log.topics[name][partition].end for name in SOURCES)
    held = [node.worker.ingest._tasks.get(partition) for node in world.members if node.worker is not None]
    return ends in [task.position() for task in held if task is not None]


def _is_read(world: World) -> bool:
    return all(
        not partition.end or world.committed_at(name, at) == partition.end
        for name in SOURCES
        for at, partition in enumerate(world.log.topics[name])
    )
