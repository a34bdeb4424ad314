"""The Dirichlet mixture of multinomial likelihoods, without the cancellation of large log gammas."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaln

from stream_xp.stats._checks import FloatArray

_LOG_2PI = math.log(2.0 * math.pi)


def log_mixture_ratio(
    counts: FloatArray, null: FloatArray, *, prior: FloatArray, excess: FloatArray | None = None
) -> FloatArray:
    """The log e-value of the Dirichlet mixture against the shares `null`.

    ln B(prior + counts) - ln B(prior) - sum_a counts_a ln null_a, with B the multivariate beta function.

    Args:
        counts: (..., K), >= 0.
        null: (..., K), each row sums to 1; an arm with `null` 0 has no count and is left out.
        prior: (..., K), > 0 wherever `null` is.
        excess: (..., K), prior - sum(prior) * null, where the caller knows it better than its rounding.

    """
    null, prior = np.broadcast_arrays(null, prior)
    strength, total = prior.sum(axis=-1, keepdims=True), counts.sum(axis=-1, keepdims=True)
    excess = prior - strength * null if excess is None else excess
    after = log_beta_ratio(counts + prior, null, counts - total * null + excess)
    return after - log_beta_ratio(prior, null, excess)


def log_beta_ratio(x: FloatArray, null: FloatArray, excess: FloatArray) -> FloatArray:
    """The value of ln B(x) - sum_a x_a ln null_a, all (..., K); excess is x - sum(x) * null."""
    # With ln Gamma(x) = (x - 1/2) ln x - x + ln(2 pi)/2 + c(x) and X = sum x, the terms of order X collapse
    # to sum_a x_a ln(x_a / (X null_a)). The excesses sum to 0 but for their rounding, which would otherwise
    # enter in full; taken off, only its square does.
    live = null > 0
    x, null = np.where(live, x, 1.0), np.where(live, null, 1.0)
    top = np.where(live, x, 0.0).sum(axis=-1)
    expected = top[..., np.newaxis] * null
    near = np.abs(excess) < 0.5 * expected
    ratio = np.where(near, np.log1p(np.where(near, excess / expected, 0.0)), np.log(x / expected))
    terms = np.where(live, x * ratio - excess - 0.5 * np.log(x) + stirling_rest(x), 0.0).sum(axis=-1)
    half = 0.5 * (np.log(top) + (live.sum(axis=-1) - 1.0) * _LOG_2PI)
    return np.asarray(terms + half - stirling_rest(top))


def stirling_rest(x: FloatArray) -> FloatArray:
    """c(x) = ln Gamma(x) - ((x - 1/2) ln x - x + ln(2 pi)/2), by its series where that is exact."""
    big = np.maximum(x, 16.0)
    square = big * big
    series = (1.0 - (1.0 / 30.0 - (1.0 / 105.0 - 1.0 / (140.0 * square)) / square) / square) / (12.0 * big)
    if (x >= 16.0).all():
        return np.asarray(series)
    small = np.minimum(x, 16.0)
    direct = gammaln(small) - ((small - 0.5) * np.log(small) - small + 0.5 * _LOG_2PI)
    return np.asarray(np.where(x >= 16.0, series, direct))
