"""The door: reasons, closed arms, cold starts, and that what leaves is always a distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stream_xp.domain.experiment import Direction
from stream_xp.engine.allocation import (
    BurnIn,
    Constraints,
    Conversions,
    Evidence,
    Policy,
    Prior,
    Values,
    allocate,
)
from stream_xp.engine.allocation.constraints import projected

EVEN = {"a": 0.5, "b": 0.5}
FREE = Constraints(floor=0.05, maximum_change=1.0, burn_in=BurnIn(units=0, conversions=0))
ADAPTIVE = [Policy.THOMPSON, Policy.TOP_TWO, Policy.CONTEXTUAL]


def rates(*cells):
    """(arm, units, conversions[, epoch[, context]])."""
    return [Evidence(arm, Conversions(n, c), *rest) for arm, n, c, *rest in cells]


def run(policy, evidence, current=EVEN, constraints=FREE, **options):
    return allocate(policy, evidence, current, control="a", constraints=constraints, **options)


BETTER_B = rates(("a", 1000, 50), ("b", 1000, 70))
THREE = {"a": 0.4, "b": 0.3, "c": 0.3}
BETTER_C = rates(("a", 1000, 50), ("b", 1000, 60), ("c", 1000, 75))


def test_thompson_is_the_probability_to_be_best():
    got = run(Policy.THOMPSON, BETTER_C, THREE)
    free = {arm: p for arm, p in got.probability_best.items() if p > 0.05}
    assert set(free) == {"b", "c"} or set(free) == {"c"}
    assert got.weights["a"] == 0.05
    assert got.weights["c"] / got.weights["b"] == pytest.approx(
        got.probability_best["c"] / max(got.probability_best["b"], 0.05), rel=0.15
    )
    assert got.reason == "thompson"
    assert got.moved == pytest.approx(0.5 * sum(abs(got.weights[arm] - THREE[arm]) for arm in THREE))


def test_top_two_never_starves_the_best_arm():
    sure = rates(("a", 10**6, 50_000), ("b", 10**6, 60_000), ("c", 10**6, 70_000))
    got = run(Policy.TOP_TWO, sure, THREE)
    assert got.probability_best["c"] == pytest.approx(1.0)
    # Half to the best, half to the second, less what the floor of the third takes from both.
    assert got.weights == {"a": 0.05, "b": 0.475, "c": 0.475}
    assert run(Policy.TOP_TWO, BETTER_B).weights == EVEN


def test_fixed_keeps_what_is_in_force_and_still_says_who_leads():
    current = {"a": 0.99, "b": 0.01}
    got = run(Policy.FIXED, BETTER_B, current, Constraints(floor=0.05))
    assert got.weights == current
    assert got.moved == 0.0
    assert got.probability_best["b"] == pytest.approx(0.97, abs=0.01)


@pytest.mark.parametrize("policy", list(Policy))
def test_a_closed_arm_gets_nothing(policy):
    got = run(policy, BETTER_C, THREE, closed={"c"})
    assert got.weights["c"] == 0.0
    assert got.probability_best["c"] == 0.0
    assert math.fsum(got.weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert run(policy, BETTER_C, THREE, closed={"b", "c"}).weights == {"a": 1.0, "b": 0.0, "c": 0.0}
    for inside in got.by_context.values():
        assert inside.weights["c"] == 0.0


def test_a_reopened_arm_has_its_floor_at_once():
    current = {"a": 0.6, "b": 0.4, "c": 0.0}
    got = run(Policy.THOMPSON, BETTER_C, current, Constraints(floor=0.05, maximum_change=0.01))
    assert got.weights["c"] >= 0.05


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_burn_in_is_equal_weights(policy):
    early = rates(("a", 1000, 50), ("b", 99, 50), ("c", 1000, 75))
    got = run(policy, early, THREE, Constraints(maximum_change=1.0))
    assert got.weights == {"a": 0.3334, "b": 0.3333, "c": 0.3333}
    assert got.reason.startswith("burn-in: b has 99 of 100 units")
    fewer = rates(("a", 1000, 50), ("b", 1000, 39), ("c", 1000, 75))
    assert "b has 39 of 40 conversions" in run(policy, fewer, THREE, Constraints(maximum_change=1.0)).reason
    # A closed arm is waited for by nobody.
    late = run(policy, early, THREE, Constraints(maximum_change=1.0), closed={"b"})
    assert late.reason.startswith(policy.value)


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_no_evidence_is_burn_in_or_no_change(policy):
    assert run(policy, [], constraints=Constraints()).reason == "burn-in: a has 0 of 100 units"
    got = run(policy, [])
    assert got.weights == EVEN
    assert got.probability_best == {}
    assert got.reason == "weights stay: no evidence"


def test_undetermined_keeps_weights_that_hold_the_floors():
    got = run(Policy.THOMPSON, [Evidence("a", Values(9, 9, 9)), Evidence("b", Values(9, 9, 9))])
    assert got.weights == EVEN
    assert got.reason.startswith("weights stay: no two values")


@pytest.mark.parametrize("policy", [Policy.THOMPSON, Policy.CONTEXTUAL])
def test_informed_priors_start_before_the_first_unit(policy):
    cold = rates(("a", 0, 0), ("b", 0, 0))
    priors = {"a": Prior(0.05, 400.0), "b": Prior(0.09, 400.0)}
    if policy is Policy.CONTEXTUAL:
        cold = rates(("a", 10, 1), ("b", 10, 1))
    got = run(policy, cold, priors=priors)
    assert got.weights["b"] > 0.8
    assert run(Policy.THOMPSON, rates(("a", 0, 0), ("b", 0, 0))).weights == EVEN
    values = [Evidence("a", Values(0, 0, 0)), Evidence("b", Values(0, 0, 0))]
    means = run(
        Policy.THOMPSON, values, priors={arm: Prior(m, 50.0, sd=2.0) for arm, m in (("a", 3), ("b", 4))}
    )
    assert means.weights["b"] == 0.95


def test_the_direction_is_the_metric_s():
    up = run(Policy.THOMPSON, BETTER_B)
    down = run(Policy.THOMPSON, BETTER_B, direction=Direction.DECREASE)
    assert up.probability_best["b"] > 0.95
    assert down.probability_best["a"] == pytest.approx(up.probability_best["b"], abs=1e-7)


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_drift_under_moving_weights_moves_nothing(policy):
    """Inside both epochs b is worse; pooled it looks better, because it had the good days."""
    cells = rates(("a", 9000, 450, 0), ("b", 1000, 40, 0), ("a", 1000, 200, 1), ("b", 9000, 1700, 1))
    got = run(policy, cells)
    assert got.probability_best["a"] > 0.9
    pooled = [Evidence(row.arm, row.sums) for row in cells]
    assert run(policy, pooled).probability_best["b"] > 0.99


def test_contexts_have_their_own_best_arm():
    cells = rates(
        ("a", 5000, 250, 0, "x"), ("b", 5000, 400, 0, "x"), ("a", 5000, 400, 0, "y"), ("b", 5000, 250, 0, "y")
    )
    got = run(Policy.CONTEXTUAL, cells, current_by_context={"x": {"a": 0.2, "b": 0.8}, "z": EVEN})
    assert got.by_context["x"].weights == {"a": 0.05, "b": 0.95}
    assert got.by_context["y"].weights == {"a": 0.95, "b": 0.05}
    assert got.by_context["x"].moved == pytest.approx(0.15)
    # A context that nobody was seen in knows only that arms differ in some contexts.
    assert got.by_context["z"].weights == {"a": 0.5, "b": 0.5}
    assert got.weights == {"a": 0.5, "b": 0.5}
    assert got.moved == pytest.approx(0.5 * 0.15 + 0.5 * 0.45)


def test_the_cap_holds_in_each_context():
    cells = rates(
        ("a", 5000, 250, 0, "x"), ("b", 5000, 400, 0, "x"), ("a", 5000, 400, 0, "y"), ("b", 5000, 250, 0, "y")
    )
    got = run(Policy.CONTEXTUAL, cells, constraints=Constraints(maximum_change=0.1))
    assert got.by_context["x"].weights == {"a": 0.4, "b": 0.6}
    assert got.by_context["y"].weights == {"a": 0.6, "b": 0.4}


def random_case(rng):
    """Arms, epochs, contexts and counts over all magnitudes; some closed, some without rows."""
    k = int(rng.choice([2, 3, 5, 64], p=[0.4, 0.3, 0.28, 0.02]))
    names = [f"arm{i:02d}" for i in range(k)]
    values = rng.random() < 0.4
    rows = []
    for name in names:
        for _ in range(int(rng.integers(0, 4))):
            n = int(10 ** rng.uniform(0, rng.choice([2, 6, 12])))
            share = rng.choice([0.0, 1.0, rng.random(), 10.0 ** rng.uniform(-9, 0)])
            c = min(n, int(n * share))
            sums = (
                Values(n, c * 10**9, c * 10**18 + int(rng.integers(0, 5)), 1e-6)
                if values
                else Conversions(n, c)
            )
            rows.append(Evidence(name, sums, int(rng.integers(0, 3)), str(rng.choice(["", "x", "y"]))))
    parts = rng.integers(0, 1000, k) + (np.arange(k) == 0)
    current = dict(zip(names, (parts / parts.sum()).tolist(), strict=True))
    burn_in = BurnIn(units=0, conversions=0) if rng.random() < 0.7 else BurnIn()
    constraints = Constraints(
        floor=float(rng.choice([0.0, 0.1, 0.9])) / k,
        maximum_change=float(rng.choice([0.1, 1.0])),
        uniform_slice=float(rng.choice([0.0, 0.1])),
        burn_in=burn_in,
    )
    closed = {name for name in names[1:] if rng.random() < 0.2}
    return rows, current, constraints, closed


def test_every_allocation_is_a_distribution_at_or_above_the_floor():
    rng = np.random.default_rng(99)
    reasons = set()
    for i in range(1500):
        rows, current, constraints, closed = random_case(rng)
        policy = ADAPTIVE[i % 3]
        direction = Direction.DECREASE if i % 2 else Direction.INCREASE
        got = allocate(
            policy,
            rows,
            current,
            control="arm00",
            constraints=constraints,
            closed=closed,
            direction=direction,
        )
        reasons.add(got.reason.split(":")[0].split(";")[0])
        opened = [arm for arm in current if arm not in closed]
        for weights in (got.weights, *(inside.weights for inside in got.by_context.values())):
            assert abs(math.fsum(weights.values()) - 1.0) <= 1e-9
            assert all(weights[arm] == 0.0 for arm in closed)
            assert all(weights[arm] >= constraints.floor - 1e-9 for arm in opened)
            least = dict.fromkeys(opened, constraints.floor_steps(len(opened)) / constraints.grid)
            start = projected({arm: current[arm] for arm in opened}, least)
            assert all(abs(weights[arm] - start[arm]) <= constraints.maximum_change + 2e-4 for arm in opened)
        for best in (got.probability_best, *(inside.probability_best for inside in got.by_context.values())):
            assert not best or abs(math.fsum(best.values()) - 1.0) <= 1e-9
        assert 0 <= got.moved <= 1
    # The cases reach every policy, the burn-in and what is undetermined.
    assert reasons == {"thompson", "top_two", "contextual", "burn-in", "weights stay"}


def test_the_order_of_rows_and_arms_has_no_say():
    rng = np.random.default_rng(7)
    for i in range(60):
        rows, current, constraints, closed = random_case(rng)
        one = allocate(
            ADAPTIVE[i % 3], rows, current, control="arm00", constraints=constraints, closed=closed
        )
        shuffled = [rows[j] for j in rng.permutation(len(rows))]
        turned = dict(reversed(current.items()))
        other = allocate(
            ADAPTIVE[i % 3], shuffled, turned, control="arm00", constraints=constraints, closed=closed
        )
        assert one.weights == other.weights
        assert one.reason == other.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": "z"}, "control 'z' is no arm"),
        ({"closed": {"a"}}, "control 'a' must not be closed"),
        ({"closed": {"z"}}, "'z' is no arm"),
        ({"evidence": rates(("z", 1, 1))}, "'z' is no arm"),
        ({"evidence": [*BETTER_B, Evidence("a", Values(1, 1, 1))]}, "one kind and step"),
        ({"current": {"a": 0.5, "b": 0.6}}, "sum to 1"),
        ({"current": {"a": math.nan, "b": 0.6}}, "in \\[0, 1\\]"),
        ({"constraints": Constraints(floor=0.6)}, "more than 1"),
        ({"priors": {"a": Prior(5.0, 10.0)}}, "between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {
        "policy": Policy.THOMPSON,
        "evidence": BETTER_B,
        "current": EVEN,
        "control": "a",
        "constraints": FREE,
    } | options
    with pytest.raises(ValueError, match=message):
        allocate(**arguments)
