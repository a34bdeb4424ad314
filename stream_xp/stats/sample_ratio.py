"""Sequential tests of the sample ratio: whether the arms get the shares that their weights promise.

Units are counted once, at their first valid exposure. Under the null hypothesis each unit falls into arm a
of its weight epoch e with probability weights[e, a], whatever came before; all tests here are then exact at
every n and under every way of looking. An e-value alone says that the shares are wrong, not by how much:
report it with the observed shares, and with two arms with the confidence sequence of the log odds.

Two mixtures, both over one or several weight epochs:

* tilt: the odds of an arm are multiplied by exp(delta) in every epoch, delta ~ N(0, sd^2). The default: a
  defect of the assignment moves all epochs alike, and the mixture learns from all of them together;
* Dirichlet: the shares of each epoch are drawn around the weights with a concentration k; a new epoch
  starts from the prior again, and the log e-values of the epochs add up. Finds any pattern, more slowly
  when there are many epochs.

Source: Lindon and Malek (2022), Anytime-valid inference for multinomial count data, NeurIPS 35,
arXiv:2011.03567 (Dirichlet mixture). The tilt mixture, which stays exact when the weights change, is the
same martingale argument applied to an exponential tilt of each unit's own weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats import _tilt
from stream_xp.stats._checks import FloatArray, level
from stream_xp.stats._counts import epochs, spread, strength
from stream_xp.stats._dirichlet import log_mixture_ratio
from stream_xp.stats.normal_mixture import Undetermined, p_always_valid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

TILT_SD = 0.1
CONCENTRATION = 100.0
NO_UNITS = "no unit has been counted"


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Evidence of a sample-ratio mismatch at one look.

    Attributes:
        log_e: natural logarithm of the e-value against "the shares are those of the weights"; finite.
        p_always_valid: min(1, exp(-log_e)).
        observed_shares: share of units per arm; sums to 1.
        expected_shares: share per arm that the weights promise for these epoch totals; sums to 1.

    """

    log_e: float
    p_always_valid: float
    observed_shares: tuple[float, ...]
    expected_shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SampleShares:
    """Units counted and units promised, per arm, summed over the epochs.

    Attributes:
        observed_counts: (..., K), units.
        expected_counts: (..., K), units that the weights promise for these epoch totals.
        observed_shares: (..., K), sums to 1; 0 without units.
        expected_shares: (..., K), sums to 1; 0 without units.
        determined: (...), whether there are units.

    """

    observed_counts: FloatArray
    expected_counts: FloatArray
    observed_shares: FloatArray
    expected_shares: FloatArray
    determined: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LogRatio:
    """Evidence about delta, the log of how much larger the odds of an arm are than its weights promise.

    For units delta is the log odds ratio of the sample ratio; for events, the log of the ratio of the rates
    of two arms. Every field is a float for one look, or an array over looks.

    Attributes:
        log_e: natural logarithm of the e-value against the null hypothesis; finite, 0 if undetermined.
        estimate: the tilt of the largest likelihood; -inf or +inf while one arm has no count, 0 if
            undetermined.
        lower: lower end of the confidence sequence, -inf where unbounded.
        upper: upper end of the confidence sequence, +inf where unbounded.
        determined: whether there is any count.

    """

    log_e: FloatArray | float
    estimate: FloatArray | float
    lower: FloatArray | float
    upper: FloatArray | float
    determined: NDArray[np.bool_] | bool

    @property
    def p_always_valid(self) -> FloatArray | float:
        """The always-valid p of this look, min(1, exp(-log_e)), in [0, 1]."""
        p: FloatArray | float = p_always_valid(np.asarray(self.log_e))
        return p


def sample_ratio(counts: ArrayLike, weights: ArrayLike, *, sd: float = TILT_SD) -> SampleRatio | Undetermined:
    """Test the sample ratio over weight epochs by the tilt mixture.

    Args:
        counts: (E, K) integers, units of each epoch and arm, >= 0 and below 2**53.
        weights: (E, K) weights; rows sum to 1 within 1e-9; above 0 wherever there is a count.
        sd: standard deviation of the tilt (a log odds ratio) under the mixture, 1e-6 to 100; fixed in
            advance.

    Returns:
        The evidence, or Undetermined while no unit is counted. Exact at every n.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See `sample_ratio_log_e`.

    """
    n, _ = epochs(counts, weights)
    if n.ndim != 2:
        raise ValueError(f"counts must have the shape (E, K), got {n.shape}")
    return _report(sample_ratio_log_e(counts, weights, sd=sd), sample_shares(counts, weights))


