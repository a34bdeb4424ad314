"""Exact, mergeable moments of pairs of quantised unit values, and of the products within each pair.

The pair (x, y) of one unit is a covariate and an outcome, or a denominator and a numerator. As in
`moments`, every sum is an integer of any size, so merging is addition and neither variance nor covariance
cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stream_xp.stats._checks import step
from stream_xp.stats._codec import decimal, integer, pack, unpack
from stream_xp.stats.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_TAG, _VERSION = "CRSM", 1
_FIELDS = ("n", "sx", "sy", "sxx", "syy", "sxy")


@dataclass(frozen=True, slots=True)
class CrossMoments:
    """Count, sums, sums of squares and sum of products of quantised pairs (x, y), one pair per unit.

    Attributes:
        n: number of units, >= 0.
        sx: sum of x, in quantisation steps of x.
        sy: sum of y, in quantisation steps of y.
        sxx: sum of x*x, in squared steps of x.
        syy: sum of y*y, in squared steps of y.
        sxy: sum of x*y, in steps of x times steps of y.

    Raises:
        ValueError: a field is no Python int, n < 0, a sum without a unit, or the sums are impossible for
            real values by Cauchy-Schwarz: n*sxx < sx*sx, n*syy < sy*sy, or
            (n*sxy - sx*sy)^2 > (n*sxx - sx*sx) * (n*syy - sy*sy).

    """

    n: int
    sx: int
    sy: int
    sxx: int
    syy: int
    sxy: int

    def __post_init__(self) -> None:
        for name in _FIELDS:
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a Python int")
        if self.n < 0:
            raise ValueError(f"n must not be negative, got {self.n}")
        if self.n == 0 and any((self.sx, self.sy, self.sxx, self.syy, self.sxy)):
            raise ValueError("sx, sy, sxx, syy and sxy must be 0 when n is 0")
        self._check_cauchy_schwarz()

    def _check_cauchy_schwarz(self) -> None:
        spread_x, spread_y = self._spread_x(), self._spread_y()
        if spread_x < 0:
            raise ValueError("sxx must satisfy n*sxx >= sx*sx")
        if spread_y < 0:
            raise ValueError("syy must satisfy n*syy >= sy*sy")
        if self._spread_xy() ** 2 > spread_x * spread_y:
            raise ValueError("sxy must satisfy (n*sxy - sx*sy)^2 <= (n*sxx - sx*sx) * (n*syy - sy*sy)")

    @classmethod
    def empty(cls) -> CrossMoments:
        """Return the moments of no unit, the identity of `merge`."""
        return cls(0, 0, 0, 0, 0, 0)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]]) -> CrossMoments:
        """Return the moments of `pairs`, one (x, y) of Python ints (in quantisation steps) per unit."""
        units = tuple(pairs)
        return cls(
            n=len(units),
            sx=sum(x for x, _ in units),
            sy=sum(y for _, y in units),
            sxx=sum(x * x for x, _ in units),
            syy=sum(y * y for _, y in units),
            sxy=sum(x * y for x, y in units),
        )

    def merge(self, other: CrossMoments) -> CrossMoments:
        """Return the moments of both sets of units together; the same as ``self + other``."""
        return self + other

    def __add__(self, other: CrossMoments) -> CrossMoments:
        """Return the moments of both sets of units together; exact, commutative and associative."""
        if not isinstance(other, CrossMoments):
            return NotImplemented
        return CrossMoments(*(a + b for a, b in zip(self.integers, other.integers, strict=True)))

    def __sub__(self, other: CrossMoments) -> CrossMoments:
        """Return the moments without the units of `other`; ValueError if they cannot be part of these."""
        if not isinstance(other, CrossMoments):
            return NotImplemented
        return CrossMoments(*(a - b for a, b in zip(self.integers, other.integers, strict=True)))

    @property
    def integers(self) -> tuple[int, int, int, int, int, int]:
        """The six fields in their order: n, sx, sy, sxx, syy, sxy."""
        return self.n, self.sx, self.sy, self.sxx, self.syy, self.sxy

    @property
    def moments_x(self) -> Moments:
        """The moments of x alone."""
        return Moments(self.n, self.sx, self.sxx)

    @property
    def moments_y(self) -> Moments:
        """The moments of y alone."""
        return Moments(self.n, self.sy, self.syy)

    def to_bytes(self) -> bytes:
        """Return the binary form, kind "CRSM", version 1: the six fields in order; canonical."""
        return pack(_TAG, _VERSION, self.integers)

    @classmethod
    def from_bytes(cls, data: bytes) -> CrossMoments:
        """Return the moments of a binary form.

        Raises:
            ValueError: `data` is damaged, of another kind or version, or its moments are impossible.

        """
        integers = unpack(data, _TAG, _VERSION)
        if len(integers) != len(_FIELDS):
            raise ValueError(f"data must hold the 6 integers {', '.join(_FIELDS)}, it holds {len(integers)}")
        return cls(*integers)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: the version, and each field as a decimal string."""
        return {"version": _VERSION} | {name: decimal(getattr(self, name)) for name in _FIELDS}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> CrossMoments:
        """Return the moments of a JSON form.

        Raises:
            ValueError: `fields` is of another version, a field is missing or no integer, or the moments are
                impossible.

        """
        if fields.get("version") != _VERSION:
            raise ValueError(f"version must be {_VERSION}, got {fields.get('version')!r}")
        return cls(*(integer(fields, name) for name in _FIELDS))

    def mean_x(self, scale: float) -> float:
        """Return the mean of x; `scale` and errors as in `Moments.mean`."""
        return self.moments_x.mean(scale)

    def mean_y(self, scale: float) -> float:
        """Return the mean of y; `scale` and errors as in `Moments.mean`."""
        return self.moments_y.mean(scale)

    def variance_x(self, scale: float) -> float:
        """Return the sample variance of x (divisor n - 1); `scale` and errors as in `Moments.variance`."""
        return self.moments_x.variance(scale)

    def variance_y(self, scale: float) -> float:
        """Return the sample variance of y (divisor n - 1); `scale` and errors as in `Moments.variance`."""
        return self.moments_y.variance(scale)

    def covariance(self, *, scale_x: float, scale_y: float) -> float:
        """Return the sample covariance of x and y (divisor n - 1), in units of x times units of y.

        The quotient (n*sxy - sx*sy) / (n*(n - 1)) is formed from exact integers and rounded once.

        Args:
            scale_x: value of one quantisation step of x, 1e-100 to 1e100.
            scale_y: value of one quantisation step of y, 1e-100 to 1e100.

        Raises:
            ValueError: n < 2, a scale is out of range, or the covariance is too large for a float.

        """
        if self.n < 2:
            raise ValueError(f"n must be at least 2 for covariance, got {self.n}")
        try:
            quotient = self._spread_xy() / (self.n * (self.n - 1))
        except OverflowError as error:
            raise ValueError("sxy must give a covariance that fits a float") from error
        return quotient * step("scale_x", scale_x) * step("scale_y", scale_y)

    def _spread_x(self) -> int:
        return self.n * self.sxx - self.sx * self.sx

    def _spread_y(self) -> int:
        return self.n * self.syy - self.sy * self.sy

    def _spread_xy(self) -> int:
        return self.n * self.sxy - self.sx * self.sy


@dataclass(frozen=True, slots=True)
class CrossStratum:
    """The cross moments of both arms in one weight epoch."""

    control: CrossMoments
    treatment: CrossMoments
