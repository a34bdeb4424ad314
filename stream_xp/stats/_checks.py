"""Argument checks of the statistics: each names the argument and the rule it broke."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

FloatArray: TypeAlias = NDArray[np.float64]

SCALE_MIN = 1e-100
SCALE_MAX = 1e100


def finite(name: str, value: ArrayLike) -> FloatArray:
    """Return `value` as float64 of any shape; ValueError unless every element is finite."""
    if type(value) is float and math.isfinite(value):
        # The common case at a tenth of the price; a float64 scalar has the methods of a 0-d array.
        return cast("FloatArray", np.float64(value))
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numeric") from error
    except OverflowError as error:
        raise ValueError(f"{name} must be finite") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    return array


def not_negative(name: str, value: ArrayLike) -> FloatArray:
    """Return `value` as float64 of any shape; ValueError unless every element is finite and >= 0."""
    array = finite(name, value)
    if _some(array < 0):
        raise ValueError(f"{name} must not be negative")
    return array


def positive(name: str, value: ArrayLike) -> FloatArray:
    """Return `value` as float64 of any shape; ValueError unless every element is finite and > 0."""
    array = finite(name, value)
    if _some(array <= 0):
        raise ValueError(f"{name} must be greater than 0")
    return array


def level(name: str, value: ArrayLike) -> FloatArray:
    """Return an error level as float64 of any shape; ValueError unless strictly between 0 and 1."""
    array = finite(name, value)
    if _some(array <= 0) or _some(array >= 1):
        raise ValueError(f"{name} must lie strictly between 0 and 1")
    return array


def _some(mask: NDArray[np.bool_]) -> bool:
    return bool(mask.any()) if mask.ndim else bool(mask)


def step(name: str, value: float) -> float:
    """Return a quantisation step; ValueError unless its square stays an ordinary float."""
    if not (math.isfinite(value) and SCALE_MIN <= value <= SCALE_MAX):
        raise ValueError(f"{name} must lie between {SCALE_MIN} and {SCALE_MAX}")
    return float(value)
