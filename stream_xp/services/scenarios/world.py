"""Units and rewards of many runs at once: what the engine's fold would have counted, drawn as arrays.

Per run and stretch of time, units of each context and arm are independent Poisson counts, a conversion's sum is
binomial and a mean's sums are those of its units. That is the law of the statistics of single units, so the units
need not be there. A stretch lies on one side of every time that tells units apart: begin of a weight epoch, end of
an attribution window. So the units of a stretch are counted as mature together, exactly when the fold would.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import special

from stream_xp.domain.decision import ConfigRecord
from stream_xp.domain.experiment import OTHER, Direction, Metric, MetricKind, Role
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.statistics import ALL, ExperimentStatistics, MetricKey, UnitKey, build
from stream_xp.services.scenarios.scenario import Delays, DelayShape, Effect, Profile, Scenario, World

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

HOUR_MS = 3_600_000
_DAY_MS = 24 * HOUR_MS
_SWING = 0.6
_NEVER = np.inf


class Stretch(NamedTuple):
    """A span of time, [start, end), milliseconds from the begin of the runs."""

    start_ms: int
    end_ms: int

    @property
    def middle_ms(self) -> float:
        """Where rates and truths are taken."""
        return (self.start_ms + self.end_ms) / 2


@dataclass(slots=True)
class _Cohort:
    """Units of one stretch that wait for a metric's window to end.

    Attributes:
        mature_ms: when they count.
        epoch: weight epoch of each run then.
        live: runs that were not concluded then.
        cells: n, s and q, (3, runs, contexts, arms).
    """

    mature_ms: int
    epoch: Ints
    live: Bools
    cells: Ints


class Truths:
    """The truth about every metric of a chunk of runs.

    Args:
        world: the scenario.
        runs: how many.
    """

    def __init__(self, world: World, runs: int) -> None:
        self.arms = list(world.spec.weights)
        self.values = list(world.scenario.contexts.shares) if world.scenario.contexts else [OTHER]
        self._metrics = [_Truth(world, metric, self.arms, self.values) for metric in world.spec.metrics]
        self.began_ms = np.stack([np.tile(one.since_ms, (runs, 1)) for one in self._metrics])
        """Metric, run, arm: when the effect begins; infinite where its stage has not come."""
        self._bad = np.stack([one.bad for one in self._metrics])

    def reached(self, run: int, stage: int, now_ms: float) -> None:
        """A run's ramp has come to a stage: effects that wait for it begin."""
        for at, one in enumerate(self._metrics):
            begins = (one.stage <= stage) & np.isinf(self.began_ms[at, run])
            self.began_ms[at, run, begins] = now_ms

    def means(self, metric: int, at_ms: float) -> Floats:
        """Mean of one unit, (runs, contexts, arms), of units exposed at a time."""
        return self._metrics[metric].means(at_ms, self.began_ms[metric])

    def harming(self, at_ms: float) -> Bools:
        """Whether an arm is worse in a guardrail now, (runs, arms)."""
        return np.asarray((self._bad[:, None, :] & (self.began_ms <= at_ms)).any(axis=0))

    def onset_ms(self) -> Floats:
        """When the first arm began to be worse in a guardrail, of each run; infinite if none did."""
        return np.asarray(np.where(self._bad[:, None, :], self.began_ms, _NEVER).min(axis=(0, 2)))


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
        worse = self._times > 1.0 if metric.direction is Direction.DECREASE else self._times < 1.0
        self.bad = worse & (metric.role is Role.GUARDRAIL)

    def means(self, at_ms: float, began_ms: Floats) -> Floats:
        age = at_ms - began_ms
        begun = age >= 0
        left = np.exp2(-np.where(begun, age, 0.0) / self._half_ms)
        effect = np.where(begun, 1.0 + (self._times - 1.0) * left, 1.0)
        baseline = self._mean * float(np.interp(at_ms, self._drift_ms, self._drift))
        return np.asarray(baseline * effect[:, None, :] * self._mix)


def in_time(delays: Delays | None, window_ms: int) -> float:
    """Share of the rewards that come inside the attribution window."""
    if delays is None:
        return 1.0
    ratio = window_ms / duration_ms(delays.mean)
    if delays.distribution is DelayShape.EXPONENTIAL:
        return -math.expm1(-ratio)
    return float(special.ndtr(math.log(ratio) / delays.sigma + delays.sigma / 2))


