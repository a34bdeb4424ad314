"""Rules across fields of an experiment: of its spec, and of its record with all weight epochs."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from stream_xp.domain.ages import age_faults
from stream_xp.domain.delays import delay_faults
from stream_xp.domain.experiment import (
    FOLDS,
    MAX_STEPS,
    OTHER,
    Adjustment,
    Aggregation,
    Direction,
    MetricKind,
    Role,
    Threshold,
)
from stream_xp.domain.fields import Fault, broken, duration_ms
from stream_xp.domain.layer_rules import layer_faults
from stream_xp.domain.rollout_rules import rollout_faults
from stream_xp.domain.statistics_size import (
    MAX_HISTOGRAM_CELLS,
    MAX_STATISTICS_BYTES,
    histogram_cells,
    most_epochs,
    row_bytes,
)

if TYPE_CHECKING:
    from stream_xp.domain.experiment import (
        Denominator,
        ExperimentRecord,
        ExperimentSpec,
        Metric,
        WeightEpoch,
    )

MAX_SEGMENTS = 32


def rules(spec: ExperimentSpec) -> list[Fault]:
    """Every rule that a well-typed spec breaks, in the order of the file."""
    return [
        *_arm_faults(spec),
        *_metric_list_faults(spec),
        *_histogram_faults(spec),
        *_row_faults(spec),
        *_segment_faults(spec),
        *_covariate_faults(spec),
        *_budget_faults(spec),
        *_runtime_faults(spec),
        *rollout_faults(spec),
        *layer_faults(spec),
        *age_faults(spec),
        *delay_faults(spec),
    ]


def _arm_faults(spec: ExperimentSpec) -> list[Fault]:
    faults = _repeated([arm.key for arm in spec.arms], "arms", "key")
    controls = sum(arm.control for arm in spec.arms)
    if controls != 1:
        faults.append(Fault(("arms",), f"exactly one arm must have control: true, found {controls}"))
    total = math.fsum(arm.weight for arm in spec.arms)
    if abs(total - 1.0) > 1e-9:
        faults.append(Fault(("arms",), f"weights must sum to 1, they sum to {total:.12g}"))
    return faults


def _metric_list_faults(spec: ExperimentSpec) -> list[Fault]:
    faults = _repeated([metric.key for metric in spec.metrics], "metrics", "key")
    if not any(metric.role in (Role.PRIMARY, Role.GUARDRAIL) for metric in spec.metrics):
        faults.append(
            Fault(("metrics",), "at least one metric must be primary or guardrail, or nothing can be decided")
        )
    for index, metric in enumerate(spec.metrics):
        found = [
            *_role_faults(metric),
            *_kind_faults(metric),
            *_size_faults(metric),
            *_adjustment_faults(spec, metric),
        ]
        faults += [Fault(("metrics", index, field), message) for field, message in found]
        faults += [
            Fault(("metrics", index, "denominator", field), message)
            for field, message in _denominator_faults(metric.denominator)
        ]
    return faults


def _role_faults(metric: Metric) -> list[tuple[str, str]]:
    guardrail = metric.role is Role.GUARDRAIL
    margin = metric.margin or Threshold(absolute=1.0)
    return broken(
        (metric.window_ms == 0, "attribution_window", "must be longer than 0"),
        (guardrail and metric.margin is None, "role", "a guardrail needs a margin"),
        (not guardrail and metric.margin is not None, "margin", "only a guardrail has a margin"),
        (not guardrail and metric.critical, "critical", "only a guardrail can be critical"),
        (
            guardrail and metric.minimum_effect is not None,
            "minimum_effect",
            "a guardrail has a margin, not a minimum effect",
        ),
        (
            guardrail and metric.direction is Direction.INCREASE and (margin.relative or 0.0) >= 1.0,
            "margin",
            "a relative margin of 1 or more allows the metric to vanish",
        ),
        (
            guardrail
            and metric.kind is MetricKind.COUNT
            and metric.at_once
            and metric.margin is not None
            and metric.margin.relative is None,
            "margin",
            "a count that folds by first needs a relative margin, its effect is a ratio of rates",
        ),
    )


def _kind_faults(metric: Metric) -> list[tuple[str, str]]:
    kind = metric.kind
    known = [aggregation.value for aggregation in FOLDS[kind]]
    listed = " or ".join([", ".join(known[:-1]), known[-1]] if known[1:] else known)
    quantiles = metric.quantiles or ()
    return broken(
        (
            metric.aggregation is not None and metric.aggregation not in FOLDS[kind],
            "aggregation",
            f"a {kind} folds by {listed}",
        ),
        (kind is MetricKind.RATIO and metric.denominator is None, "kind", "a ratio needs a denominator"),
        (
            kind is not MetricKind.RATIO and metric.denominator is not None,
            "denominator",
            "only a ratio has a denominator",
        ),
        (
            kind is not MetricKind.LATENCY and metric.quantiles is not None,
            "quantiles",
            "only a latency has quantiles",
        ),
        (
            any(low >= high for low, high in itertools.pairwise(quantiles)),
            "quantiles",
            "must grow from one to the next",
        ),
    )


def _size_faults(metric: Metric) -> list[tuple[str, str]]:
    kind = metric.kind
    counts = kind is MetricKind.COUNT
    faults = broken(
        (
            kind in (MetricKind.MEAN, MetricKind.RATIO, MetricKind.LATENCY) and metric.bound is None,
            "kind",
            f"a {kind} needs a bound",
        ),
        (kind is MetricKind.LATENCY and metric.scale is None, "kind", "a latency needs a scale"),
        (
            kind is MetricKind.CONVERSION and metric.scale not in (None, 1.0),
            "scale",
            "a conversion has scale 1",
        ),
        (
            kind is MetricKind.CONVERSION and metric.bound not in (None, 1.0),
            "bound",
            "a conversion has bound 1",
        ),
        (counts and metric.scale is not None, "scale", "a count has no scale, it counts events"),
        (counts and metric.bound is not None, "bound", "a count has no bound, it counts events"),
    )
    if metric.bounded and metric.bound is not None:
        faults += _step_faults(metric.step, metric.bound)
    return faults


def _adjustment_faults(spec: ExperimentSpec, metric: Metric) -> list[tuple[str, str]]:
    adjusted = metric.adjustment is not Adjustment.NONE
    return broken(
        (
            adjusted and metric.kind not in (MetricKind.CONVERSION, MetricKind.MEAN),
            "adjustment",
            "only a conversion or a mean can be adjusted",
        ),
        (adjusted and spec.covariate is None, "adjustment", "needs the experiment's covariate"),
    )


def _denominator_faults(denominator: Denominator | None) -> list[tuple[str, str]]:
    if denominator is None:
        return []
    counted = not denominator.bounded
    faults = broken(
        (
            denominator.aggregation is Aggregation.FIRST,
            "aggregation",
            "a ratio folds by sum, last, max or any",
        ),
        (denominator.bounded and denominator.bound is None, "bound", "required unless it folds by any"),
        (counted and denominator.scale not in (None, 1.0), "scale", "what folds by any has scale 1"),
        (counted and denominator.bound not in (None, 1.0), "bound", "what folds by any has bound 1"),
    )
    if denominator.bounded and denominator.bound is not None:
        faults += _step_faults(denominator.step, denominator.bound)
    return faults


def _covariate_faults(spec: ExperimentSpec) -> list[Fault]:
    covariate = spec.covariate
    if covariate is None:
        return []
    faults = _step_faults(covariate.scale, covariate.bound) + broken(
        (not abs(covariate.missing) <= covariate.bound, "missing", "must lie within the bound"),
    )
    return [Fault(("covariate", field), message) for field, message in faults]


def _step_faults(step: float, bound: float) -> list[tuple[str, str]]:
    steps = bound / step
    if steps < 1:
        return [("bound", "must be at least one scale step")]
    if not 1e-100 <= step <= 1e100:
        return [("scale", "must be from 1e-100 to 1e100")]
    if steps > MAX_STEPS:
        return [("scale", f"bound / scale must be at most 2**40, it is {steps:.3g}")]
    return []


def _histogram_faults(spec: ExperimentSpec) -> list[Fault]:
    latencies = [metric for metric in spec.metrics if metric.kind is MetricKind.LATENCY]
    cells = histogram_cells(spec, [metric for metric in latencies if not _size_faults(metric)])
    if cells <= MAX_HISTOGRAM_CELLS:
        return []
    rule = f"all latencies together may have {MAX_HISTOGRAM_CELLS} bins over all arms and segments"
    return [Fault(("metrics",), f"{rule}, they have {cells}; a larger scale or a smaller bound has fewer")]


def _row_faults(spec: ExperimentSpec) -> list[Fault]:
    size = row_bytes(spec)
    if size <= MAX_STATISTICS_BYTES:
        return []
    rule = f"the rows of one weight epoch may have {MAX_STATISTICS_BYTES} bytes in a record, they have {size}"
    return [
        Fault(("metrics",), f"{rule}; fewer arms, metrics or segment values, or shorter names, have fewer")
    ]


def _segment_faults(spec: ExperimentSpec) -> list[Fault]:
    """A unit's segments are kept as one number, a digit for each; every combination must have its own."""
    combinations = math.prod(len(values) + 1 for values in spec.segments.values())
    faults = [
        Fault(("segments", name, at), f"{value!r} is used twice or reserved")
        for name, values in spec.segments.items()
        for at, value in enumerate(values)
        if value in values[:at] or value == OTHER
    ]
    if len(spec.segments) > MAX_SEGMENTS or combinations >= 2**31:
        rule = f"at most {MAX_SEGMENTS} segments with fewer than 2**31 combinations of values and `{OTHER}`"
        faults.append(Fault(("segments",), f"{rule}, found {len(spec.segments)} with {combinations}"))
    return faults


