"""What the service says: results, signals and the config record that applications follow."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from stream_xp.domain.layers import Champion
from stream_xp.domain.statistics import Outcomes, Rules


class Action(StrEnum):
    """A decision. Stop outranks hold, hold outranks the others; stop and ship are final until a person resets them.

    advance: the ramp goes to its next stage. allocate: the weights follow the evidence.
    """

    STOP = "stop"
    HOLD = "hold"
    ADVANCE = "advance"
    ALLOCATE = "allocate"
    SHIP = "ship"


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, for which arm, and why in one sentence.

    Attributes:
        stage: of an advance, the number of the stage it goes to, from 0.
        weights, contexts: of an allocation, the weights it wants, as in `WeightEpoch`.
    """

    action: Action
    reason: str
    arm: str | None = None
    metric: str | None = None
    stage: int | None = None
    weights: dict[str, float] | None = None
    contexts: dict[str, dict[str, float]] = {}


class MetricState(StrEnum):
    """What the evidence of one metric and arm says."""

    UNDETERMINED = "undetermined"
    INCONCLUSIVE = "inconclusive"
    BETTER = "better"
    WORSE = "worse"
    SAFE = "safe"
    HARMED = "harmed"


class Evidence(msgspec.Struct, frozen=True, gc=False):
    """One test at one look; None where a bound does not exist (one-sided, or undetermined).

    Attributes:
        estimate, lower, upper: effect of the arm against the control, metric units, treatment minus control.
        log_e: natural logarithm of the e-value of the null hypothesis.
        p_always_valid: min(1, 1/e).
        threshold_log_e: the null is rejected at or above this.
    """

    estimate: float | None
    lower: float | None
    upper: float | None
    log_e: float
    p_always_valid: float
    threshold_log_e: float


class Method(StrEnum):
    """How a metric is tested (docs/statistics.md has the table that chooses)."""

    EXACT_THEN_ASYMPTOTIC = "exact_then_asymptotic"
    ASYMPTOTIC = "asymptotic"
    CUPED = "cuped"
    ANCOVA = "ancova"
    RATIO = "ratio"
    RATE_RATIO = "rate_ratio"
    QUANTILE = "quantile"


class QuantileResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One quantile of a latency in one arm against the control, in metric units.

    Attributes:
        quantile: which, in (0, 1).
        control_value, arm_value: the quantile of each arm's histogram, all weight epochs together.
        effect: two-sided sequence of the difference arm minus control.
        harm: one-sided test of harm (guardrails).
        safety: one-sided test of non-inferiority (guardrails).
    """

    quantile: float
    control_value: float
    arm_value: float
    effect: Evidence
    harm: Evidence | None = None
    safety: Evidence | None = None


class MetricResult(msgspec.Struct, frozen=True, gc=False):
    """One metric in one arm against the control.

    Attributes:
        method: how it is tested; frozen with the spec.
        control_units, arm_units: units tested: mature ones, or those with an event where events count at once.
        control_mean, arm_mean: stratified over weight epochs, metric units; of a ratio, the arms' ratios.
        effect: two-sided difference, arm minus control; of a count, the log rate ratio; of a latency, the
            quantile with the strongest evidence; None while undetermined.
        lift: relative difference (Fieller; of a count, rate ratio minus 1); None while undetermined or unbounded.
        harm: one-sided test of harm (guardrails); of a latency, the quantile with the strongest evidence.
        safety: one-sided test of non-inferiority (guardrails); of a latency, the quantile with the weakest.
        quantiles: of a latency, each of its quantiles.
        distribution: of a latency, the test that both arms have one distribution; its estimate and bounds are
            those of the largest difference of the two distribution functions.
        note: why it is undetermined, if it is.
        standard_error: of the effect, for the rules of a conclusion that are not always valid; None for all others.
    """

    metric: str
    role: str
    arm: str
    state: MetricState
    method: Method
    control_units: int
    arm_units: int
    control_mean: float | None = None
    arm_mean: float | None = None
    effect: Evidence | None = None
    lift: Evidence | None = None
    harm: Evidence | None = None
    safety: Evidence | None = None
    quantiles: tuple[QuantileResult, ...] = ()
    distribution: Evidence | None = None
    note: str | None = None
    standard_error: float | None = None


class SegmentResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The effect of one arm on one metric among the units of one segment.

    It informs and never decides: the error level of its metric is divided by the number of registered segment
    values once more, so that the sequences of all segments hold together.

    Attributes:
        segment: "name=value"; always one that was registered before the first look.
        effect: two-sided, as in `MetricResult`; None while undetermined.
        standard_error: of the effect, of metrics that are compared by means; None while there is none. Readers draw
            the values of a segment towards their mean by it.
    """

    metric: str
    arm: str
    segment: str
    control_units: int
    arm_units: int
    effect: Evidence | None = None
    standard_error: float | None = None


