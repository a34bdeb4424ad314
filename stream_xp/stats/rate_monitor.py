r"""Rates that should stay low: duplicates, crossovers, dead letters. Did one rise above its threshold lately?

"Above the threshold since ever" is one exact test, `bernoulli_log_e` with side "above". But a rate that was fine for a
month and broke an hour ago is still fine on average; and a monitor that runs for ever needs false alarms at a rate
rather than an error level. Both ask for change detection.

The detector is that of Shiryaev and Roberts, as an e-detector: at the start of each bucket a new bet begins that the
rate is above the threshold p from now on, and all bets grow together,

    M_b = L_b (M_(b-1) + n_b),    L_b = (q/p)^s_b ((1 - q)/(1 - p))^(n_b - s_b),

with n_b records in bucket b and s_b bad ones. As long as the chance of a bad record, given the past, is at most p, L_b
has a mean of at most 1, so M minus the number of records falls on average; stopped at A, that gives

    mean number of records to a false alarm >= A,        P(false alarm within N records) <= N / A.

M is averaged over several alternatives q, odds 1.5 to 64 times those of p. That is no e-value: it grows by itself with
every record, and its threshold is A, not 1/alpha.

Exact for rates that drift in any way below p. Buckets are cut by something that does not depend on the outcomes inside
(a minute of event time, a commit), and the result depends on how they are cut: for a replay keep the cuts. What is
lost to a bucket is only where inside it the change began. After an alarm, start again from `START`.

Sources: Shiryaev (1963), Theory of Probability and Its Applications 8(1), 22-46; Roberts (1966), Technometrics 8(3),
411-430; Shin, Ramdas and Rinaldo (2024), New England Journal of Statistics in Data Science 2(2), 229-260,
arXiv:2203.03532 (e-detectors: average run length of sums and mixtures of e-processes started at all times). Buckets
that start n_b bets at once are this project's own form.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import logsumexp

from stream_xp.stats._checks import FloatArray, level, positive
from stream_xp.stats._counts import whole

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

ODDS: Final = (1.5, 2.0, 4.0, 8.0, 16.0, 64.0)
"""Odds of a bad record, over those at the threshold, that the detector is made for; all weigh the same."""
START: Final = (-math.inf,) * len(ODDS)
"""State of a detector that has seen nothing: log M of each alternative."""


def detector_step(
    state: ArrayLike, records: ArrayLike, bad: ArrayLike, *, threshold: ArrayLike
) -> FloatArray:
    """State of detectors after one more bucket.

    Args:
        state: (..., 6) log M of each alternative of `ODDS`; `START`, or what this function returned.
        records: (...) whole numbers of records in the bucket.
        bad: (...) whole numbers of bad ones, at most `records`.
        threshold: p, the largest rate that is in order, in (0, 1), broadcast.

    Returns:
        The new state, (..., 6). An empty bucket changes nothing.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        See the module.

    """
    n, s = whole("records", records), whole("bad", bad)
    if np.any(s > n):
        raise ValueError("bad must not exceed records")
    logs = np.asarray(state, dtype=np.float64)
    if not logs.ndim or logs.shape[-1] != len(ODDS) or np.isnan(logs).any() or (logs == np.inf).any():
        raise ValueError(f"state must end in an axis of {len(ODDS)} numbers or -inf")
    p = level("threshold", threshold)
    odds = np.array(ODDS)
    # With q = p o/(1 - p + p o): ln(q/p) = ln o - d and ln((1 - q)/(1 - p)) = -d, where d = ln(1 + p (o - 1)).
    spread = np.log1p(p[..., np.newaxis] * (odds - 1.0))
    growth = s[..., np.newaxis] * np.log(odds) - n[..., np.newaxis] * spread
    with np.errstate(divide="ignore"):
        begun = np.logaddexp(logs, np.log(n)[..., np.newaxis])
    return np.asarray(begun + growth)


def detector_log(state: ArrayLike) -> FloatArray:
    """Log of the detector, the mean of M over its alternatives; alarm at ln(A).

    Args:
        state: (..., 6), from `detector_step`.

    Returns:
        Array of the shape (...); -inf before the first record.

    """
    logs = np.asarray(state, dtype=np.float64)
    return np.asarray(logsumexp(logs, axis=-1) - math.log(len(ODDS)))


def rate_detector(records: ArrayLike, bad: ArrayLike, *, threshold: ArrayLike) -> FloatArray:
    """Log of the detector after each of many buckets, in their order.

    Args:
        records: (..., T) whole numbers of records.
        bad: (..., T) whole numbers of bad ones, at most `records`.
        threshold: p, in (0, 1), broadcast against (...).

    Returns:
        (..., T); an alarm is where it reaches ln(A) first. -inf before the first record.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        See the module.

    """
    n, s = np.broadcast_arrays(np.asarray(records), np.asarray(bad))
    if not n.ndim:
        raise ValueError("records must end in an axis of buckets")
    state = np.full((*n.shape[:-1], len(ODDS)), -np.inf)
    found = np.empty(n.shape)
    for bucket in range(n.shape[-1]):
        state = detector_step(state, n[..., bucket], s[..., bucket], threshold=threshold)
        found[..., bucket] = detector_log(state)
    return found


def records_to_detect(rate: float, *, threshold: float, run_length: float) -> float:
    """About how many records a risen rate takes until the alarm.

    ln(6 A) over the expected growth per record of the best alternative. It leaves out what bets from before the change
    had gained: a guide for planning, on the careful side.

    Args:
        rate: of bad records after the change, in (0, 1).
        threshold: p, in (0, 1).
        run_length: A, mean number of records to a false alarm, > 0.

    Returns:
        Records; +inf where the rate is too close to the threshold for any alternative to grow.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Lorden (1971), Annals of Mathematical Statistics 42(6), 1897-1908, first order.

    """
    r, p = float(level("rate", rate)), float(level("threshold", threshold))
    odds = np.array(ODDS)
    growth = float((r * np.log(odds) - np.log1p(p * (odds - 1.0))).max())
    return (
        math.log(len(ODDS) * float(positive("run_length", run_length))) / growth if growth > 0 else math.inf
    )
