"""Which spec is in force for a record: a timeline of experiment records in log time.

A record on ``xp.experiments`` governs events whose log time is at or after its own log time plus the
activation delay. Every (experiment, version) gets a slot, a small number that columns and state use.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from stream_xp.domain.ages import Bucket
from stream_xp.domain.buckets import kept_buckets
from stream_xp.domain.events import Exposure, Reward, epoch_ms
from stream_xp.domain.experiment import (
    Adjustment,
    Covariate,
    Denominator,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    Status,
    WeightEpoch,
)
from stream_xp.errors import Reason, RecordRejected

FOREVER = 2**62
UNKNOWN = -1
INACTIVE = -2
DEAD = -3
NO_EVENT = -1


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One record of ``xp.experiments``, as the fold uses it.

    Attributes:
        offset: its offset there; identity of the entry.
        in_force_ms: log time from which it governs events.
        record: None for a tombstone.
    """

    offset: int
    experiment: str
    in_force_ms: int
    record: ExperimentRecord | None

    @property
    def active(self) -> bool:
        """Whether events are taken while this entry is in force."""
        return self.record is not None and self.record.status is Status.ACTIVE


class Refused(NamedTuple):
    """An entry that was not taken in, and the rule it breaks."""

    entry: Entry
    rule: str


@dataclass(frozen=True, slots=True)
class Interval:
    """A span of log time in which a slot is in force, with the weight epochs known in it."""

    from_ms: int
    until_ms: int
    epochs: tuple[WeightEpoch, ...]


class Stream(NamedTuple):
    """The rewards that make up one value of a unit: of a metric, the denominator of a ratio, or a bucket.

    Attributes:
        metric: its metric; a ratio has two streams, and one with buckets one more for each.
        source: what says how its rewards are quantised and folded.
        bucket: the span after the unit's first exposure in which they lie; None for the attribution window.
        beside: the bucket whose value makes a row of products with this one's.
    """

    metric: Metric
    source: Metric | Denominator
    bucket: Bucket | None = None
    beside: Bucket | None = None

    @property
    def least(self) -> float:
        """Smallest value that is accepted, metric units; a bound only for latencies."""
        return 0.0 if self.metric.kind is MetricKind.LATENCY else -math.inf


def streams(spec: ExperimentSpec) -> list[Stream]:
    """Every stream of an experiment: the metrics in the order of the file, the denominators, the buckets."""
    return [
        *(Stream(metric, metric) for metric in spec.metrics),
        *(Stream(metric, metric.denominator) for metric in spec.metrics if metric.denominator is not None),
        *(Stream(one.metric, *one) for one in kept_buckets(spec)),
    ]


def used_covariate(spec: ExperimentSpec) -> Covariate | None:
    """The covariate, if a metric is adjusted for it."""
    adjusted = any(metric.adjustment is not Adjustment.NONE for metric in spec.metrics)
    return spec.covariate if adjusted else None


class Listener(NamedTuple):
    """A stream that a reward reaches; `at` is its place among the streams of its slot."""

    slot: Slot
    at: int
    stream: Stream


@dataclass(slots=True)
class Slot:
    """One version of one experiment."""

    index: int
    experiment: str
    version: int
    spec: ExperimentSpec
    design_hash: str
    arms: dict[str, int]
    segments: Segments
    intervals: list[Interval] = field(default_factory=list)

    @property
    def epochs(self) -> tuple[WeightEpoch, ...]:
        """Every weight epoch ever known of this version."""
        return max((interval.epochs for interval in self.intervals), key=len)

    @property
    def ended_ms(self) -> int:
        """Log time from which this version governs nothing, as far as is known; FOREVER while it is in force."""
        spans = [span.until_ms for span in self.intervals if span.from_ms < span.until_ms]
        return max(spans, default=-FOREVER)

    @property
    def longest_window_ms(self) -> int:
        """How long after its first exposure a unit's rewards can count."""
        return self.spec.longest_window_ms

    def in_force(self, log_ms: int) -> Interval | None:
        """The interval that holds `log_ms`, if this version is in force then."""
        for interval in reversed(self.intervals):
            if interval.from_ms <= log_ms < interval.until_ms:
                return interval
        return None


