"""Fixed-point arithmetic of order-dependent statistics: the same numbers for every batching.

A value on the unit interval is held in steps of 2^-36, a squared deviation or a log capital in steps of
2^-44, rounded towards less evidence. Sums are then integers: they merge exactly, and a stream gives the
same statistic whether it is folded value by value or in batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._checks import FloatArray, finite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

VALUE_STEPS = 2**36
FINE_STEPS = 2**44
# Fewer than this many fine steps of at most 16 each still fit an int64.
_BATCH = 2**14


def to_unit(values: ArrayLike, *, lower_bound: float, upper_bound: float) -> FloatArray:
    """Return (values - lower_bound) / (upper_bound - lower_bound), one-dimensional, in [0, 1].

    Raises:
        ValueError: the bounds are not finite or not ascending, or a value lies outside them.

    """
    low, high = float(finite("lower_bound", lower_bound)), float(finite("upper_bound", upper_bound))
    width = high - low
    if not 0 < width < np.inf:
        raise ValueError("upper_bound must be greater than lower_bound, and their distance finite")
    x = finite("values", values)
    if x.ndim != 1:
        raise ValueError(f"values must be one-dimensional, got the shape {x.shape}")
    if (x < low).any() or (x > high).any():
        raise ValueError("values must lie between lower_bound and upper_bound")
    return np.clip((x - low) / width, 0.0, 1.0)


def unit_interval(name: str, value: ArrayLike) -> FloatArray:
    """Return `value` as float64 of any shape; ValueError unless every element lies in [0, 1]."""
    array = finite(name, value)
    if ((array < 0) | (array > 1)).any():
        raise ValueError(f"{name} must lie in [0, 1]")
    return array


def batches(values: ArrayLike) -> Iterator[NDArray[np.int64]]:
    """Yield the values of the unit interval in steps of 2^-36, in order, in batches of a safe size."""
    steps = np.rint(to_unit(values, lower_bound=0.0, upper_bound=1.0) * VALUE_STEPS).astype(np.int64)
    for at in range(0, len(steps), _BATCH):
        yield steps[at : at + _BATCH]


def sums_after(start: int, steps: NDArray[np.int64]) -> FloatArray:
    """Return `start` plus the running sum of `steps`, each sum exact and then rounded once."""
    if start + int(steps.sum()) < 2**63:
        return (np.cumsum(steps) + start).astype(np.float64)
    exact = np.cumsum(steps.astype(object)) + start
    return exact.astype(np.float64)


def sums_before(start: int, steps: NDArray[np.int64]) -> FloatArray:
    """Return `start` plus the sum of the earlier `steps`, each sum exact and then rounded once."""
    return np.concatenate([[float(start)], sums_after(start, steps)])[:-1]


def fine_up(values: FloatArray) -> NDArray[np.int64]:
    """Return values of at most 16 in steps of 2^-44, rounded up."""
    return np.ceil(values * FINE_STEPS).astype(np.int64)


def fine_down(values: FloatArray) -> NDArray[np.int64]:
    """Return values of at most 16 in steps of 2^-44, rounded down."""
    return np.floor(values * FINE_STEPS).astype(np.int64)
