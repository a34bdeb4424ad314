"""When the next stage of a ramp is due: every condition alone holds it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from stream_xp.domain.decision import Action, Evidence, Method, MetricResult, MetricState, SampleRatio
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.operator import OperatorAction, Order
from stream_xp.domain.publication import changed_design
from stream_xp.domain.rollout import Ramp
from stream_xp.domain.statistics import build
from stream_xp.engine.evaluate import Evaluation
from stream_xp.engine.ramp import Step, epochs_of_stage, ramp_step, stage_of
from stream_xp.engine.standing import NOTHING_SAID, Standing
from stream_xp.engine.steering import Seen, steer

FAIR = SampleRatio(log_e=-1.0, p_always_valid=1.0, threshold_log_e=6.9, mismatch=False)
PAUSE = Order(experiment="e", version=1, action=OperatorAction.PAUSE, actor="kim", reason="lunch")
STAGES = [
    {"coverage": 0.1, "minimum_units": 100, "minimum_time": "10s"},
    {"coverage": 0.5, "minimum_units": 200, "minimum_time": "20s"},
    {"coverage": 1.0, "minimum_units": 300, "minimum_time": "30s"},
]


def record(*epochs, arms="abc"):
    """An experiment with weight epochs of (coverage, begin in seconds)."""
    metric = {"kind": "mean", "attribution_window": "1s", "bound": 1.0, "direction": "increase"}
    guard = {"role": "guardrail", "margin": {"absolute": 1.0}}
    spec = msgspec.convert(
        {
            "experiment": "e",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": [{"key": key, "weight": 1 / len(arms), "control": key == "a"} for key in arms],
            "metrics": [metric | {"key": "g"} | guard, metric | {"key": "m", "role": "primary"}],
            "ramp": {"stages": STAGES},
        },
        ExperimentSpec,
    )
    listed = [
        WeightEpoch(epoch=at, weights=spec.weights, effective_ms=1000 * second, coverage=coverage)
        for at, (coverage, second) in enumerate(epochs)
    ]
    return ExperimentRecord(spec=spec, epochs=tuple(listed), design_hash=spec.design_hash())


def evaluation(states="ss", *, better=None, invalid=()):
    """The guardrail in both treatment arms: s(afe), i(nconclusive), u(ndetermined) or h(armed)."""
    names = {"s": "safe", "i": "inconclusive", "u": "undetermined", "h": "harmed"}
    units = {"method": Method.ASYMPTOTIC, "control_units": 100, "arm_units": 100}
    found = [
        MetricResult(metric="g", role="guardrail", arm=arm, state=MetricState(names[state]), **units)
        for arm, state in zip("bc", states, strict=False)
    ]
    return Evaluation(arms=(), metrics=tuple(found), sample_ratio=FAIR, invalid=tuple(invalid))


def statistics(*units):
    """So many units in each weight epoch."""
    table = {("a", at, ""): n for at, n in enumerate(units)} | {("a", 0, "os=x"): 5}
    return build(units=table, moments={}, crossover_units=0, first_exposure_ms=0, out_of_range={})


def step(one, units, *, seconds=1000, states="ss", paused=False, invalid=()):
    return ramp_step(
        one,
        evaluation(states, invalid=invalid),
        statistics(*units),
        watermark_ms=None if seconds is None else 1000 * seconds,
        paused=paused,
    )


def test_the_next_stage_is_due_when_all_is_there():
    assert step(record((0.1, 5)), [100], seconds=15) == Step(0, next_stage=1)


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ({"units": [99]}, "stage 0 has 99 of 100 units"),
        ({"seconds": 14}, "stage 0 has not lasted 10s of watermark time"),
        ({"seconds": None}, "stage 0 has not lasted 10s of watermark time"),
        ({"states": "si"}, "not yet proven non-inferior: g in c"),
        ({"states": "us"}, "not yet proven non-inferior: g in b"),
        ({"states": "hs"}, "not yet proven non-inferior: g in b"),
        ({"paused": True}, "the ramp is paused"),
        ({"invalid": ("why",)}, "the data are invalid"),
    ],
)
def test_each_condition_alone_holds_the_ramp(condition, sentence):
    met = {"units": [100], "seconds": 15}
    assert step(record((0.1, 5)), **met | condition) == Step(0, waits=(sentence,))


@pytest.mark.parametrize(
    "condition", [{"paused": True}, {"invalid": ("why",)}, {"states": "si"}, {"units": [99]}]
)
def test_what_holds_the_ramp_is_a_hold(condition):
    met = {"units": [100], "states": "ss", "paused": False, "invalid": ()} | condition
    seen = Seen(statistics(*met["units"]), watermark_ms=15_000, runtime_ms=0)
    found = evaluation(met["states"], invalid=met["invalid"])
    standing = Standing(paused=PAUSE if met["paused"] else None)
    assert steer(record((0.1, 5)), standing, found, seen).decision.action is Action.HOLD


def test_the_steering_of_a_ramp():
    seen = Seen(statistics(100), watermark_ms=15_000, runtime_ms=0)
    found = steer(record((0.1, 5)), NOTHING_SAID, evaluation(), seen)
    assert (found.decision.action, found.decision.stage) == (Action.ADVANCE, 1)
    assert found.decision.reason == "every guardrail is proven non-inferior; stage 1, 0.5 of all units"


def test_only_units_and_time_of_this_visit_count():
    # Weights that changed inside the stage begin no new visit; another stage between two visits does.
    one = record((0.1, 5), (0.5, 20), (0.5, 30))
    assert step(one, [1000, 120, 80], seconds=40) == Step(1, next_stage=2)
    assert step(one, [1000, 120, 79], seconds=40).waits == ("stage 1 has 199 of 200 units",)
    assert step(one, [1000, 120, 80], seconds=39).waits == ("stage 1 has not lasted 20s of watermark time",)
    again = record((0.1, 5), (0.5, 20), (0.1, 30))
    assert step(again, [1000, 1000, 99]).waits == ("stage 0 has 99 of 100 units",)
    assert [epoch.epoch for epoch in epochs_of_stage(again.epochs)] == [2]
    final = [msgspec.structs.replace(e, final=e.epoch == 1, coverage=0.1) for e in again.epochs]
    assert [epoch.epoch for epoch in epochs_of_stage(final)] == [2]


def test_the_last_stage_is_over_and_none_follows():
    one = record((1.0, 0))
    assert step(one, [300], seconds=30) == Step(2, over=True)
    assert step(one, [299], seconds=30) == Step(2, waits=("stage 2 has 299 of 300 units",))


@pytest.mark.parametrize(
    ("units", "coverage", "action"),
    [(300, 1.0, "ship"), (299, 1.0, "hold"), (200, 0.5, "advance"), (199, 0.5, "hold")],
)
def test_a_winner_ships_when_the_last_stage_is_over(units, coverage, action):
    proof = Evidence(0.2, 0.1, 0.3, 4.0, 0.01, 3.0)
    better = MetricResult(
        metric="m",
        role="primary",
        arm="b",
        state=MetricState.BETTER,
        method=Method.ASYMPTOTIC,
        control_units=100,
        arm_units=100,
        effect=proof,
    )
    found = evaluation()
    found = replace(found, metrics=(*found.metrics, better))
    seen = Seen(statistics(units), watermark_ms=10**6, runtime_ms=0)
    steering = steer(record((coverage, 0)), NOTHING_SAID, found, seen)
    assert steering.decision.action == action
    if action == "hold":
        assert f"{units} of {units + 1} units" in steering.decision.reason


def test_a_coverage_of_no_stage_goes_nowhere():
    one = record((0.3, 0))
    assert stage_of(one.spec, one.epochs[0]) is None
    assert step(one, [1000]) == Step(None)


def test_a_ramp_that_lists_no_stages_waits_in_each_of_them():
    stages = msgspec.convert({}, Ramp).stages
    assert [stage.coverage for stage in stages] == [0.01, 0.05, 0.1, 0.25, 0.5, 1.0]
    assert {stage.minimum_units for stage in stages} == {1_000}
    times = [duration_ms(stage.minimum_time) for stage in stages]
    assert times == sorted(times)
    assert min(times) >= 30 * 60_000
    written = msgspec.convert({"stages": [{"coverage": 1}]}, Ramp).stages
    assert [(stage.minimum_units, stage.minimum_time) for stage in written] == [(0, "0s")]


def test_a_record_of_before_keeps_the_stages_and_the_design_it_was_applied_with():
    """A record has all its fields written out, so that defaults of later say nothing about it."""
    before = Ramp(
        stages=tuple(msgspec.structs.replace(s, minimum_units=0, minimum_time="0s") for s in Ramp().stages)
    )
    old = msgspec.structs.replace(record((0.1, 0)).spec, ramp=before)
    again = msgspec.json.decode(msgspec.json.encode(old), type=ExperimentSpec)
    assert again.ramp == before
    assert again.design_hash() == old.design_hash()
    assert changed_design(old, msgspec.structs.replace(record((0.1, 0)).spec, ramp=Ramp()))[:2] == (
        "ramp.stages[0].minimum_units",
        "ramp.stages[0].minimum_time",
    )
