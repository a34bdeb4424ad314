"""Traffic with a known truth: exposures and rewards of several experiments, with faults on demand.

A `Scenario` says what the world is like, `generate` draws it once from a seed, and the `Traffic` gives the
records in the order of their sending, together with exactly what the engine must make of them. Nothing
here reads a clock: `send_ms` and event times count from 0, and `start_ms` puts them on the calendar when
the records are encoded. The same scenario, seed and start give the same bytes.

A record's Kafka timestamp is `start_ms + send_ms`, and records are sent in that order; what is late, what
is a duplicate and what a reward belongs to (docs/semantics.md) therefore do not depend on partitions.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream_xp.domain.experiment import (
    Adjustment,
    Aggregation,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    WeightEpoch,
    rules,
)
from stream_xp.domain.statistics import ALL, ExperimentStatistics, Outcomes, build
from stream_xp.errors import ConfigError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Booleans: TypeAlias = NDArray[np.bool_]

EXPOSURES: Final = "exposures"
REWARDS: Final = "rewards"
TOPICS: Final = (EXPOSURES, REWARDS)
SOURCE: Final = "simulator"
START_MS: Final = 1_750_000_000_000
"""Start of traffic that is not sent anywhere, epoch milliseconds."""

_FOREVER: Final = 2**62
_EXPOSURE, _REWARD = 0, 1
_NOWHERE: Final = -1
_AGAIN_MS: Final = 1000


# What the world is like ---------------------------------------------------------------------------


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


# The corpus of malformed records ------------------------------------------------------------------


class Malformed(NamedTuple):
    """A record that the engine must refuse.

    Attributes:
        reason: of its dead letter; None if it is no dead letter but counts as unknown_experiment.
        template: the value, with %-fields id, time, unit, experiment, arm and metric.
        key: the Kafka key, with the same fields; None for a null key.
    """

    name: str
    topic: str
    reason: Reason | None
    template: str
    key: str | None = "%(unit)s"


_WHO = '"id":"%(id)s","time":%(time)d,"unit":"%(unit)s"'
_SAW = f'{_WHO},"experiment":"%(experiment)s","arm":"%(arm)s"'
_DID = f'{_WHO},"metric":"%(metric)s"'
_DEEP = '"deep":' + "[" * 10_000 + "]" * 10_000
_YEAR_3000 = '"id":"%(id)s","time":"3000-01-01T00:00:00Z","unit":"%(unit)s"'

MALFORMED: Final = (
    Malformed("broken JSON", EXPOSURES, Reason.INVALID_JSON, '{"id":"%(id)s","time":%(time)d,"unit":'),
    Malformed("broken JSON", REWARDS, Reason.INVALID_JSON, f"{{{_DID}"),
    Malformed(
        "wrong type", EXPOSURES, Reason.INVALID_FIELD, f'{{{_WHO},"experiment":"%(experiment)s","arm":7}}'
    ),
    Malformed("wrong type", REWARDS, Reason.INVALID_FIELD, f'{{{_DID},"value":"1"}}'),
    Malformed("NaN", EXPOSURES, Reason.INVALID_JSON, f'{{{_SAW},"covariate":NaN}}'),
    Malformed("NaN", REWARDS, Reason.INVALID_JSON, f'{{{_DID},"value":NaN}}'),
    Malformed("1e999", EXPOSURES, Reason.INVALID_FIELD, f'{{{_SAW},"covariate":1e999}}'),
    Malformed("1e999", REWARDS, Reason.INVALID_FIELD, f'{{{_DID},"value":1e999}}'),
    Malformed(
        "missing unit",
        EXPOSURES,
        Reason.INVALID_FIELD,
        '{"id":"%(id)s","time":%(time)d,"experiment":"%(experiment)s","arm":"%(arm)s"}',
    ),
    Malformed(
        "missing unit", REWARDS, Reason.INVALID_FIELD, '{"id":"%(id)s","time":%(time)d,"metric":"%(metric)s"}'
    ),
    Malformed(
        "unknown experiment", EXPOSURES, None, f'{{{_WHO},"experiment":"no-such-test","arm":"%(arm)s"}}'
    ),
    Malformed("unknown experiment", REWARDS, None, f'{{{_DID},"experiment":"no-such-test"}}'),
    Malformed(
        "unknown arm",
        EXPOSURES,
        Reason.UNKNOWN_ARM,
        f'{{{_WHO},"experiment":"%(experiment)s","arm":"no-such-arm"}}',
    ),
    Malformed("unknown epoch", EXPOSURES, Reason.UNKNOWN_WEIGHT_EPOCH, f'{{{_SAW},"weight_epoch":999999}}'),
    Malformed("nested 10,000 deep", EXPOSURES, Reason.INVALID_JSON, f"{{{_SAW},{_DEEP}}}"),
    Malformed("nested 10,000 deep", REWARDS, Reason.INVALID_JSON, f"{{{_DID},{_DEEP}}}"),
    Malformed(
        "year 3000",
        EXPOSURES,
        Reason.TIME_OUT_OF_RANGE,
        f'{{{_YEAR_3000},"experiment":"%(experiment)s","arm":"%(arm)s"}}',
    ),
    Malformed("year 3000", REWARDS, Reason.TIME_OUT_OF_RANGE, f'{{{_YEAR_3000},"metric":"%(metric)s"}}'),
    Malformed("empty key", EXPOSURES, Reason.MISSING_KEY, f"{{{_SAW}}}", key=""),
    Malformed("null key", REWARDS, Reason.MISSING_KEY, f"{{{_DID}}}", key=None),
    Malformed("key of another unit", EXPOSURES, Reason.KEY_MISMATCH, f"{{{_SAW}}}", key="other-%(unit)s"),
    Malformed("empty value", REWARDS, Reason.EMPTY_VALUE, ""),
)
"""The corpus; the faults of a scenario go through it again and again, in this order."""


# Drawing ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Columns:
    """Records as columns of one length; times in milliseconds from the start.

    A field without a meaning in a record is -1. A record and its copy have the same `identity`; `malformed`
    is a position in the corpus.
    """

    topic: Integers
    experiment: Integers
    unit: Integers
    arm: Integers
    epoch: Integers
    segment: Integers
    metric: Integers
    value: Floats
    event_ms: Integers
    send_ms: Integers
    identity: Integers
    malformed: Integers

    def __len__(self) -> int:
        return len(self.topic)

    def take(self, rows: Integers | Booleans | slice) -> _Columns:
        return _Columns(*(getattr(self, name)[rows] for name in self.__slots__))


def _concatenate(parts: list[_Columns]) -> _Columns:
    return _Columns(*(np.concatenate([getattr(p, name) for p in parts]) for name in _Columns.__slots__))


def _columns(count: int, **given: NDArray[np.generic] | int) -> _Columns:
    """Columns with the given fields, arrays or one value for all, and -1 in the others."""

    def column(name: str) -> Any:
        kind = np.float64 if name == "value" else np.int64
        return np.broadcast_to(np.asarray(given.get(name, _NOWHERE), dtype=kind), count)

    return _Columns(*map(column, _Columns.__slots__))


@dataclass(frozen=True, slots=True)
class _Units:
    """The units of one experiment in order of their exposure."""

    unit: Integers
    exposed_ms: Integers
    arm: Integers
    epoch: Integers
    segment: Integers


@dataclass(frozen=True, slots=True)
class _Draw:
    """What every step of a draw needs: the scenario, the random stream and the number of faults so far."""

    scenario: Scenario
    rng: np.random.Generator
    counts: Counter[str]

    def chosen(self, count: int, fault: str) -> Integers:
        """Positions below `count`, each with the probability of the fault."""
        return np.flatnonzero(self.rng.random(count) < getattr(self.scenario.faults, fault))

    def number(self, count: int, fault: str) -> int:
        """Return the fault's share of `count`, but at least one if the share is not 0."""
        share: float = getattr(self.scenario.faults, fault)
        return max(round(count * share), int(share > 0))


