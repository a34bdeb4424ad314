"""The policies of a spec, from statistics to the decision that moves weights."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.decision import Action
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.operator import OperatorAction, Order
from stream_xp.domain.statistics import build
from stream_xp.engine.evaluate import evaluate
from stream_xp.engine.standing import NOTHING_SAID, Demand, Standing
from stream_xp.engine.steering import Seen, epoch_after, steer
from stream_xp.engine.weights_by_policy import weights_by_policy

PAUSE = Order(experiment="e", version=1, action=OperatorAction.PAUSE, actor="kim", reason="lunch")


def record(*, direction="increase", segments=None, **allocation):
    metric = {"kind": "conversion", "attribution_window": "1s", "role": "secondary", "direction": direction}
    guard = {
        "key": "errors",
        "kind": "conversion",
        "attribution_window": "1s",
        "role": "guardrail",
        "direction": "decrease",
        "margin": {"absolute": 0.1},
    }
    spec = msgspec.convert(
        {
            "experiment": "e",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 10_000,
            "arms": [
                {"key": key, "weight": w, "control": key == "a"}
                for key, w in zip("abc", (0.4, 0.3, 0.3), strict=True)
            ],
            "metrics": [metric | {"key": "click"}, guard],
            "segments": segments or {},
            "allocation": {"policy": "thompson", "metric": "click", "interval": "10s"} | allocation,
        },
        ExperimentSpec,
    )
    epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
    return ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())


def statistics(clicks, errors=(0.1, 0.1, 0.1), *, n=10_000, cells=None):
    """So many units by the weights, with rates of the three arms; of cells, per segment value its rates."""
    units, moments = {}, {}
    listed = {"": clicks} | {f"os={value}": rates for value, rates in (cells or {}).items()}
    for segment, rates in listed.items():
        for arm, share, click, error in zip("abc", (0.4, 0.3, 0.3), rates, errors, strict=True):
            size = round(n * share / (len(cells) if cells and segment else 1))
            units[arm, 0, segment] = size
            for metric, rate in (("click", click), ("errors", error)):
                hits = round(size * rate)
                moments[metric, arm, 0, segment] = (size, hits, hits)
    return build(units=units, moments=moments, crossover_units=0, first_exposure_ms=0, out_of_range={})


def steered(one, found, *, standing=NOTHING_SAID, watermark_ms=10_000):
    seen = Seen(found, watermark_ms=watermark_ms, runtime_ms=watermark_ms)
    return steer(one, standing, evaluate(one, found), seen, allocator=weights_by_policy).decision


@pytest.mark.parametrize(("direction", "best"), [("increase", "b"), ("decrease", "c")])
def test_weights_go_to_the_better_arm(direction, best):
    decision = steered(record(direction=direction), statistics((0.2, 0.3, 0.1)))
    assert decision.action is Action.ALLOCATE
    assert max(decision.weights, key=decision.weights.get) == best
    assert decision.weights[best] == pytest.approx(0.4)  # at most `maximum_change` more
    assert min(decision.weights.values()) >= 0.05
    assert (
        steered(record(direction=direction), statistics((0.2, 0.3, 0.1)), watermark_ms=9_999).action
        is Action.HOLD
    )


def test_contexts_have_weights_of_their_own():
    one = record(policy="contextual", context="os", segments={"os": ["tv", "web"]}, maximum_change=1.0)
    cells = {"tv": (0.2, 0.4, 0.1), "web": (0.2, 0.1, 0.4)}
    decision = steered(one, statistics((0.2, 0.25, 0.25), cells=cells))
    assert decision.action is Action.ALLOCATE
    best = {
        value: max(weights, key=weights.get)
        for value, weights in decision.contexts.items()
        if value != "other"
    }
    assert best == {"tv": "b", "web": "c"}


@pytest.mark.parametrize(
    "prior",
    [
        {"worth": 5000.0, "scores": {"a": 0.1, "b": 0.1, "c": 0.9}},
        {"worth": 5.0, "mean": 0.2},
        {"worth": 5.0, "past": [0.1, 0.3]},
    ],
    ids=["scores", "mean", "past"],
)
def test_priors_count(prior):
    decision = steered(record(prior=prior), statistics((0.2, 0.21, 0.2)))
    assert decision.action is Action.ALLOCATE
    assert (max(decision.weights, key=decision.weights.get) == "c") == ("scores" in prior)


def test_what_the_policy_cannot_answer_moves_nothing():
    one = record(floor=0.5)
    found = statistics((0.2, 0.3, 0.1))
    wanted = weights_by_policy(one, found, evaluate(one, found))
    assert wanted.weights is None
    assert wanted.reason.startswith("weights stay: floor 0.5 of 3 arms")
    assert steered(one, found).action is Action.HOLD


HARM = statistics((0.2, 0.3, 0.1), (0.1, 0.1, 0.5))


def test_an_arm_that_harms_is_closed_and_the_others_go_on():
    one = record()
    decision = steered(one, HARM, watermark_ms=1)  # at once, whatever the interval
    assert decision.action is Action.ALLOCATE
    assert decision.weights["c"] == 0.0
    assert decision.reason.startswith("harm is proven, no more units for c; ")
    # While that is on its way nothing else comes, and afterwards the evidence of then is no stop.
    asked = Demand(Action.ALLOCATE, "s", decision, epochs=1)
    assert steered(one, HARM, standing=Standing(move=asked)).action is Action.HOLD
    closed = msgspec.structs.replace(one, epochs=(*one.epochs, epoch_after(one, asked, effective_ms=0)))
    after = steered(closed, HARM)
    assert after.action in (Action.HOLD, Action.ALLOCATE)
    assert after.weights is None or after.weights["c"] == 0.0


@pytest.mark.parametrize(
    ("one", "found", "standing"),
    [
        (record(policy="fixed"), HARM, NOTHING_SAID),
        (record(floor=0.5), HARM, NOTHING_SAID),
        (record(), HARM, Standing(paused=PAUSE)),
        (record(), statistics((0.2, 0.3, 0.1), (0.1, 0.5, 0.5)), NOTHING_SAID),
    ],
    ids=["fixed", "no answer", "paused", "all treatments"],
)
def test_where_no_arm_can_be_closed_all_stops(one, found, standing):
    assert steered(one, found, standing=standing).action is Action.STOP
