"""From exact statistics to evidence: every test of an experiment at one look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from stream_xp import stats
from stream_xp.domain.decision import ArmResult, Evidence, MetricResult, MetricState, SampleRatio
from stream_xp.domain.experiment import Direction, ExperimentRecord, ExperimentSpec, Metric, Role
from stream_xp.domain.statistics import ALL, ExperimentStatistics

MAX_CROSSOVER_SHARE = 0.01
"""More crossovers than this share of the units make an experiment invalid."""

_UNTESTABLE = "cannot be tested"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All evidence at one look.

    Attributes:
        invalid: why nothing may ship on it; empty when all is well.
    """

    arms: tuple[ArmResult, ...]
    metrics: tuple[MetricResult, ...]
    sample_ratio: SampleRatio | None
    invalid: tuple[str, ...]


def evaluate(record: ExperimentRecord, statistics: ExperimentStatistics) -> Evaluation:
    """Test every metric in every treatment arm, and the sample ratio.

    The error budgets are split evenly: `alpha` over (primary metrics x treatment arms), two-sided,
    `guardrail_alpha` over (guardrails x treatment arms) for harm, one-sided. Non-inferiority is tested at `alpha`
    without a split, because every guardrail of an arm must pass before that arm ships. Secondary metrics are
    shown at `alpha`.

    Statistics may be ahead of the record by a weight epoch. Metrics use its units, because the comparison
    inside an epoch needs no weights; the sample ratio cannot, so the experiment is invalid until the record is here.
    """
    spec = record.spec
    cells = _cells(statistics)
    metrics = tuple(
        _metric_result(spec, metric, arm.key, cells) for metric in spec.metrics for arm in spec.treatments
    )
    arms = _arm_results(record, statistics)
    ratio = _sample_ratio(record, statistics)
    invalid = [
        *_sample_ratio_faults(ratio),
        *_crossover_faults(arms, statistics.crossover_units),
        *_place_faults(record, statistics),
        *_untestable(metrics),
    ]
    return Evaluation(arms, metrics, ratio, tuple(invalid))


Cells = dict[str, dict[int, dict[str, stats.Moments]]]
"""Moments by metric, weight epoch and arm."""


def _cells(statistics: ExperimentStatistics) -> Cells:
    cells: Cells = {}
    for row in statistics.moments:
        if row.segment == ALL:
            epochs = cells.setdefault(row.metric, {})
            epochs.setdefault(row.epoch, {})[row.arm] = stats.Moments(row.n, int(row.s), int(row.q))
    return cells


def _strata(metric: Metric, control: str, arm: str, cells: Cells) -> list[stats.Stratum]:
    return [
        stats.Stratum(epoch.get(control, stats.EMPTY), epoch.get(arm, stats.EMPTY))
        for _, epoch in sorted(cells.get(metric.key, {}).items())
    ]


def _metric_result(spec: ExperimentSpec, metric: Metric, arm: str, cells: Cells) -> MetricResult:
    strata = _strata(metric, spec.control.key, arm, cells)
    result = MetricResult(
        metric=metric.key,
        role=metric.role,
        arm=arm,
        state=MetricState.UNDETERMINED,
        control_units=sum(stratum.control.n for stratum in strata),
        arm_units=sum(stratum.treatment.n for stratum in strata),
    )
    try:
        return _tested(spec, metric, result, strata)
    except ValueError as error:
        # A scale, margin or alpha beyond what the method takes. It closes this experiment's gates; it must not
        # end the worker that watches all the others.
        return msgspec.structs.replace(result, note=f"{_UNTESTABLE}: {error}")


def _tested(
    spec: ExperimentSpec, metric: Metric, result: MetricResult, strata: Sequence[stats.Stratum]
) -> MetricResult:
    means = stats.summarise(strata, scale=metric.step)
    if isinstance(means, stats.Undetermined):
        return msgspec.structs.replace(result, note=means.reason)
    result = msgspec.structs.replace(
        result, control_mean=means.control_mean, arm_mean=means.treatment_mean, **_effect(spec, metric, means)
    )
    if metric.role is Role.GUARDRAIL:
        result = msgspec.structs.replace(result, **_guard(spec, metric, means))
    return msgspec.structs.replace(result, state=_state(metric, result))


