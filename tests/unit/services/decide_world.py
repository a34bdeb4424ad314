"""The decide stage on topics that are lists: one experiment, its statistics, and who works on them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec
import pytest

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.kafka_log import LogRecord
from stream_xp.domain.decision import ConfigRecord, Result, Signal
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import Outcomes, PartitionStatistics, Progress, build
from stream_xp.engine.columns import Block
from stream_xp.engine.registry import Entry, Registry
from stream_xp.errors import DependencyError
from stream_xp.services.decide import Decide
from stream_xp.services.decide import topics as topics_module
from stream_xp.settings import Settings

T = 1_000_000


def spec(version: int = 1, *, name: str = "exp") -> ExperimentSpec:
    return msgspec.convert(
        {
            "experiment": name,
            "version": version,
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
            "metrics": [
                {
                    "key": "click",
                    "kind": "conversion",
                    "role": "primary",
                    "direction": "increase",
                    "attribution_window": f"{version}s",
                }
            ],
        },
        ExperimentSpec,
    )


def entry(version: int = 1) -> Entry:
    design = spec(version)
    record = ExperimentRecord(
        spec=design,
        epochs=(WeightEpoch(epoch=0, weights=design.weights, effective_ms=0),),
        design_hash=design.design_hash(),
    )
    return Entry(offset=version, experiment="exp", in_force_ms=version, record=record)


class CrashError(Exception):
    """The worker ends here."""


class Log:
    """Topics as lists; writes can be made to wait, to fail where they are waited for, or to be the last one.

    Attributes:
        waits: the topic of each wait for the broker, with the number of records it was for.
        last_write: the topic, and whether the record is written before the worker ends.
    """

    def __init__(self) -> None:
        self.topics: dict[str, list[bytes]] = {}
        self.waits: list[tuple[str, int]] = []
        self.failing: set[str] = set()
        self.flows = asyncio.Event()
        self.flows.set()
        self.registries: list[Registry] = []
        self.last_write: tuple[str, bool] | None = None

    async def send(self, topic: str, *, key: bytes, value: bytes | None) -> Awaitable[Any]:
        await self.flows.wait()
        if self.last_write == (topic, False):
            raise CrashError
        self.append(topic, value or b"")
        return asyncio.sleep(0)

    async def durable(self, sent: Sequence[Awaitable[Any]], topic: str) -> None:
        if sent:
            self.waits.append((topic, len(sent)))
            await asyncio.gather(*sent)
        if topic in self.failing:
            raise DependencyError(f"{topic} is not written")
        if sent and self.last_write == (topic, True):
            raise CrashError

    def append(self, topic: str, value: bytes) -> None:
        self.topics.setdefault(topic, []).append(value)
        if topic == "xp.experiments":
            for registry in self.registries:
                registry.add(self.entries())

    def entries(self) -> list[Entry]:
        """What `Experiments` makes of the topic; what `apply` wrote before has low offsets."""
        records = [
            msgspec.json.decode(v, type=ExperimentRecord) for v in self.topics.get("xp.experiments", [])
        ]
        return [
            Entry(offset=at, experiment=one.spec.experiment, in_force_ms=at, record=one)
            for at, one in enumerate(records, 100)
        ]

    def serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the decide stage read these lists."""
        monkeypatch.setattr(topics_module, "read_all", self.read_all)
        monkeypatch.setattr(topics_module, "LogTail", self.tail)

    def tail(self, settings: Settings, topic: str, partitions: Any) -> Tail:
        return Tail(self, topic)

    async def read_all(self, settings: Settings, topic: str, partitions: Any) -> list[LogRecord]:
        return [LogRecord(0, at, T, b"exp", value) for at, value in enumerate(self.topics.get(topic, []))]

    def signals(self) -> list[Signal]:
        return [msgspec.json.decode(value, type=Signal) for value in self.topics.get("xp.signals", [])]

    def configs(self) -> list[ConfigRecord]:
        return [msgspec.json.decode(value, type=ConfigRecord) for value in self.topics.get("xp.config", [])]

    def records(self) -> list[ExperimentRecord]:
        return [one.record for one in self.entries() if one.record is not None]

    def results(self) -> list[Result]:
        return [msgspec.json.decode(value, type=Result) for value in self.topics.get("xp.results", [])]


class Tail:
    """`LogTail` on a list."""

    def __init__(self, log: Log, topic: str) -> None:
        self._log, self._topic, self._at = log, topic, 0

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def poll(self) -> tuple[list[LogRecord], bool]:
        values = self._log.topics.get(self._topic, [])[self._at :]
        self._at += len(values)
        return [LogRecord(0, 0, T, b"exp", value) for value in values], True


class Specs:
    def __init__(self, *versions: int) -> None:
        self.registry = Registry(map(entry, versions))


def stage(log: Log, specs: Specs, **listeners: Any) -> Decide:
    """The stage; listeners are its telemetry and tracer."""
    specs.registry.add(log.entries())
    log.registries.append(specs.registry)
    return Decide(
        Settings(),
        experiments=specs,  # type: ignore[arg-type]
        writer=log,  # type: ignore[arg-type]
        clock=ManualClock(T),
        partitions={"signals": 1, "config": 1, "results": 1, "stats": 1},
        **listeners,
    )


def statistics(applied: int, *, a: int, b: int, version: int = 1, partition: int = 0) -> bytes:
    progress = Progress(first_offset=0, applied_offset=applied)
    counted = Outcomes(read=applied + 1, counted=applied + 1)
    found = build(
        units={("a", 0, ""): a, ("b", 0, ""): b},
        moments={},
        crossover_units=0,
        first_exposure_ms=T,
        out_of_range={},
    )
    record = PartitionStatistics(
        experiment="exp",
        version=version,
        design_hash=spec(version).design_hash(),
        partition=partition,
        exposures=progress,
        rewards=progress,
        watermark_ms=T + applied,
        allowed_lateness_ms=1,
        statistics=found,
        exposure_outcomes=counted,
        reward_outcomes=counted,
    )
    return msgspec.json.encode(record)


def block(*values: bytes) -> Block:
    n = len(values)
    return Block("xp.stats", 0, 0, n, list(range(n)), [T] * n, [b"exp"] * n, list(values), [()] * n)


MISMATCH = {"a": 400, "b": 0}
EVEN = {"a": 200, "b": 200}


async def look(decide: Decide, *values: bytes) -> None:
    """One evaluation, and those that take the steps that follow from it."""
    await decide.on_block(block(*values))
    await settle(decide)


async def settle(decide: Decide) -> None:
    for _ in range(20):
        await decide.evaluate()
        await decide.hear()
        if not any(watched.changed for watched in decide._watched.values()):
            return
    raise AssertionError("the stage does not come to rest")
