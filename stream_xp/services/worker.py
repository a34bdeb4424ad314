"""The worker: one Faust app with the ingest and the decide stage, and what ends it.

A worker that cannot go on says why and ends with a non-zero exit; whoever starts it again continues from the
log. Nothing here retries: a retry that hides a failed write is how records get lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import structlog

from stream_xp.adapters import health_file, kafka_admin
from stream_xp.adapters.clock import Clock, WallClock
from stream_xp.adapters.faust_transport import FaustSource, create_app
from stream_xp.adapters.kafka_admin import Topic
from stream_xp.adapters.kafka_log import LogWriter
from stream_xp.adapters.prometheus import Metrics, MetricsServer
from stream_xp.engine.columns import Block
from stream_xp.engine.state import EXPOSURES, REWARDS
from stream_xp.engine.warm_up import warm_up
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.decide import Decide
from stream_xp.services.experiments import Experiments
from stream_xp.services.ingest import Ingest
from stream_xp.services.partitioning import partition_of
from stream_xp.services.tracing import tracer_of
from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

_EVALUATE_S = 0.1
_WATCH_S = 0.5
_TOPICS_S = 60.0
_METRICS_S = 0.5
_STUCK_S = 30.0
_CLOSE_S = 3.0
_STOP_S = 1.0
_CANCEL_S = 0.1
_EXIT_S = 4.5
_THREAD_START_S = 120.0
_THREAD_STOP_S = 60.0


class Worker:
    """One worker process's parts, from start to stop.

    Args:
        clock: for telemetry and quiet partitions.
        topics: what the broker must have; the declared topics, unless history is replayed.

    Raises:
        ConfigError: on starting, if the broker's topics are not as declared.
    """

    def __init__(
        self, settings: Settings, *, clock: Clock | None = None, topics: Sequence[Topic] | None = None
    ) -> None:
        self.settings = settings
        self.clock = clock or WallClock()
        self._topics = tuple(topics or kafka_admin.declared_topics(settings))
        self.failure: BaseException | None = None
        self.written = False
        self._evaluated_s = time.monotonic()
        self.ended = asyncio.Event()
        self._partitions = {
            topic.name.removeprefix(settings.prefix): topic.partitions for topic in self._topics
        }
        self._tasks: list[asyncio.Task[None]] = []
        self.experiments = Experiments(settings)
        self.writer = LogWriter(settings)
        self.metrics = Metrics(
            settings.roles,
            source_partitions=settings.partitions,
            max_series=settings.metrics_max_series,
        )
        self.tracer = tracer_of(settings, self.metrics)
        self.metrics_port: int | None = None
        self._metrics_server: MetricsServer | None = None
        self._metrics_of: tuple[int, frozenset[int]] | None = None
        self._decided_partitions: frozenset[int] = frozenset()
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
            telemetry=self.metrics,
            tracer=self.tracer,
        )
        self.decide = Decide(
            settings,
            experiments=self.experiments,
            writer=self.writer,
            clock=self.clock,
            partitions=self._partitions,
            telemetry=self.metrics,
            tracer=self.tracer,
        )

    async def start(self) -> None:
        """Check the topics, compile, connect, read the specs, then join the group."""
        if self.settings.broker == "apache":
            await asyncio.to_thread(self._require_topics)
        # Compiling inside a rebalance would take longer than the session timeout.
        await _in_daemon_thread(warm_up)
        self._serve_metrics()
        await self.writer.start()
        await self.experiments.start()
        self._host("ingest", self._sources, self.ingest.on_block)
        self._host("decide", self._stats, self.decide.on_block)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        self.app.finalize()
        await self.app.start()
        self._run(self.experiments.follow())
        self._run(self._every(_WATCH_S, self._watch_app))
        self._run(self._every(_METRICS_S, self._name_experiments))
        if self._sources:
            self._run(self._every(self.settings.flush_interval_ms / 1000, self.ingest.flush))
        if self._stats:
            self._run(self.decide.follow())
            self._run(self._evaluate())
        if self.settings.broker == "apache":
            self._run(self._every(_TOPICS_S, self._watch_topics))
        if self.settings.health_file is not None:
            self._run(self._every(health_file.BEAT_S, self._beat))
        log.info("worker started", roles=self.settings.roles, bootstrap=self.settings.bootstrap)

    def _serve_metrics(self) -> None:
        if self.settings.metrics_port is not None:
            self._metrics_server = MetricsServer(
                self.metrics.registry, host=self.settings.metrics_host, port=self.settings.metrics_port
            )
            self.metrics_port = self._metrics_server.port
            log.info("metrics served", host=self.settings.metrics_host, port=self.metrics_port)

    async def _name_experiments(self) -> None:
        """Have metrics of the experiments that are there now, and of no others."""
        registry, partitions = self.experiments.registry, self._decided_partitions
        if self._metrics_of == (registry.generation, partitions):
            return
        self._metrics_of = (registry.generation, partitions)
        records = registry.unarchived()
        keys = [record.spec.experiment for record in records]
        owned = [key for key in keys if partition_of(key, self._partitions["stats"]) in partitions]
        self.metrics.registered(records, owned=owned)

    def _require_topics(self) -> None:
        with kafka_admin.connect(self.settings) as client:
            kafka_admin.require_topics(client, self._topics)

    async def _watch_topics(self) -> None:
        """End where a topic lost its place or its partitions changed: units are no longer where their state is."""
        with contextlib.suppress(DependencyError):  # a broker that is away shows itself elsewhere
            await _in_daemon_thread(self._require_shapes)

    def _require_shapes(self) -> None:
        with kafka_admin.connect(self.settings) as client:
            kafka_admin.require_shapes(client, self._topics)

    async def stop(self) -> None:
        """Stop reading, write everything out, leave the group: well inside five seconds."""
        self.ended.set()
        if self.failure is None:
            await self._guarded(_in_time(self._close(), _CLOSE_S, "write everything out"))
        await _cancel(self._tasks)
        parts = (self.app, self.experiments, self.decide, self.writer)
        ends = [part.stop() for part in parts] + [asyncio.to_thread(self.tracer.stop)]
        await asyncio.gather(*(_within(end, _STOP_S) for end in ends))
        if self._metrics_server is not None:
            self._metrics_server.stop()

    async def _close(self) -> None:
        # The last evaluation begins when the one under way has ended: a decision is never given up half-way.
        await self.ingest.close()
        await self.decide.evaluate()
        await self.app.consumer.commit()
        self.written = True

    def _host(self, name: str, topics: set[str], handle: Callable[[Block], Awaitable[None]]) -> None:
        """Have an agent give every block of these topics to `handle`, one at a time."""
        if not topics:
            return

        async def agent(stream: Any) -> None:
            async for block in stream:
                if not self.ended.is_set():
                    await self._guarded(handle(block))

        channel = self.app.topic(
            *sorted(topics), value_type=bytes, key_type=bytes, value_serializer="raw", key_serializer="raw"
        )
        self.app.agent(channel, name=f"stream_xp.{name}", concurrency=1)(agent)

    async def _on_revoked(self, app: Any, revoked: set[Any], **kwargs: Any) -> None:  # noqa: ARG002 (Faust's signal)
        if not self.ended.is_set():
            await self._guarded(self._hand_over())

    async def _hand_over(self) -> None:
        """Write out what can be written, then drop all state: after a rebalance it is loaded anew."""
        try:
            await _in_time(self.ingest.close(), _CLOSE_S, "write the state of revoked partitions")
        except DependencyError as error:
            # Not an error of state: what was not written is folded again from the log by the next owner.
            log.warning("partitions revoked before their state was written", error=str(error))
            self.ingest.drop()
        self._decided_partitions = frozenset()
        await _in_time(self.decide.drop(), _CLOSE_S, "finish an evaluation")

    async def _on_assigned(self, app: Any, assigned: set[Any], **kwargs: Any) -> None:  # noqa: ARG002 (Faust's signal)
        """Load the state of what has come; blocks that are there before it is loaded wait for it."""
        if self.ended.is_set():
            return
        partitions = {tp.partition for tp in assigned if tp.topic in self._sources}
        log.info("partitions assigned", partitions=sorted(partitions))
        await self._guarded(self._forget())
        stats = self.settings.topic("stats")
        self._decided_partitions = frozenset(tp.partition for tp in assigned if tp.topic == stats)
        self._metrics_of = None
        self._run(self.ingest.load(partitions))

    async def _forget(self) -> None:
        """Drop what was loaded after the revocation: a block that waited for it may have, and others have gone on."""
        self.ingest.drop(left=False)
        await _in_time(self.decide.drop(), _CLOSE_S, "finish an evaluation")

    async def _watch_app(self) -> None:
        """End with Faust, which ends its services on an error without telling whoever started them."""
        if self.app.should_stop:
            raise DependencyError(
                f"the consumer failed: {self.app.crash_reason!r}"
            ) from self.app.crash_reason

    async def _beat(self) -> None:
        """Say that this worker goes on, while it does; it ends by itself where it stays stuck for long."""
        evaluated_s = time.monotonic() - self._evaluated_s if self._stats else 0.0
        if max(self.ingest.stalled_s(), evaluated_s) < _STUCK_S:
            health_file.beat(Path(self.settings.health_file or ""))

    async def _evaluate(self) -> None:
        """Evaluate again and again, and leave at least as much time to ingest as an evaluation takes."""
        while not self.ended.is_set():
            began_s = time.monotonic()
            await self.decide.evaluate()
            self._evaluated_s = time.monotonic()
            pause_s = max(_EVALUATE_S, time.monotonic() - began_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), pause_s)

    async def _every(self, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while not self.ended.is_set():
            await work()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), period_s)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
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
                log.error("worker failed", error=str(error), kind=type(error).__name__)
            self.ended.set()


async def _in_daemon_thread(work: Callable[[], None]) -> None:
    """Await work in a thread that the process does not wait for: a compilation cannot be given up."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error = None
        try:
            work()
        except BaseException as caught:  # noqa: BLE001 (raised where it is awaited)
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="stream-xp-compile", daemon=True).start()
    await done


