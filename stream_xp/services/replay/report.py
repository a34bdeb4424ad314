"""What a replay says at its end, from the statistics and the result that the service published."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from stream_xp.domain.experiment import MetricKind
from stream_xp.domain.statistics import ALL, Outcomes, add_outcomes, merge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stream_xp.domain.decision import MetricResult, Result
    from stream_xp.domain.experiment import ExperimentSpec, Metric
    from stream_xp.domain.statistics import ExperimentStatistics, PartitionStatistics

_SHORT_NAMES = {
    "unknown_experiment": "unknown",
    "inactive_experiment": "inactive",
    "dead_lettered": "dead",
}


class Sums(NamedTuple):
    """Exact moments of one metric in one arm, all weight epochs together."""

    n: int
    s: int
    q: int


def build_report(
    spec: ExperimentSpec, parts: Sequence[PartitionStatistics], result: Result
) -> dict[str, Any]:
    """Return the machine-readable report of one replayed experiment."""
    statistics = merge(part.statistics for part in parts)
    return {
        "experiment": spec.experiment,
        "arms": {arm.key: _arm(spec, statistics, arm.key) for arm in spec.arms},
        "metrics": {metric.key: _metric(metric, result) for metric in spec.metrics},
        "srm": _sample_ratio(result),
        "decision": result.decision.action.value,
        "decision_reason": result.decision.reason,
        "invalid": list(result.invalid),
        "records": _records(parts),
        "fixed_sample": {metric.key: _fixed_sample(spec, metric, statistics) for metric in spec.metrics},
        "statistics_hash": result.statistics_hash,
        "statistics": msgspec.to_builtins(statistics),
    }


def sums_of(statistics: ExperimentStatistics, metric: str, arm: str) -> Sums:
    """Return the moments of all mature units of an arm."""
    cells = [
        cell for cell in statistics.moments if (cell.metric, cell.arm, cell.segment) == (metric, arm, ALL)
    ]
    return Sums(
        sum(one.n for one in cells), sum(int(one.s) for one in cells), sum(int(one.q) for one in cells)
    )


def z_test(control: Sums, arm: Sums, *, pooled: bool) -> dict[str, float | None]:
    """Return the fixed-sample z test of equal means: pooled for two proportions, else Welch's.

    It is what a person would look at who does not know of peeking; its p is right at one look planned
    ahead, and only there. z and p are None where the variance is 0 or an arm is empty.
    """
    if min(control.n, arm.n) < 2:
        return {"z": None, "p": None}
    difference = arm.s / arm.n - control.s / control.n
    if pooled:
        rate = (control.s + arm.s) / (control.n + arm.n)
        variance = rate * (1 - rate) * (1 / control.n + 1 / arm.n)
    else:
        variance = sum((one.n * one.q - one.s**2) / (one.n**2 * (one.n - 1)) for one in (control, arm))
    if variance <= 0:
        return {"z": None, "p": None}
    z = difference / math.sqrt(variance)
    return {"z": z, "p": math.erfc(abs(z) / math.sqrt(2))}


def _arm(spec: ExperimentSpec, statistics: ExperimentStatistics, arm: str) -> dict[str, Any]:
    sums = {metric.key: sums_of(statistics, metric.key, arm) for metric in spec.metrics}
    conversions = [metric.key for metric in spec.metrics if metric.kind is MetricKind.CONVERSION]
    shown = conversions[0] if conversions else spec.metrics[0].key
    return {
        "exposures": sum(row.units for row in statistics.units if (row.arm, row.segment) == (arm, ALL)),
        "successes": sums[shown].s if conversions else None,
        "mature": sums[shown].n,
        "by_metric": {
            metric.key: {"mature": sums[metric.key].n, "sum": sums[metric.key].s, "step": metric.step}
            for metric in spec.metrics
        },
    }


def _metric(metric: Metric, result: Result) -> dict[str, Any]:
    comparisons = {one.arm: _comparison(one) for one in result.metrics if one.metric == metric.key}
    first = next(iter(comparisons.values()), dict.fromkeys(("estimate", "lower", "upper", "log_e", "p")))
    return {**first, "comparisons": comparisons}


def _comparison(one: MetricResult) -> dict[str, Any]:
    evidence = one.effect
    return {
        "estimate": evidence.estimate if evidence else None,
        "lower": evidence.lower if evidence else None,
        "upper": evidence.upper if evidence else None,
        "log_e": evidence.log_e if evidence else None,
        "p": evidence.p_always_valid if evidence else None,
        "state": one.state.value,
        "note": one.note,
        **{
            name: msgspec.to_builtins(test)
            for name, test in (("harm", one.harm), ("safety", one.safety))
            if test is not None
        },
    }


def _sample_ratio(result: Result) -> dict[str, Any]:
    test = result.sample_ratio
    return {
        "log_e": test.log_e if test else None,
        "p": test.p_always_valid if test else None,
        "mismatch": test.mismatch if test else False,
        "suspected": test.suspected if test else False,
    }


def _records(parts: Sequence[PartitionStatistics]) -> dict[str, int]:
    total: Outcomes = add_outcomes(
        outcomes for part in parts for outcomes in (part.exposure_outcomes, part.reward_outcomes)
    )
    return {_SHORT_NAMES.get(name, name): count for name, count in msgspec.to_builtins(total).items()}


def _fixed_sample(spec: ExperimentSpec, metric: Metric, statistics: ExperimentStatistics) -> dict[str, Any]:
    control = sums_of(statistics, metric.key, spec.control.key)
    pooled = metric.kind is MetricKind.CONVERSION
    tests = {
        arm.key: z_test(control, sums_of(statistics, metric.key, arm.key), pooled=pooled)
        for arm in spec.treatments
    }
    return {**tests[spec.treatments[0].key], "comparisons": tests}