def _effect(spec: ExperimentSpec, metric: Metric, means: stats.ArmMeans) -> dict[str, Evidence]:
    alpha = (
        spec.alpha / (len(spec.with_role(Role.PRIMARY)) * len(spec.treatments))
        if metric.role is Role.PRIMARY
        else spec.alpha
    )
    rho2 = stats.tuned_rho2(pair_sample(spec), alpha)
    shown = {"effect": _evidence(stats.mean_difference(means, alpha=alpha, rho2=rho2), alpha)}
    lift = stats.relative_lift(means, alpha=alpha, rho2=rho2)
    if not isinstance(lift, stats.Undetermined):
        shown["lift"] = _evidence(lift, alpha)
    return shown


def _guard(spec: ExperimentSpec, metric: Metric, means: stats.ArmMeans) -> dict[str, Evidence]:
    """The two one-sided sequences of a guardrail: harm (stops) and safety (lets ship)."""
    margin, kind = _signed_margin(metric)
    harm_side, safe_side = _SIDES[metric.direction]
    harm_alpha = spec.guardrail_alpha / (len(spec.with_role(Role.GUARDRAIL)) * len(spec.treatments))
    harm = stats.one_sided_test(
        means,
        margin=0.0 if metric.critical else margin,
        margin_kind="absolute" if metric.critical else kind,
        side=harm_side,
        alpha=harm_alpha,
        rho2=stats.one_sided_rho2(pair_sample(spec), harm_alpha),
    )
    safety = stats.one_sided_test(
        means,
        margin=margin,
        margin_kind=kind,
        side=safe_side,
        alpha=spec.alpha,
        rho2=stats.one_sided_rho2(pair_sample(spec), spec.alpha),
    )
    return {"harm": _evidence(harm, harm_alpha), "safety": _evidence(safety, spec.alpha)}


def _signed_margin(metric: Metric) -> tuple[float, stats.MarginKind]:
    """The margin as an effect: negative where larger is better."""
    if metric.margin is None:
        raise ValueError("a guardrail needs a margin")
    worse = -1.0 if metric.direction is Direction.INCREASE else 1.0
    if metric.margin.absolute is not None:
        return worse * metric.margin.absolute, "absolute"
    return worse * (metric.margin.relative or 0.0), "relative"


_SIDES: dict[Direction, tuple[stats.Side, stats.Side]] = {
    Direction.INCREASE: ("below", "above"),
    Direction.DECREASE: ("above", "below"),
}
"""The side on which a guardrail is harmed, and the side on which it is safe, by its good direction."""


def pair_sample(spec: ExperimentSpec) -> float:
    """Planned units of a treatment arm and the control together, at which its sequence is narrowest.

    Even shares are assumed, because weights may change and the tuning may not.
    """
    return spec.planned_sample * 2 / len(spec.arms)


def _state(metric: Metric, result: MetricResult) -> MetricState:
    if result.harm is not None and proven(result.harm):
        return MetricState.HARMED
    if result.safety is not None:
        return MetricState.SAFE if proven(result.safety) else MetricState.INCONCLUSIVE
    if result.effect is None or result.effect.estimate is None or not proven(result.effect):
        return MetricState.INCONCLUSIVE
    good = (result.effect.estimate > 0) == (metric.direction is Direction.INCREASE)
    return MetricState.BETTER if good else MetricState.WORSE


def proven(evidence: Evidence) -> bool:
    """Whether the null hypothesis is rejected."""
    return evidence.log_e >= evidence.threshold_log_e


def _evidence(found: stats.Evidence, alpha: float) -> Evidence:
    return Evidence(
        estimate=found.estimate,
        lower=found.lower if math.isfinite(found.lower) else None,
        upper=found.upper if math.isfinite(found.upper) else None,
        log_e=found.log_e,
        p_always_valid=found.p_always_valid,
        threshold_log_e=-math.log(alpha),
    )


