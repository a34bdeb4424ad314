"""Exact confidence sequence for the value of an arm from units assigned by a changing policy.

Each unit went to the arm with a logged probability that may depend on everything before it. The weighted
reward w R, w = 1{unit went to the arm} / probability, has the arm's value as its mean given the past, but no
useful upper bound. The betting capital of the gambler who wins if the mean is larger needs none; the upper
bound comes from the same gambler on w (1 - R), whose mean is one minus the value.

Assumptions: rewards lie in [0, 1] (rescale others); probabilities are those logged at assignment; the value
is the same for every unit given the past. Non-asymptotic, order-dependent.

Source: Waudby-Smith, Wu, Ramdas, Karampatziakis and Mineiro (2024), Anytime-valid off-policy inference for
contextual bandits, ACM/IMS Journal of Data Science 1(3), arXiv:2210.10768, proposition 2 and theorem 1, with
the truncation 1/2 and the bets of `betting.predictable_bets`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._boundaries import log_threshold
from stream_xp.stats._checks import FloatArray, finite
from stream_xp.stats._predictable import unit_interval
from stream_xp.stats.betting import combined, log_growth, predictable_bets, refuted_up_to
from stream_xp.stats.normal_mixture import Undetermined

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from stream_xp.stats._boundaries import Sides

NO_UNITS = "no unit has been counted"


@dataclass(frozen=True, slots=True)
class OffPolicyValue:
    """Value of an arm.

    Attributes:
        estimate: inverse-propensity mean of the rewards; may lie outside [0, 1].
        lower: lower end of the confidence sequence, in [0, 1].
        upper: upper end, in [0, 1].
        n: number of units, whatever their arm.

    """

    estimate: float
    lower: float
    upper: float
    n: int


def off_policy_value(
    taken: ArrayLike, propensity: ArrayLike, reward: ArrayLike, *, alpha: float, side: Sides = "both"
) -> OffPolicyValue | Undetermined:
    """Confidence sequence for the mean reward that every unit would have had on the arm.

    Args:
        taken: (n,) booleans in order, whether the unit went to the arm.
        propensity: (n,) logged probability of the arm at assignment, in (0, 1].
        reward: (n,) reward in [0, 1]; disregarded where `taken` is false.
        alpha: error level, in (0, 1); alpha/2 on each of both sides.
        side: "both", "above" (a lower bound only) or "below" (an upper bound only).

    Returns:
        The value, or Undetermined without units.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Waudby-Smith et al. (2024), theorem 1.

    """
    gains, losses = _weighted(taken, propensity, reward)
    target = log_threshold(alpha, side=side)
    if not len(gains):
        return Undetermined(NO_UNITS)
    lower = 0.0 if side == "below" else _refuted(gains, target)
    upper = 1.0 if side == "above" else 1.0 - _refuted(losses, target)
    return OffPolicyValue(float(gains.mean()), lower, upper, len(gains))


def off_policy_log_e(
    taken: ArrayLike,
    propensity: ArrayLike,
    reward: ArrayLike,
    *,
    null: float,
    alpha: float,
    side: Sides = "both",
) -> float:
    """Log e-value against a value of the arm; the dual of `off_policy_value`.

    Args:
        taken: (n,) booleans in order, whether the unit went to the arm.
        propensity: (n,) logged probability of the arm at assignment, in (0, 1].
        reward: (n,) reward in [0, 1]; disregarded where `taken` is false.
        null: value of the arm under the null, in [0, 1].
        alpha: error level for which the bets are sized, in (0, 1).
        side: "both", "above" (against "at most `null`") or "below" (against "at least `null`").

    Returns:
        The log e-value; 0 without units for one side, -ln 2 for both.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Waudby-Smith et al. (2024), theorem 1.

    """
    gains, losses = _weighted(taken, propensity, reward)
    target, m = log_threshold(alpha, side=side), float(unit_interval("null", null))
    plus = log_growth(gains, predictable_bets(gains, math.exp(-target)), m)
    minus = log_growth(losses, predictable_bets(losses, math.exp(-target)), 1.0 - m)
    return float(combined(np.asarray(plus), np.asarray(minus), n=len(gains), side=side))


def _refuted(x: FloatArray, target: float) -> float:
    return refuted_up_to(x, predictable_bets(x, math.exp(-target)), target)


def _weighted(taken: ArrayLike, propensity: ArrayLike, reward: ArrayLike) -> tuple[FloatArray, FloatArray]:
    chosen, p, y = np.asarray(taken), finite("propensity", propensity), finite("reward", reward)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype != np.bool_):
        raise ValueError("taken must be a one-dimensional array of booleans")
    if p.shape != chosen.shape or y.shape != chosen.shape:
        raise ValueError("propensity and reward must have the shape of taken")
    if ((p <= 0) | (p > 1)).any():
        raise ValueError("propensity must be greater than 0 and at most 1")
    if ((y < 0) | (y > 1)).any():
        raise ValueError("reward must lie in [0, 1]")
    # A weight beyond 1e100 changes no bet that a float can hold.
    weight = np.where(chosen, 1.0 / np.maximum(p, 1e-100), 0.0)
    return weight * y, weight * (1.0 - y)
