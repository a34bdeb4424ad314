"""How a snapshot lies on the compacted state topic: chunks, then a manifest written last.

Two sets of keys are used in turn, so that compaction never takes the chunks of the newest whole snapshot while
the next one is being written. A chunk starts with the id of its snapshot; a manifest whose chunks are not all
there, or were overwritten by another writer's, is passed over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from stream_xp.domain.statistics import Progress

CHUNK_BYTES = 900_000
_ID_BYTES = 16


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The record that makes a snapshot whole."""

    snapshot_id: str
    partition: int
    chunks: int
    size_bytes: int
    exposures: Progress
    rewards: Progress
    turn: int = 0
    schema: int = 1

    @property
    def applied(self) -> int:
        """Records covered, for choosing the newest."""
        return sum(progress.next_offset or 0 for progress in (self.exposures, self.rewards))


class KeyedRecord(NamedTuple):
    """Key and value of one record of the state topic."""

    key: bytes
    value: bytes


def snapshot_records(snapshot: bytes, manifest: Manifest) -> list[KeyedRecord]:
    """The records of one snapshot, in the order in which they must be written."""
    identity = bytes.fromhex(manifest.snapshot_id)
    stem = f"{manifest.partition}/{manifest.turn}"
    chunks = [
        KeyedRecord(f"{stem}/{at}".encode(), identity + snapshot[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES])
        for at in range(manifest.chunks)
    ]
    return [*chunks, KeyedRecord(stem.encode(), msgspec.json.encode(manifest))]


def chunk_count(snapshot: bytes) -> int:
    """How many chunks a snapshot has."""
    return -(-len(snapshot) // CHUNK_BYTES)


def whole_snapshots(records: Iterable[KeyedRecord]) -> list[tuple[Manifest, bytes]]:
    """Every snapshot that is whole in a run of the state topic of one partition, the newest first."""
    chunks: dict[tuple[str, int], bytes] = {}
    manifests: list[Manifest] = []
    for record in records:
        *_, last = parts = record.key.decode(errors="replace").split("/")
        if len(parts) == 3 and last.isdecimal():
            chunks[record.value[:_ID_BYTES].hex(), int(last)] = record.value[_ID_BYTES:]
        else:
            # What is no manifest was not written by a worker, and makes no snapshot whole.
            with contextlib.suppress(msgspec.MsgspecError, RecursionError):
                manifests.append(msgspec.json.decode(record.value, type=Manifest))
    whole = []
    for manifest in manifests:
        found = [chunks.get((manifest.snapshot_id, at)) for at in range(manifest.chunks)]
        snapshot = b"".join(chunk for chunk in found if chunk is not None)
        if None not in found and len(snapshot) == manifest.size_bytes:
            whole.append((manifest, snapshot))
    # Of two with the same offsets the later one has the later watermark; sorting keeps their order.
    return sorted(whole, key=lambda pair: pair[0].applied)[::-1]
