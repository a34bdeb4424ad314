"""Signals of ramps and policies, with the weights that follow: derived again."""

from __future__ import annotations

import json

import msgspec
import pytest

from stream_xp.domain.decision import Action
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.services.verify.service import Verdict, verify
from tests.unit.services.verify_world import (
    CONTEXTS,
    RECORD,
    SETTINGS,
    SPEC,
    Broker,
    T,
    adaptive,
    decided,
    fill,
    fill_epochs,
    forged,
    only,
    parts,
    rewrite,
    with_result,
)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()
    broker.serve(monkeypatch)
    return broker


def test_weight_epochs_that_came_after_the_signal_change_nothing(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    after = WeightEpoch(epoch=1, weights={"a": 0.9, "b": 0.1}, effective_ms=T + 10**6)
    later = msgspec.structs.replace(RECORD, epochs=(*RECORD.epochs, after))
    broker.add("xp.experiments", b"exp", msgspec.json.encode(later), at_ms=T + 10**6)
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL


def test_the_weight_epochs_of_the_look_count_where_the_statistics_were_ahead(broker: Broker) -> None:
    after = WeightEpoch(epoch=1, weights={"a": 0.1, "b": 0.9}, effective_ms=T)
    ahead = msgspec.structs.replace(RECORD, epochs=(*RECORD.epochs, after))
    broker.add("xp.experiments", b"exp", msgspec.json.encode(ahead), at_ms=T - 1_000)
    for n in range(500):
        unit, epoch = f"u{n}", int(n >= 400)
        event = {"id": unit, "time": T, "unit": unit, "experiment": "exp", "arm": "a", "weight_epoch": epoch}
        broker.add("xp.exposures", unit.encode(), json.dumps(event).encode())
    published = [part for part in parts(broker) if part.partition == 0]
    signal = decided(broker, published, record=RECORD)
    assert signal.data.decision.action is Action.STOP
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    # A signal that does not say how many is tried with each number.
    rewrite(broker, with_result(signal, weight_epochs=None))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    rewrite(broker, with_result(signal, weight_epochs=2))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.DIFFERENT


def test_an_advance_is_derived_again(broker: Broker) -> None:
    stages = [{"coverage": 0.25, "minimum_units": 400}, {"coverage": 1.0}]
    guardrail = {
        "key": "errors",
        "kind": "conversion",
        "role": "guardrail",
        "direction": "decrease",
        "attribution_window": "1s",
        "margin": {"absolute": 0.3},
    }
    given = msgspec.to_builtins(SPEC)
    given |= {"ramp": {"stages": stages}, "metrics": [*given["metrics"], guardrail]}
    spec = msgspec.convert(given, ExperimentSpec)
    first = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0, coverage=0.25)
    record = ExperimentRecord(spec=spec, epochs=(first,), design_hash=spec.design_hash())
    fill(broker, record=record)
    signal = decided(broker, parts(broker), record=record)
    assert (signal.data.decision.action, signal.data.decision.stage) == (Action.ADVANCE, 1)
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    forged = msgspec.structs.replace(signal.data.decision, stage=0)
    data = msgspec.structs.replace(with_result(signal, decision=forged).data, decision=forged)
    rewrite(broker, msgspec.structs.replace(signal, data=data))
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.DIFFERENT
    assert found.first_difference is not None
    assert found.first_difference.what == "signal stage"


@pytest.mark.parametrize("policy", ["thompson", "top_two", "contextual"])
def test_an_allocation_is_derived_again_with_its_weights(broker: Broker, policy: str) -> None:
    record = adaptive(policy, prior={"worth": 5, "scores": {"a": 0.2, "b": 0.3, "c": 0.3}})
    fill_epochs(broker, record)
    signal = decided(broker, parts(broker), record=record)
    decision = signal.data.decision
    assert decision.action is Action.ALLOCATE
    assert decision.weights not in (None, record.epochs[-1].weights)
    assert set(decision.contexts) == (set(CONTEXTS) if policy == "contextual" else set())
    found = only(verify(SETTINGS, signal.id))
    assert (found.verdict, found.reason) == (Verdict.EQUAL, None)
    by_name = {one.what: one for one in found.lines}
    assert by_name["statistics_hash"].derived == signal.data.result.statistics_hash
    assert by_name["signal weights"].derived == str(decision.weights)
    assert by_name["signal contexts"].derived == str(decision.contexts)
    assert decision.weights is not None
    other = decision.weights | {"b": decision.weights["b"] - 0.001, "c": decision.weights["c"] + 0.001}
    for name, value in (("weights", other), ("contexts", {"ios": other})):
        rewrite(broker, forged(signal, **{name: value}))
        found = only(verify(SETTINGS, signal.id))
        assert found.verdict is Verdict.DIFFERENT
        assert found.first_difference is not None
        assert found.first_difference.what == f"signal {name}"


def test_the_closing_of_an_arm_that_harms_is_derived_again(broker: Broker) -> None:
    record = adaptive("thompson")
    fill_epochs(broker, record, harmful="b")
    signal = decided(broker, parts(broker), record=record)
    decision = signal.data.decision
    assert decision.action is Action.ALLOCATE
    assert decision.weights is not None
    assert decision.weights["b"] == 0.0
    assert decision.reason.startswith("harm is proven, no more units for b; ")
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    # On the weight epochs of before another one follows: what a signal says of them is part of what is derived.
    rewrite(broker, with_result(signal, weight_epochs=1))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.DIFFERENT
