"""Exact tests of rates: one Bernoulli or [0, 1] mean, and the difference of two against a margin.

**One mean** (`bernoulli_log_e`, `bernoulli_bounds`). The beta-binomial mixture of likelihood ratios against
a mean m. It needs no variance and no minimum of units; with S = 0 or S = n it gives the bounds that an
asymptotic method cannot. Valid for every variable in [0, 1], not only for 0 and 1 (then conservative),
because X ln(q/m) + (1 - X) ln((1-q)/(1-m)) has a convex exponential.

* two-sided: H0 is that every unit has mean m, given the past;
* one-sided "above": H0 is that every unit has a mean of *at most* m, given the past; the mixture is then
  over rates above m only. "below" mirrors it. The means may drift on their side.

**Two means** (`bernoulli_pair_log_e`, `bernoulli_pair_bound`). H0 "above": there is a number x such that at
every time, given the past, the mean of a control unit is at least x and that of a treatment unit at most
x + margin. Constant rates with theta_1 - theta_0 <= margin are the plain case; rates that drift are covered
as long as one x separates them at all times. For each x the evidence against the two halves, e_1(x + margin)
and e_0(x), and their product are e-processes (each unit multiplies one of them by a factor of mean at most
1); the e-value is their average in its least favourable x. Hence no arm needs a single event: 10,000 units
without a failure in each arm prove "no worse than 1 % more failures".

Source: Howard, Ramdas, McAuliffe and Sekhon (2021), Annals of Statistics 49(2), 1055-1080, beta-binomial
mixture (propositions 7 and 8) with its tuning; the pair is the intersection of two such tests, minimised over the
nuisance rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from scipy.special import betainc, expit

from stream_xp.stats import _tilt
from stream_xp.stats._checks import FloatArray, finite, level, positive
from stream_xp.stats._counts import COUNT_LIMIT
from stream_xp.stats._dirichlet import log_beta_ratio, log_mixture_ratio
from stream_xp.stats._roots import crossing, end

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

Sides: TypeAlias = Literal["both", "above", "below"]

_LEAST_SHRINKAGE = 1e-3
_LARGEST_SCALE = 1e15
_SMALLEST_MEAN = 1e-100
_SMALL_TAIL = 1e-30
_MANY = 1e8


@dataclass(frozen=True, slots=True)
class BetaPrior:
    """A fixed beta mixture over the rates; frozen before the first look.

    Attributes:
        a: prior successes, 1e-6 to 1e6.
        b: prior failures, 1e-6 to 1e6.

    Raises:
        ValueError: an attribute is out of its range.

    """

    a: float
    b: float

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            if not 1e-6 <= positive(name, getattr(self, name)) <= 1e6:
                raise ValueError(f"{name} must lie between 1e-6 and 1e6")

    def shape(self, m: FloatArray, rest: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return a, b, and the excess a - (a + b) m over the mean m; rest is 1 - m."""
        a, b = np.full(m.shape, float(self.a)), np.full(m.shape, float(self.b))
        return a, b, a * rest - b * m


