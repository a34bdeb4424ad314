"""What a memo holds; its JSON is these types, its Markdown is written from them."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from stream_xp.domain.decision import (
    Action,
    AgeResult,
    ArmResult,
    Evidence,
    LookTaken,
    Method,
    MetricState,
    PartitionOffsets,
    QuantileResult,
    SampleRatio,
    SegmentResult,
    ShrunkSegment,
    UniformSlice,
)
from stream_xp.domain.experiment import ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import Outcomes


class Force(StrEnum):
    """Where a decision stands now.

    in_force: it holds. waits: for a person. rejected: a person refused it. taken_back: by a reset, or by what was
    ordered instead.
    """

    IN_FORCE = "in_force"
    WAITS = "waits"
    REJECTED = "rejected"
    TAKEN_BACK = "taken_back"


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """The decision that the memo is about.

    Attributes:
        by: `the service`, or the person who ordered it.
        time: RFC 3339.
        approved_by: who approved a proposal; None where nobody had to, or has.
    """

    action: Action
    reason: str
    by: str
    signal_id: str
    source: str
    time: str
    force: Force
    arm: str | None = None
    metric: str | None = None
    proposed: bool = False
    approved_by: str | None = None


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the audit trail.

    Attributes:
        by: `the service` or a person.
        what: the action, `proposed` before it where it waited.
        about: arm, metric, stage or signal.
        nothing: why it changed nothing; None if it did.
    """

    time: str
    by: str
    what: str
    about: str
    reason: str
    id: str
    nothing: str | None = None


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A reason for which nothing could ship, over the looks that are known."""

    reason: str
    first_look: int
    last_look: int
    from_ms: int
    until_ms: int


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen by the decision.

    Attributes:
        look: of the result that the memo shows; known_looks: how many results of the version are still known.
        runtime_ms: watermark minus first exposure.
        watermark_ms: event time up to which it is complete.
    """

    look: int
    known_looks: int
    runtime_ms: int
    watermark_ms: int | None
    arms: tuple[ArmResult, ...]
    crossover_units: int
    sample_ratio: SampleRatio | None
    exposure_outcomes: Outcomes
    reward_outcomes: Outcomes
    invalid: tuple[str, ...]
    looks: tuple[LookTaken, ...] = ()
    evaluated_ms: int = 0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A look at one metric in one arm: units of the control and the arm, and the sequence by then."""

    look: int
    evaluated_ms: int
    units: int
    estimate: float
    lower: float | None
    upper: float | None


class PriorSource(StrEnum):
    """Where a prior comes from: learned from past experiments, or the default while too few are known."""

    LEARNED = "learned"
    DEFAULT = "default"


class Shrunk(msgspec.Struct, frozen=True, kw_only=True):
    """The effect after the winner's curse (docs/statistics.md), or why it is not given.

    Attributes:
        standard_error: of the raw estimate.
        experiments: past effects on the metric that are known, of other experiments.
        prior: where the prior of the true effects comes from, N(0, prior_sd^2); None where there is none.
        effect, sd: posterior mean and standard deviation. shrinkage: share of the estimate that survived.
        type_s: probability that the effect has not the sign of the estimate.
        type_m: expected exaggeration of its size.
        note: why there is no effect here, or what the default prior is.
    """

    experiments: int
    standard_error: float | None = None
    prior: PriorSource | None = None
    prior_sd: float | None = None
    effect: float | None = None
    sd: float | None = None
    shrinkage: float | None = None
    type_s: float | None = None
    type_m: float | None = None
    note: str | None = None


class MetricMemo(msgspec.Struct, frozen=True, kw_only=True):
    """The evidence of one metric in one arm by the decision, as in `MetricResult`, and how it came about.

    Attributes:
        history: the looks that are known, oldest first.
        since_units: units of control and arm at the first known look that had an effect.
        plot: file of its plot, if it was drawn.
    """

    metric: str
    role: str
    arm: str
    state: MetricState
    method: Method
    control_units: int
    arm_units: int
    control_mean: float | None
    arm_mean: float | None
    effect: Evidence | None
    lift: Evidence | None
    harm: Evidence | None
    safety: Evidence | None
    quantiles: tuple[QuantileResult, ...]
    note: str | None
    shrunk: Shrunk
    history: tuple[Point, ...]
    since_units: int | None
    plot: str | None = None


class Memo(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one decision on one experiment version.

    Attributes:
        spec: the plan as it was applied; its design is what `design_hash` covers.
        segments: effects in the values of registered segments, and `shrunk_segments` those that could be shrunk.
        ages: effects by age.
        uniform_slice: the uniform slice alone; None where exposures do not tell who is in it.
        epochs: all weight epochs of the version, those after the decision too.
        audit: all that was said of the version, in the order in which it counts.
        guarantee: what the rule that ships promises; None for specs without a conclusion.
        statistics_hash, offsets, code_version: what the decision can be derived from again (`stream-xp verify`).
        weights_plot: file of the plot of weights and coverage, if it was drawn.
    """

    experiment: str
    version: int
    decided: Decided
    spec: ExperimentSpec
    design_hash: str
    seen: Seen
    metrics: tuple[MetricMemo, ...]
    segments: tuple[SegmentResult, ...]
    shrunk_segments: tuple[ShrunkSegment, ...]
    ages: tuple[AgeResult, ...]
    uniform_slice: UniformSlice | None
    epochs: tuple[WeightEpoch, ...]
    invalid: tuple[Span, ...]
    caveats: tuple[str, ...]
    audit: tuple[Said, ...]
    guarantee: str | None
    statistics_hash: str
    offsets: dict[str, PartitionOffsets]
    code_version: str
    weights_plot: str | None = None
    schema: int = 1
