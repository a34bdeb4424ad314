"""How far apart truth and null hypothesis are, in units of the noise: one class per kind of outcome.

`distance` and `variance` of a true effect and an edge of the null give the signal of n units of a pair of arms as
distance * sqrt(n / variance), which is all that a plan needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from stream_xp.domain.experiment import Aggregation, Metric, MetricKind
from stream_xp.engine.design import Margin, Plan, Test
from stream_xp.services.plan.baselines import Baseline
from stream_xp.stats.conversion_difference import RATIO_SD
from stream_xp.stats.planning import effect_variance, first_look

FIRST_EVENTS = 20
"""Expected events at the first look of a count: before, no decision is likely and no curve is smooth."""


class Outcome(Protocol):
    """A metric in the control arm, and what an effect makes of it in a treatment arm."""

    @property
    def base(self) -> float:
        """The control's mean, ratio, or share of units with an event."""

    def possible(self, effect: float) -> bool:
        """Whether a treatment arm can be that far from the control."""

    def edge(self, margin: Margin) -> float:
        """The edge of the null hypothesis as an absolute effect."""

    def distance(self, effect: float, margin: Margin) -> float:
        """From the edge of the null hypothesis to the true effect, signed, on the scale of the test."""

    def variance(self, effect: float, margin: Margin, share: float) -> float:
        """Variance of the estimated distance, times the units of the pair."""

    def rho2(self, test: Test, effect: float, margin: Margin, share: float) -> float:
        """Tuning constant of the sequence per unit of the pair."""

    def first_units(self, share: float) -> float:
        """Units of the pair at the first look."""

    def step_units(self, share: float) -> float:
        """Units of the pair from one step of the evidence to the next."""

    def rarest(self, share: float) -> float:
        """Expected units, per unit of the pair, of the rarest kind in the arm that has fewer; 1 if none is rare."""


@dataclass(frozen=True, slots=True)
class Means:
    """A unit's value with a mean and a variance; of a rate the variance follows the mean.

    Attributes:
        base: the control's mean; of a ratio, the ratio.
        noise: variance of one unit; of a ratio, of its linearised value over the squared mean of denominators.
        is_rate: whether values are 0 and 1.
        unexplained: share of the variance that the covariate leaves.
    """

    base: float
    noise: float
    is_rate: bool = False
    unexplained: float = 1.0

    def possible(self, effect: float) -> bool:
        """Whether a treatment arm can be that far from the control."""
        return not self.is_rate or 0.0 < self.base + effect < 1.0

    def edge(self, margin: Margin) -> float:
        """The edge of the null hypothesis as an absolute effect."""
        return margin.value * abs(self.base) if margin.relative else margin.value

    def distance(self, effect: float, margin: Margin) -> float:
        """From the edge of the null hypothesis to the true effect, signed."""
        return effect - self.edge(margin)

    def variance(self, effect: float, margin: Margin, share: float) -> float:
        """Variance of treatment mean minus (1 + relative margin) times control mean, times the units of the pair."""
        treated = (self.base + effect) * (1.0 - self.base - effect) if self.is_rate else self.noise
        # A relative margin makes the control's mean count (1 + margin) times.
        factor = 1.0 + math.copysign(margin.value, margin.value * self.base) if margin.relative else 1.0
        both = effect_variance(factor**2 * self.noise, treated, treatment_share=share)
        return self.unexplained * float(both)

    def rho2(self, test: Test, effect: float, margin: Margin, share: float) -> float:  # noqa: ARG002
        """The design's own."""
        return test.rho2

    def first_units(self, share: float) -> float:
        """Units at which the smaller arm is expected to have 25."""
        return float(first_look(share))

    def step_units(self, share: float) -> float:
        """Every unit counts, but evidence moves with the rarer of the two values."""
        if not self.is_rate:
            return 1.0
        return min(self.first_units(share), max(1.0, 0.5 / min(self.base, 1.0 - self.base)))

    def rarest(self, share: float) -> float:
        """Of a rate, units with the rarer value in the smaller arm."""
        return min(share, 1.0 - share) * min(self.base, 1.0 - self.base) if self.is_rate else 1.0


