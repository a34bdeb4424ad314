"""The engine's fold against the oracle, byte for byte, over any traffic, batching and interleaving."""

from __future__ import annotations

import json
import random

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.domain.statistics import Outcomes
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec, recompute

LATENESS_MS = 50
DELAY_MS = 20
LIMITS = Limits(record_bytes=2000, future_ms=100)
START_MS = 1_000


def _metric(key, window_ms, **fields):
    return {"key": key, "direction": "increase", "attribution_window": f"{window_ms}ms", **fields}


def _spec(experiment, version, metrics, segments=None):
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


def _record(spec, epochs=1, status=Status.ACTIVE):
    return ExperimentRecord(
        spec=spec,
        epochs=tuple(
            WeightEpoch(epoch=e, weights=spec.weights, effective_ms=START_MS + 60 * e) for e in range(epochs)
        ),
        design_hash=spec.design_hash(),
        status=status,
    )


ONE, TWO, PLAIN_ONE = _spec("one", 1, RICH, SEGMENTS), _spec("one", 2, RICH), _spec("plain", 1, PLAIN)
HISTORIES = [
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
]

times = st.integers(min_value=0, max_value=160).map(lambda t: START_MS + t)
units = st.sampled_from(["u1", "u2", "u3", "u4", "ü5"])
delays = st.one_of(st.integers(0, 8), st.integers(-110, LATENESS_MS + 4))
exposures = st.fixed_dictionaries(
    {
        "id": st.integers(0, 12).map(str),
        "time": times,
        "experiment": st.sampled_from(["one", "one", "one", "plain", "nobody"]),
        "unit": units,
        "arm": st.sampled_from(["a", "b", "b", "c", "zz"]),
    },
    optional={
        "weight_epoch": st.integers(0, 2),
        "segments": st.dictionaries(
            st.sampled_from(["device", "plan", "age"]),
            st.sampled_from(["ios", "web", "free", "x"]),
            max_size=2,
        ),
        "source": st.sampled_from(["", "s"]),
    },
)
rewards = st.fixed_dictionaries(
    {
        "id": st.integers(0, 30).map(str),
        "time": times,
        "unit": units,
        "metric": st.sampled_from(["click", "order", "order", "nothing"]),
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
        "experiment": st.sampled_from(["one", "plain", "nobody"]),
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


def fold_all(exposure_log, reward_log, history, schedule, *, clock_ms=None):
    """Fold both logs in the interleaving and batching of `schedule`, through a snapshot wherever it says so."""
    state = PartitionState(0, _registry(history), allowed_lateness_ms=LATENESS_MS)
    logs = {EXPOSURES: exposure_log, REWARDS: reward_log}
    at = {EXPOSURES: 0, REWARDS: 0}
    letters = []
    for is_exposure, size, crash in [*schedule, (True, 1000, False), (False, 1000, False)]:
        topic = EXPOSURES if is_exposure else REWARDS
        if at[topic] < len(logs[topic]):
            at[topic], refused = _fold(state, topic, logs[topic], at[topic], size)
            letters += refused
        if crash:
            state = decode_snapshot(encode_snapshot(state), Registry(), allowed_lateness_ms=LATENESS_MS)
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


def dense_traffic(seed):
    """Traffic in which everything happens often: much more of it than hypothesis draws by itself."""
    rng = random.Random(seed)
    span_ms = rng.choice([60, 160, 400])
    ids = rng.choice([20, 400])

    def event(units):
        return {
            "id": str(rng.randrange(ids)),
            "time": START_MS + rng.randrange(span_ms),
            "unit": f"u{rng.randrange(units)}",
        }

    def exposure():
        made = event(12)
        made["experiment"] = rng.choice(["one"] * 6 + ["plain"] * 3 + ["nobody"])
        made["arm"] = rng.choice(["a"] * 8 + ["b", "b", "c", "zz"])
        if rng.random() < 0.3:
            made["weight_epoch"] = rng.randrange(3)
        if rng.random() < 0.6:
            made["segments"] = {
                rng.choice(["device", "plan", "age"]): rng.choice(["ios", "web", "free", "x"])
            }
        return made

    def reward():
        made = event(14)
        made["metric"] = rng.choice(["click", "order", "order", "order", "nothing"])
        made["value"] = rng.choice(
            [0.0, 1, 0.015, -3.25, 5.0, 10.0, 51, 100.004, 100.01, 1e300, rng.uniform(-99, 99)]
        )
        if rng.random() < 0.1:
            made["experiment"] = rng.choice(["one", "plain", "nobody"])
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
    return log(exposure, 120), log(reward, 200), rng.choice(HISTORIES[:4]), schedule, clock_ms


@pytest.mark.parametrize("batch", range(8))
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
    assert min(totals.values()) > 50, totals
    assert mature > 1000


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
