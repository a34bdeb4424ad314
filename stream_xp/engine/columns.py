"""From a block of raw records to columns: what the fold takes, whoever decoded them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import xxhash

from stream_xp.domain.codec import Headers, Limits, RawColumns, decode_exposures, decode_rewards
from stream_xp.domain.dead_letter import DeadLetter, dead_letter
from stream_xp.domain.events import Exposure, Reward, epoch_ms
from stream_xp.engine.registry import (
    DEAD,
    FOREVER,
    INACTIVE,
    Interval,
    Registry,
    Segments,
    Slot,
    used_covariate,
)
from stream_xp.errors import RecordRejected

_Event = TypeVar("_Event", Exposure, Reward)
Int64 = npt.NDArray[np.int64]
NO_EXPERIMENT = -1


class Block(NamedTuple):
    """A fetched run of records of one topic partition, in offset order.

    Attributes:
        fetch_offset: the offset that was asked for; nothing between it and `next_offset` is missing.
        next_offset: the offset to fetch next.
        timestamps_ms: the broker's append times.
        fetched_ns: monotonic clock of the process when it had these records; None where nobody looked.
    """

    topic: str
    partition: int
    fetch_offset: int
    next_offset: int
    offsets: Sequence[int]
    timestamps_ms: Sequence[int]
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Sequence[Headers]
    fetched_ns: int | None = None

    def since(self, offset: int) -> Block:
        """The records at or after `offset`."""
        first = int(np.searchsorted(np.asarray(self.offsets, np.int64), offset))
        if first == 0:
            return self
        return self._replace(**{name: getattr(self, name)[first:] for name in _PER_RECORD})


_PER_RECORD = ("offsets", "timestamps_ms", "keys", "values", "headers")


@dataclass(frozen=True, slots=True)
class ExposureColumns:
    """Exposures of one partition, one row each, in offset order.

    Attributes:
        offset, log_ms, time_ms: int64[n].
        unit, event_id: int64[n, 2], 128-bit hashes.
        slot: int64[n], slot or UNKNOWN, INACTIVE, DEAD.
        arm, epoch, segment: int64[n], meaningful where slot >= 0.
        covariate: int64[n], in steps of the slot's covariate; 0 where it has none.
    """

    offset: Int64
    log_ms: Int64
    time_ms: Int64
    unit: Int64
    event_id: Int64
    slot: Int64
    arm: Int64
    epoch: Int64
    segment: Int64
    covariate: Int64


@dataclass(frozen=True, slots=True)
class RewardColumns:
    """Rewards of one partition, one row each, in offset order.

    Attributes:
        event: int64[n], event code, or NO_EVENT, DEAD, or UNKNOWN - 10, INACTIVE - 10 for its experiment.
        experiment: int64[n], slot of the only experiment it is for, or NO_EXPERIMENT.
        value: float64[n], metric units.
        The rest as in ExposureColumns.
    """

    offset: Int64
    log_ms: Int64
    time_ms: Int64
    unit: Int64
    event_id: Int64
    event: Int64
    experiment: Int64
    value: npt.NDArray[np.float64]


def log_times(block: Block, floor_ms: int) -> Int64:
    """Log time of each record: the largest timestamp so far, `floor_ms` that of the records before."""
    stamps = np.asarray(block.timestamps_ms, np.int64)
    return np.maximum(np.maximum.accumulate(stamps), floor_ms) if len(stamps) else stamps


def exposure_columns(
    block: Block, registry: Registry, *, floor_ms: int, limits: Limits
) -> tuple[ExposureColumns, list[DeadLetter]]:
    """Decode and route a block of exposures; refused rows have slot DEAD and a dead letter."""
    log_ms = log_times(block, floor_ms)
    logs = log_ms.tolist()
    decoded = decode_exposures(RawColumns(block.keys, block.values, block.headers, logs), limits)
    route = _router(registry, _ExposureRouter).route
    routed = [route(event, log) for event, log in zip(decoded, logs, strict=True)]
    events, codes, letters = _sorted_out(block, logs, decoded, routed, dead=(DEAD, 0, 0, 0))
    columns = ExposureColumns(
        offset=np.asarray(block.offsets, np.int64),
        log_ms=log_ms,
        **_identity(block, events),
        slot=np.ascontiguousarray(codes[:, 0]),
        arm=np.ascontiguousarray(codes[:, 1]),
        epoch=np.ascontiguousarray(codes[:, 2]),
        segment=np.ascontiguousarray(codes[:, 3]),
        covariate=_covariates(registry, codes[:, 0], events),
    )
    return columns, letters


def reward_columns(
    block: Block, registry: Registry, *, floor_ms: int, limits: Limits
) -> tuple[RewardColumns, list[DeadLetter]]:
    """Decode and route a block of rewards; refused rows have event DEAD and a dead letter."""
    log_ms = log_times(block, floor_ms)
    logs = log_ms.tolist()
    decoded = decode_rewards(RawColumns(block.keys, block.values, block.headers, logs), limits)
    route = _router(registry, _RewardRouter).route
    routed = [route(event, log) for event, log in zip(decoded, logs, strict=True)]
    events, codes, letters = _sorted_out(block, logs, decoded, routed, dead=(DEAD, NO_EXPERIMENT))
    columns = RewardColumns(
        offset=np.asarray(block.offsets, np.int64),
        log_ms=log_ms,
        **_identity(block, events),
        event=np.ascontiguousarray(codes[:, 0]),
        experiment=np.ascontiguousarray(codes[:, 1]),
        value=np.array([0.0 if e is None else e.value for e in events], np.float64),
    )
    return columns, letters


def _covariates(registry: Registry, slot: Int64, events: Sequence[Exposure | None]) -> Int64:
    """Each exposure's covariate in whole steps, cut off at the bound."""
    steps = np.zeros(len(slot), np.int64)
    if "covariates" not in registry.memo:
        used = [(one.index, used_covariate(one.spec)) for one in registry.slots]
        registry.memo["covariates"] = [(index, covariate) for index, covariate in used if covariate]
    for index, covariate in registry.memo["covariates"]:
        rows = np.flatnonzero(slot == index)
        given = [
            None if event is None else event.covariate for event in map(events.__getitem__, rows.tolist())
        ]
        values = [covariate.missing if value is None else value for value in given]
        with np.errstate(over="ignore"):
            quotients = np.array(values, np.float64) / covariate.scale
        # Cut off while it is a float: a quotient may be beyond what an integer holds.
        steps[rows] = np.rint(np.clip(quotients, -covariate.max_steps, covariate.max_steps))
    return steps


