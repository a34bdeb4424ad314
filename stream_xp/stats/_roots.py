"""Roots of many monotone functions at once, element by element."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stream_xp.stats._checks import FloatArray

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_DOUBLINGS = 1100  # from the smallest to the largest float
_STEPS = 200  # plain bisection needs 64; the interpolation never needs more than twice that
_TOLERANCE = 4e-16
_FLAT = 1e-11  # the ends of an interval are roots of a log e-value minus a threshold


def beyond(f: Callable[[FloatArray], FloatArray], start: FloatArray, *, step: FloatArray) -> FloatArray:
    """Return points start + step * 2^j, one per element, at which `f` is not negative.

    Args:
        f: maps an array to an array of the same shape; 0 or above far enough in the direction of `step`.
        start: where to begin.
        step: first step, with its sign; not 0.

    """
    point = start + step
    for _ in range(_DOUBLINGS):
        short = f(point) < 0
        if not short.any():
            break
        step = np.where(short, 2.0 * step, step)
        point = start + step
    return point


def crossing(
    f: Callable[[FloatArray], FloatArray],
    a: FloatArray,
    b: FloatArray,
    *,
    tolerance: float = _TOLERANCE,
    flat: float = 0.0,
) -> FloatArray:
    """Return the root of `f` between `a` and `b`, one per element.

    Where `f` has the same sign at both ends, the end with the smaller |f| is returned.

    Args:
        f: maps an array to an array of the same shape, element by element.
        a: one end.
        b: the other end.
        tolerance: of the root, relative to its size.
        flat: an |f| as small as this is 0.

    Source:
        Chandrupatla (1997), Advances in Engineering Software 28(3), 145-149 (inverse quadratic
        interpolation where it is safe, bisection elsewhere).

    """
    fa, fb = f(a), f(b)
    done = np.sign(fa) * np.sign(fb) >= 0
    c, fc = a, fa
    share = np.full(np.shape(fa), 0.5)
    for _ in range(_STEPS):
        best, f_best = np.where(np.abs(fa) < np.abs(fb), a, b), np.minimum(np.abs(fa), np.abs(fb))
        with np.errstate(all="ignore"):
            least = tolerance * np.abs(best) / np.abs(b - a)
        done = done | ~(least <= 0.5) | (f_best <= flat)
        if done.all():
            break
        within = np.where(done, 0.5, np.clip(share, least, 1.0 - least))
        x = np.where(done, best, a + within * (b - a))
        fx = f(x)
        same = np.sign(fx) == np.sign(fa)
        c, fc, b, fb = (
            np.where(done, old, np.where(same, keep, swap))
            for old, keep, swap in ((c, a, b), (fc, fa, fb), (b, b, a), (fb, fb, fa))
        )
        a, fa = np.where(done, a, x), np.where(done, fa, fx)
        share = _next_share(a, b, c, f=(fa, fb, fc))
    return np.where(np.abs(fa) < np.abs(fb), a, b)


def end(
    f: Callable[[FloatArray], FloatArray], start: FloatArray, *, step: FloatArray, open_: NDArray[np.bool_]
) -> FloatArray:
    """Return the root of `f` from `start` in the direction of `step`; infinite where `open_` says there is none.

    Args:
        f: below 0 at `start`, increasing in the direction of `step`.
        start: inside the interval whose end is sought.
        step: a first guess of the distance, with its sign; not 0.
        open_: where the interval has no end on this side.

    """

    def closed(point: FloatArray) -> FloatArray:
        return np.where(open_, 0.0, f(point))

    root = crossing(closed, start, beyond(closed, start, step=step), flat=_FLAT)
    return np.where(open_, np.copysign(np.inf, step), root)


def _next_share(
    a: FloatArray, b: FloatArray, c: FloatArray, *, f: tuple[FloatArray, FloatArray, FloatArray]
) -> FloatArray:
    # Where between a and b to look next: 1/2, or the root of the inverse quadratic where that is monotone.
    fa, fb, fc = f
    with np.errstate(all="ignore"):
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        safe = (phi * phi < xi) & ((1.0 - phi) ** 2 < 1.0 - xi)
        quadratic = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
    return np.where(safe & np.isfinite(quadratic), quadratic, 0.5)
