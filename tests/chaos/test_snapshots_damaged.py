"""Snapshots on the state topic with a flipped byte, cut off, or gone: an older one, or the log, takes their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from broker.worker_process import remake
from kafka import KafkaProducer

from stream_xp.services.oracle.reading import open_reader

if TYPE_CHECKING:
    from chaos.harness import Rig

    from stream_xp.services.oracle.recompute import LoggedRecord

DAMAGES = ("newest chunks flipped", "all chunks flipped", "all cut off", "no manifests", "topic emptied")


@pytest.mark.chaos("snapshots damaged or missing")
def test_damaged_snapshots_cost_a_replay_and_no_truth(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    for damage in list(DAMAGES) * rig.count(dev=1, short=1, full=3):
        with rig.worker() as worker, traffic.flowing():
            worker.wait_started()
            rig.settle_some()
            rig.kill(worker)
        do(rig, damage)
        rig.faulted()
        with rig.worker() as worker:
            rig.check()
            worker.finish()
            loaded = worker.events("partition loaded")
        if damage == "topic emptied":
            assert all(line["units"] == 0 for line in loaded), loaded
        elif damage != "no manifests":
            assert worker.events("snapshot passed over") or damage == "all cut off", worker.log[-3000:]


def do(rig: Rig, damage: str) -> None:
    """Write the damage behind what is there, under the same keys, as a bad disk or a bad writer would."""
    if damage == "topic emptied":
        remake(rig.settings, "state")
        return
    topic = rig.settings.topic("state")
    producer = KafkaProducer(**rig.settings.kafka_python_options(), acks="all", max_request_size=2**21)
    try:
        with open_reader(rig.settings) as reader:
            for partition in range(rig.settings.partitions):
                for record in damaged(reader.read_all(topic, partition), damage):
                    producer.send(topic, key=record[0], value=record[1], partition=partition)
        producer.flush(30)
    finally:
        producer.close(timeout=10)


def damaged(records: list[LoggedRecord], damage: str) -> list[tuple[bytes, bytes]]:
    """The records to write behind the ones that are there."""
    newest = {one.key: one.value for one in records if one.key and one.value}
    chunks = {key: value for key, value in newest.items() if not value.startswith(b"{")}
    if damage == "no manifests":
        return [(key, b"{") for key in newest.keys() - chunks.keys()]
    if damage == "newest chunks flipped":
        last = [one.key for one in records if one.key in chunks][-1]
        chunks = {last: chunks[last]}
    if damage == "all cut off":
        return [(key, value[:-7]) for key, value in chunks.items()]
    # The head of a chunk names its snapshot; the byte is flipped behind it.
    return [(key, value[:-9] + bytes([value[-9] ^ 1]) + value[-8:]) for key, value in chunks.items()]
