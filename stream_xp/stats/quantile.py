r"""Confidence sequences for quantiles and for their difference between two arms.

Everything rests on one count: of n values, k lie below x. If x is the p-quantile, k grows like the successes
of a coin with probability p, and a beta mixture tests that. Where several values equal x, or where only the
counts of bins are known, k is known up to a range; the k of that range that refutes least is taken, so bins
and ties round outward and never claim too much.

A `Sample` is therefore a list of cells that cover the line, each with its range of k. A value x is in the
confidence sequence if the log e-value of its cell is below ln(1/alpha). Where even k = n refutes nothing the
upper bound is +inf, where k = 0 refutes nothing the lower bound is -inf.

Two arms: with M_0(x) and M_1(y) the e-values of "x is the control's quantile" and "y is the treatment's",

    e(delta) = inf over x of  (M_0(x) + M_1(x + delta)) / 2     ("average"), or
    e(delta) = inf over x of   M_0(x) * M_1(x + delta)          ("product")

is an e-value of "the quantiles differ by delta": it is at most its value at the true x, which is the average,
or the product, of two nonnegative supermartingales that move in turn. The confidence sequence is its dual,
{delta: e(delta) < 1/alpha}. With "average" it lies inside the box [L_1 - U_0, U_1 - L_0] of two sequences at
alpha/2: if delta is outside the box, then for every x either x is outside the control's sequence or x + delta
outside the treatment's, so one of M_0, M_1 is at least 2/alpha and their average at least 1/alpha. "product"
refutes with about half the sample when both arms have many values (both deviations count), and refutes less
than "average" while one arm has few.

Assumptions: the values of an arm are independent with one distribution, or at least lie below the quantile
with the same probability given the past; arms may interleave in any way that does not look ahead.
Non-asymptotic. p, alpha, the concentrations and the combination are frozen before the first look.

Source: Howard and Ramdas (2022), Sequential estimation of quantiles with applications to A/B testing and
best-arm identification, Bernoulli 28(3), 1704-1728, arXiv:1906.09712: theorem 1 and section 3.1 (beta-binomial
confidence sequence), section 5 (two-sample tests of quantiles).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from stream_xp.stats._boundaries import Sides, beta_binomial_log_e, is_above, tuned_concentration
from stream_xp.stats._checks import FloatArray, finite, level, positive
from stream_xp.stats._counts import whole
from stream_xp.stats.normal_mixture import Undetermined

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

    from stream_xp.stats.log_histogram import LogHistogram

    # The end of the effects of pairs of a treatment cell and a control cell.
    _Ends: TypeAlias = Callable[["IntArray", "IntArray"], "FloatArray"]

Combination: TypeAlias = Literal["average", "product"]
_T = TypeVar("_T", bound=np.generic)
BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.int64]

NO_VALUES = "an arm has no value"
_LOG_2 = math.log(2.0)
_NEAR = np.arange(-2.0, 3.0)
_OVERWHELMING = 12.0  # a log e-value beyond which the search looks at every cell
_BOTH: Sides = "both"
_ABOVE: Sides = "above"
_BELOW: Sides = "below"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What is known of the empirical distribution: cells that cover the line, with ranges of counts.

    Cell i runs from points[i] to points[i + 1]. A value x in it has between below[i] and below[i + 1] values
    of the sample below it (or equal to it). Build it by `from_values`, `from_bins` or `from_histogram`.

    Attributes:
        points: (C + 1,) ascending, from -inf to +inf; equal neighbours enclose a single value.
        left_out: (C + 1,) whether the cell that starts at a point leaves out the point itself.
        below: (..., C + 1) number of values below the cell that starts at a point, ascending from 0 to n;
            leading dimensions are independent samples.

    """

    points: FloatArray
    left_out: BoolArray
    below: FloatArray

    @property
    def n(self) -> FloatArray:
        """Number of values of each sample, (...)."""
        return np.asarray(self.below[..., -1])

    @property
    def keys(self) -> FloatArray:
        """The least float of every cell, (C + 1,), and +inf: x lies in the last cell whose key is <= x."""
        return _keys(self, self.points)

    @classmethod
    def from_values(cls, values: ArrayLike) -> Sample:
        """Return the sample of (n,) finite values in any order.

        Raises:
            ValueError: `values` is not one-dimensional or not finite.

        """
        x = finite("values", values)
        if x.ndim != 1:
            raise ValueError(f"values must be one-dimensional, got the shape {x.shape}")
        distinct, counts = np.unique(x, return_counts=True)
        after = np.cumsum(counts).astype(np.float64)
        # (-inf, u1), {u1}, (u1, u2), {u2}, ..., (um, inf)
        below = np.repeat(np.concatenate([[0.0], after]), 2)
        points = np.concatenate([[-np.inf], np.repeat(distinct, 2), [np.inf]])
        left_out = np.zeros(len(points), dtype=np.bool_)
        left_out[2:-1:2] = True
        return cls(points, left_out, below)

    @classmethod
    def from_bins(cls, edges: ArrayLike, counts: ArrayLike) -> Sample:
        """Return the sample of binned values, or many samples on the same bins.

        Args:
            edges: (B + 1,) finite, strictly ascending.
            counts: (..., B) integers; count i is of the values in [edges[i], edges[i + 1]); no value lies
                elsewhere. Each sample below 2**53.

        Raises:
            ValueError: an argument breaks a rule above.

        """
        e, c = finite("edges", edges), whole("counts", counts)
        if e.ndim != 1 or len(e) < 2 or (np.diff(e) <= 0).any():
            raise ValueError("edges must be one-dimensional and strictly ascending, two or more")
        if c.ndim < 1 or c.shape[-1] != len(e) - 1:
            raise ValueError(f"counts must have {len(e) - 1} bins on their last axis, got {c.shape}")
        # Outside the bins in use there is nothing to tell apart.
        used = np.flatnonzero(c.reshape(-1, c.shape[-1]).any(axis=0))
        first, last = (used[0], used[-1]) if used.size else (0, 0)
        c, e = c[..., first : last + 1], e[first : last + 2]
        below = np.zeros((*c.shape[:-1], len(e) + 2))
        np.cumsum(c, axis=-1, out=below[..., 2:-1])
        below[..., -1] = below[..., -2]
        if (below[..., -1] >= 2**53).any():
            raise ValueError("counts must sum to less than 2**53")
        points = np.concatenate([[-np.inf], e, [np.inf]])
        return cls(points, np.zeros(len(points), dtype=np.bool_), below)

    @classmethod
    def from_histogram(cls, histogram: LogHistogram, scale: float) -> Sample:
        """Return the sample of a histogram; `scale` is one quantisation step in metric units."""
        return cls.from_bins(*histogram.edges_and_counts(scale))


