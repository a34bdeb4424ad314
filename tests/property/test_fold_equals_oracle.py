"""The engine's fold against the oracle, byte for byte, over any traffic, batching and interleaving."""

from __future__ import annotations

import json
import random
from collections import Counter

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.domain.statistics import Outcomes
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot, state_of
from stream_xp.engine.snapshot_log import SnapshotReader, SnapshotWriter
from stream_xp.engine.state import EXPOSURES, MAX_UNITS, REWARDS, PartitionState
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec, recompute

LATENESS_MS = 50
DELAY_MS = 20
LIMITS = Limits(record_bytes=2000, future_ms=100)
START_MS = 1_000


def _metric(key, window_ms, **fields):
    return {"key": key, "direction": "increase", "attribution_window": f"{window_ms}ms", **fields}


def _spec(experiment, version, metrics, segments=None, **fields):
    arms = [
        {"key": "a", "weight": 0.5, "control": True},
        {"key": "b", "weight": 0.3},
        {"key": "c", "weight": 0.2},
    ]
    return msgspec.convert(
        {
            "experiment": experiment,
            "version": version,
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": arms,
            "metrics": metrics,
            "segments": segments or {},
            **fields,
        },
        ExperimentSpec,
    )


RICH = [
    _metric("click", 60, kind="conversion", role="primary"),
    _metric("spend", 60, kind="mean", role="secondary", scale=0.01, bound=100.0, event="order"),
    _metric(
        "top", 90, kind="mean", role="secondary", scale=0.5, bound=10.0, event="order", aggregation="max"
    ),
    _metric(
        "latest", 30, kind="mean", role="secondary", scale=1.0, bound=50.0, event="order", aggregation="last"
    ),
    _metric("bought", 90, kind="mean", role="secondary", bound=1.0, event="order", aggregation="any"),
]
SEGMENTS = {"device": ["ios", "web"], "plan": ["free"]}
PLAIN = [_metric("click", 40, kind="conversion", role="primary")]


def _latency(key, window_ms, **fields):
    return _metric(key, window_ms, kind="latency", role="secondary", event="wait", **fields)


def _ratio(key, window_ms, denominator, **fields):
    made = _metric(key, window_ms, kind="ratio", role="secondary", event="order", bound=60, scale=0.5)
    return {**made, "denominator": denominator, **fields}


COVARIATE = {"scale": 0.25, "bound": 1e3, "missing": -3.1}
# Nothing at its end alone: a unit of it never matures.
ONCE = [
    _metric("visits", 70, kind="count", role="primary", event="visit"),
    {**_latency("first", 50, scale=0.125, bound=80), "role": "primary"},
]
KINDS = [
    *ONCE,
    _metric("click", 60, kind="conversion", role="secondary", adjustment="cuped"),
    _metric("spend", 60, kind="mean", role="secondary", event="order", bound=50, adjustment="ancova"),
    _metric("visited", 40, kind="count", role="secondary", event="visit", aggregation="sum"),
    _latency("slowest", 90, scale=1, bound=60, aggregation="max"),
    _latency("newest", 30, scale=0.001, bound=1000, aggregation="last"),
    _ratio("per_visit", 60, {"event": "visit", "bound": 5}),
    _ratio("both", 60, {"event": "order", "bound": 20, "aggregation": "max"}, aggregation="last"),
    _ratio("per_visitor", 90, {"event": "visit", "aggregation": "any"}, aggregation="max"),
    _ratio("newest_wait", 30, {"event": "wait", "bound": 90, "scale": 0.1, "aggregation": "last"}),
]


def _record(spec, epochs=1, status=Status.ACTIVE, *, final=(), shift_ms=0):
    over = {"weights": {"a": 1.0, "b": 0.0, "c": 0.0}, "coverage": 0.0, "final": True, "signal_id": "s"}
    return ExperimentRecord(
        spec=spec,
        epochs=tuple(
            WeightEpoch(
                **{"epoch": e, "weights": spec.weights, "effective_ms": START_MS + 60 * e + shift_ms}
                | (over if e in final else {})
            )
            for e in range(epochs)
        ),
        design_hash=spec.design_hash(),
        status=status,
    )