def generate(scenario: Scenario, seed: int) -> Traffic:
    """Draw the traffic of a scenario; the same arguments give the same traffic.

    Each experiment has a random stream of its own, so that a change in one leaves the others as they were.
    """
    *streams, noise = np.random.SeedSequence(seed).spawn(len(scenario.experiments) + 1)
    parts: list[_Columns] = []
    counts: Counter[str] = Counter()
    first_unit = 0
    for index, stream in enumerate(streams):
        draw = _Draw(scenario, np.random.default_rng(stream), counts)
        records, units = _draw_experiment(draw, index, first_unit)
        parts.append(records)
        first_unit += units
    draw = _Draw(scenario, np.random.default_rng(noise), counts)
    records = _with_copies(draw, _with_strays(draw, _concatenate(parts), first_unit))
    records = _with_malformed(draw, records)
    # Stable, so that of records sent in the same millisecond the one drawn first goes first.
    return Traffic(
        scenario=scenario,
        seed=seed,
        injected=MappingProxyType(dict(counts)),
        _records=records.take(np.argsort(records.send_ms, kind="stable")),
    )


def _draw_experiment(draw: _Draw, index: int, first_unit: int) -> tuple[_Columns, int]:
    traffic = draw.scenario.experiments[index]
    units = _draw_units(draw, traffic, first_unit)
    rewards = [
        _draw_rewards(draw, index, position, units)
        for position, metric in enumerate(traffic.spec.metrics)
        if metric.key in traffic.outcomes
    ]
    quickest_ms = np.full(len(units.unit), _FOREVER)
    for reward in rewards:
        np.minimum.at(quickest_ms, reward.unit - first_unit, reward.event_ms)
    exposures = [_exposures(units, index), *_extra_exposures(draw, index, units)]
    records = _concatenate([*exposures, *rewards])
    return _hold_back(draw, records, quickest_ms - units.exposed_ms), len(units.unit)


