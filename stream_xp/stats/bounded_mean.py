"""Confidence sequences for the mean of bounded values, by three constructions of the same guarantee.

====================  =======================  ================================================
construction          order of the values      width
====================  =======================  ================================================
hoeffding             does not matter          that of the largest possible variance
empirical_bernstein   per partition            adapts to the variance, mergeable by addition
betting               per partition            narrow for small variances; not correctable
====================  =======================  ================================================

All three are non-asymptotic for independent or dependent values with the same mean given the past.

Source: Howard et al. (2021), Annals of Statistics 49(2), 1055-1080 (hoeffding, empirical_bernstein);
Waudby-Smith and Ramdas (2024), Journal of the Royal Statistical Society B 86(1), 1-27 (betting).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from stream_xp.stats._boundaries import is_above
from stream_xp.stats._checks import FloatArray, finite, level, not_negative, positive
from stream_xp.stats._predictable import to_unit, unit_interval
from stream_xp.stats.betting import betting_bounds, betting_log_e
from stream_xp.stats.empirical_bernstein import (
    EmpiricalBernstein,
    empirical_bernstein_bounds,
    empirical_bernstein_log_e,
    empirical_bernstein_rho,
)
from stream_xp.stats.normal_mixture import (
    Undetermined,
    log_e_one_sided,
    log_e_two_sided,
    one_sided_rho2,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
    tuned_rho2,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from stream_xp.stats._boundaries import Sides

Construction: TypeAlias = Literal["hoeffding", "empirical_bernstein", "betting"]

CONSTRUCTIONS: tuple[Construction, ...] = ("hoeffding", "empirical_bernstein", "betting")
# Where nothing is planned: the sequences lose less where the sample turns out larger than planned than where it
# turns out smaller, hence a modest number of values and a modest variance (a quarter of the range as deviation).
N_STAR = 1_000.0
PLANNED_VARIANCE = 1.0 / 16.0
NO_VALUES = "no value has been seen"


@dataclass(frozen=True, slots=True)
class BoundedMean:
    """Mean of bounded values.

    Attributes:
        estimate: the sample mean, in metric units.
        lower: lower end of the confidence sequence, at least the lower bound of the values.
        upper: upper end, at most the upper bound of the values.
        n: number of values.

    """

    estimate: float
    lower: float
    upper: float
    n: int


def bounded_mean(
    values: ArrayLike,
    *,
    construction: Construction,
    lower_bound: float = 0.0,
    upper_bound: float = 1.0,
    alpha: float = 0.05,
    side: Sides = "both",
    n_star: float = N_STAR,
) -> BoundedMean | Undetermined:
    """Confidence sequence for the mean of values between two bounds.

    Args:
        values: (n,) in the order in which they were seen.
        construction: "hoeffding", "empirical_bernstein" or "betting".
        lower_bound: least possible value, in metric units.
        upper_bound: largest possible value, in metric units, > lower_bound.
        alpha: error level, in (0, 1); with one side in (0, 0.5).
        side: "both", "above" (a lower bound only) or "below" (an upper bound only).
        n_star: planned number of values, > 0, fixed in advance; "betting" needs none.

    Returns:
        The sequence at this look, or Undetermined without values. A mean has a log e-value
        (`bounded_mean_log_e`) of at least ln(1/alpha) if and only if it lies outside.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See the module.

    """
    x = to_unit(values, lower_bound=lower_bound, upper_bound=upper_bound)
    plan = _Plan(construction, alpha, side, n_star)
    if not len(x):
        return Undetermined(NO_VALUES)
    lower, upper = _BOUNDS[construction](x, plan)
    low, width = float(lower_bound), float(upper_bound) - float(lower_bound)
    estimate = low + width * math.fsum(x) / len(x)
    return BoundedMean(estimate, _stretched(lower, low, width), _stretched(upper, low, width), len(x))


def bounded_mean_log_e(
    values: ArrayLike,
    null: float,
    *,
    construction: Construction,
    lower_bound: float = 0.0,
    upper_bound: float = 1.0,
    alpha: float = 0.05,
    side: Sides = "both",
    n_star: float = N_STAR,
) -> float:
    """Log e-value against a mean; the dual of `bounded_mean`.

    Args:
        values: (n,) in the order in which they were seen.
        null: mean under the null, between the bounds, in metric units.
        construction: "hoeffding", "empirical_bernstein" or "betting".
        lower_bound: least possible value, in metric units.
        upper_bound: largest possible value, in metric units, > lower_bound.
        alpha: error level for which the e-value is tuned, in (0, 1); with one side in (0, 0.5).
        side: "both", "above" (against "at most `null`") or "below" (against "at least `null`").
        n_star: planned number of values, > 0, fixed in advance; "betting" needs none.

    Returns:
        The log e-value, finite.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See the module.

    """
    x = to_unit(values, lower_bound=lower_bound, upper_bound=upper_bound)
    plan = _Plan(construction, alpha, side, n_star)
    m = (float(finite("null", null)) - lower_bound) / (float(upper_bound) - float(lower_bound))
    if not 0 <= m <= 1:
        raise ValueError("null must lie between lower_bound and upper_bound")
    return _LOG_E[construction](x, plan, m)


def hoeffding_log_e(
    n: ArrayLike, mean: ArrayLike, *, null: ArrayLike, rho2: float, side: Sides = "both"
) -> FloatArray:
    """Log e-value of the Hoeffding mixture for means of values in [0, 1]; order never matters.

    The normal mixture with the largest variance that such values can have, 1/(4 n). Non-asymptotic.

    Args:
        n: number of values, >= 0, any shape.
        mean: their mean, in [0, 1], broadcast.
        null: mean under the null, in [0, 1], broadcast.
        rho2: ``tuned_rho2(n_star, alpha)``, or ``one_sided_rho2`` with one side, > 0.
        side: "both", "above" (against "at most `null`") or "below" (against "at least `null`").

    Returns:
        The log e-value, finite, of the broadcast shape (0-d for scalars).

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), propositions 5 and 6 with the sub-Gaussian bound of Hoeffding's lemma.

    """
    count = not_negative("n", n)
    z = np.asarray(2.0 * np.sqrt(count) * (unit_interval("mean", mean) - unit_interval("null", null)))
    k = np.asarray(count * float(positive("rho2", rho2)))
    if side == "both":
        return np.asarray(log_e_two_sided(z, k))
    return np.asarray(log_e_one_sided(z if is_above(side) else -z, k))


def hoeffding_bounds(
    n: ArrayLike, mean: ArrayLike, *, alpha: float, rho2: float, side: Sides = "both"
) -> tuple[FloatArray, FloatArray]:
    """Confidence sequence of the Hoeffding mixture; the dual of `hoeffding_log_e`.

    Args:
        n: number of values, >= 0, any shape.
        mean: their mean, in [0, 1], broadcast; disregarded where n is 0.
        alpha: error level, in (0, 1).
        rho2: ``tuned_rho2(n_star, alpha)``, or ``one_sided_rho2`` with one side, > 0.
        side: "both", "above" (a lower bound only) or "below" (an upper bound only).

    Returns:
        (lower, upper) of the broadcast shape, within [0, 1]; (0, 1) where n is 0.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), propositions 5 and 6 with the sub-Gaussian bound of Hoeffding's lemma.

    """
    count, centre = not_negative("n", n), unit_interval("mean", mean)
    units = np.asarray(np.maximum(count, 1.0))
    k = np.asarray(units * float(positive("rho2", rho2)))
    multiplier = radius_multiplier_two_sided if side == "both" else radius_multiplier_one_sided
    radius = np.where(count > 0, 0.5 / np.sqrt(units) * multiplier(k, alpha), 1.0)
    lower, upper = np.clip(centre - radius, 0.0, 1.0), np.clip(centre + radius, 0.0, 1.0)
    if side == "both":
        return lower, upper
    return (lower, np.ones_like(upper)) if is_above(side) else (np.zeros_like(lower), upper)


@dataclass(frozen=True, slots=True)
class _Plan:
    construction: Construction
    alpha: float
    side: Sides
    n_star: float

    def __post_init__(self) -> None:
        if self.construction not in CONSTRUCTIONS:
            raise ValueError(f"construction must be one of {CONSTRUCTIONS}, got {self.construction!r}")
        level("alpha", self.alpha)
        positive("n_star", self.n_star)
        if self.side != "both":
            is_above(self.side)

    @property
    def rho2(self) -> float:
        tuned = tuned_rho2 if self.side == "both" else one_sided_rho2
        return tuned(self.n_star, self.alpha)

    @property
    def rho(self) -> float:
        return empirical_bernstein_rho(self.n_star * PLANNED_VARIANCE, self.alpha, side=self.side)


def _hoeffding_bounds(x: FloatArray, plan: _Plan) -> tuple[float, float]:
    n, mean = len(x), math.fsum(x) / len(x)
    lower, upper = hoeffding_bounds(n, mean, alpha=plan.alpha, rho2=plan.rho2, side=plan.side)
    return float(lower), float(upper)


def _hoeffding_log_e(x: FloatArray, plan: _Plan, m: float) -> float:
    mean = math.fsum(x) / max(len(x), 1)
    return float(hoeffding_log_e(len(x), mean, null=m, rho2=plan.rho2, side=plan.side))


def _bernstein_bounds(x: FloatArray, plan: _Plan) -> tuple[float, float]:
    t = EmpiricalBernstein.empty().update(x)
    lower, upper = empirical_bernstein_bounds(
        t.n, t.total, t.intrinsic_time, alpha=plan.alpha, rho=plan.rho, side=plan.side
    )
    return float(lower), float(upper)


def _bernstein_log_e(x: FloatArray, plan: _Plan, m: float) -> float:
    t = EmpiricalBernstein.empty().update(x)
    return float(
        empirical_bernstein_log_e(t.n, t.total, t.intrinsic_time, null=m, rho=plan.rho, side=plan.side)
    )


def _betting_bounds(x: FloatArray, plan: _Plan) -> tuple[float, float]:
    return betting_bounds(x, alpha=plan.alpha, side=plan.side)


def _betting_log_e(x: FloatArray, plan: _Plan, m: float) -> float:
    return betting_log_e(x, m, alpha=plan.alpha, side=plan.side)


_BOUNDS = {
    "hoeffding": _hoeffding_bounds,
    "empirical_bernstein": _bernstein_bounds,
    "betting": _betting_bounds,
}
_LOG_E = {
    "hoeffding": _hoeffding_log_e,
    "empirical_bernstein": _bernstein_log_e,
    "betting": _betting_log_e,
}


def _stretched(x: float, low: float, width: float) -> float:
    return low + width * x if x < 1.0 else low + width
