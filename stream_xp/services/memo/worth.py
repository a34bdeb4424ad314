"""What an effect is worth after its experiment was stopped: shrunk by what past experiments have found.

Everything here is a function of what stands on the topics: the same records give the same numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from stream_xp import stats
from stream_xp.domain.decision import Evidence, Method, MetricResult, Result
from stream_xp.domain.experiment import ExperimentRecord, Metric, MetricKind, Threshold
from stream_xp.engine.design import plans
from stream_xp.services.memo.record import PriorSource, Shrunk
from stream_xp.stats.selection import MIN_EXPERIMENTS

_NORMAL: Final = (
    Method.EXACT_THEN_ASYMPTOTIC,
    Method.ASYMPTOTIC,
    Method.CUPED,
    Method.ANCOVA,
    Method.RATIO,
)
"""Methods whose sequence is a normal mixture around a difference, so that it tells the standard error."""


MOST_PAST: Final = 1000
"""Past effects on one metric that the prior is learned from."""
DEFAULT_LIFT_SD: Final = 0.3
"""Standard deviation of relative effects where nothing else is known of them: two in three are below 30 %."""


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

    Those that run are there because who leaves them out keeps what stopped early, which are the large effects.

    Args:
        records: by experiment and version. A result whose record is gone is left out: what its tuning was is unknown.
        results: one per experiment version, that of its stop or its newest.

    Returns:
        Oldest first; of each metric at most `MOST_PAST`, those of the experiments that began last. When one ended
        depends on what it found, so that by its end no bound could choose: what stops early has large effects.
    """
    by_metric: defaultdict[tuple[str, MetricKind], list[Past]] = defaultdict(list)
    for result in sorted(results, key=_began):
        record = records.get((result.experiment, result.version))
        for one in () if record is None else _of_result(record, result):
            by_metric[one.metric, one.kind].append(one)
    return [one for found in by_metric.values() for one in found[-MOST_PAST:]]


def _began(result: Result) -> tuple[int, str, int]:
    """About when it began, and its name: an order that does not depend on what it found."""
    return result.evaluated_ms - result.runtime_ms, result.experiment, result.version


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

    Effects of this experiment, of whatever version, are not its own past. With fewer than `MIN_EXPERIMENTS` of others
    the prior is the default one: as wide as `DEFAULT_LIFT_SD` of the control mean, or as the minimum effect if that
    is larger.
    """
    metric = next((one for one in record.spec.metrics if one.key == result.metric), None)
    mine = [
        one
        for one in past
        if metric is not None
        and (one.metric, one.kind) == (metric.key, metric.kind)
        and one.experiment != record.spec.experiment
    ]
    error = standard_error(record, result)
    if metric is None or error is None or result.effect is None or result.effect.estimate is None:
        return Shrunk(experiments=len(mine), note="there is no standard error to shrink by")
    prior = _prior(metric, result, mine)
    if prior is None:
        note = f"{_too_few(len(mine))}, and no default one: the control mean is 0, and the metric has no minimum effect"
        return Shrunk(experiments=len(mine), standard_error=error, note=note)
    found = stats.selected_effect(result.effect.estimate, error, prior_sd=prior.sd)
    return Shrunk(
        experiments=len(mine),
        standard_error=error,
        prior=prior.source,
        prior_sd=prior.sd,
        effect=float(found.effect),
        sd=float(found.sd),
        shrinkage=float(found.shrinkage),
        type_s=float(found.type_s),
        type_m=float(found.type_m),
        note=prior.note,
    )


class _Prior(NamedTuple):
    """Of the true effects, even around 0; the side that is good does not matter."""

    source: PriorSource
    sd: float
    note: str | None = None


def _prior(metric: Metric, result: MetricResult, past: list[Past]) -> _Prior | None:
    if len(past) >= MIN_EXPERIMENTS:
        effects, errors = [one.effect for one in past], [one.standard_error for one in past]
        return _Prior(PriorSource.LEARNED, float(stats.prior_from_past(effects, errors).sd))
    # A margin says what is tolerable and a minimum effect what is wanted; only the latter also is thought possible.
    wanted = metric.minimum_effect or Threshold(relative=DEFAULT_LIFT_SD)
    control = abs(result.control_mean or 0.0)
    sd = max(DEFAULT_LIFT_SD * control, wanted.absolute or (wanted.relative or 0.0) * control)
    if sd == 0:
        return None
    note = f"{_too_few(len(past))}; as wide as {100 * DEFAULT_LIFT_SD:g} % of the control mean, or the minimum effect"
    return _Prior(PriorSource.DEFAULT, sd, note)


def _too_few(known: int) -> str:
    return f"no prior could be learned: {known} past effects on this metric are known, {MIN_EXPERIMENTS} are needed"
