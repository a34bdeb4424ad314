r"""What a stopped experiment is worth: the winner's curse, shrinkage by past experiments, type S and type M.

An experiment is stopped, shipped or shown because its estimate is large, so on average the estimate is larger than
the effect: the winner's curse. Two answers, which do not compete:

* **After the fact** (`selected_effect`): with effects ~ N(m, tau^2) the posterior N(effect, sd^2) of the true effect is
  the same whether the sample was fixed or stopped by its own results, because the stopping rule is no part of the
  likelihood. On average over experiments from the prior the shrunk effect of the shipped ones is right, while the raw
  one exaggerates. m and tau come from past experiments (`prior_from_past`).
* **Of the design** (`design_errors`, `stopped_design_errors`): if the true effect were D, how often would a claim have
  the wrong sign (type S), and how much would the estimate exaggerate when it is claimed (type M)?

None of this controls a type-I error; it is what a report owes its reader after a decision.

Sources: Gelman and Carlin (2014), Perspectives on Psychological Science 9(6), 641-651 (type S, type M); Lu, Qiu and
Deng (2019), British Journal of Mathematical and Statistical Psychology 72(1), 1-17 (their closed forms); Armitage,
McPherson and Rowe (1969), Journal of the Royal Statistical Society A 132(2), 235-244 (stopped paths); Gelman, Carlin,
Stern, Dunson, Vehtari and Rubin (2013), Bayesian Data Analysis, section 8.2 (ignorable designs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import log_ndtr, ndtri

from stream_xp.stats._checks import FloatArray, finite, level, not_negative, positive
from stream_xp.stats.bayes import posterior, prob_better
from stream_xp.stats.group_sequential import Sides, stopping
from stream_xp.stats.shrinkage import between_variance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

MIN_EXPERIMENTS: Final = 10
"""Past experiments below which nothing is said about the spread of effects."""
FLOOR_SHARE: Final = 0.1
"""Least standard deviation of a learned prior, as a share of the median standard error of the past experiments."""

_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# Five-point derivative by the drift: its error is near 1e-10 at probabilities that are exact to 1e-12.
_STEP = 0.02
_OFFSETS = (-2.0, -1.0, 1.0, 2.0)
_STENCIL = (1.0 / 12.0, -8.0 / 12.0, 8.0 / 12.0, -1.0 / 12.0)


@dataclass(frozen=True, slots=True, eq=False)
class PastPrior:
    """Prior N(mean, sd^2) of the true effects on a metric, learned from past experiments; arrays of the shape (...).

    Attributes:
        mean: mean of the true effects.
        mean_sd: its standard error; 0 if it was given.
        sd: tau, standard deviation of the true effects, at least the floor; +inf where too few experiments are known.
            A prior with sd +inf shrinks nothing.
        lower: lower limit of tau (not floored).
        upper: upper limit of tau; +inf where too few experiments are known.
        experiments: past experiments that were used, int64.
        known: whether there were enough of them.

    """

    mean: FloatArray
    mean_sd: FloatArray
    sd: FloatArray
    lower: FloatArray
    upper: FloatArray
    experiments: NDArray[np.int64]
    known: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class SelectedEffect:
    """What is known of the effect of one experiment after it has stopped; floats, or arrays of one shape.

    Attributes:
        effect: posterior mean, to be shown beside the raw estimate.
        sd: posterior standard deviation.
        shrinkage: share of the estimate's distance from the prior mean that survived, in [0, 1].
        type_s: posterior probability that the effect has not the sign of the raw estimate; one half for an estimate
            of 0.
        type_m: expected exaggeration, size of the raw estimate over the posterior mean size of the effect. (The mean
            of their ratio is infinite: effects near 0 are possible.) +inf where the effect is known to be 0.

    """

    effect: FloatArray | float
    sd: FloatArray | float
    shrinkage: FloatArray | float
    type_s: FloatArray | float
    type_m: FloatArray | float


@dataclass(frozen=True, slots=True, eq=False)
class DesignErrors:
    """How a claim of an effect errs if the true effect is as assumed; floats, or arrays of one shape.

    Attributes:
        power: probability that an effect is claimed, of either sign.
        type_s: probability that the claimed sign is wrong, given a claim; one half for an effect of 0.
        type_m: exaggeration, mean size of the estimate given a claim over the size of the effect; +inf for an effect
            of 0.

    """

    power: FloatArray | float
    type_s: FloatArray | float
    type_m: FloatArray | float


def prior_from_past(
    effects: ArrayLike,
    standard_errors: ArrayLike,
    *,
    mean: float | None = 0.0,
    min_experiments: int = MIN_EXPERIMENTS,
    floor_share: float = FLOOR_SHARE,
    alpha: float = 0.05,
) -> PastPrior:
    """Prior of the true effects on a metric, from all past experiments that measured it.

    tau^2 by (restricted) maximum likelihood, because past experiments stopped by their own results: that biases moments
    such as DerSimonian and Laird's (`learned_prior`, made for fixed samples), but not the likelihood. Give every
    experiment with its estimate and standard error at its own stop, the failed and the inconclusive ones too: a
    registry of winners gives a prior that hardly shrinks.

    Args:
        effects: (..., M) estimated effects, one per past experiment, in one unit and one orientation; metrics in
            leading axes. Not read where the standard error is +inf.
        standard_errors: (..., M) of these estimates, 1e-50 to 1e50; +inf pads a metric with fewer experiments.
        mean: of the true effects. 0 says that neither direction is expected, which is safe for a report; None learns
            it as well.
        min_experiments: experiments that a metric needs, at least 2.
        floor_share: least tau as a share of the median standard error, >= 0: even if estimates spread no more than
            their errors, a tau of 0 would deny every effect for good.
        alpha: 1 - level of the limits of tau, in (0, 1).

    Returns:
        The prior, of the shape (...); a flat one (sd +inf) for metrics with too few experiments.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        See `between_variance`.

    """
    if min_experiments < 2:
        raise ValueError(f"min_experiments must be at least 2, got {min_experiments}")
    errors = np.asarray(standard_errors, dtype=np.float64)
    spread = between_variance(effects, errors, mean=mean, alpha=alpha)
    known = np.asarray(spread.groups >= min_experiments)
    errors = np.broadcast_to(errors, np.broadcast_shapes(np.shape(effects), errors.shape))
    with np.errstate(invalid="ignore"):
        usual = np.nanmedian(np.where(np.isfinite(errors) | ~known[..., np.newaxis], errors, np.nan), axis=-1)
    floor = float(not_negative("floor_share", floor_share)) * np.where(known, usual, 0.0)
    return PastPrior(
        mean=np.where(known, spread.mean, 0.0),
        mean_sd=np.where(known, spread.mean_sd, np.inf),
        sd=np.where(known, np.maximum(np.sqrt(spread.tau2), floor), np.inf),
        lower=np.where(known, np.sqrt(spread.lower), 0.0),
        upper=np.where(known, np.sqrt(spread.upper), np.inf),
        experiments=spread.groups,
        known=known,
    )


def selected_effect(
    estimate: ArrayLike, standard_error: ArrayLike, *, prior_mean: ArrayLike = 0.0, prior_sd: ArrayLike
) -> SelectedEffect:
    """Shrunk effect, type S and type M risk of an experiment that has stopped, whatever stopped it.

    Args:
        estimate: raw estimate at the stop, any shape.
        standard_error: of that estimate (not the half width of a sequence), > 0, broadcast.
        prior_mean: m, broadcast.
        prior_sd: tau, >= 0, broadcast; +inf for a flat prior, which shrinks nothing.

    Returns:
        The effect, of the broadcast shape (floats for scalars).

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Gelman et al. (2013), equations 2.11 and 2.12; the mean size is that of a folded normal.

    """
    y, se = finite("estimate", estimate), positive("standard_error", standard_error)
    tau = np.asarray(prior_sd, dtype=np.float64)
    if np.isnan(tau).any() or (tau < 0).any():
        raise ValueError("prior_sd must not be negative; +inf means a flat prior")
    after = posterior(y, se * se, prior_mean=prior_mean, prior_variance=tau * tau)
    mean, size = np.asarray(after.mean), np.asarray(after.loss_ship) + np.asarray(after.loss_keep)
    sign = np.sign(y)
    with np.errstate(over="ignore", divide="ignore"):
        kept = np.where(tau > 0, 1.0 / (1.0 + (se / np.where(tau > 0, tau, 1.0)) ** 2), 0.0)
        exaggeration = np.where(size > 0, np.abs(y) / np.where(size > 0, size, 1.0), np.inf)
    # From the lower tail on either side, so that a small risk keeps its digits.
    wrong = np.where(sign == 0, 0.5, np.asarray(prob_better(-sign * mean, after.sd)))
    found = np.broadcast_arrays(mean, np.asarray(after.sd), kept, wrong, exaggeration)
    return SelectedEffect(*_plain(*found))


def design_errors(
    effect: ArrayLike, standard_error: ArrayLike, *, critical: ArrayLike | None = None, alpha: float = 0.05
) -> DesignErrors:
    """Power, type S and type M of a look at a fixed sample that claims an effect beyond `critical` standard errors.

    With l = |D|/s and c the critical value: power = Phi(l - c) + Phi(-l - c), type S = Phi(-l - c)/power, type M =
    (phi(l - c) + phi(l + c) + l (Phi(l - c) - Phi(-l - c)))/(l power).

    Args:
        effect: D, the true effect that is thought plausible before the data, any shape; its sign does not matter.
        standard_error: of the estimate at the look, > 0, broadcast.
        critical: c > 0, broadcast: for a confidence sequence its half width in standard errors at that look
            (`radius_multiplier_two_sided`). By default that of a z test at `alpha`.
        alpha: two-sided level of the z test, in (0, 1).

    Returns:
        The errors, of the broadcast shape (floats for scalars); exact for a normal estimate, in logs, so that they
        stay right where the power is tiny.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Gelman and Carlin (2014); closed forms after Lu, Qiu and Deng (2019), propositions 1 and 2.

    """
    size = np.abs(finite("effect", effect)) / positive("standard_error", standard_error)
    quantile = -float(ndtri(float(level("alpha", alpha)) / 2.0))
    c = positive("critical", quantile if critical is None else critical)
    size, c = np.broadcast_arrays(size, c)
    right, wrong = log_ndtr(size - c), log_ndtr(-size - c)
    power = np.logaddexp(right, wrong)
    with np.errstate(under="ignore", divide="ignore"):
        type_s = np.exp(wrong - power)
        heights = [np.exp(-0.5 * (size - side * c) ** 2 - _LOG_SQRT_2PI - power) for side in (1.0, -1.0)]
        total = heights[0] + heights[1] + size * (1.0 - 2.0 * type_s)
        type_m = np.where(size > 0, total / np.where(size > 0, size, 1.0), np.inf)
        return DesignErrors(*_plain(np.exp(power), type_s, type_m))


def stopped_design_errors(
    effect: float, standard_errors: Sequence[float], critical: Sequence[float], *, sides: Sides = 2
) -> DesignErrors:
    """Power, type S and type M of an experiment that stops at the first look beyond its boundary.

    The estimate is that of the look that stopped, and a claim is any stop. Early looks have large standard errors, so
    what stops early exaggerates most. The mean of the stopped estimate follows from the stopping probabilities alone:
    with P_k(theta) the chance to stop at look k and side, information t_k and B_k = t_k * estimate,
    E[B_k; stop] = dP_k/dtheta + theta t_k P_k.

    Args:
        effect: D, the true effect.
        standard_errors: (K,) of the estimate at each look, > 0 and strictly decreasing.
        critical: (K,) boundary at each look in standard errors, > 0; for a confidence sequence its multipliers.
        sides: 1 for claims above 0 only, or 2.

    Returns:
        The errors, as floats; accurate to about 1e-8 for the looks given. Looks in between are not counted: of a
        sequence that is watched all the time some 50 looks, evenly spaced in ln n, come close.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Armitage, McPherson and Rowe (1969) for P_k; the mean by the score identity, as in Emerson and Fleming (1990),
        Biometrika 77(4), 875-892.

    """
    se = positive("standard_errors", standard_errors)
    if se.ndim != 1 or not se.size or (np.diff(se) >= 0).any():
        raise ValueError("standard_errors must be a sequence that strictly decreases")
    z = positive("critical", critical)
    information = (se[-1] / se) ** 2
    drift = float(finite("effect", effect)) / float(se[-1])

    def chances(theta: float) -> FloatArray:
        found = stopping(information.tolist(), z.tolist(), drift=theta, sides=sides)
        return np.array([found.upper, found.lower])

    at = chances(drift)
    slope = sum(w * chances(drift + o * _STEP) for w, o in zip(_STENCIL, _OFFSETS, strict=True)) / _STEP
    # Mean estimates in units of the last standard error, then of the effect.
    means = (slope + drift * information * at) / information
    power = float(at.sum())
    size = float((means[0] - means[1]).sum()) / power if power > 0 else math.nan
    right = float(at[0 if drift >= 0 else 1].sum())
    wrong = (power - right) / power if drift != 0 else 0.5
    return DesignErrors(power, wrong, size / abs(drift) if drift else math.inf)


def _plain(*values: FloatArray) -> tuple[FloatArray | float, ...]:
    return tuple(float(value) if np.ndim(value) == 0 else np.asarray(value) for value in values)
