"""Always-valid t and F tests of a Gaussian linear model with equal variances.

The model is y = X b + Z g + noise with p nuisance and d tested columns, and nu = n - p - d residual degrees
of freedom. The tests depend on the data through t or F, nu, and one number k that says how much of the
tested columns has been seen: k = n / g under a g-prior, k = z2 / phi under a normal prior of precision phi
on one coefficient in units of the noise, where z2 is the squared norm of its column after regression on
all the others. With r = 1 / (1 + k) these are the formulas in r of the source. As nu grows the t test
becomes the normal mixture of `normal_mixture` at the same k, so that g corresponds to 1 / rho2.

Guarantee: exact at every n with nu >= 1, if the noise is Gaussian, independent and of ONE variance (for
the g-prior this holds when the design fills up evenly, so that z2 grows like n).
Do not compare two arms with it whose variances may differ: with standard deviations 3:1 and a share of
10 % it was measured to err in 0.45 of experiments at a nominal 0.05. `mean_difference` and
`adjusted_difference` do not assume equal variances.

Two-sided: the prior is symmetric around no effect.

Source: Lindon, Ham, Tingley and Bojinov (2022), Anytime-valid linear models and regression adjusted causal
inference in randomized experiments, arXiv:2210.08589 (sequential t and F tests and their confidence
sequences).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._checks import FloatArray, finite, level, not_negative, positive
from stream_xp.stats.mean_difference import NO_VARIANCE
from stream_xp.stats.normal_mixture import Z_LIMIT, Evidence, Undetermined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

COLLINEAR = 1e-12
"""Smallest eigenvalue, of the Gram matrix scaled to a unit diagonal, that counts as full rank."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearFit:
    """Least squares from Gram sums.

    Attributes:
        coefficients: (..., m) one per column.
        standard_errors: (..., m) under one noise variance, >= 0.
        z2: (..., m) squared norm of each column after regression on all the others, > 0.
        inverse_gram: (..., m, m) inverse of X'X.
        residual_variance: (...) residual sum of squares over `residual_df`, >= 0.
        residual_df: n - m, >= 1, (...).
        n: observations, (...).

    """

    coefficients: FloatArray
    standard_errors: FloatArray
    z2: FloatArray
    inverse_gram: FloatArray
    residual_variance: FloatArray
    residual_df: FloatArray
    n: FloatArray


def g_prior_k(n: ArrayLike, g: ArrayLike) -> FloatArray | float:
    """Return k of a g-prior, n / g.

    Args:
        n: observations, > 0, any shape.
        g: > 0, broadcast; fixed in advance. g = 1 / rho2 gives the width of a mean difference tuned by rho2.

    Raises:
        ValueError: an argument is out of its range.

    """
    return _plain(_in_range("n over g", positive("n", n), positive("g", g)))


def exact_prior_k(z2: ArrayLike, phi: ArrayLike) -> FloatArray | float:
    """Return k of a normal prior on one coefficient, z2 / phi.

    Args:
        z2: squared norm of the column after regression on all the others, > 0, any shape; `LinearFit.z2`.
        phi: prior precision of the coefficient in units of the noise, > 0, broadcast; fixed in advance.

    Raises:
        ValueError: an argument is out of its range.

    """
    return _plain(_in_range("z2 over phi", positive("z2", z2), positive("phi", phi)))


def log_e_t(t: ArrayLike, k: ArrayLike, *, residual_df: ArrayLike) -> FloatArray | float:
    """Log e-value of one coefficient, against "it is 0".

    -log1p(k)/2 + (nu + 1)/2 * log1p(k t^2 / (nu (1 + k) + t^2)), the difference of logarithms of the source
    in one term that does not cancel.

    Args:
        t: t statistic, any shape; finite, saturates at |t| = 1e150.
        k: from `g_prior_k` or `exact_prior_k`, >= 0, broadcast.
        residual_df: nu, > 0, broadcast.

    Returns:
        Natural logarithm of the e-value, finite, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Lindon et al. (2022), the sequential t test.

    """
    statistic = np.minimum(np.abs(finite("t", t)), Z_LIMIT)
    return _plain(
        _log_e(statistic * statistic, not_negative("k", k), df=1.0, nu=positive("residual_df", residual_df))
    )


