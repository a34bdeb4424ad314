"""Experiment files: metrics of each kind."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.experiment import Adjustment, Covariate
from stream_xp.services.spec_file import parse_spec
from tests.unit.spec_file_world import faults_of

KINDS = """\
experiment: kinds
owner: a@example.com
hypothesis: it does no harm
unit: member
arms:
  - {key: old, weight: 0.5, control: true}
  - {key: new, weight: 0.5}
covariate:
  scale: 0.5
  bound: 100
metrics:
  - key: spend_per_visit
    kind: ratio
    role: primary
    direction: increase
    attribution_window: 1d
    bound: 1000
    denominator:
      event: visit
      bound: 10
  - key: errors
    kind: count
    role: guardrail
    direction: decrease
    attribution_window: 1h
    margin: {relative: 0.1}
  - key: wait
    kind: latency
    role: secondary
    direction: decrease
    attribution_window: 10m
    scale: 0.001
    bound: 60
    quantiles: [0.5, 0.95]
  - key: revenue
    kind: mean
    role: secondary
    direction: increase
    attribution_window: 1d
    bound: 1000
    adjustment: cuped
planned_sample: 20_000
"""


def test_every_kind_is_read() -> None:
    spec = parse_spec(KINDS.encode(), "f.yaml")
    ratio, count, latency, mean = spec.metrics
    assert ratio.denominator is not None
    assert (ratio.folds_by, ratio.denominator.folds_by, ratio.denominator.listens_to) == (
        "sum",
        "sum",
        "visit",
    )
    assert (ratio.max_steps, ratio.denominator.max_steps, ratio.at_once) == (1000, 10, False)
    assert (count.folds_by, count.at_once, count.bounded, count.step) == ("first", True, False, 1.0)
    assert (latency.folds_by, latency.at_once, latency.max_steps) == ("first", True, 60_000)
    assert (latency.tested_quantiles, latency.bins) == ((0.5, 0.95), 32 * 10 + (60_000 >> 10) + 1)
    assert msgspec.structs.replace(latency, quantiles=None).tested_quantiles == (0.5, 0.9, 0.99)
    assert (mean.adjustment, mean.at_once, spec.covariate) == (
        "cuped",
        False,
        Covariate(scale=0.5, bound=100),
    )
    assert spec.covariate.max_steps == 200


# (what is replaced, by what, then the fault's line, path and a part of the message)
KIND_CASES: dict[str, tuple[str, str, tuple[int, str, str]]] = {
    "ratio without a denominator": (
        "    denominator:\n      event: visit\n      bound: 10\n",
        "",
        (13, "metrics[0].kind", "a ratio needs a denominator"),
    ),
    "ratio without a bound": (
        "    bound: 1000\n    denominator",
        "    denominator",
        (13, "metrics[0].kind", "a ratio needs a bound"),
    ),
    "ratio by first": (
        "    denominator:",
        "    aggregation: first\n    denominator:",
        (18, "metrics[0].aggregation", "a ratio folds by sum, last, max or any"),
    ),
    "denominator without an event": (
        "      event: visit\n",
        "",
        (19, "metrics[0].denominator.event", "required field is missing"),
    ),
    "denominator without a bound": (
        "      bound: 10\n",
        "",
        (18, "metrics[0].denominator.bound", "required unless it folds by any"),
    ),
    "denominator by first": (
        "      bound: 10\n",
        "      bound: 10\n      aggregation: first\n",
        (21, "metrics[0].denominator.aggregation", "a ratio folds by sum, last, max or any"),
    ),
    "denominator by any with a scale": (
        "      bound: 10\n",
        "      aggregation: any\n      scale: 2\n",
        (21, "metrics[0].denominator.scale", "what folds by any has scale 1"),
    ),
    "denominator by any with a bound": (
        "      bound: 10\n",
        "      aggregation: any\n      bound: 2\n",
        (21, "metrics[0].denominator.bound", "what folds by any has bound 1"),
    ),
    "denominator's bound below its scale": (
        "      bound: 10\n",
        "      bound: 10\n      scale: 11\n",
        (20, "metrics[0].denominator.bound", "must be at least one scale step"),
    ),
    "unknown field of a denominator": (
        "      bound: 10\n",
        "      bound: 10\n      kind: mean\n",
        (21, "metrics[0].denominator.kind", "unknown field"),
    ),
    "denominator of a mean": (
        "    adjustment: cuped",
        "    denominator: {event: visit, bound: 1}",
        (41, "metrics[3].denominator", "only a ratio has a denominator"),
    ),
    "count by max": (
        "    kind: count\n",
        "    kind: count\n    aggregation: max\n",
        (23, "metrics[1].aggregation", "a count folds by first or sum"),
    ),
    "count with a scale": (
        "    kind: count\n",
        "    kind: count\n    scale: 1\n",
        (23, "metrics[1].scale", "a count has no scale"),
    ),
    "count with a bound": (
        "    kind: count\n",
        "    kind: count\n    bound: 1\n",
        (23, "metrics[1].bound", "a count has no bound"),
    ),
    "count with an absolute margin": (
        "{relative: 0.1}",
        "{absolute: 0.1}",
        (26, "metrics[1].margin", "needs a relative margin, its effect is a ratio of rates"),
    ),
    "latency by sum": (
        "    kind: latency\n",
        "    kind: latency\n    aggregation: sum\n",
        (29, "metrics[2].aggregation", "a latency folds by first, max or last"),
    ),
    "latency without a scale": (
        "    scale: 0.001\n",
        "",
        (28, "metrics[2].kind", "a latency needs a scale"),
    ),
    "latency without a bound": (
        "    bound: 60\n",
        "",
        (28, "metrics[2].kind", "a latency needs a bound"),
    ),
    "latency with too many steps": (
        "    scale: 0.001\n",
        "    scale: 1.0e-12\n",
        (32, "metrics[2].scale", "must be at most 2**40"),
    ),
    "quantiles that fall": (
        "[0.5, 0.95]",
        "[0.95, 0.5]",
        (34, "metrics[2].quantiles", "must grow from one to the next"),
    ),
    "a quantile twice": ("[0.5, 0.95]", "[0.5, 0.5]", (34, "metrics[2].quantiles", "must grow from one")),
    "no quantile": ("[0.5, 0.95]", "[]", (34, "metrics[2].quantiles", "has 0 entries")),
    "too many quantiles": (
        "[0.5, 0.95]",
        "[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]",
        (34, "metrics[2].quantiles", "has 9 entries"),
    ),
    "a quantile of 1": ("[0.5, 0.95]", "[0.5, 1]", (34, "metrics[2].quantiles[1]", "must be less than 1")),
    "quantiles of a mean": (
        "    adjustment: cuped",
        "    quantiles: [0.5]",
        (41, "metrics[3].quantiles", "only a latency has quantiles"),
    ),
    "an adjusted count": (
        "    kind: count\n",
        "    kind: count\n    adjustment: ancova\n",
        (23, "metrics[1].adjustment", "only a conversion or a mean can be adjusted"),
    ),
    "an adjustment without a covariate": (
        "covariate:\n  scale: 0.5\n  bound: 100\n",
        "",
        (38, "metrics[3].adjustment", "needs the experiment's covariate"),
    ),
    "an adjustment nobody knows": (
        "adjustment: cuped",
        "adjustment: cupid",
        (41, "metrics[3].adjustment", "must be one of none, cuped, ancova, got 'cupid', did you mean cuped?"),
    ),
    "a covariate without a bound": (
        "  bound: 100\n",
        "",
        (9, "covariate.bound", "required field is missing"),
    ),
    "a covariate's bound below its scale": (
        "  bound: 100\n",
        "  bound: 0.4\n",
        (10, "covariate.bound", "must be at least one scale step"),
    ),
    "a covariate beyond its bound": (
        "  bound: 100\n",
        "  bound: 100\n  missing: -101\n",
        (11, "covariate.missing", "must lie within the bound"),
    ),
}


@pytest.mark.parametrize("case", KIND_CASES)
def test_each_fault_of_a_kind_has_its_place_and_brings_no_others(case: str) -> None:
    old, new, (line, path, message) = KIND_CASES[case]
    assert KINDS.count(old) == 1
    (found,) = faults_of(KINDS.replace(old, new))
    assert (found.line, found.path) == (line, path)
    assert message in found.message


UNREADABLE_KINDS = {
    "kind of a ratio": ("kind: ratio", "kind: x", {"metrics[0].kind"}),
    "kind of a count": ("kind: count", "kind: x", {"metrics[1].kind"}),
    "kind of a latency": ("kind: latency", "kind: x", {"metrics[2].kind"}),
    "kind of an adjusted mean": ("kind: mean", "kind: x", {"metrics[3].kind"}),
    "denominator": ("      event: visit", "      event: 7", {"metrics[0].denominator.event"}),
    "quantiles": ("[0.5, 0.95]", "x", {"metrics[2].quantiles"}),
    "adjustment": ("adjustment: cuped", "adjustment: x", {"metrics[3].adjustment"}),
    "covariate": ("  scale: 0.5", "  scale: x", {"covariate.scale"}),
    "scale of a latency": ("scale: 0.001", "scale: x", {"metrics[2].scale"}),
    "margin of a count": ("{relative: 0.1}", "{relative: x}", {"metrics[1].margin.relative"}),
    "aggregation of a count": (
        "margin: {relative: 0.1}",
        "aggregation: x\n    margin: {absolute: 0.1}",
        {"metrics[1].aggregation"},
    ),
}


@pytest.mark.parametrize("case", UNREADABLE_KINDS)
def test_no_rule_of_a_kind_is_called_broken_because_a_field_could_not_be_read(case: str) -> None:
    old, new, paths = UNREADABLE_KINDS[case]
    assert KINDS.count(old) == 1
    assert {fault.path for fault in faults_of(KINDS.replace(old, new))} == paths


@pytest.mark.timeout(60)  # reading each fault by itself would take many minutes
def test_a_file_of_metrics_that_cannot_be_read_is_told_in_time() -> None:
    metric = "  - {key: x, kind: x, role: x, direction: x, scale: x, bound: x, aggregation: x, margin: x,"
    metric += " denominator: x, quantiles: x, adjustment: x, attribution_window: x, event: 1}\n"
    text = KINDS.replace("planned_sample", metric * 60 + "planned_sample")
    assert len(faults_of(text)) >= 12 * 60


def test_histograms_of_all_latencies_together_are_bounded() -> None:
    text = KINDS + "segments: {device: [" + ", ".join(f"d{n}" for n in range(60)) + "]}\n"
    parse_spec(text.encode(), "f.yaml")
    (found,) = faults_of(text.replace("scale: 0.001", "scale: 1.0e-10"))
    # 62 segment cells in 2 arms, of 1123 bins each
    assert (found.line, found.path) == (11, "metrics")
    assert "131072 bins over all arms and segments, they have 139252" in found.message


def test_every_newer_field_is_part_of_the_design() -> None:
    spec = parse_spec(KINDS.encode(), "f.yaml")
    ratio, _, latency, mean = spec.metrics
    assert ratio.denominator is not None
    changes = [
        msgspec.structs.replace(ratio, denominator=msgspec.structs.replace(ratio.denominator, bound=11)),
        msgspec.structs.replace(latency, quantiles=None),
        msgspec.structs.replace(mean, adjustment=Adjustment.ANCOVA),
        msgspec.structs.replace(mean, adjustment=Adjustment.NONE),
    ]
    others = [
        msgspec.structs.replace(spec, metrics=tuple(one if m.key == one.key else m for m in spec.metrics))
        for one in changes
    ]
    others.append(msgspec.structs.replace(spec, covariate=Covariate(scale=0.5, bound=100, missing=1)))
    assert len({one.design_hash() for one in [spec, *others]}) == 6
