"""More than can be taken in at once: fetching pauses, memory stays flat, the group stays as it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from broker.proxy import Shape
from broker.worker_process import DEADLINE_S, committed, ends
from chaos.traffic import Mix
from kafka import KafkaAdminClient

if TYPE_CHECKING:
    from chaos.harness import Process, Rig

    from stream_xp.settings import Settings

PAD_BYTES = 8_000
MIB = 2**20
MOST_GROWTH_BYTES = 192 * MIB
"""What fetched and waiting blocks may take: some copies of 4 MiB for each of 8 partitions, whatever the burst."""


def members(settings: Settings) -> set[str]:
    """The members of the workers' group, by an id that changes when one joins again."""
    client = KafkaAdminClient(**settings.kafka_python_options())
    try:
        group = client.describe_groups([settings.group_id])[settings.group_id]
        return {member["member_id"] for member in group["members"]}
    finally:
        client.close()


def lag(settings: Settings) -> int:
    """Records that are not durable yet, as whoever watches the group sees it."""
    durable = committed(settings)
    return sum(end - durable.get(place, 0) for place, end in ends(settings).items())


class Watch:
    """What is seen of a worker while it catches up."""

    def __init__(self, rig: Rig, worker: Process) -> None:
        self._rig = rig
        self._worker = worker
        self._members = members(rig.settings)
        self._assigned = len(worker.events("partitions assigned"))
        self.first_bytes = worker.rss_bytes()
        self.grown_bytes = 0
        self.worst_lag = 0

    def until_caught_up(self) -> None:
        """Watch until nothing is left."""
        deadline = time.monotonic() + DEADLINE_S
        while (behind := lag(self._rig.settings)) > 0:
            assert time.monotonic() < deadline, f"{behind} records behind"
            assert not self._worker.ended(), self._worker.log[-3000:]
            self.worst_lag = max(self.worst_lag, behind)
            self.grown_bytes = max(self.grown_bytes, self._worker.rss_bytes() - self.first_bytes)
            time.sleep(1)

    def assert_same_generation(self) -> None:
        assert members(self._rig.settings) == self._members
        assert len(self._worker.events("partitions assigned")) == self._assigned


@pytest.mark.chaos("burst over ten times the rate")
def test_a_burst_is_taken_in_at_the_workers_pace(rig: Rig) -> None:
    """The worker is slowed down per block, so that what it did not hold back would pile up in its memory."""
    rig.prepare()
    # Long records without bad ones between them: the burst is about bytes.
    traffic = rig.traffic(mix=Mix(late=0, skewed=0, unknown=0, nobody=0, poison=0), pad_bytes=PAD_BYTES)
    with rig.worker(faults=("--apply-slowly-ms", "200")) as worker:
        worker.wait_started()
        with traffic.flowing(per_s=20):
            time.sleep(3)
        rig.settle()
        watch = Watch(rig, worker)
        units = rig.count(dev=24_000, short=24_000, full=48_000)
        traffic.send(units)
        rig.faulted()
        burst_bytes = units * 1.6 * PAD_BYTES
        watch.until_caught_up()
        print(f"burst {burst_bytes / MIB:.0f} MiB, worker grew {watch.grown_bytes / MIB:.0f} MiB")
        assert watch.worst_lag > units / 10
        assert burst_bytes / 1.5 > MOST_GROWTH_BYTES
        assert watch.grown_bytes < MOST_GROWTH_BYTES, f"{watch.grown_bytes / MIB:.0f} MiB"
        watch.assert_same_generation()
        rig.check()
        worker.finish()


@pytest.mark.chaos("slow broker")
def test_a_slow_broker_makes_lag_and_nothing_else(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    with rig.worker() as worker:
        worker.wait_started()
        traffic.send(200)
        rig.settle()
        watch = Watch(rig, worker)
        rig.proxy.shape = Shape(latency_ms=30, jitter_ms=40, bytes_per_s=60_000)
        with traffic.flowing(per_s=rig.count(dev=400, short=400, full=800)):
            time.sleep(rig.count(dev=5, short=5, full=20))
        watch.worst_lag = lag(rig.settings)
        assert watch.worst_lag > 100
        rig.proxy.heal()
        rig.faulted()
        watch.until_caught_up()
        watch.assert_same_generation()
        assert watch.grown_bytes < 64 * MIB
        rig.check()
        worker.finish()
