"""Posterior of each arm's mean from exact sums, and where its prior comes from.

Conversions have a Beta posterior. Means have a Student one, from the conjugate normal-inverse-gamma model; its
prior variance is the one common to all arms and counts for 200 units (`VARIANCE_WORTH`), so that an arm whose few
values are all 0 is not taken for one without variance.

A prior is a mean and its worth in units: what so many units of that mean would say. It comes from the spec, from past
experiments (`learned_prior`) or from a quality score of each arm (`score_priors`).

Sources: Gelman, Carlin, Stern, Dunson, Vehtari and Rubin (2013), Bayesian Data Analysis, sections 2.4 (Beta), 3.3
(normal-inverse-gamma); Kleinman (1973), Journal of the American Statistical Association 68(341), 46-54 (moment
estimate of a Beta prior); DerSimonian and Laird (1986), Controlled Clinical Trials 7(3), 177-188 (of a normal one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stream_xp.engine.allocation.evidence import Conversions, Values
from stream_xp.stats import Undetermined
from stream_xp.stats.bayes import learned_prior as learned_effects

FloatArray: TypeAlias = NDArray[np.float64]

VARIANCE_WORTH = 200.0
LARGEST_WORTH = 1000.0
NO_SPREAD = "no two values of an arm differ, and the prior names no standard deviation"
NO_UNITS = "an arm has no units, and its prior is worth none"
TOO_FEW_ARMS = "a prior is learned from at least 2 past arms with units"
NO_VARIETY = "the past arms converted never, or always"

_KLEINMAN_STEPS = 100


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of an arm's mean before its first unit.

    Attributes:
        mean: expected mean, in metric units; strictly between 0 and 1 for conversions.
        worth: units whose evidence it weighs as much as, >= 0; > 0 for conversions.
        sd: standard deviation of one unit's value, for means; None if not known.
    """

    mean: float
    worth: float
    sd: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.worth) and self.worth >= 0):
            raise ValueError("a prior's mean must be finite, and its worth finite and not negative")
        if self.sd is not None and not (math.isfinite(self.sd) and self.sd > 0):
            raise ValueError("a prior's sd must be finite and greater than 0")


UNIFORM = Prior(mean=0.5, worth=2.0)
"""Beta(1, 1): every conversion rate is equally likely."""
FLAT = Prior(mean=0.0, worth=0.0)
"""Nothing is known of a mean."""


@dataclass(frozen=True, slots=True, eq=False)
class BetaPosterior:
    """Independent Beta distributions of K rates.

    Attributes:
        a, b: (K,) shapes, > 0.
    """

    a: FloatArray
    b: FloatArray

    def __post_init__(self) -> None:
        if self.a.ndim != 1 or self.a.shape != self.b.shape or not len(self.a):
            raise ValueError("a and b must have one shape (K,), with at least one arm")
        if not all(np.isfinite(shape).all() and (shape > 0).all() for shape in (self.a, self.b)):
            raise ValueError("a and b must be finite and greater than 0")


@dataclass(frozen=True, slots=True, eq=False)
class StudentPosterior:
    """Independent Student distributions of K means; normal ones where the degrees are infinite.

    Attributes:
        location: (K,) centres, in metric units.
        scale: (K,), > 0; the standard deviation of a normal one.
        degrees: (K,) degrees of freedom, > 0, up to infinity.
    """

    location: FloatArray
    scale: FloatArray
    degrees: FloatArray

    def __post_init__(self) -> None:
        shape = self.location.shape
        if len(shape) != 1 or not shape[0] or self.scale.shape != shape or self.degrees.shape != shape:
            raise ValueError("location, scale and degrees must have one shape (K,), with at least one arm")
        if not (np.isfinite(self.location).all() and np.isfinite(self.scale).all()):
            raise ValueError("location and scale must be finite")
        if not ((self.scale > 0).all() and (self.degrees > 0).all()):
            raise ValueError("scale and degrees must be greater than 0")


