"""Rows b1: one mean in [0, 1] against its true value, and two against a margin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stream_xp.services.calibrate.case import PLANNED, ever
from stream_xp.services.calibrate.conversions import both_arms
from stream_xp.services.calibrate.data import BoolArray, Sample
from stream_xp.services.calibrate.running import EVERY_UNIT, Looks, totals
from stream_xp.stats.bernoulli import BetaPrior, Sides, TunedPrior, bernoulli_log_e, bernoulli_pair_log_e


@dataclass(frozen=True, slots=True)
class OneRate:
    """The beta-binomial mixture against the true mean; its sequence leaves out just the means it rejects.

    Attributes:
        side: of the test.
        flat: whether the prior is flat; else it is tuned.
        looks: when.

    """

    side: Sides = "both"
    flat: bool = False
    looks: Looks = EVERY_UNIT

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the true mean is ever rejected."""
        at = self.looks.at(drawn.n)
        level = alpha if self.side == "both" else 2.0 * alpha
        prior = BetaPrior(1.0, 1.0) if self.flat else TunedPrior(PLANNED, level)
        sums = np.minimum(totals(drawn.y, at), at)
        log_e = bernoulli_log_e(at, sums, mean=drawn.truth, prior=prior, side=self.side)
        return ever(np.asarray(log_e) >= -math.log(alpha))


@dataclass(frozen=True, slots=True)
class RateMargin:
    """One-sided exact test of the difference of two rates, with the true difference as the margin."""

    side: Literal["above", "below"]
    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the test ever rejects."""
        at = self.looks.at(drawn.n)
        units, successes = (both_arms(drawn, values, at).sum(axis=-2) for values in (1, drawn.ticks))
        margin = drawn.lift * drawn.truth
        log_e = bernoulli_pair_log_e(units, successes, margin=margin, side=self.side)
        return ever(np.asarray(log_e) >= -math.log(alpha))
