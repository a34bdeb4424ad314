"""What is compared: one metric of one arm with the control, in one segment, epoch by epoch, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from stream_xp import stats
from stream_xp.domain.decision import Evidence, Method, QuantileResult
from stream_xp.domain.experiment import ExperimentRecord, WeightEpoch
from stream_xp.domain.statistics import (
    ALL,
    ExperimentStatistics,
    MetricEvents,
    MetricHistogram,
    MetricMoments,
    MetricProducts,
)
from stream_xp.engine.design import Plan, Test, plans

Floats = npt.NDArray[np.float64]
UNTESTABLE = "cannot be tested"


# There is one of these for every result of every look. None can be part of a cycle, because each is frozen and
# made of what was there before it; so the garbage collector, which would take a third of the time, is told not to
# look at them.


class Stratum(msgspec.Struct, frozen=True, gc=False):
    """Units of a comparison that were drawn with the same weights; a row is None where the arm has none yet.

    That is a weight epoch, or one value of the context in an epoch whose weights depend on it: to pool units of two
    values would compare the values and not the arms.

    Attributes:
        epoch: its number.
        share: probability with which a unit of the pair was assigned to the treatment arm; None where the record
            does not know the epoch, or an arm had weight 0.
        control, arm: rows of the kind that the method reads (moments, events or a histogram).
        control_products, arm_products: beside moments, where the method reads products.
        part: share of the epoch's level that a test of this stratum alone may spend; all of an epoch sum to 1.
    """

    epoch: int
    share: float | None
    control: Any
    arm: Any
    control_products: MetricProducts | None = None
    arm_products: MetricProducts | None = None
    part: float = 1.0


class Comparison(msgspec.Struct, frozen=True, gc=False):
    """One metric of one treatment arm against the control, all units or those of one segment."""

    plan: Plan
    arm: str
    segment: str
    strata: tuple[Stratum, ...]

    @property
    def effect(self) -> Test:
        """The two-sided test that is due here."""
        return self.plan.effect if self.segment == ALL else self.plan.segment

    @property
    def guards(self) -> bool:
        """Whether harm and safety are tested: of a guardrail, over all units."""
        return self.plan.harm is not None and self.segment == ALL

    @property
    def units(self) -> tuple[int, int]:
        """Units tested, of the control and of the arm."""
        return (
            sum([_units(stratum.control) for stratum in self.strata]),
            sum([_units(stratum.arm) for stratum in self.strata]),
        )


class Finding(msgspec.Struct, frozen=True, gc=False):
    """What the tests of one comparison say: the fields of `domain.decision.MetricResult` from its units on."""

    control_units: int
    arm_units: int
    control_mean: float | None = None
    arm_mean: float | None = None
    effect: Evidence | None = None
    lift: Evidence | None = None
    harm: Evidence | None = None
    safety: Evidence | None = None
    quantiles: tuple[QuantileResult, ...] = ()
    distribution: Evidence | None = None
    note: str | None = None
    standard_error: float | None = None


def nothing_found(comparison: Comparison, note: str) -> Finding:
    """The finding of a comparison that is undetermined, and why."""
    return Finding(*comparison.units, note=note)


Finder = Callable[[Sequence[Comparison]], list[Finding]]
"""Tests comparisons of one method that have equally many strata."""


def comparisons(record: ExperimentRecord, statistics: ExperimentStatistics) -> list[Comparison]:
    """Every comparison of an experiment: each metric and treatment arm, over all units, then in each segment."""
    rows = _Rows(record, statistics)
    spec, designed = record.spec, plans(record)
    # The slice and the rest of the units are no groups of people, and have weights of their own (`engine.uniform`).
    segments = [
        f"{name}={value}"
        for name, known in spec.segments.items()
        if name != spec.uniform_segment
        for value in (*known, "other")
    ]
    return [
        one for segment in (ALL, *segments) for plan in designed for one in rows.comparisons(plan, segment)
    ]


def planned_comparisons(
    record: ExperimentRecord, statistics: ExperimentStatistics, wanted: Iterable[Plan]
) -> list[Comparison]:
    """The comparisons of other plans than the experiment's own: each plan and treatment arm, over all units."""
    rows = _Rows(record, statistics)
    return [one for plan in wanted for one in rows.comparisons(plan, ALL)]


class Cell(NamedTuple):
    """Where the rows stand of units that were drawn with the same weights.

    Attributes:
        segment: ALL, or the value of the context that the weights of the epoch depend on.
        weights: None where the record does not know the epoch.
        part: as in `Stratum`.
    """

    epoch: int
    segment: str
    weights: Mapping[str, float] | None
    part: float = 1.0


def cells(record: ExperimentRecord) -> list[Cell]:
    """The cells of all weight epochs of the record; together they hold every unit once."""
    contexts = record.spec.context_segments
    return [cell for epoch in record.epochs for cell in _cells_of(epoch, contexts)]


def _cells_of(epoch: WeightEpoch, contexts: Sequence[str]) -> list[Cell]:
    if not epoch.contexts:
        return [Cell(epoch.epoch, ALL, epoch.weights)]
    part = 1 / len(contexts)
    return [
        Cell(epoch.epoch, segment, epoch.weights_in(segment.partition("=")[2]), part) for segment in contexts
    ]


_Table: TypeAlias = dict[tuple[str, str, str, int], Any]
"""Rows of one kind by metric, segment, arm and epoch."""


