"""Every fault of a spec file, at once and with its place."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.domain.experiment import Adjustment, Covariate, ExperimentSpec
from stream_xp.domain.fields import duration_ms
from stream_xp.errors import ConfigError
from stream_xp.services import spec_file
from stream_xp.services.spec_file import MAX_FILE_BYTES, SpecFault, SpecFaults, load_spec, parse_spec

if TYPE_CHECKING:
    from pathlib import Path

VALID = """\
experiment: canary
owner: a@example.com
hypothesis: it does no harm
unit: member
arms:
  - key: old
    weight: 0.9
    control: true
  - key: new
    weight: 0.1
metrics:
  - key: errors
    kind: conversion
    role: guardrail
    direction: decrease
    attribution_window: 10m
    margin:
      absolute: 0.005
  - key: spend
    kind: mean
    role: secondary
    direction: increase
    attribution_window: 1d
    bound: 100
    scale: 0.01
planned_sample: 20_000
alpha: 0.05
minimum_runtime: 1d
maximum_runtime: 7d
segments:
  device: [tv, web]
"""


def faults_of(text: str | bytes) -> list[SpecFault]:
    raw = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(SpecFaults) as caught:
        parse_spec(raw, "f.yaml")
    return list(caught.value.faults)


def edited(old: str, new: str) -> str:
    assert VALID.count(old) == 1, old
    return VALID.replace(old, new)


def test_a_valid_file_is_the_spec() -> None:
    spec = parse_spec(VALID.encode(), "f.yaml")
    assert isinstance(spec, ExperimentSpec)
    assert spec.weights == {"old": 0.9, "new": 0.1}
    assert spec.planned_sample == 20_000
    assert spec.metrics[1].bound == 100.0
    assert spec.segments == {"device": ("tv", "web")}
    assert spec == msgspec.yaml.decode(VALID, type=ExperimentSpec)


def test_a_byte_order_mark_and_carriage_returns_do_no_harm() -> None:
    assert parse_spec(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode(), "f") == parse_spec(
        VALID.encode(), "f"
    )


# (what is replaced, by what, then each fault as line, column, path and a part of the message)
CASES: dict[str, tuple[str, str, tuple[int, int, str, str]]] = {
    "unknown field": ("alpha: 0.05", "alhpa: 0.05", (27, 1, "alhpa", "unknown field, did you mean alpha?")),
    "unknown field, no guess": ("alpha: 0.05", "zzz: 0.05", (27, 1, "zzz", "unknown field")),
    "unknown field inside": ("weight: 0.1", "weigth: 0", (10, 5, "arms[1].weigth", "did you mean weight?")),
    "name is no text": ("alpha: 0.05", "[a]: 1", (27, 1, "", "a field name must be text")),
    "merge key": ("alpha: 0.05", "<<: {alpha: 0.1}", (27, 1, "<<", "unknown field")),
    "missing": ("owner: a@example.com\n", "", (1, 1, "owner", "required field is missing")),
    "missing inside": ("    direction: decrease\n", "", (12, 5, "metrics[0].direction", "is missing")),
    "twice": ("owner: a@example.com", "unit: a", (4, 1, "unit", "given twice, first on line 2")),
    "number for text": ("unit: member", "unit: 5", (4, 7, "unit", "got the number '5'; put it in quotes")),
    "boolean for text": (
        "- key: new",
        "- key: no",
        (9, 10, "arms[1].key", "got the boolean 'no'; put it in"),
    ),
    "date for text": ("unit: member", "unit: 2026-01-01", (4, 7, "unit", "got the date '2026-01-01'; put")),
    "nothing for text": ("unit: member", "unit:", (4, 6, "unit", "expected text, got nothing")),
    "list for text": ("unit: member", "unit: [a]", (4, 7, "unit", "expected text, got a list")),
    "fields for text": ("unit: member", "unit: {a: 1}", (4, 7, "unit", "expected text, got fields")),
    "text for number": ("alpha: 0.05", 'alpha: "0.05"', (27, 8, "alpha", "take the quotes away")),
    "words for number": ("alpha: 0.05", "alpha: small", (27, 8, "alpha", "a number, got the text 'small'")),
    "boolean for number": (
        "alpha: 0.05",
        "alpha: yes",
        (27, 8, "alpha", "expected a number, got the boolean"),
    ),
    "nothing for number": ("alpha: 0.05", "alpha: null", (27, 8, "alpha", "expected a number, got nothing")),
    "list for number": ("alpha: 0.05", "alpha: [0.05]", (27, 8, "alpha", "expected a number, got a list")),
    "not a number": ("alpha: 0.05", "alpha: .nan", (27, 8, "alpha", "must be finite, got .nan")),
    "infinity": ("bound: 100", "bound: .inf", (24, 12, "metrics[1].bound", "must be finite, got .inf")),
    "minus infinity": ("bound: 100", "bound: -.INF", (24, 12, "metrics[1].bound", "must be finite")),
    "too large": ("bound: 100", "bound: 1.0e+400", (24, 12, "metrics[1].bound", "is too large for a number")),
    "exponent": (
        "alpha: 0.05",
        "alpha: 5e-2",
        (27, 8, "alpha", "without point and sign as text, write 0.05"),
    ),
    "huge exponent": ("alpha: 0.05", "alpha: 1e-999", (27, 8, "alpha", "an exponent without point and sign")),
    "octal": (
        "planned_sample: 20_000",
        "planned_sample: 020000",
        (26, 17, "planned_sample", "plain decimals"),
    ),
    "hexadecimal": (
        "planned_sample: 20_000",
        "planned_sample: 0xFFF",
        (26, 17, "planned_sample", "decimals"),
    ),
    "base 60": (
        "planned_sample: 20_000",
        "planned_sample: 5:30",
        (26, 17, "planned_sample", "plain decimals"),
    ),
    "base 60 for a duration": (
        "minimum_runtime: 1d",
        "minimum_runtime: 1:30",
        (28, 18, "minimum_runtime", "text"),
    ),
    "fraction": (
        "planned_sample: 20_000",
        "planned_sample: 200.5",
        (26, 17, "planned_sample", "a whole number"),
    ),
    "whole float": ("planned_sample: 20_000", "planned_sample: 200.0", (26, 17, "planned_sample", "a whole")),
    "long integer": (
        "planned_sample: 20_000",
        f"planned_sample: {'9' * 5000}",
        (26, 17, "planned_sample", "is too large for a number: 999"),
    ),
    "text for boolean": (
        "control: true",
        "control: 'true'",
        (8, 14, "arms[0].control", "true or false, got"),
    ),
    "number for boolean": (
        "control: true",
        "control: 1",
        (8, 14, "arms[0].control", "expected true or false"),
    ),
    "too small": ("planned_sample: 20_000", "planned_sample: 99", (26, 17, "planned_sample", "at least 100")),
    "too big": ("weight: 0.1", "weight: 1.5", (10, 13, "arms[1].weight", "must be at most 1.0, got 1.5")),
    "at an open limit": ("alpha: 0.05", "alpha: 0", (27, 8, "alpha", "must be greater than 0.0, got 0.0")),
    "at another": ("alpha: 0.05", "alpha: 1", (27, 8, "alpha", "must be less than 1.0, got 1.0")),
    "key": ("experiment: canary", "experiment: can ary", (1, 13, "experiment", "got 'can ary'")),
    "key with a newline": (
        "experiment: canary",
        'experiment: "canary\\n"',
        (1, 13, "experiment", r"'canary\\n'"),
    ),
    "long key": ("experiment: canary", f"experiment: {'k' * 101}", (1, 13, "experiment", "1 to 100 letters")),
    "empty text": ("unit: member", 'unit: ""', (4, 7, "unit", "has 0 characters, needs at least 1")),
    "long text": (
        "unit: member",
        f"unit: {'m' * 101}",
        (4, 7, "unit", "has 101 characters, may have at most 100"),
    ),
    "half a surrogate": ("unit: member", 'unit: "a\\ud800"', (4, 7, "unit", "half a surrogate pair")),
    "duration": (
        "attribution_window: 10m",
        "attribution_window: ten",
        (16, 25, "metrics[0].attribution_window", "7d"),
    ),
    "duration with a newline": (
        "minimum_runtime: 1d",
        'minimum_runtime: "1d\\n"',
        (28, 18, "minimum_runtime", "7d"),
    ),
    "choice": (
        "kind: mean",
        "kind: meen",
        (20, 11, "metrics[1].kind", "count, latency, got 'meen', did you mean"),
    ),
    "choice, no guess": ("role: secondary", "role: x", (21, 11, "metrics[1].role", "must be one of primary")),
    "empty event": ("scale: 0.01", 'event: ""', (25, 12, "metrics[1].event", "has 0 characters")),
    "empty list": ("  device: [tv, web]", "  device: []", (31, 11, "segments.device", "has 0 entries")),
    "list item": (
        "  device: [tv, web]",
        "  device: [tv, 4]",
        (31, 16, "segments.device[1]", "put it in quotes"),
    ),
    "segment name": ("  device: [tv, web]", "  a b: [tv]", (31, 3, "segments.a b", "1 to 100 letters")),
    "segment number": (
        "  device: [tv, web]",
        "  1: [tv]",
        (31, 3, "segments.1", "got the number '1'; put it"),
    ),
    "no list": (
        "  device: [tv, web]",
        "  device: tv",
        (31, 11, "segments.device", "expected a list, got the text 'tv'"),
    ),
    "no fields": (
        "      absolute: 0.005",
        "      0.005",
        (18, 7, "metrics[0].margin", "expected fields, got the"),
    ),
    "a tag": (
        "unit: member",
        "unit: !!python/name:os.system x",
        (4, 7, "unit", "python/name:os.system: 'x'"),
    ),
    "another tag": ("alpha: 0.05", "alpha: !secret 0.05", (27, 8, "alpha", "a value tagged !secret: '0.05'")),
    "an alias": (
        "owner: a@example.com",
        "owner: &o x\nhypothesis: *o",
        (3, 13, "", "aliases (*name) are not"),
    ),
    "both sizes": (
        "absolute: 0.005",
        "{absolute: 1, relative: 1}",
        (18, 7, "metrics[0].margin", "exactly one"),
    ),
    "no size": (
        "    margin:\n      absolute: 0.005",
        "    margin: {}",
        (17, 13, "metrics[0].margin", "exactly one"),
    ),
    # the rules across fields
    "weights": ("weight: 0.1", "weight: 0.2", (5, 1, "arms", "weights must sum to 1, they sum to 1.1")),
    "two controls": (
        "weight: 0.1",
        "weight: 0.1\n    control: true",
        (5, 1, "arms", "exactly one arm must have"),
    ),
    "same key": ("- key: new", "- key: old", (9, 10, "arms[1].key", "'old' is used twice")),
    "no margin": ("    margin:\n      absolute: 0.005\n", "", (14, 11, "metrics[0].role", "needs a margin")),
    "margin elsewhere": (
        "scale: 0.01",
        "margin: {relative: 1}",
        (25, 5, "metrics[1].margin", "only a guardrail"),
    ),
    "no bound": ("    bound: 100\n", "", (20, 11, "metrics[1].kind", "a mean needs a bound")),
    "steps": ("scale: 0.01", "scale: 1.0e-15", (25, 12, "metrics[1].scale", "must be at most 2**40")),
    "empty window": (
        "attribution_window: 10m",
        "attribution_window: 0s",
        (16, 25, "metrics[0].attribution_window", "0"),
    ),
    "runtime": (
        "maximum_runtime: 7d",
        "maximum_runtime: 24h",
        (29, 18, "maximum_runtime", "longer than minimum"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_has_its_place(case: str) -> None:
    old, new, (line, column, path, message) = CASES[case]
    found = [fault for fault in faults_of(edited(old, new)) if (fault.line, fault.column) == (line, column)]
    assert any(fault.path == path and message in fault.message for fault in found), faults_of(
        edited(old, new)
    )


@pytest.mark.parametrize("case", [name for name in CASES if "twice" not in name and "missing" not in name])
def test_one_fault_brings_no_others(case: str) -> None:
    """A fault of one field is no fault of its neighbours; leaving a field out may be a second one."""
    old, new, _ = CASES[case]
    others = [fault for fault in faults_of(edited(old, new)) if "missing" not in fault.message]
    expected = 2 if case == "an alias" else 1
    assert len(others) == expected, others


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


MOVING = """\
experiment: moving
owner: a@example.com
hypothesis: it is better
unit: member
arms:
  - {key: old, weight: 0.5, control: true}
  - {key: new, weight: 0.5}
