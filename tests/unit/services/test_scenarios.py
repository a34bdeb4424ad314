"""Scenarios: what a file may say, and that a fault names its field and line."""

from __future__ import annotations

from functools import partial

import pytest

from stream_xp.errors import ConfigError
from stream_xp.services.scenarios.measures import check_claims
from stream_xp.services.scenarios.scenario import load_scenario
from tests.unit.services.scenarios_world import FOLLOWED, MEAN, experiment, write_and_load


@pytest.fixture
def load(tmp_path):
    return partial(write_and_load, tmp_path)


AGES = {"metrics": ["errors"], "until": ["1h", "2h"]}
MINUTES = experiment(metrics=[{**MEAN, "role": "primary"}])


@pytest.mark.parametrize(
    ("over", "field", "rule"),
    [
        ({"lookz": "1h"}, "lookz", "unknown field, did you mean looks?"),
        ({"looks": "often"}, "looks", "a whole number and a unit"),
        ({"traffic": {"units_per_hour": 0}}, "traffic.units_per_hour", "greater than 0"),
        ({"looks": "0s"}, "looks", "longer than 0"),
        ({"looks": "7m"}, "horizon", "multiple of looks"),
        ({"activation": "1h"}, "activation", "not be longer than looks"),
        ({"delays": {"mean": "0s"}}, "delays.mean", "longer than 0"),
        ({"truths": {}}, "truths.errors", "each metric has its truth"),
        ({"truths": {"errors": {"mean": 0.1}, "x": {"mean": 1}}}, "truths.x", "no metric"),
        ({"truths": {"errors": {"mean": 0.1, "sd": 1}}}, "truths.errors.sd", "conversion has none"),
        ({"truths": {"errors": {"mean": 0.6, "arms": {"b": {"times": 2}}}}}, "truths.errors.mean", "reaches 1.2"),
        ({"truths": {"errors": {"mean": 0.6, "drift": [{"at": "1h", "times": 2}]}}}, "truths.errors.mean", "reaches"),
        ({"truths": {"errors": {"mean": 0.1, "arms": {"c": {"times": 2}}}}}, "truths.errors.arms.c", "no arm"),
        (
            {"truths": {"errors": {"mean": 0.1, "arms": {"b": {"times": 2, "stage": 0}}}}},
            "truths.errors.arms.b.stage",
            "0 stages",
        ),
        (
            {"truths": {"errors": {"mean": 0.1, "arms": {"b": {"times": 2, "stage": 0, "since": "1h"}}}}},
            "truths.errors.arms.b",
            "at most one of since and stage",
        ),
        (
            {
                "truths": {
                    "errors": {"mean": 0.1, "drift": [{"at": "2h", "times": 2}, {"at": "1h", "times": 1}]}
                }
            },
            "truths.errors.drift",
            "order of time",
        ),
        ({"contexts": {"segment": "device", "shares": {"tv": 1}}}, "contexts.segment", "no registered segment"),
        ({"truths": {"errors": {"mean": 0.1, "levels": {"tv": 2}}}}, "truths.errors.levels.tv", "no share"),
        ({"changes": [{"at": "40m", "weights": {"a": 0.5, "b": 0.5}}]}, "changes[0].at", "multiple of looks"),
        ({"changes": [{"at": "1h", "weights": {"a": 1}}]}, "changes[0].weights", "name every arm"),
        ({"changes": [{"at": "1h", "weights": {"a": 0.5, "b": 0.4}}]}, "changes[0].weights", "sum to 1"),
        ({"claims": [{"measure": "stopped"}]}, "claims[0]", "exactly one"),
        ({"delays": {"mean": "1m", "arms": {"c": "1m"}}}, "delays.arms.c", "no arm"),
        ({"delays": {"mean": "1m", "arms": {"b": "0s"}}}, "delays.arms.b", "longer than 0"),
        ({"arrivals": {"c": "1s"}}, "arrivals.c", "no arm"),
        ({"arrivals": {"b": "61s"}, "lateness": "1m"}, "arrivals.b", "longer than lateness, 1m"),
        ({"comparisons": ["fixed_known"]}, "known_sample", "goes with"),
        ({"known_sample": 100}, "known_sample", "goes with"),
        ({"comparisons": ["context_free"]}, "comparisons", "policy contextual"),
        ({"comparisons": ["peekd"]}, "comparisons[0]", "did you mean peeked?"),
        ({"traffic": {"units_per_hour": 1e12}}, "traffic.units_per_hour", "more than 1e+12 units"),
        ({"traffic": {"units_per_hour": float("inf")}}, "traffic.units_per_hour", "finite"),
        ({"changes": [{"at": "4h", "weights": {"a": 0.5, "b": 0.5}}]}, "changes[0].at", "before the horizon"),
        ({"experiment": 3}, "experiment", "expected text, got the number"),
        ({"experiment": "nowhere.yaml"}, "nowhere.yaml", "cannot be read"),
        (
            {"experiment": MINUTES, "truths": {"minutes": {"mean": 5, "sd": 5}}, "comparisons": ["immature"]},
            "comparisons",
            "immature needs conversions",
        ),
        (
            {
                "experiment": MINUTES,
                "truths": {"minutes": {"mean": 5, "sd": 5}},
                "traffic": {"units_per_hour": 900_000},
            },
            "truths.minutes",
            "drawn between two looks",
        ),
        ({"experiment": experiment(planned_sample=1)}, "planned_sample", "100"),
        ({"experiment": experiment(ages=AGES)}, "experiment.ages", "not simulated"),
        (
            {"experiment": FOLLOWED, "truths": {"take": {"mean": 0.1}}},
            "experiment.allocation.uniform_segment",
            "not simulated",
        ),
        ({"experiment": MINUTES, "truths": {"minutes": {"mean": 5}}}, "truths.minutes.sd", "required"),
        (
            {
                "experiment": MINUTES,
                "truths": {"minutes": {"mean": 5, "sd": 50}},
            },
            "truths.minutes.sd",
            "beyond the metric's bound",
        ),
    ],
)  # fmt: skip
def test_a_fault_names_the_field_and_the_rule(load, over, field, rule):
    with pytest.raises(ConfigError) as raised:
        load(**over)
    assert any(field in line and rule in line for line in str(raised.value).splitlines()), raised.value


