"""Scenarios: their files, what is drawn against the real fold, the engine's chain, measures, the page, the command."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from stream_xp import simulator
from stream_xp.cli import main
from stream_xp.domain.codec import Limits
from stream_xp.domain.decision import Action, Method, MetricResult, MetricState
from stream_xp.domain.publication import next_config, next_record
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import ConfigError
from stream_xp.services.scenarios import harness
from stream_xp.services.scenarios.early import Early
from stream_xp.services.scenarios.measures import (
    _NOTHING,
    Measure,
    _holds,
    _quantile,
    _rate,
    check_claims,
    summary,
)
from stream_xp.services.scenarios.naive import rejected
from stream_xp.services.scenarios.report import (
    WORDS,
    _value,
    complaints,
    page,
    read_results,
    results_path,
    said,
)
from stream_xp.services.scenarios.runs import Chunk, _Simulation
from stream_xp.services.scenarios.scenario import Delays, DelayShape, load_scenario
from stream_xp.services.scenarios.truths import Truths, in_time
from stream_xp.services.scenarios.world import HOUR_MS, Drawn

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples" / "scenarios").glob("*.yaml"))
PAGE = ROOT / "docs" / "scenarios.md"


def experiment(**fields):
    return {
        "experiment": "one",
        "owner": "o",
        "hypothesis": "h",
        "unit": "member",
        "arms": [{"key": "a", "weight": 0.6, "control": True}, {"key": "b", "weight": 0.4}],
        "metrics": [
            {
                "key": "errors",
                "kind": "conversion",
                "role": "guardrail",
                "direction": "decrease",
                "attribution_window": "10m",
                "margin": {"absolute": 0.05},
                "critical": True,
            }
        ],
        "planned_sample": 2000,
        **fields,
    }


def fields(**over):
    return {
        "scenario": "s",
        "title": "A title.",
        "experiment": experiment(),
        "traffic": {"units_per_hour": 600},
        "truths": {"errors": {"mean": 0.1}},
        "looks": "30m",
        "horizon": "4h",
        **over,
    }


@pytest.fixture
def load(tmp_path):
    def write_and_load(**over):
        path = tmp_path / "scenario.yaml"
        path.write_text(yaml.safe_dump(fields(**over)), encoding="utf-8")
        return load_scenario(path)

    return write_and_load


MEAN = {
    "key": "minutes",
    "kind": "mean",
    "role": "secondary",
    "direction": "increase",
    "attribution_window": "1h",
    "scale": 0.5,
    "bound": 100,
}

AGES = {"metrics": ["errors"], "until": ["1h", "2h"]}
MINUTES = experiment(metrics=[{**MEAN, "role": "primary"}])

# ---- the file ------------------------------------------------------------------------------------------------


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


# ---- what is drawn -------------------------------------------------------------------------------------------

START_MS = simulator.START_MS
WINDOW_S, LATENESS_S = 40, 5
FOLDS = 120
DRAWN = experiment(
    arms=[
        {"key": "a", "weight": 0.5, "control": True},
        {"key": "b", "weight": 0.3},
        {"key": "c", "weight": 0.2},
    ],
    metrics=[
        {**experiment()["metrics"][0], "attribution_window": f"{WINDOW_S}s"},
        {**MEAN, "attribution_window": "70s", "scale": 0.25},
    ],
    segments={"device": ["tv", "phone"]},
)
LATER = {"a": 0.2, "b": 0.2, "c": 0.6}
COME, IN_TIME = 1 - math.exp(-1), 1 - math.exp(-70 / 40)
"""Shares of the rewards that come inside 40 and 70 seconds, with a mean delay of 40."""


def drawn_rows(world, looks):
    """Rows of many runs, drawn: weights that change after a minute, looks every 20 seconds."""
    drawn = Drawn(world, FOLDS, np.random.default_rng(3))
    record = next_record(None, world.spec, effective_ms=0)
    config = next_config(None, record)
    arms = tuple(msgspec.structs.replace(arm, weight=LATER[arm.key]) for arm in world.spec.arms)
    after = next_record(record, msgspec.structs.replace(world.spec, arms=arms), effective_ms=60_000)
    for run in range(FOLDS):
        drawn.follow(run, config, 0)
        drawn.follow(run, next_config(config, after), 0)
    for look in range(1, max(looks) + 1):
        for span in drawn.stretches(look):
            drawn.draw(span)
        drawn.mature(look * 20_000)
        if look in looks:
            yield look, drawn.statistics(list(range(FOLDS)))


def folded_rows(spec, looks):
    """The same through the real fold: single units, their records, and a partition of the engine."""
    outcomes = {
        "errors": {
            arm: (simulator.Since(outcome=simulator.Conversion(probability=p * COME)),)
            for arm, p in (("a", 0.2), ("b", 0.4), ("c", 0.2))
        },
        "minutes": {
            arm: (simulator.Since(outcome=simulator.LogNormal(log_mean=math.log(7), log_sd=0, probability=IN_TIME)),)
            for arm in "abc"
        },
    }  # fmt: skip
    traffic = simulator.ExperimentTraffic(
        spec=spec,
        units_per_s=2.0,
        outcomes=outcomes,
        weight_changes=(simulator.WeightChange(from_ms=60_000, weights=LATER),),
        reward_delay_ms=5000,
    )
    world = simulator.Scenario(
        experiments=(traffic,), duration_ms=max(looks) * 20_000, allowed_lateness_ms=LATENESS_S * 1000
    )
    found = {look: [] for look in looks}
    for seed in range(FOLDS):
        for look, statistics in folded(simulator.generate(world, seed), traffic, looks):
            found[look].append(statistics)
    return found.items()


def folded(traffic, one, looks):
    record = one.record(START_MS)
    registry = Registry([Entry(offset=0, experiment=record.spec.experiment, in_force_ms=0, record=record)])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_S * 1000)
    events = list(traffic.events(START_MS))
    at = {EXPOSURES: 0, REWARDS: 0}
    for look in range(1, max(looks) + 1):
        for topic, columns, apply in (
            (EXPOSURES, exposure_columns, state.apply_exposures),
            (REWARDS, reward_columns, state.apply_rewards),
        ):
            due = [event for event in events if event.topic == topic and event.send_ms < look * 20_000][
                at[topic] :
            ]
            times = [START_MS + event.send_ms for event in due]
            offsets = range(at[topic], at[topic] + len(due))
            keys, values = [event.key for event in due], [event.value for event in due]
            block = Block(topic, 0, at[topic], offsets.stop, offsets, times, keys, values, [()] * len(due))
            limits = Limits(record_bytes=10_000, future_ms=1000)
            made, _ = columns(block, registry, floor_ms=state.log_ms(topic), limits=limits)
            apply(made, next_offset=offsets.stop)
            at[topic] = offsets.stop
        state.advance(START_MS + look * 20_000)
        if look in looks:
            yield look, state.statistics(registry.slots[0])


def table(many):
    """Row key to the values of its columns in every run; 0 where a run has no such row."""
    rows = defaultdict(lambda: np.zeros((len(many), 3)))
    for run, statistics in enumerate(many):
        for row in statistics.units:
            rows["units", row.arm, row.epoch, row.segment][run] = row.units
        for row in statistics.moments:
            rows[row.metric, row.arm, row.epoch, row.segment][run] = row.n, int(row.s), int(row.q)
    return rows


def test_what_is_drawn_is_what_the_fold_counts(load):
    """Every row at four looks: the same rows, with equal means and standard deviations over 120 runs of each."""
    truths = {
        "errors": {"mean": 0.2, "arms": {"b": {"times": 2}}},
        "minutes": {"mean": 7, "sd": 1e-9},
    }
    world = load(
        experiment=DRAWN,
        truths=truths,
        traffic={"units_per_hour": 7200},
        looks="20s",
        horizon="160s",
        lateness=f"{LATENESS_S}s",
        delays={"mean": f"{WINDOW_S}s"},
        contexts={"segment": "device", "shares": {"tv": 0.5, "phone": 0.5}},
    )
    looks = (2, 3, 6, 8)
    compared = 0
    for (look, drawn), (_, real) in zip(
        drawn_rows(world, looks), folded_rows(world.spec, looks), strict=True
    ):
        ours, theirs = table(drawn), table(real)
        assert ours.keys() == theirs.keys(), look
        for key, values in ours.items():
            others = theirs[key]
            for column in range(3):
                one, two = values[:, column], others[:, column]
                error = math.sqrt((one.var() + two.var()) / FOLDS)
                assert abs(one.mean() - two.mean()) <= 4.5 * error + 1e-9, (look, key, column)
                if one.mean() > 5 and two.std() > 0:
                    assert 0.6 < one.std() / two.std() < 1.7, (look, key, column)
                compared += 1
    assert compared > 300


def test_units_count_at_once_and_values_when_their_window_is_over(load):
    world = load(lateness="30m", looks="30m")
    drawn = Drawn(world, 1, np.random.default_rng(1))
    drawn.follow(0, next_config(None, next_record(None, world.spec, effective_ms=0)), 0)
    units = []
    for look in range(1, 4):
        units += [drawn.draw(span).sum() for span in drawn.stretches(look)]
        drawn.mature(look * 30 * 60_000)
        (statistics,) = drawn.statistics([0])
        assert sum(row.units for row in statistics.units) == sum(units)
        # Stretches are 20 and 10 minutes long; 40 minutes after a stretch its units count.
        counted = sum(row.n for row in statistics.moments)
        assert counted == sum(units[: [0, 1, 3][look - 1]])
    assert 0 <= statistics.first_exposure_ms < 60_000


@pytest.mark.parametrize("shape", ["exponential", "lognormal"])
def test_share_of_rewards_that_come_in_time(shape):
    delays = Delays(mean="10m", distribution=DelayShape(shape), sigma=0.8)
    rng = np.random.default_rng(1)
    drawn = {
        "exponential": lambda: rng.exponential(10, 200_000),
        "lognormal": lambda: rng.lognormal(math.log(10) - 0.32, 0.8, 200_000),
    }[shape]()
    assert in_time(delays, 15 * 60_000, "a") == pytest.approx((drawn < 15).mean(), abs=0.005)
    assert in_time(None, 1, "a") == 1.0


def test_truths_drift_begin_fade_and_wait_for_a_stage(load):
    effect = {"times": 3, "since": "1h", "half_life": "1h"}
    drift = [{"at": "0h", "times": 1}, {"at": "2h", "times": 2}]
    world = load(truths={"errors": {"mean": 0.1, "drift": drift, "arms": {"b": effect}}})
    truths = Truths(world, 1)
    means = [truths.means(0, at * HOUR_MS)[0, 0].tolist() for at in (0, 1, 2, 3)]
    wanted = [[0.1, 0.1], [0.15, 0.45], [0.2, 0.4], [0.2, 0.3]]
    assert means == [pytest.approx(one) for one in wanted]

    staged = load(
        experiment=experiment(ramp={"stages": [{"coverage": 0.5}, {"coverage": 1}]}),
        truths={"errors": {"mean": 0.1, "arms": {"b": {"times": 2, "stage": 1}}}},
    )
    truths = Truths(staged, 2)
    truths.reached(0, 0, 5.0)
    truths.reached(1, 1, 7.0)
    assert truths.harming(8.0).tolist() == [[False, False], [False, True]]
    assert truths.means(0, 8.0)[:, 0, 1].tolist() == pytest.approx([0.1, 0.2])
    assert truths.can_harm(staged)


HARMLESS = {"critical": False, "margin": {"absolute": 0.05}}


@pytest.mark.parametrize(
    ("metric", "arms", "harms"),
    [
        ({}, {"b": {"times": 1.01}}, True),
        ({}, {"b": {"times": 0.9}}, False),
        ({"direction": "increase"}, {"b": {"times": 0.9}}, True),
        ({"role": "primary", "margin": None, "critical": None}, {"b": {"times": 2}}, False),
        # No more than the margin allows, and a little more.
        (HARMLESS, {"b": {"times": 1.5}}, False),
        (HARMLESS, {"b": {"times": 1.51}}, True),
        ({"critical": False, "margin": {"relative": 0.2}}, {"b": {"times": 1.19}}, False),
        ({"critical": False, "margin": {"relative": 0.2}}, {"b": {"times": 1.21}}, True),
        # Against the control, whatever the baseline is.
        ({}, {"a": {"times": 1.5}, "b": {"times": 1.4}}, False),
        ({}, {"a": {"times": 0.5}}, True),
    ],
)
def test_an_arm_harms_beyond_what_its_guardrail_tolerates(load, metric, arms, harms):
    of_metric = {**experiment()["metrics"][0], **metric}
    of_metric = {name: value for name, value in of_metric.items() if value is not None}
    world = load(experiment=experiment(metrics=[of_metric]), truths={"errors": {"mean": 0.1, "arms": arms}})
    truths = Truths(world, 1)
    assert truths.harming(0.0).tolist() == [[False, harms]]
    assert truths.can_harm(world) is harms


def test_harm_in_one_context_counts_with_its_share(load):
    def harms(tv, phone):
        contexts = {"tv": {"b": tv}, "phone": {"b": phone}}
        world = load(
            experiment=experiment(segments={"device": ["tv", "phone"]}),
            contexts={"segment": "device", "shares": {"tv": 0.25, "phone": 0.75}},
            truths={"errors": {"mean": 0.1, "contexts": contexts}},
        )
        return bool(Truths(world, 1).harming(0.0)[0, 1])

    assert harms(1.5, 1.0)
    assert not harms(1.5, 0.8)


def test_the_true_effect_is_that_of_the_units_counted(load):
    """Some of the units come before the effect begins, to the minute, and those that are not mature are left out."""
    world = load(
        truths={"errors": {"mean": 0.1, "arms": {"b": {"times": 3, "since": "65m"}}}},
        traffic={"units_per_hour": 1e6},
    )
    drawn = Drawn(world, 1, np.random.default_rng(1))
    drawn.follow(0, next_config(None, next_record(None, world.spec, effective_ms=0)), 0)
    found = []
    for look in range(1, 5):
        for span in drawn.stretches(look):
            drawn.draw(span)
        drawn.mature(look * 30 * 60_000)
        found.append(drawn.true_effect(0, 0, 1))
    # Of the units until 1:50 those of the last 45 minutes have the effect.
    assert found[1] == (0.0, pytest.approx(0.1))
    assert found[3] == (pytest.approx(0.2 * 45 / 110, rel=0.01), pytest.approx(0.1))
    assert drawn.true_effect(0, 0, 0) == (0.0, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("state", "effect", "wrong"),
    [
        ("worse", 0.0, True),
        ("worse", 0.01, False),
        ("better", 0.01, True),
        ("better", -0.01, False),
        ("harmed", 0.049, True),
        ("harmed", 0.051, False),
        ("safe", 0.049, False),
        ("safe", 0.05, True),
        ("inconclusive", 0.0, False),
    ],
)
def test_what_is_called_proven_is_held_against_the_truth(load, monkeypatch, state, effect, wrong):
    metric = {**experiment()["metrics"][0], **HARMLESS}
    simulation = _Simulation(load(experiment=experiment(metrics=[metric])), 1, np.random.default_rng(1))
    monkeypatch.setattr(Drawn, "true_effect", lambda *_: (effect, 0.1))
    claim = MetricResult("errors", "guardrail", "b", MetricState(state), Method.ASYMPTOTIC, 100, 100)
    assert simulation._is_wrong(0, claim) is wrong


def test_rewards_come_by_their_delays(load):
    """After any time the share that has come is that of the distribution, and after the window all have come."""
    world = load(delays={"mean": "5m", "arms": {"b": "1m"}})
    early = Early(world, 1, np.random.default_rng(1))
    units, rewards = np.full((1, 2), 100_000), np.full((1, 2), 50_000)
    early.expose(0, 0.0, units, rewards)
    for minute in (2, 5, 10):
        early.look(minute * 60_000)
        come = [(1 - math.exp(-minute / mean)) / (1 - math.exp(-10 / mean)) for mean in (5, 1)]
        assert early.counts[0, 1, 0] / 50_000 == pytest.approx(come, abs=0.01)
        assert early.counts[0, 0].tolist() == units.tolist()
    assert early.counts[0, 1].tolist() == early.counts[0, 2].tolist() == rewards.tolist()


# ---- the engine ----------------------------------------------------------------------------------------------


def test_harm_is_stopped_by_the_chain(load):
    world = load(
        truths={"errors": {"mean": 0.05, "arms": {"b": {"times": 5, "since": "1h"}}}}, comparisons=["peeked"]
    )
    for run in Chunk(world, 0, 10, 1).run():
        assert (run.action, run.arm, run.metric) == (Action.STOP, "b", "errors")
        assert run.onset_ms == HOUR_MS
        assert run.ended_ms > run.onset_ms
        assert run.ended_ms % (30 * 60_000) == 0
        # A weight epoch of the file and the final one.
        assert run.epochs == 2
        hours = (run.ended_ms - HOUR_MS) / HOUR_MS
        assert run.harmed == pytest.approx(240 * hours, abs=6 * math.sqrt(240 * hours))


def test_a_ramp_goes_through_its_stages_and_ships(load):
    world = load(
        experiment=experiment(ramp={"stages": [{"coverage": 0.2}, {"coverage": 1}]}),
        traffic={"units_per_hour": 20_000},
        truths={"errors": {"mean": 0.02}},
        activation="5m",
    )
    for run in Chunk(world, 0, 5, 1).run():
        assert (run.action, run.arm, run.stage, run.epochs) == (Action.SHIP, "b", 1, 3)


ORDERS = {
    "key": "orders",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": "10m",
}
BOTH = [{**experiment()["metrics"][0], **HARMLESS}, ORDERS]
ORDERS_TRUTH = {"mean": 0.1, "arms": {"b": {"times": 3}}}


def test_after_a_ship_all_units_of_a_harmful_arm_are_harmed(load):
    world = load(
        experiment=experiment(metrics=BOTH),
        truths={
            "errors": {"mean": 0.1, "arms": {"b": {"times": 3, "since": "3h"}}},
            "orders": ORDERS_TRUTH,
        },
        traffic={"units_per_hour": 6000},
        comparisons=["uniform"],
    )
    for run in Chunk(world, 0, 3, 1).run():
        assert (run.action, run.shipped_best, run.false_stop) == (Action.SHIP, True, False)
        assert run.ended_ms < 3 * HOUR_MS
        # All of one hour, and not the 40 % that the arm had in the experiment.
        assert run.harmed == pytest.approx(6000, rel=0.1)


def test_monitors_hold_as_in_the_service(load):
    """Three times the orders are taken for lost rewards of the control, where the file says so."""
    held = load(
        experiment=experiment(metrics=BOTH, monitors={"reward_loss": 1.5}),
        truths={"errors": {"mean": 0.1}, "orders": ORDERS_TRUTH},
        traffic={"units_per_hour": 6000},
    )
    assert [run.action for run in Chunk(held, 0, 2, 1).run()] == [None, None]


def test_a_stop_for_futility_is_no_false_stop(load):
    world = load(
        experiment=experiment(
            metrics=[{**ORDERS, "minimum_effect": {"absolute": 0.1}}],
            conclusion={"mode": "auto", "futility": True},
        ),
        truths={"orders": {"mean": 0.1}},
        traffic={"units_per_hour": 6000},
    )
    for run in Chunk(world, 0, 2, 1).run():
        assert (run.action, run.futile, run.false_stop) == (Action.STOP, True, False)


def test_a_stop_of_an_arm_that_does_no_harm_yet_is_false(load):
    world = load(truths={"errors": {"mean": 0.05, "arms": {"b": {"times": 5, "since": "1h"}}}})
    simulation = _Simulation(world, 2, np.random.default_rng(1))
    simulation.outcomes()
    found = []
    for ended_ms in (HOUR_MS, 2 * HOUR_MS):
        simulation._runs[0].ended_ms = ended_ms
        found.append(simulation._is_false_stop(0))
    assert found == [True, False]


CONTEXTUAL = {
    "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
    "metrics": [ORDERS],
    "segments": {"device": ["tv", "phone"]},
    "minimum_runtime": "52w",
    "allocation": {
        "policy": "contextual",
        "context": "device",
        "metric": "orders",
        "floor": 0.1,
        "interval": "30m",
        "maximum_change": 0.5,
    },
}


def test_contexts_are_worth_their_regret(load):
    world = load(
        experiment=experiment(**CONTEXTUAL),
        contexts={"segment": "device", "shares": {"tv": 0.5, "phone": 0.5}},
        truths={"orders": {"mean": 0.2, "contexts": {"tv": {"b": 2}, "phone": {"b": 0.3}}}},
        comparisons=["uniform", "context_free"],
        claims=[{"measure": "regret", "at_most": "context_free.regret"}],
    )
    found = summary(world, Chunk(world, 0, 5, 1).run())
    values = {measure.name: measure.value for measure in found.measures}
    assert values["on_best"] > 0.7
    assert values["on_best_at_end"] == pytest.approx(0.9)
    # One of two arms for everybody is right for half of the units, whatever the weights are.
    assert values["context_free.on_best"] == pytest.approx(0.5, abs=0.03)
    assert values["regret"] < 0.6 * values["context_free.regret"]
    assert found.holds


def test_a_proposal_is_approved_at_once(load):
    ramp = {"stages": [{"coverage": 1}]}
    world = load(
        experiment=experiment(ramp=ramp, conclusion={"mode": "approve"}),
        traffic={"units_per_hour": 20_000},
        truths={"errors": {"mean": 0.02}},
    )
    assert {run.action for run in Chunk(world, 0, 3, 1).run()} == {Action.SHIP}


def test_numbers_do_not_depend_on_processes_but_on_the_seed(load, monkeypatch):
    monkeypatch.setattr(harness, "CHUNK_RUNS", 3)
    worlds = [load(comparisons=["peeked", "uniform"]), load(truths={"errors": {"mean": 0.2}})]
    one, two = (harness.simulate(worlds, runs=7, seed=1, processes=n) for n in (1, 2))
    assert one == two
    assert one != harness.simulate(worlds, runs=7, seed=2)
    assert [found.runs for found in one] == [7, 7]
    assert harness.simulate(worlds[1:], runs=7, seed=1) == one[1:]
    chunks = harness._chunks(worlds[0], 7, 1)
    assert [(chunk.number, chunk.runs) for chunk in chunks] == [(0, 3), (1, 3), (2, 1)]
    assert chunks[0].run() != chunks[1].run()


# ---- what it is compared with ----------------------------------------------------------------------------------


def test_naive_z_test_is_that_of_the_values(load):
    world = load(experiment=experiment(metrics=[*experiment()["metrics"], {**MEAN, "role": "primary"}]),
                 truths={"errors": {"mean": 0.1}, "minutes": {"mean": 5, "sd": 1}})  # fmt: skip
    rng = np.random.default_rng(5)
    found, sizes = [], []
    for shift in np.linspace(0.0, 0.3, 40):
        cells = np.zeros((2, 3, 1, 2), np.int64)
        steps = [np.rint(rng.normal(5 + shift * arm, 1, 400) / 0.5).astype(np.int64) for arm in (0, 1)]
        for arm, one in enumerate(steps):
            cells[1, :, 0, arm] = len(one), one.sum(), (one * one).sum()
        values = [one * 0.5 for one in steps]
        error = math.sqrt(sum(one.var(ddof=1) / len(one) for one in values))
        z = (values[1].mean() - values[0].mean()) / error
        assert rejected(world.spec, cells).tolist() == [abs(z) > 1.959964]
        found.append(abs(z) > 1.959964)
        sizes.append(abs(z))
    assert {True, False} <= set(found)
    assert any(1.65 < one < 1.95 for one in sizes)


def test_naive_guardrail_is_one_sided_and_critical_has_no_margin(load):
    world = load()
    harmed, better = np.zeros((1, 3, 2, 2), np.int64)[:, :, :1], np.zeros((1, 3, 1, 2), np.int64)
    harmed[0, :, 0] = [[1000, 1000], [50, 75], [50, 75]]
    better[0, :, 0] = [[1000, 1000], [75, 50], [75, 50]]
    assert rejected(world.spec, harmed).tolist() == [True]
    assert rejected(world.spec, better).tolist() == [False]
    metric = {**experiment()["metrics"][0], "critical": False}
    tolerant = load(experiment=experiment(metrics=[metric]))
    assert rejected(tolerant.spec, harmed).tolist() == [False]


# ---- measures --------------------------------------------------------------------------------------------------


def test_quantiles_know_what_lies_beyond_the_horizon():
    assert _quantile("x", [1.0, 2.0, 3.0, math.inf], 0.5).value == 2.0
    assert _quantile("x", [1.0, math.inf, math.inf], 0.95).value is None
    exact = _quantile("x", [float(n) for n in range(1, 1001)], 0.95)
    assert (exact.value, round(exact.error, 1)) == (950.0, 6.5)


def test_a_rate_is_never_without_error():
    assert _rate("x", [False] * 500).error == pytest.approx(math.sqrt(0.5 / 501 * 500.5 / 501 / 500))


@pytest.mark.parametrize(
    ("value", "limit", "most", "promised", "holds"),
    [
        (0.06, 0.05, True, True, True),
        (0.09, 0.05, True, True, False),
        (0.06, 0.05, True, False, False),
        (0.9, 0.9, False, True, True),
        (0.89, 0.9, False, True, False),
        (None, 3.0, True, True, False),
        (3.0, None, True, False, True),
    ],
)
def test_claims(value, limit, most, promised, holds):
    measure = Measure(name="x", value=value, error=0.01, runs=100)
    assert _holds(measure, limit, most=most, promised=promised) is holds


def test_of_two_values_beyond_the_horizon_none_is_the_smaller_one():
    never = Measure(name="x", value=None, error=None, runs=100)
    assert not _holds(never, None, most=True, promised=False)
    assert not _holds(never, None, most=False, promised=False)
    assert _holds(never, 3.0, most=False, promised=True)
    assert not _holds(Measure(name="x", value=None, error=None, runs=0), 3.0, most=False, promised=True)


def test_delays_and_harm_are_of_the_runs_that_met_the_harm(load):
    """A run that was stopped before is a false stop; its delay is not the longest, and its 0 units no success."""
    world = load(
        truths={"errors": {"mean": 0.1, "arms": {"b": {"times": 2, "since": "2h"}}}}, comparisons=["peeked"]
    )

    def run(action, hours, harmed, peeked, **more):
        return msgspec.structs.replace(
            _NOTHING,
            action=action,
            ended_ms=hours * HOUR_MS,
            onset_ms=2.0 * HOUR_MS,
            harmed=harmed,
            naive={"peeked": (peeked * HOUR_MS, 10.0 * peeked)},
            **more,
        )

    runs = [
        run(Action.STOP, 3, 30.0, 4),
        run(Action.STOP, 1, 0.0, 1, false_stop=True),
        run(Action.SHIP, 1, 90.0, 2),
    ]
    found = {measure.name: measure for measure in summary(world, runs).measures}
    assert (found["delay_h_p50"].value, found["delay_h_p50"].runs) == (1.0, 2)
    assert found["delay_h_p95"].value is None
    assert [found[f"units_harmed_{p}"].value for p in ("p50", "p95")] == [30.0, 90.0]
    assert (found["peeked.false_stops"].value, found["peeked.delay_h_p95"].runs) == (pytest.approx(2 / 3), 1)
    assert (found["peeked.delay_h_p95"].value, found["peeked.units_harmed_p95"].value) == (2.0, 40.0)


# ---- files of this repository ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_scenarios_with_claims(path):
    world = load_scenario(path)
    assert world.scenario.scenario == path.stem
    assert world.scenario.claims


def test_the_page_is_that_of_its_results():
    results = read_results(results_path(PAGE))
    assert PAGE.read_text(encoding="utf-8") == page(results)
    assert [one.scenario for one in results.scenarios] == [path.stem for path in EXAMPLES]


def test_the_example_of_the_page_is_a_scenario(tmp_path):
    text = PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "scenario.yaml"
    path.write_text(text.replace("../canary", str(ROOT / "examples" / "canary")), encoding="utf-8")
    check_claims(load_scenario(path))


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 3
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_every_measure_has_words():
    results = read_results(results_path(PAGE))
    assert all(said(measure.name) for one in results.scenarios for measure in one.measures)
    assert {"delay_h_p95", "units_harmed_p95", "regret_share"} <= WORDS.keys()


# ---- the command ---------------------------------------------------------------------------------------------------


def command(tmp_path, *arguments, **over):
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(fields(**over)), encoding="utf-8")
    return CliRunner().invoke(main, ["simulate", str(path), "--runs", "3", "--processes", "1", *arguments])


def test_command_writes_the_page_and_its_results(tmp_path):
    output = tmp_path / "found.md"
    done = command(tmp_path, "--write", str(output), "--json", claims=[{"measure": "shipped", "at_most": 0}])
    assert done.exit_code == 0, done.output
    results = read_results(tmp_path / "found.json")
    assert output.read_text(encoding="utf-8") == page(results)
    assert json.loads(done.stdout)["scenarios"][0]["runs"] == 3
    assert "**1 of 1 claims hold.**" in output.read_text(encoding="utf-8")


def test_command_fails_where_a_claim_does(tmp_path):
    done = command(tmp_path, claims=[{"measure": "shipped", "at_least": 0.5}])
    assert done.exit_code == 1
    assert "s: shipped is 0 ± 0.19, claimed at least 0.5" in done.stderr


def test_command_names_the_fault_of_a_file(tmp_path):
    done = command(tmp_path, looks="7m")
    assert done.exit_code == 2
    assert "horizon: must be a multiple of looks, 7m" in done.stderr


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.0512, 0.0034, "0.0512 ± 0.0034"),
        (11760.4, 350.2, "11,760 ± 350"),
        (11760.4, None, "11,760"),
        (78.5, None, "78.5"),
        (None, None, "beyond the horizon"),
    ],
)
def test_values_as_people_read_them(value, error, shown):
    assert _value(Measure(name="x", value=value, error=error, runs=100)) == shown


def test_complaints_are_of_claims_that_fail(load):
    claims = [{"measure": "shipped", "at_most": 0}, {"measure": "stopped", "at_least": 1}]
    world = load(claims=claims)
    found = complaints([summary(world, Chunk(world, 0, 2, 1).run())])
    assert [one.split(":")[1].split()[0] for one in found] == ["stopped"]