Posterior = BetaPosterior | StudentPosterior


def conversion_posterior(sums: Sequence[Conversions], priors: Sequence[Prior]) -> BetaPosterior:
    """Beta(worth * mean + conversions, worth * (1 - mean) + failures) of each arm's rate.

    Args:
        sums: per arm.
        priors: per arm, of a mean strictly between 0 and 1 and a worth above 0.

    Raises:
        ValueError: a prior is none of a rate.

    Source:
        Gelman et al. (2013), section 2.4.
    """
    for prior in priors:
        if not (0 < prior.mean < 1 and prior.worth > 0):
            raise ValueError("the prior of a conversion needs a mean between 0 and 1 and a worth above 0")
    pairs = list(zip(sums, priors, strict=True))
    return BetaPosterior(
        np.array([p.worth * p.mean + s.conversions for s, p in pairs]),
        np.array([p.worth * (1.0 - p.mean) + (s.units - s.conversions) for s, p in pairs]),
    )


def mean_posterior(sums: Sequence[Values], priors: Sequence[Prior]) -> StudentPosterior | Undetermined:
    """Student distribution of each arm's mean under the conjugate model.

    With kappa = worth + n, m the prior mean, s0^2 the variance common to the arms (within them, and of the priors)
    and S an arm's sum of squares around its mean ybar: location (worth m + n ybar) / kappa, degrees nu = 200 + n,
    scale^2 = (200 s0^2 + S + worth n / kappa (ybar - m)^2) / (nu kappa). A flat prior spends one degree.

    Args:
        sums: per arm.
        priors: per arm.

    Returns:
        The posterior, or Undetermined while nothing is known of the variance or of an arm's mean.

    Source:
        Gelman et al. (2013), section 3.3; the prior variance is learned from all arms.
    """
    pairs = list(zip(sums, priors, strict=True))
    variance = _common_variance(pairs)
    if variance <= 0:
        return Undetermined(NO_SPREAD)
    if any(s.units + p.worth <= 0 for s, p in pairs):
        return Undetermined(NO_UNITS)
    found = np.array([_student(s, p, variance) for s, p in pairs])
    return StudentPosterior(found[:, 0], np.sqrt(found[:, 1]), found[:, 2])


def _common_variance(pairs: Sequence[tuple[Values, Prior]]) -> float:
    degrees = math.fsum(max(s.units - 1.0, 0.0) for s, _ in pairs)
    known = math.fsum(p.worth for _, p in pairs if p.sd is not None)
    spread = math.fsum(s.spread for s, _ in pairs)
    spread += math.fsum(p.worth * p.sd * p.sd for _, p in pairs if p.sd is not None)
    return spread / (degrees + known) if degrees + known > 0 else 0.0


def _student(sums: Values, prior: Prior, variance: float) -> tuple[float, float, float]:
    n, kappa = sums.units, prior.worth + sums.units
    mean = sums.mean if n > 0 else prior.mean
    gap = prior.worth * n / kappa * (mean - prior.mean) ** 2
    degrees = VARIANCE_WORTH + (n if prior.worth > 0 else max(n - 1.0, 0.0))
    unit = (VARIANCE_WORTH * variance + sums.spread + gap) / degrees
    return (prior.worth * prior.mean + n * mean) / kappa, unit / kappa, degrees


