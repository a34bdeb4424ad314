"""A partition's state as bytes: everything the fold needs to go on from its applied offsets.

The state is cut into named parts. `head` holds the specs in force, each weight epoch once, so that a snapshot can be
read after the topic of specs has been compacted, and changes only with them; `tail` holds the applied offsets and all
that is small; every large array is a part of its own. Hash tables and heaps are left out and built again.

Parts go to the log in pages (`snapshot_pages`), of which only those that changed are written. `encode_snapshot`
puts them into one frame: magic, schema, length and hash of the body, then the body compressed with LZ4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import lz4.frame
import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.domain.statistics import Progress, Rules
from stream_xp.engine import kernels
from stream_xp.engine.kernels import NEVER
from stream_xp.engine.layout import epoch_cells, epoch_words, metric_rows
from stream_xp.engine.registry import Entry, Registry, Slot
from stream_xp.engine.state import MAX_UNITS, PartitionState
from stream_xp.errors import ConfigError, StateError

SCHEMA = 4
Parts: TypeAlias = dict[str, npt.NDArray[np.uint8]]
HEAD, TAIL = "head", "tail"

_MAGIC = b"sxps"
_HEADER = struct.Struct("<4sIQQ")
_LARGE = {
    "rows": kernels.ROWS,
    "values": kernels.VALUES,
    "pool": kernels.POOL,
    "exposure_ids": kernels.IDS_EXPOSURES,
    "reward_ids": kernels.IDS_REWARDS,
    "units": None,
    "moments": None,
}
"""The large arrays, each with the scalar that says how much of it is used; None where all of it is."""
_SMALL = ("scalars", "exposure_outcomes", "reward_outcomes", "tallies", "out_of_range")


class _Design(msgspec.Struct, frozen=True, kw_only=True):
    """What the records of a version have in common, mostly."""

    spec: ExperimentSpec
    design_hash: str
    schema: int


class _Spec(msgspec.Struct, frozen=True, array_like=True):
    """An entry of the registry.

    Every record of a version holds all weight epochs there were by then; here, `kept` says how many of them are those
    of the version's entry before, and `epochs` are the others. `design` is a place in the head, None for a tombstone.
    """

    offset: int
    experiment: str
    in_force_ms: int
    design: int | None = None
    status: Status = Status.ACTIVE
    kept: int = 0
    epochs: tuple[WeightEpoch, ...] = ()


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    designs: list[_Design]
    specs: list[_Spec]
    slots: list[tuple[str, int]]
    events: list[str]


class _Tail(msgspec.Struct, frozen=True, kw_only=True):
    """What is small; `epochs` are (slot, epoch, base in units, base in moments)."""

    partition: int
    allowed_lateness_ms: int
    max_units: int
    rules: Rules | None
    progress: dict[str, Progress]
    behind: dict[str, list[int]]
    epochs: list[tuple[int, int, int, int]]
    lengths: dict[str, int]


def parts_of(state: PartitionState) -> Parts:
    """The parts of a state, as views of its arrays: they hold until the state is changed."""
    # Specs that came since the last record: head and tail must speak of the same slots.
    state.sync_registry()
    parts = {HEAD: _bytes_of(_head(state.registry)), TAIL: _bytes_of(_tail(state))}
    for name, counter in _LARGE.items():
        used = None if counter is None else int(state.arrays["scalars"][counter])
        parts[name] = state.arrays[name][:used].view(np.uint8)
    return parts


class Restoration:
    """A state on its way out of the parts of a snapshot, which it takes over.

    Three steps. The first and the last take time and touch nothing that is shared: they may run in a thread beside
    whoever uses the registry. The second is short.

    Raises:
        StateError: the parts do not fit together.
    """

    def __init__(self, parts: Parts) -> None:
        try:
            self._head = msgspec.json.decode(parts[HEAD].data, type=_Head)
            self._entries = list(_entries(self._head))
            size = int(parts[TAIL][:8].view(np.int64)[0])
            self._tail = msgspec.json.decode(parts[TAIL][8 : 8 + size].data, type=_Tail)
            self._held = _arrays(parts, self._tail, parts[TAIL][8 + size :])
        except (KeyError, ValueError, IndexError, msgspec.MsgspecError) as error:
            raise StateError(f"snapshot is damaged: its parts do not fit together ({error})") from error

    def join(
        self,
        registry: Registry,
        *,
        allowed_lateness_ms: int,
        max_units: int = MAX_UNITS,
        rules: Rules | None = None,
    ) -> None:
        """Add the specs of the snapshot to `registry`, and make a state of it that knows them.

        Raises:
            ConfigError: it was made under other rules, with another bound of units only where it shows; or of another
                design or other weight epochs of a version than the registry knows.
        """
        head, tail, held = self._head, self._tail, self._held
        _check_rules(tail, allowed_lateness_ms, rules)
        _check_max_units(tail, held["tallies"], max_units)
        _check_specs(tail.partition, self._entries, registry)
        registry.add(self._entries)
        state = self._state = PartitionState(
            tail.partition,
            registry,
            allowed_lateness_ms=allowed_lateness_ms,
            max_units=max_units,
            rules=rules,
        )
        self._slot_of = np.array([slot.index for slot in _slots(registry, head)], np.int64)
        self._event_of = np.array([registry.events[event] for event in head.events], np.int64)
        state.arrays["tallies"][self._slot_of] = held["tallies"]
        _restore_cells(state, head, tail, held)
        state.progress = tail.progress
        state.behind = tail.behind

    def finish(self) -> PartitionState:
        """The state, whole."""
        held = self._held
        _renumber(held, self._slot_of, self._event_of)
        counted = ("scalars", "exposure_outcomes", "reward_outcomes")
        self._state.restore({name: held[name] for name in (*counted, "rows", "values", "pool", *_IDS)})
        return self._state


def state_of(
    parts: Parts,
    registry: Registry,
    *,
    allowed_lateness_ms: int,
    max_units: int = MAX_UNITS,
    rules: Rules | None = None,
) -> PartitionState:
    """The state made of the parts, which it takes over; the specs in them are added to `registry`.

    Raises:
        StateError: the parts do not fit together.
        ConfigError: they were made under other rules; with another bound of units only where it shows.
    """
    restoration = Restoration(parts)
    restoration.join(registry, allowed_lateness_ms=allowed_lateness_ms, max_units=max_units, rules=rules)
    return restoration.finish()


def _check_rules(tail: _Tail, allowed_lateness_ms: int, rules: Rules | None) -> None:
    """A record has one outcome under the rules it was counted under, and may have another one under others."""
    made = {"allowed_lateness_ms": tail.allowed_lateness_ms} | _unbending(tail.rules)
    now = {"allowed_lateness_ms": allowed_lateness_ms} | _unbending(rules)
    for name in made.keys() & now.keys():
        if made[name] != now[name]:
            raise ConfigError(
                f"partition {tail.partition}: the snapshot was made with {name}={made[name]}, the setting is "
                f"{now[name]}; statistics of different rules cannot be mixed: set it back, or start under a new prefix"
            )


def _check_specs(partition: int, entries: Sequence[Entry], registry: Registry) -> None:
    """What was counted under one design, or drawn with one epoch's weights, must not go on as another's."""
    versions = {(e.experiment, e.record.spec.version): e.record for e in entries if e.record is not None}
    for (experiment, version), made in versions.items():
        known = registry.newest(experiment, version)
        n = 0 if known is None else min(len(known.epochs), len(made.epochs))
        if known is None or (known.design_hash, known.epochs[:n]) == (made.design_hash, made.epochs[:n]):
            continue
        what = "design" if known.design_hash != made.design_hash else "weight epochs"
        raise ConfigError(
            f"partition {partition}: the snapshot was made with another {what} of {experiment} version {version} than "
            "the topic of experiments has now; the record that was in force is gone: put it back from a copy, or start "
            "under a new prefix"
        )


def _unbending(rules: Rules | None) -> dict[str, int]:
    """The rules by name that may not change at all; none where nobody said them."""
    named = {} if rules is None else msgspec.structs.asdict(rules)
    return {name: value for name, value in named.items() if name != "max_units"}


def _check_max_units(tail: _Tail, tallies: npt.NDArray[Any], max_units: int) -> None:
    """The bound may change as long as the state would be the same had it been so from the beginning."""
    if max_units == tail.max_units:
        return
    units, refused = (int(tallies[name].max(initial=0)) for name in ("units", "over_limit"))
    if refused or units > max_units:
        raise ConfigError(
            f"partition {tail.partition}: the snapshot was made with max_units={tail.max_units}, the setting is "
            f"{max_units}, and an experiment has {units} units{' and had to refuse more' if refused else ''}: "
            "set it back, or start under a new prefix"
        )


def encode_snapshot(state: PartitionState) -> bytes:
    """The snapshot of a partition's state as one frame."""
    parts = parts_of(state)
    sizes = msgspec.json.encode({name: len(part) for name, part in parts.items()})
    body = b"".join([struct.pack("<Q", len(sizes)), sizes, *(part.data for part in parts.values())])
    packed: bytes = lz4.frame.compress(body, compression_level=0)
    return _HEADER.pack(_MAGIC, SCHEMA, len(packed), _digest(packed, SCHEMA)) + packed


