"""Laws of the fold of signals and orders: order, repeats, other versions, latching, reset, answers."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from stream_xp.domain.decision import Action, Decision
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.domain.operator import OperatorAction, Order
from stream_xp.engine.standing import NOTHING_SAID, Said, standing

SPEC = msgspec.convert(
    {
        "experiment": "exp",
        "version": 2,
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
        "metrics": [
            {
                "key": "m",
                "kind": "conversion",
                "role": "primary",
                "direction": "increase",
                "attribution_window": "1s",
            }
        ],
        "ramp": {"stages": [{"coverage": 0.1}, {"coverage": 1.0}]},
    },
    ExperimentSpec,
)
RESETS = [None, "r0", "r1"]


def decided(id_, action, *, arm="b", since=None, proposed=False, version=2, experiment="exp", **fields):
    decision = Decision(action=Action(action), reason="why", arm=arm, **fields)
    return Said("svc", id_, experiment, version, decision=decision, since=since, proposed=proposed, epochs=1)


def ordered(id_, action, *, version=2, experiment="exp", **fields):
    order = Order(
        experiment=experiment,
        version=version,
        action=OperatorAction(action),
        actor="kim",
        reason="because",
        **fields,
    )
    return Said("person", id_, experiment, version, order=order)


decisions = st.builds(
    decided,
    st.sampled_from(["s0", "s1", "s2", "s3", "s4"]),
    st.sampled_from(list(Action)),
    arm=st.sampled_from(["a", "b", "z"]),
    since=st.sampled_from(RESETS),
    proposed=st.booleans(),
    stage=st.sampled_from([None, 0, 1, 2]),
    weights=st.sampled_from([None, {"a": 0.4, "b": 0.6}, {"a": 0.4, "b": 0.4}, {"b": 1.0}]),
)
orders = st.builds(
    ordered,
    st.sampled_from(["r0", "r1", "o0", "o1", "o2"]),
    st.sampled_from(list(OperatorAction)),
    arm=st.sampled_from([None, "a", "b", "z"]),
    stage=st.sampled_from([None, 0, 1, 2]),
    signal_id=st.sampled_from([None, "s0", "s1", "s2"]),
    monitors=st.booleans(),
)
logs = st.lists(st.one_of(decisions, orders), max_size=15)
FOREIGN = [{"version": 1}, {"version": 3}, {"experiment": "other"}]
foreign = st.one_of(
    st.builds(
        lambda one, where: one._replace(**where), st.one_of(decisions, orders), st.sampled_from(FOREIGN)
    )
)


def effect(found):
    return replace(found, ignored=())


@given(logs, st.data())
def test_a_repeat_changes_nothing(log, data):
    """Neither a record read twice nor all of a prefix written again."""
    at = data.draw(st.integers(0, len(log)))
    assert standing(SPEC, [*log[:at], *log[:at], *log[at:]]) == standing(SPEC, log)


@given(logs, st.lists(foreign, max_size=5), st.randoms(use_true_random=False))
def test_what_is_said_of_others_changes_nothing(log, others, shuffler):
    mixed = list(log)
    for one in others:
        mixed.insert(shuffler.randint(0, len(mixed)), one)
    assert standing(SPEC, mixed) == standing(SPEC, log)


@given(logs)
def test_the_first_stop_or_ship_after_the_last_reset_counts(log):
    """What is latched stays through every longer prefix, up to a reset that takes it back."""
    before = NOTHING_SAID
    for end in range(1, len(log) + 1):
        now = standing(SPEC, log[:end])
        if before.latched is not None and now.since == before.since:
            assert now.latched == before.latched
            assert (now.demand, now.move) == (before.demand, before.move)
            assert now.proposed is None
        if now.latched is not None and before.latched is None:
            assert now.latched.decision.action in (Action.STOP, Action.SHIP)
            assert now.latched.decision.arm in (None, "a", "b", "z")
            assert now.demand is not None
            assert now.demand.signal_id == now.latched.signal_id
        before = now


@given(logs)
def test_every_record_has_an_effect_or_is_said_to_have_none(log):
    before = NOTHING_SAID
    seen = set()
    for end, one in enumerate(log, 1):
        now = standing(SPEC, log[:end])
        news = (one.source, one.id) not in seen
        seen.add((one.source, one.id))
        changed = effect(now) != effect(before)
        reported = len(now.ignored) - len(before.ignored)
        assert reported in ((0, 1) if news else (0,))
        assert not (changed and reported)
        if news and not changed:
            assert reported == 1
        before = now


@given(logs)
def test_what_is_proposed_waits_until_it_is_answered(log):
    """A proposal latches by an approval that names it, by nothing else; a proven stop does not wait for it."""
    before = NOTHING_SAID
    for end, one in enumerate(log, 1):
        now = standing(SPEC, log[:end])
        if now.latched is not None and before.latched is None and before.proposed is not None:
            approved = one.order is not None and one.order.action is OperatorAction.APPROVE
            if now.latched == before.proposed:
                assert approved
                assert one.order.signal_id == before.proposed.signal_id
                assert now.approved is one.order
            else:
                assert not approved
        before = now


@given(logs)
def test_nothing_moves_while_paused_or_concluded(log):
    before = NOTHING_SAID
    for end, one in enumerate(log, 1):
        now = standing(SPEC, log[:end])
        if now.move is not None and now.move != before.move:
            assert before.paused is None
            assert before.latched is None
            assert one.decision.action in (Action.ADVANCE, Action.ALLOCATE)
        before = now


SHIP = decided("s0", "ship")
STOP = decided("s1", "stop")
PROPOSED = decided("s2", "ship", proposed=True)


def test_a_reset_begins_again():
    found = standing(SPEC, [STOP, ordered("r0", "reset", signal_id="s1")])
    assert (found.latched, found.since) == (None, "r0")
    assert found.demand is not None
    assert (found.demand.action, found.demand.undone) == (OperatorAction.RESET, True)
    # Whoever did not know of the reset is not heard, whoever knew of it is.
    stale, news = decided("s3", "ship"), decided("s4", "ship", since="r0")
    assert standing(SPEC, [STOP, ordered("r0", "reset"), stale]).latched is None
    assert standing(SPEC, [STOP, ordered("r0", "reset"), stale, news]).latched.signal_id == "s4"


@given(logs)
def test_a_reset_of_monitors_opens_their_latches_and_no_more(log):
    """Whatever is in force or waits stays; what was decided before it counts."""
    opening = ordered("m", "reset", monitors=True)
    assert standing(SPEC, [*log, opening]) == replace(standing(SPEC, log), opened="m")
    after, without = standing(SPEC, [opening, *log]), standing(SPEC, log)
    assert replace(after, opened=None) == replace(without, opened=None)


@given(logs)
def test_latches_are_opened_by_every_resume_and_reset_that_counts_and_by_nothing_else(log):
    before = NOTHING_SAID
    for end, one in enumerate(log, 1):
        now = standing(SPEC, log[:end])
        opens = one.order is not None and one.order.action in (OperatorAction.RESUME, OperatorAction.RESET)
        if now.opened != before.opened:
            assert opens
            assert now.opened == one.id
        elif opens and len(now.ignored) == len(before.ignored):
            assert (one.source, one.id) in {(early.source, early.id) for early in log[: end - 1]}
        before = now


@pytest.mark.parametrize(
    ("log", "rule"),
    [
        ([ordered("o", "approve", signal_id="s2")], "no proposal 's2' waits"),
        ([PROPOSED, ordered("o", "approve", signal_id="s9")], "no proposal 's9' waits"),
        ([PROPOSED, ordered("o", "approve")], "no proposal None waits"),
        ([STOP, PROPOSED], "a stop is in force; a reset must come first"),
        ([STOP, ordered("o", "ship", arm="b")], "a stop is in force; a reset must come first"),
        ([SHIP, STOP], "a ship is in force; a reset must come first"),
        ([ordered("o", "reset")], "there is no stop, ship or proposal to take back"),
        ([STOP, ordered("o", "reset", signal_id="s9")], "'s9' is not in force, 's1' is"),
        ([ordered("o", "ship", arm="z")], "'z' is no arm"),
        ([ordered("o", "ship")], "None is no arm"),
        ([ordered("o", "set_stage", stage=2)], "the ramp has the stages 0 to 1"),
        ([ordered("o", "resume")], "it is not paused"),
        ([ordered("o", "pause"), ordered("p", "pause")], "it is paused already"),
        ([ordered("o", "pause"), decided("s", "advance", stage=1)], "the experiment is paused"),
        ([PROPOSED, decided("s9", "stop", proposed=True)], "signal s2 waits already"),
        ([decided("s", "hold")], "a hold changes nothing"),
        ([decided("s", "advance", stage=2)], "the ramp has the stages 0 to 1"),
        ([decided("s", "allocate")], "weights must name every arm"),
        ([decided("s", "allocate", weights={"a": 1.0})], "weights must name every arm"),
        ([decided("s", "allocate", weights={"a": 0.7, "b": 0.7})], "weights must be shares that sum to 1"),
        ([decided("s", "allocate", weights={"a": -1.0, "b": 2.0})], "weights must be shares that sum to 1"),
    ],
)
def test_what_changes_nothing_says_why(log, rule):
    found = standing(SPEC, log)
    assert found.ignored[-1].rule == rule
    assert effect(found) == effect(standing(SPEC, log[:-1]))


def test_answers():
    approved = standing(SPEC, [PROPOSED, ordered("o", "approve", signal_id="s2")])
    assert approved.latched.decision.action is Action.SHIP
    assert approved.approved.actor == "kim"
    refused = standing(SPEC, [PROPOSED, ordered("o", "reject", signal_id="s2")])
    assert refused.latched is refused.proposed is None
    assert refused.rejected == ((Action.SHIP, "b", "kim: because"),)
    assert standing(SPEC, [PROPOSED, STOP]).latched.signal_id == "s1"


def test_an_order_to_a_stage_takes_the_place_of_a_move():
    move = decided("s", "advance", stage=1)
    found = standing(SPEC, [move, ordered("o", "set_stage", stage=0)])
    assert (found.demand.stage, found.move) == (0, None)
    assert standing(SPEC, [move]).move.stage == 1