def test_metrics_that_are_not_drawn_are_refused(load):
    count = {
        "key": "n",
        "kind": "count",
        "role": "secondary",
        "direction": "increase",
        "attribution_window": "1h",
    }
    metrics = [*experiment()["metrics"], count]
    with pytest.raises(ConfigError, match=r"truths\.n: conversions and means"):
        load(experiment=experiment(metrics=metrics), truths={"errors": {"mean": 0.1}, "n": {"mean": 1}})


def test_what_is_no_scenario_is_refused(tmp_path):
    for text, rule in (
        ("[", "is not YAML"),
        ("a: &x 1\nb: *x", "aliases"),
        ("", "is empty"),
        ("[1]", "expected fields"),
    ):
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=rule):
            load_scenario(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_scenario(tmp_path / "y.yaml")


LINES = """\
scenario: lines
title: A title.
experiment:
  experiment: one
  owner: o
  hypothesis: h
  unit: member
  arms:
    - {key: a, weight: 0.6, control: true}
    - {key: b, weight: 0.4}
  metrics:
    - {key: e, kind: conversion, role: guardrail, direction: decrease, attribution_window: 1m, margin: {absolute: 1}}
  planned_sample: 2000
traffic: {units_per_hour: 600}
truths:
  e:
    mean: 0.1
    arms:
      b: {times: 2}
looks: 30m
horizon: 4h
claims:
  - {measure: stopped, at_least: 0.9}
"""


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("title: A title.", "title: ''", "2:8: title: has 0 characters"),
        ("weight: 0.4", "weight: 0.5", "8:3: experiment.arms: "),
        (
            "planned_sample: 2000",
            "planned_sample: 10",
            "13:19: experiment.planned_sample: must be at least 100",
        ),
        ("{units_per_hour: 600}", "{units_per_hour: -1}", "14:27: traffic.units_per_hour: must be greater"),
        ("b: {times: 2}", "c: {times: 2}", "19:7: truths.e.arms.c: is no arm"),
        ("b: {times: 2}", "b: {times: 20}", "17:11: truths.e.mean: a rate must stay"),
        ("horizon: 4h", "horizon: 4h\nhorizon: 5h", "22:1: horizon: given twice, first on line 21"),
        ("horizon: 4h", "horizon: 250m", "21:10: horizon: must be a multiple"),
        ("looks: 30m\n", "", "1:1: looks: required field is missing"),
        ("measure: stopped", "measure: regret", "23:15: claims[0].measure: 'regret' is no measure"),
        ("at_least: 0.9", "at_least: regret", "23:34: claims[0].at_least: 'regret' is no measure"),
    ],
)
def test_a_fault_names_its_line(tmp_path, old, new, where):
    path = tmp_path / "lines.yaml"
    path.write_text(LINES, encoding="utf-8")
    check_claims(load_scenario(path))
    assert old in LINES
    path.write_text(LINES.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        check_claims(load_scenario(path))
    assert str(raised.value).startswith(f"{path}:{where}"), raised.value
