"""The file of a scenario: an experiment, the truth about it, and what is claimed of the engine's decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from stream_xp.domain.experiment import (
    OTHER,
    Adjustment,
    Aggregation,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
)
from stream_xp.domain.fields import Duration, Key, Positive, Share, Weight, duration_ms
from stream_xp.domain.rollout import Policy
from stream_xp.services.spec_file import (
    MAX_FILE_BYTES,
    FieldPath,
    Fields,
    SpecFault,
    SpecFaults,
    load_spec,
    parse_spec,
    read_fields,
)

MAX_LOOKS = 100_000
"""Looks of one run; more are a mistake in `looks` or `horizon`."""
MAX_UNITS = 10**12
"""Expected units of one run."""
MAX_VALUES = 500_000
"""Values of a mean that one run draws between two looks: they are drawn unit by unit, for many runs together."""
_LARGEST_SUM = 2**62


class Profile(StrEnum):
    """How traffic goes through a day: flat, or daily, a sine from 40 to 160 % with its low at midnight."""

    FLAT = "flat"
    DAILY = "daily"


class TrafficShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New units.

    Attributes:
        units_per_hour: mean rate of new units among all that could take part.
        profile: how the rate goes through a day; its mean is `units_per_hour`.
    """

    units_per_hour: Positive
    profile: Profile = Profile.FLAT


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the baseline of all arms is multiplied with at a time; straight lines in between."""

    at: Duration
    times: Positive


class Effect(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an arm does to the mean of a metric.

    Attributes:
        times: multiple of the baseline.
        since: when it begins; before, the arm is like the baseline.
        stage: it begins when the ramp first comes to this stage (from 0), instead.
        half_life: of a novelty: the effect is halved in this time, and goes to none.
    """

    times: Annotated[float, msgspec.Meta(ge=0.0)]
    since: Duration | None = None
    stage: Annotated[int, msgspec.Meta(ge=0, le=19)] | None = None
    half_life: Duration | None = None


class Truth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The truth about one metric.

    Attributes:
        mean: the baseline: rate of a conversion, mean of a unit's value.
        sd: of a mean, standard deviation of a unit's value (normal, rounded to the metric's steps).
        drift: of the baseline, in order of time; constant before the first point and after the last.
        arms: effects by arm; an arm that is not named has the baseline.
        levels: value of the context to a multiple for all arms there.
        contexts: value of the context, then arm, to a further multiple.
    """

    mean: Positive
    sd: Positive | None = None
    drift: tuple[Point, ...] = ()
    arms: dict[Key, Effect] = {}
    levels: dict[str, Positive] = {}
    contexts: dict[str, dict[Key, Annotated[float, msgspec.Meta(ge=0.0)]]] = {}


class Contexts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The values of one registered segment, and their shares of the units; they sum to 1."""

    segment: Key
    shares: dict[str, Share]


class DelayShape(StrEnum):
    """Distribution of the time from exposure to reward."""

    EXPONENTIAL = "exponential"
    LOGNORMAL = "lognormal"


