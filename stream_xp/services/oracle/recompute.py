"""The statistics of one source partition, computed again from its raw records.

A second, independent reading of docs/semantics.md: whole lists instead of a fold, plain Python integers
instead of columns, and nothing of the engine. The functions stand in the order of that page's paragraphs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

from stream_xp.domain.ages import Bucket
from stream_xp.domain.codec import Headers, Limits, RawRecord, decode_exposure, decode_reward
from stream_xp.domain.events import Exposure, Reward, epoch_ms
from stream_xp.domain.experiment import (
    Adjustment,
    Aggregation,
    Covariate,
    Denominator,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    Status,
    WeightEpoch,
)
from stream_xp.domain.experiment_rules import record_rules
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.statistics import ALL, ExperimentStatistics, MetricKey, Outcomes, UnitKey, build
from stream_xp.errors import Reason, RecordRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

EXPOSURES = "exposures"
"""Name of the exposure topic in `behind_watermark`."""
REWARDS = "rewards"
"""Name of the reward topic in `behind_watermark`."""
OTHER = "other"
"""The segment value of units whose value is missing or not registered."""

VersionKey: TypeAlias = tuple[str, int]
StreamName: TypeAlias = tuple[str, str]
Event = TypeVar("Event", Exposure, Reward)


class LoggedRecord(NamedTuple):
    """One record of a raw topic partition; `timestamp_ms` is Kafka's timestamp."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class LoggedSpec(NamedTuple):
    """One record of ``xp.experiments``, in the order of the log; `record` is None for a tombstone."""

    timestamp_ms: int
    experiment: str
    record: ExperimentRecord | None
    partition: int = 0


