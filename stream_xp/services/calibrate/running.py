"""Sums along the paths: what a method has seen at each of its looks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from stream_xp.services.calibrate.data import FloatArray, IntArray, Sample
from stream_xp.stats.batch import CrossArrays, MomentArrays

Values = TypeVar("Values", FloatArray, IntArray)


@dataclass(frozen=True, slots=True)
class Looks:
    """When a method is looked at.

    Attributes:
        name: as it stands in the table.
        step: after every unit up to `dense`, then after every so many units.
        dense: see `step`.

    """

    name: str
    step: int = 1
    dense: int = 0

    def at(self, n: int) -> IntArray:
        """Numbers of units at which the method is looked at; the last is `n`."""
        late = np.arange(self.dense + self.step, n + self.step, self.step)
        units: IntArray = np.minimum(np.concatenate([np.arange(1, min(self.dense, n) + 1), late]), n)
        return units


EVERY_UNIT = Looks("every unit")
EVERY_10TH = Looks("every 10th unit", step=10)
EVERY_25TH = Looks("every 25th unit", step=25)


def totals(values: Values, at: IntArray) -> Values:
    """Sums of the first `at` units: (paths, n) to (paths, looks); exact for integers."""
    return np.cumsum(values, axis=1)[:, at - 1]


def by_epoch(drawn: Sample, values: IntArray | int, at: IntArray, *, arm: bool) -> IntArray:
    """Exact sums of the first `at` units of one arm in each weight epoch: to (paths, looks, epochs)."""
    inside = drawn.arms.treated if arm else ~drawn.arms.treated
    sums = np.zeros((drawn.paths, drawn.n + 1), np.int64)
    np.cumsum(
        inside * np.int64(values) if isinstance(values, int) else inside * values, axis=1, out=sums[:, 1:]
    )
    epochs = pairwise((0, *drawn.arms.ends))
    return np.stack([sums[:, np.clip(at, s, e)] - sums[:, [s]] for s, e in epochs], axis=-1)


def moment_arrays(drawn: Sample, at: IntArray, *, arm: bool, pooled: bool = False) -> MomentArrays:
    """Exact moments of one arm at each look, (paths, looks, epochs); `pooled` forgets the epochs."""
    ticks = drawn.ticks
    columns = [by_epoch(drawn, values, at, arm=arm) for values in (1, ticks, ticks * ticks)]
    if pooled:
        columns = [column.sum(axis=-1, keepdims=True) for column in columns]
    return MomentArrays(*columns)


def cross_arrays(drawn: Sample, at: IntArray, *, arm: bool) -> CrossArrays:
    """Exact cross moments of the second number (x) and the outcome (y) of one arm, (paths, looks, epochs)."""
    x, y = drawn.second_ticks, drawn.ticks
    return CrossArrays(*(by_epoch(drawn, values, at, arm=arm) for values in (1, x, y, x * x, y * y, x * y)))


def means_and_variances(
    n: FloatArray | IntArray, total: FloatArray, squares: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Mean and variance (divisor n - 1) from sums of any shape; 0 where there are too few units."""
    mean = total / np.maximum(n, 1)
    variance = np.maximum(squares - total * mean, 0.0) / np.maximum(n - 1, 1)
    return mean, variance
