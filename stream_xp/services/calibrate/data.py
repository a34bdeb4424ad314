"""What the simulated units do, and which arm they see.

A data model draws outcomes without an effect, as arrays (paths, n) in order of arrival. A design assigns the
arms, and what a unit does in treatment is the outcome times one plus the lift (for zeros and ones: a success
is kept or dropped). So one table combines any data with any design.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]
Rng: TypeAlias = np.random.Generator
Shape: TypeAlias = tuple[int, int]
# Outcomes, and a second number per unit (a covariate, a denominator, a cluster) where the model has one.
Drawn: TypeAlias = tuple[FloatArray, FloatArray | None]


@dataclass(frozen=True, slots=True)
class Data:
    """A data model.

    Attributes:
        name: as it stands in the table.
        draw: outcomes of units in control, and their second number or None, of a shape (paths, n).
        binary: whether every outcome is 0 or 1.
        step: outcomes are rounded to multiples of it, as they are at ingest.
        truth: what the method is to find in these data, where that is not the effect (a quantile, a mean).

    """

    name: str
    draw: Callable[[Rng, Shape], Drawn]
    binary: bool = False
    step: float = 0.001
    truth: float = 0.0


@dataclass(frozen=True, slots=True)
class Assigned:
    """Who saw what: arrays (paths, n), or (1, n) where it is the same on every path.

    Attributes:
        treated: whether the unit saw treatment.
        weight: probability of treatment when the unit was assigned, in (0, 1).
        ends: number of units at the end of each weight epoch; the last is n.

    """

    treated: BoolArray
    weight: FloatArray
    ends: tuple[int, ...]


class Design(Protocol):
    """How units get their arms."""

    @property
    def name(self) -> str:
        """As it stands in the table."""

    def assign(self, rng: Rng, control: FloatArray, treatment: FloatArray) -> Assigned:
        """Assign arms; both potential outcomes are (paths, n), of which a design may see the past."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Paths of units in order of arrival; arrays (paths, n) unless `Assigned` says otherwise.

    Attributes:
        y: the outcome that was seen.
        extra: the second number of the unit, or None.
        arms: who saw what.
        lift: relative effect of treatment on the mean.
        step: from the data model.
        truth: from the data model.

    """

    y: FloatArray
    extra: FloatArray | None
    arms: Assigned
    lift: float
    step: float
    truth: float

    @property
    def paths(self) -> int:
        """Number of paths."""
        return len(self.y)

    @property
    def n(self) -> int:
        """Number of units of a path."""
        return int(self.y.shape[1])

    @property
    def ticks(self) -> IntArray:
        """Outcomes in whole steps, the form in which statistics take them."""
        return np.rint(self.y / self.step).astype(np.int64)

    @property
    def rounded(self) -> FloatArray:
        """Outcomes as floats, rounded to whole steps."""
        return self.ticks.astype(np.float64) * self.step

    @property
    def second_ticks(self) -> IntArray:
        """The second numbers in whole steps."""
        return np.rint(self.second / self.step).astype(np.int64)

    @property
    def second(self) -> FloatArray:
        """The second number of each unit; TypeError if the data model has none."""
        if self.extra is None:
            raise TypeError("this method needs data with a second number per unit")
        return self.extra


def sample(rng: Rng, data: Data, design: Design, *, paths: int, n: int, lift: float = 0.0) -> Sample:
    """Draw paths from a data model under a design."""
    control, extra = data.draw(rng, (paths, n))
    treatment = _treated(rng, control, lift=lift, binary=data.binary)
    arms = design.assign(rng, control, treatment)
    y = control if lift == 0 else np.where(arms.treated, treatment, control)
    return Sample(y, extra, arms, lift, data.step, data.truth)


def _treated(rng: Rng, control: FloatArray, *, lift: float, binary: bool) -> FloatArray:
    if lift == 0:
        return control
    if not binary:
        return control * (1.0 + lift)
    if lift > 0:
        raise ValueError("lift must not be above 0 for zeros and ones")
    return control * (rng.random(control.shape) < 1.0 + lift)


# ---- data models -------------------------------------------------------------------------------------


def _normal(rng: Rng, shape: Shape) -> Drawn:
    return rng.standard_normal(shape), None


def _exponential(rng: Rng, shape: Shape) -> Drawn:
    return rng.standard_exponential(shape), None


def _lognormal(rng: Rng, shape: Shape, *, sigma: float) -> Drawn:
    return rng.lognormal(0.0, sigma, shape), None


def _bernoulli(rng: Rng, shape: Shape, *, p: float) -> Drawn:
    return (rng.random(shape) < p).astype(np.float64), None


def _zero_inflated(rng: Rng, shape: Shape) -> Drawn:
    return np.where(rng.random(shape) < 0.05, rng.exponential(20.0, shape), 0.0), None


def _drifting_bernoulli(rng: Rng, shape: Shape) -> Drawn:
    return (rng.random(shape) < np.linspace(0.1, 0.5, shape[1])).astype(np.float64), None


def _drifting_revenue(rng: Rng, shape: Shape) -> Drawn:
    rising = np.linspace(0.1, 0.5, shape[1])
    return np.where(rng.random(shape) < rising, rng.exponential(20.0, shape), 0.0), None


def _drifting_normal(rng: Rng, shape: Shape) -> Drawn:
    return rng.standard_normal(shape) + np.linspace(0.0, 2.0, shape[1]), None


def _growing_normal(rng: Rng, shape: Shape) -> Drawn:
    return rng.standard_normal(shape) * np.linspace(1.0, 5.0, shape[1]), None


def _jumping_normal(rng: Rng, shape: Shape) -> Drawn:
    return rng.standard_normal(shape) * np.where(np.arange(shape[1]) < shape[1] // 2, 1.0, 10.0), None


def _beta(rng: Rng, shape: Shape, *, a: float, b: float) -> Drawn:
    return rng.beta(a, b, shape), None


def _normal_with_covariate(rng: Rng, shape: Shape) -> Drawn:
    x = rng.standard_normal(shape)
    return 0.7 * x + 0.7 * rng.standard_normal(shape), x


def _normal_beside_covariate(rng: Rng, shape: Shape) -> Drawn:
    return rng.standard_normal(shape), rng.standard_normal(shape)


def _lognormal_with_covariate(rng: Rng, shape: Shape) -> Drawn:
    x = rng.standard_normal(shape)
    return np.exp(x + rng.standard_normal(shape)), np.exp(x)


def _dense_ratio(rng: Rng, shape: Shape) -> Drawn:
    views = 1.0 + rng.poisson(4.0, shape)
    rate = rng.beta(2.0, 6.0, shape)  # a unit's own rate, so its events are not independent
    return rng.binomial(views.astype(np.int64), rate).astype(np.float64), views.astype(np.float64)


def _sparse_ratio(rng: Rng, shape: Shape) -> Drawn:
    orders = np.where(rng.random(shape) < 0.1, 1.0 + rng.poisson(1.0, shape), 0.0)
    return orders * rng.exponential(20.0, shape), orders


def _clustered_counts(rng: Rng, shape: Shape) -> Drawn:
    # Events per unit: about ten, more variable than Poisson.
    return rng.poisson(rng.gamma(1.0, 10.0, shape)).astype(np.float64), None


NORMAL = Data("normal", _normal)
EXPONENTIAL = Data("exponential", _exponential)
LOGNORMAL_15 = Data("lognormal, σ 1.5", partial(_lognormal, sigma=1.5), step=0.01)
LOGNORMAL_2 = Data("lognormal, σ 2", partial(_lognormal, sigma=2.0), step=0.1)
ZERO_INFLATED = Data("95 % zeros", _zero_inflated, step=0.01)
DRIFTING = Data("Bernoulli drifting .1 to .5", _drifting_bernoulli, binary=True, step=1.0)
DRIFTING_REVENUE = Data("zero-inflated, drifting", _drifting_revenue, step=0.01)
DRIFTING_NORMAL = Data("normal drifting by 2 sd", _drifting_normal)
GROWING_SPREAD = Data("normal, sd rising from 1 to 5", _growing_normal)
JUMPING_SPREAD = Data("normal, sd 1 then 10", _jumping_normal)
WITH_COVARIATE = Data("normal, covariate r .7", _normal_with_covariate)
IDLE_COVARIATE = Data("normal, covariate r 0", _normal_beside_covariate)
SKEWED_COVARIATE = Data("lognormal, skewed covariate", _lognormal_with_covariate, step=0.01)
DENSE_RATIO = Data("ratio, 5 events a unit", _dense_ratio, step=0.1)
SPARSE_RATIO = Data("ratio, 10 % of units have events", _sparse_ratio, step=0.01)
CLUSTERED_COUNTS = Data("clustered counts, one sum a unit", _clustered_counts, step=1.0)


def bernoulli(p: float) -> Data:
    """Zeros and ones with success probability `p`."""
    return Data(
        f"Bernoulli .{f'{p:.4f}'[2:].rstrip('0')}", partial(_bernoulli, p=p), binary=True, step=1.0, truth=p
    )


def beta(a: float, b: float) -> Data:
    """Bounded outcomes in [0, 1]."""
    return Data(f"Beta({a:g}, {b:g})", partial(_beta, a=a, b=b), truth=a / (a + b))


# ---- designs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OneArm:
    """No comparison: every unit is in one arm."""

    name: str = "one arm"

    def assign(self, rng: Rng, control: FloatArray, treatment: FloatArray) -> Assigned:  # noqa: ARG002
        """Assign every unit to control."""
        n = control.shape[1]
        return Assigned(np.zeros((1, n), np.bool_), np.zeros((1, n)), (n,))


@dataclass(frozen=True, slots=True)
class Share:
    """A constant share of treatment."""

    share: float
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.share:g}")

    def assign(self, rng: Rng, control: FloatArray, treatment: FloatArray) -> Assigned:  # noqa: ARG002
        """Toss one coin per unit."""
        n = control.shape[1]
        return Assigned(rng.random(control.shape) < self.share, np.full((1, n), self.share), (n,))


@dataclass(frozen=True, slots=True)
class Ramp:
    """A share of treatment that climbs in equally long weight epochs."""

    shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "ramp " + "/".join(f"{share:g}" for share in self.shares))

    def assign(self, rng: Rng, control: FloatArray, treatment: FloatArray) -> Assigned:  # noqa: ARG002
        """Toss one coin per unit, of its epoch's weight."""
        n, epochs = control.shape[1], len(self.shares)
        ends = tuple(n * (e + 1) // epochs for e in range(epochs))
        weight = np.repeat(self.shares, np.diff((0, *ends)))[np.newaxis]
        return Assigned(rng.random(control.shape) < weight, weight, ends)


@dataclass(frozen=True, slots=True)
class Thompson:
    """Weights that follow the data: after each batch, the probability that treatment is better.

    Attributes:
        floor: least weight of either arm.
        batch: units between two changes of the weights; each batch is a weight epoch.

    """

    floor: float = 0.05
    batch: int = 100
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"Thompson, floor {self.floor:g}")

    def assign(self, rng: Rng, control: FloatArray, treatment: FloatArray) -> Assigned:
        """Play batch after batch; arms share one variance in the player's eyes."""
        treated, weight = np.zeros(control.shape, np.bool_), np.empty(control.shape)
        ends = (*range(self.batch, control.shape[1], self.batch), control.shape[1])
        seen = np.zeros((3, 2, len(control)))  # n, sum, sum of squares; arm; path
        for start, end in pairwise((0, *ends)):
            part = slice(start, end)
            weight[:, part] = self._next_weight(seen)[:, np.newaxis]
            treated[:, part] = rng.random((len(control), end - start)) < weight[:, part]
            y = np.where(treated[:, part], treatment[:, part], control[:, part])
            inside = np.stack([~treated[:, part], treated[:, part]])
            seen += np.stack([(inside * term).sum(axis=-1) for term in (np.ones_like(y), y, y * y)])
        return Assigned(treated, weight, ends)

    def _next_weight(self, seen: FloatArray) -> FloatArray:
        n, total, squares = seen
        both = np.maximum(n.sum(axis=0), 1.0)
        variance = np.maximum(squares.sum(axis=0) / both - (total.sum(axis=0) / both) ** 2, 1e-12)
        mean = total / np.maximum(n, 1.0)
        se = np.sqrt(variance * (1.0 / (n + 1.0)).sum(axis=0))
        better: FloatArray = ndtr((mean[1] - mean[0]) / se)
        return np.clip(better, self.floor, 1.0 - self.floor)
