"""Many comparisons as arrays: exact moments, means with their variances, and evidence."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._checks import FloatArray
from stream_xp.stats._exact_quotients import (
    Integers,
    any_negative_spread,
    common_kind,
    integers,
    quotient,
    spread_quotient,
)
from stream_xp.stats.batch.shapes import COUNT_LIMIT
from stream_xp.stats.mean_difference import NO_VARIANCE, TOO_FEW_UNITS, UNBOUNDED_LIFT, ArmMeans
from stream_xp.stats.normal_mixture import Evidence, Undetermined, p_always_valid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from stream_xp.stats.cross_moments import CrossMoments
    from stream_xp.stats.moments import Moments

DENOMINATOR_NEAR_ZERO = "a denominator mean is not separated from zero"
REASONS = ("", TOO_FEW_UNITS, NO_VARIANCE, UNBOUNDED_LIFT, DENOMINATOR_NEAR_ZERO)
"""Why an element is undetermined, by its code; code 0 means that it is determined."""
CODES = {reason: code for code, reason in enumerate(REASONS)}


@dataclass(frozen=True, slots=True, eq=False)
class MomentArrays:
    """Exact moments of one arm in many comparisons; fields as in `Moments`, all of the shape (..., E).

    Attributes:
        n: units, >= 0 and below 2**53; integers as an array, or as nested sequences of Python ints.
        s: sums of the values, in quantisation steps.
        q: sums of the squared values, in squared quantisation steps.

    Raises:
        ValueError: shapes differ, a field holds no whole numbers, or an element is impossible as in `Moments`.

    """

    n: Integers
    s: Integers
    q: Integers

    def __post_init__(self) -> None:
        _make_exact(self)
        _check_counts(self.n, (self.s, self.q))
        if any_negative_spread(self.n, self.q, self.s):
            raise ValueError("q must satisfy n*q >= s*s")

    @classmethod
    def of(cls, rows: Sequence[Moments], shape: tuple[int, ...]) -> MomentArrays:
        """Return the arrays of `rows`, given in the order of an array of `shape`, epochs last."""
        return cls(*(_column(name, rows, shape) for name in ("n", "s", "q")))


@dataclass(frozen=True, slots=True, eq=False)
class CrossArrays:
    """Exact cross moments of one arm in many comparisons; fields as in `CrossMoments`, all (..., E).

    Attributes:
        n: units, >= 0 and below 2**53; integers as an array, or as nested sequences of Python ints.
        sx: sums of x.
        sy: sums of y.
        sxx: sums of x*x.
        syy: sums of y*y.
        sxy: sums of x*y.

    Raises:
        ValueError: shapes differ, a field holds no whole numbers, or an element is impossible as in
            `CrossMoments`.

    """

    n: Integers
    sx: Integers
    sy: Integers
    sxx: Integers
    syy: Integers
    sxy: Integers

    def __post_init__(self) -> None:
        _make_exact(self)
        _check_counts(self.n, (self.sx, self.sy, self.sxx, self.syy, self.sxy))
        if any_negative_spread(self.n, self.sxx, self.sx):
            raise ValueError("sxx must satisfy n*sxx >= sx*sx")
        if any_negative_spread(self.n, self.syy, self.sy):
            raise ValueError("syy must satisfy n*syy >= sy*sy")
        if not _cauchy_schwarz(self):
            raise ValueError("sxy must satisfy (n*sxy - sx*sy)^2 <= (n*sxx - sx*sx) * (n*syy - sy*sy)")

    @classmethod
    def of(cls, rows: Sequence[CrossMoments], shape: tuple[int, ...]) -> CrossArrays:
        """Return the arrays of `rows`, given in the order of an array of `shape`, epochs last."""
        return cls(*(_column(name, rows, shape) for name in ("n", "sx", "sy", "sxx", "syy", "sxy")))


@dataclass(frozen=True, slots=True, eq=False)
class MeansArrays:
    """`ArmMeans` of many comparisons; every field has the shape (...) of the comparisons.

    Attributes:
        control_mean: as in `ArmMeans`; where undetermined, of no meaning but finite.
        treatment_mean: likewise.
        control_variance: likewise; +inf where undetermined.
        treatment_variance: likewise; +inf where undetermined.
        n: units of both arms in the epochs used, as floats.
        reason: code of `REASONS`, int8; 0 where determined.
        control_loading: as in `ArmMeans`; 0 where undetermined.
        treatment_loading: likewise.

    """

    control_mean: FloatArray
    treatment_mean: FloatArray
    control_variance: FloatArray
    treatment_variance: FloatArray
    n: FloatArray
    reason: NDArray[np.int8]
    control_loading: FloatArray = field(default_factory=lambda: np.zeros(()))
    treatment_loading: FloatArray = field(default_factory=lambda: np.zeros(()))

    def __post_init__(self) -> None:
        for name in ("control_loading", "treatment_loading"):
            object.__setattr__(self, name, np.broadcast_to(getattr(self, name), self.n.shape))

    @property
    def undetermined(self) -> NDArray[np.bool_]:
        """Where the data do not determine the means, bool of the shape (...)."""
        return np.asarray(self.reason != 0)

    def at(self, index: Any = ()) -> ArmMeans | Undetermined:
        """Return one element, as `summarise` returns it; without an index the only one."""
        if self.reason[index]:
            return Undetermined(REASONS[int(self.reason[index])])
        return ArmMeans(
            control_mean=float(self.control_mean[index]),
            treatment_mean=float(self.treatment_mean[index]),
            control_variance=float(self.control_variance[index]),
            treatment_variance=float(self.treatment_variance[index]),
            n=int(self.n[index]),
            control_loading=float(self.control_loading[index]),
            treatment_loading=float(self.treatment_loading[index]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class EvidenceArrays:
    """`Evidence` of many comparisons; every field has the shape (...) of the comparisons.

    Attributes:
        estimate: as in `Evidence`; 0 where undetermined.
        lower: likewise; -inf where undetermined.
        upper: likewise; +inf where undetermined.
        log_e: likewise; 0 where undetermined.
        n: units of both arms, as floats.
        reason: code of `REASONS`, int8; 0 where determined.

    """

    estimate: FloatArray
    lower: FloatArray
    upper: FloatArray
    log_e: FloatArray
    n: FloatArray
    reason: NDArray[np.int8]

    @property
    def undetermined(self) -> NDArray[np.bool_]:
        """Where the data do not determine the quantity, bool of the shape (...)."""
        return np.asarray(self.reason != 0)

    @property
    def p_always_valid(self) -> FloatArray:
        """The always-valid p of this look, element by element; 1 where undetermined."""
        return np.asarray(p_always_valid(self.log_e))

    def at(self, index: Any = ()) -> Evidence | Undetermined:
        """Return one element, as the scalar function returns it; without an index the only one."""
        if self.reason[index]:
            return Undetermined(REASONS[int(self.reason[index])])
        estimate, lower, upper, log_e = (
            float(column[index]) for column in (self.estimate, self.lower, self.upper, self.log_e)
        )
        return Evidence(estimate, lower, upper, log_e, int(self.n[index]))


def rounded_moments(n: ArrayLike, s: ArrayLike, q: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Mean and sum of squared deviations of many moments, each the correctly rounded exact quotient.

    Args:
        n: whole numbers >= 1 and below 2**53, any shape, as an array or nested sequences of Python ints.
        s: whole numbers of the same shape.
        q: whole numbers of the same shape, n*q >= s*s.

    Returns:
        (s/n, (n*q - s*s)/n) in steps and squared steps, of the same shape.

    Raises:
        ValueError: an argument breaks a rule above, or a quotient is too large for a float.

    """
    rows = MomentArrays(*(cast("Integers", column) for column in (n, s, q)))
    if np.any(rows.n < 1):
        raise ValueError("n must be at least 1")
    squares = spread_quotient(rows.n, rows.q, rows.s, t=rows.s, lowered=np.ones_like(rows.n))
    return quotient(rows.s, rows.n), squares