def sample_ratio_log_e(counts: ArrayLike, weights: ArrayLike, *, sd: float = TILT_SD) -> FloatArray:
    """Log e-value of the tilt mixture, for many experiments or looks at once.

    ln of the integral of prod_e prod_a (exp(delta_a) / sum_b rho_eb exp(delta_b))^n_ea over N(0, sd^2),
    where delta tilts one arm against the rest; with more than two arms the e-values of the tilts of every
    arm are averaged. With two arms both tilts are the same by symmetry.

    Args:
        counts: (..., E, K) integers, units of each epoch and arm, >= 0 and below 2**53.
        weights: (E, K) or (..., E, K) weights; rows sum to 1 within 1e-9; above 0 wherever there is a
            count. A row of zeros pads an experiment with fewer epochs.
        sd: standard deviation of the tilt under the mixture, 1e-6 to 100; fixed in
            advance.

    Returns:
        Array of the broadcast shape without the last two axes (0-d for one look); finite. Exact at every n.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Tilt mixture with a normal prior: the method of mixtures of Lindon and Malek (2022) on the tilts of
        each unit's own weights; quadrature between the points where the integrand has become negligible.

    """
    n, rho = epochs(counts, weights)
    arms = 1 if rho.shape[-1] == 2 else rho.shape[-1]
    hits, shares = (np.moveaxis(values[..., :arms], -1, 0) for values in np.broadcast_arrays(n, rho))
    found = _tilt.mixture(_tilt.labels(hits, n.sum(axis=-1), shares), sd=spread(sd))
    log_e = found.log_e(np.zeros(found.mode.shape))
    return np.asarray(np.logaddexp.reduce(log_e, axis=0) - math.log(arms))


def sample_ratio_log_odds(
    counts: ArrayLike, weights: ArrayLike, *, alpha: float, sd: float = TILT_SD
) -> LogRatio | Undetermined:
    """Confidence sequence of the log odds ratio delta of two arms, dual to the tilt mixture.

    delta is how much larger the log odds of the second arm are than its weights promise, the same in every
    epoch. A value is in the sequence exactly when the tilt mixture does not reject it.

    Args:
        counts: (..., E, 2) integers, units of each epoch and arm, >= 0 and below 2**53.
        weights: (E, 2) or (..., E, 2) weights, as in `sample_ratio_log_e`.
        alpha: error level, in (0, 1).
        sd: standard deviation of the tilt under the mixture, 1e-6 to 100; fixed in
            advance.

    Returns:
        The evidence, with `log_e` against delta = 0; Undetermined for one look without units. Exact at
        every n if the odds are off by the same factor in every epoch.

    Raises:
        ValueError: an argument breaks a rule above, or there are not two arms.

    Source:
        See `sample_ratio_log_e`; inverted by the concavity of its log-likelihood.

    """
    n, rho = epochs(counts, weights)
    if rho.shape[-1] != 2:
        raise ValueError(f"weights must have two arms, got {rho.shape[-1]}")
    hits, shares = (values[..., 1] for values in np.broadcast_arrays(n, rho))
    return tilt_log_ratio(_tilt.labels(hits, n.sum(axis=-1), shares), alpha=alpha, sd=sd, reason=NO_UNITS)


def sample_ratio_dirichlet(
    counts: ArrayLike, weights: ArrayLike, *, concentration: float = CONCENTRATION
) -> SampleRatio | Undetermined:
    """Test the sample ratio by the Dirichlet mixture, restarted in every weight epoch.

    Args:
        counts: (K,) or (E, K) integers, units of each arm, >= 0 and below 2**53.
        weights: weights of the same shape; rows sum to 1 within 1e-9; above 0 wherever there is a count.
        concentration: k, 1e-6 to 1e12; smaller finds gross mismatch sooner, larger a subtle one; fixed in advance.

    Returns:
        The evidence, or Undetermined while no unit is counted. Exact at every n.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See `sample_ratio_dirichlet_log_e`.

    """
    rows, rho = (np.atleast_2d(np.asarray(values)) for values in (counts, weights))
    log_e = sample_ratio_dirichlet_log_e(rows, rho, concentration=concentration)
    if log_e.ndim:
        raise ValueError(f"counts must have the shape (K,) or (E, K), got {rows.shape}")
    return _report(log_e, sample_shares(rows, rho))


