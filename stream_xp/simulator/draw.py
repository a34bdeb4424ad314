"""Draws the traffic of a scenario once from a seed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from stream_xp.simulator.columns import EXPOSURE, FOREVER, REWARD, TOPICS, Columns, columns, concatenate
from stream_xp.simulator.malformed import MALFORMED
from stream_xp.simulator.scenario import Conversion, ExperimentTraffic, LogNormal, Scenario
from stream_xp.simulator.traffic import Traffic

if TYPE_CHECKING:
    from stream_xp.domain.experiment import Metric
    from stream_xp.simulator.columns import Booleans, Floats, Integers

_AGAIN_MS: Final = 1000


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
    parts: list[Columns] = []
    counts: Counter[str] = Counter()
    first_unit = 0
    for index, stream in enumerate(streams):
        draw = _Draw(scenario, np.random.default_rng(stream), counts)
        records, units = _draw_experiment(draw, index, first_unit)
        parts.append(records)
        first_unit += units
    draw = _Draw(scenario, np.random.default_rng(noise), counts)
    records = _with_copies(draw, _with_strays(draw, concatenate(parts), first_unit))
    records = _with_malformed(draw, records)
    # Stable, so that of records sent in the same millisecond the one drawn first goes first.
    return Traffic(
        scenario=scenario,
        seed=seed,
        injected=MappingProxyType(dict(counts)),
        _records=records.take(np.argsort(records.send_ms, kind="stable")),
    )


def _draw_experiment(draw: _Draw, index: int, first_unit: int) -> tuple[Columns, int]:
    traffic = draw.scenario.experiments[index]
    units = _draw_units(draw, traffic, first_unit)
    rewards = [
        _draw_rewards(draw, index, position, units)
        for position, metric in enumerate(traffic.spec.metrics)
        if metric.key in traffic.outcomes
    ]
    quickest_ms = np.full(len(units.unit), FOREVER)
    for reward in rewards:
        np.minimum.at(quickest_ms, reward.unit - first_unit, reward.event_ms)
    exposures = [_exposures(units, index), *_extra_exposures(draw, index, units)]
    records = concatenate([*exposures, *rewards])
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


def _draw_rewards(draw: _Draw, index: int, position: int, units: _Units) -> Columns:
    traffic, rng = draw.scenario.experiments[index], draw.rng
    metric = traffic.spec.metrics[position]
    probability, log_mean, log_sd, always_1 = _unit_outcomes(traffic, metric, units)
    hit = np.flatnonzero(rng.random(len(units.unit)) < probability)
    drawn = np.exp(log_mean[hit] + log_sd[hit] * rng.standard_normal(len(hit)))
    event_ms = units.exposed_ms[hit] + _delays(len(hit), metric.window_ms, traffic.reward_delay_ms, rng)
    return columns(
        len(hit),
        topic=REWARD,
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


def _exposures(units: _Units, index: int) -> Columns:
    return columns(
        len(units.unit),
        topic=EXPOSURE,
        experiment=index,
        unit=units.unit,
        arm=units.arm,
        epoch=units.epoch,
        segment=units.segment,
        event_ms=units.exposed_ms,
        send_ms=units.exposed_ms,
    )


def _extra_exposures(draw: _Draw, index: int, units: _Units) -> list[Columns]:
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


def _hold_back(draw: _Draw, records: Columns, quickest_ms: Integers) -> Columns:
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


def _with_strays(draw: _Draw, records: Columns, first_unit: int) -> Columns:
    rewards = np.flatnonzero(records.topic == REWARD)
    count = draw.number(len(rewards), "strays") if len(rewards) else 0
    draw.counts["strays"] += count
    strays = records.take(draw.rng.choice(rewards, count) if count else rewards[:0])
    units = np.arange(first_unit, first_unit + count)
    return concatenate([records, replace(strays, unit=units, send_ms=strays.event_ms)])


def _with_copies(draw: _Draw, records: Columns) -> Columns:
    """Name every record and send some twice; not the late ones, whose copies would be late again."""
    horizon_ms = draw.scenario.horizon_ms
    named = replace(records, identity=np.arange(len(records)))
    on_time = np.flatnonzero(records.send_ms - records.event_ms <= horizon_ms)
    copies = named.take(on_time[draw.chosen(len(on_time), "duplicated")])
    draw.counts["duplicated"] += len(copies)
    pause_ms = draw.rng.integers(0, horizon_ms, len(copies), endpoint=True)
    return concatenate([named, replace(copies, send_ms=copies.send_ms + pause_ms)])


def _with_malformed(draw: _Draw, records: Columns) -> Columns:
    count = draw.number(len(records), "malformed")
    draw.counts["malformed"] += count
    kind = np.arange(count) % len(MALFORMED)
    send_ms = np.sort(draw.rng.integers(0, draw.scenario.duration_ms, count))
    extra = columns(
        count,
        topic=np.array([TOPICS.index(entry.topic) for entry in MALFORMED])[kind],
        experiment=draw.rng.integers(0, len(draw.scenario.experiments), count),
        event_ms=send_ms,
        send_ms=send_ms,
        identity=np.arange(len(records), len(records) + count),
        malformed=kind,
    )
    return concatenate([records, extra])
