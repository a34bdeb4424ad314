"""The file of a scenario: an experiment, the truth about it, and what is claimed of the engine's decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import yaml

from stream_xp.domain.experiment import OTHER, Adjustment, Aggregation, ExperimentSpec, Metric, MetricKind
from stream_xp.domain.fields import Duration, Key, Positive, Share, Weight, duration_ms
from stream_xp.errors import ConfigError
from stream_xp.services.spec_file import MAX_FILE_BYTES, load_spec, parse_spec

MAX_LOOKS = 100_000
"""Looks of one run; more are a mistake in `looks` or `horizon`."""
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

    def multiples(self, arm: str, values: Sequence[str]) -> list[float]:
        """Multiple of the baseline that an arm has in each context, once its effect has begun."""
        times = self.arms[arm].times if arm in self.arms else 1.0
        return [times * self.contexts.get(value, {}).get(arm, 1.0) for value in values]


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
        sigma: of lognormal delays, standard deviation of the logarithm.
    """

    mean: Duration
    distribution: DelayShape = DelayShape.EXPONENTIAL
    sigma: Positive = 1.0


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New weights that a person applies, as `stream-xp apply` does."""

    at: Duration
    weights: dict[Key, Weight]


class Comparison(StrEnum):
    """What the engine is compared with, on the very same units.

    fixed_sample: one z-test of pooled means, at the planned sample. peeked: the same test at every look, until it
    rejects. pooled: the same test at the horizon. uniform: weights that stay equal.
    """

    FIXED_SAMPLE = "fixed_sample"
    PEEKED = "peeked"
    POOLED = "pooled"
    UNIFORM = "uniform"


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
        changes: of weights, by a person, in order of time.
        activation: time from a decision to the new weights; a stop or ship is followed at once.
        lateness: time after an attribution window until its units are counted.
        comparisons: what to measure beside the engine.
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
    changes: tuple[Change, ...] = ()
    activation: Duration = "0s"
    lateness: Duration = "0s"
    comparisons: tuple[Comparison, ...] = ()
    claims: tuple[Claim, ...] = ()


class World(msgspec.Struct, frozen=True):
    """A scenario with the experiment that it names."""

    scenario: Scenario
    spec: ExperimentSpec

    @property
    def looks(self) -> int:
        """Evaluations of a run that nothing ends."""
        return duration_ms(self.scenario.horizon) // duration_ms(self.scenario.looks)


def load_scenario(path: Path) -> World:
    """Return the scenario in the YAML file at `path`, with its experiment.

    Raises:
        ConfigError: with the field and the rule of each fault.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is longer than {MAX_FILE_BYTES} bytes, the most that is read")
    try:
        fields = yaml.safe_load(raw)
        scenario = msgspec.convert(fields, Scenario)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        raise ConfigError(f"{path}: {where.strip('.`') or 'the file'}: {_in_words(message)}") from error
    world = World(scenario, _spec(scenario.experiment, path))
    faults = scenario_faults(world)
    if faults:
        raise ConfigError("\n".join(f"{path}: {field}: {rule}" for field, rule in faults))
    return world


def _in_words(message: str) -> str:
    """A broken pattern as its description."""
    for kind in (Duration, Key):
        (meta,) = get_args(kind)[1:]
        if f"regex {meta.pattern!r}" in message:
            return f"expected {meta.description}"
    return message


def _spec(experiment: str | dict[str, Any], path: Path) -> ExperimentSpec:
    if isinstance(experiment, str):
        return load_spec(path.parent / experiment)
    return parse_spec(yaml.safe_dump(experiment, sort_keys=False).encode(), f"{path}#experiment")


# --- rules ---------------------------------------------------------------------------------------------------


def scenario_faults(world: World) -> list[tuple[str, str]]:
    """Field and rule of every fault that the types alone cannot tell."""
    return [*_time_faults(world), *_context_faults(world), *_truth_faults(world), *_change_faults(world)]


def _time_faults(world: World) -> list[tuple[str, str]]:
    one = world.scenario
    looks_ms, horizon_ms = duration_ms(one.looks), duration_ms(one.horizon)
    if looks_ms == 0:
        return [("looks", "must be longer than 0")]
    faults = []
    if horizon_ms < looks_ms or horizon_ms % looks_ms:
        faults.append(("horizon", f"must be a multiple of looks, {one.looks}"))
    if horizon_ms // looks_ms > MAX_LOOKS:
        faults.append(("looks", f"the horizon has more than {MAX_LOOKS} of them"))
    if duration_ms(one.activation) > looks_ms:
        faults.append(("activation", f"must not be longer than looks, {one.looks}"))
    if one.delays is not None and duration_ms(one.delays.mean) == 0:
        faults.append(("delays.mean", "must be longer than 0; leave delays out for none"))
    return faults


def _context_faults(world: World) -> list[tuple[str, str]]:
    contexts = world.scenario.contexts
    if contexts is None:
        return []
    known = world.spec.segments.get(contexts.segment)
    if known is None:
        return [("contexts.segment", f"{contexts.segment!r} is no registered segment of the experiment")]
    faults = [
        (f"contexts.shares.{value}", f"is no value of {contexts.segment}, which has {', '.join(known)}")
        for value in contexts.shares
        if value not in (*known, OTHER)
    ]
    total = math.fsum(contexts.shares.values())
    if abs(total - 1.0) > 1e-9:
        faults.append(("contexts.shares", f"must sum to 1, they sum to {total:.12g}"))
    return faults


