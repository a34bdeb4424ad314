"""Planning a quantile of a latency: when the confidence sequence of two arms' difference leaves the null.

The engine bounds a difference of quantiles through ranks and bins, so a plan needs a distribution: the baseline's
quantiles, joined by straight lines of ln(value) over the normal score of the rank (exact for a lognormal). The
treatment is taken to move all of it by the effect. Samples of such arms are drawn into the engine's bins, with the
same random numbers each time, and tested as the engine tests them. Power is that of *one* look at n units; who looks
all the time finds the effect no later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Final, NamedTuple, cast

import numpy as np
from scipy.special import ndtr, ndtri

from stream_xp import stats
from stream_xp.engine.design import Margin, Test
from stream_xp.engine.quantile_findings import COMBINATION, arm_concentration, epoch_share
from stream_xp.services.plan.questions import Question
from stream_xp.services.plan.report import Curve, Power, Samples
from stream_xp.services.plan.sequential import Numbers, Sides, critical, group_powers
from stream_xp.stats.log_histogram import bin_of, lower_edge
from stream_xp.stats.planning import effect_variance, first_look, fixed_power, fixed_sample
from stream_xp.stats.quantile import (
    Sample,
    quantile_difference,
    quantile_difference_log_e,
)

FIRST_EPOCH: Final = epoch_share(0)
"""Share of its level that the engine gives a quantile's sequence in the first weight epoch."""
PATHS: Final = 300
"""Samples drawn for a power, whose standard error is then at most 0.03."""

_SEED = 1
_CURVE_POINTS = 17
_SPAN = 200.0
_EDGE = 1e-12
_LARGEST_N = 1e10
_STEP = 1e-3
_SPAN_SDS = 12.0
_HALVINGS = 12


@dataclass(frozen=True)
class Quantile:
    """One quantile of a latency in the control arm; an outcome as in `outcomes.Outcome`.

    Attributes:
        p: which quantile.
        ranks, values: the baseline's quantiles, ascending.
    """

    p: float
    ranks: tuple[float, ...]
    values: tuple[float, ...]

    @cached_property
    def base(self) -> float:
        """The control's quantile."""
        return float(self.value(self.p))

    @cached_property
    def noise(self) -> float:
        """Variance of the quantile, times the units."""
        h = _STEP * min(self.p, 1.0 - self.p)
        slope = float(self.value(self.p + h) - self.value(self.p - h)) / (2.0 * h)
        return self.p * (1.0 - self.p) * slope**2

    def value(self, rank: Any) -> Any:
        """Value at a rank in (0, 1); beyond the baseline's quantiles its outermost lines go on."""
        score = ndtri(np.clip(rank, _EDGE, 1.0 - _EDGE))
        x, y = ndtri(np.array(self.ranks)), np.log(np.array(self.values))
        at = np.clip(np.searchsorted(x, score) - 1, 0, len(x) - 2)
        return np.exp(y[at] + (score - x[at]) * (y[at + 1] - y[at]) / (x[at + 1] - x[at]))

    def rank(self, value: Any) -> Any:
        """Share of units below a value: the inverse of `value`, and 0 at and below 0."""
        x, y = ndtri(np.array(self.ranks)), np.log(np.array(self.values))
        log = np.log(np.maximum(value, 1e-300))
        at = np.clip(np.searchsorted(y, log) - 1, 0, len(y) - 2)
        return ndtr(x[at] + (log - y[at]) * (x[at + 1] - x[at]) / (y[at + 1] - y[at]))

    def possible(self, effect: float) -> bool:
        """Whether a treatment arm can be that far from the control."""
        return self.base + effect > 0

    def edge(self, margin: Margin) -> float:
        """The edge of the null hypothesis as an absolute effect."""
        return margin.value * self.base if margin.relative else margin.value

    def distance(self, effect: float, margin: Margin) -> float:
        """From the edge of the null hypothesis to the true effect, signed."""
        return effect - self.edge(margin)

    def variance(self, effect: float, margin: Margin, share: float) -> float:  # noqa: ARG002
        """Variance of the difference of the arms' quantiles, times the units of the pair."""
        return float(effect_variance(self.noise, self.noise, treatment_share=share))

    def rho2(self, test: Test, effect: float, margin: Margin, share: float) -> float:  # noqa: ARG002
        """The design's own; the sequences of quantiles are tuned to the same sample in their own way."""
        return test.rho2

    def first_units(self, share: float) -> float:
        """Units at which the smaller arm is expected to have 25."""
        return float(first_look(share))

    def step_units(self, share: float) -> float:  # noqa: ARG002
        """Every unit counts."""
        return 1.0

    def rarest(self, share: float) -> float:
        """Units beyond the quantile in the smaller arm."""
        return min(share, 1.0 - share) * min(self.p, 1.0 - self.p)


