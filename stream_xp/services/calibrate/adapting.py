"""Rows l1, l2 and l4: effects while the weights follow the data, and outcomes that come late."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stream_xp.services.calibrate.case import ALPHA, PLANNED, Outcome, ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Rng, Sample
from stream_xp.services.calibrate.running import (
    EVERY_10TH,
    EVERY_UNIT,
    Looks,
    by_epoch,
    means_and_variances,
    totals,
)
from stream_xp.stats.adaptive import aipw_estimate, delayed_effect, stratified_effect
from stream_xp.stats.mean_difference import MIN_UNITS_PER_ARM, guarded_variance
from stream_xp.stats.moments import Moments
from stream_xp.stats.normal_mixture import Undetermined, log_e_two_sided, tuned_rho2
from stream_xp.stats.propensity_sums import PropensitySums

# From here on the scores are calibrated, and the decision layer reads them.
_FIRST_LOOK = 100


@dataclass(frozen=True, slots=True)
class Scores:
    """Augmented inverse-propensity scores; errs when the sequence of the effect leaves out 0.

    Attributes:
        running: whether outcomes are centred on each arm's mean over earlier batches; else on 0.
        looks: when.

    """

    running: bool = True
    looks: Looks = EVERY_UNIT

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the sequence ever leaves out 0."""
        at = self.looks.at(drawn.n)
        estimate, variance, determined = self.effect(drawn, at)
        z = np.where(determined, estimate / np.sqrt(np.where(determined, variance, 1.0)), 0.0)
        log_e = log_e_two_sided(z, at.astype(np.float64) * tuned_rho2(PLANNED, alpha))
        return ever((log_e >= math.log(1.0 / alpha)) & determined)

    def effect(self, drawn: Sample, at: IntArray) -> tuple[FloatArray, FloatArray, BoolArray]:
        """Estimate, its variance, and whether there are enough units, each (paths, looks)."""
        n, outcome = _outcome_variances(drawn, at)
        weight = np.broadcast_to(drawn.arms.weight, drawn.y.shape)
        psi = self._psi(drawn, weight)
        estimate, variance = aipw_estimate(
            n=at,
            psi=totals(psi, at),
            psi_squares=totals(psi * psi, at),
            control_inverse=totals(1.0 / (1.0 - weight), at),
            treatment_inverse=totals(1.0 / weight, at),
            control_variance=outcome[0],
            treatment_variance=outcome[1],
        )
        determined = (n.min(axis=0) >= MIN_UNITS_PER_ARM) & (at >= _FIRST_LOOK) & (np.asarray(variance) > 0)
        return np.asarray(estimate), np.asarray(variance), determined

    def _psi(self, drawn: Sample, weight: FloatArray) -> FloatArray:
        treated, y = drawn.arms.treated, drawn.rounded
        centres = _earlier_means(drawn, y) if self.running else np.zeros((2, *y.shape))
        own = np.where(treated, (y - centres[1]) / weight, -(y - centres[0]) / (1.0 - weight))
        return np.asarray(centres[1] - centres[0] + own)


def _outcome_variances(drawn: Sample, at: IntArray) -> tuple[FloatArray, FloatArray]:
    # Units, and guarded variance of one unit, of each arm: (2, paths, looks).
    y, treated = drawn.rounded, drawn.arms.treated
    n, total, squares = (
        np.stack([totals(np.where(mask, term, 0.0), at) for mask in (~treated, treated)])
        for term in (np.ones_like(y), y, y * y)
    )
    own = means_and_variances(n, total, squares)[1]
    pooled = means_and_variances(n.sum(axis=0), total.sum(axis=0), squares.sum(axis=0))[1]
    return n, guarded_variance(own, pooled, degrees=np.maximum(n - 1.0, 0.0))


def _earlier_means(drawn: Sample, y: FloatArray) -> FloatArray:
    # Mean outcome of each arm over the earlier batches, for every unit: (2, paths, n); 0 before the first.
    centres, seen = np.zeros((2, *y.shape)), np.zeros((2, 2, drawn.paths, 1))
    for start, end in pairwise((0, *drawn.arms.ends)):
        part = slice(start, end)
        centres[:, :, part] = seen[1] / np.maximum(seen[0], 1.0)
        for arm, mask in enumerate((~drawn.arms.treated[:, part], drawn.arms.treated[:, part])):
            seen[0, arm] += mask.sum(axis=1, keepdims=True)
            seen[1, arm] += (mask * y[:, part]).sum(axis=1, keepdims=True)
    return centres


