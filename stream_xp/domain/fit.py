"""Whether statistics are of the spec under whose name they stand.

Statistics come off a topic, and the tests take for granted that each metric has the rows of its kind. Rows of
another kind, arm or segment mean that somebody else wrote them. A weight epoch that the spec does not have is no such
sign: another worker can know of new weights first, and the evaluation says so.
"""

from __future__ import annotations

from stream_xp.domain.buckets import bucket_rows
from stream_xp.domain.experiment import Aggregation, ExperimentSpec, Metric, MetricKind
from stream_xp.domain.statistics import ExperimentStatistics

LARGEST_STEPS = 2**62
"""A unit's exact sum is smaller, in steps (docs/semantics.md)."""


def check_fit(statistics: ExperimentStatistics, spec: ExperimentSpec) -> None:
    """Raise ValueError where a row is of an arm, metric or segment that the spec does not have, or of another kind."""
    arms = {arm.key for arm in spec.arms}
    segments = {
        "",
        *(f"{name}={value}" for name in spec.segments for value in (*spec.segments[name], "other")),
    }
    metrics = {metric.key: metric for metric in spec.metrics} | bucket_rows(spec)
    for row in statistics.units:
        _check_place(row.arm, row.segment, arms, segments)
    for name in ("moments", "products", "events", "histograms"):
        for row in getattr(statistics, name):
            _check_place(row.arm, row.segment, arms, segments)
            metric = metrics.get(row.metric)
            if metric is None or name not in _tables(metric):
                raise ValueError(f"the spec has no metric with {name} of that name")
    _check_bins(statistics, metrics)
    _check_sums(statistics)


def _check_place(arm: str, segment: str, arms: set[str], segments: set[str]) -> None:
    if arm not in arms or segment not in segments:
        raise ValueError("a row is of an arm or a segment that the spec does not have")


def _tables(metric: Metric) -> tuple[str, ...]:
    """The tables of `ExperimentStatistics` that hold a metric."""
    if metric.kind is MetricKind.LATENCY:
        return ("histograms",)
    if metric.kind is MetricKind.COUNT and metric.folds_by is Aggregation.FIRST:
        return ("events",)
    return ("moments", "products")


def _check_bins(statistics: ExperimentStatistics, metrics: dict[str, Metric]) -> None:
    for row in statistics.histograms:
        bins = metrics[row.metric].bins
        if any(at >= bins for at, _ in row.bins):
            raise ValueError("a bin is past the last one of its metric")


def _check_sums(statistics: ExperimentStatistics) -> None:
    """The sums of n units, each within a unit's bound: more would not fit a floating-point number."""
    units = {(row.metric, row.arm, row.epoch, row.segment): row.n for row in statistics.moments}
    sums = [(row.n, int(row.s), int(row.q)) for row in statistics.moments]
    for pair in statistics.products:
        n = units.get((pair.metric, pair.arm, pair.epoch, pair.segment), 0)
        sums += [(n, int(pair.x), int(pair.xx)), (n, 0, abs(int(pair.xy)))]
    if any(abs(s) > n * LARGEST_STEPS or q > n * LARGEST_STEPS**2 for n, s, q in sums):
        raise ValueError("a sum is larger than its units can have")