def _truth_faults(world: World) -> list[tuple[str, str]]:
    keys = {metric.key for metric in world.spec.metrics}
    faults = [
        (f"truths.{key}", "is no metric of the experiment") for key in world.scenario.truths.keys() - keys
    ]
    for metric in world.spec.metrics:
        truth = world.scenario.truths.get(metric.key)
        if truth is None:
            faults.append((f"truths.{metric.key}", "required: each metric has its truth"))
        else:
            found = [
                *_metric_faults(metric),
                *_value_faults(world, metric, truth),
                *_arm_faults(world, truth),
            ]
            faults += [(f"truths.{metric.key}{field}", rule) for field, rule in found]
    return sorted(faults)


def _metric_faults(metric: Metric) -> list[tuple[str, str]]:
    simple = metric.kind is MetricKind.CONVERSION or (
        metric.kind is MetricKind.MEAN and metric.folds_by is not Aggregation.ANY
    )
    if simple and metric.adjustment is Adjustment.NONE:
        return []
    return [("", "conversions and means without an adjustment are simulated, no other metrics")]


def _value_faults(world: World, metric: Metric, truth: Truth) -> list[tuple[str, str]]:
    times = [point.times for point in truth.drift] or [1.0]
    arms = [1.0, *(effect.times for effect in truth.arms.values())]
    mixes = [1.0, *(times for arm in truth.contexts.values() for times in arm.values())]
    largest = truth.mean * max(times) * max(arms) * max(mixes) * max([1.0, *truth.levels.values()])
    at = [duration_ms(point.at) for point in truth.drift]
    faults = []
    if at != sorted(set(at)):
        faults.append((".drift", "must be in order of time"))
    if metric.kind is MetricKind.CONVERSION:
        if truth.sd is not None:
            faults.append((".sd", "a conversion has none, it follows from its rate"))
        if largest > 1.0:
            faults.append(
                (".mean", f"a rate must stay at or below 1, with drift and effects it reaches {largest:.4g}")
            )
    elif truth.sd is None:
        faults.append((".sd", "required of a mean"))
    elif largest + 6 * truth.sd > (metric.bound or 0.0):
        faults.append(
            (
                ".sd",
                f"values reach {largest + 6 * truth.sd:.4g}, beyond the metric's bound {metric.bound:.4g}",
            )
        )
    elif _expected_units(world) * metric.max_steps**2 > _LARGEST_SUM:
        faults.append(
            ("", "sums of squares would not fit 62 bits: a larger scale, a smaller bound or fewer units do")
        )
    return faults


def _expected_units(world: World) -> float:
    return world.scenario.traffic.units_per_hour * duration_ms(world.scenario.horizon) / 3_600_000 * 2


def _arm_faults(world: World, truth: Truth) -> list[tuple[str, str]]:
    arms, contexts = set(world.spec.weights), world.scenario.contexts
    values = set() if contexts is None else set(contexts.shares)
    stages = 0 if world.spec.ramp is None else len(world.spec.ramp.stages)
    faults = [(f".arms.{arm}", "is no arm of the experiment") for arm in truth.arms.keys() - arms]
    faults += [
        (f".contexts.{value}", "has no share in contexts.shares") for value in truth.contexts.keys() - values
    ]
    faults += [
        (f".levels.{value}", "has no share in contexts.shares") for value in truth.levels.keys() - values
    ]
    for value, table in truth.contexts.items():
        faults += [(f".contexts.{value}.{arm}", "is no arm of the experiment") for arm in table.keys() - arms]
    for arm, effect in truth.arms.items():
        if effect.since is not None and effect.stage is not None:
            faults.append((f".arms.{arm}", "give at most one of since and stage"))
        if effect.stage is not None and effect.stage >= stages:
            faults.append((f".arms.{arm}.stage", f"the ramp has {stages} stages, counted from 0"))
        if effect.half_life is not None and duration_ms(effect.half_life) == 0:
            faults.append((f".arms.{arm}.half_life", "must be longer than 0"))
    return faults


def _change_faults(world: World) -> list[tuple[str, str]]:
    one = world.scenario
    looks_ms = max(1, duration_ms(one.looks))
    at = [duration_ms(change.at) for change in one.changes]
    faults = [("changes", "must be in order of time")] if at != sorted(set(at)) else []
    for index, change in enumerate(one.changes):
        where = f"changes[{index}]"
        if at[index] % looks_ms or at[index] == 0:
            faults.append((f"{where}.at", f"must be a multiple of looks, {one.looks}, and after the begin"))
        if set(change.weights) != set(world.spec.weights):
            faults.append((f"{where}.weights", "must name every arm"))
        elif abs(math.fsum(change.weights.values()) - 1.0) > 1e-9:
            faults.append((f"{where}.weights", "must sum to 1"))
    for index, claim in enumerate(one.claims):
        if (claim.at_most is None) == (claim.at_least is None):
            faults.append((f"claims[{index}]", "give exactly one of at_most and at_least"))
    return faults