metrics:
  - key: order
    kind: conversion
    role: primary
    direction: increase
    attribution_window: 1d
    minimum_effect: {relative: 0.1}
  - key: errors
    kind: conversion
    role: guardrail
    direction: decrease
    attribution_window: 10m
    margin: {absolute: 0.01}
  - key: spend
    kind: mean
    role: secondary
    direction: increase
    attribution_window: 1d
    bound: 100
planned_sample: 20_000
segments:
  device: [tv, web]
"""

CONCLUSION = """\
conclusion:
  mode: approve
  rule: group_sequential
  futility: true
  looks: [0.25, 0.5, 1]
  spending: pocock
"""

LOSS = """\
conclusion:
  rule: expected_loss
  maximum_loss: 0.001
"""

RAMP = """\
ramp:
  stages:
    - coverage: 0.01
      minimum_units: 1000
      minimum_time: 1h
    - coverage: 0.5
    - coverage: 1
"""

ALLOCATION = """\
allocation:
  policy: contextual
  metric: order
  floor: 0.1
  maximum_change: 0.2
  minimum_change: 0.01
  burn_in: {units: 500, conversions: 50}
  uniform_slice: 0.1
  interval: 10m
  context: device
  prior:
    worth: 20
    scores: {old: 0.1, new: 0.2}
