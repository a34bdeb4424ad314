r"""Whole distributions: a band around the empirical distribution function, and tests of two arms.

Two instruments, for two purposes.

* The band holds at every value and every time at once. Two bands at alpha/2 show *where* two distributions
  differ: wherever they separate. Their dual is an always-valid p, not an e-value.
* The log e-value averages the two-sample e-values of fixed quantile levels (`quantile_difference_log_e` with
  the combination "product"), each the infimum over a common x. It refutes equality sooner, can be multiplied
  and averaged, and has one-sided variants: "above" refutes "no quantile level of the treatment is larger", that
  is, it shows that the treatment is slower somewhere.

Assumptions: the values of an arm are independent with one distribution; arms may interleave in any way that
does not look ahead. Non-asymptotic. alpha, n_min, levels and concentrations are frozen before the first look.

Source: Howard and Ramdas (2022), Bernoulli 28(3), 1704-1728, arXiv:1906.09712, theorem 2 (band) and section 5;
Lindon, Sanden and Shirikian (2022), Rapid regression detection in software deployments through sequential
testing, KDD 2022, arXiv:2205.14762 (bands for two arms).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq

from stream_xp.stats._boundaries import (
    BAND_FACTOR,
    LEAST_BAND_CONSTANT,
    Sides,
    band_constant,
    is_above,
    log_band_error,
)
from stream_xp.stats._checks import FloatArray, level, not_negative, positive
from stream_xp.stats.normal_mixture import Undetermined, p_always_valid
from stream_xp.stats.quantile import NO_VALUES, Sample, quantile_difference_log_e

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

LEVELS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99)


@dataclass(frozen=True, slots=True)
class DistributionDifference:
    """Two distribution functions compared at one look.

    Attributes:
        separation: largest distance of the empirical distribution functions in the tested direction, rounded
            inward where only bins are known, in [0, 1].
        at: value x at which it is attained, in metric units; P(value < x) is compared.
        radius: sum of the radii of both bands at alpha/2; +inf before n_min values in both arms.
        separated_from: least x at which the bands are seen to separate; `at` where they do not.
        separated_to: largest such x; `at` where they do not.
        band_log_p: natural logarithm of the always-valid p of the bands, <= 0: at most ln(alpha) if and only
            if separation >= radius.
        log_e: log e-value against equality, or against the one-sided hypothesis; finite.
        n: values in both arms.

    """

    separation: float
    at: float
    radius: float
    separated_from: float
    separated_to: float
    band_log_p: float
    log_e: float
    n: int

    @property
    def bands_separate(self) -> bool:
        """Whether the two bands separate anywhere."""
        return self.separation >= self.radius

    @property
    def p_always_valid(self) -> float:
        """The always-valid p of the e-value, min(1, exp(-log_e))."""
        return p_always_valid(self.log_e)


def distribution_band(n: ArrayLike, *, n_min: float, alpha: float) -> FloatArray | float:
    """Radius of a band around the empirical distribution function, valid at all values and times at once.

    0.85 sqrt((ln(1 + ln(n/n_min)) + C) / n) with the smallest C for which the error bound is alpha.

    Args:
        n: number of values, >= 0, any shape.
        n_min: number of values from which the band holds, >= 1, fixed in advance.
        alpha: error level, in (0, 1).

    Returns:
        The radius, a distance of probabilities, > 0, of the shape of `n` (a float for a number); +inf where
        n < n_min.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard and Ramdas (2022), theorem 2 with A = 0.85.

    """
    count, start = not_negative("n", n), _first(n_min)
    constant = band_constant(float(level("alpha", alpha)))
    begun = count >= start
    units = np.where(begun, count, start)
    spread = np.log1p(np.log(units / start))
    radius = np.where(begun, BAND_FACTOR * np.sqrt((spread + constant) / units), np.inf)
    return float(radius) if radius.ndim == 0 else radius


def distribution_difference(
    control: Sample,
    treatment: Sample,
    *,
    alpha: float,
    n_min: float,
    concentration: ArrayLike,
    levels: ArrayLike = LEVELS,
    side: Sides = "both",
) -> DistributionDifference | Undetermined:
    """Compare two whole distributions.

    Args:
        control: one sample.
        treatment: one sample; bins need not be the control's, but shared edges lose least.
        alpha: error level of the bands together, in (0, 1).
        n_min: number of values of an arm from which its band holds, >= 1, fixed in advance.
        concentration: of the beta mixtures of the e-value, > 0, one for both arms or (control, treatment)
            (`quantile_concentration`).
        levels: (Q,) probabilities of the quantiles that the e-value averages, fixed in advance.
        side: "both" tests equality. "above" tests that the treatment is nowhere stochastically larger,
            P(treatment < x) >= P(control < x) at every x, and "below" that it is nowhere smaller.

    Returns:
        The comparison, or Undetermined while an arm has no value.

    Raises:
        ValueError: an argument is out of its range, or a sample holds several.

    Source:
        Howard and Ramdas (2022), theorem 2 and section 5.

    """
    if control.n.ndim or treatment.n.ndim:
        raise ValueError("control and treatment must be one sample each")
    log_e = distribution_log_e(control, treatment, concentration=concentration, levels=levels, side=side)
    n0, n1 = float(control.n), float(treatment.n)
    radius = sum(
        float(distribution_band(n, n_min=n_min, alpha=0.5 * float(level("alpha", alpha)))) for n in (n0, n1)
    )
    if not (n0 and n1):
        return Undetermined(NO_VALUES)
    x, distance = _distances(control, treatment, side=side)
    best = int(np.argmax(distance))
    apart = x[distance >= radius] if distance[best] >= radius else x[best : best + 1]
    separation = max(float(distance[best]), 0.0)
    return DistributionDifference(
        separation=separation,
        at=float(x[best]),
        radius=radius,
        separated_from=float(apart[0]),
        separated_to=float(apart[-1]),
        band_log_p=_band_log_p(separation, (n0, n1), n_min=float(n_min)),
        log_e=float(log_e),
        n=int(n0 + n1),
    )


def distribution_log_e(
    control: Sample,
    treatment: Sample,
    *,
    concentration: ArrayLike,
    levels: ArrayLike = LEVELS,
    side: Sides = "both",
) -> FloatArray | float:
    """Log e-value against equality in distribution, or against one-sided stochastic order.

    The average over the levels of inf over x of M_0(x) M_1(x). Under the hypothesis every level's factor is at
    most a nonnegative supermartingale that starts at 1, hence so is their average.

    Args:
        control: one sample, or many with leading dimensions (...).
        treatment: the same number of samples.
        concentration: of the beta mixtures, > 0, one for both arms or (control, treatment).
        levels: (Q,) probabilities of the quantiles, fixed in advance.
        side: "both", "above" or "below", as in `distribution_difference`.

    Returns:
        A float for one comparison, else an array (...); finite, 0 while an arm has no value.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard and Ramdas (2022), section 5; the average of e-values is one.

    """
    p = np.atleast_1d(level("levels", levels))
    if p.ndim > 1 or not p.size:
        raise ValueError("levels must be one-dimensional and not empty")
    parts = np.asarray(
        quantile_difference_log_e(
            control, treatment, p, concentration=concentration, combination="product", side=side
        )
    )
    log_e = np.logaddexp.reduce(parts, axis=-1) - math.log(len(p))
    return float(log_e) if np.ndim(log_e) == 0 else np.asarray(log_e)


def _first(n_min: float) -> float:
    start = float(positive("n_min", n_min))
    if start < 1:
        raise ValueError(f"n_min must be at least 1, got {n_min}")
    return start


def _distances(control: Sample, treatment: Sample, *, side: Sides) -> tuple[FloatArray, FloatArray]:
    # Guaranteed distances at every cell boundary x of either arm: of P(value < x), control less treatment for
    # "above", the reverse for "below", the larger for "both".
    keys = np.unique(np.concatenate([control.keys[1:-1], treatment.keys[1:-1]]))
    (low0, high0), (low1, high1) = (_shares(sample, keys) for sample in (control, treatment))
    larger, smaller = low0 - high1, low1 - high0
    if side == "both":
        return keys, np.maximum(larger, smaller)
    return keys, larger if is_above(side) else smaller


def _shares(sample: Sample, keys: FloatArray) -> tuple[FloatArray, FloatArray]:
    # Least and largest share of the sample below each key; exact at the sample's own boundaries.
    cell = np.searchsorted(sample.keys, keys, side="right") - 1
    low, high = sample.below[cell], sample.below[cell + 1]
    high = np.where(sample.keys[cell] == keys, low, high)
    return low / sample.n, high / sample.n


def _band_log_p(separation: float, n: tuple[float, float], *, n_min: float) -> float:
    # The least ln(alpha) at which bands at alpha/2 separate: the constant C at which the radii add up to the
    # separation, through its error bound.
    if min(n) < n_min:
        return 0.0
    spread = [math.log1p(math.log(count / n_min)) for count in n]

    def radius(c: float) -> float:
        return sum(BAND_FACTOR * math.sqrt((s + c) / count) for s, count in zip(spread, n, strict=True))

    if separation <= radius(LEAST_BAND_CONSTANT):
        return 0.0
    high = 2.0 * max(n) / BAND_FACTOR**2
    constant = float(
        brentq(lambda c: radius(c) - separation, LEAST_BAND_CONSTANT, high, xtol=1e-12, rtol=1e-14)
    )
    return min(log_band_error(constant) + math.log(2.0), 0.0)