def _draw_units(draw: _Draw, traffic: ExperimentTraffic, first_unit: int) -> _Units:
    rng, duration_ms = draw.rng, draw.scenario.duration_ms
    count = int(rng.poisson(traffic.units_per_s * duration_ms / 1000))
    exposed_ms = np.sort(rng.integers(0, duration_ms, count))
    epochs = traffic.epochs(0)
    epoch = np.searchsorted([e.effective_ms for e in epochs], exposed_ms, side="right") - 1
    edges = np.cumsum([[e.weights[arm.key] for arm in traffic.spec.arms] for e in epochs], axis=1)
    # The last edge is 1 by definition, whatever rounding made of it.
    arm = (rng.random(count)[:, np.newaxis] >= edges[epoch, :-1]).sum(axis=1)
    codes = math.prod(len(values) for values in traffic.spec.segments.values())
    segment = rng.integers(0, codes, count)
    return _Units(np.arange(first_unit, first_unit + count), exposed_ms, arm, epoch, segment)


def _draw_rewards(draw: _Draw, index: int, position: int, units: _Units) -> _Columns:
    traffic, rng = draw.scenario.experiments[index], draw.rng
    metric = traffic.spec.metrics[position]
    probability, log_mean, log_sd, always_1 = _unit_outcomes(traffic, metric, units)
    hit = np.flatnonzero(rng.random(len(units.unit)) < probability)
    drawn = np.exp(log_mean[hit] + log_sd[hit] * rng.standard_normal(len(hit)))
    event_ms = units.exposed_ms[hit] + _delays(len(hit), metric.window_ms, traffic.reward_delay_ms, rng)
    return _columns(
        len(hit),
        topic=_REWARD,
        experiment=index,
        unit=units.unit[hit],
        metric=position,
        value=np.where(always_1[hit], 1.0, _representable(drawn, metric)),
        event_ms=event_ms,
        send_ms=event_ms,
    )


def _unit_outcomes(
    traffic: ExperimentTraffic, metric: Metric, units: _Units
) -> tuple[Floats, Floats, Floats, Booleans]:
    """Give each unit the parameters that hold for its arm at its exposure."""
    count = len(units.unit)
    probability, log_mean, log_sd = np.zeros(count), np.zeros(count), np.zeros(count)
    always_1 = np.ones(count, dtype=np.bool_)
    for arm_index, arm in enumerate(traffic.spec.arms):
        for since in traffic.outcomes[metric.key][arm.key]:
            rows, outcome = (units.arm == arm_index) & (units.exposed_ms >= since.from_ms), since.outcome
            probability[rows], always_1[rows] = outcome.probability, isinstance(outcome, Conversion)
            if isinstance(outcome, LogNormal):
                log_mean[rows], log_sd[rows] = outcome.log_mean, outcome.log_sd
    return probability, log_mean, log_sd, always_1


