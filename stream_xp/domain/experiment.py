"""The experiment: arms, metrics, error budget and plan, frozen before the first look."""

from __future__ import annotations

import hashlib
import math
from enum import StrEnum
from typing import Annotated

import msgspec

# `$` alone also matches before a newline at the end; `(?!\n)$` does not, in Python and in JSON Schema alike.
Key = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}(?!\n)$",
        description="1 to 100 letters, digits, dots, underscores and hyphens, a letter or digit first",
    ),
]
EventName = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Duration = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[0-9]{1,9}(ms|s|m|h|d|w)(?!\n)$",
        description="a whole number and a unit, such as 250ms, 2s, 30m, 24h, 7d, 2w",
    ),
]
Probability = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Weight = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]

MAX_STEPS = 2**40
"""Largest bound / scale: one reward's quantised value, so that a unit's exact sum stays below 2**62."""

MAX_SEGMENTS = 32
OTHER = "other"
"""The segment value of units whose value is missing or not registered."""

_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}


def duration_ms(duration: str) -> int:
    """Milliseconds of a duration such as ``250ms``, ``2s``, ``30m``, ``24h``, ``7d``, ``2w``."""
    digits = duration.rstrip("smhdw")
    return int(digits) * _MS[duration[len(digits) :]]


class MetricKind(StrEnum):
    """What a unit's value is: conversion 0 or 1, mean a number."""

    CONVERSION = "conversion"
    MEAN = "mean"


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


class Metric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measured outcome of a unit.

    Attributes:
        key: name of the metric in this experiment.
        kind: conversion or mean.
        role: primary, secondary or guardrail.
        direction: the direction that is good.
        attribution_window: rewards in [t0, t0 + window) count, t0 the unit's first exposure.
        event: the reward's `metric` this listens to; absent: `key`.
        aggregation: any, sum, last or max; absent: any for conversion, sum for mean.
        scale: value of one quantisation step, metric units.
        bound: largest |value| of one reward that is accepted, metric units; required for a mean.
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
    minimum_effect: Threshold | None = None
    margin: Threshold | None = None
    critical: bool = False

    @property
    def listens_to(self) -> str:
        """The reward event name that reaches this metric."""
        return self.event or self.key

    @property
    def window_ms(self) -> int:
        """Attribution window in milliseconds."""
        return duration_ms(self.attribution_window)

    @property
    def folds_by(self) -> Aggregation:
        """The aggregation in force."""
        if self.kind is MetricKind.CONVERSION:
            return Aggregation.ANY
        return self.aggregation or Aggregation.SUM

    @property
    def step(self) -> float:
        """Value of one quantisation step, metric units."""
        return 1.0 if self.folds_by is Aggregation.ANY else (self.scale or 1.0)

    @property
    def max_steps(self) -> int:
        """Largest |quantised value| of one reward."""
        if self.folds_by is Aggregation.ANY:
            return MAX_STEPS
        bound = self.bound or 1.0
        steps = math.floor(bound / self.step)
        # A bound of whole steps keeps its last one although 0.3 / 0.1 is 2.9999… in binary.
        return steps + ((steps + 1) * self.step <= bound * (1 + 1e-15))


class ExperimentSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One experiment or rollout, as written in its YAML file.

    `rules()` lists what the types alone cannot say; `validate` reports all of them with their lines.

    Attributes:
        alpha: error budget of shipping, split over primary metrics and treatment arms (two-sided).
        guardrail_alpha: error budget of stopping on harm, split over guardrails and treatment arms (one-sided).
        sample_ratio_alpha: error level of the sample-ratio test.
        planned_sample: units of all arms at which the sequences are tuned to be narrowest.
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

    def with_role(self, role: Role) -> tuple[Metric, ...]:
        """The metrics of one role, in the order of the file."""
        return tuple(metric for metric in self.metrics if metric.role is role)

    def design_hash(self) -> str:
        """Hash of all that is frozen before the first look: everything but weights and prose."""
        frozen = msgspec.structs.replace(
            self,
            owner="-",
            hypothesis="-",
            arms=tuple(msgspec.structs.replace(arm, weight=0.0) for arm in self.arms),
        )
        return hashlib.sha256(msgspec.json.encode(frozen, order="deterministic")).hexdigest()