class _Rows:
    """The rows of an experiment's statistics by what they are compared in."""

    def __init__(self, record: ExperimentRecord, statistics: ExperimentStatistics) -> None:
        self._record = record
        self._control = record.spec.control.key
        moments, events, histograms = statistics.moments, statistics.events, statistics.histograms
        self._moments, self._products = _table(moments), _table(statistics.products)
        self._others = {Method.RATE_RATIO: _table(events), Method.QUANTILE: _table(histograms)}
        epochs = {row.epoch for rows in (moments, events, histograms) for row in rows}
        self._cells = self._cells_with_rows(sorted(epochs))
        self._places: dict[str, _Places] = {}

    def comparisons(self, plan: Plan, segment: str) -> list[Comparison]:
        """Of each treatment arm; its strata are the cells in which it or the control has rows."""
        key, get = plan.metric.key, self._others.get(plan.method, self._moments).get
        places, by_arm = self._places.get(segment) or self._place(segment)
        control = [get((key, where, self._control, at)) for at, where, _ in places]
        found = []
        for arm, shares in by_arm:
            strata = []
            for (at, where, part), share, row in zip(places, shares, control, strict=True):
                other = get((key, where, arm, at))
                if row is None and other is None:
                    continue
                if plan.method in _READ_PRODUCTS:
                    of = self._products.get
                    pair = of((key, where, self._control, at)), of((key, where, arm, at))
                    strata.append(Stratum(at, share, row, other, *pair, part))
                elif part == 1.0:
                    strata.append(Stratum(at, share, row, other))
                else:
                    strata.append(Stratum(at, share, row, other, None, None, part))
            found.append(Comparison(plan, arm, segment, tuple(strata)))
        return found

    def _cells_with_rows(self, epochs: Sequence[int]) -> list[Cell]:
        """Cells of the epochs that have rows; one that the record does not know may depend on a context."""
        known = {epoch.epoch: epoch for epoch in self._record.epochs}
        contexts = self._record.spec.context_segments
        part = 1 / max(1, len(contexts))
        found = []
        for at in epochs:
            if at in known:
                found += _cells_of(known[at], contexts)
            else:
                found += [Cell(at, segment, None, part) for segment in contexts or (ALL,)]
        return found

    def _place(self, segment: str) -> _Places:
        """Cells of a segment: those of all units, cut to it where the weights inside it are known to be the same."""
        wanted = self._cells
        if segment != ALL:
            # In a segment of another dimension than the context units were drawn with weights of many values, and
            # no row tells them apart: an epoch that depends on the context can say nothing about it.
            wanted = [
                Cell(cell.epoch, segment, cell.weights) for cell in wanted if cell.segment in (ALL, segment)
            ]
        arms = [arm.key for arm in self._record.spec.treatments]
        shares = [(arm, [_share(cell, self._control, arm) for cell in wanted]) for arm in arms]
        self._places[segment] = places = [(cell.epoch, cell.segment, cell.part) for cell in wanted], shares
        return places


_Places: TypeAlias = tuple[list[tuple[int, str, float]], list[tuple[str, list[float | None]]]]
"""Epoch, segment and part of each cell; and for each treatment arm, its share in each of them."""


_READ_PRODUCTS = (Method.CUPED, Method.ANCOVA, Method.RATIO)


def _table(rows: Sequence[Any]) -> _Table:
    return {(row.metric, row.segment, row.arm, row.epoch): row for row in rows}


def _share(cell: Cell, control: str, arm: str) -> float | None:
    """The share of the arm among units of the pair; None where one has weight 0."""
    weights = cell.weights or {}
    of_control, of_arm = weights.get(control, 0.0), weights.get(arm, 0.0)
    return of_arm / (of_control + of_arm) if of_control > 0 and of_arm > 0 else None


def _units(row: MetricMoments | MetricEvents | MetricHistogram | None) -> int:
    if type(row) is MetricMoments:
        return row.n
    if row is None:
        return 0
    if isinstance(row, MetricEvents):
        return row.units
    assert isinstance(row, MetricHistogram)  # noqa: S101 (there is no fourth kind of row)
    return sum(count for _, count in row.bins)


def evidence(
    estimate: Floats, bounds: tuple[Floats, Floats], log_e: Floats, thresholds: Sequence[float]
) -> list[Evidence]:
    """Evidence for each element; an infinite bound becomes None."""
    lower, upper = (_finite(bound) for bound in bounds)
    p = np.asarray(stats.p_always_valid(log_e)).tolist()
    columns = (estimate.tolist(), lower, upper, log_e.tolist(), p, thresholds)  # fields of `Evidence`
    return list(map(Evidence, *columns))


def _finite(bound: Floats) -> list[float | None]:
    listed: list[float | None] = bound.tolist()
    for at in np.flatnonzero(np.isinf(bound)).tolist():
        listed[at] = None
    return listed


def found_all(batch: Sequence[Comparison], finder: Finder) -> list[Finding]:
    """What `finder` says of every comparison, whatever numbers one of them may have.

    A scale, margin or level beyond what a method takes is one experiment's fault. It closes the gates of that one
    only, so a batch that is refused is halved until the one at fault stands alone.
    """
    try:
        return finder(batch)
    except ValueError as error:
        if len(batch) == 1:
            return [nothing_found(batch[0], f"{UNTESTABLE}: {error}")]
    middle = len(batch) // 2
    return [*found_all(batch[:middle], finder), *found_all(batch[middle:], finder)]


def grouped(batch: Sequence[Comparison], key: Callable[[Comparison], Any]) -> Mapping[Any, list[int]]:
    """Positions of the comparisons by key, in order of first sight."""
    groups: dict[Any, list[int]] = {}
    for at, comparison in enumerate(batch):
        groups.setdefault(key(comparison), []).append(at)
    return groups