def _representable(values: Floats, metric: Metric) -> Floats:
    """Values on the grid of the metric and inside its bound, so that none of them is refused."""
    return np.asarray(np.minimum(np.rint(values / metric.step), metric.max_steps) * metric.step)


def _delays(count: int, window_ms: int, mean_ms: float, rng: np.random.Generator) -> Integers:
    """Exponential delays, given that they end inside the window: by the inverse of the cut distribution."""
    share = -math.expm1(-window_ms / mean_ms)
    delays = -mean_ms * np.log1p(-share * rng.random(count))
    return np.minimum(delays.astype(np.int64), window_ms - 1)


def _exposures(units: _Units, index: int) -> _Columns:
    return _columns(
        len(units.unit),
        topic=_EXPOSURE,
        experiment=index,
        unit=units.unit,
        arm=units.arm,
        epoch=units.epoch,
        segment=units.segment,
        event_ms=units.exposed_ms,
        send_ms=units.exposed_ms,
    )


def _extra_exposures(draw: _Draw, index: int, units: _Units) -> list[_Columns]:
    """Exposures to the own arm again, and to another arm, a while after the first one."""
    arms = len(draw.scenario.experiments[index].spec.arms)
    parts = []
    for fault in ("repeated", "crossovers"):
        rows = draw.chosen(len(units.unit), fault)
        draw.counts[fault] += len(rows)
        step = draw.rng.integers(1, arms, len(rows)) if fault == "crossovers" else 0
        again = replace(
            _Units(*(getattr(units, name)[rows] for name in _Units.__slots__)),
            exposed_ms=units.exposed_ms[rows] + draw.rng.integers(1, _AGAIN_MS + 1, len(rows)),
            arm=(units.arm[rows] + step) % arms,
        )
        parts.append(_exposures(again, index))
    return parts


def _hold_back(draw: _Draw, records: _Columns, quickest_ms: Integers) -> _Columns:
    """Send some records after others that happened later, and some too late to count.

    The first rows of `records` are the units' first exposures; `quickest_ms` is how soon after it the first
    reward of each unit comes.
    """
    horizon_ms, lateness_ms = draw.scenario.horizon_ms, draw.scenario.allowed_lateness_ms
    delay_ms = np.zeros(len(records), dtype=np.int64)
    disordered = draw.chosen(len(records), "out_of_order")
    delay_ms[disordered] = draw.rng.integers(1, max(horizon_ms, 1), len(disordered), endpoint=True)
    overtaken = draw.chosen(len(quickest_ms), "reward_first")
    overtaken = overtaken[quickest_ms[overtaken] < horizon_ms]
    delay_ms[overtaken] = horizon_ms
    late = draw.chosen(len(records), "late")
    delay_ms[late] = lateness_ms + draw.rng.integers(1, lateness_ms + 1, len(late), endpoint=True)
    draw.counts.update(out_of_order=len(disordered), reward_first=len(overtaken), late=len(late))
    return replace(records, send_ms=records.event_ms + delay_ms)


def _with_strays(draw: _Draw, records: _Columns, first_unit: int) -> _Columns:
    rewards = np.flatnonzero(records.topic == _REWARD)
    count = draw.number(len(rewards), "strays") if len(rewards) else 0
    draw.counts["strays"] += count
    strays = records.take(draw.rng.choice(rewards, count) if count else rewards[:0])
    units = np.arange(first_unit, first_unit + count)
    return _concatenate([records, replace(strays, unit=units, send_ms=strays.event_ms)])


def _with_copies(draw: _Draw, records: _Columns) -> _Columns:
    """Name every record and send some twice; not the late ones, whose copies would be late again."""
    horizon_ms = draw.scenario.horizon_ms
    named = replace(records, identity=np.arange(len(records)))
    on_time = np.flatnonzero(records.send_ms - records.event_ms <= horizon_ms)
    copies = named.take(on_time[draw.chosen(len(on_time), "duplicated")])
    draw.counts["duplicated"] += len(copies)
    pause_ms = draw.rng.integers(0, horizon_ms, len(copies), endpoint=True)
    return _concatenate([named, replace(copies, send_ms=copies.send_ms + pause_ms)])


