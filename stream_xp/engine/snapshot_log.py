"""How a snapshot lies on the compacted state topic: pages, then a manifest written last.

A page has two keys, used in turn, and a manifest says under which of them each page is. The next snapshot writes
the pages that changed under the keys that the one before does not use, so the one before stays whole until the
next is. Every key holds the name of its writer, a new one each time that a partition is loaded, so two workers
that both believe they own a partition write nothing over each other's.

Nobody has to be trusted: a manifest says how the bytes of each of its pages hash, and one whose pages are not
all there, are damaged, or were written over, is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import lz4.block
import msgspec
import numpy as np
import xxhash

from stream_xp.domain.statistics import Progress
from stream_xp.engine.snapshot import SCHEMA, Parts, another_schema, parts_of
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import StateError

PAGE_BYTES = 131_072
"""Of a part, before compression: what is written again if one of its bytes changes."""
_PLACE = np.dtype([("digest", "<u8"), ("turn", "u1")])
_BEGIN = b'{"digest":"'
_DIGEST_AT, _DIGEST_END = len(_BEGIN), len(_BEGIN) + 16
_KEPT = 2
_RANDOM = {"pool", "exposure_ids", "reward_ids"}
"""Parts of hashes for the most part: to look for repetitions closely takes time and finds next to none."""
_HURRIED, _CLOSE = 16, 1


class KeyedRecord(NamedTuple):
    """Key and value of one record of the state topic."""

    key: bytes
    value: bytes


class PartPages(msgspec.Struct, frozen=True, array_like=True):
    """A part of a snapshot: its length, and for each page the hash of its record and its turn."""

    size_bytes: int
    places: bytes

    @property
    def count(self) -> int:
        """Pages of the part."""
        return page_count(self.size_bytes)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The record that makes a snapshot whole.

    Attributes:
        digest: hash of what follows it in the record, whatever the schema; stands first for that.
        writer: who wrote it; part of all of its keys.
        number: how many snapshots its writer had made whole before.
    """

    digest: str = "0" * 16
    schema: int = SCHEMA
    partition: int
    writer: str
    number: int
    exposures: Progress
    rewards: Progress
    parts: dict[str, PartPages]

    @property
    def snapshot_id(self) -> str:
        """Names the snapshot, in logs."""
        return f"{self.writer}.{self.number}"

    @property
    def applied(self) -> int:
        """Records covered, for choosing the newest."""
        return sum(progress.next_offset or 0 for progress in (self.exposures, self.rewards))

    @property
    def key(self) -> bytes:
        """The key of this record."""
        return f"{self.partition}/{self.writer}.{self.number % 2}".encode()

    def page_keys(self) -> Iterator[tuple[str, bytes, int]]:
        """Part, key and hash of each page."""
        for name, part in self.parts.items():
            for at, (digest, turn) in enumerate(np.frombuffer(part.places, _PLACE).tolist()):
                yield name, _page_key(self.partition, self.writer, name, at, turn), digest


class _OldManifest(msgspec.Struct, frozen=True, kw_only=True):
    """That of schema 2 and before, which had no hash."""

    snapshot_id: str
    chunks: int
    size_bytes: int
    turn: int = 0


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    schema: int


