"""The truth about the arms: means at any time, which arm harms, and which rewards come in time."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import special

from stream_xp.domain.experiment import OTHER, Direction, ExperimentSpec, Metric, Role
from stream_xp.domain.fields import duration_ms
from stream_xp.services.scenarios.scenario import Delays, DelayShape, Effect, World

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

TINY = 1e-12
"""Differences of means that are rounding."""
_NEVER = np.inf


class Truths:
    """The truth about every metric of a chunk of runs.

    Attributes:
        arms: keys, in the order of all arrays here.
        control: number of the control.
        values: values of the context, in the order of all arrays here.
        shares: of the units, by context.
        in_time: share of the rewards that come inside the attribution window, (metrics, arms).
        began_ms: when the effect begins, (metrics, runs, arms); infinite where its stage has not come.
        onset_ms: when an arm began to harm, (runs, arms), as far as it was noted; infinite before.
    """

    def __init__(self, world: World, runs: int) -> None:
        contexts, spec = world.scenario.contexts, world.spec
        self.arms = list(spec.weights)
        self.control = self.arms.index(spec.control.key)
        self.values = list(contexts.shares) if contexts else [OTHER]
        self.shares = np.array(list(contexts.shares.values()) if contexts else [1.0])
        self._spec = spec
        self._metrics = [_Truth(world, metric, self.arms, self.values) for metric in spec.metrics]
        self.in_time = np.array(
            [[in_time(world.scenario.delays, m.window_ms, arm) for arm in self.arms] for m in spec.metrics]
        )
        self.began_ms = np.stack([np.tile(one.since_ms, (runs, 1)) for one in self._metrics])
        self.onset_ms = np.full((runs, len(self.arms)), _NEVER)

    def reached(self, run: int, stage: int, now_ms: float) -> None:
        """A run's ramp has come to a stage: effects that wait for it begin."""
        for at, one in enumerate(self._metrics):
            begins = (one.stage <= stage) & np.isinf(self.began_ms[at, run])
            self.began_ms[at, run, begins] = now_ms

    def means(self, metric: int, at_ms: float) -> Floats:
        """Mean of one unit, (runs, contexts, arms), of units exposed at a time, were every reward in time."""
        return self._metrics[metric].means(at_ms, self.began_ms[metric])

    def counted(self, metric: int, at_ms: float) -> Floats:
        """Mean of what is counted of one unit in its window, (runs, contexts, arms)."""
        return np.asarray(self.means(metric, at_ms) * self.in_time[metric])

    def harming(self, at_ms: float) -> Bools:
        """Whether an arm harms now, (runs, arms): over all contexts worse in a guardrail than that tolerates."""
        harming = np.zeros(self.onset_ms.shape, np.bool_)
        for at, metric in enumerate(self._spec.metrics):
            if metric.role is Role.GUARDRAIL:
                means = np.einsum("rca,c->ra", self.counted(at, at_ms), self.shares)
                control = means[:, [self.control]]
                worse = oriented(metric, control - means)
                harming |= worse > tolerated(metric, control) + TINY
        return harming

    def note(self, start_ms: float, harming: Bools) -> None:
        """Note the arms that harm in a stretch of time; the first one is the onset."""
        self.onset_ms[harming & np.isinf(self.onset_ms)] = start_ms

    def can_harm(self, world: World) -> bool:
        """Whether an arm can ever come to harm, its ramp supposed to come to every stage."""
        times = [0, *(duration_ms(p.at) for truth in world.scenario.truths.values() for p in truth.drift)]
        for metric in world.spec.metrics:
            effects = world.scenario.truths[metric.key].arms.values()
            times += [duration_ms(effect.since) for effect in effects if effect.since]
        found = False
        for time_ms in times:
            # Effects that fade are largest when they begin.
            began, self.began_ms = self.began_ms, np.full_like(self.began_ms, time_ms)
            found = found or bool(self.harming(time_ms).any())
            self.began_ms = began
        return found


class _Truth:
    """The truth about one metric, as arrays over arms and contexts."""

    def __init__(self, world: World, metric: Metric, arms: list[str], values: list[str]) -> None:
        truth = world.scenario.truths[metric.key]
        effects = [truth.arms.get(arm, Effect(times=1.0)) for arm in arms]
        self._mean = truth.mean
        self._drift_ms = [duration_ms(point.at) for point in truth.drift] or [0]
        self._drift = [point.times for point in truth.drift] or [1.0]
        self._times = np.array([effect.times for effect in effects])
        self._half_ms = np.array([duration_ms(one.half_life) if one.half_life else _NEVER for one in effects])
        self._mix = np.array(
            [
                [truth.levels.get(v, 1.0) * truth.contexts.get(v, {}).get(arm, 1.0) for arm in arms]
                for v in values
            ]
        )
        self.stage = np.array([_NEVER if effect.stage is None else effect.stage for effect in effects])
        since = [duration_ms(effect.since) if effect.since else 0.0 for effect in effects]
        self.since_ms = np.where(np.isinf(self.stage), since, _NEVER)

    def means(self, at_ms: float, began_ms: Floats) -> Floats:
        age = at_ms - began_ms
        begun = age >= 0
        left = np.exp2(-np.where(begun, age, 0.0) / self._half_ms)
        effect = np.where(begun, 1.0 + (self._times - 1.0) * left, 1.0)
        baseline = self._mean * float(np.interp(at_ms, self._drift_ms, self._drift))
        return np.asarray(baseline * effect[:, None, :] * self._mix)


def oriented(metric: Metric, values: Floats) -> Floats:
    """Values that are large where they are good, of a metric that is to grow or to shrink."""
    return values if metric.direction is Direction.INCREASE else -values


def tolerated(metric: Metric, control_means: Floats) -> Floats:
    """Harm that stops nothing: the margin of a guardrail, none of a critical one."""
    return np.zeros_like(control_means) if metric.critical else margin(metric, control_means)


def margin(metric: Metric, control_means: Floats) -> Floats:
    """The margin of a guardrail in units of the metric; 0 where it has none."""
    if metric.margin is None:
        return np.zeros_like(control_means)
    if metric.margin.absolute is not None:
        return np.full_like(control_means, metric.margin.absolute)
    return np.asarray((metric.margin.relative or 0.0) * np.abs(control_means))


def in_time(delays: Delays | None, age_ms: float, arm: str) -> float:
    """Share of the rewards of an arm that have come at an age of their unit."""
    if delays is None:
        return 1.0
    if age_ms <= 0:
        return 0.0
    ratio = age_ms / duration_ms(delays.arms.get(arm, delays.mean))
    if delays.distribution is DelayShape.EXPONENTIAL:
        return -math.expm1(-ratio)
    return float(special.ndtr(math.log(ratio) / delays.sigma + delays.sigma / 2))


def followed_metric(spec: ExperimentSpec) -> int:
    """Number of the metric that traffic is to follow."""
    keys = [metric.key for metric in spec.metrics]
    return keys.index(spec.allocation.metric if spec.allocation else (spec.primaries or spec.metrics)[0].key)
