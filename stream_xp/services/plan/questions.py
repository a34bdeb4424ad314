"""The questions that a plan answers: one test of one metric, against a null, under a true effect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from scipy.optimize import brentq

from stream_xp.engine.design import Margin, Plan, Test
from stream_xp.services.plan.outcomes import Outcome
from stream_xp.services.plan.report import Effect

_DOUBLINGS = 200


@dataclass(frozen=True, slots=True)
class Pair:
    """A treatment arm and the control.

    Attributes:
        arms: treatment arms that have this share.
        share: probability that a unit of the pair is in the treatment arm.
        traffic_share: share of all units that are in the pair.
    """

    arms: tuple[str, ...]
    share: float
    traffic_share: float


@dataclass(frozen=True, slots=True)
class Question:
    """One test of one metric in one pair.

    Attributes:
        name: effect, harm or safety.
        sign: 1.0 where the test is to show a larger value than the null's, -1.0 for a smaller.
        null: edge of the null hypothesis.
        effect: the true one, absolute and signed; NaN until it is known.
        effect_source: where it comes from.
    """

    plan: Plan
    outcome: Outcome
    pair: Pair
    name: str
    test: Test
    sides: int
    sign: float
    null: Margin
    effect: float
    effect_source: str

    def distance(self) -> float:
        """From the null's edge to the truth, in the direction to be shown."""
        return self.sign * self.outcome.distance(self.effect, self.null)

    def variance(self) -> float:
        """Variance of the estimated distance, times the units of the pair."""
        return self.outcome.variance(self.effect, self.null, self.pair.share)

    def variance_without_effect(self) -> float:
        """The same if nothing is true but what the control is."""
        return self.outcome.variance(0.0, Margin(0.0, relative=False), self.pair.share)

    def rho2(self) -> float:
        """Tuning constant per unit of the pair."""
        return self.outcome.rho2(self.test, self.effect, self.null, self.pair.share)

    def signal(self) -> float:
        """Distance in standard deviations of one unit of the pair."""
        return self.distance() / math.sqrt(self.variance())

    def at(self, effect: float) -> Question:
        """The same with another true effect."""
        return replace(self, effect=effect)

    def without_effect(self) -> Question:
        """The same where nothing is to be found: no effect, or of a safety test harm as large as the margin."""
        return self.at(self.outcome.edge(self.null) if self.name == "safety" else 0.0)

    def detectable(self, signal: float) -> Question | None:
        """The same with the smallest effect, or for safety the smallest margin, that has this signal; or None."""
        start = self.outcome.edge(self.null)

        def moved(x: float) -> Question:
            if self.name == "safety":
                return replace(self, null=self.null._replace(value=-self.sign * x))
            return self.at(start + self.sign * x)

        def missing(x: float) -> float:
            return moved(x).signal() - signal

        def allowed(x: float) -> bool:
            tried = moved(x)
            if tried.null.relative and tried.null.value <= -1.0:
                return False
            return self.outcome.possible(
                tried.outcome.edge(tried.null) if self.name == "safety" else tried.effect
            )

        high = _reaching(missing, allowed, start=signal * math.sqrt(self.variance_without_effect()))
        return None if high is None else moved(float(brentq(missing, high * 1e-12, high, xtol=high * 1e-12)))

    def size(self, absolute: float) -> Effect:
        """An effect in both ways of saying it."""
        base = self.outcome.base
        return Effect(absolute=absolute, relative=absolute / abs(base) if base else None)


def _reaching(
    missing: Callable[[float], float], allowed: Callable[[float], bool], *, start: float
) -> float | None:
    """An x at which nothing is missing, or None where it would not be allowed."""
    low, high = 0.0, start
    for _ in range(_DOUBLINGS):
        if not allowed(high):
            break
        if missing(high) >= 0:
            return high
        low, high = high, 2.0 * high
    else:
        return None
    for _ in range(_DOUBLINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if allowed(middle) else (low, middle)
        if low > 0 and missing(low) >= 0:
            return low
    return None
