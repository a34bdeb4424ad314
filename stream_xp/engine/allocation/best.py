"""How probable each arm is to be the best and the second best of independent posteriors, by quadrature.

With density f_a and distribution function F_a of arm a:

* P(a is best) = integral of f_a times the product of F_b over b != a;
* P(a is second) = integral of f_a times the sum over j != a of (1 - F_j) times the product of F_b over b != a, j.

Rates are integrated over their log odds: there a Beta posterior has no edges, and a rate within 1e-12 of 1 keeps its
digits. Its density is written around the mode with Stirling's error, which cancels nothing at any count. The line is
cut where all but one arm, or every arm, are almost surely on one side, so that no factor underflows. Panels start at
each arm's own scale and are halved until Gauss's 7 points agree with Kronrod's 15.

Errors are below 1e-8, at counts to 1e12 too. Nothing is drawn: equal inputs give equal outputs.

Sources: Piessens, de Doncker-Kapenga, Ueberhuber and Kahaner (1983), QUADPACK (the rule of 7 and 15 points); Loader
(2000), Fast and accurate computation of binomial probabilities (the density).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import special

from stream_xp.domain.experiment import Direction
from stream_xp.engine.allocation.posterior import BetaPosterior, FloatArray, Posterior, StudentPosterior

MAX_ARMS = 64
"""More arms than this take seconds at large counts."""

_CUT = 1e-11
_LOG_CUT = -28.0
_FIRST_STEP = 7.5
_DOUBLINGS = 100
_TOLERANCE = 1e-11
_ENOUGH = 1e-9
_MOST_PANELS = 4096
_HALVINGS = 80
_SMALLEST = 1e-300
_MULTIPLES = np.array([0.0, 1.0, 2.5, 5.0, 12.0, 50.0, 1e3])
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
# x^a is all that a Beta distribution is at odds below e^-600.
_FAR = -600.0

_POSITIVE = (
    0.991455371120812639206854697526329,
    0.949107912342758524526189684047851,
    0.864864423359769072789712788640926,
    0.741531185599394439863864773280788,
    0.586087235467691130294144691693313,
    0.405845151377397166906606412076961,
    0.207784955007898467600689403773245,
)
_KRONROD_HALF = (
    0.022935322010529224963732008058970,
    0.063092092629978553290700663189204,
    0.104790010322250183839876322541518,
    0.140653259715525918745189590510238,
    0.169004726639267902826583426598550,
    0.190350578064785409913256402421014,
    0.204432940075298892414161999234649,
)
_GAUSS_HALF = (
    0.129484966168869693270611432679082,
    0.279705391489276667901467771423780,
    0.381830050505118944950369775488975,
)
_NODES = np.array([*(-x for x in _POSITIVE), 0.0, *reversed(_POSITIVE)])
_KRONROD = np.array([*_KRONROD_HALF, 0.209482141084727828012999174891714, *reversed(_KRONROD_HALF)])
_GAUSS = np.zeros(15)
_GAUSS[1::2] = [*_GAUSS_HALF, 0.417959183673469387755102040816327, *reversed(_GAUSS_HALF)]


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Probabilities of each arm's rank.

    Attributes:
        best: (K,) to be best; sums to 1.
        second: (K,) to be second best; sums to 1, or is 0 for a single arm.
    """

    best: FloatArray
    second: FloatArray


def ranking(posterior: Posterior, direction: Direction = Direction.INCREASE) -> Ranking:
    """How probable each arm is to be best and second best.

    Args:
        posterior: independent posteriors of at most 64 arms.
        direction: whether the best arm has the largest or the smallest mean.

    Raises:
        ValueError: too many arms.
        ArithmeticError: the probabilities do not sum to 1 within 1e-6, as where means lie further apart than a
            float can tell in the scale of the narrowest.
    """
    line = _line(posterior, upward=direction is Direction.INCREASE)
    if len(line.centre) > MAX_ARMS:
        raise ValueError(f"at most {MAX_ARMS} arms are ranked, got {len(line.centre)}")
    if len(line.centre) == 1:
        return Ranking(np.ones(1), np.zeros(1))
    best, second = _integrals(line)
    for found in (best, second):
        if abs(found.sum() - 1.0) > 1e-6:
            raise ArithmeticError(f"probabilities of one rank sum to {found.sum():.9f}")
    return Ranking(best / best.sum(), second / second.sum())


class _Line(Protocol):
    """K distributions on one coordinate of which larger is better."""

    @property
    def centre(self) -> FloatArray: ...
    @property
    def width(self) -> FloatArray: ...
    def bounds(self) -> tuple[FloatArray, FloatArray]: ...
    def log_density(self, y: FloatArray) -> FloatArray: ...
    def below(self, y: FloatArray) -> FloatArray: ...


