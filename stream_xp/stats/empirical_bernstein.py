"""Empirical Bernstein confidence sequence for the mean of bounded values, mergeable by addition.

The sum of deviations from the mean is compared with V, the sum of squared distances of each value from a
centre that was fixed before the value was seen. Because every centre is predictable, sums over partitions
stay valid whatever the order in which the partitions were read.

Assumptions: values lie in [0, 1] (rescale others) and have the same mean given the past; nothing else.
Non-asymptotic. The tuning constant is frozen before the first look.

Source: Howard, Ramdas, McAuliffe and Sekhon (2021), Annals of Statistics 49(2), 1055-1080, theorem 4
(empirical Bernstein) and proposition 9 (gamma-exponential mixture).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stream_xp.stats._boundaries import (
    Sides,
    gamma_exponential_boundary,
    gamma_exponential_log_e,
    is_above,
    tuned_rho,
)
from stream_xp.stats._checks import FloatArray, level, not_negative, positive
from stream_xp.stats._codec import decimal, integer, pack, unpack
from stream_xp.stats._predictable import FINE_STEPS, VALUE_STEPS, batches, fine_up, sums_before, unit_interval

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

_TAG, _VERSION = "EBRN", 1
_LOG_2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class EmpiricalBernstein:
    """Count, sum and predictable squared deviations of values in [0, 1]. Order-dependent.

    It lives per partition: `update` depends on the order of the values, and its centre is the mean of the
    values that this partition has seen before (1/2 for the first). Merging is addition, exact and
    commutative. All three are exact integers, so a stream gives the same statistic for every batching.

    Attributes:
        n: number of values, >= 0.
        s: sum of the values, in steps of 2^-36.
        v: sum of squared deviations from the predictable centres, in steps of 2^-44, rounded up.

    Raises:
        ValueError: a field is no Python int or impossible for values in [0, 1].

    """

    n: int
    s: int
    v: int

    def __post_init__(self) -> None:
        for name in ("n", "s", "v"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a Python int")
        if self.n < 0:
            raise ValueError(f"n must not be negative, got {self.n}")
        if not 0 <= self.s <= self.n * VALUE_STEPS:
            raise ValueError("s must lie between 0 and n values of 1")
        if not 0 <= self.v <= self.n * FINE_STEPS:
            raise ValueError("v must lie between 0 and n squared deviations of 1")

    @classmethod
    def empty(cls) -> EmpiricalBernstein:
        """Return the statistic of no values, the identity of `merge`."""
        return cls(0, 0, 0)

    def update(self, values: ArrayLike) -> EmpiricalBernstein:
        """Return the statistic after `values`, one-dimensional, in order, each in [0, 1].

        Raises:
            ValueError: a value is not finite or outside [0, 1].

        """
        n, s, v = self.n, self.s, self.v
        for steps in batches(values):
            seen = n + np.arange(len(steps), dtype=np.float64)
            before = sums_before(s, steps)
            centre = np.where(seen > 0, before / (np.maximum(seen, 1.0) * VALUE_STEPS), 0.5)
            v += int(fine_up((steps / VALUE_STEPS - centre) ** 2).sum())
            n, s = n + len(steps), s + int(steps.sum())
        return EmpiricalBernstein(n, s, v)

    def merge(self, other: EmpiricalBernstein) -> EmpiricalBernstein:
        """Return the statistic of both partitions together; exact, commutative and associative."""
        return EmpiricalBernstein(self.n + other.n, self.s + other.s, self.v + other.v)

    def __add__(self, other: EmpiricalBernstein) -> EmpiricalBernstein:
        """Return `merge` of both."""
        return self.merge(other) if isinstance(other, EmpiricalBernstein) else NotImplemented

    @property
    def total(self) -> float:
        """Sum of the values."""
        return self.s / VALUE_STEPS

    @property
    def intrinsic_time(self) -> float:
        """V, the sum of squared deviations from the predictable centres."""
        return self.v / FINE_STEPS

    def to_bytes(self) -> bytes:
        """Return the canonical binary form."""
        return pack(_TAG, _VERSION, (self.n, self.s, self.v))

    @classmethod
    def from_bytes(cls, data: bytes) -> EmpiricalBernstein:
        """Return the statistic of a binary form; ValueError if it is none."""
        numbers = unpack(data, _TAG, _VERSION)
        if len(numbers) != 3:
            raise ValueError("data must hold n, s and v")
        return cls(*numbers)

    def to_json(self) -> dict[str, Any]:
        """Return the canonical JSON object."""
        return {"version": _VERSION, "n": decimal(self.n), "s": decimal(self.s), "v": decimal(self.v)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> EmpiricalBernstein:
        """Return the statistic of a JSON object; ValueError if it is none."""
        if integer(fields, "version") != _VERSION:
            raise ValueError(f"version must be {_VERSION}")
        return cls(integer(fields, "n"), integer(fields, "s"), integer(fields, "v"))


def empirical_bernstein_rho(v_opt: float, alpha: float, *, side: Sides = "both") -> float:
    """Tuning constant of the sequence that is tightest near V = `v_opt`.

    Args:
        v_opt: planned number of values times the variance expected on the unit interval, > 0.
        alpha: error level, in (0, 1); with one side in (0, 0.5).
        side: "both", or the one side that is used.

    Returns:
        rho > 0, in the unit of V.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), section 3.5; each of both sides has alpha/2.

    """
    if side == "both":
        return float(tuned_rho(v_opt, alpha))
    if not 0 < alpha < 0.5:
        raise ValueError("alpha must lie strictly between 0 and 0.5 for a one-sided test")
    return float(tuned_rho(v_opt, 2.0 * alpha))


def empirical_bernstein_log_e(
    n: ArrayLike, total: ArrayLike, v: ArrayLike, *, null: ArrayLike, rho: ArrayLike, side: Sides = "both"
) -> FloatArray:
    """Log e-value against "the mean is `null`" ("both"), "at most" ("above") or "at least null" ("below").

    With M(s) the gamma-exponential mixture at V and s = total - n * null it is ln M(s) for "above",
    ln M(-s) for "below" and max(ln M(s), ln M(-s)) - ln 2 for "both" (0 where n is 0).
    Non-asymptotic.

    Args:
        n: number of values, >= 0, any shape.
        total: their sum, between 0 and n, broadcast.
        v: V, sum of squared deviations from predictable centres, >= 0, broadcast.
        null: mean under the null, in [0, 1], broadcast.
        rho: tuning constant (`empirical_bernstein_rho`), > 0, broadcast.
        side: which deviations count as evidence.

    Returns:
        The log e-value, finite, of the broadcast shape (0-d for scalars).

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), theorem 4 with proposition 9.

    """
    count, mean = not_negative("n", n), unit_interval("null", null)
    s = _total(total, count) - count * mean
    time, constant = not_negative("v", v), positive("rho", rho)
    if side == "both":
        # M increases in s, so the larger of both sides is that of the larger deviation.
        larger = gamma_exponential_log_e(np.abs(s), time, rho=constant)
        return np.asarray(larger - np.where(count > 0, _LOG_2, 0.0))
    return gamma_exponential_log_e(s if is_above(side) else -s, time, rho=constant)


def empirical_bernstein_bounds(
    n: ArrayLike, total: ArrayLike, v: ArrayLike, *, alpha: ArrayLike, rho: ArrayLike, side: Sides = "both"
) -> tuple[FloatArray, FloatArray]:
    """Confidence sequence for the mean: the means in [0, 1] with a log e-value below ln(1/alpha).

    total/n -+ u(V)/n with the gamma-exponential boundary u, at alpha/2 on each of both sides.

    Args:
        n: number of values, >= 0, any shape.
        total: their sum, between 0 and n, broadcast.
        v: V, sum of squared deviations from predictable centres, >= 0, broadcast.
        alpha: error level in (0, 1), broadcast.
        rho: tuning constant (`empirical_bernstein_rho`), > 0, broadcast.
        side: "both", "above" (a lower bound only) or "below" (an upper bound only).

    Returns:
        (lower, upper) of the broadcast shape, within [0, 1]; (0, 1) where n is 0.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), theorem 4 with proposition 9.

    """
    count, time = not_negative("n", n), not_negative("v", v)
    share = level("alpha", alpha) * (0.5 if side == "both" else 1.0)
    units = np.maximum(count, 1.0)
    mean = np.where(count > 0, _total(total, count) / units, 0.5)
    radius = gamma_exponential_boundary(time, rho=positive("rho", rho), alpha=np.asarray(share)) / units
    radius = np.where(count > 0, radius, 1.0)
    lower, upper = np.clip(mean - radius, 0.0, 1.0), np.clip(mean + radius, 0.0, 1.0)
    if side == "both":
        return lower, upper
    return (lower, np.ones_like(upper)) if is_above(side) else (np.zeros_like(lower), upper)


def _total(total: ArrayLike, n: FloatArray) -> FloatArray:
    value = not_negative("total", total)
    if (value > n * (1.0 + 1e-12)).any():
        raise ValueError("total must not exceed n, as values lie in [0, 1]")
    return value
