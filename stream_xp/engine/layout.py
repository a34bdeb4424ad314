"""The registry as the arrays that the kernels walk."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stream_xp.domain.buckets import kept_buckets
from stream_xp.domain.experiment import (
    Adjustment,
    Aggregation,
    Denominator,
    ExperimentSpec,
    Metric,
    MetricKind,
)
from stream_xp.engine import kernels
from stream_xp.engine.registry import Registry, Slot, Stream, streams, used_covariate
from stream_xp.errors import ConfigError

_AGGREGATIONS = {
    Aggregation.ANY: kernels.AGG_ANY,
    Aggregation.SUM: kernels.AGG_SUM,
    Aggregation.MAX: kernels.AGG_MAX,
    Aggregation.LAST: kernels.AGG_LAST,
    Aggregation.FIRST: kernels.AGG_FIRST,
}


class Cells(NamedTuple):
    """What a metric, or one of its buckets, keeps for each (arm, segment) of a weight epoch.

    Attributes:
        name: what stands as the metric in the rows of statistics.
        kind: MOMENTS, PRODUCTS, EVENTS or HISTOGRAM of the kernels.
        words: int64 words per cell.
        start: words before the metric's first cell within the epoch's block.
    """

    name: str
    kind: int
    words: int
    start: int


def cells_of(spec: ExperimentSpec, cells: int) -> list[Cells]:
    """The cells of each metric, in the order of the file, then of each bucket; each has `cells` in an epoch."""
    sizes = []
    for metric in spec.metrics:
        kind = _cell_kind(metric)
        words = metric.bins if kind == kernels.HISTOGRAM else kernels.CELL_WORDS[kind]
        sizes.append((metric.key, kind, words))
    for one in kept_buckets(spec):
        kind = kernels.MOMENTS if one.beside is None else kernels.PRODUCTS
        sizes.append((one.name, kind, kernels.CELL_WORDS[kind]))
    starts = itertools.accumulate((words * cells for _, _, words in sizes), initial=0)
    return [Cells(*size, start) for size, start in zip(sizes, starts, strict=False)]


def _cell_kind(metric: Metric) -> int:
    if metric.kind is MetricKind.LATENCY:
        return kernels.HISTOGRAM
    if metric.kind is MetricKind.COUNT and metric.at_once:
        return kernels.EVENTS
    if metric.kind is MetricKind.RATIO or metric.adjustment is not Adjustment.NONE:
        return kernels.PRODUCTS
    return kernels.MOMENTS


def epoch_cells(slot: Slot) -> int:
    """(arm, segment) pairs of a slot."""
    return len(slot.arms) * len(slot.segments.labels)


def epoch_words(slot: Slot) -> int:
    """Words in the moments pool for one weight epoch of a slot."""
    cells = epoch_cells(slot)
    return sum(metric.words * cells for metric in cells_of(slot.spec, cells))


def metric_rows(spec: ExperimentSpec) -> int:
    """Rows of a slot in `kernels.Layout.metrics`: metrics, denominators, buckets, covariate."""
    return len(streams(spec)) + (used_covariate(spec) is not None)


@dataclass(slots=True)
class Pools:
    """Where each (slot, weight epoch) has its cells; bases never move once given.

    Attributes:
        units, moments: (slot, epoch) to the base in its pool, counted in words.
        units_size, moments_size: words given out so far.
    """

    units: dict[tuple[int, int], int] = field(default_factory=dict)
    moments: dict[tuple[int, int], int] = field(default_factory=dict)
    units_size: int = 0
    moments_size: int = 0

    def reserve(self, slot: Slot) -> None:
        """Give every weight epoch of the slot its cells."""
        for epoch in range(max(epoch.epoch for epoch in slot.epochs) + 1):
            if (slot.index, epoch) not in self.units:
                self.units[slot.index, epoch] = self.units_size
                self.moments[slot.index, epoch] = self.moments_size
                self.units_size += epoch_cells(slot)
                self.moments_size += epoch_words(slot)


def build_layout(registry: Registry, pools: Pools) -> kernels.Layout:
    """Arrays of all slots and listeners; reserves cells for what is new."""
    _check_bounds(registry)
    tables = _Tables()
    for slot in registry.slots:
        pools.reserve(slot)
        tables.add_slot(slot, pools)
    tables.add_listeners(registry)
    return tables.arrays()


def _check_bounds(registry: Registry) -> None:
    if len(registry.slots) > kernels.MAX_SLOTS:
        raise ConfigError(
            f"{len(registry.slots)} versions of experiments are more than the {kernels.MAX_SLOTS} that one "
            "deployment holds: delete old ones, or start under a new prefix"
        )
    for slot in registry.slots:
        if max(epoch.epoch for epoch in slot.epochs) >= kernels.MAX_EPOCHS:
            raise ConfigError(
                f"{slot.experiment} version {slot.version} has more than {kernels.MAX_EPOCHS} weight epochs: "
                "raise `version`"
            )


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
        rows = _metric_rows(slot, len(self.metrics))
        width = sum(kernels.VALUE_WIDTH[row.aggregation] for row in rows)
        covariate = len(self.metrics) + len(rows) - 1 if used_covariate(slot.spec) else -1
        self.slots.append(self._starts(width, len(slot.segments.labels), len(slot.arms), covariate))
        for stage, window_ms in enumerate(_stage_windows(slot.spec)):
            self.stages.append((window_ms, len(self.stage_metric)))
            first = len(self.metrics)
            self.stage_metric += [first + at for at, row in enumerate(rows) if row.stage == stage]
        self.metrics += rows
        self.intervals += [(interval.from_ms, interval.until_ms) for interval in slot.intervals]
        sizes = slot.segments.sizes
        self.dimensions += [(size, 1 + sum(sizes[:at])) for at, size in enumerate(sizes)]
        self.epochs += [
            (pools.units[key], pools.moments[key]) for key in sorted(pools.units) if key[0] == slot.index
        ]

    def add_listeners(self, registry: Registry) -> None:
        for event in registry.events:
            for listener in registry.all_listeners(event):
                first = self.slots[listener.slot.index][_METRIC_START]
                self.listeners.append((listener.slot.index, first + listener.at))
            self.listener_start.append(len(self.listeners))

    def arrays(self) -> kernels.Layout:
        return kernels.Layout(
            slots=np.array([*self.slots, self._starts(0, 0, 0, -1)], kernels.SLOT),
            metrics=np.array(self.metrics, kernels.METRIC),
            stages=np.array([*self.stages, (0, len(self.stage_metric))], kernels.STAGE),
            stage_metric=np.array(self.stage_metric, np.int64),
            intervals=np.array(self.intervals, kernels.INTERVAL),
            dimensions=np.array(self.dimensions, kernels.DIMENSION),
            epochs=np.array(self.epochs, kernels.EPOCH),
            listener_start=np.array(self.listener_start, np.int64),
            listeners=np.array(self.listeners, kernels.LISTENER),
        )

    def _starts(self, width: int, cells: int, arms: int, covariate: int) -> tuple[int, ...]:
        return (
            width,
            cells,
            arms,
            covariate,
            len(self.metrics),
            len(self.stages),
            len(self.intervals),
            len(self.dimensions),
            len(self.epochs),
        )


_METRIC_START = (kernels.SLOT.names or ()).index("metric_start")


class _MetricRow(NamedTuple):
    """A row of `kernels.METRIC`."""

    aggregation: int
    scale: float
    max_steps: float
    least: float
    from_ms: int
    window_ms: int
    word: int
    kind: int
    words: int
    cells: int
    stage: int
    other: int
    counts_for: int


def _stage_windows(spec: ExperimentSpec) -> list[int]:
    """The times after first exposure at which something matures, ascending: ends of windows and of buckets."""
    windows = {metric.window_ms for metric in spec.metrics if not metric.at_once}
    return sorted(windows | {one.bucket.until_ms for one in kept_buckets(spec)})


def _metric_rows(slot: Slot, first: int) -> list[_MetricRow]:
    """The rows of a slot: metrics, denominators, buckets, the covariate; `first` is the place of the first."""
    spec = slot.spec
    listed = streams(spec)
    leads = [metric.key for metric in spec.metrics]
    others = _second_values(listed, first)
    rows: list[_MetricRow] = []
    word = 0
    for stream, other in zip(listed, others, strict=True):
        row = _stream_row(stream, word)._replace(
            other=other,
            counts_for=first + leads.index(stream.metric.key),
        )
        rows.append(row)
        word += kernels.VALUE_WIDTH[row.aggregation]
    windows = _stage_windows(spec)
    counted = [at for at, stream in enumerate(listed) if not isinstance(stream.source, Denominator)]
    for at, cells in zip(counted, cells_of(spec, epoch_cells(slot)), strict=True):
        stage = kernels.AT_ONCE if listed[at].metric.at_once else windows.index(rows[at].window_ms)
        rows[at] = rows[at]._replace(kind=cells.kind, words=cells.words, cells=cells.start, stage=stage)
    if used_covariate(spec):
        rows.append(_COVARIATE._replace(word=word))
    return rows


def _second_values(listed: list[Stream], first: int) -> list[int]:
    """The row of each stream's second value: the denominator, the bucket that it stands beside, else the covariate."""
    places = {
        (stream.metric.key, stream.bucket): first + at
        for at, stream in enumerate(listed)
        if stream.bucket is not None or isinstance(stream.source, Denominator)
    }
    covariate = first + len(listed)
    return [places.get((stream.metric.key, stream.beside), covariate) for stream in listed]


def _stream_row(stream: Stream, word: int) -> _MetricRow:
    counts = stream.metric.kind is MetricKind.COUNT
    return _COVARIATE._replace(
        aggregation=kernels.AGG_COUNT if counts else _AGGREGATIONS[stream.source.folds_by],
        scale=stream.source.step,
        max_steps=stream.source.max_steps,
        least=stream.least,
        from_ms=0 if stream.bucket is None else stream.bucket.from_ms,
        window_ms=stream.metric.window_ms if stream.bucket is None else stream.bucket.until_ms,
        word=word,
    )


_COVARIATE = _MetricRow(
    aggregation=kernels.AGG_SUM,
    scale=1.0,
    max_steps=0.0,
    least=0.0,
    from_ms=0,
    window_ms=0,
    word=0,
    kind=kernels.MOMENTS,
    words=0,
    cells=0,
    stage=kernels.NO_STAGE,
    other=0,
    counts_for=0,
)
"""The row of a covariate: one word that no reward changes."""
