r"""Hedged betting: a confidence sequence for the mean of bounded values, narrow where they vary little.

Two gamblers start with 1 each. Before value x_t of [0, 1] is seen, both fix a bet b_t from the past; against
the mean m the one multiplies its capital by 1 + min(b_t, 1/(2m)) (x_t - m), the other by
1 - min(b_t, 1/(2(1-m))) (x_t - m). If m is the mean, neither grows in expectation. The capital of the first
decreases in m and that of the second increases, so the means that neither refutes are an interval.

Assumptions: values lie in [0, 1] (rescale others) and have the same mean given the past; nothing else.
Non-asymptotic. The level that sizes the bets is frozen before the first look. Bets cannot be undone: a value
that is corrected later cannot be taken back out.

Source: Waudby-Smith and Ramdas (2024), Estimating means of bounded random variables by betting, Journal of the
Royal Statistical Society B 86(1), 1-27, arXiv:2010.09686: equations (24) to (27), theorem 3, hedged capital
with the truncation 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stream_xp.stats._boundaries import Sides, is_above, log_threshold
from stream_xp.stats._checks import FloatArray, level
from stream_xp.stats._codec import decimal, integer, pack, unpack
from stream_xp.stats._predictable import (
    FINE_STEPS,
    VALUE_STEPS,
    batches,
    fine_down,
    fine_up,
    sums_after,
    sums_before,
    to_unit,
    unit_interval,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

GRID = 200
_TRUNCATION = 0.5
_BISECTIONS = 64
_BLOCK_ELEMENTS = 500_000
_GRID_LIMIT = 1_000_000
_TAG, _VERSION = "LCAP", 1
_LOG_2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class LogCapital:
    """Log capitals of both gamblers on a fixed grid of means. Order-dependent.

    It lives per partition: `update` depends on the order of the values and bets on the past of this
    partition. Merging adds the log capitals of each gambler; that is valid for any interleaving of the
    partitions, exact and commutative. Everything is an exact integer, and each factor is rounded down, so
    a stream gives the same statistic for every batching.

    Attributes:
        alpha: level of one side for which the bets are sized, in (0, 1).
        n: number of values, >= 0.
        s: sum of the values, in steps of 2^-36.
        d: sum of squared deviations from the running mean, in steps of 2^-44.
        plus: log capital against each mean i/G, i = 0..G, of the gambler who wins if the mean is larger,
            in steps of 2^-44.
        minus: the same of the gambler who wins if the mean is smaller.

    Raises:
        ValueError: a field is out of its range.

    """

    alpha: float
    n: int
    s: int
    d: int
    plus: tuple[int, ...]
    minus: tuple[int, ...]

    def __post_init__(self) -> None:
        level("alpha", self.alpha)
        if len(self.plus) != len(self.minus) or not 2 <= len(self.plus) <= _GRID_LIMIT + 1:
            raise ValueError("plus and minus must have one log capital per grid point, 2 or more")
        if not all(type(i) is int for i in (self.n, self.s, self.d, *self.plus, *self.minus)):
            raise ValueError("n, s, d, plus and minus must be Python ints")
        if self.n < 0:
            raise ValueError(f"n must not be negative, got {self.n}")
        if not (0 <= self.s <= self.n * VALUE_STEPS and 0 <= self.d <= self.n * FINE_STEPS):
            raise ValueError("s and d must be possible for n values in [0, 1]")
        if self.n == 0 and (any(self.plus) or any(self.minus)):
            raise ValueError("plus and minus must be 0 when n is 0")

    @classmethod
    def empty(cls, *, alpha: float = 0.025, grid: int = GRID) -> LogCapital:
        """Return the statistic of no values, the identity of `merge`.

        Args:
            alpha: level of one side for which the bets are sized, in (0, 1): half the two-sided level.
            grid: G, number of intervals of the grid of means, 1 to 1,000,000; bounds are rounded to it.

        """
        if type(grid) is not int or not 1 <= grid <= _GRID_LIMIT:
            raise ValueError(f"grid must be a Python int from 1 to {_GRID_LIMIT}")
        zeros = (0,) * (grid + 1)
        return cls(float(level("alpha", alpha)), 0, 0, 0, zeros, zeros)

    @property
    def grid(self) -> int:
        """Number of intervals of the grid of means."""
        return len(self.plus) - 1

    def update(self, values: ArrayLike) -> LogCapital:
        """Return the statistic after `values`, one-dimensional, in order, each in [0, 1].

        Raises:
            ValueError: a value is not finite or outside [0, 1].

        """
        n, s, d = self.n, self.s, self.d
        m = np.arange(self.grid + 1) / self.grid
        plus, minus = np.zeros(len(m), dtype=object), np.zeros(len(m), dtype=object)
        for steps in batches(values):
            bets, squares = _bets(steps, n=n, s=s, d=d, alpha=self.alpha)
            x = steps / VALUE_STEPS
            plus += _fine_growth(x, bets, m=m)
            minus += _fine_growth(1.0 - x, bets, m=1.0 - m)
            n, s, d = n + len(steps), s + int(steps.sum()), d + squares
        return LogCapital(self.alpha, n, s, d, _added(self.plus, plus), _added(self.minus, minus))

    def merge(self, other: LogCapital) -> LogCapital:
        """Return the capitals of both partitions together; exact, commutative and associative.

        Raises:
            ValueError: `other` has another grid or other bets.

        """
        if (self.grid, self.alpha) != (other.grid, other.alpha):
            raise ValueError("other must have the same grid and alpha")
        n, s, d = self.n + other.n, self.s + other.s, self.d + other.d
        return LogCapital(self.alpha, n, s, d, _added(self.plus, other.plus), _added(self.minus, other.minus))

    def __add__(self, other: LogCapital) -> LogCapital:
        """Return `merge` of both."""
        return self.merge(other) if isinstance(other, LogCapital) else NotImplemented

    def log_e(self, null: ArrayLike, *, side: Sides = "both") -> FloatArray:
        """Log e-value against "the mean is `null`" ("both"), "at most" ("above") or "at least" ("below").

        Between grid points the capital of the neighbour that refutes less is taken, so it never claims
        too much.

        Args:
            null: mean under the null, in [0, 1], any shape.
            side: which deviations count as evidence; "both" is the larger of both less ln 2.

        Returns:
            The log e-value, finite, of the shape of `null`.

        Raises:
            ValueError: `null` or `side` is out of its range.

        """
        mean, grid = unit_interval("null", null), np.arange(self.grid + 1) / self.grid
        plus, minus = self._logs()
        above, below = np.searchsorted(grid, mean), np.searchsorted(grid, mean, side="right") - 1
        return combined(plus[above], minus[below], n=self.n, side=side)

    def bounds(self, *, alpha: float, side: Sides = "both") -> tuple[float, float]:
        """Confidence sequence for the mean, rounded outward to the grid.

        The largest grid point that the first gambler refutes and the smallest that the second does (0 and
        1 where there is none), at alpha/2 each for both sides.

        Args:
            alpha: error level, in (0, 1).
            side: "both", "above" (a lower bound only) or "below" (an upper bound only).

        Returns:
            (lower, upper), within [0, 1]. A mean outside, or on a bound other than 0 and 1, has a log e-value
            of at least ln(1/alpha).

        """
        target = log_threshold(alpha, side=side)
        plus, minus = self._logs()
        below, above = np.flatnonzero(plus >= target), np.flatnonzero(minus >= target)
        lower = below[-1] / self.grid if below.size and side != "below" else 0.0
        upper = above[0] / self.grid if above.size and side != "above" else 1.0
        return float(lower), float(upper)

    def _logs(self) -> tuple[FloatArray, FloatArray]:
        plus = np.array([i / FINE_STEPS for i in self.plus])
        return plus, np.array([i / FINE_STEPS for i in self.minus])

    def to_bytes(self) -> bytes:
        """Return the canonical binary form."""
        head = (*self.alpha.as_integer_ratio(), self.n, self.s, self.d)
        return pack(_TAG, _VERSION, (*head, *self.plus, *self.minus))

    @classmethod
    def from_bytes(cls, data: bytes) -> LogCapital:
        """Return the statistic of a binary form; ValueError if it is none."""
        numbers = unpack(data, _TAG, _VERSION)
        if len(numbers) < 9 or len(numbers) % 2 == 0 or numbers[1] <= 0:
            raise ValueError("data must hold alpha, n, s, d and both capitals")
        half = 5 + (len(numbers) - 5) // 2
        plus, minus = tuple(numbers[5:half]), tuple(numbers[half:])
        n, s, d = numbers[2:5]
        return cls(_quotient(numbers[0], numbers[1]), n, s, d, plus, minus)

    def to_json(self) -> dict[str, Any]:
        """Return the canonical JSON object; `alpha` is a hexadecimal float."""
        capitals = {name: [decimal(i) for i in getattr(self, name)] for name in ("plus", "minus")}
        numbers = {name: decimal(getattr(self, name)) for name in ("n", "s", "d")}
        return {"version": _VERSION, "alpha": self.alpha.hex(), **numbers, **capitals}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LogCapital:
        """Return the statistic of a JSON object; ValueError if it is none."""
        if integer(fields, "version") != _VERSION:
            raise ValueError(f"version must be {_VERSION}")
        try:
            alpha = float.fromhex(fields["alpha"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError("alpha must be a hexadecimal float") from error
        plus, minus = (_integers(fields, name) for name in ("plus", "minus"))
        return cls(alpha, integer(fields, "n"), integer(fields, "s"), integer(fields, "d"), plus, minus)


def betting_log_e(values: ArrayLike, null: float, *, alpha: float, side: Sides = "both") -> float:
    """Exact log e-value of one stream of values against a mean.

    Args:
        values: (n,) in order, each in [0, 1].
        null: mean under the null, in [0, 1].
        alpha: error level for which the bets are sized, in (0, 1); alpha/2 on each of both sides.
        side: "both", "above" (against "at most `null`") or "below" (against "at least `null`").

    Returns:
        The log e-value, finite; 0 without values.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Waudby-Smith and Ramdas (2024), theorem 3 (hedged capital process).

    """
    x, m = to_unit(values, lower_bound=0.0, upper_bound=1.0), float(unit_interval("null", null))
    bets = predictable_bets(x, math.exp(-log_threshold(alpha, side=side)))
    plus, minus = log_growth(x, bets, m), log_growth(1.0 - x, bets, 1.0 - m)
    return float(combined(np.asarray(plus), np.asarray(minus), n=len(x), side=side))


def betting_bounds(values: ArrayLike, *, alpha: float, side: Sides = "both") -> tuple[float, float]:
    """Exact confidence sequence of one stream for the mean.

    Args:
        values: (n,) in order, each in [0, 1].
        alpha: error level, in (0, 1); the bets are sized for it.
        side: "both", "above" (a lower bound only) or "below" (an upper bound only).

    Returns:
        (lower, upper), within [0, 1]: the means with a log e-value below ln(1/alpha). lower > upper, with
        probability at most alpha, where every mean is refuted.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Waudby-Smith and Ramdas (2024), theorem 3 (hedged capital confidence sequence).

    """
    x, target = to_unit(values, lower_bound=0.0, upper_bound=1.0), log_threshold(alpha, side=side)
    bets = predictable_bets(x, math.exp(-target))
    lower = 0.0 if side == "below" else refuted_up_to(x, bets, target)
    upper = 1.0 if side == "above" else 1.0 - refuted_up_to(1.0 - x, bets, target)
    return lower, upper


def predictable_bets(x: FloatArray, alpha: float) -> FloatArray:
    """Bets sqrt(2 ln(1/alpha) / (t ln(1 + t) s2_{t-1})) from the past of each value.

    s2 is the variance around the running mean, with one made-up value of mean 1/2 and variance 1/4 in front.

    Args:
        x: (n,) values >= 0 in order, not necessarily bounded above.
        alpha: level of one side, in (0, 1).

    Source:
        Waudby-Smith and Ramdas (2024), equations (15) and (26).

    """
    t = np.arange(1, len(x) + 1, dtype=np.float64)
    mean = (0.5 + np.cumsum(x)) / (t + 1.0)
    squares = 0.25 + np.cumsum((x - mean) ** 2)
    before = np.concatenate([[0.25], squares[:-1]])[: len(x)]
    return _bet(t, before, alpha=alpha)


def log_growth(x: FloatArray, bets: FloatArray, m: float) -> float:
    """Log capital against the mean m of the gambler who wins if the mean is larger; decreasing in m."""
    most = _TRUNCATION / m if m > _TRUNCATION / 1e300 else math.inf
    return float(np.log1p(np.minimum(bets, most) * (x - m)).sum())


def refuted_up_to(x: FloatArray, bets: FloatArray, target: float) -> float:
    """Largest mean in [0, 1] whose log capital is at least `target`, by bisection; 0 where there is none."""
    if log_growth(x, bets, 0.0) < target:
        return 0.0
    if log_growth(x, bets, 1.0) >= target:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if log_growth(x, bets, middle) >= target:
            low = middle
        else:
            high = middle
    return low


def combined(plus: FloatArray, minus: FloatArray, *, n: int, side: Sides) -> FloatArray:
    """Log e-value of both gamblers, or of the one; the larger of both less ln 2."""
    if side == "both":
        return np.asarray(np.maximum(plus, minus) - (_LOG_2 if n else 0.0))
    return np.asarray(plus if is_above(side) else minus)


def _bet(t: FloatArray, squares: FloatArray, *, alpha: float) -> FloatArray:
    # squares / t is the variance before value t, with the made-up value.
    return np.asarray(np.sqrt(-2.0 * math.log(alpha) / (np.log1p(t) * squares)))


def _bets(steps: NDArray[np.int64], *, n: int, s: int, d: int, alpha: float) -> tuple[FloatArray, int]:
    # Bets on a batch after n values of sum s and squared deviations d, and the batch's squared deviations.
    t = n + np.arange(1, len(steps) + 1, dtype=np.float64)
    mean = (0.5 + sums_after(s, steps) / VALUE_STEPS) / (t + 1.0)
    squares = fine_up((steps / VALUE_STEPS - mean) ** 2)
    return _bet(t, 0.25 + sums_before(d, squares) / FINE_STEPS, alpha=alpha), int(squares.sum())


def _fine_growth(x: FloatArray, bets: FloatArray, *, m: FloatArray) -> NDArray[np.object_]:
    # Log growth over the batch against every grid point, in fine steps, as Python ints.
    with np.errstate(divide="ignore"):
        most = _TRUNCATION / m
    growth = np.zeros(len(m), dtype=np.int64)
    for rows in np.array_split(np.arange(len(x)), 1 + len(x) * len(m) // _BLOCK_ELEMENTS):
        bet = np.minimum(bets[rows, np.newaxis], most)
        growth += fine_down(np.log1p(bet * (x[rows, np.newaxis] - m))).sum(axis=0)
    return growth.astype(object)


def _added(one: tuple[int, ...], two: Any) -> tuple[int, ...]:
    return tuple(int(a + b) for a, b in zip(one, two, strict=True))


def _quotient(numerator: int, denominator: int) -> float:
    try:
        return numerator / denominator
    except OverflowError as error:
        raise ValueError("alpha must lie strictly between 0 and 1") from error


def _integers(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = fields.get(name)
    if not isinstance(values, list):  # a wrong form is one kind of error here
        raise ValueError(f"{name} must be a list of integers")  # noqa: TRY004
    return tuple(integer({name: value}, name) for value in values)