def _unit_counts(statistics: ExperimentStatistics) -> dict[tuple[str, int], int]:
    return {(row.arm, row.epoch): row.units for row in statistics.units if row.segment == ALL}


def _arm_results(record: ExperimentRecord, statistics: ExperimentStatistics) -> tuple[ArmResult, ...]:
    counts = _unit_counts(statistics)
    totals = {
        epoch.epoch: sum(n for (_, e), n in counts.items() if e == epoch.epoch) for epoch in record.epochs
    }
    return tuple(
        ArmResult(
            arm=arm.key,
            units=sum(n for (key, _), n in counts.items() if key == arm.key),
            expected_units=math.fsum(totals[e.epoch] * e.weights.get(arm.key, 0.0) for e in record.epochs),
        )
        for arm in record.spec.arms
    )


def _sample_ratio(record: ExperimentRecord, statistics: ExperimentStatistics) -> SampleRatio | None:
    """The tilt-mixture test over all weight epochs; None while no unit was exposed.

    An arm of weight 0 has no place in its epoch's multinomial: units there are a mismatch in themselves, with no
    e-value, so that `log_e` can then lie below the threshold.
    """
    counts = _unit_counts(statistics)
    arms = [arm.key for arm in record.spec.arms]
    weights = [[epoch.weights.get(arm, 0.0) for arm in arms] for epoch in record.epochs]
    rows = [
        [
            counts.get((arm, epoch.epoch), 0) if weight > 0 else 0
            for arm, weight in zip(arms, row, strict=True)
        ]
        for epoch, row in zip(record.epochs, weights, strict=True)
    ]
    stray = _stray_units(record, counts)
    found = stats.sample_ratio(rows, weights)
    if isinstance(found, stats.Undetermined) and not stray:
        return None
    # The e-value of no unit is 1.
    log_e = 0.0 if isinstance(found, stats.Undetermined) else found.log_e
    threshold = -math.log(record.spec.sample_ratio_alpha)
    return SampleRatio(
        log_e=log_e,
        p_always_valid=stats.p_always_valid(log_e),
        threshold_log_e=threshold,
        mismatch=stray or log_e >= threshold,
    )


def _stray_units(record: ExperimentRecord, counts: dict[tuple[str, int], int]) -> bool:
    """Whether an arm of weight 0 got units: an arm at 0 can get none by chance."""
    return any(
        counts.get((arm.key, epoch.epoch), 0) > 0 and epoch.weights.get(arm.key, 0.0) == 0.0
        for epoch in record.epochs
        for arm in record.spec.arms
    )


def _sample_ratio_faults(ratio: SampleRatio | None) -> list[str]:
    return ["sample-ratio mismatch"] if ratio is not None and ratio.mismatch else []


def _crossover_faults(arms: Sequence[ArmResult], crossovers: int) -> list[str]:
    units = sum(arm.units for arm in arms)
    faults = []
    if crossovers > MAX_CROSSOVER_SHARE * (units + crossovers):
        faults.append(f"{crossovers} units were seen in two arms, more than 1 %")
    if units == 0:
        faults.append("no data")
    return faults


def _place_faults(record: ExperimentRecord, statistics: ExperimentStatistics) -> list[str]:
    """Units that the record has no place for: it is older than the statistics, or not theirs."""
    places = [(row.arm, row.epoch) for row in statistics.units]
    places += [(row.arm, row.epoch) for row in statistics.moments]
    arms = {arm for arm, _ in places} - set(record.spec.weights)
    epochs = {epoch for _, epoch in places} - {epoch.epoch for epoch in record.epochs}
    named = (("weight epoch", sorted(map(str, epochs))), ("arm", sorted(arms)))
    return [f"units of an unknown {what}: {', '.join(which)}" for what, which in named if which]


def _untestable(metrics: Sequence[MetricResult]) -> list[str]:
    """Metrics that ought to decide and cannot; each once, whatever the number of arms."""
    notes = {
        f"{result.metric} {result.note}": None
        for result in metrics
        if result.role != Role.SECONDARY and result.note is not None and result.note.startswith(_UNTESTABLE)
    }
    return list(notes)
