"""Tests of means: conversions, means, adjusted means and ratios, many comparisons at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from stream_xp import stats
from stream_xp.domain.decision import Evidence, Method
from stream_xp.domain.statistics import ALL, MetricMoments, MetricProducts
from stream_xp.engine.comparison import Comparison, Finding, Floats, Stratum, evidence
from stream_xp.engine.design import Margin, Test
from stream_xp.stats import batch as arrays
from stream_xp.stats.batch import CrossArrays, MeansArrays

Integers: TypeAlias = npt.NDArray[Any]
"""Exact whole numbers: int64 where they fit, Python ints otherwise."""
_T = TypeVar("_T")


def mean_findings(batch: Sequence[Comparison]) -> list[Finding]:
    """Findings of comparisons of one method of means that have equally many strata."""
    method = batch[0].plan.method
    rows = _rows(batch)
    means = _means(batch, method, rows)
    exact = _Exact(rows) if method is Method.EXACT_THEN_ASYMPTOTIC else None
    levels = _levels([comparison.effect for comparison in batch])
    effects = _effects(levels, means, exact)
    lifts = _lifts(levels, means, exact_share=0.0 if exact is None else stats.EXACT_SHARE)
    harms = _one_sided(batch, means, exact, safety=False)
    safeties = _one_sided(batch, means, exact, safety=True)
    unseen = [effect is None for effect in effects]
    columns = (  # fields of `Finding`
        rows.control.n.sum(axis=1).tolist(),
        rows.arm.n.sum(axis=1).tolist(),
        _unless(unseen, means.control_mean.tolist()),
        _unless(unseen, means.treatment_mean.tolist()),
        effects,
        lifts,
        harms,
        safeties,
        repeat(()),
        repeat(None),
        [_NOTES[code] for code in means.reason.tolist()],
        _errors(batch, means),
    )
    return list(map(Finding, *columns))


def _errors(batch: Sequence[Comparison], means: MeansArrays) -> list[float | None]:
    """Standard errors of the effects, where the rule of the spec or a segment asks for them and there are any."""
    asked = [one.plan.standard_error or one.segment != ALL for one in batch]
    if not any(asked):
        return [None] * len(batch)
    errors = _difference(means)[1].tolist()
    return [error if mine and error > 0 else None for mine, error in zip(asked, errors, strict=True)]


_NOTES = (None, *arrays.REASONS[1:])


# --- from exact rows to means ----------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Exact integers of one arm, each (comparisons, strata): units, sums of values and of their squares."""

    n: Integers
    s: Integers
    q: Integers


class _Rows(NamedTuple):
    """The rows of a batch, by columns.

    Attributes:
        strata: of all comparisons, one after the other.
        control, arm: sums of their rows.
    """

    strata: Sequence[Stratum]
    control: _Sums
    arm: _Sums


def _rows(batch: Sequence[Comparison]) -> _Rows:
    strata = [stratum for comparison in batch for stratum in comparison.strata or _NO_STRATA]
    sides = ([stratum.control for stratum in strata], [stratum.arm for stratum in strata])
    return _Rows(strata, *(_sums(side, len(batch)) for side in sides))


_NO_STRATA = (Stratum(0, None, None, None),)


def _sums(rows: Sequence[MetricMoments | None], comparisons: int) -> _Sums:
    filled = [_NOBODY if row is None else row for row in rows]
    columns = ([row.n for row in filled], [int(row.s) for row in filled], [int(row.q) for row in filled])
    return _Sums(*(_whole(column).reshape(comparisons, -1) for column in columns))


_NOBODY = MetricMoments("", "", 0, "", 0, "0", "0")


def _whole(column: Any) -> Integers:
    try:
        return np.array(column, np.int64)
    except OverflowError:
        return np.array(column, object)


def _means(batch: Sequence[Comparison], method: Method, rows: _Rows) -> MeansArrays:
    scale = [comparison.plan.step for comparison in batch]
    if method in (Method.EXACT_THEN_ASYMPTOTIC, Method.ASYMPTOTIC):
        control, arm = (arrays.MomentArrays(*sums) for sums in (rows.control, rows.arm))
        return arrays.summarise_arrays(control, arm, scale=scale)
    pair = _crosses(rows)
    x_scale = [_x_scale(comparison) for comparison in batch]
    if method is Method.RATIO:
        return stats.ratio_means_arrays(*pair, scale_x=x_scale, scale_y=scale)
    adjust = stats.cuped_arrays if method is Method.CUPED else stats.ancova_arrays
    return adjust(*pair, scale_x=x_scale, scale_y=scale)


def cross_sums(batch: Sequence[Comparison]) -> tuple[CrossArrays, CrossArrays]:
    """Exact sums (comparisons, strata) of x and y, of the controls and of the arms; all have equally many strata."""
    return _crosses(_rows(batch))