class Drawn:
    """The statistics of a chunk of runs, drawn one look after the other.

    Args:
        world: the scenario.
        runs: how many.
        rng: of every number.
    """

    def __init__(self, world: World, runs: int, rng: np.random.Generator) -> None:
        scenario, spec = world.scenario, world.spec
        self.spec, self.runs, self._scenario, self._rng = spec, runs, scenario, rng
        self.truths = Truths(world, runs)
        self._shares = np.array(list(scenario.contexts.shares.values()) if scenario.contexts else [1.0])
        self._labels, self._members = _segments(world, self.truths.values)
        contexts, arms = len(self.truths.values), len(spec.arms)
        self._weights = np.zeros((runs, contexts, arms))
        self._coverage = np.zeros(runs)
        self._epoch = np.zeros(runs, np.int64)
        self.live = np.ones(runs, np.bool_)
        self._coming: dict[int, ConfigRecord] = {}
        self._units = np.zeros((runs, 1, arms, contexts), np.int64)
        self._moments = np.zeros((len(spec.metrics), 3, runs, 1, arms, contexts), np.int64)
        self._waiting: list[deque[_Cohort]] = [deque() for _ in spec.metrics]
        self._windows = [m.window_ms + duration_ms(scenario.lateness) for m in spec.metrics]
        self._in_time = [in_time(scenario.delays, metric.window_ms) for metric in spec.metrics]
        self.pooled = np.zeros((len(spec.metrics), 3, runs, arms), np.int64)
        """n, s and q of mature units over all weight epochs, what came after a conclusion too."""
        self.first_ms: list[int | None] = [None] * runs
        self.harmed = np.zeros(runs)
        """Units exposed to an arm while it was worse in a guardrail, also after a conclusion."""
        self._offsets = _offsets(scenario, self._windows)

    def follow(self, run: int, config: ConfigRecord, now_ms: int) -> None:
        """Expose the units of a run as a config says, from when it is effective."""
        if config.effective_ms <= now_ms:
            self._apply(run, config)
        else:
            self._coming[run] = config

    def _apply(self, run: int, config: ConfigRecord) -> None:
        arms = self.truths.arms
        tables = [config.contexts.get(value, config.weights) for value in self.truths.values]
        self._weights[run] = [[table[arm] for arm in arms] for table in tables]
        self._coverage[run], self._epoch[run] = config.coverage, config.weight_epoch
        if config.weight_epoch >= self._units.shape[1]:
            more = config.weight_epoch + 8 - self._units.shape[1]
            self._units = np.pad(self._units, [(0, 0), (0, more), (0, 0), (0, 0)])
            self._moments = np.pad(self._moments, [(0, 0)] * 3 + [(0, more), (0, 0), (0, 0)])

    def shadow(self, run: int, weights: Mapping[str, float]) -> None:
        """Go on with other weights after a conclusion, as a person would have without it."""
        self._weights[run] = [weights[arm] for arm in self.truths.arms]

    def weights(self, run: int) -> Floats:
        """Weights in force, (contexts, arms)."""
        return np.asarray(self._weights[run])

    # --- drawing ---------------------------------------------------------------------------------------------

    def stretches(self, look: int) -> list[Stretch]:
        """The stretches between a look and the one before; looks count from 1."""
        looks_ms = duration_ms(self._scenario.looks)
        edges = [(look - 1) * looks_ms + offset for offset in (*self._offsets, looks_ms)]
        return [Stretch(start, end) for start, end in pairwise(edges)]

    def draw(self, span: Stretch) -> Ints:
        """Draw the units of a stretch and their rewards; their numbers, (runs, contexts, arms)."""
        for run in [run for run, config in self._coming.items() if config.effective_ms <= span.start_ms]:
            self._apply(run, self._coming.pop(run))
        rate = _rate(self._scenario, span)
        expected = rate * self._coverage[:, None, None] * self._shares[:, None] * self._weights
        units: Ints = self._rng.poisson(expected)
        self._expose(units, span)
        for at, metric in enumerate(self.spec.metrics):
            s, q = self._rewards(metric, units, self.truths.means(at, span.middle_ms), self._in_time[at])
            mature_ms = span.end_ms + self._windows[at]
            cells = np.stack([units, s, q])
            self._waiting[at].append(_Cohort(mature_ms, self._epoch.copy(), self.live.copy(), cells))
        return units

    def _expose(self, units: Ints, span: Stretch) -> None:
        runs = np.flatnonzero(self.live)
        self._units[runs, self._epoch[runs]] += units[runs].transpose(0, 2, 1)
        by_arm = units.sum(axis=1)
        self.harmed += (by_arm * self.truths.harming(span.middle_ms)).sum(axis=1)
        total = by_arm.sum(axis=1)
        for run in runs:
            if self.first_ms[run] is None and total[run]:
                share = self._rng.beta(1, total[run])  # The least of so many uniform times.
                self.first_ms[run] = int(span.start_ms + share * (span.end_ms - span.start_ms))

    def _rewards(self, metric: Metric, units: Ints, means: Floats, in_time: float) -> tuple[Ints, Ints]:
        if metric.kind is MetricKind.CONVERSION:
            converted: Ints = self._rng.binomial(units, np.clip(means * in_time, 0.0, 1.0))
            return converted, converted
        sd = self._scenario.truths[metric.key].sd or 0.0
        flat = units.ravel()
        values = self._rng.normal(np.repeat(means.ravel(), flat), sd)
        values[self._rng.random(len(values)) >= in_time] = 0.0
        steps = np.clip(np.rint(values / metric.step), -metric.max_steps, metric.max_steps).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(flat)])
        s, q = (np.concatenate([[0], np.cumsum(one)])[ends] for one in (steps, steps * steps))
        return np.diff(s).reshape(units.shape), np.diff(q).reshape(units.shape)

    # --- counting --------------------------------------------------------------------------------------------

    def mature(self, watermark_ms: int) -> None:
        """Count the units whose windows are over at a watermark."""
        for at, waiting in enumerate(self._waiting):
            while waiting and waiting[0].mature_ms <= watermark_ms:
                cohort = waiting.popleft()
                runs = np.flatnonzero(cohort.live)
                for word in range(3):
                    one = cohort.cells[word, runs].transpose(0, 2, 1)
                    self._moments[at, word][runs, cohort.epoch[runs]] += one
                self.pooled[at] += cohort.cells.sum(axis=2)

    def statistics(self, runs: list[int]) -> list[ExperimentStatistics]:
        """What the fold would have of each of these runs."""
        units = (self._units[runs] @ self._members).tolist()
        moments = (self._moments[:, :, runs] @ self._members).tolist()
        return [
            self._of_run(run, units[at], [[word[at] for word in m] for m in moments])
            for at, run in enumerate(runs)
        ]

    def _of_run(
        self, run: int, units: list[list[list[int]]], moments: list[list[list[list[list[int]]]]]
    ) -> ExperimentStatistics:
        keys: list[tuple[int, int, int, UnitKey]] = [
            (e, a, at, (arm, e, label))
            for e in range(int(self._epoch[run]) + 1)
            for a, arm in enumerate(self.truths.arms)
            for at, label in enumerate(self._labels)
            if units[e][a][at]
        ]
        cells: dict[MetricKey, tuple[int, ...]] = {
            (metric.key, *key): (n[e][a][at], s[e][a][at], q[e][a][at])
            for metric, (n, s, q) in zip(self.spec.metrics, moments, strict=True)
            for e, a, at, key in keys
            if n[e][a][at]
        }
        return build(
            units={key: units[e][a][at] for e, a, at, key in keys},
            moments=cells,
            crossover_units=0,
            first_exposure_ms=self.first_ms[run],
            out_of_range={},
        )


