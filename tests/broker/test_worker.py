"""`stream-xp worker` on a real Apache Kafka: it is stopped, killed, joined, cut off, and loses nothing."""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from proxy import RewritingProxy
from worker_process import (
    HurriedWorker,
    Traffic,
    WorkerProcess,
    applied,
    assert_true,
    committed,
    ends,
    final,
    merged,
    now_ms,
    outcomes,
    prepare,
    quick,
    records,
    remake,
    snapshots,
    statistics,
    wait_for,
    wait_shared,
)

from stream_xp.adapters.kafka_admin import connect, declared_topics, ensure_topics
from stream_xp.adapters.topic_writer import TopicWriter

if TYPE_CHECKING:
    from pathlib import Path

    from stream_xp.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.kafka, pytest.mark.slow]


@pytest.fixture
def settings(apache_kafka: str, topic_prefix: str) -> Settings:
    return quick(apache_kafka, topic_prefix)


def assert_flushed(settings: Settings) -> None:
    """Statistics, snapshots and committed offsets stand at one and the same place in every partition."""
    at = applied(statistics(settings))
    assert len(at) == 2 * settings.partitions
    assert snapshots(settings) == at
    assert committed(settings) == at


def test_sigterm_writes_everything_and_a_restart_loses_and_doubles_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    prepare(settings)
    traffic = Traffic(settings, seed=1)
    with WorkerProcess(settings, tmp_path) as first:
        first.wait_started()
        with traffic.flowing():
            wait_for(
                lambda: sum(applied(statistics(settings)).values()) > 300, "some of the traffic is counted"
            )
            assert first.terminate() == 0, first.log
            part_way = sum(applied(statistics(settings)).values())
            wait_for(lambda: sum(ends(settings).values()) > part_way, "traffic has gone on")
    assert_flushed(settings)
    assert sum(applied(statistics(settings)).values()) == part_way
    with WorkerProcess(settings, tmp_path) as second:
        traffic.send(400)
        parts = final(settings)
        assert second.terminate() == 0, second.log
    assert_flushed(settings)
    assert applied(statistics(settings)) == ends(settings)
    assert_true(settings, traffic, parts)
    # The first time: where it loses its session it loads them again.
    loaded = {line["partition"]: line["next"] for line in reversed(second.events("partition loaded"))}
    assert sum(map(sum, loaded.values())) == part_way


def test_kill_9_while_traffic_flows_loses_and_doubles_nothing(settings: Settings, tmp_path: Path) -> None:
    prepare(settings)
    traffic, moments = Traffic(settings, seed=2), random.Random(2)
    with traffic.flowing():
        for _ in range(3):
            with WorkerProcess(settings, tmp_path) as worker:
                worker.wait_started()
                time.sleep(moments.uniform(0.1, 1.5))
                worker.kill()
        with WorkerProcess(settings, tmp_path) as worker:
            wait_for(
                lambda: sum(applied(statistics(settings)).values()) > 0, "some of the traffic is counted"
            )
            worker.kill()
        part_way = sum(applied(statistics(settings)).values())
        wait_for(lambda: sum(ends(settings).values()) > part_way, "traffic has gone on")
    with WorkerProcess(settings, tmp_path) as last:
        parts = final(settings)
        assert last.terminate() == 0, last.log
    assert_true(settings, traffic, parts)


@pytest.mark.parametrize("leaves_by", ["sigterm", "sigkill"])
def test_two_workers_share_the_partitions_and_one_leaves(
    settings: Settings, tmp_path: Path, leaves_by: str
) -> None:
    prepare(settings)
    traffic = Traffic(settings, seed=3)
    with WorkerProcess(settings, tmp_path) as stays, WorkerProcess(settings, tmp_path) as leaves:
        stays.wait_started()
        leaves.wait_started()
        with traffic.flowing():
            wait_shared(stays, leaves)
            time.sleep(1)
            if leaves_by == "sigterm":
                assert leaves.terminate() == 0, leaves.log
            else:
                leaves.kill()
            time.sleep(0.5)
        parts = final(settings)
        assert stays.terminate() == 0, stays.log
    assert_true(settings, traffic, parts)
    remake(settings, "state", "stats")
    alone = msgspec.structs.replace(settings, group_id=f"{settings.group_id}-alone")
    with WorkerProcess(alone, tmp_path) as worker:
        parts_alone = final(alone)
        assert worker.terminate() == 0, worker.log
    assert merged(parts_alone).canonical() == merged(parts).canonical()
    assert outcomes(parts_alone) == outcomes(parts)


def send_to_one_arm(settings: Settings, first: int, units: int) -> None:
    with TopicWriter(settings) as writer:
        for n in range(first, first + units):
            event = {"id": f"x{n}", "time": now_ms(), "experiment": "checkout", "unit": f"m{n}", "arm": "a"}
            writer.send(settings.topic("exposures"), key=f"m{n}".encode(), value=json.dumps(event).encode())


