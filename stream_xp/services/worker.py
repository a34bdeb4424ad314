"""The worker: one Faust app with the ingest and the decide stage, and what ends it.

A worker that cannot go on says why and ends with a non-zero exit; whoever starts it again continues from the
log. Nothing here retries: a retry that hides a failed write is how records get lost.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

import structlog

from stream_xp.adapters import kafka_admin
from stream_xp.adapters.clock import Clock, WallClock
from stream_xp.adapters.faust_transport import FaustSource, create_app
from stream_xp.adapters.kafka_log import LogWriter
from stream_xp.engine.columns import Block
from stream_xp.engine.state import EXPOSURES, REWARDS
from stream_xp.engine.warm_up import warm_up
from stream_xp.errors import DependencyError, StreamXpError
from stream_xp.services.decide import Decide
from stream_xp.services.experiments import Experiments
from stream_xp.services.ingest import Ingest
from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

_EVALUATE_S = 0.1
_CLOSE_S = 3.5
_STOP_S = 1.0
_THREAD_START_S = 120.0


class Worker:
    """One worker process's parts, from start to stop.

    Args:
        clock: for telemetry and quiet partitions.
    """

    def __init__(self, settings: Settings, *, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or WallClock()
        self.failure: BaseException | None = None
        self.ended = asyncio.Event()
        self._partitions = {
            topic.name.removeprefix(settings.prefix): topic.partitions for topic in kafka_admin.declared_topics(settings)
        }
        self._tasks: list[asyncio.Task[None]] = []
        self.experiments = Experiments(settings)
        self.writer = LogWriter(settings)
        roles = {EXPOSURES, REWARDS} if "ingest" in settings.roles else set()
        self._sources = {settings.topic(name) for name in roles}
        self._stats = {settings.topic("stats")} if "decide" in settings.roles else set()
        self.app = create_app(settings, loop=asyncio.get_running_loop())
        self.ingest = Ingest(
            settings,
            experiments=self.experiments,
            source=FaustSource(self.app),
            writer=self.writer,
            clock=self.clock,
            stats_partitions=self._partitions["stats"],
        )
        self.decide = Decide(
            settings, experiments=self.experiments, writer=self.writer, clock=self.clock, partitions=self._partitions
        )

    async def start(self) -> None:
        """Compile, connect, read the specs, then join the group."""
        # Compiling inside a rebalance would take longer than the session timeout.
        await asyncio.to_thread(warm_up)
        await self.writer.start()
        await self.experiments.start()
        self._host("ingest", self._sources, self.ingest.on_block)
        self._host("decide", self._stats, self.decide.on_block)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        self.app.finalize()
        await self.app.start()
        self._run(self.experiments.follow())
        if self._sources:
            self._run(_every(self.settings.flush_interval_ms / 1000, self.ingest.flush))
        if self._stats:
            self._run(_every(_EVALUATE_S, self.decide.evaluate))
        log.info("worker started", roles=self.settings.roles, bootstrap=self.settings.bootstrap)

    async def stop(self) -> None:
        """Stop reading, write everything out, leave the group: well inside five seconds."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.failure is None:
            await self._guarded(asyncio.wait_for(self._close(), _CLOSE_S))
        await _within(self.app.stop(), _STOP_S)
        await _within(self.experiments.stop(), _STOP_S)
        await _within(self.writer.stop(), _STOP_S)

    async def _close(self) -> None:
        await self.ingest.close()
        await self.decide.evaluate()
        await self.app.consumer.commit()

    def _host(self, name: str, topics: set[str], handle: Callable[[Block], Awaitable[None]]) -> None:
        """Have an agent give every block of these topics to `handle`, one at a time."""
        if not topics:
            return

        async def agent(stream: Any) -> None:
            async for block in stream:
                if not self.ended.is_set():
                    await self._guarded(handle(block))

        channel = self.app.topic(*sorted(topics), value_type=bytes, key_type=bytes, value_serializer="raw", key_serializer="raw")
        self.app.agent(channel, name=f"stream_xp.{name}", concurrency=1)(agent)

    async def _on_revoked(self, app: Any, revoked: set[Any], **kwargs: Any) -> None:  # noqa: ARG002 (Faust's signal)
        """Write out what can be written, then drop all state: after a rebalance it is loaded anew."""
        if self.ended.is_set():
            return
        try:
            await asyncio.wait_for(self.ingest.close(), _CLOSE_S)
        except (TimeoutError, DependencyError) as error:
            # Not an error of state: what was not written is folded again from the log by the next owner.
            log.warning("partitions revoked before their state was written", error=str(error))
            self.ingest.drop()
        self.decide.drop()

    async def _on_assigned(self, app: Any, assigned: set[Any], **kwargs: Any) -> None:  # noqa: ARG002 (Faust's signal)
        """Load the state of what has come; blocks that are there before it is loaded wait for it."""
        partitions = {tp.partition for tp in assigned if tp.topic in self._sources}
        self._run(self.ingest.load(partitions))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(self._guarded(work)))

    async def _guarded(self, work: Awaitable[None]) -> None:
        """Await; whatever goes wrong ends the worker, because Faust would log it and go on."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 (kept, and raised by the caller of run)
            if self.failure is None:
                self.failure = error
            self.ended.set()


async def _every(period_s: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(period_s)
        await work()


async def _within(work: Awaitable[Any], deadline_s: float) -> None:
    """Await at most so long; used where everything that matters is written already."""
    try:
        await asyncio.wait_for(work, deadline_s)
    except TimeoutError:
        log.warning("a part did not stop in time")


async def run(settings: Settings, *, clock: Clock | None = None, ended: Callable[[Worker], None] | None = None) -> None:
    """Run a worker until it is told to stop by `Worker.ended`; raises what made it fail.

    Args:
        ended: called with the worker once it has started.
    """
    worker = Worker(settings, clock=clock)
    try:
        await worker.start()
        if ended is not None:
            ended(worker)
        await worker.ended.wait()
    finally:
        await worker.stop()
    if worker.failure is not None:
        raise worker.failure


def run_until_signal(settings: Settings) -> None:
    """Run a worker in this process until SIGTERM or SIGINT."""

    def install(worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.ended.set)

    asyncio.run(run(settings, ended=install))


class WorkerThread:
    """A worker in a thread of its own with its own event loop, for the demo, replays and tests.

    Raises:
        StreamXpError: on entering, if the worker could not start; on leaving, if it failed.
    """

    def __init__(self, settings: Settings, *, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: Worker | None = None
        self._thread = threading.Thread(target=self._main, name="stream-xp-worker", daemon=True)

    @property
    def worker(self) -> Worker:
        """The worker, once the thread has been entered."""
        if self._worker is None:
            raise DependencyError("the worker has not started")
        return self._worker

    def check(self) -> None:
        """Raise what made the worker fail, if it did."""
        failure = self._failure or (self._worker.failure if self._worker else None)
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_THREAD_START_S):
            raise DependencyError(f"the worker did not start within {_THREAD_START_S:g} s")
        self.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._loop is not None and self._worker is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._worker.ended.set)
        self._thread.join(timeout=15)
        if error is None:
            self.check()

    def _main(self) -> None:
        try:
            asyncio.run(run(self._settings, clock=self._clock, ended=self._started))
        except BaseException as error:  # noqa: BLE001 (raised in the thread that waits)
            self._failure = error
        finally:
            self._ready.set()

    def _started(self, worker: Worker) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker = worker
        self._ready.set()


__all__ = ["StreamXpError", "Worker", "WorkerThread", "run", "run_until_signal"]
