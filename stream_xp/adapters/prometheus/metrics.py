"""What a worker knows of itself, as series of `stream_xp.domain.metric_defs`.

The stages hand over values; series are only made when somebody asks. So an evaluation of a thousand experiments costs
a reference each, and what a scrape costs is bounded by the bound of series.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate, product

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from stream_xp import __version__
from stream_xp.adapters.prometheus.experiments import Entry, experiment_cells
from stream_xp.adapters.prometheus.families import Cells, empty_family, family, named
from stream_xp.domain.decision import Action
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.metric_defs import (
    BY_NAME,
    LABELS,
    OF_WORKERS,
    PREFIX,
    RESULTS,
    TOPICS,
    Kind,
    MetricDef,
    of_roles,
)
from stream_xp.domain.statistics import Outcomes
from stream_xp.domain.telemetry import BlockReport, ExperimentReport, PartitionReport, Telemetry
from stream_xp.domain.tracing import Delivery

_CONCLUSIONS = (Action.STOP, Action.SHIP)


class Metrics(Telemetry, Collector):
    """The series of one worker, in a registry of its own: several workers of one process do not meet.

    Stages tell it in the worker's thread, scrapes ask in others.

    Args:
        roles: of the worker.
        source_partitions: partitions that the source topics should have.
        max_series: bound of the series of experiments; see `experiment_cells`.
    """

    def __init__(self, roles: tuple[str, ...], *, source_partitions: int, max_series: int) -> None:
        self._lock = threading.Lock()
        self._roles = roles
        self._max_series = max_series
        # Of every role: a worker that does not decide evaluates nothing on its way out, and says so too.
        self._values: dict[str, Cells] = {one.name: dict(_closed(one)) for one in OF_WORKERS}
        self._buckets: dict[str, dict[tuple[str, ...], _Buckets]] = {
            one.name: {labels: _Buckets(one.buckets) for labels in _combinations(one)}
            for one in OF_WORKERS
            if one.kind is Kind.HISTOGRAM
        }
        self._highest: dict[int, dict[str, Outcomes]] = {}
        self._registered: dict[str, ExperimentRecord] = {}
        self._owned: frozenset[str] = frozenset()
        self._reports: dict[str, ExperimentReport] = {}
        self._exposures: Counter[tuple[str, str]] = Counter()
        self._set("build_info", 1, __version__)
        self._set("source_partitions", source_partitions)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # --- what the ingest stage tells ----------------------------------------------------------------------

    def registered(self, records: Sequence[ExperimentRecord], *, owned: Collection[str]) -> None:
        """Have series of these experiments and no others."""
        with self._lock:
            self._registered = {record.spec.experiment: record for record in records}
            self._owned = frozenset(owned)
            gone = {key for key in self._exposures if key[0] not in self._registered}
            for key in gone:
                del self._exposures[key]
            for experiment in self._reports.keys() - self._owned:
                del self._reports[experiment]

    def block_applied(self, report: BlockReport) -> None:
        """Count a block."""
        with self._lock:
            self._exposures.update(report.exposures)
            for reason, records in report.dead_letters.items():
                self._add("dead_letter_total", records, report.topic, reason)
            self._observe("event_lag_seconds", [lag / 1000 for lag in report.lags_ms], report.topic)

    def partition_flushed(self, report: PartitionReport) -> None:
        """Show where a partition stands."""
        at = str(report.partition)
        with self._lock:
            self._count_outcomes(report)
            for topic in TOPICS:
                self._set("applied_offset", report.applied[topic], topic, at)
                self._set_or_drop("lag_records", report.lags.get(topic), topic, at)
            self._set_or_drop("watermark_timestamp_seconds", _seconds(report.watermark_ms), at)
            self._set_or_drop("snapshot_timestamp_seconds", _seconds(report.covered_ms), at)
            self._set("units", report.units, at)
            self._set("rewards_waiting", report.outcomes["rewards"].waiting, at)

    def _count_outcomes(self, report: PartitionReport) -> None:
        """Add what is new since the last report; a partition that has just come had all of its records before.

        An outcome can fall, where an exposure becomes a crossover: then nothing is added before it is higher again.
        """
        held = self._highest.setdefault(report.partition, dict(report.outcomes))
        if held == report.outcomes:
            return
        for topic in TOPICS:
            for result in RESULTS:
                before, now = getattr(held[topic], result), getattr(report.outcomes[topic], result)
                self._add("events_total", max(0, now - before), topic, result)
        self._highest[report.partition] = {
            topic: _highest(held[topic], report.outcomes[topic]) for topic in TOPICS
        }

    def flushed(self, *, took_s: float, at_ms: int) -> None:
        """Count a flush."""
        with self._lock:
            self._observe("flush_seconds", [took_s])
            self._set("last_flush_timestamp_seconds", at_ms / 1000)

    def snapshot_written(self, *, took_s: float) -> None:
        """Count a snapshot."""
        with self._lock:
            self._observe("snapshot_seconds", [took_s])

    def hole_found(self, topic: str) -> None:
        """Count a hole."""
        with self._lock:
            self._add("holes_total", 1, topic)

    def partitions_left(self) -> None:
        """Forget every partition: another worker shows it now."""
        with self._lock:
            self._highest.clear()
            for name, cells in self._values.items():
                if "partition" in BY_NAME[name].labels:
                    cells.clear()

    # --- what the decide stage tells ----------------------------------------------------------------------

    def evaluated(self, *, took_s: float, at_ms: int, experiments: int) -> None:
        """Count an evaluation."""
        with self._lock:
            self._observe("evaluation_seconds", [took_s])
            self._set("last_evaluation_timestamp_seconds", at_ms / 1000)
            self._set("experiments", experiments)

    def experiments_evaluated(self, reports: Sequence[ExperimentReport]) -> None:
        """Show new results."""
        with self._lock:
            for report in reports:
                self._reports[report.result.experiment] = report

    def decided(self, action: Action, *, at_ms: int, first_exposure_ms: int | None) -> None:
        """Count a decision."""
        with self._lock:
            self._add("decisions_total", 1, action)
            self._set("last_decision_timestamp_seconds", at_ms / 1000)
            if first_exposure_ms is not None and action in _CONCLUSIONS:
                delay_s = max(0, at_ms - first_exposure_ms) / 1000
                self._observe("detection_delay_seconds", [delay_s], action)

    def experiments_left(self) -> None:
        """Forget every result: another worker shows them now."""
        with self._lock:
            self._reports.clear()
            self._owned = frozenset()
            self._set("experiments", 0)

    # --- what traces tell -------------------------------------------------------------------------------------

    def spans_ended(self, delivery: Delivery, spans: int) -> None:
        """Count spans."""
        with self._lock:
            self._add("trace_spans_total", spans, delivery)

    # --- what a scrape gets -----------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """Every series, as it stands now."""
        with self._lock:
            values = {name: dict(cells) for name, cells in self._values.items()}
            buckets = {
                name: {at: b.copy() for at, b in cells.items()} for name, cells in self._buckets.items()
            }
            entries = self._entries()
            exposures = dict(self._exposures)
        found, beyond = experiment_cells(entries, exposures, roles=self._roles, max_series=self._max_series)
        values[PREFIX + "overflow_experiments"] = {(): float(beyond)}
        for definition in of_roles(self._roles):
            if definition.kind is Kind.HISTOGRAM:
                yield _histogram(definition, buckets[definition.name])
            else:
                yield family(definition, values[definition.name] | found.get(definition.name, {}))

    def describe(self) -> Iterable[Metric]:
        """Nothing: what is there is told by `collect`."""
        return ()

    def _entries(self) -> list[Entry]:
        return [
            Entry(record, self._reports.get(experiment), owned=experiment in self._owned)
            for experiment, record in self._registered.items()
        ]

    # --- cells ------------------------------------------------------------------------------------------------

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._values[PREFIX + name][labels] = float(value)

    def _set_or_drop(self, name: str, value: float | None, *labels: str) -> None:
        if value is None:
            self._values[PREFIX + name].pop(labels, None)
        else:
            self._set(name, value, *labels)

    def _add(self, name: str, value: float, *labels: str) -> None:
        self._values[PREFIX + name][labels] += value

    def _observe(self, name: str, values: Iterable[float], *labels: str) -> None:
        held = self._buckets[PREFIX + name][labels]
        for value in values:
            held.observe(value)


class _Buckets:
    """The counts of a histogram: of each bucket alone, the last one without an upper bound, and the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        # A bucket holds what is at or below its bound.
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> _Buckets:
        other = _Buckets(self.bounds)
        other.counts, other.total = list(self.counts), self.total
        return other


