"""Means adjusted for a covariate from before the exposure: CUPED, and Lin's interacted regression.

Both return `ArmMeans`, so that difference, lift and one-sided tests are those of `mean_difference`. The
adjusted means are those that the arms would have if both had the covariate mean of all units together;
they therefore stay on the scale of the metric, and the error of that common covariate mean, which both
share, is carried as their loadings.

Weight epochs are handled as in `summarise`: deviations are taken within each epoch and arm, their sums are
added over the epochs, and the adjusted means are averaged with the epochs' units as weights. Slopes are
thus never estimated from how outcome and covariate move together between epochs.

Assumptions: those of `mean_difference`, and a covariate that the treatment cannot have changed. The
model need not hold: the slope only removes noise. Asymptotic; with the guard from 25 units per arm on.

Sources: Deng, Xu, Kohavi and Walker (2013), WSDM, 123-132, section 3 (CUPED); Lin (2013), Annals of Applied
Statistics 7(1), 295-318, section 4 (interacted regression); Negi and Wooldridge (2021), Econometric Reviews
40(5), 504-534 (its variance when the covariate mean is estimated from the units).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._centred import Centred, centred_of_arrays, centred_of_summaries
from stream_xp.stats._checks import FloatArray, finite, not_negative
from stream_xp.stats.batch import (
    CrossArrays,
    MeansArrays,
    Strata,
    one_comparison,
    stratified_means,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from stream_xp.stats.cross_moments import CrossStratum
    from stream_xp.stats.mean_difference import ArmMeans
    from stream_xp.stats.normal_mixture import Undetermined

_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class CovariateSummary:
    """Moments of outcome and covariate in one arm as floats, where exact moments are not at hand.

    Attributes:
        n: units, whole, >= 0 and below 2**53, any shape.
        mean: of the outcome, in metric units, broadcast against `n`.
        variance: of the outcome of one unit (divisor n - 1), >= 0, broadcast; not read where n < 2.
        covariate_mean: in units of the covariate, broadcast.
        covariate_variance: of one unit (divisor n - 1), >= 0, broadcast.
        covariance: of outcome and covariate (divisor n - 1), broadcast.

    Raises:
        ValueError: a field is out of its range, or covariance^2 exceeds the product of the variances.

    """

    n: ArrayLike
    mean: ArrayLike
    variance: ArrayLike
    covariate_mean: ArrayLike
    covariate_variance: ArrayLike
    covariance: ArrayLike

    def __post_init__(self) -> None:
        whole("n", self.n)
        finite("mean", self.mean)
        finite("covariate_mean", self.covariate_mean)
        check_covariance(
            "covariance",
            finite("covariance", self.covariance),
            not_negative("variance", self.variance),
            not_negative("covariate_variance", self.covariate_variance),
        )

    @property
    def columns(self) -> tuple[ArrayLike, ...]:
        """n, mean_x, mean_y, var_x, var_y and cov_xy, with x the covariate."""
        return (
            self.n,
            self.covariate_mean,
            self.mean,
            self.covariate_variance,
            self.variance,
            self.covariance,
        )


def check_covariance(name: str, covariance: FloatArray, first: FloatArray, second: FloatArray) -> None:
    """ValueError unless a covariance is possible with these variances, up to rounding."""
    if np.any(np.abs(covariance) > np.sqrt(first) * np.sqrt(second) * (1.0 + _SLACK)):
        raise ValueError(f"{name} must not exceed the square root of the product of both variances in size")


def cuped(
    strata: Sequence[CrossStratum], *, scale_x: float, scale_y: float, guard: bool = True
) -> ArmMeans | Undetermined:
    """Means adjusted by one slope for both arms (CUPED).

    theta = sum of products over sum of squares of x, of both arms together within their epochs;
    m_a' = m_a - theta * (x_a - x_both); v_a' = s2_y + theta^2 * s2_x - 2 * theta * s_xy of the arm, guarded
    with the same of both arms together. A covariate without variance leaves the means unadjusted, as
    `summarise` gives them.

    Args:
        strata: one per weight epoch; x is the covariate, y the outcome.
        scale_x: value of one quantisation step of the covariate, 1e-100 to 1e100.
        scale_y: value of one quantisation step of the outcome in metric units, 1e-100 to 1e100.
        guard: whether to guard the variances (`guarded_variance`).

    Returns:
        The adjusted means, or Undetermined as for `summarise`.

    Raises:
        ValueError: a scale is out of range, or a value is too large for a float.

    Source:
        Deng et al. (2013), equation 4 (the slope) and section 3.2 (the adjusted mean); the guard is this
        project's.

    """
    control, treatment = arrays_of_strata(strata)
    return cuped_arrays(control, treatment, scale_x=scale_x, scale_y=scale_y, guard=guard).at()


def cuped_arrays(
    control: CrossArrays,
    treatment: CrossArrays,
    *,
    scale_x: ArrayLike,
    scale_y: ArrayLike,
    guard: bool = True,
) -> MeansArrays:
    """`cuped` of many comparisons.

    Args:
        control: (..., E) exact cross moments of the control arms; x is the covariate, y the outcome.
        treatment: (..., E) of the treatment arms, broadcast against `control`.
        scale_x: value of one quantisation step of the covariate, 1e-100 to 1e100, broadcast against (...).
        scale_y: of the outcome, likewise.
        guard: whether to guard the variances.

    Returns:
        The adjusted means, of the shape (...).

    Raises:
        ValueError: shapes do not broadcast, or an argument is out of range.

    Source:
        See `cuped`.

    """
    return _cuped(centred_of_arrays(control, treatment, scale_x=scale_x, scale_y=scale_y), guard=guard)


def cuped_of(
    control: CovariateSummary, treatment: CovariateSummary, *, guard: bool = True, stratified: bool = False
) -> ArmMeans | Undetermined:
    """`cuped` from means, variances and covariances given as floats.

    Args:
        control: of scalars, or of (E,) arrays if stratified; at least one unit.
        treatment: likewise.
        guard: whether to guard the variances.
        stratified: whether the fields hold one number per weight epoch.

    Returns:
        The adjusted means, or Undetermined as for `summarise`.

    Raises:
        ValueError: an arm is empty, or a field has the wrong shape.

    Source:
        See `cuped`.

    """
    one_comparison(control.n, treatment.n)
    return cuped_of_summaries(control, treatment, guard=guard, stratified=stratified).at()


def cuped_of_summaries(
    control: CovariateSummary, treatment: CovariateSummary, *, guard: bool = True, stratified: bool = False
) -> MeansArrays:
    """`cuped_of` for many comparisons: fields (...), or (..., E) if stratified; ValueError as there."""
    return _cuped(_of_summaries(control, treatment, stratified=stratified), guard=guard)


def ancova(
    strata: Sequence[CrossStratum], *, scale_x: float, scale_y: float, guard: bool = True
) -> ArmMeans | Undetermined:
    """Means adjusted by a slope of their own in each arm (Lin's interacted regression).

    b_a = sum of products over sum of squares of x in arm a within its epochs;
    m_a' = m_a - b_a * (x_a - x_both); the variance of one unit is the arm's residual variance (divisor
    n_a - epochs - 1), guarded with that of one regression on both arms together. The difference has the
    variance rv_1/n_1 + rv_0/n_0 + (b_1 - b_0)^2 * s2_x / N. At least as precise as CUPED for many units, and
    more so with unequal shares and different slopes; it spends more on two slopes while an arm is small.
    Where either arm's covariate has no variance the means stay unadjusted, as `summarise` gives them.

    Args:
        strata: one per weight epoch; x is the covariate, y the outcome.
        scale_x: value of one quantisation step of the covariate, 1e-100 to 1e100.
        scale_y: value of one quantisation step of the outcome in metric units, 1e-100 to 1e100.
        guard: whether to guard the variances (`guarded_variance`).

    Returns:
        The adjusted means, or Undetermined as for `summarise`.

    Raises:
        ValueError: a scale is out of range, or a value is too large for a float.

    Source:
        Lin (2013), theorem 1; Negi and Wooldridge (2021) for the last term of the variance; the guard is
        this project's.

    """
    control, treatment = arrays_of_strata(strata)
    return ancova_arrays(control, treatment, scale_x=scale_x, scale_y=scale_y, guard=guard).at()


def ancova_arrays(
    control: CrossArrays,
    treatment: CrossArrays,
    *,
    scale_x: ArrayLike,
    scale_y: ArrayLike,
    guard: bool = True,
) -> MeansArrays:
    """`ancova` of many comparisons.

    Args:
        control: (..., E) exact cross moments of the control arms; x is the covariate, y the outcome.
        treatment: (..., E) of the treatment arms, broadcast against `control`.
        scale_x: value of one quantisation step of the covariate, 1e-100 to 1e100, broadcast against (...).
        scale_y: of the outcome, likewise.
        guard: whether to guard the variances.

    Returns:
        The adjusted means, of the shape (...).

    Raises:
        ValueError: shapes do not broadcast, or an argument is out of range.

    Source:
        See `ancova`.

    """
    return _ancova(centred_of_arrays(control, treatment, scale_x=scale_x, scale_y=scale_y), guard=guard)


def ancova_of(
    control: CovariateSummary, treatment: CovariateSummary, *, guard: bool = True, stratified: bool = False
) -> ArmMeans | Undetermined:
    """`ancova` from means, variances and covariances given as floats.

    Args:
        control: of scalars, or of (E,) arrays if stratified; at least one unit.
        treatment: likewise.
        guard: whether to guard the variances.
        stratified: whether the fields hold one number per weight epoch.

    Returns:
        The adjusted means, or Undetermined as for `summarise`.

    Raises:
        ValueError: an arm is empty, or a field has the wrong shape.

    Source:
        See `ancova`.

    """
    one_comparison(control.n, treatment.n)
    return ancova_of_summaries(control, treatment, guard=guard, stratified=stratified).at()


def ancova_of_summaries(
    control: CovariateSummary, treatment: CovariateSummary, *, guard: bool = True, stratified: bool = False
) -> MeansArrays:
    """`ancova_of` for many comparisons: fields (...), or (..., E) if stratified; ValueError as there."""
    return _ancova(_of_summaries(control, treatment, stratified=stratified), guard=guard)


def arrays_of_strata(strata: Sequence[CrossStratum]) -> tuple[CrossArrays, CrossArrays]:
    """Exact columns (E,) of control and of treatment."""
    shape = (len(strata),)
    control, treatment = [e.control for e in strata], [e.treatment for e in strata]
    return CrossArrays.of(control, shape), CrossArrays.of(treatment, shape)


def _of_summaries(control: CovariateSummary, treatment: CovariateSummary, *, stratified: bool) -> Centred:
    return centred_of_summaries([*control.columns, *treatment.columns], stratified=stratified)


def _cuped(sums: Centred, *, guard: bool) -> MeansArrays:
    strata = sums.strata
    degrees = strata.degrees
    with np.errstate(over="ignore", invalid="ignore"):
        slope = _slope(sums, 2)
        slopes = [slope, slope, slope]
        error = _covariate_error(sums, strata)
        return stratified_means(
            _shifted(sums, slopes[:2]),
            sums.variances(slopes, (*degrees, strata.pooled_degrees)),
            spreads=sums.spreads(slopes),
            degrees=degrees,
            guard=guard,
            loadings=[slope * error, slope * error],
        )


def _ancova(sums: Centred, *, guard: bool) -> MeansArrays:
    strata = sums.strata
    fitted = (sums.totals(0)[0] > 0) & (sums.totals(1)[0] > 0)
    degrees = [np.maximum(d - fitted, 0.0) for d in strata.degrees]
    with np.errstate(over="ignore", invalid="ignore"):
        slopes = [np.where(fitted, _slope(sums, part), 0.0) for part in (0, 1, 2)]
        error = _covariate_error(sums, strata)
        return stratified_means(
            _shifted(sums, slopes[:2]),
            sums.variances(slopes, (*degrees, strata.pooled_degrees - fitted)),
            spreads=sums.spreads(slopes),
            degrees=degrees,
            guard=guard,
            loadings=[slope * error for slope in slopes[:2]],
        )


def _slope(sums: Centred, part: int) -> FloatArray:
    # Of y on x within epochs; 0 where x has no variance.
    xx, _, xy = sums.totals(part)
    return np.asarray(xy / np.where(xx > 0, xx, 1.0) * (xx > 0))


def _shifted(sums: Centred, slopes: Sequence[FloatArray]) -> Strata:
    # Each mean moved along its slope to the covariate mean of both arms in its epoch.
    n0, n1 = sums.n
    both = np.maximum(n0 + n1, 1.0)
    offsets = (-sums.distance_x * (n1 / both), sums.distance_x * (n0 / both))
    means = [
        mean - slope[..., np.newaxis] * offset
        for mean, slope, offset in zip(sums.mean_y, slopes, offsets, strict=True)
    ]
    return Strata(n0, n1, *means)


def _covariate_error(sums: Centred, strata: Strata) -> FloatArray:
    # Standard error of the covariate mean of both arms together, within epochs.
    variance = sums.totals(2)[0] / strata.pooled_degrees
    return np.asarray(np.sqrt(variance / np.maximum(strata.total, 1.0)))
