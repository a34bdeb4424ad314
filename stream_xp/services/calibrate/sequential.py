"""Row g: group sequential designs, at the looks they declare and at many more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np

from stream_xp.services.calibrate.case import ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Sample
from stream_xp.stats.group_sequential import GroupSequential, Sides, Spending, group_sequential

# z of each look: from a sample and the numbers of units seen, to (paths, looks).
ZAt = Callable[[Sample, IntArray], FloatArray]


@dataclass(frozen=True, slots=True)
class Declared:
    """A design, looked at when it says.

    Attributes:
        z_at: see `ZAt`.
        spending: how the error is spread over the looks.
        information: at the looks.
        phi: exponent of the power family.
        sides: 1 or 2.

    """

    z_at: ZAt
    spending: Spending
    information: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    phi: float | None = None
    sides: Sides = 2

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the design stops."""
        z = self.z_at(drawn, np.rint(np.array(self.information) * drawn.n).astype(np.int64))
        bounds = np.array(self._design(alpha).z)
        return ever((np.abs(z) if self.sides == 2 else z) >= bounds)

    def _design(self, alpha: float) -> GroupSequential:
        return _design(self.information, alpha, self.spending, self.phi, self.sides)


@dataclass(frozen=True, slots=True)
class Peeked:
    """The same design, looked at between its looks as well, against the next critical value.

    Attributes:
        declared: the design.
        looks: how many looks are really taken, evenly.

    """

    declared: Declared
    looks: int = 500

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether any of the looks passes the critical value of the next declared one."""
        at = np.rint(np.linspace(0.0, drawn.n, self.looks + 1)[1:]).astype(np.int64)
        design = self.declared._design(alpha)  # noqa: SLF001 (of this module)
        following = np.searchsorted(np.array(design.information) * drawn.n + 0.5, at)
        return ever(np.abs(self.declared.z_at(drawn, at)) >= np.array(design.z)[following])


@lru_cache(maxsize=64)
def _design(
    information: tuple[float, ...], alpha: float, spending: str, phi: float | None, sides: int
) -> GroupSequential:
    return group_sequential(
        information, alpha=alpha, sides=cast("Sides", sides), spending=cast("Spending", spending), phi=phi
    )