def page_count(size_bytes: int) -> int:
    """Pages of a part of this length."""
    return -(-size_bytes // PAGE_BYTES)


def _page_key(partition: int, writer: str, part: str, at: int, turn: int) -> bytes:
    return f"{partition}/{writer}/{part}.{at}.{turn}".encode()


# --- writing ----------------------------------------------------------------------------------------------


class _Written(NamedTuple):
    """What is known of a part's pages on the log: the hash of each before compression, and its place."""

    hashes: list[int]
    places: list[tuple[int, int]]


class SnapshotWriter:
    """Writes the snapshots of one partition for as long as one worker holds it, each time what changed.

    Args:
        partition: the source partition.
        writer: a name that nobody else has ever used, without slashes and dots.
        seed: of the hashes by which a change is found; secret, so that no traffic can be made to hide a change.
    """

    def __init__(self, partition: int, *, writer: str, seed: int) -> None:
        self.partition = partition
        self.writer = writer
        self.seed = seed
        self.number = 0
        self.written: dict[str, _Written] = {}

    def begin(self, state: PartitionState) -> Snapshot:
        """A snapshot of the state as it is; the state must not change before its manifest is written."""
        return Snapshot(self, state)

    def commit(self, snapshot: Snapshot) -> None:
        """The snapshot is whole on the log: the next one goes on from it."""
        self.written = snapshot.written
        self.number += 1


class Snapshot:
    """One snapshot while it is written: first `pages`, to their end, then the `manifest`.

    Attributes:
        pages_written, bytes_written: what was new, compressed.
    """

    def __init__(self, writer: SnapshotWriter, state: PartitionState) -> None:
        self._writer = writer
        self._progress = dict(state.progress)
        self._parts = parts_of(state)
        self.written: dict[str, _Written] = {}
        self.pages_written = 0
        self.bytes_written = 0

    def pages(self) -> Iterator[KeyedRecord]:
        """The pages that changed since the last whole snapshot of this writer."""
        for name, part in self._parts.items():
            before = self._writer.written.get(name, _Written([], []))
            after = self.written[name] = _Written([], [])
            view = part.data
            for at in range(page_count(len(view))):
                page = view[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
                known = at < len(before.hashes)
                after.hashes.append(xxhash.xxh3_64_intdigest(page, seed=self._writer.seed))
                if known and before.hashes[at] == after.hashes[at]:
                    after.places.append(before.places[at])
                    continue
                turn = 1 - before.places[at][1] if known else 0
                value = lz4.block.compress(
                    page, mode="fast", acceleration=_HURRIED if name in _RANDOM else _CLOSE
                )
                after.places.append((xxhash.xxh3_64_intdigest(value), turn))
                self.pages_written += 1
                self.bytes_written += len(value)
                yield KeyedRecord(
                    _page_key(self._writer.partition, self._writer.writer, name, at, turn), value
                )

    def manifest(self) -> KeyedRecord:
        """The record that makes the snapshot whole."""
        parts = {
            name: PartPages(len(part), np.array(self.written[name].places, _PLACE).tobytes())
            for name, part in self._parts.items()
        }
        manifest = Manifest(
            partition=self._writer.partition,
            writer=self._writer.writer,
            number=self._writer.number,
            exposures=self._progress[EXPOSURES],
            rewards=self._progress[REWARDS],
            parts=parts,
        )
        return KeyedRecord(manifest.key, encode_manifest(manifest))


def encode_manifest(manifest: Manifest) -> bytes:
    """The record's value, with its hash."""
    encoded = msgspec.json.encode(manifest)
    return encoded[:_DIGEST_AT] + _manifest_digest(encoded) + encoded[_DIGEST_END:]


def _manifest_digest(value: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(value[_DIGEST_END:]).encode()


# --- reading ----------------------------------------------------------------------------------------------


class WholeSnapshot(NamedTuple):
    """A snapshot all of whose pages are there; `pages` are the compressed pages of each part."""

    manifest: Manifest
    pages: dict[str, list[bytes]]

    def parts(self) -> Parts:
        """The parts, decompressed; gives up the pages on the way, so that both are not held at once.

        Raises:
            StateError: a page is not what its manifest says.
        """
        return {name: _joined(part, self.pages.pop(name)) for name, part in self.manifest.parts.items()}


def _joined(part: PartPages, pages: list[bytes]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    joined = np.empty(part.size_bytes, np.uint8)
    pages.reverse()
    for at in range(part.count):
        room = joined[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
        try:
            page = lz4.block.decompress(pages.pop())
        except lz4.block.LZ4BlockError as error:
            raise StateError(f"snapshot is damaged: a page is no LZ4 block ({error})") from error
        if len(page) != len(room):
            raise StateError(f"snapshot is damaged: a page has {len(page)} bytes in place of {len(room)}")
        room[:] = np.frombuffer(page, np.uint8)
    return joined


class SnapshotReader:
    """Finds the newest whole snapshots in a run of the state topic of one partition.

    Takes the records in the order of the log, one at a time, and keeps of them only what a snapshot may still need.
    """

    def __init__(self, partition: int) -> None:
        self._partition = partition
        self._pages: dict[bytes, dict[bytes, tuple[int, bytes]]] = {}
        self._whole: list[WholeSnapshot] = []
        self.keys: set[bytes] = set()
        """Every key that the topic has a value of."""
        self.began: dict[str, int] = {}
        """By source topic, the first offset that any snapshot counted, whole or not."""
        self.unreadable = False
        """Whether a manifest is damaged: then something was counted, and nothing says from where."""
        self.damaged: dict[str, str] = {}
        """By writer, why its newest snapshot is not whole; one that was not finished is no damage."""

    def take(self, key: bytes | None, value: bytes | None) -> None:
        """Take the next record; a null value is a deletion.

        Raises:
            ConfigError: a snapshot of another schema is there: nothing can be guessed about it.
        """
        if key is None:
            return
        stem, _, _page = key.rpartition(b"/")
        if value is None:
            self.keys.discard(key)
            self._pages.get(stem, {}).pop(key, None)
            return
        self.keys.add(key)
        if b"/" in stem:
            self._pages.setdefault(stem, {})[key] = (xxhash.xxh3_64_intdigest(value), value)
        else:
            manifest = read_manifest(value)
            if manifest is None:
                self.unreadable = True
                self.damaged[_writer_of(key)] = "its manifest is no manifest, or its hash is wrong"
            else:
                self._take_manifest(manifest)

    def whole(self) -> list[WholeSnapshot]:
        """The newest whole snapshots, the one that covers most first."""
        return self._whole[::-1]

    def _take_manifest(self, manifest: Manifest) -> None:
        if manifest.partition != self._partition:
            return
        for topic, progress in (("exposures", manifest.exposures), ("rewards", manifest.rewards)):
            if progress.first_offset is not None:
                self.began[topic] = min(progress.first_offset, self.began.get(topic, progress.first_offset))
        stem = f"{manifest.partition}/{manifest.writer}".encode()
        there = self._pages.get(stem, {})
        pages: dict[str, list[bytes]] = {name: [] for name in manifest.parts}
        used = {}
        for part, key, digest in manifest.page_keys():
            found = there.get(key)
            if found is None or found[0] != digest:
                # Without damage only an older one can miss a page, which was written over; then a newer one follows.
                why = "is missing" if found is None else "is not the one that the manifest names"
                self.damaged[manifest.writer] = f"page {key.decode()} {why}"
                return
            pages[part].append(found[1])
            used[key] = found
        if any(len(pages[name]) != part.count for name, part in manifest.parts.items()):
            self.damaged[manifest.writer] = "its manifest does not name every page"
            return
        self.damaged.pop(manifest.writer, None)
        # What this one does not use is written again before any later one uses it.
        self._pages[stem] = used
        # Of two with the same offsets the later one has the later watermark; sorting keeps their order.
        self._whole.append(WholeSnapshot(manifest, pages))
        self._whole = sorted(self._whole, key=lambda one: one.manifest.applied)[-_KEPT:]


def _writer_of(key: bytes) -> str:
    return key.rpartition(b"/")[2].rpartition(b".")[0].decode(errors="replace")


def read_manifest(value: bytes) -> Manifest | None:
    """The manifest in a record, None if it is none or damaged.

    Raises:
        ConfigError: it is one of another schema.
    """
    if value[:_DIGEST_END] != _BEGIN + _manifest_digest(value):
        _refuse_old(value)
        return None
    schema = msgspec.json.decode(value, type=_Header).schema
    if schema != SCHEMA:
        raise another_schema(schema)
    return msgspec.json.decode(value, type=Manifest)


def _refuse_old(value: bytes) -> None:
    try:
        msgspec.json.decode(value, type=_OldManifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return
    raise another_schema(2)


def whole_snapshots(partition: int, records: Iterable[KeyedRecord]) -> list[WholeSnapshot]:
    """Every snapshot that is whole in a run of the state topic of one partition, the newest first."""
    reader = SnapshotReader(partition)
    for record in records:
        reader.take(*record)
    return reader.whole()
