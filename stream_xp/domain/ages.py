"""Effects by age: how long after their first exposure units are, and the buckets in which their rewards are summed."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import msgspec

from stream_xp.domain.fields import Duration, Fault, Key, broken, duration_ms

if TYPE_CHECKING:
    from stream_xp.domain.experiment import ExperimentSpec, Metric

MOST_UNITS_OF_LENGTH: Final = 10_000
"""Largest length of the first and of the last bucket, in the largest unit that divides both: their products are sums
of squares, which must stay exact."""


class Ages(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Buckets of the time since a unit's first exposure, in which metrics are compared.

    The first bucket is [0, until[0]), the next one [until[0], until[1]), and so on; a reward is in the bucket that
    holds its event time minus the unit's first exposure, whatever the attribution window of its metric. Of the first
    and the last bucket it is tested whether their effects are the same.

    Attributes:
        metrics: keys of the metrics; each folds by sum or any.
        until: ends of the buckets, growing.
    """

    metrics: Annotated[tuple[Key, ...], msgspec.Meta(min_length=1, max_length=8)]
    until: Annotated[tuple[Duration, ...], msgspec.Meta(min_length=2, max_length=8)]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets, youngest first."""
        ends_ms = [duration_ms(end) for end in self.until]
        return tuple(Bucket(at, *span) for at, span in enumerate(itertools.pairwise([0, *ends_ms]), start=1))


class Bucket(NamedTuple):
    """A span of ages: from `from_ms` on, before `until_ms`; `number` counts from 1.

    Attributes:
        mark: between the metric's key and the number, in the names of rows; no key has an `@`.
    """

    number: int
    from_ms: int
    until_ms: int
    mark: str = "@age"

    @property
    def length_ms(self) -> int:
        """How long it is."""
        return self.until_ms - self.from_ms

    def name(self, metric: str) -> str:
        """What stands as the metric in the rows of statistics that hold this bucket of the metric `metric`."""
        return f"{metric}{self.mark}{self.number}"


def age_buckets(spec: ExperimentSpec) -> list[tuple[Metric, Bucket]]:
    """Every bucket of every metric that has some, metrics in the order of the section; empty without the section."""
    if spec.ages is None:
        return []
    known = {metric.key: metric for metric in spec.metrics}
    buckets = spec.ages.buckets
    # A metric that is not there is a fault of the spec, but what stands on a topic may be anybody's.
    return [(known[key], bucket) for key in spec.ages.metrics if key in known for bucket in buckets]


def lengths(first: Bucket, last: Bucket) -> tuple[int, int, int]:
    """The lengths of two buckets in the largest unit that divides both, and that unit (ms)."""
    unit_ms = math.gcd(first.length_ms, last.length_ms)
    return first.length_ms // unit_ms, last.length_ms // unit_ms, unit_ms


def age_faults(spec: ExperimentSpec) -> list[Fault]:
    """Every rule that the section `ages` breaks."""
    if spec.ages is None:
        return []
    return [*_end_faults(spec.ages), *_metric_faults(spec, spec.ages)]


def _end_faults(ages: Ages) -> list[Fault]:
    ends_ms = [duration_ms(end) for end in ages.until]
    faults = [
        Fault(("ages", "until", at), "must be longer than the one before, the first longer than 0")
        for at, (before, end) in enumerate(itertools.pairwise([0, *ends_ms]))
        if end <= before
    ]
    if faults:
        return faults
    early, late, _ = lengths(ages.buckets[0], ages.buckets[-1])
    rule = f"first and last bucket may be {MOST_UNITS_OF_LENGTH} times as long as a length that divides both"
    most = max(early, late)
    return [Fault(("ages", "until"), f"{rule}, they are {most}")] if most > MOST_UNITS_OF_LENGTH else []


def _metric_faults(spec: ExperimentSpec, ages: Ages) -> list[Fault]:
    known = {metric.key: metric for metric in spec.metrics}
    faults = []
    for at, key in enumerate(ages.metrics):
        metric = known.get(key)
        found = broken(
            (key in ages.metrics[:at], "", "is named twice"),
            (metric is None, "", "is no metric of the experiment"),
            (metric is not None and not _is_summed(metric), "", _KINDS),
            (metric is not None and metric.zero_or_one and not _even(ages), "", _EVEN),
        )
        faults += [Fault(("ages", "metrics", at), message) for _, message in found]
    return faults


_KINDS = "must be a conversion, a mean that folds by sum or any, or a count that folds by sum"
_EVEN = "folds by any, so the first and the last bucket must be equally long to be compared"


def _is_summed(metric: Metric) -> bool:
    return metric.zero_or_one or (metric.kind in ("mean", "count") and metric.folds_by == "sum")


def _even(ages: Ages) -> bool:
    return ages.buckets[0].length_ms == ages.buckets[-1].length_ms