def quantile_of(p: float, quantiles: dict[float, float]) -> Quantile:
    """The outcome of one quantile from a baseline."""
    ranks, values = zip(*sorted(quantiles.items()), strict=True)
    return Quantile(p, ranks, values)


def quantile_numbers(question: Question, *, tuned: float, planned: float, power: float) -> Numbers:
    """Plan one question about a quantile.

    Args:
        question: its outcome is a `Quantile`.
        tuned: units of the pair at which the sequences are tuned.
        planned: units of the pair in the planned sample.
        power: aimed at.
    """
    signal, sides = question.signal(), cast("Sides", question.sides)
    group, first = group_powers(question, power=power), question.outcome.first_units(question.pair.share)

    @lru_cache(maxsize=256)
    def one_look(n: float) -> float:
        return _power(question, n, tuned)

    def powers(n: float) -> tuple[float, float, float]:
        fixed = fixed_power(signal, 1.0, n=n, alpha=question.test.alpha, sides=sides)
        return one_look(n), float(fixed), group.power(signal, n)

    samples = Samples(
        for_power=_least(lambda n: one_look(n) >= power, start=max(first, planned / 4.0)),
        median=_least(lambda n: one_look(n) >= 0.5, start=max(first, planned / 4.0)),
        fixed=float(fixed_sample(signal, 1.0, alpha=question.test.alpha, power=power, sides=sides)),
        group_sequential=group.largest(signal),
        group_sequential_expected=group.expected(signal),
    )
    last = max(2.0 * planned, 1.25 * (samples.for_power or 0.0))
    return Numbers(
        power=Power(**_named(Power, powers(planned))),
        units=samples,
        half_width=_half_width(question, planned, tuned),
        curve=_curve(question, powers, tuned, ends=(first, last)),
    )


def quantile_detectable(question: Question, *, tuned: float, planned: float, power: float) -> Question | None:
    """The question with the smallest effect, or for safety the smallest margin, that the planned sample finds."""

    def found(distance: float) -> bool:
        moved = _moved(question, distance)
        return moved is not None and _power(moved, planned, tuned) >= power

    # Without an effect that is possible this does not end by itself.
    largest = 10.0 * cast("Quantile", question.outcome).base
    distance = _least(found, start=math.sqrt(question.variance_without_effect() / planned), limit=largest)
    return None if distance is None else _moved(question, distance)


# Samples in the engine's bins ----------------------------------------------------------------------


class _Cells(NamedTuple):
    """Bins around a quantile, with each arm's probabilities."""

    edges: Any
    control: Any
    treatment: Any


def _cells(question: Question, n: float) -> _Cells:
    """Bins within 12 standard deviations of the quantile's rank, all others in one bin below and one above."""
    outcome, share = cast("Quantile", question.outcome), question.pair.share
    effect = 0.0 if math.isnan(question.effect) else question.effect
    spread = _SPAN_SDS * math.sqrt(outcome.p * (1.0 - outcome.p) / (min(share, 1.0 - share) * n))
    ends = outcome.value(np.array([outcome.p - spread, outcome.p + spread]))
    step, most = question.plan.metric.step, question.plan.metric.max_steps
    low, high = (
        bin_of(int(np.clip(value / step, 0, most)))
        for value in (min(ends[0], ends[0] + effect), max(ends[1], ends[1] + effect))
    )
    inner = lower_edge(np.arange(low, high + 2)).astype(np.float64) * step
    # A value is rounded to whole steps before it is binned.
    cuts = inner - 0.5 * step
    control, treatment = (np.diff([0.0, *outcome.rank(cuts - shift), 1.0]) for shift in (0.0, effect))
    below = [0.0] if inner[0] > 0 else [-step]
    return _Cells(np.array([*below, *inner, 2.0 * inner[-1]]), control, treatment)


