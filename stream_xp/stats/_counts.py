"""Checks of counts and weights that several tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._checks import FloatArray, finite, positive

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

COUNT_LIMIT = 2**53
_SUM_TOLERANCE = 1e-9


def whole(name: str, value: ArrayLike) -> FloatArray:
    """Return integers of any shape as float64; ValueError unless 0 <= value < 2**53 and the type is an integer's."""
    array = np.asarray(value)
    if array.dtype == object and all(type(item) is int for item in array.flat):
        raise ValueError(f"{name} must not be negative and must be below 2**53")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers")
    if (array < 0).any() or (array >= COUNT_LIMIT).any():
        raise ValueError(f"{name} must not be negative and must be below 2**53")
    return array.astype(np.float64)


def epochs(counts: ArrayLike, weights: ArrayLike, *, name: str = "counts") -> tuple[FloatArray, FloatArray]:
    """Return counts (..., E, K) and weights of a broadcastable shape, each row of weights scaled to sum to 1.

    A row without any weight is padding: it must have no count, and stays 0.

    Raises:
        ValueError: shapes do not fit, counts are no counts, weights are no distributions, or there is a
            count where there is no weight.

    """
    n, rho = np.asarray(counts), finite("weights", weights)
    if rho.ndim < 2 or rho.shape[-1] < 2 or not rho.shape[-2]:
        raise ValueError("weights must have one row per epoch and at least two arms")
    if n.shape[-2:] != rho.shape[-2:]:
        raise ValueError(f"{name} must end in the shape of weights {rho.shape[-2:]}, got {n.shape}")
    n, rho = whole(name, n), distributions(rho)
    if not _fit(n.shape, rho.shape):
        raise ValueError(f"{name} must have a shape that fits weights {rho.shape}, got {n.shape}")
    if ((n > 0) & (rho == 0)).any():
        raise ValueError(f"weights must be greater than 0 wherever {name} are")
    return n, rho


def distributions(weights: FloatArray) -> FloatArray:
    """Return the rows of `weights`, each scaled to sum to 1; rows of zeros stay."""
    total = weights.sum(axis=-1, keepdims=True)
    padding = (weights == 0).all(axis=-1, keepdims=True)
    if not ((weights >= 0) & (weights <= 1)).all() or (np.abs(total - 1.0) > _SUM_TOLERANCE)[~padding].any():
        raise ValueError("weights must lie in [0, 1] and each row must sum to 1 within 1e-9")
    return np.asarray(weights / np.where(padding, 1.0, total))


def spread(value: float) -> float:
    """Return a standard deviation of log odds; ValueError unless it lies in [1e-6, 100]."""
    if not float(positive("sd", value)) <= 100 or value < 1e-6:
        raise ValueError(f"sd must lie between 1e-6 and 100, got {value}")
    return float(value)


def strength(value: float) -> float:
    """Return a concentration; ValueError unless it lies in [1e-6, 1e12]."""
    if not float(positive("concentration", value)) <= 1e12 or value < 1e-6:
        raise ValueError(f"concentration must lie between 1e-6 and 1e12, got {value}")
    return float(value)


def _fit(*shapes: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True
