"""Exact, mergeable histogram of non-negative quantised values on fixed log-linear bins.

A value is an integer number of steps. Values below 32 have a bin of their own; above, each octave is cut
into 32 bins, so a bin is never wider than 1/32 of its lower edge. In integers, with e = bit_length(v) - 6,

    bin(v) = v                   for v < 32,
    bin(v) = 32 * e + (v >> e)   for v >= 32,

where v >> e lies in [32, 64). The last bin of an octave is 32 * e + 63, the first of the next one
32 * (e + 1) + 32: bins are contiguous, and the order of bins is the order of values. The count of values
below an edge is therefore exact, whatever was merged, in whichever order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._checks import FloatArray, step
from stream_xp.stats._codec import decimal, integer, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

IntArray: TypeAlias = NDArray[np.int64]

STEPS_LIMIT = 2**62
BINS_PER_OCTAVE = 32
_BINS = 1856  # bins of the values below STEPS_LIMIT
_COUNT_LIMIT = 2**53
_TAG, _VERSION = "LHST", 1
_POWERS: IntArray = 2 ** np.arange(63, dtype=np.int64)


@overload
def bin_of(steps: int) -> int: ...
@overload
def bin_of(steps: IntArray) -> IntArray: ...
def bin_of(steps: int | IntArray) -> int | IntArray:
    """Bin of a value, exact.

    Args:
        steps: the value in quantisation steps, a Python int or an integer array of any shape; 0 to 2**62 - 1.

    Returns:
        The bin, of the same shape; non-decreasing in `steps`.

    Raises:
        ValueError: `steps` is no integer or out of range.

    """
    if type(steps) is int:
        _require(name="steps", low=steps, high=steps, limit=STEPS_LIMIT)
        e = max(steps.bit_length() - 6, 0)
        return BINS_PER_OCTAVE * e + (steps >> e)
    v = _integers("steps", steps, limit=STEPS_LIMIT)
    exponent = np.maximum(np.searchsorted(_POWERS, v, side="right") - 6, 0)
    return np.asarray(BINS_PER_OCTAVE * exponent + (v >> exponent))


@overload
def lower_edge(bin_: int) -> int: ...
@overload
def lower_edge(bin_: IntArray) -> IntArray: ...
def lower_edge(bin_: int | IntArray) -> int | IntArray:
    """Smallest value of a bin; its largest is ``lower_edge(bin_ + 1) - 1``.

    Args:
        bin_: a Python int or an integer array of any shape; 0 to 1856 (the edge above the last bin).

    Returns:
        The smallest value in steps, of the same shape.

    Raises:
        ValueError: `bin_` is no integer or out of range.

    """
    if type(bin_) is int:
        _require(name="bin_", low=bin_, high=bin_, limit=_BINS + 1)
        e = max(bin_ // BINS_PER_OCTAVE - 1, 0)
        return (bin_ - BINS_PER_OCTAVE * e) << e
    b = _integers("bin_", bin_, limit=_BINS + 1)
    exponent = np.maximum(b // BINS_PER_OCTAVE - 1, 0)
    return np.asarray((b - BINS_PER_OCTAVE * exponent) << exponent)


def bins_needed(max_steps: int) -> int:
    """Bins that hold every value from 0 to `max_steps`; ValueError unless it is in 0 to 2**62 - 1."""
    if type(max_steps) is not int:
        raise ValueError("max_steps must be a Python int")
    _require(name="max_steps", low=max_steps, high=max_steps, limit=STEPS_LIMIT)
    return bin_of(max_steps) + 1


@dataclass(frozen=True, slots=True)
class LogHistogram:
    """Counts of quantised values per log-linear bin: a commutative monoid under `merge`.

    Attributes:
        bins: (bin, count) pairs, ascending by bin, every count a Python int > 0.

    Raises:
        ValueError: `bins` breaks a rule above.

    """

    bins: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        last = -1
        for pair in self.bins:
            if len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) is not int:
                raise ValueError("bins must be pairs of Python ints")
            if not last < pair[0] < _BINS:
                raise ValueError(f"bins must ascend from 0 to {_BINS - 1}, got bin {pair[0]} after {last}")
            if pair[1] <= 0:
                raise ValueError(f"bins must have counts above 0, got {pair[1]} in bin {pair[0]}")
            last = pair[0]

    @classmethod
    def empty(cls) -> LogHistogram:
        """Return the histogram of no values, the identity of `merge`."""
        return cls(())

    @classmethod
    def from_counts(cls, counts: Mapping[int, int]) -> LogHistogram:
        """Return the histogram with these counts per bin; counts of 0 are left out."""
        return cls(tuple(sorted((b, c) for b, c in counts.items() if c != 0)))

    @classmethod
    def from_values(cls, values: Iterable[int]) -> LogHistogram:
        """Return the histogram of `values`, Python ints in quantisation steps."""
        units = tuple(values)
        if not all(type(v) is int for v in units):
            raise ValueError("values must be Python ints")
        return cls.from_counts(Counter(bin_of(v) for v in units))

    @property
    def n(self) -> int:
        """Number of values."""
        return sum(count for _, count in self.bins)

    def merge(self, other: LogHistogram) -> LogHistogram:
        """Return the histogram of both sets of values together; exact, commutative and associative."""
        counts = dict(self.bins)
        for b, c in other.bins:
            counts[b] = counts.get(b, 0) + c
        return LogHistogram.from_counts(counts)

    def __add__(self, other: LogHistogram) -> LogHistogram:
        """Return `merge` of both."""
        return self.merge(other) if isinstance(other, LogHistogram) else NotImplemented

    def minus(self, other: LogHistogram) -> LogHistogram:
        """Return the histogram without the values of `other`, for units that are taken back out.

        Raises:
            ValueError: `other` holds values that are not here.

        """
        counts = dict(self.bins)
        for b, c in other.bins:
            counts[b] = counts.get(b, 0) - c
            if counts[b] < 0:
                raise ValueError(f"other must be part of this histogram, but has more values in bin {b}")
        return LogHistogram.from_counts(counts)

    def __sub__(self, other: LogHistogram) -> LogHistogram:
        """Return `minus`."""
        return self.minus(other) if isinstance(other, LogHistogram) else NotImplemented

    def count_below(self, bin_: int) -> int:
        """Return the exact number of values below ``lower_edge(bin_)``."""
        return sum(count for b, count in self.bins if b < bin_)

    def dense(self, bins: int) -> IntArray:
        """Return the counts as an int64 array of `bins` elements.

        Raises:
            ValueError: `bins` is too few for the values held, or a count is not below 2**53.

        """
        if self.bins and self.bins[-1][0] >= bins:
            raise ValueError(f"bins must be more than {self.bins[-1][0]}, the last bin in use, got {bins}")
        if self.n >= _COUNT_LIMIT:
            raise ValueError("bins must hold fewer than 2**53 values")
        counts = np.zeros(bins, dtype=np.int64)
        for b, c in self.bins:
            counts[b] = c
        return counts

    def edges_and_counts(self, scale: float) -> tuple[FloatArray, IntArray]:
        """Return the bins in use, from the first to the last, as edges and counts.

        Args:
            scale: value of one quantisation step in metric units, 1e-100 to 1e100.

        Returns:
            (edges, counts): B + 1 ascending edges in metric units, and B counts; count i is of the values
            in [edges[i], edges[i + 1]). Without values: one bin [0, scale) with count 0.

        Raises:
            ValueError: `scale` is out of range, or the counts sum to 2**53 or more.

        """
        first, last = (self.bins[0][0], self.bins[-1][0]) if self.bins else (0, 0)
        edges = lower_edge(np.arange(first, last + 2)).astype(np.float64) * step("scale", scale)
        return edges, self.dense(last + 1)[first:]

    def to_bytes(self) -> bytes:
        """Return the canonical binary form."""
        return pack(_TAG, _VERSION, [number for pair in self.bins for number in pair])

    @classmethod
    def from_bytes(cls, data: bytes) -> LogHistogram:
        """Return the histogram of a binary form; ValueError if it is none."""
        numbers = unpack(data, _TAG, _VERSION)
        if len(numbers) % 2:
            raise ValueError("data must hold pairs of bin and count")
        return cls(tuple(zip(numbers[::2], numbers[1::2], strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Return the canonical JSON object."""
        return {"version": _VERSION, "bins": [[decimal(b), decimal(c)] for b, c in self.bins]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LogHistogram:
        """Return the histogram of a JSON object; ValueError if it is none."""
        if integer(fields, "version") != _VERSION:
            raise ValueError(f"version must be {_VERSION}")
        rows = fields.get("bins")
        if not isinstance(rows, list) or not all(isinstance(r, list) and len(r) == 2 for r in rows):
            raise ValueError("bins must be a list of pairs of bin and count")
        pairs = ({"bin": b, "count": c} for b, c in rows)
        return cls(tuple((integer(pair, "bin"), integer(pair, "count")) for pair in pairs))


def _require(*, name: str, low: int, high: int, limit: int) -> None:
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must not be negative and must be below {limit}")


def _integers(name: str, value: int | IntArray, *, limit: int) -> IntArray:
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be an integer or an array of integers")
    if array.size:
        _require(name=name, low=int(array.min()), high=int(array.max()), limit=limit)
    return array.astype(np.int64)