class Fate(StrEnum):
    """What became of one record; the values are the fields of `Outcomes`."""

    COUNTED = "counted"
    DUPLICATE = "duplicate"
    LATE = "late"
    UNATTRIBUTED = "unattributed"
    UNKNOWN_EXPERIMENT = "unknown_experiment"
    INACTIVE_EXPERIMENT = "inactive_experiment"
    CROSSOVER = "crossover"
    DEAD_LETTERED = "dead_lettered"
    WAITING = "waiting"
    OVER_LIMIT = "over_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """What one prefix of a source partition comes to.

    Attributes:
        statistics: of every experiment version that `experiments` puts in force, empty ones too.
        exposure_outcomes, reward_outcomes: of all experiments together.
        exposure_fates, reward_fates: what became of each record, by offset.
        dead_letters: why a record was dead-lettered, by topic (`EXPOSURES`, `REWARDS`) and offset.

    """

    partition: int
    statistics: dict[VersionKey, ExperimentStatistics]
    exposure_outcomes: Outcomes
    reward_outcomes: Outcomes
    exposure_fates: dict[int, Fate]
    reward_fates: dict[int, Fate]
    dead_letters: dict[tuple[str, int], Reason]


def recompute(
    exposures: Sequence[LoggedRecord],
    rewards: Sequence[LoggedRecord],
    experiments: Sequence[LoggedSpec],
    *,
    partition: int,
    watermark_ms: int | None,
    allowed_lateness_ms: int,
    activation_delay_ms: int,
    limits: Limits,
    behind_watermark: Mapping[str, Collection[int]],
    max_units: int | None = None,
) -> Recomputed:
    """Compute what docs/semantics.md defines for a prefix of one source partition.

    `exposures` and `rewards` are the prefix of each topic in the order of offsets, `experiments` is all of
    ``xp.experiments`` in the order of its log. `watermark_ms` is the watermark that the statistics are taken
    at, None before the first record. `behind_watermark` holds, under `EXPOSURES` and `REWARDS`, the offsets
    refused only because the clock had moved the watermark on; one is believed where `watermark_ms` bears it
    out. `max_units` is the bound of units per experiment version, None where there was none.
    """
    return conclude(
        screen(
            exposures,
            rewards,
            experiments,
            watermark_ms=watermark_ms,
            allowed_lateness_ms=allowed_lateness_ms,
            activation_delay_ms=activation_delay_ms,
            limits=limits,
            behind_watermark=behind_watermark,
            max_units=max_units,
        ),
        partition=partition,
    )


def screen(
    exposures: Sequence[LoggedRecord],
    rewards: Sequence[LoggedRecord],
    experiments: Sequence[LoggedSpec],
    *,
    watermark_ms: int | None,
    allowed_lateness_ms: int,
    activation_delay_ms: int,
    limits: Limits,
    behind_watermark: Mapping[str, Collection[int]],
    max_units: int | None = None,
) -> Screening:
    """Take a prefix through steps 1 to 4 and past the bound of units; the arguments are those of `recompute`."""
    timeline = Timeline(experiments, activation_delay_ms)
    rules = Lateness(allowed_lateness_ms, watermark_ms)
    seen = _screen(
        exposures,
        lambda raw: _examine_exposure(raw, timeline, limits),
        rules,
        frozenset(behind_watermark.get(EXPOSURES, ())),
    )
    heard = _screen(
        rewards,
        lambda raw: _examine_reward(raw, timeline, limits),
        rules,
        frozenset(behind_watermark.get(REWARDS, ())),
    )
    return Screening(timeline, rules, bounded(seen, timeline, max_units), heard, max_units)


def conclude(screening: Screening, *, partition: int) -> Recomputed:
    """Take a screened prefix through steps 5 and 6 to its statistics; changes nothing in it."""
    timeline, rules = screening.timeline, screening.rules
    seen, heard = screening.seen.copy(), screening.heard.copy()
    populations = _populations(seen, timeline)
    hits = _attribute(heard, populations, timeline, rules)
    over = _over_limit(screening)
    return Recomputed(
        partition=partition,
        statistics={
            version: _statistics(
                spec, populations.get(version, {}), hits.get(version, {}), rules, over_limit=over[version]
            )
            for version, spec in timeline.designs.items()
        },
        exposure_outcomes=_outcomes(seen.fates),
        reward_outcomes=_outcomes(heard.fates),
        exposure_fates=dict(sorted(seen.fates.items())),
        reward_fates=dict(sorted(heard.fates.items())),
        dead_letters={
            **{(EXPOSURES, offset): reason for offset, reason in seen.reasons.items()},
            **{(REWARDS, offset): reason for offset, reason in heard.reasons.items()},
        },
    )


def members_of(screening: Screening, version: VersionKey) -> tuple[Mapping[str, Unit], Hits]:
    """Return the units of one experiment version and their rewards; changes nothing in `screening`."""
    populations, hits = all_members(screening)
    return populations.get(version, {}), hits.get(version, {})


def all_members(
    screening: Screening,
) -> tuple[Mapping[VersionKey, Mapping[str, Unit]], Mapping[VersionKey, Hits]]:
    """Return the units of every experiment version, and their rewards; changes nothing in `screening`."""
    populations = _populations(screening.seen.copy(), screening.timeline)
    return populations, _attribute(screening.heard.copy(), populations, screening.timeline, screening.rules)


def value_of(metric: Metric, hits: Hits, unit: str) -> int:
    """Return the value of a unit in a metric, in steps; of a ratio, its numerator."""
    return folded(metric.folds_by, _accepted(hits, Stream(metric, metric), unit))


def statistics_of(screening: Screening, version: VersionKey) -> ExperimentStatistics:
    """Return the statistics of one experiment version alone; changes nothing in `screening`."""
    units, hits = members_of(screening, version)
    over = _over_limit(screening)[version]
    return _statistics(screening.timeline.designs[version], units, hits, screening.rules, over_limit=over)


# Terms: log time, spec in force, lateness


def log_times(timestamps_ms: Sequence[int]) -> list[int]:
    """Return the log time of each record of a topic partition: the running maximum of the timestamps."""
    times: list[int] = []
    for timestamp_ms in timestamps_ms:
        times.append(max(timestamp_ms, times[-1]) if times else timestamp_ms)
    return times


class Stream(NamedTuple):
    """What folds rewards into one value of a unit: a metric's own fields, its denominator's, or a bucket."""

    metric: Metric
    fields: Metric | Denominator
    bucket: Bucket | None = None

    @property
    def name(self) -> StreamName:
        """The metric's key, and which of its streams it is; of a bucket, the name of its rows."""
        if self.bucket is not None:
            return self.metric.key, self.bucket.name(self.metric.key)
        return self.metric.key, "numerator" if self.fields is self.metric else "denominator"

    def holds(self, age_ms: int) -> bool:
        """Whether a reward that came this long after the unit's first exposure is one of this stream."""
        if self.bucket is not None:
            return self.bucket.from_ms <= age_ms < self.bucket.until_ms
        return 0 <= age_ms < self.metric.window_ms


