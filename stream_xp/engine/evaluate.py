"""From exact statistics to evidence: every test of an experiment at one look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from stream_xp import stats
from stream_xp.domain.decision import ArmResult, Evidence, MetricResult, MetricState, SampleRatio
from stream_xp.domain.experiment import Direction, ExperimentRecord, ExperimentSpec, Metric, Role, Threshold
from stream_xp.domain.statistics import ALL, ExperimentStatistics

MAX_CROSSOVER_SHARE = 0.01
"""More crossovers than this share of the units make an experiment invalid."""


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
    without a split, because every guardrail must pass. Secondary metrics are shown at `alpha`.
    """
    spec = record.spec
    moments = _moments(statistics)
    arms = _arm_results(record, statistics)
    ratio = _sample_ratio(record, statistics)
    metrics = tuple(
        _metric_result(spec, metric, arm.key, moments) for metric in spec.metrics for arm in spec.treatments
    )
    return Evaluation(arms, metrics, ratio, _invalid(statistics, ratio, [arm.units for arm in arms]))


Cells = dict[tuple[str, str, int], stats.Moments]


def _moments(statistics: ExperimentStatistics) -> Cells:
    return {
        (row.metric, row.arm, row.epoch): stats.Moments(row.n, int(row.s), int(row.q))
        for row in statistics.moments
        if row.segment == ALL
    }


def _strata(metric: Metric, control: str, arm: str, cells: Cells) -> list[stats.Stratum]:
    epochs = sorted({epoch for key, _, epoch in cells if key == metric.key})
    return [
        stats.Stratum(
            cells.get((metric.key, control, epoch), stats.EMPTY),
            cells.get((metric.key, arm, epoch), stats.EMPTY),
        )
        for epoch in epochs
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
    margin = metric.margin or Threshold(absolute=math.inf)
    size = margin.absolute if margin.absolute is not None else margin.relative or 0.0
    kind: stats.MarginKind = "absolute" if margin.absolute is not None else "relative"
    worse = -1.0 if metric.direction is Direction.INCREASE else 1.0
    harm_side, safe_side = _SIDES[metric.direction]
    harm_alpha = spec.guardrail_alpha / (len(spec.with_role(Role.GUARDRAIL)) * len(spec.treatments))
    harm = stats.one_sided_test(
        means,
        margin=0.0 if metric.critical else worse * size,
        margin_kind="absolute" if metric.critical else kind,
        side=harm_side,
        alpha=harm_alpha,
        rho2=stats.one_sided_rho2(pair_sample(spec), harm_alpha),
    )
    safety = stats.one_sided_test(
        means,
        margin=worse * size,
        margin_kind=kind,
        side=safe_side,
        alpha=spec.alpha,
        rho2=stats.one_sided_rho2(pair_sample(spec), spec.alpha),
    )
    return {"harm": _evidence(harm, harm_alpha), "safety": _evidence(safety, spec.alpha)}


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

    An arm of weight 0 has no place in its epoch's multinomial; units there are a mismatch in themselves, which
    `_stray_units` reports.
    """
    counts = _unit_counts(statistics)
    arms = [arm.key for arm in record.spec.arms]
    rows = [[counts.get((arm, epoch.epoch), 0) for arm in arms] for epoch in record.epochs]
    weights = [[epoch.weights.get(arm, 0.0) for arm in arms] for epoch in record.epochs]
    rows = [
        [n if w > 0 else 0 for n, w in zip(row, weight, strict=True)]
        for row, weight in zip(rows, weights, strict=True)
    ]
    found = stats.sample_ratio(rows, weights)
    if isinstance(found, stats.Undetermined):
        return None
    threshold = -math.log(record.spec.sample_ratio_alpha)
    return SampleRatio(
        log_e=found.log_e,
        p_always_valid=found.p_always_valid,
        threshold_log_e=threshold,
        mismatch=found.log_e >= threshold or _stray_units(record, counts),
    )


def _stray_units(record: ExperimentRecord, counts: dict[tuple[str, int], int]) -> bool:
    """Whether an arm of weight 0 got units: an arm at 0 can get none by chance."""
    return any(
        counts.get((arm.key, epoch.epoch), 0) > 0 and epoch.weights.get(arm.key, 0.0) == 0.0
        for epoch in record.epochs
        for arm in record.spec.arms
    )


def _invalid(
    statistics: ExperimentStatistics, ratio: SampleRatio | None, units: Sequence[int]
) -> tuple[str, ...]:
    reasons = []
    if ratio is not None and ratio.mismatch:
        reasons.append("sample-ratio mismatch")
    if statistics.crossover_units > MAX_CROSSOVER_SHARE * (sum(units) + statistics.crossover_units):
        reasons.append(f"{statistics.crossover_units} units were seen in two arms, more than 1 %")
    if sum(units) == 0:
        reasons.append("no data")
    return tuple(reasons)