def log_e_f(f: ArrayLike, k: ArrayLike, *, model_df: ArrayLike, residual_df: ArrayLike) -> FloatArray | float:
    """Log e-value of several coefficients together, against "all are 0".

    -d/2 * log1p(k) + (nu + d)/2 * log1p(k d F / (nu (1 + k) + d F)). With d = 1 and F = t^2 it is `log_e_t`.

    Args:
        f: F statistic, >= 0, any shape; saturates at 1e300.
        k: from `g_prior_k`, >= 0, broadcast.
        model_df: d, number of tested coefficients, >= 1, broadcast.
        residual_df: nu, > 0, broadcast.

    Returns:
        Natural logarithm of the e-value, finite, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Lindon et al. (2022), the sequential F test under a g-prior.

    """
    d = finite("model_df", model_df)
    if np.any(d < 1):
        raise ValueError("model_df must be at least 1")
    statistic = np.minimum(not_negative("f", f), Z_LIMIT**2 / d)
    return _plain(_log_e(d * statistic, not_negative("k", k), df=d, nu=positive("residual_df", residual_df)))


def radius_multiplier_t(k: ArrayLike, alpha: ArrayLike, *, residual_df: ArrayLike) -> FloatArray | float:
    """Half width of the confidence sequence of a coefficient, in standard errors.

    sqrt(nu (1 - q) / (q - r)) with q = (r alpha^2)^(1/(nu + 1)); +inf while q <= r, when there is too little
    data for any t to reject.

    Args:
        k: from `g_prior_k` or `exact_prior_k`, > 0, any shape.
        alpha: error level in (0, 1), broadcast.
        residual_df: nu, > 0, broadcast.

    Returns:
        The multiplier, > 0, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Lindon et al. (2022), the confidence sequence of a coefficient.

    """
    k, nu = positive("k", k), positive("residual_df", residual_df)
    # ln q = -(ln(1 + k) + 2 ln(1/alpha)) / (nu + 1); everything from 1 - q and 1 - r, which keep their digits.
    fall = -np.expm1(-(np.log1p(k) - 2.0 * np.log(level("alpha", alpha))) / (nu + 1.0))
    room = k / (1.0 + k) - fall
    with np.errstate(over="ignore"):
        radius = np.sqrt(nu) * np.sqrt(fall / np.where(room > 0, room, 1.0))
    return _plain(np.where(room > 0, radius, np.inf))


def coefficient_test(
    estimate: float, se: float, *, k: float, residual_df: float, n: int, alpha: float
) -> Evidence | Undetermined:
    """Confidence sequence and e-value of one coefficient.

    Args:
        estimate: the coefficient.
        se: its standard error under one noise variance, >= 0.
        k: from `g_prior_k` or `exact_prior_k`, > 0.
        residual_df: nu, > 0.
        n: observations, for the record.
        alpha: error level in (0, 1).

    Returns:
        Evidence in units of the coefficient; its sequence is the whole line while no t could reject. Or
        Undetermined where the noise has no variance.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Lindon et al. (2022), the sequential t test and its confidence sequence.

    """
    value, error = float(finite("estimate", estimate)), float(not_negative("se", se))
    multiplier = float(radius_multiplier_t(k, alpha, residual_df=residual_df))
    if error == 0:
        return Undetermined(NO_VARIANCE)
    half = error * multiplier
    log_e = float(log_e_t(max(-Z_LIMIT, min(value / error, Z_LIMIT)), k, residual_df=residual_df))
    return Evidence(value, value - half, value + half, log_e, n)


