"""Conversions of units whose window is open, by the ages of `allocation.delay`: what the fold would have of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from stream_xp.domain.delays import delay_buckets
from stream_xp.domain.fields import duration_ms
from stream_xp.services.scenarios.scenario import World
from stream_xp.services.scenarios.truths import Bools, Floats, Ints, in_time

_LEAST = 1e-300
"""Stands for a share of 0, of which there are no conversions."""


@dataclass(slots=True)
class _Aging:
    """Units of one stretch that have not reached an age.

    Attributes:
        reached_ms: when they have.
        epoch: weight epoch of each run at their exposure.
        live: runs that were not concluded then.
        cells: units, converted by the age and by the age before, (3, runs, contexts, arms).
    """

    reached_ms: int
    epoch: Ints
    live: Bools
    cells: Ints


class Open:
    """Sums by age of the metric that weights follow; none without `allocation.delay`.

    Args:
        world: the scenario.
        runs: how many.
        rng: of every number.
    """

    def __init__(self, world: World, runs: int, rng: np.random.Generator) -> None:
        kept, self._rng = delay_buckets(world.spec), rng
        self.metric = kept[0][0] if kept else None
        self.names = [bucket.name(metric.key) for metric, bucket in kept]
        lateness_ms = duration_ms(world.scenario.lateness)
        self.reached_ms = [bucket.until_ms + lateness_ms for _, bucket in kept]
        """From exposure on, when a unit counts at each age."""
        arms, delays = list(world.spec.weights), world.scenario.delays
        self._come: Floats = np.array(
            [[in_time(delays, bucket.until_ms, arm) for arm in arms] for _, bucket in kept]
        )
        self._aging: list[deque[_Aging]] = [deque() for _ in kept]
        contexts = len(world.scenario.contexts.shares) if world.scenario.contexts else 1
        self.sums = np.zeros((len(kept), 3, runs, 1, len(arms), contexts), np.int64)
        """Units, converted and converted by the age before, (ages, 3, runs, epochs, arms, contexts)."""

    def expose(self, units: Ints, converted: Ints, *, end_ms: int, epoch: Ints, live: Bools) -> None:
        """Take the units of a stretch, and how many of them convert inside the window; (runs, contexts, arms)."""
        by = converted
        for at in reversed(range(len(self.names))):
            before = np.zeros_like(by)
            if at:
                before = self._rng.binomial(by, self._come[at - 1] / np.maximum(self._come[at], _LEAST))
            reached_ms, cells = end_ms + self.reached_ms[at], np.stack([units, by, before])
            self._aging[at].append(_Aging(reached_ms, epoch.copy(), live.copy(), cells))
            by = before

    def mature(self, watermark_ms: int) -> None:
        """Count the units that have reached their ages at a watermark."""
        for at, aging in enumerate(self._aging):
            while aging and aging[0].reached_ms <= watermark_ms:
                self._count(at, aging.popleft())

    def _count(self, at: int, one: _Aging) -> None:
        runs = np.flatnonzero(one.live)
        more = int(one.epoch.max(initial=0)) + 1 - self.sums.shape[3]
        if more > 0:
            self.sums = np.pad(self.sums, [(0, 0)] * 3 + [(0, more + 8), (0, 0), (0, 0)])
        for word in range(3):
            self.sums[at, word][runs, one.epoch[runs]] += one.cells[word, runs].transpose(0, 2, 1)
