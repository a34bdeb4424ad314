"""The series of experiments, within a bound: what does not fit is added up under one label value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from stream_xp.adapters.prometheus.families import Cells
from stream_xp.domain.decision import Evidence, MetricResult, MonitorState, Result, SampleRatio
from stream_xp.domain.experiment import ExperimentRecord, Role
from stream_xp.domain.metric_defs import BY_NAME, OTHER, PREFIX, DecisionState, Overflow, series_of
from stream_xp.domain.telemetry import ExperimentReport

_Row: TypeAlias = tuple[str, tuple[str, ...], float]
"""Name of a metric without the prefix, its labels after the experiment, and the value."""
_FREE = frozenset({"arm", "metric"})
"""Labels whose values are an experiment's own."""


class Entry(NamedTuple):
    """One registered experiment: its newest record, its newest result here, and whether this worker decides on it."""

    record: ExperimentRecord
    report: ExperimentReport | None
    owned: bool


def experiment_cells(
    entries: Sequence[Entry],
    exposures: Mapping[tuple[str, str], int],
    *,
    roles: tuple[str, ...],
    max_series: int,
) -> tuple[dict[str, Cells], int]:
    """The series of all experiments, and how many experiments have none of their own.

    Experiments have their own in order of registration, as long as those that they can have at most fit into
    `max_series`. All others are added up under the label value `OTHER`, each metric as its definition says.
    """
    cells: dict[str, Cells] = {}
    left, beyond = max_series, 0
    for entry in entries:
        spec = entry.record.spec
        size = series_of(spec, roles)
        fits = size <= left
        left -= size if fits else 0
        beyond += not fits
        for name, labels, value in _rows(entry, exposures, roles):
            definition = BY_NAME[PREFIX + name]
            held = cells.setdefault(definition.name, {})
            if fits:
                held[spec.experiment, *labels] = float(value)
            else:
                closed = zip(definition.labels[1:], labels, strict=True)
                key = (OTHER, *(OTHER if label in _FREE else at for label, at in closed))
                _put(held, key, value, definition.overflow)
    return cells, beyond


_MERGED: dict[Overflow, Callable[[float, float], float]] = {
    Overflow.SUM: lambda a, b: a + b,
    Overflow.MAX: max,
    Overflow.MIN: min,
}


def _put(held: Cells, key: tuple[str, ...], value: float, overflow: Overflow | None) -> None:
    if overflow is None or overflow is Overflow.LEFT_OUT:
        return
    held[key] = _MERGED[overflow](held[key], value) if key in held else float(value)


def _rows(entry: Entry, exposures: Mapping[tuple[str, str], int], roles: tuple[str, ...]) -> Iterator[_Row]:
    """Every series of an experiment; what is not a finite number is left out."""
    if "ingest" in roles:
        experiment = entry.record.spec.experiment
        for arm in entry.record.spec.arms:
            yield "exposures_total", (arm.key,), exposures.get((experiment, arm.key), 0)
    if "decide" in roles and entry.owned:
        rows = _before_data(entry.record) if entry.report is None else _of_report(entry.report)
        yield from ((name, labels, value) for name, labels, value in rows if math.isfinite(value))


def _before_data(record: ExperimentRecord) -> Iterator[_Row]:
    """What is known of an experiment before its first result."""
    spec, epoch = record.spec, record.epochs[-1]
    yield from _state(DecisionState.NO_DATA)
    yield "experiment_version", (), spec.version
    yield "coverage_ratio", (), epoch.coverage
    yield "crossover_units", (), 0
    yield "srm_mismatch", (), 0
    yield "srm_log_evidence", (), 0.0
    for arm, weight in epoch.weights.items():
        yield "arm_weight_ratio", (arm,), weight
        yield "arm_units", (arm,), 0
    for metric in spec.with_role(Role.GUARDRAIL):
        for treatment in spec.treatments:
            yield "guardrail_breached", (metric.key, treatment.key), 0


def _of_report(report: ExperimentReport) -> Iterator[_Row]:
    result = report.result
    yield from _state(report.state)
    yield from _of_experiment(result)
    yield from _of_ratio(result.sample_ratio, mismatch=report.mismatch)
    for arm in result.arms:
        yield "arm_units", (arm.arm,), arm.units
    for metric in result.metrics:
        yield from _of_metric(metric, report)
    for monitor in result.monitors or ():
        for state in MonitorState:
            yield "monitor_state", (monitor.monitor, monitor.arm or "", state), monitor.state is state


def _state(found: DecisionState) -> Iterator[_Row]:
    for state in DecisionState:
        yield "decision_state", (state,), state is found


def _of_experiment(result: Result) -> Iterator[_Row]:
    yield "experiment_version", (), result.version
    yield "evaluated_timestamp_seconds", (), result.evaluated_ms / 1000
    yield "crossover_units", (), result.crossover_units
    watermarks = [part.watermark_ms for part in result.offsets.values()]
    known = [watermark for watermark in watermarks if watermark is not None]
    if known and len(known) == len(watermarks):
        yield "experiment_watermark_timestamp_seconds", (), min(known) / 1000
    if result.rollout is not None:
        yield "coverage_ratio", (), result.rollout.coverage
        for arm, weight in result.rollout.weights.items():
            yield "arm_weight_ratio", (arm,), weight


def _of_ratio(ratio: SampleRatio | None, *, mismatch: bool) -> Iterator[_Row]:
    yield "srm_mismatch", (), mismatch
    yield "srm_log_evidence", (), 0.0 if ratio is None else ratio.log_e
    if ratio is not None:
        yield "srm_log_evidence_threshold", (), ratio.threshold_log_e


def _of_metric(metric: MetricResult, report: ExperimentReport) -> Iterator[_Row]:
    at = (metric.metric, metric.arm)
    if metric.role == Role.GUARDRAIL:
        yield "guardrail_breached", at, at in report.breached
        yield from _of_harm(metric.harm, at)
    effect = metric.effect
    if effect is not None:
        yield "effect_log_evidence", at, effect.log_e
        bounds = (("effect", effect.estimate), ("effect_lower", effect.lower), ("effect_upper", effect.upper))
        yield from ((name, at, value) for name, value in bounds if value is not None)


def _of_harm(harm: Evidence | None, at: tuple[str, str]) -> Iterator[_Row]:
    if harm is not None:
        yield "guardrail_log_evidence", at, harm.log_e
        yield "guardrail_log_evidence_threshold", at, harm.threshold_log_e
