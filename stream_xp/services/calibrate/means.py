"""Rows a2 to a5 and f: difference, lift and one-sided tests of two means, adjusted means or ratios."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from stream_xp.services.calibrate.case import PLANNED, ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Sample
from stream_xp.services.calibrate.running import EVERY_UNIT, Looks, cross_arrays, moment_arrays
from stream_xp.stats.adjusted_difference import ancova_arrays, cuped_arrays
from stream_xp.stats.batch import (
    EvidenceArrays,
    MeansArrays,
    MomentArrays,
    mean_difference_arrays,
    one_sided_test_arrays,
    relative_lift_arrays,
    relative_lift_delta_arrays,
    summarise_arrays,
)
from stream_xp.stats.mean_difference import MarginKind, Side
from stream_xp.stats.normal_mixture import one_sided_rho2, tuned_rho2
from stream_xp.stats.ratio_difference import ratio_equality_arrays, ratio_means_arrays

Quantity: TypeAlias = Literal["mean", "cuped", "ancova", "ratio", "equality of ratios"]
_OF_PAIRS: dict[str, Callable[..., MeansArrays]] = {
    "cuped": cuped_arrays,
    "ancova": ancova_arrays,
    "ratio": ratio_means_arrays,
    "equality of ratios": ratio_equality_arrays,
}

Z_OF_ONE_LOOK = 1.96
# Units before which nobody looks at a naive test.
_FIRST_LOOK = 100


@dataclass(frozen=True, slots=True)
class Means:
    """How the means of both arms are formed at each look.

    Attributes:
        of: plain means, means adjusted for a covariate, or ratios of two sums.
        guard: whether the variances are guarded.
        pooled: whether the weight epochs are forgotten, as if the weights had never changed.
        looks: when.

    """

    of: Quantity = "mean"
    guard: bool = True
    pooled: bool = False
    looks: Looks = EVERY_UNIT

    def along(self, drawn: Sample) -> MeansArrays:
        """Means at each look, (paths, looks)."""
        return self.at(drawn, self.looks.at(drawn.n))

    def at(self, drawn: Sample, at: IntArray) -> MeansArrays:
        """Means after these numbers of units, (paths, looks)."""
        if self.of != "mean":
            pair = (cross_arrays(drawn, at, arm=arm) for arm in (False, True))
            return _OF_PAIRS[self.of](*pair, scale_x=drawn.step, scale_y=drawn.step, guard=self.guard)
        control, treatment = (moment_arrays(drawn, at, arm=a, pooled=self.pooled) for a in (False, True))
        return summarise_arrays(control, treatment, scale=drawn.step, guard=self.guard)


@dataclass(frozen=True, slots=True)
class Difference:
    """Two-sided sequence of the difference; errs when it leaves out 0, the truth without an effect."""

    means: Means = Means()

    @property
    def looks(self) -> Looks:
        """When the means are looked at."""
        return self.means.looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the sequence ever leaves out 0."""
        means = self.means.along(drawn)
        evidence = mean_difference_arrays(means, alpha=alpha, rho2=tuned_rho2(PLANNED, alpha))
        return rejects(evidence, alpha)


@dataclass(frozen=True, slots=True)
class Lift:
    """Two-sided sequence of the lift; errs when it leaves out the true one."""

    means: Means = Means()
    delta: bool = False

    @property
    def looks(self) -> Looks:
        """When the means are looked at."""
        return self.means.looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the sequence ever leaves out the true lift."""
        lifts = relative_lift_delta_arrays if self.delta else relative_lift_arrays
        return misses(
            lifts(self.means.along(drawn), alpha=alpha, rho2=tuned_rho2(PLANNED, alpha)), drawn.lift
        )


@dataclass(frozen=True, slots=True)
class AtTheMargin:
    """One-sided test of an effect that lies exactly on the margin."""

    margin: float
    kind: MarginKind
    side: Side
    means: Means = Means()

    @property
    def looks(self) -> Looks:
        """When the means are looked at."""
        return self.means.looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the test ever rejects."""
        evidence = one_sided_test_arrays(
            self.means.along(drawn),
            margin=self.margin,
            margin_kind=self.kind,
            side=self.side,
            alpha=alpha,
            rho2=one_sided_rho2(PLANNED, alpha),
        )
        return rejects(evidence, alpha)


def rejects(evidence: EvidenceArrays, alpha: float) -> BoolArray:
    """Whether the e-value ever reaches 1 / alpha; undetermined looks have an e-value of 1."""
    return ever(evidence.log_e >= math.log(1.0 / alpha))


def misses(evidence: EvidenceArrays, truth: float) -> BoolArray:
    """Whether the sequence ever leaves out the truth; undetermined looks have the whole line."""
    return ever((truth < evidence.lower) | (truth > evidence.upper))


def z_of_difference(drawn: Sample, at: IntArray) -> FloatArray:
    """Return z of the plain difference of means, (paths, looks); 0 where undetermined."""
    means = Means(guard=False).at(drawn, at)
    se = np.sqrt(np.where(means.undetermined, 1.0, means.control_variance + means.treatment_variance))
    return np.where(means.undetermined, 0.0, (means.treatment_mean - means.control_mean) / se)


def naive_z(drawn: Sample, alpha: float) -> BoolArray:  # noqa: ARG001 (1.96 is the level)
    """The z test of one look, at every look."""
    return ever(np.abs(z_of_difference(drawn, np.arange(_FIRST_LOOK, drawn.n + 1))) > Z_OF_ONE_LOOK)


def conversions_reject(units: IntArray, successes: IntArray, alpha: float) -> BoolArray:
    """The guarded difference on counts of control and treatment, (2, paths, looks); per look."""
    arms = [
        MomentArrays(*(c[..., np.newaxis] for c in (n, s, s))) for n, s in zip(units, successes, strict=True)
    ]
    means = summarise_arrays(*arms, scale=1.0)
    evidence = mean_difference_arrays(means, alpha=alpha, rho2=tuned_rho2(PLANNED, alpha))
    return np.asarray(evidence.log_e >= math.log(1.0 / alpha))