def _crosses(rows: _Rows) -> tuple[CrossArrays, CrossArrays]:
    strata = rows.strata
    return (
        _cross(rows.control, [(stratum.control, stratum.control_products) for stratum in strata]),
        _cross(rows.arm, [(stratum.arm, stratum.arm_products) for stratum in strata]),
    )


def _cross(sums: _Sums, rows: Sequence[tuple[MetricMoments | None, MetricProducts | None]]) -> CrossArrays:
    """Sums of x, x * x and x * y beside those of y, for each row of moments."""
    if any(row is not None and products is None for row, products in rows):
        raise ValueError("products must stand beside every row of moments")
    filled = [_NO_PRODUCTS if row is None or products is None else products for row, products in rows]
    columns = (
        [int(row.x) for row in filled],
        [int(row.xx) for row in filled],
        [int(row.xy) for row in filled],
    )
    x, xx, xy = (_whole(column).reshape(sums.n.shape) for column in columns)
    return CrossArrays(n=sums.n, sx=x, sy=sums.s, sxx=xx, syy=sums.q, sxy=xy)


_NO_PRODUCTS = MetricProducts("", "", 0, "", "0", "0", "0")


def _x_scale(comparison: Comparison) -> float:
    plan = comparison.plan
    denominator = plan.metric.denominator
    return plan.covariate_step if denominator is None else denominator.step


# --- asymptotic sequences, with exact tests where there are any --------------------------------------------


def _effects(levels: _Levels, means: MeansArrays, exact: _Exact | None) -> list[Evidence | None]:
    alpha, rho2, thresholds = levels
    if exact is None:
        found = arrays.mean_difference_arrays(means, alpha=alpha, rho2=rho2)
        shown = evidence(found.estimate, (found.lower, found.upper), found.log_e, thresholds)
        return _unless((found.reason != 0).tolist(), shown)
    estimate, se = _difference(means)
    early = stats.early_two_sided(
        estimate,
        se,
        _intrinsic(means, rho2),
        alpha=alpha,
        log_e_above=exact.log_e("above"),
        log_e_below=exact.log_e("below"),
    )
    shown = evidence(estimate, (early.lower, early.upper), early.log_e, thresholds)
    return _unless(exact.empty.tolist(), shown)


def _difference(means: MeansArrays) -> tuple[Floats, Floats]:
    """Differences and their standard errors, 0 where the asymptotic sequence has not begun."""
    estimate, variance = arrays.excess_arrays(means, margin=0.0, margin_kind="absolute")
    return estimate, np.where(means.undetermined, 0.0, np.sqrt(variance))


def _intrinsic(means: MeansArrays, rho2: Floats) -> Floats:
    return np.maximum(means.n, 1.0) * rho2


def _lifts(levels: _Levels, means: MeansArrays, *, exact_share: float) -> list[Evidence | None]:
    """Lifts by the asymptotic part alone, at its share of alpha: a lift that leaves 0 out is a proven effect."""
    alpha, rho2, thresholds = levels
    share = 1.0 - exact_share
    found = arrays.relative_lift_arrays(means, alpha=share * alpha, rho2=rho2)
    log_e = found.log_e + math.log(share)
    shown = evidence(found.estimate, (found.lower, found.upper), log_e, thresholds)
    return _unless((found.reason != 0).tolist(), shown)


def _one_sided(
    batch: Sequence[Comparison], means: MeansArrays, exact: _Exact | None, *, safety: bool
) -> list[Evidence | None]:
    """Tests of harm, or of safety, of each comparison; only guardrails have one."""
    guards = [at for at, comparison in enumerate(batch) if comparison.guards]
    shown: list[Evidence | None] = [None] * len(batch)
    if guards:
        tested = _guards(batch, means, exact, guards, safety=safety)
        for at, one in zip(guards, tested, strict=True):
            shown[at] = one
    return shown


def _guards(
    batch: Sequence[Comparison],
    means: MeansArrays,
    exact: _Exact | None,
    guards: Sequence[int],
    *,
    safety: bool,
) -> list[Evidence | None]:
    """Tests of harm, or of safety, of the comparisons at `guards`."""
    plans = [batch[at].plan for at in guards]
    tests = [plan.safety if safety else plan.harm for plan in plans]
    margins = [plan.margin if safety else plan.harm_margin for plan in plans]
    above = np.array([plan.harm_above != safety for plan in plans])
    alpha, rho2, thresholds = _levels([test for test in tests if test is not None])
    mine = _part(means, guards)
    margin, kind = np.array([m.value for m in margins]), np.array([m.kind for m in margins])
    if exact is None:
        found = arrays.one_sided_test_arrays(
            mine,
            margin=margin,
            margin_kind=kind,
            side=np.where(above, "above", "below"),
            alpha=alpha,
            rho2=rho2,
        )
        shown = evidence(found.estimate, (found.lower, found.upper), found.log_e, thresholds)
        return _unless((found.reason != 0).tolist(), shown)
    excess, variance = arrays.excess_arrays(mine, margin=margin, margin_kind=kind)
    early = stats.early_one_sided(
        excess,
        np.where(mine.undetermined, 0.0, np.sqrt(variance)),
        _intrinsic(mine, rho2),
        alpha=alpha,
        above=above,
        log_e_exact=exact.guard_log_e(guards, margins, above),
    )
    shown = evidence(excess, (early.lower, early.upper), early.log_e, thresholds)
    return _unless(exact.empty[guards].tolist(), shown)


