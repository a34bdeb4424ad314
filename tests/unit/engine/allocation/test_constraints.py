"""Every published distribution is one, at or above its floors, within its cap, whatever is asked for."""

from __future__ import annotations

import itertools
import math
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.engine.allocation.constraints import (
    BurnIn,
    Constraints,
    burning_in,
    change,
    constrained,
    default_floor,
    moved,
    projected,
    rounded,
)

NAMES = [f"{a}{b}" for a in string.ascii_lowercase for b in "xyz"][:64]
share = st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e300), st.sampled_from([1e-300, 1.0, 5e-324]))


def close_to(weights, **options):
    return {arm: pytest.approx(weight, **options) for arm, weight in weights.items()}


@st.composite
def distributions(draw, names):
    """A distribution of the names: on the grid, off it, or with zeros."""
    parts = draw(st.lists(st.integers(0, 1000), min_size=len(names), max_size=len(names)))
    parts[draw(st.integers(0, len(names) - 1))] += 1
    whole = sum(parts)
    return {name: part / whole for name, part in zip(names, parts, strict=True)}


@st.composite
def cases(draw):
    names = NAMES[: draw(st.one_of(st.integers(2, 6), st.integers(2, 64)))]
    grid = draw(st.sampled_from([1_000, 10_000, 1_000_000]))
    k = len(names)
    constraints = Constraints(
        floor=draw(st.floats(0, 1 / k)) * (1 - k / grid),
        maximum_change=draw(st.floats(1 / grid, 1)),
        uniform_slice=draw(st.one_of(st.just(0.0), st.floats(0, 0.9))),
        grid=grid,
    )
    target = {name: draw(share) for name in names}
    closed = set(draw(st.lists(st.sampled_from(names[1:]), max_size=k)))
    return target, draw(distributions(names)), constraints, closed


@settings(deadline=None, max_examples=150)
@given(cases())
def test_what_is_published_holds_everything(case):
    check_published(case)


def random_case(rng):
    """A case of 2 to 64 arms with counts and weights over all magnitudes, drawn faster than hypothesis can."""
    k = int(rng.integers(2, 65))
    names, grid = NAMES[:k], int(rng.choice([1_000, 10_000, 1_000_000]))
    zero = rng.random(k) < rng.choice([0.0, 0.5, 1.0])
    target = np.where(zero, 0.0, 10.0 ** rng.uniform(-300, 300, k) if rng.random() < 0.3 else rng.random(k))
    parts = np.floor(10.0 ** rng.uniform(0, 6, k)) * (rng.random(k) < 0.8)
    parts[rng.integers(k)] += 1
    constraints = Constraints(
        floor=rng.choice([0.0, 1.0, rng.random()]) / k * (1 - k / grid),
        maximum_change=rng.choice([1 / grid, 0.1, 1.0, rng.uniform(1 / grid, 1)]),
        uniform_slice=rng.choice([0.0, 0.1, rng.uniform(0, 0.9)]),
        grid=grid,
    )
    closed = {name for name in names[1:] if rng.random() < rng.choice([0.0, 0.3, 1.0])}
    current = dict(zip(names, (parts / parts.sum()).tolist(), strict=True))
    return dict(zip(names, target.tolist(), strict=True)), current, constraints, closed


def test_thousands_of_published_distributions_hold_everything():
    rng = np.random.default_rng(2026)
    for _ in range(3_000):
        check_published(random_case(rng))


