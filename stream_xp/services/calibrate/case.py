"""One row of the calibration table: a method on data under a design, and what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from stream_xp.services.calibrate.data import BoolArray, Data, Design, Rng, Sample, sample

UNITS = 5_000
# Sample that the tuning constants are set for. A fifth of the path, because a sequence errs most around it.
PLANNED = 1_000
ALPHA = 0.05
STANDARD_ERRORS = 3.0
# A check that must fail has to exceed its nominal rate by this factor as well.
FAR_ABOVE = 1.5

Status: TypeAlias = Literal["held", "above", "failed as it must", "did not fail", "nothing counted"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened on each path.

    Attributes:
        erred: (paths,), whether the method ever erred on the path.
        counted: (paths,), the paths that count; None where all do.

    """

    erred: BoolArray
    counted: BoolArray | None = None


Simulation: TypeAlias = Callable[[Rng, int, int], Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row of the table, declared.

    Attributes:
        row: the method's letter and number, by which the table is sorted.
        method: as it stands in the table.
        data: name of the data model.
        share: name of the design.
        simulate: from a generator, a number of paths and a number of units to what happened on each path.
        looks: when the method is looked at.
        nominal: rate that the method promises not to exceed.
        fails_because: for a check that must fail, why it does; empty for a method that must hold.
        known_limit: whether it is one of our own methods that fails here, outside of what it assumes.
        n: units of a path.
        multiple: this many times the paths of the other cases, where paths are cheap and the rate is exact.
        quick: whether the quick run has this case.

    """

    row: str
    method: str
    data: str
    share: str
    simulate: Simulation
    looks: str = "every unit"
    nominal: float = ALPHA
    fails_because: str = ""
    known_limit: bool = False
    n: int = UNITS
    multiple: int = 1
    quick: bool = False

    @property
    def name(self) -> str:
        """What tells this case from every other; its random numbers hang on it."""
        return f"{self.row} {self.method} | {self.data} | {self.share}"

    @property
    def must_fail(self) -> bool:
        """Whether the rate has to be far above nominal."""
        return bool(self.fails_because)


@dataclass(frozen=True, slots=True)
class Study:
    """The usual simulation: a sample of a data model under a design, given to a method.

    Attributes:
        data: the data model.
        design: the design.
        errs: whether the method ever errs, (paths,), from the sample and its error level.
        lift: effect of treatment, relative.
        alpha: error level that the method is run at.

    """

    data: Data
    design: Design
    errs: Callable[[Sample, float], BoolArray]
    lift: float = 0.0
    alpha: float = ALPHA

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        drawn = sample(rng, self.data, self.design, paths=paths, n=n, lift=self.lift)
        return Outcome(self.errs(drawn, self.alpha))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of a case.

    Attributes:
        case: the case.
        erred: paths on which the method erred.
        trials: paths that counted.
        n: units of a path.

    """

    case: Case
    erred: int
    trials: int
    n: int

    @property
    def rate(self) -> float:
        """Share of the counted paths on which the method erred; 0 if none counted."""
        return self.erred / max(self.trials, 1)

    @property
    def error(self) -> float:
        """Binomial standard error of the rate; that of one error at least, so that it is never 0."""
        trials = max(self.trials, 2)
        rate = min(max(self.erred, 1), trials - 1) / trials
        return math.sqrt(rate * (1.0 - rate) / trials)

    @property
    def limit(self) -> float:
        """Nominal rate plus three standard errors of a method whose rate is exactly nominal."""
        nominal = self.case.nominal
        return nominal + STANDARD_ERRORS * math.sqrt(nominal * (1.0 - nominal) / max(self.trials, 1))

    @property
    def status(self) -> Status:
        """Whether the case is as it must be."""
        if not self.trials:
            return "nothing counted"
        if not self.case.must_fail:
            return "held" if self.rate <= self.limit else "above"
        far = max(self.limit, FAR_ABOVE * self.case.nominal)
        return "failed as it must" if self.rate > far else "did not fail"

    @property
    def as_it_must_be(self) -> bool:
        """Whether the harness is content with this case."""
        return self.status in ("held", "failed as it must")


def ever(erred: BoolArray) -> BoolArray:
    """Whether a path errs at any look; (paths, looks) to (paths,)."""
    return np.asarray(erred.any(axis=1))