ONE, TWO, PLAIN_ONE = _spec("one", 1, RICH, SEGMENTS), _spec("one", 2, RICH), _spec("plain", 1, PLAIN)
ALL_KINDS = _spec("kinds", 1, KINDS, SEGMENTS, covariate=COVARIATE)
ONLY_ONCE = _spec("once", 1, ONCE)
# Buckets inside the attribution window, across its end and after it; of each fold that has some.
AGED = [
    _metric("click", 60, kind="conversion", role="primary"),
    _metric("spend", 30, kind="mean", role="secondary", event="order", scale=0.5, bound=60.0),
    _metric("visited", 45, kind="count", role="secondary", event="visit", aggregation="sum"),
    _metric("any", 90, kind="mean", role="secondary", event="order", bound=50.0, aggregation="any"),
    _ratio("per_visit", 60, {"event": "visit", "bound": 5}),
]
AGES = {"metrics": ["visited", "click", "spend", "any"], "until": ["20ms", "45ms", "90ms", "110ms"]}
OF_AGES = _spec("aged", 1, AGED, SEGMENTS, ages=AGES)
# Ages inside the window, one of them the end of a bucket of age; click is in both sections.
OPEN = {"policy": "thompson", "metric": "click", "delay": {"ages": ["10ms", "45ms", "50ms"]}}
OF_OPEN = _spec("open", 1, AGED, SEGMENTS, ages=AGES, allocation=OPEN)
HISTORIES = [
    [(900, "kinds", _record(ALL_KINDS)), (900, "once", _record(ONLY_ONCE))],
    [
        (900, "once", _record(ONLY_ONCE)),
        (900, "one", _record(ONE)),
        (950, "kinds", _record(ALL_KINDS)),
        (1060, "kinds", _record(ALL_KINDS, epochs=3)),
        (1130, "once", None),
    ],
    [(900, "one", _record(ONE)), (900, "plain", _record(PLAIN_ONE))],
    [(900, "one", _record(ONE)), (1040, "one", _record(ONE, epochs=2)), (1050, "plain", _record(PLAIN_ONE))],
    [
        (900, "one", _record(ONE)),
        (1080, "one", _record(TWO)),
        (900, "plain", _record(PLAIN_ONE)),
        (1100, "plain", None),
    ],
    [(900, "plain", _record(PLAIN_ONE)), (1060, "plain", _record(PLAIN_ONE, status=Status.ARCHIVED))],
    [],
    [
        (900, "aged", _record(OF_AGES)),
        (950, "plain", _record(PLAIN_ONE)),
        (1060, "aged", _record(OF_AGES, epochs=3)),
    ],
    [
        (900, "plain", _record(PLAIN_ONE)),
        (900, "one", _record(ONE, epochs=2)),
        (1020, "plain", _record(PLAIN_ONE, epochs=3, final=[2])),
        (1040, "one", _record(ONE, epochs=3, final=[1])),
        (1060, "one", _record(ONE, epochs=4, final=[3])),
    ],
]

times = st.integers(min_value=0, max_value=160).map(lambda t: START_MS + t)
units = st.sampled_from(["u1", "u2", "u3", "u4", "ü5"])
delays = st.one_of(st.integers(0, 8), st.integers(-110, LATENESS_MS + 4))
exposures = st.fixed_dictionaries(
    {
        "id": st.integers(0, 12).map(str),
        "time": times,
        "experiment": st.sampled_from(
            ["one", "one", "plain", "kinds", "kinds", "once", "aged", "aged", "nobody"]
        ),
        "unit": units,
        "arm": st.sampled_from(["a", "b", "b", "c", "zz"]),
    },
    optional={
        "weight_epoch": st.integers(0, 3),
        "segments": st.dictionaries(
            st.sampled_from(["device", "plan", "age"]),
            st.sampled_from(["ios", "web", "free", "x"]),
            max_size=2,
        ),
        "source": st.sampled_from(["", "s"]),
        "covariate": st.one_of(
            st.sampled_from([0.0, 0.125, 0.375, -0.125, 1000.2, -1e4, 1e300, -1e308]), st.floats(-9, 9)
        ),
    },
)
rewards = st.fixed_dictionaries(
    {
        "id": st.integers(0, 30).map(str),
        "time": times,
        "unit": units,
        "metric": st.sampled_from(["click", "order", "order", "wait", "wait", "visit", "nothing"]),
    },
    optional={
        "value": st.one_of(
            st.sampled_from(
                [
                    0.0,
                    -0.0,
                    1.0,
                    0.005,
                    0.015,
                    -3.25,
                    5.0,
                    10.0,
                    50.0,
                    51,
                    100.0,
                    100.004,
                    100.01,
                    1e300,
                    -1e308,
                ]
            ),
            st.floats(-120, 120, allow_nan=False),
        ),
        "experiment": st.sampled_from(["one", "plain", "kinds", "once", "aged", "nobody"]),
    },
)
BAD = [b"{", b"", None, b'{"id":"1"}', b"[1]", b'{"id":"1","time":1e999,"unit":"u1"}']