@dataclass(frozen=True, slots=True)
class Epochs:
    """Differences within weight epochs, averaged; errs when the sequence leaves out 0."""

    guard: bool = True
    constant_spread: bool = False
    looks: Looks = EVERY_10TH

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the sequence ever leaves out 0."""
        at, ticks = self.looks.at(drawn.n), drawn.ticks
        n, total, squares = (
            np.stack([by_epoch(drawn, values, at, arm=arm) for arm in (False, True)], axis=-1)
            for values in (1, ticks, ticks * ticks)
        )
        mean, variance = means_and_variances(
            n, np.float64(drawn.step) * total, np.float64(drawn.step**2) * squares
        )
        evidence = stratified_effect(
            n,
            mean,
            variance,
            alpha=alpha,
            rho2=tuned_rho2(PLANNED, alpha),
            guard=self.guard,
            constant_spread=self.constant_spread,
        )
        return ever(evidence.log_e >= math.log(1.0 / alpha))


@dataclass(frozen=True, slots=True)
class DelayedRewards:
    """One reward per unit, late, and later in treatment; the estimate is of the effect on rewards so far.

    Attributes:
        looks: when.
        weights: of treatment, one per epoch of equal length.
        mean_delay: of a reward in control, in units that arrive meanwhile; twice that in treatment.
        alpha: error level.

    """

    looks: Looks
    weights: tuple[float, ...] = (0.1, 0.3, 0.5)
    mean_delay: int = 200
    alpha: float = ALPHA

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        return Outcome(np.array([self._misses(rng, n) for _ in range(paths)]))

    def _misses(self, rng: Rng, n: int) -> bool:
        epoch = np.minimum(np.arange(n) * len(self.weights) // n, len(self.weights) - 1)
        treated = rng.random(n) < np.array(self.weights)[epoch]
        at, so_far = self.looks.at(n), []
        truth = np.zeros(len(at))
        for arm, sign in ((False, -1.0), (True, 1.0)):
            value = np.rint(rng.standard_exponential(n)).astype(np.int64)
            come = np.arange(n) + np.rint(rng.exponential(self.mean_delay * (1 + arm), n)).astype(np.int64)
            truth += sign * _come(value, come, at) / at
            so_far.append(self._arm(value, come, at, mask=treated == arm, epoch=epoch, arm=arm))
        return any(self._misses_at(*sums, truth=t) for *sums, t in zip(*so_far, truth.tolist(), strict=True))

    def _arm(
        self, value: IntArray, come: IntArray, at: IntArray, *, mask: BoolArray, epoch: IntArray, arm: bool
    ) -> list[PropensitySums]:
        # The sums of one arm at each look, put together from those of the epochs.
        looks = [PropensitySums.empty() for _ in at]
        for e, weight in enumerate(self.weights):
            part = epoch == e
            ours = mask & part
            columns = [np.cumsum(m)[at - 1] for m in (part, ours)]
            columns += [_come(v * ours, come, at) for v in (value, value * value)]
            for look, (units, *moments) in enumerate(np.stack(columns, axis=-1).tolist()):
                propensity = weight if arm else 1.0 - weight
                looks[look] += PropensitySums.from_epoch(
                    Moments(*moments), propensity=propensity, units=units
                )
        return looks

    def _misses_at(self, control: PropensitySums, treatment: PropensitySums, *, truth: float) -> bool:
        evidence = delayed_effect(control, treatment, scale=1.0, alpha=self.alpha, eta=self._eta())
        return not isinstance(evidence, Undetermined) and not evidence.lower <= truth <= evidence.upper

    def _eta(self) -> float:
        # Intrinsic variance of an arm over the planned units, at a weight of 0.3 and squared rewards of 2.
        return tuned_rho2(PLANNED * 2.0 * 0.7 / 0.3, self.alpha / 2.0)


def _come(value: IntArray, come: IntArray, at: IntArray) -> IntArray:
    # Sum of the values that have come after so many units.
    arrived = np.bincount(come, weights=value, minlength=int(at[-1]) + 1)
    return np.rint(np.cumsum(arrived)[at - 1]).astype(np.int64)
