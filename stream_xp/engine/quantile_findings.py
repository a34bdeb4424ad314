"""Tests of latencies: quantiles and the whole distribution, from exact histograms.

Histograms of different weight epochs are never added: under a ramp the arms would be mixtures of different times.
Every epoch has a test of its own at its share of the level, 1 / ((e + 1) (e + 2)) for epoch e, which sums to 1 over
all epochs there may ever be; what one epoch refutes is refuted. That asks for one effect in all epochs. Where they
contradict each other no effect is left, and the comparison is undetermined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from stream_xp import stats
from stream_xp.domain.decision import Evidence, QuantileResult
from stream_xp.domain.statistics import MetricHistogram
from stream_xp.engine.comparison import Comparison, Finding, Floats, Stratum, evidence, nothing_found
from stream_xp.engine.design import Margin, Plan, Test

BAND_FROM = 100
"""Values of an arm from which the band around its distribution function holds."""
COMBINATION: Final = "product"
"""Of the two arms' e-values: half the sample of their average where both arms have many values."""
CONTRADICTION = "the weight epochs contradict each other"


def quantile_findings(batch: Sequence[Comparison]) -> list[Finding]:
    """Findings of latencies."""
    return [_finding(comparison) for comparison in batch]


def epoch_share(epoch: int) -> float:
    """The share of every level that a weight epoch has; all there may ever be sum to 1."""
    return 1.0 / ((epoch + 1) * (epoch + 2))


def arm_concentration(pair_sample: float, test: Test, side: stats.Sides) -> float:
    """Tuning of a quantile's mixture, for an arm of half the pair, whatever the weights become."""
    return stats.quantile_concentration(pair_sample / 2, test.alpha / 2, side=side)


class _Pair(NamedTuple):
    """Both arms in one weight epoch, and its share of every level."""

    control: stats.Sample
    arm: stats.Sample
    share: float


def _finding(comparison: Comparison) -> Finding:
    plan = comparison.plan
    pairs = [_pair(s, plan) for s in comparison.strata if s.control is not None and s.arm is not None]
    if not pairs:
        return nothing_found(comparison, stats.NO_VALUES)
    effects = _tests(pairs, plan, comparison.effect)
    if any(_empty(effect) for effect in effects):
        return nothing_found(comparison, CONTRADICTION)
    harms = safeties = None
    if comparison.guards and plan.harm is not None and plan.safety is not None:
        harms = _tests(pairs, plan, plan.harm, plan.harm_margin, above=plan.harm_above)
        safeties = _tests(pairs, plan, plan.safety, plan.margin, above=not plan.harm_above)
    values = [_values(rows, plan) for rows in _arms(comparison)]
    quantiles = tuple(
        QuantileResult(
            quantile=q,
            control_value=float(values[0][at]),
            arm_value=float(values[1][at]),
            effect=effects[at],
            harm=None if harms is None else harms[at],
            safety=None if safeties is None else safeties[at],
        )
        for at, q in enumerate(plan.metric.tested_quantiles)
    )
    return Finding(
        *comparison.units,
        effect=max(effects, key=_strength),
        harm=None if harms is None else max(harms, key=_strength),
        safety=None if safeties is None else min(safeties, key=_strength),
        quantiles=quantiles,
        distribution=_distribution(pairs, comparison),
    )


def _pair(stratum: Stratum, plan: Plan) -> _Pair:
    control, arm = (_sample([row], plan) for row in (stratum.control, stratum.arm))
    return _Pair(control, arm, epoch_share(stratum.epoch) * stratum.part)


def _sample(rows: Sequence[MetricHistogram], plan: Plan) -> stats.Sample:
    merged = stats.LogHistogram.empty()
    for row in rows:
        merged = merged.merge(stats.LogHistogram(row.bins))
    return stats.Sample.from_histogram(merged, plan.step)


def _arms(comparison: Comparison) -> tuple[list[MetricHistogram], list[MetricHistogram]]:
    strata = comparison.strata
    return (
        [s.control for s in strata if s.control is not None],
        [s.arm for s in strata if s.arm is not None],
    )


