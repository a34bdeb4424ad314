"""What an allocation is computed from: exact sums per arm, weight epoch and context."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Conversions:
    """Units and how many of them converted; fractions of units where immature ones are weighted.

    Attributes:
        units: n >= 0.
        conversions: c, 0 <= c <= n.
    """

    units: float
    conversions: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.units) and 0 <= self.conversions <= self.units):
            raise ValueError(
                f"conversions must lie between 0 and units, got {self.conversions} of {self.units}"
            )

    @property
    def mean(self) -> float:
        """Share of units that converted; there must be one."""
        return self.conversions / self.units


@dataclass(frozen=True, slots=True)
class Values:
    """Count, sum and sum of squares of the units' values, in quantisation steps; integers stay exact.

    Attributes:
        units: n >= 0.
        total: sum of the values, in steps.
        squares: sum of their squares, in steps squared.
        step: value of one step, in metric units, > 0.
    """

    units: float
    total: float
    squares: float
    step: float = 1.0

    def __post_init__(self) -> None:
        # An int of any size is finite, and may be more than a float holds.
        numbers = (self.units, self.total, self.squares)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError("units, total and squares must be finite")
        if self.units < 0 or self.squares < 0 or (self.units == 0 and (self.total or self.squares)):
            raise ValueError("units and squares must not be negative, and no units have no sums")
        if not (math.isfinite(self.step) and self.step > 0):
            raise ValueError("step must be finite and greater than 0")

    @property
    def mean(self) -> float:
        """Mean of the values in metric units; there must be a unit."""
        return float(Fraction(self.total) / Fraction(self.units)) * self.step

    @property
    def spread(self) -> float:
        """Sum of squared distances from the mean, in metric units squared; the subtraction is exact."""
        if self.units == 0:
            return 0.0
        exact = Fraction(self.squares) - Fraction(self.total) ** 2 / Fraction(self.units)
        return max(0.0, float(exact)) * self.step * self.step


Sums = Conversions | Values


@dataclass(frozen=True, slots=True)
class Evidence:
    """The sums of one arm in one weight epoch, and in one context where contexts are registered.

    Attributes:
        arm: its key.
        sums: of the units first exposed in this epoch and context.
        epoch: weight epoch at first exposure. Arms are compared inside epochs.
        context: cell of the registered context features; "" where there are none.
    """

    arm: str
    sums: Sums
    epoch: int = 0
    context: str = ""