def _with_malformed(draw: _Draw, records: _Columns) -> _Columns:
    count = draw.number(len(records), "malformed")
    draw.counts["malformed"] += count
    kind = np.arange(count) % len(MALFORMED)
    send_ms = np.sort(draw.rng.integers(0, draw.scenario.duration_ms, count))
    extra = _columns(
        count,
        topic=np.array([TOPICS.index(entry.topic) for entry in MALFORMED])[kind],
        experiment=draw.rng.integers(0, len(draw.scenario.experiments), count),
        event_ms=send_ms,
        send_ms=send_ms,
        identity=np.arange(len(records), len(records) + count),
        malformed=kind,
    )
    return _concatenate([records, extra])


# The traffic and its truth ------------------------------------------------------------------------


class Event(NamedTuple):
    """One record to send: logical topic, time from the start in milliseconds, Kafka key and value."""

    topic: str
    send_ms: int
    key: bytes | None
    value: bytes


class Chunk(NamedTuple):
    """Consecutive records, all due once `due_ms` have passed since the start."""

    due_ms: int
    events: list[Event]


@dataclass(frozen=True, slots=True)
class Truth:
    """What the engine must find.

    Attributes:
        statistics: per experiment; their canonical bytes equal those of the engine.
        exposure_outcomes, reward_outcomes: once every reward's window is over.
        dead_letters: number of dead letters per (logical topic, reason).
        injected: number of records or units per kind of fault (the names of `Faults`).
    """

    statistics: Mapping[str, ExperimentStatistics]
    exposure_outcomes: Outcomes
    reward_outcomes: Outcomes
    dead_letters: Mapping[tuple[str, Reason], int]
    injected: Mapping[str, int]

    def units(self, experiment: str) -> dict[str, int]:
        """Units per arm, crossovers taken out."""
        return _by_arm(
            (row.arm, row.units) for row in self.statistics[experiment].units if row.segment == ALL
        )

    def totals(self, experiment: str, metric: str) -> dict[str, int]:
        """Sum of the quantised values of a metric per arm; for a conversion, the units that converted."""
        rows = self.statistics[experiment].moments
        return _by_arm((row.arm, int(row.s)) for row in rows if (row.metric, row.segment) == (metric, ALL))