def _router(registry: Registry, kind: type[_Router]) -> _Router:
    """The router of this state of the registry; made once for many blocks."""
    router = registry.memo.get(kind.__name__)
    if not isinstance(router, kind):
        router = registry.memo[kind.__name__] = kind(registry)
    return router


_Codes: TypeAlias = tuple[int, int, int, int]


class _Span(NamedTuple):
    """What routes the exposures of one experiment in one interval.

    Attributes:
        codes: by number of the weight epoch, then by arm, for units without segments. Under None where the exposure
            names no epoch and there is one only.
        begins_ms: when each epoch begins, if no epoch begins before the one that it follows, else empty.
        segments: None where none are registered.
    """

    from_ms: int
    until_ms: int
    codes: dict[int | None, dict[str, _Codes]]
    begins_ms: list[int]
    segments: Segments | None

    def by_time(self, event: Exposure) -> _Codes | None:
        """The codes of an exposure that names no epoch; None where this does not know."""
        if not self.begins_ms:
            return None
        epoch = max(0, bisect.bisect_right(self.begins_ms, epoch_ms(event.time)) - 1)
        return self.codes[epoch].get(event.arm)


_NO_ARMS: dict[str, _Codes] = {}


class _ExposureRouter:
    """Routes exposures, remembering per experiment what never changes inside one interval."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._spans: dict[str, _Span] = {}

    def route(self, event: Exposure | RecordRejected, log_ms: int) -> _Codes | RecordRejected:
        if isinstance(event, RecordRejected):
            return event
        span = self._spans.get(event.experiment)
        if span is not None and span[0] <= log_ms < span[1]:
            # By position, the shortest way first: this runs once for every exposure.
            codes = span[2].get(event.weight_epoch, _NO_ARMS).get(event.arm)
            if codes is None and event.weight_epoch is None:
                codes = span.by_time(event)
            if codes is not None:
                segments = span[4]
                if segments is None or codes[0] < 0:
                    return codes
                return codes[0], codes[1], codes[2], segments.code(event.segments)
        return self._route_slowly(event, log_ms)

    def _route_slowly(self, event: Exposure, log_ms: int) -> _Codes | RecordRejected:
        try:
            codes = self._registry.route_exposure(event, log_ms)
        except RecordRejected as rejection:
            return rejection
        found = self._registry.in_force(event.experiment, log_ms)
        if not isinstance(found, int):
            self._spans[event.experiment] = _span(*found)
        return codes


def _span(slot: Slot, interval: Interval) -> _Span:
    codes: dict[int | None, dict[str, _Codes]] = {
        one.epoch: {
            arm: (INACTIVE, 0, 0, 0) if one.final else (slot.index, code, one.epoch, 0)
            for arm, code in slot.arms.items()
        }
        for one in interval.epochs
    }
    begins_ms = [one.effective_ms for one in interval.epochs]
    if len(begins_ms) == 1:
        codes[None], begins_ms = codes[0], []
    if any(before > after for before, after in pairwise(begins_ms)):
        begins_ms = []
    segments = slot.segments if slot.segments.names else None
    return _Span(interval.from_ms, interval.until_ms, codes, begins_ms, segments)


_Router = TypeVar("_Router", "_ExposureRouter", "_RewardRouter")


class _RewardRouter:
    """Routes rewards, remembering per event name from when on a stream always listens, and the tightest bounds."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._plain: dict[str, tuple[int, float, float, tuple[int, int]]] = {}
        for event, code in registry.events.items():
            heard = registry.all_listeners(event)
            newest = [one.slot.intervals[-1] for one in heard]
            open_ended = [interval.from_ms for interval in newest if interval.until_ms == FOREVER]
            bound = min(one.stream.source.max_steps * one.stream.source.step for one in heard) * (1 - 1e-12)
            least = max(-bound, *(one.stream.least for one in heard))
            self._plain[event] = (min(open_ended, default=FOREVER), least, bound, (code, NO_EXPERIMENT))

    def route(self, event: Reward | RecordRejected, log_ms: int) -> tuple[int, int] | RecordRejected:
        if isinstance(event, RecordRejected):
            return event
        plain = self._plain.get(event.metric)
        if (
            event.experiment is None
            and plain is not None
            and log_ms >= plain[0]
            and plain[1] <= event.value <= plain[2]
        ):
            return plain[3]
        try:
            code = self._registry.route_reward(event, log_ms)
        except RecordRejected as rejection:
            return rejection
        return code, self._only(event, log_ms)

    def _only(self, event: Reward, log_ms: int) -> int:
        found = None if event.experiment is None else self._registry.in_force(event.experiment, log_ms)
        return NO_EXPERIMENT if found is None or isinstance(found, int) else found[0].index


