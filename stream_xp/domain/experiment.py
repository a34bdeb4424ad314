"""The experiment: arms, metrics, error budget and plan, frozen before the first look."""

from __future__ import annotations

import hashlib
import itertools
import math
from enum import StrEnum
from typing import Annotated

import msgspec

from stream_xp.domain.ages import Ages, age_faults
from stream_xp.domain.buckets import kept_buckets
from stream_xp.domain.delays import delay_faults
from stream_xp.domain.fields import (
    Duration,
    EventName,
    Fault,
    Key,
    Positive,
    Probability,
    Weight,
    broken,
    duration_ms,
)
from stream_xp.domain.layer_rules import layer_faults
from stream_xp.domain.layers import Champion, Layer, Overlap
from stream_xp.domain.rollout import Allocation, Conclusion, Monitors, Ramp
from stream_xp.domain.rollout_rules import rollout_faults

MAX_STEPS = 2**40
"""Largest bound / scale: one reward's quantised value, so that a unit's exact sum stays below 2**62."""

MAX_HISTOGRAM_CELLS = 2**17
"""Histogram bins of one weight epoch, all arms and segments: filled to the last, they still fit one record."""

MAX_STATISTICS_BYTES = 1_000_000
"""Rows of a statistics record; the topic takes 1 MiB, and the record has more than its rows."""

MAX_WEIGHT_EPOCHS = 4096
"""Of one version, however small its rows: two weeks of weights that change every five minutes.

Each costs a stratum in every evaluation and a line in every record of the experiment (docs/semantics.md).
"""

METHODS = 3
"""Version of the table that chooses methods and of all their constants; part of every design hash.

It rises whenever a released method, a constant of one, or the choice changes: an experiment that began under the
one cannot go on under the other, because both error levels would be spent.
"""

_LATER_FIELDS = (
    "conclusion",
    "ramp",
    "allocation",
    "monitors",
    "layer",
    "overlap",
    "holdout",
    "program",
    "champion",
    "ages",
)
"""Fields of a spec that came after the first specs ran: where they are absent, the design is what it was."""

_LATER_ALLOCATION_FIELDS = ("delay", "uniform_segment")
"""The same of the section `allocation`."""

MAX_SEGMENTS = 32
OTHER = "other"
"""The segment value of units whose value is missing or not registered."""


class MetricKind(StrEnum):
    """What is measured: conversion 0 or 1, mean a number, ratio two numbers, count events, latency a distribution."""

    CONVERSION = "conversion"
    MEAN = "mean"
    RATIO = "ratio"
    COUNT = "count"
    LATENCY = "latency"


class Role(StrEnum):
    """What a metric may decide: primary ships, guardrail stops, secondary informs."""

    PRIMARY = "primary"
    SECONDARY = "secondary"
    GUARDRAIL = "guardrail"


class Direction(StrEnum):
    """The direction that is good."""

    INCREASE = "increase"
    DECREASE = "decrease"


class Aggregation(StrEnum):
    """How a unit's rewards inside the attribution window become its one value."""

    ANY = "any"
    SUM = "sum"
    LAST = "last"
    MAX = "max"
    FIRST = "first"


class Adjustment(StrEnum):
    """How a metric's effect is adjusted for the covariate: not, CUPED, or interacted ANCOVA."""

    NONE = "none"
    CUPED = "cuped"
    ANCOVA = "ancova"


class Threshold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A size of effect: exactly one of `absolute` (metric units) and `relative` (share of the control mean)."""

    absolute: Positive | None = None
    relative: Positive | None = None

    def __post_init__(self) -> None:
        if (self.absolute is None) == (self.relative is None):
            raise ValueError("give exactly one of absolute and relative")


class Arm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One alternative and its share of the traffic."""

    key: Key
    weight: Weight
    control: bool = False


