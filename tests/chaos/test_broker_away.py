"""The broker is killed, goes away for a minute, or the network between it and the workers does its worst."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from broker.proxy import Shape
from chaos.audit import against_commits
from chaos.harness import supervised

if TYPE_CHECKING:
    from chaos.harness import Rig


@pytest.mark.chaos("broker killed and started again", short=True)
def test_the_broker_is_killed_and_started_again(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    with supervised(rig.worker) as supervisor:
        supervisor.worker.wait_started()
        with traffic.flowing():
            for _ in range(rig.count(dev=1, short=1, full=6)):
                time.sleep(rig.random.uniform(0.5, 2.0))
                rig.node.restart(away_s=rig.random.choice((0.0, 1.0, 4.0)))
                rig.faulted()
                time.sleep(rig.random.uniform(2.0, 4.0))
                rig.note(list(against_commits(rig.settings)))
        rig.check()


@pytest.mark.chaos("broker away for a minute")
def test_the_broker_is_away_for_a_minute(rig: Rig) -> None:
    """To the workers it is away; traffic goes on, so that there is something to catch up with."""
    rig.prepare()
    traffic = rig.traffic()
    away_s = rig.count(dev=12, short=15, full=60)
    with supervised(rig.worker, pause_s=1.0) as supervisor:
        supervisor.worker.wait_started()
        with traffic.flowing(per_s=50):
            for _ in range(rig.count(dev=1, short=1, full=2)):
                time.sleep(1)
                ends_before = len(supervisor.codes)
                rig.proxy.refuse()
                rig.proxy.reset()
                time.sleep(away_s)
                rig.proxy.heal()
                rig.faulted()
                # It ends, and is started again, at the pace of its deadlines: no crash loop.
                assert len(supervisor.codes) - ends_before <= 2 + away_s / 5
                assert all(code == 1 for code in supervisor.codes), supervisor.codes
                time.sleep(5)
        rig.check()


FAULTS = ("reset", "stall", "long stall", "latency", "slices", "no new connections")


@pytest.mark.chaos("network: latency, stalls, resets, half-open", short=True)
def test_the_network_does_its_worst(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    faults = list(FAULTS) * rig.count(dev=1, short=1, full=5)
    rig.random.shuffle(faults)
    with supervised(rig.worker) as supervisor:
        supervisor.worker.wait_started()
        with traffic.flowing(per_s=80):
            for fault in faults:
                inject(rig, fault)
                rig.proxy.heal()
                rig.faulted()
                time.sleep(rig.random.uniform(0.5, 2.0))
            rig.note(list(against_commits(rig.settings)))
        rig.check()


def inject(rig: Rig, fault: str) -> None:
    """One fault of the network, from its beginning to its end."""
    draw, proxy = rig.random, rig.proxy
    if fault == "reset":
        for _ in range(draw.randint(1, 3)):
            assert proxy.reset() > 0
            time.sleep(draw.uniform(0.0, 0.5))
    elif fault == "stall":
        proxy.stall()
        time.sleep(draw.uniform(0.2, 1.5))
    elif fault == "long stall":
        proxy.stall()
        time.sleep(rig.settings.session_timeout_ms / 1000 + draw.uniform(0.5, 2.0))
    elif fault == "latency":
        proxy.shape = Shape(latency_ms=draw.uniform(20, 150), jitter_ms=draw.uniform(0, 200))
        time.sleep(draw.uniform(1, 3))
    elif fault == "slices":
        proxy.shape = Shape(slice_bytes=draw.choice((1, 7, 100)) if draw.random() < 0.3 else 500)
        time.sleep(draw.uniform(1, 2))
    else:
        proxy.refuse()
        proxy.reset()
        time.sleep(draw.uniform(0.5, 3.0))