"""

MONITORS = """\
monitors:
  alpha: 0.01
  data_age: 5m
  crossovers: 0.02
  duplicates: 0.1
  reward_loss: 2
  exposure_stall: false
"""

SECTIONS = {
    "conclusion": CONCLUSION,
    "loss": LOSS,
    "ramp": RAMP,
    "allocation": ALLOCATION,
    "monitors": MONITORS,
    "all but a ramp": LOSS + ALLOCATION + MONITORS,
    "all but an allocation": LOSS + RAMP + MONITORS,
    "a fixed allocation beside a ramp": RAMP + "allocation: {policy: fixed, metric: order}\n",
    "defaults": "conclusion: {}\nallocation: {policy: thompson, metric: spend}\nmonitors: {}\n",
    "a ramp of defaults": "ramp: {}\n",
    "nothing": "conclusion: null\nramp: ~\nallocation: null\nmonitors: null\n",
}


@pytest.mark.parametrize("case", SECTIONS)
def test_sections_are_read_as_their_types_say(case: str) -> None:
    text = MOVING + SECTIONS[case]
    assert parse_spec(text.encode(), "f.yaml") == msgspec.yaml.decode(text, type=ExperimentSpec)


# the section, what is replaced in the whole file, by what, then the fault as line, path and a part of the message
MOVING_CASES: dict[str, tuple[str, str, str, tuple[int, str, str]]] = {
    "a section that is empty": (RAMP, RAMP, "ramp:\n", (30, "ramp", "is empty: write its fields")),
    "unknown field of a section": (
        RAMP,
        "  stages:",
        "  stages: []\n  steps:",
        (31, "ramp.stages", "0 entries"),
    ),
    "mode": (CONCLUSION, "approve", "aprove", (31, "conclusion.mode", "got 'aprove', did you mean approve?")),
    "rule": (
        LOSS,
        "expected_loss",
        "expected",
        (31, "conclusion.rule", "must be one of always_valid, group"),
    ),
    "a rule without a loss": (
        LOSS,
        "  maximum_loss: 0.001\n",
        "",
        (31, "conclusion.rule", "expected_loss needs a maximum_loss"),
    ),
    "a loss of another rule": (
        LOSS,
        "rule: expected_loss",
        "rule: always_valid",
        (32, "conclusion.maximum_loss", "only the rule expected_loss"),
    ),
    "a loss of 0": (LOSS, "0.001", "0", (32, "conclusion.maximum_loss", "must be greater than 0")),
    "a rule without looks": (
        CONCLUSION,
        "  looks: [0.25, 0.5, 1]\n",
        "",
        (32, "conclusion.rule", "group_sequential needs looks"),
    ),
    "looks of another rule": (
        "conclusion: {looks: [1]}\n",
        "unit: member",
        "unit: m",
        (30, "conclusion.looks", "only the rule group_sequential has looks"),
    ),
    "a spending of another rule": (
        LOSS,
        "  maximum_loss: 0.001\n",
        "  maximum_loss: 0.001\n  spending: pocock\n",
        (33, "conclusion.spending", "only the rule group_sequential has a spending"),
    ),
    "looks that fall": (CONCLUSION, "0.25, 0.5", "0.5, 0.25", (34, "conclusion.looks", "must grow")),
    "a look twice": (CONCLUSION, "0.25, 0.5", "0.5, 0.500000001", (34, "conclusion.looks", "must grow")),
    "looks that end early": (CONCLUSION, "0.5, 1]", "0.5]", (34, "conclusion.looks", "planned sample: 1")),
    "a look beyond the plan": (CONCLUSION, "0.5, 1]", "1, 2]", (34, "conclusion.looks[2]", "at most 1")),
    "group sequential of a latency": (
        CONCLUSION,
        "kind: conversion\n    role: primary",
        "kind: latency\n    scale: 1\n    bound: 9\n    role: primary",
        (34, "conclusion.rule", "conversions and means only, a primary is neither: order"),
    ),
    "group sequential with a ramp": (
        CONCLUSION + RAMP,
        "unit: member",
        "unit: m",
        (32, "conclusion.rule", "which a ramp does not keep to"),
    ),
    "group sequential with weights that move": (
        CONCLUSION + ALLOCATION,
        "unit: member",
        "unit: m",
        (32, "conclusion.rule", "needs weights that do not follow the evidence"),
    ),
    "a rule without a primary": (
        LOSS,
        "role: primary",
        "role: secondary",
        (31, "conclusion.rule", "expected_loss needs a primary metric"),
    ),
    "futility without a primary": (
        "conclusion: {futility: true}\n",
        "role: primary",
        "role: secondary",
        (30, "conclusion.futility", "needs a primary metric"),
    ),
    "futility without a minimum effect": (
        CONCLUSION,
        "    minimum_effect: {relative: 0.1}\n",
        "",
        (
            32,
            "conclusion.futility",
            "needs a minimum_effect of every primary metric, there is none of: order",
        ),
    ),
    "stages out of order": (
        RAMP,
        "coverage: 0.5",
        "coverage: 0.01",
        (35, "ramp.stages[1].coverage", "must be over 0.01, that of the stage before"),
    ),
    "a ramp that ends early": (
        RAMP,
        "    - coverage: 1\n",
        "",
        (35, "ramp.stages[1].coverage", "the last stage must cover all units: 1"),
    ),
    "a stage of nobody": (
        RAMP,
        "0.01\n      min",
        "0\n      min",
        (32, "ramp.stages[0].coverage", "greater than 0"),
    ),
    "time of a stage": (
        RAMP,
        "1h",
        "1 hour",
        (34, "ramp.stages[0].minimum_time", "a whole number and a unit"),
    ),
    "units of a stage": (RAMP, "1000", "-1", (33, "ramp.stages[0].minimum_units", "must be at least 0")),
    "a ramp without a guardrail": (
        RAMP,
        "role: guardrail\n    direction: decrease\n    attribution_window: 10m\n    margin: {absolute: 0.01}",
        "role: secondary\n    direction: decrease\n    attribution_window: 10m",
        (29, "ramp", "needs a guardrail"),
    ),
    "a ramp with weights that move": (
        RAMP + ALLOCATION,
        "unit: member",
        "unit: m",
        (38, "allocation.policy", "a ramp keeps the weights of the file"),
    ),
    "unknown policy": (
        ALLOCATION,
        "contextual",
        "thomson",
        (31, "allocation.policy", "top_two, contextual, got 'thomson', did you mean thompson?"),
    ),
    "unknown metric": (
        ALLOCATION,
        "metric: order",
        "metric: x",
        (32, "allocation.metric", "is not the key of"),
    ),
    "a guardrail that steers": (
        ALLOCATION,
        "metric: order",
        "metric: errors",
        (32, "allocation.metric", "must be primary or secondary"),
    ),
    "a count that steers": (
        ALLOCATION,
        "kind: conversion\n    role: primary",
        "kind: count\n    aggregation: sum\n    role: primary",
        (33, "allocation.metric", "must be a conversion or a mean, it is a count"),
    ),
    "floors over 1": (
        ALLOCATION,
        "floor: 0.1",
        "floor: 0.6",
        (33, "allocation.floor", "2 arms of at least 0.6 are more than all traffic; at most 1/2 fits"),
    ),
    "a floor of nothing": (
        ALLOCATION,
        "floor: 0.1",
        "floor: 0.009",
        (33, "allocation.floor", "must be at least 0.01, or an arm is no longer compared"),
    ),
    "weights below the floor": (
        ALLOCATION,
        "weight: 0.5, control: true}\n  - {key: new, weight: 0.5}",
        "weight: 0.95, control: true}\n  - {key: new, weight: 0.05}",
        (
            33,
            "allocation.floor",
            "no arm may have less than 0.1, the weights of the file are below it for: new",
        ),
    ),
    "weights below the uniform slice": (
        ALLOCATION.replace("uniform_slice: 0.1", "uniform_slice: 0.3"),
        "weight: 0.5, control: true}\n  - {key: new, weight: 0.5}",
        "weight: 0.88, control: true}\n  - {key: new, weight: 0.12}",
        (37, "allocation.uniform_slice", "no arm may have less than 0.15"),
    ),
    "nothing but the uniform slice": (
        ALLOCATION,
        "uniform_slice: 0.1",
        "uniform_slice: 1",
        (37, "allocation.uniform_slice", "must be below 1"),
    ),
    "a change that cannot be": (
        ALLOCATION,
        "minimum_change: 0.01",
        "minimum_change: 0.2",
        (35, "allocation.minimum_change", "must be below maximum_change, which is 0.2"),
    ),
    "no change": (
        ALLOCATION,
        "maximum_change: 0.2",
        "maximum_change: 0",
        (34, "allocation.maximum_change", "than 0"),
    ),
    "conversions of a mean": (
        ALLOCATION,
        "metric: order",
        "metric: spend",
        (36, "allocation.burn_in.conversions", "only where the metric is a conversion"),
    ),
    "hasty": (
        ALLOCATION,
        "interval: 10m",
        "interval: 59s",
        (38, "allocation.interval", "must be at least 1m"),
    ),
    "no context": (
        ALLOCATION,
        "  context: device\n",
        "",
        (31, "allocation.policy", "contextual needs a context"),
    ),
    "a context nobody registered": (
        ALLOCATION,
        "context: device",
        "context: country",
        (39, "allocation.context", "is not one of the registered segments"),
    ),
    "a context for nothing": (
        ALLOCATION,
        "contextual",
        "top_two",
        (39, "allocation.context", "only the policy contextual has a context"),
    ),
    "two priors": (
        ALLOCATION,
        "worth: 20",
        "worth: 20\n    mean: 0.5",
        (40, "allocation.prior", "exactly one of mean, scores and past, found 2"),
    ),
    "no prior": (
        ALLOCATION,
        "    scores: {old: 0.1, new: 0.2}\n",
        "",
        (40, "allocation.prior", "exactly one of mean, scores and past, found 0"),
    ),
    "a prior worth nothing": (
        ALLOCATION,
        "worth: 20",
        "worth: 0",
        (41, "allocation.prior.worth", "greater than 0"),
    ),
    "scores of some arms": (
        ALLOCATION,
        "{old: 0.1, new: 0.2}",
        "{old: 0.1}",
        (42, "allocation.prior.scores", "must name every arm, there is none of: new"),
    ),
    "scores of no arm": (
        ALLOCATION,
        "{old: 0.1, new: 0.2}",
        "{old: 0.1, new: 0.2, x: 0.3}",
        (42, "allocation.prior.scores.x", "is not an arm"),
    ),
    "a score that no conversion has": (
        ALLOCATION,
        "new: 0.2}",
        "new: 1}",
        (42, "allocation.prior.scores", "must lie between 0 and 1"),
    ),
    "a past that no conversion has": (
        ALLOCATION,
        "scores: {old: 0.1, new: 0.2}",
        "past: [0, 0]",
        (42, "allocation.prior.past", "must lie between 0 and 1"),
    ),
    "a past of one": (
        ALLOCATION,
        "scores: {old: 0.1, new: 0.2}",
        "past: [0.1]",
        (42, "allocation.prior.past", "has 1 entries, needs at least 2"),
    ),
    "a score that is text": (
        ALLOCATION,
        "new: 0.2}",
        "new: x}",
        (42, "allocation.prior.scores.new", "a number"),
    ),
    "data that may not age": (
        MONITORS,
        "data_age: 5m",
        "data_age: 0s",
        (32, "monitors.data_age", "longer than 0"),
    ),
    "level of the monitors": (MONITORS, "alpha: 0.01", "alpha: 1", (31, "monitors.alpha", "less than 1")),
    "share of crossovers": (
        MONITORS,
        "crossovers: 0.02",
        "crossovers: 2",
        (33, "monitors.crossovers", "than 1"),
    ),
    "share of duplicates": (
        MONITORS,
        "duplicates: 0.1",
        "duplicates: 0",
        (34, "monitors.duplicates", "than 0"),
    ),
    "loss of rewards": (MONITORS, "reward_loss: 2", "reward_loss: 1", (35, "monitors.reward_loss", "than 1")),
    "a stall of text": (MONITORS, "false", "'false'", (36, "monitors.exposure_stall", "true or false")),
}


@pytest.mark.parametrize("case", MOVING_CASES)
def test_each_fault_of_a_section_has_its_place_and_brings_no_others(case: str) -> None:
    section, old, new, (line, path, message) = MOVING_CASES[case]
    text = MOVING + section
    assert text.count(old) == 1
    text = text.replace(old, new)
    found = [fault for fault in faults_of(text) if "unknown field" not in fault.message]
    assert [(fault.line, fault.path) for fault in found] == [(line, path)], found
    assert message in found[0].message


UNREADABLE_BESIDE_SECTIONS = {
    "key of the metric that steers": ("- key: order", "- key: 7", {"metrics[0].key"}),
    "key of an arm with a score": ("{key: new,", "{key: 7,", {"arms[1].key"}),
    "the arms": (
        "  - {key: old, weight: 0.5, control: true}\n  - {key: new, weight: 0.5}\n",
        "  7\n",
        {"arms"},
    ),
    "role of a metric": ("role: guardrail", "role: x", {"metrics[1].role"}),
    "kind of the metric that steers": (
        "kind: conversion\n    role: primary",
        "kind: x\n    role: primary",
        {"metrics[0].kind"},
    ),
    "segments": ("  device: [tv, web]", "  device: tv", {"segments.device"}),
    "minimum effect": ("{relative: 0.1}", "{relative: x}", {"metrics[0].minimum_effect.relative"}),
    "policy": ("policy: contextual", "policy: x", {"allocation.policy"}),
    "score": ("new: 0.2}", "new: x}", {"allocation.prior.scores.new"}),
}


@pytest.mark.parametrize("case", UNREADABLE_BESIDE_SECTIONS)
def test_no_rule_of_a_section_is_called_broken_because_a_field_could_not_be_read(case: str) -> None:
    old, new, paths = UNREADABLE_BESIDE_SECTIONS[case]
    text = MOVING + ALLOCATION + "conclusion: {futility: true}\n"
    assert text.count(old) == 1
    assert {fault.path for fault in faults_of(text.replace(old, new))} == paths
    ramp = MOVING + RAMP
    if old in ramp:
        assert {fault.path for fault in faults_of(ramp.replace(old, new))} == paths


def test_rules_of_a_section_are_told_beside_a_field_that_could_not_be_read() -> None:
    text = MOVING + RAMP.replace("0.5", "0.001") + ALLOCATION.replace("0.1\n  max", "0.7\n  max")
    text = text.replace("alpha", "").replace("unit: member", "unit: 7").replace("kind: mean", "kind: x")
    assert {fault.path for fault in faults_of(text)} == {
        "unit",
        "metrics[2].kind",
        "ramp.stages[1].coverage",
        "allocation.policy",
        "allocation.floor",
    }


WHOLE_FILES: dict[str, tuple[str | bytes, int, int, str]] = {
    "empty": (b"", 1, 1, "is empty"),
    "only comments": ("# nothing\n\n", 1, 1, "is empty"),
    "only a marker": ("---\n...\n", 2, 1, "expected fields, got nothing"),
    "a list": ("- a\n", 1, 1, "expected fields, got a list"),
    "a word": ("hello\n", 1, 1, "expected fields, got the text 'hello'"),
    "an alias": ("*a\n", 1, 1, "aliases"),
    "an unclosed list": (VALID + "x: [1, 2\n", 33, 1, "is not YAML: expected ',' or ']'"),
    "an unclosed quote": ('a: 1\nb: "x\n', 3, 1, "is not YAML: found unexpected end of stream"),
    "a tabulator": ("arms:\n\t- key: a\n", 2, 1, "is not YAML: found character '\\t'"),
    "wrong indentation": ("a: 1\n b: 2\n", 2, 3, "is not YAML: mapping values are not allowed here"),
    "not UTF-8": (b"owner: x\nunit: \xff\n", 2, 7, "is not UTF-8 from here on"),
    "UTF-16": ("owner: x".encode("utf-16"), 1, 1, "is not UTF-8 from here on"),
    "a control character": ("owner: x\nunit: a\x07b\n", 2, 8, "has a character that YAML does not allow"),
    "deep": ("[" * 10_000, 1, 21, "more than 20 levels"),
    "deep fields": ("a: " + "{a: " * 10_000, 1, 77, "more than 20 levels"),
    "wide": ("- a\n" * 20_000, 10_000, 3, "more than 10000 values"),
    "too long": (b"#" * (MAX_FILE_BYTES + 1), 1, 1, f"is longer than {MAX_FILE_BYTES} bytes"),
    "bomb": (
        "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\n",
        2,
        8,
        "aliases (*name) are not allowed",
    ),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_files_that_are_no_spec_at_all(case: str) -> None:
    text, line, column, message = WHOLE_FILES[case]
    found = faults_of(text)
    assert any((f.line, f.column) == (line, column) and message in f.message for f in found), found[:5]


def test_two_documents_are_one_too_many_and_the_first_is_checked() -> None:
    found = faults_of(edited("alpha: 0.05", "alpha: 5") + "---\n" + VALID)
    assert [(fault.line, fault.path) for fault in found] == [(27, "alpha"), (32, "")]
    assert "second document" in found[1].message


def test_all_faults_come_at_once_in_the_order_of_the_file() -> None:
    text = """\