def _budget_faults(spec: ExperimentSpec) -> list[Fault]:
    """A one-sided sequence is tuned at twice its level, which must stay below 1."""
    guardrails = len(spec.with_role(Role.GUARDRAIL))
    if not guardrails:
        return []
    checks = [
        (spec.alpha >= 0.5, "alpha", "with a guardrail it must be below 0.5"),
        (
            spec.guardrail_alpha / (guardrails * max(1, len(spec.treatments))) >= 0.5,
            "guardrail_alpha",
            "divided by guardrails and treatment arms it must be below 0.5",
        ),
    ]
    return [Fault((field,), message) for broken, field, message in checks if broken]


def _runtime_faults(spec: ExperimentSpec) -> list[Fault]:
    if spec.maximum_runtime is None or duration_ms(spec.maximum_runtime) > duration_ms(spec.minimum_runtime):
        return []
    return [Fault(("maximum_runtime",), "must be longer than minimum_runtime")]


def _repeated(keys: list[str], where: str, field: str) -> list[Fault]:
    return [
        Fault((where, index, field), f"{key!r} is used twice")
        for index, key in enumerate(keys)
        if key in keys[:index]
    ]


def record_rules(record: ExperimentRecord, experiment: str) -> list[str]:
    """Every rule that a well-typed record under the key `experiment` breaks."""
    found = [fault.message for fault in rules(record.spec)]
    if record.spec.experiment != experiment:
        found.append(f"key is {experiment!r}, the spec is of {record.spec.experiment!r}")
    if record.design_hash != record.spec.design_hash():
        found.append("design_hash is not that of the spec")
    return found + _epoch_faults(record)


