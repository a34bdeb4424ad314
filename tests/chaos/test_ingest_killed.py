"""kill -9 of the ingest stage, at moments of the clock and at every boundary between two effects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from chaos.harness import Rig

BOUNDARIES = (
    "before chunk",
    "after chunk",
    "before manifest",
    "after manifest",
    "before stats",
    "after stats",
    "before deadletter",
    "before commit",
    "after commit",
)


@pytest.mark.chaos("kill -9 of ingest, at random", short=True)
def test_killed_at_random_moments(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    with traffic.flowing():
        for _ in range(rig.count(dev=2, short=3, full=30)):
            with rig.worker() as worker:
                worker.wait_started()
                time.sleep(rig.random.uniform(0.0, 2.0))
                rig.kill(worker)
        with rig.worker() as last:
            last.wait_started()
            time.sleep(1)
    with rig.worker() as last:
        rig.check()
        last.finish()


@pytest.mark.chaos("kill -9 of ingest, between effects")
def test_killed_between_effects(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    boundaries = rig.random.sample(BOUNDARIES, len(BOUNDARIES)) * rig.count(dev=1, short=1, full=4)
    with traffic.flowing():
        for boundary in boundaries[: rig.count(dev=2, short=3, full=100)]:
            at = f"{boundary}:{rig.random.randint(1, 6)}"
            with rig.worker(faults=("--at", at)) as worker:
                assert worker.wait_ended() == -9, f"{at}: {worker.log[-2000:]}"
                rig.kill(worker)
    with rig.worker() as last:
        rig.check()
        last.finish()
