"""What is watched beside metrics: crossovers, duplicates, the age of the data, lost rewards, arms that get no units.

Every monitor is a function of the statistics, the time given, and the monitors of the look before, which stand in its
result. Giving it its own answer as the look before changes nothing, so that a verification needs no other result.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream_xp import stats
from stream_xp.domain.decision import MonitorName, MonitorResult, MonitorState
from stream_xp.domain.experiment import Direction, ExperimentRecord, ExperimentSpec, Metric, MetricKind, Role
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.rollout import Monitors
from stream_xp.domain.statistics import ALL, ExperimentStatistics, Outcomes, UnitKey
from stream_xp.engine.comparison import cells
from stream_xp.engine.evaluate import Evaluation, counted_by
from stream_xp.engine.stalls import DataTime, stalls
from stream_xp.stats.bernoulli import TunedPrior, bernoulli_log_e
from stream_xp.stats.conversion_difference import pair_weights

_WARNS = frozenset({MonitorName.DUPLICATES})
"""Monitors that hold nothing."""


class Beside(NamedTuple):
    """What is known of an experiment beside its statistics.

    Attributes:
        exposures, rewards: outcomes of all records of its source partitions.
        data_age_ms: wall clock minus the least watermark; None before there is one.
        before: the monitors of the look before, or of this one.
        opened: id of the newest order that opens latches.
        time: how far its source partitions have come; None before each has a watermark.
    """

    exposures: Outcomes
    rewards: Outcomes
    data_age_ms: int | None
    before: tuple[MonitorResult, ...] = ()
    opened: str | None = None
    time: DataTime | None = None


def with_monitors(
    record: ExperimentRecord, statistics: ExperimentStatistics, evaluation: Evaluation, beside: Beside
) -> Evaluation:
    """The evaluation with what its monitors say; one that says invalid makes it so."""
    held = {(one.monitor, one.arm): one for one in beside.before}
    found = tuple(
        _latched(one, held.get((one.monitor, one.arm)), beside.opened)
        for one in (
            *_crossovers(record.spec, statistics),
            *_duplicates(record.spec, beside),
            *_data_age(record.spec, beside.data_age_ms),
            *_reward_losses(record, statistics),
            *_stalls(record, statistics, beside),
        )
    )
    reasons = [
        one.reason
        for one in found
        if one.state is MonitorState.INVALID and one.reason and one.reason not in evaluation.invalid
    ]
    return replace(evaluation, monitors=found, invalid=(*evaluation.invalid, *reasons))


def _latched(now: MonitorResult, before: MonitorResult | None, opened: str | None) -> MonitorResult:
    """The monitor with its latch: once proven it stays so, until an order opens it.

    An arm that has not begun does not latch: where its clients report later than others, it begins by itself.
    """
    proven = _proven(now)
    latches = proven and (now.run is None or now.run.units > 0)
    kept = before is not None and before.latched and before.since == opened
    state, reason = now.state, now.reason
    if state is MonitorState.QUIET and (proven or kept):
        state = MonitorState.WARNING if now.monitor in _WARNS else MonitorState.INVALID
        about = now.monitor.replace("_", " ") + (f" of {now.arm}" if now.arm else "")
        reason = reason if proven else f"{about}: proven before, and nobody has resumed or reset since"
    return msgspec.structs.replace(
        now,
        state=state,
        reason=None if state is MonitorState.QUIET else reason,
        latched=latches or kept,
        since=opened,
    )


def _proven(one: MonitorResult) -> bool:
    return one.log_e is not None and one.threshold_log_e is not None and one.log_e >= one.threshold_log_e


def _limits(spec: ExperimentSpec) -> Monitors:
    return spec.monitors or Monitors()


# --- shares that should stay low -----------------------------------------------------------------------------


def _crossovers(spec: ExperimentSpec, statistics: ExperimentStatistics) -> list[MonitorResult]:
    """Beyond its share an experiment is invalid, proven or not; the proof latches.

    A unit counts first, and as a crossover later: evidence is never ahead of that of units whose fate is known.
    """
    limits, bad = _limits(spec), statistics.crossover_units
    units = bad + sum(row.units for row in statistics.units if row.segment == ALL)
    found = _share(MonitorName.CROSSOVERS, spec, units, bad, limits.crossovers)
    over = bad > limits.crossovers * units
    state = MonitorState.INVALID if over else MonitorState.QUIET
    reason = f"{bad} units were seen in two arms, more than {100 * limits.crossovers:.4g} %"
    return [msgspec.structs.replace(found, state=state, reason=reason)]


def _duplicates(spec: ExperimentSpec, beside: Beside) -> list[MonitorResult]:
    limit = _limits(spec).duplicates
    if limit is None:
        return []
    records = beside.exposures.read + beside.rewards.read
    bad = beside.exposures.duplicate + beside.rewards.duplicate
    found = _share(MonitorName.DUPLICATES, spec, records, bad, limit)
    reason = f"{bad} of {records} records repeat another, more than {100 * limit:.4g} %"
    return [msgspec.structs.replace(found, reason=reason)]


def _share(name: MonitorName, spec: ExperimentSpec, n: int, bad: int, limit: float) -> MonitorResult:
    """The exact test that a share is above its limit, at every look."""
    alpha = _limits(spec).alpha
    prior = TunedPrior(t_opt=float(spec.planned_sample), alpha=min(2 * alpha, 0.5))
    log_e = bernoulli_log_e(n, bad, mean=limit, prior=prior, side="above")
    return MonitorResult(
        monitor=name,
        value=bad / n if n else None,
        limit=limit,
        log_e=float(log_e),
        threshold_log_e=-math.log(alpha),
    )


# --- age of the data -----------------------------------------------------------------------------------------


def _data_age(spec: ExperimentSpec, age_ms: int | None) -> list[MonitorResult]:
    """A state and no test: it has no evidence, and no latch."""
    limit = _limits(spec).data_age
    if limit is None:
        return []
    limit_ms = duration_ms(limit)
    old = age_ms is None or age_ms > limit_ms
    shown = "of unknown age" if age_ms is None else f"{age_ms / 1000:.1f} s old"
    return [
        MonitorResult(
            monitor=MonitorName.DATA_AGE,
            state=MonitorState.INVALID if old else MonitorState.QUIET,
            value=None if age_ms is None else float(age_ms),
            limit=float(limit_ms),
            reason=f"the data are {shown}, more than {limit}",
        )
    ]


# --- lost rewards --------------------------------------------------------------------------------------------


def _reward_losses(record: ExperimentRecord, statistics: ExperimentStatistics) -> list[MonitorResult]:
    """Of each treatment arm the metric with the strongest evidence; arms and metrics share the level."""
    spec, limit = record.spec, _limits(record.spec).reward_loss
    metrics = [metric for metric in spec.metrics if counts_units(metric)]
    if limit is None or not metrics:
        return []
    places = cells(record)
    keys = [arm.key for arm in spec.arms]
    at = [(keys.index(spec.control.key), keys.index(arm.key)) for arm in spec.treatments]
    weights = np.array(counted_by(spec, places, {})[1])
    pairs = np.array([pair_weights(weights, control=control, treatment=arm) for control, arm in at])
    with_reward = [counted_by(spec, places, _units_with_reward(metric, statistics))[0] for metric in metrics]
    hits = np.array([[np.array(rows, np.int64)[:, pair] for rows in with_reward] for pair in at])
    # All arms and metrics as one: what a test costs is mostly the call.
    test = stats.log_loss(hits, pairs[:, np.newaxis], largest_ratio=limit)
    threshold = math.log(len(metrics) * len(spec.treatments) / _limits(spec).alpha)
    found = []
    for i, arm in enumerate(spec.treatments):
        of_arm = [
            _Loss(
                metric,
                float(test.log_e[i, j]),
                float(test.log_e_treatment[i, j]),
                float(test.log_e_control[i, j]),
                _ratio(hits[i, j], pairs[i]),
            )
            for j, metric in enumerate(metrics)
        ]
        strongest = max(of_arm, key=lambda loss: (loss.evidence, loss.metric.key))
        found.append(_reward_loss(strongest, arm.key, spec.control.key, limit, threshold))
    return found


class _Loss(NamedTuple):
    """The test of one metric in one arm: its e-value, the two that it is the mean of, and the ratio seen."""

    metric: Metric
    either: float
    of_arm: float
    of_control: float
    ratio: float | None

    @property
    def evidence(self) -> float:
        """Of a guardrail only the side that looks good: harm is for its own test to say, and not explained away."""
        if self.metric.role is not Role.GUARDRAIL:
            return self.either
        return self.of_arm if self.metric.direction is Direction.DECREASE else self.of_control


def _reward_loss(loss: _Loss, arm: str, control: str, limit: float, threshold: float) -> MonitorResult:
    metric = loss.metric.key
    loser = arm if loss.of_arm >= loss.of_control else control
    return MonitorResult(
        monitor=MonitorName.REWARD_LOSS,
        arm=arm,
        metric=metric,
        value=loss.ratio,
        limit=limit,
        log_e=loss.evidence,
        threshold_log_e=threshold,
        reason=(
            f"rewards of {metric} are lost in {loser}: {arm} and {control} differ more than {limit:.4g} times"
        ),
    )


def counts_units(metric: Metric) -> bool:
    """Whether the statistics of a metric say how many units have a reward: sums of values do not."""
    return metric.zero_or_one or metric.at_once or metric.kind is MetricKind.LATENCY


def _units_with_reward(metric: Metric, statistics: ExperimentStatistics) -> dict[UnitKey, int]:
    found: dict[UnitKey, int] = {}
    for row in statistics.moments if metric.zero_or_one else ():
        if row.metric == metric.key:
            found[row.arm, row.epoch, row.segment] = int(row.s)
    for count in statistics.events:
        if count.metric == metric.key:
            found[count.arm, count.epoch, count.segment] = count.units
    for histogram in statistics.histograms:
        if histogram.metric == metric.key:
            key = (histogram.arm, histogram.epoch, histogram.segment)
            found[key] = sum(count for _, count in histogram.bins)
    return found


def _ratio(hits: NDArray[np.int64], pairs: NDArray[np.float64]) -> float | None:
    """Units with a reward in the arm over those that the control's make one expect; None without any of these."""
    both = (pairs > 0).all(axis=-1)
    control, arm = hits[both, 0], hits[both, 1]
    expected = float((control * pairs[both, 1] / pairs[both, 0]).sum())
    return float(arm.sum()) / expected if expected > 0 else None


# --- arms that get no units ------------------------------------------------------------------------------------


def _stalls(
    record: ExperimentRecord, statistics: ExperimentStatistics, beside: Beside
) -> list[MonitorResult]:
    if not _limits(record.spec).exposure_stall:
        return []
    runs = {
        one.arm: one.run
        for one in beside.before
        if one.monitor is MonitorName.EXPOSURE_STALL and one.arm is not None and one.run is not None
    }
    return stalls(record, statistics, beside.time, runs)


__all__ = ["Beside", "counts_units", "with_monitors"]
