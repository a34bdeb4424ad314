"""Units and rewards of many runs at once: what the engine's fold would have counted, drawn as arrays.

Per run and stretch of time, units of each context and arm are independent Poisson counts, a conversion's sum is
binomial and a mean's sums are those of its units. That is the law of the statistics of single units, so the units
need not be there. A stretch lies on one side of every time that tells units apart: begin of a weight epoch or of an
effect, end of an attribution window, end of the allowed lateness. So the units of a stretch are settled together, and
counted as mature together, exactly when the fold would.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from stream_xp.domain.decision import ConfigRecord
from stream_xp.domain.experiment import OTHER, Metric, MetricKind
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.statistics import ALL, ExperimentStatistics, MetricKey, UnitKey, build
from stream_xp.services.scenarios.arrivals import Arrivals
from stream_xp.services.scenarios.early import Early
from stream_xp.services.scenarios.open_units import Open
from stream_xp.services.scenarios.scenario import Comparison, Profile, Scenario, World
from stream_xp.services.scenarios.truths import Bools, Floats, Ints, Truths

HOUR_MS = 3_600_000
_DAY_MS = 24 * HOUR_MS
_SWING = 0.6


class Stretch(NamedTuple):
    """A span of time, [start, end), milliseconds from the begin of the runs."""

    start_ms: int
    end_ms: int

    @property
    def middle_ms(self) -> float:
        """Where rates and truths are taken."""
        return (self.start_ms + self.end_ms) / 2


_OfRun = list[list[list[list[int]]]]
"""Sums of one metric or age of a run: by word, epoch, arm and label."""


@dataclass(slots=True)
class _Cohort:
    """Units of one stretch that wait for a metric's window to end.

    Attributes:
        mature_ms: when they count.
        epoch: weight epoch of each run then.
        live: runs that were not concluded then.
        cells: n, s and q, (3, runs, contexts, arms).
        truth: of pairs of an arm and the control, (3, runs, arms): their units, and their units times the difference of
            the true means, and times the control's.
    """

    mature_ms: int
    epoch: Ints
    live: Bools
    cells: Ints
    truth: Floats


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
        self._labels, self._members = _segments(world, self.truths.values)
        contexts, arms = len(self.truths.values), len(spec.arms)
        self._weights = np.zeros((runs, contexts, arms))
        self._coverage = np.zeros(runs)
        self._epoch = np.zeros(runs, np.int64)
        self.live = np.ones(runs, np.bool_)
        self._coming: dict[int, ConfigRecord] = {}
        self._units = np.zeros((runs, 1, arms, contexts), np.int64)
        self._settled = np.zeros_like(self._units)
        lateness_ms = duration_ms(scenario.lateness)
        delays_ms = [duration_ms(scenario.arrivals.get(arm.key, "0s")) for arm in spec.arms]
        self._coming_units = Arrivals(delays_ms)
        self._settling = Arrivals([lateness_ms] * arms)
        self._moments = np.zeros((len(spec.metrics), 3, runs, 1, arms, contexts), np.int64)
        self._waiting: list[deque[_Cohort]] = [deque() for _ in spec.metrics]
        self._windows = [m.window_ms + lateness_ms for m in spec.metrics]
        self.pooled = np.zeros((len(spec.metrics), 3, runs, arms), np.int64)
        """n, s and q of mature units over all weight epochs, what came after a conclusion too."""
        self.early = Early(world, runs, rng) if Comparison.IMMATURE in scenario.comparisons else None
        self._open = Open(world, runs, rng)
        self._true = np.zeros((len(spec.metrics), 3, runs, arms))
        self.first_ms: list[int | None] = [None] * runs
        self.harmed = np.zeros(runs)
        """Units exposed to an arm while it harmed, as if nothing were ever concluded."""
        self._offsets = _offsets(scenario, [*self._windows, *self._open.reached_ms, *delays_ms, lateness_ms])

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
            wider = [(0, 0), (0, more), (0, 0), (0, 0)]
            self._units, self._settled = np.pad(self._units, wider), np.pad(self._settled, wider)
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
        expected = rate * self._coverage[:, None, None] * self.truths.shares[:, None] * self._weights
        units: Ints = self._rng.poisson(expected)
        self._expose(units, span)
        for at, metric in enumerate(self.spec.metrics):
            means = self.truths.means(at, span.middle_ms)
            s, q = self._rewards(metric, units, means, self.truths.in_time[at])
            if self.early is not None:
                self.early.expose(at, span.middle_ms, units.sum(axis=1), s.sum(axis=1))
            if metric is self._open.metric:
                self._open.expose(units, s, end_ms=span.end_ms, epoch=self._epoch, live=self.live)
            mature_ms, cells = span.end_ms + self._windows[at], np.stack([units, s, q])
            truth = self._pairs(units, means * self.truths.in_time[at])
            self._waiting[at].append(_Cohort(mature_ms, self._epoch.copy(), self.live.copy(), cells, truth))
        return units

    def _pairs(self, units: Ints, means: Floats) -> Floats:
        control = slice(self.truths.control, self.truths.control + 1)
        open_ = (self._weights > 0) & (self._weights[:, :, control] > 0)
        pairs = np.where(open_, units + units[:, :, control], 0)
        base = means[:, :, control]
        return np.stack([pairs.sum(axis=1), (pairs * (means - base)).sum(axis=1), (pairs * base).sum(axis=1)])

    def _expose(self, units: Ints, span: Stretch) -> None:
        runs = np.flatnonzero(self.live)
        for arrivals in (self._coming_units, self._settling):
            arrivals.expose(span.end_ms, self._epoch, self.live, units)
        by_arm, harming = units.sum(axis=1), self.truths.harming(span.middle_ms)
        self.truths.note(span.start_ms, harming)
        self.harmed += (by_arm * harming).sum(axis=1)
        total = by_arm.sum(axis=1)
        for run in runs:
            if self.first_ms[run] is None and total[run]:
                share = self._rng.beta(1, total[run])  # The least of so many uniform times.
                self.first_ms[run] = int(span.start_ms + share * (span.end_ms - span.start_ms))

    def _rewards(self, metric: Metric, units: Ints, means: Floats, in_time: Floats) -> tuple[Ints, Ints]:
        if metric.kind is MetricKind.CONVERSION:
            converted: Ints = self._rng.binomial(units, np.clip(means * in_time, 0.0, 1.0))
            return converted, converted
        sd = self._scenario.truths[metric.key].sd or 0.0
        flat = units.ravel()
        values = self._rng.normal(np.repeat(means.ravel(), flat), sd)
        shares = np.broadcast_to(in_time, units.shape).ravel()
        values[self._rng.random(len(values)) >= np.repeat(shares, flat)] = 0.0
        steps = np.clip(np.rint(values / metric.step), -metric.max_steps, metric.max_steps).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(flat)])
        s, q = (np.concatenate([[0], np.cumsum(one)])[ends] for one in (steps, steps * steps))
        return np.diff(s).reshape(units.shape), np.diff(q).reshape(units.shape)

    # --- counting --------------------------------------------------------------------------------------------

    def mature(self, watermark_ms: int) -> None:
        """Count the units that are there, settled, of an age, and those whose windows are over, at a watermark."""
        for arrivals, table in ((self._coming_units, self._units), (self._settling, self._settled)):
            for crowd in arrivals.due(watermark_ms):
                crowd.enter(table)
        self._open.mature(watermark_ms)
        for at, waiting in enumerate(self._waiting):
            while waiting and waiting[0].mature_ms <= watermark_ms:
                cohort = waiting.popleft()
                runs = np.flatnonzero(cohort.live)
                for word in range(3):
                    one = cohort.cells[word, runs].transpose(0, 2, 1)
                    self._moments[at, word][runs, cohort.epoch[runs]] += one
                self.pooled[at] += cohort.cells.sum(axis=2)
                self._true[at] += cohort.truth
        if self.early is not None:
            self.early.look(watermark_ms)

    def true_effect(self, metric: int, run: int, arm: int) -> tuple[float, float]:
        """What a test of the mature units is about: the arm's mean minus the control's, and the control's.

        Averaged over the units of both, where both could be met: it is what a comparison inside weight epochs and
        contexts estimates. 0 while there are none.
        """
        pairs, differences, base = self._true[metric, :, run, arm].tolist()
        return (differences / pairs, base / pairs) if pairs else (0.0, 0.0)

    def statistics(self, runs: list[int]) -> list[ExperimentStatistics]:
        """What the fold would have of each of these runs."""
        units, settled = ((table[runs] @ self._members).tolist() for table in (self._units, self._settled))
        moments = (self._moments[:, :, runs] @ self._members).tolist()
        by_age = (self._open.sums[:, :, runs] @ self._members).tolist()
        return [
            self._of_run(
                run,
                (units[at], settled[at]),
                [[word[at] for word in m] for m in moments],
                [[word[at] for word in age] for age in by_age],
            )
            for at, run in enumerate(runs)
        ]

    def _of_run(
        self,
        run: int,
        counts: tuple[list[list[list[int]]], list[list[list[int]]]],
        moments: list[_OfRun],
        by_age: list[_OfRun],
    ) -> ExperimentStatistics:
        units, settled = counts
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
        products: dict[MetricKey, tuple[int, ...]] = {}
        for name, (n, s, before) in zip(self._open.names, by_age, strict=True):
            for e, a, at, key in keys:
                if e < len(n) and n[e][a][at]:
                    cells[name, *key] = n[e][a][at], s[e][a][at], s[e][a][at]
                    # A value is 0 or 1, and 1 at an age after which it was 1.
                    products[name, *key] = (before[e][a][at],) * 3
        return build(
            units={key: units[e][a][at] for e, a, at, key in keys},
            settled={key: settled[e][a][at] for e, a, at, key in keys},
            moments=cells,
            products={key: sums for key, sums in products.items() if key[0] != self._open.names[0]},
            crossover_units=0,
            first_exposure_ms=self.first_ms[run],
            out_of_range={},
        )


def _offsets(scenario: Scenario, spans_ms: list[int]) -> list[int]:
    """Where the stretches of a look begin.

    At it, where weights become active, where effects begin, and the spans before later looks.
    """
    looks_ms = duration_ms(scenario.looks)
    since = [
        duration_ms(effect.since)
        for truth in scenario.truths.values()
        for effect in truth.arms.values()
        if effect.since
    ]
    ends = [-span for span in spans_ms]
    return sorted({at % looks_ms for at in (0, duration_ms(scenario.activation), *since, *ends)})


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