async def _in_time(work: Awaitable[None], deadline_s: float, what: str) -> None:
    try:
        await asyncio.wait_for(work, deadline_s)
    except TimeoutError as error:
        raise DependencyError(f"the broker took more than {deadline_s:g} s to {what}") from error


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended.

    Before Python 3.12 `asyncio.wait_for` loses a cancellation that comes as what it waits for is done (CPython issue
    86296), and a task that loops for ever then goes on.
    """
    going = set(tasks)
    while going:
        for task in going:
            task.cancel()
        _, going = await asyncio.wait(going, timeout=_CANCEL_S)


async def _within(work: Awaitable[Any], deadline_s: float) -> None:
    """Await at most so long; used where everything that matters is written already."""
    try:
        await asyncio.wait_for(work, deadline_s)
    except TimeoutError:
        log.warning("a part did not stop in time")


async def run(worker: Worker, *, started: Callable[[], None] | None = None) -> None:
    """Run a worker until `Worker.ended` is set; raises what made it fail. `started` is called in between."""
    try:
        if await _done_before(worker.ended, worker.start()) and started is not None:
            started()
        await worker.ended.wait()
    except BaseException as error:
        worker.failure = worker.failure or error
        raise
    finally:
        await worker.stop()
    if worker.failure is not None:
        raise worker.failure


async def _done_before(ended: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether `work` was done before `ended` was set, which gives it up."""
    task, end = asyncio.create_task(work), asyncio.create_task(ended.wait())
    await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        return False
    await task
    return True


