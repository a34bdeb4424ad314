"""Exact tests of event counts: which arm the events fall into, whatever their rate over time.

Each event is labelled with the arm of its unit. If the units exposed in weight epoch e fall into arm a with
probability rho_ea, and a unit of arm a has its event lambda_a times as often as a baseline that is common to
all arms and otherwise arbitrary (it may drift, jump, follow the time of day), then, whatever came before, the
next event of this epoch falls into arm a with probability rho_ea lambda_a / sum_b rho_eb lambda_b. The effect
is the log rate ratio delta_a = ln(lambda_a / lambda_control), assumed constant; e-values and confidence
sequences are exact at every n and under every way of looking. Only the counts are needed, not the units
without events. Of first events lambda is a relative risk: a unit that has had its event is no longer counted,
so a ratio of hazards is understated once a good part of the units has had theirs; the test of equal rates
stays exact.

Two warnings:

* The events must be independent given the arm. Count the *first* event of each unit only. Units with
  about ten events each make these tests err in 43 % to 52 % of experiments at a nominal 5 %; first events
  keep the level (measured .028).
* An excess of units is an excess of events: a sample-ratio mismatch is confounded with an effect. Read the
  result only while the sample ratio of the units is in order.

Source: Lindon and Malek (2022), Anytime-valid inference for multinomial count data, NeurIPS 35,
arXiv:2011.03567 (events of inhomogeneous Poisson processes as multinomial labels; Dirichlet mixture).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats import _tilt
from stream_xp.stats._checks import FloatArray, level
from stream_xp.stats._counts import epochs
from stream_xp.stats._dirichlet import log_mixture_ratio
from stream_xp.stats._roots import end
from stream_xp.stats.normal_mixture import Undetermined, p_always_valid
from stream_xp.stats.sample_ratio import (
    CONCENTRATION,
    LogRatio,
    log_ratio,
    sample_ratio_dirichlet_log_e,
    sample_ratio_log_e,
    tilt_log_ratio,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# A normal prior on the log rate ratio as wide as that of the Dirichlet mixture with k = 100 at equal shares.
RATE_SD = 0.2
NO_EVENTS = "no event has been counted"


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Evidence about event rates at one look, or of many looks at once.

    The fields of the arms have the shape (..., K - 1), the treatment arms in their order without the
    control; with two arms the last axis is dropped. One look of two arms has plain floats.

    Attributes:
        log_e: (...), natural logarithm of the e-value against "all rates are equal"; finite.
        arm_log_e: against "the rates of this arm and of the control are equal"; dual to the bounds.
        estimate: log rate ratio of this arm against the control; -inf or +inf while one of them has no
            event, 0 while neither has (see `determined`).
        lower: lower end of the confidence sequence of the log rate ratio, -inf where unbounded.
        upper: its upper end, +inf where unbounded.
        determined: whether this arm and the control have any event.

    """

    log_e: FloatArray | float
    arm_log_e: FloatArray | float
    estimate: FloatArray | float
    lower: FloatArray | float
    upper: FloatArray | float
    determined: NDArray[np.bool_] | bool

    @property
    def p_always_valid(self) -> FloatArray | float:
        """The always-valid p of "all rates are equal" at this look, min(1, exp(-log_e)), in [0, 1]."""
        p: FloatArray | float = p_always_valid(np.asarray(self.log_e))
        return p


def event_counts(
    counts: ArrayLike,
    weights: ArrayLike,
    *,
    alpha: float,
    concentration: float = CONCENTRATION,
    control: int = 0,
) -> EventCounts | Undetermined:
    """Compare event rates under constant weights by the Dirichlet mixture.

    log e(delta) = ln B(k rho + c) - ln B(k rho) - sum_a c_a ln(rho_a exp(delta_a) / sum_b rho_b exp(delta_b)).
    The test of equal rates takes delta = 0 and all arms; the confidence sequence of one arm takes the events
    of this arm and of the control, with their weights scaled to sum to 1, and holds the delta with
    log e(delta) < ln(1/alpha).

    Args:
        counts: (..., K) integers, first events per arm, >= 0 and below 2**53.
        weights: (K,) or (..., K) weights; sum to 1 within 1e-9; above 0 wherever there is a count.
        alpha: error level of each confidence sequence, in (0, 1).
        concentration: k, 1e-6 to 1e12, fixed in advance; smaller for large effects.
        control: index of the control arm.

    Returns:
        The evidence; Undetermined for one look without events. Exact at every n; see the module for what
        is assumed of the events.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Lindon and Malek (2022), Dirichlet-multinomial mixture and its confidence sequences.

    """
    n, rho = epochs(np.asarray(counts)[..., np.newaxis, :], np.asarray(weights)[..., np.newaxis, :])
    log_e = sample_ratio_dirichlet_log_e(n.astype(np.int64), rho, concentration=concentration)
    threshold, k = -math.log(float(level("alpha", alpha))), float(concentration)
    pairs = _pairs(n, rho, control)
    return _report(log_e, _dirichlet_ratio(pairs, k=k, log_threshold=threshold))


