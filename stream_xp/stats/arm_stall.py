r"""Exposure stall: an arm that should get units gets none.

A crash of one variant, a flag that is off, a cache that serves one arm: units go on in the other arms and none comes to
this one. The sample ratio finds that in time; the run of units since the arm's last one finds it sooner.

While no unit comes to an arm of weight w, each unit of another arm multiplies a bet on "it is stalled" by 1/(1 - w);
the next unit of the arm itself ends the run and loses that bet. Weights may change inside a run; each unit counts with
the weight of its epoch. A run that is rare by itself is bound to come in a stream that never ends (at 50 %, one
of 20 others in a row for about every million units of the arm), so the start of every run is paid for.
There are two ways to pay:

* **Error over the whole life** (`log_e`): run r has the share 1/(r (r + 1)) of the capital, which sums to 1 over all
  runs. What runs to come have left is still there, so

      e = 1/(r + 1) + 1/(r (r + 1)) * prod over the run of 1/(1 - w)

  is an e-process: it reaches 1/alpha, ever, with probability at most alpha. The price is 2 ln r of evidence.
* **False alarms at a rate** (`log_rarity`): alarm when 1 over the run's probability reaches A. Each run does so with
  probability at most 1/A given the past, so on average at least A units come to the arm before a false alarm. For a
  monitor that a person resets.

Both are exact at every look, also while weights follow outcomes, as long as each unit's weight is fixed before it
comes. Units are taken in the order in which they are counted, so the order must not depend on the arm: one whose
clients report in bursts, or later than the other's, has long runs without a stall. No traffic at all is no evidence:
watch the age of the data for that.

Source: this project's own; a test martingale of a run with capital split over restarts, by Ville (1939); Shafer and
Vovk (2019), Game-Theoretic Foundations for Probability and Finance, section 2.1; the run length after Lorden (1971),
Annals of Mathematical Statistics 42(6), 1897-1908 (theorem 2, restarted tests).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._checks import FloatArray, finite, level
from stream_xp.stats._counts import whole

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True, eq=False)
class ArmStall:
    """Evidence that arms are stalled; floats, or arrays of one shape.

    Attributes:
        log_e: natural logarithm of the e-process against "the arm gets its weight"; finite. Reaches ln(1/alpha), ever,
            with probability at most alpha.
        log_rarity: minus the log probability of a run as long as this one, >= 0. An alarm at ln(A) is false, on
            average, at most once in A units of the arm.

    """

    log_e: FloatArray | float
    log_rarity: FloatArray | float


def arm_stall(others: ArrayLike, weights: ArrayLike, *, units: ArrayLike) -> ArmStall:
    """Evidence of an exposure stall, from the run of units since an arm's last one.

    Args:
        others: (..., E) whole numbers of units in other arms since the last unit of this arm, or since the start, by
            weight epoch.
        weights: (..., E) weight of this arm in each epoch, at least 0, and below 1 wherever there are others;
            broadcast. An epoch of weight 0 says nothing.
        units: (...) whole numbers of units that came to this arm so far, in the same order of counting.

    Returns:
        The evidence, of the broadcast shape without the last axis (floats for one arm).

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See the module.

    """
    n, w = whole("others", others), finite("weights", weights)
    if not n.ndim or not w.ndim:
        raise ValueError("others and weights must end in an axis of weight epochs")
    if ((w < 0) | (w > 1)).any() or np.any((n > 0) & (w == 1)):
        raise ValueError("weights must lie in [0, 1], and below 1 wherever there are others")
    run = whole("units", units) + 1.0
    rarity = np.asarray(-(n * np.log1p(-np.where(n > 0, w, 0.0))).sum(axis=-1))
    # ln(1/(r + 1) + exp(rarity)/(r (r + 1))).
    log_e = np.logaddexp(0.0, rarity - np.log(run)) - np.log1p(run)
    rarity, log_e = np.broadcast_arrays(rarity, log_e)
    return ArmStall(*(float(x) if x.ndim == 0 else np.asarray(x) for x in (log_e, rarity)))


def units_to_detect_stall(weight: float, *, alpha: float, units: int) -> int:
    """Units in other arms after which a stall is proven, with no unit in this arm: the delay of the monitor.

    Args:
        weight: of the arm, in (0, 1).
        alpha: error level of `ArmStall.log_e`, in (0, 1).
        units: units that came to the arm before it stalled, >= 0.

    Returns:
        The least n with e >= 1/alpha.

    Raises:
        ValueError: an argument is out of its range.

    """
    w, a, run = (
        float(level("weight", weight)),
        float(level("alpha", alpha)),
        float(whole("units", units)) + 1.0,
    )
    needed = math.log(run * ((run + 1.0) / a - 1.0))
    return max(0, math.ceil(needed / -math.log1p(-w) - 1e-9))
