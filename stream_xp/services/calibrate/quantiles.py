"""Rows e: quantiles, their differences, and whole distributions, from binned values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stream_xp.services.calibrate.case import PLANNED, ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Sample
from stream_xp.services.calibrate.running import Looks
from stream_xp.stats.distribution import distribution_band, distribution_difference, distribution_log_e
from stream_xp.stats.log_histogram import bin_of, bins_needed, lower_edge
from stream_xp.stats.normal_mixture import Undetermined
from stream_xp.stats.quantile import (
    Combination,
    quantile_concentration,
    quantile_difference_log_e,
    quantile_log_e,
)
from stream_xp.stats.quantile import Sample as Binned

# Outcomes of scale 1 in steps, as latencies come in milliseconds.
STEPS = 200.0
FIRST_OF_BAND = 100
# Quantiles that the test of equal distributions averages.
LEVELS = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Quantile:
    """One quantile of exponential outcomes, in the bins of the log histogram, against its true value."""

    q: float
    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the true quantile is ever rejected."""
        seen = _binned(drawn, self.looks.at(drawn.n))
        concentration = quantile_concentration(PLANNED, alpha)
        truth = -STEPS * math.log1p(-self.q)
        log_e = quantile_log_e(seen, self.q, null=truth, concentration=concentration)
        return ever(np.asarray(np.asarray(log_e) >= -math.log(alpha)))


@dataclass(frozen=True, slots=True)
class QuantileDifference:
    """The difference of a quantile between two arms of one distribution, against 0."""

    q: float
    looks: Looks
    combination: Combination = "average"

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether equal quantiles are ever rejected."""
        control, treatment = both_binned(drawn, self.looks.at(drawn.n))
        log_e = quantile_difference_log_e(
            control,
            treatment,
            self.q,
            concentration=quantile_concentration(PLANNED / 2.0, alpha / 2.0),
            combination=self.combination,
        )
        return ever(np.asarray(np.asarray(log_e) >= -math.log(alpha)))


@dataclass(frozen=True, slots=True)
class Band:
    """The band around the distribution function of exponential outcomes, at every value at once."""

    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the true distribution function ever leaves the band."""
        true = -np.expm1(-drawn.y)
        missed = np.zeros(drawn.paths, np.bool_)
        for at in self.looks.at(drawn.n).tolist():
            radius = distribution_band(at, n_min=FIRST_OF_BAND, alpha=alpha)
            missed |= _distance(np.sort(true[:, :at], axis=1)) > radius
        return missed


@dataclass(frozen=True, slots=True)
class SameDistribution:
    """The e-value against equality of two whole distributions."""

    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether equality is ever rejected."""
        control, treatment = both_binned(drawn, self.looks.at(drawn.n))
        concentration = quantile_concentration(PLANNED / 2.0, alpha)
        log_e = distribution_log_e(control, treatment, concentration=concentration, levels=LEVELS)
        return ever(np.asarray(np.asarray(log_e) >= -math.log(alpha)))


@dataclass(frozen=True, slots=True)
class SeparateBands:
    """The bands of two arms of one distribution, each at half the level."""

    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the bands ever separate."""
        steps, treated = np.floor(drawn.y * STEPS), drawn.arms.treated
        looks = self.looks.at(drawn.n).tolist()
        return np.array(
            [
                any(_separate(steps[path, :at], treated[path, :at], alpha) for at in looks)
                for path in range(drawn.paths)
            ]
        )


def _separate(values: FloatArray, treated: BoolArray, alpha: float) -> bool:
    control, treatment = (Binned.from_values(values[mask]) for mask in (~treated, treated))
    found = distribution_difference(
        control, treatment, alpha=alpha, n_min=FIRST_OF_BAND, concentration=100.0, levels=[0.5]
    )
    return not isinstance(found, Undetermined) and found.bands_separate


def _distance(ordered: FloatArray) -> FloatArray:
    # Largest distance of the empirical distribution function from the true one, (paths,).
    n = ordered.shape[1]
    ranks = np.arange(n + 1) / n
    return np.asarray(np.maximum(ranks[1:] - ordered, ordered - ranks[:-1]).max(axis=1))


def both_binned(drawn: Sample, at: IntArray) -> tuple[Binned, Binned]:
    """Samples (paths, looks) of control and of treatment."""
    treated = drawn.arms.treated
    return _binned(drawn, at, inside=~treated), _binned(drawn, at, inside=treated)


def _binned(drawn: Sample, at: IntArray, *, inside: BoolArray | None = None) -> Binned:
    steps = np.floor(drawn.y * STEPS).astype(np.int64)
    bins = bins_needed(int(steps.max()))
    edges = lower_edge(np.arange(bins + 1)).astype(np.float64)
    return Binned.from_bins(edges, _counts(bin_of(steps), at, bins=bins, inside=inside))


def _counts(which: IntArray, at: IntArray, *, bins: int, inside: BoolArray | None) -> FloatArray:
    # Units in each bin at each look, (paths, looks, bins).
    paths, n = which.shape
    counts = np.zeros((paths, len(at), bins), np.int64)
    look = np.broadcast_to(np.searchsorted(at, np.arange(1, n + 1)), which.shape)
    path = np.broadcast_to(np.arange(paths)[:, np.newaxis], which.shape)
    np.add.at(counts, (path, look, which), 1 if inside is None else inside)
    return np.cumsum(counts, axis=1)
