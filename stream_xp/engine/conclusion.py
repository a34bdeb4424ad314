"""What ships, and what is given up: a decision table over the roles of metrics, and the rules that call one better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from stream_xp.domain.decision import (
    Action,
    Decision,
    Evidence,
    LookTaken,
    Method,
    MetricResult,
    MetricState,
)
from stream_xp.domain.experiment import Direction, ExperimentSpec, Metric, Role
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.rollout import Conclusion, ShipRule, Spending
from stream_xp.engine.design import pair_sample
from stream_xp.engine.evaluate import Evaluation
from stream_xp.stats.bayes import expected_losses
from stream_xp.stats.group_sequential import group_sequential


class Says(Enum):
    """What one metric says of shipping its arm."""

    SHIP = "it is better"
    NO = "the arm must not ship"
    WARNING = "shown beside a ship"
    NOTHING = "nothing"


TABLE: dict[tuple[Role, MetricState], tuple[Says, str]] = {
    (Role.PRIMARY, MetricState.BETTER): (Says.SHIP, "{arm} is better in {metric}"),
    (Role.PRIMARY, MetricState.WORSE): (Says.NO, "{arm} is worse in {metric}"),
    (Role.PRIMARY, MetricState.INCONCLUSIVE): (Says.NOTHING, ""),
    (Role.PRIMARY, MetricState.UNDETERMINED): (Says.NOTHING, ""),
    (Role.GUARDRAIL, MetricState.SAFE): (Says.NOTHING, ""),
    (Role.GUARDRAIL, MetricState.HARMED): (Says.NO, "{arm} harms {metric}"),
    (Role.GUARDRAIL, MetricState.INCONCLUSIVE): (
        Says.NO,
        "{metric} is not yet proven non-inferior in {arm}",
    ),
    (Role.GUARDRAIL, MetricState.UNDETERMINED): (
        Says.NO,
        "{metric} is not yet proven non-inferior in {arm}",
    ),
    (Role.SECONDARY, MetricState.WORSE): (Says.WARNING, "{arm} is worse in {metric}"),
    (Role.SECONDARY, MetricState.BETTER): (Says.NOTHING, ""),
    (Role.SECONDARY, MetricState.INCONCLUSIVE): (Says.NOTHING, ""),
    (Role.SECONDARY, MetricState.UNDETERMINED): (Says.NOTHING, ""),
}
"""An arm ships if one metric says ship and none says no.

