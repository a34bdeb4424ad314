r"""Futility: whatever the effect is, it is smaller than the smallest one that would matter.

Two one-sided tests (TOST) with the minimum effect m > 0 as their margin: one of "the effect is at least +m", one of
"the effect is at most -m". Futile is declared when both are rejected, that is when the one-sided sequences put the
effect inside (-m, +m); the e-value of the pair is the smaller of the two.

**What is guaranteed.** If the effect is as large as m, in either direction, futility is ever declared with probability
at most alpha, however often one looks: one of the two nulls is then true, and rejecting both means rejecting that one.
So neither test needs half of alpha. Nothing is promised about how often an effect *below* m is called futile; that is
power, and takes a sample that makes the sequence narrower than m. Declaring futility is no evidence for "no effect": a
sequence inside (-m, +m) may leave out 0.

Stopping for futility does not spend the level of the test for an effect, which may stop earlier but not more often.

Sources: Schuirmann (1987), Journal of Pharmacokinetics and Biopharmaceutics 15(6), 657-680 (two one-sided tests);
Howard, Ramdas, McAuliffe and Sekhon (2021), Annals of Statistics 49(2), 1055-1080 (one-sided sequences); Fieller
(1954), Journal of the Royal Statistical Society B 16(2), 175-185 (relative margins).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from stream_xp.stats._checks import FloatArray, level, positive
from stream_xp.stats.batch import MeansArrays, one_sided_test_arrays

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from stream_xp.stats.mean_difference import MarginKind

Wanted: TypeAlias = Literal["both", "above", "below"]


@dataclass(frozen=True, slots=True, eq=False)
class Futility:
    """Evidence that effects are smaller than the minimum effect; every field has the shape (...) of the means.

    Attributes:
        log_e: log e-value against "the effect is at least the minimum effect"; 0 where undetermined.
        log_e_small: its part against an effect of at least +m.
        log_e_not_bad: its part against an effect of at most -m.
        reason: code of `batch.REASONS`, int8; 0 where determined.

    """

    log_e: FloatArray
    log_e_small: FloatArray
    log_e_not_bad: FloatArray
    reason: NDArray[np.int8]

    def proven(self, alpha: ArrayLike) -> NDArray[np.bool_]:
        """Where futility is proven at level `alpha`, in (0, 1), broadcast; bool of the shape (...).

        Raises:
            ValueError: `alpha` is out of its range.

        """
        return np.asarray((self.reason == 0) & (self.log_e >= -np.log(level("alpha", alpha))))


def futility(
    means: MeansArrays,
    *,
    minimum_effect: ArrayLike,
    kind: MarginKind,
    alpha: ArrayLike,
    rho2: ArrayLike,
    wanted: Wanted = "both",
) -> Futility:
    """Test that effects are smaller than a minimum effect.

    A relative minimum effect m is a share of the absolute control mean, which is itself estimated: the tests are those
    of the linear combinations m1 - (1 + m) m0 and m1 - (1 - m) m0 with their own variances (Fieller), not of a
    quotient.

    Args:
        means: of the shape (...).
        minimum_effect: m > 0, in metric units, or as a fraction, then below 1; broadcast against (...).
        kind: "absolute" or "relative".
        alpha: error level, in (0, 1), broadcast; the whole of it for each of the two tests.
        rho2: ``one_sided_rho2(n_star, alpha)``, > 0, broadcast.
        wanted: "both" asks for an effect inside (-m, +m). "above": only an increase is worth having, so that an effect
            below +m is futile, however negative; "below" mirrors it.

    Returns:
        The evidence.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Schuirmann (1987), with e-values: the smaller of two e-values against two nulls is one against their union.

    """
    m = positive("minimum_effect", minimum_effect)
    if kind == "relative" and (m >= 1).any():
        raise ValueError("minimum_effect must be below 1 when relative")
    if wanted not in ("both", "above", "below"):
        raise ValueError(f"wanted must be 'both', 'above' or 'below', got {wanted!r}")
    small = one_sided_test_arrays(means, margin=m, margin_kind=kind, side="below", alpha=alpha, rho2=rho2)
    not_bad = one_sided_test_arrays(means, margin=-m, margin_kind=kind, side="above", alpha=alpha, rho2=rho2)
    chosen = {
        "both": np.minimum(small.log_e, not_bad.log_e),
        "above": small.log_e,
        "below": not_bad.log_e,
    }[wanted]
    return Futility(chosen, small.log_e, not_bad.log_e, np.maximum(small.reason, not_bad.reason))


def inside(lower: ArrayLike, upper: ArrayLike, minimum_effect: ArrayLike) -> NDArray[np.bool_]:
    """Whether a confidence sequence lies inside (-minimum effect, +minimum effect).

    For sequences of any origin at level alpha, such as the averaged one of conversions or the lift by Fieller with a
    relative minimum effect. Declares futility wrongly, ever, with probability at most alpha; a two-sided sequence is
    wider than the tests of `futility`, so that takes longer.

    Args:
        lower: lower ends, any shape; -inf for none.
        upper: upper ends, broadcast; +inf for none.
        minimum_effect: m > 0, in the unit of the ends, broadcast.

    Returns:
        Bool of the broadcast shape.

    Raises:
        ValueError: an end is not a number, or `minimum_effect` is not above 0.

    """
    low, high = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    if np.isnan(low).any() or np.isnan(high).any():
        raise ValueError("lower and upper must be numbers or infinite")
    m = positive("minimum_effect", minimum_effect)
    return np.asarray((low > -m) & (high < m))
