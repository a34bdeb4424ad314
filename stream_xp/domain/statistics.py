"""Sufficient statistics of one experiment: exact, mergeable, with one canonical form in bytes."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import msgspec

SCHEMA = 1
ALL = ""
"""The segment that holds every unit."""


class ArmUnits(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Units exposed to an arm in a weight epoch and segment, crossovers taken out.

    `settled` are those of them whose first exposure nothing admissible can precede any more; 0 from workers that did
    not say so yet.
    """

    arm: str
    epoch: int
    segment: str
    units: int
    settled: int = 0


class MetricMoments(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Count, sum and sum of squares of the quantised values of mature units.

    `s` and `q` are decimal strings, because they may exceed what a JSON number holds.
    """

    metric: str
    arm: str
    epoch: int
    segment: str
    n: int
    s: str
    q: str


class MetricProducts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Sums over the units of the moments row of the same key, with a second value `x` of each unit beside its `y`.

    Of a ratio, `x` is the denominator and `y` the numerator; of an adjusted metric, `x` is the covariate. The
    sums of x, x * x and x * y are decimal strings, as those of the moments are.
    """

    metric: str
    arm: str
    epoch: int
    segment: str
    x: str
    xx: str
    xy: str


class MetricEvents(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Units with at least one event in their window, and all these events: a count that folds by first."""

    metric: str
    arm: str
    epoch: int
    segment: str
    units: int
    events: int


class MetricHistogram(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Units of a latency per bin of their quantised value: (bin, units), ascending, empty bins left out."""

    metric: str
    arm: str
    epoch: int
    segment: str
    bins: tuple[tuple[int, int], ...]


class ExperimentStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """All that any test of the experiment needs; a commutative monoid under `merge`.

    Rows are sorted by their key and rows of zeros are left out, so equal statistics have equal bytes.

    Attributes:
        units: per (arm, epoch, segment), units at their first exposure, and how many of them are settled.
        moments: per (metric, arm, epoch, segment), mature units; of a ratio, its numerator.
        products: of ratios and adjusted metrics, a row for each row of moments.
        events: of counts that fold by first, per (metric, arm, epoch, segment).
        histograms: of latencies, per (metric, arm, epoch, segment).
        crossover_units: units seen in two arms; their contributions are in no row.
        first_exposure_ms: earliest event time of an exposure, None before the first.
        out_of_range: rewards refused by a metric's bound, per metric key.
        over_limit: exposures refused because a partition had as many units as it takes. If there is one, the
            units are not those that were exposed, and nothing may ship on them.
    """

    units: tuple[ArmUnits, ...] = ()
    moments: tuple[MetricMoments, ...] = ()
    products: tuple[MetricProducts, ...] = ()
    events: tuple[MetricEvents, ...] = ()
    histograms: tuple[MetricHistogram, ...] = ()
    crossover_units: int = 0
    first_exposure_ms: int | None = None
    out_of_range: dict[str, int] = {}
    over_limit: int = 0

    def canonical(self) -> bytes:
        """The one encoding of these statistics; equality of statistics is equality of these bytes."""
        return msgspec.json.encode(self, order="deterministic")

    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hexadecimal."""
        return hashlib.sha256(self.canonical()).hexdigest()


UnitKey: TypeAlias = tuple[str, int, str]
"""Arm, weight epoch and segment."""
MetricKey: TypeAlias = tuple[str, str, int, str]
"""Metric, arm, weight epoch and segment."""
_Table: TypeAlias = dict[MetricKey, tuple[int, ...]]


def merge(parts: Iterable[ExperimentStatistics]) -> ExperimentStatistics:
    """Sum of statistics of disjoint units, such as the partitions of one experiment."""
    units: Counter[UnitKey] = Counter()
    settled: Counter[UnitKey] = Counter()
    out_of_range: Counter[str] = Counter()
    histograms: dict[MetricKey, Counter[int]] = {}
    moments: _Table = {}
    products: _Table = {}
    events: _Table = {}
    crossover_units = 0
    over_limit = 0
    firsts: list[int] = []
    for part in parts:
        for row in part.units:
            units[row.arm, row.epoch, row.segment] += row.units
            settled[row.arm, row.epoch, row.segment] += row.settled
        for cell in part.moments:
            _add(moments, _key(cell), cell.n, int(cell.s), int(cell.q))
        for pair in part.products:
            _add(products, _key(pair), int(pair.x), int(pair.xx), int(pair.xy))
        for count in part.events:
            _add(events, _key(count), count.units, count.events)
        for histogram in part.histograms:
            histograms.setdefault(_key(histogram), Counter()).update(dict(histogram.bins))
        out_of_range.update(part.out_of_range)
        crossover_units += part.crossover_units
        over_limit += part.over_limit
        if part.first_exposure_ms is not None:
            firsts.append(part.first_exposure_ms)
    return build(
        units=units,
        settled=settled,
        moments=moments,
        products=products,
        events=events,
        histograms=histograms,
        crossover_units=crossover_units,
        first_exposure_ms=min(firsts, default=None),
        out_of_range=out_of_range,
        over_limit=over_limit,
    )


def _key(row: MetricMoments | MetricProducts | MetricEvents | MetricHistogram) -> MetricKey:
    return (row.metric, row.arm, row.epoch, row.segment)


def _add(table: _Table, key: MetricKey, *numbers: int) -> None:
    held = table.get(key)
    table[key] = numbers if held is None else tuple(map(operator.add, held, numbers))


def build(
    *,
    units: Mapping[UnitKey, int],
    settled: Mapping[UnitKey, int] | None = None,
    moments: Mapping[MetricKey, tuple[int, ...]],
    products: Mapping[MetricKey, tuple[int, ...]] | None = None,
    events: Mapping[MetricKey, tuple[int, ...]] | None = None,
    histograms: Mapping[MetricKey, Mapping[int, int]] | None = None,
    crossover_units: int,
    first_exposure_ms: int | None,
    out_of_range: Mapping[str, int],
    over_limit: int = 0,
) -> ExperimentStatistics:
    """Canonical statistics from tables.

    `settled` are the settled ones of `units`, all of them where it is None. A cell of `moments` is (n, s, q), of
    `products` (x, xx, xy), of `events` (units, events), of `histograms` units per bin. Products without moments of the
    same key are left out.
    """
    certain = units if settled is None else settled
    filled = {key: {at: n for at, n in sorted(bins.items()) if n} for key, bins in (histograms or {}).items()}
    return ExperimentStatistics(
        units=tuple(
            ArmUnits(*key, count, certain.get(key, 0)) for key, count in sorted(units.items()) if count
        ),
        moments=tuple(
            MetricMoments(*key, n, str(s), str(q)) for key, (n, s, q) in sorted(moments.items()) if n
        ),
        products=tuple(
            MetricProducts(*key, str(x), str(xx), str(xy))
            for key, (x, xx, xy) in sorted((products or {}).items())
            if moments.get(key, (0,))[0]
        ),
        events=tuple(
            MetricEvents(*key, count, total)
            for key, (count, total) in sorted((events or {}).items())
            if total
        ),
        histograms=tuple(
            MetricHistogram(*key, tuple(bins.items())) for key, bins in sorted(filled.items()) if bins
        ),
        crossover_units=crossover_units,
        first_exposure_ms=first_exposure_ms,
        out_of_range={metric: count for metric, count in sorted(out_of_range.items()) if count},
        over_limit=over_limit,
    )


class Outcomes(msgspec.Struct, frozen=True, kw_only=True):
    """What became of every record of one source partition; `read` is the sum of all the others.

    Attributes:
        read: records read.
        counted: an exposure of a unit in one arm; a reward that reached an exposed unit's window.
        duplicate: same source and id as an earlier record.
        late: broker append time minus event time over the allowed lateness.
        unattributed: a reward that met no exposure, or none whose window holds it.
        unknown_experiment: names an experiment that has no spec in force.
        inactive_experiment: names an archived experiment, or an older version of one.
        crossover: an exposure of a unit seen in two arms.
        dead_lettered: malformed, kept on the dead-letter topic with its reason.
        waiting: a reward whose exposure may still come.
        over_limit: an exposure of a new unit, where the partition had as many of the experiment as it takes.
    """

    read: int = msgspec.field(default=0, name="in")
    counted: int = 0
    duplicate: int = 0
    late: int = 0
    unattributed: int = 0
    unknown_experiment: int = 0
    inactive_experiment: int = 0
    crossover: int = 0
    dead_lettered: int = 0
    waiting: int = 0
    over_limit: int = 0

    def conserved(self) -> bool:
        """Whether every record read has exactly one outcome."""
        rest = sum(getattr(self, field) for field in self.__struct_fields__ if field != "read")
        return bool(self.read == rest)


def add_outcomes(parts: Iterable[Outcomes]) -> Outcomes:
    """Sum of outcomes over partitions or topics."""
    listed = list(parts)
    return Outcomes(
        **{name: sum(getattr(part, name) for part in listed) for name in Outcomes.__struct_fields__}
    )


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far one source topic's partition has been applied; offsets are inclusive, None before the first."""

    first_offset: int | None = None
    applied_offset: int | None = None

    @property
    def next_offset(self) -> int | None:
        """The offset to read next."""
        return None if self.applied_offset is None else self.applied_offset + 1


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a worker on which the outcome of a record depends, beside the allowed lateness.

    Attributes:
        activation_delay_ms: append time from which a spec governs, after its own append time.
        future_tolerance_ms: event time minus append time over which an event is dead-lettered.
        max_record_bytes: longest record that is decoded.
        max_units: units of one experiment version that a partition takes; None from workers without a bound.
    """

    activation_delay_ms: int
    future_tolerance_ms: int
    max_record_bytes: int
    max_units: int | None = None


class PartitionStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A record of ``xp.stats``: one experiment in one source partition, whole and cumulative.

    It replaces every earlier record under its key; `newer_than` orders them.

    Attributes:
        exposures, rewards: the prefix of each source topic these statistics are a function of.
        watermark_ms: units with t0 + window + lateness at or below it are mature; None before the first record.
        allowed_lateness_ms: the lateness in force.
        behind_watermark: offsets of records refused as late only because a quiet partition's watermark had
            been moved on by the clock; empty as long as the broker's clock and the worker's agree.
        outcomes: of exposures and rewards of the whole partition, all experiments.
        rules: the worker's; None from workers that did not say so yet.
    """

    experiment: str
    version: int
    design_hash: str
    partition: int
    exposures: Progress
    rewards: Progress
    watermark_ms: int | None
    allowed_lateness_ms: int
    statistics: ExperimentStatistics
    exposure_outcomes: Outcomes
    reward_outcomes: Outcomes
    behind_watermark: dict[str, tuple[int, ...]] = {}
    rules: Rules | None = None
    schema: int = SCHEMA

    def position(self) -> tuple[int, int, int]:
        """Orders the records of one key: version, records applied, watermark."""
        applied = sum(
            -1 if p.applied_offset is None else p.applied_offset for p in (self.exposures, self.rewards)
        )
        return (self.version, applied, -1 if self.watermark_ms is None else self.watermark_ms)

    def newer_than(self, other: PartitionStatistics) -> bool:
        """Whether this record replaces `other`."""
        return self.position() > other.position()