def decode_snapshot(
    snapshot: bytes,
    registry: Registry,
    *,
    allowed_lateness_ms: int,
    max_units: int = MAX_UNITS,
    rules: Rules | None = None,
) -> PartitionState:
    """The state in a frame; its specs are added to `registry`.

    Raises:
        StateError: the bytes are damaged; another snapshot, or the log itself, can take their place.
        ConfigError: the snapshot is whole, but of another schema or made under other rules: nothing can be guessed.
    """
    body = np.frombuffer(lz4.frame.decompress(_checked(snapshot)), np.uint8)
    at = 8 + int(body[:8].view(np.int64)[0])
    parts = {}
    for name, size in msgspec.json.decode(body[8:at].data, type=dict[str, int]).items():
        parts[name] = body[at : at + size].copy()
        at += size
    return state_of(
        parts, registry, allowed_lateness_ms=allowed_lateness_ms, max_units=max_units, rules=rules
    )


def another_schema(schema: int) -> ConfigError:
    """The refusal of a snapshot that is whole, but of a schema that this version does not read."""
    return ConfigError(
        f"snapshot has schema {schema}, this version reads schema {SCHEMA}: "
        "go back to the version that wrote it, or start under a new prefix"
    )


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
        raise another_schema(schema)
    return packed


# --- taking apart ---------------------------------------------------------------------------------------