@dataclass(frozen=True, slots=True, eq=False)
class QuantileSequence:
    """Quantiles, or differences of quantiles, at one look: floats, or arrays of the shape (..., Q).

    Attributes:
        estimate: the sample quantile or the difference of both (interpolated inside a bin); 0 where nothing
            is determined.
        lower: lower end of the confidence sequence, -inf where no value refutes.
        upper: upper end, +inf where no value refutes.
        determined: false where an arm has no value; the sequence is then the whole line.

    """

    estimate: FloatArray | float
    lower: FloatArray | float
    upper: FloatArray | float
    determined: BoolArray | bool


def quantile_concentration(n_star: float, alpha: float, *, side: Sides = "both") -> float:
    """Concentration of the beta mixture that is tightest near `n_star` values of an arm, for every quantile.

    Args:
        n_star: planned number of values of the arm, > 0.
        alpha: error level of the arm's sequence, in (0, 1), with one side in (0, 0.5); half of the level of
            a difference with the combination "average".
        side: "both", or the one side that is used.

    Returns:
        The concentration, in values, at least 0.001.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard et al. (2021), Annals of Statistics 49(2), 1055-1080, section 3.5.

    """
    positive("n_star", n_star)
    if side == "both":
        return float(tuned_concentration(n_star, alpha))
    is_above(side)
    if not 0 < alpha < 0.5:
        raise ValueError("alpha must lie strictly between 0 and 0.5 for a one-sided test")
    return float(tuned_concentration(n_star, 2.0 * alpha))


