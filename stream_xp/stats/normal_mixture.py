r"""The normal mixture: the one kernel behind every mean, lift and one-sided test.

With an estimate of variance V, z = estimate / sqrt(V), N units and a tuning constant rho2, every
quantity depends on z and K = N * rho2 only. A confidence sequence is an interval that covers the truth
at all times at once with probability at least 1 - alpha; its dual is a test that rejects when
``log_e >= ln(1/alpha)``, that is exactly when 0 lies outside the sequence.

Assumptions: with a known variance and sub-Gaussian sums the guarantee holds at every n. With an estimated
variance it holds asymptotically. rho2 and alpha are frozen before the first look.

Sources: Robbins (1970), Annals of Mathematical Statistics 41(5), 1397-1409 (the mixture);
Howard, Ramdas, McAuliffe and Sekhon (2021), Annals of Statistics 49(2), 1055-1080, two-sided and one-sided
normal mixture boundaries (v = N, rho = 1/rho2); Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024),
Annals of Statistics 52(6), 2613-2640 (asymptotic confidence sequences).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast, overload

import numpy as np
from scipy.special import erfcx, log_ndtr

from stream_xp.stats._checks import FloatArray, finite, level, not_negative, positive

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# Beyond this |z| the evidence saturates, so that its square stays a finite float.
Z_LIMIT = 1e150
_SQRT_HALF = math.sqrt(0.5)
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_NEWTON_STEPS = 60
_TOLERANCE = 4e-16
_REMEMBERED = 65_536
_THRESHOLD_LIMIT = 1e280


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the data say about one effect at one look.

    Attributes:
        estimate: the point estimate, in the unit of the effect.
        lower: lower end of the confidence sequence, same unit; -inf for a one-sided upper bound.
        upper: upper end of the confidence sequence, same unit; +inf for a one-sided lower bound.
        log_e: natural logarithm of the e-value against the null hypothesis; finite.
        n: number of units in both arms.

    """

    estimate: float
    lower: float
    upper: float
    log_e: float
    n: int

    @property
    def p_always_valid(self) -> float:
        """The always-valid p of this look, min(1, exp(-log_e)), in [0, 1]."""
        return p_always_valid(self.log_e)


@dataclass(frozen=True, slots=True)
class Undetermined:
    """The data do not determine the quantity asked for; an expected answer, not an error.

    Attributes:
        reason: why, one of the constants of the module that returns it.

    """

    reason: str


@overload
def tuned_rho2(n_star: float, alpha: float) -> float: ...
@overload
def tuned_rho2(n_star: FloatArray, alpha: FloatArray | float) -> FloatArray: ...
@overload
def tuned_rho2(n_star: float, alpha: FloatArray) -> FloatArray: ...
def tuned_rho2(n_star: ArrayLike, alpha: ArrayLike) -> FloatArray | float:
    """Tuning constant that makes the two-sided sequence tightest, relative to sqrt(V), at `n_star` units.

    rho2 = (-W_{-1}(-alpha^2/e) - 1) / n_star: with x = rho2 * n_star, the root of
    x - log1p(x) = 2 ln(1/alpha), found by Newton from the upper bound x <= L + sqrt(2 L). The root is found
    once for each distinct alpha and remembered.

    Args:
        n_star: planned number of units in both arms, > 0, any shape.
        alpha: two-sided error level, in (0, 1), broadcast. For a one-sided test of level a pass 2 * a.

    Returns:
        rho2 per unit, > 0, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), optimal tuning of the two-sided normal mixture by the lower Lambert branch;
        Chatzigeorgiou (2013), IEEE Communications Letters 17(8), 1505-1508, theorem 1 (the bound).

    """
    if type(n_star) in {int, float} and type(alpha) is float:
        return _tuned_rho2(cast("float", n_star), alpha)
    n, levels = positive("n_star", n_star), level("alpha", alpha)
    distinct, where = np.unique(levels, return_inverse=True)
    roots = np.array([_tuned_root(a) for a in distinct.tolist()], dtype=np.float64)
    return _plain(roots[where].reshape(levels.shape) / n)


@lru_cache(maxsize=_REMEMBERED)
def _tuned_rho2(n_star: float, alpha: float) -> float:
    positive("n_star", n_star)
    level("alpha", alpha)
    return _tuned_root(alpha) / n_star


@lru_cache(maxsize=_REMEMBERED)
def _tuned_root(alpha: float) -> float:
    target = -2.0 * math.log(alpha)
    x = target + math.sqrt(2.0 * target)
    for _ in range(_NEWTON_STEPS):
        change = (x - math.log1p(x) - target) * (1.0 + x) / x
        x -= change
        if abs(change) <= _TOLERANCE * x:
            break
    return x


