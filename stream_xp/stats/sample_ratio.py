"""Sequential tests of the sample ratio: whether the arms get the shares that their weights promise.

Units are counted once, at their first valid exposure. Under the null hypothesis each unit falls into arm a
of its weight epoch e with probability weights[e, a], whatever came before; both tests are then exact at
every n and under every way of looking.

Source: Lindon and Malek (2022), Anytime-valid inference for multinomial count data, NeurIPS 35,
arXiv:2011.03567 (Dirichlet mixture). The tilt mixture, which stays exact when the weights change, is the
same martingale argument applied to an exponential tilt of each unit's own weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln

from stream_xp.stats._checks import FloatArray, finite, positive
from stream_xp.stats.normal_mixture import Undetermined, p_always_valid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

TILT_SD = 0.1
CONCENTRATION = 100.0
NO_UNITS = "no unit has been counted"

_NODES, _NODE_WEIGHTS = np.polynomial.hermite.hermgauss(61)
# Weights for an integrand without its Gaussian factor.
_LOG_NODE_WEIGHTS = np.log(_NODE_WEIGHTS) + _NODES**2
_MODE_STEPS = 200
_BLOCK_ELEMENTS = 250_000
_COUNT_LIMIT = 2**53


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Evidence of a sample-ratio mismatch at one look.

    Attributes:
        log_e: natural logarithm of the e-value against "the shares are those of the weights"; finite.
        p_always_valid: min(1, exp(-log_e)).
        observed_shares: share of units per arm; sums to 1.
        expected_shares: share per arm that the weights promise for these epoch totals; sums to 1.

    """

    log_e: float
    p_always_valid: float
    observed_shares: tuple[float, ...]
    expected_shares: tuple[float, ...]


def sample_ratio(counts: ArrayLike, weights: ArrayLike, *, sd: float = TILT_SD) -> SampleRatio | Undetermined:
    """Test the sample ratio over weight epochs by the tilt mixture.

    Args:
        counts: (E, K) integers, units of each epoch and arm, >= 0 and below 2**53.
        weights: (E, K) weights; rows sum to 1 within 1e-9; above 0 wherever there is a count.
        sd: standard deviation of the tilt (a log odds ratio) under the mixture, > 0; fixed in advance.

    Returns:
        The evidence, or Undetermined while no unit is counted.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See `sample_ratio_log_e`.

    """
    n, rho = _checked(counts, weights)
    if n.ndim != 2:
        raise ValueError(f"counts must have the shape (E, K), got {n.shape}")
    log_e = sample_ratio_log_e(counts, weights, sd=sd)
    return _report(float(log_e), n, rho)


def sample_ratio_log_e(counts: ArrayLike, weights: ArrayLike, *, sd: float = TILT_SD) -> FloatArray:
    """Log e-value of the tilt mixture, for many looks at once.

    ln of the integral of prod_e prod_a (exp(delta_a) / sum_b rho_eb exp(delta_b))^n_ea over N(0, sd^2),
    where delta tilts one arm against the rest; with more than two arms the e-values of the tilts of every
    arm are averaged. With two arms both tilts are the same by symmetry.

    The integrand is log-concave and, for many units, far narrower than the prior; the 61 Gauss-Hermite
    nodes are therefore centred on its mode and scaled by its curvature there.

    Args:
        counts: (..., E, K) integers, units of each epoch and arm, >= 0 and below 2**53.
        weights: (E, K) weights; rows sum to 1 within 1e-9; above 0 wherever there is a count.
        sd: standard deviation of the tilt under the mixture, > 0; fixed in advance.

    Returns:
        Array of the shape of `counts` without its last two axes (0-d for one look); finite.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Tilt mixture with a normal prior; adaptive quadrature after Naylor and Smith (1982), Journal of the
        Royal Statistical Society C 31(3), 214-225.

    """
    n, rho = _checked(counts, weights)
    precision = 1.0 / float(positive("sd", sd)) ** 2
    totals = n.sum(axis=-1)
    arms = 1 if rho.shape[1] == 2 else rho.shape[1]
    tilts = [_tilt_log_e(n[..., a], totals, rho=rho[:, a], precision=precision) for a in range(arms)]
    return np.asarray(np.logaddexp.reduce(tilts, axis=0) - math.log(arms))