def test_one_signal_and_its_config_after_kill_9(settings: Settings, tmp_path: Path) -> None:
    prepare(settings)
    with WorkerProcess(settings, tmp_path) as first:
        first.wait_started()
        send_to_one_arm(settings, 0, 400)
        wait_for(
            lambda: bool(records(settings, "signals")), "all units in one arm are a sample-ratio mismatch"
        )
        first.kill()
    (signal,) = records(settings, "signals")
    assert signal["data"]["decision"]["action"] == "stop"
    # As if the kill had come between the signal and the config that follows from it.
    running = records(settings, "config")[0]
    remake(settings, "config")
    with TopicWriter(settings) as writer:
        writer.send(settings.topic("config"), key=b"checkout", value=json.dumps(running).encode())
    looks = max((result["look"] for result in records(settings, "results")), default=0)
    with WorkerProcess(settings, tmp_path) as second:
        send_to_one_arm(settings, 400, 100)
        wait_for(lambda: len(records(settings, "config")) > 1, "the config follows the signal")
        # Whether they still count depends on when the last weight epoch begins.
        wait_for(lambda: exposures_evaluated(settings) == 500, "the new exposures are evaluated")
        assert second.terminate() == 0, second.log
    assert records(settings, "signals") == [signal]
    before, after = records(settings, "config")
    assert (before["status"], after["status"]) == ("running", "stopped")
    assert after["signal_id"] == signal["id"]
    assert after["weights"] == {"a": 1.0, "b": 0.0}
    assert after["config_version"] == before["config_version"] + 1
    newest = records(settings, "results")[-1]
    assert newest["decision"] == signal["data"]["decision"]
    assert newest["look"] > looks


def exposures_evaluated(settings: Settings) -> int:
    """Of the newest result, whatever became of them."""
    results = records(settings, "results")
    return results[-1]["exposure_outcomes"]["in"] if results else 0


def test_it_refuses_to_start_without_its_topics(settings: Settings, tmp_path: Path) -> None:
    with WorkerProcess(settings, tmp_path) as worker:
        assert worker.wait_ended() == 2
    for topic in declared_topics(settings):
        assert f"{topic.name}: topic: wanted present, found missing" in worker.log
    assert "Traceback" not in worker.log


def test_it_refuses_to_start_on_topics_of_another_shape(settings: Settings, tmp_path: Path) -> None:
    other = msgspec.structs.replace(settings, partitions=2)
    with connect(settings) as client:
        ensure_topics(client, declared_topics(other, timestamp_type="CreateTime"))
    with WorkerProcess(settings, tmp_path) as worker:
        assert worker.wait_ended() == 2
    rewards = settings.topic("rewards")
    assert f"{rewards}: partitions: wanted 4, found 2" in worker.log
    assert f"{rewards}: message.timestamp.type: wanted LogAppendTime, found CreateTime" in worker.log
    assert "Traceback" not in worker.log


@pytest.mark.parametrize("fault", ["silent for longer than the session", "connections cut"])
def test_the_broker_goes_away_for_a_while(
    settings: Settings, apache_kafka: str, tmp_path: Path, fault: str
) -> None:
    prepare(settings)
    traffic = Traffic(settings, seed=4)
    with RewritingProxy(apache_kafka) as proxy:
        through = msgspec.structs.replace(settings, bootstrap=proxy.address)
        with WorkerProcess(through, tmp_path) as worker:
            worker.wait_started()
            with traffic.flowing():
                time.sleep(0.7)
                if fault == "connections cut":
                    proxy.reset()
                    time.sleep(1)
                    proxy.reset()
                else:
                    proxy.stall()
                    time.sleep(settings.session_timeout_ms / 1000 + 1)
                    proxy.resume()
                time.sleep(1)
            if worker.ended():
                assert worker.process.returncode == 1, worker.log
                assert "worker failed" in worker.log
        with WorkerProcess(settings, tmp_path):
            parts = final(settings)
    assert_true(settings, traffic, parts)


def test_sigterm_ends_it_while_the_broker_is_away(
    settings: Settings, apache_kafka: str, tmp_path: Path
) -> None:
    prepare(settings)
    traffic = Traffic(settings, seed=5)
    with RewritingProxy(apache_kafka) as proxy:
        through = msgspec.structs.replace(settings, bootstrap=proxy.address)
        with HurriedWorker(through, tmp_path) as worker:
            worker.wait_started()
            with traffic.flowing():
                wait_for(lambda: sum(applied(statistics(settings)).values()) > 0, "some of it is counted")
                proxy.stall()
                time.sleep(0.5)
                assert worker.terminate() == 1, worker.log
            assert "took more than" in worker.log
    with WorkerProcess(settings, tmp_path) as after:
        parts = final(settings)
        assert after.terminate() == 0, after.log
    assert_true(settings, traffic, parts)