@dataclass(frozen=True, slots=True)
class FirstEvents:
    """Units with an event, compared by the arms that events fall into.

    One event tells as much as the Kullback-Leibler divergence of its label's true distribution from that of the
    null; as twice that is the squared signal of a normal, so many units stand for one of variance 1.

    Attributes:
        base: share of the control's units that have an event.
    """

    base: float

    def possible(self, effect: float) -> bool:
        """Whether a treatment arm can be that far from the control."""
        return 0.0 < self.base + effect < 1.0

    def edge(self, margin: Margin) -> float:
        """The edge of the null hypothesis as a difference of shares."""
        return margin.value * self.base if margin.relative else margin.value

    def distance(self, effect: float, margin: Margin) -> float:
        """From the edge of the null hypothesis to the true effect as a log rate ratio, signed."""
        return math.log1p(effect / self.base) - math.log1p(self.edge(margin) / self.base)

    def variance(self, effect: float, margin: Margin, share: float) -> float:
        """Variance of the estimated log rate ratio, times the units of the pair."""
        distance, events = self.distance(effect, margin), self._events(effect, share)
        if abs(distance) < 1e-6:
            null = self._label(self.edge(margin), share)
            return 1.0 / (events * null * (1.0 - null))
        true, null = self._label(effect, share), self._label(self.edge(margin), share)
        told = true * math.log(true / null) + (1.0 - true) * math.log((1.0 - true) / (1.0 - null))
        return distance**2 / (2.0 * told * events)

    def rho2(self, test: Test, effect: float, margin: Margin, share: float) -> float:  # noqa: ARG002
        """Of a normal prior on the log rate ratio: its variance times what one unit tells."""
        null = self._label(self.edge(margin), share)
        return RATIO_SD**2 * null * (1.0 - null) * self._events(effect, share)

    def first_units(self, share: float) -> float:
        """Units at which 20 events are expected."""
        return math.ceil(FIRST_EVENTS / self._events(0.0, share))

    def step_units(self, share: float) -> float:
        """Units to the next event."""
        return 1.0 / self._events(0.0, share)

    def rarest(self, share: float) -> float:
        """Events of the smaller arm."""
        return min(share, 1.0 - share) * self.base

    def _label(self, effect: float, share: float) -> float:
        """Probability that an event is of the treatment arm."""
        treated = share * (self.base + effect)
        return treated / (treated + (1.0 - share) * self.base)

    def _events(self, effect: float, share: float) -> float:
        return self.base + share * effect


def outcome_of(plan: Plan, baseline: Baseline) -> Outcome:
    """The outcome of a metric that is no latency, from its whole baseline."""
    metric = plan.metric
    if metric.kind is MetricKind.RATIO:
        return _ratio(baseline)
    if metric.folds_by is Aggregation.FIRST:
        return FirstEvents(_there(baseline.share))
    unexplained = 1.0 - (baseline.correlation or 0.0) ** 2
    if metric.folds_by is Aggregation.ANY:
        rate = _there(baseline.rate)
        return Means(rate, rate * (1.0 - rate), is_rate=True, unexplained=unexplained)
    return Means(_there(baseline.mean), _there(baseline.sd) ** 2, unexplained=unexplained)


def bounded_below(metric: Metric) -> bool:
    """Whether a unit's value cannot be below 0, so that harm of more than the mean is no plan."""
    return metric.kind in (MetricKind.CONVERSION, MetricKind.COUNT, MetricKind.LATENCY)


def _ratio(baseline: Baseline) -> Means:
    denominator = _there(baseline.mean_d)
    ratio = _there(baseline.mean_m) / denominator
    spread = (
        _there(baseline.var_m) - 2.0 * ratio * _there(baseline.cov_md) + ratio**2 * _there(baseline.var_d)
    )
    return Means(ratio, max(spread, 0.0) / denominator**2)


def _there(value: float | None) -> float:
    assert value is not None  # noqa: S101 (the caller has looked with `lacking`)
    return value
