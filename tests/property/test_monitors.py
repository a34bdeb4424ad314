"""Laws of the monitors: what they hold and what they cannot hold, latches, orders that open them, orientation."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from stream_xp.domain.decision import Action, MetricState, MonitorName, MonitorResult, MonitorState
from stream_xp.domain.rollout import Monitors
from stream_xp.domain.statistics import Outcomes, build
from stream_xp.engine.conclusion import looked
from stream_xp.engine.evaluate import Evaluation
from stream_xp.engine.monitors import Beside, with_monitors
from stream_xp.engine.stalls import DataTime
from stream_xp.engine.standing import NOTHING_SAID
from stream_xp.engine.steering import Seen, steer
from tests.property.test_decisions import record, runtimes
from tests.property.test_steering import all_but_harmed, even, made, rollouts, watermarks

WATCHED = Monitors(data_age="1m", duplicates=0.05, reward_loss=2.0)
NOTHING = Evaluation((), (), None, ())
ARMED = [MonitorName.REWARD_LOSS, MonitorName.EXPOSURE_STALL]
COUNTED = {
    "key": "click",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": "1s",
}

orders = st.sampled_from([None, "r0", "r1"])


@st.composite
def latches(draw, arms="abc"):
    """Monitors of the look before, some of them latched, under one order or another."""
    found = [
        MonitorResult(monitor=name, latched=draw(st.booleans()), since=draw(orders))
        for name in (MonitorName.CROSSOVERS, MonitorName.DUPLICATES)
    ]
    found += [
        MonitorResult(
            monitor=name, arm=arm, latched=draw(st.sampled_from([False] * 5 + [True])), since=draw(orders)
        )
        for name in ARMED
        for arm in arms
    ]
    return tuple(found)


@st.composite
def surroundings(draw):
    duplicate = draw(st.sampled_from([0, 0, 0, 400]))
    outcomes = Outcomes(read=1000, counted=1000 - duplicate, duplicate=duplicate)
    age_ms = draw(st.sampled_from([0, 0, 0, 60_000, 60_001, None]))
    before = draw(st.one_of(st.just(()), latches()))
    return Beside(outcomes, Outcomes(), age_ms, before, draw(orders), DataTime(0, 0, 0))


def held_back(decision):
    """Whether it is none that a monitor holds: nothing, or the stop that protects."""
    stops = decision.action is Action.STOP and not decision.reason.startswith("futility")
    return stops or decision.action is Action.HOLD


@settings(deadline=None, max_examples=300)
@given(rollouts(), runtimes, watermarks, surroundings(), st.sampled_from([even, all_but_harmed]))
def test_a_monitor_holds_all_but_a_proven_stop_and_a_quiet_one_nothing(
    rollout, runtime_ms, watermark_ms, around, allocator
):
    plain, found, bare = made(rollout)
    one = msgspec.structs.replace(plain, spec=msgspec.structs.replace(plain.spec, monitors=WATCHED))
    evaluation = with_monitors(one, found, bare, around)

    def steered(evaluation):
        looks = looked(one.spec, evaluation, ())
        seen = Seen(found, watermark_ms=watermark_ms, runtime_ms=runtime_ms, looks=looks)
        return steer(one, NOTHING_SAID, evaluation, seen, allocator=allocator)

    invalid = [m for m in evaluation.monitors if m.state is MonitorState.INVALID]
    steering, without = steered(evaluation), steered(bare)
    assert len(set(steering.waits)) == len(steering.waits)
    assert set(bare.invalid) <= set(evaluation.invalid)
    if invalid:
        assert held_back(steering.decision)
        assert not steering.proposed
        assert {m.reason for m in invalid} <= set(evaluation.invalid)
    else:
        # Those that only warn are of no account either.
        assert steering == without
    harmed = any(r.state is MetricState.HARMED for r in bare.metrics)
    mismatch = bare.sample_ratio is not None and bare.sample_ratio.mismatch
    if without.decision.action is Action.STOP and held_back(without.decision):
        assert harmed or mismatch
        assert steering.decision == without.decision


@st.composite
def looks(draw):
    """Units of three arms that only grow, crossovers, duplicates, and an order from time to time."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, 1, 5, 60]),
                st.sampled_from([0, 1, 5, 60]),
                st.sampled_from([0, 0, 0, 1, 20]),
                st.sampled_from([0, 0, 1, 30]),
                st.sampled_from([None, None, None, "order"]),
            ),
            min_size=2,
            max_size=8,
        )
    )
    a = b = crossed = repeated = 0
    opened, found = None, []
    for at, (more_a, more_b, more_crossed, more_repeated, order) in enumerate(steps):
        a, b = a + more_a, b + more_b
        crossed, repeated = crossed + more_crossed, repeated + more_repeated
        opened = opened if order is None else f"r{at}"
        units = {("a", 0, ""): a, ("b", 0, ""): b}
        moments = {("click", "a", 0, ""): (a, a // 2, a // 2), ("click", "b", 0, ""): (b, b // 9, b // 9)}
        statistics = build(
            units=units, moments=moments, crossover_units=crossed, first_exposure_ms=0, out_of_range={}
        )
        total = a + b + crossed + repeated
        outcomes = Outcomes(read=total, counted=total - repeated, duplicate=repeated)
        found.append((statistics, outcomes, opened))
    return found


def two_arms(*metrics, **fields):
    return record(list(metrics) or [COUNTED], [{"a": 0.5, "b": 0.5}], arms="ab", **fields)


def proven(one):
    return one.log_e is not None and one.log_e >= one.threshold_log_e


@settings(deadline=None)
@given(looks())
def test_a_latch_stays_until_an_order_opens_it_and_closes_on_proof_alone(seen):
    one = two_arms(monitors=msgspec.to_builtins(WATCHED))
    before, opened_before = {}, None
    for statistics, outcomes, opened in seen:
        around = Beside(outcomes, Outcomes(), 0, tuple(before.values()), opened, DataTime(0, 0, 0))
        evaluation = with_monitors(one, statistics, NOTHING, around)
        now = {(m.monitor, m.arm): m for m in evaluation.monitors}
        for key, monitor in now.items():
            begun = monitor.run is None or monitor.run.units > 0
            kept = key in before and before[key].latched and opened == opened_before
            assert monitor.latched == ((proven(monitor) and begun) or kept)
            assert monitor.since == opened
            loud = MonitorState.WARNING if monitor.monitor is MonitorName.DUPLICATES else MonitorState.INVALID
            if monitor.latched or proven(monitor):
                assert monitor.state is loud
                assert monitor.reason
            assert (monitor.state is MonitorState.QUIET) == (monitor.reason is None)
        before, opened_before = now, opened


@settings(deadline=None)
@given(
    st.tuples(st.integers(0, 400), st.integers(0, 400)),
    st.sampled_from(["increase", "decrease"]),
    st.sampled_from(["primary", "guardrail", "secondary"]),
)
def test_lost_rewards_are_oriented(hits, direction, role):
    """Turning the arms and what is good round is the same loss; of a guardrail, harm is none."""
    mirror = {"increase": "decrease", "decrease": "increase"}
    losses = []
    for (in_a, in_b), way in ((hits, direction), (hits[::-1], mirror[direction])):
        metric = COUNTED | {"role": role, "direction": way}
        if role == "guardrail":
            metric["margin"] = {"absolute": 0.01}
        listed = [metric] if role != "secondary" else [COUNTED | {"key": "p"}, metric]
        one = two_arms(*listed, monitors={"reward_loss": 2.0})
        statistics = build(
            units={("a", 0, ""): 1000, ("b", 0, ""): 1000},
            moments={("click", "a", 0, ""): (1000, in_a, in_a), ("click", "b", 0, ""): (1000, in_b, in_b)},
            crossover_units=0,
            first_exposure_ms=0,
            out_of_range={},
        )
        around = Beside(Outcomes(), Outcomes(), 0, time=DataTime(0, 0, 0))
        found = with_monitors(one, statistics, NOTHING, around).monitors
        (loss,) = [m for m in found if m.monitor is MonitorName.REWARD_LOSS]
        losses.append(loss)
        if role == "guardrail" and loss.state is MonitorState.INVALID:
            # What is lost makes the arm look good: fewer of what is bad, or more of what is good.
            assert (in_b < in_a) == (way == "decrease")
    assert losses[0].log_e == pytest.approx(losses[1].log_e, rel=1e-9, abs=1e-9)
    assert losses[0].state is losses[1].state