def streams(metric: Metric) -> list[Stream]:
    """Return the one stream of a metric, or the two of a ratio: numerator, denominator."""
    own = [Stream(metric, metric)]
    return own if metric.denominator is None else [*own, Stream(metric, metric.denominator)]


def aged(design: ExperimentSpec, metric: Metric) -> list[Stream]:
    """Return a stream for each bucket of age of a metric, youngest first; none where it has none."""
    ages = design.ages
    if ages is None or metric.key not in ages.metrics:
        return []
    return [Stream(metric, metric, bucket) for bucket in ages.buckets]


def opened(design: ExperimentSpec, metric: Metric) -> list[Stream]:
    """Return a stream for each age at which open units of a metric are looked at, and one for its whole window."""
    allocation = design.allocation
    if allocation is None or allocation.delay is None or metric.key != allocation.metric:
        return []
    ends_ms = [*(duration_ms(age) for age in allocation.delay.ages), metric.window_ms]
    return [Stream(metric, metric, Bucket(i + 1, 0, end_ms, "@by")) for i, end_ms in enumerate(ends_ms)]


def bucketed(design: ExperimentSpec, metric: Metric) -> list[tuple[Stream, Stream | None]]:
    """Return every bucket of a metric, and the one whose value stands beside its own.

    That is the first one beside the last bucket of age, and the age before beside each other age.
    """
    by_age, by_now = aged(design, metric), opened(design, metric)
    pairs: list[tuple[Stream, Stream | None]] = [(one, None) for one in by_age[:-1]]
    pairs += [(one, by_age[0]) for one in by_age[-1:]]
    pairs += [(one, None) for one in by_now[:1]]
    return pairs + list(zip(by_now[1:], by_now[:-1], strict=True))


class _Listener(NamedTuple):
    """A stream of an experiment version in force that a reward reaches."""

    version: VersionKey
    stream: Stream


class _Era:
    """The specs in force between two changes; None stands for an experiment that has ended."""

    def __init__(
        self, records: dict[str, ExperimentRecord | None], designs: dict[VersionKey, ExperimentSpec]
    ) -> None:
        self.records = records
        self._listeners: dict[str, list[_Listener]] = defaultdict(list)
        for experiment, record in records.items():
            if record is not None:
                version = (experiment, record.spec.version)
                for metric in designs[version].metrics:
                    buckets = [one for one, _ in bucketed(designs[version], metric)]
                    for stream in (*streams(metric), *buckets):
                        self._listeners[stream.fields.listens_to].append(_Listener(version, stream))

    def listeners(self, reward: Reward) -> list[_Listener]:
        """Return the streams in force that listen to the reward and that it is for."""
        listening = self._listeners.get(reward.metric, [])
        return [one for one in listening if reward.experiment in (None, one.version[0])]