experiment: "bad key"
unit: 5
arms:
  - {key: a, weight: 0.9, control: true, controll: false}
  - key: a
    weight: 1e-1
metrics:
  - key: m
    kind: convrsion
    role: guardrail
    direction: up
    attribution_window: 1 hour
  - key: m
    kind: mean
    role: primary
    direction: increase
    attribution_window: 0s
    margin: {absolute: 1, relative: 2}
    critical: yes
planned_sample: 20.5
planned_sample: 3
alpha: 1.5
maximum_runtime: 0s
extra: 1
"""
    assert [(fault.line, fault.path) for fault in faults_of(text)] == [
        (1, "hypothesis"),
        (1, "owner"),
        (1, "experiment"),
        (2, "unit"),
        (4, "arms[0].controll"),
        (5, "arms[1].key"),
        (6, "arms[1].weight"),
        (9, "metrics[0].kind"),
        (10, "metrics[0].role"),
        (11, "metrics[0].direction"),
        (12, "metrics[0].attribution_window"),
        (13, "metrics[1].key"),
        (14, "metrics[1].kind"),
        (17, "metrics[1].attribution_window"),
        (18, "metrics[1].margin"),
        (18, "metrics[1].margin"),
        (19, "metrics[1].critical"),
        (20, "planned_sample"),
        (21, "planned_sample"),
        (22, "alpha"),
        (23, "maximum_runtime"),
        (24, "extra"),
    ]


UNREADABLE = {
    "weight": ("weight: 0.1", "weight: x", {"arms[1].weight"}),
    "control": ("control: true", "control: x", {"arms[0].control"}),
    "arm": ("  - key: new\n    weight: 0.1", "  - 7", {"arms[1]"}),
    "arms": (
        "  - key: old\n    weight: 0.9\n    control: true\n  - key: new\n    weight: 0.1",
        "  7",
        {"arms"},
    ),
    "role": ("role: guardrail", "role: x", {"metrics[0].role"}),
    "kind": ("kind: mean", "kind: x", {"metrics[1].kind"}),
    "bound": ("bound: 100", "bound: x", {"metrics[1].bound"}),
    "scale": ("scale: 0.01", "scale: x", {"metrics[1].scale"}),
    "margin": ("      absolute: 0.005", "      absolute: x", {"metrics[0].margin.absolute"}),
    "minimum": ("minimum_runtime: 1d", "minimum_runtime: x", {"minimum_runtime"}),
    "maximum": ("maximum_runtime: 7d", "maximum_runtime: x", {"maximum_runtime"}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_no_rule_is_called_broken_because_a_field_could_not_be_read(case: str) -> None:
    old, new, paths = UNREADABLE[case]
    assert {fault.path for fault in faults_of(edited(old, new))} == paths


def test_a_rule_that_no_reading_heals_is_told_beside_the_unreadable_field() -> None:
    text = edited("role: guardrail", "role: x").replace("weight: 0.9", "weight: 0.8")
    text = text.replace("    bound: 100\n", "").replace("- key: spend", "- key: errors")
    assert {fault.path for fault in faults_of(text)} == {
        "metrics[0].role",
        "arms",
        "metrics[1].kind",
        "metrics[1].key",
    }


def test_the_format_of_a_line() -> None:
    with pytest.raises(SpecFaults) as caught:
        parse_spec(edited("role: secondary", "role: guardrail").encode(), "dir/f.yaml")
    assert str(caught.value) == "dir/f.yaml:21:11: metrics[1].role: a guardrail needs a margin"
    assert isinstance(caught.value, ConfigError)
    assert caught.value.lines() == [str(caught.value)]


def test_a_message_is_one_printable_line_whatever_the_file_holds() -> None:
    hostile = 'unit: "x"\n"\\e[31m\\n": 1\nexperiment: "\\e[2J\\u202e"\n'
    for fault in faults_of(hostile):
        assert (fault.path + fault.message).isprintable()
    assert all(len(f.message) < 300 for f in faults_of(f"experiment: {'x y' * 10_000}\n"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SpecFaults, match=re.escape(f"{path}:1:1: cannot be read: ")):
            load_spec(path)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(VALID)
    assert load_spec(str(path)) == load_spec(path)


def test_a_constraint_the_walk_does_not_know_is_still_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_file, "_in_range", lambda number, kind: number)
    found = faults_of(edited("planned_sample: 20_000", "planned_sample: 1"))
    assert [(fault.line, fault.message) for fault in found] == [(1, "Expected `int` >= 100")]


@given(st.binary(max_size=200))
def test_no_bytes_bring_another_exception(raw: bytes) -> None:
    with pytest.raises(SpecFaults):
        parse_spec(raw, "f")


@given(st.data())
def test_no_edit_of_a_valid_file_brings_another_exception(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(VALID)))
    end = data.draw(st.integers(start, min(len(VALID), start + 40)))
    text = VALID[:start] + data.draw(st.text(max_size=12)) + VALID[end:]
    try:
        spec = parse_spec(text.encode("utf-8", "surrogatepass"), "f")
    except SpecFaults as error:
        faults = error.faults
    else:
        faults = (SpecFault(1, 1, "", "none"),)
        assert msgspec.json.decode(msgspec.json.encode(spec), type=ExperimentSpec) == spec
        assert duration_ms(spec.minimum_runtime) >= 0
    assert faults
    assert all(fault.line >= 1 and fault.column >= 1 for fault in faults)
