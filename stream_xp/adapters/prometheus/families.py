"""One metric as the Prometheus client takes it, from its definition and its values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from prometheus_client.core import Metric

if TYPE_CHECKING:
    from stream_xp.domain.metric_defs import MetricDef

Cells: TypeAlias = dict[tuple[str, ...], float]
"""The series of one metric: label values to value."""


def empty_family(definition: MetricDef) -> Metric:
    """A metric without series."""
    return Metric(definition.name.removesuffix("_total"), definition.help, definition.kind)


def named(definition: MetricDef, labels: Iterable[str]) -> dict[str, str]:
    """Label values with the names of their labels."""
    return dict(zip(definition.labels, labels, strict=True))


def family(definition: MetricDef, cells: Cells) -> Metric:
    """A counter or a gauge with its series."""
    metric = empty_family(definition)
    for labels, value in cells.items():
        metric.add_sample(definition.name, named(definition, labels), value)
    return metric
