"""The experiment: arms, metrics, error budget and plan, frozen before the first look."""

from __future__ import annotations

import hashlib
import math
from enum import StrEnum
from typing import Annotated

import msgspec

from stream_xp.domain.ages import Ages
from stream_xp.domain.buckets import kept_buckets
from stream_xp.domain.fields import Duration, EventName, Key, Positive, Probability, Weight, duration_ms
from stream_xp.domain.layers import Champion, Layer, Overlap
from stream_xp.domain.rollout import Allocation, Conclusion, Monitors, Ramp

MAX_STEPS = 2**40
"""Largest bound / scale: one reward's quantised value, so that a unit's exact sum stays below 2**62."""

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
        return self.aggregation or FOLDS[self.kind][0]

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


FOLDS = {
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
