"""Tests of event rates: counts of units with an event, by the labels of their first events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stream_xp import stats
from stream_xp.domain.decision import Evidence
from stream_xp.domain.statistics import MetricEvents
from stream_xp.engine.comparison import (
    Comparison,
    Finding,
    Floats,
    Stratum,
    evidence,
    grouped,
    nothing_found,
)
from stream_xp.engine.design import Margin, Test

_Counts = npt.NDArray[np.int64]
NO_EVENTS = "no event has been counted"


def rate_findings(batch: Sequence[Comparison]) -> list[Finding]:
    """Findings of counts that have equally many strata.

    Given that a unit has its first event, its arm has a known distribution under equal rates: the logged shares of
    its weight epoch, whatever the rates do over time. Units still open count as well, because nobody is compared
    with those who have had none.
    """
    rows = [[_first_events(stratum) for stratum in one.strata] or [_NOBODY] for one in batch]
    table = np.array(rows, np.float64)
    weights = np.stack((1.0 - table[..., 0], table[..., 0]), axis=-1)
    weights[table[..., 0] == 0] = 0.0
    events = table[..., 1:].astype(np.int64)
    tests = grouped(batch, lambda comparison: comparison.effect)
    found: list[_Found] = [(None, None)] * len(batch)
    for test, members in tests.items():
        for at, one in zip(members, _effects(events[members], weights[members], test), strict=True):
            found[at] = one
    harms = _one_sided(batch, events, weights, safety=False)
    safeties = _one_sided(batch, events, weights, safety=True)
    return [
        nothing_found(comparison, NO_EVENTS)
        if effect is None
        else Finding(*comparison.units, effect=effect, lift=lift, harm=harms.get(at), safety=safeties.get(at))
        for at, (comparison, (effect, lift)) in enumerate(zip(batch, found, strict=True))
    ]


_Found: TypeAlias = tuple[Evidence | None, Evidence | None]
"""Effect and lift."""
_NOBODY = (0.0, 0, 0)


def _first_events(stratum: Stratum) -> tuple[float, int, int]:
    if stratum.share is None:
        return _NOBODY
    return (stratum.share, _events(stratum.control), _events(stratum.arm))


def _events(row: MetricEvents | None) -> int:
    return 0 if row is None else row.units


def _effects(events: _Counts, weights: Floats, test: Test) -> list[_Found]:
    """The log rate ratio, and the rate ratio minus 1 as the lift: one sequence on two scales."""
    found = _log_ratios(stats.success_ratio(events, weights, alpha=test.alpha))
    thresholds = [test.threshold_log_e] * len(events)
    ratio = evidence(found.estimate, (found.lower, found.upper), found.log_e, thresholds)
    grown = [np.expm1(np.minimum(side, _LARGEST)) for side in (found.estimate, found.lower, found.upper)]
    bounds = (
        np.where(np.isneginf(found.lower), -1.0, grown[1]),
        np.where(found.upper > _LARGEST, np.inf, grown[2]),
    )
    lift = evidence(grown[0], bounds, found.log_e, thresholds)
    infinite = ~np.isfinite(found.estimate)
    return [
        _shown(effect, change, infinite=lost, determined=known)
        for effect, change, lost, known in zip(
            ratio, lift, infinite.tolist(), found.determined.tolist(), strict=True
        )
    ]


_LARGEST = 700.0


class _LogRatios(NamedTuple):
    """`stats.LogRatio` of many looks."""

    log_e: Floats
    estimate: Floats
    lower: Floats
    upper: Floats
    determined: npt.NDArray[np.bool_]


def _log_ratios(found: stats.LogRatio | stats.Undetermined) -> _LogRatios:
    assert isinstance(found, stats.LogRatio)  # noqa: S101 (many looks are never undetermined as a whole)
    return _LogRatios(*(np.asarray(getattr(found, name)) for name in _LogRatios._fields))


def _shown(effect: Evidence, lift: Evidence, *, infinite: bool, determined: bool) -> _Found:
    if not determined:
        return (None, None)
    return (_without_estimate(effect), None) if infinite else (effect, lift)


def _without_estimate(effect: Evidence) -> Evidence:
    """While one arm has no event the log rate ratio has no estimate, but a bound and an e-value."""
    return Evidence(
        estimate=None,
        lower=effect.lower,
        upper=effect.upper,
        log_e=effect.log_e,
        p_always_valid=effect.p_always_valid,
        threshold_log_e=effect.threshold_log_e,
    )


def _one_sided(
    batch: Sequence[Comparison], events: _Counts, weights: Floats, *, safety: bool
) -> dict[int, Evidence]:
    """Tests of harm, or of safety, against the relative margin, on the scale of the log rate ratio over it."""
    guards = [at for at, comparison in enumerate(batch) if comparison.guards]
    shown: dict[int, Evidence] = {}
    groups: dict[tuple[Margin, bool, Test], list[int]] = {}
    for at in guards:
        plan = batch[at].plan
        test, margin = (plan.safety, plan.margin) if safety else (plan.harm, plan.harm_margin)
        if test is not None:
            groups.setdefault((margin, plan.harm_above != safety, test), []).append(at)
    for (margin, above, test), members in groups.items():
        null = math.log1p(margin.value)
        side: stats.Sides = "above" if above else "below"
        found = _log_ratios(
            stats.success_ratio(events[members], weights[members], alpha=test.alpha, null=null, side=side)
        )
        excess = np.where(np.isfinite(found.estimate), found.estimate, 0.0) - null
        bounds = (found.lower - null, found.upper - null)
        rows = evidence(excess, bounds, found.log_e, [test.threshold_log_e] * len(members))
        shown |= dict(zip(members, rows, strict=True))
    return shown
