"""The ingest stage between a source and a log that can be made to fail at any point."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import msgspec
import pytest

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.kafka_log import LogRecord
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.engine.columns import Block
from stream_xp.engine.registry import Entry, Registry
from stream_xp.errors import DependencyError
from stream_xp.services import ingest as module
from stream_xp.services.ingest import Ingest
from stream_xp.settings import Settings

LATENESS_MS = 1_000
T = 1_000_000
SPEC = msgspec.convert(
    {
        "experiment": "exp",
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
                "attribution_window": "1s",
            }
        ],
    },
    ExperimentSpec,
)


def record_of(spec: ExperimentSpec) -> ExperimentRecord:
    return ExperimentRecord(
        spec=spec,
        epochs=(WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0),),
        design_hash=spec.design_hash(),
    )


class Log:
    """A broker's topics as lists; `failing` names topics whose writes are never acknowledged."""

    def __init__(self) -> None:
        self.topics: dict[str, list[LogRecord]] = {}
        self.starts = {"xp.exposures": 0, "xp.rewards": 0}
        self.failing: set[str] = set()
        self.order: list[str] = []

    def serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the ingest stage read these lists."""
        monkeypatch.setattr(module, "read_all", self.read_all)
        monkeypatch.setattr(module, "log_starts", self.log_starts)

    async def send(
        self, topic: str, *, key: bytes, value: bytes | None, partition: int | None = None
    ) -> Awaitable[Any]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if topic in self.failing:
            future.set_exception(DependencyError(f"{topic} is not written"))
            future.exception()  # seen, so that only those who await it hear of it
            return future
        held = self.topics.setdefault(topic, [])
        held.append(LogRecord(partition or 0, len(held), T, key, value))
        self.order.append(topic)
        future.set_result(None)
        return future

    async def durable(self, sent: list[Awaitable[Any]], topic: str) -> None:
        await asyncio.gather(*sent)

    async def read_all(self, settings: Settings, topic: str, partitions: list[int]) -> list[LogRecord]:
        await asyncio.sleep(0)
        return [record for record in self.topics.get(topic, []) if record.partition in partitions]

    async def log_starts(self, settings: Settings, topics: list[str], partition: int) -> dict[str, int]:
        return {topic: self.starts[topic] for topic in topics}

    def statistics(self) -> list[PartitionStatistics]:
        records = self.topics.get("xp.stats", [])
        return [msgspec.json.decode(record.value or b"", type=PartitionStatistics) for record in records]


class Consumer:
    """The consumer's side: what was asked of it."""

    def __init__(self) -> None:
        self.seeks: list[tuple[str, int, int]] = []
        self.commits: dict[tuple[str, int], int] = {}
        self.ends: dict[str, tuple[int, int]] = {}

    async def seek(self, topic: str, partition: int, offset: int) -> None:
        self.seeks.append((topic, partition, offset))

    def end(self, topic: str, partition: int) -> tuple[int, int] | None:
        return self.ends.get(topic)

    def durable(self, topic: str, partition: int, offset: int) -> None:
        self.commits[topic, partition] = offset


class Specs:
    """One experiment, in force from the beginning; `covered` can be made to wait."""

    def __init__(self) -> None:
        self.registry = Registry([Entry(offset=0, experiment="exp", in_force_ms=0, record=record_of(SPEC))])
        self.covered = asyncio.Event()
        self.covered.set()

    async def cover(self, log_ms: int, *, fetched_ns: int | None = None) -> None:
        await self.covered.wait()


class Parts:
    """An ingest stage and everything around it."""

    def __init__(self, log: Log, **changed: Any) -> None:
        self.log, self.source, self.specs, self.clock = log, Consumer(), Specs(), ManualClock(T)
        self.ingest = Ingest(
            Settings(
                **{
                    "allowed_lateness_ms": LATENESS_MS,
                    "flush_interval_ms": 1,
                    "snapshot_interval_ms": 1,
                    **changed,
                }
            ),
            experiments=self.specs,  # type: ignore[arg-type]
            source=self.source,
            writer=log,  # type: ignore[arg-type]
            clock=self.clock,
            stats_partitions=1,
        )

    def state(self, partition: int = 0) -> Any:
        return self.ingest._tasks[partition].state


def exposures(
    first: int, count: int, *, bad: frozenset[int] = frozenset(), topic: str = "xp.exposures"
) -> Block:
    """A block of exposures of units that are named by their offsets."""
    offsets = list(range(first, first + count))
    bodies = [
        {"id": str(at), "time": T + at, "experiment": "exp", "unit": f"u{at}", "arm": "ab"[at % 2]}
        for at in offsets
    ]
    values = [
        b"{" if at in bad else json.dumps(body).encode() for at, body in zip(offsets, bodies, strict=True)
    ]
    keys = [f"u{at}".encode() for at in offsets]
    stamps = [T + at for at in offsets]
    return Block(topic, 0, first, first + count, offsets, stamps, keys, values, [()] * count)


def units(parts: Parts) -> int:
    (slot,) = parts.specs.registry.slots
    return sum(row.units for row in parts.state().statistics(slot).units)