class Segments:
    """Registered segments as one mixed-radix code per unit and one cell per value.

    Cell 0 holds every unit; each dimension has a cell per registered value and one for `other`.
    """

    def __init__(self, registered: dict[str, tuple[str, ...]]) -> None:
        self.names = sorted(registered)
        self.codes = [{value: code for code, value in enumerate(registered[name])} for name in self.names]
        self.sizes = [len(registered[name]) + 1 for name in self.names]
        self.labels = [""] + [
            f"{name}={value}" for name in self.names for value in (*registered[name], "other")
        ]

    def code(self, segments: dict[str, str]) -> int:
        """The mixed-radix code of a unit's segments; what is missing or not registered is `other`."""
        code = 0
        for name, known, size in zip(self.names, self.codes, self.sizes, strict=True):
            code = code * size + known.get(segments.get(name, ""), size - 1)
        return code


class Registry:
    """All experiment versions, and what is in force when.

    Slots are numbered in order of first sight and never renumbered; `generation` grows with every change.

    Attributes:
        memo: what others derive from it; emptied with every change.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.slots: list[Slot] = []
        self.generation = 0
        self.memo: dict[str, Any] = {}
        self.events: dict[str, int] = {}
        self._entries: dict[int, Entry] = {}
        self._timelines: dict[str, list[Entry]] = {}
        self._refused: dict[str, int] = {}
        self._by_version: dict[tuple[str, int], Slot] = {}
        self._listeners: dict[str, list[Listener]] = {}
        self.add(entries)

    @property
    def entries(self) -> list[Entry]:
        """Every entry, by offset."""
        return [self._entries[offset] for offset in sorted(self._entries)]

    def add(self, entries: Iterable[Entry]) -> list[Refused]:
        """Take in entries, each once by offset; those that break a rule are handed back and change nothing.

        A version is immutable but for weight epochs that are added, versions only rise, and one that has ended does
        not come back: the last good entry stays in force.
        """
        refused = []
        changed = set()
        for entry in sorted(entries, key=lambda entry: entry.offset):
            if entry.offset in self._entries:
                continue
            rule = self._broken_rule(entry)
            if rule is not None:
                refused.append(Refused(entry, rule))
                self._refused[entry.experiment] = max(entry.offset, self._refused.get(entry.experiment, -1))
                continue
            entry = self._sharing(entry)  # noqa: PLW2901 (the same entry, in less memory)
            self._entries[entry.offset] = entry
            self._timelines.setdefault(entry.experiment, []).append(entry)
            if entry.record is not None:
                self._slot(entry.experiment, entry.record)
            changed.add(entry.experiment)
        for experiment in changed:
            self._rebuild(experiment)
        if changed:
            self.generation += 1
            self.memo.clear()
        return refused

    def buried(self) -> list[Entry]:
        """The entry in force of each experiment whose newest record on the topic is another, which was refused.

        Compaction keeps the newest record of a key, also where nobody goes by it. The record has all weight epochs of
        its version.
        """
        newest = [max(self._timelines[name], key=lambda e: e.offset) for name in self._refused]
        return [self._whole(entry) for entry in newest if entry.offset < self._refused[entry.experiment]]

    def _whole(self, entry: Entry) -> Entry:
        record = entry.record
        if record is None:
            return entry
        return msgspec.structs.replace(entry, record=self.newest(entry.experiment, record.spec.version))

    def _broken_rule(self, entry: Entry) -> str | None:
        if entry.record is None:
            return None
        version = entry.record.spec.version
        known = self._by_version.get((entry.experiment, version))
        if known is not None and known.design_hash != entry.record.design_hash:
            return f"version {version} is frozen: a change of anything but weights needs a new version"
        earlier = [e for e in self._timelines.get(entry.experiment, []) if e.offset < entry.offset]
        newest = max((e.record.spec.version for e in earlier if e.record), default=0)
        if version < newest:
            return f"version {version} is older than {newest}"
        if entry.active and version == newest and not max(earlier, key=lambda e: e.offset).active:
            return f"version {version} has ended: to start again needs a new version"
        return _broken_epochs(entry.record, earlier)

    def _sharing(self, entry: Entry) -> Entry:
        """The entry, with the objects of its version's newest one where it says the same.

        Every record holds all weight epochs of its version: a thousand changes would be half a million of them.
        """
        record = entry.record
        held = None if record is None else self._last(entry.experiment, record.spec.version)
        if record is None or held is None:
            return entry
        n = min(len(held.epochs), len(record.epochs))
        same = record.epochs[:n] == held.epochs[:n]
        shared = msgspec.structs.replace(
            record,
            spec=held.spec if record.spec == held.spec else record.spec,
            epochs=(*held.epochs[:n], *record.epochs[n:]) if same else record.epochs,
        )
        return msgspec.structs.replace(entry, record=shared)

    def unarchived(self) -> list[ExperimentRecord]:
        """The newest record of each experiment that is not archived, in order of registration."""
        newest = [timeline[-1] for timeline in self._timelines.values()]
        return [entry.record for entry in newest if entry.record is not None and entry.active]

    def slot(self, experiment: str, version: int) -> Slot:
        """The slot of a version that is known."""
        return self._by_version[experiment, version]

    def newest(self, experiment: str, version: int) -> ExperimentRecord | None:
        """The newest record of a version, with all its weight epochs."""
        record = self._last(experiment, version)
        if record is None:
            return None
        epochs = self._by_version[experiment, version].epochs
        return record if record.epochs == epochs else msgspec.structs.replace(record, epochs=epochs)

    def known_from(self, experiment: str, version: int) -> int:
        """Log time from which exposures of a version's newest weight epoch are taken, as far as is known."""
        number = len(self._by_version[experiment, version].epochs)
        return next(
            entry.in_force_ms
            for entry in self._timelines[experiment]
            if entry.record is not None
            and entry.record.spec.version == version
            and len(entry.record.epochs) == number
        )

    def _last(self, experiment: str, version: int) -> ExperimentRecord | None:
        for entry in reversed(self._timelines.get(experiment, [])):
            if entry.record is not None and entry.record.spec.version == version:
                return entry.record
        return None

    def in_force(self, experiment: str, log_ms: int) -> tuple[Slot, Interval] | int:
        """The slot and interval that govern a record, or UNKNOWN or INACTIVE."""
        timeline = self._timelines.get(experiment, [])
        at = bisect.bisect_right(timeline, log_ms, key=lambda entry: entry.in_force_ms)
        if at == 0:
            return UNKNOWN
        entry = timeline[at - 1]
        if entry.record is None or not entry.active:
            return INACTIVE
        slot = self._by_version[experiment, entry.record.spec.version]
        interval = slot.in_force(log_ms)
        return UNKNOWN if interval is None else (slot, interval)

    def listeners(self, event: str, log_ms: int, experiment: str | None) -> list[Listener]:
        """The streams in force that a reward reaches."""
        return [
            listener
            for listener in self._listeners.get(event, [])
            if (experiment is None or listener.slot.experiment == experiment)
            and listener.slot.in_force(log_ms) is not None
        ]

    def all_listeners(self, event: str) -> list[Listener]:
        """The streams that a reward of this name has ever reached."""
        return self._listeners.get(event, [])

    def route_exposure(self, exposure: Exposure, log_ms: int) -> tuple[int, int, int, int]:
        """(slot, arm, epoch, segment code); slot is UNKNOWN or INACTIVE where no spec is in force.

        It also is INACTIVE for an exposure of a final epoch: the experiment is over for it.

        Raises:
            RecordRejected: the arm or the weight epoch is not in the spec in force.
        """
        found = self.in_force(exposure.experiment, log_ms)
        if isinstance(found, int):
            return found, 0, 0, 0
        slot, interval = found
        arm = slot.arms.get(exposure.arm)
        if arm is None:
            raise RecordRejected(
                Reason.UNKNOWN_ARM, f"`arm` is not an arm of {slot.experiment} version {slot.version}"
            )
        epoch = _epoch(exposure, slot, interval)
        if epoch.final:
            return INACTIVE, 0, 0, 0
        return slot.index, arm, epoch.epoch, slot.segments.code(exposure.segments)

    def route_reward(self, reward: Reward, log_ms: int) -> int:
        """The event code, or NO_EVENT where nobody listens, or UNKNOWN - 10 / INACTIVE - 10 for its experiment.

        Raises:
            RecordRejected: `value` is refused by every metric in force that listens.
        """
        if reward.experiment is not None:
            found = self.in_force(reward.experiment, log_ms)
            if isinstance(found, int):
                return found - 10
        heard = self.listeners(reward.metric, log_ms, reward.experiment)
        if not heard:
            return NO_EVENT
        if all(refuses(listener.stream, reward.value) for listener in heard):
            raise RecordRejected(
                Reason.VALUE_OUT_OF_RANGE, f"`value` is outside the bound of {reward.metric}"
            )
        return self.events[reward.metric]

    def _slot(self, experiment: str, record: ExperimentRecord) -> None:
        spec = record.spec
        if (experiment, spec.version) in self._by_version:
            return
        slot = Slot(
            index=len(self.slots),
            experiment=experiment,
            version=spec.version,
            spec=spec,
            design_hash=record.design_hash,
            arms={arm.key: index for index, arm in enumerate(spec.arms)},
            segments=Segments(spec.segments),
        )
        self.slots.append(slot)
        self._by_version[experiment, spec.version] = slot
        for at, stream in enumerate(streams(spec)):
            event = stream.source.listens_to
            self.events.setdefault(event, len(self.events))
            self._listeners.setdefault(event, []).append(Listener(slot, at, stream))

    def _rebuild(self, experiment: str) -> None:
        timeline = self._timelines[experiment]
        timeline.sort(key=lambda entry: entry.offset)
        for slot in self.slots:
            if slot.experiment == experiment:
                slot.intervals = []
        for entry, following in zip(timeline, [*timeline[1:], None], strict=True):
            until_ms = FOREVER if following is None else following.in_force_ms
            if entry.record is not None:
                slot = self._by_version[experiment, entry.record.spec.version]
                from_ms = entry.in_force_ms if entry.active else until_ms
                slot.intervals.append(Interval(from_ms, until_ms, entry.record.epochs))


