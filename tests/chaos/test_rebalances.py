"""A worker joins or leaves every three seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from broker.worker_process import wait_for
from chaos.audit import against_commits

if TYPE_CHECKING:
    from chaos.harness import Process, Rig

EVERY_S = 3.0
MOST_GUESTS = 3


@pytest.mark.chaos("a worker joins or leaves every 3 s")
def test_a_rebalance_storm(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    lasts_s = rig.count(dev=24, short=24, full=120)
    with rig.worker() as host:
        host.wait_started()
        guests: list[Process] = []
        try:
            with traffic.flowing(per_s=80):
                begun_s = time.monotonic()
                for turn in range(int(lasts_s / EVERY_S)):
                    time.sleep(max(0.0, begun_s + turn * EVERY_S - time.monotonic()))
                    join_or_leave(rig, guests)
                wait_for(
                    lambda: len(host.events("partitions assigned")) > 1,
                    "a guest has had partitions",
                )
                rig.note(list(against_commits(rig.settings)))
        finally:
            for guest in guests:
                guest.__exit__()
        assert not host.ended(), host.log[-3000:]
        rig.check()
        host.finish()


def join_or_leave(rig: Rig, guests: list[Process]) -> None:
    """Who came first leaves, by a signal or by force, once it has had partitions; otherwise somebody comes."""
    if guests and guests[0].events("partitions assigned"):
        leaving = guests.pop(0)
        if rig.random.random() < 0.5:
            leaving.kill()
        else:
            leaving.terminate()
        rig.faulted()
    elif len(guests) < MOST_GUESTS:
        guests.append(rig.worker())
        rig.faults += 1
