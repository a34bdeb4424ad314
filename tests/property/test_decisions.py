"""Laws of `evaluate` and `decide`: orientation, order, merging, latching, validity."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import example, given, settings

from stream_xp.domain.decision import Action, MetricState
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import build, merge
from stream_xp.engine.evaluate import evaluate
from stream_xp.engine.policy import decide

ARMS = "abc"
EPOCHS = 2
MIRROR = {"increase": "decrease", "decrease": "increase"}

directions = st.sampled_from(["increase", "decrease"])
margins = st.one_of(
    st.builds(lambda size: {"absolute": size}, st.floats(0.001, 0.5)),
    st.builds(lambda size: {"relative": size}, st.floats(0.01, 0.9)),
)


@st.composite
def metrics(draw):
    """One to four metrics, at least one that decides."""
    roles = draw(st.lists(st.sampled_from(["primary", "guardrail", "secondary"]), max_size=3))
    roles.insert(0, draw(st.sampled_from(["primary", "guardrail"])))
    found = []
    for index, role in enumerate(roles):
        metric = {
            "key": f"m{index}",
            "kind": "mean",
            "role": role,
            "direction": draw(directions),
            "attribution_window": "1s",
            "scale": 0.01,
            "bound": 100.0,
        }
        if role == "guardrail":
            metric |= {"margin": draw(margins), "critical": draw(st.booleans())}
        found.append(metric)
    return found


@st.composite
def weights(draw):
    parts = draw(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any))
    return {arm: part / sum(parts) for arm, part in zip(ARMS, parts, strict=True)}


def record(metrics, epochs, *, arms=ARMS, **fields):
    spec = {
        "experiment": "e",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 2000,
        "arms": [{"key": arm, "weight": epochs[-1][arm], "control": arm == "a"} for arm in arms],
        "metrics": metrics,
    } | fields
    spec = msgspec.convert(spec, ExperimentSpec)
    listed = [WeightEpoch(epoch=e, weights=w, effective_ms=e) for e, w in enumerate(epochs)]
    return ExperimentRecord(spec=spec, epochs=tuple(listed), design_hash=spec.design_hash())


@st.composite
def cells(draw, metrics, epochs):
    """Units and moments of every arm and epoch, with effects of any size; mostly in the shares of the weights."""
    size = draw(st.one_of(st.integers(0, 100), st.integers(500, 6000), st.integers(500, 6000)))
    skew, stray = draw(st.sampled_from([1, 1, 1, 1, 2])), draw(st.sampled_from([0] * 9 + [1]))
    noise = random.Random(draw(st.integers(0, 2**32)))
    units, moments = {}, {}
    for epoch, shares in enumerate(epochs):
        for arm, share in shares.items():
            n = round(size * share * (skew if arm == "a" else 1)) + stray
            units[arm, epoch, ""] = n
            for metric in metrics:
                mean = draw(st.integers(-60, 60)) if arm != "a" else 20
                s = sum(round(noise.gauss(mean, 50)) for _ in range(min(n, 20))) * n // max(min(n, 20), 1)
                moments[metric["key"], arm, epoch, ""] = (
                    n,
                    s,
                    (s * s) // max(n, 1) + 2500 * n + 1 if n else 0,
                )
    return units, moments


@st.composite
def experiments(draw):
    listed = draw(metrics())
    epochs = [draw(weights()) for _ in range(draw(st.integers(1, EPOCHS)))]
    units, moments = draw(cells(listed, epochs))
    crossovers = draw(st.sampled_from([0, 0, 0, 1, 500]))
    minimum = draw(st.sampled_from(["0s", "1h", "1w"]))  # a week: one whole cycle of the traffic
    return listed, epochs, units, moments, {"crossover_units": crossovers}, {"minimum_runtime": minimum}


def statistics(units, moments, *, crossover_units=0):
    return build(
        units=units,
        moments=moments,
        crossover_units=crossover_units,
        first_exposure_ms=0,
        out_of_range={},
    )


MINIMA_MS = {"0s": 0, "1h": 3_600_000, "1w": 7 * 86_400_000}
runtimes = st.sampled_from([0, 3_600_000, MINIMA_MS["1w"] - 1, MINIMA_MS["1w"]])


def numbers(result):
    tests = (result.effect, result.harm, result.safety)
    return [(t.log_e, t.threshold_log_e) for t in tests if t is not None]


@settings(deadline=None)
@given(experiments(), runtimes)
def test_orientation_is_symmetric(experiment, runtime_ms):
    """Turning every value round, and what is good with it, changes no state and no decision."""
    listed, epochs, units, moments, extra, fields = experiment
    turned = [metric | {"direction": MIRROR[metric["direction"]]} for metric in listed]
    mirrored = {key: (n, -s, q) for key, (n, s, q) in moments.items()}
    one, other = record(listed, epochs, **fields), record(turned, epochs, **fields)
    found = evaluate(one, statistics(units, moments, **extra))
    image = evaluate(other, statistics(units, mirrored, **extra))
    assert [r.state for r in found.metrics] == [r.state for r in image.metrics]
    assert [numbers(r) for r in found.metrics] == [numbers(r) for r in image.metrics]
    decisions = [decide(r.spec, e, runtime_ms=runtime_ms) for r, e in ((one, found), (other, image))]
    assert decisions[0] == decisions[1]


@settings(deadline=None)
@given(st.integers(25, 10**6), st.floats(0, 1), st.floats(0, 1), directions, st.floats(0.001, 0.5))
def test_failures_mirror_successes(n, control, treatment, direction, margin):
    """That more succeed is good says the same as that more fail is bad.

    Of the asymptotic test alone: the exact part of a conversion mixes over base rates that lean to the rare ones.
    """
    listed = [
        {"key": "win", "kind": "mean", "role": "primary", "bound": 1.0},
        {"key": "guard", "kind": "mean", "role": "guardrail", "bound": 1.0, "margin": {"absolute": margin}},
    ]
    states = []
    for way in (direction, MIRROR[direction]):
        one = [m | {"direction": way, "attribution_window": "1s"} for m in listed]
        wins = {arm: int(rate * n) for arm, rate in (("a", control), ("b", treatment))}
        counts = {arm: s if way == direction else n - s for arm, s in wins.items()}
        moments = {(m["key"], arm, 0, ""): (n, s, s) for m in listed for arm, s in counts.items()}
        even = [{"a": 0.5, "b": 0.5}]
        found = evaluate(record(one, even, arms="ab"), statistics({}, moments))
        states.append(found.metrics)
    for here, there in zip(*states, strict=True):
        assert here.state is there.state
        for (log_e, level), (image, same) in zip(numbers(here), numbers(there), strict=True):
            assert log_e == pytest.approx(image, rel=1e-6, abs=1e-6)
            assert level == same


@settings(deadline=None)
@given(experiments(), runtimes, st.permutations(ARMS), st.randoms(use_true_random=False))
def test_the_order_of_the_file_does_not_matter(experiment, runtime_ms, arms, shuffler):
    """Neither that of the arms nor that of the metrics."""
    listed, epochs, units, moments, extra, fields = experiment
    one = record(listed, epochs, **fields)
    other = record(shuffler.sample(listed, len(listed)), epochs, arms=arms, **fields)
    found, again = (evaluate(r, statistics(units, moments, **extra)) for r in (one, other))
    by_place = {(r.metric, r.arm): r for r in again.metrics}
    assert [by_place[r.metric, r.arm] for r in found.metrics] == list(found.metrics)
    assert sorted(found.invalid) == sorted(again.invalid)
    assert (found.sample_ratio is None) == (again.sample_ratio is None)
    if found.sample_ratio is not None:
        # The average over the arms is summed in their order.
        assert found.sample_ratio.log_e == pytest.approx(again.sample_ratio.log_e, rel=1e-9, abs=1e-9)
    here, there = (decide(r.spec, e, runtime_ms=runtime_ms) for r, e in ((one, found), (other, again)))
    assert (here.action, here.arm, here.metric) == (there.action, there.arm, there.metric)


@settings(deadline=None)
@given(experiments(), st.lists(st.integers(0, 100), min_size=1, max_size=3))
def test_merging_partitions_gives_the_same_evaluation(experiment, cuts):
    listed, epochs, units, moments, extra, _ = experiment
    whole = statistics(units, moments, **extra)
    parts, rest, left = [], dict(units), dict(moments)
    for cut in cuts:
        taken = {place: n * cut // 100 for place, n in rest.items()}
        share = {place: tuple(v * cut // 100 for v in values) for place, values in left.items()}
        # `build` leaves out rows without units, so that their sums would be lost.
        share = {place: values if values[0] else (0, 0, 0) for place, values in share.items()}
        parts.append(statistics(taken, share))
        rest = {place: n - taken[place] for place, n in rest.items()}
        left = {place: tuple(v - t for v, t in zip(left[place], share[place], strict=True)) for place in left}
    parts.append(statistics(rest, left, **extra))
    found = evaluate(record(listed, epochs), whole)
    for order in (parts, parts[::-1]):
        assert evaluate(record(listed, epochs), merge(order)) == found


@settings(deadline=None)
@given(st.data())
def test_decisions_latch(data):
    """Over any sequence of looks there is one stop or ship, and nothing after it."""
    listed, epochs, *_ = data.draw(experiments())
    one, latched, said = record(listed, epochs), None, []
    for _ in range(data.draw(st.integers(1, 6))):
        units, moments = data.draw(cells(listed, epochs))
        found = evaluate(one, statistics(units, moments))
        latched = decide(one.spec, found, runtime_ms=data.draw(runtimes), latched=latched)
        said.append(latched)
    finals = [decision for decision in said if decision.action is not Action.HOLD]
    assert len(set(map(msgspec.json.encode, finals))) <= 1
    assert said[len(said) - len(finals) :] == finals


ONE = [{"a": 0.5, "b": 0.25, "c": 0.25}]
WIN = {
    "key": "m0",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": "1s",
}
COUNTS = {"a": 4000, "b": 2000, "c": 2000}
SHIPS = (
    [WIN],
    ONE,
    {(arm, 0, ""): n for arm, n in COUNTS.items()},
    {("m0", arm, 0, ""): (n, s, s) for (arm, n), s in zip(COUNTS.items(), (800, 600, 500), strict=True)},
    {},
    {},
)


@settings(deadline=None)
@given(experiments(), runtimes)
@example(SHIPS, 0)
def test_what_a_decision_needs(experiment, runtime_ms):
    listed, epochs, units, moments, extra, fields = experiment
    one = record(listed, epochs, **fields)
    found = evaluate(one, statistics(units, moments, **extra))
    decision = decide(one.spec, found, runtime_ms=runtime_ms)
    harmed = {r.arm for r in found.metrics if r.state is MetricState.HARMED}
    mismatch = found.sample_ratio is not None and found.sample_ratio.mismatch
    assert (decision.action is Action.STOP) == (bool(harmed) or mismatch)
    if decision.action is Action.SHIP:
        mine = [r for r in found.metrics if r.arm == decision.arm]
        primary = {r.state for r in mine if r.role == "primary"}
        assert not found.invalid
        assert runtime_ms >= MINIMA_MS[fields.get("minimum_runtime", "0s")]
        assert MetricState.BETTER in primary
        assert MetricState.WORSE not in primary
        assert {r.state for r in mine if r.role == "guardrail"} <= {MetricState.SAFE}
        assert decision.arm in {arm.key for arm in one.spec.treatments}
    if experiment is SHIPS:
        assert (decision.action, decision.arm) == (Action.SHIP, "b")


@pytest.mark.parametrize("minimum", MINIMA_MS)
def test_what_would_ship_waits_for_a_whole_cycle(minimum):
    listed, epochs, units, moments, extra, fields = SHIPS
    one = record(listed, epochs, **{**fields, "minimum_runtime": minimum})
    found = evaluate(one, statistics(units, moments, **extra))
    over_ms = MINIMA_MS[minimum]
    assert decide(one.spec, found, runtime_ms=over_ms).action is Action.SHIP
    if over_ms:
        waiting = decide(one.spec, found, runtime_ms=over_ms - 1)
        assert (waiting.action, waiting.reason) == (
            Action.HOLD,
            f"the minimum runtime of {minimum} is not over",
        )


@settings(deadline=None)
@given(experiments(), runtimes)
def test_a_decision_is_a_function_of_the_statistics(experiment, runtime_ms):
    """Also of statistics and a spec that went over the wire, and all of its numbers can go there too."""
    listed, epochs, units, moments, extra, fields = experiment
    one, seen = record(listed, epochs, **fields), statistics(units, moments, **extra)
    found = evaluate(one, seen)
    again = evaluate(
        msgspec.json.decode(msgspec.json.encode(one), type=ExperimentRecord),
        msgspec.json.decode(seen.canonical(), type=type(seen)),
    )
    assert found == again
    assert decide(one.spec, found, runtime_ms=runtime_ms) == decide(one.spec, again, runtime_ms=runtime_ms)
    shown = msgspec.json.encode((found.arms, found.metrics, found.sample_ratio))
    assert all(map(math.isfinite, floats(msgspec.json.decode(shown))))


def floats(value):
    """Every number in decoded JSON. What JSON cannot hold was written as null, where a number has to be."""
    if isinstance(value, dict):
        required = {"log_e", "p_always_valid", "threshold_log_e", "units", "expected_units"}
        assert all(value[name] is not None for name in required & value.keys())
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from floats(item)
    elif isinstance(value, float):
        yield value
