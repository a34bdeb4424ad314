"""Means of many comparisons at once: the array form of `mean_difference`, element by element the same.

One element is one comparison: a treatment arm against its control, for one metric of one experiment (and
segment). Arrays have any leading shape; exact moments have one more axis at the end, the weight epochs,
where an epoch that a comparison does not have is a 0 in every field.

An element that the data do not determine has the reason's code, a log e-value of 0 and the whole line as
its sequence; `at` gives one element in the form that the scalar functions return. Guarantees, assumptions
and sources are those of the scalar function of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._checks import SCALE_MAX, SCALE_MIN, FloatArray, finite, level, not_negative, positive
from stream_xp.stats._exact_quotients import (
    Integers,
    any_negative_spread,
    common_kind,
    integers,
    quotient,
    spread_quotient,
)
from stream_xp.stats.mean_difference import (
    EPOCH_UNITS,
    MIN_UNITS_PER_ARM,
    NO_VARIANCE,
    TOO_FEW_UNITS,
    UNBOUNDED_LIFT,
    ArmMeans,
    combined_variance,
    fieller_bounds,
    guarded_variance,
    one_sided,
    two_sided,
)
from stream_xp.stats.normal_mixture import (
    Evidence,
    Undetermined,
    p_always_valid,
    radius_multiplier_two_sided,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from stream_xp.stats.cross_moments import CrossMoments
    from stream_xp.stats.moments import Moments

DENOMINATOR_NEAR_ZERO = "a denominator mean is not separated from zero"

REASONS = ("", TOO_FEW_UNITS, NO_VARIANCE, UNBOUNDED_LIFT, DENOMINATOR_NEAR_ZERO)
"""Why an element is undetermined, by its code; code 0 means that it is determined."""

CODES = {reason: code for code, reason in enumerate(REASONS)}

_COUNT_LIMIT = 2**53


# ---- containers ---------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """Mean and variance of one arm as floats, where exact moments are not at hand.

    Attributes:
        n: units, whole, >= 0 and below 2**53, any shape.
        mean: in metric units, broadcast against `n`.
        variance: of one unit (divisor n - 1), >= 0, broadcast; not read where n < 2.

    Raises:
        ValueError: a field is out of its range.

    """

    n: ArrayLike
    mean: ArrayLike
    variance: ArrayLike

    def __post_init__(self) -> None:
        whole("n", self.n)
        finite("mean", self.mean)
        not_negative("variance", self.variance)


# ---- exact integers to floats -------------------------------------------------------------------------


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
    if np.any(n >= _COUNT_LIMIT):
        raise ValueError("n must be below 2**53")
    empty = n == 0
    if np.any(empty) and any(np.any(column[empty] != 0) for column in sums):
        raise ValueError("every sum must be 0 where n is 0")


# ---- stratified means ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Strata:
    """What the stratified means of two arms are made of, all float64 of the shape (..., E).

    An epoch with an empty arm has 0 units in both arms and 0 in every other field.

    Attributes:
        control_n: units.
        treatment_n: units.
        control_mean: mean of the epoch, in metric units.
        treatment_mean: mean of the epoch.

    """

    control_n: FloatArray
    treatment_n: FloatArray
    control_mean: FloatArray
    treatment_mean: FloatArray

    @property
    def epochs(self) -> FloatArray:
        """Number of epochs used, (...)."""
        return np.asarray((self.control_n > 0).sum(axis=-1), dtype=np.float64)

    @property
    def total(self) -> FloatArray:
        """Units of both arms, (...); exact."""
        return np.asarray((self.control_n + self.treatment_n).sum(axis=-1))

    @property
    def weights(self) -> FloatArray:
        """Share of the units of both arms in each epoch, (..., E)."""
        return (self.control_n + self.treatment_n) / np.maximum(self.total, 1.0)[..., np.newaxis]

    @property
    def degrees(self) -> list[FloatArray]:
        """Degrees of freedom of the within-epoch variance of control and of treatment, each (...)."""
        return [np.maximum(n.sum(axis=-1) - self.epochs, 0.0) for n in (self.control_n, self.treatment_n)]

    @property
    def pooled_degrees(self) -> FloatArray:
        """Degrees of freedom of the within-epoch variance of both arms together, at least 1, (...)."""
        return np.asarray(np.maximum(self.total - self.epochs, 1.0))

    @property
    def too_few(self) -> NDArray[np.bool_]:
        """Where an arm has too few units for any report, (...)."""
        # With several epochs each one costs a degree of freedom; with one the rule counts units.
        spent = np.where(self.epochs == 1, 0.0, self.epochs)
        units = np.minimum(self.control_n.sum(axis=-1), self.treatment_n.sum(axis=-1))
        return np.asarray(units - spent < MIN_UNITS_PER_ARM)


def stratified_means(
    strata: Strata,
    variances: Sequence[FloatArray],
    *,
    spreads: Sequence[FloatArray] | None,
    degrees: Sequence[FloatArray],
    guard: bool = True,
    loadings: Sequence[FloatArray] | None = None,
    reason: NDArray[np.int8] | None = None,
) -> MeansArrays:
    """Stratified means and their guarded variances; the core of every asymptotic comparison.

    Args:
        strata: units and means per epoch, (..., E).
        variances: of one unit in control, in treatment, and in both together, within epochs, each (...).
        spreads: sums of squared deviations in each epoch: of control and of treatment from their own means, and of
            both together from their common mean, each (..., E); not read where only one epoch is used. None takes
            the spread of an arm to be the same in every epoch.
        degrees: degrees of freedom of the first two variances, each (...).
        guard: whether to guard the variances (`guarded_variance`).
        loadings: of the two means on an error that they share, each (...); none by default.
        reason: codes that the caller has found already, (...).

    Returns:
        The means; too few units and no variance are marked, after the codes of `reason`.

    """
    own_control, own_treatment, pooled = variances
    unit = [own_control, own_treatment]
    if guard:
        unit = [guarded_variance(own, pooled, degrees=d) for own, d in zip(unit, degrees, strict=True)]
    code = np.where(strata.too_few, CODES[TOO_FEW_UNITS], 0 if reason is None else reason)
    constant = (pooled == 0) | (unit[0] + unit[1] == 0)
    code = np.where((code == 0) & constant, CODES[NO_VARIANCE], code).astype(np.int8)
    known = code == 0
    mean_variances = _mean_variances(strata, own=variances[:2], unit=unit, spreads=spreads, guard=guard)
    zero = np.zeros(known.shape)
    shared = [zero, zero] if loadings is None else [np.where(known, h, 0.0) for h in loadings]
    return MeansArrays(
        control_mean=finite("control_mean", sum_over_epochs(strata.weights * strata.control_mean)),
        treatment_mean=finite("treatment_mean", sum_over_epochs(strata.weights * strata.treatment_mean)),
        control_variance=np.where(known, finite("control_variance", mean_variances[0]), np.inf),
        treatment_variance=np.where(known, finite("treatment_variance", mean_variances[1]), np.inf),
        n=strata.total,
        reason=code,
        control_loading=shared[0],
        treatment_loading=shared[1],
    )


def _mean_variances(
    strata: Strata,
    *,
    own: Sequence[FloatArray],
    unit: Sequence[FloatArray],
    spreads: Sequence[FloatArray] | None,
    guard: bool,
) -> list[FloatArray]:
    # The larger of two: as if the spread were the same in every epoch, and with the spread of each epoch.
    squared, arms = strata.weights**2, (strata.control_n, strata.treatment_n)
    level = [
        sum_over_epochs(squared * v[..., np.newaxis] / np.maximum(n, 1.0))
        for n, v in zip(arms, unit, strict=True)
    ]
    several = strata.epochs > 1
    if spreads is None or not np.any(several):
        return level
    both = spreads[2] / np.maximum(strata.control_n + strata.treatment_n - 1.0, 1.0)
    by_epoch = [
        sum_over_epochs(squared * _epoch_variances(n, spread, both, own=v, guard=guard) / np.maximum(n, 1.0))
        for n, spread, v in zip(arms, spreads[:2], own, strict=True)
    ]
    return [np.where(several, np.maximum(*pair), pair[0]) for pair in zip(level, by_epoch, strict=True)]


def _epoch_variances(
    n: FloatArray, spread: FloatArray, both: FloatArray, *, own: FloatArray, guard: bool
) -> FloatArray:
    # An arm's variance in each epoch, drawn towards that of both arms times the arm's ratio over all epochs.
    degrees = np.maximum(n - 1.0, 0.0)
    total = sum_over_epochs(degrees)
    base = sum_over_epochs(degrees * both) / np.maximum(total, 1.0)
    ratio = np.where(base > 0, own / np.where(base > 0, base, 1.0), 1.0)
    if guard:
        ratio = guarded_variance(ratio, 1.0, degrees=total)
    return np.asarray((spread + EPOCH_UNITS * ratio[..., np.newaxis] * both) / (degrees + EPOCH_UNITS))


def sum_over_epochs(values: FloatArray) -> FloatArray:
    """Sum over the last axis, to about twice the precision of a float and the same in every order.

    The terms are sorted first, so that the result is a function of the set of terms; their rounding errors
    are added up apart (Ogita, Rump and Oishi 2005, SIAM Journal on Scientific Computing 26(6), Sum2).
    """
    ordered = np.sort(values, axis=-1) if values.shape[-1] > 1 else values
    if values.shape[-1] >= _MANY_EPOCHS:
        return _sum_of_many(ordered)
    total, lost = np.zeros(values.shape[:-1]), np.zeros(values.shape[:-1])
    for epoch in range(values.shape[-1]):
        term = ordered[..., epoch]
        raised = total + term
        moved = raised - total
        lost = lost + ((total - (raised - moved)) + (term - moved))
        total = raised
    return np.asarray(total + lost)


_MANY_EPOCHS = 16
"""From so many on a sum is taken of whole arrays; it is the same to the last bit."""


def _sum_of_many(ordered: FloatArray) -> FloatArray:
    # An accumulation adds one term after the other, as the loop does.
    totals = _accumulated(ordered)
    before, raised = totals[..., :-1], totals[..., 1:]
    moved = raised - before
    lost = _accumulated((before - (raised - moved)) + (ordered - moved))
    return np.asarray(raised[..., -1] + lost[..., -1])


def _accumulated(terms: FloatArray) -> FloatArray:
    return np.add.accumulate(np.concatenate((np.zeros((*terms.shape[:-1], 1)), terms), axis=-1), axis=-1)


def summarise_arrays(
    control: MomentArrays, treatment: MomentArrays, *, scale: ArrayLike, guard: bool = True
) -> MeansArrays:
    """Stratified means of many comparisons from exact moments; `summarise` for each element.

    Args:
        control: (..., E) exact moments of the control arms.
        treatment: (..., E) exact moments of the treatment arms, broadcast against `control`.
        scale: value of one quantisation step in metric units, 1e-100 to 1e100, broadcast against (...).
        guard: whether to guard the variances.

    Returns:
        The means, of the shape (...).

    Raises:
        ValueError: shapes do not broadcast, `scale` is out of range, or a value is too large for a float.

    Source:
        See `summarise`.

    """
    c, t = used_columns(control, treatment)
    used = c[0] > 0
    steps = steps_of("scale", scale, used.shape[:-1])
    squared, one = _squared(steps), used.sum(axis=-1) == 1
    both = [a + b for a, b in zip(c, t, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        spreads = [_exact_spreads(rows, one=one) * squared[..., np.newaxis] for rows in (c, t, both)]
        strata = Strata(
            control_n=c[0].astype(np.float64),
            treatment_n=t[0].astype(np.float64),
            control_mean=exact_mean(c[0], c[1]) * steps[..., np.newaxis],
            treatment_mean=exact_mean(t[0], t[1]) * steps[..., np.newaxis],
        )
        divisors = (*strata.degrees, strata.pooled_degrees)
        variances = [
            sum_over_epochs(spread) / np.where(one, 1.0, np.maximum(d, 1.0))
            for spread, d in zip(spreads, divisors, strict=True)
        ]
    return stratified_means(strata, variances, spreads=spreads, degrees=strata.degrees, guard=guard)


def exact_mean(n: Integers, s: Integers) -> FloatArray:
    """Correctly rounded s/n, and 0 where n is 0, in steps."""
    return quotient(s, np.maximum(n, 1))


def _exact_spreads(rows: Sequence[Integers], *, one: NDArray[np.bool_]) -> FloatArray:
    # Sums of squared deviations per epoch, in squared steps. With one epoch its variance instead, rounded once,
    # so that one epoch gives the plain two-sample numbers.
    n, s, q = rows
    counts = np.maximum(n, 1)
    lowered = np.where(one[..., np.newaxis], np.maximum(counts - 1, 1), 1).astype(n.dtype)
    return spread_quotient(counts, q, s, t=s, lowered=lowered)


def means_of_summaries(
    control: ArmSummary,
    treatment: ArmSummary,
    *,
    guard: bool = True,
    stratified: bool = False,
    constant_spread: bool = False,
) -> MeansArrays:
    """Stratified means of many comparisons from means and variances given as floats.

    The pooled variance of the guard is rebuilt from the summaries. As exact as the floats are: where the
    variance is far below the squared mean, exact moments (`summarise_arrays`) keep digits that these lose.

    Args:
        control: summary of the control arms, (...), or (..., E) if stratified.
        treatment: summary of the treatment arms, broadcast against `control`.
        guard: whether to guard the variances.
        stratified: whether the last axis holds weight epochs; otherwise each element is one epoch.
        constant_spread: whether an arm's variance is taken to be the same in every epoch; errs where it is not.

    Returns:
        The means, of the shape (...).

    Raises:
        ValueError: shapes do not broadcast.

    Source:
        See `summarise`.

    """
    rows = broadcast_summaries(
        (control.n, control.mean, control.variance, treatment.n, treatment.mean, treatment.variance),
        stratified=stratified,
    )
    n, mean, squares = (
        rows[0::3],
        rows[1::3],
        [np.maximum(r - 1.0, 0.0) * v for r, v in zip(rows[0::3], rows[2::3], strict=True)],
    )
    between = pooled_product(n, mean[1] - mean[0], mean[1] - mean[0])
    strata = Strata(*n, *mean)
    degrees = strata.degrees
    variances = [sum_over_epochs(q) / np.maximum(d, 1.0) for q, d in zip(squares, degrees, strict=True)]
    spreads = [*squares, squares[0] + squares[1] + between]
    pooled = sum_over_epochs(spreads[2]) / strata.pooled_degrees
    return stratified_means(
        strata,
        [*variances, pooled],
        spreads=None if constant_spread else spreads,
        degrees=degrees,
        guard=guard,
    )


def arm_means_of(
    control: ArmSummary, treatment: ArmSummary, *, guard: bool = True, stratified: bool = False
) -> ArmMeans | Undetermined:
    """`summarise` from means and variances given as floats.

    Args:
        control: of scalars, or of (E,) arrays if stratified; at least one unit.
        treatment: likewise.
        guard: whether to guard the variances.
        stratified: whether the fields hold one number per weight epoch.

    Returns:
        The means, or Undetermined as for `summarise`.

    Raises:
        ValueError: an arm is empty, or a field has the wrong shape.

    Source:
        See `summarise`.

    """
    one_comparison(control.n, treatment.n)
    return means_of_summaries(control, treatment, guard=guard, stratified=stratified).at()


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


def pooled_product(n: Sequence[FloatArray], first: FloatArray, second: FloatArray) -> FloatArray:
    """What two arms' distance adds to the sum of products about their common mean, n0*n1/(n0 + n1)*a*b."""
    return n[0] / np.maximum(n[0] + n[1], 1.0) * n[1] * first * second


