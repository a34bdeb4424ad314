"""`stream-xp verify` against what a worker decided, on both kinds of broker."""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from oracle_world import run, with_one_more
from worker_process import (
    SPEC,
    Traffic,
    WorkerProcess,
    ends,
    final,
    now_ms,
    prepare,
    quick,
    records,
    remake,
    wait_for,
)

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.decision import Signal
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.services.oracle.service import examine

if TYPE_CHECKING:
    from pathlib import Path

    from stream_xp.adapters.embedded_broker import EmbeddedBroker
    from stream_xp.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.slow]


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker, topic_prefix: str) -> Settings:
    """Settings of an embedded broker with its topics made, for which it has no administration."""
    settings = quick(embedded_broker.bootstrap, topic_prefix, broker="embedded")
    for topic in declared_topics(settings):
        embedded_broker.create_topic(topic.name, topic.partitions)
    return settings


@pytest.fixture
def kafka(apache_kafka: str, topic_prefix: str) -> Settings:
    """Settings of an Apache Kafka, under which a winner ships at once."""
    return quick(apache_kafka, topic_prefix)


SHIPPING = msgspec.structs.replace(SPEC, minimum_runtime="0s", planned_sample=500)


def send_winner(settings: Settings, *, units: int, seed: int = 1) -> None:
    """Send units of which b clicks far more often, in both arms evenly."""
    dice = random.Random(seed)
    with TopicWriter(settings) as writer:
        for n in range(units):
            unit, arm, at_ms = f"w{seed}-{n}", "ab"[n % 2], now_ms()
            events: list[tuple[str, dict[str, Any]]] = [
                ("exposures", {"id": f"x{unit}", "experiment": "checkout", "arm": arm})
            ]
            if dice.random() < (0.8 if arm == "b" else 0.1):
                events.append(("rewards", {"id": f"c{unit}", "metric": "click"}))
            value = round(dice.uniform(0, 90), 2)
            events.append(("rewards", {"id": f"s{unit}", "metric": "spend", "value": value}))
            for topic, event in events:
                text = json.dumps({**event, "unit": unit, "time": at_ms}).encode()
                writer.send(settings.topic(topic), key=unit.encode(), value=text)
        writer.flush()


def first_signal(settings: Settings) -> dict[str, Any]:
    wait_for(lambda: bool(records(settings, "signals")), "a decision")
    signal: dict[str, Any] = records(settings, "signals")[0]
    return signal


def has_gone_on(settings: Settings, signal: dict[str, Any]) -> bool:
    """Whether there are more exposures than those that a signal was decided on."""
    now = ends(settings)
    offsets = signal["data"]["result"]["offsets"]
    return any(of["exposures"] < now["exposures", int(partition)] - 1 for partition, of in offsets.items())


@pytest.mark.kafka
def test_signals_of_workers_that_were_killed_are_derived_again(kafka: Settings, tmp_path: Path) -> None:
    """kill -9 before the first decision, during it, and after; traffic goes on past the signal's offsets."""
    prepare(kafka, SHIPPING)
    traffic, moments = Traffic(kafka, seed=11), random.Random(11)
    with traffic.flowing(per_s=100):
        for round_ in range(3):
            with WorkerProcess(kafka, tmp_path) as worker:
                worker.wait_started()
                send_winner(kafka, units=200, seed=round_)
                time.sleep(moments.uniform(0.3, 2.5))
                worker.kill()
        # Traffic goes on past the signal, whichever of the workers decided.
        with WorkerProcess(kafka, tmp_path) as worker:
            signal = first_signal(kafka)
            wait_for(lambda: has_gone_on(kafka, signal), "traffic has gone on")
            worker.kill()
    with WorkerProcess(kafka, tmp_path) as last:
        final(kafka)
        assert last.terminate() == 0, last.log
    (only,) = records(kafka, "signals")
    assert only == signal
    done = run("verify", kafka, signal["id"])
    assert done.exit_code == 0, done.output
    assert f"equal: signal {signal['id']}" in done.stdout
    shown = json.loads(run("verify", kafka, signal["id"], "--json").stdout)
    assert shown["verdict"] == "equal"
    assert all(line["equal"] is not False for line in shown["lines"])
    assert examine(kafka).equal