def _line(posterior: Posterior, *, upward: bool) -> _Line:
    if isinstance(posterior, BetaPosterior):
        a, b = (posterior.a, posterior.b) if upward else (posterior.b, posterior.a)
        return _LogOdds(a, b)
    location = posterior.location if upward else -posterior.location
    # From the best location, so that a small scale there is not lost to rounding.
    return _Means(StudentPosterior(location - location.max(), posterior.scale, posterior.degrees))


def _reach(degrees: FloatArray) -> FloatArray:
    """How many scales from the centre a Student distribution has mass `_CUT` beyond."""
    normal = np.isinf(degrees)
    heavy = special.stdtrit(np.where(normal, 1.0, degrees), _CUT)
    return np.asarray(-np.where(normal, special.ndtri(_CUT), heavy))


class _LogOdds:
    def __init__(self, a: FloatArray, b: FloatArray) -> None:
        self._a, self._b = a[:, np.newaxis], b[:, np.newaxis]
        self.centre: FloatArray = np.log(a) - np.log(b)
        self.width: FloatArray = np.sqrt(1.0 / a + 1.0 / b)

    def bounds(self) -> tuple[FloatArray, FloatArray]:
        return self._out_to(-1.0), self._out_to(1.0)

    def _out_to(self, side: float) -> FloatArray:
        # The density is log-concave here, so what is beyond a point weighs about as little as the density there.
        # Inverses of the incomplete beta function fail at some large counts.
        step = _FIRST_STEP * self.width
        for _ in range(_DOUBLINGS):
            near = self._log_height((self.centre + side * step)[:, np.newaxis])[:, 0] > _LOG_CUT
            if not near.any():
                break
            step = np.where(near, 2.0 * step, step)
        return np.asarray(self.centre + side * step)

    def _log_height(self, y: FloatArray) -> FloatArray:
        """Log of the density over that at the centre."""
        a, b = self._a, self._b
        rise = special.log_expit(y) + np.log1p(b / a)
        fall = special.log_expit(-y) + np.log1p(a / b)
        return np.asarray(a * _log_minus_linear(rise) + b * _log_minus_linear(fall))

    def log_density(self, y: FloatArray) -> FloatArray:
        a, b = self._a, self._b
        norm = 0.5 * (np.log(a) - np.log1p(a / b)) - _HALF_LOG_2PI
        norm += _stirling_error(a + b) - _stirling_error(a) - _stirling_error(b)
        return np.asarray(norm + self._log_height(y))

    def below(self, y: FloatArray) -> FloatArray:
        a, b, at = np.broadcast_arrays(self._a, self._b, y)
        found = np.empty(at.shape)
        low = at < 0
        # From the side where the rate has its digits.
        found[low] = special.betainc(a[low], b[low], special.expit(at[low]))
        found[~low] = special.betaincc(b[~low], a[~low], special.expit(-at[~low]))
        for far, one, other, value in (
            (at < _FAR, a, b, at),
            (at > -_FAR, b, a, -at),
        ):
            if far.any():
                tail = np.exp(one[far] * value[far] - np.log(one[far]) - special.betaln(one[far], other[far]))
                found[far] = tail if value is at else 1.0 - tail
        return found


class _Means:
    def __init__(self, posterior: StudentPosterior) -> None:
        self.centre, self.width = posterior.location, posterior.scale
        self._degrees = posterior.degrees

    def bounds(self) -> tuple[FloatArray, FloatArray]:
        half = self.width * _reach(self._degrees)
        return self.centre - half, self.centre + half

    def log_density(self, y: FloatArray) -> FloatArray:
        z2 = np.square(self._z(y))
        degrees = self._degrees[:, np.newaxis]
        finite = np.where(np.isinf(degrees), 1.0, degrees)
        kernel = np.where(np.isinf(degrees), -0.5 * z2, -0.5 * (finite + 1.0) * np.log1p(z2 / finite))
        return np.asarray(kernel + _log_student_norm(degrees) - np.log(self.width)[:, np.newaxis])

    def below(self, y: FloatArray) -> FloatArray:
        z = self._z(y)
        normal = np.isinf(self._degrees)
        found = np.empty(z.shape)
        found[normal] = special.ndtr(z[normal])
        found[~normal] = special.stdtr(self._degrees[~normal, np.newaxis], z[~normal])
        return found

    def _z(self, y: FloatArray) -> FloatArray:
        with np.errstate(over="ignore"):
            z = (y - self.centre[:, np.newaxis]) / self.width[:, np.newaxis]
        return np.asarray(np.clip(z, -1e100, 1e100))


