"""Scenarios: the engine decides on what is drawn."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from stream_xp.domain.decision import Action
from stream_xp.services.scenarios import harness
from stream_xp.services.scenarios.measures import summary
from stream_xp.services.scenarios.runs import Chunk, _Simulation
from stream_xp.services.scenarios.world import HOUR_MS
from tests.unit.services.scenarios_world import HARMLESS, experiment, write_and_load


@pytest.fixture
def load(tmp_path):
    return partial(write_and_load, tmp_path)


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
