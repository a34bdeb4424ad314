"""Simulations of their own: outcomes that ripen, events in clusters, an effect that wears off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from stream_xp.services.calibrate.case import Outcome, ever
from stream_xp.services.calibrate.data import (
    EXPONENTIAL,
    NORMAL,
    BoolArray,
    Design,
    IntArray,
    Rng,
    Sample,
    Share,
    sample,
)
from stream_xp.services.calibrate.running import Looks

# Counts and successes of control and treatment, (2, paths, looks), to whether the test rejects.
RejectsCounts = Callable[[IntArray, IntArray], BoolArray]

_RATE = 0.3
# Units that arrive while a unit's outcome may still change.
_WINDOW = 500


@dataclass(frozen=True, slots=True)
class DelayedConversions:
    """Both arms convert equally often in the end; treatment converts sooner.

    One unit arrives per unit of time. A conversion comes within the window: after up to all of it in control,
    up to a tenth of it in treatment.

    Attributes:
        looks: when the test is looked at.
        rejects: see `RejectsCounts`.
        matured: whether a unit is counted only when its window is over; else with what it has done so far.

    """

    looks: Looks
    rejects: RejectsCounts
    matured: bool

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        treated = rng.random((paths, n)) < 0.5
        delay = rng.integers(0, np.where(treated, _WINDOW // 10, _WINDOW))
        converts = rng.random((paths, n)) < _RATE
        arrival = np.arange(n)
        shown = arrival + (_WINDOW if self.matured else delay)
        counted = arrival + (_WINDOW if self.matured else 0)
        at = self.looks.at(n)
        units, successes = (
            np.stack([_arrived(when, mask & chosen, at) for mask in (~treated, treated)])
            for when, chosen in ((np.broadcast_to(counted, treated.shape), True), (shown, converts))
        )
        return Outcome(ever(self.rejects(units, successes)))


def _arrived(when: IntArray, mask: BoolArray, at: IntArray) -> IntArray:
    # How many of the masked things have happened by each look: (paths, n) to (paths, looks).
    paths, n = mask.shape
    happened = np.zeros((paths, n + 1), np.int64)
    np.add.at(happened, (np.arange(paths)[:, np.newaxis], np.minimum(when, n)), mask)
    totals: IntArray = np.cumsum(happened[:, :n], axis=1)[:, at - 1]
    return totals


@dataclass(frozen=True, slots=True)
class ClusteredEvents:
    """Events of units that differ in how active they are; a unit is in one arm with all its events.

    Attributes:
        looks: after which events the test is looked at.
        rejects: from counts of events (paths, looks, 2) to (paths, looks).
        per_unit: mean number of events of a unit.
        first_only: whether only the first event of a unit is counted.

    """

    looks: Looks
    rejects: Callable[[IntArray], BoolArray]
    per_unit: int = 10
    first_only: bool = False

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        treated = rng.random((paths, n // self.per_unit)) < 0.5
        who = _active_units(rng, paths, units=treated.shape[1], events=n)
        counted = _first_of_each(who) if self.first_only else np.ones(who.shape, np.bool_)
        ours, all_ = np.take_along_axis(treated, who, axis=1) & counted, counted
        at = self.looks.at(n)
        seen = [np.cumsum(mask, axis=1)[:, at - 1] for mask in (all_ & ~ours, ours)]
        return Outcome(ever(self.rejects(np.stack(seen, axis=-1))))


def _first_of_each(who: IntArray) -> BoolArray:
    first = np.zeros(who.shape, np.bool_)
    for path, units in enumerate(who):
        first[path, np.unique(units, return_index=True)[1]] = True
    return first


@dataclass(frozen=True, slots=True)
class SpreadsOut:
    """Normal outcomes without an effect on the mean, whose spread grows with time in treatment alone.

    Attributes:
        design: how units get their arms.
        errs: the method, on the sample and its level.
        alpha: error level.
        last_sd: standard deviation of a treated unit at the end; 1 at the start, and 1 in control.

    """

    design: Design
    errs: Callable[[Sample, float], BoolArray]
    alpha: float
    last_sd: float = 3.0

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        drawn = sample(rng, NORMAL, self.design, paths=paths, n=n)
        wide = drawn.y * np.linspace(1.0, self.last_sd, n)
        return Outcome(self.errs(replace(drawn, y=np.where(drawn.arms.treated, wide, drawn.y)), self.alpha))


@dataclass(frozen=True, slots=True)
class TurnsSparse:
    """Exponential outcomes that treatment alone makes rare and large, with the same mean.

    No effect on the mean, but a large one on everything else: most units of treatment show 0, and a small arm
    looks as if it had lost all.

    Attributes:
        share: of treatment.
        errs: the method, on the sample and its level.
        alpha: error level.
        positive: share of treated units with an outcome above 0.

    """

    share: float
    errs: Callable[[Sample, float], BoolArray]
    alpha: float
    positive: float = 0.05

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        drawn = sample(rng, EXPONENTIAL, Share(self.share), paths=paths, n=n)
        rare = np.where(rng.random((paths, n)) < self.positive, drawn.y / self.positive, 0.0)
        return Outcome(self.errs(replace(drawn, y=np.where(drawn.arms.treated, rare, drawn.y)), self.alpha))


def _active_units(rng: Rng, paths: int, *, units: int, events: int) -> IntArray:
    # Which unit each event is of: activities are exponential, so a few units cause many events.
    activity = np.cumsum(rng.standard_exponential((paths, units)), axis=1)
    ticks = rng.random((paths, events)) * activity[:, -1:]
    return np.stack([np.searchsorted(a, t) for a, t in zip(activity, ticks, strict=True)])
