r"""Uniform boundaries for sub-gamma and sub-Bernoulli sums, and for the empirical distribution function.

A boundary u(v) is crossed at any time with probability at most alpha. Each one is the root of its own log
e-value, so boundary and e-value are dual. Everything is in log space: terms that grow with the sample are
combined before they can cancel. Arguments are checked by the callers.

Source: Howard, Ramdas, McAuliffe and Sekhon (2021), Time-uniform, nonparametric, nonasymptotic confidence
sequences, Annals of Statistics 49(2), 1055-1080, arXiv:1810.08240 ("HRMS"); Howard and Ramdas (2022),
Sequential estimation of quantiles with applications to A/B testing and best-arm identification, Bernoulli
28(3), 1704-1728, arXiv:1906.09712 ("HR").
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import betainc, gammainc, hyp1f1

from stream_xp.stats._checks import FloatArray, level, positive
from stream_xp.stats._dirichlet import stirling_rest
from stream_xp.stats.normal_mixture import radius_multiplier_one_sided, radius_multiplier_two_sided

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

    Curve: TypeAlias = Callable[[FloatArray], tuple[FloatArray, FloatArray]]

# "above" gains from values larger, "below" from values smaller than under the null; "both" from either.
Sides: TypeAlias = Literal["both", "above", "below"]

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_NEWTON_STEPS = 200
_DOUBLINGS = 200
_TOLERANCE = 1e-15
_LEAST_CONCENTRATION = 1e-3
_TINY = 1e-280
_WHOLE_SDS = 9.0  # a beta distribution that lies this far below p lies below p to all digits
# Gauss-Laguerre nodes for integrals that an exponential dominates.
_NODES, _NODE_WEIGHTS = np.polynomial.laguerre.laggauss(48)
BAND_FACTOR = 0.85
LEAST_BAND_CONSTANT = 1e-3


def tuned_rho(v_opt: ArrayLike, alpha: ArrayLike) -> FloatArray:
    """Tuning constant of a mixture that is tightest near the intrinsic time `v_opt`.

    v_opt / (2 ln(1/alpha) + ln(1 + 2 ln(1/alpha))), in the unit of `v_opt`; for a one-sided boundary of
    level a pass alpha = 2 * a.

    Source:
        HRMS section 3.5, closed approximation to the lower Lambert branch.

    """
    twice = -2.0 * np.log(level("alpha", alpha))
    return np.asarray(positive("v_opt", v_opt) / (twice + np.log1p(twice)))


def tuned_concentration(n_opt: ArrayLike, alpha: ArrayLike) -> FloatArray:
    """Concentration of the beta mixture, as prior units, that is tightest near `n_opt` units.

    K = max(rho / (p (1 - p)) - 1, 0.001) with rho = ``tuned_rho(n_opt * p * (1 - p), alpha)``; p cancels.
    The mixture of the success probability is Beta(K p, K (1 - p)).

    Source:
        HRMS proposition 7 with the tuning of section 3.5.

    """
    return np.asarray(np.maximum(tuned_rho(n_opt, alpha) - 1.0, _LEAST_CONCENTRATION))


def normal_boundary(v: FloatArray, *, rho: FloatArray, alpha: FloatArray, side: Sides) -> FloatArray:
    """Normal mixture boundary at intrinsic time v > 0, one- or two-sided (HRMS propositions 5 and 6)."""
    multiplier = radius_multiplier_two_sided if side == "both" else radius_multiplier_one_sided
    return np.asarray(np.sqrt(v) * multiplier(np.asarray(v / rho), alpha))


def gamma_exponential_log_e(s: FloatArray, v: FloatArray, *, rho: FloatArray, c: float = 1.0) -> FloatArray:
    """Log of the gamma-exponential mixture, increasing and convex in `s`, for a sub-exponential sum.

    With x = v + rho, y = s + x (both over c^2, s over c) it is
    ln [rho^rho e^-rho / g(rho, rho)] + ln [e^y y^-x g(x, y)], g the lower incomplete gamma function.

    Args:
        s: sum of deviations above the null, any sign, any shape.
        v: its intrinsic time, >= 0, broadcast.
        rho: tuning constant, > 0, broadcast.
        c: scale of the sub-exponential tail, > 0.

    Source:
        HRMS proposition 9.

    """
    u, x, scaled_rho = _gamma_arguments(s, v, rho=rho, c=c)
    return np.asarray(_log_gamma_prior(scaled_rho) + _log_gamma_integral(u, x))


def gamma_exponential_boundary(v: FloatArray, *, rho: FloatArray, alpha: FloatArray) -> FloatArray:
    """Root s > 0 of ``gamma_exponential_log_e(s, v, rho=rho) = ln(1/alpha)``, of the broadcast shape."""
    v, rho, alpha = np.broadcast_arrays(v, rho, alpha)
    x, target = v + rho, -np.log(alpha) - _log_gamma_prior(rho)
    start = np.sqrt(2.0 * x * np.maximum(-np.log(alpha), 1.0))
    return convex_root(lambda s: _gamma_curve(s, x), target, start=start)


def beta_binomial_log_e(
    k: FloatArray, n: FloatArray, *, p: FloatArray, concentration: FloatArray, side: Sides = "both"
) -> FloatArray:
    """Log e-value of k successes in n trials against the success probability p, by a beta mixture.

    ln B(a + k, b + n - k) - ln B(a, b) - k ln p - (n - k) ln(1 - p), a = K p, b = K (1 - p), arranged
    around the expected counts. With one side the mixture is cut at p: "above" is decided by success
    probabilities above p and tests "at most p", "below" tests "at least p".

    Args:
        k: successes, 0 to n, any shape; need not be whole.
        n: trials, >= 0, broadcast.
        p: success probability of the null, in (0, 1), broadcast.
        concentration: K, > 0, broadcast.
        side: "both", "above" or "below".

    Source:
        HRMS propositions 7 (two-sided) and 8 (one-sided), with g = p and h = 1 - p.

    """
    both = _beta_binomial(k, n, p=p, concentration=concentration)
    if side == "both":
        return both
    mirrored, none = is_above(side), np.asarray(0.0)
    share = _log_share(k, n, p=p, concentration=concentration, mirrored=mirrored)
    prior = _log_share(none, none, p=p, concentration=concentration, mirrored=mirrored)
    return np.asarray(both + share - prior)


def beta_binomial_boundary(
    n: FloatArray, *, p: FloatArray, concentration: FloatArray, alpha: FloatArray
) -> FloatArray:
    """Smallest excess u >= 0 over n p whose two-sided log e-value is ln(1/alpha); +inf where none reaches it.

    The lower boundary at p is the upper one at 1 - p.
    """
    n, p, concentration, alpha = np.broadcast_arrays(n, p, concentration, alpha)
    target = -np.log(alpha)

    def log_e(s: FloatArray) -> FloatArray:
        return _beta_binomial(np.minimum(n * p + s, n), n, p=p, concentration=concentration)

    most = n * (1.0 - p)
    reached = log_e(most) >= target
    root = _bisected(log_e, target, low=np.zeros(n.shape), high=most)
    return np.asarray(np.where(reached, root, np.inf))


@lru_cache(maxsize=256)
def band_constant(alpha: float) -> float:
    """Smallest C for which the band 0.85 sqrt((ln(1 + ln(n/n_min)) + C) / n) errs with at most `alpha`.

    The infimum over eta of ``band_error`` equals alpha.

    Source:
        HR theorem 2, with its constant A = 0.85.

    """
    # C = 2.9 is the least at which the bound is below 1 for any eta; ln error is decreasing in C.
    high = 4.0
    while log_band_error(high) > math.log(alpha):
        high *= 2.0
    return float(
        brentq(
            lambda c: log_band_error(c) - math.log(alpha), LEAST_BAND_CONSTANT, high, xtol=1e-13, rtol=1e-14
        )
    )


def log_band_error(c: float) -> float:
    """Log of the smallest bound on the chance that the band with constant `c` is ever left; decreasing.

    The minimum over eta in (1, 2 A^2) of 4 exp(-g C) (1 + 1 / ((g - 1) ln eta)), with
    g = (2/eta) (A - sqrt(2 (eta - 1) / C))^2 > 1 (HR theorem 2). At most 0.
    """
    # g > 1 up to the root of sqrt(eta/2) + sqrt(2 (eta - 1) / C) = A.
    most = brentq(
        lambda eta: math.sqrt(eta / 2) + math.sqrt(2 * (eta - 1) / c) - BAND_FACTOR, 1.0, 2 * BAND_FACTOR**2
    )

    def bound(eta: float) -> float:
        g = 2.0 / eta * (BAND_FACTOR - math.sqrt(2.0 * (eta - 1.0) / c)) ** 2
        if g <= 1.0 or eta <= 1.0:
            return math.inf
        return math.log(4.0) - g * c + math.log1p(1.0 / ((g - 1.0) * math.log(eta)))

    best = minimize_scalar(bound, bounds=(1.0, most), method="bounded", options={"xatol": 1e-12})
    return min(float(best.fun), 0.0)


def is_above(side: Sides) -> bool:
    """Whether the one side is the upper one; ValueError unless it is "above" or "below"."""
    if side not in ("above", "below"):
        raise ValueError(f"side must be 'both', 'above' or 'below', got {side!r}")
    return side == "above"


def log_threshold(alpha: float, *, side: Sides) -> float:
    """Log capital that rejects at level alpha, where both sides share the level equally."""
    whole = -math.log(float(level("alpha", alpha)))
    if side == "both":
        return whole + math.log(2.0)
    is_above(side)
    return whole


def convex_root(curve: Curve, target: FloatArray, *, start: FloatArray) -> FloatArray:
    """Root s > 0 of an increasing convex function, element by element.

    Doubles `start` until the function has reached `target`; from there Newton descends without overshooting.

    Args:
        curve: returns the function and its slope, for an array of the shape of `start`.
        target: the value to reach, broadcast.
        start: any positive first guess.

    """
    s = start
    for _ in range(_DOUBLINGS):
        short = curve(s)[0] < target
        if not short.any():
            break
        s = np.where(short, 2.0 * s, s)
    for _ in range(_NEWTON_STEPS):
        height, slope = curve(s)
        change = (height - target) / slope
        s = np.maximum(s - change, 0.0)
        if (np.abs(change) <= _TOLERANCE * s).all():
            break
    return np.asarray(s)


def _bisected(
    f: Callable[[FloatArray], FloatArray], target: FloatArray, *, low: FloatArray, high: FloatArray
) -> FloatArray:
    for _ in range(_NEWTON_STEPS):
        middle = 0.5 * (low + high)
        reached = f(middle) >= target
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return np.asarray(high)


def _less_log1p(u: FloatArray) -> FloatArray:
    # u - log1p(u) without cancellation: with w = u/(2 + u) it is u w - 2 (w^3/3 + w^5/5 + ...).
    near = np.clip(u, -0.1, 0.1)
    far = np.where(np.abs(u) <= 0.1, 1.0, u)
    w = near / (2.0 + near)
    w2 = w * w
    tail = w2 * w * (1 / 3 + w2 * (1 / 5 + w2 * (1 / 7 + w2 * (1 / 9 + w2 * (1 / 11 + w2 / 13)))))
    return np.asarray(np.where(np.abs(u) <= 0.1, near * w - 2.0 * tail, far - np.log1p(far)))


def _gamma_arguments(
    s: FloatArray, v: FloatArray, *, rho: FloatArray, c: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    s, v, rho = np.broadcast_arrays(
        np.asarray(s / c, dtype=np.float64), np.asarray(v / (c * c)), np.asarray(rho / (c * c))
    )
    return s, v + rho, rho


def _log_gamma_prior(rho: FloatArray) -> FloatArray:
    # ln [rho^rho e^-rho / g(rho, rho)].
    whole = 0.5 * np.log(rho) - _HALF_LOG_2PI - stirling_rest(rho)
    return np.asarray(whole - np.log(gammainc(rho, rho)))


def _log_gamma_integral(s: FloatArray, x: FloatArray) -> FloatArray:
    # ln [e^y y^-x g(x, y)] with y = x + s: by the incomplete gamma function near and right of s = 0, by
    # Kummer's function or quadrature in the left tail, where that would underflow.
    edge = -np.minimum(5.0 * np.sqrt(x), 0.5 * x)
    left = s < edge
    inner = np.where(left, 0.0, s)
    whole = _HALF_LOG_2PI - 0.5 * np.log(x) + stirling_rest(x)
    body = whole + x * _less_log1p(inner / x) + np.log(gammainc(x, x + inner))
    if not left.any():
        return np.asarray(body)
    return np.asarray(np.where(left, _log_left_tail(np.where(left, s, edge), x), body))


def _log_left_tail(s: FloatArray, x: FloatArray) -> FloatArray:
    # ln of the integral of e^(y u) (1 - u)^(x - 1) over u in (0, 1), y = x + s far below x.
    small = x < 50.0
    kummer = np.log(hyp1f1(1.0, np.where(small, x, 1.0) + 1.0, np.where(small, x + s, 0.0))) - np.log(x)
    decay = np.where(small, 1e6, -1.0 - s)
    with np.errstate(divide="ignore"):
        u = np.minimum(_NODES / decay[..., np.newaxis], 1.0)
        bent = np.where(small, 1e6, x - 1.0)[..., np.newaxis] * (u + np.log1p(-u))
    with np.errstate(under="ignore"):
        share = (np.exp(np.maximum(bent, -745.0)) * _NODE_WEIGHTS).sum(axis=-1)
    return np.asarray(np.where(small, kummer, np.log(share) - np.log(decay)))


def _gamma_curve(s: FloatArray, x: FloatArray) -> tuple[FloatArray, FloatArray]:
    height = _log_gamma_integral(s, x)
    # The slope of ln e^y y^-x g(x, y) is 1 - x/y + 1/(y * that factor).
    return height, s / (x + s) + np.exp(-height) / (x + s)


def _beta_binomial(k: FloatArray, n: FloatArray, *, p: FloatArray, concentration: FloatArray) -> FloatArray:
    log_density = _log_density(k, n, p=p, concentration=concentration)
    return np.asarray(_log_beta_prior(p, concentration) - log_density)


def _log_density(k: FloatArray, n: FloatArray, *, p: FloatArray, concentration: FloatArray) -> FloatArray:
    # ln [p^a (1 - p)^b / B(a, b)] with a = k + K p, b = n - k + K (1 - p). By ln Gamma(x) = (x - 1/2) ln x
    # - x + ln(2 pi)/2 + c(x) the terms of order n collapse to expected * (r ln r - (r - 1)) with
    # r = x / expected. Both counts go through each step together.
    top, excess = np.asarray(n + concentration), k - n * p
    expected = np.stack(np.broadcast_arrays(top * p, top * (1.0 - p)))
    x = np.stack(np.broadcast_arrays(k + concentration * p, n - k + concentration * (1.0 - p)))
    expected = expected.reshape(2, *(1,) * (x.ndim - expected.ndim), *expected.shape[1:])
    d = np.stack((excess, -excess)) / expected
    log_ratio = np.log1p(np.maximum(d, -0.5))
    far = d < -0.5
    if far.any():
        log_ratio = np.where(far, np.log(x / expected), log_ratio)
    main = (expected * ((1.0 + d) * log_ratio - d) - 0.5 * np.log(x) + stirling_rest(x)).sum(axis=0)
    return np.asarray(stirling_rest(top) - 0.5 * np.log(top) - _HALF_LOG_2PI - main)


def _log_beta_prior(p: FloatArray, concentration: FloatArray) -> FloatArray:
    # -ln B(a, b) + a ln p + b ln(1 - p) with a = K p, b = K (1 - p), in the same arrangement.
    a, b = concentration * p, concentration * (1.0 - p)
    rest = stirling_rest(np.asarray(concentration)) - stirling_rest(a) - stirling_rest(b)
    return np.asarray(rest + 0.5 * (np.log(a) + np.log(b) - np.log(concentration)) - _HALF_LOG_2PI)


def _log_share(
    k: FloatArray, n: FloatArray, *, p: FloatArray, concentration: FloatArray, mirrored: bool
) -> FloatArray:
    # ln of the share of Beta(k + K p, n - k + K (1 - p)) that lies below p (or above it, if mirrored); by
    # quadrature where it would underflow, and nothing at all where it is 1.
    if mirrored:
        k, p = n - k, 1.0 - p
    k, n, p, concentration = np.broadcast_arrays(k, n, p, concentration)
    a, b = k + concentration * p, n - k + concentration * (1.0 - p)
    part = np.asarray(a - (a + b) * p >= -_WHOLE_SDS * np.sqrt((a + b + 1.0) * p * (1.0 - p)) - _WHOLE_SDS)
    log_share = np.zeros(a.shape)
    share = betainc(a[part], b[part], p[part])
    tiny = share < _TINY
    logs = np.log(np.where(tiny, 1.0, share))
    if tiny.any():
        far = tuple(v[part][tiny] for v in (k, n, p, concentration))
        logs[tiny] = _log_far_share(*far)
    log_share[part] = logs
    return log_share


def _log_far_share(k: FloatArray, n: FloatArray, p: FloatArray, concentration: FloatArray) -> FloatArray:
    # The integral of theta^(a-1) (1-theta)^(b-1) up to p, with theta = p e^-w and w = node / decay.
    a, b = (k + concentration * p)[..., np.newaxis], (n - k + concentration * (1.0 - p))[..., np.newaxis]
    odds = (p / (1.0 - p))[..., np.newaxis]
    decay = a - (b - 1.0) * odds
    w = _NODES / decay
    bent = _NODES - a * w + (b - 1.0) * np.log1p(odds * -np.expm1(-w))
    with np.errstate(under="ignore"):
        log_integral = np.log((np.exp(bent) * _NODE_WEIGHTS).sum(axis=-1)) - np.log(decay[..., 0])
    return np.asarray(log_integral - np.log1p(-p) + _log_density(k, n, p=p, concentration=concentration))
