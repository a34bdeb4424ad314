from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.decision import (
    Action,
    Decision,
    Evidence,
    Method,
    MetricResult,
    MetricState,
    SampleRatio,
)
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.engine.evaluate import Evaluation
from stream_xp.engine.policy import decide

THRESHOLD = 3.0
HOUR_MS = 3_600_000
FAIR = SampleRatio(log_e=-1.0, p_always_valid=1.0, threshold_log_e=6.9, mismatch=False)
SKEWED = SampleRatio(log_e=8.0, p_always_valid=0.0003, threshold_log_e=6.9, mismatch=True)
STRAY = SampleRatio(log_e=0.0, p_always_valid=1.0, threshold_log_e=6.9, mismatch=True)


def spec(*roles, arms="abc", **fields):
    """An experiment with one metric per role, named by it and numbered."""
    metric = {"kind": "conversion", "direction": "increase", "attribution_window": "1s"}
    guard = {"margin": {"absolute": 0.01}}
    fields = {
        "experiment": "e",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [{"key": key, "weight": 1 / len(arms), "control": key == "a"} for key in arms],
        "metrics": [
            metric | {"key": f"{role}-{i}", "role": role} | (guard if role == "guardrail" else {})
            for i, role in enumerate(roles or ["primary", "guardrail"])
        ],
    } | fields
    return msgspec.convert(fields, ExperimentSpec)


def proof(log_e=4.0, threshold=THRESHOLD):
    return Evidence(
        estimate=0.1, lower=0.05, upper=0.15, log_e=log_e, p_always_valid=0.01, threshold_log_e=threshold
    )


def result(metric, arm, state, log_e=4.0, threshold=THRESHOLD):
    seen = proof(log_e, threshold)
    return MetricResult(
        method=Method.ASYMPTOTIC,
        metric=metric,
        role=metric.split("-")[0],
        arm=arm,
        state=MetricState(state),
        control_units=100,
        arm_units=100,
        effect=seen,
        harm=seen,
        safety=seen,
    )


def evaluation(*results, ratio=FAIR, invalid=()):
    if ratio is not None and ratio.mismatch:
        invalid = ("sample-ratio mismatch", *invalid)
    return Evaluation(arms=(), metrics=results, sample_ratio=ratio, invalid=tuple(invalid))


WIN = (result("primary-0", "b", "better"), result("guardrail-1", "b", "safe"))
HARM = result("guardrail-1", "c", "harmed")


def decided(*results, of=None, runtime_ms=10 * HOUR_MS, latched=None, **fields):
    return decide(of or spec(), evaluation(*results, **fields), runtime_ms=runtime_ms, latched=latched)


# ---- stop --------------------------------------------------------------------------------------------


def test_proven_harm_stops():
    decision = decided(HARM)
    assert (decision.action, decision.arm, decision.metric) == (Action.STOP, "c", "guardrail-1")
    assert decision.reason == "c harms guardrail-1: log_e 4.00 >= 3.00"


def test_a_sample_ratio_mismatch_stops():
    decision = decided(*WIN, ratio=SKEWED)
    assert decision.action is Action.STOP
    assert decision.arm is decision.metric is None
    assert decision.reason == "sample-ratio mismatch: log_e 8.00 >= 6.90"


def test_a_mismatch_without_an_e_value_says_what_it_is():
    assert decided(ratio=STRAY).reason == "sample-ratio mismatch: units in an arm of weight 0"


def test_a_harm_that_may_come_of_a_mismatch_says_so():
    reason = "c harms guardrail-1: log_e 4.00 >= 3.00; sample-ratio mismatch: log_e 8.00 >= 6.90"
    assert decided(HARM, ratio=SKEWED).reason == reason


def test_a_stop_outranks_a_winner_in_another_arm():
    assert decided(*WIN, HARM).action is Action.STOP


@pytest.mark.parametrize("runtime_ms", [0, HOUR_MS, 10**12])
@pytest.mark.parametrize("invalid", [(), ("12 units were seen in two arms, more than 1 %",)])
def test_a_stop_comes_at_any_time(runtime_ms, invalid):
    plan = spec(minimum_runtime="2h", maximum_runtime="3h")
    assert decided(HARM, of=plan, runtime_ms=runtime_ms, invalid=invalid).action is Action.STOP
    assert decided(ratio=SKEWED, of=plan, runtime_ms=runtime_ms, invalid=invalid).action is Action.STOP


def test_the_strongest_harm_is_named_whatever_the_order():
    harms = [
        result("guardrail-1", "b", "harmed", 5.0, threshold=4.5),
        result("guardrail-1", "c", "harmed", 4.9),
        result("guardrail-2", "c", "harmed", 4.9),
        result("guardrail-2", "b", "harmed", 3.1),
    ]
    for order in (harms, harms[::-1]):
        decision = decided(*order)
        assert (decision.arm, decision.metric) == ("c", "guardrail-2")


# ---- ship --------------------------------------------------------------------------------------------


def test_a_safe_winner_ships():
    decision = decided(*WIN)
    assert (decision.action, decision.arm, decision.metric) == (Action.SHIP, "b", "primary-0")
    assert decision.reason == "b is better in primary-0: log_e 4.00 >= 3.00"


def test_no_guardrail_is_none_to_wait_for():
    assert decided(WIN[0], of=spec("primary")).action is Action.SHIP


@pytest.mark.parametrize(
    "other",
    [
        result("guardrail-2", "b", "inconclusive"),
        result("guardrail-2", "b", "undetermined"),
        result("primary-2", "b", "worse"),
    ],
)
def test_what_holds_a_winner_back(other):
    assert decided(*WIN, other).action is Action.HOLD


