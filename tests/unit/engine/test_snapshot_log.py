"""Which snapshots on the state topic are whole, whoever wrote them and wherever they were given up."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from stream_xp.domain.statistics import Progress
from stream_xp.engine import snapshot_log
from stream_xp.engine.kernels import ROW
from stream_xp.engine.registry import Registry
from stream_xp.engine.snapshot import parts_of
from stream_xp.engine.snapshot_log import (
    PAGE_BYTES,
    KeyedRecord,
    SnapshotReader,
    SnapshotWriter,
    encode_manifest,
    page_count,
    read_manifest,
    whole_snapshots,
)
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import ConfigError, StateError

PARTITION = 2
LARGE_ROWS = (2 * PAGE_BYTES + 17) // ROW.itemsize
GOLDEN = Path(__file__).parents[2] / "golden" / "state"


class State:
    """A state that is nothing but bytes to be kept, and how many records they cover."""

    def __init__(self, applied: int, rows: int = LARGE_ROWS) -> None:
        self.state = PartitionState(PARTITION, Registry(), allowed_lateness_ms=0)
        arrays = self.state.arrays
        arrays["rows"] = np.zeros(rows, ROW)
        arrays["rows"]["unit0"] = np.random.default_rng(applied).integers(0, 2**60, rows)
        arrays["scalars"][3] = rows
        self.state.progress[EXPOSURES] = Progress(first_offset=0, applied_offset=applied)

    def contents(self) -> dict[str, bytes]:
        return {name: part.tobytes() for name, part in parts_of(self.state).items()}


def write(writer: SnapshotWriter, state: State) -> list[KeyedRecord]:
    snapshot = writer.begin(state.state)
    records = [*snapshot.pages(), snapshot.manifest()]
    writer.commit(snapshot)
    return records


def writer(name: str = "one", *, seed: int = 7) -> SnapshotWriter:
    return SnapshotWriter(PARTITION, writer=name, seed=seed)


def compacted(records: list[Any]) -> list[Any]:
    """What a compacted topic keeps: the newest record of each key, in the order of writing."""
    newest = {record[0]: at for at, record in enumerate(records)}
    return [record for at, record in enumerate(records) if newest[record[0]] == at]


def applied(records: list[KeyedRecord]) -> list[int | None]:
    return [one.manifest.exposures.applied_offset for one in whole_snapshots(PARTITION, records)]


def contents(records: list[KeyedRecord]) -> dict[str, bytes]:
    return {name: part.tobytes() for name, part in whole_snapshots(PARTITION, records)[0].parts().items()}


@pytest.mark.parametrize("rows", [0, 1, PAGE_BYTES // ROW.itemsize, LARGE_ROWS])
def test_a_snapshot_comes_back_as_it_was(rows: int) -> None:
    state = State(5, rows)
    records = write(writer(), state)
    manifest = read_manifest(records[-1].value)
    assert manifest is not None
    assert len(records) == 1 + sum(part.count for part in manifest.parts.values())
    assert manifest.parts["rows"].count == page_count(rows * ROW.itemsize)
    assert max(len(record.value) for record in records) < PAGE_BYTES * 1.01 + 100
    assert contents(records) == state.contents()


def test_only_the_pages_that_changed_are_written() -> None:
    owner, state = writer(), State(5)
    before = write(owner, state)
    state.state.arrays["rows"]["stage"][-1] = 1
    state.state.progress[EXPOSURES] = Progress(first_offset=0, applied_offset=6)
    after = write(owner, state)
    pages = [record.key.split(b"/")[2].rsplit(b".", 1)[0] for record in after[:-1]]
    assert pages == [b"tail.0", f"rows.{page_count(LARGE_ROWS * ROW.itemsize) - 1}".encode()]
    assert contents(before + after) == contents(compacted(before + after)) == state.contents()
    # Nothing changed but that it is another snapshot.
    assert len(write(owner, state)) == 1


def test_every_byte_that_changes_is_found() -> None:
    owner, state = writer(), State(5)
    records = write(owner, state)
    draw = random.Random(3)
    raw = state.state.arrays["rows"].view(np.uint8)
    edges = [0, PAGE_BYTES - 1, PAGE_BYTES, 2 * PAGE_BYTES - 1, 2 * PAGE_BYTES, len(raw) - 1]
    for place in [*edges, *(draw.randrange(len(raw)) for _ in range(40))]:
        raw[place] ^= 1 << draw.randrange(8)
        records += write(owner, state)
        assert contents(compacted(records)) == state.contents()


def test_a_part_may_grow_and_shrink() -> None:
    owner = writer()
    records: list[KeyedRecord] = []
    for number, rows in enumerate([LARGE_ROWS, 10, 3 * LARGE_ROWS, 0, LARGE_ROWS, LARGE_ROWS]):
        state = State(number, rows)
        records += write(owner, state)
        assert contents(records) == contents(compacted(records)) == state.contents()


def test_one_that_was_given_up_is_passed_over() -> None:
    owner = writer()
    before = write(owner, State(5))
    after = write(owner, State(9))
    for written in range(len(after)):
        assert applied(before + after[:written]) == [5]
        assert applied(compacted(before + after[:written])) == [5]
    assert applied(compacted(before + after)) == [9, 5]


def test_after_one_that_was_given_up_the_next_is_whole() -> None:
    """A flush that fails half-way may be followed by another one."""
    owner = writer()
    records = write(owner, State(5))
    for pages in (1, 2, 3):
        snapshot = owner.begin(State(9).state)
        records += list(snapshot.pages())[:pages]
        assert applied(compacted(records)) == [5]
    records += write(owner, State(11))
    assert applied(compacted(records)) == [11, 5]


def test_a_page_that_is_gone_makes_a_snapshot_none() -> None:
    records = write(writer(), State(5))
    for missing in range(len(records)):
        assert applied([record for at, record in enumerate(records) if at != missing]) == []


def test_every_damage_of_a_record_leaves_the_snapshot_before() -> None:
    owner, state = writer(), State(5)
    before = write(owner, state)
    draw = random.Random(11)
    after = write(owner, State(9))
    for at, record in enumerate(after):
        places = [0, len(record.value) - 1, *(draw.randrange(len(record.value)) for _ in range(20))]
        if at == len(after) - 1:
            places = list(range(len(record.value)))
        for place in places:
            damaged = bytearray(record.value)
            damaged[place] ^= 1 << draw.randrange(8)
            spoilt = [*after[:at], record._replace(value=bytes(damaged)), *after[at + 1 :]]
            assert applied(compacted(before + spoilt)) == [5], (record.key, place)
            cut = [*after[:at], record._replace(value=record.value[:place]), *after[at + 1 :]]
            assert applied(before + cut) == [5], (record.key, place)


def test_the_one_before_is_whole_until_the_next_is() -> None:
    owner = writer()
    records: list[KeyedRecord] = []
    for number in range(1, 6):
        following = write(owner, State(number, LARGE_ROWS + number))
        for at in range(len(following)):
            held = applied(compacted(records + following[:at]))
            assert number == 1 or held[0] == number - 1
        records += following
    assert applied(compacted(records)) == [5, 4]


def test_one_key_for_a_page_would_lose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Why a page has two keys.
    real = snapshot_log._page_key
    monkeypatch.setattr(
        snapshot_log, "_page_key", lambda partition, name, part, at, _: real(partition, name, part, at, 0)
    )
    owner = writer()
    before, after = write(owner, State(5)), write(owner, State(9))
    assert applied(compacted(before + after[:1])) == []


def test_two_writers_of_one_name_would_lose_each_others() -> None:
    # Why every load has a name of its own.
    one, other = write(writer(), State(5)), write(writer(), State(6))
    assert applied(compacted(one + other[:2])) == []


@pytest.mark.parametrize("seed", range(20))
def test_two_writers_interleaved_never_make_one_of_both(seed: int) -> None:
    draw = random.Random(seed)
    whole: dict[str, dict[str, bytes]] = {}
    queues: list[list[KeyedRecord]] = []
    for name in ("one", "other"):
        owner = writer(name)
        queue: list[KeyedRecord] = []
        for number in range(1, 4):
            state = State(number + 10 * (name == "one"), draw.choice([1, LARGE_ROWS]))
            queue += write(owner, state)
            whole[f"{name}.{number - 1}"] = state.contents()
        queues.append(queue)
    mixed: list[KeyedRecord] = []
    complete = 0
    while any(queues):
        queue = draw.choice([queue for queue in queues if queue])
        mixed.append(queue.pop(0))
        complete += mixed[-1].key.count(b"/") == 1
        for view in (mixed, compacted(mixed)):
            found = whole_snapshots(PARTITION, view)
            assert bool(found) == (complete > 0)
            for one in found:
                raw = {name: part.tobytes() for name, part in one.parts().items()}
                assert raw == whole[one.manifest.snapshot_id]
    assert applied(mixed) == [13, 12]


def test_what_a_writer_deletes_is_not_missed_once_its_own_is_whole() -> None:
    before = write(writer("one"), State(5))
    owner = writer("two")
    own = write(owner, State(7)) + write(owner, State(9))
    deleted = [*before, *own, *(KeyedRecord(record.key, None) for record in before)]  # type: ignore[arg-type]
    assert applied(compacted(deleted)) == [9, 7]
    reader = SnapshotReader(PARTITION)
    for key, value in deleted:
        reader.take(key, value)
    assert reader.keys == {record.key for record in own}


def test_the_newest_is_the_one_that_covers_most_not_the_last_written() -> None:
    ahead, zombie = write(writer("one"), State(9)), write(writer("zombie"), State(5))
    assert applied(ahead + zombie) == [9, 5]


def test_of_two_with_the_same_offsets_the_later_one_is_newer() -> None:
    # It differs in the watermark alone, which never goes back.
    records = write(writer("first"), State(5)) + write(writer("later"), State(5))
    found = whole_snapshots(PARTITION, records)
    assert [one.manifest.writer for one in found] == ["later", "first"]


def test_one_record_is_more_than_none() -> None:
    nothing = State(0)
    nothing.state.progress[EXPOSURES] = Progress()
    records = write(writer("first"), State(0)) + write(writer("later"), nothing)
    assert applied(records) == [0, None]


def test_a_topic_without_records_has_no_snapshot() -> None:
    assert whole_snapshots(PARTITION, []) == []


def test_what_others_wrote_on_the_topic_is_passed_over() -> None:
    own = write(writer(), State(5))
    strange = [
        KeyedRecord(b"\xff", b"{"),
        KeyedRecord(b"2/0/x", b"abc"),
        KeyedRecord(b"2/one", b"[1]"),
        KeyedRecord(b"2/one.1", b"[" * 10_000),
        KeyedRecord(b"2/one.1", b""),
        KeyedRecord(b"2/one/rows.0.5", b"x"),
    ]
    assert applied([*strange, *own, *strange]) == [5]
    assert whole_snapshots(PARTITION, strange) == []


def damage(records: list[KeyedRecord]) -> dict[str, str]:
    reader = SnapshotReader(PARTITION)
    for key, value in records:
        reader.take(key, value)
    return reader.damaged


def test_damage_of_the_newest_snapshot_is_named_and_what_was_not_finished_is_none() -> None:
    owner = writer()
    first, second = write(owner, State(5)), write(owner, State(9))
    both = first + second
    assert damage(both) == damage(compacted(both)) == damage([*both, second[0]._replace(value=b"?")]) == {}
    unfinished = [*owner.begin(State(11).state).pages()]
    assert damage(both + unfinished) == damage(compacted(both + unfinished)) == {}
    page = second[0]
    flipped = [*first, page._replace(value=b"?"), *second[1:]]
    assert damage(flipped) == {"one": f"page {page.key.decode()} is not the one that the manifest names"}
    assert applied(flipped) == [5]
    assert damage(first + second[1:]) == {"one": f"page {page.key.decode()} is missing"}
    assert damage([*first, *second[:-1], second[-1]._replace(value=b"{")]) == {
        "one": "its manifest is no manifest, or its hash is wrong"
    }
    assert damage([*flipped, *write(owner, State(11))]) == {}
    assert damage([*flipped, *write(writer("two"), State(5))]) == damage(flipped)


def test_a_snapshot_of_another_partition_is_none() -> None:
    assert whole_snapshots(PARTITION + 1, write(writer(), State(5))) == []


def test_a_page_that_hashes_right_and_is_no_page_is_an_error_of_state() -> None:
    """It was written so; the one before is taken instead."""
    for value in (b"no block", b"\x02\x00\x00\x00\x20ab"):
        whole = whole_snapshots(PARTITION, write(writer(), State(5)))[0]
        whole.pages["rows"][0] = value
        with pytest.raises(StateError, match="a page"):
            whole.parts()


def test_another_schema_refuses_to_start() -> None:
    records = write(writer(), State(5))
    manifest = read_manifest(records[-1].value)
    assert manifest is not None
    later = encode_manifest(msgspec.structs.replace(manifest, schema=5))
    with pytest.raises(ConfigError, match="schema 5, this version reads schema 4: go back to the version"):
        whole_snapshots(PARTITION, [*records, KeyedRecord(b"2/later.0", later)])
    # Whatever else the later schema has in it.
    odd = b'{"digest":"0000000000000000","schema":6,"anything":[]}'
    odd = odd[:11] + snapshot_log._manifest_digest(odd) + odd[27:]
    with pytest.raises(ConfigError, match="schema 6"):
        whole_snapshots(PARTITION, [KeyedRecord(b"2/later.0", odd)])
    # One that is damaged is no other schema.
    damaged = later.replace(b'"schema":5', b'"schema":9')
    assert applied([*records, KeyedRecord(b"2/later.0", damaged)]) == [5]


def golden(name: str) -> list[KeyedRecord]:
    found = json.loads((GOLDEN / name).read_text())
    records = found if isinstance(found, list) else found["records"]
    return [KeyedRecord(one["key"].encode(), base64.b64decode(one["value"])) for one in records]


@pytest.mark.parametrize("schema", [2, 3])
def test_a_snapshot_of_an_older_schema_refuses_to_start(schema: int) -> None:
    """Written by the version that had it: nothing of it is read, and it is not passed over for the log either."""
    with pytest.raises(ConfigError, match=f"schema {schema}, this version reads schema 4"):
        whole_snapshots(3, golden(f"schema{schema}.json"))


def test_a_manifest_names_what_it_covers() -> None:
    state = State(41)
    state.state.progress[REWARDS] = Progress(first_offset=3, applied_offset=9)
    manifest = read_manifest(write(writer(), state)[-1].value)
    assert manifest is not None
    assert (manifest.applied, manifest.snapshot_id) == (42 + 10, "one.0")
