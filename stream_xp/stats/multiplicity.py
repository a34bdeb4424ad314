"""Many e-values at once: which hypotheses of a family may be rejected.

The last axis is the family (metrics, arms or experiments); leading axes are separate families. Results are in
the order given. Evidence enters as natural logarithms; `log_e_values` makes them from plain e-values.

Feed the e-values *of one common moment*. The running maximum of an e-value is no e-value, and neither is 1/p
of a running minimum: e-BH promises nothing about the false discovery rate on them. A moment chosen by looking
at all of them (a common stopping time) is fine. No assumption on the dependence among the e-values is needed.

Sources: Vovk and Wang (2021), Annals of Statistics 49(3), 1736-1754 (e-Holm: algorithm 1); Wang and Ramdas
(2022), Journal of the Royal Statistical Society B 84(3), 822-852 (e-BH); Tavyrikov, Goeman and de Heide (2025),
arXiv:2501.19360 (why suprema of e-processes do not serve).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._checks import FloatArray, finite, level, not_negative

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# An e-value that meets its threshold exactly rejects, however its logarithm was rounded.
_ROUNDING = 1e-12
_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Multiplicity:
    """Decisions of one procedure on families of e-values.

    Attributes:
        rejected: (..., m) whether each hypothesis is rejected.
        log_adjusted: (..., m) log of the adjusted e-value; a hypothesis is rejected exactly when it is at least
            ln(1/alpha). -inf where the e-value, and every other that it is averaged with, is 0.

    """

    rejected: NDArray[np.bool_]
    log_adjusted: FloatArray

    @property
    def adjusted(self) -> FloatArray:
        """(..., m) adjusted e-values, cut off at the largest float."""
        return np.exp(np.minimum(self.log_adjusted, math.log(np.finfo(np.float64).max)))


def log_e_values(e_values: ArrayLike) -> FloatArray:
    """Natural logarithms of e-values.

    Args:
        e_values: any shape, finite, >= 0.

    Returns:
        Their logarithms, of the same shape; -inf for an e-value of 0.

    Raises:
        ValueError: an e-value is negative or not finite.

    """
    e = not_negative("e_values", e_values)
    return np.where(e > 0, np.log(np.where(e > 0, e, 1.0)), -np.inf)


def e_bonferroni(log_e: ArrayLike, *, alpha: ArrayLike) -> Multiplicity:
    """Reject every hypothesis whose e-value is at least m / alpha.

    Args:
        log_e: (..., m) logs of the e-values of m >= 1 hypotheses; -inf for an e-value of 0.
        alpha: family-wise error level, in (0, 1); broadcast against the leading axes.

    Returns:
        Decisions; the adjusted e-value is e / m.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Markov's inequality and the union bound, as in Vovk and Wang (2021); family-wise error at most alpha
        under any dependence, non-asymptotic.

    """
    e = _family(log_e)
    return _decided(e - math.log(e.shape[-1]), alpha)


def e_holm(log_e: ArrayLike, *, alpha: ArrayLike) -> Multiplicity:
    """Closed test by averages: never rejects less than `e_bonferroni`.

    The adjusted e-value of hypothesis i is the smallest average of e-values over the subsets that hold i.
    With the e-values in ascending order it is the minimum of (e_i + sum of the j smallest) / (j + 1) over
    j = 0, ..., rank of i minus 1: the j smallest never include i itself.

    Args:
        log_e: (..., m) logs of the e-values of m >= 1 hypotheses; -inf for an e-value of 0.
        alpha: family-wise error level, in (0, 1); broadcast against the leading axes.

    Returns:
        Decisions with the adjusted e-values. Time and working memory grow as m squared.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Vovk and Wang (2021), algorithm 1 (e-values merged by their average, the only admissible symmetric
        way); family-wise error at most alpha under any dependence, non-asymptotic.

    """
    e = _family(log_e)
    order = np.argsort(e, axis=-1, kind="stable")
    adjusted = _smallest_averages(np.take_along_axis(e, order, axis=-1))
    return _decided(_in_order_given(adjusted, order), alpha)


def e_bh(log_e: ArrayLike, *, alpha: ArrayLike) -> Multiplicity:
    """Reject the k largest e-values, with the largest k for which the k-th is at least m / (k alpha).

    The adjusted e-value of the i-th largest is the maximum of k e_(k) / m over k >= i, so that it is at least
    1 / alpha exactly for the rejected.

    Args:
        log_e: (..., m) logs of the e-values of m >= 1 hypotheses; -inf for an e-value of 0.
        alpha: false discovery rate, in (0, 1); broadcast against the leading axes.

    Returns:
        Decisions with the adjusted e-values.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Wang and Ramdas (2022), the base e-BH procedure; false discovery rate at most alpha times the share
        of true nulls under any dependence, non-asymptotic. The same as Benjamini and Hochberg on p = 1/e.

    """
    e = _family(log_e)
    order = np.argsort(-e, axis=-1, kind="stable")
    m = e.shape[-1]
    scaled = np.take_along_axis(e, order, axis=-1) + np.log(np.arange(1, m + 1) / m)
    adjusted = np.maximum.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1]
    return _decided(_in_order_given(adjusted, order), alpha)


def sequential_bonferroni(alpha: float, weights: ArrayLike) -> FloatArray:
    """Error levels for the confidence sequences of a family: alpha times each weight.

    Each sequence held at its own level, at any times, misses somewhere in the family with probability at most
    alpha. Freeze the weights before the first look.

    Args:
        alpha: family-wise error level, in (0, 1).
        weights: (..., m) shares of alpha, > 0; each family sums to 1 within 1e-9.

    Returns:
        (..., m) levels.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        The union bound over time-uniform sequences; Ramdas, Gruenwald, Vovk and Shafer (2023), Statistical
        Science 38(4), 576-601.

    """
    shares = finite("weights", weights)
    if not shares.ndim or not shares.shape[-1]:
        raise ValueError("weights must have one element per hypothesis, and at least one")
    if (shares <= 0).any() or (np.abs(shares.sum(axis=-1) - 1.0) > 1e-9).any():
        raise ValueError("weights must be greater than 0 and sum to 1 within 1e-9")
    return np.asarray(float(level("alpha", alpha)) * (shares / shares.sum(axis=-1, keepdims=True)))


def equal_levels(alpha: float, m: int) -> FloatArray:
    """Return `sequential_bonferroni` with equal weights: m times alpha / m.

    Raises:
        ValueError: `alpha` is outside (0, 1), or `m` is no whole number of at least 1.

    """
    if type(m) is not int or m < 1:
        raise ValueError(f"m must be a whole number of at least 1, got {m!r}")
    return np.full(m, float(level("alpha", alpha)) / m)


def _family(log_e: ArrayLike) -> FloatArray:
    try:
        e = np.asarray(log_e, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("log_e must be numeric") from error
    if not e.ndim or not e.shape[-1]:
        raise ValueError("log_e must have one element per hypothesis, and at least one")
    if np.isnan(e).any() or (e == np.inf).any():
        raise ValueError("log_e must be finite, or -inf for an e-value of 0")
    return e


def _decided(log_adjusted: FloatArray, alpha: ArrayLike) -> Multiplicity:
    threshold = -np.log(level("alpha", alpha))
    if threshold.ndim > log_adjusted.ndim - 1:
        raise ValueError("alpha must be one level, or one for each family")
    rejected = log_adjusted >= threshold[..., np.newaxis] - _ROUNDING
    if rejected.shape != log_adjusted.shape:
        raise ValueError("alpha must be one level, or one for each family")
    return Multiplicity(rejected, log_adjusted)


def _smallest_averages(e: FloatArray) -> FloatArray:
    # e (..., m) ascending. Ranks go in blocks, so that a (rank, j) table fits into memory.
    m = e.shape[-1]
    none = np.full((*e.shape[:-1], 1), -np.inf)
    sums = np.concatenate((none, np.logaddexp.accumulate(e[..., :-1], axis=-1)), axis=-1)
    out, sizes = np.empty(e.shape), np.log(np.arange(1, m + 1))
    rows = max(1, _BLOCK_ELEMENTS // e.size)
    for start in range(0, m, rows):
        ranks = np.arange(start, min(m, start + rows))
        table = np.logaddexp(e[..., ranks, np.newaxis], sums[..., np.newaxis, :]) - sizes
        out[..., ranks] = np.where(np.arange(m) <= ranks[:, np.newaxis], table, np.inf).min(axis=-1)
    return out


def _in_order_given(values: FloatArray, order: NDArray[np.intp]) -> FloatArray:
    out = np.empty(values.shape)
    np.put_along_axis(out, order, values, axis=-1)
    return out