def sample_ratio_dirichlet(
    counts: ArrayLike, weights: ArrayLike, *, concentration: float = CONCENTRATION
) -> SampleRatio | Undetermined:
    """Test the sample ratio under constant weights by the Dirichlet mixture.

    log e = ln B(k rho + n) - ln B(k rho) - sum_a n_a ln rho_a, rearranged around the expected counts so
    that no large terms cancel.

    Args:
        counts: (K,) integers, units of each arm, >= 0 and below 2**53.
        weights: (K,) weights that sum to 1 within 1e-9; above 0 wherever there is a count.
        concentration: k, > 0; smaller finds gross mismatch sooner, larger a subtle one; fixed in advance.

    Returns:
        The evidence, or Undetermined while no unit is counted.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Lindon and Malek (2022), Dirichlet-multinomial mixture.

    """
    n, rho = _checked(np.asarray(counts)[np.newaxis], np.asarray(weights)[np.newaxis])
    k = float(positive("concentration", concentration))
    live = rho[0] > 0
    return _report(_dirichlet_log_e(n[0][live], rho[0][live], k=k), n, rho)


def _checked(counts: ArrayLike, weights: ArrayLike) -> tuple[FloatArray, FloatArray]:
    n, rho = np.asarray(counts), finite("weights", weights)
    if rho.ndim != 2 or rho.shape[1] < 2 or not rho.shape[0]:
        raise ValueError("weights must have one row per epoch and at least two arms")
    if n.shape[-2:] != rho.shape:
        raise ValueError(f"counts must end in the shape of weights {rho.shape}, got {n.shape}")
    if not np.issubdtype(n.dtype, np.integer):
        raise ValueError("counts must be integers")
    if (n < 0).any() or (n >= _COUNT_LIMIT).any():
        raise ValueError("counts must not be negative and must be below 2**53")
    if not ((rho >= 0) & (rho <= 1)).all() or (np.abs(rho.sum(axis=1) - 1.0) > 1e-9).any():
        raise ValueError("weights must lie in [0, 1] and each row must sum to 1 within 1e-9")
    if ((n > 0) & (rho == 0)).any():
        raise ValueError("weights must be greater than 0 wherever counts are")
    return n.astype(np.float64), rho / rho.sum(axis=1, keepdims=True)


def _report(log_e: float, n: FloatArray, rho: FloatArray) -> SampleRatio | Undetermined:
    totals = n.sum(axis=1)
    total = totals.sum()
    if total == 0:
        return Undetermined(NO_UNITS)
    observed, expected = n.sum(axis=0) / total, totals @ rho / total
    return SampleRatio(log_e, p_always_valid(log_e), tuple(observed.tolist()), tuple(expected.tolist()))