class Denominator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a ratio divides by: a second value of each unit, from rewards in the same window.

    Attributes:
        event: the reward's `metric` this listens to; may be the one of the numerator.
        aggregation: any, sum, last or max.
        scale: value of one quantisation step, denominator units.
        bound: largest |value| of one reward that is accepted, denominator units; required unless it folds by any.
    """

    event: EventName
    aggregation: Aggregation = Aggregation.SUM
    scale: Positive | None = None
    bound: Positive | None = None

    @property
    def listens_to(self) -> str:
        """The reward event name that reaches this denominator."""
        return self.event

    @property
    def folds_by(self) -> Aggregation:
        """The aggregation in force."""
        return self.aggregation

    @property
    def bounded(self) -> bool:
        """Whether a reward's value is quantised and held against a bound, or only compared with 0."""
        return self.aggregation is not Aggregation.ANY

    @property
    def step(self) -> float:
        """Value of one quantisation step, denominator units."""
        return (self.scale or 1.0) if self.bounded else 1.0

    @property
    def max_steps(self) -> int:
        """Largest |quantised value| of one reward."""
        return _whole_steps(self.bound or 1.0, self.step) if self.bounded else MAX_STEPS


class Covariate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a unit before its exposure, such as its spending of the month before.

    It comes as `covariate` on the exposure, is quantised to whole steps and cut off at the bound: a covariate
    that is winsorised is another one that is fixed before the exposure, and so as valid for any adjustment.

    Attributes:
        scale: value of one quantisation step, covariate units.
        bound: largest |value|; what is beyond it counts as the bound.
        missing: value of an exposure without a covariate.
    """

    scale: Positive
    bound: Positive
    missing: float = 0.0

    @property
    def max_steps(self) -> int:
        """Largest |quantised value|."""
        return _whole_steps(self.bound, self.scale)


class Metric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measured outcome of a unit.

    Attributes:
        key: name of the metric in this experiment.
        kind: conversion, mean, ratio, count or latency.
        role: primary, secondary or guardrail.
        direction: the direction that is good.
        attribution_window: rewards in [t0, t0 + window) count, t0 the unit's first exposure.
        event: the reward's `metric` this listens to; absent: `key`.
        aggregation: any for a conversion; any, sum, last or max for mean and ratio (absent: sum); first or sum
            for a count; first, max or last for a latency (absent: first).
        scale: value of one quantisation step, metric units; required for a latency.
        bound: largest |value| of one reward that is accepted, metric units; required for mean, ratio and latency.
        denominator: what a ratio divides by; required there.
        quantiles: quantiles of a latency to compare; absent: 0.5, 0.9 and 0.99.
        adjustment: how the effect is adjusted for the covariate; conversions and means only.
        minimum_effect: the smallest effect worth shipping (primary, secondary).
        margin: the largest harm that is tolerable (guardrail; required there).
        critical: a guardrail that stops on any proven harm, not only on harm beyond its margin.
    """

    key: Key
    kind: MetricKind
    role: Role
    direction: Direction
    attribution_window: Duration
    event: EventName | None = None
    aggregation: Aggregation | None = None
    scale: Positive | None = None
    bound: Positive | None = None
    denominator: Denominator | None = None
    quantiles: Annotated[tuple[Probability, ...], msgspec.Meta(min_length=1, max_length=8)] | None = None
    adjustment: Adjustment = Adjustment.NONE
    minimum_effect: Threshold | None = None
    margin: Threshold | None = None
    critical: bool = False

    @property
    def listens_to(self) -> str:
        """The reward event name that reaches this metric; of a ratio, its numerator."""
        return self.event or self.key

    @property
    def window_ms(self) -> int:
        """Attribution window in milliseconds."""
        return duration_ms(self.attribution_window)

    @property
    def folds_by(self) -> Aggregation:
        """The aggregation in force; of a ratio, its numerator's."""
        if self.kind is MetricKind.CONVERSION:
            return Aggregation.ANY
        return self.aggregation or _FOLDS[self.kind][0]

    @property
    def bounded(self) -> bool:
        """Whether a reward's value is quantised and held against the bound, or only compared with 0."""
        return self.kind is not MetricKind.COUNT and self.folds_by is not Aggregation.ANY

    @property
    def at_once(self) -> bool:
        """Whether an event counts as soon as it is settled, and not when its unit's window is over."""
        return self.folds_by is Aggregation.FIRST

    @property
    def averaged(self) -> bool:
        """Whether arms are compared by the mean of one number per unit: of a conversion and a mean."""
        return self.kind in (MetricKind.CONVERSION, MetricKind.MEAN)

    @property
    def zero_or_one(self) -> bool:
        """Whether it is averaged and that number is 0 or 1."""
        return self.averaged and self.folds_by is Aggregation.ANY

    @property
    def step(self) -> float:
        """Value of one quantisation step, metric units."""
        return (self.scale or 1.0) if self.bounded else 1.0

    @property
    def max_steps(self) -> int:
        """Largest |quantised value| of one reward."""
        return _whole_steps(self.bound or 1.0, self.step) if self.bounded else MAX_STEPS

    @property
    def bins(self) -> int:
        """Bins of a latency's histogram: 32 of one step each, then 32 to each doubling (docs/semantics.md)."""
        doublings = max(0, self.max_steps.bit_length() - 6)
        return 32 * doublings + (self.max_steps >> doublings) + 1

    @property
    def tested_quantiles(self) -> tuple[float, ...]:
        """The quantiles of a latency that are compared."""
        return self.quantiles or (0.5, 0.9, 0.99)