def quantile(
    sample: Sample, q: ArrayLike, *, alpha: float, concentration: float, side: Sides = "both"
) -> QuantileSequence | Undetermined:
    """Confidence sequence for quantiles of one arm; each quantile has its own level alpha.

    Args:
        sample: one sample, or many with leading dimensions (...).
        q: probability of the quantile in (0, 1), a number or (Q,).
        alpha: error level, in (0, 1).
        concentration: of the beta mixture, > 0 (`quantile_concentration`).
        side: "both", "above" (a lower bound only) or "below" (an upper bound only).

    Returns:
        Floats for one sample and one quantile, else arrays (..., Q). Undetermined for one quantile of one
        sample without values.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard and Ramdas (2022), theorem 1 and section 3.1.

    """
    p, threshold = _probabilities(q), -math.log(float(level("alpha", alpha)))
    arm = _Arm(sample, p, _concentration(concentration), side)
    scan = arm.scan(threshold)
    if not (scan.refuted_left(threshold) & scan.refuted_right(threshold)).all():
        scan = arm.scan(threshold, whole=True)
    inside = scan.heights < threshold
    first = scan.start[..., 0] + np.argmax(inside, axis=-1)
    last = scan.start[..., 0] + inside.shape[-1] - np.argmax(inside[..., ::-1], axis=-1)
    lower = np.where(side == "below", -np.inf, sample.points[first])
    upper = np.where(side == "above", np.inf, sample.points[last])
    determined = np.broadcast_to((sample.n > 0)[..., np.newaxis], lower.shape)
    return _report(_estimates(sample, p), (lower, upper), determined, plain=np.ndim(q) == 0)


def quantile_log_e(
    sample: Sample, q: ArrayLike, *, null: float, concentration: float, side: Sides = "both"
) -> FloatArray | float:
    """Log e-value of quantiles of one arm; the dual of `quantile`.

    Args:
        sample: one sample, or many with leading dimensions (...).
        q: probability of the quantile in (0, 1), a number or (Q,).
        null: x in metric units, finite.
        concentration: of the beta mixture, > 0.
        side: "both" against "x is the quantile", "above" against "the quantile is at most x", "below"
            against "the quantile is at least x".

    Returns:
        A float for one sample and one quantile, else an array (..., Q); finite, 0 without values.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard and Ramdas (2022), theorem 1 and section 3.1.

    """
    x = float(finite("null", null))
    cell = np.searchsorted(sample.keys, x, side="right") - 1
    arm = _Arm(sample, _probabilities(q), _concentration(concentration), side)
    low, high = (sample.below[..., np.newaxis, cell + i, np.newaxis] for i in (0, 1))
    return _squeezed(arm.heights(low, high)[0][..., 0], plain=np.ndim(q) == 0)