def sample_ratio_dirichlet_log_e(
    counts: ArrayLike, weights: ArrayLike, *, concentration: float = CONCENTRATION
) -> FloatArray:
    """Log e-value of the Dirichlet mixture, for many experiments or looks at once.

    sum_e [ln B(k rho_e + n_e) - ln B(k rho_e) - sum_a n_ea ln rho_ea], rearranged around the expected
    counts so that no large terms cancel.

    Args:
        counts: (..., E, K) integers, units of each epoch and arm, >= 0 and below 2**53.
        weights: (E, K) or (..., E, K) weights, as in `sample_ratio_log_e`.
        concentration: k, 1e-6 to 1e12, fixed in advance.

    Returns:
        Array of the broadcast shape without the last two axes (0-d for one look); finite. Exact at every n.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Lindon and Malek (2022), Dirichlet-multinomial mixture; epochs multiply because each starts from its
        prior, independent of what came before.

    """
    n, rho = epochs(counts, weights)
    k = strength(concentration)
    counted = np.where((rho > 0).any(axis=-1, keepdims=True), rho, 1.0 / rho.shape[-1])  # padding: e = 1
    return np.asarray(log_mixture_ratio(n, counted, prior=k * counted).sum(axis=-1))


def sample_shares(counts: ArrayLike, weights: ArrayLike) -> SampleShares:
    """Observed and promised units per arm, the effect size that belongs to the e-value.

    Args:
        counts: (..., E, K) integers, units of each epoch and arm, >= 0 and below 2**53.
        weights: (E, K) or (..., E, K) weights, as in `sample_ratio_log_e`.

    Raises:
        ValueError: an argument breaks a rule above.

    """
    n, rho = epochs(counts, weights)
    observed, expected = n.sum(axis=-2), (n.sum(axis=-1, keepdims=True) * rho).sum(axis=-2)
    total = observed.sum(axis=-1, keepdims=True)
    units = np.maximum(total, 1.0)
    return SampleShares(observed, expected, observed / units, expected / units, total[..., 0] > 0)


def tilt_log_ratio(data: _tilt.Labels, *, alpha: float, sd: float, reason: str) -> LogRatio | Undetermined:
    """Two-sided evidence about a common tilt of labelled counts; the part that units and events share.

    Args:
        data: hits are the counts of the second arm.
        alpha: error level, in (0, 1).
        sd: standard deviation of the tilt under the mixture, > 0.
        reason: of the answer when one look has no count.

    Raises:
        ValueError: `alpha` or `sd` is out of its range.

    """
    threshold = -math.log(float(level("alpha", alpha)))
    found = _tilt.mixture(data, sd=spread(sd))
    lower, upper = _tilt.bounds(found, log_threshold=threshold)
    total = (data.hits + data.misses).sum(axis=-1)
    return log_ratio(
        found.log_e(np.zeros(total.shape)), _tilt.peak(data), (lower, upper), total=total, reason=reason
    )


def log_ratio(
    log_e: FloatArray,
    estimate: FloatArray,
    bounds: tuple[FloatArray, FloatArray],
    *,
    total: FloatArray,
    reason: str,
) -> LogRatio | Undetermined:
    """Assemble a `LogRatio`: floats for one look, Undetermined if that look has no count."""
    determined = total > 0
    log_e = np.where(determined, log_e, 0.0)
    lower, upper = np.where(determined, bounds[0], -np.inf), np.where(determined, bounds[1], np.inf)
    if total.ndim:
        return LogRatio(log_e, estimate, lower, upper, determined)
    if not determined:
        return Undetermined(reason)
    return LogRatio(float(log_e), float(estimate), float(lower), float(upper), determined=True)


def _report(log_e: FloatArray, shares: SampleShares) -> SampleRatio | Undetermined:
    if not shares.determined:
        return Undetermined(NO_UNITS)
    observed, expected = (tuple(s.tolist()) for s in (shares.observed_shares, shares.expected_shares))
    return SampleRatio(float(log_e), p_always_valid(float(log_e)), observed, expected)
