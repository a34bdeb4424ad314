"""From single looks to a whole run: always-valid p, running e-value and intersection; and the mSPRT.

An e-process is at most 1 in expectation at every stopping time under the null hypothesis, hence by Ville's
inequality the chance that it ever reaches 1/alpha is at most alpha. So one may stop at the first look that
rejects, and the smallest p of all looks so far is still a p.

Source: Ramdas, Gruenwald, Vovk and Shafer (2023), Statistical Science 38(4), 576-601.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._checks import FloatArray, finite, positive
from stream_xp.stats.mean_difference import two_sided
from stream_xp.stats.normal_mixture import (
    Evidence,
    log_e_two_sided,
    p_always_valid,
    radius_multiplier_two_sided,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True, eq=False)
class Intersection:
    """The intersection of a confidence sequence's intervals, look by look.

    Attributes:
        lower: largest lower end so far, of the shape of the looks; -inf is possible.
        upper: smallest upper end so far; +inf is possible.
        empty: where no value is left (lower > upper), bool. If the parameter is constant this has
            probability at most alpha, so an empty intersection says that it is not.

    """

    lower: FloatArray
    upper: FloatArray
    empty: NDArray[np.bool_]


def running_log_e(log_e: ArrayLike, *, axis: int = -1) -> FloatArray:
    """Largest log e-value of all looks so far.

    Reject the null hypothesis once it reaches ln(1/alpha). It is evidence for stopping only: a maximum of
    e-values is no e-value, so it must not be multiplied, averaged, or given to an e-value procedure of
    multiplicity.

    Args:
        log_e: log e-values in the order of the looks, along `axis`; finite.
        axis: which axis holds the looks.

    Returns:
        Array of the same shape.

    Raises:
        ValueError: a value is not finite, or there is no such axis.

    Source:
        Ramdas et al. (2023), Ville's inequality.

    """
    return np.asarray(np.maximum.accumulate(_looks("log_e", log_e, axis), axis=axis))


def running_p(log_e: ArrayLike, *, axis: int = -1) -> FloatArray:
    """Always-valid p over all looks so far: the smallest min(1, exp(-log_e)).

    Under the null hypothesis the chance that it is ever <= alpha is at most alpha.

    Args:
        log_e: log e-values in the order of the looks, along `axis`; finite.
        axis: which axis holds the looks.

    Returns:
        p in [0, 1], never increasing along `axis`, of the same shape.

    Raises:
        ValueError: a value is not finite, or there is no such axis.

    Source:
        Ramdas et al. (2023), Ville's inequality.

    """
    return np.asarray(p_always_valid(running_log_e(log_e, axis=axis)))


def running_intersection(lower: ArrayLike, upper: ArrayLike, *, axis: int = -1) -> Intersection:
    """Intersect the intervals of all looks so far.

    Only if the parameter is the same at every look. An effect that wears off moves the parameter itself: with
    an effect falling from 0.6 to 0 the single intervals were measured to miss it in 0.03 of runs and
    their intersection in all of them. Show the interval of the latest look; intersect for a sharp null
    hypothesis.

    Args:
        lower: lower ends in the order of the looks, along `axis`; -inf allowed, NaN not.
        upper: upper ends, of the same shape, not below `lower`; +inf allowed.
        axis: which axis holds the looks.

    Returns:
        The intersections, of the same shape.

    Raises:
        ValueError: shapes differ, a bound is NaN, an interval is empty, or there is no such axis.

    Source:
        Howard, Ramdas, McAuliffe and Sekhon (2021), Annals of Statistics 49(2), 1055-1080, section 2
        (uniform coverage, hence coverage of the intersection).

    """
    low, high = (_bounds(name, value) for name, value in (("lower", lower), ("upper", upper)))
    if low.shape != high.shape:
        raise ValueError(f"upper must have the shape of lower {low.shape}, got {high.shape}")
    _check_axis(low, axis)
    if np.any(high < low):
        raise ValueError("upper must not be below lower")
    lows, highs = np.maximum.accumulate(low, axis=axis), np.minimum.accumulate(high, axis=axis)
    return Intersection(lows, highs, np.asarray(lows > highs))


def msprt_log_e(
    difference: ArrayLike, *, variance: ArrayLike, n: ArrayLike, tau2: ArrayLike
) -> FloatArray | float:
    """Log of the mixture likelihood ratio of the mSPRT, against "no difference".

    ln sqrt(V / (V + n tau2)) + n^2 tau2 D^2 / (2 V (V + n tau2)): the two-sided normal mixture with
    z = D * sqrt(n / V) and K = n tau2 / V. tau2 is an absolute variance of the effect under the mixture, where
    rho2 of `normal_mixture` is relative to the noise.

    Guarantee: exact at every n for normal values of known variance; asymptotic with an estimated one.

    Args:
        difference: D, mean difference of n pairs of units, any shape.
        variance: V, variance of one pair's difference (the sum of both arms' variances of one unit), > 0.
        n: pairs, > 0.
        tau2: variance of the effect under the mixture, > 0; fixed in advance. All broadcast.

    Returns:
        Natural logarithm of the likelihood ratio, finite, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Johari, Koomen, Pekelis and Walsh (2022), Operations Research 70(3), 1806-1821, mixture of the normal
        likelihood ratio; Robbins (1970), Annals of Mathematical Statistics 41(5), 1397-1409.

    """
    se, k = _msprt_kernel(variance, n, tau2)
    with np.errstate(over="ignore"):
        z = np.clip(finite("difference", difference) / se, -1e150, 1e150)
    return _plain(np.asarray(log_e_two_sided(z, k)))


def msprt_radius(
    *, variance: ArrayLike, n: ArrayLike, tau2: ArrayLike, alpha: ArrayLike
) -> FloatArray | float:
    """Half width of the mSPRT's confidence sequence for the difference, in its unit.

    Args:
        variance: V, variance of one pair's difference, > 0.
        n: pairs, > 0.
        tau2: variance of the effect under the mixture, > 0; fixed in advance.
        alpha: error level in (0, 1). All broadcast.

    Returns:
        The half width, > 0, of the broadcast shape: the set of differences that `msprt_log_e` does not
        reject.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        See `msprt_log_e`.

    """
    se, k = _msprt_kernel(variance, n, tau2)
    return _plain(np.asarray(se * radius_multiplier_two_sided(k, finite("alpha", alpha))))


def msprt(difference: float, *, variance: float, n: int, tau2: float, alpha: float) -> Evidence:
    """Confidence sequence and e-value of the mSPRT for one difference.

    Args:
        difference: D, mean difference of n pairs of units.
        variance: V, variance of one pair's difference, > 0.
        n: pairs, > 0.
        tau2: variance of the effect under the mixture, > 0; fixed in advance.
        alpha: error level in (0, 1).

    Returns:
        Evidence about the difference; its `n` counts the units of both arms, 2 n.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        See `msprt_log_e`.

    """
    estimate = float(finite("difference", difference))
    se, k = _msprt_kernel(variance, n, tau2)
    half, log_e = map(float, two_sided(estimate, se, k=k, alpha=alpha))
    return Evidence(estimate, estimate - half, estimate + half, log_e, 2 * n)


def _msprt_kernel(variance: ArrayLike, n: ArrayLike, tau2: ArrayLike) -> tuple[FloatArray, FloatArray]:
    v, pairs, mixture = positive("variance", variance), positive("n", n), positive("tau2", tau2)
    with np.errstate(over="ignore"):
        k = pairs * (mixture / v)
    return np.asarray(np.sqrt(v / pairs)), positive("n * tau2 / variance", k)


def _looks(name: str, value: ArrayLike, axis: int) -> FloatArray:
    looks = finite(name, value)
    _check_axis(looks, axis)
    return looks


def _check_axis(looks: FloatArray, axis: int) -> None:
    if not -looks.ndim <= axis < looks.ndim:
        raise ValueError(f"axis must be one of the {looks.ndim} axes, got {axis}")


def _bounds(name: str, value: ArrayLike) -> FloatArray:
    try:
        bounds = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numeric") from error
    if np.isnan(bounds).any():
        raise ValueError(f"{name} must not be NaN")
    return bounds


def _plain(value: FloatArray) -> FloatArray | float:
    return float(value) if np.ndim(value) == 0 else value
