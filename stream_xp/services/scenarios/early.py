"""What a dashboard shows that does not wait for windows to end: every unit exposed, with the rewards that have come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from stream_xp.domain.experiment import MetricKind
from stream_xp.services.scenarios.scenario import World
from stream_xp.services.scenarios.truths import Floats, Ints, in_time


@dataclass(slots=True)
class _Coming:
    """Rewards of units of one stretch that have not come.

    Attributes:
        exposed_ms: of the units.
        left: rewards, (runs, arms).
        come: share of the window's rewards that have come, (arms,).
    """

    exposed_ms: float
    left: Ints
    come: Floats


class Early:
    """Units and rewards of conversions as they come.

    Args:
        world: the scenario.
        runs: how many.
        rng: of every number.
    """

    def __init__(self, world: World, runs: int, rng: np.random.Generator) -> None:
        self._delays, self._rng, self._arms = world.scenario.delays, rng, list(world.spec.weights)
        self._windows = {
            at: metric.window_ms
            for at, metric in enumerate(world.spec.metrics)
            if metric.kind is MetricKind.CONVERSION
        }
        self._coming: dict[int, deque[_Coming]] = {at: deque() for at in self._windows}
        self.counts = np.zeros((len(world.spec.metrics), 3, runs, len(self._arms)), np.int64)
        """n, s and q of every metric, over all weight epochs."""

    def expose(self, metric: int, exposed_ms: float, units: Ints, rewards: Ints) -> None:
        """Take the units of a stretch, and the rewards that will come inside their windows; (runs, arms)."""
        if metric in self._windows:
            self.counts[metric, 0] += units
            self._coming[metric].append(_Coming(exposed_ms, rewards.copy(), np.zeros(len(self._arms))))

    def look(self, now_ms: int) -> None:
        """Take the rewards that have come by now."""
        for metric, coming in self._coming.items():
            for one in coming:
                self._come(metric, one, now_ms - one.exposed_ms)
            while coming and now_ms - coming[0].exposed_ms >= self._windows[metric]:
                coming.popleft()

    def _come(self, metric: int, one: _Coming, age_ms: float) -> None:
        window_ms = self._windows[metric]
        age_ms = min(age_ms, window_ms)
        come = np.array(
            [in_time(self._delays, age_ms, arm) / in_time(self._delays, window_ms, arm) for arm in self._arms]
        )
        left = 1.0 - one.come
        # Of those that come inside the window, and have not come yet.
        share = np.where(left > 0, (come - one.come) / np.where(left > 0, left, 1.0), 1.0)
        now: Ints = self._rng.binomial(one.left, np.clip(share, 0.0, 1.0))
        one.left -= now
        one.come = come
        self.counts[metric, 1:] += now
