"""What the world is like: experiments, what their arms do, and what goes wrong on the way."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from stream_xp.domain.experiment import Adjustment, ExperimentRecord, ExperimentSpec, MetricKind, WeightEpoch
from stream_xp.domain.experiment_rules import rules
from stream_xp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A unit gives one reward of 1 with this probability."""

    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """A unit gives, with this probability, one reward whose natural logarithm is normal, in metric units."""

    log_mean: float
    log_sd: float
    probability: float = 1.0


Outcome: TypeAlias = Conversion | LogNormal


@dataclass(frozen=True, slots=True, kw_only=True)
class Since:
    """What an arm does to units exposed at or after `from_ms`, until the next change."""

    outcome: Outcome
    from_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChange:
    """New weights for units exposed at or after `from_ms`: the next weight epoch."""

    from_ms: int
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentTraffic:
    """One experiment and the truth about it.

    Attributes:
        spec: its spec; epoch 0 has the weights of the spec.
        units_per_s: mean rate of new units (a Poisson process).
        outcomes: metric key, then arm key, to what the arm does, in order of time.
        weight_changes: the later weight epochs, in order of time.
        reward_delay_ms: mean of the exponential delay from exposure to reward, before it is cut off at
            the end of the attribution window.
    """

    spec: ExperimentSpec
    units_per_s: float
    outcomes: Mapping[str, Mapping[str, tuple[Since, ...]]]
    weight_changes: tuple[WeightChange, ...] = ()
    reward_delay_ms: float = 300.0

    def epochs(self, start_ms: int) -> tuple[WeightEpoch, ...]:
        """Return the weight epochs for traffic that starts at `start_ms`, epoch milliseconds."""
        changes = (WeightChange(from_ms=0, weights=self.spec.weights), *self.weight_changes)
        return tuple(
            WeightEpoch(epoch=epoch, weights=dict(change.weights), effective_ms=start_ms + change.from_ms)
            for epoch, change in enumerate(changes)
        )

    def record(self, start_ms: int) -> ExperimentRecord:
        """Return what must stand on the topic of experiments before traffic that starts at `start_ms`."""
        return ExperimentRecord(
            spec=self.spec, epochs=self.epochs(start_ms), design_hash=self.spec.design_hash()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong on the way; every share lies in [0, 1].

    Attributes:
        duplicated: share of the records that are sent twice, with the same id.
        out_of_order: share of the records that are held back, though not for so long that they are late.
        late: share of the records that are sent after the allowed lateness.
        malformed: records of the corpus `MALFORMED` to add, as a share of the good ones.
        crossovers: share of the units that are exposed to a second arm.
        reward_first: share of the units with a quick reward whose exposure is sent after it.
        repeated: share of the units exposed to their own arm again.
        strays: rewards of units that were never exposed to add, as a share of the good rewards.
    """

    duplicated: float = 0.0
    out_of_order: float = 0.0
    late: float = 0.0
    malformed: float = 0.0
    crossovers: float = 0.0
    reward_first: float = 0.0
    repeated: float = 0.0
    strays: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Several experiments at the same time; raises ConfigError if they contradict themselves.

    Attributes:
        duration_ms: units are exposed in [0, duration); their rewards may follow.
        allowed_lateness_ms: that of the engine.
    """

    experiments: tuple[ExperimentTraffic, ...]
    duration_ms: int
    allowed_lateness_ms: int
    faults: Faults = Faults()

    def __post_init__(self) -> None:
        for fault in itertools.chain(_scenario_faults(self), *map(_traffic_faults, self.experiments)):
            raise ConfigError(fault)

    @property
    def horizon_ms(self) -> int:
        """Longest time that a record on time is held back; its copy may come as long after it again."""
        return 2 * self.allowed_lateness_ms // 5


def _scenario_faults(scenario: Scenario) -> Iterator[str]:
    if not scenario.experiments or scenario.duration_ms < 1:
        yield "a scenario needs an experiment and a duration of at least 1 ms"
    keys = [traffic.spec.experiment for traffic in scenario.experiments]
    if len(set(keys)) != len(keys):
        yield "the experiments of a scenario must have different keys"
    for name in Faults.__dataclass_fields__:
        share = getattr(scenario.faults, name)
        if not 0.0 <= share <= 1.0:
            yield f"faults.{name} must lie in [0, 1], got {share}"
    if scenario.horizon_ms < 1 and scenario.faults != Faults(late=scenario.faults.late):
        yield "faults other than late need an allowed lateness of at least 3 ms"


def _traffic_faults(traffic: ExperimentTraffic) -> Iterator[str]:
    key = traffic.spec.experiment
    yield from (f"{key}: {fault.message}" for fault in rules(traffic.spec))
    for metric in traffic.spec.metrics:
        if (
            metric.kind not in (MetricKind.CONVERSION, MetricKind.MEAN)
            or metric.adjustment != Adjustment.NONE
        ):
            yield f"{key}.{metric.key}: the truth is known of conversions and means without an adjustment only"
    if not (math.isfinite(traffic.units_per_s) and traffic.units_per_s > 0 and traffic.reward_delay_ms > 0):
        yield f"{key}: units_per_s and reward_delay_ms must be greater than 0"
    events = [metric.listens_to for metric in traffic.spec.metrics]
    if len(set(events)) != len(events):
        yield f"{key}: two metrics listen to the same event, and the truth would count its rewards once"
    if not _in_order([0, *(change.from_ms for change in traffic.weight_changes)]):
        yield f"{key}: weight changes must come in order of time, after 0 ms"
    for change in traffic.weight_changes:
        total = math.fsum(change.weights.values())
        if set(change.weights) != set(traffic.spec.weights) or abs(total - 1.0) > 1e-9:
            yield f"{key}: every weight change must name all arms, with weights that sum to 1"
    yield from _outcome_faults(traffic)


def _outcome_faults(traffic: ExperimentTraffic) -> Iterator[str]:
    metrics, arms = {metric.key for metric in traffic.spec.metrics}, set(traffic.spec.weights)
    for metric, by_arm in traffic.outcomes.items():
        where = f"{traffic.spec.experiment}.{metric}"
        if metric not in metrics:
            yield f"{where}: outcomes of {metric!r}, which is no metric"
        if set(by_arm) != arms or not all(_in_order([s.from_ms for s in by_arm[arm]]) for arm in by_arm):
            yield f"{where}: every arm needs outcomes, the first one from 0 ms, in order of time"
        for outcome in (since.outcome for steps in by_arm.values() for since in steps):
            if not 0.0 <= outcome.probability <= 1.0:
                yield f"{where}: a probability must lie in [0, 1], got {outcome.probability}"
            if isinstance(outcome, LogNormal) and not (
                outcome.log_sd >= 0 and math.isfinite(outcome.log_mean)
            ):
                yield f"{where}: log_mean must be finite and log_sd at least 0"


def _in_order(times: list[int]) -> bool:
    """Whether times begin with 0 and grow."""
    return bool(times) and times[0] == 0 and all(a < b for a, b in itertools.pairwise(times))