def quantile_difference(
    control: Sample,
    treatment: Sample,
    q: ArrayLike,
    *,
    alpha: float,
    concentration: ArrayLike,
    combination: Combination = "average",
    relative: bool = False,
    side: Sides = "both",
) -> QuantileSequence | Undetermined:
    """Confidence sequence for the treatment's quantile minus the control's, or their ratio less 1.

    Args:
        control: one sample, or many with leading dimensions (...).
        treatment: the same number of samples; bins need not be the control's.
        q: probability of the quantile in (0, 1), a number or (Q,).
        alpha: error level, in (0, 1).
        concentration: of the beta mixtures, > 0, one for both arms or (control, treatment).
        combination: "average" or "product" (see the module).
        relative: whether the effect is (treatment - control) / control; values must not be negative then.
        side: "both", "above" (a lower bound only) or "below" (an upper bound only).

    Returns:
        Floats for one comparison and one quantile, else arrays (..., Q). Undetermined for one quantile of
        one comparison while an arm has no value. An infinite end means that no effect is refuted there.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard and Ramdas (2022), section 5; the dual sequence is derived in the module.

    """
    p, threshold = _probabilities(q), -math.log(float(level("alpha", alpha)))
    arms = _arms(control, treatment, p, concentration=concentration, side=side)
    ends = (_ratio_ends if relative else _difference_ends)(control, treatment)
    product = _is_product(combination)
    lower, upper, exact = _effects(arms, ends, threshold, product=product, whole=False)
    if not exact:
        lower, upper, _ = _effects(arms, ends, threshold, product=product, whole=True)
    m0, m1 = _estimates(control, p), _estimates(treatment, p)
    determined = np.broadcast_to(((control.n > 0) & (treatment.n > 0))[..., np.newaxis], lower.shape)
    # A ratio to a control quantile of 0 has no estimate; the lower end is then all that can be said.
    ratio = np.where(m0 > 0, m1 / np.where(m0 > 0, m0, 1.0) - 1.0, lower)
    estimate = ratio if relative else m1 - m0
    return _report(np.where(determined, estimate, 0.0), (lower, upper), determined, plain=np.ndim(q) == 0)


