"""Adaptive traffic weights: from each arm's evidence to the shares of the next weight epoch. Pure; nothing is drawn."""

from stream_xp.engine.allocation.allocate import Allocation, ContextAllocation, allocate
from stream_xp.engine.allocation.best import MAX_ARMS, Ranking, ranking
from stream_xp.engine.allocation.constraints import BurnIn, Constraints, default_floor, moved
from stream_xp.engine.allocation.delays import delayed_evidence
from stream_xp.engine.allocation.evidence import Conversions, Evidence, Values
from stream_xp.engine.allocation.maturity import (
    MaturityCurve,
    OpenUnits,
    learned_curve,
    mature_conversions,
    mature_values,
)
from stream_xp.engine.allocation.policies import Policy
from stream_xp.engine.allocation.posterior import Prior, learned_prior, score_line, score_priors
from stream_xp.engine.allocation.rows import evidence_of

__all__ = [
    "MAX_ARMS",
    "Allocation",
    "BurnIn",
    "Constraints",
    "ContextAllocation",
    "Conversions",
    "Evidence",
    "MaturityCurve",
    "OpenUnits",
    "Policy",
    "Prior",
    "Ranking",
    "Values",
    "allocate",
    "default_floor",
    "delayed_evidence",
    "evidence_of",
    "learned_curve",
    "learned_prior",
    "mature_conversions",
    "mature_values",
    "moved",
    "ranking",
    "score_line",
    "score_priors",
]