class ShrunkSegment(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The effect in a segment value, drawn towards the mean of all values of its segment (docs/long-effects.md).

    It is what to expect of the value; no test, and nothing of it has an error level.

    Attributes:
        raw, standard_error: the value's own estimate.
        effect, sd: posterior mean and standard deviation, metric units.
        weight: share that the value's own estimate has in it, 0 to 1; the rest is the mean of all values.
    """

    metric: str
    arm: str
    segment: str
    raw: float
    standard_error: float
    effect: float
    sd: float
    weight: float


class AgeChange(StrEnum):
    """What a change of an effect with age is called: with novelty it shrinks, with habituation it grows or turns."""

    NOVELTY = "novelty"
    HABITUATION = "habituation"


class AgeEffect(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The effect of one arm on one metric in a bucket of age: the time since a unit's first exposure.

    All units count whose bucket is over, with 0 where a unit did not come back. Its level is divided by the number of
    buckets, so that the sequences of a curve hold together.

    Attributes:
        from_ms, until_ms: the bucket, [from, until) after first exposure.
        effect: two-sided, arm minus control, metric units per bucket; None while undetermined.
    """

    from_ms: int
    until_ms: int
    control_units: int
    arm_units: int
    effect: Evidence | None = None


class AgeResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How the effect of one arm on one metric changes with age (docs/long-effects.md). It informs and never decides.

    Attributes:
        control_units, arm_units: units whose last bucket is over; early, late and change are about these alone.
        per_ms: time that early, late and change are per; of a share of units, the length of both buckets.
        early, late: effects in the first and the last bucket, metric units per `per_ms`; to be shown, no tests.
        change: late minus early, two-sided; always valid, at the level that the number of metrics and arms leaves.
        kind: what a proven change is called, by the estimates; None while none is proven.
        buckets: the effect in every bucket; no test of a change.
        note: why the change is undetermined, if it is.
    """

    metric: str
    arm: str
    control_units: int
    arm_units: int
    per_ms: int
    buckets: tuple[AgeEffect, ...]
    early: Evidence | None = None
    late: Evidence | None = None
    change: Evidence | None = None
    kind: AgeChange | None = None
    note: str | None = None


class SegmentRatio(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The sample-ratio test among the units of one registered segment value.

    Attributes:
        segment: "name=value".
        threshold_log_e: the level of the experiment's test, divided by the number of registered segment values.
    """

    segment: str
    units: int
    log_e: float
    threshold_log_e: float


class SampleRatio(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The sequential sample-ratio test over all weight epochs.

    Attributes:
        log_e: evidence of the settled units, which no arm can still add to: when an arm is counted changes nothing.
        mismatch: it is proven on settled units. It stops.
        diagnosis: of a mismatch, proven or suspected, the registered segment values that deviate most, the strongest
            first. It says where to look and decides nothing.
        counted_log_e: evidence of all units counted so far; None from workers that tested nothing else.
        suspected: it is proven on them and not on settled units: arms may be counted at different times. It holds.
    """

    log_e: float
    p_always_valid: float
    threshold_log_e: float
    mismatch: bool
    diagnosis: tuple[SegmentRatio, ...] = ()
    counted_log_e: float | None = None
    suspected: bool = False


class MonitorName(StrEnum):
    """What is watched beside metrics (docs/decisions.md)."""

    CROSSOVERS = "crossovers"
    DATA_AGE = "data_age"
    DUPLICATES = "duplicates"
    REWARD_LOSS = "reward_loss"
    EXPOSURE_STALL = "exposure_stall"


class MonitorState(StrEnum):
    """What a monitor says: quiet; warning, for people; invalid, nothing moves."""

    QUIET = "quiet"
    WARNING = "warning"
    INVALID = "invalid"


class ArmCount(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the arms other than one had got by a look.

    Attributes:
        at_ms: newest watermark of the source partitions at that look.
        others: units of the other arms.
        nats: minus the logarithm of the chance that so many others come in a row.
    """

    at_ms: int = 0
    others: Annotated[int, msgspec.Meta(ge=0)] = 0
    nats: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0


class ArmRun(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The run of units in other arms since an arm last got one (`engine.stalls`).

    Attributes:
        units: of the arm.
        since_ms: newest watermark at the look where it last got one; None before there is one.
        first, last: the looks between which the run is counted: no unit of the arm that is still on its way can
            fall between them. None before they are an allowed lateness old.
        marks: later looks, that wait to be so old.
    """

    units: Annotated[int, msgspec.Meta(ge=0)] = 0
    since_ms: int | None = None
    first: ArmCount | None = None
    last: ArmCount | None = None
    marks: tuple[ArmCount, ...] = ()


class MonitorResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One monitor at one look.

    Attributes:
        arm: of a monitor that watches each arm by itself.
        metric: of a loss of rewards, the metric with the strongest evidence.
        value: what was seen: a share, an age (ms), a ratio of rates, or units of other arms in a row.
        limit: what the spec allows of it; None for a stall.
        log_e: natural logarithm of the e-value against "all is well"; None where the state is no test.
        threshold_log_e: proven at or above this.
        latched: it was proven at this look or before, and nobody has opened it since.
        since: id of the newest order that opens latches, as known by this look.
        run: of a stall, its run of units, for the look after.
        reason: why it is not quiet.
    """

    monitor: MonitorName
    state: MonitorState = MonitorState.QUIET
    arm: str | None = None
    metric: str | None = None
    value: float | None = None
    limit: float | None = None
    log_e: float | None = None
    threshold_log_e: float | None = None
    latched: bool = False
    since: str | None = None
    run: ArmRun | None = None
    reason: str | None = None


class ArmResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Units exposed to an arm, and the weight they should have had (over all epochs)."""

    arm: str
    units: int
    expected_units: float


class UniformEffect(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The effect of one arm on one metric among the units of the uniform slice; fields as in `MetricResult`.

    All weight epochs with the same open arms are one stratum: each unit of the slice was assigned by the same draw.
    """

    metric: str
    arm: str
    control_units: int
    arm_units: int
    control_mean: float | None = None
    arm_mean: float | None = None
    effect: Evidence | None = None
    note: str | None = None


class UniformSlice(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the units say that were drawn evenly, whatever the weights were. It informs and never decides.

    Attributes:
        share: of the units, by the spec.
        arms: units exposed in the slice, and how many of them each arm should have.
        sample_ratio: the sample-ratio test inside the slice; None while no unit was exposed in it.
        effects: of every metric and treatment arm, at `alpha` split evenly over them.
    """

    share: float
    arms: tuple[ArmResult, ...]
    sample_ratio: SampleRatio | None
    effects: tuple[UniformEffect, ...]


class PartitionOffsets(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The prefix of one source partition that a result is a function of.

    What has a default is None in results of workers that did not say so yet.

    Attributes:
        exposures, rewards: applied offset of each source topic, inclusive.
        exposures_from, rewards_from: offset of the first record applied.
        allowed_lateness_ms, rules: under which they were applied.
        behind_watermark: as in `PartitionStatistics`.
    """

    exposures: int | None
    rewards: int | None
    watermark_ms: int | None
    exposures_from: int | None = None
    rewards_from: int | None = None
    allowed_lateness_ms: int | None = None
    rules: Rules | None = None
    behind_watermark: dict[str, tuple[int, ...]] = {}


class LookTaken(msgspec.Struct, frozen=True, kw_only=True):
    """One of the looks that a group sequential rule declared, and what it found.

    Attributes:
        look: share of the planned sample at which it was due.
        information: share of the planned sample at which it was taken.
        better, worse: (metric, arm) of every primary that was beyond the critical value, at this look or before.
    """

    look: float
    information: float
    better: tuple[tuple[str, str], ...] = ()
    worse: tuple[tuple[str, str], ...] = ()


class RolloutState(msgspec.Struct, frozen=True, kw_only=True):
    """Where an experiment stands between its first unit and its end.

    Attributes:
        stage: of its ramp, from 0; None without a ramp, or where its coverage is that of no stage.
        coverage, weights: of its newest weight epoch.
        paused: a person holds it.
        proposed: id of the signal that waits for a person.
        epochs_left: how many more weight epochs this version can have.
        waits: why the ramp and the weights stay as they are, in a sentence each.
    """

    stage: int | None
    coverage: float
    weights: dict[str, float]
    paused: bool
    proposed: str | None
    epochs_left: int
    waits: tuple[str, ...] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A record of ``xp.results``: the newest evidence of an experiment.

    Attributes:
        look: running number of this evaluation of this experiment version.
        offsets: source partition (as text) to the prefix used.
        runtime_ms: watermark minus first exposure.
        invalid: why nothing may ship now; empty when all is well.
        decision: the decision in force; latched ones stay.
        evaluated_ms: wall clock of the worker; only the age of the data depends on it.
        weight_epochs: how many weight epochs the spec had by then; None in results of workers that did not say so.
        spread_ms: distance of the source partitions' watermarks over which nothing ships; None likewise.
        rollout: where it stands; None likewise.
        guarantee: what the rule that ships it promises; None for a spec without a conclusion.
        ages: effects by age, of the metrics that the spec names for it.
        looks: of a group sequential rule, the looks that it has taken.
        monitors: what is watched beside metrics; None in results of workers that did not say so.
        champion: the arm that shipped before, which the control is, if the spec names one.
        uniform_slice: the uniform slice alone; None where exposures do not tell who is in it.
    """

    experiment: str
    version: int
    design_hash: str
    statistics_hash: str
    code_version: str
    look: int
    offsets: dict[str, PartitionOffsets]
    runtime_ms: int
    arms: tuple[ArmResult, ...]
    crossover_units: int
    metrics: tuple[MetricResult, ...]
    sample_ratio: SampleRatio | None
    invalid: tuple[str, ...]
    decision: Decision
    segments: tuple[SegmentResult, ...] = ()
    exposure_outcomes: Outcomes
    reward_outcomes: Outcomes
    evaluated_ms: int
    weight_epochs: int | None = None
    spread_ms: int | None = None
    rollout: RolloutState | None = None
    guarantee: str | None = None
    looks: tuple[LookTaken, ...] = ()
    monitors: tuple[MonitorResult, ...] | None = None
    champion: Champion | None = None
    ages: tuple[AgeResult, ...] = ()
    uniform_slice: UniformSlice | None = None
    schema: int = 1


class SignalData(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a signal: the decision and all that is needed to derive it again.

    Attributes:
        proposed: it waits for a person to approve it.
        since: id of the newest reset that whoever decided knew of; a decision of before a reset does not count.
    """

    decision: Decision
    result: Result
    proposed: bool = False
    since: str | None = None


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """A record of ``xp.signals``: a structured CloudEvent; `source` + `id` is the dedupe key."""

    id: str
    source: str
    subject: str
    time: str
    data: SignalData
    type: str = "com.streamxp.decision.v1"
    specversion: str = "1.0"
    datacontenttype: str = "application/json"


class RolloutStatus(StrEnum):
    """What applications do with the experiment."""

    RUNNING = "running"
    STOPPED = "stopped"
    SHIPPED = "shipped"


class LayerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What applications need to find the slot of a unit (docs/many-experiments.md).

    Attributes:
        name: of the layer.
        salt: what units are hashed with.
        of: how many slots the layer has.
        slots: first and last, both included, of those that the experiment takes.
        hash: name of the hash; an application that does not know it must not assign.
    """

    name: str
    salt: str
    of: Annotated[int, msgspec.Meta(ge=2)]
    slots: tuple[tuple[int, int], ...]
    hash: str


class ConfigRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record of ``xp.config``: what applications and gates follow.

    Attributes:
        weights: arm key to share of the traffic from `effective_ms` on; a distribution.
        coverage: share of all units that take part; the others get the control and are not exposed.
        contexts: as in `WeightEpoch`.
        context: the segment whose values have weights of their own, if one has.
        paused: a person holds the ramp and the weights.
        layer: whose slots it takes; units in others get the control and are not exposed. None: it takes all units.
        holdout: it is one: units in its slots get the arm `holdout`, all others `program`.
        program: the holdout whose units get the control here and are not exposed, even after a ship.
        config_version: grows with every change.
        signal_id: the signal that made it so; None while running.
        uniform_slice: share of the units that are drawn first, evenly over the arms that have a weight; the others are
            drawn so that all together have `weights`. 0: all are drawn by `weights`.
        uniform_segment: the segment that exposures of units of the slice carry with the value `uniform`.
    """

    experiment: str
    version: int
    status: RolloutStatus
    weights: dict[str, float]
    weight_epoch: int
    effective_ms: int
    config_version: int
    signal_id: str | None = None
    coverage: float = 1.0
    contexts: dict[str, dict[str, float]] = {}
    context: str | None = None
    paused: bool = False
    layer: LayerConfig | None = None
    holdout: bool = False
    program: str | None = None
    uniform_slice: float = 0.0
    uniform_segment: str | None = None
    schema: int = 1
