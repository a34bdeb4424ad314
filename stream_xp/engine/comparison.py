"""What is compared: one metric of one arm with the control, in one segment, epoch by epoch, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_xp import stats
from stream_xp.domain.decision import Evidence, Method, QuantileResult
from stream_xp.domain.experiment import ExperimentRecord
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


class Stratum(NamedTuple):
    """One weight epoch of a comparison; a row is None where the arm has none yet.

    Attributes:
        epoch: its number.
        share: probability with which a unit of the pair was assigned to the treatment arm; None where the record
            does not know the epoch, or an arm had weight 0.
        control, arm: rows of the kind that the method reads (moments, events or a histogram).
        control_products, arm_products: beside moments, where the method reads products.
    """

    epoch: int
    share: float | None
    control: Any
    arm: Any
    control_products: MetricProducts | None = None
    arm_products: MetricProducts | None = None


class Comparison(NamedTuple):
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


class Finding(NamedTuple):
    """What the tests of one comparison say; fields as in `domain.decision.MetricResult`."""

    control_mean: float | None = None
    arm_mean: float | None = None
    effect: Evidence | None = None
    lift: Evidence | None = None
    harm: Evidence | None = None
    safety: Evidence | None = None
    quantiles: tuple[QuantileResult, ...] = ()
    distribution: Evidence | None = None
    note: str | None = None


Finder = Callable[[Sequence[Comparison]], list[Finding]]
"""Tests comparisons of one method that have equally many strata."""


def comparisons(record: ExperimentRecord, statistics: ExperimentStatistics) -> Iterator[Comparison]:
    """Every comparison of an experiment: each metric and treatment arm, over all units, then in each segment."""
    rows = _Rows(record, statistics)
    spec = record.spec
    segments = [f"{name}={value}" for name, known in spec.segments.items() for value in (*known, "other")]
    for segment in (ALL, *segments):
        for plan in plans(record):
            for arm in spec.treatments:
                yield Comparison(plan, arm.key, segment, rows.strata(plan, arm.key, segment))


class _Rows:
    """The rows of an experiment's statistics by what they are compared in."""

    def __init__(self, record: ExperimentRecord, statistics: ExperimentStatistics) -> None:
        self._control = record.spec.control.key
        self._shares: dict[str, dict[int, float]] = {
            arm.key: _shares(record, self._control, arm.key) for arm in record.spec.treatments
        }
        self._counted = _by_place(statistics.moments)
        self._counted.update(_by_place(statistics.events))
        self._counted.update(_by_place(statistics.histograms))
        self._products = _by_place(statistics.products)

    def strata(self, plan: Plan, arm: str, segment: str) -> tuple[Stratum, ...]:
        key = plan.metric.key
        control = self._counted.get((key, segment, self._control), _NO_ROWS)
        treated = self._counted.get((key, segment, arm), _NO_ROWS)
        epochs = sorted(control if control.keys() == treated.keys() else control.keys() | treated.keys())
        shares = self._shares[arm]
        strata = [Stratum(at, shares.get(at), control.get(at), treated.get(at)) for at in epochs]
        if plan.method in _READ_PRODUCTS:
            first = self._products.get((key, segment, self._control), _NO_ROWS)
            second = self._products.get((key, segment, arm), _NO_ROWS)
            strata = [
                stratum._replace(control_products=first.get(at), arm_products=second.get(at))
                for stratum, at in zip(strata, epochs, strict=True)
            ]
        return tuple(strata)


_NO_ROWS: dict[int, Any] = {}
_READ_PRODUCTS = (Method.CUPED, Method.ANCOVA, Method.RATIO)


def _by_place(rows: Iterable[Any]) -> dict[tuple[str, str, str], dict[int, Any]]:
    table: dict[tuple[str, str, str], dict[int, Any]] = {}
    for row in rows:
        place = (row.metric, row.segment, row.arm)
        epochs = table.get(place)
        if epochs is None:
            table[place] = {row.epoch: row}
        else:
            epochs[row.epoch] = row
    return table


def _shares(record: ExperimentRecord, control: str, arm: str) -> dict[int, float]:
    """Per weight epoch, the share of the arm among units of the pair; epochs in which one has weight 0 are out."""
    shares = {}
    for epoch in record.epochs:
        of_control, of_arm = epoch.weights.get(control, 0.0), epoch.weights.get(arm, 0.0)
        if of_control > 0 and of_arm > 0:
            shares[epoch.epoch] = of_arm / (of_control + of_arm)
    return shares


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
    columns = (estimate.tolist(), lower, upper, log_e.tolist(), p, thresholds)
    return [
        Evidence(
            estimate=at, lower=low, upper=high, log_e=log, p_always_valid=valid, threshold_log_e=threshold
        )
        for at, low, high, log, valid, threshold in zip(*columns, strict=True)
    ]


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
            return [Finding(note=f"{UNTESTABLE}: {error}")]
    middle = len(batch) // 2
    return [*found_all(batch[:middle], finder), *found_all(batch[middle:], finder)]


def grouped(batch: Sequence[Comparison], key: Callable[[Comparison], Any]) -> Mapping[Any, list[int]]:
    """Positions of the comparisons by key, in order of first sight."""
    groups: dict[Any, list[int]] = {}
    for at, comparison in enumerate(batch):
        groups.setdefault(key(comparison), []).append(at)
    return groups
