r"""Two experiments on the same units: does the effect of one depend on the arm of the other?

Both experiments assign every unit by themselves, so their arms cross to a table of r x c cells. For arm i of the first
and arm j of the second, each against its control 0, the interaction is the difference of differences

    (m_ij - m_i0) - (m_0j - m_00),

the effect of j among the units in i minus its effect among those in 0 (and the same with the roles exchanged). If it is
0, each experiment may be read as if the other did not exist; main effects of any size do no harm.

Strata are the crossings of both experiments' weight epochs, in which the chances of all cells are constant. Means are
compared within them and averaged with weights N_e/N, N_e the units of the four cells, as in `mean_difference`; each
cell's variance is guarded in the same way, with the four cells together in the place of both arms.

Interactions are hard to find: with equal shares the variance is four times that of an effect, so an interaction as
large as an effect takes four times the units, and one half as large sixteen times.

Assumptions: those of `mean_difference`, and that a unit enters once, when its windows in both experiments are over; a
unit that is in one of the two experiments only is no part of the table. The scale matters: two effects that multiply
interact in the difference of rates. Asymptotic; the guard keeps it calibrated from 25 units per cell on.

Sources: Cox (1984), International Statistical Review 52(1), 1-24 (interaction); Waudby-Smith, Arbour, Sinha, Kennedy
and Ramdas (2024), Annals of Statistics 52(6), 2613-2640, theorem 2.2 (the sequence); Vovk and Wang (2021), Annals of
Statistics 49(3), 1736-1754 (averages of e-values).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import logsumexp

from stream_xp.stats._checks import FloatArray, level, positive
from stream_xp.stats._exact_quotients import spread_quotient
from stream_xp.stats.batch import CODES, EvidenceArrays, MomentArrays, exact_mean, steps_of, sum_over_epochs
from stream_xp.stats.mean_difference import (
    EPOCH_UNITS,
    MIN_UNITS_PER_ARM,
    NO_VARIANCE,
    TOO_FEW_UNITS,
    guarded_variance,
    two_sided,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_SIGNS = np.array([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True, slots=True, eq=False)
class InteractionArrays:
    """Estimated interactions; every field has the shape (..., r - 1, c - 1) of the pairs of treatment arms.

    Attributes:
        estimate: difference of differences, in metric units; of no meaning where undetermined.
        variance: of the estimate, guarded; +inf where undetermined.
        n: units of the four cells in the strata used, as floats.
        reason: code of `batch.REASONS`, int8; 0 where determined. Too few units means fewer than 25 in one of the
            four cells (with several strata, degrees of freedom).

    """

    estimate: FloatArray
    variance: FloatArray
    n: FloatArray
    reason: NDArray[np.int8]


def interaction_means(cells: MomentArrays, *, scale: ArrayLike, guard: bool = True) -> InteractionArrays:
    """Differences of differences of a table of cells, with their variances.

    Args:
        cells: (..., r, c, E) exact moments of the units in arm i of the first and arm j of the second experiment, the
            controls at index 0, by stratum; a stratum that does not exist is 0. Of a conversion, q = s.
        scale: value of one quantisation step in metric units, 1e-100 to 1e100, broadcast against (...).
        guard: whether to guard the variances; without, and with one stratum, the standard error is that of a regression
            with both arms and their product under heteroskedastic errors (HC2).

    Returns:
        The interactions. Strata in which one of the four cells is empty are left out of that pair's.

    Raises:
        ValueError: `cells` has no two arms twice, `scale` is out of range, or a value is too large for a float.

    Source:
        Miratrix, Sekhon and Yu (2013), Journal of the Royal Statistical Society B 75(2), 369-396 (strata), with the
        guard of `guarded_variance` and the variance by epoch of `summarise`.

    """
    if cells.n.ndim < 3 or min(cells.n.shape[-3:-1]) < 2:
        raise ValueError("cells must have the shape (..., r, c, E) with at least two arms of each experiment")
    rows = [_fours(column) for column in (cells.n, cells.s, cells.q)]
    used = np.asarray((rows[0] > 0).all(axis=-2, keepdims=True))
    n, s, q = (column * used for column in rows)
    steps = steps_of("scale", scale, cells.n.shape[:-3])[..., np.newaxis, np.newaxis, np.newaxis]
    with np.errstate(over="ignore", invalid="ignore"):
        means = exact_mean(n, s) * steps[..., np.newaxis]
        squares = _squares(n, s, q) * (steps * steps)[..., np.newaxis]
        both = _squares(*(column.sum(axis=-2) for column in (n, s, q))) * (steps * steps)
    counts = n.astype(np.float64)
    sizes = counts.sum(axis=-2)
    total, strata = sizes.sum(axis=-1), used[..., 0, :].sum(axis=-1)
    weights = sizes / np.maximum(total, 1.0)[..., np.newaxis]
    variances = _variances(counts, squares, both, weights=weights, guard=guard)
    variance, pooled = variances.sum(axis=-1), sum_over_epochs(both)
    spent = np.where(strata == 1, 0, strata)
    few = counts.sum(axis=-1).min(axis=-1) - spent < MIN_UNITS_PER_ARM
    constant = (pooled == 0) | (variance == 0)
    code = np.where(few, CODES[TOO_FEW_UNITS], np.where(constant, CODES[NO_VARIANCE], 0)).astype(np.int8)
    contrast = (means * _SIGNS[:, np.newaxis]).sum(axis=-2)
    estimate = sum_over_epochs(weights * contrast)
    return InteractionArrays(estimate, np.where(code == 0, variance, np.inf), total, code)


def interaction(found: InteractionArrays, *, alpha: ArrayLike, rho2: ArrayLike) -> EvidenceArrays:
    """Confidence sequences and e-values of interactions, valid at every look.

    Args:
        found: from `interaction_means`.
        alpha: two-sided error level of each pair of arms, in (0, 1), broadcast; divide by the number of pairs (and of
            pairs of experiments) for sequences that hold together.
        rho2: ``tuned_rho2(n_star, alpha)`` with n_star the planned units of the four cells, > 0, broadcast.

    Returns:
        Evidence about each interaction, in metric units; `log_e` is against none.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Waudby-Smith et al. (2024), theorem 2.2, for a contrast of four means.

    """
    lost = found.reason != 0
    se = np.where(lost, 1.0, np.sqrt(np.where(lost, 1.0, found.variance)))
    k = np.where(lost, 1.0, found.n) * positive("rho2", rho2)
    half, log_e = two_sided(found.estimate, se, k=k, alpha=level("alpha", alpha))
    return EvidenceArrays(
        estimate=np.where(lost, 0.0, found.estimate),
        lower=np.where(lost, -np.inf, found.estimate - half),
        upper=np.where(lost, np.inf, found.estimate + half),
        log_e=np.where(lost, 0.0, log_e),
        n=found.n,
        reason=found.reason,
    )


def any_interaction_log_e(evidence: EvidenceArrays) -> FloatArray:
    """Log e-value against "no pair of arms interacts": the mean of the pairs' e-values.

    Args:
        evidence: from `interaction`, (..., r - 1, c - 1).

    Returns:
        Array of the shape (...); a pair that is undetermined counts as an e-value of 1.

    Source:
        Vovk and Wang (2021), averages of e-values, whatever their dependence.

    """
    pairs = evidence.log_e.shape[-2] * evidence.log_e.shape[-1]
    return np.asarray(logsumexp(evidence.log_e, axis=(-2, -1)) - math.log(pairs))


def _fours(column: NDArray[np.int64] | NDArray[np.object_]) -> NDArray[np.int64] | NDArray[np.object_]:
    # (..., r, c, E) to (..., r - 1, c - 1, 4, E): the cells 00, 0j, i0 and ij of every pair (i, j).
    shape = (*column.shape[:-3], column.shape[-3] - 1, column.shape[-2] - 1, column.shape[-1])
    parts = (column[..., :1, :1, :], column[..., :1, 1:, :], column[..., 1:, :1, :], column[..., 1:, 1:, :])
    return np.stack([np.broadcast_to(part, shape) for part in parts], axis=-2)


def _squares(
    n: NDArray[np.int64] | NDArray[np.object_],
    s: NDArray[np.int64] | NDArray[np.object_],
    q: NDArray[np.int64] | NDArray[np.object_],
) -> FloatArray:
    counts = np.maximum(n, 1)
    return spread_quotient(counts, q, s, t=s, lowered=np.ones_like(counts))


def _variances(
    n: FloatArray, squares: FloatArray, both: FloatArray, *, weights: FloatArray, guard: bool
) -> FloatArray:
    # Variances of the four stratified means, (..., 4): the larger of two, as in `mean_difference.summarise`.
    degrees = np.maximum(n - 1.0, 0.0)
    total, sizes = degrees.sum(axis=-1), n.sum(axis=-2)
    own = sum_over_epochs(squares) / np.maximum(total, 1.0)
    unit = own
    if guard:
        used = (sizes > 0).sum(axis=-1)
        pooled = sum_over_epochs(both) / np.maximum(sizes.sum(axis=-1) - used, 1.0)
        unit = guarded_variance(own, pooled[..., np.newaxis], degrees=total)
    share = weights[..., np.newaxis, :] ** 2 / np.maximum(n, 1.0)
    at_once = sum_over_epochs(share * unit[..., np.newaxis])
    spread = (both / np.maximum(sizes - 1.0, 1.0))[..., np.newaxis, :]
    base = sum_over_epochs(degrees * spread) / np.maximum(total, 1.0)
    ratio = np.where(base > 0, own / np.where(base > 0, base, 1.0), 1.0)
    if guard:
        ratio = guarded_variance(ratio, 1.0, degrees=total)
    each = (squares + EPOCH_UNITS * ratio[..., np.newaxis] * spread) / (degrees + EPOCH_UNITS)
    several = ((sizes > 0).sum(axis=-1) > 1)[..., np.newaxis]
    return np.where(several, np.maximum(at_once, sum_over_epochs(share * each)), at_once)