def _histogram(definition: MetricDef, held: dict[tuple[str, ...], _Buckets]) -> Metric:
    metric = empty_family(definition)
    bounds = [*(repr(bound) for bound in definition.buckets), "+Inf"]
    for labels, one in held.items():
        given = named(definition, labels)
        for bound, count in zip(bounds, accumulate(one.counts), strict=True):
            metric.add_sample(definition.name + "_bucket", {**given, "le": bound}, count)
        metric.add_sample(definition.name + "_count", given, sum(one.counts))
        metric.add_sample(definition.name + "_sum", given, one.total)
    return metric


def _combinations(definition: MetricDef) -> list[tuple[str, ...]]:
    """Every combination of labels whose values are known beforehand; none where one is not."""
    if definition.name == PREFIX + "detection_delay_seconds":
        return [(action,) for action in _CONCLUSIONS]
    values = [LABELS[label].values for label in definition.labels]
    return [tuple(one) for one in product(*(known or () for known in values))]


def _closed(definition: MetricDef) -> Iterator[tuple[tuple[str, ...], float]]:
    """The series that exist from the start: counters with closed labels, at 0.

    A gauge has none before it has a value: 0 would be a time in 1970, or an offset that was never applied.
    """
    if definition.kind is Kind.COUNTER:
        for labels in _combinations(definition):
            yield labels, 0.0
    elif definition.name == PREFIX + "experiments":
        yield (), 0.0


def _highest(held: Outcomes, now: Outcomes) -> Outcomes:
    return Outcomes(
        **{name: max(getattr(held, name), getattr(now, name)) for name in Outcomes.__struct_fields__}
    )


def _seconds(at_ms: int | None) -> float | None:
    return None if at_ms is None else at_ms / 1000