def _log_minus_linear(u: FloatArray) -> FloatArray:
    """log(r) - (r - 1) for r = exp(u), without cancellation near r = 1."""
    with np.errstate(over="ignore"):
        t = np.expm1(u)
        return np.asarray(np.where(np.abs(t) < 0.5, np.log1p(np.maximum(t, -0.5)), u) - t)


def _stirling_error(z: FloatArray) -> FloatArray:
    """By how much ln Gamma(z) is above Stirling's formula, (z - 1/2) ln z - z + ln(2 pi) / 2."""
    large = np.maximum(z, 10.0)
    q = 1.0 / (large * large)
    series = (1 / 12 - q * (1 / 360 - q * (1 / 1260 - q * (1 / 1680 - q / 1188)))) / large
    small = np.minimum(z, 10.0)
    exact = special.gammaln(small) - ((small - 0.5) * np.log(small) - small + _HALF_LOG_2PI)
    return np.asarray(np.where(z >= 10.0, series, exact))


def _log_student_norm(degrees: FloatArray) -> FloatArray:
    """Log of the density of a standard Student distribution at 0."""
    v = np.minimum(degrees, 1e5)
    exact = special.gammaln((v + 1.0) / 2.0) - special.gammaln(v / 2.0) - 0.5 * np.log(v * math.pi)
    return np.asarray(np.where(degrees > 1e5, -_HALF_LOG_2PI - 0.25 / degrees, exact))


def _integrals(line: _Line) -> tuple[FloatArray, FloatArray]:
    """(probability to be best, to be second) of each arm, not yet normalised."""
    arms = len(line.centre)
    edges = _edges(line)
    low, high = edges[:-1], edges[1:]
    total = np.zeros((2, arms))
    for left in range(_HALVINGS, -1, -1):
        kronrod, gauss = _panels(line, low, high)
        errors = np.abs(kronrod - gauss).max(axis=(0, 1))
        rough = errors > _TOLERANCE
        # Panels that only rounding keeps apart would double for ever; `ranking` checks the sum of all.
        if not left or errors.sum() <= _ENOUGH or np.count_nonzero(rough) > _MOST_PANELS:
            rough[:] = False
        total += kronrod[:, :, ~rough].sum(axis=2)
        if not rough.any():
            break
        middle = 0.5 * (low[rough] + high[rough])
        low, high = np.concatenate((low[rough], middle)), np.concatenate((middle, high[rough]))
    return total[0], total[1]


def _edges(line: _Line) -> FloatArray:
    """First breakpoints: multiples of each arm's width about its centre, where anything may be best or second."""
    lower, upper = line.bounds()
    # Nothing below the second largest lower bound is second; nothing above the largest upper one is best.
    start, end = float(np.partition(lower, -2)[-2]), float(upper.max())
    steps = np.concatenate((-_MULTIPLES[:0:-1], _MULTIPLES))
    points = (line.centre[:, np.newaxis] + line.width[:, np.newaxis] * steps).ravel()
    points = np.sort(np.concatenate((points, lower, upper)))
    points = points[(points > start) & (points < end)]
    nearest = 0.25 * float(line.width.min())
    kept = [start]
    for point in points:
        if point - kept[-1] >= nearest and end - point >= nearest:
            kept.append(float(point))
    return np.array([*kept, end])


def _panels(line: _Line, low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Kronrod's and Gauss's integrals, (2, K, panels) each: to be best, to be second."""
    half = 0.5 * (high - low)
    y = (low + half)[:, np.newaxis] + half[:, np.newaxis] * _NODES
    heights = _heights(line, y.ravel()).reshape(2, len(line.centre), len(low), len(_NODES))
    return np.asarray((heights * _KRONROD).sum(axis=3) * half), np.asarray(
        (heights * _GAUSS).sum(axis=3) * half
    )


def _heights(line: _Line, y: FloatArray) -> FloatArray:
    """Both integrands at y, (2, K, len(y))."""
    # Only one arm may be below _SMALLEST: the others are at or above their lower bounds.
    below = np.clip(line.below(y), _SMALLEST, 1.0)
    log_below = np.log(below)
    others = log_below.sum(axis=0) - log_below + line.log_density(y)
    odds = (1.0 - below) / below
    # The sum over the other arms, from both sides: a subtraction would cancel where one arm is far ahead.
    with np.errstate(divide="ignore", under="ignore"):
        return np.asarray(np.exp(np.stack((others, others + np.log(_exclusive(odds))))))


def _exclusive(odds: FloatArray) -> FloatArray:
    """For each row the sum of all other rows."""
    zero = np.zeros((1, odds.shape[1]))
    before = np.concatenate((zero, np.cumsum(odds[:-1], axis=0)))
    after = np.concatenate((np.cumsum(odds[:0:-1], axis=0)[::-1], zero))
    return before + after
