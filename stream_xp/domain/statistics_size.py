"""How large the statistics of a version can become, and how many weight epochs it can have for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stream_xp.domain.buckets import kept_buckets
from stream_xp.domain.experiment import OTHER, Adjustment, MetricKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stream_xp.domain.experiment import ExperimentSpec, Metric

MAX_HISTOGRAM_CELLS = 2**17
"""Histogram bins of one weight epoch, all arms and segments: filled to the last, they still fit one record."""

MAX_STATISTICS_BYTES = 1_000_000
"""Rows of a statistics record; the topic takes 1 MiB, and the record has more than its rows."""

MAX_WEIGHT_EPOCHS = 4096
"""Of one version, however small its rows: two weeks of weights that change every five minutes.

Each costs a stratum in every evaluation and a line in every record of the experiment (docs/semantics.md).
"""


def most_epochs(spec: ExperimentSpec) -> int:
    """How many weight epochs a version can have, so that its statistics in one partition stay one record.

    As many as fit if every row of every epoch is there and has large numbers.
    """
    return min(MAX_WEIGHT_EPOCHS, MAX_STATISTICS_BYTES // (row_bytes(spec) + _bin_bytes(spec)))


def row_bytes(spec: ExperimentSpec) -> int:
    """Bytes of one weight epoch in a statistics record, the bins of histograms left out."""
    labels = [f"{name}={value}" for name, values in spec.segments.items() for value in (*values, OTHER)]
    segments, segment_bytes = 1 + len(labels), sum(len(label.encode()) for label in labels)
    arms, arm_bytes = len(spec.arms), sum(len(arm.key) for arm in spec.arms)
    rows = [
        (0, 2 * _UNIT_DIGITS),
        *(row for metric in spec.metrics for row in _rows(metric)),
        *_bucket_rows(spec),
    ]
    keys = arms * segment_bytes + segments * arm_bytes
    return sum(keys + arms * segments * (key_bytes + _FRAME_BYTES + digits) for key_bytes, digits in rows)


def histogram_cells(spec: ExperimentSpec, latencies: Iterable[Metric]) -> int:
    """Histogram bins of these latencies in one weight epoch, over all arms and segments."""
    bins = sum(metric.bins for metric in latencies)
    return bins * len(spec.arms) * (1 + sum(len(values) + 1 for values in spec.segments.values()))


_FRAME_BYTES = 24
"""Brackets, quotes and commas of a row, and its epoch."""
_UNIT_DIGITS = 8
_BIN_BYTES = 12


def _rows(metric: Metric) -> list[tuple[int, int]]:
    """Bytes of the metric's key, and digits of the numbers, in each row of one arm, epoch and segment."""
    key_bytes = len(metric.key)
    if metric.at_once or metric.kind is MetricKind.LATENCY:
        return [(key_bytes, 2 * _UNIT_DIGITS)]
    # Of a unit's value: that of a reward and three digits more, for the rewards that are added up.
    value = 1 if metric.kind is MetricKind.CONVERSION else 3 + len(str(metric.max_steps))
    value = 6 if metric.kind is MetricKind.COUNT else value
    rows = [(key_bytes, 3 * _UNIT_DIGITS + 3 * value)]
    if metric.kind is MetricKind.RATIO or metric.adjustment is not Adjustment.NONE:
        rows.append((key_bytes, 3 * _UNIT_DIGITS + 6 * value))
    return rows


def _bucket_rows(spec: ExperimentSpec) -> list[tuple[int, int]]:
    """The same of every bucket: its sums, and its products where it stands beside another."""
    found = []
    for one in kept_buckets(spec):
        (_, digits), *_ = _rows(one.metric)
        found.append((len(one.name), digits))
        if one.beside is not None:
            found.append((len(one.name), 2 * digits))
    return found


def _bin_bytes(spec: ExperimentSpec) -> int:
    """Bytes of the histograms of one weight epoch, every bin filled."""
    return _BIN_BYTES * histogram_cells(
        spec, [metric for metric in spec.metrics if metric.kind is MetricKind.LATENCY]
    )
