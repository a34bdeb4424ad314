r"""An exact e-process and the asymptotic sequence as one test: valid early, sharp late.

While events are few an asymptotic sequence says nothing, or nothing that may be trusted; an exact e-process
needs no such patience but may be weaker once there are many events, and has no confidence sequence of its own.
Which of the two to believe may not depend on the data, so both are held from the first unit on and averaged,

    e(d) = w * E_exact(d) + (1 - w) * E_asymptotic(d),    w = EXACT_SHARE,

for every effect d. An average of e-processes is one. An exact one-sided e-process E_above against "effect <= 0"
is as well one against every null with d <= 0, which is a smaller set of truths; so it counts for d <= 0, E_below
for d >= 0, and the dual sequence {d : e(d) < 1/alpha} has bounds in closed form: on each side of 0 the
asymptotic sequence at the level that the exact evidence leaves to it. Where the exact evidence alone suffices, the
sequence ends at 0. It is an open interval: a null is rejected when it is a bound or beyond one.

Before the asymptotic sequence has begun its e-value counts as 0, which costs its share and no more.

Assumptions: those of the parts; the guarantee is non-asymptotic while only the exact part has begun.
Source: Vovk and Wang (2021), Annals of Statistics 49(3), 1736-1754 (averages of e-values); the two-sided form is
this project's own and checked by simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._checks import FloatArray, level, positive
from stream_xp.stats.normal_mixture import (
    log_e_one_sided,
    log_e_two_sided,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

EXACT_SHARE: Final = 0.2
"""Share of the exact e-process in the average: the asymptotic part runs at 0.8 of alpha, 2.7 % wider at its best."""
_TINY: Final = 5e-324


@dataclass(frozen=True, slots=True)
class EarlyEvidence:
    """Evidence of both parts together, element by element, all of one shape.

    Attributes:
        lower: lower end of the confidence sequence; -inf where there is none.
        upper: upper end; +inf where there is none.
        log_e: against the null hypothesis that the effect is 0; finite.

    """

    lower: FloatArray
    upper: FloatArray
    log_e: FloatArray


def early_two_sided(
    estimate: ArrayLike,
    standard_error: ArrayLike,
    k: ArrayLike,
    *,
    alpha: ArrayLike,
    log_e_above: ArrayLike,
    log_e_below: ArrayLike,
) -> EarlyEvidence:
    """Average of a two-sided asymptotic sequence with the two sides of an exact test.

    Args:
        estimate: of the effect, any shape.
        standard_error: of the estimate, broadcast, >= 0; 0 where the asymptotic sequence has not begun.
        k: K = N * rho2 of the asymptotic sequence, > 0, broadcast.
        alpha: two-sided error level in (0, 1), broadcast.
        log_e_above: exact log e-value against "effect <= 0", broadcast; -inf for none.
        log_e_below: exact log e-value against "effect >= 0", broadcast; -inf for none. Each side has half of the
            exact share.

    Returns:
        Evidence about the effect, in its unit. At 0 only the exact side that the estimate is on counts, which
        makes `log_e` smaller than the average, never larger, and the dual of the sequence.

    Raises:
        ValueError: an argument is out of its range.

    """
    estimate, se, k, alpha, above, below = _broadcast(
        estimate, standard_error, k, alpha, log_e_above, log_e_below
    )
    begun = se > 0
    z = np.where(begun, estimate / np.where(begun, se, 1.0), 0.0)
    asymptotic = np.where(begun, np.asarray(log_e_two_sided(z, k)), -np.inf)
    half = math.log(EXACT_SHARE / 2)
    log_e = _average(half + np.where(estimate >= 0, above, below), asymptotic)
    low = _radius(half + above, k, alpha=alpha, begun=begun, sides=2)
    high = _radius(half + below, k, alpha=alpha, begun=begun, sides=2)
    reach_low, reach_high = _reach(se, low), _reach(se, high)
    # Below 0 the level is what E_above leaves, above 0 what E_below leaves; a side may be left out altogether.
    lower = np.where(estimate - reach_low < 0, estimate - reach_low, np.maximum(estimate - reach_high, 0.0))
    upper = np.where(estimate + reach_high > 0, estimate + reach_high, np.minimum(estimate + reach_low, 0.0))
    rejects = log_e >= -np.log(alpha)
    lower = _dual(lower, rejects & (estimate >= 0), rejects | (lower < 0))
    upper = -_dual(-upper, rejects & (estimate < 0), rejects | (upper > 0))
    return EarlyEvidence(lower, upper, _finite(log_e))


def early_one_sided(
    excess: ArrayLike,
    standard_error: ArrayLike,
    k: ArrayLike,
    *,
    alpha: ArrayLike,
    above: ArrayLike,
    log_e_exact: ArrayLike,
) -> EarlyEvidence:
    """Average of a one-sided asymptotic bound with an exact one-sided test of the same null.

    Args:
        excess: estimate of the effect over the margin, any shape.
        standard_error: of the excess, broadcast, >= 0; 0 where the asymptotic sequence has not begun.
        k: K = N * rho2 of the one-sided sequence, > 0, broadcast.
        alpha: one-sided error level in (0, 1), broadcast.
        above: whether the null is "excess <= 0" (else "excess >= 0"), broadcast.
        log_e_exact: exact log e-value against that null, broadcast; -inf for none.

    Returns:
        Evidence about the excess: (lower, +inf) where `above`, else (-inf, upper).

    Raises:
        ValueError: an argument is out of its range.

    """
    excess, se, k, alpha, exact, side = _broadcast(
        excess, standard_error, k, alpha, log_e_exact, np.where(above, 1.0, -1.0)
    )
    begun = se > 0
    toward = side * excess
    z = np.where(begun, toward / np.where(begun, se, 1.0), 0.0)
    asymptotic = np.where(begun, np.asarray(log_e_one_sided(z, k)), -np.inf)
    share = math.log(EXACT_SHARE) + exact
    log_e = _average(share, asymptotic)
    helped = toward - _reach(se, _radius(share, k, alpha=alpha, begun=begun, sides=1))
    alone = toward - _reach(se, _radius(np.full_like(share, -np.inf), k, alpha=alpha, begun=begun, sides=1))
    bound = np.where(helped < 0, helped, np.maximum(alone, 0.0))
    rejects = log_e >= -np.log(alpha)
    bound = _dual(bound, rejects, rejects | (bound < 0))
    lower, upper = np.where(side > 0, bound, -np.inf), np.where(side > 0, np.inf, -bound)
    return EarlyEvidence(lower, upper, _finite(log_e))


def _broadcast(
    estimate: ArrayLike, se: ArrayLike, k: ArrayLike, alpha: ArrayLike, *exact: ArrayLike
) -> list[FloatArray]:
    arrays = [np.asarray(estimate, np.float64), np.asarray(se, np.float64), positive("k", k)]
    for name, array in zip(("estimate", "standard_error"), arrays, strict=False):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite")
    if (arrays[1] < 0).any():
        raise ValueError("standard_error must not be negative")
    logs = [np.asarray(log, np.float64) for log in exact]
    if any(np.isnan(log).any() or (log == np.inf).any() for log in logs):
        raise ValueError("log_e_exact must be a number or -inf")
    return list(np.broadcast_arrays(*arrays, level("alpha", alpha), *logs))


def _average(share: FloatArray, asymptotic: FloatArray) -> FloatArray:
    return np.asarray(np.logaddexp(share, math.log1p(-EXACT_SHARE) + asymptotic))


def _radius(
    share: FloatArray, k: FloatArray, *, alpha: FloatArray, begun: NDArray[np.bool_], sides: int
) -> FloatArray:
    """Half width, in standard errors, of the asymptotic part at the level that the exact evidence leaves.

    -inf where it leaves nothing: the exact part is at 1/alpha by itself.
    """
    # alpha' = (1 - w) / (1/alpha - share), in logs; log(1/alpha - share) = -ln(alpha) + log1p(-alpha * share).
    used = np.minimum(share + np.log(alpha), 0.0)
    left = used < 0
    rest = np.where(left, np.log(-np.expm1(np.where(left, used, -1.0))), 0.0)
    log_alpha = math.log1p(-EXACT_SHARE) + np.log(alpha) - rest
    # A level of 1 or more comes up only where the exact part is within 1 of 1/alpha; nothing is left then, but
    # for a part that has not begun, whose level does not matter.
    left &= (log_alpha < 0) | ~begun
    level_left = np.exp(np.where(left & (log_alpha < 0), log_alpha, -1.0))
    multiplier = radius_multiplier_two_sided if sides == 2 else radius_multiplier_one_sided
    return np.where(left, np.asarray(multiplier(k, level_left)), -np.inf)


def _dual(bound: FloatArray, excludes: NDArray[np.bool_], consistent: NDArray[np.bool_]) -> FloatArray:
    """Put 0 on the side of a lower bound where the e-value has it; they part only by rounding, or at a level of 1."""
    bound = np.where(excludes, np.maximum(bound, 0.0), bound)
    return np.where(consistent, bound, np.minimum(bound, -_TINY))


def _reach(se: FloatArray, radius: FloatArray) -> FloatArray:
    # Without a standard error the asymptotic part has not begun, and holds every effect the exact part leaves.
    reach = np.where(se > 0, se * np.where(np.isfinite(radius), radius, 0.0), np.inf)
    return np.where(np.isneginf(radius), -np.inf, reach)


def _finite(log_e: FloatArray) -> FloatArray:
    # With no evidence from either part the e-value counts as 1: nothing has been tested yet.
    return np.where(np.isneginf(log_e), 0.0, log_e)
