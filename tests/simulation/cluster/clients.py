"""Stand-ins for aiokafka and for the Faust app, for the node whose code runs.

Every call that would go to the broker passes `World.gate` first: there the scheduler may let others go first, pause
the node or end it.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError
from faust.types.tuples import TP

from tests.simulation.cluster.loop import OWNER


@dataclass(eq=False)
class Write:
    """A record on its way to the broker.

    Attributes:
        life: of the node when it was sent; a new one begins with every rebalance.
        sender: the node's name; `sent`: when, among everything that happened on the broker.
        appended: whether the broker has it, which the node need not know.
    """

    topic: str
    partition: int
    key: bytes
    value: bytes | None
    future: asyncio.Future[Any]
    life: int
    sender: str = ""
    sent: int = 0
    appended: bool = False


class Producer:
    """aiokafka's idempotent producer: one queue for each partition, in order."""

    def __init__(self, **options: Any) -> None:
        self._node = OWNER.get()

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def send(
        self, topic: str, *, value: bytes | None, key: bytes, partition: int | None = None
    ) -> asyncio.Future[Any]:
        await self._node.world.gate(f"send to {topic}")
        count = len(self._node.world.log.topics[topic])
        at = zlib.crc32(key) % count if partition is None else partition
        future = asyncio.get_running_loop().create_future()
        sent = self._node.world.log.tick()
        self._node.accept(Write(topic, at, key, value, future, self._node.life, self._node.name, sent))
        return future

    async def partitions_for(self, topic: str) -> set[int]:
        return set(range(len(self._node.world.log.topics[topic])))


class Fetched(NamedTuple):
    """A record as aiokafka gives it."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class Consumer:
    """aiokafka's consumer without a group, as the readers of the service's own topics use it."""

    def __init__(self, **options: Any) -> None:
        self._world = OWNER.get().world
        self._positions: dict[TopicPartition, int] = {}

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def assign(self, partitions: list[TopicPartition]) -> None:
        self._positions = dict.fromkeys(partitions, 0)

    async def seek_to_beginning(self, *partitions: TopicPartition) -> None:
        for tp in partitions:
            self._positions[tp] = self._held(tp).start

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        await self._world.gate(f"ends of {partitions[0].topic}")
        return {tp: self._held(tp).end for tp in partitions}

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        await self._world.gate(f"starts of {partitions[0].topic}")
        return {tp: self._held(tp).start for tp in partitions}

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int
    ) -> dict[TopicPartition, list[Fetched]]:
        await self._world.gate(f"read {partitions[0].topic}")
        found = {}
        for tp in partitions:
            held = self._held(tp)
            limit = self._world.batch()
            records = held.read(max(self._positions[tp], held.start), limit)
            self._positions[tp] = records[-1].offset + 1 if len(records) == limit else held.end
            found[tp] = [Fetched(tp.partition, r.offset, r.timestamp_ms, r.key, r.value) for r in records]
        return found

    async def position(self, tp: TopicPartition) -> int:
        return self._positions[tp]

    def _held(self, tp: TopicPartition) -> Any:
        return self._world.log.topics[tp.topic][tp.partition]


AIOKAFKA = SimpleNamespace(
    AIOKafkaProducer=Producer, AIOKafkaConsumer=Consumer, TopicPartition=TopicPartition
)
"""What `stream_xp.adapters.kafka_log` uses of the package."""


class Handlers(list[Callable[..., Any]]):
    """A signal of Faust's."""

    def connect(self, handler: Callable[..., Any]) -> None:
        self.append(handler)


class GroupConsumer:
    """The consumer of a node in its group, as `FaustSource` and `Worker` use it; `Block`s go to `inboxes`."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._thread = SimpleNamespace(_consumer=self)
        self.durable = DurableOffsets(node)
        self.positions: dict[TP, int] = {}
        self.ends: dict[TP, tuple[int, int]] = {}

    def assignment(self) -> dict[TP, int]:
        return self.positions

    def highwater(self, tp: TP) -> int | None:
        return self.ends[tp][0] if tp in self.ends else None

    def last_poll_timestamp(self, tp: TP) -> int | None:
        return self.ends[tp][1] if tp in self.ends else None

    async def seek_wait(self, offsets: dict[TP, int]) -> None:
        await self._node.world.gate("seek")
        for tp, offset in offsets.items():
            if tp not in self.positions:
                raise IllegalStateError(f"{tp} is not assigned")
            self._node.world.seek(self._node, tp, offset)

    async def commit(self) -> None:
        await self._node.world.gate("commit")
        self._node.world.commit(self._node)


class DurableOffsets(dict[TP, int]):
    """What a node declared durable; each time the world looks whether it is."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self._node = node

    def __setitem__(self, tp: TP, offset: int) -> None:
        super().__setitem__(tp, offset)
        self._node.world.watch.declared(self._node, tp, offset)


class App:
    """What `Worker` uses of a Faust app."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._agents: list[tuple[tuple[str, ...], Callable[..., Any]]] = []
        self.consumer = GroupConsumer(node)
        self.inboxes: dict[str, asyncio.Queue[Any]] = {}
        self.on_partitions_revoked, self.on_partitions_assigned = Handlers(), Handlers()
        self.should_stop, self.crash_reason = False, None

    def topic(self, *names: str, **options: Any) -> tuple[str, ...]:
        return names

    def agent(self, channel: tuple[str, ...], **options: Any) -> Callable[[Callable[..., Any]], None]:
        return lambda agent: self._agents.append((channel, agent))

    def finalize(self) -> None:
        pass

    async def start(self) -> None:
        for channel, agent in self._agents:
            inbox: asyncio.Queue[Any] = asyncio.Queue()
            self.inboxes |= dict.fromkeys(channel, inbox)
            asyncio.get_running_loop().create_task(agent(_stream(inbox)))
        self._node.world.join(self._node)

    async def stop(self) -> None:
        self._node.world.leave(self._node)


async def _stream(inbox: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while True:
        yield await inbox.get()
