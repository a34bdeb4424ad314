"""Do two experiments on the same units interact? From the cells of their common units to evidence.

`stats.interaction` tests one table. Here the tables of many pairs become one family: the e-value of a pair is the mean
over its tables and their pairs of treatment arms, which tests "nothing of these interacts" whatever their dependence,
and e-Holm over the pairs of experiments keeps the chance of any wrong one at alpha, at every look.

The tuning of each sequence follows from the two designs alone, so it is frozen with them. The level of the intervals
is alpha over all that are shown, so they hold together; it follows which experiments run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.special import logsumexp

from stream_xp.domain.experiment import ExperimentSpec, Metric
from stream_xp.stats.batch import REASONS, EvidenceArrays, MomentArrays
from stream_xp.stats.interaction import InteractionArrays, interaction, interaction_means
from stream_xp.stats.multiplicity import e_holm
from stream_xp.stats.normal_mixture import tuned_rho2

TUNED_AT = 0.05
"""Level at which the sequences are tuned, whatever level is asked for: a tuning may not follow the data."""

CellKey: TypeAlias = tuple[str, str, int, int]
"""Arm of the first and of the second experiment, weight epoch of the first and of the second."""
Sums: TypeAlias = tuple[int, int, int]
"""Units, and the sums of their values and squared values in steps."""


class Table(NamedTuple):
    """The common units of two experiments by both arms, measured by a metric of one of them.

    Attributes:
        first, second: the two designs.
        metric: a conversion or a mean; its step is that of the sums.
        cells: of units whose windows in both are over.
    """

    first: ExperimentSpec
    second: ExperimentSpec
    metric: Metric
    cells: Mapping[CellKey, Sums]


class Interaction(NamedTuple):
    """One pair of treatment arms, each against the control of its experiment.

    Attributes:
        units: of the four cells.
        estimate, lower, upper: difference of differences, metric units; None while undetermined.
        log_e: natural logarithm of the e-value against no interaction; 0 while undetermined.
        note: why it is undetermined, if it is.
    """

    first_arm: str
    second_arm: str
    units: int
    estimate: float | None
    lower: float | None
    upper: float | None
    log_e: float
    note: str | None


class PairEvidence(NamedTuple):
    """All that is known of one pair of experiments.

    Attributes:
        tables: the pairs of arms of each of its tables, in the order given.
        log_e: of the pair; log_adjusted: by e-Holm over all pairs.
        found: whether it is proven that something interacts.
    """

    tables: tuple[tuple[Interaction, ...], ...]
    log_e: float
    log_adjusted: float
    found: bool


def interactions(pairs: Sequence[Sequence[Table]], *, alpha: float) -> list[PairEvidence]:
    """Test the pairs of experiments as one family.

    Args:
        pairs: the tables of each pair; one without a table takes part with an e-value of 1.
        alpha: family-wise error level, in (0, 1).

    Source:
        Vovk and Wang (2021), Annals of Statistics 49(3), 1736-1754: averages of e-values, and algorithm 1 (e-Holm).
    """
    if not pairs:
        return []
    shown = sum(len(_arm_pairs(table)) for tables in pairs for table in tables)
    tested = [[_tested(table, alpha / shown) for table in tables] for tables in pairs]
    log_e = [_mean_log_e(tables) for tables in tested]
    verdict = e_holm(np.array(log_e), alpha=alpha)
    return [
        PairEvidence(tuple(map(tuple, tables)), of_pair, float(adjusted), found=bool(rejected))
        for tables, of_pair, adjusted, rejected in zip(
            tested, log_e, verdict.log_adjusted, verdict.rejected, strict=True
        )
    ]


def _mean_log_e(tables: Sequence[Sequence[Interaction]]) -> float:
    values = [one.log_e for table in tables for one in table]
    return float(logsumexp(values) - math.log(len(values))) if values else 0.0


def _arms(spec: ExperimentSpec) -> list[str]:
    return [spec.control.key, *(arm.key for arm in spec.treatments)]


def _arm_pairs(table: Table) -> list[tuple[str, str]]:
    return [(a.key, b.key) for a in table.first.treatments for b in table.second.treatments]


def _planned_units(table: Table) -> float:
    """Units of four cells by when the smaller of both experiments has its planned sample, at even shares."""
    planned = min(table.first.planned_sample, table.second.planned_sample)
    return planned * (2 / len(table.first.arms)) * (2 / len(table.second.arms))


def _tested(table: Table, alpha: float) -> list[Interaction]:
    found = interaction_means(_moments(table), scale=table.metric.step)
    evidence = interaction(found, alpha=alpha, rho2=tuned_rho2(_planned_units(table), TUNED_AT))
    columns = len(table.second.treatments)
    return [
        _interaction(pair, found, evidence=evidence, at=divmod(at, columns))
        for at, pair in enumerate(_arm_pairs(table))
    ]


def _interaction(
    arms: tuple[str, str], found: InteractionArrays, *, evidence: EvidenceArrays, at: tuple[int, int]
) -> Interaction:
    reason = int(found.reason[at])
    determined = reason == 0
    return Interaction(
        *arms,
        units=int(found.n[at]),
        estimate=float(evidence.estimate[at]) if determined else None,
        lower=float(evidence.lower[at]) if determined else None,
        upper=float(evidence.upper[at]) if determined else None,
        log_e=float(evidence.log_e[at]),
        note=None if determined else REASONS[reason],
    )


def _moments(table: Table) -> MomentArrays:
    """The cells as (r, c, E), the controls first; a stratum is a pair of weight epochs."""
    strata = sorted({(first, second) for _, _, first, second in table.cells}) or [(0, 0)]
    cells = [
        [[table.cells.get((a, b, *stratum), (0, 0, 0)) for stratum in strata] for b in _arms(table.second)]
        for a in _arms(table.first)
    ]
    return MomentArrays(*([[[sums[k] for sums in row] for row in rows] for rows in cells] for k in range(3)))  # type: ignore[arg-type]
