"""What alerts hold on to: harm and mismatches once proven, although later evidence may be weaker."""

from __future__ import annotations

from typing import NamedTuple

from stream_xp.domain.decision import Action, MetricState, Result
from stream_xp.domain.metric_defs import DecisionState
from stream_xp.engine.standing import Standing


class Latches(NamedTuple):
    """What was proven of one version since its newest reset.

    Attributes:
        since: id of that reset.
        breached: (metric, arm) of guardrails that were harmed.
        mismatch: whether the sample ratio was wrong.
    """

    version: int
    since: str | None
    breached: frozenset[tuple[str, str]] = frozenset()
    mismatch: bool = False


def latches(result: Result, standing: Standing, before: Latches | None) -> Latches:
    """What is proven now, or was before.

    A stop in force names its metric and arm, so that a worker that has just started knows them too. What was proven
    beside it is known as long as some worker keeps the experiment, or the evidence says it still.
    """
    if before is None or (before.version, before.since) != (result.version, standing.since):
        before = Latches(result.version, standing.since)
    harmed = {(one.metric, one.arm) for one in result.metrics if one.state is MetricState.HARMED}
    for held in (standing.latched, standing.proposed):
        if held is not None and held.decision.action is Action.STOP and held.decision.metric is not None:
            harmed.add((held.decision.metric, held.decision.arm or ""))
    ratio = result.sample_ratio
    return before._replace(
        breached=before.breached | harmed,
        mismatch=before.mismatch or (ratio is not None and ratio.mismatch),
    )


def decision_state(result: Result, standing: Standing) -> DecisionState:
    """Where an experiment that has a result stands, in one word."""
    if standing.latched is not None:
        shipped = standing.latched.decision.action is Action.SHIP
        return DecisionState.SHIPPED if shipped else DecisionState.STOPPED
    if standing.proposed is not None:
        return DecisionState.PROPOSED
    if result.invalid:
        return DecisionState.INVALID
    return DecisionState.RUNNING if standing.paused is None else DecisionState.PAUSED
