"""Exponential tilts of known shares: likelihood, normal mixture, and the bounds that are dual to it.

Units (or events) fall into an arm, a hit, or not, a miss; a hit has the share rho_e of its epoch. A tilt
delta multiplies the odds of a hit in every epoch by exp(delta). Its log-likelihood ratio against no tilt,

    LL(delta) = sum_e hits_e delta - (hits_e + misses_e) ln(1 - rho_e + rho_e exp(delta)),

is concave. Everything is centred on the expected hits, and the integrals on the mode of their integrand,
so that differences keep their digits when the counts are large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit, log_ndtr

from stream_xp.stats._checks import FloatArray
from stream_xp.stats._roots import beyond, crossing, end

if TYPE_CHECKING:
    from collections.abc import Callable

_NODES, _WEIGHTS = (0.5 * values.reshape(6, 6) for values in np.polynomial.legendre.leggauss(36))
_NODES = _NODES + 0.5
_CUT = 32.0  # an integral ends where its integrand has fallen to exp(-32) of the peak
_SLACK = 4.0  # and no later than where it has fallen to exp(-36)
_STEPS = 200
_SMALLEST_SHARE = 1e-300
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class Labels:
    """Hits and misses per epoch, with the share of hits that the null hypothesis promises.

    Attributes:
        hits: (..., E), >= 0.
        misses: (..., E), >= 0.
        log_odds: (..., E), of a hit.
        shares: (..., E), of hits; above 0.
        rests: (..., E), 1 - shares, kept apart because it may be tiny; above 0.

    """

    hits: FloatArray
    misses: FloatArray
    log_odds: FloatArray
    shares: FloatArray
    rests: FloatArray

    def tilted(self, delta: FloatArray) -> Labels:
        """The same counts against shares whose odds are multiplied by exp(delta); delta (...)."""
        return _labels(self.hits, self.misses, self.log_odds + delta[..., np.newaxis])

    def slope(self) -> FloatArray:
        """First derivative of LL at 0, (...)."""
        return np.asarray(self._excess().sum(axis=-1))

    def curvature(self) -> FloatArray:
        """Minus the second derivative of LL at 0, (...)."""
        return np.asarray(((self.hits + self.misses) * self.shares * self.rests).sum(axis=-1))

    def log_likelihood(self, delta: FloatArray) -> FloatArray:
        """LL at delta (...)."""
        cumulants = _cumulant(delta[..., np.newaxis], self.shares, self.rests)
        return np.asarray(self.slope() * delta - ((self.hits + self.misses) * cumulants).sum(axis=-1))

    def log_likelihoods(self, deltas: FloatArray) -> FloatArray:
        """LL at several deltas (..., J) of each element; result (..., J)."""
        shares, rests, totals = (
            a[..., np.newaxis, :] for a in (self.shares, self.rests, self.hits + self.misses)
        )
        cumulants = _cumulant(deltas[..., np.newaxis], shares, rests)
        return np.asarray(self.slope()[..., np.newaxis] * deltas - (totals * cumulants).sum(axis=-1))

    def _excess(self) -> FloatArray:
        return np.asarray(self.hits * self.rests - self.misses * self.shares)


@dataclass(frozen=True, slots=True)
class Mixture:
    """A normal mixture over tilts, relative to its mode.

    Attributes:
        mode: (...), the tilt with the largest posterior density.
        at_mode: the labels against the shares that the mode has tilted.
        gain: (...), log e-value minus LL(mode); at most 0 (and rounding) when the mixture is two-sided.

    """

    mode: FloatArray
    at_mode: Labels
    gain: FloatArray

    def log_e(self, null: FloatArray) -> FloatArray:
        """Log e-value against the tilt `null` (...); of a one-sided mixture only 0 has a meaning."""
        return np.asarray(self.gain - self.at_mode.log_likelihood(null - self.mode))


def labels(hits: FloatArray, totals: FloatArray, shares: FloatArray) -> Labels:
    """Return the labels; epochs in which a tilt changes nothing (shares of 0 or 1) lose their counts."""
    # One layout of memory for all, because the order in which the epochs are added depends on it.
    hits, totals, shares = (np.ascontiguousarray(a) for a in np.broadcast_arrays(hits, totals, shares))
    open_ = (shares > 0) & (shares < 1)
    if not open_.all():
        hits, totals, shares = hits * open_, totals * open_, np.where(open_, shares, 0.5)
    return Labels(hits, totals - hits, np.log(shares) - np.log1p(-shares), shares, 1.0 - shares)


def _labels(hits: FloatArray, misses: FloatArray, log_odds: FloatArray) -> Labels:
    shares, rests = (np.maximum(expit(odds), _SMALLEST_SHARE) for odds in (log_odds, -log_odds))
    return Labels(hits, misses, log_odds, shares, rests)


def mixture(data: Labels, *, sd: float, one_sided: bool = False) -> Mixture:
    """Mix the likelihood ratios over delta ~ N(0, sd^2); over its absolute value if `one_sided`."""
    precision = 1.0 / sd**2
    mode = _mode(data, precision)
    if one_sided:
        mode = np.maximum(mode, 0.0)
    at_mode = data.tilted(mode)
    area = _log_area(at_mode, mode, precision=precision, floor=-mode if one_sided else None)
    prior = 0.5 * math.log(precision / (2.0 * math.pi)) + (math.log(2.0) if one_sided else 0.0)
    return Mixture(mode, at_mode, area + prior - 0.5 * precision * mode * mode)


def log_half_line(data: Labels) -> FloatArray:
    """Logarithm of the integral of exp(LL(delta)) over delta > 0; hits and misses are above 0."""
    mode = np.maximum(peak(data), 0.0)
    return _log_area(data.tilted(mode), mode, precision=0.0, floor=-mode) + data.log_likelihood(mode)


def bounds(found: Mixture, *, log_threshold: float) -> tuple[FloatArray, FloatArray]:
    """Ends of the set of tilts whose log e-value is below `log_threshold`; infinite where it has none.

    LL is concave, so the set is an interval. It holds the mode, because gain <= 0. It has no lower end
    without hits: the shares tilted to 0 then give the data probability 1, and no mixture gives more.
    """
    data, depth = found.at_mode, log_threshold - found.gain

    def fallen(u: FloatArray) -> FloatArray:
        return np.asarray(-depth - data.log_likelihood(u))

    step = np.sqrt(2.0 * depth / np.maximum(data.curvature(), 1e-2))
    no_hits, no_misses = (counts.sum(axis=-1) == 0 for counts in (data.hits, data.misses))
    lower = end(fallen, np.zeros(depth.shape), step=-step, open_=no_hits)
    upper = end(fallen, np.zeros(depth.shape), step=step, open_=no_misses)
    return found.mode + lower, found.mode + upper


def one_sided_bound(data: Labels, *, sd: float, log_threshold: float) -> FloatArray:
    """The smallest tilt that the mixture over larger tilts does not reject, (...); -inf where it rejects none.

    Each likelihood ratio of null + t against null falls as null grows, so there is one such tilt. As null
    falls the ratio tends to exp(t hits), whose mean over the mixture is 2 exp(x^2/2) Phi(x) with
    x = hits * sd.
    """
    hits, misses = data.hits.sum(axis=-1), data.misses.sum(axis=-1)
    limit = math.log(2.0) + 0.5 * (hits * sd) ** 2 + log_ndtr(hits * sd)
    # Without misses the likelihood has no peak; there e < 1/alpha where every share is close enough to 1.
    ceiling = np.log(4.0 * (hits + 1.0) / min(log_threshold, 1.0)) - data.log_odds.min(axis=-1)
    best = peak(data)
    start = np.where(misses == 0, ceiling, np.where(hits == 0, 0.0, best))

    def excess(null: FloatArray) -> FloatArray:
        at_null = data.tilted(null)
        return mixture(at_null, sd=sd, one_sided=True).log_e(np.zeros(null.shape)) - log_threshold

    step = -1.0 / np.sqrt(np.maximum(data.tilted(start).curvature(), 1e-2))
    return start + end(
        lambda u: excess(start + u), np.zeros(start.shape), step=step, open_=limit <= log_threshold
    )


def peak(data: Labels) -> FloatArray:
    """The tilt of the largest likelihood, (...): -inf without hits, +inf without misses, 0 without labels."""
    hits, misses = data.hits.sum(axis=-1), data.misses.sum(axis=-1)
    closed = (hits == 0) | (misses == 0)
    pooled = np.log(np.where(closed, 1.0, hits)) - np.log(np.where(closed, 1.0, misses))
    live = data.hits + data.misses > 0
    low = np.where(closed, 0.0, pooled - np.where(live, data.log_odds, -np.inf).max(axis=-1))
    high = np.where(closed, 0.0, pooled - np.where(live, data.log_odds, np.inf).min(axis=-1))
    root = crossing(lambda delta: -data.tilted(delta).slope(), low, high)
    return np.where(closed, np.where(hits > 0, np.inf, np.where(misses > 0, -np.inf, 0.0)), root)


def _mode(data: Labels, precision: float) -> FloatArray:
    # The highest posterior density, to a thousandth of its width, which is all that centring needs: Newton
    # inside a bracket, bisection where a step would leave it or shrinks slower than by half.
    edge = data.slope() / precision  # the curvature is at least the prior's
    low, high, mode = np.minimum(edge, 0.0), np.maximum(edge, 0.0), np.zeros(edge.shape)
    moved = np.full(edge.shape, np.inf)
    close = np.zeros(edge.shape, dtype=np.bool_)
    for _ in range(_STEPS):
        here = data.tilted(mode)
        slope = here.slope() - precision * mode
        low, high = np.where(slope > 0, mode, low), np.where(slope < 0, mode, high)
        curvature = here.curvature() + precision
        newton = mode + slope / curvature
        good = (newton >= low) & (newton <= high) & (np.abs(newton - mode) <= 0.5 * moved)
        after = np.where(good, newton, 0.5 * (low + high))
        # An element that is close stays, whatever the others need: nothing of it may depend on them.
        moved, mode = np.abs(after - mode), np.where(close, mode, after)
        close |= moved * moved * curvature <= 1e-6
        if close.all():
            break
    return mode


def _log_area(at_mode: Labels, mode: FloatArray, *, precision: float, floor: FloatArray | None) -> FloatArray:
    # ln of the integral of exp(height) over u > floor, u counted from the mode.
    def height(u: FloatArray) -> FloatArray:
        return np.asarray(at_mode.log_likelihood(u) - precision * u * (mode + 0.5 * u))

    def slope(u: FloatArray) -> FloatArray:
        return np.asarray(at_mode.tilted(u).slope() - precision * (mode + u))

    # First guesses of the edges: from the curvature, or from the slope where the floor cuts off the peak.
    curved, tilted = (
        np.sqrt((at_mode.curvature() + precision) / (2.0 * _CUT)),
        slope(np.zeros(mode.shape)) / _CUT,
    )
    right = _edge(height, slope, 1.0 / np.maximum(curved, -tilted))
    left = _edge(height, slope, -1.0 / np.maximum(curved, tilted), known=floor)
    span, area = right - left, np.zeros(mode.shape)
    for nodes, weights in zip(_NODES, _WEIGHTS, strict=True):
        u = left[..., np.newaxis] + span[..., np.newaxis] * nodes
        heights = at_mode.log_likelihoods(u) - precision * u * (mode[..., np.newaxis] + 0.5 * u)
        # No height is above the mode's, which is 0. Summed row by row, in groups of a fixed size: a matrix product
        # rounds by the number of its rows, and what is found of one experiment must not depend on the others.
        area = area + (np.exp(heights) * weights).sum(axis=-1)
    return np.asarray(np.log(area * span))


def _edge(
    height: Callable[[FloatArray], FloatArray],
    slope: Callable[[FloatArray], FloatArray],
    step: FloatArray,
    known: FloatArray | None = None,
) -> FloatArray:
    # A point where the concave height has fallen by _CUT, but not by much more: Newton from outside never
    # passes the root. It is not sought below a floor that is known.
    floor = np.full(step.shape, -np.inf) if known is None else known
    u = beyond(lambda at: np.where(at <= floor, 0.0, -_CUT - height(at)), np.zeros(step.shape), step=step)
    u = np.maximum(u, floor)
    for _ in range(_STEPS):
        fallen = height(u) + _CUT
        near = (fallen > -_SLACK) | (u == floor)
        if near.all():
            break
        u = np.where(near, u, u - fallen / np.where(near, 1.0, slope(u)))
    return u


def _cumulant(delta: FloatArray, shares: FloatArray, rests: FloatArray) -> FloatArray:
    # ln(1 - rho + rho e^delta) - rho delta, written for the smaller of the two shares so that nothing
    # cancels: the argument of log1p is at least -1/2.
    smaller, d = np.minimum(shares, rests), np.where(shares <= rests, 1.0, -1.0) * delta
    if d.max(initial=0.0) <= _LARGEST_EXPONENT:
        return np.asarray(np.log1p(smaller * np.expm1(d)) - smaller * d)
    capped = np.minimum(d, _LARGEST_EXPONENT)
    return np.asarray(np.log1p(smaller * np.expm1(capped)) - smaller * d + (d - capped))