def _log(events):
    """Records of a topic partition in log order: (timestamp, key, value), some spoilt."""

    def lay(items):
        laid = []
        for event, delay, spoilt in items:
            stamp = event["time"] + delay
            value = json.dumps(event).encode() if spoilt is None else BAD[spoilt]
            laid.append((stamp, event["unit"].encode(), value))
        laid.sort(key=lambda record: record[0] // 16)
        return laid

    spoilt = st.one_of(*[st.none()] * 9, st.integers(0, len(BAD) - 1))
    return st.lists(st.tuples(events, delays, spoilt), max_size=40).map(lay)


@st.composite
def traffic(draw):
    exposure_log, reward_log = draw(_log(exposures)), draw(_log(rewards))
    return (
        exposure_log,
        reward_log,
        draw(st.sampled_from(HISTORIES)),
        draw(st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.booleans()), max_size=30)),
        draw(st.one_of(st.none(), st.integers(START_MS, START_MS + 400))),
    )


def _registry(history):
    return Registry(
        Entry(
            offset=offset,
            experiment=experiment,
            in_force_ms=_running_max(history, offset) + DELAY_MS,
            record=record,
        )
        for offset, (_, experiment, record) in enumerate(history)
    )


def _running_max(history, offset):
    return max(stamp for stamp, _, _ in history[: offset + 1])


def _block(topic, log, start, size):
    part = log[start : start + size]
    end = start + len(part)
    stamps, keys, values = zip(*part, strict=True) if part else ((), (), ())
    return Block(topic, 0, start, end, list(range(start, end)), stamps, keys, values, [()] * len(part))


def _fold(state, topic, log, start, size):
    block = _block(topic, log, start, size)
    if topic == EXPOSURES:
        columns, letters = exposure_columns(
            block, state.registry, floor_ms=state.log_ms(topic), limits=LIMITS
        )
        state.apply_exposures(columns, next_offset=block.next_offset)
    else:
        columns, letters = reward_columns(block, state.registry, floor_ms=state.log_ms(topic), limits=LIMITS)
        state.apply_rewards(columns, next_offset=block.next_offset)
    return block.next_offset, letters


def fold_all(exposure_log, reward_log, history, schedule, *, clock_ms=None, max_units=MAX_UNITS):
    """Fold both logs in the interleaving and batching of `schedule`, through a snapshot wherever it says so."""
    state = PartitionState(0, _registry(history), allowed_lateness_ms=LATENESS_MS, max_units=max_units)
    logs = {EXPOSURES: exposure_log, REWARDS: reward_log}
    at = {EXPOSURES: 0, REWARDS: 0}
    letters = []
    for is_exposure, size, crash in [*schedule, (True, 1000, False), (False, 1000, False)]:
        topic = EXPOSURES if is_exposure else REWARDS
        if at[topic] < len(logs[topic]):
            at[topic], refused = _fold(state, topic, logs[topic], at[topic], size)
            letters += refused
        if crash:
            state = decode_snapshot(
                encode_snapshot(state), Registry(), allowed_lateness_ms=LATENESS_MS, max_units=max_units
            )
            if clock_ms is not None:
                state.advance(clock_ms)
    return state, letters


def oracle_of(exposure_log, reward_log, history, state):
    return recompute(
        [LoggedRecord(at, *record) for at, record in enumerate(exposure_log)],
        [LoggedRecord(at, *record) for at, record in enumerate(reward_log)],
        [LoggedSpec(*change) for change in history],
        partition=0,
        watermark_ms=state.watermark_ms,
        allowed_lateness_ms=LATENESS_MS,
        activation_delay_ms=DELAY_MS,
        limits=LIMITS,
        behind_watermark=state.behind,
        max_units=state.max_units,
    )


