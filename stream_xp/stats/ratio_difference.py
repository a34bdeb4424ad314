"""Ratio metrics of units: sum of numerators over sum of denominators, compared between two arms.

A unit contributes a pair, such as (revenue, orders) or (clicks, views); x is the denominator, y the
numerator. The ratio of an arm is that of its stratified means, so that both arms weigh the weight epochs
alike. Its variance is that of the linearised value y - r*x of one unit, because the unit is what was
randomised: counting denominators as if each were an observation errs several times too often.

`ratio_means` returns `ArmMeans` whose means are the two ratios: difference, lift by Fieller and one-sided
tests are those of `mean_difference`. `ratio_equality_means` is for the test of equal ratios alone; it needs
no linearisation and speaks earlier where denominators are sparse.

The linearisation is void where a denominator mean may be 0. `ratio_means` is therefore Undetermined until
both stand 2 standard errors clear of 0.

Assumptions: those of `mean_difference`. Asymptotic; with the guard from 25 units per arm on, also where
nine units out of ten have no denominator.

Source: Deng, Knoblich and Lu (2018), KDD, 233-242, section 3 (delta method for a ratio of unit sums). Guard
and separation rule are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._centred import Centred, centred_of_arrays, centred_of_summaries
from stream_xp.stats._checks import FloatArray, finite, not_negative
from stream_xp.stats.adjusted_difference import arrays_of_strata, check_covariance
from stream_xp.stats.batch import (
    CODES,
    DENOMINATOR_NEAR_ZERO,
    CrossArrays,
    MeansArrays,
    Strata,
    one_comparison,
    stratified_means,
    sum_over_epochs,
    whole,
)
from stream_xp.stats.mean_difference import guarded_variance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from stream_xp.stats.cross_moments import CrossStratum
    from stream_xp.stats.mean_difference import ArmMeans
    from stream_xp.stats.normal_mixture import Undetermined

SEPARATION = 2.0
"""Standard errors by which a denominator mean must differ from 0."""


@dataclass(frozen=True, slots=True)
class RatioSummary:
    """Moments of numerator m and denominator d in one arm as floats, where exact moments are not at hand.

    Attributes:
        n: units, whole, >= 0 and below 2**53, any shape.
        mean_m: of the numerator, broadcast against `n`.
        mean_d: of the denominator, broadcast.
        var_m: of one unit's numerator (divisor n - 1), >= 0, broadcast; not read where n < 2.
        var_d: of one unit's denominator (divisor n - 1), >= 0, broadcast.
        cov_md: of numerator and denominator (divisor n - 1), broadcast.

    Raises:
        ValueError: a field is out of its range, or cov_md^2 exceeds the product of the variances.

    """

    n: ArrayLike
    mean_m: ArrayLike
    mean_d: ArrayLike
    var_m: ArrayLike
    var_d: ArrayLike
    cov_md: ArrayLike

    def __post_init__(self) -> None:
        whole("n", self.n)
        finite("mean_m", self.mean_m)
        finite("mean_d", self.mean_d)
        check_covariance(
            "cov_md",
            finite("cov_md", self.cov_md),
            not_negative("var_m", self.var_m),
            not_negative("var_d", self.var_d),
        )

    @property
    def columns(self) -> tuple[ArrayLike, ...]:
        """n, mean_x, mean_y, var_x, var_y and cov_xy, with x the denominator."""
        return self.n, self.mean_d, self.mean_m, self.var_d, self.var_m, self.cov_md


def ratio_means(
    strata: Sequence[CrossStratum], *, scale_x: float, scale_y: float, guard: bool = True
) -> ArmMeans | Undetermined:
    """Ratios of two arms with the variances of these ratios.

    r_a = M_a / D_a with M and D the stratified means; L_a = s2_m - 2 * r_a * s_md + r_a^2 * s2_d within
    epochs, guarded with the same of both arms together at their common ratio; the variance of r_a is
    L_a * sum_e (N_e / N)^2 / n_ea / D_a^2, with one epoch L_a / (n_a * D_a^2).

    Args:
        strata: one per weight epoch; x is the denominator, y the numerator.
        scale_x: value of one quantisation step of the denominator, 1e-100 to 1e100.
        scale_y: value of one quantisation step of the numerator, 1e-100 to 1e100.
        guard: whether to guard the variances (`guarded_variance`).

    Returns:
        The ratios, in units of the numerator per unit of the denominator; or Undetermined as for
        `summarise`, or while a denominator mean is not separated from 0.

    Raises:
        ValueError: a scale is out of range, or a value is too large for a float.

    Source:
        Deng et al. (2018), section 3.

    """
    control, treatment = arrays_of_strata(strata)
    return ratio_means_arrays(control, treatment, scale_x=scale_x, scale_y=scale_y, guard=guard).at()


def ratio_means_arrays(
    control: CrossArrays,
    treatment: CrossArrays,
    *,
    scale_x: ArrayLike,
    scale_y: ArrayLike,
    guard: bool = True,
) -> MeansArrays:
    """`ratio_means` of many comparisons.

    Args:
        control: (..., E) exact cross moments of the control arms; x is the denominator, y the numerator.
        treatment: (..., E) of the treatment arms, broadcast against `control`.
        scale_x: value of one quantisation step of the denominator, 1e-100 to 1e100, broadcast against (...).
        scale_y: of the numerator, likewise.
        guard: whether to guard the variances.

    Returns:
        The ratios, of the shape (...).

    Raises:
        ValueError: shapes do not broadcast, or an argument is out of range.

    Source:
        See `ratio_means`.

    """
    return _ratio_means(centred_of_arrays(control, treatment, scale_x=scale_x, scale_y=scale_y), guard=guard)


def ratio_means_of(
    control: RatioSummary, treatment: RatioSummary, *, guard: bool = True, stratified: bool = False
) -> ArmMeans | Undetermined:
    """`ratio_means` from means, variances and covariances given as floats.

    Args:
        control: of scalars, or of (E,) arrays if stratified; at least one unit.
        treatment: likewise.
        guard: whether to guard the variances.
        stratified: whether the fields hold one number per weight epoch.

    Returns:
        The ratios, or Undetermined as for `ratio_means`.

    Raises:
        ValueError: an arm is empty, or a field has the wrong shape.

    Source:
        See `ratio_means`.

    """
    one_comparison(control.n, treatment.n)
    return ratio_means_of_summaries(control, treatment, guard=guard, stratified=stratified).at()


def ratio_means_of_summaries(
    control: RatioSummary, treatment: RatioSummary, *, guard: bool = True, stratified: bool = False
) -> MeansArrays:
    """`ratio_means_of` for many comparisons: fields (...), or (..., E) if stratified; ValueError as there."""
    return _ratio_means(_of_summaries(control, treatment, stratified=stratified), guard=guard)


def ratio_equality_means(
    strata: Sequence[CrossStratum], *, scale_x: float, scale_y: float, guard: bool = True
) -> ArmMeans | Undetermined:
    """Means of the linearised values at the common ratio, for a test of equal ratios.

    With r the ratio of both arms together, the mean of arm a is M_a - r * D_a and the variance of one unit
    s2_m - 2 * r * s_md + r^2 * s2_d, guarded. Pass it to `mean_difference` or, with margin 0, to
    `one_sided_test`: no effect is the hypothesis that both ratios are equal. The estimate is in units of the
    numerator per unit randomised; it is no difference of ratios, and a lift of it has no meaning.

    Args:
        strata: one per weight epoch; x is the denominator, y the numerator.
        scale_x: value of one quantisation step of the denominator, 1e-100 to 1e100.
        scale_y: value of one quantisation step of the numerator, 1e-100 to 1e100.
        guard: whether to guard the variances (`guarded_variance`).

    Returns:
        The means, or Undetermined as for `summarise`, or while both denominators together sum to 0.

    Raises:
        ValueError: a scale is out of range, or a value is too large for a float.

    Source:
        Deng et al. (2018), section 3, at the ratio of the null hypothesis (a score test).

    """
    control, treatment = arrays_of_strata(strata)
    return ratio_equality_arrays(control, treatment, scale_x=scale_x, scale_y=scale_y, guard=guard).at()


def ratio_equality_arrays(
    control: CrossArrays,
    treatment: CrossArrays,
    *,
    scale_x: ArrayLike,
    scale_y: ArrayLike,
    guard: bool = True,
) -> MeansArrays:
    """`ratio_equality_means` of many comparisons; arguments, result and errors as `ratio_means_arrays`."""
    return _equality_means(
        centred_of_arrays(control, treatment, scale_x=scale_x, scale_y=scale_y), guard=guard
    )


def ratio_equality_of(
    control: RatioSummary, treatment: RatioSummary, *, guard: bool = True, stratified: bool = False
) -> ArmMeans | Undetermined:
    """`ratio_equality_means` from floats; arguments and errors as `ratio_means_of`."""
    one_comparison(control.n, treatment.n)
    return ratio_equality_of_summaries(control, treatment, guard=guard, stratified=stratified).at()


def ratio_equality_of_summaries(
    control: RatioSummary, treatment: RatioSummary, *, guard: bool = True, stratified: bool = False
) -> MeansArrays:
    """`ratio_equality_of` for many comparisons: fields (...), or (..., E) if stratified; ValueError as there."""
    return _equality_means(_of_summaries(control, treatment, stratified=stratified), guard=guard)


def _of_summaries(control: RatioSummary, treatment: RatioSummary, *, stratified: bool) -> Centred:
    return centred_of_summaries([*control.columns, *treatment.columns], stratified=stratified)


def _ratio_means(sums: Centred, *, guard: bool) -> MeansArrays:
    strata, degrees = sums.strata, sums.strata.degrees
    with np.errstate(over="ignore", invalid="ignore"):
        bottoms = [sum_over_epochs(strata.weights * mean) for mean in sums.mean_x]
        tops = [sum_over_epochs(strata.weights * mean) for mean in sums.mean_y]
        near = _near_zero(sums, strata, bottoms)
        safe = [np.where(near, 1.0, bottom) for bottom in bottoms]
        ratios = [np.where(near, 0.0, top / bottom) for top, bottom in zip(tops, safe, strict=True)]
        slopes = [*ratios, _common_ratio(sums)[0]]
        means = stratified_means(
            strata,
            sums.variances(slopes, (*degrees, strata.pooled_degrees)),
            spreads=sums.spreads(slopes),
            degrees=degrees,
            guard=guard,
            reason=np.where(near, CODES[DENOMINATOR_NEAR_ZERO], 0).astype(np.int8),
        )
        return replace(
            means,
            control_mean=finite("control_mean", ratios[0]),
            treatment_mean=finite("treatment_mean", ratios[1]),
            control_variance=means.control_variance / safe[0] ** 2,
            treatment_variance=means.treatment_variance / safe[1] ** 2,
        )


def _equality_means(sums: Centred, *, guard: bool) -> MeansArrays:
    with np.errstate(over="ignore", invalid="ignore"):
        ratio, undefined = _common_ratio(sums)
        means = [y - ratio[..., np.newaxis] * x for x, y in zip(sums.mean_x, sums.mean_y, strict=True)]
        strata, ratios = Strata(*sums.n, *means), [ratio, ratio, ratio]
        degrees = strata.degrees
        return stratified_means(
            strata,
            sums.variances(ratios, (*degrees, strata.pooled_degrees)),
            spreads=sums.spreads(ratios),
            degrees=degrees,
            guard=guard,
            reason=np.where(undefined, CODES[DENOMINATOR_NEAR_ZERO], 0).astype(np.int8),
        )


def _common_ratio(sums: Centred) -> tuple[FloatArray, NDArray[np.bool_]]:
    # Of both arms together, and where it does not exist.
    tops, bottoms = (
        sum_over_epochs(sums.n[0] * means[0] + sums.n[1] * means[1]) for means in (sums.mean_y, sums.mean_x)
    )
    undefined = bottoms == 0
    return np.where(undefined, 0.0, tops / np.where(undefined, 1.0, bottoms)), undefined


def _near_zero(sums: Centred, strata: Strata, bottoms: Sequence[FloatArray]) -> NDArray[np.bool_]:
    degrees, pooled = strata.degrees, sums.totals(2)[0] / strata.pooled_degrees
    near = np.zeros(strata.total.shape, dtype=np.bool_)
    for part, bottom in enumerate(bottoms):
        own = sums.totals(part)[0] / np.maximum(degrees[part], 1.0)
        unit = guarded_variance(own, pooled, degrees=degrees[part])
        shares = sum_over_epochs(strata.weights**2 / np.maximum(sums.n[part], 1.0))
        near |= np.abs(bottom) <= SEPARATION * np.sqrt(unit * shares)
    return near
