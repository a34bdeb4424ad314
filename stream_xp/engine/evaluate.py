"""From exact statistics to evidence: every test of many experiments at one look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import msgspec
import numpy as np

from stream_xp import stats
from stream_xp.domain.decision import (
    AgeResult,
    ArmResult,
    Evidence,
    Method,
    MetricResult,
    MetricState,
    MonitorResult,
    SampleRatio,
    SegmentRatio,
    SegmentResult,
    UniformEffect,
    UniformSlice,
)
from stream_xp.domain.experiment import OTHER, Direction, ExperimentRecord, ExperimentSpec, Metric, Role
from stream_xp.domain.rollout import Monitors
from stream_xp.domain.statistics import ALL, ExperimentStatistics, UnitKey
from stream_xp.engine.ages import age_results
from stream_xp.engine.comparison import (
    UNTESTABLE,
    Cell,
    Comparison,
    Finder,
    Finding,
    cells,
    comparisons,
    found_all,
    grouped,
    nothing_found,
    planned_comparisons,
)
from stream_xp.engine.mean_findings import mean_findings
from stream_xp.engine.quantile_findings import quantile_findings
from stream_xp.engine.rate_findings import rate_findings
from stream_xp.engine.uniform import uniform_look, uniform_plans

_MOST_NAMED = 5
"""Segment values in the diagnosis of a sample ratio."""
SUSPECTED = "sample-ratio mismatch, not proven on settled units yet"
"""Why nothing ships while arms may only be counted at different times."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All evidence at one look.

    Attributes:
        segments: effects inside segments; they inform and never decide.
        invalid: why nothing may ship on it; empty when all is well.
        monitors: what is watched beside metrics (`engine.monitors`); None where nobody does.
        ages: effects by age; they inform and never decide.
        uniform_slice: the uniform slice alone; it informs and never decides. None where nobody tells who is in it.
    """

    arms: tuple[ArmResult, ...]
    metrics: tuple[MetricResult, ...]
    sample_ratio: SampleRatio | None
    invalid: tuple[str, ...]
    segments: tuple[SegmentResult, ...] = ()
    monitors: tuple[MonitorResult, ...] | None = None
    ages: tuple[AgeResult, ...] = ()
    uniform_slice: UniformSlice | None = None


Look = tuple[ExperimentRecord, ExperimentStatistics]
"""An experiment and what is known of it."""


def evaluate(record: ExperimentRecord, statistics: ExperimentStatistics) -> Evaluation:
    """Test every metric in every treatment arm, and the sample ratio; `evaluate_all` for one experiment."""
    (evaluation,) = evaluate_all([(record, statistics)])
    return evaluation


def evaluate_all(looks: Sequence[Look]) -> list[Evaluation]:
    """Test every metric in every treatment arm of every experiment, and their sample ratios.

    Methods, levels and tunings come from the specs alone (`engine.design`). Comparisons of one method are tested
    together as arrays, across experiments; what is found of one experiment does not depend on the others.

    Statistics may be ahead of the record by a weight epoch. Asymptotic tests use its units, because the comparison
    inside an epoch needs no weights; exact tests and the sample ratio cannot, so the experiment is invalid until
    the record is here.
    """
    batches = [comparisons(record, statistics) for record, statistics in looks]
    findings = iter(_findings([comparison for batch in batches for comparison in batch]))
    ratios = _sample_ratios(looks)
    found = [
        _evaluation(look, batch, list(islice(findings, len(batch))), ratio)
        for look, batch, ratio in zip(looks, batches, ratios, strict=True)
    ]
    beside = zip(found, age_results(looks), _uniform_slices(looks), strict=True)
    return [replace(one, ages=by_age, uniform_slice=uniform) for one, by_age, uniform in beside]


_FINDERS: dict[Method, Finder] = {
    Method.EXACT_THEN_ASYMPTOTIC: mean_findings,
    Method.ASYMPTOTIC: mean_findings,
    Method.CUPED: mean_findings,
    Method.ANCOVA: mean_findings,
    Method.RATIO: mean_findings,
    Method.RATE_RATIO: rate_findings,
    Method.QUANTILE: quantile_findings,
}


def _findings(batch: Sequence[Comparison]) -> list[Finding]:
    findings: list[Any] = [None] * len(batch)
    groups = grouped(batch, lambda one: (one.plan.fault, one.plan.method, len(one.strata)))
    for (fault, method, _), members in groups.items():
        finder = _FINDERS[method] if fault is None else _refuse
        of_group = found_all([batch[at] for at in members], finder)
        for at, finding in zip(members, of_group, strict=True):
            findings[at] = finding
    return findings


def _refuse(batch: Sequence[Comparison]) -> list[Finding]:
    return [nothing_found(comparison, f"{UNTESTABLE}: {comparison.plan.fault}") for comparison in batch]


def _evaluation(
    look: Look,
    batch: Sequence[Comparison],
    findings: Sequence[Finding],
    ratio: SampleRatio | None,
) -> Evaluation:
    record, statistics = look
    metrics = tuple([_metric_result(c, f) for c, f in zip(batch, findings, strict=True) if c.segment == ALL])
    arms = _arm_results(record, statistics)
    invalid = [
        *_sample_ratio_faults(ratio),
        *_crossover_faults(record.spec, arms, statistics.crossover_units),
        *_limit_faults(statistics),
        *_place_faults(record, statistics),
        *_untestable(metrics),
    ]
    segments = [_segment_result(c, f) for c, f in zip(batch, findings, strict=True) if c.segment != ALL]
    return Evaluation(arms, metrics, ratio, tuple(invalid), tuple(segments))


# --- metrics -------------------------------------------------------------------------------------------


def _metric_result(comparison: Comparison, finding: Finding) -> MetricResult:
    plan = comparison.plan
    metric, state = plan.metric, _state(plan.metric, finding)
    found = msgspec.structs.astuple(finding)
    return MetricResult(metric.key, metric.role, comparison.arm, state, plan.method, *found)


def _segment_result(comparison: Comparison, finding: Finding) -> SegmentResult:
    return SegmentResult(
        metric=comparison.plan.metric.key,
        arm=comparison.arm,
        segment=comparison.segment,
        control_units=finding.control_units,
        arm_units=finding.arm_units,
        effect=finding.effect,
        standard_error=finding.standard_error,
    )


def _uniform_slices(looks: Sequence[Look]) -> list[UniformSlice | None]:
    """What the uniform slice of each experiment says; None of those whose exposures do not tell it."""
    slices = [uniform_look(*look) for look in looks]
    told = [(look[0], one) for look, one in zip(looks, slices, strict=True) if one is not None]
    batches = [planned_comparisons(*one, uniform_plans(record)) for record, one in told]
    findings = iter(_findings([comparison for batch in batches for comparison in batch]))
    ratios = _sample_ratios([one for _, one in told])
    found = iter(
        [
            UniformSlice(
                share=record.spec.allocation.uniform_slice if record.spec.allocation else 0.0,
                arms=_arm_results(*one),
                sample_ratio=ratio,
                effects=tuple(map(_uniform_effect, batch, islice(findings, len(batch)))),
            )
            for (record, one), batch, ratio in zip(told, batches, ratios, strict=True)
        ]
    )
    return [None if one is None else next(found) for one in slices]


def _uniform_effect(comparison: Comparison, finding: Finding) -> UniformEffect:
    return UniformEffect(
        metric=comparison.plan.metric.key,
        arm=comparison.arm,
        control_units=finding.control_units,
        arm_units=finding.arm_units,
        control_mean=finding.control_mean,
        arm_mean=finding.arm_mean,
        effect=finding.effect,
        note=finding.note,
    )


def _state(metric: Metric, finding: Finding) -> MetricState:
    if finding.harm is not None and proven(finding.harm):
        return MetricState.HARMED
    if finding.safety is not None and proven(finding.safety):
        return MetricState.SAFE
    proofs = [effect for effect in _effects(finding) if proven(effect)]
    if not proofs or metric.role is Role.GUARDRAIL:
        # With a note only an exact test has begun, and has not proven anything.
        return _UNDETERMINED if finding.effect is None or finding.note is not None else _INCONCLUSIVE
    # A latency that is better at one quantile and worse at another is worse: nobody asked for that trade.
    good = 1 if metric.direction is Direction.INCREASE else -1
    return MetricState.BETTER if all(_sign(effect) == good for effect in proofs) else MetricState.WORSE


# What most metrics are: a member of an enumeration is a slow thing to look up.
_UNDETERMINED, _INCONCLUSIVE = MetricState.UNDETERMINED, MetricState.INCONCLUSIVE


def _effects(finding: Finding) -> list[Evidence]:
    if finding.quantiles:
        return [quantile.effect for quantile in finding.quantiles]
    return [] if finding.effect is None else [finding.effect]


def _sign(effect: Evidence) -> int:
    """The side of 0 that the sequence has left; the estimate's where it has only one bound."""
    if effect.lower is not None and effect.lower >= 0:
        return 1
    return -1 if effect.upper is not None and effect.upper <= 0 else 1 if (effect.estimate or 0.0) > 0 else -1


