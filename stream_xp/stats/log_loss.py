r"""Reward-log loss: an arm's rewards are missing for a reason that is no effect.

A variant that breaks its event log, a consent banner in one arm, a renamed event: the share of units with any reward
event drops to nearly 0 in one arm. As an effect that would be absurd, and read as one it stops, or ships, the wrong
thing. So a largest plausible ratio k > 1 is declared in advance, and the null hypothesis is that the ratio of the two
rates lies in [1/k, k] at all times: what leaves that interval is a fault of the log until shown otherwise.

Given that a unit has an event, it is in the treatment with odds of the weights times the ratio. The labels of these
units test "the ratio is at least 1/k" and "it is at most k" (`success_ratio`, one-sided), whatever the common rate does
over time; the two e-values are averaged. Nothing is known of the cause: with a ratio too high, it is the control that
lost its log.

Exact at every n, under any drift of the common rate and any logged change of the weights. It trusts the weights;
with `units` the largest likelihood ratio that a wrong assignment could give is taken off (`assignment_deviance`). Count
first events, whose units' windows may be open: an effect that only makes events come sooner looks like a ratio above 1
for a while, which k has to allow for.

Source: Lindon and Malek (2022), NeurIPS 35, arXiv:2011.03567 (labels of events); Vovk and Wang (2021), Annals of
Statistics 49(3), 1736-1754 (averages of e-values).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._checks import FloatArray
from stream_xp.stats.assignment import assignment_deviance
from stream_xp.stats.conversion_difference import RATIO_SD, success_ratio_log_e

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True, eq=False)
class LogLoss:
    """Evidence that rewards are missing in one arm; arrays of one shape, finite.

    Attributes:
        log_e: natural logarithm of the e-value against "the ratio of the rates is plausible".
        log_e_treatment: its part for "the treatment's rewards are missing", against a ratio of at least 1/k.
        log_e_control: its part for "the control's rewards are missing", against a ratio of at most k.

    """

    log_e: FloatArray
    log_e_treatment: FloatArray
    log_e_control: FloatArray


def log_loss(
    with_reward: ArrayLike,
    weights: ArrayLike,
    *,
    largest_ratio: float,
    units: ArrayLike | None = None,
    sd: float = RATIO_SD,
) -> LogLoss:
    """Test that the rates of units with any reward differ by no more than a plausible ratio.

    Args:
        with_reward: (..., E, 2) whole numbers of units with a reward event, per weight epoch and (control, treatment).
        weights: (E, 2) or (..., E, 2) logged assignment probabilities of the two arms, scaled so that rows sum to 1
            within 1e-9 (`pair_weights`).
        largest_ratio: k, the largest ratio of the two rates that could be an effect, in (1, 1e40]; fixed in advance.
        units: (..., E, 2) whole numbers of exposed units; given, the evidence survives a broken assignment, at about
            half a nat for each epoch. None trusts the weights.
        sd: standard deviation of the log ratio beyond the edge under the mixture, 1e-6 to 100; fixed in advance.

    Returns:
        The evidence, of the broadcast shape without the last two axes; 0 without any reward.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See the module.

    """
    if not 1 < largest_ratio <= 1e40:
        raise ValueError(f"largest_ratio must be above 1 and at most 1e40, got {largest_ratio}")
    edge = math.log(largest_ratio)
    low = success_ratio_log_e(with_reward, weights, null=-edge, sd=sd, side="below")
    high = success_ratio_log_e(with_reward, weights, null=edge, sd=sd, side="above")
    if units is not None:
        deviance = assignment_deviance(units, weights)
        low, high = low - deviance, high - deviance
    return LogLoss(np.asarray(np.logaddexp(low, high) - math.log(2.0)), np.asarray(low), np.asarray(high))
