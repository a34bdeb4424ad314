"""A hundred thousand experiments that nobody knows, in records: counted as unknown, and neither series nor memory."""

from __future__ import annotations

import asyncio
import json
import random
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from unit.services.ingest_world import SPEC, Log, Parts, T, exposures

from stream_xp.adapters.prometheus import Metrics
from stream_xp.engine.columns import Block
from stream_xp.settings import ROLES

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = 100_000
EACH = 5_000
SETTLED = 20_000
BYTES = 400_000
"""What so many records may leave; four bytes of each."""


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


def blocks(topic: str, event: dict[str, Any], name: str, *, seed: int) -> Iterator[Block]:
    """Records alike but for one field, which is another one each time."""
    draw = random.Random(seed)
    for first in range(0, IDS, EACH):
        offsets = list(range(first, first + EACH))
        values = [
            json.dumps(
                event | {"id": str(at), "time": T + at, "unit": f"u{at}", name: f"{draw.getrandbits(64):x}"}
            ).encode()
            for at in offsets
        ]
        keys = [f"u{at}".encode() for at in offsets]
        yield Block(
            topic, 0, first, first + EACH, offsets, [T + at for at in offsets], keys, values, [()] * EACH
        )


def parts_with_metrics(log: Log) -> tuple[Parts, Metrics]:
    parts, metrics = Parts(log), Metrics(ROLES, source_partitions=1, max_series=10_000)
    metrics.registered(parts.specs.registry.unarchived(), owned=["exp"])
    parts.ingest._telemetry = metrics
    return parts, metrics


def series(metrics: Metrics) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.startswith("process_")
    }


@pytest.mark.parametrize(
    ("topic", "event", "name", "outcome"),
    [
        ("exposures", {"arm": "a"}, "experiment", "unknown_experiment"),
        ("rewards", {"metric": "click", "value": 1}, "experiment", "unknown_experiment"),
        ("rewards", {"value": 1}, "metric", "unattributed"),
    ],
    ids=["experiments of exposures", "experiments of rewards", "metrics of rewards"],
)
def test_ids_in_records_become_no_series_and_no_memory(
    log: Log,
    capsys: pytest.CaptureFixture[str],
    topic: str,
    event: dict[str, Any],
    name: str,
    outcome: str,
) -> None:
    parts, metrics = parts_with_metrics(log)

    async def scenario() -> None:
        await parts.ingest.load([0])
        other = "rewards" if topic == "exposures" else "exposures"
        await parts.ingest.flush()
        before, held = series(metrics), 0
        sent = list(blocks(f"xp.{topic}", event, name, seed=3))
        tracemalloc.start()
        for block in sent:
            await parts.ingest.on_block(block)
            if block.next_offset == SETTLED:
                held = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - held
        tracemalloc.stop()
        assert grown < BYTES, f"{grown:,} bytes"
        await parts.ingest.flush()
        counted = parts.state().outcomes(topic)
        assert counted.read == IDS
        assert getattr(counted, outcome) == IDS, counted
        assert (parts.state().units, parts.state().outcomes(other).read) == (0, 0)
        # What a flush shows of the partition is there from the first one on.
        new = series(metrics) - before
        assert not new, sorted(new)[:5]

    asyncio.run(scenario())
    assert capsys.readouterr().out.count("\n") < 10


def test_arms_that_are_none_are_dead_letters_of_one_reason(log: Log) -> None:
    parts, metrics = parts_with_metrics(log)

    async def scenario() -> None:
        await parts.ingest.load([0])
        await parts.ingest.flush()
        before = series(metrics)
        (block, *_) = blocks("xp.exposures", {"experiment": SPEC.experiment}, "arm", seed=4)
        await parts.ingest.on_block(block)
        await parts.ingest.flush()
        assert series(metrics) == before
        assert parts.state().outcomes("exposures").dead_lettered == EACH
        # One that is counted shows that counting goes on.
        await parts.ingest.on_block(exposures(EACH, 1))
        assert parts.state().units == 1

    asyncio.run(scenario())