def run_until_signal(settings: Settings) -> None:
    """Run a worker in this process until SIGTERM or SIGINT."""

    async def main() -> None:
        worker = Worker(settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.ended.set)
        threading.Thread(target=_exit_in_time, args=(worker,), daemon=True).start()
        await run(worker)

    asyncio.run(main())


def _exit_in_time(worker: Worker) -> None:
    """End the process even where a thread of the Kafka client waits for a broker that is away."""
    while not worker.ended.is_set():
        time.sleep(0.1)
    time.sleep(_EXIT_S)
    if worker.failure is not None:
        sys.stderr.write(f"Error: {worker.failure}\n")
        sys.stderr.flush()
    os._exit(2 if isinstance(worker.failure, ConfigError) else 0 if worker.written else 1)


class WorkerThread:
    """A worker in a thread of its own with its own event loop, for the demo, replays and tests.

    Raises:
        StreamXpError: on entering, if the worker could not start; on leaving, if it failed.
    """

    def __init__(
        self, settings: Settings, *, clock: Clock | None = None, topics: Sequence[Topic] | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._topics = topics
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None and self._worker is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._worker.ended.set)
        self._thread.join(timeout=_THREAD_STOP_S)
        if error is None:
            self.check()
            if self._thread.is_alive():
                raise DependencyError(f"the worker did not stop within {_THREAD_STOP_S:g} s")

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:  # noqa: BLE001 (raised in the thread that waits)
            self._failure = error
        finally:
            self._ready.set()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker = Worker(self._settings, clock=self._clock, topics=self._topics)
        await run(self._worker, started=self._ready.set)