def event_counts_by_epoch(
    counts: ArrayLike, weights: ArrayLike, *, alpha: float, sd: float = RATE_SD, control: int = 0
) -> EventCounts | Undetermined:
    """Compare event rates under weights that change from epoch to epoch, by the tilt mixture.

    The likelihood of delta is prod_e prod_a (rho_ea exp(delta_a) / sum_b rho_eb exp(delta_b))^c_ea, mixed
    over delta ~ N(0, sd^2). The test of equal rates averages the e-values of the tilts of every arm against
    the rest; the confidence sequence of one arm takes the events of this arm and of the control, with their
    weights scaled to sum to 1 in each epoch.

    Args:
        counts: (..., E, K) integers, first events per epoch and arm, >= 0 and below 2**53. An event belongs
            to the weight epoch of its unit's exposure, whenever it happens.
        weights: (E, K) or (..., E, K) weights; rows sum to 1 within 1e-9; above 0 wherever there is a
            count. A row of zeros pads an experiment with fewer epochs.
        alpha: error level of each confidence sequence, in (0, 1).
        sd: standard deviation of the log rate ratio under the mixture, 1e-6 to 100; fixed in
            advance.
        control: index of the control arm.

    Returns:
        The evidence; Undetermined for one look without events. Exact at every n; see the module for what
        is assumed of the events.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        The labels of Lindon and Malek (2022) with a normal prior on a tilt common to all epochs.

    """
    n, rho = epochs(counts, weights)
    log_e = sample_ratio_log_e(n.astype(np.int64), rho, sd=sd)
    return _report(log_e, tilt_log_ratio(_pairs(n, rho, control), alpha=alpha, sd=sd, reason=NO_EVENTS))


def _pairs(n: FloatArray, rho: FloatArray, control: int) -> _tilt.Labels:
    # Labels (..., K - 1, E), or (..., E) with two arms: hits are the events of the arm, misses the control's.
    arms = rho.shape[-1]
    if not 0 <= control < arms:
        raise ValueError(f"control must be the index of one of {arms} arms, got {control}")
    n, rho = (np.moveaxis(values, -1, -2) for values in np.broadcast_arrays(n, rho))
    base, others = [control], [arm for arm in range(arms) if arm != control]
    both = rho[..., others, :] + rho[..., base, :]
    shares = rho[..., others, :] / np.where(both > 0, both, 1.0)
    hits, totals = n[..., others, :], n[..., others, :] + n[..., base, :]
    if arms == 2:
        hits, totals, shares = hits[..., 0, :], totals[..., 0, :], shares[..., 0, :]
    return _tilt.labels(hits, totals, shares)


def _dirichlet_ratio(pairs: _tilt.Labels, *, k: float, log_threshold: float) -> LogRatio | Undetermined:
    counts, prior = (
        np.stack(values, axis=-1)[..., 0, :]
        for values in ((pairs.misses, pairs.hits), (k * pairs.rests, k * pairs.shares))
    )
    base, hits = counts[..., 0], counts[..., 1]

    # Log e is at most 0 at the estimate. While an arm is empty the e-value is below 1/alpha wherever its
    # share is small enough, here below ln(1/alpha) / (4 n).
    estimate, total = _tilt.peak(pairs), base + hits
    far = np.log(4.0 * (total + 1.0) / min(log_threshold, 1.0))
    start = np.where(np.isfinite(estimate), estimate, np.sign(estimate) * far - pairs.log_odds[..., 0])
    step = np.sqrt(2.0 * (1.0 + log_threshold) / (0.01 + base * hits / np.maximum(total, 1.0)))
    at_start = pairs.tilted(start)
    shares = np.stack((at_start.rests, at_start.shares), axis=-1)[..., 0, :]
    log_e = log_mixture_ratio(counts, shares, prior=prior)

    def excess(delta: FloatArray) -> FloatArray:
        return np.asarray(log_e - at_start.log_likelihood(delta - start) - log_threshold)

    lower = end(excess, start, step=-step, open_=hits == 0)
    upper = end(excess, start, step=step, open_=base == 0)
    at_equal = excess(np.zeros(total.shape)) + log_threshold
    return log_ratio(at_equal, estimate, (lower, upper), total=total, reason=NO_EVENTS)


def _report(log_e: FloatArray, ratio: LogRatio | Undetermined) -> EventCounts | Undetermined:
    if isinstance(ratio, Undetermined) or not (log_e.ndim or np.any(ratio.determined)):
        return Undetermined(NO_EVENTS)
    overall = log_e if log_e.ndim else float(log_e)
    arms = ratio.log_e if np.ndim(ratio.log_e) > log_e.ndim else overall  # of two arms it is the same test
    return EventCounts(overall, arms, ratio.estimate, ratio.lower, ratio.upper, ratio.determined)
