"""Row b2: exact tests of two conversion rates, by the logged weights of each epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stream_xp.services.calibrate.case import PLANNED, ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Sample
from stream_xp.services.calibrate.means import Means
from stream_xp.services.calibrate.running import EVERY_UNIT, Looks, by_epoch
from stream_xp.stats.conversion_difference import Sides, conversion_log_e, success_ratio
from stream_xp.stats.early_evidence import early_two_sided
from stream_xp.stats.normal_mixture import Undetermined, tuned_rho2


@dataclass(frozen=True, slots=True)
class LabelPrediction:
    """The label-mixture test of equal rates."""

    side: Sides = "both"
    looks: Looks = EVERY_UNIT

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the test ever rejects."""
        at = self.looks.at(drawn.n)
        units, successes = both_arms(drawn, 1, at), both_arms(drawn, drawn.ticks, at)
        log_e = conversion_log_e(units, successes, weights=logged_weights(drawn), side=self.side)
        return ever(log_e >= math.log(1.0 / alpha))


@dataclass(frozen=True, slots=True)
class RelativeRisk:
    """The sequence of the relative risk from successes alone; errs when it leaves out the true one."""

    looks: Looks
    side: Sides = "both"

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the sequence ever leaves out the truth."""
        successes = both_arms(drawn, drawn.ticks, self.looks.at(drawn.n))
        evidence = success_ratio(successes, logged_weights(drawn), alpha=alpha, side=self.side)
        if isinstance(evidence, Undetermined):
            raise TypeError(evidence.reason)
        truth = math.log1p(drawn.lift)
        return ever((truth < np.asarray(evidence.lower)) | (truth > np.asarray(evidence.upper)))


@dataclass(frozen=True, slots=True)
class EarlyAndLate:
    """The conversion test averaged with the asymptotic sequence; errs when the sequence leaves out 0."""

    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the sequence ever leaves out 0."""
        at = self.looks.at(drawn.n)
        units, successes = both_arms(drawn, 1, at), both_arms(drawn, drawn.ticks, at)
        above, below = (
            conversion_log_e(units, successes, weights=logged_weights(drawn), side=side)
            for side in ("above", "below")
        )
        means = Means().at(drawn, at)
        known = ~means.undetermined
        variance = np.where(known, means.control_variance + means.treatment_variance, 0.0)
        evidence = early_two_sided(
            means.treatment_mean - means.control_mean,
            np.sqrt(variance),
            np.maximum(means.n, 1.0) * tuned_rho2(PLANNED, alpha),
            alpha=alpha,
            log_e_above=above,
            log_e_below=below,
        )
        rejected = evidence.log_e >= math.log(1.0 / alpha)
        return ever(rejected | (evidence.lower > 0) | (evidence.upper < 0))


def both_arms(drawn: Sample, values: IntArray | int, at: IntArray) -> IntArray:
    """Sums of control and treatment, (paths, looks, epochs, 2)."""
    return np.stack([by_epoch(drawn, values, at, arm=arm) for arm in (False, True)], axis=-1)


def logged_weights(drawn: Sample) -> FloatArray:
    """Assignment probabilities of control and treatment, (paths or 1, 1, epochs, 2)."""
    treated = drawn.arms.weight[:, np.newaxis, np.array(drawn.arms.ends) - 1]
    return np.stack([1.0 - treated, treated], axis=-1)
