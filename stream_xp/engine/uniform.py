"""The uniform slice as an experiment of its own: units drawn evenly whatever the evidence says.

Exposures tell who is in it, by a value of a registered segment, so its sums stand apart in the statistics. Inside it
the open arms have equal weights in every weight epoch and context. So all epochs with the same open arms are one
stratum, in which every unit was assigned by the same draw: neither a baseline that drifts nor weights that follow
outcomes have a part in its estimates.

What is found informs and never decides. Its levels are its own: `alpha` is split evenly over metrics and treatments.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from stream_xp import stats
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, MetricKind, WeightEpoch
from stream_xp.domain.rollout import UNIFORM, Allocation
from stream_xp.domain.statistics import ALL, ExperimentStatistics, merge
from stream_xp.engine.design import Plan, Test, pair_sample, plans

_TABLES = ("units", "moments", "products", "events", "histograms")


def uniform_look(
    record: ExperimentRecord, statistics: ExperimentStatistics
) -> tuple[ExperimentRecord, ExperimentStatistics] | None:
    """The slice as if it were all units: a record with even weights, and its rows; None without a told slice.

    Units of a weight epoch that the record does not know yet are left out until it does.
    """
    allocation = record.spec.allocation
    if allocation is None or allocation.uniform_segment is None:
        return None
    label = f"{allocation.uniform_segment}={UNIFORM}"
    first = _first_epochs(record)
    rows: dict[str, Any] = {
        name: tuple(
            msgspec.structs.replace(row, segment=ALL, epoch=first[row.epoch])
            for row in getattr(statistics, name)
            if row.segment == label and row.epoch in first
        )
        for name in _TABLES
    }
    spec = msgspec.structs.replace(record.spec, segments={}, allocation=None)
    epochs = tuple(_even(epoch) for epoch in record.epochs if epoch.epoch in first.values())
    # Rows of several epochs have one key now; merging adds them up.
    return msgspec.structs.replace(record, spec=spec, epochs=epochs), merge([ExperimentStatistics(**rows)])


def _first_epochs(record: ExperimentRecord) -> dict[int, int]:
    """Of each weight epoch, the first one with the same open arms; none draws from a final epoch."""
    known: dict[frozenset[str], int] = {}
    return {
        epoch.epoch: known.setdefault(_open_arms(epoch), epoch.epoch)
        for epoch in record.epochs
        if not epoch.final
    }


def _open_arms(epoch: WeightEpoch) -> frozenset[str]:
    return frozenset(arm for arm, weight in epoch.weights.items() if weight > 0)


def _even(epoch: WeightEpoch) -> WeightEpoch:
    opened = _open_arms(epoch)
    weights = {arm: 1 / len(opened) if arm in opened else 0.0 for arm in epoch.weights}
    return msgspec.structs.replace(epoch, weights=weights, contexts={})


def uniform_plans(record: ExperimentRecord) -> list[Plan]:
    """The two-sided test of each metric in the slice, tuned to the part of the planned sample that is in it."""
    spec, allocation = record.spec, record.spec.allocation
    if allocation is None:
        return []
    return [_sliced(spec, allocation, plan) for plan in plans(record)]


def _sliced(spec: ExperimentSpec, allocation: Allocation, plan: Plan) -> Plan:
    parts = len(plan.metric.tested_quantiles) if plan.metric.kind is MetricKind.LATENCY else 1
    alpha = spec.alpha / (len(spec.metrics) * len(spec.treatments) * parts)
    sample = pair_sample(spec) * allocation.uniform_slice
    plain = plan._replace(harm=None, safety=None, pair_sample=sample, standard_error=False)
    try:
        test = Test(alpha, stats.tuned_rho2(sample, alpha), -math.log(alpha))
    except ValueError as error:
        return plain._replace(fault=plan.fault or str(error))
    return plain._replace(effect=test, segment=test)