def fit_from_gram(xtx: ArrayLike, xty: ArrayLike, *, yty: ArrayLike, n: ArrayLike) -> LinearFit:
    """Least squares from sums of products, which add up over partitions.

    As exact as the sums: centre columns with large means first, or their squares swallow the rest.

    Args:
        xtx: (..., m, m) X'X of all columns, the constant among them; symmetric and of full rank.
        xty: (..., m) X'y.
        yty: (...) y'y.
        n: (...) observations, whole, > m.

    Returns:
        The fit, with the leading shape of `xtx`.

    Raises:
        ValueError: a shape is wrong, `xtx` is not symmetric or not of full rank, n <= m, or `yty` is less
            than the columns explain.

    """
    gram, cross, square, count = (
        finite(name, value) for name, value in (("xtx", xtx), ("xty", xty), ("yty", yty), ("n", n))
    )
    _check_gram(gram, cross)
    m = gram.shape[-1]
    if np.any(count != np.floor(count)) or np.any(count <= m):
        raise ValueError(f"n must be a whole number above the number of columns {m}")
    inverse = _inverse(gram)
    coefficients = (inverse @ cross[..., np.newaxis])[..., 0]
    residual = square - (coefficients * cross).sum(axis=-1)
    if np.any(residual < -1e-9 * np.abs(square)):
        raise ValueError("yty must be at least what the columns explain")
    variance = np.maximum(residual, 0.0) / (count - m)
    diagonal = np.diagonal(inverse, axis1=-2, axis2=-1)
    return LinearFit(
        coefficients=coefficients,
        standard_errors=np.sqrt(variance[..., np.newaxis] * diagonal),
        z2=1.0 / diagonal,
        inverse_gram=inverse,
        residual_variance=variance,
        residual_df=np.broadcast_to(count - m, variance.shape),
        n=np.broadcast_to(count, variance.shape),
    )


def f_statistic(fit: LinearFit, columns: Sequence[int]) -> FloatArray | float:
    """F statistic of several coefficients together, against "all are 0".

    Args:
        fit: from `fit_from_gram`; its noise must have a variance.
        columns: which coefficients are tested, at least one, each once.

    Returns:
        F with ``len(columns)`` and `fit.residual_df` degrees of freedom, of the leading shape of the fit.

    Raises:
        ValueError: `columns` is empty, repeats or exceeds the columns; or the noise has no variance.

    """
    chosen = list(columns)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError("columns must name at least one coefficient, each once")
    if not all(0 <= c < fit.coefficients.shape[-1] for c in chosen):
        raise ValueError(f"columns must lie between 0 and {fit.coefficients.shape[-1] - 1}")
    if np.any(fit.residual_variance == 0):
        raise ValueError("fit must have a residual variance above 0")
    tested = fit.coefficients[..., chosen]
    weight = np.linalg.inv(fit.inverse_gram[..., chosen, :][..., chosen])
    squares = (tested * (weight @ tested[..., np.newaxis])[..., 0]).sum(axis=-1)
    return _plain(np.maximum(squares, 0.0) / (len(chosen) * fit.residual_variance))


def _log_e(square: FloatArray, k: FloatArray, *, df: ArrayLike, nu: FloatArray) -> FloatArray:
    # -df/2 ln(1 + k) + (nu + df)/2 ln(1 + k s / (nu (1 + k) + s)), s = df * F; the fraction is divided
    # through by 1 + k, so that it overflows nowhere.
    d = np.asarray(df, dtype=np.float64)
    seen = k / (1.0 + k)
    share = seen * square / (nu + square / (1.0 + k))
    return np.asarray(0.5 * (nu + d) * np.log1p(share) - 0.5 * d * np.log1p(k))


def _check_gram(gram: FloatArray, cross: FloatArray) -> None:
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or not gram.shape[-1]:
        raise ValueError(f"xtx must have the shape (..., m, m), got {gram.shape}")
    if cross.ndim < 1 or cross.shape[-1] != gram.shape[-1]:
        raise ValueError(f"xty must end in {gram.shape[-1]} columns, got the shape {cross.shape}")
    if not np.allclose(gram, np.swapaxes(gram, -1, -2), rtol=1e-9, atol=0.0):
        raise ValueError("xtx must be symmetric")
    if np.any(np.diagonal(gram, axis1=-2, axis2=-1) <= 0):
        raise ValueError("xtx must have a diagonal above 0")


def _inverse(gram: FloatArray) -> FloatArray:
    # Scaled to a unit diagonal, so that the units of the columns do not matter.
    scale = 1.0 / np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    outer = scale[..., :, np.newaxis] * scale[..., np.newaxis, :]
    values, vectors = np.linalg.eigh(gram * outer)
    if np.any(values < COLLINEAR):
        raise ValueError("xtx must be of full rank: a column is a combination of the others")
    inverse: NDArray[Any] = (vectors / values[..., np.newaxis, :]) @ np.swapaxes(vectors, -1, -2)
    return np.asarray(inverse * outer, dtype=np.float64)


def _in_range(name: str, numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return positive(name, numerator / denominator)


def _plain(value: FloatArray) -> FloatArray | float:
    return float(value) if np.ndim(value) == 0 else value
