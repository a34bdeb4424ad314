"""Which experiment records are taken at all, whoever wrote them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.experiment_rules import record_rules
from stream_xp.domain.rollout import Allocation, Policy

SPEC = msgspec.convert(
    {
        "experiment": "bandit",
        "owner": "a",
        "hypothesis": "b",
        "unit": "member",
        "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
        "metrics": [
            {
                "key": "order",
                "kind": "conversion",
                "role": "primary",
                "direction": "increase",
                "attribution_window": "10m",
            }
        ],
        "planned_sample": 1000,
        "segments": {"device": ["tv", "web"]},
        "allocation": {"policy": "contextual", "metric": "order", "context": "device"},
    },
    ExperimentSpec,
)
HALVES = {"old": 0.5, "new": 0.5}


def faults(*epochs: dict[str, Any], spec: ExperimentSpec = SPEC) -> list[str]:
    made = tuple(
        WeightEpoch(**{"epoch": at, "weights": HALVES, "effective_ms": at, **fields})
        for at, fields in enumerate(epochs)
    )
    return record_rules(
        ExperimentRecord(spec=spec, epochs=made, design_hash=spec.design_hash()), spec.experiment
    )


def test_epochs_that_a_worker_writes_are_taken() -> None:
    contexts = {"tv": {"old": 0.2, "new": 0.8}, "other": {"old": 0.9, "new": 0.1}}
    final = {"weights": {"old": 0.0, "new": 1.0}, "final": True, "coverage": 0.0}
    assert faults({}, {"contexts": contexts}, {"coverage": 0.5, "signal_id": "s"}, final, {}) == []


BROKEN = {
    "none at all": ((), "epochs must be numbered 0, 1, 2"),
    "a hole": (({}, {"epoch": 2}), "epochs must be numbered 0, 1, 2"),
    "an arm too few": (({"weights": {"old": 1.0}},), "the weights of epoch 0 must name every arm"),
    "a sum over 1": (({"weights": {"old": 0.9, "new": 0.9}},), "the weights of epoch 0 must name every arm"),
    "a sum over 1 in a context": (
        ({"contexts": {"tv": {"old": 0.9, "new": 0.9}}},),
        "the weights of epoch 0 in 'tv' must name every arm and sum to 1",
    ),
    "a value nobody registered": (
        ({"contexts": {"radio": HALVES}},),
        "epoch 0 has weights of 'radio', which is no value of the context",
    ),
    "final and split": (({}, {"final": True}), "epoch 1 is final, so one arm must have weight 1"),
    "final with contexts": (
        ({"final": True, "weights": {"old": 1.0, "new": 0.0}, "contexts": {"tv": HALVES}},),
        "epoch 0 is final, so one arm must have weight 1, and no context others",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_epochs_that_break_a_rule_are_named(case: str) -> None:
    epochs, message = BROKEN[case]
    (found,) = faults(*epochs)
    assert message in found


def test_contexts_need_a_policy_that_has_one() -> None:
    spec = msgspec.structs.replace(SPEC, allocation=Allocation(policy=Policy.THOMPSON, metric="order"))
    assert faults({"contexts": {"tv": HALVES}}, spec=spec) == [
        "epoch 0 has weights of 'tv', which is no value of the context"
    ]


def test_the_rules_of_the_file_hold_for_the_record() -> None:
    spec = msgspec.structs.replace(SPEC, allocation=Allocation(policy=Policy.THOMPSON, metric="x"))
    assert faults({}, spec=spec) == ["is not the key of a metric"]
