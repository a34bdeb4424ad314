"""Centred sums of pairs (x, y) of two arms: what adjusted and ratio comparisons are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._exact_quotients import Integers, spread_quotient
from stream_xp.stats.batch import (
    CrossArrays,
    Strata,
    broadcast_summaries,
    exact_mean,
    pooled_product,
    steps_of,
    sum_over_epochs,
    used_columns,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from stream_xp.stats._checks import FloatArray

# A residual sum below this share of its terms is their rounding error.
_ROUNDING = 1e-13


@dataclass(frozen=True, slots=True, eq=False)
class Centred:
    """Means and centred sums per weight epoch, all float64 of the shape (..., E).

    An epoch with an empty arm has 0 everywhere.

    Attributes:
        n: units of control and of treatment.
        mean_x: mean of x in control and in treatment.
        mean_y: mean of y in control and in treatment.
        distance_x: mean of x in treatment minus that in control.
        xx: sums of squared deviations of x in control, in treatment, and in both about their common mean.
        yy: likewise of y.
        xy: likewise of the products of both deviations.

    """

    n: Sequence[FloatArray]
    mean_x: Sequence[FloatArray]
    mean_y: Sequence[FloatArray]
    distance_x: FloatArray
    xx: Sequence[FloatArray]
    yy: Sequence[FloatArray]
    xy: Sequence[FloatArray]

    @property
    def strata(self) -> Strata:
        """Units and means of y."""
        return Strata(*self.n, *self.mean_y)

    def totals(self, part: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Sums of xx, yy and xy over the epochs; part 0 is control, 1 treatment, 2 both together; each (...)."""
        return sum_over_epochs(self.xx[part]), sum_over_epochs(self.yy[part]), sum_over_epochs(self.xy[part])

    def variances(self, slopes: Sequence[FloatArray], divisors: Sequence[FloatArray]) -> list[FloatArray]:
        """Variance of y - slope * x within epochs, of every part with its own slope and divisor, each (...).

        A divisor below 1 counts as 1; the variance is exactly 0 where only rounding is left.
        """
        return [
            _residual(*self.totals(part), slope) / np.maximum(divisor, 1.0)
            for part, (slope, divisor) in enumerate(zip(slopes, divisors, strict=True))
        ]

    def spreads(self, slopes: Sequence[FloatArray]) -> list[FloatArray]:
        """Sums of squared deviations of y - slope * x, of every part with its own slope, in each epoch, (..., E)."""
        parts = zip(self.xx, self.yy, self.xy, slopes, strict=True)
        return [_residual(xx, yy, xy, slope[..., np.newaxis]) for xx, yy, xy, slope in parts]


def _residual(xx: FloatArray, yy: FloatArray, xy: FloatArray, slope: FloatArray) -> FloatArray:
    explained = slope * slope * xx
    squares = yy + explained - 2.0 * slope * xy
    return np.where(squares > _ROUNDING * (yy + explained), squares, 0.0)


def centred_of_arrays(
    control: CrossArrays, treatment: CrossArrays, *, scale_x: ArrayLike, scale_y: ArrayLike
) -> Centred:
    """Centred sums from exact cross moments, each rounded once; epochs last."""
    c, t = used_columns(control, treatment)
    shape = c[0].shape[:-1]
    x, y = (steps_of(n, s, shape)[..., np.newaxis] for n, s in (("scale_x", scale_x), ("scale_y", scale_y)))
    parts = [c, t, [a + b for a, b in zip(c, t, strict=True)]]
    with np.errstate(over="ignore", invalid="ignore"):
        return Centred(
            n=[rows[0].astype(np.float64) for rows in (c, t)],
            mean_x=[exact_mean(rows[0], rows[1]) * x for rows in (c, t)],
            mean_y=[exact_mean(rows[0], rows[2]) * y for rows in (c, t)],
            distance_x=_distance(c, t) * x,
            xx=[_centred(rows[0], rows[3], rows[1], t=rows[1]) * (x * x) for rows in parts],
            yy=[_centred(rows[0], rows[4], rows[2], t=rows[2]) * (y * y) for rows in parts],
            xy=[_centred(rows[0], rows[5], rows[1], t=rows[2]) * (x * y) for rows in parts],
        )


def _centred(n: Integers, q: Integers, s: Integers, *, t: Integers) -> FloatArray:
    counts = np.maximum(n, 1)
    return spread_quotient(counts, q, s, t=t, lowered=np.ones_like(counts))


def _distance(c: Sequence[Integers], t: Sequence[Integers]) -> FloatArray:
    # s1/n1 - s0/n0 = (n0*s1 - s0*n1) / (n0*n1), rounded once.
    n0, n1 = np.maximum(c[0], 1), np.maximum(t[0], 1)
    return spread_quotient(n0, t[1], c[1], t=n1, lowered=n1)


def centred_of_summaries(columns: Sequence[ArrayLike], *, stratified: bool) -> Centred:
    """Centred sums from floats: n, mean_x, mean_y, var_x, var_y, cov_xy of control, then of treatment."""
    rows = broadcast_summaries(columns, stratified=stratified)
    arms = [rows[:6], rows[6:]]
    n, mean_x, mean_y = ([arm[i] for arm in arms] for i in range(3))
    xx, yy, xy = ([np.maximum(arm[0] - 1.0, 0.0) * arm[i] for arm in arms] for i in (3, 4, 5))
    dx, dy = mean_x[1] - mean_x[0], mean_y[1] - mean_y[0]
    return Centred(
        n=n,
        mean_x=mean_x,
        mean_y=mean_y,
        distance_x=dx,
        xx=[*xx, xx[0] + xx[1] + pooled_product(n, dx, dx)],
        yy=[*yy, yy[0] + yy[1] + pooled_product(n, dy, dy)],
        xy=[*xy, xy[0] + xy[1] + pooled_product(n, dx, dy)],
    )
