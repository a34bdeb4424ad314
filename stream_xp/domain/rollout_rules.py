"""Rules across fields for what moves an experiment: conclusion, ramp, allocation and monitors."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from stream_xp.domain.fields import Fault, broken, duration_ms
from stream_xp.domain.rollout import UNIFORM, Allocation, BurnIn, Policy, Prior, Ramp, ShipRule, Stage

if TYPE_CHECKING:
    from stream_xp.domain.experiment import ExperimentSpec, Metric

MINIMUM_INTERVAL_MS = 60_000
"""Shortest time between two updates of weights: every update is a weight epoch, and epochs are bounded."""

LEAST_FLOOR = 0.01
"""Least weight of an arm that is not closed. An interval takes 5 %, which is the default."""

_SLACK = 1e-9
_LEAST_STEP = 1e-8
"""Looks that are nearer to each other, as a share of the later one, are one look (`stats.group_sequential`)."""


def rollout_faults(spec: ExperimentSpec) -> list[Fault]:
    """Every rule that the sections `conclusion`, `ramp`, `allocation` and `monitors` break."""
    return [
        *_conclusion_faults(spec),
        *_ramp_faults(spec),
        *_allocation_faults(spec),
        *_monitor_faults(spec),
    ]


def _placed(where: tuple[str | int, ...], found: list[tuple[str, str]]) -> list[Fault]:
    return [Fault((*where, field), message) for field, message in found]


def _moves_weights(spec: ExperimentSpec) -> bool:
    return spec.allocation is not None and spec.allocation.policy is not Policy.FIXED


# Conclusion ---------------------------------------------------------------------------------------


def _conclusion_faults(spec: ExperimentSpec) -> list[Fault]:
    conclusion = spec.conclusion
    if conclusion is None:
        return []
    rule, looks = conclusion.rule, conclusion.looks
    sequential, loss = rule is ShipRule.GROUP_SEQUENTIAL, rule is ShipRule.EXPECTED_LOSS
    found = broken(
        (
            rule is not ShipRule.ALWAYS_VALID and not spec.primaries,
            "rule",
            f"{rule} needs a primary metric",
        ),
        (loss and conclusion.maximum_loss is None, "rule", "expected_loss needs a maximum_loss"),
        (
            not loss and conclusion.maximum_loss is not None,
            "maximum_loss",
            "only the rule expected_loss has a maximum_loss",
        ),
        (sequential and looks is None, "rule", "group_sequential needs looks"),
        (not sequential and looks is not None, "looks", "only the rule group_sequential has looks"),
        (
            not sequential and conclusion.spending is not None,
            "spending",
            "only the rule group_sequential has a spending",
        ),
    )
    if sequential:
        found += _group_sequential_faults(spec, looks or (1.0,))
    return _placed(("conclusion",), found + _futility_faults(spec, futility=conclusion.futility))


def _group_sequential_faults(spec: ExperimentSpec, looks: tuple[float, ...]) -> list[tuple[str, str]]:
    others = [metric.key for metric in spec.primaries if not metric.averaged]
    return broken(
        (
            any(high - low < _LEAST_STEP * high for low, high in itertools.pairwise(looks)),
            "looks",
            "must grow from one to the next",
        ),
        (looks[-1] != 1.0, "looks", "the last look must be at the planned sample: 1"),
        (
            bool(others),
            "rule",
            f"group_sequential tests conversions and means only, a primary is neither: {', '.join(others)}",
        ),
        (
            spec.ramp is not None,
            "rule",
            "group_sequential looks at shares of one plan, which a ramp does not keep to",
        ),
        (_moves_weights(spec), "rule", "group_sequential needs weights that do not follow the evidence"),
    )


def _futility_faults(spec: ExperimentSpec, *, futility: bool) -> list[tuple[str, str]]:
    without = [metric.key for metric in spec.primaries if metric.minimum_effect is None]
    return broken(
        (futility and not spec.primaries, "futility", "needs a primary metric"),
        (
            futility and bool(without),
            "futility",
            f"needs a minimum_effect of every primary metric, there is none of: {', '.join(without)}",
        ),
    )


# Ramp ---------------------------------------------------------------------------------------------


def _ramp_faults(spec: ExperimentSpec) -> list[Fault]:
    ramp = spec.ramp
    if ramp is None:
        return []
    faults = _stage_faults(ramp)
    if not spec.guardrails:
        faults.append(Fault(("ramp",), "needs a guardrail, or nothing can be proven to do no harm"))
    return faults


def _stage_faults(ramp: Ramp) -> list[Fault]:
    where, last = ("ramp", "stages"), len(ramp.stages) - 1
    faults = [
        Fault((*where, at, "coverage"), f"must be over {before.coverage:g}, that of the stage before")
        for at, (before, stage) in enumerate(itertools.pairwise(ramp.stages), start=1)
        if stage.coverage <= before.coverage
    ]
    if _covers_a_part(ramp.stages[last]):
        faults.append(Fault((*where, last, "coverage"), "the last stage must cover all units: 1"))
    return faults


def _covers_a_part(stage: Stage) -> bool:
    return stage.coverage != 1.0


# Allocation ---------------------------------------------------------------------------------------


def _allocation_faults(spec: ExperimentSpec) -> list[Fault]:
    allocation = spec.allocation
    if allocation is None:
        return []
    moving = _moves_weights(spec)
    found = [
        *broken(
            (
                moving and spec.ramp is not None,
                "policy",
                "a ramp keeps the weights of the file, so only fixed goes with it",
            ),
            (
                duration_ms(allocation.interval) < MINIMUM_INTERVAL_MS,
                "interval",
                "must be at least 1m",
            ),
        ),
        *_context_faults(spec, allocation),
        *_uniform_faults(spec, allocation),
        *(_size_faults(spec, allocation) if moving else []),
    ]
    return [*_placed(("allocation",), found), *_metric_faults(spec, allocation)]


def _context_faults(spec: ExperimentSpec, allocation: Allocation) -> list[tuple[str, str]]:
    contextual, context = allocation.policy is Policy.CONTEXTUAL, allocation.context
    return broken(
        (contextual and context is None, "policy", "contextual needs a context"),
        (not contextual and context is not None, "context", "only the policy contextual has a context"),
        (
            contextual and context is not None and context not in spec.segments,
            "context",
            "is not one of the registered segments",
        ),
    )


def _uniform_faults(spec: ExperimentSpec, allocation: Allocation) -> list[tuple[str, str]]:
    name = allocation.uniform_segment
    if name is None:
        return []
    return broken(
        (
            UNIFORM not in spec.segments.get(name, ()),
            "uniform_segment",
            f"must be a registered segment with the value {UNIFORM}",
        ),
        (name == allocation.context, "uniform_segment", "must not be the context"),
        (
            allocation.uniform_slice == 0.0 or not _moves_weights(spec),
            "uniform_segment",
            "needs a uniform_slice over 0 of weights that follow the evidence",
        ),
    )


def _size_faults(spec: ExperimentSpec, allocation: Allocation) -> list[tuple[str, str]]:
    arms, floor, uniform = len(spec.arms), allocation.floor, allocation.uniform_slice
    least = max(floor, uniform / arms)
    below = [arm.key for arm in spec.arms if arm.weight < least - _SLACK]
    full = arms * floor > 1.0 + _SLACK
    return broken(
        (floor < LEAST_FLOOR, "floor", f"must be at least {LEAST_FLOOR:g}, or an arm is no longer compared"),
        (
            full,
            "floor",
            f"{arms} arms of at least {floor:g} are more than all traffic; at most 1/{arms} fits",
        ),
        (uniform >= 1.0, "uniform_slice", "must be below 1, or no weight can ever move"),
        (
            bool(below) and not full,
            "floor" if floor >= uniform / arms else "uniform_slice",
            f"no arm may have less than {least:g}, the weights of the file are below it for: {', '.join(below)}",
        ),
        (
            allocation.minimum_change >= allocation.maximum_change,
            "minimum_change",
            f"must be below maximum_change, which is {allocation.maximum_change:g}",
        ),
    )


def _metric_faults(spec: ExperimentSpec, allocation: Allocation) -> list[Fault]:
    metric = next((one for one in spec.metrics if one.key == allocation.metric), None)
    if metric is None:
        return [Fault(("allocation", "metric"), "is not the key of a metric")]
    usual = BurnIn().conversions
    found = broken(
        (
            metric in spec.guardrails,
            "metric",
            "must be primary or secondary, a guardrail stops and does not steer",
        ),
        (not metric.averaged, "metric", f"must be a conversion or a mean, it is a {metric.kind}"),
    )
    faults = _placed(("allocation",), found)
    if metric.averaged and not metric.zero_or_one and allocation.burn_in.conversions not in (0, usual):
        message = "only where the metric is a conversion"
        faults.append(Fault(("allocation", "burn_in", "conversions"), message))
    return faults + _prior_faults(spec, allocation.prior, metric)


def _prior_faults(spec: ExperimentSpec, prior: Prior | None, metric: Metric) -> list[Fault]:
    if prior is None:
        return []
    given = [name for name in ("mean", "scores", "past") if getattr(prior, name) is not None]
    if len(given) != 1:
        return [
            Fault(("allocation", "prior"), f"give exactly one of mean, scores and past, found {len(given)}")
        ]
    (name,) = given
    where = ("allocation", "prior", name)
    scores = prior.scores or {}
    arms = [arm.key for arm in spec.arms]
    missing = [key for key in arms if prior.scores is not None and key not in scores]
    faults = [Fault((*where, key), "is not an arm") for key in scores if key not in arms]
    if missing:
        faults.append(Fault(where, f"must name every arm, there is none of: {', '.join(missing)}"))
    if metric.zero_or_one and not all(0.0 < value < 1.0 for value in _expected(prior)):
        faults.append(
            Fault(where, "what is expected of a conversion must lie between 0 and 1, neither included")
        )
    return faults


def _expected(prior: Prior) -> list[float]:
    """The expected values that the prior gives."""
    if prior.past is not None:
        return [math.fsum(prior.past) / len(prior.past)]
    return list((prior.scores or {}).values()) if prior.mean is None else [prior.mean]


# Monitors -----------------------------------------------------------------------------------------


def _monitor_faults(spec: ExperimentSpec) -> list[Fault]:
    age = None if spec.monitors is None else spec.monitors.data_age
    if age is None or duration_ms(age) > 0:
        return []
    return [Fault(("monitors", "data_age"), "must be longer than 0")]
