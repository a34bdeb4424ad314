"""Means of arms within contexts, partly pooled: y = level of the context + effect of the arm + their interaction.

Levels are fitted freely, because what is common to all arms of a context does not say which is best. Effects of arms
are common to the contexts; interactions are normal with variance tau^2 and let a context have another best arm. A
context with few units borrows the effects of the others, one with many relies on its own: its weight on the common
effect is v / (v + tau^2), with v the variance of its own mean.

tau^2 is estimated from the spread Q around the additive fit, placed at the lower quartile of its chi-squared
distribution. The usual moment estimate (Q at its mean) pools completely in half of the cases with few contexts; pooling
too much hands a context the wrong arm, pooling too little costs some units.

Given tau^2 and the levels the arms of a context are independent and normal. Variances are those of the whole context,
so that an arm without conversions is not taken for certain.

Sources: Gelman et al. (2013), equations 5.17 to 5.20 (partial pooling); Thompson and Sharp (1999), Statistics in
Medicine 18, 2693-2708 (the moment estimate beside a regression); the quartile is this project's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from stream_xp.engine.allocation.evidence import Conversions, Sums, Values
from stream_xp.engine.allocation.posterior import (
    NO_SPREAD,
    NO_UNITS,
    VARIANCE_WORTH,
    FloatArray,
    Prior,
    StudentPosterior,
)
from stream_xp.engine.allocation.strata import layout
from stream_xp.stats import Undetermined

_QUARTILE = 0.25


class Pooled(NamedTuple):
    """Posteriors of the arms.

    Attributes:
        by_context: in each context, on a scale that all its arms share.
        whole: over the contexts' mix, every arm at the same mix.
        interaction_variance: tau^2, in metric units squared.
    """

    by_context: dict[str, StudentPosterior]
    whole: StudentPosterior
    interaction_variance: float


def pooled(
    sums: Mapping[str, Mapping[str, Sums]], arms: Sequence[str], priors: Mapping[str, Prior]
) -> Pooled | Undetermined:
    """Partly pooled posteriors of every arm in every context.

    Args:
        sums: per context and arm, adjusted for weight epochs.
        arms: the order of the posteriors.
        priors: of arms of which something is known.
    """
    contexts = sorted(sums)
    n = np.array([[sums[c][arm].units for c in contexts] for arm in arms], dtype=np.float64)
    y = np.array([[sums[c][arm].mean if sums[c][arm].units > 0 else 0.0 for c in contexts] for arm in arms])
    unit = _unit_variances([list(sums[c].values()) for c in contexts])
    if not (unit > 0).all():
        return Undetermined(NO_SPREAD)
    seen = n.sum(axis=1) > 0
    worth = np.array([priors[arm].worth if arm in priors else 0.0 for arm in arms])
    if not (seen | (worth > 0)).all() or not seen.any():
        return Undetermined(NO_UNITS)
    weights = n / unit
    fit = layout(weights[seen], y[seen])
    if isinstance(fit, Undetermined):
        return fit
    tau2 = _interaction(weights[seen], y[seen], fit.effects, fit.covariance)
    levels = _levels(weights[seen], y[seen], fit.effects)
    # Effects are about the mix of contexts that the units have.
    levels -= levels @ n.sum(axis=0) / n.sum()
    typical = float(unit @ n.sum(axis=0) / n.sum())
    known = np.array([priors[arm].mean if arm in priors else 0.0 for arm in arms])
    by_context, whole = _shrunk(weights, y - levels, tau2=tau2, known=known, precision=worth / typical)
    return Pooled(dict(zip(contexts, by_context, strict=True)), whole, tau2)


def _unit_variances(contexts: Sequence[Sequence[Sums]]) -> FloatArray:
    """(C,) variance of one unit in each context, all arms alike."""
    if isinstance(contexts[0][0], Conversions):
        rates = np.array([_rate(arms) for arms in contexts])
        return np.asarray(rates * (1.0 - rates))
    spread = np.array([sum(s.spread for s in arms if isinstance(s, Values)) for arms in contexts])
    degrees = np.array([sum(max(s.units - 1.0, 0.0) for s in arms) for arms in contexts], dtype=np.float64)
    common = float(spread.sum() / degrees.sum()) if degrees.sum() > 0 else 0.0
    return np.asarray((spread + VARIANCE_WORTH * common) / (degrees + VARIANCE_WORTH))


def _rate(arms: Sequence[Sums]) -> float:
    units = sum(s.units for s in arms)
    return (sum(s.conversions for s in arms if isinstance(s, Conversions)) + 1.0) / (units + 2.0)


def _levels(weights: FloatArray, y: FloatArray, effects: FloatArray) -> FloatArray:
    """(C,) fitted level of each context; 0 for one without units."""
    every = weights.sum(axis=0)
    return np.asarray((weights * (y - effects[:, np.newaxis])).sum(axis=0) / np.where(every > 0, every, 1.0))


def _interaction(weights: FloatArray, y: FloatArray, effects: FloatArray, covariance: FloatArray) -> float:
    """The variance tau^2 beside chance: Q / quartile = 1 + tau^2 * (W - leverage) / degrees."""
    every = weights.sum(axis=0)
    degrees = np.count_nonzero(weights) - len(weights) - np.count_nonzero(every) + 1
    if degrees < 1:
        return 0.0
    rest = y - effects[:, np.newaxis] - _levels(weights, y, effects)
    share = weights / np.where(every > 0, every, 1.0)
    crossed = covariance @ share
    fitted = np.diag(covariance)[:, np.newaxis] - 2.0 * crossed + (share * crossed).sum(axis=0)
    leverage = share + weights * fitted
    free = float((weights * (1.0 - leverage)).sum())
    excess = float((weights * rest * rest).sum()) / float(special.chdtri(degrees, 1.0 - _QUARTILE)) - 1.0
    return max(0.0, excess * float(degrees) / free) if free > 0 else 0.0


def _shrunk(
    weights: FloatArray, z: FloatArray, *, tau2: float, known: FloatArray, precision: FloatArray
) -> tuple[list[StudentPosterior], StudentPosterior]:
    with np.errstate(divide="ignore"):
        marginal = weights / (1.0 + tau2 * weights)
    total = marginal.sum(axis=1) + precision
    mean = ((marginal * z).sum(axis=1) + precision * known) / total
    # Weight of the common effect: v / (v + tau^2) with v = 1 / weight.
    keep = 1.0 / (1.0 + tau2 * weights)
    centre = keep * mean[:, np.newaxis] + (1.0 - keep) * z
    variance = keep * tau2 + keep * keep / total[:, np.newaxis]
    endless = np.full(len(mean), np.inf)
    columns = zip(centre.T, np.sqrt(variance).T, strict=True)
    return [StudentPosterior(m, s, endless) for m, s in columns], StudentPosterior(
        mean, np.sqrt(1.0 / total), endless
    )
