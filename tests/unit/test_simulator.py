"""The simulator's truth is recounted from the bytes it gives, record by record, by docs/semantics.md."""

import math
from collections import Counter, defaultdict

import msgspec
import pytest

from stream_xp.domain.codec import RawRecord, decode_exposure, decode_reward
from stream_xp.domain.experiment import Arm, Direction, ExperimentSpec, Metric, MetricKind, Role
from stream_xp.domain.experiment_rules import rules
from stream_xp.domain.statistics import build
from stream_xp.errors import ConfigError, Reason, RecordRejected
from stream_xp.simulator import (
    EXPOSURES,
    MALFORMED,
    REWARDS,
    START_MS,
    Conversion,
    ExperimentTraffic,
    Faults,
    LogNormal,
    Scenario,
    Since,
    WeightChange,
    generate,
)

LATENESS_MS = 500
ALL_FAULTS = Faults(
    duplicated=0.03,
    out_of_order=0.1,
    late=0.02,
    malformed=0.01,
    crossovers=0.02,
    reward_first=0.5,
    repeated=0.1,
    strays=0.05,
)


def conversion(probability, **since):
    return Since(outcome=Conversion(probability=probability), **since)


def a_spec(key="shop", **changes):
    fields = {
        "experiment": key,
        "owner": "team",
        "hypothesis": "it is better",
        "unit": "member",
        "arms": (Arm(key="old", weight=0.7, control=True), Arm(key="new", weight=0.3)),
        "metrics": (
            Metric(
                key="order",
                kind=MetricKind.CONVERSION,
                role=Role.PRIMARY,
                direction=Direction.INCREASE,
                attribution_window="1s",
            ),
            Metric(
                key="revenue",
                event="payment",
                kind=MetricKind.MEAN,
                role=Role.SECONDARY,
                direction=Direction.INCREASE,
                attribution_window="2s",
                scale=0.01,
                bound=100.0,
            ),
        ),
        "planned_sample": 10_000,
        "segments": {"country": ("se", "us"), "device": ("tv", "web", "phone")},
        **changes,
    }
    return ExperimentSpec(**fields)


def a_traffic(key="shop", **changes):
    revenue = LogNormal(log_mean=2.0, log_sd=1.5, probability=0.4)
    fields = {
        "spec": a_spec(key),
        "units_per_s": 500.0,
        "outcomes": {
            "order": {
                "old": (conversion(0.1),),
                "new": (conversion(0.1), conversion(0.4, from_ms=4_000)),
            },
            "revenue": {"old": (Since(outcome=revenue),), "new": (Since(outcome=revenue),)},
        },
        "weight_changes": (WeightChange(from_ms=3_000, weights={"old": 0.5, "new": 0.5}),),
        **changes,
    }
    return ExperimentTraffic(**fields)


def a_scenario(**changes):
    plain = a_spec("plain", segments={}, metrics=a_spec().metrics[:1])
    outcomes = {"order": {"old": (conversion(0.3),), "new": (conversion(0.3),)}}
    second = ExperimentTraffic(spec=plain, units_per_s=200.0, outcomes=outcomes)
    fields = {
        "experiments": (a_traffic(), second),
        "duration_ms": 8_000,
        "allowed_lateness_ms": LATENESS_MS,
        "faults": ALL_FAULTS,
        **changes,
    }
    return Scenario(**fields)


