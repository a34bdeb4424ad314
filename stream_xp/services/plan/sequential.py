"""Samples and powers of the engine's normal-mixture sequence, beside a fixed and a group sequential test."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from stream_xp import stats
from stream_xp.domain.decision import Method
from stream_xp.services.plan.questions import Question
from stream_xp.services.plan.report import Curve, Power, Samples
from stream_xp.stats.early_evidence import EXACT_SHARE
from stream_xp.stats.group_sequential import GroupSequential, drift_for_power, group_sequential, stopping
from stream_xp.stats.planning import (
    StoppingCurve,
    fixed_detectable_effect,
    fixed_power,
    fixed_sample,
    sequential_detectable_effect,
    stopping_curve,
)

CURVE_POINTS = 41
_SPAN = 200.0
INFORMATION = (0.2, 0.4, 0.6, 0.8, 1.0)

Sides = Literal[1, 2]


class Sequence(NamedTuple):
    """The asymptotic sequence of a test, in units of the pair.

    Attributes:
        alpha: its error level; of a test that is averaged with an exact one, what is left to it.
        rho2: tuning constant per unit, as the engine holds it; None of quantiles, which are tuned otherwise.
        tuned: units at which it is narrowest.
        first: units at the first look.
        step: units from one look to the next.
    """

    alpha: float
    rho2: float | None
    tuned: float
    sides: Sides
    first: float
    step: float = 1.0


def sequence_of(question: Question) -> Sequence:
    """The sequence that the engine will hold for a question."""
    early = question.plan.method is Method.EXACT_THEN_ASYMPTOTIC
    alpha = question.test.alpha * (1.0 - EXACT_SHARE if early else 1.0)
    sides, rho2 = cast("Sides", question.sides), question.rho2()
    # tuned_rho2(n, alpha) is a constant over n, so that this n has the engine's rho2 at this alpha.
    constant = stats.tuned_rho2(1.0, alpha) if sides == 2 else stats.one_sided_rho2(1.0, alpha)
    outcome, share = question.outcome, question.pair.share
    first, step = outcome.first_units(share), outcome.step_units(share)
    return Sequence(alpha, rho2, float(constant) / rho2, sides, first, step)


def signal_found(sequence: Sequence, *, n: float, power: float) -> float | None:
    """Signal of one unit that the sequence finds by n units of the pair; None where n is before the first look."""
    if n <= sequence.first:
        return None
    return _drift(sequence._replace(rho2=None), n, power) / math.sqrt(n)


@lru_cache(maxsize=4096)
def _drift(sequence: Sequence, n: float, power: float) -> float:
    # A variance of n makes one unit of effect one standard error at n.
    return sequential_detectable_effect(n, n=n, power=power, **_settings(sequence))


def _settings(sequence: Sequence) -> dict[str, Any]:
    """The sequence in the words of `stats.planning`."""
    return {
        "alpha": sequence.alpha,
        "n_star": sequence.tuned,
        "sides": sequence.sides,
        "n_first": sequence.first,
        "look_every": sequence.step,
    }


class Numbers(NamedTuple):
    """Everything about one question, samples in units of the pair."""

    power: Power
    units: Samples
    half_width: float | None
    curve: Curve


def numbers(question: Question, sequence: Sequence, *, planned: float, power: float) -> Numbers:
    """Plan one question.

    Args:
        question: with a true effect on the far side of its null.
        sequence: its sequence.
        planned: units of the pair in the planned sample.
        power: aimed at.

    Raises:
        ValueError: the signal is too small for any sample.
    """
    signal = question.signal()
    curve = stopping_curve(signal, 1.0, **_settings(sequence))
    group = group_powers(question, power=power)
    fixed = float(fixed_sample(signal, 1.0, alpha=question.test.alpha, power=power, sides=sequence.sides))
    units = Samples(
        for_power=_value(curve.sample_for_power(power)),
        median=_value(curve.quantile(0.5)),
        expected=_expected(curve, planned),
        expected_without_effect=_expected(_null_curve(question, sequence, planned), planned),
        fixed=fixed,
        group_sequential=group.largest(signal),
        group_sequential_expected=group.expected(signal),
    )
    power_at = _powers(question, sequence, curve, group)
    last = max(2.0 * planned, 1.25 * (units.for_power or 0.0), 2.0 * sequence.first)
    drawn = _curve(question, sequence, power_at, last=last)
    reached = Power(**dict(zip(Power.__struct_fields__, power_at(planned), strict=True)))
    width = float(_half_widths(question, sequence, np.array([planned]))[0])
    return Numbers(reached, units, width if planned >= sequence.first else None, drawn)


def _null_curve(question: Question, sequence: Sequence, planned: float) -> StoppingCurve | None:
    if planned <= sequence.first:
        return None
    nothing = question.without_effect()
    return stopping_curve(nothing.signal(), 1.0, n_last=planned, **_settings(sequence))


def _expected(curve: StoppingCurve | None, planned: float) -> float:
    return planned if curve is None else curve.expected(min(planned, curve.n[-1]))


class Group(NamedTuple):
    """The group sequential test beside a sequence, at the same error level.

    Attributes:
        drift: expected z at its last look that gives the power aimed at.
        average: share of the largest sample that it then takes on average.
    """

    design: GroupSequential
    drift: float
    average: float

    def largest(self, signal: float) -> float:
        """Units at the last look."""
        return (self.drift / signal) ** 2

    def expected(self, signal: float) -> float:
        """Units on average."""
        return self.largest(signal) * self.average

    def power(self, signal: float, n: float) -> float:
        """Power if the last look is at n units."""
        drift, design = signal * math.sqrt(n), self.design
        return min(1.0, stopping(design.information, design.z, drift=drift, sides=design.sides).power)


def group_powers(question: Question, *, power: float) -> Group:
    """The group sequential test for a question."""
    return _group(question.test.alpha, cast("Sides", question.sides), power)


@lru_cache(maxsize=256)
def _group(alpha: float, sides: Sides, power: float) -> Group:
    design = group_sequential(INFORMATION, alpha=alpha, sides=sides)
    drift = drift_for_power(design, power=power)
    average = stopping(design.information, design.z, drift=drift, sides=sides).expected_information
    return Group(design, drift, average)


Powers = Callable[[float], tuple[float, float, float]]


def _powers(question: Question, sequence: Sequence, curve: StoppingCurve, group: Group) -> Powers:
    """Powers of the sequence, of a fixed and of a group sequential test, as a function of units of the pair."""
    signal = question.signal()

    def at(n: float) -> tuple[float, float, float]:
        fixed = fixed_power(signal, 1.0, n=n, alpha=question.test.alpha, sides=sequence.sides)
        return curve.power(min(n, curve.n[-1])), float(fixed), group.power(signal, n)

    return at


def _curve(question: Question, sequence: Sequence, power_at: Powers, *, last: float) -> Curve:
    n = np.geomspace(max(sequence.first, last / _SPAN), last, CURVE_POINTS)
    powers = zip(*(power_at(float(at)) for at in n), strict=True)
    fixed = critical(question) * np.sqrt(question.variance() / n)
    widths = _half_widths(question, sequence, n)
    columns = (n, *powers, widths, fixed)
    return Curve(**{name: _floats(c) for name, c in zip(Curve.__struct_fields__, columns, strict=True)})


def _half_widths(question: Question, sequence: Sequence, n: Any) -> Any:
    multiplier = (
        stats.radius_multiplier_two_sided if sequence.sides == 2 else stats.radius_multiplier_one_sided
    )
    return np.asarray(multiplier(n * sequence.rho2, sequence.alpha)) * np.sqrt(question.variance() / n)


def critical(question: Question) -> float:
    """What a fixed test multiplies its standard error with: a power of 1/2 needs exactly this signal."""
    sides = cast("Sides", question.sides)
    return float(fixed_detectable_effect(1.0, n=1.0, alpha=question.test.alpha, power=0.5, sides=sides))


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _value(found: float | stats.Undetermined) -> float | None:
    return None if isinstance(found, stats.Undetermined) else float(found)
