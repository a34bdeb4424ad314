"""Rows j and k: posteriors that are watched, and many metrics at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from stream_xp.services.calibrate.case import ALPHA, PLANNED, Outcome, ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, Rng, Sample
from stream_xp.services.calibrate.running import Looks, totals
from stream_xp.stats.bayes import Posterior, learned_prior, posterior
from stream_xp.stats.multiplicity import equal_levels
from stream_xp.stats.normal_mixture import Undetermined, log_e_two_sided, tuned_rho2

# The chance to be better that stops an experiment, and from which unit on anybody looks.
_SURE = 0.975
_FIRST_LOOK = 100
_TINY_LOSS, _LIKELY = 0.002, 0.95
_PRIOR_SD = 0.05
_PAST_EXPERIMENTS, _PAST_VARIANCE = 2_000, 0.02**2


# ---- j: Bayes ----------------------------------------------------------------------------------------


def peeked_probability(drawn: Sample, alpha: float) -> BoolArray:  # noqa: ARG001 (the rule has its own)
    """Stop when the chance to be better under a flat prior is above 97.5 % or below 2.5 %."""
    after = _posterior_of(drawn.y, prior_variance=math.inf)
    return ever((np.abs(np.asarray(after.prob_better) - 0.5) > _SURE - 0.5)[:, _FIRST_LOOK:])


def peeked_loss(drawn: Sample, alpha: float) -> BoolArray:  # noqa: ARG001
    """Stop when shipping or keeping is likely right and its expected loss is tiny, under a flat prior."""
    after = _posterior_of(drawn.y, prior_variance=math.inf)
    better = np.asarray(after.prob_better)
    ship = (better > _LIKELY) & (np.asarray(after.loss_ship) < _TINY_LOSS)
    keep = (better < 1.0 - _LIKELY) & (np.asarray(after.loss_keep) < _TINY_LOSS)
    return ever((ship | keep)[:, _FIRST_LOOK:])


def _posterior_of(y: FloatArray, *, prior_mean: float = 0.0, prior_variance: float) -> Posterior:
    n = np.arange(1, y.shape[1] + 1)
    return posterior(
        totals(y, n) / n, np.asarray(1.0 / n), prior_mean=prior_mean, prior_variance=prior_variance
    )


@dataclass(frozen=True, slots=True)
class StoppedByPosterior:
    """Effects come from a prior; an experiment stops when its posterior is sure of the sign.

    Only stopped experiments count: the posterior promises something about those, and about them on average.

    Attributes:
        interval: err when the 95 % posterior interval leaves out the truth; else when the sign is wrong.
        learned: whether the prior is learned from past experiments; else the true one is known.

    """

    interval: bool = False
    learned: bool = False

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        effect = _PRIOR_SD * rng.standard_normal(paths)
        mean, variance = self._prior(rng)
        y = rng.standard_normal((paths, n)) + effect[:, np.newaxis]
        after = _posterior_of(y, prior_mean=mean, prior_variance=variance)
        sure = np.abs(np.asarray(after.prob_better) - 0.5) > _SURE - 0.5
        at = np.arange(paths), sure.argmax(axis=1)
        centre, sd = np.asarray(after.mean)[at], np.asarray(after.sd)[at]
        outside = np.abs(effect - centre) > -float(ndtri(ALPHA / 2.0)) * sd
        return Outcome(outside if self.interval else effect * centre < 0, ever(sure))

    def _prior(self, rng: Rng) -> tuple[float, float]:
        if not self.learned:
            return 0.0, _PRIOR_SD**2
        spread = math.sqrt(_PRIOR_SD**2 + _PAST_VARIANCE)
        past = spread * rng.standard_normal(_PAST_EXPERIMENTS)
        prior = learned_prior(past, np.full(_PAST_EXPERIMENTS, _PAST_VARIANCE))
        if isinstance(prior, Undetermined):
            raise TypeError(prior.reason)
        return prior.mean, prior.variance


# ---- k: many metrics ---------------------------------------------------------------------------------

# From log e-values (..., m) and the level to which hypotheses are rejected.
Procedure = Callable[[FloatArray, float], BoolArray]


@dataclass(frozen=True, slots=True)
class ManyMetrics:
    """Metrics of one experiment, all without an effect, correlated; any rejection is an error.

    Attributes:
        procedure: see `Procedure`.
        looks: when all e-values are looked at.
        metrics: how many.
        correlation: of every two of them.

    """

    procedure: Procedure
    looks: Looks
    metrics: int = 15
    correlation: float = 0.3

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        at = self.looks.at(n)
        shared = math.sqrt(self.correlation) * totals(rng.standard_normal((paths, n)), at)
        own = [totals(rng.standard_normal((paths, n)), at) for _ in range(self.metrics)]
        sums = shared[..., np.newaxis] + math.sqrt(1.0 - self.correlation) * np.stack(own, axis=-1)
        z = sums / np.sqrt(at)[:, np.newaxis]
        k = at.astype(np.float64) * tuned_rho2(PLANNED, ALPHA)
        log_e = log_e_two_sided(z, k[:, np.newaxis])
        return Outcome(ever(np.asarray(self.procedure(log_e, ALPHA).any(axis=-1))))


def without_correction(log_e: FloatArray, alpha: float) -> BoolArray:
    """Each metric at the whole level."""
    return np.asarray(log_e >= -math.log(alpha))


def levels_of_bonferroni(log_e: FloatArray, alpha: float) -> BoolArray:
    """Each metric's own sequence at its share of the level."""
    return np.asarray(log_e >= -np.log(equal_levels(alpha, log_e.shape[-1])))