class Delays(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Time from exposure to reward; a reward after its attribution window is lost.

    Attributes:
        mean: mean delay.
        arms: mean delay of those arms that have another one.
        sigma: of lognormal delays, standard deviation of the logarithm.
    """

    mean: Duration
    arms: dict[Key, Duration] = {}
    distribution: DelayShape = DelayShape.EXPONENTIAL
    sigma: Positive = 1.0


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New weights that a person applies, as `stream-xp apply` does."""

    at: Duration
    weights: dict[Key, Weight]


class Comparison(StrEnum):
    """What the engine is compared with, on the very same units.

    fixed_sample: one z-test of pooled means, at the planned sample. fixed_known: the same at `known_sample`, what such
    a test needs for just this effect. peeked: the same test at every look, until it rejects. pooled: the same test at
    the horizon. immature: peeked, and each unit counts from its exposure on with the rewards that have come. uniform:
    weights that stay equal. context_free: the same experiment with the policy `thompson`, which knows no contexts.
    """

    FIXED_SAMPLE = "fixed_sample"
    FIXED_KNOWN = "fixed_known"
    PEEKED = "peeked"
    POOLED = "pooled"
    IMMATURE = "immature"
    UNIFORM = "uniform"
    CONTEXT_FREE = "context_free"


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must hold of a measure: a bound that is a number, or another measure of the same runs."""

    measure: str
    at_most: float | str | None = None
    at_least: float | str | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole scenario.

    Attributes:
        scenario: its name.
        title: what it shows, in a sentence.
        experiment: an experiment file, relative to this one, or its fields.
        truths: by metric; each metric of the experiment has one.
        looks: time between two evaluations.
        horizon: how long a run lasts at most.
        contexts: mix of the units; absent: no unit has a segment.
        delays: of all rewards; absent: at once.
        arrivals: by arm, time from an exposure until its record is appended; other arms at once.
        changes: of weights, by a person, in order of time.
        activation: time from a decision to the new weights; a stop or ship is followed at once.
        lateness: time until the units of before are settled, and after an attribution window until its units count.
        comparisons: what to measure beside the engine.
        known_sample: units of all arms at which `fixed_known` tests.
        claims: what must hold.
    """

    scenario: Key
    title: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    experiment: str | dict[str, Any]
    traffic: TrafficShape
    truths: dict[Key, Truth]
    looks: Duration
    horizon: Duration
    contexts: Contexts | None = None
    delays: Delays | None = None
    arrivals: dict[Key, Duration] = {}
    changes: tuple[Change, ...] = ()
    activation: Duration = "0s"
    lateness: Duration = "0s"
    comparisons: tuple[Comparison, ...] = ()
    known_sample: Annotated[int, msgspec.Meta(ge=2)] | None = None
    claims: tuple[Claim, ...] = ()


class World(msgspec.Struct, frozen=True):
    """A scenario with the experiment that it names.

    Attributes:
        file: where it was read.
        places: line and column of its fields.
    """

    scenario: Scenario
    spec: ExperimentSpec
    file: str = ""
    places: dict[FieldPath, tuple[int, int]] = {}

    @property
    def looks(self) -> int:
        """Evaluations of a run that nothing ends."""
        return duration_ms(self.scenario.horizon) // duration_ms(self.scenario.looks)

    def refusal(self, faults: Sequence[tuple[FieldPath, str]]) -> SpecFaults:
        """The error that names every fault with its line."""
        fields = Fields(self.file, None, self.places or {(): (1, 1)}, {})
        return SpecFaults(self.file, [fields.fault(path, rule) for path, rule in faults])


def load_scenario(path: Path) -> World:
    """Return the scenario in the YAML file at `path`, with its experiment.

    Raises:
        SpecFaults: with line, field and rule of each fault, of the scenario or of its experiment.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        fault = SpecFault(1, 1, "", f"cannot be read: {error.strerror}")
        raise SpecFaults(str(path), [fault]) from error
    fields = read_fields(raw, str(path), Scenario)
    world = World(fields.value, _spec(fields, path), str(path), fields.places)
    faults = scenario_faults(world)
    if faults:
        raise world.refusal(faults)
    return world


def _spec(fields: Fields, path: Path) -> ExperimentSpec:
    where: FieldPath = ("experiment",)
    if where not in fields.texts:
        return load_spec(path.parent / fields.value.experiment)
    try:
        return parse_spec(fields.texts[where].encode(), str(path))
    except SpecFaults as error:
        inside = [
            fault._replace(path=".".join(filter(None, ("experiment", fault.path)))) for fault in error.faults
        ]
        raise SpecFaults(str(path), inside) from error


# --- rules ---------------------------------------------------------------------------------------------------

_Faults = list[tuple[FieldPath, str]]


def scenario_faults(world: World) -> _Faults:
    """Field and rule of every fault that the types alone cannot tell."""
    if duration_ms(world.scenario.looks) == 0:
        return [(("looks",), "must be longer than 0")]
    return [
        *_time_faults(world),
        *_age_faults(world),
        *_uniform_faults(world),
        *_traffic_faults(world),
        *_delay_faults(world),
        *_arrival_faults(world),
        *_context_faults(world),
        *_truth_faults(world),
        *_change_faults(world),
        *_comparison_faults(world),
    ]


def _age_faults(world: World) -> _Faults:
    """A unit's rewards are drawn as one value, without their times."""
    return [(("experiment", "ages"), "is not simulated")] if world.spec.ages is not None else []


def _uniform_faults(world: World) -> _Faults:
    """Units are drawn by their weights, in one step."""
    told = world.spec.uniform_segment is not None
    return [(("experiment", "allocation", "uniform_segment"), "is not simulated")] if told else []


def _time_faults(world: World) -> _Faults:
    one = world.scenario
    looks_ms, horizon_ms = duration_ms(one.looks), duration_ms(one.horizon)
    faults: _Faults = []
    if horizon_ms < looks_ms or horizon_ms % looks_ms:
        faults.append((("horizon",), f"must be a multiple of looks, {one.looks}"))
    if horizon_ms // looks_ms > MAX_LOOKS:
        faults.append((("looks",), f"the horizon has more than {MAX_LOOKS} of them"))
    if duration_ms(one.activation) > looks_ms:
        faults.append((("activation",), f"must not be longer than looks, {one.looks}"))
    return faults


def _traffic_faults(world: World) -> _Faults:
    if _expected_units(world) <= MAX_UNITS:
        return []
    return [
        (("traffic", "units_per_hour"), f"the horizon has more than {MAX_UNITS:.0e} units, the most of a run")
    ]


def _delay_faults(world: World) -> _Faults:
    delays = world.scenario.delays
    if delays is None:
        return []
    faults: _Faults = []
    if duration_ms(delays.mean) == 0:
        faults.append((("delays", "mean"), "must be longer than 0; leave delays out for none"))
    for arm, mean in delays.arms.items():
        if arm not in world.spec.weights:
            faults.append((("delays", "arms", arm), "is no arm of the experiment"))
        elif duration_ms(mean) == 0:
            faults.append((("delays", "arms", arm), "must be longer than 0"))
    return faults


def _arrival_faults(world: World) -> _Faults:
    """A record that is appended later than the lateness allows is late, and tells of no unit."""
    one, faults = world.scenario, list[tuple[FieldPath, str]]()
    for arm, delay in one.arrivals.items():
        if arm not in world.spec.weights:
            faults.append((("arrivals", arm), "is no arm of the experiment"))
        elif duration_ms(delay) > duration_ms(one.lateness):
            faults.append((("arrivals", arm), f"must not be longer than lateness, {one.lateness}"))
    return faults


def _context_faults(world: World) -> _Faults:
    contexts = world.scenario.contexts
    if contexts is None:
        return []
    known = world.spec.segments.get(contexts.segment)
    if known is None:
        rule = f"{contexts.segment!r} is no registered segment of the experiment"
        return [(("contexts", "segment"), rule)]
    faults: _Faults = [
        (("contexts", "shares", value), f"is no value of {contexts.segment}, which has {', '.join(known)}")
        for value in contexts.shares
        if value not in (*known, OTHER)
    ]
    total = math.fsum(contexts.shares.values())
    if abs(total - 1.0) > 1e-9:
        faults.append((("contexts", "shares"), f"must sum to 1, they sum to {total:.12g}"))
    return faults


def _truth_faults(world: World) -> _Faults:
    keys = {metric.key for metric in world.spec.metrics}
    faults: _Faults = [
        (("truths", key), "is no metric of the experiment") for key in world.scenario.truths.keys() - keys
    ]
    for metric in world.spec.metrics:
        truth = world.scenario.truths.get(metric.key)
        where: FieldPath = ("truths", metric.key)
        if truth is None:
            faults.append((where, "required: each metric has its truth"))
        elif not _is_drawn(metric):
            faults.append(
                (where, "conversions and means without an adjustment are simulated, no other metrics")
            )
        else:
            found = [*_value_faults(world, metric, truth), *_arm_faults(world, truth)]
            faults += [((*where, *path), rule) for path, rule in found]
    return faults


def _is_drawn(metric: Metric) -> bool:
    simple = metric.kind is MetricKind.CONVERSION or (
        metric.kind is MetricKind.MEAN and metric.folds_by is not Aggregation.ANY
    )
    return simple and metric.adjustment is Adjustment.NONE


def _largest(world: World, truth: Truth) -> float:
    """The largest mean that any arm can come to, in any context."""
    contexts = world.scenario.contexts
    values = [OTHER] if contexts is None else list(contexts.shares)
    return (
        truth.mean
        * max([point.times for point in truth.drift] or [1.0])
        * max(
            truth.levels.get(value, 1.0)
            * truth.contexts.get(value, {}).get(arm, 1.0)
            * max(1.0, truth.arms[arm].times if arm in truth.arms else 1.0)
            for value in values
            for arm in world.spec.weights
        )
    )


def _value_faults(world: World, metric: Metric, truth: Truth) -> _Faults:
    at, largest = [duration_ms(point.at) for point in truth.drift], _largest(world, truth)
    faults: _Faults = []
    if at != sorted(set(at)):
        faults.append((("drift",), "must be in order of time"))
    if metric.kind is MetricKind.CONVERSION:
        if truth.sd is not None:
            faults.append((("sd",), "a conversion has none, it follows from its rate"))
        if largest > 1.0:
            rule = f"a rate must stay at or below 1, with drift and effects it reaches {largest:.4g}"
            faults.append((("mean",), rule))
        return faults
    if truth.sd is None:
        return [*faults, (("sd",), "required of a mean")]
    reached = largest + 6 * truth.sd
    if reached > (metric.bound or 0.0):
        rule = f"values reach {reached:.4g}, beyond the metric's bound {metric.bound:.4g}"
        faults.append((("sd",), rule))
    elif _expected_units(world) * metric.max_steps**2 > _LARGEST_SUM:
        rule = "sums of squares would not fit 62 bits: a larger scale, a smaller bound or fewer units do"
        faults.append(((), rule))
    if _expected_units(world) / world.looks > MAX_VALUES:
        rule = f"more than {MAX_VALUES} values are drawn between two looks: more looks or fewer units do"
        faults.append(((), rule))
    return faults


def _expected_units(world: World) -> float:
    """Units of a run, with twice those expected as a bound that chance does not reach."""
    return world.scenario.traffic.units_per_hour * duration_ms(world.scenario.horizon) / 3_600_000 * 2


def _arm_faults(world: World, truth: Truth) -> _Faults:
    arms, contexts = set(world.spec.weights), world.scenario.contexts
    values = set() if contexts is None else set(contexts.shares)
    stages = 0 if world.spec.ramp is None else len(world.spec.ramp.stages)
    no_arm, no_share = "is no arm of the experiment", "has no share in contexts.shares"
    faults: _Faults = [(("arms", arm), no_arm) for arm in truth.arms.keys() - arms]
    faults += [(("contexts", value), no_share) for value in truth.contexts.keys() - values]
    faults += [(("levels", value), no_share) for value in truth.levels.keys() - values]
    for value, table in truth.contexts.items():
        faults += [(("contexts", value, arm), no_arm) for arm in table.keys() - arms]
    for arm, effect in truth.arms.items():
        if effect.since is not None and effect.stage is not None:
            faults.append((("arms", arm), "give at most one of since and stage"))
        if effect.stage is not None and effect.stage >= stages:
            faults.append((("arms", arm, "stage"), f"the ramp has {stages} stages, counted from 0"))
        if effect.half_life is not None and duration_ms(effect.half_life) == 0:
            faults.append((("arms", arm, "half_life"), "must be longer than 0"))
    return faults


def _change_faults(world: World) -> _Faults:
    one = world.scenario
    looks_ms = duration_ms(one.looks)
    at = [duration_ms(change.at) for change in one.changes]
    faults: _Faults = [(("changes",), "must be in order of time")] if at != sorted(set(at)) else []
    for index, change in enumerate(one.changes):
        where: FieldPath = ("changes", index)
        if at[index] % looks_ms or at[index] == 0:
            rule = f"must be a multiple of looks, {one.looks}, and after the begin"
            faults.append(((*where, "at"), rule))
        if at[index] >= duration_ms(one.horizon):
            faults.append(((*where, "at"), f"must lie before the horizon, {one.horizon}"))
        if set(change.weights) != set(world.spec.weights):
            faults.append(((*where, "weights"), "must name every arm"))
        elif abs(math.fsum(change.weights.values()) - 1.0) > 1e-9:
            faults.append(((*where, "weights"), "must sum to 1"))
    for index, claim in enumerate(one.claims):
        if (claim.at_most is None) == (claim.at_least is None):
            faults.append((("claims", index), "give exactly one of at_most and at_least"))
    return faults


def _comparison_faults(world: World) -> _Faults:
    one, spec = world.scenario, world.spec
    where: FieldPath = ("comparisons",)
    faults: _Faults = []
    if (Comparison.FIXED_KNOWN in one.comparisons) != (one.known_sample is not None):
        faults.append((("known_sample",), "goes with the comparison fixed_known, and that with it"))
    if Comparison.IMMATURE in one.comparisons and not all(
        metric.kind is MetricKind.CONVERSION for metric in spec.metrics if metric.role is not Role.SECONDARY
    ):
        faults.append((where, "immature needs conversions as primaries and guardrails"))
    contextual = spec.allocation is not None and spec.allocation.policy is Policy.CONTEXTUAL
    if Comparison.CONTEXT_FREE in one.comparisons and not contextual:
        faults.append((where, "context_free needs an experiment with the policy contextual"))
    return faults