@overload
def one_sided_rho2(n_star: float, alpha: float) -> float: ...
@overload
def one_sided_rho2(n_star: FloatArray, alpha: FloatArray | float) -> FloatArray: ...
@overload
def one_sided_rho2(n_star: float, alpha: FloatArray) -> FloatArray: ...
def one_sided_rho2(n_star: ArrayLike, alpha: ArrayLike) -> FloatArray | float:
    """Tuning constant of a one-sided test of level `alpha`: that of the two-sided one at 2 * alpha.

    Args:
        n_star: planned number of units in both arms, > 0, any shape.
        alpha: one-sided error level, in (0, 0.5), broadcast.

    Returns:
        rho2 per unit, > 0, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    """
    if type(n_star) in {int, float} and type(alpha) is float and 0 < alpha < 0.5:
        return _tuned_rho2(cast("float", n_star), 2.0 * alpha)
    levels = finite("alpha", alpha)
    if not ((levels > 0) & (levels < 0.5)).all():
        raise ValueError("alpha must lie strictly between 0 and 0.5 for a one-sided test")
    return tuned_rho2(positive("n_star", n_star), 2.0 * levels)


@overload
def log_e_two_sided(z: float, k: float) -> float: ...
@overload
def log_e_two_sided(z: FloatArray, k: FloatArray | float) -> FloatArray: ...
@overload
def log_e_two_sided(z: float, k: FloatArray) -> FloatArray: ...
def log_e_two_sided(z: ArrayLike, k: ArrayLike) -> FloatArray | float:
    """Log e-value of the two-sided normal mixture, -log1p(K)/2 + z^2/2 * K/(1+K).

    Args:
        z: estimate over its standard error, any shape; finite, saturates at |z| = 1e150.
        k: K = N * rho2, >= 0, broadcast against `z`.

    Returns:
        Natural logarithm of the e-value, finite, of the broadcast shape.

    Raises:
        ValueError: an argument is not finite, or `k` is negative.

    Source:
        Robbins (1970); Howard et al. (2021), two-sided normal mixture.

    """
    k = not_negative("k", k)
    x = _shrunk(z, k)
    return _plain(0.5 * x * x - 0.5 * np.log1p(k))


@overload
def radius_multiplier_two_sided(k: float, alpha: float) -> float: ...
@overload
def radius_multiplier_two_sided(k: FloatArray, alpha: FloatArray | float) -> FloatArray: ...
@overload
def radius_multiplier_two_sided(k: float, alpha: FloatArray) -> FloatArray: ...
def radius_multiplier_two_sided(k: ArrayLike, alpha: ArrayLike) -> FloatArray | float:
    """Half width of the two-sided confidence sequence in standard errors.

    sqrt((1 + 1/K) * (log1p(K) + 2 ln(1/alpha))); the half width is sqrt(variance) times this.

    Args:
        k: K = N * rho2, > 0, any shape.
        alpha: error level in (0, 1), broadcast against `k`.

    Returns:
        The multiplier, > 0, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), two-sided normal mixture; Waudby-Smith et al. (2024), theorem 2.2.

    """
    k = positive("k", k)
    return _plain(np.sqrt(np.log1p(k) - 2.0 * np.log(level("alpha", alpha))) * _widening(k))


@overload
def radius_multiplier_at(k: float, log_threshold: float) -> float: ...
@overload
def radius_multiplier_at(k: FloatArray, log_threshold: FloatArray | float) -> FloatArray: ...
@overload
def radius_multiplier_at(k: float, log_threshold: FloatArray) -> FloatArray: ...
def radius_multiplier_at(k: ArrayLike, log_threshold: ArrayLike) -> FloatArray | float:
    """Half width, in standard errors, at which the two-sided log e-value reaches any given threshold.

    sqrt((1 + 1/K) * (log1p(K) + 2 t)), and 0 where the log e-value is above t even at z = 0: the set
    {z: log_e_two_sided(z, K) < t} is then empty. With t = ln(1/alpha) it is `radius_multiplier_two_sided`.
    For a mixture of this e-value with another one, whose threshold is then not 1/alpha.

    Args:
        k: K = N * rho2, > 0, any shape.
        log_threshold: t, finite, of either sign, at most 1e280 in size, broadcast against `k`.

    Returns:
        The multiplier, >= 0, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), two-sided normal mixture.

    """
    k, threshold = positive("k", k), finite("log_threshold", log_threshold)
    if (np.abs(threshold) > _THRESHOLD_LIMIT).any():
        raise ValueError(f"log_threshold must be at most {_THRESHOLD_LIMIT} in size")
    return _plain(np.sqrt(np.maximum(np.log1p(k) + 2.0 * threshold, 0.0)) * _widening(k))