class Recount:
    """A batch recomputation, one record after another, of what docs/semantics.md says."""

    def __init__(self, traffic, start_ms):
        self.specs = {t.spec.experiment: t.spec for t in traffic.scenario.experiments}
        self.epochs = {t.spec.experiment: t.epochs(start_ms) for t in traffic.scenario.experiments}
        self.outcomes = {EXPOSURES: Counter(), REWARDS: Counter()}
        self.dead = Counter()
        self.exposures, self.rewards, seen = defaultdict(list), [], set()
        for event in traffic.events(start_ms):
            self.outcomes[event.topic]["in"] += 1
            log_ms = start_ms + event.send_ms
            outcome, decoded = self.check(event, RawRecord(event.key, event.value, (), log_ms))
            if outcome is None and log_ms - decoded.time > LATENESS_MS:
                outcome = "late"
            elif outcome is None and (event.topic, decoded.source, decoded.id) in seen:
                outcome = "duplicate"
            if outcome is not None:
                self.outcomes[event.topic][outcome] += 1
                continue
            seen.add((event.topic, decoded.source, decoded.id))
            if event.topic == EXPOSURES:
                self.exposures[decoded.experiment, decoded.unit].append(decoded)
            else:
                self.rewards.append(decoded)
        self.attribute()

    def check(self, event, record):
        try:
            decoded = (decode_exposure if event.topic == EXPOSURES else decode_reward)(record)
            if decoded.experiment is not None:
                if decoded.experiment not in self.specs:
                    return "unknown_experiment", None
                self.check_names(event.topic, decoded)
        except RecordRejected as rejection:
            self.dead[event.topic, rejection.reason] += 1
            return "dead_lettered", None
        return None, decoded

    def check_names(self, topic, decoded):
        if topic == EXPOSURES and decoded.arm not in self.specs[decoded.experiment].weights:
            raise RecordRejected(Reason.UNKNOWN_ARM, decoded.arm)
        if topic == EXPOSURES and decoded.weight_epoch >= len(self.epochs[decoded.experiment]):
            raise RecordRejected(Reason.UNKNOWN_WEIGHT_EPOCH, "")

    def attribute(self):
        self.first = {who: min(seen, key=lambda e: e.time) for who, seen in self.exposures.items()}
        self.crossed = {who for who, seen in self.exposures.items() if len({e.arm for e in seen}) > 1}
        for who, seen in self.exposures.items():
            self.outcomes[EXPOSURES]["crossover" if who in self.crossed else "counted"] += len(seen)
        self.values = defaultdict(int)
        for reward in self.rewards:
            hits = [
                (experiment, metric)
                for experiment, spec in self.specs.items()
                for metric in spec.metrics
                if metric.listens_to == reward.metric and (experiment, reward.unit) in self.first
                if 0 <= reward.time - self.first[experiment, reward.unit].time < metric.window_ms
            ]
            self.outcomes[REWARDS]["counted" if hits else "unattributed"] += 1
            for experiment, metric in hits:
                steps = round(reward.value / metric.step)
                assert abs(steps) <= metric.max_steps
                self.values[experiment, metric.key, reward.unit] += steps

    def statistics(self, experiment):
        units, moments = Counter(), {}
        for (name, unit), exposure in self.first.items():
            if name != experiment or (name, unit) in self.crossed:
                continue
            for segment in ["", *(f"{dimension}={v}" for dimension, v in exposure.segments.items())]:
                cell = (exposure.arm, exposure.weight_epoch, segment)
                units[cell] += 1
                for metric in self.specs[name].metrics:
                    y = self.values[name, metric.key, unit]
                    n, s, q = moments.get((metric.key, *cell), (0, 0, 0))
                    moments[metric.key, *cell] = (n + 1, s + y, q + y * y)
        times = [e.time for (name, _), seen in self.exposures.items() if name == experiment for e in seen]
        return build(
            units=units,
            moments=moments,
            crossover_units=sum(name == experiment for name, _ in self.crossed),
            first_exposure_ms=min(times, default=None),
            out_of_range={},
        )


@pytest.fixture(scope="module")
def traffic():
    return generate(a_scenario(), 7)


def test_same_seed_and_start_give_the_same_bytes(traffic):
    assert list(generate(a_scenario(), 7).events()) == list(traffic.events())


def test_another_seed_gives_other_traffic(traffic):
    other = generate(a_scenario(), 8)
    assert list(other.events()) != list(traffic.events())
    assert other.truth().units("shop") != traffic.truth().units("shop")


def test_a_change_in_one_experiment_leaves_the_others_as_they_were():
    quiet = a_scenario(faults=Faults())
    first = ExperimentTraffic(
        **{**{n: getattr(a_traffic(), n) for n in a_traffic().__slots__}, "units_per_s": 90.0}
    )
    changed = a_scenario(faults=Faults(), experiments=(first, quiet.experiments[1]))
    before, after = generate(quiet, 3).truth(), generate(changed, 3).truth()
    assert before.statistics["plain"] == after.statistics["plain"]
    assert before.statistics["shop"] != after.statistics["shop"]