_IDS = ("exposure_ids", "reward_ids")


def _bytes_of(encoded: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(encoded, np.uint8)


def _head(registry: Registry) -> bytes:
    """Kept until the specs change: with many experiments it is long, and every snapshot needs it."""
    head: bytes | None = registry.memo.get("snapshot head")
    if head is None:
        slots = [(slot.experiment, slot.version) for slot in registry.slots]
        designs, specs = _specs(registry.entries)
        described = _Head(designs=designs, specs=specs, slots=slots, events=list(registry.events))
        head = registry.memo["snapshot head"] = msgspec.json.encode(described)
    return head


def _specs(entries: list[Entry]) -> tuple[list[_Design], list[_Spec]]:
    """The entries, each without what it repeats: with many weight epochs that is nearly all of it."""
    designs: list[_Design] = []
    specs = []
    last: dict[tuple[str, int], tuple[int, tuple[WeightEpoch, ...]]] = {}
    for entry in entries:
        place = (entry.offset, entry.experiment, entry.in_force_ms)
        record = entry.record
        if record is None:
            specs.append(_Spec(*place))
            continue
        design = _Design(spec=record.spec, design_hash=record.design_hash, schema=record.schema)
        at, epochs = last.get((entry.experiment, record.spec.version), (-1, ()))
        if at < 0 or designs[at] != design:
            at = len(designs)
            designs.append(design)
        kept = len(epochs) if record.epochs[: len(epochs)] == epochs else 0
        specs.append(_Spec(*place, at, record.status, kept, record.epochs[kept:]))
        last[entry.experiment, record.spec.version] = at, record.epochs
    return designs, specs


def _tail(state: PartitionState) -> bytes:
    small = {name: state.arrays[name] for name in _SMALL}
    described = msgspec.json.encode(
        _Tail(
            partition=state.partition,
            allowed_lateness_ms=state.allowed_lateness_ms,
            max_units=state.max_units,
            rules=state.rules,
            progress=state.progress,
            behind=state.behind,
            epochs=[(*key, base, state.pools.moments[key]) for key, base in state.pools.units.items()],
            lengths={name: array.nbytes for name, array in small.items()},
        )
    )
    return b"".join([struct.pack("<Q", len(described)), described, *(a.tobytes() for a in small.values())])


# --- putting together ---------------------------------------------------------------------------------


def _entries(head: _Head) -> Iterator[Entry]:
    """What `_specs` was given."""
    last: dict[tuple[str, int], tuple[WeightEpoch, ...]] = {}
    for held in head.specs:
        record = None
        if held.design is not None:
            design = head.designs[held.design]
            key = (held.experiment, design.spec.version)
            epochs = last[key] = (*last.get(key, ())[: held.kept], *held.epochs)
            record = ExperimentRecord(
                spec=design.spec,
                epochs=epochs,
                design_hash=design.design_hash,
                status=held.status,
                schema=design.schema,
            )
        yield Entry(
            offset=held.offset, experiment=held.experiment, in_force_ms=held.in_force_ms, record=record
        )


def _arrays(parts: Parts, tail: _Tail, small: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
    """Every array of a snapshot; the waiting rewards without the places between them, in order of offset."""
    held = {name: _typed(name, parts[name]) for name in _LARGE}
    at = 0
    for name in _SMALL:
        held[name] = _typed(name, small[at : at + tail.lengths[name]].copy())
        at += tail.lengths[name]
    pool = held["pool"][held["pool"]["time_ms"] != NEVER]
    held["pool"] = pool[np.argsort(pool["offset"])]
    return held


def _typed(name: str, part: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    return part.view(kernels.DTYPES.get(name, np.dtype(np.int64)))


def _renumber(held: Mapping[str, npt.NDArray[Any]], slot_of: kernels.Int64, event_of: kernels.Int64) -> None:
    """Translate slots and event codes to those of this process's registry."""
    if (slot_of != np.arange(len(slot_of))).any():
        held["rows"]["slot"] = slot_of[held["rows"]["slot"]]
    pool = held["pool"]
    pool["event"] = event_of[pool["event"]]
    named = pool["experiment"] >= 0
    pool["experiment"][named] = slot_of[pool["experiment"][named]]


def _slots(registry: Registry, head: _Head) -> list[Slot]:
    return [registry.slot(experiment, version) for experiment, version in head.slots]


def _restore_cells(
    state: PartitionState, head: _Head, tail: _Tail, held: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Copy counts and moments to where this process's registry has them."""
    slots = _slots(state.registry, head)
    metric = 0
    for slot in slots:
        count = metric_rows(slot.spec)
        first = state.first_metric(slot)
        state.arrays["out_of_range"][first : first + count] = held["out_of_range"][metric : metric + count]
        metric += count
    for old_slot, epoch, units, moments in tail.epochs:
        slot = slots[old_slot]
        cells, words = epoch_cells(slot), epoch_words(slot)
        to_units, to_moments = state.pools.units[slot.index, epoch], state.pools.moments[slot.index, epoch]
        state.arrays["units"][to_units : to_units + cells] = held["units"][units : units + cells]
        state.arrays["moments"][to_moments : to_moments + words] = held["moments"][moments : moments + words]