def _tilt_log_e(n: FloatArray, totals: FloatArray, *, rho: FloatArray, precision: float) -> FloatArray:
    # Log e-value of tilting one arm: n, totals (..., E), rho (E,); result (...).
    open_ = (rho > 0) & (rho < 1)  # elsewhere a tilt changes nothing
    n, totals, rho = n[..., open_], totals[..., open_], rho[open_]
    mode = _tilt_mode(n, totals, rho=rho, precision=precision)
    width = math.sqrt(2.0) / np.sqrt(_curvature(mode, totals, rho=rho, precision=precision))
    log_e = np.full(mode.shape, -np.inf)
    for block in np.array_split(np.arange(len(_NODES)), 1 + len(_NODES) * n.size // _BLOCK_ELEMENTS):
        delta = mode[..., np.newaxis] + width[..., np.newaxis] * _NODES[block]
        heights = _log_likelihood(delta, n, totals, rho=rho) - 0.5 * precision * delta * delta
        log_e = np.logaddexp(log_e, np.logaddexp.reduce(heights + _LOG_NODE_WEIGHTS[block], axis=-1))
    return np.asarray(log_e + np.log(width) + 0.5 * math.log(precision / (2.0 * math.pi)))


def _tilt_mode(n: FloatArray, totals: FloatArray, *, rho: FloatArray, precision: float) -> FloatArray:
    # The highest posterior density: Newton inside a bracket, bisection where a step would leave it or
    # shrinks slower than by half.
    edge = (n - totals * rho).sum(axis=-1) / precision  # the curvature is at least the prior's
    low, high, mode = np.minimum(edge, 0.0), np.maximum(edge, 0.0), np.zeros(edge.shape)
    moved = np.full(edge.shape, np.inf)
    for _ in range(_MODE_STEPS):
        slope = (n - totals * _tilted_share(mode, rho)).sum(axis=-1) - precision * mode
        low, high = np.where(slope > 0, mode, low), np.where(slope < 0, mode, high)
        newton = mode + slope / _curvature(mode, totals, rho=rho, precision=precision)
        good = (newton >= low) & (newton <= high) & (np.abs(newton - mode) <= 0.5 * moved)
        after = np.where(good, newton, 0.5 * (low + high))
        moved, mode = np.abs(after - mode), after
        if (moved <= 1e-12 * (1.0 + np.abs(mode))).all():
            break
    return mode


def _curvature(delta: FloatArray, totals: FloatArray, *, rho: FloatArray, precision: float) -> FloatArray:
    share = _tilted_share(delta, rho)
    return np.asarray((totals * share * (1.0 - share)).sum(axis=-1) + precision)


def _tilted_share(delta: FloatArray, rho: FloatArray) -> FloatArray:
    # rho e^delta / (1 - rho + rho e^delta): delta (...), rho (E,), result (..., E).
    log_odds = np.log(rho) - np.log1p(-rho) + delta[..., np.newaxis]
    return np.asarray(np.exp(-np.logaddexp(0.0, -log_odds)))


def _log_likelihood(delta: FloatArray, n: FloatArray, totals: FloatArray, *, rho: FloatArray) -> FloatArray:
    # sum_e n_e delta - N_e ln(1 - rho_e + rho_e e^delta), centred so that large counts keep their digits;
    # delta (..., J); n, totals (..., E); rho (E,); result (..., J).
    d, n, totals = delta[..., np.newaxis], n[..., np.newaxis, :], totals[..., np.newaxis, :]
    log_sum = np.log1p(rho * np.expm1(np.clip(d, -1.0, 1.0)))
    if np.abs(d).max(initial=0.0) > 1.0:
        far = np.logaddexp(np.log1p(-rho), np.log(rho) + d)
        log_sum = np.where(np.abs(d) <= 1.0, log_sum, far)
    return np.asarray(((n - totals * rho) * d - totals * (log_sum - rho * d)).sum(axis=-1))


def _dirichlet_log_e(n: FloatArray, rho: FloatArray, *, k: float) -> float:
    # With ln Gamma(x) = (x - 1/2) ln x - x + ln(2 pi)/2 + c(x) at x_a = k rho_a + n_a and X = k + n, the
    # terms of order n collapse to sum_a x_a ln(x_a / (X rho_a)), and x_a - X rho_a = n_a - n rho_a.
    x, prior = n + k * rho, k * rho
    top, total = n.sum() + k, n.sum()
    main = float((x * np.log1p((n - total * rho) / (top * rho))).sum() + (prior * np.log(rho)).sum())
    half = 0.5 * (math.log(top) - float(np.log(x).sum())) + 0.5 * (len(n) - 1) * math.log(2.0 * math.pi)
    rest = float(_stirling_rest(x).sum() - _stirling_rest(np.asarray(top)))
    return main + half + rest + float(gammaln(k) - gammaln(prior).sum())


def _stirling_rest(x: FloatArray) -> FloatArray:
    # c(x) = ln Gamma(x) - ((x - 1/2) ln x - x + ln(2 pi)/2), by its series where that is exact.
    big = np.maximum(x, 16.0)
    series = (1.0 - (1.0 / 30.0 - (1.0 / 105.0 - 1.0 / (140.0 * big**2)) / big**2) / big**2) / (12.0 * big)
    small = np.minimum(x, 16.0)
    direct = gammaln(small) - ((small - 0.5) * np.log(small) - small + 0.5 * math.log(2.0 * math.pi))
    return np.asarray(np.where(x >= 16.0, series, direct))