@pytest.mark.parametrize("faults", [Faults(), ALL_FAULTS], ids=["no faults", "all faults"])
@pytest.mark.parametrize("seed", [1, 2])
def test_truth_equals_a_recount_of_the_bytes(seed, faults):
    traffic = generate(a_scenario(faults=faults), seed)
    truth, recount = traffic.truth(), Recount(traffic, START_MS)
    for topic, outcomes in ((EXPOSURES, truth.exposure_outcomes), (REWARDS, truth.reward_outcomes)):
        assert outcomes.conserved()
        found = {name: count for name, count in msgspec.to_builtins(outcomes).items() if count}
        assert found == dict(recount.outcomes[topic])
        assert outcomes.read == traffic.count(topic)
    assert truth.dead_letters == dict(recount.dead)
    for experiment, statistics in truth.statistics.items():
        assert statistics.canonical() == recount.statistics(experiment).canonical()


def test_every_fault_is_counted(traffic):
    truth = traffic.truth()
    assert set(truth.injected) == set(Faults.__dataclass_fields__)
    assert all(truth.injected.values())
    both = (truth.exposure_outcomes, truth.reward_outcomes)
    assert sum(o.late for o in both) == truth.injected["late"]
    assert sum(o.duplicate for o in both) == truth.injected["duplicated"]
    assert sum(o.dead_lettered + o.unknown_experiment for o in both) == truth.injected["malformed"]
    # A stray may be a copy, and a reward whose exposure was late has nowhere to go either.
    assert truth.reward_outcomes.unattributed >= truth.injected["strays"]
    crossed = sum(s.crossover_units for s in truth.statistics.values())
    assert 0.9 * truth.injected["crossovers"] <= crossed <= truth.injected["crossovers"]


def test_without_faults_every_record_counts():
    traffic = generate(a_scenario(faults=Faults()), 5)
    truth = traffic.truth()
    for outcomes in (truth.exposure_outcomes, truth.reward_outcomes):
        assert outcomes.counted == outcomes.read > 0
    events = list(traffic.events())
    times = [msgspec.json.decode(event.value)["time"] for event in events]
    assert times == [START_MS + event.send_ms for event in events]


@pytest.mark.parametrize("entry", MALFORMED, ids=lambda entry: f"{entry.name} in {entry.topic}")
def test_each_malformed_record_is_refused_for_its_reason(entry):
    count = 3 * len(MALFORMED)
    traffic = generate(a_scenario(faults=Faults(malformed=0.02)), 1)
    assert traffic.injected["malformed"] > count
    decode = decode_exposure if entry.topic == EXPOSURES else decode_reward
    known = traffic.scenario.experiments[0].spec
    position = MALFORMED.index(entry)
    records = [e for e in traffic.events() if e.key is None or not e.key.startswith((b"shop-", b"plain-"))]
    # The corpus is gone through in order of time.
    event = records[position]
    assert event.topic == entry.topic
    record = RawRecord(event.key, event.value, (), START_MS + event.send_ms)
    if entry.reason is None:
        assert decode(record).experiment == "no-such-test"
    elif entry.reason is Reason.UNKNOWN_ARM:
        assert decode(record).arm not in known.weights
    elif entry.reason is Reason.UNKNOWN_WEIGHT_EPOCH:
        assert decode(record).weight_epoch == 999_999
    else:
        with pytest.raises(RecordRejected) as refusal:
            decode(record)
        assert refusal.value.reason is entry.reason


def test_records_come_in_order_of_sending_and_chunks_hold_all_of_them(traffic):
    sent = [event.send_ms for event in traffic.events()]
    assert sent == sorted(sent)
    assert sent[-1] == traffic.last_send_ms
    chunks = list(traffic.chunks(START_MS, chunk_ms=20))
    assert [event for chunk in chunks for event in chunk.events] == list(traffic.events())
    for chunk in chunks:
        assert all(chunk.due_ms - 20 <= event.send_ms < chunk.due_ms for event in chunk.events)


def test_start_moves_event_times_only(traffic):
    here, there = traffic.truth(START_MS), traffic.truth(START_MS + 1_000)
    assert here.statistics["shop"].first_exposure_ms + 1_000 == there.statistics["shop"].first_exposure_ms
    assert here.statistics["shop"].units == there.statistics["shop"].units
    first, moved = next(traffic.events(START_MS)), next(traffic.events(START_MS + 1_000))
    assert first.send_ms == moved.send_ms
    assert msgspec.json.decode(first.value)["time"] + 1_000 == msgspec.json.decode(moved.value)["time"]


