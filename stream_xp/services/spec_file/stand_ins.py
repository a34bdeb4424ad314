"""Stand-ins for what could not be read, so that the rules across fields can be asked all the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from stream_xp.domain.ages import Ages
from stream_xp.domain.experiment import (
    Adjustment,
    Aggregation,
    Arm,
    Covariate,
    Denominator,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
    Threshold,
)
from stream_xp.domain.rollout import Allocation
from stream_xp.services.spec_file.partial import Partial, readable

_STAND_IN_ARMS = (Arm(key="\0a", weight=0.5, control=True), Arm(key="\0b", weight=0.5))
_STAND_IN_METRIC = {
    "kind": tuple(MetricKind),
    "role": tuple(Role),
    "aggregation": (None, Aggregation.ANY, Aggregation.SUM),
    "attribution_window": ("1d",),
    "margin": (Threshold(relative=0.5),),
    "minimum_effect": (Threshold(absolute=1.0),),
    "critical": (False,),
    "direction": ("increase",),
    "event": (None,),
    "denominator": (None, Denominator(event="-", aggregation=Aggregation.ANY)),
    "quantiles": (None,),
    "adjustment": (Adjustment.NONE,),
}


def stand_ins(value: object) -> list[ExperimentSpec]:
    """Specs that agree with `value` where it could be read and differ where not; `value` itself if all could.

    A rule that all of them break is broken by the readable part alone.
    """
    if isinstance(value, ExperimentSpec):
        return [value]
    if not isinstance(value, Partial):
        return []
    arms = _alternatives(value.fields.get("arms"), _arm_variants, _STAND_IN_ARMS)
    metrics = _alternatives(value.fields.get("metrics"), _metric_variants, (_metric_variants({}, 0)[0],))
    count = max(len(arms), len(metrics))
    return [_spec(value.fields, arms[n % len(arms)], metrics[n % len(metrics)]) for n in range(count)]


def _spec(fields: Mapping[str, Any], arms: tuple[Arm, ...], metrics: tuple[Metric, ...]) -> ExperimentSpec:
    minimum, maximum = fields.get("minimum_runtime", "0s"), fields.get("maximum_runtime")
    covariate = fields.get("covariate")
    if "covariate" in fields and not readable(covariate):
        covariate = Covariate(scale=1.0, bound=1.0)
    segments = fields.get("segments", {})
    return ExperimentSpec(
        experiment="-",
        owner="-",
        hypothesis="-",
        unit="-",
        planned_sample=100,
        arms=arms,
        metrics=metrics,
        minimum_runtime=minimum if isinstance(minimum, str) else "0s",
        maximum_runtime=maximum if isinstance(maximum, str) else None,
        covariate=covariate,
        segments=segments if readable(segments) else {},
        **{name: fields[name] for name in _sections(fields)},
    )


def _sections(fields: Mapping[str, Any]) -> list[str]:
    """The sections whose rules can be asked: they and what they speak of could be read.

    A stand-in for a section is none at all: one that heals every rule with every other would be long.
    """
    metrics, arms = (_listed(fields.get(name)) for name in ("metrics", "arms"))
    found = []
    for name in _SECTIONS:
        section = fields.get(name)
        names_others = isinstance(section, Allocation | Ages)
        named = metrics is not None and (
            not names_others or (_keyed(metrics) and _keyed(arms) and readable(fields.get("segments", {})))
        )
        if readable(section) and section is not None and named:
            found.append(name)
    return found


_SECTIONS = ("conclusion", "ramp", "allocation", "monitors", "layer", "ages")
"""The rules of a holdout, an overlap and a champion speak of the whole file, so they need all of it."""


def _listed(value: Any) -> tuple[Any, ...] | None:
    return value if isinstance(value, tuple) and not isinstance(value, Partial) else None


def _keyed(items: tuple[Any, ...] | None) -> bool:
    """Whether every arm or metric of the list has a key that could be read."""
    if items is None:
        return False
    fields = [
        item.fields if isinstance(item, Partial) else {"key": getattr(item, "key", None)} for item in items
    ]
    return all(isinstance(one.get("key"), str) for one in fields)


def _alternatives(value: Any, variants: Any, fallback: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    items = _listed(value)
    if items is None:
        return [fallback]
    columns = [_element_variants(item, index, variants) for index, item in enumerate(items)]
    count = max(map(len, columns), default=1)
    return [tuple(column[n % len(column)] for column in columns) for n in range(count)]


def _element_variants(item: Any, index: int, variants: Any) -> list[Any]:
    if isinstance(item, (Arm, Metric)):
        return [item]
    return list(variants(item.fields if isinstance(item, Partial) else {}, index))


def _arm_variants(fields: Mapping[str, Any], index: int) -> list[Arm]:
    known = {name: field for name, field in fields.items() if readable(field)}
    key = known.get("key", f"\0{index}")
    weights = (known["weight"],) if "weight" in known else (0.0, 0.5)
    unreadable = not fields or ("control" in fields and "control" not in known)
    controls = (False, True) if unreadable else (known.get("control", False),)
    return [Arm(key=key, weight=weight, control=control) for weight in weights for control in controls]


def _metric_variants(fields: Mapping[str, Any], index: int) -> list[Metric]:
    """Every combination of stand-ins for the unreadable fields of one metric."""
    known = {name: field for name, field in fields.items() if readable(field)}
    unreadable = set(fields) - set(known) if fields else {"kind", "role", "direction", "attribution_window"}
    sizes = {known.get("scale") or 1.0, known.get("bound") or 1.0, 1.0, None}
    stand_ins = {"key": (f"\0{index}",), "scale": tuple(sizes), "bound": tuple(sizes), **_STAND_IN_METRIC}
    names = sorted(unreadable | ({"key"} - set(known)))
    combinations = itertools.product(*(stand_ins[name] for name in names))
    return [Metric(**{**known, **dict(zip(names, chosen, strict=True))}) for chosen in combinations]