class Fault(msgspec.Struct, frozen=True):
    """One broken rule of a spec: where (path of field names and list positions) and what."""

    path: tuple[str | int, ...]
    message: str


def rules(spec: ExperimentSpec) -> list[Fault]:
    """Every rule that a well-typed spec breaks, in the order of the file."""
    return [
        *_arm_faults(spec),
        *_metric_list_faults(spec),
        *_segment_faults(spec),
        *_budget_faults(spec),
        *_runtime_faults(spec),
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
        faults += [Fault(("metrics", index, field), message) for field, message in _metric_faults(metric)]
    return faults


def _metric_faults(metric: Metric) -> list[tuple[str, str]]:
    checks = [
        (metric.window_ms == 0, "attribution_window", "must be longer than 0"),
        (metric.role is Role.GUARDRAIL and metric.margin is None, "role", "a guardrail needs a margin"),
        (
            metric.role is not Role.GUARDRAIL and metric.margin is not None,
            "margin",
            "only a guardrail has a margin",
        ),
        (
            metric.role is not Role.GUARDRAIL and metric.critical,
            "critical",
            "only a guardrail can be critical",
        ),
        (
            metric.role is Role.GUARDRAIL and metric.minimum_effect is not None,
            "minimum_effect",
            "a guardrail has a margin, not a minimum effect",
        ),
        (
            metric.margin is not None
            and metric.role is Role.GUARDRAIL
            and metric.direction is Direction.INCREASE
            and (metric.margin.relative or 0.0) >= 1.0,
            "margin",
            "a relative margin of 1 or more allows the metric to vanish",
        ),
        (metric.kind is MetricKind.MEAN and metric.bound is None, "kind", "a mean needs a bound"),
        (
            metric.kind is MetricKind.CONVERSION and metric.aggregation not in (None, Aggregation.ANY),
            "aggregation",
            "a conversion folds by any",
        ),
        (
            metric.kind is MetricKind.CONVERSION and metric.scale not in (None, 1.0),
            "scale",
            "a conversion has scale 1",
        ),
        (
            metric.kind is MetricKind.CONVERSION and metric.bound not in (None, 1.0),
            "bound",
            "a conversion has bound 1",
        ),
    ]
    return [(field, message) for broken, field, message in checks if broken] + _step_faults(metric)


def _step_faults(metric: Metric) -> list[tuple[str, str]]:
    if metric.kind is not MetricKind.MEAN or metric.bound is None or metric.folds_by is Aggregation.ANY:
        return []
    steps = metric.bound / metric.step
    if steps < 1:
        return [("bound", "must be at least one scale step")]
    if not 1e-100 <= metric.step <= 1e100:
        return [("scale", "must be from 1e-100 to 1e100")]
    if steps > MAX_STEPS:
        return [("scale", f"bound / scale must be at most 2**40, it is {steps:.3g}")]
    return []


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
    """

    epoch: int
    weights: dict[str, Weight]
    effective_ms: int


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


def _epoch_faults(record: ExperimentRecord) -> list[str]:
    arms = {arm.key for arm in record.spec.arms}
    found = []
    if not record.epochs or [epoch.epoch for epoch in record.epochs] != list(range(len(record.epochs))):
        found.append("epochs must be numbered 0, 1, 2, … without a hole, and there must be one")
    found += [
        f"the weights of epoch {epoch.epoch} must name every arm and sum to 1"
        for epoch in record.epochs
        if set(epoch.weights) != arms or abs(math.fsum(epoch.weights.values()) - 1.0) > 1e-9
    ]
    return found
