"""The two consumers that are compared, each a process of its own: the engine, and a Faust agent per event.

Both read the same topics and do the same job: decode, dedupe, join by event time within the attribution window,
and keep exact counts, sums and sums of squares per experiment, metric and arm. The engine also keeps its state
on the broker and evaluates; the agent per event does neither.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import faust
import msgspec

from stream_xp.domain.events import Exposure, Reward, epoch_ms
from stream_xp.domain.experiment import Metric, MetricKind
from stream_xp.errors import DependencyError
from stream_xp.services.bench.load import experiment_records
from stream_xp.services.worker import Worker
from stream_xp.settings import Settings

_DEADLINE_S = 120.0
_POLL_S = 0.005


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What one run took; CPU is user and system time of the whole process, all threads."""

    events: int
    cpu_s: float
    wall_s: float
    rss_mb: float


class Stopwatch:
    """Measures from the first event on, as seen by a poll every few milliseconds."""

    def __init__(self, progress: Callable[[], int], goal: int) -> None:
        self._progress = progress
        self._goal = goal

    async def run(self) -> Reading:
        """Wait for the goal."""
        cpu_s, deadline = _cpu_s(), time.monotonic() + _DEADLINE_S
        first_s: float | None = None
        while (done := self._progress()) < self._goal:
            if time.monotonic() > deadline:
                raise DependencyError(f"only {done} of {self._goal} events came within {_DEADLINE_S:g} s")
            if done and first_s is None:
                first_s = time.monotonic()
            await asyncio.sleep(_POLL_S)
        wall_s = time.monotonic() - (first_s or time.monotonic())
        return Reading(events=done, cpu_s=_cpu_s() - cpu_s, wall_s=wall_s, rss_mb=_rss_mb())


def _cpu_s() -> float:
    spent = os.times()
    return spent.user + spent.system


def _rss_mb() -> float:
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 (no file system path, a kernel one)
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


async def run_engine(settings: Settings, goal: int) -> Reading:
    """Run a whole worker until it has applied `goal` records."""
    worker = Worker(settings)
    await worker.start()
    gc.freeze()
    try:
        reading = await Stopwatch(lambda: _checked(worker).ingest.records, goal).run()
    finally:
        await worker.stop()
    return reading


def _checked(worker: Worker) -> Worker:
    if worker.failure is not None:
        raise worker.failure
    return worker


async def run_agent_per_event(settings: Settings, goal: int) -> Reading:
    """Run a plain Faust app with one agent call per event."""
    job = PlainJob()
    app = faust.App(
        settings.group_id,
        **settings.faust_options(),
        loop=asyncio.get_running_loop(),
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        value_serializer="raw",
        key_serializer="raw",
        logging_config=None,
    )

    async def exposures(stream: Any) -> None:
        async for value in stream:
            job.expose(value)

    async def rewards(stream: Any) -> None:
        async for value in stream:
            job.reward(value)

    for agent in (exposures, rewards):
        topic = app.topic(settings.topic(agent.__name__), value_type=bytes, value_serializer="raw")
        app.agent(topic, name=f"bench.{agent.__name__}")(agent)
    app.finalize()
    await app.start()
    return await Stopwatch(lambda: job.events, goal).run()


class PlainJob:
    """The same job in plain Python, a call per event."""

    def __init__(self) -> None:
        self.events = 0
        self.units: dict[tuple[str, str], tuple[int, str]] = {}
        self.values: dict[tuple[str, str], int] = {}
        self.sums: dict[tuple[str, str], list[int]] = {}
        self.seen: set[tuple[str, str]] = set()
        self.listeners: dict[str, tuple[str, Metric]] = {
            metric.key: (record.spec.experiment, metric)
            for record in experiment_records()
            for metric in record.spec.metrics
        }
        self._exposure = msgspec.json.Decoder(Exposure)
        self._reward = msgspec.json.Decoder(Reward)

    def expose(self, value: bytes) -> None:
        """Take an exposure: the first by event time fixes the arm."""
        self.events += 1
        event = self._exposure.decode(value)
        if self._repeated(event.source, event.id):
            return
        key = (event.experiment, event.unit)
        time_ms = epoch_ms(event.time)
        held = self.units.get(key)
        if held is None or time_ms < held[0]:
            self.units[key] = (time_ms, event.arm)

    def reward(self, value: bytes) -> None:
        """Take a reward: join, fold into the unit's value, and keep the sums."""
        self.events += 1
        event = self._reward.decode(value)
        if self._repeated(event.source, event.id):
            return
        experiment, metric = self.listeners[event.metric]
        unit = self.units.get((experiment, event.unit))
        if unit is None or not unit[0] <= epoch_ms(event.time) < unit[0] + metric.window_ms:
            return
        conversion = metric.kind is MetricKind.CONVERSION
        steps = int(event.value != 0.0) if conversion else round(event.value / metric.step)
        key = (event.metric, event.unit)
        before = self.values.get(key, 0)
        after = max(before, steps) if conversion else before + steps
        self.values[key] = after
        sums = self.sums.setdefault((event.metric, unit[1]), [0, 0])
        sums[0] += after - before
        sums[1] += after * after - before * before

    def _repeated(self, source: str, identity: str) -> bool:
        key = (source, identity)
        if key in self.seen:
            return True
        self.seen.add(key)
        return False


async def _main(name: str, goal: int) -> None:
    run = {"engine": run_engine, "agent_per_event": run_agent_per_event}[name]
    reading = await run(Settings.load(os.environ), goal)
    sys.stdout.buffer.write(msgspec.json.encode(reading) + b"\n")
    sys.stdout.flush()
    os._exit(0)  # Faust's orderly end takes seconds, and nothing is to be kept.


if __name__ == "__main__":
    # One child: its name and goal are the arguments, its settings the environment; prints a Reading.
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))
