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

DAMAGES = ("newest page flipped", "all pages flipped", "all cut off", "no manifests", "topic emptied")


@pytest.mark.chaos("snapshots damaged or missing")
def test_damaged_snapshots_cost_a_replay_and_no_truth(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    for damage in list(DAMAGES) * rig.count(dev=1, short=1, full=2):
        with rig.worker() as worker, traffic.flowing():
            worker.wait_started()
            rig.settle_some()
            rig.kill(worker)
        do(rig, damage)
        rig.faulted()
        with rig.worker() as worker:
            # What was committed before the damage is ahead of what is on the topic until it is written again.
            rig.settle_some()
            rig.check()
            worker.finish()
            loaded = worker.events("partition loaded")
            passed_over = {line["partition"] for line in worker.events("snapshot passed over")}
        whole = damage == "newest page flipped"
        assert all((line["units"] > 0) == whole for line in loaded), (damage, loaded)
        wanted = set() if damage == "topic emptied" else set(range(rig.settings.partitions))
        assert passed_over == wanted, worker.log[-3000:]


def do(rig: Rig, damage: str) -> None:
    """Have the damage where the records are, as a bad disk has it: what is only written behind them changes nothing."""
    topic = rig.settings.topic("state")
    with open_reader(rig.settings) as reader:
        found = [reader.read_all(topic, partition) for partition in range(rig.settings.partitions)]
    remake(rig.settings, "state")
    if damage == "topic emptied":
        return
    producer = KafkaProducer(**rig.settings.kafka_python_options(), acks="all", max_request_size=2**21)
    try:
        for partition, records in enumerate(found):
            for key, value in damaged(records, damage):
                producer.send(topic, key=key, value=value, partition=partition)
        producer.flush(30)
    finally:
        producer.close(timeout=10)


def damaged(records: list[LoggedRecord], damage: str) -> list[tuple[bytes, bytes | None]]:
    """Key and value of every record, some of them damaged."""
    manifests = [at for at, one in enumerate(records) if one.value and is_manifest(one)]
    pages = [at for at, one in enumerate(records) if one.value and not is_manifest(one)]
    if damage == "newest page flipped":
        # The newest that a manifest names: what follows the last manifest is of a snapshot that was not finished.
        pages = [at for at in pages if at < manifests[-1]][-1:]
    chosen, change = {
        "newest page flipped": (pages, flipped),
        "all pages flipped": (pages, flipped),
        "all cut off": (pages, lambda value: value[:-7]),
        "no manifests": (manifests, lambda _: b"{"),
    }[damage]
    places = set(chosen)
    return [
        (one.key or b"", change(one.value) if at in places and one.value else one.value)
        for at, one in enumerate(records)
    ]


def is_manifest(record: LoggedRecord) -> bool:
    """Manifests are under the key of their writer, pages below it."""
    return (record.key or b"").count(b"/") == 1


def flipped(value: bytes) -> bytes:
    """One byte with one bit the other way."""
    return value[:-9] + bytes([value[-9] ^ 1]) + value[-8:]