def _sorted_out(
    block: Block,
    logs: list[int],
    decoded: Sequence[_Event | RecordRejected],
    routed: Sequence[tuple[int, ...] | RecordRejected],
    *,
    dead: tuple[int, ...],
) -> tuple[Sequence[_Event | None], Int64, list[DeadLetter]]:
    """The events (None where one was refused), their codes, and the dead letters."""
    refused = {row: route for row, route in enumerate(routed) if isinstance(route, RecordRejected)}
    events = [None if row in refused else event for row, event in enumerate(decoded)] if refused else decoded
    kept = [dead if row in refused else route for row, route in enumerate(routed)] if refused else routed
    codes = np.fromiter(chain.from_iterable(cast("Sequence[tuple[int, ...]]", kept)), np.int64)
    letters = [_dead_letter(block, logs[row], row, rejection) for row, rejection in refused.items()]
    return cast("Sequence[_Event | None]", events), codes.reshape(-1, len(dead)), letters


def _identity(block: Block, events: Sequence[Exposure | Reward | None]) -> dict[str, Any]:
    return {
        "time_ms": np.array([0 if e is None else epoch_ms(e.time) for e in events], np.int64),
        "unit": hashes([b"" if e is None else key or b"" for e, key in zip(events, block.keys, strict=True)]),
        "event_id": hashes([b"" if e is None else f"{e.source}\0{e.id}".encode() for e in events]),
    }


def hashes(values: Sequence[bytes]) -> Int64:
    """128-bit XXH3 of each value as two int64: int64[n, 2]."""
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, values)), np.int64).reshape(-1, 2)


def _dead_letter(block: Block, log_time_ms: int, row: int, rejection: RecordRejected) -> DeadLetter:
    return dead_letter(
        topic=block.topic,
        partition=block.partition,
        offset=block.offsets[row],
        log_time_ms=log_time_ms,
        reason=rejection.reason,
        detail=rejection.detail,
        key=block.keys[row],
        value=block.values[row],
    )
