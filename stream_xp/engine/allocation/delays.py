"""Units whose window is open as evidence, from the exact sums by age that the fold keeps (`allocation.delay`).

Of each arm, epoch and context there are, for every registered age and for the whole window, the units that have reached
it, how many had converted by then, and how many of those had by the age before. So the units between two ages, which
are open, stand apart from those whose window is over, each with its conversions by an age that it has reached.

The share of the final conversions that has come by an age is learned from the same sums by development factors: of
the units that reached an age with a conversion, how many had it by the age before. Both numbers are of the same units,
so a baseline that drifts, or weights that move, bias nothing, as long as the delays stay what they are. Each arm has
factors of its own, drawn towards those of all arms by few conversions, so that an arm that merely converts sooner looks
no better.

Where no unit has come from one age to the next with a conversion and nothing is registered, nothing is known of what
is still to come, and units younger than that do not count.

Source: Mack (1993), ASTIN Bulletin 23(2), 213-225 (development factors of the chain ladder).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from stream_xp.domain.delays import delay_buckets
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.domain.rollout import Delay
from stream_xp.domain.statistics import ALL, ExperimentStatistics
from stream_xp.engine.allocation.evidence import Conversions, Evidence
from stream_xp.engine.allocation.maturity import MaturityCurve, OpenUnits, mature_conversions

REGISTERED_WORTH = 100.0
"""Conversions that registered shares count for."""
COMMON_WORTH = 10.0
"""Conversions that the delays of all arms together count for in those of one. More favours the faster arm for longer
(tests/simulation/test_delayed_weights.py)."""


class Reached(NamedTuple):
    """Units of a cell that have reached an age: how many, converted by then, and converted by the age before."""

    units: int = 0
    converted: int = 0
    before: int = 0


_Cell = tuple[str, int, str]
"""Arm, epoch and segment."""


def delayed_evidence(
    spec: ExperimentSpec, delay: Delay, statistics: ExperimentStatistics, *, feature: str | None = None
) -> list[Evidence]:
    """Rows of the metric that weights follow, with its open units, per arm and weight epoch and value of a feature.

    Args:
        spec: with the section `allocation.delay`.
        delay: that section.
        statistics: of all partitions together.
        feature: name of the registered segment whose values are the contexts.
    """
    buckets = delay_buckets(spec)
    names = [bucket.name(metric.key) for metric, bucket in buckets]
    ages_ms = [float(bucket.until_ms) for _, bucket in buckets]
    # All units are the segment "", so no feature has the name of its part before "=".
    wanted = ALL if feature is None else feature
    cells = {
        cell: reached
        for cell, reached in _cells(names, statistics).items()
        if cell[2].partition("=")[0] == wanted
    }
    factors = _factors(delay, cells)
    rows = [Evidence(arm, Conversions(0, 0)) for arm in spec.weights] if feature is None else []
    for (arm, epoch, segment), reached in sorted(cells.items()):
        sums = _counted(reached, ages_ms, factors[arm])
        rows.append(Evidence(arm, sums, epoch, segment.partition("=")[2] if feature is not None else ""))
    return rows


def _cells(names: Sequence[str], statistics: ExperimentStatistics) -> dict[_Cell, list[Reached]]:
    """What every cell has reached, youngest age first."""
    places = {name: at for at, name in enumerate(names)}
    before = {
        (row.metric, row.arm, row.epoch, row.segment): int(row.x)
        for row in statistics.products
        if row.metric in places
    }
    cells: dict[_Cell, list[Reached]] = {}
    for row in statistics.moments:
        if row.metric in places:
            reached = cells.setdefault((row.arm, row.epoch, row.segment), [Reached()] * len(names))
            key = (row.metric, row.arm, row.epoch, row.segment)
            reached[places[row.metric]] = Reached(row.n, int(row.s), before.get(key, 0))
    return cells


def _factors(delay: Delay, cells: Mapping[_Cell, Sequence[Reached]]) -> dict[str, list[float | None]]:
    """Of each arm, the share of the conversions by an age that had come by the age before; None where unknown."""
    steps = len(delay.ages)
    registered: list[float | None] = [None] * steps
    if delay.shares is not None:
        registered = [low / high for low, high in itertools.pairwise((*delay.shares, 1.0))]
    totals = _totals(cells.values(), steps)
    common = _drawn(totals, registered, worth=REGISTERED_WORTH)
    by_arm: dict[str, list[Sequence[Reached]]] = {}
    for (arm, _, _), reached in cells.items():
        by_arm.setdefault(arm, []).append(reached)
    return {arm: _drawn(_totals(mine, steps), common, worth=COMMON_WORTH) for arm, mine in by_arm.items()}


def _totals(cells: Iterable[Sequence[Reached]], steps: int) -> list[tuple[int, int]]:
    """For each age but the youngest: conversions by the age before, and by it, of the units that reached it."""
    totals = [(0, 0)] * steps
    for reached in cells:
        totals = [
            (before + one.before, converted + one.converted)
            for (before, converted), one in zip(totals, reached[1:], strict=True)
        ]
    return totals


def _drawn(
    totals: Sequence[tuple[int, int]], priors: Sequence[float | None], *, worth: float
) -> list[float | None]:
    """Factors of the totals, each drawn towards its prior by so many conversions; None where nothing is known."""
    found: list[float | None] = []
    for (before, converted), prior in zip(totals, priors, strict=True):
        if prior is None:
            found.append(before / converted if converted else None)
        else:
            found.append((before + worth * prior) / (converted + worth))
    return found


def _counted(
    reached: Sequence[Reached], ages_ms: Sequence[float], factors: Sequence[float | None]
) -> Conversions:
    """The sums of a cell, open units by what they say at their age."""
    mature = Conversions(reached[-1].units, reached[-1].converted)
    shares = _shares(factors)
    curve = MaturityCurve(tuple(ages_ms), (*(share or 0.0 for share in shares), 1.0))
    still = [
        OpenUnits(age, Conversions(one.units - older.units, one.converted - older.before))
        for age, share, (one, older) in zip(ages_ms, shares, itertools.pairwise(reached), strict=False)
        # By an age at which nothing has ever come a unit says nothing.
        if share and one.units > older.units
    ]
    return mature_conversions(mature, still, curve)


def _shares(factors: Sequence[float | None]) -> list[float | None]:
    """Share of the final conversions by each age; None from the oldest unknown factor on downward."""
    shares: list[float | None] = []
    share = 1.0
    for at, factor in enumerate(reversed(factors)):
        if factor is None:
            return [*[None] * (len(factors) - at), *reversed(shares)]
        share *= factor
        shares.append(share)
    return list(reversed(shares))