def quantile_difference_log_e(
    control: Sample,
    treatment: Sample,
    q: ArrayLike,
    *,
    margin: float = 0.0,
    concentration: ArrayLike,
    combination: Combination = "average",
    relative: bool = False,
    side: Sides = "both",
) -> FloatArray | float:
    """Log e-value against an effect on quantiles; the dual of `quantile_difference`.

    side "above" with margin m > 0 shows harm where larger is worse: H0 is Q_1 <= Q_0 + m, or with `relative`
    Q_1 <= (1 + m) Q_0. It combines the control's evidence that its quantile lies below x with the treatment's
    that its own lies above x + m, and takes the infimum over x.

    Args:
        control: one sample, or many with leading dimensions (...).
        treatment: the same number of samples; bins need not be the control's.
        q: probability of the quantile in (0, 1), a number or (Q,).
        margin: effect under the null, finite; greater than -1 if `relative`.
        concentration: of the beta mixtures, > 0, one for both arms or (control, treatment).
        combination: "average" or "product" (see the module).
        relative: whether the effect is (treatment - control) / control; values must not be negative then.
        side: "both" against "the effect is the margin", "above" against "at most", "below" against "at
            least the margin".

    Returns:
        A float for one comparison and one quantile, else an array (..., Q); finite, 0 while an arm has no
        value.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Howard and Ramdas (2022), section 5.

    """
    p, shift = _probabilities(q), float(finite("margin", margin))
    if relative:
        _require_not_negative(control, treatment)
        if shift <= -1:
            raise ValueError(f"margin must be greater than -1 when relative, got {margin}")
    points = control.points * (1.0 + shift) if relative else control.points + shift
    keys = _keys(control, points), treatment.keys
    arms = _arms(control, treatment, p, concentration=concentration, side=side)
    product = _is_product(combination)
    log_e, exact = _least_evidence(arms, keys, product=product, whole=False)
    if not exact:
        log_e, _ = _least_evidence(arms, keys, product=product, whole=True)
    determined = ((control.n > 0) & (treatment.n > 0))[..., np.newaxis]
    return _squeezed(np.where(determined, log_e, 0.0), plain=np.ndim(q) == 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Scan:
    # Log e-values of a run of cells: heights (..., Q, W) of the cells from start (..., Q, 1) on; all others lie
    # further out. floor (..., Q, 1) is the least over all cells.
    start: IntArray
    heights: FloatArray
    floor: FloatArray
    cells: int
    side: Sides

    @property
    def stop(self) -> IntArray:
        return np.asarray(self.start + self.heights.shape[-1])

    def refuted_left(self, cap: FloatArray | float) -> BoolArray:
        # Whether every cell left of the run has at least `cap`; true by definition where none ever does.
        return np.asarray((self.start == 0) | (self.heights[..., :1] >= cap) | (self.side == "below"))

    def refuted_right(self, cap: FloatArray | float) -> BoolArray:
        return np.asarray(
            (self.stop == self.cells) | (self.heights[..., -1:] >= cap) | (self.side == "above")
        )

    def first(self, cap: FloatArray) -> IntArray:
        # First cell below `cap` of a run that falls from the left.
        return np.asarray(self.start + (self.heights >= cap).sum(axis=-1, keepdims=True))

    def last(self, cap: FloatArray) -> IntArray:
        # Last cell below `cap` of a run that rises to the right.
        return np.asarray(self.stop - 1 - (self.heights >= cap).sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True, eq=False)
class _Arm:
    sample: Sample
    p: FloatArray
    concentration: FloatArray
    side: Sides

    @property
    def n(self) -> FloatArray:
        return self.sample.n[..., np.newaxis, np.newaxis]

    def heights(self, low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        # Least log e-value of any count in low..high (..., Q, W), the least of all counts, and that count. The
        # log e-value is convex in the count (two-sided), or monotone.
        central, prob = self._central(), self.p[:, np.newaxis]
        k = [low, high] if self.side == "both" else [high] if self.side == "above" else [low]
        wide = [np.broadcast_to(a, (*central.shape[:-1], a.shape[-1])) for a in k]
        # Few values below x show that the quantile is above x.
        tail: Sides = {"both": _BOTH, "above": _BELOW, "below": _ABOVE}[self.side]
        log_e = beta_binomial_log_e(
            np.concatenate([central, *wide], axis=-1),
            self.n,
            p=prob,
            concentration=self.concentration,
            side=tail,
        )
        at = np.argmin(log_e[..., : central.shape[-1]], axis=-1)[..., np.newaxis]
        least_k, floor = _taken(central, at), _taken(log_e, at)
        log_e = log_e[..., central.shape[-1] :]
        if self.side != "both":
            return log_e, floor, least_k
        width = wide[0].shape[-1]
        ends = np.minimum(log_e[..., :width], log_e[..., width:])
        return np.where((wide[0] < least_k) & (least_k < wide[1]), floor, ends), floor, least_k

    def _central(self) -> FloatArray:
        # Counts of which one has the least log e-value, (..., Q, 1 or 5). Two-sided it is within 2 of n p, as
        # digamma(x) is close to ln(x - 1/2).
        prob = self.p[:, np.newaxis]
        if self.side == "both":
            return np.asarray(np.clip(np.floor(self.n * prob + 0.5 - prob) + _NEAR, 0.0, self.n))
        extreme = np.ones_like(prob) if is_above(self.side) else np.zeros_like(prob)
        return np.asarray(self.n * extreme)

    def depth(self) -> FloatArray:
        # About how far below 0 the least log e-value is.
        spread = np.log1p(self.n / self.concentration)
        return np.asarray(0.5 * spread + 1.0 if self.side == "both" else spread + 3.0)

    def reach(self, cap: FloatArray | float) -> tuple[IntArray, IntArray]:
        # First cell and one past the last whose log e-value may be below `cap`, (..., Q, 1): a guess by
        # Bernstein's inequality, to be checked.
        goal = self.n * self.p[:, np.newaxis]
        depth = cap + 0.5 * np.log1p(self.n / self.concentration) + 2.0
        radius = np.sqrt(2.0 * goal * (1.0 - self.p[:, np.newaxis]) * depth) + depth + 2.0
        below = self.sample.below[..., np.newaxis, :]
        start = (below <= goal - radius).sum(axis=-1, keepdims=True) - 2
        stop = (below < goal + radius).sum(axis=-1, keepdims=True) + 1
        cells = below.shape[-1] - 1
        return np.clip(start, 0, cells - 1), np.clip(stop, 1, cells)

    def counts(self, cells: IntArray) -> FloatArray:
        # Counts below the cells (..., Q, W).
        return _taken(self.sample.below[..., np.newaxis, :], cells)

    def scan(self, cap: FloatArray | float, *, whole: bool = False) -> _Scan:
        cells = self.sample.below.shape[-1] - 1
        run = _run(*self.reach(cap), cells=cells, whole=whole)
        heights, floor, _ = self.heights(self.counts(run), self.counts(run + 1))
        return _Scan(run[..., :1], heights, floor, cells, self.side)


def _taken(values: NDArray[_T], at: IntArray) -> NDArray[_T]:
    # Elements of the last axis, as np.take_along_axis, which takes ten times as long on short arrays.
    rows = np.arange(math.prod(values.shape[:-1])).reshape(*values.shape[:-1], 1)
    return np.asarray(values.reshape(-1)[rows * values.shape[-1] + at])


def _run(start: IntArray, stop: IntArray, *, cells: int, whole: bool) -> IntArray:
    # Runs of cells of one common width that hold start..stop, (..., Q, W).
    width = cells if whole else int((stop - start).max())
    return np.minimum(start, cells - width) + np.arange(width)


def _arms(
    control: Sample, treatment: Sample, p: FloatArray, *, concentration: ArrayLike, side: Sides
) -> tuple[_Arm, _Arm]:
    if control.n.shape != treatment.n.shape:
        raise ValueError("treatment must have as many samples as control")
    k0, k1 = np.broadcast_to(_concentration(concentration), (2,))
    opposite = side if side == "both" else _BELOW if is_above(side) else _ABOVE
    return _Arm(control, p, np.asarray(k0), opposite), _Arm(treatment, p, np.asarray(k1), side)


def _combined(v0: FloatArray, v1: FloatArray, *, product: bool) -> FloatArray:
    return np.asarray(v0 + v1 if product else np.logaddexp(v0, v1) - _LOG_2)


def _limits(v0: FloatArray, threshold: float, *, product: bool) -> FloatArray:
    # What the treatment's log e-value must stay below for the pair not to be refuted; -inf: nothing can.
    if product:
        return np.asarray(threshold - v0)
    short = np.minimum(v0 - threshold - _LOG_2, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(threshold + _LOG_2 + np.log(-np.expm1(short)))


def _is_product(combination: Combination) -> bool:
    if combination not in ("average", "product"):
        raise ValueError(f"combination must be 'average' or 'product', got {combination!r}")
    return combination == "product"


def _keys(sample: Sample, points: FloatArray) -> FloatArray:
    # The least float of each cell, as a cell is a run of floats.
    return np.where(sample.left_out, np.nextafter(points, np.inf), points)


def _overlaps(keys0: FloatArray, keys1: FloatArray) -> tuple[IntArray, IntArray]:
    # First and last of the treatment's cells that each of the control's cells meets.
    first = np.searchsorted(keys1, keys0[:-1], side="right") - 1
    last = np.searchsorted(keys1, keys0[1:], side="left") - 1
    last_cell = len(keys1) - 2
    first = np.minimum(first, last_cell)
    return first, np.clip(last, first, last_cell)


def _least_evidence(
    arms: tuple[_Arm, _Arm], keys: tuple[FloatArray, FloatArray], *, product: bool, whole: bool
) -> tuple[FloatArray, bool]:
    # The least combined log e-value over the control's cells, each with the treatment's cells that it meets,
    # and whether no cell outside the run that was looked at can have less.
    control, treatment = arms
    first, last = _overlaps(*keys)
    run = _run(*_relevant(arms, keys), cells=len(first), whole=whole)
    counts = (
        (control.counts(run), control.counts(run + 1)),
        (treatment.counts(first[run]), treatment.counts(last[run] + 1)),
    )
    values = [arm.heights(*c) for arm, c in zip(arms, counts, strict=True)]
    least = _combined(values[0][0], values[1][0], product=product).min(axis=-1, keepdims=True)
    left, right = run[..., :1] == 0, run[..., -1:] == len(first) - 1
    for (v, _, least_k), (low, high), other in zip(values, counts, values[::-1], strict=True):
        # Beyond an edge where this arm already rises outwards, its log e-value is at least that of the edge.
        bound = v + other[1] if product else v - _LOG_2
        left |= (high[..., :1] <= least_k) & (bound[..., :1] >= least)
        right |= (low[..., -1:] >= least_k) & (bound[..., -1:] >= least)
    return least[..., 0], bool((left & right).all())


def _relevant(arms: tuple[_Arm, _Arm], keys: tuple[FloatArray, FloatArray]) -> tuple[IntArray, IntArray]:
    # The control's cells where neither arm alone has overwhelming evidence: a guess, to be checked.
    starts, stops = zip(*(arm.reach(_OVERWHELMING) for arm in arms), strict=True)
    cells = len(keys[0]) - 1
    from_other = np.searchsorted(keys[0], keys[1][starts[1]], side="right") - 1
    to_other = np.searchsorted(keys[0], keys[1][stops[1]], side="left")
    side = arms[1].side
    start = (
        from_other if side == "above" else starts[0] if side == "below" else np.maximum(starts[0], from_other)
    )
    stop = stops[0] if side == "above" else to_other if side == "below" else np.minimum(stops[0], to_other)
    start, stop = np.minimum(start, stop - 1), np.maximum(start + 1, stop)
    return np.clip(start, 0, cells - 1), np.clip(stop, 1, cells)


def _effects(
    arms: tuple[_Arm, _Arm], ends: tuple[_Ends, _Ends], threshold: float, *, product: bool, whole: bool
) -> tuple[FloatArray, FloatArray, bool]:
    # The least and the largest effect of any pair of cells that is not refuted, and whether no pair outside
    # the runs that were looked at can lie further out.
    caps = [threshold + (other.depth() if product else _LOG_2) for other in reversed(arms)]
    s0, s1 = (arm.scan(cap, whole=whole) for arm, cap in zip(arms, caps, strict=True))
    limits = _limits(s0.heights, threshold, product=product)
    lower, upper = _hull(s0, s1, limits, ends)
    cap0 = threshold - s1.floor if product else np.asarray(threshold + _LOG_2)
    cap1 = threshold - s0.floor if product else cap0
    exact = s0.refuted_left(cap0) & s0.refuted_right(cap0) & s1.refuted_left(cap1) & s1.refuted_right(cap1)
    if s1.side == "above":
        upper = np.full_like(upper, np.inf)
        exact &= (s0.start == 0) | (ends[0](s1.first(cap1), np.maximum(s0.start - 1, 0)) >= lower)
        exact &= (s1.stop == s1.cells) | (ends[0](np.minimum(s1.stop, s1.cells - 1), s0.last(cap0)) >= lower)
    elif s1.side == "below":
        lower = np.full_like(lower, -np.inf)
        exact &= (s0.stop == s0.cells) | (ends[1](s1.last(cap1), np.minimum(s0.stop, s0.cells - 1)) <= upper)
        exact &= (s1.start == 0) | (ends[1](np.maximum(s1.start - 1, 0), s0.first(cap0)) <= upper)
    return lower[..., 0], upper[..., 0], bool(exact.all())


def _hull(
    s0: _Scan, s1: _Scan, limits: FloatArray, ends: tuple[_Ends, _Ends]
) -> tuple[FloatArray, FloatArray]:
    # The treatment's log e-values fall and then rise along its cells, so each control cell goes with a run of
    # them. Some pair is always free: both least log e-values are at most 0.
    v1, cell = s1.heights, s0.start + np.arange(limits.shape[-1])
    least = np.argmin(v1, axis=-1)[..., np.newaxis]
    free = _taken(v1, least) < limits
    last = s1.start + _run_end(v1, limits, start=least, stop=v1.shape[-1])
    first = s1.start + _run_end(v1, limits, start=least, stop=-1)
    lower = np.where(free, ends[0](first, cell), np.inf).min(axis=-1, keepdims=True)
    upper = np.where(free, ends[1](last, cell), -np.inf).max(axis=-1, keepdims=True)
    return lower, upper


def _run_end(v1: FloatArray, limits: FloatArray, *, start: IntArray, stop: int) -> IntArray:
    # The last cell from `start` towards `stop` whose log e-value is below the limit, by bisection.
    inside = np.broadcast_to(start, limits.shape)
    outside = np.full(limits.shape, stop)
    for _ in range(v1.shape[-1].bit_length()):
        middle = (inside + outside) // 2 if stop > 0 else -(-(inside + outside) // 2)
        below = _taken(v1, np.clip(middle, 0, v1.shape[-1] - 1)) < limits
        open_ = np.abs(outside - inside) > 1
        inside, outside = np.where(open_ & below, middle, inside), np.where(open_ & ~below, middle, outside)
    return np.asarray(inside)


def _difference_ends(control: Sample, treatment: Sample) -> tuple[_Ends, _Ends]:
    x, y = control.points, treatment.points
    return (lambda j, i: y[j] - x[i + 1]), (lambda j, i: y[j + 1] - x[i])


def _ratio_ends(control: Sample, treatment: Sample) -> tuple[_Ends, _Ends]:
    _require_not_negative(control, treatment)
    x, y = np.maximum(control.points, 0.0), np.maximum(treatment.points, 0.0)

    def least(j: IntArray, i: IntArray) -> FloatArray:
        # A control cell that ends at 0 lets every ratio through.
        end = x[i + 1]
        return np.asarray(np.where(end > 0, y[j] / np.where(end > 0, end, 1.0), 0.0) - 1.0)

    def most(j: IntArray, i: IntArray) -> FloatArray:
        start = x[i]
        return np.asarray(np.where(start > 0, y[j + 1] / np.where(start > 0, start, 1.0), np.inf) - 1.0)

    return least, most


def _require_not_negative(control: Sample, treatment: Sample) -> None:
    for name, sample in (("control", control), ("treatment", treatment)):
        if sample.points[1] < 0:
            raise ValueError(f"{name} must not hold negative values when relative")


def _estimates(sample: Sample, p: FloatArray) -> FloatArray:
    # The first cell at whose end the count reaches n p, (..., Q); a bin is interpolated.
    goal = sample.n[..., np.newaxis] * p
    ends = sample.below[..., np.newaxis, 1:]
    cell = np.argmax((ends >= goal[..., np.newaxis]) & (ends > 0), axis=-1)
    low, high = (_taken(sample.below, cell + i) for i in (0, 1))
    # Without values it is the first cell, which no count ever reaches.
    start, end = (np.where(cell > 0, sample.points[cell + i], 0.0) for i in (0, 1))
    share = np.clip((goal - low) / np.maximum(high - low, 1.0), 0.0, 1.0)
    return np.where(cell > 0, start + share * (end - start), 0.0)


def _report(
    estimate: FloatArray, ends: tuple[FloatArray, FloatArray], determined: BoolArray, *, plain: bool
) -> QuantileSequence | Undetermined:
    if plain and determined.shape == (1,):
        if not determined[0]:
            return Undetermined(NO_VALUES)
        return QuantileSequence(float(estimate[0]), float(ends[0][0]), float(ends[1][0]), determined=True)
    numbers = [a[..., 0] if plain else a for a in (estimate, *ends)]
    mask = determined[..., 0] if plain else determined
    lower, upper = np.where(mask, numbers[1], -np.inf), np.where(mask, numbers[2], np.inf)
    return QuantileSequence(np.where(mask, numbers[0], 0.0), lower, upper, np.array(mask))


def _squeezed(values: FloatArray, *, plain: bool) -> FloatArray | float:
    if not plain:
        return values
    return float(values[0]) if values.ndim == 1 else values[..., 0]


def _probabilities(q: ArrayLike) -> FloatArray:
    p = level("q", q)
    if p.ndim > 1:
        raise ValueError(f"q must be a number or one-dimensional, got the shape {p.shape}")
    return np.atleast_1d(p)


def _concentration(value: ArrayLike) -> FloatArray:
    k = positive("concentration", value)
    if k.shape not in ((), (2,)):
        raise ValueError("concentration must be one number, or one for control and one for treatment")
    return k
