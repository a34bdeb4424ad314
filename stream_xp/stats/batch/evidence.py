"""Evidence from means: differences, lifts and one-sided tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._checks import FloatArray, finite, level, positive
from stream_xp.stats.batch.arrays import CODES, EvidenceArrays, MeansArrays
from stream_xp.stats.batch.shapes import shaped
from stream_xp.stats.mean_difference import (
    NO_VARIANCE,
    UNBOUNDED_LIFT,
    combined_variance,
    fieller_bounds,
    one_sided,
    two_sided,
)
from stream_xp.stats.normal_mixture import radius_multiplier_two_sided

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


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
