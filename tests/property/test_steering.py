"""Laws of `steer`, of the weight epochs that follow and of the config: precedence, the ramp, orientation."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import example, given, settings

from stream_xp.domain.decision import Action, Decision, MetricState, RolloutStatus
from stream_xp.domain.experiment import WeightEpoch
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.operator import OperatorAction, Order
from stream_xp.domain.statistics_size import most_epochs
from stream_xp.engine.conclusion import harmed_arms, invalid, looked
from stream_xp.engine.evaluate import evaluate
from stream_xp.engine.policy import decide
from stream_xp.engine.ramp import epochs_of_stage, ramp_step
from stream_xp.engine.standing import NOTHING_SAID, Demand, Latch, Standing
from stream_xp.engine.steering import (
    MAX_EPOCHS,
    RESERVED_EPOCHS,
    Seen,
    Wanted,
    config_after,
    config_is_due,
    epoch_after,
    epochs_left,
    epochs_spent,
    owed_epoch,
    steer,
)
from tests.property.test_decisions import MIRROR, experiments, record, runtimes, statistics

COVERAGES = (0.1, 0.5, 1.0)
ALLOCATION = {"policy": "thompson", "metric": "m0", "interval": "10s"}
PAUSE = Order(experiment="e", version=1, action=OperatorAction.PAUSE, actor="kim", reason="lunch")

stages = st.builds(
    lambda units, time: [{"coverage": c, "minimum_units": units, "minimum_time": time} for c in COVERAGES],
    st.sampled_from([0, 1000, 10**6]),
    st.sampled_from(["0s", "1h"]),
)
rules = st.sampled_from(
    [
        {},
        {"futility": True},
        {"rule": "group_sequential", "looks": [0.25, 0.5, 1.0]},
        {"rule": "expected_loss", "maximum_loss": 0.05},
        {"mode": "approve"},
    ]
)


@st.composite
def rollouts(draw):
    """An experiment with a ramp, a policy or a rule, and statistics of it."""
    listed, epochs, units, moments, extra, fields = draw(experiments())
    fields = fields | {"conclusion": draw(st.one_of(st.none(), rules))}
    if draw(st.booleans()):
        fields["ramp"] = {"stages": draw(stages)}
    if draw(st.booleans()):
        fields["allocation"] = ALLOCATION
    coverages = draw(st.lists(st.sampled_from(COVERAGES), min_size=len(epochs), max_size=len(epochs)))
    for metric in listed:
        if metric["role"] == "primary" and draw(st.booleans()):
            metric["minimum_effect"] = draw(st.sampled_from([{"absolute": 0.5}, {"relative": 0.2}]))
    return listed, epochs, units, moments, extra, fields, coverages


def made(rollout, *, turned=False):
    """The record, its statistics, and the evidence."""
    listed, epochs, units, moments, extra, fields, coverages = rollout
    if turned:
        listed = [metric | {"direction": MIRROR[metric["direction"]]} for metric in listed]
        moments = {key: (n, -s, q) for key, (n, s, q) in moments.items()}
    plain = record(listed, epochs, **fields)
    covered = [
        msgspec.structs.replace(epoch, coverage=coverage if plain.spec.ramp else 1.0)
        for epoch, coverage in zip(plain.epochs, coverages, strict=True)
    ]
    one = msgspec.structs.replace(plain, epochs=tuple(covered))
    found = statistics(units, moments, **extra)
    return one, found, evaluate(one, found)


def even(one, found, evaluation):
    return Wanted(dict.fromkeys("abc", 1 / 3), {}, "evenly")


def all_but_harmed(one, found, evaluation):
    open_ = [arm for arm in "abc" if arm not in harmed_arms(evaluation)]
    return Wanted(
        {arm: (arm in open_) / len(open_) for arm in "abc"}, {}, "evenly, but none for arms that harm"
    )


def steered(
    rollout, runtime_ms, *, turned=False, watermark_ms=3_600_001, standing=NOTHING_SAID, allocator=even
):
    one, found, evaluation = made(rollout, turned=turned)
    looks = looked(one.spec, evaluation, ())
    seen = Seen(found, watermark_ms=watermark_ms, runtime_ms=runtime_ms, looks=looks)
    return one, found, evaluation, seen, steer(one, standing, evaluation, seen, allocator=allocator)


watermarks = st.sampled_from([None, 0, 9_000, 3_600_001])


@settings(deadline=None)
@given(rollouts(), runtimes, watermarks)
def test_orientation_is_symmetric_for_every_rule(rollout, runtime_ms, watermark_ms):
    """Turning every value round, and what is good with it, changes nothing that is done."""
    *_, here = steered(rollout, runtime_ms, watermark_ms=watermark_ms)
    *_, there = steered(rollout, runtime_ms, watermark_ms=watermark_ms, turned=True)
    assert here == there


@settings(deadline=None)
@given(rollouts(), runtimes, watermarks, st.booleans(), st.sampled_from([even, all_but_harmed]))
def test_precedence(rollout, runtime_ms, watermark_ms, paused, allocator):
    """Stop, then hold, then the rest; and each needs what it needs."""
    standing = Standing(paused=PAUSE if paused else None)
    one, _, evaluation, seen, steering = steered(
        rollout, runtime_ms, watermark_ms=watermark_ms, standing=standing, allocator=allocator
    )
    decision, spec = steering.decision, one.spec
    harmed = any(r.state is MetricState.HARMED for r in evaluation.metrics)
    mismatch = evaluation.sample_ratio is not None and evaluation.sample_ratio.mismatch
    futile = decision.reason.startswith("futility")
    if decision.action is Action.STOP and not futile:
        assert harmed or mismatch
        assert not steering.proposed
        return
    closing = decision.reason.startswith("harm is proven")
    if harmed or mismatch:
        check_closed(one, evaluation, decision)
    if paused or invalid(evaluation):
        assert decision.action is Action.HOLD
    if decision.action is Action.ADVANCE:
        check_advance(one, evaluation, seen, decision)
    if decision.action is Action.SHIP or futile:
        assert runtime_ms >= duration_ms(spec.minimum_runtime)
        assert steering.proposed == (spec.conclusion is not None and spec.conclusion.mode == "approve")
        assert steering.step.next_stage is None
    if decision.action is Action.SHIP:
        check_ship(one, evaluation, decision)
        assert steering.step.over
    if decision.action is Action.ALLOCATE and not closing:
        assert watermark_ms is not None
        assert watermark_ms - one.epochs[-1].effective_ms >= 10_000


def check_closed(one, evaluation, decision):
    """What harms and stops nothing has no weight, or gets none now; another treatment goes on."""
    harmed = harmed_arms(evaluation)
    assert one.spec.allocation is not None
    assert not evaluation.sample_ratio.mismatch
    assert {arm.key for arm in one.spec.treatments} - harmed
    weights = decision.weights or one.epochs[-1].weights
    assert {weights[arm] for arm in harmed} == {0.0}


def check_advance(one, evaluation, seen, decision):
    visit = {epoch.epoch for epoch in epochs_of_stage(one.epochs)}
    units = sum(row.units for row in seen.statistics.units if row.epoch in visit and row.segment == "")
    at = COVERAGES.index(one.epochs[-1].coverage)
    assert decision.stage == at + 1
    assert units >= one.spec.ramp.stages[at].minimum_units
    passed_ms = seen.watermark_ms - one.epochs[min(visit)].effective_ms
    assert passed_ms >= duration_ms(one.spec.ramp.stages[at].minimum_time)
    guards = [r.state for r in evaluation.metrics if r.role == "guardrail"]
    assert set(guards) <= {MetricState.SAFE}


def check_ship(one, evaluation, decision):
    assert one.spec.ramp is None or one.epochs[-1].coverage == 1.0
    mine = [r for r in evaluation.metrics if r.arm == decision.arm]
    assert mine
    assert {r.state for r in mine if r.role == "guardrail"} <= {MetricState.SAFE}
    assert MetricState.WORSE not in {r.state for r in mine if r.role == "primary"}
    if one.spec.conclusion is None or one.spec.conclusion.rule == "always_valid":
        assert MetricState.BETTER in {r.state for r in mine if r.role == "primary"}


@settings(deadline=None)
@given(experiments(), runtimes)
def test_without_ramp_policy_or_people_it_is_the_evidence_alone(experiment, runtime_ms):
    listed, epochs, units, moments, extra, fields = experiment
    one, found = record(listed, epochs, **fields), statistics(units, moments, **extra)
    seen = Seen(found, watermark_ms=None, runtime_ms=runtime_ms)
    evaluation = evaluate(one, found)
    decision = steer(one, NOTHING_SAID, evaluation, seen).decision
    assert decision == decide(one.spec, evaluation, runtime_ms=runtime_ms)


STOPPED = Decision(action=Action.STOP, reason="then")
SHIPPED = Decision(action=Action.SHIP, reason="then", arm="b")


@settings(deadline=None)
@given(rollouts(), runtimes, st.sampled_from([STOPPED, SHIPPED]))
def test_a_latched_decision_stays(rollout, runtime_ms, latched):
    *_, steering = steered(rollout, runtime_ms, standing=Standing(latched=Latch(latched, "s")))
    assert steering.decision is latched


@settings(deadline=None)
@given(rollouts(), runtimes)
def test_while_something_is_owed_or_asked_only_a_proven_stop_comes(rollout, runtime_ms):
    one, *_ = made(rollout)
    asked = Standing(proposed=Latch(SHIPPED, "s"))
    owed = Standing(move=Demand(Action.ADVANCE, "s", stage=1, epochs=len(one.epochs)))
    for standing in (asked, owed):
        *_, steering = steered(rollout, runtime_ms, standing=standing)
        if steering.decision.action is not Action.HOLD:
            assert steering.decision.action is Action.STOP
            assert not steering.decision.reason.startswith("futility")


@settings(deadline=None)
@given(rollouts())
def test_a_ramp_that_stands_says_why(rollout):
    one, found, evaluation = made(rollout)
    step = ramp_step(one, evaluation, found, watermark_ms=3_600_001, paused=False)
    if one.spec.ramp is None:
        assert (step.stage, step.next_stage, step.over, step.waits) == (None, None, True, ())
        return
    last = one.epochs[-1].coverage == 1.0
    assert (step.next_stage is None) == (last or bool(step.waits))
    assert step.over == (last and not step.waits)
    paused = ramp_step(one, evaluation, found, watermark_ms=3_600_001, paused=True)
    assert paused.waits == ("the ramp is paused", *step.waits)
    early = ramp_step(one, evaluation, found, watermark_ms=None, paused=False)
    assert any("watermark time" in why for why in early.waits)


# ---- what follows -----------------------------------------------------------------------------------------

demands = st.one_of(
    st.builds(lambda: Demand(Action.STOP, "s", STOPPED)),
    st.builds(
        lambda arm: Demand(Action.SHIP, "s", msgspec.structs.replace(SHIPPED, arm=arm)),
        st.sampled_from("abc"),
    ),
    st.builds(lambda stage: Demand(Action.ADVANCE, "s", stage=stage), st.integers(0, 2)),
    st.builds(lambda stage: Demand(OperatorAction.SET_STAGE, "s", stage=stage), st.integers(0, 2)),
    st.builds(lambda undone: Demand(OperatorAction.RESET, "s", undone=undone), st.booleans()),
    st.builds(
        lambda w: Demand(
            Action.ALLOCATE,
            "s",
            Decision(action=Action.ALLOCATE, reason="r", weights=w, contexts={"tv": w}),
        ),
        st.sampled_from([{"a": 0.2, "b": 0.3, "c": 0.5}, {"a": 1.0, "b": 0.0, "c": 0.0}]),
    ),
)
WIN = {"key": "m0", "kind": "mean", "role": "primary", "direction": "increase", "attribution_window": "1s"}


def ramped(**fields):
    ramp = {"stages": [{"coverage": c} for c in COVERAGES]}
    one = record([WIN | {"bound": 1.0}], [{"a": 0.5, "b": 0.25, "c": 0.25}], ramp=ramp, **fields)
    return msgspec.structs.replace(one, epochs=(msgspec.structs.replace(one.epochs[0], coverage=0.1),))


@given(st.lists(demands, min_size=1, max_size=6), st.integers(-5, 5))
@example([Demand(Action.STOP, "s", STOPPED), Demand(OperatorAction.RESET, "r", undone=True)], 0)
@example([Demand(Action.SHIP, "s", SHIPPED), Demand(OperatorAction.RESET, "r")], 0)
def test_weight_epochs_append_and_are_distributions(asked, effective_ms):
    one = ramped()
    for demand in asked:
        epoch = epoch_after(one, demand, effective_ms=effective_ms)
        before, one = one, msgspec.structs.replace(one, epochs=(*one.epochs, epoch))
        assert epoch.epoch == len(before.epochs)
        assert epoch.effective_ms >= before.epochs[-1].effective_ms
        assert epoch.signal_id == demand.signal_id
        for weights in (epoch.weights, *epoch.contexts.values()):
            assert set(weights) == set("abc")
            assert math.fsum(weights.values()) == pytest.approx(1.0)
        assert epoch.final == (demand.action in (Action.STOP, Action.SHIP))
        if demand.action is Action.STOP:
            assert (epoch.coverage, epoch.weights["a"], epoch.contexts) == (0.0, 1.0, {})
        elif demand.action is Action.SHIP:
            assert (epoch.coverage, epoch.weights[demand.decision.arm]) == (1.0, 1.0)
        elif demand.stage is not None:
            assert epoch.coverage == COVERAGES[demand.stage]
        else:
            base = [e for e in before.epochs if not e.final][-1]
            stopped = demand.action is OperatorAction.RESET and demand.undone
            assert epoch.coverage == (COVERAGES[0] if stopped else base.coverage)
            assert demand.action is not OperatorAction.RESET or epoch.weights == base.weights


@given(st.lists(demands, min_size=1, max_size=4), st.booleans())
def test_the_config_says_what_the_newest_epoch_says(asked, paused):
    one = ramped()
    for number, demand in enumerate(asked):
        epoch = epoch_after(one, demand, effective_ms=7)
        one = msgspec.structs.replace(one, epochs=(*one.epochs, epoch))
        latched = Latch(demand.decision, "s") if epoch.final else None
        standing = Standing(latched=latched, paused=PAUSE if paused else None)
        config = config_after(one, standing, config_version=number, lead_ms=2)
        assert (config.weights, config.coverage, config.contexts) == (
            epoch.weights,
            epoch.coverage,
            epoch.contexts,
        )
        assert (config.weight_epoch, config.signal_id, config.paused) == (epoch.epoch, "s", paused)
        assert config.effective_ms == (5 if epoch.final else 7)
        status = {Action.STOP: RolloutStatus.STOPPED, Action.SHIP: RolloutStatus.SHIPPED}
        assert config.status is status.get(demand.action, RolloutStatus.RUNNING)
        assert not config_is_due(one, standing, config)
        turned = Standing(latched=latched, paused=None if paused else PAUSE)
        assert config_is_due(one, turned, config)
        older = msgspec.structs.replace(config, weight_epoch=epoch.epoch - 1)
        assert config_is_due(one, standing, older)
        assert config_is_due(one, standing, None)
        assert config_is_due(one, standing, msgspec.structs.replace(config, signal_id="another"))
        newer = msgspec.structs.replace(config, version=2)
        assert not config_is_due(one, turned, newer)


def test_the_config_of_apply_is_left_to_apply():
    one = ramped()
    applied = msgspec.structs.replace(
        one, epochs=(*one.epochs, WeightEpoch(epoch=1, weights={}, effective_ms=1))
    )
    config = config_after(one, NOTHING_SAID, config_version=1, lead_ms=0)
    assert not config_is_due(applied, NOTHING_SAID, config)
    assert not config_is_due(one, NOTHING_SAID, None)


def test_what_is_owed():
    one = ramped()
    stop, move = Demand(Action.STOP, "s"), Demand(Action.ADVANCE, "m", stage=1, epochs=1)
    assert owed_epoch(one, NOTHING_SAID) is None
    assert owed_epoch(one, Standing(demand=stop)) is stop
    assert owed_epoch(one, Standing(move=move)) is move
    assert owed_epoch(one, Standing(demand=stop, move=move)) is stop
    answered = epoch_after(one, stop._replace(decision=STOPPED), effective_ms=0)
    more = msgspec.structs.replace(one, epochs=(*one.epochs, answered))
    assert owed_epoch(more, Standing(demand=stop)) is None
    # A move of before the newest epoch has been overtaken.
    assert owed_epoch(more, Standing(demand=stop, move=move)) is None


@pytest.mark.parametrize(
    "demand",
    [
        Demand(Action.SHIP, "s", Decision(action=Action.SHIP, reason="no arm")),
        Demand(Action.SHIP, "s", Decision(action=Action.SHIP, reason="another's", arm="z")),
        Demand(Action.ADVANCE, "s", stage=3),
        Demand(Action.ALLOCATE, "s", Decision(action=Action.ALLOCATE, reason="no weights")),
    ],
)
def test_no_weights_follow_from_nonsense(demand):
    with pytest.raises(ValueError, match=r"no weights follow|has no stage|an allocation has weights"):
        epoch_after(ramped(), demand, effective_ms=0)


@pytest.mark.parametrize(("epochs", "action"), [(5, "allocate"), (MAX_EPOCHS - RESERVED_EPOCHS, "hold")])
def test_the_last_weight_epochs_are_kept_for_the_end(epochs, action):
    plain = record(
        [WIN | {"bound": 1.0}],
        [{"a": 0.5, "b": 0.25, "c": 0.25}],
        allocation=ALLOCATION,
        minimum_runtime="9w",
    )
    many = [msgspec.structs.replace(plain.epochs[0], epoch=at) for at in range(epochs)]
    one = msgspec.structs.replace(plain, epochs=tuple(many))
    units = {("a", 0, ""): 500, ("b", 0, ""): 250, ("c", 0, ""): 250}
    found = statistics(units, {})
    seen = Seen(found, watermark_ms=10**9, runtime_ms=0)
    steering = steer(one, NOTHING_SAID, evaluate(one, found), seen, allocator=even)
    assert steering.decision.action == action
    if action == "hold":
        assert steering.waits == (f"version 1 has had all its weight epochs, {epochs}",)


def test_weight_epochs_fit_their_record():
    """With weights for many contexts there are fewer of them."""
    plain = ramped()
    contexts = {f"context {at}": {"a": 0.123456789, "b": 0.3, "c": 0.576543211} for at in range(64)}
    wide = msgspec.structs.replace(plain.epochs[0], contexts=contexts)
    many = msgspec.structs.replace(plain, epochs=(wide,))
    assert epochs_left(plain) == MAX_EPOCHS - RESERVED_EPOCHS - 1
    left = epochs_left(many)
    full = msgspec.structs.replace(many, epochs=(wide,) * (left + 1 + RESERVED_EPOCHS))
    assert 20 < left < 200
    assert len(msgspec.json.encode(full)) < 1_000_000
    assert epochs_left(full) == 0


def test_weight_epochs_have_room_in_their_statistics():
    """A version with many rows has fewer of them, and keeps some for the end."""
    values = [f"v{at}" for at in range(30)]
    wide = ramped(segments={"os": values, "country": values})
    most = most_epochs(wide.spec)
    assert 4 <= most < MAX_EPOCHS
    reserved = min(RESERVED_EPOCHS, most // 4)
    assert epochs_left(wide) == most - reserved - 1
    full = msgspec.structs.replace(wide, epochs=wide.epochs * (most - reserved))
    assert epochs_left(full) == 0
    assert not epochs_spent(full)
    assert epochs_spent(msgspec.structs.replace(wide, epochs=wide.epochs * most))
