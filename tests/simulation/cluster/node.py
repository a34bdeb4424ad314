"""One worker process of the cluster: the real `Worker` around the stand-ins of clients.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from faust.types.tuples import TP

from stream_xp.services import worker as worker_module
from stream_xp.services.worker import Worker
from tests.simulation.cluster.clients import App, Write
from tests.simulation.cluster.traffic import START_MS


class NodeClock:
    """The clock of one node's machine, `skew_ms` ahead of the broker's."""

    def __init__(self, world: Any, skew_ms: int) -> None:
        self._world, self.skew_ms = world, skew_ms

    def now_ms(self) -> int:
        return START_MS + self._world.loop.now_ms + self.skew_ms

    def quiet_ms(self, observed_ms: int) -> int:
        return observed_ms


class SteppedWorker(Worker):
    """The worker without its timers: when it flushes and evaluates, the scheduler says."""

    async def _evaluate(self) -> None:
        pass

    async def _every(self, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        pass


class Node:
    """A process that is alive, paused (SIGSTOP) or dead, and what the broker knows of it.

    Attributes:
        writes: per topic partition, what was sent and not acknowledged yet.
        generation: that of the group when it was assigned its partitions.
        consumes: whether it has ever joined the group.
        told: whether it knows of the rebalance that is under way; `revoking`: whether it gives up its
            partitions; `joined`: whether it has joined.
        life: grows whenever it gets or loses partitions.
        serving: answers to fetches that are on their way to it.
        busy: what it is doing on the scheduler's demand.
    """

    def __init__(self, world: Any, name: str, *, skew_ms: int) -> None:
        self.world, self.name = world, name
        self.alive, self.paused = True, False
        self.clock = NodeClock(world, skew_ms)
        self.writes: dict[tuple[str, int], deque[Write]] = {}
        self.generation = -1
        self.life = 0
        self.consumes = self.told = self.revoking = self.joined = False
        self.serving: dict[TP, tuple[int, Any, int]] = {}
        self.busy: set[str] = set()
        self.app = App(self)
        self.worker: SteppedWorker | None = None
        self.error: BaseException | None = None
        self.excused: set[str] = set()

    async def main(self) -> None:
        """From start to end, as `run_until_signal` does it."""
        try:
            topics = [SimpleNamespace(name=name, partitions=len(held)) for name, held in self.world.topics()]
            self.worker = SteppedWorker(self.world.settings, clock=self.clock, topics=topics)  # type: ignore[arg-type]
            await worker_module.run(self.worker)
        except Exception as error:  # however a worker ends, the schedule judges it
            self.error = error
        if self.alive:
            self.world.ended(self)

    def accept(self, write: Write) -> None:
        """Its producer takes a record."""
        self.writes.setdefault((write.topic, write.partition), deque()).append(write)

    def has_sent(self, topic: str) -> bool:
        """Whether a record for this topic is under way."""
        return any(one == topic and queue for (one, _), queue in self.writes.items())

    @property
    def running(self) -> bool:
        """Whether it does what the scheduler asks of it."""
        return self.alive and not self.paused

    @property
    def serves(self) -> bool:
        """Whether its services have started and not ended."""
        return self.running and self.worker is not None and not self.worker.ended.is_set()

    def begin(self, what: str, work: Callable[[], Awaitable[Any]]) -> None:
        """Have the worker do something in the background, as its timers would."""

        async def do() -> None:
            try:
                await work()
            finally:
                self.busy.discard(what)

        async def run() -> None:
            assert self.worker is not None
            self.worker._run(do())

        self.busy.add(what)
        self.world.loop.start(run(), self)
