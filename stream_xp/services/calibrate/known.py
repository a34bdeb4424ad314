"""Row a1, means with a known variance, and what a fixed test does when it is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stream_xp.services.calibrate.case import PLANNED, ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Sample
from stream_xp.services.calibrate.running import EVERY_UNIT, Looks, totals
from stream_xp.stats.normal_mixture import (
    log_e_one_sided,
    log_e_two_sided,
    one_sided_rho2,
    tuned_rho2,
)


def known_variance_z(drawn: Sample, at: IntArray) -> FloatArray:
    """Return z of the mean of unit-variance outcomes with mean 0, (paths, looks)."""
    return np.asarray(totals(drawn.y, at) / np.sqrt(at))


@dataclass(frozen=True, slots=True)
class KnownVariance:
    """The normal mixture on `known_variance_z`; one- or two-sided."""

    sides: int = 2
    looks: Looks = EVERY_UNIT

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the test ever rejects."""
        at = self.looks.at(drawn.n)
        z = known_variance_z(drawn, at)
        units = at.astype(np.float64)
        if self.sides == 2:
            log_e = log_e_two_sided(z, units * tuned_rho2(PLANNED, alpha))
        else:
            log_e = log_e_one_sided(z, units * one_sided_rho2(PLANNED, alpha))
        return ever(log_e >= math.log(1.0 / alpha))
