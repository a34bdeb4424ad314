"""What an effect is worth after its experiment was stopped: shrunk by what past experiments have found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from stream_xp import stats
from stream_xp.domain.decision import Evidence, Method, MetricResult, Result
from stream_xp.domain.experiment import ExperimentRecord, MetricKind
from stream_xp.engine.design import plans
from stream_xp.services.memo.record import Shrunk
from stream_xp.stats.selection import MIN_EXPERIMENTS

_NORMAL: Final = (
    Method.EXACT_THEN_ASYMPTOTIC,
    Method.ASYMPTOTIC,
    Method.CUPED,
    Method.ANCOVA,
    Method.RATIO,
)
"""Methods whose sequence is a normal mixture around a difference, so that it tells the standard error."""


class Past(NamedTuple):
    """What one experiment found in one metric and arm, in metric units, at its own stop.

    Attributes:
        metric, kind: key and kind; only effects of the same key and kind are of one unit.
    """

    experiment: str
    version: int
    metric: str
    kind: MetricKind
    arm: str
    effect: float
    standard_error: float


def past_effects(
    records: Mapping[tuple[str, int], ExperimentRecord], results: Iterable[Result]
) -> list[Past]:
    """The effects of experiments, winners, losers and those that still run, one for each metric and arm.

    Args:
        records: by experiment and version. A result whose record is gone is left out: what its tuning was is unknown.
        results: one per experiment version, that of its stop or its newest.
    """
    return [
        one
        for result in results
        if (record := records.get((result.experiment, result.version))) is not None
        for one in _of_result(record, result)
    ]


def _of_result(record: ExperimentRecord, result: Result) -> list[Past]:
    kinds = {metric.key: metric.kind for metric in record.spec.metrics}
    found = []
    for metric in result.metrics:
        error = standard_error(record, metric)
        if error is not None and metric.effect is not None and metric.effect.estimate is not None:
            about = (result.experiment, result.version, metric.metric, kinds[metric.metric], metric.arm)
            found.append(Past(*about, metric.effect.estimate, error))
    return found


def standard_error(record: ExperimentRecord, result: MetricResult) -> float | None:
    """The standard error of an effect: as it was reported, or from the half width of its sequence.

    The half width of a normal mixture is the standard error times a number that follows from the design and the
    units. A sequence that an exact test helps is narrowed on the side of 0 only, so the other side is taken.

    Returns:
        Metric units; None where there is none, or the method is no normal mixture.
    """
    if result.standard_error is not None:
        return result.standard_error
    plan = next((plan for plan in plans(record) if plan.metric.key == result.metric), None)
    width = None if result.effect is None else _far_width(result.effect)
    units = result.control_units + result.arm_units
    if plan is None or plan.fault is not None or width is None or result.method not in _NORMAL or units < 2:
        return None
    exact = result.method is Method.EXACT_THEN_ASYMPTOTIC
    alpha = plan.effect.alpha * (1.0 - stats.EXACT_SHARE if exact else 1.0)
    return width / stats.radius_multiplier_two_sided(units * plan.effect.rho2, alpha)


def _far_width(effect: Evidence) -> float | None:
    """The half width on the side that lies away from 0."""
    if effect.estimate is None:
        return None
    far = effect.upper if effect.estimate >= 0 else effect.lower
    width = None if far is None else abs(far - effect.estimate)
    return width or None


def shrunk(record: ExperimentRecord, result: MetricResult, past: Iterable[Past]) -> Shrunk:
    """The shrunk effect with its risks, by a prior from the past effects on the same metric.

    Effects of this experiment, of whatever version, are not its own past.
    """
    kind = next((one.kind for one in record.spec.metrics if one.key == result.metric), None)
    mine = [
        one
        for one in past
        if (one.metric, one.kind) == (result.metric, kind) and one.experiment != record.spec.experiment
    ]
    error = standard_error(record, result)
    if error is None or result.effect is None or result.effect.estimate is None:
        return Shrunk(experiments=len(mine), note="there is no standard error to shrink by")
    if not mine:
        return Shrunk(experiments=0, standard_error=error, note=_too_few(0))
    # The side that is good does not matter: the prior is even around 0.
    prior = stats.prior_from_past([one.effect for one in mine], [one.standard_error for one in mine])
    if not prior.known:
        return Shrunk(experiments=len(mine), standard_error=error, note=_too_few(len(mine)))
    found = stats.selected_effect(result.effect.estimate, error, prior_sd=float(prior.sd))
    return Shrunk(
        experiments=len(mine),
        standard_error=error,
        prior_sd=float(prior.sd),
        effect=float(found.effect),
        sd=float(found.sd),
        shrinkage=float(found.shrinkage),
        type_s=float(found.type_s),
        type_m=float(found.type_m),
    )


def _too_few(known: int) -> str:
    return f"no prior could be learned: {known} past effects on this metric are known, {MIN_EXPERIMENTS} are needed"
