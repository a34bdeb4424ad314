"""Exact, mergeable moments of quantised unit values.

A unit value is quantised once to an integer number of steps; count, sum and sum of squares are then
integers of any size, so merging is addition, order never matters and the variance does not cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stream_xp.stats._checks import step
from stream_xp.stats._codec import decimal, integer, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_TAG, _VERSION = "MOMT", 1


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
    def empty(cls) -> Moments:
        """Return the moments of no unit, the identity of `merge`."""
        return EMPTY

    @classmethod
    def from_values(cls, values: Iterable[int]) -> Moments:
        """Return the moments of `values`, one Python int (in quantisation steps) per unit."""
        units = tuple(values)
        return cls(n=len(units), s=sum(units), q=sum(v * v for v in units))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of units together; the same as ``self + other``."""
        return self + other

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

    def to_bytes(self) -> bytes:
        """Return the binary form, kind "MOMT", version 1: n, s, q. Equal moments have equal bytes."""
        return pack(_TAG, _VERSION, (self.n, self.s, self.q))

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """Return the moments of a binary form.

        Raises:
            ValueError: `data` is damaged, of another kind or version, or its moments are impossible.

        """
        integers = unpack(data, _TAG, _VERSION)
        if len(integers) != len(cls.__slots__):
            raise ValueError(f"data must hold the 3 integers n, s and q, it holds {len(integers)}")
        return cls(*integers)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: the version, and n, s and q as decimal strings."""
        return {"version": _VERSION, "n": decimal(self.n), "s": decimal(self.s), "q": decimal(self.q)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Moments:
        """Return the moments of a JSON form.

        Raises:
            ValueError: `fields` is of another version, a field is missing or no integer, or the moments are
                impossible.

        """
        if fields.get("version") != _VERSION:
            raise ValueError(f"version must be {_VERSION}, got {fields.get('version')!r}")
        return cls(*(integer(fields, name) for name in ("n", "s", "q")))

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
