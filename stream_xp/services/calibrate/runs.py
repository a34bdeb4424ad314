"""Rows h and i: whole runs, intersections of their intervals, and the mixture SPRT."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stream_xp.services.calibrate.case import ALPHA, PLANNED, Outcome, ever
from stream_xp.services.calibrate.data import NORMAL, BoolArray, Rng, Sample, Share, sample
from stream_xp.services.calibrate.known import known_variance_z
from stream_xp.services.calibrate.means import Means
from stream_xp.services.calibrate.running import EVERY_UNIT, means_and_variances, totals
from stream_xp.stats.always_valid import msprt_log_e, running_intersection, running_p
from stream_xp.stats.batch import mean_difference_arrays
from stream_xp.stats.normal_mixture import log_e_two_sided, tuned_rho2

_FIRST_PAIRS = 25
# An effect of novelty, in standard deviations, and the units in which it falls to a third.
_NOVELTY, _FADING = 0.6, 500.0


def smallest_p(drawn: Sample, alpha: float) -> BoolArray:
    """Whether the smallest always-valid p of the run is at most alpha, for unit-variance outcomes."""
    at = EVERY_UNIT.at(drawn.n)
    log_e = log_e_two_sided(known_variance_z(drawn, at), at.astype(np.float64) * tuned_rho2(PLANNED, alpha))
    return np.asarray(running_p(log_e)[:, -1] <= alpha)


def intersected(drawn: Sample, alpha: float) -> BoolArray:
    """Whether the intersection of all intervals of a constant difference leaves out 0."""
    evidence = mean_difference_arrays(Means().along(drawn), alpha=alpha, rho2=tuned_rho2(PLANNED, alpha))
    left = running_intersection(evidence.lower, evidence.upper)
    return np.asarray((left.lower[:, -1] > 0) | (left.upper[:, -1] < 0))


@dataclass(frozen=True, slots=True)
class WornOff:
    """An effect that wears off; the truth at each look is the mean effect on the units so far.

    Attributes:
        intersect: whether the intervals of all looks are intersected; else the latest one counts.

    """

    intersect: bool

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        drawn = sample(rng, NORMAL, Share(0.5), paths=paths, n=n)
        effect = _NOVELTY * np.exp(-np.arange(n) / _FADING)
        y = drawn.y + np.where(drawn.arms.treated, effect, 0.0)
        moved = Sample(y, None, drawn.arms, 0.0, drawn.step, 0.0)
        evidence = mean_difference_arrays(Means().along(moved), alpha=ALPHA, rho2=tuned_rho2(PLANNED, ALPHA))
        lower, upper = evidence.lower, evidence.upper
        if self.intersect:
            left = running_intersection(lower, upper)
            lower, upper = left.lower, left.upper
        truth = np.cumsum(effect) / np.arange(1, n + 1)
        return Outcome(ever((truth < lower) | (truth > upper)))


@dataclass(frozen=True, slots=True)
class Msprt:
    """The mixture SPRT on pairs of units, one of each arm.

    Attributes:
        tau2: variance of the effect under the mixture.
        variance: of one pair's difference; None estimates it from both arms at each look.

    """

    tau2: float
    variance: float | None = None

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the test ever rejects."""
        first, second = drawn.y[:, 0 : drawn.n - 1 : 2], drawn.y[:, 1 : drawn.n : 2]
        at = EVERY_UNIT.at(first.shape[1])
        moments = [means_and_variances(at, totals(y, at), totals(y * y, at)) for y in (first, second)]
        difference = moments[1][0] - moments[0][0]
        if self.variance is not None:
            return ever(
                np.asarray(msprt_log_e(difference, variance=self.variance, n=at, tau2=self.tau2))
                >= -math.log(alpha)
            )
        spread = moments[0][1] + moments[1][1]
        known = (spread > 0) & (at >= _FIRST_PAIRS)
        log_e = msprt_log_e(difference, variance=np.where(known, spread, 1.0), n=at, tau2=self.tau2)
        return ever((np.asarray(log_e) >= -math.log(alpha)) & known)
