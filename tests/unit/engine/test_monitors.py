"""Monitors: each is quiet on a healthy experiment and fires on its fault; latches, orders, verification."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest

from stream_xp import stats
from stream_xp.domain.decision import ArmRun, MonitorResult, MonitorState
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import Outcomes, build
from stream_xp.engine.evaluate import Evaluation, evaluate
from stream_xp.engine.monitors import Beside, with_monitors
from stream_xp.engine.stalls import MOST_MARKS, DataTime
from tests.simulation.runs import runs as drawn_runs

CLICK = {
    "key": "click",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": "1s",
}
CRASH = CLICK | {"key": "crash", "role": "guardrail", "direction": "decrease", "margin": {"absolute": 0.01}}
EVEN = {"a": 0.5, "b": 0.5}
THREE = {"a": 0.5, "b": 0.25, "c": 0.25}
NOTHING = Evaluation((), (), None, ())


def record(*metrics, weights=EVEN, epochs=None, **fields) -> ExperimentRecord:
    spec = msgspec.convert(
        {
            "experiment": "e",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 10_000,
            "arms": [{"key": key, "weight": w, "control": key == "a"} for key, w in weights.items()],
            "metrics": list(metrics) or [CLICK],
        }
        | fields,
        ExperimentSpec,
    )
    listed = tuple(
        WeightEpoch(epoch=at, weights=one, effective_ms=at) for at, one in enumerate(epochs or [weights])
    )
    return ExperimentRecord(spec=spec, epochs=listed, design_hash=spec.design_hash())


def counted(units, *, clicks=None, crossovers=0, metric="click"):
    """Statistics of {arm: units} or {(arm, epoch, segment): units}, and units with a click of {arm: units}."""
    keyed = {key if isinstance(key, tuple) else (key, 0, ""): n for key, n in units.items()}
    moments = {(metric, arm, 0, ""): (units[arm], s, s) for arm, s in (clicks or {}).items()}
    return build(
        units=keyed, moments=moments, crossover_units=crossovers, first_exposure_ms=0, out_of_range={}
    )


NOW = DataTime(0, 0, 0)


def beside(before=(), *, age_ms=0, read=0, duplicate=0, opened=None, time=NOW):
    outcomes = Outcomes(read=read, counted=read - duplicate, duplicate=duplicate)
    return Beside(outcomes, Outcomes(), age_ms, before, opened, time)


def monitors(one, statistics, around=None) -> dict[tuple[str, str | None], MonitorResult]:
    found = with_monitors(one, statistics, NOTHING, around or beside()).monitors or ()
    return {(str(monitor.monitor), monitor.arm): monitor for monitor in found}


def in_turn(one, looks, times=(), **fields):
    """The monitors after each of several looks."""
    before: tuple[MonitorResult, ...] = ()
    found = []
    for statistics, time in itertools.zip_longest(looks, times, fillvalue=NOW):
        evaluation = with_monitors(one, statistics, NOTHING, beside(before, time=time, **fields))
        before = evaluation.monitors or ()
        found.append(evaluation)
    return found


# ---- crossovers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("monitors_of", "crossovers", "invalid"),
    [(None, 10, False), (None, 11, True), ({}, 11, True), ({"crossovers": 0.05}, 50, False)],
)
def test_crossovers_beyond_their_share_are_invalid_before_they_are_proven(monitors_of, crossovers, invalid):
    one = record(monitors=monitors_of)
    statistics = counted({"a": 495, "b": 495}, crossovers=crossovers)
    found = monitors(one, statistics)["crossovers", None]
    assert (found.state is MonitorState.INVALID) is invalid
    assert not found.latched
    # The evaluation says it already, and once.
    evaluation = evaluate(one, statistics)
    assert with_monitors(one, statistics, evaluation, beside()).invalid == evaluation.invalid
    assert bool(evaluation.invalid) is invalid


def test_a_proof_latches_until_a_person_opens_it():
    one = record()
    bad, good = (
        counted({"a": 450, "b": 450}, crossovers=60),
        counted({"a": 50_000, "b": 50_000}, crossovers=60),
    )
    first, second = in_turn(one, [bad, good])
    at_first, at_second = first.monitors[0], second.monitors[0]
    assert at_first.latched
    assert at_first.log_e >= at_first.threshold_log_e == -math.log(0.001)
    assert (at_second.latched, at_second.state) == (True, MonitorState.INVALID)
    assert at_second.log_e < at_second.threshold_log_e
    assert second.invalid == ("crossovers: proven before, and nobody has resumed or reset since",)
    opened = with_monitors(one, good, NOTHING, beside(second.monitors, opened="r"))
    assert (opened.invalid, opened.monitors[0].latched) == ((), False)
    # What is still proven latches again.
    again = with_monitors(one, bad, NOTHING, beside(first.monitors, opened="r"))
    assert again.monitors[0].latched


# ---- duplicates, age of the data -----------------------------------------------------------------------------


def test_duplicates_warn_and_hold_nothing():
    one = record(monitors={"duplicates": 0.05})
    found = with_monitors(one, counted({"a": 50, "b": 50}), NOTHING, beside(read=1000, duplicate=200))
    (duplicates,) = [m for m in found.monitors if m.monitor == "duplicates"]
    assert (duplicates.state, duplicates.latched, found.invalid) == (MonitorState.WARNING, True, ())
    quiet = monitors(one, counted({}), beside(read=1000, duplicate=50))["duplicates", None]
    assert (quiet.state, quiet.value, quiet.reason) == (MonitorState.QUIET, 0.05, None)
    assert ("duplicates", None) not in monitors(record(), counted({}), beside(read=10, duplicate=10))


@pytest.mark.parametrize(("age_ms", "invalid"), [(0, False), (60_000, False), (60_001, True), (None, True)])
def test_old_data_are_invalid_while_they_are_old(age_ms, invalid):
    one, statistics = record(monitors={"data_age": "1m"}), counted({"a": 50, "b": 50})
    found = with_monitors(one, statistics, NOTHING, beside(age_ms=age_ms))
    assert bool(found.invalid) is invalid
    (age,) = [m for m in found.monitors if m.monitor == "data_age"]
    assert (age.value, age.latched) == (age_ms, False)
    assert with_monitors(one, statistics, NOTHING, beside(found.monitors)).invalid == ()
    assert ("data_age", None) not in monitors(record(), statistics, beside(age_ms=None))


# ---- lost rewards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clicks", "loser"),
    [
        ({"a": 300, "b": 290}, None),
        ({"a": 300, "b": 160}, None),
        ({"a": 300, "b": 0}, "b"),
        ({"a": 0, "b": 300}, "a"),
    ],
)
def test_lost_rewards_are_told_by_arm(clicks, loser):
    one = record(monitors={"reward_loss": 2})
    found = monitors(one, counted({"a": 1000, "b": 1000}, clicks=clicks))["reward_loss", "b"]
    assert (found.state is MonitorState.INVALID) == found.latched == (loser is not None)
    assert loser is None or f"lost in {loser}" in found.reason


def test_lost_rewards_are_weighed_by_the_weights():
    one = record(weights={"a": 0.9, "b": 0.1}, monitors={"reward_loss": 2})
    found = monitors(one, counted({"a": 9000, "b": 1000}, clicks={"a": 900, "b": 100}))["reward_loss", "b"]
    assert found.value == pytest.approx(1.0)
    assert found.state is MonitorState.QUIET


@pytest.mark.parametrize("direction", ["increase", "decrease"])
def test_what_would_be_harm_of_a_guardrail_is_no_loss(direction):
    guard = CRASH | {"direction": direction}
    one = record(CLICK, guard, monitors={"reward_loss": 2})
    states = {}
    for shape, rewards in (("more", {"a": 20, "b": 300}), ("less", {"a": 300, "b": 20})):
        statistics = counted({"a": 1000, "b": 1000}, clicks=rewards, metric="crash")
        states[shape] = monitors(one, statistics)["reward_loss", "b"].state
    good = "more" if direction == "increase" else "less"
    assert states == {"more": MonitorState.QUIET, "less": MonitorState.QUIET} | {good: MonitorState.INVALID}


def test_metrics_that_do_not_count_units_are_passed_over():
    spend = CLICK | {"key": "spend", "kind": "mean", "scale": 1.0, "bound": 100.0}
    assert ("reward_loss", "b") not in monitors(record(spend, monitors={"reward_loss": 2}), counted({}))
    assert ("reward_loss", "b") not in monitors(record(), counted({}))


@pytest.mark.parametrize("kind", ["count", "latency"])
def test_events_and_latencies_count_units(kind):
    metric = CLICK | {"kind": kind, "aggregation": "first"}
    if kind == "latency":
        metric |= {"quantiles": [0.5], "scale": 1.0, "bound": 1000.0}
    table = {"a": (400, 500), "b": (3, 3)} if kind == "count" else {"a": {5: 400}, "b": {5: 3}}
    name = "events" if kind == "count" else "histograms"
    cells = {("click", arm, 0, ""): row for arm, row in table.items()}
    statistics = build(
        units={("a", 0, ""): 1000, ("b", 0, ""): 1000},
        moments={},
        crossover_units=0,
        first_exposure_ms=0,
        out_of_range={},
        **{name: cells},
    )
    found = monitors(record(metric, monitors={"reward_loss": 2}), statistics)["reward_loss", "b"]
    assert found.state is MonitorState.INVALID
    assert found.value == pytest.approx(3 / 400)


# ---- stalls --------------------------------------------------------------------------------------------------


def test_the_evidence_of_a_stall_is_that_of_the_statistical_function():
    first, second = in_turn(record(), [counted({"a": 500, "b": 490}), counted({"a": 540, "b": 490})])
    assert not first.invalid
    (stall,) = [m for m in second.monitors if m.arm == "b"]
    expected = stats.arm_stall([40], [0.5], units=490)
    assert stall.log_e == pytest.approx(expected.log_e)
    assert (stall.value, stall.state) == (40.0, MonitorState.INVALID)
    assert stall.threshold_log_e == pytest.approx(math.log(2 / 0.001))
    assert second.invalid == ("b gets no units: 40 in a row went to other arms",)


def test_an_arm_that_has_not_begun_is_stalled_until_it_begins():
    looks = [counted({"a": 5}), counted({"a": 25}), counted({"a": 30, "b": 1})]
    found = [{m.arm: m for m in one.monitors}["b"] for one in in_turn(record(), looks)]
    assert [one.state for one in found] == [MonitorState.QUIET, MonitorState.INVALID, MonitorState.QUIET]
    assert not any(one.latched for one in found)
    assert found[2].run.units == 1


def test_an_arm_that_comes_back_is_latched():
    looks = [counted({"a": 5, "b": 5}), counted({"a": 45, "b": 5}), counted({"a": 50, "b": 9})]
    found = [{m.arm: m for m in one.monitors}["b"] for one in in_turn(record(), looks)]
    assert [one.latched for one in found] == [False, True, True]
    assert found[2].log_e < 0 < found[1].log_e


def test_a_unit_that_became_a_crossover_is_no_sign_of_life():
    looks = [counted({"a": 500, "b": 500}), counted({"a": 520, "b": 498}, crossovers=2)]
    last = counted({"a": 545, "b": 497}, crossovers=3)
    found = [{m.arm: m for m in one.monitors}["b"] for one in in_turn(record(), [*looks, last])]
    assert [one.value for one in found] == [0.0, 20.0, 45.0]
    assert found[-1].latched
    # One that came since is, though the arm has fewer than at the begin.
    alive = with_monitors(
        record(), counted({"a": 550, "b": 498}, crossovers=3), NOTHING, beside((found[-1],))
    )
    assert {m.arm: m for m in alive.monitors}["b"].value == 0.0


def test_an_arm_of_weight_0_or_1_cannot_stall():
    one = record(epochs=[EVEN, {"a": 1.0, "b": 0.0}])
    looks = [counted({"a": 50, "b": 50}), counted({("a", 0, ""): 50, ("b", 0, ""): 50, ("a", 1, ""): 900})]
    last = in_turn(one, looks)[-1]
    assert last.invalid == ()
    stall = {m.arm: m for m in last.monitors if m.monitor == "exposure_stall"}
    assert stall["b"].run.units == 50


LATE_MS = 60_000


def stalled(looks, times, arm="b", **fields):
    """The stall monitor of an arm after each look."""
    found = in_turn(record(**fields), [counted(units) for units in looks], times)
    return [{m.arm: m for m in one.monitors if m.monitor == "exposure_stall"}[arm] for one in found]


def at(*watermarks_ms, apart_ms=0):
    return [DataTime(one, one + apart_ms, LATE_MS) for one in watermarks_ms]


def test_a_batch_of_one_arm_before_that_of_the_other_is_no_stall():
    """Each minute one arm's records come, then the other's, all of them within the allowed lateness."""
    times, looks, units = [], [], {"a": 0, "b": 0}
    for half_minute in range(40):
        units = units | {"ab"[half_minute % 2]: units["ab"[half_minute % 2]] + 500}
        times.append(half_minute * LATE_MS // 2)
        looks.append(units)
    for arm in "ab":
        assert not any(one.latched or one.value for one in stalled(looks, at(*times), arm))
    # With no lateness allowed such records would be late, and a run of 500 is a stall.
    assert stalled(looks, [DataTime(one, one, 0) for one in times])[-1].latched


def test_a_run_begins_and_ends_an_allowed_lateness_inside():
    looks = [{"a": a, "b": 100} for a in (100, 200, 300, 400, 500, 500)]
    found = stalled(looks, at(0, LATE_MS - 1, LATE_MS, LATE_MS + 1, 2 * LATE_MS, 2 * LATE_MS + 1))
    # Those until 60 s may have been exposed before the last one of b, those after 60.001 s may be ahead of one of b.
    assert [one.value for one in found] == [0.0, 0.0, 0.0, 0.0, 0.0, 100.0]
    assert found[-1].run.first.others == 300
    assert found[-1].run.last.others == 400
    assert [mark.others for mark in found[-1].run.marks] == [500]


def test_source_partitions_that_are_apart_count_with_the_one_that_is_behind():
    looks = [{"a": a, "b": 100} for a in (100, 300, 400, 400, 400)]
    least_ms = [0, LATE_MS + 99, LATE_MS + 100, 2 * LATE_MS + 199, 2 * LATE_MS + 200]
    found = stalled(looks, at(*least_ms, apart_ms=100))
    assert [None if one.run.first is None else one.run.first.others for one in found] == [
        None,
        None,
        400,
        400,
        400,
    ]
    looks = [{"a": a, "b": 100} for a in (100, 300, 400, 400, 400)]
    least_ms = [0, LATE_MS + 100, LATE_MS + 101, 2 * LATE_MS + 200, 2 * LATE_MS + 201]
    assert [one.value for one in stalled(looks, at(*least_ms, apart_ms=100))] == [0, 0, 0, 0, 100]


def test_without_a_watermark_nothing_is_proven():
    looks = [{"a": 100, "b": 100}, {"a": 900, "b": 100}, {"a": 1800, "b": 100}]
    assert not any(one.value for one in stalled(looks, [None, None, None]))
    # The run begins with the first watermark.
    last = stalled(looks, [None, *at(0, LATE_MS)])[-1]
    assert (last.run.since_ms, last.run.first.others) == (0, 1800)


def test_the_looks_of_a_run_that_wait_are_bounded():
    """One source partition stands while the others go on; when it has caught up, nothing was lost but a little time."""
    looks = [{"a": 100 + 9 * n, "b": 100} for n in range(40)]
    times = [DataTime(0, 0, LATE_MS), *(DataTime(LATE_MS, LATE_MS + n * LATE_MS, LATE_MS) for n in range(38))]
    times.append(DataTime(50 * LATE_MS, 50 * LATE_MS, LATE_MS))
    found = stalled(looks, times)
    assert max(len(one.run.marks) for one in found) == MOST_MARKS
    assert not found[-2].value
    assert found[-1].value == 9 * MOST_MARKS
    assert found[-1].latched
    # Room that a look makes it uses itself, so that looking again changes nothing.
    again = monitors(record(), counted(looks[-1]), beside((found[-1],), time=times[-1]))[
        "exposure_stall", "b"
    ]
    assert again == found[-1]
    assert [mark.others for mark in again.run.marks] == [looks[-1]["a"]]


def test_a_run_that_was_written_by_an_older_version_begins_again():
    old = msgspec.json.decode(b'{"units": 100, "others": 3, "nats": 2.0}', type=ArmRun)
    before = MonitorResult(monitor="exposure_stall", arm="b", run=old)
    now = monitors(record(), counted({"a": 900, "b": 100}), beside((before,)))["exposure_stall", "b"]
    assert (now.value, now.run.since_ms, now.run.first.others) == (0.0, 0, 900)


def test_a_stall_can_be_left_unwatched():
    found = monitors(record(monitors={"exposure_stall": False}), counted({"a": 500}))
    assert list(found) == [("crossovers", None)]


# ---- laws ----------------------------------------------------------------------------------------------------

FULL = {"data_age": "1m", "duplicates": 0.05, "reward_loss": 2}


def a_look(rng, total, *, weights=THREE):
    units = dict(zip(weights, rng.multinomial(total, list(weights.values())).tolist(), strict=True))
    return counted(units, clicks={arm: n // 3 for arm, n in units.items()}, crossovers=total // 50)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_arms_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    looks = [a_look(rng, total) for total in (100, 300, 301, 900)] + [counted({"a": 999, "b": 3})]
    turned = dict(reversed(THREE.items()))
    here, there = (in_turn(record(weights=weights, monitors=FULL), looks) for weights in (THREE, turned))
    for one, other in zip(here, there, strict=True):
        mine, theirs = ({(m.monitor, m.arm): m for m in e.monitors} for e in (one, other))
        assert mine.keys() == theirs.keys()
        for key, monitor in mine.items():
            other_one = theirs[key]
            assert (monitor.log_e or 0.0) == pytest.approx(other_one.log_e or 0.0, rel=1e-9, abs=1e-9)
            assert (monitor.state, monitor.latched) == (other_one.state, other_one.latched)


@pytest.mark.parametrize("lateness_ms", [0, 2, 40, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_looking_twice_at_the_same_changes_nothing(seed, lateness_ms):
    """A verification gives the monitors of a result as those of the look before it."""
    rng = np.random.default_rng(seed)
    one, before = record(weights=THREE, monitors=FULL), ()
    units, least_ms, newest_ms = {"a": 0, "b": 0, "c": 0}, 0, 0
    for _ in range(60):
        # The watermark of an owner can be behind that of the one before.
        least_ms += int(rng.integers(-5, 15))
        newest_ms = least_ms + int(rng.integers(0, 9))
        units["abc"[rng.choice(3, p=[0.7, 0.25, 0.05])]] += int(rng.integers(0, 3))
        statistics, time = counted(dict(units)), DataTime(least_ms, newest_ms, lateness_ms)
        first = with_monitors(one, statistics, NOTHING, beside(before, time=time))
        again = with_monitors(one, statistics, NOTHING, beside(first.monitors, time=time))
        assert again == first
        before = first.monitors


def test_monitors_are_quiet_on_a_healthy_experiment():
    """Looked at after every few units, the monitors that are tests fire in at most their level of the runs."""
    alpha, runs = 0.05, drawn_runs(200, short=80)
    one = record(
        weights=THREE, monitors={"alpha": alpha, "crossovers": 0.01, "duplicates": 0.05, "reward_loss": 1.05}
    )
    fired: dict[str, int] = {"crossovers": 0, "duplicates": 0, "reward_loss": 0, "exposure_stall": 0}
    rng = np.random.default_rng(7)
    for _ in range(runs):
        for name in latched_in_a_run(rng, one):
            fired[name] += 1
    most = runs * alpha + 3 * math.sqrt(runs * alpha * (1 - alpha))
    assert all(count <= most for count in fired.values()), fired


def latched_in_a_run(rng, one) -> set[str]:
    before: tuple[MonitorResult, ...] = ()
    units, clicks = np.zeros(3, int), np.zeros(3, int)
    crossovers = read = duplicate = 0
    for step in rng.integers(1, 60, 15):
        crossed = int(rng.binomial(step, 0.01))
        came = rng.multinomial(step - crossed, list(THREE.values()))
        units, clicks = units + came, clicks + rng.binomial(came, 0.3)
        read, duplicate = read + int(step), duplicate + int(rng.binomial(step, 0.05))
        crossovers += crossed
        seen = dict(zip(THREE, units.tolist(), strict=True))
        statistics = counted(
            seen, clicks=dict(zip(THREE, clicks.tolist(), strict=True)), crossovers=crossovers
        )
        around = beside(before, read=read, duplicate=duplicate)
        before = with_monitors(one, statistics, NOTHING, around).monitors or ()
    return {str(monitor.monitor) for monitor in before if monitor.latched}


# ---- sample ratio --------------------------------------------------------------------------------------------


def by_platform(tv, web):
    units = {("a", 0, ""): tv[0] + web[0], ("b", 0, ""): tv[1] + web[1]}
    for value, (a, b) in (("tv", tv), ("web", web)):
        units |= {("a", 0, f"platform={value}"): a, ("b", 0, f"platform={value}"): b}
    return counted(units)


def test_a_mismatch_names_the_segment_value_that_deviates_most():
    one = record(segments={"platform": ["tv", "web"]})
    ratio = evaluate(one, by_platform((2000, 1200), (2000, 2010))).sample_ratio
    assert [found.segment for found in ratio.diagnosis] == ["platform=tv", "platform=web"]
    tv, web = ratio.diagnosis
    assert tv.log_e >= tv.threshold_log_e == pytest.approx(math.log(3 / one.spec.sample_ratio_alpha))
    assert web.log_e < web.threshold_log_e
    assert evaluate(one, by_platform((2000, 1990), (2000, 2010))).sample_ratio.diagnosis == ()


def test_units_of_a_context_are_held_against_the_weights_of_it():
    allocation = {"policy": "contextual", "metric": "click", "context": "platform"}
    one = record(segments={"platform": ["tv", "web"]}, allocation=allocation)
    epoch = msgspec.structs.replace(
        one.epochs[0], contexts={"tv": {"a": 0.9, "b": 0.1}, "web": {"a": 0.2, "b": 0.8}}
    )
    one = msgspec.structs.replace(one, epochs=(epoch,))
    fair = evaluate(one, by_platform((1800, 200), (100, 400)))
    assert not fair.sample_ratio.mismatch
    assert [arm.expected_units for arm in fair.arms] == pytest.approx([1900, 600])
    turned = evaluate(one, by_platform((1250, 1250), (250, 250)))
    assert turned.sample_ratio.mismatch