_FOLDS = {
    MetricKind.CONVERSION: (Aggregation.ANY,),
    MetricKind.MEAN: (Aggregation.SUM, Aggregation.LAST, Aggregation.MAX, Aggregation.ANY),
    MetricKind.RATIO: (Aggregation.SUM, Aggregation.LAST, Aggregation.MAX, Aggregation.ANY),
    MetricKind.COUNT: (Aggregation.FIRST, Aggregation.SUM),
    MetricKind.LATENCY: (Aggregation.FIRST, Aggregation.MAX, Aggregation.LAST),
}
"""The aggregations that a kind of metric knows, its default first."""


def _whole_steps(bound: float, step: float) -> int:
    if bound / step > MAX_STEPS:
        return MAX_STEPS + 1  # One more than a spec may have; the quotient may be infinite.
    steps = math.floor(bound / step)
    # A bound of whole steps keeps its last one although 0.3 / 0.1 is 2.9999… in binary.
    return steps + ((steps + 1) * step <= bound * (1 + 1e-15))


class ExperimentSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One experiment or rollout, as written in its YAML file.

    `rules()` lists what the types alone cannot say; `validate` reports all of them with their lines.

    Attributes:
        alpha: error budget of shipping, split over primary metrics and treatment arms (two-sided).
        guardrail_alpha: error budget of stopping on harm, split over guardrails and treatment arms (one-sided).
        sample_ratio_alpha: error level of the sample-ratio test.
        planned_sample: units of all arms at which the sequences are tuned to be narrowest.
        covariate: what exposures tell of a unit from before; for metrics with an adjustment.
        conclusion: how it comes to its end; absent: by itself, always-valid, without futility.
        ramp: stages of its coverage; absent: all units from the start.
        allocation: weights that follow the evidence; absent: those of the file.
        monitors: what is watched beside metrics; absent: the defaults of `Monitors`.
        layer: the part of all units that it takes; absent: all of them.
        overlap: with whom it may share no unit; absent: with everybody.
        holdout: true for a holdout: its slots are held out of a program, and it measures the program.
        program: the holdout that it keeps away from.
        champion: the arm that shipped before, and is the control here.
        ages: metrics that are compared by the time since first exposure too; absent: none.
    """

    experiment: Key
    owner: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    hypothesis: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    unit: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    arms: Annotated[tuple[Arm, ...], msgspec.Meta(min_length=2, max_length=64)]
    metrics: Annotated[tuple[Metric, ...], msgspec.Meta(min_length=1, max_length=64)]
    planned_sample: Annotated[int, msgspec.Meta(ge=100, le=10**12)]
    version: Annotated[int, msgspec.Meta(ge=1, le=10**6)] = 1
    alpha: Probability = 0.05
    guardrail_alpha: Probability = 0.05
    sample_ratio_alpha: Probability = 0.001
    minimum_runtime: Duration = "0s"
    maximum_runtime: Duration | None = None
    segments: dict[
        Key,
        Annotated[
            tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=100)], ...],
            msgspec.Meta(min_length=1, max_length=64),
        ],
    ] = {}
    covariate: Covariate | None = None
    conclusion: Conclusion | None = None
    ramp: Ramp | None = None
    allocation: Allocation | None = None
    monitors: Monitors | None = None
    layer: Layer | None = None
    overlap: Overlap | None = None
    holdout: bool | None = None
    program: Key | None = None
    champion: Champion | None = None
    ages: Ages | None = None

    @property
    def control(self) -> Arm:
        """The baseline arm."""
        return next(arm for arm in self.arms if arm.control)

    @property
    def treatments(self) -> tuple[Arm, ...]:
        """Every arm but the control, in the order of the file."""
        return tuple(arm for arm in self.arms if not arm.control)

    @property
    def weights(self) -> dict[str, float]:
        """Arm key to share of the traffic."""
        return {arm.key: arm.weight for arm in self.arms}

    @property
    def primaries(self) -> tuple[Metric, ...]:
        """The metrics that ship."""
        return self.with_role(Role.PRIMARY)

    @property
    def guardrails(self) -> tuple[Metric, ...]:
        """The metrics that stop."""
        return self.with_role(Role.GUARDRAIL)

    @property
    def context_segments(self) -> tuple[str, ...]:
        """Of a contextual policy, the segments (``name=value``) of its context; they hold every unit once."""
        name = None if self.allocation is None else self.allocation.context
        return (
            ()
            if name is None
            else tuple(f"{name}={value}" for value in (*self.segments.get(name, ()), OTHER))
        )

    @property
    def uniform_segment(self) -> str | None:
        """The registered segment by which exposures of the uniform slice are told, if they are."""
        return None if self.allocation is None else self.allocation.uniform_segment

    @property
    def longest_window_ms(self) -> int:
        """How long after its first exposure a unit's rewards can count."""
        windows = [metric.window_ms for metric in self.metrics]
        return max([*windows, *(one.bucket.until_ms for one in kept_buckets(self))])

    def with_role(self, role: Role) -> tuple[Metric, ...]:
        """The metrics of one role, in the order of the file."""
        return tuple(metric for metric in self.metrics if metric.role is role)

    def design_hash(self) -> str:
        """Hash of all that is frozen before the first look: everything but weights and prose, and the methods."""
        frozen = msgspec.structs.replace(
            self,
            owner="-",
            hypothesis="-",
            arms=tuple(msgspec.structs.replace(arm, weight=0.0) for arm in self.arms),
        )
        # Names in an order of their own are put in order; fields keep that of the type.
        fields = msgspec.to_builtins(frozen, order="deterministic")
        for name in _LATER_FIELDS:
            if fields[name] is None:
                del fields[name]
        for name in _LATER_ALLOCATION_FIELDS if self.allocation is not None else ():
            if fields["allocation"][name] is None:
                del fields["allocation"][name]
        spec = msgspec.json.encode(fields)
        return hashlib.sha256(b"methods %d\n%b" % (METHODS, spec)).hexdigest()


