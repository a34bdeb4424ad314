"""The policies of a spec as an allocator: its evidence, priors and constraints in, weights out."""

from __future__ import annotations

from collections.abc import Mapping

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Metric
from stream_xp.domain.rollout import Allocation
from stream_xp.domain.rollout import Policy as Wish
from stream_xp.domain.statistics import ExperimentStatistics
from stream_xp.engine.allocation import (
    BurnIn,
    Constraints,
    Policy,
    Prior,
    allocate,
    delayed_evidence,
    evidence_of,
)
from stream_xp.engine.conclusion import harmed_arms
from stream_xp.engine.evaluate import Evaluation
from stream_xp.engine.steering import Wanted, closed_arms


def weights_by_policy(
    record: ExperimentRecord, statistics: ExperimentStatistics, evaluation: Evaluation
) -> Wanted:
    """The weights that the policy of the spec wants after the newest epoch.

    Arms that harm a guardrail get none, nor do those that were closed before. What the policy cannot answer moves
    nothing, and says why: the experiment goes on with the weights it has.
    """
    spec = record.spec
    allocation = spec.allocation
    metric = next((one for one in spec.metrics if allocation and one.key == allocation.metric), None)
    if allocation is None or metric is None:
        return Wanted(None, {}, "the spec has no metric to follow")
    try:
        return _wanted(
            record, statistics, allocation, metric, closed=harmed_arms(evaluation) | closed_arms(record)
        )
    except ValueError as error:
        return Wanted(None, {}, f"weights stay: {error}")


def _wanted(
    record: ExperimentRecord,
    statistics: ExperimentStatistics,
    allocation: Allocation,
    metric: Metric,
    *,
    closed: frozenset[str],
) -> Wanted:
    spec, newest = record.spec, record.epochs[-1]
    feature = allocation.context if allocation.policy is Wish.CONTEXTUAL else None
    if allocation.delay is None:
        evidence = evidence_of(statistics, metric, arms=tuple(spec.weights), feature=feature)
    else:
        evidence = delayed_evidence(spec, allocation.delay, statistics, feature=feature)
    found = allocate(
        Policy(allocation.policy.value),
        evidence,
        newest.weights,
        control=spec.control.key,
        constraints=_constraints(allocation),
        direction=metric.direction,
        priors=_priors(spec, allocation),
        closed=closed,
        current_by_context=newest.contexts,
    )
    contexts = {value: one.weights for value, one in found.by_context.items()}
    return Wanted(found.weights, contexts, found.reason)


def _constraints(allocation: Allocation) -> Constraints:
    burn_in = allocation.burn_in
    return Constraints(
        floor=allocation.floor,
        maximum_change=allocation.maximum_change,
        minimum_change=allocation.minimum_change,
        burn_in=BurnIn(units=burn_in.units, conversions=burn_in.conversions, even=False),
        uniform_slice=allocation.uniform_slice,
    )


def _priors(spec: ExperimentSpec, allocation: Allocation) -> Mapping[str, Prior]:
    """The prior of each arm: its score, or one mean for all; the mean of past arms is one."""
    prior = allocation.prior
    if prior is None:
        return {}
    if prior.scores is not None:
        return {arm: Prior(mean=score, worth=prior.worth) for arm, score in prior.scores.items()}
    past = prior.past or ()
    mean = sum(past) / len(past) if past else prior.mean
    return {} if mean is None else {arm: Prior(mean=mean, worth=prior.worth) for arm in spec.weights}
