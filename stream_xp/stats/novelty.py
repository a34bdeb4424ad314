r"""Does an effect last? Effects by days since first exposure, and a test that the late effect left the early one.

A new thing draws attention because it is new (novelty), or is disliked until people know it (change aversion, primacy,
habituation). Both show as an effect that depends on the age of the unit, the days since its first exposure, and not on
the calendar. So units are compared at equal age, each arm with its concurrent control.

**One value per unit.** A unit is in the early window of its age and later in the late one, so the two effects are
dependent, and a test that takes them for two samples errs. Here a unit has one value, its late rate per day minus its
own early one, known when its late window is over; the change of the effect is the difference of that value's means
between the arms. What units have in common over time cancels, and units are independent, each enters once, in the
order of exposure: the sequence is that of a plain mean and may be looked at every day as units age.

**The sums**, exact integers in quantisation steps, per arm and weight epoch of first exposure:

* for the test, over units whose late window is over: n, sum x, sum y, sum x^2, sum x*y, sum y^2, with x and y the
  unit's totals in the early and in the late window (`CrossMoments`). Sums per window alone do not suffice, because they
  hold nothing of the dependence;
* for the curve, per age bucket, over units whose bucket is over: n, sum, sum of squares of the unit's total in it.

Both windows count everyone who was exposed, with 0 where a unit does not come back: what is dropped with those who
leave cannot be compared. The windows are registered before the first look, or the level is divided by their number.

The effect of an experiment that changes is a moving target: read its latest interval, and never intersect intervals
over time. Of early and late effect neither is wrong; a ship decision is about the late one.

Assumptions: those of `mean_difference`, for the units' changes. What should last is the difference per day: where the
metric itself falls with age in both arms, a constant relative effect falls with it. A change of the effect with the
calendar (a sale at which the treatment does better) is seen as well: early and late windows of one unit are at
different dates.

Sources: Hohnhold, O'Brien and Tang (2015), KDD, 1849-1858 (cohorts of equal age); Sadeghi, Gupta, Gramatovici, Lu, Ai
and Zhang (2022), Technometrics 64(4), 524-534 (novelty and primacy as a difference in differences); Waudby-Smith,
Arbour, Sinha, Kennedy and Ramdas (2024), Annals of Statistics 52(6), 2613-2640, theorem 2.2 (the sequence).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from stream_xp.stats._checks import FloatArray, positive
from stream_xp.stats.batch import (
    CrossArrays,
    EvidenceArrays,
    MeansArrays,
    MomentArrays,
    mean_difference_arrays,
    summarise_arrays,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

NOT_PROVEN: Final = ""
NOVELTY: Final = "novelty"
HABITUATION: Final = "habituation"
CHANGES: Final = (NOT_PROVEN, NOVELTY, HABITUATION)
"""What a change of an effect is called, by its code: with novelty it shrinks, with habituation (primacy) it grows."""

_MOST_DAYS = 10_000
_EXACT_LIMIT = 2.0**61


@dataclass(frozen=True, slots=True, eq=False)
class EffectChange:
    """Early and late effects per day of many comparisons, and what became of them; fields of the shape (...).

    All three are about the same units, those whose late window is over.

    Attributes:
        early: effect per day in the early window, at the level of the test; to be shown, not to be counted as a test.
        late: the same in the late window.
        change: late effect minus early effect, both per day; its `log_e` is against "the effect lasts".
        kind: code of `CHANGES`, int8: 0 while no change is proven; 1 (novelty) where the estimated late effect is
            nearer to 0 than the early one; 2 (habituation) where it is not, which includes one that changed its sign
            and grew. The change is what is proven, its name describes the estimates.

    """

    early: EvidenceArrays
    late: EvidenceArrays
    change: EvidenceArrays
    kind: NDArray[np.int8]

    def names(self) -> NDArray[np.str_]:
        """Return the names of the kinds, from `CHANGES`, of the shape (...)."""
        return np.asarray(np.array(CHANGES)[self.kind])


def change_moments(pairs: CrossArrays, *, early_days: int, late_days: int) -> MomentArrays:
    """Exact moments of the units' changes, in steps per (early_days * late_days).

    With a and b the days of the windows a unit's value is a*y - b*x, that is a*b times y/b - x/a: an integer whose sums
    follow from those of the pair, a*sy - b*sx and a^2*syy - 2ab*sxy + b^2*sxx.

    Args:
        pairs: (..., E) exact cross moments with x a unit's total in the early window and y that in the late one.
        early_days: a, length of the early window in days, 1 to 10,000.
        late_days: b, length of the late window in days, 1 to 10,000.

    Returns:
        The moments, of the same shape.

    Raises:
        ValueError: a window has no such length.

    """
    a, b = _days("early_days", early_days), _days("late_days", late_days)
    n, sx, sy, sxx, syy, sxy = (pairs.n, pairs.sx, pairs.sy, pairs.sxx, pairs.syy, pairs.sxy)
    largest = max(
        float(np.abs(column.astype(np.float64)).max(initial=0.0)) for column in (sxx, syy, sxy, sx, sy)
    )
    if largest * (a + b) ** 2 >= _EXACT_LIMIT:
        n, sx, sy, sxx, syy, sxy = (column.astype(object) for column in (n, sx, sy, sxx, syy, sxy))
    return MomentArrays(n, a * sy - b * sx, a * a * syy - 2 * a * b * sxy + b * b * sxx)


def effect_change(
    control: CrossArrays,
    treatment: CrossArrays,
    *,
    early_days: int,
    late_days: int,
    scale: ArrayLike,
    alpha: ArrayLike,
    rho2: ArrayLike,
) -> EffectChange:
    """Test that the effect in a late window of units' age left the one in an early window.

    Args:
        control: (..., E) cross moments (x early, y late) of the control units whose late window is over.
        treatment: (..., E) the same of the treatment arms, broadcast against `control`.
        early_days: length of the early window, 1 to 10,000 days.
        late_days: length of the late window, 1 to 10,000 days.
        scale: value of one quantisation step in metric units, 1e-100 to 1e100, broadcast against (...).
        alpha: two-sided error level of the change, in (0, 1), broadcast.
        rho2: ``tuned_rho2(n_star, alpha)`` with n_star the planned units of both arms, > 0, broadcast.

    Returns:
        The effects per day and their change. Valid at every look; undetermined before each arm has 25 units whose late
        window is over. Names err with the test: a change is named, ever, with probability at most alpha if there is
        none.

    Raises:
        ValueError: an argument is out of its range or does not broadcast.

    Source:
        The difference of the means of per-unit changes, by Waudby-Smith et al. (2024), theorem 2.2.

    """
    changes = [
        change_moments(arm, early_days=early_days, late_days=late_days) for arm in (control, treatment)
    ]
    unit = positive("scale", scale)
    means = summarise_arrays(*changes, scale=unit / (early_days * late_days))
    change = mean_difference_arrays(means, alpha=alpha, rho2=rho2)
    windows = [
        mean_difference_arrays(_window(control, treatment, axis, scale=unit / days), alpha=alpha, rho2=rho2)
        for axis, days in (("x", early_days), ("y", late_days))
    ]
    proven = ~change.undetermined & (change.log_e >= -np.log(np.asarray(alpha, dtype=np.float64)))
    shrinks = np.abs(windows[1].estimate) < np.abs(windows[0].estimate)
    kind = np.where(proven, np.where(shrinks, CHANGES.index(NOVELTY), CHANGES.index(HABITUATION)), 0)
    return EffectChange(windows[0], windows[1], change, kind.astype(np.int8))


def effects_by_age(
    control: MomentArrays, treatment: MomentArrays, *, scale: ArrayLike, alpha: ArrayLike, rho2: ArrayLike
) -> EvidenceArrays:
    """Effect in every bucket of days since first exposure; the curve to be drawn.

    Units are in several buckets, so the points are dependent; each has its own sequence at alpha over the number of
    buckets, which hold together under any dependence. The curve is no test of a change: see `effect_change`. Late
    buckets have fewer units, and those of an earlier calendar time.

    Args:
        control: (..., D, E) moments of the totals in bucket d of the control units whose bucket d is over.
        treatment: (..., D, E) the same of the treatment arms, broadcast.
        scale: value of one quantisation step in metric units, broadcast against (..., D).
        alpha: two-sided error level of all buckets together, in (0, 1), broadcast against (..., D).
        rho2: ``tuned_rho2(n_star, alpha / D)``, > 0, broadcast against (..., D).

    Returns:
        Evidence about the effect in each bucket, (..., D), in metric units per bucket.

    Raises:
        ValueError: there is no axis of buckets, or an argument is out of its range.

    Source:
        `mean_difference` at alpha / D (Bonferroni).

    """
    if min(control.n.ndim, treatment.n.ndim) < 2:
        raise ValueError("control and treatment must have the shape (..., D, E)")
    means = summarise_arrays(control, treatment, scale=scale)
    levels = np.asarray(alpha, dtype=np.float64) / max(1, means.n.shape[-1])
    return mean_difference_arrays(means, alpha=levels, rho2=rho2)


def _window(control: CrossArrays, treatment: CrossArrays, axis: str, *, scale: FloatArray) -> MeansArrays:
    arms = [
        MomentArrays(arm.n, getattr(arm, f"s{axis}"), getattr(arm, f"s{axis}{axis}"))
        for arm in (control, treatment)
    ]
    return summarise_arrays(arms[0], arms[1], scale=scale)


def _days(name: str, value: int) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_DAYS:
        raise ValueError(f"{name} must be a whole number from 1 to {_MOST_DAYS}, got {value!r}")
    return value
