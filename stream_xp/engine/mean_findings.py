"""Tests of means: conversions, means, adjusted means and ratios, many comparisons at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stream_xp import stats
from stream_xp.domain.decision import Evidence, Method
from stream_xp.domain.statistics import MetricMoments, MetricProducts
from stream_xp.engine.comparison import Comparison, Finding, Floats, Stratum, evidence
from stream_xp.engine.design import Margin, Test
from stream_xp.stats import batch as arrays
from stream_xp.stats.batch import MeansArrays


def mean_findings(batch: Sequence[Comparison]) -> list[Finding]:
    """Findings of comparisons of one method of means that have equally many strata."""
    method = batch[0].plan.method
    means = _means(batch, method)
    exact = _Exact(batch) if method is Method.EXACT_THEN_ASYMPTOTIC else None
    effects = _effects(batch, means, exact)
    lifts = _lifts(batch, means, exact_share=0.0 if exact is None else stats.EXACT_SHARE)
    guards = [at for at, comparison in enumerate(batch) if comparison.guards]
    harms = _one_sided(batch, means, exact, guards, safety=False)
    safeties = _one_sided(batch, means, exact, guards, safety=True)
    control, arm = means.control_mean.tolist(), means.treatment_mean.tolist()
    notes = [arrays.REASONS[code] for code in means.reason.tolist()]
    findings = []
    for at, note in enumerate(notes):
        undetermined = bool(note)
        if undetermined and effects[at] is None:
            findings.append(Finding(note=note))
            continue
        findings.append(
            Finding(
                control_mean=control[at],
                arm_mean=arm[at],
                effect=effects[at],
                lift=lifts[at],
                harm=harms.get(at),
                safety=safeties.get(at),
                note=note or None,
            )
        )
    return findings


# --- from exact rows to means ----------------------------------------------------------------------------


def _means(batch: Sequence[Comparison], method: Method) -> MeansArrays:
    scale = [comparison.plan.step for comparison in batch]
    if method in (Method.EXACT_THEN_ASYMPTOTIC, Method.ASYMPTOTIC):
        return arrays.summarise_arrays(_moments(batch, "control"), _moments(batch, "arm"), scale=scale)
    control, treatment = _cross(batch, "control"), _cross(batch, "arm")
    x_scale = [_x_scale(comparison) for comparison in batch]
    if method is Method.RATIO:
        return stats.ratio_means_arrays(control, treatment, scale_x=x_scale, scale_y=scale)
    adjust = stats.cuped_arrays if method is Method.CUPED else stats.ancova_arrays
    return adjust(control, treatment, scale_x=x_scale, scale_y=scale)


def _moments(batch: Sequence[Comparison], side: str) -> arrays.MomentArrays:
    control = side == "control"
    rows = [
        _moment_row(stratum.control if control else stratum.arm)
        for comparison in batch
        for stratum in comparison.strata or _NO_STRATA
    ]
    return arrays.MomentArrays(*_columns(rows, len(batch)))


_NO_STRATA = (Stratum(0, None, None, None),)


def _columns(rows: Sequence[tuple[int, ...]], comparisons: int) -> list[Any]:
    """Exact integers by field, each (comparisons, strata)."""
    return [_whole(column).reshape(comparisons, -1) for column in zip(*rows, strict=True)]


def _whole(column: tuple[int, ...]) -> Any:
    try:
        return np.array(column, np.int64)
    except OverflowError:
        return np.array(column, object)


def _moment_row(row: MetricMoments | None) -> tuple[int, int, int]:
    return (0, 0, 0) if row is None else (row.n, int(row.s), int(row.q))


def _cross(batch: Sequence[Comparison], side: str) -> arrays.CrossArrays:
    control = side == "control"
    rows = [
        _cross_row(stratum.control, stratum.control_products)
        if control
        else _cross_row(stratum.arm, stratum.arm_products)
        for comparison in batch
        for stratum in comparison.strata or _NO_STRATA
    ]
    return arrays.CrossArrays(*_columns(rows, len(batch)))


def _cross_row(row: MetricMoments | None, products: MetricProducts | None) -> tuple[int, ...]:
    """The fields of `CrossArrays`: n, sums of x, y, x * x, y * y, x * y."""
    if row is None:
        return (0,) * 6
    if products is None:
        raise ValueError("products must stand beside every row of moments")
    return (row.n, int(products.x), int(row.s), int(products.xx), int(row.q), int(products.xy))


def _x_scale(comparison: Comparison) -> float:
    plan = comparison.plan
    denominator = plan.metric.denominator
    return plan.covariate_step if denominator is None else denominator.step


# --- asymptotic sequences, with exact tests where there are any --------------------------------------------


def _effects(batch: Sequence[Comparison], means: MeansArrays, exact: _Exact | None) -> list[Evidence | None]:
    tests = [comparison.effect for comparison in batch]
    alpha, rho2, thresholds = _levels(tests)
    if exact is None:
        found = arrays.mean_difference_arrays(means, alpha=alpha, rho2=rho2)
        shown = evidence(found.estimate, (found.lower, found.upper), found.log_e, thresholds)
        return _unless(found.reason != 0, shown)
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
    return _unless(exact.empty, shown)


def _difference(means: MeansArrays) -> tuple[Floats, Floats]:
    """Differences and their standard errors, 0 where the asymptotic sequence has not begun."""
    estimate, variance = arrays.excess_arrays(means, margin=0.0, margin_kind="absolute")
    return estimate, np.where(means.undetermined, 0.0, np.sqrt(variance))


def _intrinsic(means: MeansArrays, rho2: Floats) -> Floats:
    return np.maximum(means.n, 1.0) * rho2


def _lifts(batch: Sequence[Comparison], means: MeansArrays, *, exact_share: float) -> list[Evidence | None]:
    """Lifts by the asymptotic part alone, at its share of alpha: a lift that leaves 0 out is a proven effect."""
    alpha, rho2, thresholds = _levels([comparison.effect for comparison in batch])
    share = 1.0 - exact_share
    found = arrays.relative_lift_arrays(means, alpha=share * alpha, rho2=rho2)
    log_e = found.log_e + math.log(share)
    shown = evidence(found.estimate, (found.lower, found.upper), log_e, thresholds)
    return _unless(found.reason != 0, shown)


def _one_sided(
    batch: Sequence[Comparison],
    means: MeansArrays,
    exact: _Exact | None,
    guards: Sequence[int],
    *,
    safety: bool,
) -> dict[int, Evidence]:
    """Tests of harm, or of safety, for the guardrails among the comparisons."""
    if not guards:
        return {}
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
        return {
            at: one for at, one, code in zip(guards, shown, found.reason.tolist(), strict=True) if not code
        }
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
    return {at: one for at, one in zip(guards, shown, strict=True) if not exact.empty[at]}


def _levels(tests: Sequence[Test]) -> tuple[Floats, Floats, list[float]]:
    return (
        np.array([test.alpha for test in tests]),
        np.array([test.rho2 for test in tests]),
        [test.threshold_log_e for test in tests],
    )


def _part(means: MeansArrays, at: Sequence[int]) -> MeansArrays:
    index = np.asarray(at)
    fields: dict[str, Any] = {name: getattr(means, name)[index] for name in means.__slots__}
    return replace(means, **fields)


def _unless(undetermined: Any, shown: Sequence[Evidence]) -> list[Evidence | None]:
    return [None if lost else one for one, lost in zip(shown, undetermined.tolist(), strict=True)]


# --- exact tests of conversions ----------------------------------------------------------------------------


class _Exact:
    """Exact log e-values of two conversion rates, from counts per weight epoch and logged shares.

    An epoch whose share is not known (the record is behind, or an arm has weight 0) is left out: there the labels
    have no distribution to be tested against.

    Attributes:
        empty: comparisons without a weight epoch that has units in both arms; there is nothing to report.
    """

    def __init__(self, batch: Sequence[Comparison]) -> None:
        counts = [
            _conversions(stratum) for comparison in batch for stratum in comparison.strata or _NO_STRATA
        ]
        table = np.array(counts, np.float64).reshape(len(batch), -1, 5)  # share, units, successes
        self._weights = np.stack((1.0 - table[..., 0], table[..., 0]), axis=-1)
        self._weights[table[..., 0] == 0] = 0.0
        self._units = table[..., 1:3].astype(np.int64)
        self._successes = table[..., 3:5].astype(np.int64)
        everyone = np.array(
            [
                any(stratum.control is not None and stratum.arm is not None for stratum in comparison.strata)
                for comparison in batch
            ]
        )
        self.empty = ~everyone

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


_NOBODY = (0.0, 0, 0, 0, 0)


def _conversions(stratum: Stratum) -> tuple[float, int, int, int, int]:
    if stratum.share is None:
        return _NOBODY
    control, arm = _moment_row(stratum.control), _moment_row(stratum.arm)
    return (stratum.share, control[0], arm[0], control[1], arm[1])