class Timeline:
    """Which spec of each experiment is in force at a log time.

    Attributes:
        designs: what is frozen of each version (metrics, segments), from its first good record.

    """

    def __init__(self, experiments: Sequence[LoggedSpec], activation_delay_ms: int) -> None:
        changes: list[tuple[int, str, ExperimentRecord | None]] = []
        newest: dict[int, int] = {}
        self._over: set[str] = set()
        self._epochs: dict[VersionKey, tuple[WeightEpoch, ...]] = {}
        self.designs: dict[VersionKey, ExperimentSpec] = {}
        for logged in experiments:
            log_ms = max(logged.timestamp_ms, newest.get(logged.partition, logged.timestamp_ms))
            newest[logged.partition] = log_ms
            if logged.record is not None and self._refuses(logged.experiment, logged.record):
                continue
            if logged.record is None or logged.record.status is Status.ARCHIVED:
                self._over.add(logged.experiment)
            else:
                self._over.discard(logged.experiment)
            changes.append((log_ms + activation_delay_ms, logged.experiment, logged.record))
            if logged.record is not None:
                version = (logged.experiment, logged.record.spec.version)
                self.designs.setdefault(version, logged.record.spec)
                self._epochs[version] = max(self._epochs.get(version, ()), logged.record.epochs, key=len)
        self._changes = sorted(changes, key=lambda change: change[0])
        self._times = [change[0] for change in self._changes]
        self._eras: dict[int, _Era] = {}

    def _refuses(self, experiment: str, record: ExperimentRecord) -> bool:
        """Whether a record breaks a rule, changes what is known, or goes back to an older or ended version."""
        spec = record.spec
        if record_rules(record, experiment) or self._takes_epochs_back(experiment, record):
            return True
        known = {version: design for (key, version), design in self.designs.items() if key == experiment}
        if experiment in self._over and record.status is Status.ACTIVE and spec.version in known:
            return True
        if spec.version in known:
            return known[spec.version].design_hash() != record.design_hash or spec.version < max(known)
        return spec.version < max(known, default=0)

    def _takes_epochs_back(self, experiment: str, record: ExperimentRecord) -> bool:
        """Whether a known weight epoch is another one here, or, unless the record archives, is missing."""
        known = self._epochs.get((experiment, record.spec.version), ())
        if record.status is Status.ACTIVE and len(record.epochs) < len(known):
            return True
        return any(before != now for before, now in zip(known, record.epochs, strict=False))

    def at(self, log_ms: int) -> _Era:
        """Return the specs in force for a record of this log time."""
        changes = bisect_right(self._times, log_ms)
        if changes not in self._eras:
            self._eras[changes] = self._era(changes)
        return self._eras[changes]

    def _era(self, changes: int) -> _Era:
        records: dict[str, ExperimentRecord | None] = {}
        for _, experiment, record in self._changes[:changes]:
            ended = record is None or record.status is Status.ARCHIVED
            records[experiment] = None if ended else record
        return _Era(records, self.designs)

    def record(self, experiment: str, log_ms: int) -> ExperimentRecord:
        """Return the record in force; the experiment is known to have one."""
        record = self.at(log_ms).records[experiment]
        assert record is not None  # noqa: S101 (only admitted exposures come here)
        return record


class Lateness(NamedTuple):
    """Allowed lateness and the watermark it is compared with."""

    allowed_ms: int
    watermark_ms: int | None

    def passed(self, time_ms: int) -> bool:
        """Whether nothing of event time `time_ms` can come any more: `time + L < W`."""
        return self.watermark_ms is not None and time_ms + self.allowed_ms < self.watermark_ms

    def mature(self, end_ms: int) -> bool:
        """Whether a window that ends just before `end_ms` is complete: `end + L <= W`."""
        return self.watermark_ms is not None and end_ms + self.allowed_ms <= self.watermark_ms


# Outcome of a record, steps 1 to 4


class Admitted(NamedTuple, Generic[Event]):
    """A record that came past step 4."""

    event_ms: int
    offset: int
    log_ms: int
    event: Event