def _values(rows: Sequence[MetricHistogram], plan: Plan) -> Floats:
    """Sample quantiles of an arm, all epochs together: for people to look at, nothing is tested on them."""
    quantiles = np.array(plan.metric.tested_quantiles)
    found = stats.quantile(_sample(rows, plan), quantiles, alpha=0.5, concentration=1.0)
    assert isinstance(found, stats.QuantileSequence)  # noqa: S101 (there are values)
    return np.asarray(found.estimate)


def _tests(
    pairs: Sequence[_Pair],
    plan: Plan,
    test: Test,
    margin: Margin | None = None,
    *,
    above: bool | None = None,
) -> list[Evidence]:
    """Evidence about each quantile: of the effect, or with a margin of the excess over it."""
    side: stats.Sides = "both" if above is None else "above" if above else "below"
    edge = margin or Margin(0.0, relative=False)
    found = [_test(pair, plan, test, edge, side=side) for pair in pairs]
    # What one epoch refutes is refuted: the sequences are intersected, and the strongest e-value counts.
    log_e = np.max([log_e for _, log_e in found], axis=0)
    sequences = [sequence for sequence, _ in found]
    lower = np.max([np.asarray(one.lower) for one in sequences], axis=0)
    upper = np.min([np.asarray(one.upper) for one in sequences], axis=0)
    sizes = [float(pair.control.n + pair.arm.n) for pair in pairs]
    estimate = np.average([np.asarray(one.estimate) for one in sequences], axis=0, weights=sizes)
    bounds = (lower - edge.value, upper - edge.value)
    return evidence(estimate - edge.value, bounds, log_e, [test.threshold_log_e] * len(log_e))


def _test(
    pair: _Pair, plan: Plan, test: Test, margin: Margin, *, side: stats.Sides
) -> tuple[stats.QuantileSequence, Floats]:
    quantiles = np.array(plan.metric.tested_quantiles)
    alpha = test.alpha * pair.share
    concentration = arm_concentration(plan.pair_sample, test, side)
    sequence = stats.quantile_difference(
        pair.control,
        pair.arm,
        quantiles,
        alpha=alpha,
        concentration=concentration,
        combination=COMBINATION,
        relative=margin.relative,
        side=side,
    )
    log_e = stats.quantile_difference_log_e(
        pair.control,
        pair.arm,
        quantiles,
        margin=margin.value,
        concentration=concentration,
        combination=COMBINATION,
        relative=margin.relative,
        side=side,
    )
    assert isinstance(sequence, stats.QuantileSequence)  # noqa: S101 (both arms have values)
    return sequence, np.asarray(log_e) + math.log(pair.share)


def _strength(evidence: Evidence) -> float:
    return evidence.log_e - evidence.threshold_log_e


def _empty(effect: Evidence) -> bool:
    return effect.lower is not None and effect.upper is not None and effect.lower > effect.upper


def _distribution(pairs: Sequence[_Pair], comparison: Comparison) -> Evidence:
    """Whether the arms have one distribution, in the epoch that speaks most clearly against it.

    The e-value tests; the bounds of the largest distance of the two distribution functions are those of two
    time-uniform bands, which say more of where the distributions differ and less of whether they do.
    """
    test = comparison.effect
    alpha = test.alpha * len(comparison.plan.metric.tested_quantiles)  # one test, not one for each quantile
    concentration = stats.quantile_concentration(comparison.plan.pair_sample / 2, alpha / 4)
    rows = []
    for pair in pairs:
        found = stats.distribution_difference(
            pair.control, pair.arm, alpha=alpha * pair.share, n_min=BAND_FROM, concentration=concentration
        )
        assert isinstance(found, stats.DistributionDifference)  # noqa: S101 (both arms have values)
        rows.append((found.log_e + math.log(pair.share), found.separation, found.radius))
    log_e, separation, radius = max(rows)
    lower, upper = max(separation - radius, 0.0), min(separation + radius, 1.0)
    columns = (np.array([value]) for value in (separation, lower, upper, log_e))
    estimate, low, high, log = columns
    (shown,) = evidence(estimate, (low, high), log, [-math.log(alpha)])
    return shown
