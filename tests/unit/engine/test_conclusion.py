"""The decision table, futility, and the rules that call a primary better."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.decision import (
    Action,
    Evidence,
    LookTaken,
    Method,
    MetricResult,
    MetricState,
    QuantileResult,
    SampleRatio,
)
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Role, WeightEpoch
from stream_xp.domain.statistics import build
from stream_xp.engine.conclusion import TABLE, Says, futility, guarantee, information, looked, ship
from stream_xp.engine.evaluate import Evaluation, evaluate
from stream_xp.engine.policy import decide
from stream_xp.stats.group_sequential import group_sequential

FAIR = SampleRatio(log_e=-1.0, p_always_valid=1.0, threshold_log_e=6.9, mismatch=False)
HOUR_MS = 3_600_000


def spec(*metrics, arms="ab", **fields):
    base = {"kind": "mean", "attribution_window": "1s", "bound": 100.0, "direction": "increase"}
    listed = metrics or ({"key": "m", "role": "primary"},)
    fields = {
        "experiment": "e",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [{"key": key, "weight": 1 / len(arms), "control": key == "a"} for key in arms],
        "metrics": [base | metric for metric in listed],
    } | fields
    return msgspec.convert(fields, ExperimentSpec)


def sequence(lower, upper, estimate=0.0, log_e=0.0):
    return Evidence(estimate, lower, upper, log_e, 1.0, 3.0)


def result(metric="m", arm="b", role="primary", state="inconclusive", **fields):
    fields = {"method": Method.ASYMPTOTIC, "control_units": 100, "arm_units": 100} | fields
    return MetricResult(metric=metric, role=role, arm=arm, state=MetricState(state), **fields)


def evaluation(*results, invalid=()):
    return Evaluation(arms=(), metrics=results, sample_ratio=FAIR, invalid=tuple(invalid))


# ---- table -------------------------------------------------------------------------------------------


def test_every_role_and_state_has_its_row():
    """But those that a metric of the role never is in."""
    states = {
        Role.PRIMARY: {"undetermined", "inconclusive", "better", "worse"},
        Role.SECONDARY: {"undetermined", "inconclusive", "better", "worse"},
        Role.GUARDRAIL: {"undetermined", "inconclusive", "safe", "harmed"},
    }
    assert set(TABLE) == {(role, MetricState(state)) for role, found in states.items() for state in found}


WIN = result(state="better", effect=sequence(0.1, 0.3, 0.2, 4.0))
TWO = ({"key": "m", "role": "primary"}, {"key": "s", "role": "secondary"})


def test_a_secondary_that_is_worse_warns_and_does_not_hold():
    found = ship(spec(*TWO), evaluation(WIN, result("s", role="secondary", state="worse")), runtime_ms=0)
    assert found.action is Action.SHIP
    assert found.reason == "b is better in m: log_e 4.00 >= 3.00; warning: b is worse in s"


@pytest.mark.parametrize(("role", "state"), [(role, state) for role, state in TABLE])
def test_what_a_state_does_to_a_winner(role, state):
    found = ship(spec(*TWO), evaluation(WIN, result("o", role=role.value, state=state.value)), runtime_ms=0)
    says, _ = TABLE[role, state]
    assert (found is None) == (says is Says.NO)


def test_nothing_ships_before_the_end_of_the_ramp():
    assert ship(spec(), evaluation(WIN), runtime_ms=0, ramp_over=False) is None
    assert ship(spec(), evaluation(WIN), runtime_ms=0) is not None


GUARDED = {"key": "g", "role": "guardrail", "margin": {"absolute": 1.0}}


@pytest.mark.parametrize(
    ("arms", "state", "ramp", "ships"),
    [
        ("ab", "safe", {}, True),
        ("ab", "inconclusive", {}, False),
        ("abc", "safe", {}, False),
        ("ab", "safe", None, False),
    ],
)
def test_without_a_primary_the_one_treatment_of_a_ramp_ships_at_its_end(arms, state, ramp, ships):
    plan = spec(GUARDED, arms=arms, ramp=ramp)
    guards = [result("g", arm, role="guardrail", state=state) for arm in arms[1:]]
    found = ship(plan, evaluation(*guards), runtime_ms=0)
    assert (found is not None) is ships
    if ships:
        assert found.reason == "b is proven non-inferior in every guardrail at the end of its ramp"
        assert ship(plan, evaluation(*guards), runtime_ms=0, ramp_over=False) is None
        assert ship(plan, evaluation(*guards, invalid=("why",)), runtime_ms=0) is None


# ---- futility ----------------------------------------------------------------------------------------


def futile(*results, direction="increase", effect=None, runtime_ms=0, invalid=(), **fields):
    metric = {
        "key": "m",
        "role": "primary",
        "direction": direction,
        "minimum_effect": effect or {"absolute": 0.5},
    }
    arms = "a" + "".join(sorted({"b", *(one.arm for one in results)}))
    plan = spec(metric, arms=arms, conclusion={"futility": True}, **fields)
    return futility(plan, evaluation(*results, invalid=invalid), runtime_ms=runtime_ms)


@pytest.mark.parametrize(
    ("lower", "upper", "increase", "decrease"),
    [
        (-0.4, 0.4, True, True),
        (-0.6, 0.4, True, False),
        (-0.4, 0.6, False, True),
        (-0.4, 0.5, False, True),
        (-9.0, -8.0, True, False),
        (8.0, 9.0, False, True),
        (None, 0.4, True, False),
        (None, None, False, False),
    ],
)
def test_futile_is_what_cannot_be_as_good_as_its_minimum_effect(lower, upper, increase, decrease):
    one = result(effect=sequence(lower, upper))
    assert (futile(one) is not None) is increase
    assert (futile(one, direction="decrease") is not None) is decrease
    # Mirrored, the same.
    turned = sequence(None if upper is None else -upper, None if lower is None else -lower)
    assert (futile(result(effect=turned), direction="decrease") is not None) is increase


def test_futility_says_that_it_is_no_harm():
    found = futile(result(effect=sequence(-0.1, 0.1)))
    assert (found.action, found.arm) == (Action.STOP, None)
    assert (
        found.reason
        == "futility, no harm: every primary is proven to stay below its minimum effect in every arm"
    )


@pytest.mark.parametrize(
    ("results", "fields"),
    [
        ([result(effect=sequence(-0.1, 0.1)), result(arm="c", effect=sequence(-0.1, 0.6))], {}),
        ([result(effect=sequence(-0.1, 0.1)), result(arm="c")], {}),
        ([result(effect=sequence(-0.1, 0.1))], {"invalid": ("why",)}),
        ([result(effect=sequence(-0.1, 0.1))], {"minimum_runtime": "1h"}),
        ([result(effect=sequence(-0.1, 0.1), method=Method.RATE_RATIO)], {}),
        ([], {}),
    ],
)
def test_what_is_not_futile(results, fields):
    assert futile(*results, **fields) is None


def test_a_relative_minimum_effect_is_one_of_the_lift():
    relative = {"relative": 0.1}
    one = result(effect=sequence(-5.0, 5.0), lift=sequence(-0.05, 0.05))
    assert futile(one, effect=relative) is not None
    assert futile(result(effect=sequence(-0.01, 0.01)), effect=relative) is None


def test_every_quantile_of_a_latency_counts():
    small, large = sequence(-0.1, 0.1), sequence(-0.1, 0.9)
    found = [
        result(
            effect=small,
            quantiles=tuple(
                QuantileResult(quantile=q, control_value=1.0, arm_value=1.0, effect=one)
                for q, one in enumerate(effects)
            ),
        )
        for effects in ([small, small], [small, large])
    ]
    assert [futile(one) is not None for one in found] == [True, False]


def test_futility_is_asked_for():
    one = result(effect=sequence(-0.1, 0.1))
    metric = {"key": "m", "role": "primary", "minimum_effect": {"absolute": 0.5}}
    assert futility(spec(metric), evaluation(one), runtime_ms=0) is None
    plan = spec(metric, conclusion={"futility": True})
    assert decide(plan, evaluation(one), runtime_ms=0).action is Action.STOP
    # What is proven better ships, however small it is.
    better = result(state="better", effect=sequence(0.01, 0.1, 0.05, 4.0))
    assert decide(plan, evaluation(better), runtime_ms=0).action is Action.SHIP


# ---- group sequential --------------------------------------------------------------------------------

LOOKS = {"rule": "group_sequential", "looks": [0.25, 0.5, 1.0]}


def at(share, z, *, arm="b", metric="m", sample=1000):
    units = round(share * sample / 2)
    return result(
        metric, arm, control_units=units, arm_units=units, effect=sequence(None, None, z), standard_error=1.0
    )


def test_between_looks_nothing():
    plan = spec(conclusion=LOOKS)
    assert looked(plan, evaluation(at(0.2, 9.0)), ()) == ()
    first = looked(plan, evaluation(at(0.26, 0.0)), ())
    assert [(one.look, one.information) for one in first] == [(0.25, 0.26)]
    # However large the effect is before the next look.
    assert looked(plan, evaluation(at(0.49, 9.0)), first) == first
    second = looked(plan, evaluation(at(0.6, 9.0)), first)
    assert second[-1] == LookTaken(look=0.5, information=0.6, better=(("m", "b"),))
    assert ship(plan, evaluation(at(0.6, 9.0)), runtime_ms=0, looks=second).arm == "b"
    # It has been proven, whatever comes after; a guardrail may have to be waited for.
    assert ship(plan, evaluation(at(0.7, 0.0)), runtime_ms=0, looks=second).arm == "b"
    assert "at the look of 50%" in ship(plan, evaluation(at(0.7, 0.0)), runtime_ms=0, looks=second).reason


def test_the_always_valid_proof_does_not_ship_under_another_rule():
    assert ship(spec(conclusion=LOOKS), evaluation(WIN), runtime_ms=0) is None


@pytest.mark.parametrize("side", [1, -1])
def test_the_critical_values_are_those_of_the_test(side):
    plan = spec(conclusion=LOOKS)
    design = group_sequential([0.25, 0.5, 1.0], alpha=0.05, sides=2)
    taken: tuple[LookTaken, ...] = ()
    for share, z in zip([0.25, 0.5, 1.0], design.z, strict=True):
        below = looked(plan, evaluation(at(share, side * (z - 1e-6))), taken)
        above = looked(plan, evaluation(at(share, side * (z + 1e-6))), taken)
        assert (below[-1].better, below[-1].worse) == ((), ())
        assert (above[-1].better, above[-1].worse) == (
            ((("m", "b"),), ()) if side > 0 else ((), (("m", "b"),))
        )
        taken = below


def test_what_is_worse_at_a_look_holds_the_arm_back():
    two = ({"key": "m", "role": "primary"}, {"key": "n", "role": "primary"})
    plan = spec(*two, conclusion=LOOKS)
    seen = evaluation(at(0.5, 9.0), at(0.5, -9.0, metric="n"))
    looks = looked(plan, seen, ())
    assert (looks[-1].better, looks[-1].worse) == ((("m", "b"),), (("n", "b"),))
    assert ship(plan, seen, runtime_ms=0, looks=looks) is None


def test_a_look_is_missed_and_a_sample_is_overrun():
    plan = spec(conclusion=LOOKS)
    looks = looked(plan, evaluation(at(0.7, 0.0)), ())
    assert [one.look for one in looks] == [0.5]
    last = looked(plan, evaluation(at(1.3, 0.0)), looks)
    assert [one.look for one in last] == [0.5, 1.0]
    design = group_sequential([0.7 / 1.3, 1.0], alpha=0.05, sides=2, spending_time=[0.5, 1.0])
    assert looked(plan, evaluation(at(1.3, design.z[-1] + 1e-6)), looks)[-1].better == (("m", "b"),)
    assert looked(plan, evaluation(at(1.3, design.z[-1] - 1e-6)), looks)[-1].better == ()
    assert looked(plan, evaluation(at(2.0, 9.0)), last) == last


def test_no_look_is_taken_on_invalid_data():
    plan = spec(conclusion=LOOKS)
    assert looked(plan, evaluation(at(0.5, 9.0), invalid=("why",)), ()) == ()


def test_the_information_is_that_of_the_slowest():
    plan = spec(conclusion=LOOKS, arms="abc")
    seen = evaluation(at(0.5, 9.0, sample=600), at(0.2, 9.0, arm="c", sample=600))
    assert information(plan, seen) == pytest.approx(0.2 * 600 / (1000 * 2 / 3), rel=0.02)


# ---- expected loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["increase", "decrease"])
def test_an_arm_ships_when_its_expected_loss_is_small(direction):
    good = 1 if direction == "increase" else -1
    metric = {"key": "m", "role": "primary", "direction": direction}
    plan = spec(metric, conclusion={"rule": "expected_loss", "maximum_loss": 0.01})
    found = [
        ship(
            plan,
            evaluation(result(effect=sequence(None, None, good * estimate), standard_error=0.1)),
            runtime_ms=0,
        )
        for estimate in (-0.3, 0.0, 0.05, 0.3)
    ]
    assert [one is not None for one in found] == [False, False, False, True]
    assert found[-1].reason == "b is better in m: expected loss 3.82e-05 <= 0.01, with no error level"


def test_without_a_standard_error_there_is_no_loss():
    plan = spec(conclusion={"rule": "expected_loss", "maximum_loss": 0.01})
    assert ship(plan, evaluation(WIN), runtime_ms=0) is None


# ---- on statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "conversion"])
@pytest.mark.parametrize("direction", ["increase", "decrease"])
@pytest.mark.parametrize(
    "conclusion",
    [LOOKS, {"rule": "expected_loss", "maximum_loss": 0.001}, {}],
    ids=["group_sequential", "expected_loss", "always_valid"],
)
def test_every_rule_ships_a_clear_winner_and_says_what_it_promises(kind, conclusion, direction):
    metric = {"key": "m", "role": "primary", "direction": direction, "kind": kind}
    plan = spec(metric | ({"bound": 1.0} if kind == "conversion" else {}), conclusion=conclusion)
    rates = (0.2, 0.4) if direction == "increase" else (0.4, 0.2)
    moments = {
        ("m", arm, 0, ""): (400, round(400 * r), round(400 * r)) for arm, r in zip("ab", rates, strict=True)
    }
    units = {(arm, 0, ""): 400 for arm in "ab"}
    statistics = build(units=units, moments=moments, crossover_units=0, first_exposure_ms=0, out_of_range={})
    epoch = WeightEpoch(epoch=0, weights=plan.weights, effective_ms=0)
    record = ExperimentRecord(spec=plan, epochs=(epoch,), design_hash=plan.design_hash())
    seen = evaluate(record, statistics)
    (one,) = seen.metrics
    assert (one.standard_error is not None) == bool(conclusion)
    looks = looked(plan, seen, ())
    assert len(looks) == (conclusion is LOOKS)
    assert decide(plan, seen, runtime_ms=0, looks=looks).action is Action.SHIP
    promise = guarantee(plan)
    assert promise is not None
    assert ("no error level" in promise) == ("maximum_loss" in conclusion)


def test_a_spec_without_a_conclusion_promises_as_before():
    assert guarantee(spec()) is None
