"""Means of arms over weight epochs and strata, with their variances, from exact moments or summaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._checks import FloatArray, finite, not_negative
from stream_xp.stats._exact_quotients import Integers, quotient, spread_quotient
from stream_xp.stats.batch.arrays import CODES, MeansArrays, MomentArrays, used_columns
from stream_xp.stats.batch.shapes import broadcast_summaries, one_comparison, steps_of, whole
from stream_xp.stats.mean_difference import (
    EPOCH_UNITS,
    MIN_UNITS_PER_ARM,
    NO_VARIANCE,
    TOO_FEW_UNITS,
    ArmMeans,
    guarded_variance,
)
from stream_xp.stats.normal_mixture import Undetermined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """Mean and variance of one arm as floats, where exact moments are not at hand.

    Attributes:
        n: units, whole, >= 0 and below 2**53, any shape.
        mean: in metric units, broadcast against `n`.
        variance: of one unit (divisor n - 1), >= 0, broadcast; not read where n < 2.

    Raises:
        ValueError: a field is out of its range.

    """

    n: ArrayLike
    mean: ArrayLike
    variance: ArrayLike

    def __post_init__(self) -> None:
        whole("n", self.n)
        finite("mean", self.mean)
        not_negative("variance", self.variance)


@dataclass(frozen=True, slots=True, eq=False)
class Strata:
    """What the stratified means of two arms are made of, all float64 of the shape (..., E).

    An epoch with an empty arm has 0 units in both arms and 0 in every other field.

    Attributes:
        control_n: units.
        treatment_n: units.
        control_mean: mean of the epoch, in metric units.
        treatment_mean: mean of the epoch.

    """

    control_n: FloatArray
    treatment_n: FloatArray
    control_mean: FloatArray
    treatment_mean: FloatArray

    @property
    def epochs(self) -> FloatArray:
        """Number of epochs used, (...)."""
        return np.asarray((self.control_n > 0).sum(axis=-1), dtype=np.float64)

    @property
    def total(self) -> FloatArray:
        """Units of both arms, (...); exact."""
        return np.asarray((self.control_n + self.treatment_n).sum(axis=-1))

    @property
    def weights(self) -> FloatArray:
        """Share of the units of both arms in each epoch, (..., E)."""
        return (self.control_n + self.treatment_n) / np.maximum(self.total, 1.0)[..., np.newaxis]

    @property
    def degrees(self) -> list[FloatArray]:
        """Degrees of freedom of the within-epoch variance of control and of treatment, each (...)."""
        return [np.maximum(n.sum(axis=-1) - self.epochs, 0.0) for n in (self.control_n, self.treatment_n)]

    @property
    def pooled_degrees(self) -> FloatArray:
        """Degrees of freedom of the within-epoch variance of both arms together, at least 1, (...)."""
        return np.asarray(np.maximum(self.total - self.epochs, 1.0))

    @property
    def too_few(self) -> NDArray[np.bool_]:
        """Where an arm has too few units for any report, (...)."""
        # With several epochs each one costs a degree of freedom; with one the rule counts units.
        spent = np.where(self.epochs == 1, 0.0, self.epochs)
        units = np.minimum(self.control_n.sum(axis=-1), self.treatment_n.sum(axis=-1))
        return np.asarray(units - spent < MIN_UNITS_PER_ARM)


def stratified_means(
    strata: Strata,
    variances: Sequence[FloatArray],
    *,
    spreads: Sequence[FloatArray] | None,
    degrees: Sequence[FloatArray],
    guard: bool = True,
    loadings: Sequence[FloatArray] | None = None,
    reason: NDArray[np.int8] | None = None,
) -> MeansArrays:
    """Stratified means and their guarded variances; the core of every asymptotic comparison.

    Args:
        strata: units and means per epoch, (..., E).
        variances: of one unit in control, in treatment, and in both together, within epochs, each (...).
        spreads: sums of squared deviations in each epoch: of control and of treatment from their own means, and of
            both together from their common mean, each (..., E); not read where only one epoch is used. None takes
            the spread of an arm to be the same in every epoch.
        degrees: degrees of freedom of the first two variances, each (...).
        guard: whether to guard the variances (`guarded_variance`).
        loadings: of the two means on an error that they share, each (...); none by default.
        reason: codes that the caller has found already, (...).

    Returns:
        The means; too few units and no variance are marked, after the codes of `reason`.

    """
    own_control, own_treatment, pooled = variances
    unit = [own_control, own_treatment]
    if guard:
        unit = [guarded_variance(own, pooled, degrees=d) for own, d in zip(unit, degrees, strict=True)]
    code = np.where(strata.too_few, CODES[TOO_FEW_UNITS], 0 if reason is None else reason)
    constant = (pooled == 0) | (unit[0] + unit[1] == 0)
    code = np.where((code == 0) & constant, CODES[NO_VARIANCE], code).astype(np.int8)
    known = code == 0
    mean_variances = _mean_variances(strata, own=variances[:2], unit=unit, spreads=spreads, guard=guard)
    zero = np.zeros(known.shape)
    shared = [zero, zero] if loadings is None else [np.where(known, h, 0.0) for h in loadings]
    return MeansArrays(
        control_mean=finite("control_mean", sum_over_epochs(strata.weights * strata.control_mean)),
        treatment_mean=finite("treatment_mean", sum_over_epochs(strata.weights * strata.treatment_mean)),
        control_variance=np.where(known, finite("control_variance", mean_variances[0]), np.inf),
        treatment_variance=np.where(known, finite("treatment_variance", mean_variances[1]), np.inf),
        n=strata.total,
        reason=code,
        control_loading=shared[0],
        treatment_loading=shared[1],
    )


def _mean_variances(
    strata: Strata,
    *,
    own: Sequence[FloatArray],
    unit: Sequence[FloatArray],
    spreads: Sequence[FloatArray] | None,
    guard: bool,
) -> list[FloatArray]:
    # The larger of two: as if the spread were the same in every epoch, and with the spread of each epoch.
    squared, arms = strata.weights**2, (strata.control_n, strata.treatment_n)
    level = [
        sum_over_epochs(squared * v[..., np.newaxis] / np.maximum(n, 1.0))
        for n, v in zip(arms, unit, strict=True)
    ]
    several = strata.epochs > 1
    if spreads is None or not np.any(several):
        return level
    both = spreads[2] / np.maximum(strata.control_n + strata.treatment_n - 1.0, 1.0)
    by_epoch = [
        sum_over_epochs(squared * _epoch_variances(n, spread, both, own=v, guard=guard) / np.maximum(n, 1.0))
        for n, spread, v in zip(arms, spreads[:2], own, strict=True)
    ]
    return [np.where(several, np.maximum(*pair), pair[0]) for pair in zip(level, by_epoch, strict=True)]


def _epoch_variances(
    n: FloatArray, spread: FloatArray, both: FloatArray, *, own: FloatArray, guard: bool
) -> FloatArray:
    # An arm's variance in each epoch, drawn towards that of both arms times the arm's ratio over all epochs.
    degrees = np.maximum(n - 1.0, 0.0)
    total = sum_over_epochs(degrees)
    base = sum_over_epochs(degrees * both) / np.maximum(total, 1.0)
    ratio = np.where(base > 0, own / np.where(base > 0, base, 1.0), 1.0)
    if guard:
        ratio = guarded_variance(ratio, 1.0, degrees=total)
    return np.asarray((spread + EPOCH_UNITS * ratio[..., np.newaxis] * both) / (degrees + EPOCH_UNITS))


def sum_over_epochs(values: FloatArray) -> FloatArray:
    """Sum over the last axis, to about twice the precision of a float and the same in every order.

    The terms are sorted first, so that the result is a function of the set of terms; their rounding errors
    are added up apart (Ogita, Rump and Oishi 2005, SIAM Journal on Scientific Computing 26(6), Sum2).
    """
    ordered = np.sort(values, axis=-1) if values.shape[-1] > 1 else values
    if values.shape[-1] >= _MANY_EPOCHS:
        return _sum_of_many(ordered)
    total, lost = np.zeros(values.shape[:-1]), np.zeros(values.shape[:-1])
    for epoch in range(values.shape[-1]):
        term = ordered[..., epoch]
        raised = total + term
        moved = raised - total
        lost = lost + ((total - (raised - moved)) + (term - moved))
        total = raised
    return np.asarray(total + lost)


_MANY_EPOCHS = 16
"""From so many on a sum is taken of whole arrays; it is the same to the last bit."""


def _sum_of_many(ordered: FloatArray) -> FloatArray:
    # An accumulation adds one term after the other, as the loop does.
    totals = _accumulated(ordered)
    before, raised = totals[..., :-1], totals[..., 1:]
    moved = raised - before
    lost = _accumulated((before - (raised - moved)) + (ordered - moved))
    return np.asarray(raised[..., -1] + lost[..., -1])


def _accumulated(terms: FloatArray) -> FloatArray:
    return np.add.accumulate(np.concatenate((np.zeros((*terms.shape[:-1], 1)), terms), axis=-1), axis=-1)


def summarise_arrays(
    control: MomentArrays, treatment: MomentArrays, *, scale: ArrayLike, guard: bool = True
) -> MeansArrays:
    """Stratified means of many comparisons from exact moments; `summarise` for each element.

    Args:
        control: (..., E) exact moments of the control arms.
        treatment: (..., E) exact moments of the treatment arms, broadcast against `control`.
        scale: value of one quantisation step in metric units, 1e-100 to 1e100, broadcast against (...).
        guard: whether to guard the variances.

    Returns:
        The means, of the shape (...).

    Raises:
        ValueError: shapes do not broadcast, `scale` is out of range, or a value is too large for a float.

    Source:
        See `summarise`.

    """
    c, t = used_columns(control, treatment)
    used = c[0] > 0
    steps = steps_of("scale", scale, used.shape[:-1])
    squared, one = _squared(steps), used.sum(axis=-1) == 1
    both = [a + b for a, b in zip(c, t, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        spreads = [_exact_spreads(rows, one=one) * squared[..., np.newaxis] for rows in (c, t, both)]
        strata = Strata(
            control_n=c[0].astype(np.float64),
            treatment_n=t[0].astype(np.float64),
            control_mean=exact_mean(c[0], c[1]) * steps[..., np.newaxis],
            treatment_mean=exact_mean(t[0], t[1]) * steps[..., np.newaxis],
        )
        divisors = (*strata.degrees, strata.pooled_degrees)
        variances = [
            sum_over_epochs(spread) / np.where(one, 1.0, np.maximum(d, 1.0))
            for spread, d in zip(spreads, divisors, strict=True)
        ]
    return stratified_means(strata, variances, spreads=spreads, degrees=strata.degrees, guard=guard)


def exact_mean(n: Integers, s: Integers) -> FloatArray:
    """Correctly rounded s/n, and 0 where n is 0, in steps."""
    return quotient(s, np.maximum(n, 1))


def _exact_spreads(rows: Sequence[Integers], *, one: NDArray[np.bool_]) -> FloatArray:
    # Sums of squared deviations per epoch, in squared steps. With one epoch its variance instead, rounded once,
    # so that one epoch gives the plain two-sample numbers.
    n, s, q = rows
    counts = np.maximum(n, 1)
    lowered = np.where(one[..., np.newaxis], np.maximum(counts - 1, 1), 1).astype(n.dtype)
    return spread_quotient(counts, q, s, t=s, lowered=lowered)


def means_of_summaries(
    control: ArmSummary,
    treatment: ArmSummary,
    *,
    guard: bool = True,
    stratified: bool = False,
    constant_spread: bool = False,
) -> MeansArrays:
    """Stratified means of many comparisons from means and variances given as floats.

    The pooled variance of the guard is rebuilt from the summaries. As exact as the floats are: where the
    variance is far below the squared mean, exact moments (`summarise_arrays`) keep digits that these lose.

    Args:
        control: summary of the control arms, (...), or (..., E) if stratified.
        treatment: summary of the treatment arms, broadcast against `control`.
        guard: whether to guard the variances.
        stratified: whether the last axis holds weight epochs; otherwise each element is one epoch.
        constant_spread: whether an arm's variance is taken to be the same in every epoch; errs where it is not.

    Returns:
        The means, of the shape (...).

    Raises:
        ValueError: shapes do not broadcast.

    Source:
        See `summarise`.

    """
    rows = broadcast_summaries(
        (control.n, control.mean, control.variance, treatment.n, treatment.mean, treatment.variance),
        stratified=stratified,
    )
    n, mean, squares = (
        rows[0::3],
        rows[1::3],
        [np.maximum(r - 1.0, 0.0) * v for r, v in zip(rows[0::3], rows[2::3], strict=True)],
    )
    between = pooled_product(n, mean[1] - mean[0], mean[1] - mean[0])
    strata = Strata(*n, *mean)
    degrees = strata.degrees
    variances = [sum_over_epochs(q) / np.maximum(d, 1.0) for q, d in zip(squares, degrees, strict=True)]
    spreads = [*squares, squares[0] + squares[1] + between]
    pooled = sum_over_epochs(spreads[2]) / strata.pooled_degrees
    return stratified_means(
        strata,
        [*variances, pooled],
        spreads=None if constant_spread else spreads,
        degrees=degrees,
        guard=guard,
    )


def arm_means_of(
    control: ArmSummary, treatment: ArmSummary, *, guard: bool = True, stratified: bool = False
) -> ArmMeans | Undetermined:
    """`summarise` from means and variances given as floats.

    Args:
        control: of scalars, or of (E,) arrays if stratified; at least one unit.
        treatment: likewise.
        guard: whether to guard the variances.
        stratified: whether the fields hold one number per weight epoch.

    Returns:
        The means, or Undetermined as for `summarise`.

    Raises:
        ValueError: an arm is empty, or a field has the wrong shape.

    Source:
        See `summarise`.

    """
    one_comparison(control.n, treatment.n)
    return means_of_summaries(control, treatment, guard=guard, stratified=stratified).at()


def pooled_product(n: Sequence[FloatArray], first: FloatArray, second: FloatArray) -> FloatArray:
    """What two arms' distance adds to the sum of products about their common mean, n0*n1/(n0 + n1)*a*b."""
    return n[0] / np.maximum(n[0] + n[1], 1.0) * n[1] * first * second


def _squared(steps: FloatArray) -> FloatArray:
    # Rounded as a Python float's power is, which is not always steps * steps.
    distinct, where = np.unique(steps, return_inverse=True)
    return np.array([value**2 for value in distinct.tolist()])[where].reshape(steps.shape)
