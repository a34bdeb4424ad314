"""Rows c2 and c3: whether the arms get the shares that their weights promise, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.stats import chi2

from stream_xp.services.calibrate.case import ALPHA, Outcome, ever
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Rng
from stream_xp.services.calibrate.running import Looks

# log e of counts (..., epochs, arms) under weights (epochs, arms).
LogE = Callable[[IntArray, FloatArray], FloatArray]


@dataclass(frozen=True, slots=True)
class SharesStudy:
    """Units fall into arms by the weights of their epoch, and nothing else happens.

    Attributes:
        weights: one row per epoch; epochs are equally long.
        looks: when the test is looked at.
        rejects: from counts (paths, looks, epochs, arms) and weights (epochs, arms) to (paths, looks).

    """

    weights: tuple[tuple[float, ...], ...]
    looks: Looks
    rejects: Callable[[IntArray, FloatArray], BoolArray]

    def __call__(self, rng: Rng, paths: int, n: int) -> Outcome:
        """Simulate."""
        weights = np.array(self.weights)
        ends = [n * (e + 1) // len(weights) for e in range(len(weights))]
        epoch = np.repeat(np.arange(len(weights)), np.diff([0, *ends]))
        arm = (rng.random((paths, n, 1)) > np.cumsum(weights, axis=1)[epoch][:, :-1]).sum(axis=-1)
        counts = _counts(arm, self.looks.at(n), ends=ends, arms=weights.shape[1])
        return Outcome(ever(self.rejects(counts, weights)))


def _counts(arm: IntArray, at: IntArray, *, ends: list[int], arms: int) -> IntArray:
    seen = np.stack([np.cumsum(arm == a, axis=1) for a in range(arms)], axis=-1)
    seen = np.concatenate([np.zeros_like(seen[:, :1]), seen], axis=1)
    return np.stack([seen[:, np.clip(at, s, e)] - seen[:, [s]] for s, e in pairwise((0, *ends))], axis=2)


def chi_square(counts: IntArray, weights: FloatArray) -> BoolArray:
    """The usual test of the sample ratio at one look: totals against constant weights."""
    totals = counts.sum(axis=-2)
    expected = totals.sum(axis=-1, keepdims=True) * weights[0]
    statistic = ((totals - expected) ** 2 / expected).sum(axis=-1)
    # From 5 expected units in each arm on, the usual rule.
    return np.asarray((statistic > chi2.isf(ALPHA, weights.shape[1] - 1)) & (expected.min(axis=-1) >= 5))