@dataclass(slots=True)
class Screened(Generic[Event]):
    """A topic partition after steps 1 to 4; the fates of the admitted are still to come.

    Attributes:
        refused: what was decoded and routed, and is late or a duplicate.
        over: exposures that came past step 4, of units that the bound keeps out.

    """

    fates: dict[int, Fate] = field(default_factory=dict)
    reasons: dict[int, Reason] = field(default_factory=dict)
    admitted: list[Admitted[Event]] = field(default_factory=list)
    refused: list[Admitted[Event]] = field(default_factory=list)
    over: list[Admitted[Event]] = field(default_factory=list)

    def copy(self) -> Screened[Event]:
        """Return the same with fates that can be added to; the records are shared."""
        return Screened(dict(self.fates), self.reasons, self.admitted, self.refused, self.over)


class Screening(NamedTuple):
    """Both topics of a prefix after steps 1 to 4 and the bound of units, and what the rest follows from."""

    timeline: Timeline
    rules: Lateness
    seen: Screened[Exposure]
    heard: Screened[Reward]
    max_units: int | None = None


def _screen(
    records: Sequence[LoggedRecord],
    examine: Callable[[RawRecord], Event | Fate],
    rules: Lateness,
    behind: frozenset[int],
) -> Screened[Event]:
    """Take each record of a topic partition through steps 1 to 4, in the order of its log."""
    screened: Screened[Event] = Screened()
    newest_copy_ms: dict[tuple[str, str], int] = {}
    for record, log_ms in zip(records, log_times([record.timestamp_ms for record in records]), strict=True):
        try:
            verdict = examine(RawRecord(record.key, record.value, record.headers, log_ms))
        except RecordRejected as rejection:
            screened.reasons[record.offset] = rejection.reason
            screened.fates[record.offset] = Fate.DEAD_LETTERED
            continue
        if isinstance(verdict, Fate):
            screened.fates[record.offset] = verdict
            continue
        event_ms = epoch_ms(verdict.time)
        identity = (verdict.source, verdict.id)
        entered = Admitted(event_ms, record.offset, log_ms, verdict)
        if log_ms - event_ms > rules.allowed_ms or (record.offset in behind and rules.passed(event_ms)):
            screened.fates[record.offset] = Fate.LATE
            screened.refused.append(entered)
        elif identity in newest_copy_ms and newest_copy_ms[identity] + rules.allowed_ms >= log_ms:
            screened.fates[record.offset] = Fate.DUPLICATE
            screened.refused.append(entered)
        else:
            newest_copy_ms[identity] = max(event_ms, newest_copy_ms.get(identity, event_ms))
            screened.admitted.append(entered)
    return screened


def _examine_exposure(raw: RawRecord, timeline: Timeline, limits: Limits) -> Exposure | Fate:
    """Take a record through steps 1 and 2; raises RecordRejected."""
    exposure = decode_exposure(raw, limits)
    in_force = timeline.at(raw.log_time_ms).records
    if exposure.experiment not in in_force:
        return Fate.UNKNOWN_EXPERIMENT
    record = in_force[exposure.experiment]
    if record is None:
        return Fate.INACTIVE_EXPERIMENT
    if exposure.arm not in {arm.key for arm in record.spec.arms}:
        raise RecordRejected(Reason.UNKNOWN_ARM, "`arm` is not an arm of the experiment")
    if exposure.weight_epoch is not None and exposure.weight_epoch not in {
        one.epoch for one in record.epochs
    }:
        raise RecordRejected(Reason.UNKNOWN_WEIGHT_EPOCH, "`weight_epoch` is not one of the experiment")
    drawn_in = _epoch(exposure, epoch_ms(exposure.time), record)
    if any(one.final for one in record.epochs if one.epoch == drawn_in):
        return Fate.INACTIVE_EXPERIMENT
    return exposure


def _examine_reward(raw: RawRecord, timeline: Timeline, limits: Limits) -> Reward | Fate:
    """Take a record through steps 1 and 2; raises RecordRejected."""
    reward = decode_reward(raw, limits)
    era = timeline.at(raw.log_time_ms)
    if reward.experiment is not None:
        if reward.experiment not in era.records:
            return Fate.UNKNOWN_EXPERIMENT
        if era.records[reward.experiment] is None:
            return Fate.INACTIVE_EXPERIMENT
    listeners = era.listeners(reward)
    if not listeners:
        return Fate.UNATTRIBUTED
    if all(quantised(one.stream, reward.value) is None for one in listeners):
        raise RecordRejected(Reason.VALUE_OUT_OF_RANGE, "`value` is refused by every metric it reaches")
    return reward