def assert_equal(state, found):
    for slot in state.registry.slots:
        assert (
            state.statistics(slot).canonical() == found.statistics[slot.experiment, slot.version].canonical()
        )
    assert state.outcomes(EXPOSURES) == found.exposure_outcomes
    assert state.outcomes(REWARDS) == found.reward_outcomes
    assert state.outcomes(EXPOSURES).conserved()
    assert state.outcomes(REWARDS).conserved()


def dense_traffic(seed, *, history=None):
    """Traffic in which everything happens often: much more of it than hypothesis draws by itself.

    With a history of its own it spans the most time.
    """
    rng = random.Random(seed)
    span_ms = rng.choice([60, 160, 400])
    ids = rng.choice([20, 400])
    drawn = rng.choice(HISTORIES[:2] * 2 + HISTORIES[2:6])
    history, span_ms = (drawn, span_ms) if history is None else (history, 400)
    crossing = rng.choice([0.05, 0.3, 1.0])
    epochs = max(
        [3, *(len(record.epochs) + 1 for _, _, record in history if record and len(record.epochs) > 3)]
    )
    experiments = [experiment for _, experiment, _ in history] * 5 + ["nobody"]
    rewarded = ["click", "order", "order", "order", "wait", "wait", "visit", "nothing"]

    def event(units):
        return {
            "id": str(rng.randrange(ids)),
            "time": START_MS + rng.randrange(span_ms),
            "unit": f"u{rng.randrange(units)}",
        }

    def exposure():
        made = event(12)
        made["experiment"] = rng.choice(experiments)
        made["arm"] = "abc"[len(made["unit"]) % 3]
        if rng.random() < crossing:
            made["arm"] = rng.choice(["a"] * 8 + ["b", "b", "c", "zz"])
        if rng.random() < 0.3:
            made["weight_epoch"] = rng.randrange(epochs)
        if rng.random() < 0.6:
            made["segments"] = {
                rng.choice(["device", "plan", "age"]): rng.choice(["ios", "web", "free", "x"])
            }
        if rng.random() < 0.8:
            made["covariate"] = rng.choice([0.125, 0.375, -1e4, 1e300, rng.uniform(-99, 99)])
        return made

    def reward():
        made = event(14)
        made["metric"] = rng.choice(rewarded)
        made["value"] = rng.choice(
            [0.0, 1, 0.015, -3.25, 5.0, 10.0, 51, 100.004, 100.01, 1e300, rng.uniform(-99, 99)]
        )
        if rng.random() < 0.1:
            made["experiment"] = rng.choice(["one", "plain", "kinds", "once", "aged", "nobody"])
        return made

    def log(make, size):
        laid = []
        for _ in range(rng.randrange(size)):
            made = make()
            delay = rng.randrange(9) if rng.random() < 0.8 else rng.randrange(-110, LATENESS_MS + 5)
            value = json.dumps(made).encode() if rng.random() < 0.95 else rng.choice(BAD)
            laid.append((made["time"] + delay, made["unit"].encode(), value))
        grain = rng.choice([1, 16])
        return sorted(laid, key=lambda record: record[0] // grain)

    schedule = [
        (rng.random() < 0.5, rng.randrange(1, 20), rng.random() < 0.1) for _ in range(rng.randrange(30))
    ]
    clock_ms = rng.choice([None, None, START_MS + rng.randrange(400)])
    return log(exposure, 120), log(reward, 250), history, schedule, clock_ms


@pytest.mark.parametrize("batch", range(12))
def test_dense_traffic_equals_oracle(batch):
    for seed in range(batch * 50, batch * 50 + 50):
        exposure_log, reward_log, history, schedule, clock_ms = dense_traffic(seed)
        state, letters = fold_all(exposure_log, reward_log, history, schedule, clock_ms=clock_ms)
        found = oracle_of(exposure_log, reward_log, history, state)
        assert_equal(state, found)
        assert {(letter.topic, letter.offset): letter.reason for letter in letters} == found.dead_letters


def test_dense_traffic_has_every_outcome():
    totals = dict.fromkeys(Outcomes.__struct_fields__, 0)
    mature = 0
    for seed in range(100):
        state, _ = fold_all(*dense_traffic(seed)[:4])
        for topic in (EXPOSURES, REWARDS):
            for field in totals:
                totals[field] += getattr(state.outcomes(topic), field)
        mature += sum(row.n for slot in state.registry.slots for row in state.statistics(slot).moments)
    # No traffic is as many units as a partition takes.
    assert totals.pop("over_limit") == 0
    assert min(totals.values()) > 50, totals
    assert mature > 1000


def test_dense_traffic_fills_every_table():
    """Every metric of every kind gets rows, and those that can refuse do; also units whose second arm comes late."""
    rows, refused, again = Counter(), Counter(), Counter()
    for seed in range(150):
        exposure_log, reward_log, history, schedule, _ = dense_traffic(seed)
        state, _ = fold_all(exposure_log, reward_log, history, schedule)
        for slot in state.registry.slots:
            found = state.statistics(slot)
            for table in (found.moments, found.products, found.events, found.histograms):
                rows.update((slot.experiment, type(row).__name__, row.metric) for row in table)
            refused.update({(slot.experiment, key): count for key, count in found.out_of_range.items()})
            again.update({slot.experiment: found.crossover_units})
    products = {"click", "spend", "per_visit", "both", "per_visitor", "newest_wait"}
    wanted = {("kinds", "MetricProducts", key) for key in products}
    wanted |= {("kinds", "MetricMoments", key) for key in products | {"visited"}}
    wanted |= {(experiment, "MetricEvents", "visits") for experiment in ("kinds", "once")}
    wanted |= {("kinds", "MetricHistogram", key) for key in ("first", "slowest", "newest")}
    assert min(rows[key] for key in [*wanted, ("once", "MetricHistogram", "first")]) > 20, rows
    refusing = {"spend", "first", "slowest", "per_visit", "both", "per_visitor", "newest_wait"}
    assert min(refused["kinds", key] for key in refusing) > 10, refused
    assert min(again["kinds"], again["once"]) > 40


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(traffic())
def test_fold_equals_oracle(given_traffic):
    exposure_log, reward_log, history, schedule, clock_ms = given_traffic
    state, letters = fold_all(exposure_log, reward_log, history, schedule, clock_ms=clock_ms)
    found = oracle_of(exposure_log, reward_log, history, state)
    assert_equal(state, found)
    assert {(letter.topic, letter.offset): letter.reason for letter in letters} == found.dead_letters


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(traffic())
def test_interleaving_batching_and_snapshots_change_nothing(given_traffic):
    exposure_log, reward_log, history, schedule, _ = given_traffic
    one, _ = fold_all(exposure_log, reward_log, history, schedule)
    other, _ = fold_all(exposure_log, reward_log, history, [])
    assert one.watermark_ms == other.watermark_ms
    for slot in other.registry.slots:
        mine = one.registry.slot(slot.experiment, slot.version)
        assert one.statistics(mine) == other.statistics(slot)
    for topic in (EXPOSURES, REWARDS):
        assert one.outcomes(topic) == other.outcomes(topic)


class StateTopic:
    """A partition of the state topic, compacted now and then: what a reader finds there."""

    def __init__(self, rng):
        self.rng = rng
        self.records = []

    def write(self, record):
        self.records.append(record)
        if self.rng.random() < 0.05:
            newest = {key: at for at, (key, _) in enumerate(self.records)}
            self.records = [one for at, one in enumerate(self.records) if newest[one[0]] == at]

    def read(self):
        reader = SnapshotReader(0)
        for key, value in self.records:
            reader.take(key, value)
        return reader


class Owner:
    """A worker that holds the partition: folds, writes snapshots, and may be given up at any record."""

    def __init__(self, topic, logs, history, name):
        self.topic, self.logs = topic, logs
        reader = topic.read()
        found = reader.whole()
        self.state = PartitionState(0, _registry(history), allowed_lateness_ms=LATENESS_MS)
        if found:
            # The process has seen the specs in another order.
            registry = _registry([])
            self.state = state_of(found[0].parts(), registry, allowed_lateness_ms=LATENESS_MS)
        self.left = list(reader.keys)
        self.writer = SnapshotWriter(0, writer=name, seed=topic.rng.randrange(2**63))

    def fold(self, topic, size):
        at = self.state.progress[topic].next_offset or 0
        if at < len(self.logs[topic]):
            _fold(self.state, topic, self.logs[topic], at, size)

    def snapshot(self, stop_after=None):
        snapshot = self.writer.begin(self.state)
        for written, record in enumerate(snapshot.pages()):
            if written == stop_after:
                return
            self.topic.write(record)
        self.topic.write(snapshot.manifest())
        self.writer.commit(snapshot)
        if self.left and self.writer.number == 2:
            for key in self.left:
                self.topic.write((key, None))


@pytest.mark.parametrize("batch", range(6))
def test_any_crash_and_any_snapshot_equal_the_uninterrupted_fold(batch):
    """Snapshots of what changed, given up at any record, two owners at once, and a crash at any point."""
    found = Counter()
    for seed in range(batch * 40, batch * 40 + 40):
        rng = random.Random(seed)
        exposure_log, reward_log, history, *_ = dense_traffic(seed)
        logs = {EXPOSURES: exposure_log, REWARDS: reward_log}
        topic = StateTopic(rng)
        owners = [Owner(topic, logs, history, "first")]
        for step in range(rng.randrange(10, 60)):
            owner = rng.choice(owners)
            action = rng.choice(["fold"] * 4 + ["snapshot"] * 2 + ["give up", "crash", "zombie"])
            if action == "fold":
                owner.fold(rng.choice([EXPOSURES, REWARDS]), rng.randrange(1, 30))
            elif action == "snapshot":
                owner.snapshot()
            elif action == "give up":
                owner.snapshot(stop_after=rng.randrange(6))
            else:
                kept = owners if action == "zombie" and len(owners) < 3 else []
                owners = [*kept, Owner(topic, logs, history, f"w{step}")]
                found.update([action, f"from {min(1, len(owners[-1].left))}"])
        last = Owner(topic, logs, history, "last")
        found["resumed"] += last.state.progress[EXPOSURES].next_offset is not None
        for name in (EXPOSURES, REWARDS):
            last.fold(name, 1000)
        whole, _ = fold_all(exposure_log, reward_log, history, [])
        assert last.state.watermark_ms == whole.watermark_ms
        for slot in whole.registry.slots:
            mine = last.state.registry.slot(slot.experiment, slot.version)
            assert last.state.statistics(mine).canonical() == whole.statistics(slot).canonical(), seed
        for name in (EXPOSURES, REWARDS):
            assert last.state.outcomes(name) == whole.outcomes(name)
    assert min(found["crash"], found["zombie"], found["resumed"], found["from 1"]) > 10, found


@pytest.mark.parametrize("batch", range(4))
def test_a_bound_of_units_equals_oracle(batch):
    """Which units are taken follows from the exposures alone; batching, crashes and rewards have no part in it."""
    refused = 0
    for seed in range(batch * 50, batch * 50 + 50):
        exposure_log, reward_log, history, schedule, clock_ms = dense_traffic(seed)
        most = 1 + seed % 7
        state, _ = fold_all(exposure_log, reward_log, history, schedule, clock_ms=clock_ms, max_units=most)
        assert_equal(state, oracle_of(exposure_log, reward_log, history, state))
        found = [state.statistics(slot) for slot in state.registry.slots]
        assert sum(one.over_limit for one in found) == state.outcomes(EXPOSURES).over_limit
        assert int(state.arrays["tallies"]["units"].max(initial=0)) <= most
        refused += state.outcomes(EXPOSURES).over_limit
    assert refused > 200


ENDINGS = [
    [
        (900, "plain", _record(PLAIN_ONE)),
        (900, "kinds", _record(ALL_KINDS)),
        (1060, "plain", _record(PLAIN_ONE, status=Status.ARCHIVED)),
        # It has ended: this one is refused, and so is the one after.
        (1080, "plain", _record(PLAIN_ONE)),
        (1090, "kinds", None),
        (1120, "kinds", _record(ALL_KINDS, epochs=2)),
        (1150, "plain", _record(_spec("plain", 2, PLAIN))),
    ],
    [
        (900, "one", _record(ONE)),
        (900, "once", _record(ONLY_ONCE)),
        (1050, "one", _record(TWO)),
        (1070, "once", None),
        (1100, "one", None),
        (1150, "once", _record(_spec("once", 2, ONCE))),
    ],
]


@pytest.mark.parametrize("batch", range(4))
def test_rows_of_ended_versions_are_given_up_and_nothing_shows(batch):
    released = 0
    for seed in range(batch * 40, batch * 40 + 40):
        traffic = dense_traffic(seed, history=ENDINGS[seed % len(ENDINGS)])
        exposure_log, reward_log, history, schedule, clock_ms = traffic
        state, letters = fold_all(exposure_log, reward_log, history, schedule, clock_ms=clock_ms)
        found = oracle_of(exposure_log, reward_log, history, state)
        assert_equal(state, found)
        assert {(letter.topic, letter.offset): letter.reason for letter in letters} == found.dead_letters
        tallies = state.arrays["tallies"]
        assert state.units == tallies["rows"].sum()
        released += int((tallies["units"] - tallies["rows"]).sum())
    assert released > 150


# What moves: epochs that are added and that are not, an end, a way back from it, and ends while others go on.
MOVING = [
    [
        (900, "plain", _record(PLAIN_ONE)),
        (900, "kinds", _record(ALL_KINDS)),
        (1030, "plain", _record(PLAIN_ONE, epochs=2)),
        # Of another writer, that did not see the one before: refused.
        (1035, "plain", _record(PLAIN_ONE, epochs=2, shift_ms=1)),
        (1090, "plain", _record(PLAIN_ONE, epochs=3)),
        (1095, "plain", _record(PLAIN_ONE, epochs=2)),
        (1100, "kinds", _record(ALL_KINDS, epochs=3, final=[2])),
        (1150, "plain", _record(PLAIN_ONE, epochs=4, final=[3])),
        (1200, "kinds", _record(ALL_KINDS, epochs=4, final=[2])),
        (1260, "kinds", _record(ALL_KINDS, epochs=5, final=[2, 4])),
        (1300, "plain", _record(PLAIN_ONE, epochs=2, status=Status.ARCHIVED)),
    ],
    [
        (900, "one", _record(ONE)),
        (900, "once", _record(ONLY_ONCE, epochs=4)),
        (1050, "one", _record(ONE, epochs=3, final=[2])),
        (1060, "once", _record(ONLY_ONCE, epochs=5, final=[3])),
        (1070, "once", _record(ONLY_ONCE, epochs=5, final=[4])),
        (1180, "one", _record(ONE, epochs=4, final=[2])),
        (1200, "one", _record(TWO, epochs=2, final=[1])),
        (1250, "once", _record(ONLY_ONCE, epochs=1, status=Status.ARCHIVED)),
    ],
]


@pytest.mark.parametrize("batch", range(6))
def test_epochs_that_are_added_and_final_ones_equal_oracle(batch):
    """Late records of old epochs, and early ones of the next, among them."""
    found = Counter()
    for seed in range(batch * 40, batch * 40 + 40):
        traffic = dense_traffic(seed, history=MOVING[seed % len(MOVING)])
        exposure_log, reward_log, history, schedule, clock_ms = traffic
        state, letters = fold_all(exposure_log, reward_log, history, schedule, clock_ms=clock_ms)
        oracle = oracle_of(exposure_log, reward_log, history, state)
        assert_equal(state, oracle)
        assert {(letter.topic, letter.offset): letter.reason for letter in letters} == oracle.dead_letters
        other, _ = fold_all(exposure_log, reward_log, history, [], clock_ms=None)
        if clock_ms is None:
            assert_equal(other, oracle)
        found["inactive"] += state.outcomes(EXPOSURES).inactive_experiment
        for slot in state.registry.slots:
            for row in state.statistics(slot).units:
                found[slot.experiment, row.epoch] += row.units
    assert found["inactive"] > 100, found
    wanted = [("plain", 0), ("plain", 1), ("plain", 2), ("kinds", 3), ("one", 1), ("one", 3), ("once", 2)]
    assert min(found[key] for key in wanted) > 5, found
    assert not any(found[key] for key in [("plain", 3), ("kinds", 2), ("kinds", 4), ("one", 2)]), found


# Buckets of age alone: with epochs that are added, an end before the oldest bucket is over, and a second version.
AGING = [
    [(900, "aged", _record(OF_AGES)), (1060, "aged", _record(OF_AGES, epochs=3))],
    [
        (900, "aged", _record(OF_AGES, epochs=2)),
        (950, "kinds", _record(ALL_KINDS)),
        (1120, "aged", None),
        (1150, "plain", _record(PLAIN_ONE)),
    ],
    [
        (900, "aged", _record(OF_AGES)),
        (1150, "aged", _record(_spec("aged", 2, AGED, ages={**AGES, "until": ["10ms", "20ms"]}))),
    ],
]


@pytest.mark.parametrize("batch", range(6))
def test_buckets_of_age_equal_oracle(batch):
    rows, released, refused = Counter(), 0, 0
    for seed in range(batch * 50, batch * 50 + 50):
        traffic = dense_traffic(seed, history=AGING[seed % len(AGING)])
        exposure_log, reward_log, history, schedule, clock_ms = traffic
        state, letters = fold_all(exposure_log, reward_log, history, schedule, clock_ms=clock_ms)
        found = oracle_of(exposure_log, reward_log, history, state)
        assert_equal(state, found)
        assert {(letter.topic, letter.offset): letter.reason for letter in letters} == found.dead_letters
        for slot in state.registry.slots:
            statistics = state.statistics(slot)
            refused += statistics.out_of_range.get("spend", 0) if slot.experiment == "aged" else 0
            for table in (statistics.moments, statistics.products):
                rows.update((type(row).__name__, row.metric) for row in table if "@" in row.metric)
        tallies = state.arrays["tallies"]
        released += int((tallies["units"] - tallies["rows"]).sum())
    buckets = {f"{key}@age{number}" for key in AGES["metrics"] for number in range(1, 5)}
    wanted = {("MetricMoments", name) for name in buckets}
    wanted |= {("MetricProducts", name) for name in buckets if name.endswith(("age2", "age4"))}
    assert set(rows) == wanted
    assert min(rows.values()) > 20, rows
    assert min(released, refused) > 20


OPENED = [
    [(900, "open", _record(OF_OPEN)), (1060, "open", _record(OF_OPEN, epochs=3))],
    [(900, "open", _record(OF_OPEN, epochs=2)), (950, "kinds", _record(ALL_KINDS)), (1120, "open", None)],
]


@pytest.mark.parametrize("batch", range(4))
def test_open_units_by_age_equal_oracle(batch):
    rows, open_units = Counter(), 0
    for seed in range(batch * 50, batch * 50 + 50):
        traffic = dense_traffic(seed, history=OPENED[seed % len(OPENED)])
        exposure_log, reward_log, history, schedule, clock_ms = traffic
        state, letters = fold_all(exposure_log, reward_log, history, schedule, clock_ms=clock_ms)
        found = oracle_of(exposure_log, reward_log, history, state)
        assert_equal(state, found)
        assert {(letter.topic, letter.offset): letter.reason for letter in letters} == found.dead_letters
        for slot in state.registry.slots:
            statistics = state.statistics(slot)
            reached = {
                (row.metric, row.arm, row.epoch, row.segment): (row.n, int(row.s))
                for row in statistics.moments
            }
            for table in (statistics.moments, statistics.products):
                rows.update((type(row).__name__, row.metric) for row in table if "@by" in row.metric)
            for row in statistics.products:
                if "@by" in row.metric:
                    younger = f"click@by{int(row.metric[-1]) - 1}"
                    n, s = reached[younger, row.arm, row.epoch, row.segment]
                    older, later = reached[row.metric, row.arm, row.epoch, row.segment]
                    assert older <= n
                    assert int(row.x) <= min(s, later)
                    assert row.x == row.xx == row.xy
                    open_units += n - older
            # The last age is the window: its rows are those of the metric.
            whole = {key[1:]: sums for key, sums in reached.items() if key[0] == "click@by4"}
            assert whole == {
                key[1:]: sums
                for key, sums in reached.items()
                if key[0] == "click" and slot.experiment == "open"
            }
    names = {f"click@by{number}" for number in range(1, 5)}
    wanted = {("MetricMoments", name) for name in names}
    assert set(rows) == wanted | {("MetricProducts", name) for name in names - {"click@by1"}}
    assert open_units >= 5
    assert min(rows.values()) > 20, rows