def _offsets(scenario: Scenario, windows: list[int]) -> list[int]:
    """Where the stretches of a look begin: at it, where weights become active, and where windows end at later looks."""
    looks_ms = duration_ms(scenario.looks)
    return sorted(
        {0, duration_ms(scenario.activation) % looks_ms, *(-window % looks_ms for window in windows)}
    )


def _rate(scenario: Scenario, span: Stretch) -> float:
    """Expected units of a stretch at full coverage."""
    hours = (span.end_ms - span.start_ms) / HOUR_MS
    swing = 0.0
    if scenario.traffic.profile is Profile.DAILY:
        swing = -_SWING * math.cos(2 * math.pi * span.middle_ms / _DAY_MS)
    return scenario.traffic.units_per_hour * hours * (1.0 + swing)


def _segments(world: World, values: list[str]) -> tuple[list[str], Ints]:
    """Labels of the rows, and which contexts each has, (contexts, labels)."""
    labels, members = [ALL], [[1] * len(values)]
    known = world.scenario.contexts.segment if world.scenario.contexts else None
    for segment, registered in world.spec.segments.items():
        for value in (*registered, OTHER):
            labels.append(f"{segment}={value}")
            found = [value == one for one in values] if segment == known else [value == OTHER] * len(values)
            members.append([int(one) for one in found])
    return labels, np.array(members, np.int64).T
