"""Scenarios: what is drawn, and what is true of it."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial

import msgspec
import numpy as np
import pytest

from stream_xp import simulator
from stream_xp.domain.codec import Limits
from stream_xp.domain.decision import Method, MetricResult, MetricState
from stream_xp.domain.publication import next_config, next_record
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.services.scenarios.early import Early
from stream_xp.services.scenarios.runs import _Simulation
from stream_xp.services.scenarios.scenario import Delays, DelayShape
from stream_xp.services.scenarios.truths import Truths, in_time
from stream_xp.services.scenarios.world import HOUR_MS, Drawn
from tests.unit.services.scenarios_world import FOLLOWED, HARMLESS, MEAN, experiment, write_and_load


@pytest.fixture
def load(tmp_path):
    return partial(write_and_load, tmp_path)


START_MS = simulator.START_MS


WINDOW_S, LATENESS_S = 40, 5


FOLDS = 120
DRAWN = experiment(
    arms=[
        {"key": "a", "weight": 0.5, "control": True},
        {"key": "b", "weight": 0.3},
        {"key": "c", "weight": 0.2},
    ],
    metrics=[
        {**experiment()["metrics"][0], "attribution_window": f"{WINDOW_S}s"},
        {**MEAN, "attribution_window": "70s", "scale": 0.25},
    ],
    segments={"device": ["tv", "phone"]},
)


LATER = {"a": 0.2, "b": 0.2, "c": 0.6}


COME, IN_TIME = 1 - math.exp(-1), 1 - math.exp(-70 / 40)
"""Shares of the rewards that come inside 40 and 70 seconds, with a mean delay of 40."""


def drawn_rows(world, looks):
    """Rows of many runs, drawn: weights that change after a minute, looks every 20 seconds."""
    drawn = Drawn(world, FOLDS, np.random.default_rng(3))
    record = next_record(None, world.spec, effective_ms=0)
    config = next_config(None, record)
    arms = tuple(msgspec.structs.replace(arm, weight=LATER[arm.key]) for arm in world.spec.arms)
    after = next_record(record, msgspec.structs.replace(world.spec, arms=arms), effective_ms=60_000)
    for run in range(FOLDS):
        drawn.follow(run, config, 0)
        drawn.follow(run, next_config(config, after), 0)
    for look in range(1, max(looks) + 1):
        for span in drawn.stretches(look):
            drawn.draw(span)
        drawn.mature(look * 20_000)
        if look in looks:
            yield look, drawn.statistics(list(range(FOLDS)))


def folded_rows(spec, looks):
    """The same through the real fold: single units, their records, and a partition of the engine."""
    outcomes = {
        "errors": {
            arm: (simulator.Since(outcome=simulator.Conversion(probability=p * COME)),)
            for arm, p in (("a", 0.2), ("b", 0.4), ("c", 0.2))
        },
        "minutes": {
            arm: (simulator.Since(outcome=simulator.LogNormal(log_mean=math.log(7), log_sd=0, probability=IN_TIME)),)
            for arm in "abc"
        },
    }  # fmt: skip
    traffic = simulator.ExperimentTraffic(
        spec=spec,
        units_per_s=2.0,
        outcomes=outcomes,
        weight_changes=(simulator.WeightChange(from_ms=60_000, weights=LATER),),
        reward_delay_ms=5000,
    )
    world = simulator.Scenario(
        experiments=(traffic,), duration_ms=max(looks) * 20_000, allowed_lateness_ms=LATENESS_S * 1000
    )
    found = {look: [] for look in looks}
    for seed in range(FOLDS):
        for look, statistics in folded(simulator.generate(world, seed), traffic, looks):
            found[look].append(statistics)
    return found.items()


def folded(traffic, one, looks):
    record = one.record(START_MS)
    registry = Registry([Entry(offset=0, experiment=record.spec.experiment, in_force_ms=0, record=record)])
    state = PartitionState(0, registry, allowed_lateness_ms=LATENESS_S * 1000)
    events = list(traffic.events(START_MS))
    at = {EXPOSURES: 0, REWARDS: 0}
    for look in range(1, max(looks) + 1):
        for topic, columns, apply in (
            (EXPOSURES, exposure_columns, state.apply_exposures),
            (REWARDS, reward_columns, state.apply_rewards),
        ):
            due = [event for event in events if event.topic == topic and event.send_ms < look * 20_000][
                at[topic] :
            ]
            times = [START_MS + event.send_ms for event in due]
            offsets = range(at[topic], at[topic] + len(due))
            keys, values = [event.key for event in due], [event.value for event in due]
            block = Block(topic, 0, at[topic], offsets.stop, offsets, times, keys, values, [()] * len(due))
            limits = Limits(record_bytes=10_000, future_ms=1000)
            made, _ = columns(block, registry, floor_ms=state.log_ms(topic), limits=limits)
            apply(made, next_offset=offsets.stop)
            at[topic] = offsets.stop
        state.advance(START_MS + look * 20_000)
        if look in looks:
            yield look, state.statistics(registry.slots[0])


def table(many):
    """Row key to the values of its columns in every run; 0 where a run has no such row."""
    rows = defaultdict(lambda: np.zeros((len(many), 3)))
    for run, statistics in enumerate(many):
        for row in statistics.units:
            rows["units", row.arm, row.epoch, row.segment][run] = row.units
        for row in statistics.moments:
            rows[row.metric, row.arm, row.epoch, row.segment][run] = row.n, int(row.s), int(row.q)
    return rows


def test_what_is_drawn_is_what_the_fold_counts(load):
    """Every row at four looks: the same rows, with equal means and standard deviations over 120 runs of each."""
    truths = {
        "errors": {"mean": 0.2, "arms": {"b": {"times": 2}}},
        "minutes": {"mean": 7, "sd": 1e-9},
    }
    world = load(
        experiment=DRAWN,
        truths=truths,
        traffic={"units_per_hour": 7200},
        looks="20s",
        horizon="160s",
        lateness=f"{LATENESS_S}s",
        delays={"mean": f"{WINDOW_S}s"},
        contexts={"segment": "device", "shares": {"tv": 0.5, "phone": 0.5}},
    )
    looks = (2, 3, 6, 8)
    compared = 0
    for (look, drawn), (_, real) in zip(
        drawn_rows(world, looks), folded_rows(world.spec, looks), strict=True
    ):
        ours, theirs = table(drawn), table(real)
        assert ours.keys() == theirs.keys(), look
        for key, values in ours.items():
            others = theirs[key]
            for column in range(3):
                one, two = values[:, column], others[:, column]
                error = math.sqrt((one.var() + two.var()) / FOLDS)
                assert abs(one.mean() - two.mean()) <= 4.5 * error + 1e-9, (look, key, column)
                if one.mean() > 5 and two.std() > 0:
                    assert 0.6 < one.std() / two.std() < 1.7, (look, key, column)
                compared += 1
    assert compared > 300


def test_units_count_at_once_and_values_when_their_window_is_over(load):
    world = load(lateness="30m", looks="30m")
    drawn = Drawn(world, 1, np.random.default_rng(1))
    drawn.follow(0, next_config(None, next_record(None, world.spec, effective_ms=0)), 0)
    units = []
    for look in range(1, 4):
        units += [drawn.draw(span).sum() for span in drawn.stretches(look)]
        drawn.mature(look * 30 * 60_000)
        (statistics,) = drawn.statistics([0])
        assert sum(row.units for row in statistics.units) == sum(units)
        # Stretches are 20 and 10 minutes long; 40 minutes after a stretch its units count.
        counted = sum(row.n for row in statistics.moments)
        assert counted == sum(units[: [0, 1, 3][look - 1]])
    assert 0 <= statistics.first_exposure_ms < 60_000


@pytest.mark.parametrize("shape", ["exponential", "lognormal"])
def test_share_of_rewards_that_come_in_time(shape):
    delays = Delays(mean="10m", distribution=DelayShape(shape), sigma=0.8)
    rng = np.random.default_rng(1)
    drawn = {
        "exponential": lambda: rng.exponential(10, 200_000),
        "lognormal": lambda: rng.lognormal(math.log(10) - 0.32, 0.8, 200_000),
    }[shape]()
    assert in_time(delays, 15 * 60_000, "a") == pytest.approx((drawn < 15).mean(), abs=0.005)
    assert in_time(None, 1, "a") == 1.0


def test_truths_drift_begin_fade_and_wait_for_a_stage(load):
    effect = {"times": 3, "since": "1h", "half_life": "1h"}
    drift = [{"at": "0h", "times": 1}, {"at": "2h", "times": 2}]
    world = load(truths={"errors": {"mean": 0.1, "drift": drift, "arms": {"b": effect}}})
    truths = Truths(world, 1)
    means = [truths.means(0, at * HOUR_MS)[0, 0].tolist() for at in (0, 1, 2, 3)]
    wanted = [[0.1, 0.1], [0.15, 0.45], [0.2, 0.4], [0.2, 0.3]]
    assert means == [pytest.approx(one) for one in wanted]

    staged = load(
        experiment=experiment(ramp={"stages": [{"coverage": 0.5}, {"coverage": 1}]}),
        truths={"errors": {"mean": 0.1, "arms": {"b": {"times": 2, "stage": 1}}}},
    )
    truths = Truths(staged, 2)
    truths.reached(0, 0, 5.0)
    truths.reached(1, 1, 7.0)
    assert truths.harming(8.0).tolist() == [[False, False], [False, True]]
    assert truths.means(0, 8.0)[:, 0, 1].tolist() == pytest.approx([0.1, 0.2])
    assert truths.can_harm(staged)


@pytest.mark.parametrize(
    ("metric", "arms", "harms"),
    [
        ({}, {"b": {"times": 1.01}}, True),
        ({}, {"b": {"times": 0.9}}, False),
        ({"direction": "increase"}, {"b": {"times": 0.9}}, True),
        ({"role": "primary", "margin": None, "critical": None}, {"b": {"times": 2}}, False),
        # No more than the margin allows, and a little more.
        (HARMLESS, {"b": {"times": 1.5}}, False),
        (HARMLESS, {"b": {"times": 1.51}}, True),
        ({"critical": False, "margin": {"relative": 0.2}}, {"b": {"times": 1.19}}, False),
        ({"critical": False, "margin": {"relative": 0.2}}, {"b": {"times": 1.21}}, True),
        # Against the control, whatever the baseline is.
        ({}, {"a": {"times": 1.5}, "b": {"times": 1.4}}, False),
        ({}, {"a": {"times": 0.5}}, True),
    ],
)
def test_an_arm_harms_beyond_what_its_guardrail_tolerates(load, metric, arms, harms):
    of_metric = {**experiment()["metrics"][0], **metric}
    of_metric = {name: value for name, value in of_metric.items() if value is not None}
    world = load(experiment=experiment(metrics=[of_metric]), truths={"errors": {"mean": 0.1, "arms": arms}})
    truths = Truths(world, 1)
    assert truths.harming(0.0).tolist() == [[False, harms]]
    assert truths.can_harm(world) is harms


def test_harm_in_one_context_counts_with_its_share(load):
    def harms(tv, phone):
        contexts = {"tv": {"b": tv}, "phone": {"b": phone}}
        world = load(
            experiment=experiment(segments={"device": ["tv", "phone"]}),
            contexts={"segment": "device", "shares": {"tv": 0.25, "phone": 0.75}},
            truths={"errors": {"mean": 0.1, "contexts": contexts}},
        )
        return bool(Truths(world, 1).harming(0.0)[0, 1])

    assert harms(1.5, 1.0)
    assert not harms(1.5, 0.8)


def test_the_true_effect_is_that_of_the_units_counted(load):
    """Some of the units come before the effect begins, to the minute, and those that are not mature are left out."""
    world = load(
        truths={"errors": {"mean": 0.1, "arms": {"b": {"times": 3, "since": "65m"}}}},
        traffic={"units_per_hour": 1e6},
    )
    drawn = Drawn(world, 1, np.random.default_rng(1))
    drawn.follow(0, next_config(None, next_record(None, world.spec, effective_ms=0)), 0)
    found = []
    for look in range(1, 5):
        for span in drawn.stretches(look):
            drawn.draw(span)
        drawn.mature(look * 30 * 60_000)
        found.append(drawn.true_effect(0, 0, 1))
    # Of the units until 1:50 those of the last 45 minutes have the effect.
    assert found[1] == (0.0, pytest.approx(0.1))
    assert found[3] == (pytest.approx(0.2 * 45 / 110, rel=0.01), pytest.approx(0.1))
    assert drawn.true_effect(0, 0, 0) == (0.0, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("state", "effect", "wrong"),
    [
        ("worse", 0.0, True),
        ("worse", 0.01, False),
        ("better", 0.01, True),
        ("better", -0.01, False),
        ("harmed", 0.049, True),
        ("harmed", 0.051, False),
        ("safe", 0.049, False),
        ("safe", 0.05, True),
        ("inconclusive", 0.0, False),
    ],
)
def test_what_is_called_proven_is_held_against_the_truth(load, monkeypatch, state, effect, wrong):
    metric = {**experiment()["metrics"][0], **HARMLESS}
    simulation = _Simulation(load(experiment=experiment(metrics=[metric])), 1, np.random.default_rng(1))
    monkeypatch.setattr(Drawn, "true_effect", lambda *_: (effect, 0.1))
    claim = MetricResult("errors", "guardrail", "b", MetricState(state), Method.ASYMPTOTIC, 100, 100)
    assert simulation._is_wrong(0, claim) is wrong


def test_rewards_come_by_their_delays(load):
    """After any time the share that has come is that of the distribution, and after the window all have come."""
    world = load(delays={"mean": "5m", "arms": {"b": "1m"}})
    early = Early(world, 1, np.random.default_rng(1))
    units, rewards = np.full((1, 2), 100_000), np.full((1, 2), 50_000)
    early.expose(0, 0.0, units, rewards)
    for minute in (2, 5, 10):
        early.look(minute * 60_000)
        come = [(1 - math.exp(-minute / mean)) / (1 - math.exp(-10 / mean)) for mean in (5, 1)]
        assert early.counts[0, 1, 0] / 50_000 == pytest.approx(come, abs=0.01)
        assert early.counts[0, 0].tolist() == units.tolist()
    assert early.counts[0, 1].tolist() == early.counts[0, 2].tolist() == rewards.tolist()


def test_open_units_are_counted_by_their_ages(load):
    """Units of a stretch reach 2, 6 and 10 minutes at the looks after; conversions take 4 minutes on average."""
    allocation = {
        key: value for key, value in FOLLOWED["allocation"].items() if not key.startswith("uniform")
    }
    world = load(
        experiment={**FOLLOWED, "allocation": allocation},
        truths={"take": {"mean": 0.5, "arms": {"b": {"times": 1.5}}}},
        traffic={"units_per_hour": 60_000},
        looks="2m",
        horizon="20m",
        delays={"mean": "4m", "arms": {"b": "1m"}},
    )
    drawn = Drawn(world, 20, np.random.default_rng(1))
    record = next_record(None, world.spec, effective_ms=0)
    for run in range(20):
        drawn.follow(run, next_config(None, record), 0)
    for look in range(1, 8):
        for span in drawn.stretches(look):
            drawn.draw(span)
        drawn.mature(look * 120_000)
    found = drawn.statistics(list(range(20)))
    sums = defaultdict(lambda: np.zeros((len(found), 2)))
    for run, one in enumerate(found):
        for row in one.moments:
            sums[row.metric, row.arm][run] = row.n, int(row.s)
    assert {name for name, _ in sums} == {"take", "take@by1", "take@by2", "take@by3"}
    for arm, mean, delay in (("a", 0.5, 4), ("b", 0.75, 1)):
        assert (sums["take", arm] == sums["take@by3", arm]).all()
        for name, age, stretches in (("take@by1", 2, 6), ("take@by2", 6, 4), ("take@by3", 10, 2)):
            n, s = sums[name, arm].sum(axis=0)
            assert n == pytest.approx(20 * stretches * 2000 * world.spec.weights[arm], rel=0.03)
            rate = mean * -math.expm1(-age / delay)
            assert s / n == pytest.approx(rate, abs=4.5 * math.sqrt(rate / n))
    before = {(row.metric, row.arm): (int(row.x), row.x == row.xx == row.xy) for row in found[0].products}
    assert {name for name, _ in before} == {"take@by2", "take@by3"}
    assert all(same for _, same in before.values())
    of_a = [
        int(row.x)
        for one in found
        for row in one.products
        if (row.metric, row.arm, row.segment) == ("take@by2", "a", "")
    ]
    came = 0.5 * -math.expm1(-2 / 4)
    assert sum(of_a) / sums["take@by2", "a"][:, 0].sum() == pytest.approx(came, rel=0.05)
