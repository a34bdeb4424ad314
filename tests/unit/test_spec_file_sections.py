"""Experiment files: conclusion, ramp, allocation and monitors."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.spec_file import parse_spec
from tests.unit.spec_file_world import faults_of

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
