"""Which snapshots on the state topic are whole, whoever wrote them and wherever they were given up."""

from __future__ import annotations

import random

import msgspec
import pytest

from stream_xp.domain.statistics import Progress
from stream_xp.engine.snapshot_log import (
    CHUNK_BYTES,
    KeyedRecord,
    Manifest,
    chunk_count,
    snapshot_records,
    whole_snapshots,
)

SMALL = 1_000
LARGE = 2 * CHUNK_BYTES + 17


def snapshot(number: int, size: int = SMALL, *, turn: int = 0) -> tuple[Manifest, bytes, list[KeyedRecord]]:
    """A snapshot that covers `number` records: manifest, bytes, and its records."""
    raw = random.Random(number).randbytes(size)
    manifest = Manifest(
        snapshot_id=random.Random(f"id {number}").randbytes(16).hex(),
        partition=2,
        chunks=chunk_count(raw),
        size_bytes=size,
        exposures=Progress(first_offset=0, applied_offset=number),
        rewards=Progress(),
        turn=turn,
    )
    return manifest, raw, snapshot_records(raw, manifest)


def compacted(records: list[KeyedRecord]) -> list[KeyedRecord]:
    """What a compacted topic keeps: the newest record of each key, in the order of writing."""
    newest = {record.key: at for at, record in enumerate(records)}
    return [record for at, record in enumerate(records) if newest[record.key] == at]


def applied(records: list[KeyedRecord]) -> list[int | None]:
    return [manifest.exposures.applied_offset for manifest, _ in whole_snapshots(records)]


@pytest.mark.parametrize("size", [1, SMALL, CHUNK_BYTES, CHUNK_BYTES + 1, LARGE])
def test_a_snapshot_comes_back_as_it_was(size: int) -> None:
    manifest, raw, records = snapshot(5, size)
    assert len(records) == manifest.chunks + 1
    assert max(len(record.value) for record in records) <= CHUNK_BYTES + 16
    assert whole_snapshots(records) == [(manifest, raw)]


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_one_that_was_given_up_is_passed_over(written: int) -> None:
    _, _, before = snapshot(5, LARGE)
    _, _, records = snapshot(9, LARGE, turn=1)
    assert applied(before + records[:written]) == [5]
    assert applied(compacted(before + records[:written])) == [5]
    assert applied(compacted(before + records)) == [9, 5]


def test_a_chunk_that_is_gone_makes_a_snapshot_none() -> None:
    _, _, records = snapshot(5, LARGE)
    for missing in range(3):
        assert applied([record for at, record in enumerate(records) if at != missing]) == []


def test_two_turns_keep_the_one_before_until_the_next_is_whole() -> None:
    records: list[KeyedRecord] = []
    for number in range(1, 6):
        _, _, following = snapshot(number, LARGE, turn=number % 2)
        for at in range(len(following)):
            held = applied(compacted(records + following[:at]))
            assert number == 1 or held[0] == number - 1
        records += following
    assert applied(compacted(records)) == [5, 4]


def test_one_turn_alone_would_lose_it() -> None:
    # Why an owner goes on with the other turn than that of the snapshot which it loaded.
    _, _, before = snapshot(5, LARGE)
    _, _, after = snapshot(9, LARGE)
    assert applied(compacted(before + after[:1])) == []


@pytest.mark.parametrize("seed", range(20))
def test_two_writers_interleaved_never_make_one_of_both(seed: int) -> None:
    draw = random.Random(seed)
    whole = {}
    queues = []
    for number, size in ((5, LARGE), (6, LARGE - 1)):
        manifest, raw, records = snapshot(number, size)
        whole[manifest.snapshot_id] = raw
        queues.append(records)
    mixed: list[KeyedRecord] = []
    while any(queues):
        queue = draw.choice([queue for queue in queues if queue])
        mixed.append(queue.pop(0))
        for view in (mixed, compacted(mixed)):
            for manifest, raw in whole_snapshots(view):
                assert raw == whole[manifest.snapshot_id]
    assert applied(mixed) == [6, 5]


def test_the_newest_is_the_one_that_covers_most_not_the_last_written() -> None:
    _, _, ahead = snapshot(9, turn=0)
    _, _, zombie = snapshot(5, turn=1)
    assert applied(ahead + zombie) == [9, 5]


def test_of_two_with_the_same_offsets_the_later_one_is_newer() -> None:
    # It differs in the watermark alone, which never goes back.
    first, _, records = snapshot(5)
    later = msgspec.structs.replace(first, snapshot_id="ab" * 16, turn=1)
    both = whole_snapshots([*records, *snapshot_records(b"x" * SMALL, later)])
    assert [manifest.snapshot_id for manifest, _ in both] == [later.snapshot_id, first.snapshot_id]


def test_one_record_is_more_than_none() -> None:
    first, _, one = snapshot(0)
    nothing = msgspec.structs.replace(first, snapshot_id="ab" * 16, turn=1, exposures=Progress())
    assert applied([*one, *snapshot_records(b"x" * SMALL, nothing)]) == [0, None]


def test_a_topic_without_records_has_no_snapshot() -> None:
    assert whole_snapshots([]) == []


def test_what_others_wrote_on_the_topic_is_passed_over() -> None:
    strange = [KeyedRecord(b"\xff", b"{"), KeyedRecord(b"0/0/x", b"abc"), KeyedRecord(b"0/1", b"[1]")]
    assert whole_snapshots(strange) == []