def _by_arm(rows: Iterator[tuple[str, int]]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for arm, count in rows:
        totals[arm] += count
    return dict(totals)


@dataclass(frozen=True)
class Traffic:
    """The records of one draw, in the order of sending; `generate` makes it."""

    scenario: Scenario
    seed: int
    injected: Mapping[str, int]
    _records: _Columns = field(repr=False)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def last_send_ms(self) -> int:
        """When the last record is sent, from the start; 0 if there is none."""
        return int(self._records.send_ms[-1]) if len(self) else 0

    def count(self, topic: str) -> int:
        """Return the number of records of a logical topic."""
        return int((self._records.topic == TOPICS.index(topic)).sum())

    def chunks(self, start_ms: int = START_MS, *, chunk_ms: int = 50) -> Iterator[Chunk]:
        """Encode the records in steps of `chunk_ms`, for traffic that starts at `start_ms` (epoch ms).

        A step without records is left out.
        """
        encoder = _Encoder(self.scenario, start_ms)
        send_ms = self._records.send_ms
        first = 0
        while first < len(self):
            due_ms = (int(send_ms[first]) // chunk_ms + 1) * chunk_ms
            last = int(np.searchsorted(send_ms, due_ms, side="left"))
            yield Chunk(due_ms, encoder.events(self._records.take(slice(first, last))))
            first = last

    def events(self, start_ms: int = START_MS) -> Iterator[Event]:
        """Every record, for traffic that starts at `start_ms` (epoch ms)."""
        for chunk in self.chunks(start_ms, chunk_ms=1000):
            yield from chunk.events

    def truth(self, start_ms: int = START_MS) -> Truth:
        """Return what the engine must have found when all is over."""
        return Truth(
            statistics={
                traffic.spec.experiment: self.statistics(traffic.spec.experiment, start_ms)
                for traffic in self.scenario.experiments
            },
            exposure_outcomes=self._exposure_outcomes(),
            reward_outcomes=self._reward_outcomes(),
            dead_letters=self._dead_letters(),
            injected=self.injected,
        )

    def statistics(self, experiment: str, start_ms: int = START_MS) -> ExperimentStatistics:
        """Return the final statistics of one experiment."""
        return self.history(experiment, [_FOREVER], start_ms)[0]

    def history(
        self, experiment: str, watermarks_ms: Sequence[int], start_ms: int = START_MS
    ) -> list[ExperimentStatistics]:
        """Return the statistics of one experiment at each of several watermarks, counted from the start.

        The engine may know units a little newer than its watermark, which are left out here; it tests only
        what is mature, and that is equal. Crossovers are known here before they happen.
        """
        index = [traffic.spec.experiment for traffic in self.scenario.experiments].index(experiment)
        marks = np.asarray(watermarks_ms, dtype=np.int64)
        return _history(self._standing, self.scenario, index, start_ms=start_ms, marks=marks)

    @cached_property
    def _standing(self) -> _Standing:
        return _standing(self._records, self.scenario)

    def _outcome_counts(self, topic: int) -> dict[str, int]:
        records, standing = self._records, self._standing
        here = records.topic == topic
        bad = records.malformed[here & (records.malformed >= 0)]
        dead = sum(MALFORMED[kind].reason is not None for kind in bad.tolist())
        return {
            "read": int(here.sum()),
            "late": int((here & standing.late).sum()),
            "duplicate": int((here & standing.duplicate).sum()),
            "dead_lettered": dead,
            "unknown_experiment": len(bad) - dead,
        }

    def _exposure_outcomes(self) -> Outcomes:
        shared = self._outcome_counts(_EXPOSURE)
        crossed = int(self._standing.crossed[self._standing.exposures.unit].sum())
        return Outcomes(**shared, crossover=crossed, counted=len(self._standing.exposures) - crossed)

    def _reward_outcomes(self) -> Outcomes:
        shared = self._outcome_counts(_REWARD)
        counted = int(self._standing.attributed.sum())
        return Outcomes(**shared, counted=counted, unattributed=len(self._standing.rewards) - counted)

    def _dead_letters(self) -> dict[tuple[str, Reason], int]:
        counts: Counter[tuple[str, Reason]] = Counter()
        for kind in self._records.malformed[self._records.malformed >= 0].tolist():
            entry = MALFORMED[kind]
            if entry.reason is not None:
                counts[entry.topic, entry.reason] += 1
        return dict(counts)


@dataclass(frozen=True, slots=True)
class _Standing:
    """What became of the records.

    `late` and `duplicate` go over all records. `exposures` and `rewards` are the records that came past
    these checks, `attributed` goes over those rewards. The rest goes over units: `first` is the row of the
    first exposure in `exposures`, -1 if there is none.
    """

    late: Booleans
    duplicate: Booleans
    exposures: _Columns
    rewards: _Columns
    attributed: Booleans
    first: Integers
    crossed: Booleans


def _standing(records: _Columns, scenario: Scenario) -> _Standing:
    good = records.malformed < 0
    late = good & (records.send_ms - records.event_ms > scenario.allowed_lateness_ms)
    rest = np.flatnonzero(good & ~late)
    _, first_copies = np.unique(records.identity[rest], return_index=True)
    kept = np.zeros(len(records), dtype=np.bool_)
    kept[rest[first_copies]] = True
    exposures = records.take(kept & (records.topic == _EXPOSURE))
    rewards = records.take(kept & (records.topic == _REWARD))
    units = int(records.unit.max(initial=-1)) + 1
    first, crossed = _first_exposures(exposures, units)
    return _Standing(
        late=late,
        duplicate=good & ~late & ~kept,
        exposures=exposures,
        rewards=rewards,
        attributed=_attributed(rewards, exposures, first, scenario),
        first=first,
        crossed=crossed,
    )


def _first_exposures(exposures: _Columns, units: int) -> tuple[Integers, Booleans]:
    """Row of the first exposure of each unit by event time, then order of sending; and who saw two arms."""
    first = np.full(units, _NOWHERE)
    # From the last to the first, so that the first one is written last and stays.
    order = np.argsort(exposures.event_ms, kind="stable")[::-1]
    first[exposures.unit[order]] = order
    crossed = np.zeros(units, dtype=np.bool_)
    crossed[exposures.unit[exposures.arm != exposures.arm[first[exposures.unit]]]] = True
    return first, crossed


def _attributed(rewards: _Columns, exposures: _Columns, first: Integers, scenario: Scenario) -> Booleans:
    windows = _table(scenario, lambda metric: metric.window_ms)[rewards.experiment, rewards.metric]
    row = first[rewards.unit]
    exposed_ms = exposures.event_ms[row] if len(exposures) else np.full(len(rewards), _FOREVER)
    inside = (rewards.event_ms >= exposed_ms) & (rewards.event_ms < exposed_ms + windows)
    return np.asarray((row >= 0) & inside)


def _table(scenario: Scenario, cell: Callable[[Metric], int]) -> Integers:
    """Return a number for each experiment and metric, 0 where there is no metric."""
    width = max(len(traffic.spec.metrics) for traffic in scenario.experiments)
    table = np.zeros((len(scenario.experiments), width), dtype=np.int64)
    for index, traffic in enumerate(scenario.experiments):
        table[index, : len(traffic.spec.metrics)] = [cell(metric) for metric in traffic.spec.metrics]
    return table


def _history(
    standing: _Standing, scenario: Scenario, index: int, *, start_ms: int, marks: Integers
) -> list[ExperimentStatistics]:
    spec = scenario.experiments[index].spec
    exposures = standing.exposures.take(standing.exposures.experiment == index)
    firsts = standing.exposures.take(standing.first[np.unique(exposures.unit)])
    crossed = standing.crossed[firsts.unit]
    clean = firsts.take(~crossed)
    units = {cell: _counts(clean.event_ms[rows], marks) for cell, rows in _cells(clean, spec)}
    moments = {}
    for position, metric in enumerate(spec.metrics):
        steps = _unit_values(standing, index, position, metric)[clean.unit]
        mature_ms = clean.event_ms + metric.window_ms + scenario.allowed_lateness_ms
        for cell, rows in _cells(clean, spec):
            moments[(metric.key, *cell)] = _moments(
                steps[rows], _counts(mature_ms[rows], marks), mature_ms[rows]
            )
    crossovers = _counts(firsts.event_ms[crossed], marks)
    first_ms = int(exposures.event_ms.min(initial=_FOREVER))
    return [
        build(
            units={cell: int(counts[look]) for cell, counts in units.items()},
            moments={cell: sums[look] for cell, sums in moments.items()},
            crossover_units=int(crossovers[look]),
            first_exposure_ms=start_ms + first_ms if first_ms <= min(mark, _FOREVER - 1) else None,
            out_of_range={},
        )
        for look, mark in enumerate(marks.tolist())
    ]


def _counts(times_ms: Integers, marks: Integers) -> Integers:
    """How many of the times are at or below each mark."""
    return np.searchsorted(np.sort(times_ms), marks, side="right")


def _cells(exposures: _Columns, spec: ExperimentSpec) -> Iterator[tuple[tuple[str, int, str], Integers]]:
    """Yield the rows of each (arm, epoch, segment); a unit is in that of all and in one per dimension."""
    everyone = np.zeros(len(exposures), dtype=np.int64)
    dimensions: list[tuple[Integers, tuple[str, ...]]] = [(everyone, (ALL,))]
    code = exposures.segment
    for name, values in spec.segments.items():
        dimensions.append((code % len(values), tuple(f"{name}={value}" for value in values)))
        code = code // len(values)
    keys = [arm.key for arm in spec.arms]
    arm_and_epoch = exposures.epoch * len(keys) + exposures.arm
    for value_at, labels in dimensions:
        cells, cell_at = np.unique(arm_and_epoch * len(labels) + value_at, return_inverse=True)
        for number, cell in enumerate(cells.tolist()):
            rest, value = divmod(cell, len(labels))
            epoch, arm = divmod(rest, len(keys))
            yield (keys[arm], epoch, labels[value]), np.flatnonzero(cell_at == number)


def _unit_values(standing: _Standing, index: int, position: int, metric: Metric) -> Integers:
    """Each unit's quantised value; a unit gives at most one reward per metric."""
    values = np.zeros(len(standing.first), dtype=np.int64)
    rewards = standing.rewards
    rows = standing.attributed & (rewards.experiment == index) & (rewards.metric == position)
    steps = np.rint(rewards.value[rows] / metric.step).astype(np.int64)
    values[rewards.unit[rows]] = steps != 0 if metric.folds_by is Aggregation.ANY else steps
    return values


def _moments(steps: Integers, counts: Integers, mature_ms: Integers) -> list[tuple[int, int, int]]:
    """Count, sum and sum of squares of the first values by maturity, for each of several counts."""
    ordered: NDArray[Any] = steps[np.argsort(mature_ms, kind="stable")]
    largest = int(np.abs(ordered).max(initial=0))
    if largest * largest * len(ordered) >= 2**62:
        ordered = ordered.astype(object)
    sums, squares = (np.concatenate([[0], np.cumsum(y)]) for y in (ordered, ordered * ordered))
    return [(n, int(sums[n]), int(squares[n])) for n in counts.tolist()]


# Encoding -----------------------------------------------------------------------------------------


class _ExposureWire(msgspec.Struct, gc=False, omit_defaults=True):
    id: str
    time: int
    experiment: str
    unit: str
    arm: str
    source: str
    weight_epoch: int
    propensity: float | None
    segments: dict[str, str] = {}


class _RewardWire(msgspec.Struct, gc=False):
    id: str
    time: int
    unit: str
    metric: str
    source: str
    value: float


class _Encoder:
    """Columns to records."""

    def __init__(self, scenario: Scenario, start_ms: int) -> None:
        self._start_ms = start_ms
        self._specs = [traffic.spec for traffic in scenario.experiments]
        self._encode = msgspec.json.Encoder().encode
        self._propensity = [
            [[epoch.weights[arm.key] for arm in traffic.spec.arms] for epoch in traffic.epochs(0)]
            for traffic in scenario.experiments
        ]
        self._segments = [_segment_values(spec) for spec in self._specs]

    def events(self, records: _Columns) -> list[Event]:
        """Encode the records."""
        rows = zip(*(getattr(records, name).tolist() for name in _Columns.__slots__), strict=True)
        return [self._event(row) for row in rows]

    def _event(self, row: tuple[Any, ...]) -> Event:
        (
            topic,
            experiment,
            unit,
            arm,
            epoch,
            segment,
            metric,
            value,
            event_ms,
            send_ms,
            identity,
            malformed,
        ) = row
        if malformed >= 0:
            return self._malformed(malformed, experiment, send_ms, identity)
        spec = self._specs[experiment]
        name, time_ms = f"{spec.experiment}-{unit}", self._start_ms + event_ms
        if topic == _REWARD:
            event = spec.metrics[metric].listens_to
            reward = _RewardWire(f"r{identity}", time_ms, name, event, SOURCE, value)
            return Event(REWARDS, send_ms, name.encode(), self._encode(reward))
        exposure = _ExposureWire(
            f"x{identity}",
            time_ms,
            spec.experiment,
            name,
            spec.arms[arm].key,
            SOURCE,
            epoch,
            # An arm of weight 0 is met by crossovers only, and 0 is no propensity.
            self._propensity[experiment][epoch][arm] or None,
            self._segments[experiment][segment],
        )
        return Event(EXPOSURES, send_ms, name.encode(), self._encode(exposure))

    def _malformed(self, kind: int, experiment: int, send_ms: int, identity: int) -> Event:
        entry, spec = MALFORMED[kind], self._specs[experiment]
        fields = {
            "id": f"m{identity}",
            "time": self._start_ms + send_ms,
            "unit": f"malformed-{identity}",
            "experiment": spec.experiment,
            "arm": spec.control.key,
            "metric": spec.metrics[0].listens_to,
        }
        key = None if entry.key is None else (entry.key % fields).encode()
        return Event(entry.topic, send_ms, key, (entry.template % fields).encode())


def _segment_values(spec: ExperimentSpec) -> list[dict[str, str]]:
    """Segment values of each code; the first dimension varies fastest, as `_cells` takes it apart."""
    names = list(spec.segments)
    tuples = itertools.product(*(spec.segments[name] for name in reversed(names)))
    return [dict(zip(reversed(names), values, strict=True)) for values in tuples]