def proven(evidence: Evidence) -> bool:
    """Whether the null hypothesis is rejected."""
    return evidence.log_e >= evidence.threshold_log_e


# --- units ---------------------------------------------------------------------------------------------


Counts: TypeAlias = dict[UnitKey, int]
"""Units by arm, epoch and segment."""


def unit_counts(statistics: ExperimentStatistics) -> Counts:
    """Units exposed, by their key."""
    return {(row.arm, row.epoch, row.segment): row.units for row in statistics.units}


def _arm_results(record: ExperimentRecord, statistics: ExperimentStatistics) -> tuple[ArmResult, ...]:
    units = {arm.key: 0 for arm in record.spec.arms}
    totals: dict[tuple[int, str], int] = {}
    for row in statistics.units:
        totals[row.epoch, row.segment] = totals.get((row.epoch, row.segment), 0) + row.units
        if row.segment == ALL and row.arm in units:
            units[row.arm] += row.units
    spread = [(totals.get((cell.epoch, cell.segment), 0), cell.weights or {}) for cell in cells(record)]
    return tuple(
        ArmResult(
            arm=arm,
            units=of_arm,
            expected_units=math.fsum(total * weights.get(arm, 0.0) for total, weights in spread),
        )
        for arm, of_arm in units.items()
    )


