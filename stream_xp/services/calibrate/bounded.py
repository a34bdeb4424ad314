"""Rows d and l3: means of bounded values, and the exact value of an arm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stream_xp.services.calibrate.case import PLANNED, ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, Sample
from stream_xp.services.calibrate.running import EVERY_UNIT, Looks, totals
from stream_xp.stats.betting import LogCapital
from stream_xp.stats.bounded_mean import PLANNED_VARIANCE, hoeffding_log_e
from stream_xp.stats.empirical_bernstein import (
    EmpiricalBernstein,
    empirical_bernstein_log_e,
    empirical_bernstein_rho,
)
from stream_xp.stats.normal_mixture import tuned_rho2
from stream_xp.stats.off_policy import off_policy_log_e

# Grid of means of the betting capital; the true means lie on it.
_GRID = 10


def hoeffding(drawn: Sample, alpha: float) -> BoolArray:
    """Whether the Hoeffding mixture ever rejects the true mean."""
    at = EVERY_UNIT.at(drawn.n)
    mean = np.clip(totals(drawn.y, at) / at, 0.0, 1.0)
    log_e = hoeffding_log_e(at, mean, null=drawn.truth, rho2=tuned_rho2(PLANNED, alpha))
    return ever(log_e >= -math.log(alpha))


@dataclass(frozen=True, slots=True)
class Bernstein:
    """The empirical Bernstein sequence; what comes between two looks goes to one of the partitions in turn."""

    looks: Looks
    partitions: int = 1

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the true mean is ever rejected."""
        n, total, time = np.stack([self._sums(y) for y in drawn.y], axis=1)
        rho = empirical_bernstein_rho(PLANNED * PLANNED_VARIANCE, alpha)
        log_e = empirical_bernstein_log_e(n, total, time, null=drawn.truth, rho=rho)
        return ever(log_e >= -math.log(alpha))

    def _sums(self, y: FloatArray) -> FloatArray:
        # n, total and V of all partitions together, (3, looks).
        parts, sums = [EmpiricalBernstein.empty()] * self.partitions, []
        for look, values in enumerate(np.split(y, self.looks.at(len(y))[:-1])):
            parts[look % self.partitions] = parts[look % self.partitions].update(values)
            merged = sum(parts[1:], parts[0])
            sums.append((merged.n, merged.total, merged.intrinsic_time))
        return np.array(sums).T


@dataclass(frozen=True, slots=True)
class Betting:
    """Hedged betting; what comes between two looks goes to one of the partitions in turn."""

    looks: Looks
    partitions: int = 1

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the true mean is ever rejected."""
        return np.array([self._rejects(y, drawn.truth, alpha) for y in drawn.y])

    def _rejects(self, y: FloatArray, truth: float, alpha: float) -> bool:
        parts = [LogCapital.empty(alpha=alpha / 2.0, grid=_GRID)] * self.partitions
        for look, values in enumerate(np.split(y, self.looks.at(len(y))[:-1])):
            parts[look % self.partitions] = parts[look % self.partitions].update(values)
            if float(sum(parts[1:], parts[0]).log_e(truth)) >= -math.log(alpha):
                return True
        return False


@dataclass(frozen=True, slots=True)
class ArmValue:
    """The exact value of treatment under changing weights, against its true value."""

    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the true value is ever rejected."""
        weight = np.broadcast_to(drawn.arms.weight, drawn.y.shape)
        paths = zip(drawn.arms.treated, weight, drawn.y, strict=True)
        return np.array([self._rejects(*path, truth=drawn.truth, alpha=alpha) for path in paths])

    def _rejects(
        self, treated: BoolArray, weight: FloatArray, y: FloatArray, *, truth: float, alpha: float
    ) -> bool:
        return any(
            off_policy_log_e(treated[:at], weight[:at], y[:at], null=truth, alpha=alpha) >= -math.log(alpha)
            for at in self.looks.at(len(y))
        )
