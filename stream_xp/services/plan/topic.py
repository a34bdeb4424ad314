"""Baselines from the topic: the control arm of this experiment so far, or of another with the same metrics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.domain.codec import decode_experiment
from stream_xp.domain.experiment import Aggregation, ExperimentRecord, ExperimentSpec, Metric, MetricKind
from stream_xp.domain.statistics import ALL, ExperimentStatistics, PartitionStatistics, merge
from stream_xp.errors import ConfigError
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.plan.baselines import Baseline, Known
from stream_xp.settings import Settings
from stream_xp.stats.log_histogram import lower_edge

MIN_UNITS = 100
"""Fewer units than this make no baseline."""


class Past(NamedTuple):
    """An experiment on the topics, with the newest statistics of its version."""

    spec: ExperimentSpec
    statistics: ExperimentStatistics


def read_baselines(
    settings: Settings, spec: ExperimentSpec, *, experiment: str | None = None
) -> dict[str, Known]:
    """Return the baselines of metrics that an experiment on the topics has too.

    Records that cannot be read are passed over, and the log says so.

    Args:
        settings: brokers and prefix.
        spec: the experiment that is planned.
        experiment: the one to read from; by default the one of the same name, and for metrics that it does not
            have, of all others the one with most units in the control.

    Raises:
        ConfigError: a topic is missing, or the experiment named is not there.
        DependencyError: a broker did not answer.
    """
    with PassedOver() as passed_over:
        pasts = join_pasts(_records(settings, passed_over), _statistics(settings, passed_over))
    if experiment is not None:
        pasts = [past for past in pasts if past.spec.experiment == experiment]
        if not pasts:
            raise ConfigError(f"{experiment}: no statistics on {settings.topic('stats')}; does a worker run?")
    return baselines_from(pasts, spec)


def join_pasts(
    records: Mapping[str, ExperimentRecord], statistics: Iterable[PartitionStatistics]
) -> list[Past]:
    """Experiments with their statistics merged over partitions; those of another design are left out."""
    ordered = sorted(statistics, key=lambda part: part.experiment)
    pasts = []
    for name, parts in itertools.groupby(ordered, key=lambda part: part.experiment):
        record = records.get(name)
        if record is None:
            continue
        mine = [part.statistics for part in parts if part.design_hash == record.design_hash]
        if mine:
            pasts.append(Past(record.spec, merge(mine)))
    return pasts


def baselines_from(pasts: Sequence[Past], spec: ExperimentSpec) -> dict[str, Known]:
    """Baselines of the metrics of `spec` that the experiments have, as `read_baselines` chooses them."""
    known = {}
    for metric in spec.metrics:
        found = [
            (past.spec.experiment == spec.experiment, *one)
            for past in pasts
            if (one := _baseline(past, metric)) is not None
        ]
        if found:
            known[metric.key] = max(found, key=lambda choice: choice[:2])[2]
    return known


def _records(settings: Settings, passed_over: PassedOver) -> dict[str, ExperimentRecord]:
    records: dict[str, ExperimentRecord] = {}
    with TopicReader(settings, settings.topic("experiments")) as reader:
        for record in reader.backlog():
            if record.key is None:
                passed_over.note("without a key", topic=record.topic, place=record.place)
                continue
            name = record.key.decode(errors="replace")
            if record.value is None:
                records.pop(name, None)
                continue
            try:
                records[name] = decode_experiment(name, record.value)
            except ConfigError as error:
                # For the worker too the last good one stays in force.
                passed_over.note(f"no {error}", topic=record.topic, place=record.place)
    return records


def _statistics(settings: Settings, passed_over: PassedOver) -> list[PartitionStatistics]:
    newest: dict[bytes, PartitionStatistics] = {}
    with TopicReader(settings, settings.topic("stats")) as reader:
        for record in reader.backlog():
            if record.key is None:
                passed_over.note("without a key", topic=record.topic, place=record.place)
                continue
            if record.value is None:
                newest.pop(record.key, None)
                continue
            part = passed_over.decoded(
                record.value, PartitionStatistics, topic=record.topic, place=record.place
            )
            if part is not None and (record.key not in newest or part.newer_than(newest[record.key])):
                newest[record.key] = part
    return list(newest.values())


# One metric -----------------------------------------------------------------------------------------


def _baseline(past: Past, metric: Metric) -> tuple[int, Known] | None:
    """Units and baseline of the control arm, or None where the experiment has no such metric or few units."""
    theirs = next((one for one in past.spec.metrics if one.key == metric.key), None)
    if theirs is None or theirs.kind is not metric.kind or theirs.folds_by is not metric.folds_by:
        return None
    find = _FINDERS.get(metric.kind, _of_moments)
    if metric.folds_by is Aggregation.FIRST and metric.kind is MetricKind.COUNT:
        find = _of_events
    units, baseline = find(past, theirs)
    if units < MIN_UNITS or not baseline.given():
        return None
    source = f"{past.spec.experiment} version {past.spec.version}, {units:,} units of {past.spec.control.key}"
    return units, Known(baseline, source, tuple(_differences(theirs, metric)))


def _differences(theirs: Metric, mine: Metric) -> Iterable[str]:
    if theirs.attribution_window != mine.attribution_window:
        yield f"the baseline has an attribution window of {theirs.attribution_window}"
    if theirs.listens_to != mine.listens_to:
        yield f"the baseline listens to {theirs.listens_to!r}"


def _of_moments(past: Past, metric: Metric) -> tuple[int, Baseline]:
    n, s, q = _sums(past, metric, past.statistics.moments, lambda row: (row.n, int(row.s), int(row.q)))
    if n < 2:
        return n, Baseline()
    correlation = _correlation(past, metric, n, s, q)
    mean, variance = _mean(n, s, metric.step), _covariance(n, s, s, q) * metric.step**2
    if metric.folds_by is Aggregation.ANY:
        return n, Baseline(rate=mean, correlation=correlation) if 0 < mean < 1 else Baseline()
    return n, Baseline(mean=mean, sd=math.sqrt(variance), correlation=correlation) if variance else Baseline()


def _correlation(past: Past, metric: Metric, n: int, s: int, q: int) -> float | None:
    x, xx, xy = _products(past, metric)
    spreads = _covariance(n, x, x, xx) * _covariance(n, s, s, q)
    if not spreads:
        return None
    return max(-0.999999, min(0.999999, _covariance(n, x, s, xy) / math.sqrt(spreads)))


def _of_ratio(past: Past, metric: Metric) -> tuple[int, Baseline]:
    n, s, q = _sums(past, metric, past.statistics.moments, lambda row: (row.n, int(row.s), int(row.q)))
    x, xx, xy = _products(past, metric)
    if n < 2 or not x or metric.denominator is None:
        return n, Baseline()
    step, below = metric.step, metric.denominator.step
    return n, Baseline(
        mean_m=_mean(n, s, step),
        mean_d=_mean(n, x, below),
        var_m=_covariance(n, s, s, q) * step**2,
        var_d=_covariance(n, x, x, xx) * below**2,
        cov_md=_covariance(n, x, s, xy) * step * below,
    )


def _of_events(past: Past, metric: Metric) -> tuple[int, Baseline]:
    with_event = sum(row.units for row in _rows(past, metric, past.statistics.events))
    units = sum(
        row.units for row in past.statistics.units if row.arm == past.spec.control.key and row.segment == ALL
    )
    return units, Baseline(share=with_event / units) if 0 < with_event < units else Baseline()


def _of_histogram(past: Past, metric: Metric) -> tuple[int, Baseline]:
    counts: dict[int, int] = {}
    for row in _rows(past, metric, past.statistics.histograms):
        for at, count in row.bins:
            counts[at] = counts.get(at, 0) + count
    total, below, quantiles = sum(counts.values()), 0, {}
    for at in sorted(counts):
        below += counts[at]
        if below < total:
            quantiles[below / total] = lower_edge(at + 1) * metric.step
    return total, Baseline(quantiles=quantiles) if len(quantiles) > 1 else Baseline()


_FINDERS: dict[MetricKind, Callable[[Past, Metric], tuple[int, Baseline]]] = {
    MetricKind.RATIO: _of_ratio,
    MetricKind.LATENCY: _of_histogram,
}


def _rows(past: Past, metric: Metric, rows: Iterable[Any]) -> list[Any]:
    """Rows of the control arm over all weight epochs: nothing is compared here, so that they may be pooled."""
    control = past.spec.control.key
    return [row for row in rows if (row.metric, row.arm, row.segment) == (metric.key, control, ALL)]


def _sums(
    past: Past, metric: Metric, rows: Iterable[Any], fields: Callable[[Any], tuple[int, ...]]
) -> tuple[int, ...]:
    found = [fields(row) for row in _rows(past, metric, rows)]
    return tuple(map(sum, zip(*found, strict=True))) if found else (0,) * 3


def _products(past: Past, metric: Metric) -> tuple[int, ...]:
    return _sums(past, metric, past.statistics.products, lambda row: (int(row.x), int(row.xx), int(row.xy)))


def _mean(n: int, s: int, step: float) -> float:
    return float(Fraction(s, n)) * step


def _covariance(n: int, s: int, t: int, st: int) -> float:
    """Sample covariance from sums, divisor n - 1, in squared steps."""
    return float(Fraction(n * st - s * t, n * (n - 1)))
