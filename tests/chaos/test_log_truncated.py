"""Records deleted before they were counted: the worker says so and stops, and nothing is made up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from broker.worker_process import ends, snapshots, statistics
from kafka import TopicPartition

from stream_xp.adapters.kafka_admin import connect
from stream_xp.services.oracle.reading import LogTruncatedError
from stream_xp.services.oracle.service import check

if TYPE_CHECKING:
    from chaos.harness import Rig


@pytest.mark.chaos("log truncated under the applied offset", short=True)
def test_a_truncated_log_stops_the_worker(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    with rig.worker() as worker:
        worker.wait_started()
        traffic.send(600)
        rig.check()
        worker.finish()
    traffic.send(400)
    topic, partition = rig.settings.topic("exposures"), 1
    at = ends(rig.settings)["exposures", partition] - 5
    with connect(rig.settings) as client:
        client.delete_records({TopicPartition(topic, partition): at})
    held = {place: offset for place, offset in snapshots(rig.settings).items() if place[1] == partition}
    believed = [part for part in statistics(rig.settings) if part.partition == partition]
    # However often it is started again.
    for _ in range(rig.count(dev=1, short=1, full=3)):
        with rig.worker() as worker:
            assert worker.wait_ended() == 1, worker.log[-3000:]
            (failure,) = worker.events("worker failed")
            assert failure["kind"] == "StateError"
            assert f"{topic} {partition}: the log starts at {at}" in failure["error"]
            assert f"{held['exposures', partition]} is the next offset to apply" in failure["error"]
            rig.faulted(recovers=False)
        now = {place: offset for place, offset in snapshots(rig.settings).items() if place[1] == partition}
        assert now["exposures", partition] == held["exposures", partition]
        after = [part for part in statistics(rig.settings) if part.partition == partition]
        assert [part.exposures for part in after] == [part.exposures for part in believed]
    with pytest.raises(LogTruncatedError, match=r"retention has removed these records"):
        check(rig.settings)