# Step 5: units and crossovers


class Unit(NamedTuple):
    """A unit as its first exposure fixes it; `segments` are all the rows it stands in."""

    t0_ms: int
    arm: str
    epoch: int
    segments: tuple[str, ...]
    covariate: int
    crossover: bool


def bounded(seen: Screened[Exposure], timeline: Timeline, max_units: int | None) -> Screened[Exposure]:
    """Return the same with the exposures apart of units that came when their version had `max_units` of them.

    Which these are follows from the records before them alone, so it may be done before a prefix is cut shorter.
    """
    held: dict[VersionKey, set[str]] = defaultdict(set)
    taken, over = [], []
    for one in sorted((*seen.admitted, *seen.over), key=lambda exposure: exposure.offset):
        units = held[version_of(one, timeline)]
        if max_units is None or one.event.unit in units or len(units) < max_units:
            units.add(one.event.unit)
            taken.append(one)
        else:
            over.append(one)
    fates = seen.fates | {one.offset: Fate.OVER_LIMIT for one in over}
    return Screened(fates, seen.reasons, taken, seen.refused, over)


def version_of(exposure: Admitted[Exposure], timeline: Timeline) -> VersionKey:
    """Return the experiment version that an admitted exposure belongs to."""
    experiment = exposure.event.experiment
    return experiment, timeline.record(experiment, exposure.log_ms).spec.version


def _over_limit(screening: Screening) -> Counter[VersionKey]:
    return Counter(version_of(one, screening.timeline) for one in screening.seen.over)


def _populations(seen: Screened[Exposure], timeline: Timeline) -> dict[VersionKey, dict[str, Unit]]:
    """Return the units of each experiment version (step 5); notes the fates of their exposures."""
    exposures: dict[tuple[VersionKey, str], list[Admitted[Exposure]]] = defaultdict(list)
    for one in seen.admitted:
        exposures[version_of(one, timeline), one.event.unit].append(one)
    populations: dict[VersionKey, dict[str, Unit]] = defaultdict(dict)
    for (version, unit), of_unit in exposures.items():
        arms = {one.event.arm for one in of_unit}
        fate = Fate.CROSSOVER if len(arms) > 1 else Fate.COUNTED
        seen.fates.update((one.offset, fate) for one in of_unit)
        first = min(of_unit, key=lambda one: (one.event_ms, one.offset))
        populations[version][unit] = Unit(
            t0_ms=first.event_ms,
            arm=first.event.arm,
            epoch=_epoch(first.event, first.event_ms, timeline.record(version[0], first.log_ms)),
            segments=_segments(first.event, timeline.designs[version]),
            covariate=_covariate(first.event, timeline.designs[version].covariate),
            crossover=len(arms) > 1,
        )
    return populations


def _epoch(exposure: Exposure, time_ms: int, record: ExperimentRecord) -> int:
    """Return the weight epoch that the exposure names, else the newest one effective at its event time."""
    if exposure.weight_epoch is not None:
        return exposure.weight_epoch
    effective = [one.epoch for one in record.epochs if one.effective_ms <= time_ms]
    oldest = min((one.epoch for one in record.epochs), default=0)
    return max(effective, default=oldest)


def _segments(exposure: Exposure, design: ExperimentSpec) -> tuple[str, ...]:
    """Name the rows of the exposure: all units, then one for each registered segment."""
    rows = [ALL]
    for name, registered in design.segments.items():
        value = exposure.segments.get(name)
        rows.append(f"{name}={value if value in registered else OTHER}")
    return tuple(rows)