def refuses(stream: Stream, value: float) -> bool:
    """Whether the stream's bound refuses a reward of this value."""
    if not stream.source.bounded:
        return False
    steps = value / stream.source.step
    return value < stream.least or math.isinf(steps) or abs(round(steps)) > stream.source.max_steps


def _epoch(exposure: Exposure, slot: Slot, interval: Interval) -> WeightEpoch:
    """The epoch that the exposure names, else the newest that had begun at its time; numbers are positions."""
    epochs, named = interval.epochs, exposure.weight_epoch
    if named is None:
        time_ms = epoch_ms(exposure.time)
        begun = [epoch for epoch in epochs if epoch.effective_ms <= time_ms]
        return begun[-1] if begun else epochs[0]
    if not 0 <= named < len(epochs):
        raise RecordRejected(
            Reason.UNKNOWN_WEIGHT_EPOCH,
            f"`weight_epoch` is not an epoch of {slot.experiment} version {slot.version}",
        )
    return epochs[named]


def _broken_epochs(record: ExperimentRecord, earlier: Iterable[Entry]) -> str | None:
    """The rule that the record's weight epochs break, given the entries before it.

    Of two writers that add an epoch at once the first one on the topic wins. Archiving needs no epochs: who
    archives may have read the record before the newest one.
    """
    version = record.spec.version
    of_version = [e.record.epochs for e in earlier if e.record and e.record.spec.version == version]
    known = max(of_version, key=len, default=())
    given = record.epochs[: len(known)]
    if given == known or (record.status is Status.ARCHIVED and given == known[: len(given)]):
        return None
    wrong = next(
        (at for at, pair in enumerate(zip(known, given, strict=False)) if pair[0] != pair[1]), len(given)
    )
    what = "is missing" if wrong == len(given) else "is another than the one known"
    return f"weight epochs of version {version} are only ever added: epoch {wrong} {what}"