def test_rates_and_weights_are_right_within_monte_carlo_error():
    traffic = generate(a_scenario(duration_ms=60_000, faults=Faults()), 11)
    shop = traffic.truth().statistics["shop"]
    units = {(row.arm, row.epoch): row.units for row in shop.units if row.segment == ""}
    assert_poisson(sum(units.values()), 60 * 500)
    for epoch, weight, seconds in ((0, 0.3, 3), (1, 0.5, 57)):
        total = units["old", epoch] + units["new", epoch]
        assert_poisson(total, 500 * seconds)
        assert_binomial(units["new", epoch], total, weight)
    moments = {(m.metric, m.arm, m.epoch): m for m in shop.moments if m.segment == ""}
    for arm, epoch, rate in (("old", 0, 0.1), ("old", 1, 0.1), ("new", 0, 0.1)):
        cell = moments["order", arm, epoch]
        assert_binomial(int(cell.s), cell.n, rate)
    # One second of 57 passes before the change of the truth at 4 s.
    after = moments["order", "new", 1]
    assert_binomial(int(after.s), after.n, (0.1 + 56 * 0.4) / 57)


def test_harm_begins_at_its_onset():
    outcomes = {
        "order": {"old": (conversion(0.0),), "new": (conversion(0.0), conversion(1.0, from_ms=2_000))}
    }
    traffic = generate(a_scenario(experiments=(a_traffic(outcomes=outcomes),), faults=Faults()), 2)
    exposed = {}
    for event in traffic.events():
        body = msgspec.json.decode(event.value)
        if event.topic == EXPOSURES:
            exposed[body["unit"]] = (body["time"] - START_MS, body["arm"])
        else:
            at_ms, arm = exposed[body["unit"]]
            assert at_ms >= 2_000
            assert arm == "new"
    total = sum(at_ms >= 2_000 and arm == "new" for at_ms, arm in exposed.values())
    assert traffic.count(REWARDS) == total > 0


def test_lognormal_values_lie_on_the_grid_inside_the_bound():
    wild = LogNormal(log_mean=3.0, log_sd=2.0)
    outcomes = {"revenue": {"old": (Since(outcome=wild),), "new": (Since(outcome=wild),)}}
    traffic = generate(a_scenario(experiments=(a_traffic(outcomes=outcomes),), faults=Faults()), 2)
    values = [
        msgspec.json.decode(event.value)["value"] for event in traffic.events() if event.topic == REWARDS
    ]
    assert max(values) == 100.0
    assert all(math.isclose(value / 0.01, round(value / 0.01), rel_tol=1e-12) for value in values)
    below = sum(value < math.exp(3.0) for value in values)
    assert_binomial(below, len(values), 0.5)


def test_statistics_at_a_watermark_hold_what_is_mature():
    traffic = generate(a_scenario(faults=Faults()), 4)
    part, end = traffic.history("shop", [5_000, 10**9])
    exposures = [e for e in map(decoded_exposure, traffic.events()) if e and e["experiment"] == "shop"]
    for metric, wait_ms in (("order", 1_000), ("revenue", 2_000)):
        mature = sum(e["time"] - START_MS + wait_ms + LATENESS_MS <= 5_000 for e in exposures)
        assert sum(m.n for m in part.moments if (m.metric, m.segment) == (metric, "")) == mature
    assert sum(row.units for row in part.units if row.segment == "") == sum(
        e["time"] - START_MS <= 5_000 for e in exposures
    )
    assert end == traffic.statistics("shop")
    assert not traffic.history("shop", [-1])[0].units


def decoded_exposure(event):
    return msgspec.json.decode(event.value) if event.topic == EXPOSURES else None


