"""Correctly rounded quotients of exact integers, for whole arrays at the price of floats.

Each value is the float nearest to the exact rational, as Python's division of integers gives it. Columns
whose integers fit 61 bits are divided in pairs of floats (a value and its rounding error), with a bound on
the error that is left; where that bound does not settle the last bit, and for larger integers, the element
is divided in Python. So the answers never depend on which way was taken.

Sources: Dekker (1971), Numerische Mathematik 18, 224-242 (exact product); Ziv (1991), ACM Transactions on
Mathematical Software 17(3), 410-423 (rounding test with exact fallback).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stream_xp.stats._checks import FloatArray

Integers: TypeAlias = NDArray[Any]
"""Exact whole numbers: int64 below the limits here, Python ints (dtype object) otherwise."""

COUNT_LIMIT = 2**52
VALUE_LIMIT = 2**61
_SPLITTER = 2.0**27 + 1.0
# Twice the bound derived in `_pair_quotient`.
_SLACK = 2.0**-97


def integers(name: str, value: Any) -> Integers:
    """Return `value` as exact integers of any shape; ValueError unless it holds whole numbers only."""
    array = value if isinstance(value, np.ndarray) else _read(value)
    if array.dtype == object:
        if not set(map(type, array.ravel().tolist())) <= {int}:
            raise ValueError(f"{name} must hold Python ints only, in rows of one length")
    elif array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold whole numbers, its type is {array.dtype}")
    if array.dtype == np.uint64:
        array = array.astype(object)
    try:
        return array.astype(np.int64)
    except OverflowError:
        return array


def _read(value: Any) -> NDArray[Any]:
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        return np.array([None])
    # Anything but plain integers is read again as the objects that it is made of.
    return array if array.dtype == np.int64 else np.array(value, dtype=object)


def common_kind(columns: dict[str, Integers]) -> dict[str, Integers]:
    """Columns in one type, in which two of them may be added; "n" is the column of counts."""
    fits = all(
        column.dtype != object and _largest(column) < (COUNT_LIMIT if name == "n" else VALUE_LIMIT)
        for name, column in columns.items()
    )
    return columns if fits else {name: column.astype(object) for name, column in columns.items()}


def _largest(column: Integers) -> int:
    return max(int(column.max(initial=0)), -int(column.min(initial=0)))


def quotient(numerator: Integers, denominator: Integers) -> FloatArray:
    """Return numerator / denominator, each correctly rounded.

    Args:
        numerator: exact integers, any shape.
        denominator: exact counts, > 0, of the same shape.

    Raises:
        ValueError: a quotient is too large for a float.

    """
    if any(a.dtype == object for a in (numerator, denominator)):
        return _python_quotient(numerator.astype(object), denominator.astype(object))
    high, low = _pair(numerator)
    d = denominator.astype(np.float64)
    value, certain = _pair_quotient(high, low, d=(d, np.zeros(d.shape)), size=np.abs(high))
    if not certain.all():
        rest = ~certain
        value[rest] = _python_quotient(numerator[rest].astype(object), denominator[rest].astype(object))
    return value


def spread_quotient(n: Integers, q: Integers, s: Integers, *, t: Integers, lowered: Integers) -> FloatArray:
    """Return (n*q - s*t) / (n*lowered), each correctly rounded.

    Args:
        n: exact counts, > 0, any shape.
        q: exact integers of the same shape.
        s: likewise.
        t: likewise.
        lowered: exact counts, > 0, of the same shape.

    Raises:
        ValueError: a quotient is too large for a float.

    """
    if any(a.dtype == object for a in (n, q, s, t, lowered)):
        n, q, s, t, lowered = (a.astype(object) for a in (n, q, s, t, lowered))
        return _python_quotient(n * q - s * t, n * lowered)
    high, low, size = _spread_pair(n, q, s, t=t)
    d = _two_product(n.astype(np.float64), lowered.astype(np.float64))
    value, certain = _pair_quotient(high, low, d=d, size=size)
    if not certain.all():
        n, q, s, t, lowered = (a[~certain].astype(object) for a in (n, q, s, t, lowered))
        value[~certain] = _python_quotient(n * q - s * t, n * lowered)
    return value


def any_negative_spread(n: Integers, q: Integers, s: Integers) -> bool:
    """Whether n*q < s*s anywhere, decided exactly."""
    if n.dtype != object:
        high, low, size = _spread_pair(n, q, s, t=s)
        doubtful = high + low < _SLACK * size
        n, q, s = (a[doubtful].astype(object) for a in (n, q, s))
    return bool(np.any(n * q < s * s))


def _python_quotient(numerator: Integers, denominator: Integers) -> FloatArray:
    # The true division of two Python ints is correctly rounded whatever their size.
    try:
        return np.asarray(np.true_divide(numerator, denominator), dtype=np.float64)
    except OverflowError as error:
        raise ValueError("s and q must give a mean and a variance that fit a float") from error


def _pair(values: Integers) -> tuple[FloatArray, FloatArray]:
    high = values.astype(np.float64)
    return high, (values - high.astype(np.int64)).astype(np.float64)


def _spread_pair(
    n: Integers, q: Integers, s: Integers, *, t: Integers
) -> tuple[FloatArray, FloatArray, FloatArray]:
    # n*q - s*t as a pair of floats, and M = |n*q| + |s*t|; the pair is off by less than 2**-100 * M. Exact
    # are both leading products and their difference; what is rounded is of the order 2**-53 * M, and there
    # are fewer than 32 such roundings.
    count, (qh, ql), (sh, sl), (th, tl) = n.astype(np.float64), _pair(q), _pair(s), _pair(t)
    (p, p_rest), (r, r_rest) = _two_product(count, qh), _two_product(sh, th)
    high, rest = _two_sum(p, -r)
    rest = rest + ((p_rest - r_rest) + (count * ql - (sh * tl + sl * th + sl * tl)))
    return *_two_sum(high, rest), np.abs(p) + np.abs(r)


def _pair_quotient(
    high: FloatArray, low: FloatArray, *, d: tuple[FloatArray, FloatArray], size: FloatArray
) -> tuple[FloatArray, NDArray[np.bool_]]:
    # (high + low) / (d[0] + d[1]) and where it is certainly the correctly rounded quotient, given that
    # high + low is off by less than 2**-100 * size and |high| <= 2 * size. The remainder of the leading
    # quotient is exact (Dekker); the correction adds less than 2**-100 * |quotient| of error.
    lead = high / d[0]
    product, rest = _two_product(lead, d[0])
    change = (((high - product) - rest) + (low - lead * d[1])) / d[0]
    slack = _SLACK * (size / d[0])
    value = lead + (change + slack)
    return value, np.asarray(value == lead + (change - slack))


def _two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    total = a + b
    moved = total - a
    return total, (a - (total - moved)) + (b - moved)


def _two_product(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    (ah, al), (bh, bl) = _split(a), _split(b)
    product = a * b
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def _split(a: FloatArray) -> tuple[FloatArray, FloatArray]:
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high