No metric may have deteriorated: a primary or guardrail by proof, which has a share of the error budget. A secondary
has none; were each of them able to hold a ship back, every metric that somebody added out of interest would cost
power, so they warn. What must not become worse is a guardrail.
"""


def said_of(result: MetricResult, looks: Sequence[LookTaken] = ()) -> tuple[Says, str]:
    """What a metric says of its arm, and in words.

    Args:
        result: the metric in the arm.
        looks: of a group sequential rule, those taken; what was proven worse at one holds the arm back.
    """
    state = result.state
    if any((result.metric, result.arm) in look.worse for look in looks[-1:]):
        state = MetricState.WORSE
    says, words = TABLE.get((Role(result.role), state), (Says.NO, "{metric} says nothing of {arm}"))
    return says, words.format(arm=result.arm, metric=result.metric)


def obstacles(evaluation: Evaluation, arm: str, looks: Sequence[LookTaken] = ()) -> list[str]:
    """Why an arm may not ship: primaries that are worse first, then guardrails."""
    mine = [result for result in evaluation.metrics if result.arm == arm]
    found = [(result.role, *said_of(result, looks)) for result in mine]
    of_primaries, others = (
        [words for role, says, words in found if says is Says.NO and (role == Role.PRIMARY) is primary]
        for primary in (True, False)
    )
    return of_primaries + others


def invalid(evaluation: Evaluation) -> tuple[str, ...]:
    """Why nothing may move on this evaluation; empty when all is well."""
    if evaluation.sample_ratio is None and not evaluation.invalid:
        return ("the sample ratio is not tested",)
    return evaluation.invalid


# --- the rules that call a primary better --------------------------------------------------------------------


class Claim(NamedTuple):
    """A primary metric that a rule calls better in an arm.

    Attributes:
        words: the evidence, for people.
        strength: of two claims by one rule the larger one is the stronger one.
    """

    result: MetricResult
    words: str
    strength: float


def claims(spec: ExperimentSpec, evaluation: Evaluation, looks: Sequence[LookTaken] = ()) -> list[Claim]:
    """Every primary metric and arm that the rule of the spec calls better."""
    rule = ShipRule.ALWAYS_VALID if spec.conclusion is None else spec.conclusion.rule
    primaries = [result for result in evaluation.metrics if result.role == Role.PRIMARY]
    found = [_RULES[rule](spec, result, looks) for result in primaries]
    return [claim for claim in found if claim is not None]


def strongest(found: Sequence[Claim]) -> Claim:
    """The strongest claim; among equals by name, so that no order of a file decides."""
    return max(found, key=lambda claim: (claim.strength, claim.result.arm, claim.result.metric))


def beyond(evidence: Evidence) -> str:
    """A proof in words."""
    return f"log_e {evidence.log_e:.2f} >= {evidence.threshold_log_e:.2f}"


def _always_valid(
    spec: ExperimentSpec,  # noqa: ARG001 (rules have one shape)
    result: MetricResult,
    looks: Sequence[LookTaken],  # noqa: ARG001
) -> Claim | None:
    if result.state is not MetricState.BETTER or result.effect is None:
        return None
    return Claim(result, beyond(result.effect), result.effect.log_e - result.effect.threshold_log_e)


def _group_sequential(
    spec: ExperimentSpec,  # noqa: ARG001
    result: MetricResult,
    looks: Sequence[LookTaken],
) -> Claim | None:
    at = next((look for look in looks if (result.metric, result.arm) in look.better), None)
    if at is None:
        return None
    return Claim(result, f"beyond the critical value at the look of {at.look:.0%}", -at.look)


def _expected_loss(
    spec: ExperimentSpec,
    result: MetricResult,
    looks: Sequence[LookTaken],  # noqa: ARG001
) -> Claim | None:
    conclusion, z = spec.conclusion, oriented_z(spec, result)
    if conclusion is None or conclusion.maximum_loss is None or z is None or z <= 0:
        return None
    error = result.standard_error or 0.0
    loss = float(expected_losses(z * error, error)[0])
    if loss > conclusion.maximum_loss:
        return None
    words = f"expected loss {loss:.3g} <= {conclusion.maximum_loss:.3g}, with no error level"
    return Claim(result, words, conclusion.maximum_loss - loss)


_RULES: dict[ShipRule, Callable[[ExperimentSpec, MetricResult, Sequence[LookTaken]], Claim | None]] = {
    ShipRule.ALWAYS_VALID: _always_valid,
    ShipRule.GROUP_SEQUENTIAL: _group_sequential,
    ShipRule.EXPECTED_LOSS: _expected_loss,
}

GUARANTEES = {
    ShipRule.ALWAYS_VALID: (
        "always valid: however often it is looked at, a ship without an effect has at most the probability alpha"
    ),
    ShipRule.GROUP_SEQUENTIAL: (
        "group sequential: at most alpha over the declared looks together, and at these only; asymptotic"
    ),
    ShipRule.EXPECTED_LOSS: (
        "expected loss: no error level; the expected loss under a flat prior is small, and frequent looks "
        "ship more arms without an effect than any alpha says"
    ),
}


def guarantee(spec: ExperimentSpec) -> str | None:
    """What the rule of the spec promises of a ship; None where the spec has no conclusion."""
    return None if spec.conclusion is None else GUARANTEES[spec.conclusion.rule]


def metric_of(spec: ExperimentSpec, result: MetricResult) -> Metric | None:
    """The metric that a result is of."""
    return next((metric for metric in spec.metrics if metric.key == result.metric), None)


def oriented_z(spec: ExperimentSpec, result: MetricResult) -> float | None:
    """The effect over its standard error, positive where it is good; None where there is none."""
    metric, error = metric_of(spec, result), result.standard_error
    if metric is None or result.effect is None or result.effect.estimate is None or not error:
        return None
    return (1 if metric.direction is Direction.INCREASE else -1) * result.effect.estimate / error


# --- looks of a group sequential rule ----------------------------------------------------------------------


def information(spec: ExperimentSpec, evaluation: Evaluation) -> float:
    """Share of the planned sample that is in: that of the primary and arm with the fewest units."""
    units = [
        result.control_units + result.arm_units
        for result in evaluation.metrics
        if result.role == Role.PRIMARY
    ]
    return min(units, default=0) / pair_sample(spec)


def looked(
    spec: ExperimentSpec, evaluation: Evaluation, taken: tuple[LookTaken, ...]
) -> tuple[LookTaken, ...]:
    """The looks taken after this evaluation: one more where a declared one is due, else the same.

    A look is taken at the first valid evaluation with its share of the sample or more; of several that are due, the
    last one. Its critical value spends what its declared place may spend at the information that is really there.
    What was beyond a critical value stays so: the test has ended for it.
    """
    conclusion = spec.conclusion
    if conclusion is None or conclusion.rule is not ShipRule.GROUP_SEQUENTIAL or invalid(evaluation):
        return taken
    now = information(spec, evaluation)
    due = max((look for look in conclusion.looks or () if look <= now), default=0.0)
    last = taken[-1] if taken else LookTaken(look=0.0, information=0.0)
    if due <= last.look or now <= last.information * (1 + _SMALLEST_STEP):
        return taken
    fresh = LookTaken(look=due, information=now, better=last.better, worse=last.worse)
    critical = _critical_value(spec, conclusion, (*taken, fresh))
    found = [(result, oriented_z(spec, result)) for result in evaluation.metrics]
    beyond = [
        (r.metric, r.arm, z)
        for r, z in found
        if r.role == Role.PRIMARY and z is not None and abs(z) >= critical
    ]
    better = {(metric, arm) for metric, arm, z in beyond if z > 0} - set(last.worse)
    worse = {(metric, arm) for metric, arm, z in beyond if z < 0} - set(last.better)
    fresh = msgspec.structs.replace(
        fresh, better=tuple(sorted(better | set(last.better))), worse=tuple(sorted(worse | set(last.worse)))
    )
    return (*taken, fresh)


_SMALLEST_STEP = 1e-6


def _critical_value(spec: ExperimentSpec, conclusion: Conclusion, looks: Sequence[LookTaken]) -> float:
    comparisons = len(spec.with_role(Role.PRIMARY)) * len(spec.treatments)
    full = max(1.0, looks[-1].information)
    design = group_sequential(
        [look.information / full for look in looks],
        alpha=spec.alpha / comparisons,
        sides=2,
        spending=(conclusion.spending or Spending.OBRIEN_FLEMING).value,
        spending_time=[look.look for look in looks],
    )
    return design.z[-1]


# --- decisions ---------------------------------------------------------------------------------------------


def ship(
    spec: ExperimentSpec,
    evaluation: Evaluation,
    *,
    runtime_ms: int,
    looks: Sequence[LookTaken] = (),
    ramp_over: bool = True,
) -> Decision | None:
    """The ship that is due, if one is: of several arms, the one with the strongest evidence.

    Args:
        spec: the plan.
        evaluation: the evidence; nothing ships while it is invalid.
        runtime_ms: of the data; nothing ships before the minimum runtime.
        looks: of a group sequential rule, those taken, this one included.
        ramp_over: whether the last stage of the ramp has had its minimums; True without a ramp.
    """
    if invalid(evaluation) or not ramp_over or runtime_ms < duration_ms(spec.minimum_runtime):
        return None
    if not spec.with_role(Role.PRIMARY):
        return _ship_safe(spec, evaluation)
    winners = [
        claim
        for claim in claims(spec, evaluation, looks)
        if not obstacles(evaluation, claim.result.arm, looks)
    ]
    if not winners:
        return None
    best = strongest(winners)
    arm, metric = best.result.arm, best.result.metric
    warnings = [
        f"warning: {words}"
        for says, words in (said_of(result) for result in evaluation.metrics if result.arm == arm)
        if says is Says.WARNING
    ]
    reason = "; ".join([f"{arm} is better in {metric}: {best.words}", *warnings])
    return Decision(action=Action.SHIP, reason=reason, arm=arm, metric=metric)


def _ship_safe(spec: ExperimentSpec, evaluation: Evaluation) -> Decision | None:
    """Without a primary: the one treatment of a ramp that came to its end with every guardrail non-inferior."""
    if spec.ramp is None or len(spec.treatments) != 1 or not all_safe(evaluation):
        return None
    (arm,) = spec.treatments
    reason = f"{arm.key} is proven non-inferior in every guardrail at the end of its ramp"
    return Decision(action=Action.SHIP, reason=reason, arm=arm.key)


def guardrails(evaluation: Evaluation) -> list[MetricResult]:
    """Every guardrail in every arm."""
    return [result for result in evaluation.metrics if result.role == Role.GUARDRAIL]


def harmed_arms(evaluation: Evaluation) -> frozenset[str]:
    """The arms in which a guardrail is proven harmed."""
    return frozenset(result.arm for result in guardrails(evaluation) if result.state is MetricState.HARMED)


def all_safe(evaluation: Evaluation) -> bool:
    """Whether there is a guardrail, and every one is proven non-inferior in every arm."""
    states = {result.state for result in guardrails(evaluation)}
    return states == {MetricState.SAFE}


def futility(spec: ExperimentSpec, evaluation: Evaluation, *, runtime_ms: int) -> Decision | None:
    """The stop for futility that is due, if one is: the sequence of every primary lies below its minimum effect.

    It concludes with the control. It is no protection, and so waits for valid data and the minimum runtime.
    """
    if spec.conclusion is None or not spec.conclusion.futility:
        return None
    if invalid(evaluation) or runtime_ms < duration_ms(spec.minimum_runtime):
        return None
    primaries = [result for result in evaluation.metrics if result.role == Role.PRIMARY]
    if not primaries or not all(_too_small(spec, result) for result in primaries):
        return None
    reason = "futility, no harm: every primary is proven to stay below its minimum effect in every arm"
    return Decision(action=Action.STOP, reason=reason)


def _too_small(spec: ExperimentSpec, result: MetricResult) -> bool:
    metric = metric_of(spec, result)
    if metric is None or metric.minimum_effect is None:
        return False
    least = metric.minimum_effect
    size = least.absolute if least.absolute is not None else least.relative
    found = _sequences(result, relative=least.absolute is None)
    good = metric.direction is Direction.INCREASE
    edges = [one.upper if good else None if one.lower is None else -one.lower for one in found]
    return bool(edges) and all(edge is not None and edge < (size or math.nan) for edge in edges)


def _sequences(result: MetricResult, *, relative: bool) -> list[Evidence]:
    """The confidence sequences on the scale of the minimum effect; none where the metric has none on it."""
    if relative:
        return [] if result.lift is None else [result.lift]
    if result.quantiles:
        return [quantile.effect for quantile in result.quantiles]
    # The effect of a rate is the logarithm of a ratio, which no difference in units of the metric speaks of.
    return [] if result.effect is None or result.method is Method.RATE_RATIO else [result.effect]
