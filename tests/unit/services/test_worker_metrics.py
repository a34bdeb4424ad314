"""Which experiments a worker shows, from assignment to revocation, and where it serves them."""

from __future__ import annotations

import asyncio
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types.tuples import TP

from stream_xp.engine.registry import Entry, Registry
from stream_xp.services.partitioning import partition_of
from stream_xp.services.worker import Worker
from stream_xp.settings import Settings
from tests.unit.services.decide_world import entry

STATS = 4
OF_EXP = partition_of("exp", STATS)


def built(**settings: Any) -> Worker:
    """A worker of which nothing is connected, with one experiment."""
    worker = Worker(Settings(**settings))
    worker.experiments.registry = Registry([entry()])
    worker.ingest = SimpleNamespace(load=nothing, close=nothing, drop=lambda **_: None)  # type: ignore[assignment]
    return worker


async def nothing(*_: Any) -> None:
    pass


def shown(worker: Worker, name: str) -> dict[str, float]:
    """The series of a metric, by the experiment."""
    (family,) = [one for one in worker.metrics.collect() if one.name == name]
    return {sample.labels["experiment"]: sample.value for sample in family.samples}


def test_an_experiment_is_shown_by_whoever_holds_its_partition_and_as_long_as_it_does() -> None:
    async def scenario() -> None:
        worker = built()
        mine, anothers = TP("xp.stats", OF_EXP), TP("xp.stats", (OF_EXP + 1) % STATS)

        async def assigned(*partitions: TP) -> dict[str, float]:
            await worker._on_assigned(None, set(partitions))
            await worker._name_experiments()
            return shown(worker, "streamxp_srm_mismatch")

        assert await assigned(anothers) == {}
        assert await assigned(mine, anothers) == {"exp": 0}
        # The same partitions again: what was dropped with the old assignment is shown again.
        assert await assigned(mine, anothers) == {"exp": 0}
        await worker._on_revoked(None, {mine, anothers})
        assert shown(worker, "streamxp_srm_mismatch") == {}
        await worker._name_experiments()
        assert shown(worker, "streamxp_srm_mismatch") == {}
        assert await assigned(mine) == {"exp": 0}
        # Exposures of it can come to any worker.
        assert shown(worker, "streamxp_exposures") == {"exp": 0}

    asyncio.run(scenario())


def test_an_experiment_that_is_archived_is_shown_no_more() -> None:
    async def scenario() -> None:
        worker = built()
        await worker._on_assigned(None, {TP("xp.stats", OF_EXP)})
        await worker._name_experiments()
        assert shown(worker, "streamxp_exposures") == {"exp": 0}
        worker.experiments.registry.add([Entry(offset=9, experiment="exp", in_force_ms=9, record=None)])
        await worker._name_experiments()
        assert shown(worker, "streamxp_exposures") == {}
        assert shown(worker, "streamxp_srm_mismatch") == {}

    asyncio.run(scenario())


def test_several_workers_of_one_process_serve_their_own(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> list[int]:
        workers = [built(metrics_port=0), built(metrics_port=0, roles=("decide",))]
        served = []
        for worker in workers:
            worker._serve_metrics()
            assert worker.metrics_port is not None
            served.append(worker.metrics_port)
            url = f"http://127.0.0.1:{worker.metrics_port}/metrics"
            text = await asyncio.to_thread(lambda url=url: urllib.request.urlopen(url, timeout=30).read())
            assert (b"streamxp_holes_total" in text) == ("ingest" in worker.settings.roles)
        for worker in workers:
            worker.failure = ValueError("nothing to write out")
            await worker.stop()
        return served

    ports = asyncio.run(scenario())
    assert len(set(ports)) == 2
    for port in ports:
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30)


def test_without_a_port_nothing_is_served() -> None:
    async def scenario() -> None:
        worker = built()
        worker._serve_metrics()
        assert worker._metrics_server is None
        assert worker.metrics_port is None

    asyncio.run(scenario())
