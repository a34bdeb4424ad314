"""Counts units of one source partition after the other; a unit's records are all in one of them.

What is kept is sums: the units themselves are forgotten with their partition.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from stream_xp.domain.assignment import in_slots, layer_config
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Metric, Role
from stream_xp.domain.layer_rules import Relation, relation
from stream_xp.domain.layers import HOLDOUT_ARM
from stream_xp.engine.interactions import CellKey, Sums
from stream_xp.services.oracle.recompute import (
    Hits,
    Lateness,
    Screening,
    Unit,
    VersionKey,
    all_members,
    value_of,
)

PairKey: TypeAlias = tuple[str, str]
"""Two experiments, in alphabetical order."""
Cells: TypeAlias = dict[CellKey, Sums]


@dataclass(slots=True)
class Counts:
    """Sums over the source partitions that were counted.

    Attributes:
        units, outside, held_out: by experiment, as in `ExperimentUnits`.
        shared: by pair.
        cells: by pair, experiment of the metric, and metric.
    """

    units: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    held_out: Counter[str] = field(default_factory=Counter)
    shared: Counter[PairKey] = field(default_factory=Counter)
    cells: defaultdict[tuple[PairKey, str, str], Cells] = field(default_factory=lambda: defaultdict(dict))

    def add(self, screening: Screening, running: Sequence[ExperimentRecord]) -> None:
        """Count one source partition."""
        populations, hits = all_members(screening)
        specs = [record.spec for record in running]
        of = {spec.experiment: populations.get(_version(spec), {}) for spec in specs}
        for spec in specs:
            units = of[spec.experiment]
            self.units[spec.experiment] += len(units)
            self.outside[spec.experiment] += _outside(spec, units)
            holdouts = [one for one in specs if one.holdout and relation(one, spec) is Relation.HELD_OUT]
            self.held_out[spec.experiment] += _held_out(holdouts, units)
        for first, second in pairs(specs):
            both = of[first.experiment].keys() & of[second.experiment].keys()
            self.shared[first.experiment, second.experiment] += len(both)
            if both and relation(first, second) is Relation.FREE:
                self._measure(
                    first,
                    second,
                    both=sorted(both),
                    populations=populations,
                    hits=hits,
                    rules=screening.rules,
                )

    def _measure(
        self,
        first: ExperimentSpec,
        second: ExperimentSpec,
        *,
        both: Sequence[str],
        populations: Mapping[VersionKey, Mapping[str, Unit]],
        hits: Mapping[VersionKey, Hits],
        rules: Lateness,
    ) -> None:
        ones, twos = populations[_version(first)], populations[_version(second)]
        units = [(name, ones[name], twos[name]) for name in both]
        clean = [one for one in units if not (one[1].crossover or one[2].crossover)]
        pair = (first.experiment, second.experiment)
        for spec in (first, second):
            rewards = hits.get(_version(spec), {})
            for metric in tested(spec):
                cells = self.cells[pair, spec.experiment, metric.key]
                for name, one, two in clean:
                    if _measured(one, two, own=one if spec is first else two, metric=metric, rules=rules):
                        key = (one.arm, two.arm, one.epoch, two.epoch)
                        value = value_of(metric, rewards, name)
                        n, s, q = cells.get(key, (0, 0, 0))
                        cells[key] = (n + 1, s + value, q + value * value)


def pairs(specs: Sequence[ExperimentSpec]) -> Iterator[tuple[ExperimentSpec, ExperimentSpec]]:
    """Every two experiments, each pair and its members in alphabetical order."""
    return itertools.combinations(sorted(specs, key=lambda spec: spec.experiment), 2)


def tested(spec: ExperimentSpec) -> list[Metric]:
    """The metrics in which an interaction is looked for: primary ones and guardrails that are compared by means."""
    return [metric for metric in spec.metrics if metric.role is not Role.SECONDARY and metric.averaged]


def untested(spec: ExperimentSpec) -> list[Metric]:
    """The other primary metrics and guardrails."""
    return [metric for metric in spec.metrics if metric.role is not Role.SECONDARY and not metric.averaged]


def _version(spec: ExperimentSpec) -> VersionKey:
    return spec.experiment, spec.version


def _outside(spec: ExperimentSpec, units: Mapping[str, Unit]) -> int:
    layer = layer_config(spec.layer)
    if layer is None:
        return 0
    # Of a holdout all units are units; the slot is the arm.
    return sum(
        in_slots(layer, name) != (not spec.holdout or unit.arm == HOLDOUT_ARM) for name, unit in units.items()
    )


def _held_out(holdouts: Sequence[ExperimentSpec], units: Mapping[str, Unit]) -> int:
    layers = [layer for one in holdouts if (layer := layer_config(one.layer)) is not None]
    return sum(any(in_slots(layer, name) for layer in layers) for name in units)


def _measured(one: Unit, two: Unit, *, own: Unit, metric: Metric, rules: Lateness) -> bool:
    """Whether a unit's value is final, and the later of its exposures came while the value could still change."""
    later_ms = max(one.t0_ms, two.t0_ms)
    return later_ms < own.t0_ms + metric.window_ms and rules.mature(later_ms + metric.window_ms)