_Levels: TypeAlias = tuple[Floats, Floats, Sequence[float]]
"""Error levels, tunings and thresholds of many tests."""


def _levels(tests: Sequence[Test]) -> _Levels:
    return (
        np.array([test.alpha for test in tests]),
        np.array([test.rho2 for test in tests]),
        [test.threshold_log_e for test in tests],
    )


def _part(means: MeansArrays, at: Sequence[int]) -> MeansArrays:
    index = np.asarray(at)
    fields: dict[str, Any] = {name: getattr(means, name)[index] for name in means.__slots__}
    return replace(means, **fields)


def _unless(lost: Sequence[bool], shown: Sequence[_T]) -> list[_T | None]:
    return [None if none else one for one, none in zip(shown, lost, strict=True)]


# --- exact tests of conversions ----------------------------------------------------------------------------


class _Exact:
    """Exact log e-values of two conversion rates, from counts per weight epoch and logged shares.

    An epoch whose share is not known (the record is behind, or an arm has weight 0) is left out: there the labels
    have no distribution to be tested against.

    Attributes:
        empty: comparisons without a weight epoch that has units in both arms; there is nothing to report.
    """

    def __init__(self, rows: _Rows) -> None:
        shape = rows.control.n.shape
        share = np.array([stratum.share for stratum in rows.strata], np.float64).reshape(shape)
        known = ~np.isnan(share)
        share = np.where(known, share, 0.0)
        self._weights = np.stack((1.0 - share, share), axis=-1)
        self._weights[share == 0] = 0.0
        self._units = _pairs(known, rows.control.n, rows.arm.n)
        self._successes = _pairs(known, rows.control.s, rows.arm.s)
        both = [stratum.control is not None and stratum.arm is not None for stratum in rows.strata]
        self.empty: npt.NDArray[np.bool_] = ~np.any(np.array(both).reshape(shape), axis=1)

    def log_e(self, side: stats.Sides) -> Floats:
        """Against "the arm's rate is not above (below) the control's", for every comparison.

        A wrong sample ratio must not pass for an effect before its own test has found it.
        """
        return self._label_log_e(slice(None), side)

    def _label_log_e(self, rows: Any, side: stats.Sides) -> Floats:
        units, weights = self._units[rows], self._weights[rows]
        log_e = stats.conversion_log_e(units, self._successes[rows], weights=weights, side=side)
        return log_e - stats.assignment_deviance(units, weights)

    def guard_log_e(self, guards: Sequence[int], margins: Sequence[Margin], above: Any) -> Floats:
        """Against "the excess over the margin is not above (below) 0", for the comparisons at `guards`.

        Without a margin by label prediction, with a relative one by the successes alone, both under any drift.
        With an absolute one by two one-sample processes, which need constant rates and so one weight epoch; with
        more epochs there is no exact test, and the asymptotic part stands alone.
        """
        log_e = np.full(len(guards), -np.inf)
        groups: dict[tuple[Margin, bool], list[int]] = {}
        for at, (margin, side) in enumerate(zip(margins, above.tolist(), strict=True)):
            groups.setdefault((margin, side), []).append(at)
        for (margin, side), members in groups.items():
            rows = np.asarray(guards)[members]
            log_e[members] = self._margin_log_e(rows, margin, "above" if side else "below")
        return log_e

    def _margin_log_e(self, rows: Any, margin: Margin, side: stats.Side) -> Floats:
        units, successes, weights = self._units[rows], self._successes[rows], self._weights[rows]
        if margin.value == 0:
            return self._label_log_e(rows, side)
        if margin.relative:
            null = float(np.log1p(margin.value))
            log_e = stats.success_ratio_log_e(successes, weights, null=null, side=side)
            return log_e - stats.assignment_deviance(units, weights)
        if units.shape[1] > 1 or abs(margin.value) > 1:  # no two rates are further apart
            return np.full(len(rows), -np.inf)
        return np.asarray(
            stats.bernoulli_pair_log_e(units[:, 0], successes[:, 0], margin=margin.value, side=side)
        )


def _pairs(known: Any, control: Integers, arm: Integers) -> Integers:
    """Counts (comparisons, strata, 2), 0 where the share is not known."""
    return _whole(np.where(known[..., np.newaxis], np.stack((control, arm), axis=-1), 0))
