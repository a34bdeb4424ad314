"""What the engine is compared with, on the very same units: z-tests of pooled means."""

from __future__ import annotations

import numpy as np
from scipy import special

from stream_xp.domain.experiment import ExperimentSpec, Metric, Role
from stream_xp.domain.fields import duration_ms
from stream_xp.services.scenarios.scenario import Comparison, World
from stream_xp.services.scenarios.truths import Bools, Floats, Ints, oriented, tolerated
from stream_xp.services.scenarios.world import Drawn

TESTS = (
    Comparison.FIXED_SAMPLE,
    Comparison.FIXED_KNOWN,
    Comparison.PEEKED,
    Comparison.POOLED,
    Comparison.IMMATURE,
)
"""The comparisons that are z-tests."""
LEAST_UNITS = 30
"""Units of an arm before a z-test is looked at, which is already more than many tools ask for."""


class Naive:
    """Pooled z-tests of every guardrail and primary, in every treatment arm, at the engine's own levels.

    Args:
        world: the scenario.
        runs: how many.
    """

    def __init__(self, world: World, runs: int) -> None:
        self._spec = world.spec
        self._horizon_ms = duration_ms(world.scenario.horizon)
        self._known_sample = world.scenario.known_sample or 0
        self._wanted = [one for one in TESTS if one in world.scenario.comparisons]
        self._done = {c: np.zeros(runs, np.bool_) for c in self._wanted}
        self._at_ms = {c: np.full(runs, -1, np.int64) for c in self._wanted}
        self._harmed = {c: np.zeros(runs) for c in self._wanted}

    def look(self, drawn: Drawn, now_ms: int) -> None:
        """Take the looks that are due, before a person changes anything."""
        if not self._wanted:
            return
        rejects = rejected(self._spec, drawn.pooled)
        early = rejects if drawn.early is None else rejected(self._spec, drawn.early.counts)
        counted = drawn.pooled[:, 0].sum(axis=2).min(axis=0)
        due = {
            Comparison.PEEKED: rejects,
            Comparison.IMMATURE: early,
            Comparison.FIXED_SAMPLE: counted >= self._spec.planned_sample,
            Comparison.FIXED_KNOWN: counted >= self._known_sample,
            Comparison.POOLED: np.full(len(rejects), now_ms == self._horizon_ms),
        }
        for one in self._wanted:
            now = due[one] & ~self._done[one]
            self._done[one] |= now
            now &= early if one is Comparison.IMMATURE else rejects
            self._at_ms[one][now] = now_ms
            self._harmed[one][now] = drawn.harmed[now]

    def of_run(self, at: int, drawn: Drawn) -> dict[str, tuple[int | None, float]]:
        """When each test rejected, and the units harmed until then, or until the end if it did not."""
        found: dict[str, tuple[int | None, float]] = {}
        for one in self._wanted:
            when = int(self._at_ms[one][at])
            harmed = self._harmed[one][at] if when >= 0 else drawn.harmed[at]
            found[one.value] = (None if when < 0 else when, float(harmed))
        return found


def rejected(spec: ExperimentSpec, pooled: Ints) -> Bools:
    """Whether a z-test rejects in any arm: harm of a guardrail one-sided, a primary two-sided; of each run.

    Args:
        spec: levels, margins and directions.
        pooled: n, s and q of every metric, (metrics, 3, runs, arms).
    """
    arms = [arm.key for arm in spec.arms]
    control = arms.index(spec.control.key)
    found = np.zeros(pooled.shape[2], np.bool_)
    for at, metric in enumerate(spec.metrics):
        if metric.role is not Role.SECONDARY:
            for arm in range(len(arms)):
                if arm != control:
                    found |= _rejects(spec, metric, pooled[at], control, arm)
    return found


def _rejects(spec: ExperimentSpec, metric: Metric, cells: Ints, control: int, arm: int) -> Bools:
    n, means, variances = _moments(metric, cells)
    enough = np.minimum(n[:, control], n[:, arm]) >= LEAST_UNITS
    squared = variances[:, control] + variances[:, arm]
    enough &= squared > 0
    difference = means[:, arm] - means[:, control]
    pairs = len(spec.treatments)
    if metric.role is Role.PRIMARY:
        z, level = np.abs(difference), spec.alpha / (2 * pairs * len(spec.primaries))
    else:
        z, level = -oriented(metric, difference) - tolerated(metric, means[:, control]), spec.guardrail_alpha
        level /= pairs * len(spec.guardrails)
    critical = float(special.ndtri(1.0 - level))
    return np.asarray(enough & (z > critical * np.sqrt(np.where(enough, squared, 1.0))))


def _moments(metric: Metric, cells: Ints) -> tuple[Floats, Floats, Floats]:
    """Units, mean and squared standard error, (runs, arms)."""
    n, s, q = cells.astype(np.float64)
    safe = np.maximum(n, 2.0)
    means = s / safe
    variances = np.maximum(q - s * means, 0.0) / (safe - 1.0) / safe
    return n, means * metric.step, variances * metric.step**2