def _arms(question: Question, n: float) -> tuple[int, int]:
    share = question.pair.share
    return max(1, round((1.0 - share) * n)), max(1, round(share * n))


def _side(question: Question) -> stats.Sides:
    return "both" if question.sides == 2 else "above" if question.sign > 0 else "below"


def _concentration(question: Question, tuned: float) -> float:
    """As the engine tunes it."""
    return arm_concentration(tuned, question.test, _side(question))


def _power(question: Question, n: float, tuned: float) -> float:
    """Share of samples of n units that the engine's test decides on."""
    cells, rng = _cells(question, n), np.random.default_rng(_SEED)
    control, treatment = (
        Sample.from_bins(cells.edges, rng.multinomial(units, probabilities, size=PATHS))
        for units, probabilities in zip(_arms(question, n), (cells.control, cells.treatment), strict=True)
    )
    log_e = quantile_difference_log_e(
        control,
        treatment,
        cast("Quantile", question.outcome).p,
        margin=question.null.value,
        relative=question.null.relative,
        concentration=_concentration(question, tuned),
        combination=COMBINATION,
        side=_side(question),
    )
    return float(np.mean(np.asarray(log_e) >= -math.log(question.test.alpha * FIRST_EPOCH)))


def _half_width(question: Question, n: float, tuned: float) -> float | None:
    """Of the difference's sequence on the sample that the distribution promises; None where it has no end."""
    cells = _cells(question, n)
    control, treatment = (
        Sample.from_bins(
            cells.edges, np.diff(np.rint(units * np.cumsum([0.0, *probabilities]))).astype(np.int64)
        )
        for units, probabilities in zip(_arms(question, n), (cells.control, cells.treatment), strict=True)
    )
    found = quantile_difference(
        control,
        treatment,
        cast("Quantile", question.outcome).p,
        alpha=question.test.alpha * FIRST_EPOCH,
        concentration=_concentration(question, tuned),
        combination=COMBINATION,
        side=_side(question),
    )
    if isinstance(found, stats.Undetermined):
        return None
    width = float(found.estimate - found.lower if question.sign > 0 else found.upper - found.estimate)
    return width if math.isfinite(width) else None


def _curve(
    question: Question,
    powers: Callable[[float], tuple[float, float, float]],
    tuned: float,
    *,
    ends: tuple[float, float],
) -> Curve:
    one_look = critical(question) * math.sqrt(question.variance())
    rows = [
        (n, *powers(n), width, one_look / math.sqrt(n))
        for n in np.geomspace(max(ends[0], ends[1] / _SPAN), ends[1], _CURVE_POINTS).tolist()
        if (width := _half_width(question, n, tuned)) is not None  # it begins where the sequence has an end
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(Curve.__struct_fields__)
    return Curve(**_named(Curve, columns))


def _named(kind: Any, values: Any) -> dict[str, Any]:
    return dict(zip(kind.__struct_fields__, values, strict=True))


def _moved(question: Question, distance: float) -> Question | None:
    """The question at this distance from its null: another effect, or for safety another margin."""
    outcome = question.outcome
    if question.name != "safety":
        moved = question.at(outcome.edge(question.null) + question.sign * distance)
        return moved if outcome.possible(moved.effect) else None
    margin = question.effect - question.sign * distance
    if not outcome.possible(margin):
        return None
    value = margin / outcome.base if question.null.relative else margin
    return replace(question, null=question.null._replace(value=value))


def _least(reached: Callable[[float], bool], *, start: float, limit: float = _LARGEST_N) -> float | None:
    """The least number for which something is reached, to 0.1 %; None if it is above the limit."""
    low, high = 0.0, start
    while not reached(high):
        low, high = high, 2.0 * high
        if high > limit:
            return None
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
