"""Gaussian Bayes for one effect: posterior, chance to be better, expected losses, shrinkage.

A normal prior on the effect and an asymptotically normal estimate give a normal posterior. These numbers help
to decide and to report; **they control no type-I error under peeking**. Stopping as soon as the chance to be
better leaves (2.5 %, 97.5 %) under a flat prior, looking after every unit, errs in 44 % of experiments without
an effect; stopping at an expected loss below 0.002 with a chance above 95 % in 35 %. What does hold, on
average over experiments that follow the prior, is the posterior itself, whenever one stops: hence learn the
prior from past experiments (`learned_prior`), and after a stop report the shrunk effect (`shrunk_effect`), not
the raw estimate, which overstates.

Sources: Gelman, Carlin, Stern, Dunson, Vehtari and Rubin (2013), Bayesian Data Analysis, section 2.5 (normal
posterior); DerSimonian and Laird (1986), Controlled Clinical Trials 7(3), 177-188 (learned prior);
Gelman and Carlin (2014), Perspectives on Psychological Science 9(6), 641-651 (type S and type M errors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import erfcx, log_ndtr, logsumexp, ndtr, ndtri

from stream_xp.stats._checks import FloatArray, finite, level, not_negative, positive
from stream_xp.stats.normal_mixture import Undetermined

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

TOO_FEW_EXPERIMENTS = "a prior is learned from at least 2 experiments"
NO_EFFECT = "under this prior there is no effect whose size could be overstated"

_SQRT_2PI = math.sqrt(2.0 * math.pi)
_FRACTION_LEVELS = 60
_LARGEST = 1e100
# Panels of a normal tail: halving towards its edge, where a posterior may turn sharply, then of unit length.
_TAIL_EDGES = np.concatenate(([0.0], 0.5 ** np.arange(40.0, 0.0, -1.0), np.arange(1.0, 21.0)))
_BULK_SDS = np.linspace(-9.0, 9.0, 19)
_GAUSS_NODES, _GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(12)


@dataclass(frozen=True, slots=True)
class Posterior:
    """What a normal posterior says about an effect for which larger is better; floats, or arrays of one shape.

    Attributes:
        mean: posterior mean, the shrunk effect.
        sd: posterior standard deviation.
        prob_better: posterior probability that the effect is above 0; half where it is known to be 0.
        loss_ship: expected loss of shipping, E max(-effect, 0), in the unit of the effect.
        loss_keep: expected loss of keeping control, E max(effect, 0).

    """

    mean: FloatArray | float
    sd: FloatArray | float
    prob_better: FloatArray | float
    loss_ship: FloatArray | float
    loss_keep: FloatArray | float


@dataclass(frozen=True, slots=True)
class LearnedPrior:
    """A normal prior learned from past experiments.

    Attributes:
        mean: mean of the true effects.
        variance: tau^2, their variance; 0 where the estimates spread no more than their errors.
        mean_variance: variance of `mean` as an estimate.
        heterogeneity: Cochran's Q, about chi-squared with experiments - 1 degrees under no spread.
        experiments: number of experiments learned from.

    """

    mean: float
    variance: float
    mean_variance: float
    heterogeneity: float
    experiments: int

    def shrinkage(self, variance: ArrayLike) -> FloatArray | float:
        """Return how much of an estimate's distance from the prior mean survives, tau^2 / (tau^2 + variance).

        Args:
            variance: of the estimate, > 0, any shape.

        Raises:
            ValueError: `variance` is not finite, or not above 0.

        """
        return _plain(self.variance / (self.variance + positive("variance", variance)))


@dataclass(frozen=True, slots=True)
class ShrunkEffect:
    """An estimate shrunk by what is known of past experiments.

    Attributes:
        mean: posterior mean, to be reported in place of the raw estimate.
        sd: posterior standard deviation.
        lower: lower end of the central posterior interval.
        upper: its upper end.
        shrinkage: share of the distance from the prior mean that survived, in [0, 1).

    """

    mean: float
    sd: float
    lower: float
    upper: float
    shrinkage: float


@dataclass(frozen=True, slots=True)
class DecisionErrors:
    """How a decision rule errs over experiments whose true effects follow a prior.

    Attributes:
        log_fires: log of the probability that the rule fires.
        type_s: probability that the claimed sign is wrong, given that the rule fires.
        type_m: mean size of the estimate over mean size of the true effect, given that the rule fires.
        mean_estimate: mean size of the estimate given that the rule fires, in the unit of the effect.
        mean_effect: mean true effect in the claimed direction given that the rule fires, same unit.

    """

    log_fires: float
    type_s: float
    type_m: float
    mean_estimate: float
    mean_effect: float


@dataclass(frozen=True, slots=True, eq=False)
class BestArm:
    """Posterior probabilities to be the best of several arms.

    Attributes:
        prob_best: (..., K) probability that each arm has the largest value; sums to 1.
        expected_loss: (..., K) expected distance from each arm to the best one, same unit as the means.

    """

    prob_best: FloatArray
    expected_loss: FloatArray


def posterior(
    estimate: ArrayLike, variance: ArrayLike, *, prior_mean: ArrayLike = 0.0, prior_variance: ArrayLike
) -> Posterior:
    """Normal posterior of an effect with its losses. No control of the type-I error under peeking: 0.44.

    Args:
        estimate: of the effect, any shape; larger is better, else pass its negative.
        variance: of the estimate (not of one unit), > 0, broadcast.
        prior_mean: mean of the prior, broadcast.
        prior_variance: of the prior, >= 0, broadcast; +inf for a flat prior.

    Returns:
        The posterior; floats for scalars.

    Raises:
        ValueError: an argument is not finite or out of its range.

    Source:
        Gelman et al. (2013), equations 2.11 and 2.12; losses by integration of the normal density.

    """
    v, tau2 = positive("variance", variance), _prior_variance(prior_variance)
    y, m = finite("estimate", estimate), finite("prior_mean", prior_mean)
    # The shares of estimate and prior mean, each from its own quotient: their sum is 1 only by rounding, but
    # the smaller one keeps its digits.
    with np.errstate(over="ignore"):
        keep = np.where(tau2 > 0, 1.0 / (1.0 + v / np.where(tau2 > 0, tau2, 1.0)), 0.0)
        drop = 1.0 / (1.0 + tau2 / v)
    mean, sd = (
        np.asarray(keep * y + drop * m),
        np.sqrt(np.where(tau2 < v, drop * np.minimum(tau2, v), keep * v)),
    )
    mean, sd = np.broadcast_arrays(mean, sd)
    ship, keep_loss = _losses(mean, sd)
    return Posterior(*(_plain(np.asarray(x)) for x in (mean, sd, _prob_better(mean, sd), ship, keep_loss)))


def prob_better(mean: ArrayLike, sd: ArrayLike) -> FloatArray | float:
    """Posterior probability that an effect is above 0, Phi(mean / sd).

    Args:
        mean: posterior mean, any shape.
        sd: posterior standard deviation, >= 0, broadcast.

    Returns:
        Probability of the broadcast shape; with sd 0 it is 0, 1, or one half for an effect of 0.

    Raises:
        ValueError: an argument is not finite, or `sd` is negative.

    Source:
        Gelman et al. (2013), section 2.5.

    """
    return _plain(_prob_better(finite("mean", mean), not_negative("sd", sd)))


def expected_losses(mean: ArrayLike, sd: ArrayLike) -> tuple[FloatArray | float, FloatArray | float]:
    """Expected losses of shipping and of keeping, sd phi(z) - mean Phi(-z) and sd phi(z) + mean Phi(z).

    z = mean / sd. In the tails, where the two terms cancel, Mills' ratio is continued as a fraction instead,
    so that the relative error stays near 1e-14.

    Args:
        mean: posterior mean of the effect, any shape.
        sd: posterior standard deviation, >= 0, broadcast.

    Returns:
        (loss of shipping, loss of keeping), >= 0, of the broadcast shape.

    Raises:
        ValueError: an argument is not finite, or `sd` is negative.

    Source:
        The unit normal loss integral; Raiffa and Schlaifer (1961), Applied Statistical Decision Theory, 5.3.

    """
    ship, keep = _losses(finite("mean", mean), not_negative("sd", sd))
    return _plain(ship), _plain(keep)


def learned_prior(estimates: ArrayLike, variances: ArrayLike) -> LearnedPrior | Undetermined:
    """Normal prior of the effects, from the results of past experiments.

    tau^2 = max(0, (Q - (M - 1)) / (sum w - sum w^2 / sum w)) with w = 1 / variance and Q the weighted spread
    around the weighted mean; the mean is then weighted by 1 / (variance + tau^2). Use all past experiments on
    the metric: a selection of the successful ones gives a prior that hardly shrinks.

    Args:
        estimates: (M,) estimated effects, at the planned end of each experiment.
        variances: (M,) variances of these estimates, > 0.

    Returns:
        The prior, or Undetermined for fewer than 2 experiments.

    Raises:
        ValueError: an argument is not finite, above 1e100, of another shape, or a variance is below 1e-100.

    Source:
        DerSimonian and Laird (1986), the moment estimate; consistent as M grows, rough below about 20.

    """
    y, v = finite("estimates", estimates), positive("variances", variances)
    if y.ndim != 1 or y.shape != v.shape:
        raise ValueError("variances must have the shape (M,) of estimates")
    if (np.abs(y) > _LARGEST).any() or (v > _LARGEST).any() or (v < 1.0 / _LARGEST).any():
        raise ValueError(f"estimates and variances must lie within {_LARGEST} and its inverse in size")
    if len(y) < 2:
        return Undetermined(TOO_FEW_EXPERIMENTS)
    w = v.min() / v  # relative weights stay in (0, 1]
    spread = float(w @ (y - w @ y / w.sum()) ** 2) / float(v.min())
    excess = float(w.sum() - w @ w / w.sum()) / float(v.min())
    tau2 = max(0.0, (spread - (len(y) - 1)) / excess) if excess > 0 else 0.0
    total = v + tau2
    share = total.min() / total
    return LearnedPrior(
        float(share @ y / share.sum()), tau2, float(total.min() / share.sum()), spread, len(y)
    )


def shrunk_effect(
    estimate: float, variance: float, *, prior: LearnedPrior, mass: float = 0.95
) -> ShrunkEffect:
    """Effect to report for an experiment that has stopped.

    The raw estimate at a stop overstates: measured .090 for a true .055, and .055 shrunk. The stopping rule
    does not enter; the interval covers with probability `mass` on average over experiments from the prior, and
    is no confidence sequence.

    Args:
        estimate: raw estimate at the stop.
        variance: of that estimate, > 0.
        prior: from `learned_prior`.
        mass: posterior probability of the interval, in (0, 1).

    Returns:
        The shrunk effect.

    Raises:
        ValueError: an argument is not finite or out of its range.

    Source:
        Gelman et al. (2013), equations 2.11 and 2.12.

    """
    after = posterior(
        float(finite("estimate", estimate)),
        float(positive("variance", variance)),
        prior_mean=prior.mean,
        prior_variance=prior.variance,
    )
    mean, sd = float(after.mean), float(after.sd)
    half = -float(ndtri((1.0 - float(level("mass", mass))) / 2.0)) * sd
    return ShrunkEffect(mean, sd, mean - half, mean + half, float(prior.shrinkage(variance)))


def decision_errors(
    variance: float, *, z: float, prior_mean: float = 0.0, prior_variance: float, sides: int = 2
) -> DecisionErrors | Undetermined:
    """Type S and type M errors of a rule that claims an effect when its estimate is z standard errors away.

    The true effects follow the prior and the estimates scatter around them; the rule fires when the estimate
    is at least z standard errors above 0 (one-sided), or that far on either side. For a test of this library
    at n units, z is its radius multiplier; the answer is then about a look at n.

    Args:
        variance: of the estimate, > 0.
        z: threshold of the rule, >= 0.
        prior_mean: mean of the true effects.
        prior_variance: variance of the true effects, >= 0.
        sides: 1 or 2.

    Returns:
        The errors, or Undetermined where every true effect is 0.

    Raises:
        ValueError: an argument is not finite or out of its range.

    Source:
        Gelman and Carlin (2014), averaged over the prior; one-dimensional quadrature over the estimates that
        make the rule fire, relative error about 1e-10.

    """
    v, tau2 = float(positive("variance", variance)), float(not_negative("prior_variance", prior_variance))
    mean, edge = float(finite("prior_mean", prior_mean)), float(not_negative("z", z)) * math.sqrt(v)
    if sides not in (1, 2):
        raise ValueError(f"sides must be 1 or 2, got {sides!r}")
    if mean == 0 and tau2 == 0:
        return Undetermined(NO_EFFECT)
    # The lower tail is the upper one of the mirrored metric.
    tails = [_tail(edge, m, variance=v, prior_variance=tau2) for m in (mean, -mean)[:sides]]
    log_mass = np.array([tail[0] for tail in tails])
    log_fires = float(logsumexp(log_mass))
    share = np.exp(log_mass - log_fires)
    wrong, estimate, size, effect = (float(share @ [tail[i] for tail in tails]) for i in range(1, 5))
    return DecisionErrors(log_fires, wrong, estimate / size, estimate, effect)


def best_arm(means: ArrayLike, sds: ArrayLike) -> BestArm:
    """Probability to be best and expected loss of each arm, under independent normal posteriors.

    Args:
        means: (..., K) posterior means of at least one arm; larger is better.
        sds: (..., K) posterior standard deviations, > 0, of the same shape.

    Returns:
        Probabilities with an absolute error near 1e-12, and losses.

    Raises:
        ValueError: an argument is not finite, of another shape, or an sd is not above 0.

    Source:
        P(best_a) is the integral of the density of arm a times the distribution functions of the others;
        Gauss-Legendre quadrature between breakpoints of one standard deviation of each arm.

    """
    m, s = finite("means", means), positive("sds", sds)
    if not m.ndim or not m.shape[-1] or m.shape != s.shape:
        raise ValueError("sds must have the shape (..., K) of means, with at least one arm")
    with np.errstate(over="ignore"):
        # From the largest mean, where the mass is, so that a small sd there is not lost to rounding.
        m = np.maximum(m - m.max(axis=-1, keepdims=True), -1e300)
    x, weights = _arm_grid(m, s)
    with np.errstate(over="ignore"):
        z = np.clip((x[..., np.newaxis, :] - m[..., np.newaxis]) / s[..., np.newaxis], -1e150, 1e150)
    log_below = log_ndtr(z)
    log_others = log_below.sum(axis=-2, keepdims=True) - log_below
    with np.errstate(under="ignore"):
        heights = np.exp(log_others - 0.5 * z * z) / (_SQRT_2PI * s[..., np.newaxis])
        loss = (np.exp(log_below) * -np.expm1(log_others) * weights[..., np.newaxis, :]).sum(axis=-1)
    prob = (heights * weights[..., np.newaxis, :]).sum(axis=-1)
    return BestArm(prob / prob.sum(axis=-1, keepdims=True), loss)


def _prior_variance(value: ArrayLike) -> FloatArray:
    array = np.asarray(value, dtype=np.float64)
    if np.isnan(array).any() or (array < 0).any():
        raise ValueError("prior_variance must not be negative; +inf means a flat prior")
    return array


def _standardised(mean: FloatArray, sd: FloatArray) -> FloatArray:
    # mean / sd, saturated; where sd is 0 far away on the side of the mean, and 0 for a mean of 0.
    with np.errstate(over="ignore"):
        z = np.where(sd > 0, mean / np.where(sd > 0, sd, 1.0), np.sign(mean) * 1e150)
    return np.asarray(np.clip(z, -1e150, 1e150))


def _prob_better(mean: FloatArray, sd: FloatArray) -> FloatArray:
    return np.asarray(ndtr(_standardised(mean, sd)))


def _losses(mean: FloatArray, sd: FloatArray) -> tuple[FloatArray, FloatArray]:
    z = _standardised(mean, sd)
    rare = sd * _normal_loss(np.abs(z))
    likely = rare + np.abs(mean)
    return np.where(z >= 0, rare, likely), np.where(z >= 0, likely, rare)


def _normal_loss(z: FloatArray) -> FloatArray:
    # phi(z) - z Phi(-z) for z >= 0. With Mills' ratio R = 1/(z + K), K = 1/(z + 2/(z + 3/...)), it is
    # phi R K; below 5 that converges slowly, but there the difference keeps its digits.
    far = np.maximum(z, 5.0)
    fraction: FloatArray = np.zeros(far.shape)
    for j in range(_FRACTION_LEVELS, 1, -1):
        fraction = j / (far + fraction)
    rest = 1.0 / (far + fraction)
    near = np.minimum(z, 5.0)
    mills = math.sqrt(math.pi / 2.0) * erfcx(near / math.sqrt(2.0))
    scaled = np.where(z > 5.0, rest / (far + rest), 1.0 - near * mills)
    return np.asarray(np.exp(-0.5 * np.minimum(z, 1e100) ** 2) / _SQRT_2PI * scaled)


def _tail(edge: float, mean: float, *, variance: float, prior_variance: float) -> tuple[float, ...]:
    # Given an estimate above `edge`: (log probability of that, probability of a negative effect, mean
    # estimate, mean size of the effect, mean effect).
    sd = math.sqrt(variance + prior_variance)
    start = max((edge - mean) / sd, -10.0)
    edges = start + _TAIL_EDGES / max(1.0, 0.5 * start)
    half = 0.5 * np.diff(edges)[:, np.newaxis]
    w = (edges[:-1, np.newaxis] + half * (1.0 + _GAUSS_NODES)).ravel()
    height = (
        (half * _GAUSS_WEIGHTS).ravel() * np.exp(0.5 * (start - w) * (start + w))
        if start > 0
        else (half * _GAUSS_WEIGHTS).ravel() * np.exp(-0.5 * w * w)
    )
    share = height / height.sum()
    keep = prior_variance / (prior_variance + variance)
    x = mean + sd * w
    after, spread = np.asarray(mean + keep * sd * w), np.full(w.shape, math.sqrt(keep * variance))
    ship, keep_loss = _losses(after, spread)
    averages = (_prob_better(-after, spread), x, ship + keep_loss, after)
    return float(log_ndtr(-(edge - mean) / sd)), *(float(share @ value) for value in averages)


def _arm_grid(m: FloatArray, s: FloatArray) -> tuple[FloatArray, FloatArray]:
    edges = m[..., np.newaxis] + s[..., np.newaxis] * _BULK_SDS
    edges = np.sort(edges.reshape(*m.shape[:-1], -1), axis=-1)
    half = 0.5 * np.diff(edges)[..., np.newaxis]
    x = edges[..., :-1, np.newaxis] + half * (1.0 + _GAUSS_NODES)
    flat = (*m.shape[:-1], -1)
    return x.reshape(flat), (half * _GAUSS_WEIGHTS).reshape(flat)


def _plain(value: FloatArray) -> FloatArray | float:
    return float(value) if np.ndim(value) == 0 else np.asarray(value)