def _covariate(exposure: Exposure, covariate: Covariate | None) -> int:
    """Return the exposure's covariate in whole steps, cut off at the bound; 0 where there is no such thing."""
    if covariate is None:
        return 0
    value = covariate.missing if exposure.covariate is None else exposure.covariate
    most = covariate.max_steps
    quotient = value / covariate.scale
    if abs(quotient) > most:
        return most if quotient > 0 else -most
    return round(quotient)


# Step 6: attribution of rewards


class Hit(NamedTuple):
    """A settled reward in the window of a unit; `steps` is None where the stream refuses it."""

    event_ms: int
    offset: int
    steps: int | None


Hits: TypeAlias = dict[tuple[StreamName, str], list[Hit]]
"""By the stream's name and the unit."""


def _attribute(
    heard: Screened[Reward],
    populations: Mapping[VersionKey, Mapping[str, Unit]],
    timeline: Timeline,
    rules: Lateness,
) -> dict[VersionKey, Hits]:
    """Return the rewards of each unit and metric (step 6); notes the fates of the rewards."""
    hits: dict[VersionKey, Hits] = defaultdict(lambda: defaultdict(list))
    for one in heard.admitted:
        if not rules.passed(one.event_ms):
            heard.fates[one.offset] = Fate.WAITING
            continue
        heard.fates[one.offset] = Fate.UNATTRIBUTED
        for version, stream in timeline.at(one.log_ms).listeners(one.event):
            unit = populations.get(version, {}).get(one.event.unit)
            if unit is not None and stream.holds(one.event_ms - unit.t0_ms):
                heard.fates[one.offset] = Fate.COUNTED
                steps = quantised(stream, one.event.value)
                hits[version][stream.name, one.event.unit].append(Hit(one.event_ms, one.offset, steps))
    return hits


def quantised(stream: Stream, value: float) -> int | None:
    """Return `value` in whole steps of the stream, ties to even; None where the stream refuses it.

    What folds by any, and a count, ask only whether the value is 0, and refuse nothing.
    """
    if stream.metric.kind is MetricKind.COUNT or stream.fields.folds_by is Aggregation.ANY:
        return int(value != 0.0)
    quotient = value / stream.fields.step
    if math.isinf(quotient) or (stream.metric.kind is MetricKind.LATENCY and value < 0):
        return None
    steps = round(quotient)
    return steps if abs(steps) <= stream.fields.max_steps else None


# Statistics of one experiment version


def _statistics(
    design: ExperimentSpec, population: Mapping[str, Unit], hits: Hits, rules: Lateness, *, over_limit: int
) -> ExperimentStatistics:
    clean = {name: unit for name, unit in population.items() if not unit.crossover}
    units: dict[UnitKey, int] = defaultdict(int)
    settled: dict[UnitKey, int] = defaultdict(int)
    for unit in clean.values():
        for segment in unit.segments:
            units[unit.arm, unit.epoch, segment] += 1
            settled[unit.arm, unit.epoch, segment] += rules.passed(unit.t0_ms)
    tables = _Tables()
    for metric in design.metrics:
        mature = {name for name, unit in clean.items() if rules.mature(unit.t0_ms + metric.window_ms)}
        for name in clean if metric.folds_by is Aggregation.FIRST else mature:
            tables.enter(metric, clean[name], [_accepted(hits, one, name) for one in streams(metric)])
        _enter_buckets(tables, bucketed(design, metric), clean, hits, rules)
    return build(
        units=units,
        settled=settled,
        moments=tables.moments,
        products=tables.products,
        events=tables.events,
        histograms=tables.histograms,
        crossover_units=sum(unit.crossover for unit in population.values()),
        first_exposure_ms=min((unit.t0_ms for unit in population.values()), default=None),
        out_of_range=_out_of_range(hits),
        over_limit=over_limit,
    )