def _sample_ratios(looks: Sequence[Look]) -> list[SampleRatio | None]:
    """The tilt-mixture test over all weight epochs of each experiment; None while no unit was exposed.

    It is tested on settled units, and on all that are counted. Arms that are counted at different times differ in
    the latter at every moment, though they have the right shares: such evidence holds, and only that of settled
    units stops.
    """
    settled = [(record, _settled_counts(statistics)) for record, statistics in looks]
    counted = [(record, unit_counts(statistics)) for record, statistics in looks]
    log_e = _sample_ratio_log_e([*settled, *counted])
    return [
        _sample_ratio(record, of_settled, of_counted, log_e=(on_settled, on_counted))
        for (record, of_settled), (_, of_counted), on_settled, on_counted in zip(
            settled, counted, log_e[: len(looks)], log_e[len(looks) :], strict=True
        )
    ]


def _settled_counts(statistics: ExperimentStatistics) -> Counts:
    return {(row.arm, row.epoch, row.segment): row.settled for row in statistics.units}


def _sample_ratio_log_e(asked: Sequence[tuple[ExperimentRecord, Counts]]) -> list[float]:
    """The log e-value of each experiment's counts, tested together as arrays.

    Where the weights of an epoch depend on a context, each of its values is as an epoch of its own. Coverage has no
    part in it: who does not take part is not exposed. An arm of weight 0 has no place in its multinomial: units
    there are a mismatch in themselves, with no e-value, so that `log_e` can then lie below the threshold.
    """
    log_e = np.full(len(asked), -np.inf)
    shapes: dict[tuple[int, int], list[tuple[int, float, _Table]]] = {}
    for at, (record, counts) in enumerate(asked):
        for log_share, part in _parts(record, counted_by(record.spec, cells(record), counts)):
            shapes.setdefault((len(part[0]), len(part[0][0])), []).append((at, log_share, part))
    for members in shapes.values():
        counts_of = np.array([rows for _, _, (rows, _) in members], np.int64)
        found = stats.sample_ratio_log_e(counts_of, np.array([weights for _, _, (_, weights) in members]))
        for (at, log_share, _), one in zip(members, found, strict=True):
            log_e[at] = np.logaddexp(log_e[at], log_share + one)
    return [float(one) for one in log_e]


_Table: TypeAlias = tuple[list[list[int]], list[list[float]]]
"""Units, and weights, by cell and arm."""


def _parts(record: ExperimentRecord, table: _Table) -> list[tuple[float, _Table]]:
    """The tables that are tested, each with the logarithm of its share of the mixture.

    All cells together find an arm that gets too few everywhere. Who draws every unit with the same weights where they
    depend on a context errs one way here and the other there; so half of the mixture looks at each value by itself,
    from the first look of a contextual policy on.
    """
    values = record.spec.context_segments
    if not values:
        return [(0.0, table)]
    known = cells(record)
    nothing: _Table = ([[0] * len(table[0][0])], [table[1][0]])
    parts = [(math.log(0.5), table)]
    for value in values:
        mine = [at for at, cell in enumerate(known) if cell.segment == value]
        part = ([table[0][at] for at in mine], [table[1][at] for at in mine]) if mine else nothing
        parts.append((math.log(0.5 / len(values)), part))
    return parts


def counted_by(spec: ExperimentSpec, places: Sequence[Cell], counts: Counts) -> _Table:
    """Counts per cell and arm, in the order of the file, without those in arms of weight 0, and the weights."""
    arms = [arm.key for arm in spec.arms]
    weights = [[(cell.weights or {}).get(arm, 0.0) for arm in arms] for cell in places]
    rows = [
        [
            counts.get((arm, cell.epoch, cell.segment), 0) if weight > 0 else 0
            for arm, weight in zip(arms, row, strict=True)
        ]
        for cell, row in zip(places, weights, strict=True)
    ]
    return rows, weights


