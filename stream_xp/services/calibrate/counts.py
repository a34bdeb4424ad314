"""Rows b4 and c1: counts of events per arm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stream_xp.services.calibrate.case import ALPHA, ever
from stream_xp.services.calibrate.conversions import both_arms, logged_weights
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Sample
from stream_xp.services.calibrate.running import Looks
from stream_xp.stats.event_counts import EventCounts, event_counts, event_counts_by_epoch
from stream_xp.stats.normal_mixture import Undetermined


@dataclass(frozen=True, slots=True)
class FirstConversions:
    """Conversions of both arms by weight epoch; errs when the sequence leaves out the true log rate ratio.

    Attributes:
        looks: when.
        by_epoch: whether to use the tilt mixture, which needs no constant weights.
        concentration: of the Dirichlet mixture.

    """

    looks: Looks
    by_epoch: bool = False
    concentration: float = 100.0

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the sequence ever leaves out the truth."""
        at = self.looks.at(drawn.n)
        evidence = self._evidence(both_arms(drawn, drawn.ticks, at), logged_weights(drawn), alpha)
        truth = math.log1p(drawn.lift)
        return ever((truth < np.asarray(evidence.lower)) | (truth > np.asarray(evidence.upper)))

    def _evidence(self, counts: IntArray, weights: FloatArray, alpha: float) -> EventCounts:
        if self.by_epoch:
            return _determined(event_counts_by_epoch(counts, weights, alpha=alpha))
        totals, constant = counts.sum(axis=-2), weights[..., 0, :]
        return _determined(event_counts(totals, constant, alpha=alpha, concentration=self.concentration))


def events_reject(counts: IntArray) -> BoolArray:
    """Whether equal rates are rejected on counts (paths, looks, 2) under equal shares; per look."""
    evidence = _determined(event_counts(counts, [0.5, 0.5], alpha=ALPHA, concentration=10.0))
    return np.asarray(np.asarray(evidence.log_e) >= -math.log(ALPHA))


def _determined(evidence: EventCounts | Undetermined) -> EventCounts:
    if isinstance(evidence, Undetermined):
        raise TypeError("arrays of looks are determined element by element")
    return evidence
