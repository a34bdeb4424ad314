"""The design of an experiment's tests: methods, error levels and tunings, all fixed by the spec alone.

Nothing here looks at data. What it computes is a function of what the design hash covers, so it is frozen before
the first look.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from stream_xp import stats
from stream_xp.domain.decision import Method
from stream_xp.domain.experiment import (
    Adjustment,
    Aggregation,
    Direction,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
)
from stream_xp.domain.rollout import ShipRule


class Test(NamedTuple):
    """The level and tuning of one sequence.

    Attributes:
        alpha: error level, in (0, 1); two-sided or one-sided as the test is.
        rho2: tuning constant of the normal mixture per unit.
        threshold_log_e: ln(1/alpha); the null is rejected at or above this.
    """

    alpha: float
    rho2: float
    threshold_log_e: float


class Margin(NamedTuple):
    """The largest tolerable harm as an effect: negative where larger is better.

    Attributes:
        value: metric units, or a share of the control mean.
        relative: which of the two.
    """

    value: float
    relative: bool

    @property
    def kind(self) -> stats.MarginKind:
        """The same in the words of `stats`."""
        return "relative" if self.relative else "absolute"


NO_MARGIN = Margin(0.0, relative=False)
_NO_TEST = Test(1.0, 1.0, 0.0)


class Plan(NamedTuple):
    """All tests of one metric, the same in every arm.

    Attributes:
        effect: two-sided. segment: the same, at its share for one segment value.
        harm: one-sided, guardrails only, at `harm_margin`. safety: one-sided, guardrails only, at `margin`.
        harm_above: whether harm is a larger value; safety lies on the other side.
        pair_sample: planned units of the arm and the control together.
        step: value of one quantisation step of the metric.
        covariate_step: value of one quantisation step of the covariate.
        fault: why the spec is beyond what the methods take, if it is; nothing is tested then.
        standard_error: whether the rule that ships reads it.
    """

    metric: Metric
    method: Method
    effect: Test
    segment: Test
    harm: Test | None = None
    safety: Test | None = None
    margin: Margin = NO_MARGIN
    harm_margin: Margin = NO_MARGIN
    harm_above: bool = False
    pair_sample: float = 1.0
    step: float = 1.0
    covariate_step: float = 1.0
    fault: str | None = None
    standard_error: bool = False


def method_of(metric: Metric) -> Method:
    """The method of a metric: what its kind and its design ask for, whatever the weights do.

    All of them compare arms inside weight epochs, so that fixed weights, ramps and batches of adaptive weights
    need no different ones. Sample so far decides nothing: where an asymptotic method needs a start, an exact one
    is averaged with it from the first unit on (`stats.early_evidence`).
    """
    if metric.kind is MetricKind.RATIO:
        return Method.RATIO
    if metric.kind is MetricKind.LATENCY:
        return Method.QUANTILE
    if metric.kind is MetricKind.COUNT and metric.folds_by is Aggregation.FIRST:
        return Method.RATE_RATIO
    if metric.adjustment is not Adjustment.NONE:
        return Method.CUPED if metric.adjustment is Adjustment.CUPED else Method.ANCOVA
    return Method.EXACT_THEN_ASYMPTOTIC if metric.folds_by is Aggregation.ANY else Method.ASYMPTOTIC


def pair_sample(spec: ExperimentSpec) -> float:
    """Planned units of a treatment arm and the control together, at which its sequence is narrowest.

    Even shares are assumed, because weights may change and the tuning may not.
    """
    return spec.planned_sample * 2 / len(spec.arms)


def plans(record: ExperimentRecord) -> tuple[Plan, ...]:
    """The tests of every metric, in the order of the file.

    The error budgets are split evenly: `alpha` over (primary metrics x treatment arms), two-sided, `guardrail_alpha`
    over (guardrails x treatment arms) for harm, one-sided. Non-inferiority is tested at `alpha` without a split,
    because every guardrail of an arm must pass before that arm ships. Secondary metrics are shown at `alpha`. The
    level of a latency is split once more over its quantiles, that of a segment over all registered values.
    """
    found = _MEMO.get(record.design_hash)
    if found is None:
        if len(_MEMO) >= _MEMO_SIZE:
            _MEMO.clear()
        found = _MEMO[record.design_hash] = tuple(
            _checked(record.spec, metric) for metric in record.spec.metrics
        )
    return found


_MEMO: dict[str, tuple[Plan, ...]] = {}
_MEMO_SIZE = 10_000


def _checked(spec: ExperimentSpec, metric: Metric) -> Plan:
    try:
        return _plan(spec, metric)
    except ValueError as error:
        # The rules of a spec refuse such levels, but what stands on a topic may be anybody's.
        return Plan(metric, method_of(metric), effect=_NO_TEST, segment=_NO_TEST, fault=str(error))


def _plan(spec: ExperimentSpec, metric: Metric) -> Plan:
    arms = len(spec.treatments)
    alpha = spec.alpha / (len(spec.with_role(Role.PRIMARY)) * arms if metric.role is Role.PRIMARY else 1)
    parts = len(metric.tested_quantiles) if metric.kind is MetricKind.LATENCY else 1
    values = max(1, sum(len(known) + 1 for known in spec.segments.values()))
    plan = Plan(
        metric=metric,
        method=method_of(metric),
        effect=_two_sided(spec, alpha / parts),
        segment=_two_sided(spec, alpha / parts / values),
        pair_sample=pair_sample(spec),
        step=metric.step,
        covariate_step=1.0 if spec.covariate is None else spec.covariate.scale,
        standard_error=metric.role is Role.PRIMARY and _reads_standard_error(spec),
    )
    if metric.role is not Role.GUARDRAIL:
        return plan
    harm_alpha = spec.guardrail_alpha / (len(spec.with_role(Role.GUARDRAIL)) * arms)
    margin = _signed_margin(metric)
    return plan._replace(
        harm=_one_sided(spec, harm_alpha / parts),
        safety=_one_sided(spec, spec.alpha / parts),
        margin=margin,
        harm_margin=NO_MARGIN if metric.critical else margin,
        harm_above=metric.direction is Direction.DECREASE,
    )


def _reads_standard_error(spec: ExperimentSpec) -> bool:
    return spec.conclusion is not None and spec.conclusion.rule is not ShipRule.ALWAYS_VALID


def _two_sided(spec: ExperimentSpec, alpha: float) -> Test:
    return Test(alpha, stats.tuned_rho2(pair_sample(spec), alpha), -math.log(alpha))


def _one_sided(spec: ExperimentSpec, alpha: float) -> Test:
    return Test(alpha, stats.one_sided_rho2(pair_sample(spec), alpha), -math.log(alpha))


def _signed_margin(metric: Metric) -> Margin:
    if metric.margin is None:
        raise ValueError("a guardrail needs a margin")
    worse = -1.0 if metric.direction is Direction.INCREASE else 1.0
    if metric.margin.absolute is not None:
        return Margin(worse * metric.margin.absolute, relative=False)
    return Margin(worse * (metric.margin.relative or 0.0), relative=True)