def _sample_ratio(
    record: ExperimentRecord, settled: Counts, counted: Counts, *, log_e: tuple[float, float]
) -> SampleRatio | None:
    """What follows from the log e-values of settled units and of all that are counted."""
    if not _are_exposed(record, counted):
        return None
    threshold = -math.log(record.spec.sample_ratio_alpha)
    proven_on = [
        one >= threshold or _stray_units(record, counts)
        for one, counts in zip(log_e, (settled, counted), strict=True)
    ]
    mismatch = proven_on[0]
    suspected = proven_on[1] and not mismatch
    return SampleRatio(
        log_e=log_e[0],
        p_always_valid=stats.p_always_valid(log_e[0]),
        threshold_log_e=threshold,
        mismatch=mismatch,
        diagnosis=_diagnosis(record, counted if suspected else settled) if mismatch or suspected else (),
        counted_log_e=log_e[1],
        suspected=suspected,
    )


def _are_exposed(record: ExperimentRecord, counted: Counts) -> bool:
    """Whether there are units in a place that the record knows."""
    places = {(arm.key, cell.epoch, cell.segment) for cell in cells(record) for arm in record.spec.arms}
    return any(units > 0 and key in places for key, units in counted.items())


def _diagnosis(record: ExperimentRecord, counts: Counts) -> tuple[SegmentRatio, ...]:
    """The segment values that deviate most; a context's value is held against the weights of its own."""
    spec, known = record.spec, cells(record)
    labels = [
        f"{name}={value}"
        for name, values in spec.segments.items()
        if name != spec.uniform_segment
        for value in (*values, OTHER)
    ]
    threshold = math.log(max(1, len(labels)) / spec.sample_ratio_alpha)
    found = []
    for label in labels:
        # Where the weights depend on another segment, those of this value's units are not known.
        places = [cell._replace(segment=label) for cell in known if cell.segment in (ALL, label)]
        rows, weights = counted_by(spec, places, counts)
        units = sum(map(sum, rows))
        if units:
            log_e = float(stats.sample_ratio_log_e(np.array(rows, np.int64), np.array(weights)))
            found.append(SegmentRatio(segment=label, units=units, log_e=log_e, threshold_log_e=threshold))
    return tuple(sorted(found, key=lambda one: (-one.log_e, one.segment))[:_MOST_NAMED])


def _stray_units(record: ExperimentRecord, counts: Counts) -> bool:
    """Whether an arm of weight 0 got units: an arm at 0 can get none by chance."""
    return any(
        counts.get((arm.key, cell.epoch, cell.segment), 0) > 0
        and (cell.weights or {}).get(arm.key, 0.0) == 0.0
        for cell in cells(record)
        for arm in record.spec.arms
    )


# --- what makes an experiment invalid --------------------------------------------------------------------


def _sample_ratio_faults(ratio: SampleRatio | None) -> list[str]:
    if ratio is None or not (ratio.mismatch or ratio.suspected):
        return []
    return ["sample-ratio mismatch" if ratio.mismatch else SUSPECTED]


def _crossover_faults(spec: ExperimentSpec, arms: Sequence[ArmResult], crossovers: int) -> list[str]:
    """More crossovers than their share of the spec, proven or not; `engine.monitors` has the proof."""
    units = sum(arm.units for arm in arms)
    share = (spec.monitors or Monitors()).crossovers
    faults = []
    if crossovers > share * (units + crossovers):
        faults.append(f"{crossovers} units were seen in two arms, more than {100 * share:.4g} %")
    if units == 0:
        faults.append("no data")
    return faults


def _limit_faults(statistics: ExperimentStatistics) -> list[str]:
    """Units that were not taken: those that were are a part, and the experiment does not go on."""
    if not statistics.over_limit:
        return []
    return [f"the most units that a partition takes were reached, {statistics.over_limit} exposures refused"]


def _place_faults(record: ExperimentRecord, statistics: ExperimentStatistics) -> list[str]:
    """Units that the record has no place for: it is older than the statistics, or not theirs."""
    s = statistics
    rows: list[Any] = [*s.units, *s.moments, *s.events, *s.histograms]
    arms = {row.arm for row in rows} - set(record.spec.weights)
    epochs = {row.epoch for row in rows} - {epoch.epoch for epoch in record.epochs}
    named = (("weight epoch", sorted(map(str, epochs))), ("arm", sorted(arms)))
    return [f"units of an unknown {what}: {', '.join(which)}" for what, which in named if which]


def _untestable(metrics: Sequence[MetricResult]) -> list[str]:
    """Metrics that ought to decide and cannot; each once, whatever the number of arms."""
    notes = {
        f"{result.metric} {result.note}": None
        for result in metrics
        if result.note is not None and result.note.startswith(UNTESTABLE) and result.role != Role.SECONDARY
    }
    return list(notes)