def test_exact_sums_of_large_values():
    metric = Metric(
        key="big",
        kind=MetricKind.MEAN,
        role=Role.PRIMARY,
        direction=Direction.INCREASE,
        attribution_window="1s",
        scale=1.0,
        bound=float(2**40),
    )
    spec = a_spec("big", metrics=(metric,), segments={})
    huge = Since(outcome=LogNormal(log_mean=60.0, log_sd=0.0))
    outcomes = {"big": {"old": (huge,), "new": (huge,)}}
    only = ExperimentTraffic(spec=spec, units_per_s=200.0, outcomes=outcomes)
    cells = generate(a_scenario(experiments=(only,), faults=Faults()), 1).truth().statistics["big"].moments
    most = metric.max_steps
    assert most >= 2**40
    assert all(int(cell.s) == cell.n * most and int(cell.q) == cell.n * most**2 for cell in cells)
    assert sum(cell.n for cell in cells) > 100


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: a_scenario(duration_ms=0), "duration"),
        (lambda: a_scenario(experiments=()), "needs an experiment"),
        (lambda: a_scenario(experiments=(a_traffic(), a_traffic())), "different keys"),
        (lambda: a_scenario(faults=Faults(late=1.5)), "faults.late"),
        (lambda: a_scenario(allowed_lateness_ms=0), "allowed lateness"),
        (lambda: one(units_per_s=0.0), "units_per_s"),
        (lambda: one(outcomes={"clicks": {}}), "'clicks', which is no metric"),
        (lambda: one(outcomes={"order": {"old": (conversion(0.1),)}}), "every arm"),
        (
            lambda: one(
                outcomes={"order": {"old": (conversion(0.1, from_ms=5),), "new": (conversion(0.1),)}}
            ),
            "0 ms",
        ),
        (
            lambda: one(outcomes={"order": {"old": (conversion(1.1),), "new": (conversion(0.1),)}}),
            "probability",
        ),
        (
            lambda: one(weight_changes=(WeightChange(from_ms=0, weights={"old": 1.0, "new": 0.0}),)),
            "after 0 ms",
        ),
        (
            lambda: one(weight_changes=(WeightChange(from_ms=9, weights={"old": 0.5, "new": 0.4}),)),
            "sum to 1",
        ),
        (lambda: one(weight_changes=(WeightChange(from_ms=9, weights={"old": 1.0}),)), "all arms"),
        (lambda: one(spec=a_spec(arms=(Arm(key="old", weight=1.0), Arm(key="new", weight=0.0)))), "control"),
        (lambda: one(spec=a_spec(metrics=(*a_spec().metrics, same_event()))), "same event"),
        (lambda: one(spec=a_spec(metrics=(*a_spec().metrics, a_count()))), "conversions and means"),
        (lambda: one(reward_delay_ms=0.0), "reward_delay_ms"),
        (lambda: one(outcomes={"order": {"old": (), "new": ()}}), "every arm"),
        (lambda: one(outcomes={"revenue": dict.fromkeys(("old", "new"), (narrow(-1.0),))}), "log_sd"),
    ],
)
def test_a_scenario_that_contradicts_itself_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def one(**changes):
    return a_scenario(experiments=(a_traffic(**changes),))


def narrow(log_sd):
    return Since(outcome=LogNormal(log_mean=0.0, log_sd=log_sd))


def a_count():
    return msgspec.structs.replace(a_spec().metrics[0], key="errors", kind=MetricKind.COUNT)


def same_event():
    return msgspec.structs.replace(a_spec().metrics[0], key="order2", event="order")


def test_an_arm_of_weight_0_is_met_by_crossovers_without_a_propensity():
    traffic = a_traffic(weight_changes=(WeightChange(from_ms=1, weights={"old": 1.0, "new": 0.0}),))
    drawn = generate(a_scenario(experiments=(traffic,), faults=Faults(crossovers=0.1)), 1)
    assert drawn.truth().exposure_outcomes.crossover > 0
    assert Recount(drawn, START_MS).outcomes[EXPOSURES]["dead_lettered"] == 0


def test_the_record_for_the_topic_of_experiments_is_a_valid_one():
    record = a_traffic().record(START_MS)
    assert not rules(record.spec)
    assert [epoch.effective_ms for epoch in record.epochs] == [START_MS, START_MS + 3_000]
    assert [epoch.epoch for epoch in record.epochs] == [0, 1]
    assert record.design_hash == record.spec.design_hash()


def assert_binomial(hits, n, probability):
    """A test at 4.5 standard errors: one false alarm in 100,000."""
    assert abs(hits - n * probability) <= 4.5 * math.sqrt(n * probability * (1 - probability))


def assert_poisson(count, mean):
    assert abs(count - mean) <= 4.5 * math.sqrt(mean)
