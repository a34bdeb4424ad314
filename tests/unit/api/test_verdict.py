"""The verdict of every gate: each state by its records, and what outranks what."""

from __future__ import annotations

import msgspec
import pytest
from gate_world import (
    BASE,
    BEGUN_MS,
    EVIDENCE,
    NOW_MS,
    SPEC,
    STATES,
    World,
    config,
    order,
    record,
    result,
    signal,
    spec,
    world_in,
)

from stream_xp.domain.decision import Action, MetricState, RolloutStatus
from stream_xp.domain.gate import Cause, Verdict
from stream_xp.domain.operator import OperatorAction


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_its_verdict(state: str) -> None:
    found = world_in(state).view.verdict("checkout", "canary")
    assert (found.verdict, found.cause) == (STATES[state].verdict, STATES[state].cause), found.reason


def test_every_cause_is_among_the_states() -> None:
    assert {state.cause for state in STATES.values()} == set(Cause) - {Cause.UNKNOWN_ARM}


def test_an_arm_that_is_none_is_invalid_also_under_a_stop() -> None:
    view = world_in("stop").view
    for arm in ("stable", "canry"):
        assert view.verdict("checkout", arm).cause is Cause.UNKNOWN_ARM


def test_without_an_arm_all_treatments_count() -> None:
    assert world_in("pass").view.verdict("checkout").verdict is Verdict.PASS
    # One arm that is closed is no reason to stop the other.
    assert world_in("arm closed").view.verdict("checkout").verdict is not Verdict.STOP
    assert world_in("shipped").view.verdict("checkout").verdict is Verdict.PASS
    assert world_in("shipped").view.verdict("checkout", "rival").cause is Cause.ANOTHER_ARM
    one_harmed = msgspec.structs.replace(
        result(),
        metrics=(
            *result().metrics[:3],
            msgspec.structs.replace(result().metrics[3], state=MetricState.INCONCLUSIVE),
        ),
    )
    world = World()
    world.put(*BASE)
    world.put("results", one_harmed)
    world.read()
    assert world.view.verdict("checkout", "canary").verdict is Verdict.PASS
    assert world.view.verdict("checkout").verdict is Verdict.CONTINUE


def test_a_shipped_control_stops_every_treatment() -> None:
    world = World()
    for topic, value in (BASE, EVIDENCE, ("config", config(RolloutStatus.SHIPPED, "stable"))):
        world.put(topic, value)
    world.read()
    assert world.view.verdict("checkout").cause is Cause.ANOTHER_ARM


def test_a_stop_is_latched_until_a_person_resets_it() -> None:
    world = world_in("stop")
    world.put("results", result(look=8))  # all is well again
    assert world.view.verdict("checkout", "canary").verdict is Verdict.STOP
    world.put("signals", signal(Action.SHIP, identity="later"))
    assert world.view.verdict("checkout", "canary").verdict is Verdict.STOP
    world.put("signals", order(OperatorAction.RESET))
    assert world.view.verdict("checkout", "canary").verdict is Verdict.PASS
    # It was decided before the reset, so it is read again without effect.
    world.put("signals", signal(Action.STOP))
    assert world.view.verdict("checkout", "canary").verdict is Verdict.PASS


def test_a_new_version_begins_without_the_stop_of_the_old_one() -> None:
    world = world_in("stop")
    world.put("config", config(RolloutStatus.STOPPED, "stable"))
    world.put("experiments", record(spec(version=2)))
    assert world.view.verdict("checkout", "canary").cause is Cause.NO_DATA
    world.put("results", result(version=2, look=1))
    assert world.view.verdict("checkout", "canary").verdict is Verdict.PASS


def test_an_older_look_changes_nothing() -> None:
    world = world_in("pass")
    world.put("results", result(look=6, errors=MetricState.INCONCLUSIVE))
    assert world.view.verdict("checkout", "canary").look == 7


def test_what_is_no_record_is_counted_and_changes_nothing() -> None:
    world = world_in("pass")
    for topic in ("experiments", "config", "signals", "results"):
        world.put(topic, b'{"no": "record"}')
    world.put("results", result(experiment="other"))
    refused = record(spec(planned_sample=20_000))  # version 1 is frozen
    world.put("experiments", refused)
    no_control = [arm | {"control": False} for arm in SPEC["arms"]]  # type: ignore[attr-defined]
    world.put("experiments", record(spec(version=2, arms=no_control)))
    world.put("experiments", record(spec(experiment="other")))
    assert world.view.verdict("checkout", "canary").verdict is Verdict.PASS
    assert world.view.passed_over == {"xp.experiments": 4, "xp.config": 1, "xp.signals": 1, "xp.results": 2}


def test_ages_are_numbers_also_without_data() -> None:
    fresh = world_in("pass").view.verdict("checkout", "canary")
    assert (fresh.data_age_ms, fresh.invalid_ms) == (2_000, 0)
    none = world_in("no data").view.verdict("checkout", "canary")
    assert (none.data_age_ms, none.invalid_ms) == (NOW_MS - BEGUN_MS, NOW_MS - BEGUN_MS)
    unknown = world_in("unknown experiment").view.verdict("checkout", "canary")
    assert (unknown.data_age_ms, unknown.invalid_ms) == (1_000, 1_000)
    world = world_in("pass")
    world.put("results", result(look=8, invalid=("late",), evaluated_ms=NOW_MS))
    invalid = world.view.verdict("checkout", "canary")
    # The newest valid look was 1.7 s ago.
    assert (invalid.verdict, invalid.invalid_ms) == (Verdict.INVALID, 1_700)


def test_the_history_is_bounded_and_reaches_back() -> None:
    world = world_in("pass")
    for look in range(8, 3_000):
        world.put("results", result(look=look))
    looks = [point.look for point in world.view.history("checkout")]
    assert len(looks) <= 256
    assert (looks[0], looks[-60:]) == (7, list(range(2_940, 3_000)))
    assert looks == sorted(set(looks))