def steps_of(name: str, scale: ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    """Return quantisation steps broadcast to `shape`; ValueError if one is out of range."""
    steps = positive(name, scale)
    if np.any(steps < SCALE_MIN) or np.any(steps > SCALE_MAX):
        raise ValueError(f"{name} must lie between {SCALE_MIN} and {SCALE_MAX}")
    return shaped(name, steps, shape)


def _squared(steps: FloatArray) -> FloatArray:
    # Rounded as a Python float's power is, which is not always steps * steps.
    distinct, where = np.unique(steps, return_inverse=True)
    return np.array([value**2 for value in distinct.tolist()])[where].reshape(steps.shape)


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
    if np.any(counts >= _COUNT_LIMIT):
        raise ValueError(f"{name} must be below 2**53")
    return counts


# ---- evidence -----------------------------------------------------------------------------------------


def mean_difference_arrays(means: MeansArrays, *, alpha: ArrayLike, rho2: ArrayLike) -> EvidenceArrays:
    """Two-sided confidence sequences and e-values of many differences; `mean_difference` for each element.

    Args:
        means: of the shape (...).
        alpha: two-sided error levels, in (0, 1), broadcast against (...).
        rho2: ``tuned_rho2(n_star, alpha)``, > 0, broadcast against (...).

    Returns:
        Evidence about the differences, in metric units.

    Raises:
        ValueError: an argument is out of its range or does not broadcast.

    Source:
        See `mean_difference`.

    """
    known, k, levels = _prepared(means, alpha, rho2)
    with np.errstate(over="ignore"):
        estimate = means.treatment_mean - means.control_mean
        half, log_e = two_sided(estimate, np.sqrt(combined_variance(known, 1.0)), k=k, alpha=levels)
        return _evidence(means, estimate, bounds=(estimate - half, estimate + half), log_e=log_e)


def relative_lift_arrays(means: MeansArrays, *, alpha: ArrayLike, rho2: ArrayLike) -> EvidenceArrays:
    """Two-sided confidence sequences of many lifts by Fieller; `relative_lift` for each element.

    Args:
        means: of the shape (...).
        alpha: two-sided error levels, in (0, 1), broadcast against (...).
        rho2: ``tuned_rho2(n_star, alpha)``, > 0, broadcast against (...).

    Returns:
        Evidence about the lifts as fractions; UNBOUNDED_LIFT where a control mean is not separated from 0.

    Raises:
        ValueError: an argument is out of its range or does not broadcast.

    Source:
        See `relative_lift`.

    """
    known, k, levels = _prepared(means, alpha, rho2)
    lower, upper, bounded = fieller_bounds(
        control_mean=known.control_mean,
        control_variance=known.control_variance,
        treatment_mean=known.treatment_mean,
        treatment_variance=known.treatment_variance,
        multiplier=radius_multiplier_two_sided(k, levels),
        control_loading=known.control_loading,
        treatment_loading=known.treatment_loading,
    )
    difference = mean_difference_arrays(means, alpha=alpha, rho2=rho2)
    lift = difference.estimate / np.where(bounded, np.abs(known.control_mean), 1.0)
    return _evidence(_unbounded(means, ~bounded), lift, bounds=(lower, upper), log_e=difference.log_e)


def relative_lift_delta_arrays(means: MeansArrays, *, alpha: ArrayLike, rho2: ArrayLike) -> EvidenceArrays:
    """Lifts by the delta method, which errs on sparse values: see `relative_lift_delta` before any use.

    Args:
        means: of the shape (...).
        alpha: two-sided error levels, in (0, 1), broadcast against (...).
        rho2: ``tuned_rho2(n_star, alpha)``, > 0, broadcast against (...).

    Returns:
        Evidence about the lifts as fractions; UNBOUNDED_LIFT where a control mean is 0.

    Raises:
        ValueError: an argument is out of its range or does not broadcast.

    Source:
        See `relative_lift_delta`.

    """
    known, k, levels = _prepared(means, alpha, rho2)
    size = np.abs(known.control_mean)
    unit = np.where(size > 0, size, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        factor = known.treatment_mean / np.where(size > 0, known.control_mean, 1.0)
        difference, se = known.treatment_mean - known.control_mean, np.sqrt(combined_variance(known, factor))
        lost = (size == 0) | ~np.isfinite(se / unit) | ~np.isfinite(difference / unit) | (se == 0)
        half, log_e = two_sided(difference, np.where(lost, 1.0, se), k=k, alpha=levels)
        lift, radius = np.where(lost, 0.0, difference / unit), np.where(lost, 0.0, half / unit)
    lost |= ~np.isfinite(radius)
    return _evidence(_unbounded(means, lost), lift, bounds=(lift - radius, lift + radius), log_e=log_e)


def excess_arrays(
    means: MeansArrays, *, margin: ArrayLike, margin_kind: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Excess of many effects over margins, m1 - m0 - margin or m1 - m0 - margin * abs(m0), and its variance.

    Args:
        means: of the shape (...).
        margin: as in `one_sided_test_arrays`.
        margin_kind: likewise.

    Returns:
        (excess, variance), each (...); the variance is +inf where the means are undetermined.

    Raises:
        ValueError: an argument is out of its range or does not broadcast.

    Source:
        Fieller (1954), the linear combination of both means.

    """
    shape = means.n.shape
    relative = _chosen("margin_kind", margin_kind, choices=("absolute", "relative"), shape=shape)
    edge = shaped("margin", finite("margin", margin), shape)
    if np.any(relative & ~((edge > -1) & (edge < 1e100))):
        raise ValueError("margin must be greater than -1 and less than 1e100 when relative")
    with np.errstate(over="ignore"):
        # The sign of a control mean of 0 is unknown: the larger variance of the two.
        mirrored = (np.signbit(edge) != np.signbit(means.control_mean)) & (means.control_mean != 0)
        factor = np.where(relative, 1.0 + np.where(mirrored, -np.abs(edge), np.abs(edge)), 1.0)
        difference = means.treatment_mean - means.control_mean
        excess = difference - np.where(relative, edge * np.abs(means.control_mean), edge)
        return excess, combined_variance(means, factor)


def one_sided_test_arrays(
    means: MeansArrays,
    *,
    margin: ArrayLike,
    margin_kind: ArrayLike,
    side: ArrayLike,
    alpha: ArrayLike,
    rho2: ArrayLike,
) -> EvidenceArrays:
    """One-sided tests of many effects against margins; `one_sided_test` for each element.

    Args:
        means: of the shape (...).
        margin: effects on the edge of H0, signed; in metric units, or as fractions of the absolute control
            mean, then > -1 and < 1e100; broadcast against (...).
        margin_kind: "absolute" or "relative", one or an array that broadcasts against (...).
        side: "above" or "below", one or an array that broadcasts against (...).
        alpha: one-sided error levels, in (0, 1), broadcast against (...).
        rho2: ``one_sided_rho2(n_star, alpha)``, > 0, broadcast against (...).

    Returns:
        Evidence about the excesses over the margins, in metric units.

    Raises:
        ValueError: an argument is out of its range or does not broadcast.

    Source:
        See `one_sided_test`.

    """
    known, k, levels = _prepared(means, alpha, rho2)
    below = _chosen("side", side, choices=("above", "below"), shape=k.shape)
    excess, variance = excess_arrays(known, margin=margin, margin_kind=margin_kind)
    with np.errstate(over="ignore"):
        se = np.sqrt(variance)
        lost = se == 0
        found = one_sided(excess, np.where(lost, 1.0, se), sign=np.where(below, -1.0, 1.0), k=k, alpha=levels)
        bounds = np.where(below, -np.inf, excess - found[0]), np.where(below, excess + found[0], np.inf)
    code = np.where((means.reason == 0) & lost, CODES[NO_VARIANCE], means.reason).astype(np.int8)
    return _evidence(replace(means, reason=code), excess, bounds=bounds, log_e=found[1])


def _prepared(
    means: MeansArrays, alpha: ArrayLike, rho2: ArrayLike
) -> tuple[MeansArrays, FloatArray, FloatArray]:
    # The means with harmless numbers where undetermined, K, and the error levels, all of one shape.
    shape = means.n.shape
    levels = shaped("alpha", level("alpha", alpha), shape)
    rates = shaped("rho2", positive("rho2", rho2), shape)
    lost = means.undetermined
    if not lost.any():
        return means, means.n * rates, levels
    variances = [np.where(lost, 1.0, v) for v in (means.control_variance, means.treatment_variance)]
    known = replace(means, control_variance=variances[0], treatment_variance=variances[1])
    return known, np.where(lost, 1.0, means.n) * rates, levels


def _unbounded(means: MeansArrays, where: NDArray[np.bool_]) -> MeansArrays:
    code = np.where((means.reason == 0) & where, CODES[UNBOUNDED_LIFT], means.reason)
    return replace(means, reason=code.astype(np.int8))


def _evidence(
    means: MeansArrays, estimate: FloatArray, *, bounds: tuple[FloatArray, FloatArray], log_e: FloatArray
) -> EvidenceArrays:
    lost = means.undetermined
    return EvidenceArrays(
        estimate=np.where(lost, 0.0, estimate),
        lower=np.where(lost, -np.inf, bounds[0]),
        upper=np.where(lost, np.inf, bounds[1]),
        log_e=np.where(lost, 0.0, log_e),
        n=means.n,
        reason=means.reason,
    )


def _chosen(
    name: str, value: ArrayLike, *, choices: tuple[str, str], shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    # Where the second of two choices is taken.
    array = np.asarray(value)
    second = np.asarray(array == choices[1])
    if array.dtype.kind != "U" or not np.all(second | (array == choices[0])):
        raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}")
    try:
        return np.broadcast_to(second, shape)
    except ValueError as error:
        raise ValueError(f"{name} must broadcast to the shape {shape}, got {second.shape}") from error
