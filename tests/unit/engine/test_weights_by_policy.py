"""The policies of a spec, from statistics to the decision that moves weights."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.domain.decision import Action
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.operator import OperatorAction, Order
from stream_xp.domain.statistics import build
from stream_xp.engine.conclusion import harmed_arms
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


@pytest.mark.parametrize("limits", [{"units": 10**6}, {"conversions": 10**6}])
def test_the_weights_of_the_file_hold_until_the_burn_in_is_over(limits):
    one, found = record(burn_in=limits, maximum_change=1.0), statistics((0.2, 0.3, 0.1))
    wanted = weights_by_policy(one, found, evaluate(one, found))
    assert wanted.weights == one.epochs[0].weights
    assert wanted.reason.startswith("burn-in: a has ")
    assert steered(one, found).action is Action.HOLD
    # An arm that harms is not waited for.
    assert steered(one, HARM).weights == pytest.approx({"a": 4 / 7, "b": 3 / 7, "c": 0.0}, abs=1e-4)


def test_in_a_burn_in_contexts_begin_no_weight_epoch():
    one = record(policy="contextual", context="os", segments={"os": ["tv", "web"]}, burn_in={"units": 10**6})
    cells = {"tv": (0.2, 0.4, 0.1), "web": (0.2, 0.1, 0.4)}
    assert steered(one, statistics((0.2, 0.25, 0.25), cells=cells)).action is Action.HOLD


def test_a_contextual_reason_says_where_weights_move():
    fields = {"policy": "contextual", "context": "os", "segments": {"os": ["tv", "web"]}}
    cells = {"tv": (0.2, 0.4, 0.1), "web": (0.2, 0.2, 0.2)}
    decision = steered(record(**fields, minimum_change=0.09), statistics((0.2, 0.3, 0.15), cells=cells))
    assert decision.reason.startswith("contextual; weights move in tv")
    least = record(**fields, minimum_change=0.6, maximum_change=0.7)
    found = statistics((0.2, 0.2, 0.2), cells={"tv": (0.2, 0.21, 0.2), "web": (0.2, 0.2, 0.2)})
    wanted = weights_by_policy(least, found, evaluate(least, found))
    assert wanted.reason == "contextual; the change is too small to publish in every context"


NOBODY = build(units={}, moments={}, crossover_units=0, first_exposure_ms=0, out_of_range={})


@pytest.mark.parametrize("policy", ["thompson", "top_two"])
def test_scores_move_weights_before_the_first_unit(policy):
    """A cold start: the burn-in would wait for units."""
    prior = {"worth": 500.0, "scores": {"a": 0.1, "b": 0.15, "c": 0.3}}
    one = record(policy=policy, prior=prior, burn_in={"units": 0, "conversions": 0}, maximum_change=1.0)
    weights = weights_by_policy(one, NOBODY, evaluate(one, NOBODY)).weights
    assert max(weights, key=weights.get) == "c"
    waiting = record(policy=policy, prior=prior)
    assert weights_by_policy(waiting, NOBODY, evaluate(waiting, NOBODY)).weights == waiting.epochs[0].weights


def with_epoch(one, weights, contexts=None):
    newest = WeightEpoch(epoch=1, weights=weights, effective_ms=0, contexts=contexts or {})
    return msgspec.structs.replace(one, epochs=(*one.epochs, newest))


WITHOUT_C = {"a": 0.6, "b": 0.4, "c": 0.0}


@pytest.mark.parametrize("policy", ["thompson", "top_two", "contextual"])
def test_an_arm_that_was_closed_stays_closed_when_its_harm_is_proven_no_more(policy):
    fields = {"context": "os", "segments": {"os": ["tv"]}} if policy == "contextual" else {}
    contexts = {"tv": WITHOUT_C, "other": WITHOUT_C} if policy == "contextual" else {}
    one = with_epoch(record(policy=policy, **fields), WITHOUT_C, contexts)
    cells = {"tv": (0.1, 0.1, 0.9), "other": (0.1, 0.1, 0.9)} if policy == "contextual" else None
    found = statistics((0.1, 0.1, 0.9), cells=cells)
    wanted = weights_by_policy(one, found, evaluate(one, found))
    assert [weights["c"] for weights in (wanted.weights, *wanted.contexts.values())] == [0.0] * (
        1 + len(contexts)
    )
    # Only in one context without units is not closed: it has its floor again.
    if contexts:
        open_in_tv = with_epoch(one, WITHOUT_C, {"tv": {"a": 0.4, "b": 0.3, "c": 0.3}, "other": WITHOUT_C})
        again = weights_by_policy(open_in_tv, found, evaluate(open_in_tv, found))
        assert again.contexts["other"]["c"] >= 0.05


def test_where_the_only_other_treatment_was_closed_before_all_stops():
    one = with_epoch(record(), WITHOUT_C)
    harm_of_b = statistics((0.2, 0.3, 0.1), (0.1, 0.5, 0.1))
    assert steered(one, harm_of_b).action is Action.STOP
    # The one that is closed already stops nobody.
    assert steered(one, HARM).action is not Action.STOP


RATES = st.tuples(*[st.floats(0.0, 1.0)] * 3)


@settings(deadline=None, max_examples=60)
@given(
    RATES,
    RATES,
    st.sampled_from(["thompson", "top_two"]),
    st.sampled_from([0.01, 0.05, 0.2]),
    st.sampled_from([0.05, 0.1, 1.0]),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from([40, 1_000, 10_000]),
    st.booleans(),
)
def test_what_a_spec_promises_of_its_weights_holds(
    clicks, errors, policy, floor, cap, uniform_slice, units, closed
):
    """Floor, slice, cap, burn-in and closed arms, from the spec to the weights."""
    one = record(
        policy=policy, floor=floor, maximum_change=cap, minimum_change=0.0, uniform_slice=uniform_slice
    )
    current = WITHOUT_C if closed else one.epochs[0].weights
    one = with_epoch(one, current)
    found = statistics(clicks, errors, n=units)
    evaluation = evaluate(one, found)
    wanted = weights_by_policy(one, found, evaluation)
    assert sum(wanted.weights.values()) == pytest.approx(1.0, abs=1e-9)
    shut = harmed_arms(evaluation) | ({"c"} if closed else set())
    opened = set(wanted.weights) - shut
    assert {wanted.weights[arm] for arm in shut} <= {0.0}
    least = max(floor, uniform_slice / len(opened))
    assert min(wanted.weights[arm] for arm in opened) >= least - 1e-9
    if (
        shut <= {arm for arm, weight in current.items() if weight == 0}
        and min(current[a] for a in opened) >= least
    ):
        moved = max(abs(wanted.weights[arm] - current[arm]) for arm in current)
        assert moved <= cap + 2e-4
        if units == 40:
            assert (wanted.weights, wanted.reason.split(":")[0]) == (current, "burn-in")
