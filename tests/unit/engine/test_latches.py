"""What alerts hold on to, and the one word for where an experiment stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_xp.domain.decision import Action, Decision, MetricState, Result, SampleRatio
from stream_xp.domain.metric_defs import DecisionState
from stream_xp.domain.operator import OperatorAction, Order
from stream_xp.engine.latches import decision_state, latches
from stream_xp.engine.standing import NOTHING_SAID, Latch, Standing

GOLDEN = Path(__file__).parents[3] / "topics" / "golden" / "result.v1.json"
HARMED = msgspec.structs.replace(
    msgspec.json.decode(GOLDEN.read_bytes(), type=Result),
    decision=Decision(action=Action.HOLD, reason="r"),
    invalid=(),
)
HEALTHY = msgspec.structs.replace(
    HARMED, metrics=tuple(msgspec.structs.replace(one, state=MetricState.SAFE) for one in HARMED.metrics)
)
PAIR = {("errors", "canary")}
STOP = Latch(Decision(action=Action.STOP, reason="r", arm="canary", metric="errors"), "s1")
BY_HAND = Latch(Decision(action=Action.STOP, reason="kim: r"), "s2")
SHIP = Latch(Decision(action=Action.SHIP, reason="r", arm="canary"), "s3")


def standing(**changed: Any) -> Standing:
    return Standing(**changed)


def with_ratio(result: Result, *, mismatch: bool) -> Result:
    ratio = SampleRatio(log_e=9.0, p_always_valid=0.1, threshold_log_e=7.0, mismatch=mismatch)
    return msgspec.structs.replace(result, sample_ratio=ratio)


def test_harm_that_is_proven_once_stays() -> None:
    proven = latches(HARMED, NOTHING_SAID, None)
    assert proven.breached == PAIR
    assert latches(HEALTHY, NOTHING_SAID, proven).breached == PAIR
    assert latches(HEALTHY, NOTHING_SAID, None).breached == set()


def test_a_mismatch_that_is_proven_once_stays() -> None:
    proven = latches(with_ratio(HEALTHY, mismatch=True), NOTHING_SAID, None)
    assert proven.mismatch
    assert latches(with_ratio(HEALTHY, mismatch=False), NOTHING_SAID, proven).mismatch
    assert not latches(with_ratio(HEALTHY, mismatch=False), NOTHING_SAID, None).mismatch


def test_a_reset_and_a_new_version_let_go_of_what_the_evidence_says_no_more() -> None:
    proven = latches(with_ratio(HARMED, mismatch=True), NOTHING_SAID, None)
    reset = latches(with_ratio(HEALTHY, mismatch=False), standing(since="order"), proven)
    assert (reset.breached, reset.mismatch) == (set(), False)
    newer = msgspec.structs.replace(with_ratio(HEALTHY, mismatch=False), version=HEALTHY.version + 1)
    assert latches(newer, NOTHING_SAID, proven).breached == set()
    # What it still says is held again.
    assert latches(HARMED, standing(since="order"), proven).breached == PAIR


@pytest.mark.parametrize("held", ["latched", "proposed"])
def test_a_worker_that_has_just_started_knows_a_stop_in_force(held: str) -> None:
    assert latches(HEALTHY, standing(**{held: STOP}), None).breached == PAIR
    assert latches(HEALTHY, standing(**{held: BY_HAND}), None).breached == set()
    assert latches(HEALTHY, standing(**{held: SHIP}), None).breached == set()


def test_one_word_for_where_it_stands() -> None:
    paused = Order(experiment="e", version=1, action=OperatorAction.PAUSE, actor="kim", reason="r")
    invalid = msgspec.structs.replace(HEALTHY, invalid=("too old",))
    assert decision_state(HEALTHY, NOTHING_SAID) is DecisionState.RUNNING
    assert decision_state(HEALTHY, standing(paused=paused)) is DecisionState.PAUSED
    assert decision_state(invalid, standing(paused=paused)) is DecisionState.INVALID
    assert decision_state(invalid, standing(proposed=SHIP)) is DecisionState.PROPOSED
    assert decision_state(invalid, standing(proposed=SHIP, latched=STOP)) is DecisionState.STOPPED
    assert decision_state(invalid, standing(latched=SHIP)) is DecisionState.SHIPPED
