"""Planning: how many units a sequential comparison takes, and what it can detect.

The test is the normal mixture tuned to `n_star` units, looked at after every `look_every` units from `n_first`
units on. Its z at n units, times sqrt(n), is a Brownian motion with drift, and its critical value a slowly
curving boundary. The probability of having crossed is found without simulation: the density of paths that have
not is carried over a fine geometric grid of n, and inside each step the boundary is taken as straight, for
which the crossing probability of a Brownian motion is known exactly. Looking at whole units rather than at
every instant moves the boundary outward by 0.5826 standard deviations of one look's step.

Numbers are asymptotic like the test: estimates are taken as normal with a known variance. `variance` is always
V = v1 / share1 + v0 / share0, the variance of the estimated effect times the units n of both arms
(`effect_variance`). Against a simulated test, probabilities agree within 0.005 and expected samples within 1 %.

Sources: Siegmund (1985), Sequential Analysis, equation 3.13 (straight boundary) and section 10.2 (0.5826);
Howard, Ramdas, McAuliffe and Sekhon (2021), Annals of Statistics 49(2), 1055-1080 (the boundaries);
Wang and Poetzelberger (1997), Journal of Applied Probability 34(1), 54-65 (straight pieces).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from stream_xp.stats._checks import FloatArray, finite, level, not_negative, positive
from stream_xp.stats.group_sequential import Sides, Spending, drift_for_power, group_sequential, stopping
from stream_xp.stats.mean_difference import MIN_UNITS_PER_ARM
from stream_xp.stats.normal_mixture import (
    Undetermined,
    one_sided_rho2,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
    tuned_rho2,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from stream_xp.stats.mean_difference import MarginKind, Side

N_FIRST = 50
NOT_REACHED = "the sample planned for does not reach this probability of a decision"

_STEP_RATIO = 1.05
_STEPS_LIMIT = 5000
_LARGEST_N = 1e15
# -zeta(1/2) / sqrt(2 pi), the mean overshoot of a normal random walk in its standard deviations.
_OVERSHOOT = 0.5825971579390106
_REACH = 6.0
_PANEL_SDS = 4.0
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclass(frozen=True, slots=True)
class StoppingCurve:
    """Distribution of the sample at which a sequential test decides.

    Attributes:
        n: units at the grid points, increasing; the first is the first look.
        right: probability of having decided in the direction of the effect by each of them.
        wrong: probability of having decided in the other direction; 0 for a one-sided test.

    """

    n: tuple[float, ...]
    right: tuple[float, ...]
    wrong: tuple[float, ...]

    def power(self, n: float) -> float:
        """Return the probability of having decided in the direction of the effect by `n` units.

        Raises:
            ValueError: `n` is beyond the curve.

        """
        return self._at(n, self.right)

    def decided(self, n: float) -> float:
        """Return the probability of having decided either way by `n` units.

        Raises:
            ValueError: `n` is beyond the curve.

        """
        return self._at(n, self._either())

    def quantile(self, probability: float) -> float | Undetermined:
        """Return the units by which the test has decided, either way, with a given probability.

        Args:
            probability: in (0, 1); 0.5 gives the median sample.

        Returns:
            Units of both arms, or Undetermined where the curve ends before.

        Raises:
            ValueError: `probability` is outside (0, 1).

        """
        return self._reached(float(level("probability", probability)), self._either())

    def sample_for_power(self, power: float) -> float | Undetermined:
        """Return the units by which the test has decided in the direction of the effect with probability `power`.

        Raises:
            ValueError: `power` is outside (0, 1).

        """
        return self._reached(float(level("power", power)), self.right)

    def expected(self, n_max: float | None = None) -> float:
        """Return the expected sample of a test that ends at `n_max` units at the latest.

        Args:
            n_max: the last look, on the curve; its end by default.

        Raises:
            ValueError: `n_max` is beyond the curve.

        """
        last = self.n[-1] if n_max is None else n_max
        undecided_last = 1.0 - self.decided(last)
        if last <= self.n[0]:
            return float(last)
        inside = [i for i, n in enumerate(self.n) if n < last]
        n = np.array([*(self.n[i] for i in inside), last])
        either = self._either()
        undecided = np.array([*(1.0 - either[i] for i in inside), undecided_last])
        return float(n[0] + np.trapezoid(undecided, n))

    def _either(self) -> tuple[float, ...]:
        return tuple(r + w for r, w in zip(self.right, self.wrong, strict=True))

    def _at(self, n: float, values: Sequence[float]) -> float:
        if float(positive("n", n)) > self.n[-1] * (1.0 + 1e-12):
            raise ValueError(f"n must be at most the end of the curve, {self.n[-1]}")
        return 0.0 if n < self.n[0] else float(np.interp(math.log(n), np.log(self.n), values))

    def _reached(self, probability: float, values: Sequence[float]) -> float | Undetermined:
        if values[-1] < probability:
            return Undetermined(NOT_REACHED)
        return float(np.exp(np.interp(probability, values, np.log(self.n))))


@dataclass(frozen=True, slots=True)
class Plan:
    """What one comparison takes and gives. Samples are units of both arms.

    Attributes:
        effect: planned for, in metric units: the distance from the edge of the null hypothesis, > 0.
        variance: V, n times the variance of the estimated effect.
        alpha: error level.
        sides: 1 or 2.
        power: aimed at.
        n_star: planned sample, at which the sequential test is tuned.
        power_at_n_star: probability that the sequential test has decided rightly by `n_star`.
        detectable_effect: effect found with probability `power` by `n_star`, same unit as `effect`.
        n_for_power: sample by which the sequential test has decided rightly with probability `power`.
        median_n: median sample of a decision.
        expected_n: expected sample when one stops at `n_star` at the latest.
        expected_n_null: the same when the effect is 0 instead.
        fixed_n: sample of a fixed test with that power, which may be looked at once.
        fixed_power_at_n_star: power of a fixed test at `n_star`.
        group_sequential_n: largest sample of a group sequential test with that power.
        group_sequential_expected_n: its expected sample under the effect.
        curve: distribution of the sample of a decision under the effect.

    """

    effect: float
    variance: float
    alpha: float
    sides: Sides
    power: float
    n_star: int
    power_at_n_star: float
    detectable_effect: float
    n_for_power: float | Undetermined
    median_n: float | Undetermined
    expected_n: float
    expected_n_null: float
    fixed_n: float
    fixed_power_at_n_star: float
    group_sequential_n: float
    group_sequential_expected_n: float
    curve: StoppingCurve


# ---- the comparison ----------------------------------------------------------------------------------


def effect_variance(
    control_variance: ArrayLike, treatment_variance: ArrayLike, *, treatment_share: ArrayLike = 0.5
) -> FloatArray | float:
    """V = v1 / share + v0 / (1 - share): n times the variance of the difference of two means.

    Args:
        control_variance: v0, variance of one unit, >= 0, any shape.
        treatment_variance: v1, broadcast.
        treatment_share: share of the units of both arms that get treatment, in (0, 1), broadcast.

    Returns:
        V in squared metric units, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    """
    share = level("treatment_share", treatment_share)
    v0, v1 = (
        not_negative("control_variance", control_variance),
        not_negative("treatment_variance", treatment_variance),
    )
    return _plain(v1 / share + v0 / (1.0 - share))


def conversion_variance(rate: ArrayLike) -> FloatArray | float:
    """Return the variance of one unit's conversion, rate (1 - rate).

    Raises:
        ValueError: `rate` is outside (0, 1).

    """
    p = level("rate", rate)
    return _plain(p * (1.0 - p))


def absolute_effect(relative: ArrayLike, *, baseline: ArrayLike) -> FloatArray | float:
    """Return the effect in metric units of a lift (0.1 is +10 % of the absolute control mean).

    Raises:
        ValueError: an argument is not finite, or `baseline` is 0.

    """
    return _plain(finite("relative", relative) * _size_of(baseline))


def relative_effect(absolute: ArrayLike, *, baseline: ArrayLike) -> FloatArray | float:
    """Return the lift of an effect in metric units, as a fraction of the absolute control mean.

    Raises:
        ValueError: an argument is not finite, or `baseline` is 0.

    """
    return _plain(finite("absolute", absolute) / _size_of(baseline))


def runtime_days(n: ArrayLike, *, units_per_day: ArrayLike) -> FloatArray | float:
    """Return the days in which `n` units of both arms arrive; add the attribution window and the allowed lateness.

    Raises:
        ValueError: `n` is negative, or `units_per_day` is not above 0.

    """
    return _plain(not_negative("n", n) / positive("units_per_day", units_per_day))


def first_look(treatment_share: float) -> int:
    """Return the units of both arms at which the smaller arm is expected to have 25, the first look of a mean.

    Raises:
        ValueError: `treatment_share` is outside (0, 1).

    """
    share = float(level("treatment_share", treatment_share))
    return math.ceil(MIN_UNITS_PER_ARM / min(share, 1.0 - share) - 1e-9)


# ---- fixed and group sequential tests ----------------------------------------------------------------


def fixed_sample(
    effect: ArrayLike, variance: ArrayLike, *, alpha: ArrayLike, power: ArrayLike, sides: Sides = 2
) -> FloatArray | float:
    """Units of both arms that a z test, looked at once, needs: V ((z_alpha + z_power) / effect)^2.

    Args:
        effect: in metric units, not 0, any shape.
        variance: V, > 0, broadcast.
        alpha: error level, in (0, 1), broadcast.
        power: in (alpha / sides, 1), broadcast; the other direction's error is not counted as power.
        sides: 1 or 2.

    Returns:
        The sample, not rounded, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        The normal approximation; Jennison and Turnbull (2000), Group Sequential Methods, equation 2.3.

    """
    size = np.abs(finite("effect", effect))
    if (size == 0).any():
        raise ValueError("effect must not be 0")
    reach = _reach_of_fixed(alpha, power, sides)
    with np.errstate(over="ignore"):
        n = np.asarray(positive("variance", variance) * (reach / size) ** 2)
    if not np.isfinite(n).all():
        raise ValueError("effect must be large enough that the sample fits a float")
    return _plain(n)


def fixed_power(
    effect: ArrayLike, variance: ArrayLike, *, n: ArrayLike, alpha: ArrayLike, sides: Sides = 2
) -> FloatArray | float:
    """Return the power of a z test at `n` units, in the direction of the effect.

    Args:
        effect: in metric units, any shape.
        variance: V, > 0, broadcast.
        n: units of both arms, > 0, broadcast.
        alpha: error level, in (0, 1), broadcast.
        sides: 1 or 2.

    Raises:
        ValueError: an argument is out of its range.

    """
    _check_sides(sides)
    drift = np.abs(finite("effect", effect)) * np.sqrt(positive("n", n) / positive("variance", variance))
    return _plain(np.asarray(ndtr(drift + ndtri(level("alpha", alpha) / sides))))


def fixed_detectable_effect(
    variance: ArrayLike, *, n: ArrayLike, alpha: ArrayLike, power: ArrayLike, sides: Sides = 2
) -> FloatArray | float:
    """Return the effect that a z test at `n` units finds with probability `power`; arguments as in `fixed_sample`.

    Raises:
        ValueError: an argument is out of its range.

    """
    reach = _reach_of_fixed(alpha, power, sides)
    return _plain(reach * np.sqrt(positive("variance", variance) / positive("n", n)))


def group_sequential_sample(
    effect: float,
    variance: float,
    *,
    alpha: float,
    power: float,
    sides: Sides = 2,
    information: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
    spending: Spending = "obrien_fleming",
    phi: float | None = None,
) -> tuple[float, float]:
    """Largest and expected sample of a group sequential test with a given power.

    Args:
        effect: in metric units, not 0.
        variance: V, > 0.
        alpha: error level, in (0, 1); below 0.5 when one-sided.
        power: in (alpha / sides, 1).
        sides: 1 or 2.
        information: the looks, as in `group_sequential`.
        spending: as in `group_sequential`.
        phi: as in `group_sequential`.

    Returns:
        (units at information 1, expected units under the effect).

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Jennison and Turnbull (2000), section 7.2.

    """
    per_drift = (
        float(positive("variance", variance)) / float(finite("effect", effect)) ** 2 if effect else 0.0
    )
    if per_drift == 0:
        raise ValueError("effect must not be 0")
    design = group_sequential(information, alpha=alpha, sides=sides, spending=spending, phi=phi)
    drift = drift_for_power(design, power=power)
    average = stopping(design.information, design.z, drift=drift, sides=sides).expected_information
    return drift**2 * per_drift, drift**2 * per_drift * average


# ---- the sequential test -----------------------------------------------------------------------------


def stopping_curve(
    effect: float,
    variance: float,
    *,
    alpha: float,
    n_star: float,
    sides: Sides = 2,
    n_first: float = N_FIRST,
    n_last: float | None = None,
    look_every: float = 1.0,
) -> StoppingCurve:
    """Distribution of the sample at which the normal mixture sequence decides.

    Args:
        effect: true distance from the edge of the null hypothesis, in metric units; its sign does not matter
            when two-sided, and when one-sided a negative one lies inside the null hypothesis.
        variance: V, > 0.
        alpha: error level, in (0, 1); below 0.5 when one-sided.
        n_star: units of both arms at which the sequence is tuned, > 0.
        sides: 1 or 2.
        n_first: units of both arms at the first look, > 0; see `first_look`.
        n_last: units at the last look, > n_first; by default far enough that a decision is certain, and at
            least `n_star`. Required for an effect of 0, or below when one-sided.
        look_every: units between looks, > 0 and at most n_first.

    Returns:
        The curve, probabilities within about 0.001 of a Brownian motion looked at that often; within 0.005
        where looks are as rare as half of `n_first`.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        Siegmund (1985), equation 3.13 and section 10.2; Wang and Poetzelberger (1997).

    """
    walk = _walk(effect, variance, alpha=alpha, n_star=n_star, sides=sides, look_every=look_every)
    first = float(positive("n_first", n_first)) / walk.n_star
    if look_every > n_first:
        raise ValueError("look_every must be at most n_first")
    last = _last(walk, first) if n_last is None else float(positive("n_last", n_last)) / walk.n_star
    if last <= first:
        raise ValueError("n_last must be greater than n_first")
    steps = math.ceil(math.log(last / first) / math.log(_STEP_RATIO))
    if steps > _STEPS_LIMIT:
        raise ValueError("n_last must be within a factor of 1e60 of n_first")
    t = first * (last / first) ** (np.arange(steps + 1) / steps)
    upper, lower = _crossings(walk, t)
    n = tuple(float(v) for v in t * walk.n_star)
    return StoppingCurve(n, tuple(np.cumsum(upper).tolist()), tuple(np.cumsum(lower).tolist()))


def sequential_power(
    effect: float,
    variance: float,
    *,
    n: float,
    alpha: float,
    n_star: float,
    sides: Sides = 2,
    n_first: float = N_FIRST,
    look_every: float = 1.0,
) -> float:
    """Return the probability that the sequence decides in the direction of the effect by `n` units.

    Args:
        effect: as in `stopping_curve`.
        variance: V, > 0.
        n: units of both arms, > n_first.
        alpha: as in `stopping_curve`.
        n_star: as in `stopping_curve`.
        sides: 1 or 2.
        n_first: as in `stopping_curve`.
        look_every: as in `stopping_curve`.

    Raises:
        ValueError: an argument is out of its range.

    """
    curve = stopping_curve(
        effect,
        variance,
        alpha=alpha,
        n_star=n_star,
        sides=sides,
        n_first=n_first,
        n_last=float(positive("n", n)),
        look_every=look_every,
    )
    return curve.right[-1]


def sequential_sample(
    effect: float,
    variance: float,
    *,
    alpha: float,
    power: float,
    sides: Sides = 2,
    n_first: float = N_FIRST,
    look_every: float = 1.0,
) -> int:
    """Planned sample n_star at which the sequence tuned to it has decided rightly with probability `power`.

    Args:
        effect: in metric units, not 0; above 0 when one-sided.
        variance: V, > 0.
        alpha: error level, in (0, 1); below 0.5 when one-sided.
        power: in (alpha / sides, 1), at most 1 - 1e-6.
        sides: 1 or 2.
        n_first: units at the first look, > 0.
        look_every: units between looks, > 0 and at most n_first.

    Returns:
        Units of both arms, rounded up; at least the first look.

    Raises:
        ValueError: an argument is out of its range, or the sample is above 1e15.

    """
    fixed = float(fixed_sample(effect, variance, alpha=alpha, power=power, sides=sides))
    _check_power(effect, power, sides)
    start = float(positive("n_first", n_first)) * 1.0001

    def missing(log_n: float) -> float:
        n = math.exp(log_n)
        return -power + sequential_power(
            effect, variance, n=n, alpha=alpha, n_star=n, sides=sides, n_first=n_first, look_every=look_every
        )

    low = math.log(max(start, 0.5 * fixed))
    if missing(low) >= 0:
        low = math.log(start)
        if missing(low) >= 0:
            return math.ceil(n_first)
    high = low + math.log(2.0)
    while missing(high) < 0:
        low, high = high, high + math.log(2.0)
        if high > math.log(_LARGEST_N):
            raise ValueError("effect must be large enough to be found with at most 1e15 units")
    return math.ceil(math.exp(float(brentq(missing, low, high, xtol=1e-6))))


def sequential_detectable_effect(
    variance: float,
    *,
    n: float,
    alpha: float,
    power: float,
    n_star: float | None = None,
    sides: Sides = 2,
    n_first: float = N_FIRST,
    look_every: float = 1.0,
) -> float:
    """Effect that the sequence finds with probability `power` by `n` units.

    Args:
        variance: V, > 0.
        n: units of both arms, > n_first.
        alpha: error level, in (0, 1); below 0.5 when one-sided.
        power: in (alpha / sides, 1), at most 1 - 1e-6.
        n_star: units at which the sequence is tuned; `n` by default.
        sides: 1 or 2.
        n_first: units at the first look, > 0.
        look_every: units between looks, > 0 and at most n_first.

    Returns:
        The effect in metric units, > 0.

    Raises:
        ValueError: an argument is out of its range.

    """
    unit = math.sqrt(float(positive("variance", variance)) / float(positive("n", n)))
    fixed = float(fixed_detectable_effect(1.0, n=1.0, alpha=alpha, power=power, sides=sides))
    _check_power(1.0, power, sides)

    def missing(drift: float) -> float:
        return -power + sequential_power(
            drift * unit,
            variance,
            n=n,
            alpha=alpha,
            n_star=n if n_star is None else n_star,
            sides=sides,
            n_first=n_first,
            look_every=look_every,
        )

    high = 1.5 * fixed
    while missing(high) < 0:
        high *= 1.5
    return unit * float(brentq(missing, 0.0, high, xtol=1e-7))


def plan_difference(
    effect: float,
    variance: float,
    *,
    alpha: float,
    power: float = 0.8,
    n_star: float | None = None,
    sides: Sides = 2,
    n_first: float = N_FIRST,
    look_every: float = 1.0,
) -> Plan:
    """Plan a comparison of two arms.

    Args:
        effect: to be found, in metric units, not 0; for a lift see `absolute_effect`.
        variance: V, > 0, from `effect_variance`.
        alpha: error level, in (0, 1); below 0.5 when one-sided.
        power: aimed at, in (alpha / sides, 1), at most 1 - 1e-6.
        n_star: planned sample, > n_first; by default the one that gives the power (`sequential_sample`).
        sides: 1 or 2.
        n_first: units at the first look, > 0.
        look_every: units between looks, > 0 and at most n_first.

    Returns:
        The plan of the sequential test, with a fixed and a group sequential test beside it.

    Raises:
        ValueError: an argument is out of its range.

    """
    size = abs(float(finite("effect", effect)))
    fixed = float(fixed_sample(size, variance, alpha=alpha, power=power, sides=sides))
    planned = math.floor(n_first) + 1
    if n_star is None:
        least = sequential_sample(
            size, variance, alpha=alpha, power=power, sides=sides, n_first=n_first, look_every=look_every
        )
        planned = max(planned, least)
    elif float(positive("n_star", n_star)) < planned:
        raise ValueError("n_star must be greater than n_first")
    else:
        planned = math.ceil(n_star)
    curve, null = (
        stopping_curve(
            e,
            variance,
            alpha=alpha,
            n_star=planned,
            sides=sides,
            n_first=n_first,
            n_last=last,
            look_every=look_every,
        )
        for e, last in ((size, None), (0.0, planned))
    )
    detectable = sequential_detectable_effect(
        variance, n=planned, alpha=alpha, power=power, sides=sides, n_first=n_first, look_every=look_every
    )
    largest, expected = group_sequential_sample(size, variance, alpha=alpha, power=power, sides=sides)
    return Plan(
        effect=size, variance=float(variance), alpha=float(alpha), sides=sides, power=float(power),
        n_star=planned, power_at_n_star=curve.power(planned), detectable_effect=detectable,
        n_for_power=curve.sample_for_power(power), median_n=curve.quantile(0.5),
        expected_n=curve.expected(planned), expected_n_null=null.expected(), fixed_n=fixed,
        fixed_power_at_n_star=float(fixed_power(size, variance, n=planned, alpha=alpha, sides=sides)),
        group_sequential_n=largest, group_sequential_expected_n=expected, curve=curve,
    )  # fmt: skip


def plan_guardrail(
    *,
    control_mean: float,
    control_variance: float,
    treatment_variance: float,
    margin: float,
    margin_kind: MarginKind,
    side: Side,
    alpha: float,
    power: float = 0.8,
    effect: float = 0.0,
    treatment_share: float = 0.5,
    n_star: float | None = None,
    n_first: float | None = None,
    look_every: float = 1.0,
) -> Plan:
    """Plan a one-sided test against a margin, such as non-inferiority of a guardrail; as in `one_sided_test`.

    Args:
        control_mean: of the metric, in metric units; read for a relative margin.
        control_variance: of one unit, >= 0.
        treatment_variance: of one unit, >= 0.
        margin: effect on the edge of the null hypothesis, signed; a fraction above -1 when relative.
        margin_kind: "absolute" or "relative".
        side: "above" to show effect > margin, "below" to show effect < margin.
        alpha: one-sided error level, in (0, 0.5).
        power: aimed at.
        effect: true effect, in metric units; 0 for a treatment that changes nothing.
        treatment_share: share of the units of both arms that get treatment, in (0, 1).
        n_star: planned sample; by default the one that gives the power.
        n_first: units at the first look, > 0; by default `first_look` of the share.
        look_every: units between looks, > 0 and at most n_first.

    Returns:
        The plan; its `effect` is the distance of the true effect from the margin.

    Raises:
        ValueError: an argument is out of its range, or the true effect does not lie beyond the margin.

    """
    edge, factor = float(finite("margin", margin)), 1.0
    mean = float(finite("control_mean", control_mean))
    if margin_kind not in ("absolute", "relative"):
        raise ValueError(f"margin_kind must be 'absolute' or 'relative', got {margin_kind!r}")
    if side not in ("above", "below"):
        raise ValueError(f"side must be 'above' or 'below', got {side!r}")
    if margin_kind == "relative":
        if not -1 < edge < 1e100:
            raise ValueError(f"margin must be greater than -1 and less than 1e100 when relative, got {edge}")
        edge, factor = edge * abs(mean), 1.0 + math.copysign(edge, edge * mean)
    distance = (float(finite("effect", effect)) - edge) * (1.0 if side == "above" else -1.0)
    if distance <= 0:
        raise ValueError("effect must lie beyond the margin on the side to be shown")
    scaled = factor**2 * float(not_negative("control_variance", control_variance))
    variance = float(effect_variance(scaled, treatment_variance, treatment_share=treatment_share))
    return plan_difference(
        distance,
        variance,
        alpha=alpha,
        power=power,
        n_star=n_star,
        sides=1,
        n_first=first_look(treatment_share) if n_first is None else n_first,
        look_every=look_every,
    )


# ---- Brownian motion and its boundary ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Walk:
    # Time is n / n_star; drift is the expected z at time 1; k the mixture's K there.
    n_star: float
    drift: float
    k: float
    alpha: float
    sides: int
    shift: float

    def edges(self, t: FloatArray) -> FloatArray:
        multiplier = radius_multiplier_two_sided if self.sides == 2 else radius_multiplier_one_sided
        return np.asarray(np.sqrt(t) * multiplier(self.k * t, self.alpha) + self.shift)


def _walk(
    effect: float, variance: float, *, alpha: float, n_star: float, sides: int, look_every: float
) -> _Walk:
    _check_sides(sides)
    planned = float(positive("n_star", n_star))
    rho2 = tuned_rho2(planned, alpha) if sides == 2 else one_sided_rho2(planned, alpha)
    size = float(finite("effect", effect))
    drift = (abs(size) if sides == 2 else size) * math.sqrt(planned / float(positive("variance", variance)))
    shift = _OVERSHOOT * math.sqrt(float(positive("look_every", look_every)) / planned)
    return _Walk(planned, float(finite("effect", drift)), rho2 * planned, alpha, sides, shift)


def _last(walk: _Walk, first: float) -> float:
    # Where the expected z is 6 above the boundary.
    if walk.drift <= 0:
        raise ValueError("n_last must be given where the effect is not in the direction of a decision")
    last = max(1.0, first * _STEP_RATIO)
    while walk.drift * last < float(walk.edges(np.asarray(last))) + 6.0 * math.sqrt(last):
        last *= 1.2
        if last * walk.n_star > 1e3 * _LARGEST_N:
            raise ValueError("n_last must be given where a decision takes more than 1e18 units")
    return last


def _crossings(walk: _Walk, t: FloatArray) -> tuple[FloatArray, FloatArray]:
    # Probabilities of crossing the upper and the lower boundary by t[0], and in each step after.
    edges, upper, lower = walk.edges(t), np.zeros(len(t)), np.zeros(len(t))
    sd = math.sqrt(t[0])
    upper[0] = float(ndtr((walk.drift * t[0] - edges[0]) / sd))
    lower[0] = float(ndtr((-edges[0] - walk.drift * t[0]) / sd)) if walk.sides == 2 else 0.0
    u, weights = _open_nodes(walk, t[0], edges[0], panel=sd * math.sqrt(_STEP_RATIO - 1.0))
    mass = weights * np.exp(-0.5 * ((u - walk.drift * t[0]) / sd) ** 2) / (sd * math.sqrt(2.0 * math.pi))
    for i in range(1, len(t)):
        gap, line = t[i] - t[i - 1], (float(edges[i - 1]), float(edges[i]))
        upper[i] = float(mass @ _hits(line[0] - u, walk.drift - (line[1] - line[0]) / gap, gap))
        if walk.sides == 2:
            lower[i] = float(mass @ _hits(line[0] + u, -walk.drift - (line[1] - line[0]) / gap, gap))
        x, weights = _open_nodes(walk, t[i], line[1], panel=math.sqrt(gap))
        u, mass = x, weights * (_kernel(x, u, gap, line=line, walk=walk) @ mass)
    return upper, lower


def _hits(distance: FloatArray, drift: float, gap: float) -> FloatArray:
    # Chance that a Brownian motion with this drift reaches a level this far above within the gap.
    sd = math.sqrt(gap)
    direct = ndtr((drift * gap - distance) / sd)
    reflected = np.exp(np.minimum(2.0 * drift * distance + log_ndtr((-distance - drift * gap) / sd), 0.0))
    return np.asarray(direct + reflected)


def _kernel(
    x: FloatArray, u: FloatArray, gap: float, *, line: tuple[float, float], walk: _Walk
) -> FloatArray:
    # Density at x from u over the paths that stay off the straight boundaries in between.
    away = x[:, np.newaxis] - u - walk.drift * gap
    density = np.exp(-0.5 * away * away / gap) / math.sqrt(2.0 * math.pi * gap)
    stays = -np.expm1(-2.0 / gap * (line[1] - x)[:, np.newaxis] * (line[0] - u))
    if walk.sides == 2:
        stays = stays * -np.expm1(-2.0 / gap * (line[1] + x)[:, np.newaxis] * (line[0] + u))
    return np.asarray(density * stays)


def _open_nodes(walk: _Walk, t: float, edge: float, *, panel: float) -> tuple[FloatArray, FloatArray]:
    # Gauss-Legendre nodes of the open region, as far as paths reach; none where all have crossed.
    centre, reach = walk.drift * t, _REACH * math.sqrt(t)
    low, high = centre - reach, min(edge, centre + reach)
    low = max(low, -edge) if walk.sides == 2 else low
    if low >= high:
        return np.zeros(1), np.zeros(1)
    cuts = np.linspace(low, high, 1 + max(1, math.ceil((high - low) / (_PANEL_SDS * panel))))
    half = 0.5 * np.diff(cuts)[:, np.newaxis]
    return (cuts[:-1, np.newaxis] + half * (1.0 + _NODES)).ravel(), (half * _NODE_WEIGHTS).ravel()


# ---- arguments ---------------------------------------------------------------------------------------


def _reach_of_fixed(alpha: ArrayLike, power: ArrayLike, sides: int) -> FloatArray:
    _check_sides(sides)
    error, reached = level("alpha", alpha) / sides, level("power", power)
    if (reached <= error).any():
        raise ValueError("power must be greater than alpha / sides")
    return np.asarray(ndtri(reached) - ndtri(error))


def _check_power(effect: float, power: float, sides: int) -> None:
    if power > 1 - 1e-6:
        raise ValueError("power must be at most 1 - 1e-6")
    if sides == 1 and effect < 0:
        raise ValueError("effect must be greater than 0 for a one-sided test")


def _check_sides(sides: int) -> None:
    if sides not in (1, 2):
        raise ValueError(f"sides must be 1 or 2, got {sides!r}")


def _size_of(baseline: ArrayLike) -> FloatArray:
    size = np.abs(finite("baseline", baseline))
    if (size == 0).any():
        raise ValueError("baseline must not be 0")
    return np.asarray(size)


def _plain(value: FloatArray) -> FloatArray | float:
    return float(value) if np.ndim(value) == 0 else np.asarray(value)
