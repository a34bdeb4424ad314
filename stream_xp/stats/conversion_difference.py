"""Exact tests of two conversion rates, under any drift of the rates and any logged change of the weights.

Two e-processes, both from counts per weight epoch and arm, so both merge by addition. `rho_e` are the
*logged assignment probabilities* of the epoch, never the observed shares: of the two arms compared, scaled
to sum to 1 (given that a unit is in one of the two, these are its probabilities).

**Label prediction** (`conversion_log_e`, `conversion_difference`). Each unit, once its outcome y is known,
multiplies the e-value by p_a(y) / sum_b rho_b p_b(y), with a its arm and p a Bernoulli probability of a grid
point. Under the sharp null "y does not depend on the arm" the mean of this factor over the arm is 1 for
either y. It stays exact when the weights ramp up, when a bandit sets them, and when the rates drift,
where pooled means err in up to 99.9 % of experiments. One-sided: for a grid point with theta_1 > theta_0
and true conversion probabilities tau_0, tau_1 of the next unit, the mean of the factor is
1 + rho_1 d_1 (tau_1 - tau_0) with d_1 = theta_1/theta_bar - (1 - theta_1)/(1 - theta_bar) > 0. Hence the
points with theta_1 > theta_0 alone are an e-process for the composite null "tau_1 <= tau_0 at every time,
given the past", and those with theta_1 < theta_0 one for "tau_1 >= tau_0 at every time". It tests, it has
no dual interval for the difference: use the stratified asymptotic sequence for bounds.

**Success ratio** (`success_ratio`). Given that a unit converts, it is in arm a with probability
rho_a theta_a / sum_b rho_b theta_b, which depends on the relative risk only. The tilt mixture over the
successes gives exact tests against any relative margin, and a confidence sequence of the log relative risk,
under any time-varying baseline as long as the relative risk is constant (two-sided), or on one side of the
null at every time (one-sided). It needs the units without conversion for nothing.

Sources: Turner, Ly and Gruenwald (2024), Journal of Statistical Planning and Inference 230, 106116,
arXiv:2106.02693, section 2 (the simple e-variable p_a(y)/sum_b rho_b p_b(y) of two data streams, here with
the label random and the block of one unit); Lindon and Malek (2022), NeurIPS 35, arXiv:2011.03567 (labels
of events). The mixture over a fixed grid, the logged weights and the one-sided argument are this project's
own; they are checked by enumeration in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from scipy.special import expit, log_expit

from stream_xp.stats import _tilt
from stream_xp.stats._checks import FloatArray, finite, level, positive
from stream_xp.stats._counts import epochs, spread
from stream_xp.stats.normal_mixture import Undetermined, p_always_valid
from stream_xp.stats.sample_ratio import LogRatio, log_ratio

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

NO_COMMON_EPOCH = "no weight epoch has units in both arms"
NO_SUCCESSES = "no success has been counted"
# Made for harm: against a margin of 20 % at 1 %, a tenfold rate takes a median of 17 failures (25 with 0.5), a
# threefold one 53 (61), a rate of 1.5 951 (870).
RATIO_SD = 1.0
_BLOCK_ELEMENTS = 200_000

Sides: TypeAlias = Literal["both", "above", "below"]


@dataclass(frozen=True, slots=True)
class RateGrid:
    """Pairs of conversion rates over which the label prediction mixes; frozen before the first look.

    The pair (base, effect) stands for log odds base + effect * rho_control of the treatment and
    base - effect * rho_treatment of the control: a log odds ratio of effect. All pairs weigh the same.

    Attributes:
        bases: log odds, at least one.
        effects: sizes of the log odds ratio, > 0, at least one; each is used with both signs.

    Raises:
        ValueError: an attribute breaks a rule above.

    """

    bases: tuple[float, ...]
    effects: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("bases", "effects"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        finite("bases", self.bases)
        positive("effects", self.effects)


# Log odds from -6 to 2 in halves: rates of 0.25 % to 88 %.
DEFAULT_GRID = RateGrid(tuple(-6.0 + 0.5 * i for i in range(17)), (0.05, 0.1, 0.25, 0.5, 1.0))
# Log odds from -12 to 2 in ones, and a larger effect: for rates down to 1e-5. At 0.1 % against 0.12 % it finds
# 55 % of the effects where the default finds 47 %, at 1e-5 against 1.3e-5 33 % instead of 8 %; at 5 % against
# 6 % the two are level, at 30 % against 32 % it finds 41 % where the default finds 47 %.
RARE_GRID = RateGrid(tuple(-12.0 + i for i in range(15)), (0.05, 0.1, 0.25, 0.5, 1.0, 2.0))


@dataclass(frozen=True, slots=True)
class ConversionDifference:
    """Evidence about the conversion rates of two arms at one look.

    Attributes:
        estimate: treatment rate minus control rate, a mean of the epochs' differences weighted by units.
        log_e: natural logarithm of the e-value against equal rates; finite.
        n: units in the epochs that have units in both arms.

    """

    estimate: float
    log_e: float
    n: int

    @property
    def p_always_valid(self) -> float:
        """The always-valid p of this look, min(1, exp(-log_e)), in [0, 1]."""
        return p_always_valid(self.log_e)


def conversion_difference(
    units: ArrayLike,
    successes: ArrayLike,
    *,
    weights: ArrayLike,
    side: Sides = "both",
    grid: RateGrid = DEFAULT_GRID,
) -> ConversionDifference | Undetermined:
    """Compare the conversion rates of two arms by label prediction, with the stratified difference.

    Args:
        units: (E, 2) integers, units whose outcome is known, per weight epoch and (control, treatment).
        successes: (E, 2) integers, units that converted, at most `units`.
        weights: (E, 2) logged assignment probabilities, as in `conversion_log_e`.
        side: as in `conversion_log_e`.
        grid: pairs of rates to mix over; fixed in advance.

    Returns:
        The evidence; Undetermined while no epoch has units in both arms. The test is exact at every n. There
        is no confidence sequence of the difference: the test is of the sharp null only.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See `conversion_log_e`; Miratrix, Sekhon and Yu (2013), Journal of the Royal Statistical Society B
        75(2), 369-396 (post-stratified estimate).

    """
    log_e = conversion_log_e(units, successes, weights=weights, side=side, grid=grid)
    if log_e.ndim:
        raise ValueError(f"units must have the shape (E, 2), got {np.shape(units)}")
    n, s = np.asarray(units, dtype=np.float64), np.asarray(successes, dtype=np.float64)
    both = (n > 0).all(axis=-1)
    if not both.any():
        return Undetermined(NO_COMMON_EPOCH)
    rates, size = s[both] / n[both], n[both].sum(axis=-1)
    estimate = float((size * (rates[:, 1] - rates[:, 0])).sum() / size.sum())
    return ConversionDifference(estimate, float(log_e), int(size.sum()))


def conversion_log_e(
    units: ArrayLike,
    successes: ArrayLike,
    *,
    weights: ArrayLike,
    side: Sides = "both",
    grid: RateGrid = DEFAULT_GRID,
) -> FloatArray:
    """Log e-value of label prediction, for many comparisons at once.

    ln sum_k w_k exp(sum_e sum_a [S_ea ln(theta_kea / theta_bar_ke) + F_ea ln((1 - theta_kea) /
    (1 - theta_bar_ke))]), with S successes, F = units - S, k the points of the grid and theta_bar_ke =
    sum_a rho_ea theta_kea.

    Args:
        units: (..., E, 2) integers, units whose outcome is known, per weight epoch and (control, treatment);
            >= 0 and below 2**53.
        successes: (..., E, 2) integers, units that converted, at most `units`.
        weights: (E, 2) or (..., E, 2) logged assignment probabilities of the two arms, scaled so that rows
            sum to 1 within 1e-9; above 0 wherever there are units. A row of zeros pads a comparison with
            fewer epochs. From more arms, see `pair_weights`.
        side: "both" tests that outcomes do not depend on the arm; "above" tests that the treatment's rate
            is never above the control's (so evidence is for better); "below" that it is never below.
        grid: pairs of rates to mix over; fixed in advance.

    Returns:
        Array of the broadcast shape without the last two axes (0-d for one comparison); finite. Exact at
        every n, under any drift of the rates and any change of the weights that is logged.

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See the module.

    """
    n, rho = epochs(units, weights, name="units")
    s, _ = epochs(successes, weights, name="successes")
    if rho.shape[-1] != 2:
        raise ValueError(f"weights must have two arms, got {rho.shape[-1]}")
    if n.shape != s.shape or (s > n).any():
        raise ValueError("successes must have the shape of units and must not exceed them")
    observed = np.concatenate((s, n - s), axis=-1)
    shape = np.broadcast_shapes(observed.shape[:-1], rho.shape[:-1])
    observed = np.broadcast_to(observed, (*shape, 4)).reshape(-1, shape[-1], 4)
    share = np.broadcast_to(rho[..., 1], shape).reshape(-1, shape[-1])
    return _mixed(observed, share, grid, side).reshape(shape[:-1])


def success_ratio(
    successes: ArrayLike,
    weights: ArrayLike,
    *,
    alpha: float,
    null: float = 0.0,
    sd: float = RATIO_SD,
    side: Sides = "both",
) -> LogRatio | Undetermined:
    """Test and bound the log relative risk ln(theta_treatment / theta_control) by the successes alone.

    The likelihood of delta is prod_e prod_a (rho_ea exp(delta_a) / sum_b rho_eb exp(delta_b))^S_ea. Two-sided
    it is mixed over delta ~ N(0, sd^2) and compared with its value at `null`; one-sided over
    |delta - null| ~ N(0, sd^2) on the far side of the null. Either way the confidence sequence holds exactly
    the nulls that are not rejected.

    Args:
        successes: (..., E, 2) integers, units that converted, per weight epoch and (control, treatment).
        weights: (E, 2) or (..., E, 2) logged assignment probabilities, as in `conversion_log_e`.
        alpha: error level, in (0, 1).
        null: log relative risk of the null hypothesis, in [-100, 100]; ln(1 + margin) for a relative margin.
        sd: standard deviation of the log relative risk under the mixture, 1e-6 to 100; fixed in
            advance.
        side: "both" for H0: the relative risk is exp(null); "above" for H0: it is at most exp(null) at every
            time, with a lower bound; "below" for H0: it is at least exp(null), with an upper bound.

    Returns:
        The evidence, `log_e` against `null`; Undetermined for one look without successes. Exact at every n
        under any time-varying baseline, if the relative risk is constant ("both") or always on the side of
        the null hypothesis (one-sided).

    Raises:
        ValueError: an argument breaks a rule above.

    Source:
        See the module; the one-sided mixture is monotone in `null` because each of its likelihood ratios is.

    """
    data, sign = _labels(successes, weights, side)
    null, sd = sign * _null(null), spread(sd)
    threshold, total = -math.log(float(level("alpha", alpha))), (data.hits + data.misses).sum(axis=-1)
    if side == "both":
        limits = _tilt.bounds(_tilt.mixture(data, sd=sd), log_threshold=threshold)
    else:
        bound = sign * _tilt.one_sided_bound(data, sd=sd, log_threshold=threshold)
        limits = (bound, np.full(total.shape, np.inf)) if sign > 0 else (np.full(total.shape, -np.inf), bound)
    log_e = _ratio_log_e(data, null, sd=sd, one_sided=side != "both")
    return log_ratio(log_e, sign * _tilt.peak(data), limits, total=total, reason=NO_SUCCESSES)


def success_ratio_log_e(
    successes: ArrayLike, weights: ArrayLike, *, null: float = 0.0, sd: float = RATIO_SD, side: Sides = "both"
) -> FloatArray:
    """Log e-value of `success_ratio` without its bounds, which cost much more.

    Args:
        successes: (..., E, 2) integers, as in `success_ratio`.
        weights: (E, 2) or (..., E, 2) logged assignment probabilities, as in `conversion_log_e`.
        null: as in `success_ratio`.
        sd: as in `success_ratio`.
        side: as in `success_ratio`.

    Returns:
        Array of the broadcast shape without the last two axes (0-d for one comparison); finite, 0 without
        successes. Exact at every n under the assumptions of `success_ratio`.

    Raises:
        ValueError: an argument breaks a rule of `success_ratio`.

    Source:
        See `success_ratio`.

    """
    data, sign = _labels(successes, weights, side)
    return _ratio_log_e(data, sign * _null(null), sd=spread(sd), one_sided=side != "both")


def pair_weights(weights: ArrayLike, *, control: int, treatment: int) -> FloatArray:
    """Assignment probabilities of two arms out of several, given that a unit is in one of the two.

    Args:
        weights: (..., K) rows that sum to 1 within 1e-9.
        control: index of the control arm.
        treatment: index of another arm.

    Returns:
        (..., 2), (control, treatment); rows sum to 1, or are 0 where neither arm has a weight.

    Raises:
        ValueError: an argument breaks a rule above.

    """
    rho = finite("weights", weights)
    _, rho = epochs(np.zeros(rho.shape, dtype=np.int64)[..., np.newaxis, :], rho[..., np.newaxis, :])
    arms = rho.shape[-1]
    if control == treatment or not (0 <= control < arms and 0 <= treatment < arms):
        raise ValueError(f"control and treatment must be the indices of two of {arms} arms")
    pair = rho[..., 0, [control, treatment]]
    both = pair.sum(axis=-1, keepdims=True)
    return np.asarray(pair / np.where(both > 0, both, 1.0))


def _side(side: Sides) -> Sides:
    if side not in {"both", "above", "below"}:
        raise ValueError(f"side must be 'both', 'above' or 'below', got {side!r}")
    return side


def _points(grid: RateGrid, side: Sides) -> tuple[FloatArray, FloatArray]:
    signs = {"both": (1.0, -1.0), "above": (1.0,), "below": (-1.0,)}[_side(side)]
    effects = [sign * effect for sign in signs for effect in grid.effects]
    base, effect = np.meshgrid(np.array(grid.bases), np.array(effects), indexing="ij")
    return base.ravel(), effect.ravel()


def _mixed(observed: FloatArray, share: FloatArray, grid: RateGrid, side: Sides) -> FloatArray:
    # observed (B, E, 4), successes then failures of (control, treatment); share (B, E), the weight of the
    # treatment; result (B,). Sorted, so that most blocks see few weights and need few logarithms.
    out, order = np.empty(len(observed)), np.argsort(share[:, 0], kind="stable")
    points = len(_points(grid, side)[0])
    blocks = 1 + share.size * points // _BLOCK_ELEMENTS
    for block in np.array_split(order, blocks):
        weights, index = np.unique(share[block], return_inverse=True)
        factors, rows = _factors(weights, grid, side), index.reshape(len(block), -1)
        # A term at a time, not as a matrix product, which rounds by the number of its rows: what is found of
        # one comparison must not depend on the others.
        if rows.shape[1] > len(block):
            logs = np.stack([_added(observed[at], factors[of]) for at, of in zip(block, rows, strict=True)])
        else:
            logs = np.zeros((len(block), points))
            for epoch in range(rows.shape[1]):
                of_epoch = factors[rows[:, epoch]] if len(weights) > 1 else factors
                for outcome in range(4):
                    logs += observed[block, epoch, outcome, np.newaxis] * of_epoch[:, outcome]
        out[block] = _log_mean_exp(logs)
    return out


def _added(observed: FloatArray, factors: FloatArray) -> FloatArray:
    # Over the epochs of one comparison: observed (E, 4), factors (E, 4, J), result (J,). A sum over another axis than
    # the last is taken row after row, so that it rounds as the loop does.
    terms = observed[..., np.newaxis] * factors
    return np.asarray(np.add.reduce(terms.reshape(-1, terms.shape[-1]), axis=0, initial=0.0))


def _factors(share: FloatArray, grid: RateGrid, side: Sides) -> FloatArray:
    # Weights of an epoch never change, so what follows from them is kept: of many epochs few are new.
    known = _MEMO.setdefault((grid, side), {})
    new = [one for one in share.tolist() if one not in known]
    if len(known) + len(new) > _MEMO_ROWS:
        known.clear()
        new = share.tolist()
    if new:
        known.update(zip(new, _log_factors(np.array(new), _points(grid, side)), strict=True))
    return np.stack([known[one] for one in share.tolist()])


_MEMO: dict[tuple[RateGrid, Sides], dict[float, FloatArray]] = {}
_MEMO_ROWS = 4_000
"""Of about 5 kB each."""


def _log_factors(share: FloatArray, points: tuple[FloatArray, FloatArray]) -> FloatArray:
    # ln of p_a(y) / sum_b rho_b p_b(y): share (R,) of the treatment; result (R, 4, J), y = 1 then y = 0,
    # each for (control, treatment).
    (base, effect), share = points, share[:, np.newaxis]
    control, treatment = base - effect * share, base + effect * (1.0 - share)
    tops = []
    for sign in (1.0, -1.0):
        mean = np.log((1.0 - share) * expit(sign * control) + share * expit(sign * treatment))
        tops += [log_expit(sign * control) - mean, log_expit(sign * treatment) - mean]
    return np.stack(tops, axis=1)


def _log_mean_exp(logs: FloatArray) -> FloatArray:
    top = logs.max(axis=-1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(logs - top).mean(axis=-1)))


def _labels(successes: ArrayLike, weights: ArrayLike, side: Sides) -> tuple[_tilt.Labels, float]:
    # Mirrored, "below" is "above": hits are then the control's, and the log relative risk changes its sign.
    s, rho = epochs(successes, weights, name="successes")
    if rho.shape[-1] != 2:
        raise ValueError(f"weights must have two arms, got {rho.shape[-1]}")
    arm, sign = (0, -1.0) if _side(side) == "below" else (1, 1.0)
    s, rho = np.broadcast_arrays(s, rho)
    return _tilt.labels(s[..., arm], s.sum(axis=-1), rho[..., arm]), sign


def _null(null: float) -> float:
    if not -100 <= null <= 100:
        raise ValueError(f"null must lie in [-100, 100], got {null}")
    return null


def _ratio_log_e(data: _tilt.Labels, null: float, *, sd: float, one_sided: bool) -> FloatArray:
    at = np.full(data.hits.shape[:-1], null)
    if not one_sided:
        return _tilt.mixture(data, sd=sd).log_e(at)
    return _tilt.mixture(data.tilted(at), sd=sd, one_sided=True).log_e(np.zeros(at.shape))
