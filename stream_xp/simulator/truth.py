"""What becomes of the records, and what the engine must find: recounted by docs/semantics.md, without the engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stream_xp.domain.experiment import Aggregation, ExperimentSpec, Metric
from stream_xp.domain.statistics import ALL, ExperimentStatistics, Outcomes, build
from stream_xp.errors import Reason
from stream_xp.simulator.columns import EXPOSURE, FOREVER, NOWHERE, REWARD, Booleans, Columns, Integers
from stream_xp.simulator.scenario import Scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


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


@dataclass(frozen=True, slots=True)
class Standing:
    """What became of the records.

    `late` and `duplicate` go over all records. `exposures` and `rewards` are the records that came past
    these checks, `attributed` goes over those rewards. The rest goes over units: `first` is the row of the
    first exposure in `exposures`, -1 if there is none.
    """

    late: Booleans
    duplicate: Booleans
    exposures: Columns
    rewards: Columns
    attributed: Booleans
    first: Integers
    crossed: Booleans


def standing_of(records: Columns, scenario: Scenario) -> Standing:
    """Judge all records of a draw, which stand in the order of their sending."""
    good = records.malformed < 0
    late = good & (records.send_ms - records.event_ms > scenario.allowed_lateness_ms)
    rest = np.flatnonzero(good & ~late)
    _, first_copies = np.unique(records.identity[rest], return_index=True)
    kept = np.zeros(len(records), dtype=np.bool_)
    kept[rest[first_copies]] = True
    exposures = records.take(kept & (records.topic == EXPOSURE))
    rewards = records.take(kept & (records.topic == REWARD))
    units = int(records.unit.max(initial=-1)) + 1
    first, crossed = _first_exposures(exposures, units)
    return Standing(
        late=late,
        duplicate=good & ~late & ~kept,
        exposures=exposures,
        rewards=rewards,
        attributed=_attributed(rewards, exposures, first, scenario),
        first=first,
        crossed=crossed,
    )


def _first_exposures(exposures: Columns, units: int) -> tuple[Integers, Booleans]:
    """Row of the first exposure of each unit by event time, then order of sending; and who saw two arms."""
    first = np.full(units, NOWHERE)
    # From the last to the first, so that the first one is written last and stays.
    order = np.argsort(exposures.event_ms, kind="stable")[::-1]
    first[exposures.unit[order]] = order
    crossed = np.zeros(units, dtype=np.bool_)
    crossed[exposures.unit[exposures.arm != exposures.arm[first[exposures.unit]]]] = True
    return first, crossed


def _attributed(rewards: Columns, exposures: Columns, first: Integers, scenario: Scenario) -> Booleans:
    windows = _table(scenario, lambda metric: metric.window_ms)[rewards.experiment, rewards.metric]
    row = first[rewards.unit]
    exposed_ms = exposures.event_ms[row] if len(exposures) else np.full(len(rewards), FOREVER)
    inside = (rewards.event_ms >= exposed_ms) & (rewards.event_ms < exposed_ms + windows)
    return np.asarray((row >= 0) & inside)


def _table(scenario: Scenario, cell: Callable[[Metric], int]) -> Integers:
    """Return a number for each experiment and metric, 0 where there is no metric."""
    width = max(len(traffic.spec.metrics) for traffic in scenario.experiments)
    table = np.zeros((len(scenario.experiments), width), dtype=np.int64)
    for index, traffic in enumerate(scenario.experiments):
        table[index, : len(traffic.spec.metrics)] = [cell(metric) for metric in traffic.spec.metrics]
    return table


def history_of(
    standing: Standing, scenario: Scenario, index: int, *, start_ms: int, marks: Integers
) -> list[ExperimentStatistics]:
    """Return the statistics of one experiment at each of several watermarks.

    Args:
        standing: what became of the records.
        scenario: that they were drawn from.
        index: of the experiment in the scenario.
        start_ms: when the traffic starts, epoch milliseconds.
        marks: the watermarks, from the start.
    """
    spec = scenario.experiments[index].spec
    exposures = standing.exposures.take(standing.exposures.experiment == index)
    firsts = standing.exposures.take(standing.first[np.unique(exposures.unit)])
    crossed = standing.crossed[firsts.unit]
    clean = firsts.take(~crossed)
    units = {cell: _counts(clean.event_ms[rows], marks) for cell, rows in _cells(clean, spec)}
    # A unit is settled once the lateness has passed, and not yet at the very millisecond.
    settled_ms = clean.event_ms + scenario.allowed_lateness_ms + 1
    settled = {cell: _counts(settled_ms[rows], marks) for cell, rows in _cells(clean, spec)}
    moments = {}
    for position, metric in enumerate(spec.metrics):
        steps = _unit_values(standing, index, position, metric)[clean.unit]
        mature_ms = clean.event_ms + metric.window_ms + scenario.allowed_lateness_ms
        for cell, rows in _cells(clean, spec):
            moments[(metric.key, *cell)] = _moments(
                steps[rows], _counts(mature_ms[rows], marks), mature_ms[rows]
            )
    crossovers = _counts(firsts.event_ms[crossed], marks)
    first_ms = int(exposures.event_ms.min(initial=FOREVER))
    return [
        build(
            units={cell: int(counts[look]) for cell, counts in units.items()},
            settled={cell: int(counts[look]) for cell, counts in settled.items()},
            moments={cell: sums[look] for cell, sums in moments.items()},
            crossover_units=int(crossovers[look]),
            first_exposure_ms=start_ms + first_ms if first_ms <= min(mark, FOREVER - 1) else None,
            out_of_range={},
        )
        for look, mark in enumerate(marks.tolist())
    ]


def _counts(times_ms: Integers, marks: Integers) -> Integers:
    """How many of the times are at or below each mark."""
    return np.searchsorted(np.sort(times_ms), marks, side="right")


def _cells(exposures: Columns, spec: ExperimentSpec) -> Iterator[tuple[tuple[str, int, str], Integers]]:
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


def _unit_values(standing: Standing, index: int, position: int, metric: Metric) -> Integers:
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
