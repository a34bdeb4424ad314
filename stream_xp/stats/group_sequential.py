r"""Group sequential tests: critical values for a few declared looks, their power and their price.

At look k a share t_k of the planned information (for means: units over planned units) is in, and the test
stops when z_k, the estimate over its standard error, passes a critical value. Under a drift theta, the
expected z at t = 1, the process B(t_k) = z_k * sqrt(t_k) has independent normal increments with mean
theta * (t_k - t_{k-1}) and variance t_k - t_{k-1}. Its density over the paths that have not stopped is
carried from look to look by Gauss-Legendre quadrature; critical values are accurate to about 1e-9.

Guarantee: with known variances the total error is exactly alpha over the looks *in the list given*, and over
no others. These tests are not always valid: the same bounds looked at 500 times err in 10 %
(O'Brien-Fleming type) to 21 % (Pocock) of experiments at a nominal 5 %. With estimated variances the
guarantee is asymptotic; take the first look at 200 units per arm or later. Information is units over
planned units only for metrics that are complete when they are counted.

A look may be anywhere: critical values of earlier looks do not depend on later ones (spending functions
only), so looks off plan are just the list given. When the trial runs over or under the plan, pass the actual
information divided by its last value, and the share of alpha to have spent by then as `spending_time`.

Sources: Armitage, McPherson and Rowe (1969), Journal of the Royal Statistical Society A 132(2), 235-244 (the
recursion); Pocock (1977), Biometrika 64(2), 191-199; O'Brien and Fleming (1979), Biometrics 35(3), 549-556;
Lan and DeMets (1983), Biometrika 70(3), 659-663 (spending); Kim and DeMets (1987), Biometrika 74(1), 149-154
(power family); Lan and DeMets (1989), Biometrics 45(3), 1017-1020 (two clocks); Jennison and Turnbull (2000),
Group Sequential Methods, chapters 2, 7, 9 and 19.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp, ndtr, ndtri, ndtri_exp

from stream_xp.stats._checks import FloatArray, finite, level, positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

Spending: TypeAlias = Literal["obrien_fleming", "pocock", "power", "classic_obrien_fleming", "classic_pocock"]
Sides: TypeAlias = Literal[1, 2]

SMALLEST_STEP = 1e-8
_SPENDING = ("obrien_fleming", "pocock", "power")
_CLASSIC = ("classic_obrien_fleming", "classic_pocock")
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)
# Panels of 3 standard deviations with 16 nodes carry a normal kernel to about 1e-13.
_PANEL_SDS = 3.0
# Beyond these many standard deviations a path has probability below 1e-18, respectively below 1e-306.
_REACH = 9.0
_FAR_REACH = 37.5
_ROWS = 256
_NEWTON_STEPS = 100
# An increment of alpha below this is met by its marginal tail: what earlier looks took away is less still.
_LOG_NEGLIGIBLE = -640.0


@dataclass(frozen=True, slots=True)
class GroupSequential:
    """The critical values of a group sequential test.

    Attributes:
        information: information at the looks, as given; strictly increasing in (0, 1].
        z: critical value of each look; stop when abs(z_k) (two-sided) or z_k (one-sided) is at least it.
            It is also the multiplier of the standard error in a repeated confidence bound.
        alpha_spent: error spent up to and including each look, both sides together.
        alpha: total error level.
        sides: 1 or 2.

    """

    information: tuple[float, ...]
    z: tuple[float, ...]
    alpha_spent: tuple[float, ...]
    alpha: float
    sides: Sides


@dataclass(frozen=True, slots=True)
class Stopping:
    """When and on which side a group sequential test stops under one drift.

    Attributes:
        upper: probability of stopping at each look at the upper critical value.
        lower: the same at the lower one; zeros for a one-sided test.
        expected_information: information at the stop on average; a test that never stops ends at the last look.

    """

    upper: tuple[float, ...]
    lower: tuple[float, ...]
    expected_information: float

    @property
    def power(self) -> float:
        """Probability of stopping at the upper critical value at any look."""
        return math.fsum(self.upper)

    @property
    def error(self) -> float:
        """Probability of stopping at all; under no drift, the error rate."""
        return math.fsum((*self.upper, *self.lower))


def spent_alpha(
    information: ArrayLike,
    *,
    alpha: float,
    sides: Sides = 2,
    spending: Spending = "obrien_fleming",
    phi: float | None = None,
) -> FloatArray | float:
    """Error that a spending function allows up to each point of the information.

    Per side, with a = alpha / sides: "obrien_fleming" 2 - 2 Phi(z_{a/2} / sqrt(t)), "pocock"
    a ln(1 + (e - 1) t), "power" a t^phi.

    Args:
        information: t, any shape, in (0, 1].
        alpha: total error level, in (0, 1); below 0.5 when one-sided.
        sides: 1 or 2.
        spending: one of the three functions above.
        phi: exponent of "power", > 0; only with it.

    Returns:
        Cumulative error of both sides together, of the shape of `information`.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Lan and DeMets (1983), alpha*_1 and alpha*_2; Kim and DeMets (1987).

    """
    t = positive("information", information)
    if (t > 1).any():
        raise ValueError("information must lie in (0, 1]")
    _check_design(alpha, sides, spending=spending, phi=phi)
    if spending not in _SPENDING:
        raise ValueError(f"spending must be one of {_SPENDING} here, got {spending!r}")
    spent = sides * np.exp(_log_spent(t, alpha / sides, spending=spending, phi=phi))
    return spent if t.ndim else float(spent)


def group_sequential(
    information: Sequence[float],
    *,
    alpha: float,
    sides: Sides = 2,
    spending: Spending = "obrien_fleming",
    phi: float | None = None,
    spending_time: Sequence[float] | None = None,
) -> GroupSequential:
    """Critical values for the looks in the list given.

    The spending functions meet `spent_alpha` at each look in turn. The classic designs choose one constant C
    so that the total error over the list is alpha: z_k = C ("classic_pocock") or C sqrt(t_K / t_k)
    ("classic_obrien_fleming"); their list must therefore be complete, and the steps may be unequal.

    Args:
        information: (K,) strictly increasing in (0, 1]; each step at least 1e-8 of its end.
        alpha: total error level, in (0, 1); below 0.5 when one-sided.
        sides: 1 or 2; two-sided tests are symmetric.
        spending: how the error is spread over the looks.
        phi: exponent of "power", > 0; only with it.
        spending_time: (K,) strictly increasing in (0, 1]; where to read the spending function when it is not
            at `information` (over- and under-running); not with the classic designs.

    Returns:
        The design, with the error spent so far at each look.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Armitage, McPherson and Rowe (1969); Jennison and Turnbull (2000), sections 2.4, 2.5, 7.2 and 19.2.

    """
    t = _looks("information", information)
    _check_design(alpha, sides, spending=spending, phi=phi)
    if spending in _CLASSIC:
        if spending_time is not None:
            raise ValueError("spending_time must not be given for a classic design")
        z = _classic_values(t, alpha, sides=sides, power=0.5 if spending == "classic_obrien_fleming" else 0.0)
        spent = np.cumsum(_both_sides(_upper_crossings(t, z, sides=sides), sides))
    else:
        clock = t if spending_time is None else _looks("spending_time", spending_time)
        if len(clock) != len(t):
            raise ValueError(f"spending_time must have {len(t)} looks, got {len(clock)}")
        log_spent = _log_spent(clock, alpha / sides, spending=spending, phi=phi)
        z, spent = _spending_values(t, log_spent, sides=sides), sides * np.exp(log_spent)
    return GroupSequential(_tuple(t), _tuple(z), _tuple(spent), float(alpha), sides)


def stopping(
    information: Sequence[float], z: Sequence[float], *, drift: float = 0.0, sides: Sides = 2
) -> Stopping:
    """Probabilities of stopping at each look under a drift.

    Args:
        information: (K,) strictly increasing in (0, 1]; each step at least 1e-8 of its end.
        z: (K,) critical values; > 0 when two-sided.
        drift: theta, the expected z at information 1: effect over the standard error of its estimate there.
        sides: 1 or 2.

    Returns:
        The probabilities, exact to about 1e-12. With drift 0 their sum is the error spent by these looks.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Armitage, McPherson and Rowe (1969); Jennison and Turnbull (2000), section 19.2.

    """
    t, edges = _looks("information", information), finite("z", z)
    theta = float(finite("drift", drift))
    _check_sides(sides)
    if edges.shape != t.shape:
        raise ValueError(f"z must have {len(t)} looks, got the shape {edges.shape}")
    if sides == 2 and (edges <= 0).any():
        raise ValueError("z must be greater than 0 for a two-sided test")
    upper, lower, paths = np.zeros(len(t)), np.zeros(len(t)), _START
    for k, (now, edge) in enumerate(zip(t, edges * np.sqrt(t), strict=True)):
        upper[k] = paths.beyond(now, edge, drift=theta)
        lower[k] = paths.below(now, -edge, drift=theta) if sides == 2 else 0.0
        low, high = _reach(now, theta, _REACH)
        low = max(low, -edge) if sides == 2 else low
        paths = paths.continued(now, (low, min(high, edge)), panel=_panel(t, k), drift=theta)
    ends = math.fsum((upper + lower) * t) + float(t[-1]) * max(0.0, 1.0 - math.fsum(upper + lower))
    return Stopping(_tuple(upper), _tuple(lower), ends)


def drift_for_power(design: GroupSequential, *, power: float) -> float:
    """The drift at which a design stops at its upper critical values with a given probability.

    Args:
        design: from `group_sequential`.
        power: in (alpha / sides, 1), at most 1 - 1e-9.

    Returns:
        theta > 0, the expected z at information 1.

    Raises:
        ValueError: `power` is out of its range.

    Source:
        Jennison and Turnbull (2000), section 7.2.

    """
    reached = float(level("power", power))
    if not design.alpha / design.sides < reached <= 1 - 1e-9:
        raise ValueError("power must be greater than alpha / sides, and at most 1 - 1e-9")

    def missing(drift: float) -> float:
        return stopping(design.information, design.z, drift=drift, sides=design.sides).power - reached

    last = design.z[-1] + float(ndtri(reached))
    # At this drift the last look alone has the power asked for.
    return float(brentq(missing, 0.0, max(last, 0.0) / math.sqrt(design.information[-1]) + 1e-6, xtol=1e-11))


def sample_inflation(design: GroupSequential, *, power: float) -> float:
    """Largest sample of a design relative to the fixed test of equal level and power.

    Args:
        design: from `group_sequential`.
        power: in (alpha / sides, 1), at most 1 - 1e-9.

    Returns:
        The ratio, >= 1; sample at information 1 over the sample of a fixed test.

    Raises:
        ValueError: `power` is out of its range.

    Source:
        Jennison and Turnbull (2000), tables 2.2 and 2.4 (their constants R_P and R_B).

    """
    theta = drift_for_power(design, power=power)
    fixed = float(ndtri(power) - ndtri(design.alpha / design.sides))
    return (theta / fixed) ** 2


def repeated_bounds(
    estimate: ArrayLike, standard_error: ArrayLike, *, z: ArrayLike, sides: Sides = 2
) -> tuple[FloatArray | float, FloatArray | float]:
    """Repeated confidence bounds: estimate -+ z_k standard errors.

    They cover the truth at all declared looks at once with probability 1 - alpha, and are dual to the test:
    an effect lies outside exactly when the test of that effect stops at this look.

    Args:
        estimate: of the effect, any shape.
        standard_error: of the estimate, > 0, broadcast.
        z: critical value of the look, from `GroupSequential.z`, broadcast.
        sides: 1 gives a lower bound and +inf.

    Returns:
        (lower, upper), floats for scalars.

    Raises:
        ValueError: an argument is not finite, or `standard_error` is not above 0.

    Source:
        Jennison and Turnbull (2000), section 9.1.

    """
    _check_sides(sides)
    centre, half = finite("estimate", estimate), finite("z", z) * positive("standard_error", standard_error)
    lower, upper = np.asarray(centre - half), np.asarray(centre + half)
    upper = upper if sides == 2 else np.full(lower.shape, np.inf)
    return (lower, upper) if lower.ndim else (float(lower), float(upper))


# ---- densities of unstopped paths --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Paths:
    # Paths that have not stopped by time t: nodes of the process, and the probability mass at each.
    t: float
    nodes: FloatArray
    mass: FloatArray

    def beyond(self, t: float, edge: float, *, drift: float = 0.0) -> float:
        gap = t - self.t
        return float(self.mass @ ndtr((self.nodes + drift * gap - edge) / math.sqrt(gap)))

    def below(self, t: float, edge: float, *, drift: float = 0.0) -> float:
        gap = t - self.t
        return float(self.mass @ ndtr((edge - self.nodes - drift * gap) / math.sqrt(gap)))

    def continued(self, t: float, bounds: tuple[float, float], *, panel: float, drift: float = 0.0) -> _Paths:
        if bounds[0] >= bounds[1]:
            return _Paths(t, np.zeros(1), np.zeros(1))
        x, weights = _quadrature(*bounds, panel=panel)
        return _Paths(t, x, weights * _density(self, t, x, drift=drift))


_START = _Paths(0.0, np.zeros(1), np.ones(1))


def _density(paths: _Paths, t: float, x: FloatArray, *, drift: float) -> FloatArray:
    # The convolution with the normal step; each block of rows meets only the nodes that can reach it.
    gap = t - paths.t
    sd = math.sqrt(gap)
    band = sd * (_REACH + _FAR_REACH * math.sqrt(gap / t))
    out = np.empty(len(x))
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS] - drift * gap
        first, last = np.searchsorted(paths.nodes, (rows[0] - band, rows[-1] + band))
        away = (rows[:, np.newaxis] - paths.nodes[first:last]) / sd
        out[start : start + _ROWS] = np.exp(-0.5 * away * away) @ paths.mass[first:last]
    return out / (sd * math.sqrt(2.0 * math.pi))


def _quadrature(low: float, high: float, *, panel: float) -> tuple[FloatArray, FloatArray]:
    edges = np.linspace(low, high, 1 + max(1, math.ceil((high - low) / panel)))
    half = 0.5 * np.diff(edges)[:, np.newaxis]
    nodes = edges[:-1, np.newaxis] + half * (1.0 + _NODES)
    return nodes.ravel(), (half * _NODE_WEIGHTS).ravel()


def _panel(t: FloatArray, k: int) -> float:
    # The density at look k is smooth on the scale of the step before, and meets a kernel of the step after.
    steps = np.diff(t, prepend=0.0)[k : k + 2]
    return _PANEL_SDS * math.sqrt(steps.min())


def _reach(t: float, drift: float, sds: float) -> tuple[float, float]:
    return drift * t - sds * math.sqrt(t), drift * t + sds * math.sqrt(t)


# ---- critical values ---------------------------------------------------------------------------------


def _log_spent(t: FloatArray, per_side: float, *, spending: Spending, phi: float | None) -> FloatArray:
    if spending == "obrien_fleming":
        return np.asarray(math.log(2.0) + log_ndtr(ndtri(per_side / 2.0) / np.sqrt(t)))
    if spending == "pocock":
        return np.asarray(math.log(per_side) + np.log(np.log1p(math.expm1(1.0) * t)))
    return np.asarray(math.log(per_side) + (1.0 if phi is None else phi) * np.log(t))


def _spending_values(t: FloatArray, log_spent: FloatArray, *, sides: Sides) -> FloatArray:
    before = np.concatenate(([-np.inf], log_spent[:-1]))
    if (log_spent <= before).any():
        raise ValueError("spending_time must step far enough to spend error at every look")
    steps = log_spent + np.log1p(-np.exp(before - log_spent))
    z, paths = np.empty(len(t)), _START
    for k, now in enumerate(t):
        z[k] = _critical_value(paths, now, float(steps[k]))
        paths = paths.continued(now, _open_region(now, z[k], sides), panel=_panel(t, k))
    return z


def _critical_value(paths: _Paths, t: float, log_target: float) -> float:
    # The z whose upper crossing has this log probability. The log probability is concave in z and at the
    # start, the marginal quantile, not above the target: Newton descends to the root without overshooting.
    z = -float(ndtri_exp(log_target))
    if log_target < _LOG_NEGLIGIBLE:
        return z
    live = paths.mass > 0
    nodes, log_mass, sd = paths.nodes[live], np.log(paths.mass[live]), math.sqrt(t - paths.t)
    for _ in range(_NEWTON_STEPS):
        away = (nodes - z * math.sqrt(t)) / sd
        log_crossing = float(logsumexp(log_mass + log_ndtr(away)))
        log_slope = float(logsumexp(log_mass - 0.5 * away * away)) - 0.5 * math.log(2.0 * math.pi)
        change = (log_crossing - log_target) * math.exp(log_crossing - log_slope) * sd / math.sqrt(t)
        z += change
        if abs(change) <= 1e-13 * max(1.0, abs(z)):
            break
    return z


def _open_region(t: float, z: float, sides: Sides) -> tuple[float, float]:
    # Upward the far reach, because the next crossing may be a rare event; downward nothing rare matters.
    low = -min(z, _REACH) if sides == 2 else -_REACH
    return low * math.sqrt(t), min(z, _FAR_REACH) * math.sqrt(t)


def _upper_crossings(t: FloatArray, z: FloatArray, *, sides: Sides) -> FloatArray:
    crossings, paths = np.empty(len(t)), _START
    for k, now in enumerate(t):
        crossings[k] = paths.beyond(now, z[k] * math.sqrt(now))
        paths = paths.continued(now, _open_region(now, z[k], sides), panel=_panel(t, k))
    return crossings


def _both_sides(crossings: FloatArray, sides: Sides) -> FloatArray:
    return np.asarray(sides * crossings)


def _classic_values(t: FloatArray, alpha: float, *, sides: Sides, power: float) -> FloatArray:
    shape = (t[-1] / t) ** power

    def excess(constant: float) -> float:
        crossings = _upper_crossings(t, constant * shape, sides=sides)
        return math.log(sides * math.fsum(crossings) / alpha)

    # The last look alone errs with alpha at the first constant, and by Bonferroni all with at most alpha at
    # the second.
    low, high = (-float(ndtri(alpha / sides / looks)) for looks in (1, len(t)))
    constant = low if len(t) == 1 else float(brentq(excess, low - 1e-9, high + 1e-9, xtol=1e-12, rtol=1e-14))
    return np.asarray(constant * shape)


# ---- arguments ---------------------------------------------------------------------------------------


def _looks(name: str, value: Sequence[float]) -> FloatArray:
    t = finite(name, value)
    if t.ndim != 1 or not len(t):
        raise ValueError(f"{name} must be a list of at least one look")
    if (t <= 0).any() or (t > 1).any() or (np.diff(t) <= 0).any():
        raise ValueError(f"{name} must be strictly increasing in (0, 1]")
    if (np.diff(t) < SMALLEST_STEP * t[1:]).any():
        raise ValueError(f"{name} must grow by at least {SMALLEST_STEP} of itself from look to look")
    return t


def _check_sides(sides: int) -> None:
    if sides not in (1, 2):
        raise ValueError(f"sides must be 1 or 2, got {sides!r}")


def _check_design(alpha: float, sides: int, *, spending: str, phi: float | None) -> None:
    _check_sides(sides)
    if float(level("alpha", alpha)) >= 0.5 and sides == 1:
        raise ValueError("alpha must lie strictly between 0 and 0.5 for a one-sided test")
    if spending not in _SPENDING + _CLASSIC:
        raise ValueError(f"spending must be one of {_SPENDING + _CLASSIC}, got {spending!r}")
    if (phi is None) == (spending == "power"):
        raise ValueError("phi must be given for the power family, and only for it")
    if phi is not None:
        positive("phi", phi)


def _tuple(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
