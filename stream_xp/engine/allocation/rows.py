"""From the statistics of an experiment to the evidence of one metric."""

from __future__ import annotations

from collections.abc import Iterator

from stream_xp.domain.experiment import Aggregation, Metric, MetricKind
from stream_xp.domain.statistics import ALL, ExperimentStatistics
from stream_xp.engine.allocation.evidence import Conversions, Evidence, Sums, Values


def evidence_of(
    statistics: ExperimentStatistics, metric: Metric, *, arms: tuple[str, ...], feature: str | None = None
) -> list[Evidence]:
    """Rows of mature units per arm and weight epoch, and per value of a registered segment if one is named.

    Every arm has at least a row of 0 units, which says of what kind the metric is.

    Args:
        statistics: of all partitions together.
        metric: a conversion, a mean, or a count that is summed.
        arms: all arms of the spec.
        feature: name of a registered segment whose values are the contexts; they are disjoint and cover all units.

    Raises:
        ValueError: the metric has no mean of units' values: a ratio, a latency, a count of first events.
    """
    if metric.kind in {MetricKind.RATIO, MetricKind.LATENCY} or metric.folds_by is Aggregation.FIRST:
        raise ValueError(f"weights cannot follow {metric.key}: its evidence is no mean over units")
    empty = [Evidence(arm, _sums(metric, 0, 0, 0)) for arm in arms] if feature is None else []
    return [*empty, *_rows(statistics, metric, feature)]


def _rows(statistics: ExperimentStatistics, metric: Metric, feature: str | None) -> Iterator[Evidence]:
    for row in statistics.moments:
        if row.metric != metric.key:
            continue
        name, _, value = row.segment.partition("=")
        if row.segment == ALL if feature is None else (row.segment != ALL and name == feature):
            sums = _sums(metric, row.n, int(row.s), int(row.q))
            yield Evidence(row.arm, sums, row.epoch, value if feature is not None else "")


def _sums(metric: Metric, n: int, s: int, q: int) -> Sums:
    return Conversions(n, s) if metric.folds_by is Aggregation.ANY else Values(n, s, q, metric.step)
