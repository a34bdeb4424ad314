"""The registry as the arrays that the kernels walk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from stream_xp.domain.experiment import Aggregation
from stream_xp.engine import kernels
from stream_xp.engine.registry import Registry, Slot

_AGGREGATIONS = {
    Aggregation.ANY: kernels.AGG_ANY,
    Aggregation.SUM: kernels.AGG_SUM,
    Aggregation.MAX: kernels.AGG_MAX,
    Aggregation.LAST: kernels.AGG_LAST,
}


@dataclass(slots=True)
class Pools:
    """Where each (slot, weight epoch) has its cells; bases never move once given.

    Attributes:
        units, moments: (slot, epoch) to the base in its pool, counted in cells.
        units_size, moments_size: cells given out so far.
    """

    units: dict[tuple[int, int], int] = field(default_factory=dict)
    moments: dict[tuple[int, int], int] = field(default_factory=dict)
    units_size: int = 0
    moments_size: int = 0

    def reserve(self, slot: Slot) -> None:
        """Give every weight epoch of the slot its cells."""
        cells = len(slot.arms) * len(slot.segments.labels)
        for epoch in range(max(epoch.epoch for epoch in slot.epochs) + 1):
            if (slot.index, epoch) not in self.units:
                self.units[slot.index, epoch] = self.units_size
                self.moments[slot.index, epoch] = self.moments_size
                self.units_size += cells
                self.moments_size += cells * len(slot.spec.metrics)


def build_layout(registry: Registry, pools: Pools) -> kernels.Layout:
    """Arrays of all slots and listeners; reserves cells for what is new."""
    tables = _Tables()
    for slot in registry.slots:
        pools.reserve(slot)
        tables.add_slot(slot, pools)
    tables.add_listeners(registry)
    return tables.arrays()


class _Tables:
    """The rows of each table, a slot at a time."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, ...]] = []
        self.metrics: list[tuple[float, ...]] = []
        self.stages: list[tuple[int, int]] = []
        self.stage_metric: list[int] = []
        self.intervals: list[tuple[int, int]] = []
        self.dimensions: list[tuple[int, int]] = []
        self.epochs: list[tuple[int, int]] = []
        self.listener_start: list[int] = [0]
        self.listeners: list[tuple[int, int]] = []

    def add_slot(self, slot: Slot, pools: Pools) -> None:
        aggregations = [_AGGREGATIONS[metric.folds_by] for metric in slot.spec.metrics]
        widths = [kernels.VALUE_WIDTH[aggregation] for aggregation in aggregations]
        self.slots.append(self._starts(sum(widths), len(slot.segments.labels), len(slot.arms)))
        self._add_stages([metric.window_ms for metric in slot.spec.metrics])
        self.metrics += [
            (aggregation, metric.step, metric.max_steps, metric.window_ms, sum(widths[:at]))
            for at, (metric, aggregation) in enumerate(zip(slot.spec.metrics, aggregations, strict=True))
        ]
        self.intervals += [(interval.from_ms, interval.until_ms) for interval in slot.intervals]
        sizes = slot.segments.sizes
        self.dimensions += [(size, 1 + sum(sizes[:at])) for at, size in enumerate(sizes)]
        self.epochs += [
            (pools.units[key], pools.moments[key]) for key in sorted(pools.units) if key[0] == slot.index
        ]

    def add_listeners(self, registry: Registry) -> None:
        for event in registry.events:
            for slot, metric in registry.all_listeners(event):
                first = self.slots[slot.index][3]
                at = [other.key for other in slot.spec.metrics].index(metric.key)
                self.listeners.append((slot.index, first + at))
            self.listener_start.append(len(self.listeners))

    def arrays(self) -> kernels.Layout:
        return kernels.Layout(
            slots=np.array([*self.slots, self._starts(0, 0, 0)], kernels.SLOT),
            metrics=np.array(self.metrics, kernels.METRIC),
            stages=np.array([*self.stages, (0, len(self.stage_metric))], kernels.STAGE),
            stage_metric=np.array(self.stage_metric, np.int64),
            intervals=np.array(self.intervals, kernels.INTERVAL),
            dimensions=np.array(self.dimensions, kernels.DIMENSION),
            epochs=np.array(self.epochs, kernels.EPOCH),
            listener_start=np.array(self.listener_start, np.int64),
            listeners=np.array(self.listeners, kernels.LISTENER),
        )

    def _starts(self, width: int, cells: int, arms: int) -> tuple[int, ...]:
        return (
            width,
            cells,
            arms,
            len(self.metrics),
            len(self.stages),
            len(self.intervals),
            len(self.dimensions),
            len(self.epochs),
        )

    def _add_stages(self, windows: list[int]) -> None:
        first = len(self.metrics)
        for window in sorted(set(windows)):
            self.stages.append((window, len(self.stage_metric)))
            self.stage_metric += [first + at for at, other in enumerate(windows) if other == window]