def exact_columns(*arms: MomentArrays | CrossArrays) -> list[list[Integers]]:
    """Columns of arms of one kind, broadcast to one shape, in a type in which sums of arms stay exact.

    Raises:
        ValueError: the shapes do not broadcast.

    """
    columns = [[getattr(arm, column.name) for column in fields(arm)] for arm in arms]
    try:
        shape = np.broadcast_shapes(*(rows[0].shape for rows in columns))
    except ValueError as error:
        raise ValueError("control and treatment must have shapes that broadcast") from error
    if not shape:
        raise ValueError("control and treatment must end in an axis of weight epochs")
    if any(rows[0].dtype == object for rows in columns):
        columns = [[column.astype(object) for column in rows] for rows in columns]
    return [[np.broadcast_to(column, shape) for column in rows] for rows in columns]


def used_columns(
    control: MomentArrays | CrossArrays, treatment: MomentArrays | CrossArrays
) -> list[list[Integers]]:
    """Columns of both arms of one shape; epochs with an empty arm become 0 throughout."""
    c, t = exact_columns(control, treatment)
    used = (c[0] > 0) & (t[0] > 0)
    if used.all():
        return [c, t]
    return [[column * used for column in rows] for rows in (c, t)]


def _column(name: str, rows: Sequence[Any], shape: tuple[int, ...]) -> Integers:
    column = integers("rows", [getattr(row, name) for row in rows])
    try:
        return column.reshape(shape)
    except ValueError as error:
        raise ValueError(f"rows must fill the shape {shape}, there are {len(rows)}") from error


def _make_exact(rows: MomentArrays | CrossArrays) -> None:
    columns = {column.name: integers(column.name, getattr(rows, column.name)) for column in fields(rows)}
    for name, column in columns.items():
        if column.shape != columns["n"].shape:
            raise ValueError(f"{name} must have the shape of n {columns['n'].shape}, got {column.shape}")
    for name, column in common_kind(columns).items():
        object.__setattr__(rows, name, column)


def _cauchy_schwarz(rows: CrossArrays) -> bool:
    # Exact only where floats leave a doubt.
    n = np.maximum(rows.n, 1)
    xx, yy, xy = (
        spread_quotient(n, product, first, t=second, lowered=np.ones_like(n))
        for product, first, second in (
            (rows.sxx, rows.sx, rows.sx),
            (rows.syy, rows.sy, rows.sy),
            (rows.sxy, rows.sx, rows.sy),
        )
    )
    doubtful = np.abs(xy) > np.sqrt(xx) * np.sqrt(yy) * (1.0 - 1e-12)
    n, sx, sy, sxx, syy, sxy = (getattr(rows, c.name)[doubtful].astype(object) for c in fields(rows))
    return bool(np.all((n * sxy - sx * sy) ** 2 <= (n * sxx - sx * sx) * (n * syy - sy * sy)))


def _check_counts(n: Integers, sums: Sequence[Integers]) -> None:
    if np.any(n < 0):
        raise ValueError("n must not be negative")
    if np.any(n >= COUNT_LIMIT):
        raise ValueError("n must be below 2**53")
    empty = n == 0
    if np.any(empty) and any(np.any(column[empty] != 0) for column in sums):
        raise ValueError("every sum must be 0 where n is 0")
