"""Exact, mergeable moments of quantised unit values.

A unit value is quantised once to an integer number of steps; count, sum and sum of squares are then
integers of any size, so merging is addition, order never matters and the variance does not cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stream_xp.stats._checks import step

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, sum and sum of squares of quantised unit values.

    Attributes:
        n: number of units, >= 0.
        s: sum of the values, in quantisation steps.
        q: sum of the squared values, in squared quantisation steps.

    Raises:
        ValueError: a field is no Python int, n < 0, a sum without a unit, or n*q < s*s
            (impossible for real values, by Cauchy-Schwarz).

    """

    n: int
    s: int
    q: int

    def __post_init__(self) -> None:
        for name in ("n", "s", "q"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a Python int")
        if self.n < 0:
            raise ValueError(f"n must not be negative, got {self.n}")
        if self.n == 0 and (self.s or self.q):
            raise ValueError("s and q must be 0 when n is 0")
        if self.n * self.q < self.s * self.s:
            raise ValueError("q must satisfy n*q >= s*s")

    @classmethod
    def from_values(cls, values: Iterable[int]) -> Moments:
        """Return the moments of `values`, one Python int (in quantisation steps) per unit."""
        units = tuple(values)
        return cls(n=len(units), s=sum(units), q=sum(v * v for v in units))

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of units together; exact, commutative and associative."""
        if not isinstance(other, Moments):
            return NotImplemented
        return Moments(self.n + other.n, self.s + other.s, self.q + other.q)

    def __sub__(self, other: Moments) -> Moments:
        """Return the moments without the units of `other`; ValueError if they cannot be part of these."""
        if not isinstance(other, Moments):
            return NotImplemented
        return Moments(self.n - other.n, self.s - other.s, self.q - other.q)

    def mean(self, scale: float) -> float:
        """Return the mean in metric units.

        Args:
            scale: value of one quantisation step in metric units, 1e-100 to 1e100.

        Raises:
            ValueError: n is 0, `scale` is out of range, or the mean is too large for a float.

        """
        self._require_units(1, "mean")
        return _quotient(self.s, self.n) * step("scale", scale)

    def variance(self, scale: float) -> float:
        """Return the sample variance (divisor n - 1) in squared metric units.

        The quotient (n*q - s*s) / (n*(n - 1)) is formed from exact integers and rounded once.

        Args:
            scale: value of one quantisation step in metric units, 1e-100 to 1e100.

        Raises:
            ValueError: n < 2, `scale` is out of range, or the variance is too large for a float.

        """
        self._require_units(2, "variance")
        return _quotient(self._spread(), self.n * (self.n - 1)) * step("scale", scale) ** 2

    def sum_of_squared_deviations(self, scale: float) -> float:
        """Return the sum of squared deviations from the mean, (n*q - s*s) / n, in squared metric units.

        Args:
            scale: value of one quantisation step in metric units, 1e-100 to 1e100.

        Raises:
            ValueError: n is 0, `scale` is out of range, or the sum is too large for a float.

        """
        self._require_units(1, "sum_of_squared_deviations")
        return _quotient(self._spread(), self.n) * step("scale", scale) ** 2

    def _spread(self) -> int:
        return self.n * self.q - self.s * self.s

    def _require_units(self, least: int, what: str) -> None:
        if self.n < least:
            raise ValueError(f"n must be at least {least} for {what}, got {self.n}")


def _quotient(numerator: int, denominator: int) -> float:
    # The true division of two Python ints is correctly rounded whatever their size.
    try:
        return numerator / denominator
    except OverflowError as error:
        raise ValueError("s and q must give a mean and a variance that fit a float") from error


EMPTY = Moments(0, 0, 0)