_EPOCHS_ADVICE = (
    "that a version with these arms, metrics and segments can have: raise `version` to start again, "
    "or change weights less often; fewer metrics or segments leave room for more"
)


def _epoch_faults(record: ExperimentRecord) -> list[str]:
    arms = {arm.key for arm in record.spec.arms}
    found = []
    if not record.epochs or [epoch.epoch for epoch in record.epochs] != list(range(len(record.epochs))):
        found.append("epochs must be numbered 0, 1, 2, … without a hole, and there must be one")
    most = max(1, most_epochs(record.spec))
    if len(record.epochs) > most:
        found.append(f"{len(record.epochs)} weight epochs are more than the {most} {_EPOCHS_ADVICE}")
    for epoch in record.epochs:
        found += _weight_faults(epoch, arms) + _context_faults(epoch, record.spec)
    return found


def _weight_faults(epoch: WeightEpoch, arms: set[str]) -> list[str]:
    tables = {f"epoch {epoch.epoch}": epoch.weights}
    tables |= {f"epoch {epoch.epoch} in {value!r}": weights for value, weights in epoch.contexts.items()}
    found = [
        f"the weights of {where} must name every arm and sum to 1"
        for where, weights in tables.items()
        if set(weights) != arms or abs(math.fsum(weights.values()) - 1.0) > 1e-9
    ]
    if epoch.final and (epoch.contexts or max(epoch.weights.values(), default=0.0) != 1.0):
        found.append(f"epoch {epoch.epoch} is final, so one arm must have weight 1, and no context others")
    return found


def _context_faults(epoch: WeightEpoch, spec: ExperimentSpec) -> list[str]:
    context = None if spec.allocation is None else spec.allocation.context
    values = {*spec.segments.get(context, ()), OTHER} if context is not None else set()
    return [
        f"epoch {epoch.epoch} has weights of {value!r}, which is no value of the context"
        for value in epoch.contexts
        if value not in values
    ]