def _enter_buckets(
    tables: _Tables,
    buckets: Sequence[tuple[Stream, Stream | None]],
    clean: Mapping[str, Unit],
    hits: Hits,
    rules: Lateness,
) -> None:
    """Let the units whose bucket is over into each bucket of a metric, with the value that stands beside theirs."""
    for stream, beside in buckets:
        assert stream.bucket is not None  # noqa: S101 (only buckets come here)
        name = stream.bucket.name(stream.metric.key)
        for key, unit in clean.items():
            if rules.mature(unit.t0_ms + stream.bucket.until_ms):
                y, x = (
                    folded(one.fields.folds_by, _accepted(hits, one, key))
                    for one in (stream, beside or stream)
                )
                for segment in unit.segments:
                    row = (name, unit.arm, unit.epoch, segment)
                    _add(tables.moments, row, (1, y, y * y))
                    if beside is not None:
                        _add(tables.products, row, (x, x * x, x * y))


class _Tables:
    """The tables of an experiment's metrics, by (metric, arm, epoch, segment)."""

    def __init__(self) -> None:
        self.moments: dict[MetricKey, tuple[int, ...]] = {}
        self.products: dict[MetricKey, tuple[int, ...]] = {}
        self.events: dict[MetricKey, tuple[int, ...]] = {}
        self.histograms: dict[MetricKey, dict[int, int]] = defaultdict(lambda: defaultdict(int))

    def enter(self, metric: Metric, unit: Unit, accepted: list[list[int]]) -> None:
        """Let a unit in with the accepted rewards of each stream of the metric, in order."""
        values = [
            folded(one.fields.folds_by, steps) for one, steps in zip(streams(metric), accepted, strict=True)
        ]
        for segment in unit.segments:
            key = (metric.key, unit.arm, unit.epoch, segment)
            if metric.kind is MetricKind.LATENCY:
                if accepted[0]:
                    self.histograms[key][histogram_bin(values[0])] += 1
            elif metric.folds_by is Aggregation.FIRST:
                # Of a count, every accepted reward is 1, or 0 if its value is.
                _add(self.events, key, (int(sum(accepted[0]) > 0), sum(accepted[0])))
            else:
                y, x = values[0], values[1] if metric.denominator else unit.covariate
                _add(self.moments, key, (1, y, y * y))
                if metric.denominator or metric.adjustment is not Adjustment.NONE:
                    _add(self.products, key, (x, x * x, x * y))


def _add(table: dict[MetricKey, tuple[int, ...]], key: MetricKey, numbers: tuple[int, ...]) -> None:
    table[key] = tuple(map(sum, zip(table.get(key, (0,) * len(numbers)), numbers, strict=True)))


def _accepted(hits: Hits, stream: Stream, unit: str) -> list[int]:
    """Return the accepted rewards of a unit and stream in steps, by event time, then offset."""
    ordered = sorted(hits.get((stream.name, unit), []), key=lambda hit: (hit.event_ms, hit.offset))
    return [hit.steps for hit in ordered if hit.steps is not None]


def folded(aggregation: Aggregation, accepted: Sequence[int]) -> int:
    """Return the value of a unit: its accepted rewards as one integer, 0 if there is none."""
    if not accepted:
        return 0
    if aggregation is Aggregation.SUM:
        return sum(accepted)
    if aggregation is Aggregation.LAST:
        return accepted[-1]
    return accepted[0] if aggregation is Aggregation.FIRST else max(accepted)


def histogram_bin(value: int) -> int:
    """Return the bin of a value: how many lower edges of bins, but for the first, are at or below it."""
    return bisect_right(_EDGES, value)


_EDGES = [*range(1, 64), *(edge for e in range(1, 36) for edge in range(32 << e, 64 << e, 1 << e))]
"""Lower edges of all bins but the first, up to the largest value."""


def _out_of_range(hits: Hits) -> dict[str, int]:
    refused: dict[str, int] = defaultdict(int)
    for ((metric, _), _), of_unit in hits.items():
        refused[metric] += sum(hit.steps is None for hit in of_unit)
    return refused


def _outcomes(fates: Mapping[int, Fate]) -> Outcomes:
    counts: dict[str, int] = defaultdict(int)
    for fate in fates.values():
        counts[fate.value] += 1
    return Outcomes(read=len(fates), **counts)
