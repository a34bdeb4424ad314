"""Topics that are missing or of another shape, before a start and under a running worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from broker.worker_process import wait_for
from kafka.admin import NewPartitions

from stream_xp.adapters.kafka_admin import connect, describe_topics

if TYPE_CHECKING:
    from chaos.harness import Rig


def delete(rig: Rig, name: str) -> None:
    topic = rig.settings.topic(name)
    with connect(rig.settings) as client:
        client.delete_topics([topic])
        wait_for(lambda: topic not in client.list_topics(), f"{topic} is gone")


def add_partitions(rig: Rig, name: str, total: int) -> None:
    topic = rig.settings.topic(name)
    with connect(rig.settings) as client:
        client.create_partitions({topic: NewPartitions(total)})
        wait_for(
            lambda: describe_topics(client, [topic])[topic].partitions == total, "there are more partitions"
        )


def refuses(rig: Rig, line: str) -> None:
    with rig.worker() as worker:
        assert worker.wait_ended() == 2, worker.log[-3000:]
        assert line in worker.log
        assert "Traceback" not in worker.log
    rig.faulted(recovers=False)


@pytest.mark.chaos("topic missing or of another shape")
@pytest.mark.parametrize("name", ["exposures", "state", "experiments"])
def test_a_missing_topic_is_refused(rig: Rig, name: str) -> None:
    rig.prepare()
    delete(rig, name)
    refuses(rig, f"{rig.settings.topic(name)}: topic: wanted present, found missing")


@pytest.mark.chaos("topic missing or of another shape")
def test_added_partitions_are_refused(rig: Rig) -> None:
    rig.prepare()
    add_partitions(rig, "exposures", 5)
    add_partitions(rig, "stats", 6)
    refuses(rig, f"{rig.settings.topic('exposures')}: partitions: wanted 4, found 5")
    refuses(rig, f"{rig.settings.topic('stats')}: partitions: wanted 4, found 6")


@pytest.mark.chaos("partitions added under a running worker")
@pytest.mark.parametrize("name", ["exposures", "rewards", "stats"])
def test_partitions_added_under_a_running_worker_end_it(rig: Rig, name: str) -> None:
    """From then on units go to other partitions than their state is in."""
    rig.prepare()
    traffic = rig.traffic()
    with rig.worker() as worker:
        worker.wait_started()
        traffic.send(200)
        rig.check()
        add_partitions(rig, name, 5)
        assert worker.wait_ended() == 2, worker.log[-3000:]
        (failure,) = worker.events("worker failed")
        assert failure["kind"] == "ConfigError"
        assert f"{rig.settings.topic(name)}: partitions: wanted 4, found 5" in failure["error"]
    rig.faulted(recovers=False)
    refuses(rig, f"{rig.settings.topic(name)}: partitions: wanted 4, found 5")