def learned_prior(
    past: Sequence[Conversions] | Sequence[Values], *, largest_worth: float = LARGEST_WORTH
) -> Prior | Undetermined:
    """Prior of an arm like those of past experiments: empirical Bayes by moments.

    Use all past arms: a selection of the good ones promises too much. Where the arms differ no more than chance makes
    them, the worth has no bound but `largest_worth`, which keeps one prior from silencing new arms for long.

    Args:
        past: sums of past arms on the same metric, at least 2 with units (2 each for means).
        largest_worth: bound of the worth, in units.

    Returns:
        The prior, or Undetermined.

    Source:
        Kleinman (1973) for conversions; DerSimonian and Laird (1986) for means, worth = unit variance / tau^2.
    """
    rates = [arm for arm in past if isinstance(arm, Conversions) and arm.units > 0]
    if rates:
        return _learned_rate(rates, largest_worth)
    means = [arm for arm in past if isinstance(arm, Values) and arm.units > 1]
    if len(means) < 2:
        return Undetermined(TOO_FEW_ARMS)
    variance = math.fsum(arm.spread for arm in means) / math.fsum(arm.units - 1 for arm in means)
    if variance <= 0:
        return Undetermined(NO_SPREAD)
    effects = learned_effects([arm.mean for arm in means], [variance / arm.units for arm in means])
    if isinstance(effects, Undetermined):  # pragma: no cover - there are two
        return effects
    worth = variance / effects.variance if effects.variance > variance / largest_worth else largest_worth
    return Prior(effects.mean, worth, math.sqrt(variance))


def _learned_rate(past: Sequence[Conversions], largest_worth: float) -> Prior | Undetermined:
    if len(past) < 2:
        return Undetermined(TOO_FEW_ARMS)
    n = np.array([arm.units for arm in past])
    rate = np.array([arm.mean for arm in past])
    if math.fsum(rate) in (0.0, float(len(past))):
        return Undetermined(NO_VARIETY)
    mean, likeness = _beta_moments(n, rate, weights=n)
    for _ in range(_KLEINMAN_STEPS):
        mean, likeness = _beta_moments(n, rate, weights=n / (1.0 + likeness * np.maximum(n - 1.0, 0.0)))
    # worth = a + b = 1 / likeness - 1, where likeness is the correlation of two units of one arm.
    worth = min(1.0 / likeness - 1.0, largest_worth) if likeness > 0 else largest_worth
    return Prior(mean, max(worth, 1.0))


def _beta_moments(n: FloatArray, rate: FloatArray, *, weights: FloatArray) -> tuple[float, float]:
    share = weights / weights.sum()
    mean = float(share @ rate)
    chance = mean * (1.0 - mean)
    spread = float(share @ (rate - mean) ** 2)
    by_units = float((share / n) @ (1.0 - share))
    excess = chance * (float(share @ (1.0 - share)) - by_units)
    likeness = (spread - chance * by_units) / excess if excess > 0 else 0.0
    return mean, min(max(likeness, 0.0), 1.0)


def score_priors(
    scores: Mapping[str, float], *, intercept: float, slope: float, worth: float, sd: float | None = None
) -> dict[str, Prior]:
    """Prior of each arm with a mean that is linear in its quality score.

    Args:
        scores: per arm.
        intercept: mean at score 0, in metric units.
        slope: metric units per point of score.
        worth: of every prior, in units.
        sd: standard deviation of one unit's value, for means.
    """
    return {arm: Prior(intercept + slope * score, worth, sd) for arm, score in sorted(scores.items())}


def score_line(
    scores: Sequence[float], past: Sequence[Conversions] | Sequence[Values]
) -> tuple[float, float]:
    """(intercept, slope) of the means of past arms on their scores, by least squares weighted by units.

    Raises:
        ValueError: fewer than 2 past arms with units, or all of one score.
    """
    arms: list[Conversions | Values] = list(past)
    seen = np.array([(x, a.mean, a.units) for x, a in zip(scores, arms, strict=True) if a.units > 0])
    if len(seen) < 2 or np.ptp(seen[:, 0]) == 0:
        raise ValueError("a line needs at least 2 past arms with units and different scores")
    x, y, n = seen.T
    share = n / n.sum()
    centre, level = float(share @ x), float(share @ y)
    slope = float(share @ ((x - centre) * (y - level))) / float(share @ (x - centre) ** 2)
    return level - slope * centre, slope
