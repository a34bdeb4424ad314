"""Arms compared inside weight epochs: sums that no drift of the baseline and no change of weights can bias.

Where weights follow the outcomes, an arm that got most of its units in good weeks looks good. So the mean of arm a is
fitted as level of the epoch + effect of the arm, by least squares over units, and an arm's evidence becomes *adjusted
sums*: as many units as give the arms' differences their variance under that fit, at the fitted mean. In a single epoch
they are the sums themselves.

Units in an epoch where no other arm has any say nothing of a difference and are left out.

Source: the two-way layout without interaction; Scheffe (1959), The Analysis of Variance, chapter 4.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_xp.engine.allocation.evidence import Conversions, Evidence, Sums, Values
from stream_xp.engine.allocation.posterior import FloatArray
from stream_xp.stats import Undetermined

APART = "some arms never had units in one epoch or context with the others"

Table = dict[str, dict[int, Sums]]
"""Sums per arm and epoch."""


def tabled(evidence: Iterable[Evidence]) -> Table:
    """Sums per arm and epoch; rows of one arm and epoch add up."""
    table: Table = {}
    for row in evidence:
        epochs = table.setdefault(row.arm, {})
        held = epochs.get(row.epoch)
        epochs[row.epoch] = row.sums if held is None else added(held, row.sums)
    return table


def added(one: Sums, other: Sums) -> Sums:
    """Sums of disjoint units.

    Raises:
        ValueError: they are of different kinds or steps.
    """
    if isinstance(one, Conversions) and isinstance(other, Conversions):
        return Conversions(one.units + other.units, one.conversions + other.conversions)
    if isinstance(one, Values) and isinstance(other, Values) and one.step == other.step:
        return Values(one.units + other.units, one.total + other.total, one.squares + other.squares, one.step)
    raise ValueError("sums of one metric must be of one kind and step")


class Layout(NamedTuple):
    """A two-way fit of arms and strata.

    Attributes:
        effects: (A,) of the arms; the one with the largest weight has 0.
        covariance: (A, A) of the effects, in units of the variance of one unit of weight.
    """

    effects: FloatArray
    covariance: FloatArray


def layout(weights: FloatArray, means: FloatArray) -> Layout | Undetermined:
    """Least-squares effects of the arms beside the level of each stratum.

    Args:
        weights: (A, S) weight of each cell, >= 0; each arm has some.
        means: (A, S) of the cells; any number where the weight is 0.

    Returns:
        The fit, or Undetermined where arms share no stratum, directly or through others.
    """
    share = weights / np.maximum(weights.sum(axis=0), np.finfo(float).tiny)
    normal = np.diag(weights.sum(axis=1)) - share @ weights.T
    right = (weights * (means - (share * means).sum(axis=0))).sum(axis=1)
    if not _connected(weights > 0):
        return Undetermined(APART)
    arms = len(weights)
    anchor = int(np.argmax(weights.sum(axis=1)))
    rest = np.delete(np.arange(arms), anchor)
    # Scaled to a diagonal of 1: arms of one unit stand beside arms of a billion.
    root = np.sqrt(np.diag(normal)[rest])
    inverse = np.linalg.inv(normal[np.ix_(rest, rest)] / np.outer(root, root)) / np.outer(root, root)
    effects, covariance = np.zeros(arms), np.zeros((arms, arms))
    effects[rest] = inverse @ right[rest]
    covariance[np.ix_(rest, rest)] = inverse
    return Layout(effects, covariance)


def _connected(present: NDArray[np.bool_]) -> bool:
    reached = np.zeros(len(present), dtype=bool)
    reached[:1] = True
    for _ in range(len(present)):
        strata = present[reached].any(axis=0)
        reached |= present[:, strata].any(axis=1)
    return bool(reached.all())


def adjusted(
    table: Mapping[str, Mapping[int, Sums]], arms: Sequence[str], *, nothing: Sums
) -> dict[str, Sums] | Undetermined:
    """Sums of each arm with the levels of the epochs taken out.

    Args:
        table: sums per arm and epoch, all of one kind.
        arms: those to compare.
        nothing: what an arm without comparable units has, sums of 0.
    """
    cells = {arm: {e: s for e, s in table.get(arm, {}).items() if s.units > 0} for arm in arms}
    crowd = Counter(epoch for arm in arms for epoch in cells[arm])
    # Where no epoch has two arms there is nothing to adjust yet: what there is counts for its arm.
    fewest = min(2, max(crowd.values(), default=0))
    epochs = sorted(epoch for epoch, present in crowd.items() if present >= fewest)
    kept = {arm: {e: cells[arm][e] for e in epochs if e in cells[arm]} for arm in arms}
    totals = {arm: reduce(added, kept[arm].values(), nothing) for arm in arms}
    present = [arm for arm in arms if totals[arm].units > 0]
    if len(epochs) < 2 or len(present) < 2:
        return totals
    fit = _fitted([kept[arm] for arm in present], epochs)
    if isinstance(fit, Undetermined):
        return fit
    for arm, mean, units in zip(present, *fit, strict=True):
        totals[arm] = _moved_to(list(kept[arm].values()), float(mean), float(units))
    return totals


def _fitted(
    cells: Sequence[Mapping[int, Sums]], epochs: Sequence[int]
) -> tuple[FloatArray, FloatArray] | Undetermined:
    """(means, effective units) of arms with units."""
    n = np.array([[arm[e].units if e in arm else 0.0 for e in epochs] for arm in cells], dtype=np.float64)
    y = np.array([[arm[e].mean if e in arm else 0.0 for e in epochs] for arm in cells])
    fit = layout(n, y)
    if isinstance(fit, Undetermined):
        return fit
    units = n.sum(axis=1)
    level = float((n * (y - fit.effects[:, np.newaxis])).sum() / units.sum())
    return fit.effects + level, 1.0 / np.maximum(_own_variances(fit.covariance, units), 1.0 / units)


def _own_variances(covariance: FloatArray, units: FloatArray) -> FloatArray:
    """Variances of independent arms whose pairwise sums are, by least squares, those of the fitted differences."""
    own = np.diag(covariance)
    pairs = own[:, np.newaxis] + own - 2.0 * covariance
    arms = len(own)
    if arms == 2:
        return np.asarray(pairs[0, 1] * units[::-1] / units.sum())
    return np.asarray((pairs.sum(axis=1) - pairs.sum() / 2.0 / (arms - 1)) / (arms - 2))


def _moved_to(parts: Sequence[Sums], mean: float, units: float) -> Sums:
    """Sums of so many units at this mean, with the variance inside the parts."""
    if isinstance(parts[0], Conversions):
        return Conversions(units, units * min(max(mean, 0.0), 1.0))
    values = [part for part in parts if isinstance(part, Values)]
    degrees = math.fsum(max(part.units - 1.0, 0.0) for part in values)
    spread = math.fsum(part.spread for part in values)
    inside = max(units - 1.0, 0.0) * spread / degrees if degrees > 0 else 0.0
    return Values(units, units * mean, units * mean * mean + inside)