@pytest.mark.kafka
def test_a_tampered_signal_and_a_tampered_record_are_found(kafka: Settings, tmp_path: Path) -> None:
    prepare(kafka, SHIPPING)
    with WorkerProcess(kafka, tmp_path) as worker:
        worker.wait_started()
        send_winner(kafka, units=400)
        signal = first_signal(kafka)
        final(kafka)
        assert worker.terminate() == 0, worker.log
    before = published(kafka)
    assert run("verify", kafka, signal["id"]).exit_code == 0
    assert run("oracle", kafka).exit_code == 0
    changed = msgspec.convert(signal, Signal)
    effect = signal["data"]["result"]["metrics"][0]["effect"]
    signal["data"]["result"]["metrics"][0]["effect"] = {**effect, "log_e": effect["log_e"] + 1}
    remake(kafka, "signals", "stats")
    with TopicWriter(kafka) as writer:
        writer.send(kafka.topic("signals"), key=b"checkout", value=json.dumps(signal).encode())
        for part in before:
            wrong = with_one_more(part, arm="b") if part.partition == 2 else part
            key = f"checkout/{part.partition}".encode()
            writer.send(kafka.topic("stats"), key=key, value=msgspec.json.encode(wrong))
        writer.flush()
    done = run("verify", kafka, changed.id)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1].split(": ")[2] == "metrics click b effect log_e"
    (found,) = examine(kafka).differences
    assert (found.partition, found.metric, found.arm) == (2, "click", "b")
    assert run("oracle", kafka).exit_code == 1


def published(settings: Settings) -> list[PartitionStatistics]:
    return [msgspec.convert(record, PartitionStatistics) for record in newest(settings).values()]


def newest(settings: Settings) -> dict[int, dict[str, Any]]:
    held: dict[int, dict[str, Any]] = {}
    for record in records(settings, "stats"):
        part = msgspec.convert(record, PartitionStatistics)
        known = held.get(part.partition)
        if known is None or part.newer_than(msgspec.convert(known, PartitionStatistics)):
            held[part.partition] = record
    return held


@pytest.mark.kafka
def test_deleted_records_are_no_difference(kafka: Settings, tmp_path: Path) -> None:
    prepare(kafka, SHIPPING)
    with WorkerProcess(kafka, tmp_path) as worker:
        worker.wait_started()
        send_winner(kafka, units=400)
        signal = first_signal(kafka)
        assert worker.terminate() == 0, worker.log
    remake(kafka, "rewards")
    done = run("verify", kafka, signal["id"])
    assert done.exit_code == 2
    assert done.stdout.startswith("cannot say: ")
    assert "ends before offset" in done.stdout
    assert run("oracle", kafka).exit_code == 2


def test_the_signal_of_a_worker_on_the_embedded_broker(settings: Settings, tmp_path: Path) -> None:
    prepare(settings, SHIPPING)
    with WorkerProcess(settings, tmp_path) as worker:
        worker.wait_started()
        send_winner(settings, units=400)
        signal = first_signal(settings)
        assert worker.terminate() == 0, worker.log
    done = run("verify", settings, signal["id"])
    assert done.exit_code == 0, done.output
    unknown = run("verify", settings, "0" * 32)
    assert unknown.exit_code == 2
    assert "holds no signal" in unknown.stderr
    checked = run("oracle", settings)
    assert checked.exit_code == 0
    assert "note: a worker's settings are not those of this command" in checked.stdout
    assert "activation_delay_ms 100 (here 5000)" in checked.stdout
    for offsets in signal["data"]["result"]["offsets"].values():
        assert offsets["rules"]["activation_delay_ms"] == settings.activation_delay_ms
