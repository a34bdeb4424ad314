"""A partition's state as bytes: everything the fold needs to go on from its applied offsets.

One frame: magic, schema, length and hash of the body, then the body compressed with LZ4. The body is a JSON
description followed by the arrays. The specs in force travel along, so that a snapshot can be read after the
topic of specs has been compacted.
"""

from __future__ import annotations

import struct
from typing import Any

import lz4.frame
import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from stream_xp.domain.statistics import Progress
from stream_xp.engine import kernels
from stream_xp.engine.kernels import NEVER
from stream_xp.engine.layout import epoch_cells, epoch_words, metric_rows
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.state import PartitionState
from stream_xp.errors import ConfigError, StateError

SCHEMA = 2
_MAGIC = b"sxps"
_HEADER = struct.Struct("<4sIQQ")
_SIZED_BY = {
    "rows": kernels.ROWS,
    "values": kernels.VALUES,
    "due": kernels.DUE,
    "waiting": kernels.WAITING,
    "free": kernels.FREE,
    "pool": kernels.POOL,
}
_IDS = {"exposure_ids": kernels.IDS_EXPOSURES, "reward_ids": kernels.IDS_REWARDS}


class _Description(msgspec.Struct, frozen=True, kw_only=True):
    partition: int
    allowed_lateness_ms: int
    progress: dict[str, Progress]
    behind: dict[str, list[int]]
    entries: list[Entry]
    slots: list[tuple[str, int]]
    events: list[str]
    epochs: list[tuple[int, int, int, int]]
    lengths: dict[str, int]


def encode_snapshot(state: PartitionState) -> bytes:
    """The snapshot of a partition's state."""
    arrays = {name: _trimmed(state, name) for name in kernels.State._fields if name != "lookup"}
    registry = state.registry
    description = _Description(
        partition=state.partition,
        allowed_lateness_ms=state.allowed_lateness_ms,
        progress=state.progress,
        behind=state.behind,
        entries=registry.entries,
        slots=[(slot.experiment, slot.version) for slot in registry.slots],
        events=list(registry.events),
        epochs=[(*key, base, state.pools.moments[key]) for key, base in state.pools.units.items()],
        lengths={name: len(array) for name, array in arrays.items()},
    )
    head = msgspec.json.encode(description)
    body = b"".join([struct.pack("<Q", len(head)), head, *(array.tobytes() for array in arrays.values())])
    packed: bytes = lz4.frame.compress(body, compression_level=0)
    return _HEADER.pack(_MAGIC, SCHEMA, len(packed), _digest(packed, SCHEMA)) + packed


def decode_snapshot(snapshot: bytes, registry: Registry, *, allowed_lateness_ms: int) -> PartitionState:
    """The state in a snapshot; its specs are added to `registry`.

    Raises:
        StateError: the bytes are damaged; another snapshot, or the log itself, can take their place.
        ConfigError: the snapshot is whole, but of another schema or allowed lateness: nothing can be guessed.
    """
    body = memoryview(lz4.frame.decompress(_checked(snapshot)))
    (head_bytes,) = struct.unpack_from("<Q", body)
    description = msgspec.json.decode(body[8 : 8 + head_bytes], type=_Description)
    if description.allowed_lateness_ms != allowed_lateness_ms:
        raise ConfigError(
            f"partition {description.partition}: the snapshot was made with allowed_lateness_ms="
            f"{description.allowed_lateness_ms}, the setting is {allowed_lateness_ms}; "
            "statistics of different lateness cannot be mixed: set it back, or start under a new prefix"
        )
    registry.add(description.entries)
    state = PartitionState(description.partition, registry, allowed_lateness_ms=allowed_lateness_ms)
    _restore_arrays(state, description, body[8 + head_bytes :])
    state.progress = description.progress
    state.behind = description.behind
    return state


def _digest(packed: bytes, schema: int) -> int:
    """Hash of body and schema number, so that damage to the number does not pass for another schema."""
    return int(xxhash.xxh3_64_intdigest(packed, seed=schema))


def _checked(snapshot: bytes) -> bytes:
    if len(snapshot) < _HEADER.size:
        raise StateError(f"snapshot has {len(snapshot)} bytes, its header alone has {_HEADER.size}")
    magic, schema, size, digest = _HEADER.unpack_from(snapshot)
    if magic != _MAGIC:
        raise StateError("snapshot does not start with its magic bytes")
    packed = snapshot[_HEADER.size :]
    if len(packed) != size or _digest(packed, schema) != digest:
        raise StateError("snapshot is damaged: its length or hash does not match")
    if schema != SCHEMA:
        raise ConfigError(
            f"snapshot has schema {schema}, this version reads schema {SCHEMA}: "
            "go back to the version that wrote it, or start under a new prefix"
        )
    return packed


def _trimmed(state: PartitionState, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = state.arrays[name]
    if name in _SIZED_BY:
        array = array[: int(state.arrays["scalars"][_SIZED_BY[name]])]
    if name in _IDS:
        array = array[array["ms"] != NEVER]
    return array


def _restore_arrays(state: PartitionState, description: _Description, body: memoryview) -> None:
    at = 0
    held = {}
    for name, length in description.lengths.items():
        dtype = state.arrays[name].dtype
        held[name] = np.frombuffer(body, dtype, count=length, offset=at).copy()
        at += length * dtype.itemsize
    _renumber(state, description, held)
    for name in ("scalars", "exposure_outcomes", "reward_outcomes", *_SIZED_BY):
        state.arrays[name] = held[name]
    state.restore_tables(exposure_ids=held["exposure_ids"], reward_ids=held["reward_ids"])


def _renumber(state: PartitionState, description: _Description, held: dict[str, npt.NDArray[Any]]) -> None:
    """Translate slots, event codes and pool bases to those of this process's registry."""
    registry = state.registry
    slots = [registry.slot(experiment, version) for experiment, version in description.slots]
    slot_of = np.array([slot.index for slot in slots], np.int64)
    event_of = np.array([registry.events[event] for event in description.events], np.int64)
    held["rows"]["slot"] = slot_of[held["rows"]["slot"]]
    pool = held["pool"]
    pool["event"] = event_of[pool["event"]]
    named = pool["experiment"] >= 0
    pool["experiment"][named] = slot_of[pool["experiment"][named]]
    state.arrays["tallies"][slot_of] = held["tallies"]
    metric = 0
    for slot in slots:
        count = metric_rows(slot.spec)
        first = state.first_metric(slot)
        state.arrays["out_of_range"][first : first + count] = held["out_of_range"][metric : metric + count]
        metric += count
    for old_slot, epoch, units, moments in description.epochs:
        slot = slots[old_slot]
        cells, words = epoch_cells(slot), epoch_words(slot)
        to_units, to_moments = state.pools.units[slot.index, epoch], state.pools.moments[slot.index, epoch]
        state.arrays["units"][to_units : to_units + cells] = held["units"][units : units + cells]
        state.arrays["moments"][to_moments : to_moments + words] = held["moments"][moments : moments + words]
