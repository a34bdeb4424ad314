"""Open units as evidence before their attribution window is over.

Of units that will convert, the share G(age) has done so at an age. Then an open unit that converted says all it ever
will, and one that has not says: 1 - p G(age). The maximum of that likelihood over p, with every age weighted by the
share of its window that is over, is the estimate; its Fisher information, as a number of mature units, is the effective
sample: each open unit counts for G (1 - p) / (1 - p G) of a mature one, times its weight. Posteriors take the two as
*pseudo-sums*.

The weights are there because G is estimated: an error of G at young ages, where G is small, is large in proportion.
What remains is the bias from arms that convert at different speeds: with one curve for all arms a faster arm looks
better than it is until its units are mature. Give each arm its own curve (`learned_curve` with `pooled`).

Allocation may use this; tests of effects may not, and do not: they take mature units alone.

Sources: Chapelle (2014), KDD, 1097-1105 (conversion and delay modelled apart); Vernade, Cappe and Perchet (2017), UAI,
arXiv:1706.09186 (bandits with delayed conversions: units count for the curve at their age). Weights and pseudo-sums are
this project's own and are checked by simulation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stream_xp.engine.allocation.evidence import Conversions, Values

_BISECTIONS = 200


@dataclass(frozen=True, slots=True)
class MaturityCurve:
    """Cumulative share of the final conversions (or of the final sum) at an age; linear between grid points.

    Attributes:
        ages_ms: ascending, > 0; the last is the attribution window.
        shares: at these ages, in [0, 1], not descending; the last is 1.
    """

    ages_ms: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        ages, shares = (0.0, *self.ages_ms), (0.0, *self.shares)
        if len(ages) != len(shares) or len(ages) < 2:
            raise ValueError("a maturity curve needs one share for each age, and at least one age")
        if any(not a < b < math.inf for a, b in itertools.pairwise(ages)):
            raise ValueError("ages_ms must be finite, greater than 0 and ascending")
        if any(not a <= b for a, b in itertools.pairwise(shares)) or shares[-1] != 1.0:
            raise ValueError("shares must ascend from 0 to 1")

    @property
    def window_ms(self) -> float:
        """Age at which a unit is mature."""
        return self.ages_ms[-1]

    def share_at(self, age_ms: float) -> float:
        """Share of the final conversions that has come by an age >= 0."""
        before_age, before = 0.0, 0.0
        for age, share in zip(self.ages_ms, self.shares, strict=True):
            if age_ms <= age:
                return before + (share - before) * (max(age_ms, 0.0) - before_age) / (age - before_age)
            before_age, before = age, share
        return 1.0


def learned_curve(
    ages_ms: Sequence[float],
    conversions: Sequence[float],
    *,
    pooled: MaturityCurve | None = None,
    worth: float = 100.0,
) -> MaturityCurve | None:
    """The curve of mature units from how many converted in each bin of delay.

    Args:
        ages_ms: upper edges of the bins, ascending; the last is the attribution window.
        conversions: of mature units, in each bin; or the sum of what they brought, >= 0.
        pooled: curve of all arms, towards which that of one arm with few conversions is drawn.
        worth: conversions that `pooled` counts for.

    Returns:
        The curve, or None where nothing has converted and nothing is pooled.
    """
    if any(not 0 <= count < math.inf for count in conversions) or len(ages_ms) != len(conversions):
        raise ValueError("conversions must be finite, not negative, and one for each age")
    seen = math.fsum(conversions)
    extra = worth if pooled is not None else 0.0
    if seen + extra <= 0:
        return None
    shares = []
    for i, age in enumerate(ages_ms):
        prior = extra * pooled.share_at(age) if pooled is not None else 0.0
        shares.append(min(1.0, (math.fsum(conversions[: i + 1]) + prior) / (seen + extra)))
    return MaturityCurve(tuple(float(age) for age in ages_ms), (*shares[:-1], 1.0))


@dataclass(frozen=True, slots=True)
class OpenUnits:
    """Units of one arm and age whose window is not over.

    Attributes:
        age_ms: of these units; of a bucket its middle.
        sums: of these units so far.
    """

    age_ms: float
    sums: Conversions | Values


def mature_conversions(
    mature: Conversions, open_units: Sequence[OpenUnits], curve: MaturityCurve
) -> Conversions:
    """Pseudo-sums of an arm: mature units, and open ones for what they say by now.

    Args:
        mature: units whose window is over.
        open_units: buckets of those whose window is not over, with conversions so far.
        curve: of this arm.

    Returns:
        Effective units, and conversions as their estimated final number.
    """
    if not open_units:
        return mature
    cells = [(mature.units, mature.conversions, 1.0, 1.0)]
    for bucket in open_units:
        if not isinstance(bucket.sums, Conversions):
            raise TypeError("open units of a conversion must be conversions")
        age = min(bucket.age_ms, curve.window_ms)
        weight, by_now = max(age, 0.0) / curve.window_ms, curve.share_at(age)
        cells.append((bucket.sums.units, bucket.sums.conversions, weight, by_now))
    rate = _likeliest(cells)
    units = math.fsum(
        weight * n * (by_now * (1.0 - rate) / (1.0 - rate * by_now) if by_now < 1 else 1.0)
        for n, _, weight, by_now in cells
    )
    return Conversions(units, min(units, units * rate))


def _likeliest(cells: Sequence[tuple[float, float, float, float]]) -> float:
    """The rate p in [0, 1] at which the weighted score is 0; it falls in p, so halving finds it."""
    low, high = 0.0, 1.0
    if not any(weight * count > 0 for _, count, weight, _ in cells):
        return 0.0
    for _ in range(_BISECTIONS):
        rate = 0.5 * (low + high)
        if not low < rate < high:
            break
        score = math.fsum(
            weight * (count / rate - (n - count) * by_now / (1.0 - rate * by_now))
            for n, count, weight, by_now in cells
        )
        low, high = (rate, high) if score > 0 else (low, rate)
    return high


def mature_values(mature: Values, open_units: Sequence[OpenUnits], curve: MaturityCurve) -> Values:
    """Pseudo-sums of an arm's values: mature units, and open ones scaled to what they will bring.

    An open unit counts for its weight times G, and so does what it brought so far once that is divided by G, so that
    the mean is that of the final values. The variance of a unit is that of the mature ones.

    Args:
        mature: units whose window is over.
        open_units: buckets of those whose window is not over, with their sums so far.
        curve: of this arm, of the sum.
    """
    if not open_units:
        return mature
    units, sums = [float(mature.units)], [float(mature.total)]
    for bucket in open_units:
        if not isinstance(bucket.sums, Values) or bucket.sums.step != mature.step:
            raise TypeError("open units of a mean must be values of the step of the mature ones")
        age = min(bucket.age_ms, curve.window_ms)
        weight = max(age, 0.0) / curve.window_ms
        units.append(weight * curve.share_at(age) * bucket.sums.units)
        sums.append(weight * float(bucket.sums.total))
    n, total = math.fsum(units), math.fsum(sums)
    if n <= 0:
        return Values(0, 0, 0, mature.step)
    inside = mature.spread / mature.step**2 / (mature.units - 1.0) if mature.units > 1 else 0.0
    return Values(n, total, total * total / n + max(n - 1.0, 0.0) * inside, mature.step)
