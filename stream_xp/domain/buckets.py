"""Every bucket of the time since first exposure that has rows of its own: of effects by age, and of open units."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stream_xp.domain.ages import Bucket, age_buckets
from stream_xp.domain.delays import delay_buckets

if TYPE_CHECKING:
    from stream_xp.domain.experiment import ExperimentSpec, Metric


class Kept(NamedTuple):
    """A bucket of a metric.

    Attributes:
        beside: another bucket of the metric, whose value of the same unit makes a row of products with this one's.
    """

    metric: Metric
    bucket: Bucket
    beside: Bucket | None = None

    @property
    def name(self) -> str:
        """What stands as the metric in its rows."""
        return self.bucket.name(self.metric.key)


def kept_buckets(spec: ExperimentSpec) -> list[Kept]:
    """Those of `ages`, the last one beside the first; then those of `allocation.delay`, each beside the one before."""
    kept = []
    ends = None if spec.ages is None else spec.ages.buckets
    for metric, bucket in age_buckets(spec):
        kept.append(Kept(metric, bucket, ends[0] if ends is not None and bucket == ends[-1] else None))
    before = None
    for metric, bucket in delay_buckets(spec):
        kept.append(Kept(metric, bucket, before))
        before = bucket
    return kept


def bucket_rows(spec: ExperimentSpec) -> dict[str, Metric]:
    """The metric of each name that rows of a bucket have."""
    return {one.name: one.metric for one in kept_buckets(spec)}