@dataclass(frozen=True, slots=True)
class TunedPrior:
    """A beta mixture centred on the rate under test and as wide as makes the bounds tightest at `t_opt` units.

    a = r/(1 - m), b = r/m with r = max(rho - m(1 - m), m(1 - m)/1000) and
    rho = m(1 - m) t_opt / (2 ln(1/alpha) + ln(1 + 2 ln(1/alpha))).

    Attributes:
        t_opt: number of units, in (0, 1e12].
        alpha: the error level to tune for, in (0, 1); for a one-sided test of level a pass 2 * a.

    Raises:
        ValueError: an attribute is out of its range.

    """

    t_opt: float
    alpha: float

    def __post_init__(self) -> None:
        if not positive("t_opt", self.t_opt) <= 1e12:
            raise ValueError("t_opt must not be above 1e12")
        level("alpha", self.alpha)

    def shape(self, m: FloatArray, rest: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return a, b, and the excess a - (a + b) m over the mean m, which is 0; rest is 1 - m."""
        log_inverse = -2.0 * math.log(self.alpha)
        scale = max(self.t_opt / (log_inverse + math.log1p(log_inverse)) - 1.0, _LEAST_SHRINKAGE)
        scale = min(scale, _LARGEST_SCALE)
        return scale * m, scale * rest, np.zeros(m.shape)


Prior: TypeAlias = BetaPrior | TunedPrior

# Log odds ratios over which a pair mixes: 1/128 to 8 in doublings, and the limit in which every unit of an
# arm has the same value. All weigh the same. They do not depend on the rate under test, so every mixture is
# monotone and log-convex in that rate, and the least favourable rate is found, not guessed.
_TILTS = np.exp2(np.arange(-7.0, 4.0))[:, np.newaxis]
_GROWS, _SHRINKS = np.expm1(_TILTS), np.expm1(-_TILTS)
_LOG_TILT_WEIGHT = -math.log(len(_TILTS) + 1)
_MINIMISER_TOLERANCE = 1e-11
_BLOCK = 1000
_SMALLEST_RATE = 1e-200
_FARTHEST_LOG_ODDS = 230.0  # a mean of 1e-100


def bernoulli_log_e(
    n: ArrayLike, successes: ArrayLike, *, mean: ArrayLike, prior: Prior, side: Sides = "both"
) -> FloatArray | float:
    """Log e-value of the beta-binomial mixture against a mean.

    Two-sided: ln B(a + S, b + n - S) - ln B(a, b) - S ln m - (n - S) ln(1 - m), rearranged so that no large
    terms cancel. One-sided, the beta prior is cut to the rates beyond m.

    Args:
        n: whole numbers of units, any shape, >= 0 and below 2**53.
        successes: sum of the units' values, each in [0, 1]; 0 to `n`; broadcast.
        mean: the mean m of the null hypothesis, 1e-100 to below 1, broadcast.
        prior: of the rate under the mixture; fixed in advance.
        side: "both" for H0: all means are m; "above" for H0: all are at most m (evidence for a larger one);
            "below" for H0: all are at least m. Means are meant given the past.

    Returns:
        Natural logarithm of the e-value, of the broadcast shape (a float for scalars); finite, 0 for n = 0.
        Exact at every n; conservative for values strictly between 0 and 1.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Howard et al. (2021), propositions 7 (two-sided) and 8 (one-sided), with g = m and h = 1 - m.

    """
    units, s, m = _together("mean", *_units(n, successes), level("mean", mean))
    if (m < _SMALLEST_MEAN).any():
        raise ValueError(f"mean must not be below {_SMALLEST_MEAN}")
    return _plain(_log_e((s, units - s), m, 1.0 - m, prior=prior, side=_side(side)))


def bernoulli_bounds(
    n: ArrayLike, successes: ArrayLike, *, alpha: float, prior: Prior, side: Sides = "both"
) -> tuple[FloatArray | float, FloatArray | float]:
    """Confidence sequence of a mean in [0, 1]: all means that `bernoulli_log_e` does not reject.

    Args:
        n: whole numbers of units, any shape, >= 0 and below 2**53.
        successes: sum of the units' values, each in [0, 1]; 0 to `n`; broadcast.
        alpha: error level, in (0, 1).
        prior: of the rate under the mixture; fixed in advance.
        side: "both"; "above" for a lower bound alone (the upper end is 1); "below" for an upper bound.

    Returns:
        lower and upper end, of the broadcast shape (floats for scalars), in [0, 1]. Nothing learned is the
        whole of [0, 1], as for n = 0. Exact at every n.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Howard et al. (2021), propositions 7 and 8, inverted in the log odds of the mean.

    """
    units, s = _units(n, successes)
    threshold, f = -math.log(float(level("alpha", alpha))), units - s
    lower, upper = np.zeros(s.shape), np.ones(s.shape)
    if _side(side) != "below":
        lower = expit(_bound((s, f), prior, side=side, sign=-1.0, log_threshold=threshold))
    if side != "above":
        upper = expit(_bound((s, f), prior, side=side, sign=1.0, log_threshold=threshold))
    return _plain(lower), _plain(upper)


def bernoulli_pair_log_e(
    units: ArrayLike, successes: ArrayLike, *, margin: ArrayLike, side: Literal["above", "below"]
) -> FloatArray | float:
    """Log e-value of a one-sided test of the difference of two means in [0, 1] against an absolute margin.

    With e_1(y) against "treatment means are at most y" and e_0(x) against "control means are at least x",
    ln of the least (e_1(x + margin) + e_0(x) + e_1(x + margin) e_0(x))/3 over all x. Each of the two is the
    mean of exp(lambda S - n ln(1 - m + m exp(lambda))) over fixed log odds ratios lambda, so the sum is
    log-convex in x and its least value is found by the sign of the derivative.

    Args:
        units: (..., 2) whole numbers, units of (control, treatment), >= 0 and below 2**53.
        successes: (..., 2) sums of the units' values, each in [0, 1]; 0 to `units`.
        margin: difference treatment - control of the null hypothesis, in [-1, 1], broadcast against the
            leading axes.
        side: "above" for H0: the difference is at most `margin` (a number x separates the means at all
            times, see the module); "below" for H0: it is at least `margin`. To show that failures are no
            worse than 1 % more, test "below" with margin 0.01.

    Returns:
        Natural logarithm of the e-value, of the broadcast shape (a float for one pair); finite. Exact at
        every n, with no minimum of units or events. Made for few events: the mixture covers log odds ratios
        of 1/128 and more.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Howard et al. (2021), sub-Bernoulli processes, two of them minimised over the nuisance rate.

    """
    pair = _pair(units, successes, side)
    difference = finite("margin", margin)
    if (np.abs(difference) > 1).any():
        raise ValueError("margin must lie in [-1, 1]")
    return _in_blocks(_pair_log_e, pair, difference if side == "above" else -difference)


def bernoulli_pair_bound(
    units: ArrayLike, successes: ArrayLike, *, alpha: float, side: Literal["above", "below"]
) -> FloatArray | float:
    """Confidence bound of the difference of two means in [0, 1], dual to `bernoulli_pair_log_e`.

    Args:
        units: (..., 2) whole numbers, units of (control, treatment), >= 0 and below 2**53.
        successes: (..., 2) sums of the units' values, each in [0, 1]; 0 to `units`.
        alpha: error level, in (0, 1).
        side: "above" for the lower bound of treatment - control, "below" for the upper bound.

    Returns:
        The bound, of the leading shape (a float for one pair), in [-1, 1]; -1 or 1 while nothing is
        excluded. Every margin beyond it is rejected, none inside. Exact at every n.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See `bernoulli_pair_log_e`; its e-value falls, log-convexly, as the margin grows.

    """
    threshold = -math.log(float(level("alpha", alpha)))

    def bound(pair: tuple[FloatArray, ...], floor: FloatArray) -> FloatArray:
        n0, s0, n1, s1 = pair
        inside = s1 / np.maximum(n1, 1.0) - s0 / np.maximum(n0, 1.0)

        def excess(difference: FloatArray) -> FloatArray:
            return _pair_log_e(pair, difference) - threshold

        return np.where(excess(floor) < 0, floor, crossing(excess, floor, inside, flat=1e-11))

    lowest = _in_blocks(bound, _pair(units, successes, side), np.asarray(-1.0))
    return lowest if side == "above" else -lowest


def _in_blocks(
    f: Callable[[tuple[FloatArray, ...], FloatArray], FloatArray],
    pair: tuple[FloatArray, ...],
    last: FloatArray,
) -> FloatArray | float:
    # f of the flattened, broadcast arguments, a block at a time, so that the grid of tilts stays in cache.
    *wide, last = _together("margin", *pair, last)
    flat, out = [values.ravel() for values in (*wide, last)], np.empty(last.size)
    for block in np.array_split(np.arange(last.size), 1 + last.size // _BLOCK):
        *part, ending = (values[block] for values in flat)
        out[block] = f(tuple(part), ending)
    return _plain(out.reshape(last.shape))


def _units(n: ArrayLike, successes: ArrayLike, *, name: str = "n") -> tuple[FloatArray, FloatArray]:
    units, s = finite(name, n), finite("successes", successes)
    if ((units < 0) | (units >= COUNT_LIMIT) | (units != np.floor(units))).any():
        raise ValueError(f"{name} must be whole numbers, not negative and below 2**53")
    units, s = _together("successes", units, s)
    if ((s < 0) | (s > units)).any():
        raise ValueError(f"successes must lie between 0 and {name}")
    return units, s


def _together(name: str, *values: FloatArray) -> tuple[FloatArray, ...]:
    try:
        return tuple(np.broadcast_arrays(*values))
    except ValueError as error:
        raise ValueError(f"{name} must have a shape that fits the units") from error


def _side(side: Sides) -> Sides:
    if side not in {"both", "above", "below"}:
        raise ValueError(f"side must be 'both', 'above' or 'below', got {side!r}")
    return side


def _log_e(
    counts: tuple[FloatArray, FloatArray], m: FloatArray, rest: FloatArray, *, prior: Prior, side: Sides
) -> FloatArray:
    # counts are successes and failures; rest is 1 - m.
    a, b, excess = prior.shape(m, rest)
    if side == "both":
        stacked = (np.stack(values, axis=-1) for values in (counts, (m, rest), (a, b), (excess, -excess)))
        s, null, shape, off = stacked
        return log_mixture_ratio(s, null, prior=shape, excess=off)
    if side == "below":
        a, b, excess, m, rest, counts = b, a, -excess, rest, m, counts[::-1]
    after = _log_tail(a + counts[0], b + counts[1], m, rest, counts[0] * rest - counts[1] * m + excess)
    return after - _log_tail(a, b, m, rest, excess)


def _log_tail(
    a: FloatArray, b: FloatArray, m: FloatArray, rest: FloatArray, excess: FloatArray
) -> FloatArray:
    # ln of the integral over q > m of (q/m)^a ((1-q)/(1-m))^b dq/(q (1-q)), that is B(a, b) P(q > m)
    # / (m^a (1-m)^b); excess is a - (a + b) m. Where a and b are too large or P too small for the incomplete
    # beta function, the integrand is smooth and is integrated over the log odds ratio of q and m.
    usual = np.minimum(a, b) < _MANY
    tail = np.asarray(betainc(np.where(usual, b, 1.0), np.where(usual, a, 1.0), np.where(usual, rest, 0.0)))
    x, null, off = (np.stack(v, axis=-1) for v in ((a, b), (m, rest), (excess, -excess)))
    total = np.asarray(log_beta_ratio(x, null, off) + np.log(np.maximum(tail, _SMALL_TAIL)))
    far = tail < _SMALL_TAIL
    if far.any():
        hits, misses, shares, rests = (values[far][:, np.newaxis] for values in (a, b, m, rest))
        data = _tilt.Labels(hits, misses, np.log(shares) - np.log(rests), shares, rests)
        total[far] = _tilt.log_half_line(data)
    return total


def _bound(
    counts: tuple[FloatArray, FloatArray], prior: Prior, *, side: Sides, sign: float, log_threshold: float
) -> FloatArray:
    # The log odds at which log e crosses the threshold, going from the observed mean in the direction of
    # sign; infinite where it does not.
    s, f = counts
    n = s + f
    # At an observed mean of 0 or 1, where the null still gives the data a probability of nearly 1.
    far = np.log(4.0 * (n + 1.0) / min(log_threshold, 1.0))
    inner = (s > 0) & (f > 0)
    middle = np.log(np.where(inner, s, 1.0)) - np.log(np.where(inner, f, 1.0))
    start = np.where(inner, middle, np.where(s > 0, far, -far))

    def excess(log_odds: FloatArray) -> FloatArray:
        at = np.clip(log_odds, -_FARTHEST_LOG_ODDS, _FARTHEST_LOG_ODDS)
        return _log_e(counts, expit(at), expit(-at), prior=prior, side=side) - log_threshold

    open_ = excess(np.full(n.shape, sign * _FARTHEST_LOG_ODDS)) < 0
    step = sign * np.sqrt(2.0 * (1.0 + log_threshold) / (0.01 + s * f / np.maximum(n, 1.0)))
    return end(excess, start, step=step, open_=open_ | (n == 0))


def _pair(units: ArrayLike, successes: ArrayLike, side: str) -> tuple[FloatArray, ...]:
    # n and S of the arm that should be lower under H0's mirror, then of the other: (control, treatment) for
    # "above", swapped for "below", whose difference is treatment's shortfall.
    n, s = finite("units", units), finite("successes", successes)
    if n.shape != s.shape or n.shape[-1:] != (2,):
        raise ValueError(
            f"units and successes must both have the shape (..., 2), got {n.shape} and {s.shape}"
        )
    n, s = _units(n, s, name="units")
    if side not in {"above", "below"}:
        raise ValueError(f"side must be 'above' or 'below', got {side!r}")
    first, second = (0, 1) if side == "above" else (1, 0)
    return n[..., first], s[..., first], n[..., second], s[..., second]


def _pair_log_e(pair: tuple[FloatArray, ...], margin: FloatArray) -> FloatArray:
    n0, s0, n1, s1 = pair
    low, high = np.maximum(0.0, -margin), np.minimum(1.0, 1.0 - margin)

    def processes(at: FloatArray) -> tuple[tuple[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]:
        # The nuisance x and 1 - x, on a scale whose ends resolve small and large rates.
        x = low + (high - low) * at * at * (3.0 - 2.0 * at)
        rest = (1.0 - high) + (high - low) * (1.0 - at) ** 2 * (1.0 + 2.0 * at)
        return _upper_process(n1, s1, x + margin, rest - margin), _upper_process(n0, n0 - s0, rest, x)

    def slope(at: FloatArray) -> FloatArray:
        # Of ln(1 + e_1) + ln(1 + e_0), whose exponential is three times the average, plus 1; relative to the
        # sizes of its two terms, which differ by hundreds of orders of magnitude near the ends.
        (log_1, slope_1), (log_0, slope_0) = processes(at)
        down, up = -expit(log_1) * slope_1, -expit(log_0) * slope_0
        return np.asarray((up - down) / (up + down + _SMALLEST_RATE))

    first, last = np.zeros(low.shape), np.ones(low.shape)
    middle = crossing(slope, first, last, tolerance=_MINIMISER_TOLERANCE)
    least = np.where(slope(first) >= 0, first, np.where(slope(last) <= 0, last, middle))
    (log_1, _), (log_0, _) = processes(least)
    return np.logaddexp(np.logaddexp(log_1, log_0), log_1 + log_0) - math.log(3.0)


def _upper_process(
    n: FloatArray, s: FloatArray, m: FloatArray, rest: FloatArray
) -> tuple[FloatArray, FloatArray]:
    # ln of the mean over lambda of exp(lambda S - n ln(1 - m + m e^lambda)), against means of at most m, and
    # its derivative in m; rest is 1 - m. Written for the smaller of the two, u, with lambda negated if that
    # is 1 - m: then 1 - m + m e^lambda is 1 + u (e^lambda - 1), times e^lambda_0 if negated.
    m, rest = np.maximum(m, _SMALLEST_RATE), np.maximum(rest, _SMALLEST_RATE)
    flipped, smaller = m > rest, np.minimum(m, rest)
    growth = np.where(flipped, _SHRINKS, _GROWS)
    mean = 1.0 + smaller * growth
    logs = np.where(flipped, s - n, s) * _TILTS - n * np.log1p(smaller * growth)
    slopes = np.where(flipped, n, -n) * growth / mean
    one = np.where(s == n, -s * np.log(m), -np.inf)
    top = np.maximum(logs.max(axis=0), one)
    parts, part = np.exp(logs - top), np.exp(one - top)
    # Added one by one: numpy's own sum would round a block of one pair differently from a longer one.
    total: FloatArray = sum(parts, part)
    slope: FloatArray = sum(parts * slopes, -part * s / m)
    return top + np.log(total) + _LOG_TILT_WEIGHT, slope / total


def _plain(value: FloatArray) -> FloatArray | float:
    return float(value) if np.ndim(value) == 0 else np.asarray(value)