@overload
def log_e_one_sided(z: float, k: float) -> float: ...
@overload
def log_e_one_sided(z: FloatArray, k: FloatArray | float) -> FloatArray: ...
@overload
def log_e_one_sided(z: float, k: FloatArray) -> FloatArray: ...
def log_e_one_sided(z: ArrayLike, k: ArrayLike) -> FloatArray | float:
    """Log e-value of the one-sided normal mixture, for H0: effect <= 0.

    ln 2 - log1p(K)/2 + x^2/2 + ln Phi(x) with x = z * sqrt(K/(1+K)); the mixture is a normal folded onto
    the positive effects. Increasing in `z`; pass -z to test H0: effect >= 0.

    Args:
        z: estimate over its standard error, any shape; finite, saturates at |z| = 1e150.
        k: K = N * rho2, >= 0, broadcast against `z`.

    Returns:
        Natural logarithm of the e-value, finite, of the broadcast shape.

    Raises:
        ValueError: an argument is not finite, or `k` is negative.

    Source:
        Howard et al. (2021), one-sided normal mixture.

    """
    k = not_negative("k", k)
    return _plain(math.log(2.0) - 0.5 * np.log1p(k) + _log_scaled_ndtr(_shrunk(z, k)))


@overload
def radius_multiplier_one_sided(k: float, alpha: float) -> float: ...
@overload
def radius_multiplier_one_sided(k: FloatArray, alpha: FloatArray | float) -> FloatArray: ...
@overload
def radius_multiplier_one_sided(k: float, alpha: FloatArray) -> FloatArray: ...
def radius_multiplier_one_sided(k: ArrayLike, alpha: ArrayLike) -> FloatArray | float:
    """Distance of a one-sided confidence bound from the estimate, in standard errors.

    The exact root z of ``log_e_one_sided(z, k) = ln(1/alpha)``. In x the left side is increasing and
    convex and the closed form sqrt(2 ln(1 + sqrt(1+K)/(2 alpha))) lies above the root, so Newton started
    there descends to it without overshooting.

    Args:
        k: K = N * rho2, > 0, any shape.
        alpha: error level in (0, 1), broadcast against `k`.

    Returns:
        The multiplier, > 0, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), one-sided normal mixture (exact, and its closed upper bound).

    """
    k = positive("k", k)
    target = 0.5 * np.log1p(k) - np.log(level("alpha", alpha)) - math.log(2.0)
    return _plain(_root_of_scaled_ndtr(target) * _widening(k))


@overload
def p_always_valid(log_e: float) -> float: ...
@overload
def p_always_valid(log_e: FloatArray) -> FloatArray: ...
def p_always_valid(log_e: ArrayLike) -> FloatArray | float:
    """Always-valid p of one look, min(1, exp(-log_e)).

    Args:
        log_e: natural logarithm of the e-value, any shape; finite.

    Returns:
        p in [0, 1], of the same shape.

    Raises:
        ValueError: `log_e` is not finite.

    Source:
        Ramdas, Gruenwald, Vovk and Shafer (2023), Statistical Science 38(4), 576-601 (p = 1/e, by Ville).

    """
    return _plain(np.exp(-np.maximum(finite("log_e", log_e), 0.0)))


def _shrunk(z: ArrayLike, k: FloatArray) -> FloatArray:
    x: FloatArray = np.minimum(np.maximum(finite("z", z), -Z_LIMIT), Z_LIMIT) * np.sqrt(k / (1.0 + k))
    return x


def _widening(k: FloatArray) -> FloatArray:
    # sqrt((1 + K)/K) in two factors: 1/K alone overflows for the smallest K.
    widening: FloatArray = np.sqrt(1.0 + k) / np.sqrt(k)
    return widening


def _log_scaled_ndtr(x: FloatArray) -> FloatArray:
    # x^2/2 + ln Phi(x); left of 0 by erfcx, because there the two terms cancel.
    left = np.log(0.5 * erfcx(np.maximum(-x, 0.0) * _SQRT_HALF))
    right = 0.5 * x * x + log_ndtr(np.maximum(x, 0.0))
    result: FloatArray = np.where(x < 0.0, left, right)
    return result


def _root_of_scaled_ndtr(target: FloatArray) -> FloatArray:
    # The x >= 0 with x^2/2 + ln Phi(x) = target, for target > -ln 2; there is one, as the left side
    # increases from -ln 2 at x = 0. Each element stops at its own last step, so that it never depends on
    # the others that are computed with it.
    flat = np.asarray(target, dtype=np.float64).reshape(-1)
    roots: FloatArray = np.sqrt(2.0 * np.logaddexp(0.0, flat))
    open_, x = np.arange(flat.size), roots
    for _ in range(_NEWTON_STEPS):
        height = 0.5 * x * x + log_ndtr(x)
        change = (height - flat[open_]) / (x + np.exp(-height - _LOG_SQRT_2PI))
        x = np.maximum(x - change, 0.0)
        roots[open_] = x
        moving = np.abs(change) > _TOLERANCE * np.maximum(x, 1.0)
        if not moving.any():
            break
        open_, x = open_[moving], x[moving]
    return roots.reshape(np.shape(target))


def _plain(value: FloatArray) -> FloatArray | float:
    # A 0-d array becomes a float, anything else stays as it is.
    return float(value) if np.ndim(value) == 0 else value