@pytest.mark.parametrize(
    "other",
    [
        result("guardrail-1", "c", "inconclusive"),
        result("guardrail-1", "c", "undetermined"),
        result("primary-0", "c", "worse"),
        result("primary-2", "b", "inconclusive"),
        result("secondary-2", "b", "worse"),
    ],
)
def test_what_does_not_hold_a_winner_back(other):
    assert decided(*WIN, other).action is Action.SHIP


def test_a_better_secondary_ships_nothing():
    assert decided(result("secondary-0", "b", "better")).action is Action.HOLD


def test_an_invalid_experiment_ships_nothing():
    decision = decided(*WIN, invalid=("no data", "units of an unknown weight epoch: 3"))
    assert decision.action is Action.HOLD
    assert decision.reason == "invalid: no data; units of an unknown weight epoch: 3"


def test_nothing_ships_before_the_sample_ratio_is_tested():
    decision = decided(*WIN, ratio=None)
    assert decision.action is Action.HOLD
    assert decision.reason == "invalid: the sample ratio is not tested"


@pytest.mark.parametrize(
    ("runtime_ms", "action"), [(0, "hold"), (HOUR_MS - 1, "hold"), (HOUR_MS, "ship"), (10**13, "ship")]
)
def test_nothing_ships_before_the_minimum_runtime(runtime_ms, action):
    decision = decided(*WIN, of=spec(minimum_runtime="60m"), runtime_ms=runtime_ms)
    assert decision.action == action
    assert action == "ship" or decision.reason == "the minimum runtime of 60m is not over"


def test_the_strongest_of_several_winners_ships():
    safe = [result("guardrail-1", arm, "safe") for arm in "bc"]
    wins = [result("primary-0", "b", "better", 5.0), result("primary-0", "c", "better", 6.0)]
    for order in (wins, wins[::-1]):
        assert decided(*order, *safe).arm == "c"
    # The strongest of those that may ship.
    assert decided(*wins, safe[0], result("guardrail-1", "c", "inconclusive")).arm == "b"


def test_a_tie_is_decided_by_name():
    ties = [result(metric, arm, "better") for arm in "bc" for metric in ("primary-0", "primary-1")]
    for order in (ties, ties[::-1], ties[2:] + ties[:2]):
        decision = decided(*order, of=spec("primary", "primary"))
        assert (decision.arm, decision.metric) == ("c", "primary-1")


# ---- hold --------------------------------------------------------------------------------------------

OPEN = result("primary-0", "b", "inconclusive")
DOUBT = result("guardrail-1", "b", "inconclusive")
WORSE = result("primary-0", "b", "worse")


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([OPEN, DOUBT], "inconclusive"),
        (
            [WIN[0], DOUBT, result("guardrail-1", "c", "undetermined")],
            "inconclusive: b is better in primary-0, but guardrail-1 is not yet proven non-inferior in b",
        ),
        (
            [*WIN, result("primary-2", "b", "worse")],
            "inconclusive: b is better in primary-0, but b is worse in primary-2",
        ),
        ([WORSE, OPEN], "inconclusive"),
        ([WORSE, result("primary-0", "c", "worse")], "b is worse in primary-0; c is worse in primary-0"),
    ],
)
def test_a_hold_says_why(results, reason):
    decision = decided(*results)
    assert decision == Decision(action=Action.HOLD, reason=reason)
    over = decided(*results, of=spec(maximum_runtime="2h"))
    assert over == decided(*results, of=spec(maximum_runtime="2h"), runtime_ms=2 * HOUR_MS)
    assert over.reason == reason.replace("inconclusive", "inconclusive at the maximum runtime", 1)
    assert decided(*results, of=spec(maximum_runtime="2h"), runtime_ms=2 * HOUR_MS - 1).reason == reason


def test_what_is_proven_after_the_maximum_runtime_ships():
    assert decided(*WIN, of=spec(maximum_runtime="2h")).action is Action.SHIP


CANARY = spec("guardrail", "guardrail", arms="ab", maximum_runtime="2h")
PROVEN = "every guardrail is proven non-inferior; without a primary nothing ships"


@pytest.mark.parametrize(
    ("second", "runtime_ms", "reason"),
    [
        ("safe", 0, PROVEN),
        ("safe", 10 * HOUR_MS, PROVEN),
        ("inconclusive", 0, "inconclusive"),
        ("undetermined", 10 * HOUR_MS, "inconclusive at the maximum runtime"),
    ],
)
def test_a_canary_without_a_primary_never_ships(second, runtime_ms, reason):
    guards = [result("guardrail-0", "b", "safe"), result("guardrail-1", "b", second)]
    decision = decided(*guards, of=CANARY, runtime_ms=runtime_ms)
    assert decision == Decision(action=Action.HOLD, reason=reason)


def test_a_canary_without_a_primary_stops():
    assert decided(result("guardrail-0", "b", "harmed"), of=CANARY).action is Action.STOP


# ---- latching ----------------------------------------------------------------------------------------

STOPPED = Decision(action=Action.STOP, reason="then", arm="b")
SHIPPED = Decision(action=Action.SHIP, reason="then", arm="c")


@pytest.mark.parametrize("latched", [STOPPED, SHIPPED])
@pytest.mark.parametrize("results", [WIN, (HARM,), ()])
@pytest.mark.parametrize("ratio", [FAIR, SKEWED, None])
def test_stop_and_ship_latch(latched, results, ratio):
    assert decided(*results, ratio=ratio, latched=latched) is latched


def test_a_hold_does_not_latch():
    held = Decision(action=Action.HOLD, reason="then")
    assert decided(*WIN, latched=held).action is Action.SHIP
    assert decided(HARM, latched=held).action is Action.STOP