def check_published(case):
    target, current, constraints, closed = case
    got = constrained(target, current, constraints=constraints, closed=closed).weights
    opened = [arm for arm in current if arm not in closed]
    step = 1 / constraints.grid
    assert set(got) == set(current)
    assert abs(math.fsum(got.values()) - 1.0) <= 1e-9
    assert all(got[arm] == 0 for arm in closed)
    if got != current:
        assert all(abs(w * constraints.grid - round(w * constraints.grid)) < 1e-6 for w in got.values())
    even = constraints.uniform_slice / len(opened)
    assert all(got[arm] >= constraints.floor - 1e-9 and got[arm] >= even - 1e-9 for arm in opened)
    # The cap counts from the nearest weights that hold the floors; from the ones in force if they do.
    least = constraints.floor_steps(len(opened)) * step
    start = projected({arm: current[arm] for arm in opened}, dict.fromkeys(opened, least))
    assert change(got, dict.fromkeys(current, 0.0) | start) <= constraints.maximum_change + step + 1e-9
    if not closed and all(weight >= least for weight in current.values()):
        assert start == close_to(current, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_arms_has_no_say(case, random):
    target, current, constraints, closed = case
    shuffled = list(current)
    random.shuffle(shuffled)
    one = constrained(target, current, constraints=constraints, closed=closed)
    other = constrained(
        {arm: target[arm] for arm in shuffled},
        {arm: current[arm] for arm in reversed(shuffled)},
        constraints=constraints,
        closed=closed,
    )
    assert one.weights == other.weights
    assert one.notes == other.notes


@settings(deadline=None, max_examples=60)
@given(cases())
def test_updates_arrive_and_stay(case):
    """With the cap off one update is the goal, and the second changes nothing; capped ones get there too."""
    target, current, constraints, closed = case
    free = Constraints(
        floor=constraints.floor,
        uniform_slice=constraints.uniform_slice,
        grid=constraints.grid,
        maximum_change=1.0,
    )
    goal = constrained(target, current, constraints=free, closed=closed).weights
    again = constrained(target, goal, constraints=free, closed=closed).weights
    assert again == goal
    capped = Constraints(
        floor=free.floor, uniform_slice=free.uniform_slice, grid=free.grid, maximum_change=0.1
    )
    weights = current
    for _ in range(12):
        weights = constrained(target, weights, constraints=capped, closed=closed).weights
    # Every step ends on the grid, less than one step of it away from the line.
    assert change(weights, goal) <= 2 / free.grid + 1e-9


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_the_projection_is_the_nearest_in_relative_entropy(data):
    names = NAMES[: data.draw(st.integers(2, 64))]
    k = len(names)
    shares = {name: data.draw(st.one_of(st.just(0.0), st.floats(1e-9, 1.0))) for name in names}
    floors = {name: data.draw(st.floats(0.0, 1 / k)) for name in names}
    got = projected(shares, floors)
    assert math.fsum(got.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(got[name] >= floors[name] for name in names)
    free = [name for name in names if got[name] > floors[name] * (1 + 1e-9) + 1e-12]
    if any(shares.values()):
        # The conditions of the optimum: one ratio above the floors, none larger at a floor.
        ratios = [got[name] / shares[name] for name in free]
        assert not ratios or max(ratios) == pytest.approx(min(ratios), rel=1e-6)
        held = [name for name in names if name not in free and shares[name] > 0]
        assert all(got[name] / shares[name] >= max(ratios, default=0.0) * (1 - 1e-6) for name in held)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_more_share_never_gives_less_weight(data):
    names = NAMES[: data.draw(st.integers(2, 10))]
    shares = {name: data.draw(st.floats(1e-6, 1.0)) for name in names}
    floor = data.draw(st.floats(0.0, 1 / len(names)))
    floors = dict.fromkeys(names, floor)
    before = projected(shares, floors)
    # Between arms, and for one arm as its share grows.
    ranked = sorted(names, key=lambda name: shares[name])
    assert all(before[a] <= before[b] for a, b in itertools.pairwise(ranked))
    after = projected(shares | {names[0]: shares[names[0]] * data.draw(st.floats(1, 100))}, floors)
    assert after[names[0]] >= before[names[0]] - 1e-12
    assert all(after[name] <= before[name] + 1e-12 for name in names[1:])


def test_projection_by_hand():
    got = projected({"a": 0.9, "b": 0.06, "c": 0.04}, {"a": 0.1, "b": 0.1, "c": 0.1})
    assert got == {"a": pytest.approx(0.8), "b": 0.1, "c": 0.1}
    assert projected({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.2}) == {"a": 0.5, "b": 0.5}
    assert projected({"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}) == {"a": 0.5, "b": 0.5}


def test_a_closed_arm_falls_at_once_whatever_the_cap():
    current = {"a": 0.5, "b": 0.3, "c": 0.2}
    got = constrained(
        {"a": 0.1, "b": 0.9}, current, constraints=Constraints(floor=0.05, maximum_change=0.1), closed={"c"}
    )
    # a and b share what c had in their ratio, 0.625 and 0.375, and then move by the cap.
    assert got.weights == {"a": 0.525, "b": 0.475, "c": 0.0}
    assert got.notes == (
        "arms without their floor or closed are mended at once",
        "moved by 0.1 of 0.525 at most",
    )


def test_what_the_slice_gives_counts_towards_the_floor():
    current = {"a": 0.5, "b": 0.5}
    constraints = Constraints(floor=0.05, uniform_slice=0.1, maximum_change=1.0)
    got = constrained({"a": 0.0, "b": 1.0}, current, constraints=constraints)
    assert got.weights == {"a": 0.05, "b": 0.95}
    higher = Constraints(floor=0.14, uniform_slice=0.1, maximum_change=1.0)
    assert constrained({"a": 0.0, "b": 1.0}, current, constraints=higher).weights == {"a": 0.14, "b": 0.86}


def test_a_change_too_small_keeps_the_weights_in_force():
    current = {"a": 1 / 3, "b": 2 / 3}
    constraints = Constraints(minimum_change=0.05)
    got = constrained({"a": 0.3, "b": 0.7}, current, constraints=constraints)
    assert got.weights == current
    assert got.notes == ("the change is too small to publish",)
    assert constrained({"a": 0.2, "b": 0.8}, current, constraints=constraints).weights == {"a": 0.2, "b": 0.8}


def test_rounding_by_largest_remainder():
    thirds = {"c": 1 / 3, "a": 1 / 3, "b": 1 / 3}
    assert rounded(thirds, 1000) == {"a": 0.334, "b": 0.333, "c": 0.333}
    assert rounded({"a": 0.12349, "b": 0.87651}, 10_000) == {"a": 0.1235, "b": 0.8765}
    assert rounded({"a": 0.1 + 0.2, "b": 0.7}, 1000) == {"a": 0.3, "b": 0.7}


def test_moved_is_half_the_distance():
    assert moved({"a": 0.2, "b": 0.8}, {"a": 0.5, "b": 0.5}) == pytest.approx(0.3)
    assert moved({"a": 0.1, "b": 0.15, "c": 0.75}, {"a": 0.2, "b": 0.2, "c": 0.6}) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("arms", "interval", "floor"), [(2, False, 0.05), (4, True, 0.05), (20, False, 0.01), (2, True, 0.05)]
)
def test_default_floor(arms, interval, floor):
    assert default_floor(arms, interval=interval) == pytest.approx(floor)


LIMITS = BurnIn(units=100, conversions=40)


def test_burn_in_names_what_is_lacking():
    assert burning_in({"a": 99, "b": 500}, {"a": 90, "b": 90}, LIMITS) == ["a has 99 of 100 units"]
    assert burning_in({"a": 500, "b": 500}, {"a": 39, "b": 60}, LIMITS) == ["a has 39 of 40 conversions"]
    assert burning_in({"a": 100, "b": 100}, {"a": 40, "b": 40}, LIMITS) == []
    assert burning_in({"a": 100, "b": 100}, None, LIMITS) == []


def test_an_arm_that_never_converts_ends_its_burn_in():
    assert burning_in({"a": 1590, "b": 1590}, {"a": 0, "b": 159}, LIMITS)
    assert not burning_in({"a": 1610, "b": 1610}, {"a": 0, "b": 161}, LIMITS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Constraints(floor=1.0), "floor"),
        (lambda: Constraints(floor=math.nan), "floor"),
        (lambda: Constraints(maximum_change=0.0), "maximum_change"),
        (lambda: Constraints(maximum_change=1.1), "maximum_change"),
        (lambda: Constraints(minimum_change=1.0), "minimum_change"),
        (lambda: Constraints(uniform_slice=0.95), "uniform_slice"),
        (lambda: Constraints(grid=100), "grid"),
        (lambda: BurnIn(units=-1), "burn_in"),
        (lambda: Constraints(floor=0.4).floor_steps(3), "more than 1"),
        (lambda: Constraints(floor=1 / 3).floor_steps(3), "more than 1"),
        (lambda: projected({"a": -1.0}, {"a": 0.0}), "not negative"),
        (lambda: projected({"a": 1.0, "b": 1.0}, {"a": 0.6, "b": 0.6}), "more than 1"),
        (lambda: constrained({"a": 1.0}, {"a": 0.9}, constraints=Constraints()), "sum to 1"),
        (lambda: constrained({"a": 1.0}, {"a": 1.5}, constraints=Constraints()), "in \\[0, 1\\]"),
        (
            lambda: constrained({"a": 1.0}, {"a": 1.0}, constraints=Constraints(), closed={"a"}),
            "every arm is closed",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