def most_epochs(spec: ExperimentSpec) -> int:
    """How many weight epochs a version can have, so that its statistics in one partition stay one record.

    As many as fit if every row of every epoch is there and has large numbers.
    """
    return min(MAX_WEIGHT_EPOCHS, MAX_STATISTICS_BYTES // (row_bytes(spec) + _bin_bytes(spec)))


def row_bytes(spec: ExperimentSpec) -> int:
    """Bytes of one weight epoch in a statistics record, the bins of histograms left out."""
    labels = [f"{name}={value}" for name, values in spec.segments.items() for value in (*values, OTHER)]
    segments, segment_bytes = 1 + len(labels), sum(len(label.encode()) for label in labels)
    arms, arm_bytes = len(spec.arms), sum(len(arm.key) for arm in spec.arms)
    rows = [
        (0, 2 * _UNIT_DIGITS),
        *(row for metric in spec.metrics for row in _rows(metric)),
        *_bucket_rows(spec),
    ]
    keys = arms * segment_bytes + segments * arm_bytes
    return sum(keys + arms * segments * (key_bytes + _FRAME_BYTES + digits) for key_bytes, digits in rows)


_FRAME_BYTES = 24
"""Brackets, quotes and commas of a row, and its epoch."""
_UNIT_DIGITS = 8
_BIN_BYTES = 12


def _rows(metric: Metric) -> list[tuple[int, int]]:
    """Bytes of the metric's key, and digits of the numbers, in each row of one arm, epoch and segment."""
    key_bytes = len(metric.key)
    if metric.at_once or metric.kind is MetricKind.LATENCY:
        return [(key_bytes, 2 * _UNIT_DIGITS)]
    # Of a unit's value: that of a reward and three digits more, for the rewards that are added up.
    value = 1 if metric.kind is MetricKind.CONVERSION else 3 + len(str(metric.max_steps))
    value = 6 if metric.kind is MetricKind.COUNT else value
    rows = [(key_bytes, 3 * _UNIT_DIGITS + 3 * value)]
    if metric.kind is MetricKind.RATIO or metric.adjustment is not Adjustment.NONE:
        rows.append((key_bytes, 3 * _UNIT_DIGITS + 6 * value))
    return rows


def _bucket_rows(spec: ExperimentSpec) -> list[tuple[int, int]]:
    """The same of every bucket: its sums, and its products where it stands beside another."""
    found = []
    for one in kept_buckets(spec):
        (_, digits), *_ = _rows(one.metric)
        found.append((len(one.name), digits))
        if one.beside is not None:
            found.append((len(one.name), 2 * digits))
    return found


def _bin_bytes(spec: ExperimentSpec) -> int:
    """Bytes of the histograms of one weight epoch, every bin filled."""
    bins = sum(metric.bins for metric in spec.metrics if metric.kind is MetricKind.LATENCY)
    return (
        _BIN_BYTES * bins * len(spec.arms) * (1 + sum(len(values) + 1 for values in spec.segments.values()))
    )


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
    known = [aggregation.value for aggregation in _FOLDS[kind]]
    listed = " or ".join([", ".join(known[:-1]), known[-1]] if known[1:] else known)
    quantiles = metric.quantiles or ()
    return broken(
        (
            metric.aggregation is not None and metric.aggregation not in _FOLDS[kind],
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
    bins = [metric.bins for metric in latencies if not _size_faults(metric)]
    cells = sum(bins) * len(spec.arms) * (1 + sum(len(values) + 1 for values in spec.segments.values()))
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


class WeightEpoch(msgspec.Struct, frozen=True, kw_only=True):
    """A span of constant weights. Estimates never pool raw across epochs.

    Attributes:
        epoch: 0, 1, 2, …
        weights: arm key to share; sums to 1.
        effective_ms: event time from which assignment draws with these weights.
        coverage: share of all units that take part; the others get the control and are not exposed.
        contexts: of a contextual policy, value of the context segment to weights of its own; values that are not
            named here have `weights`.
        final: the experiment is over: all units get the arm of weight 1, and nothing is exposed any more.
        signal_id: the signal that made it so; None where `apply` did.
    """

    epoch: int
    weights: dict[str, Weight]
    effective_ms: int
    coverage: Weight = 1.0
    contexts: dict[str, dict[str, Weight]] = {}
    final: bool = False
    signal_id: str | None = None

    def weights_in(self, value: str) -> dict[str, float]:
        """The weights of units with this value of the context segment."""
        return self.contexts.get(value, self.weights)


class Status(StrEnum):
    """Whether the engine takes events for the experiment."""

    ACTIVE = "active"
    ARCHIVED = "archived"


class ExperimentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What stands on ``xp.experiments`` under the experiment's key: the spec and all its weight epochs."""

    spec: ExperimentSpec
    epochs: tuple[WeightEpoch, ...]
    design_hash: str
    status: Status = Status.ACTIVE
    schema: int = 1


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
