"""Numbers and arrays of a caller, checked and brought to the shape of the comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._checks import SCALE_MAX, SCALE_MIN, FloatArray, not_negative, positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


COUNT_LIMIT = 2**53


def one_comparison(*counts: ArrayLike) -> None:
    """ValueError unless every arm has a unit."""
    for n in counts:
        if not np.any(np.asarray(n, dtype=np.float64) > 0):
            raise ValueError("n must be at least 1")


def broadcast_summaries(columns: Sequence[ArrayLike], *, stratified: bool) -> list[FloatArray]:
    """Columns of two arms' summaries as floats of one shape (..., E); epochs with an empty arm become 0.

    The first column of each half is its units.
    """
    try:
        arrays = np.broadcast_arrays(*(np.asarray(column, dtype=np.float64) for column in columns))
    except ValueError as error:
        raise ValueError("control and treatment must have fields whose shapes broadcast") from error
    if not stratified:
        arrays = tuple(array[..., np.newaxis] for array in arrays)
    if not arrays[0].ndim:
        raise ValueError("control and treatment must end in an axis of weight epochs if stratified")
    used = (arrays[0] > 0) & (arrays[len(arrays) // 2] > 0)
    return [np.where(used, array, 0.0) for array in arrays]


def steps_of(name: str, scale: ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    """Return quantisation steps broadcast to `shape`; ValueError if one is out of range."""
    steps = positive(name, scale)
    if np.any(steps < SCALE_MIN) or np.any(steps > SCALE_MAX):
        raise ValueError(f"{name} must lie between {SCALE_MIN} and {SCALE_MAX}")
    return shaped(name, steps, shape)


def shaped(name: str, value: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Return `value` broadcast to `shape`; ValueError if it does not fit."""
    try:
        return np.broadcast_to(value, shape)
    except ValueError as error:
        raise ValueError(f"{name} must broadcast to the shape {shape}, got {value.shape}") from error


def whole(name: str, value: ArrayLike) -> FloatArray:
    """Return counts as float64 of any shape; ValueError unless whole, >= 0 and below 2**53."""
    counts = not_negative(name, value)
    if np.any(counts != np.floor(counts)):
        raise ValueError(f"{name} must be a whole number")
    if np.any(counts >= COUNT_LIMIT):
        raise ValueError(f"{name} must be below 2**53")
    return counts
