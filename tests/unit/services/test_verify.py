"""A signal is derived again from raw records in memory: right ones hold, tampered ones are named."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from broker.oracle_world import published_part
from click.testing import CliRunner

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.kafka_log import LogRecord
from stream_xp.cli import main
from stream_xp.domain.ages import Ages
from stream_xp.domain.codec import Limits
from stream_xp.domain.decision import Action, MonitorState, PartitionOffsets, Result, Signal
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import ConfigError
from stream_xp.services.decide import Decide
from stream_xp.services.decide import topics as decide_topics
from stream_xp.services.oracle import service as oracle_module
from stream_xp.services.oracle.prefixes import rules_of
from stream_xp.services.oracle.reading import LogShortError, LogTruncatedError
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.verify import service as module
from stream_xp.services.verify.compare import line, result_lines
from stream_xp.services.verify.service import Verdict, Verification, verify
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

T = 1_750_000_000_000
SETTINGS = Settings(allowed_lateness_ms=1_000, activation_delay_ms=100, idle_grace_ms=500, partitions=2)
SPEC = msgspec.convert(
    {
        "experiment": "exp",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
        "metrics": [
            {
                "key": "click",
                "kind": "conversion",
                "role": "primary",
                "direction": "increase",
                "attribution_window": "1s",
            },
            {
                "key": "spend",
                "kind": "mean",
                "role": "secondary",
                "direction": "increase",
                "attribution_window": "1s",
                "scale": 0.01,
                "bound": 100,
            },
            {
                "key": "wait",
                "kind": "latency",
                "role": "secondary",
                "direction": "decrease",
                "attribution_window": "1s",
                "scale": 0.1,
                "bound": 100,
            },
        ],
    },
    ExperimentSpec,
)
RECORD = ExperimentRecord(
    spec=SPEC,
    epochs=(WeightEpoch(epoch=0, weights=SPEC.weights, effective_ms=0),),
    design_hash=SPEC.design_hash(),
)


class Broker:
    """Topics as lists of records; reads as `LogReader` does and is written to as `LogWriter` is."""

    def __init__(self) -> None:
        self.logs: dict[tuple[str, int], list[LoggedRecord]] = defaultdict(list)
        self.begin = 0

    def add(self, topic: str, key: bytes, value: bytes, *, at_ms: int = T, partition: int = 0) -> None:
        log = self.logs[topic, partition]
        log.append(LoggedRecord(len(log), at_ms, key, value))

    def partitions(self, topic: str) -> list[int]:
        return [0, 1] if topic in ("xp.exposures", "xp.rewards") else [0]

    def read_all(self, topic: str, partition: int) -> list[LoggedRecord]:
        return list(self.logs[topic, partition])

    def read_span(self, topic: str, partition: int, *, first: int, last: int) -> list[LoggedRecord]:
        if first < self.begin:
            raise LogTruncatedError(f"{topic}[{partition}] begins at offset {self.begin}")
        if last >= len(self.logs[topic, partition]):
            raise LogShortError(f"{topic}[{partition}] ends")
        return self.logs[topic, partition][first : last + 1]

    def read_after(self, topic: str, partition: int, *, last: int, most: int) -> list[LoggedRecord]:
        return self.logs[topic, partition][last + 1 : last + 1 + most]

    async def send(self, topic: str, *, key: bytes, value: bytes | None) -> None:
        self.add(topic, key, value or b"")

    async def durable(self, sent: Any, topic: str) -> None:
        pass

    async def read_everything(self, settings: Settings, topic: str, partitions: Any) -> list[LogRecord]:
        return [LogRecord(0, one.offset, T, one.key, one.value) for one in self.logs[topic, 0]]


class Silence:
    """`LogTail` of a topic on which nothing was said."""

    async def start(self) -> None:
        pass

    async def poll(self) -> tuple[list[LogRecord], bool]:
        return [], True


class Specs:
    def __init__(self, record: ExperimentRecord) -> None:
        self.registry = Registry([Entry(offset=0, experiment="exp", in_force_ms=0, record=record)])


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()

    @contextmanager
    def opened(settings: Settings, **_: Any) -> Iterator[Broker]:
        yield broker

    monkeypatch.setattr(module, "open_reader", opened)
    monkeypatch.setattr(oracle_module, "open_reader", opened)
    monkeypatch.setattr(decide_topics, "read_all", broker.read_everything)
    monkeypatch.setattr(decide_topics, "LogTail", lambda *_: Silence())
    return broker


def fill(
    broker: Broker, *, units: int = 600, seed: int = 1, record: ExperimentRecord = RECORD, arms: str = "ab"
) -> None:
    """Write the spec, and units of which b clicks far more often."""
    dice = random.Random(seed)
    broker.add("xp.experiments", b"exp", msgspec.json.encode(record), at_ms=T - 1_000)
    for n in range(units):
        arm, unit, at_ms = arms[n % len(arms)], f"u{n}", T + n
        where = {"at_ms": at_ms, "partition": n % 2 if n % 5 else 0}

        def send(
            topic: str, unit: str = unit, at_ms: int = at_ms, where: dict[str, int] = where, **fields: Any
        ) -> None:
            value = {"id": f"{unit}{fields}", "time": at_ms, "unit": unit, **fields}
            broker.add(f"xp.{topic}", unit.encode(), json.dumps(value).encode(), **where)

        send("exposures", experiment="exp", arm=arm)
        if dice.random() < (0.6 if arm == "b" else 0.1):
            send("rewards", metric="click")
        send("rewards", metric="spend", value=round(dice.uniform(-5, 50), 2))
        send("rewards", metric="wait", value=round(dice.uniform(0, 90), 1))


def parts(broker: Broker, *, watermark_ms: int = T + 9_000) -> list[PartitionStatistics]:
    """What ingest would publish of all that is there."""
    specs = [
        LoggedSpec(one.timestamp_ms, "exp", msgspec.json.decode(one.value or b"", type=ExperimentRecord))
        for one in broker.logs["xp.experiments", 0]
    ]
    newest = specs[-1].record
    assert newest is not None
    return [
        published_part(
            newest.spec,
            *(broker.logs[f"xp.{topic}", partition] for topic in ("exposures", "rewards")),
            specs,
            settings=SETTINGS,
            partition=partition,
            watermark_ms=watermark_ms,
            rules=rules_of(SETTINGS),
        )
        for partition in (0, 1)
    ]


def decided(
    broker: Broker, published: list[PartitionStatistics], *, record: ExperimentRecord = RECORD
) -> Signal:
    """Let the decide stage say what follows, and return its signal."""
    values = [msgspec.json.encode(part) for part in published]
    n = len(values)
    block = Block("xp.stats", 0, 0, n, list(range(n)), [T] * n, [b"exp"] * n, values, [()] * n)

    async def scenario() -> None:
        stage = Decide(
            SETTINGS,
            experiments=Specs(record),  # type: ignore[arg-type]
            writer=broker,  # type: ignore[arg-type]
            clock=ManualClock(T),
            partitions={"signals": 1, "config": 1, "results": 1, "stats": 1},
        )
        await stage.on_block(block)
        await stage.evaluate()

    asyncio.run(scenario())
    (signal,) = signals(broker)
    return signal


def signals(broker: Broker) -> list[Signal]:
    return [msgspec.json.decode(one.value or b"", type=Signal) for one in broker.logs["xp.signals", 0]]


def rewrite(broker: Broker, signal: Signal) -> None:
    """Put another signal in the place of the first."""
    broker.logs["xp.signals", 0] = []
    broker.add("xp.signals", b"exp", msgspec.json.encode(signal))


def with_result(signal: Signal, **changes: Any) -> Signal:
    result = msgspec.structs.replace(signal.data.result, **changes)
    return msgspec.structs.replace(signal, data=msgspec.structs.replace(signal.data, result=result))


def only(found: list[Verification]) -> Verification:
    (one,) = found
    return one


def test_a_right_signal_is_derived_to_the_last_value(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    assert signal.data.decision.action is Action.SHIP
    found = only(verify(SETTINGS, signal.id))
    assert (found.verdict, found.first_difference, found.reason, found.notes) == (
        Verdict.EQUAL,
        None,
        None,
        (),
    )
    by_name = {one.what: one for one in found.lines}
    assert by_name["statistics_hash"].derived == signal.data.result.statistics_hash
    effect = signal.data.result.metrics[0].effect
    assert effect is not None
    assert by_name["metrics click b effect log_e"].recorded == str(effect.log_e)
    assert by_name["code version"].equal is None


def with_ids(broker: Broker, *ids: str) -> None:
    """Put more signals on the topic, of which only the ids matter."""
    (signal,) = signals(broker)
    for one in ids:
        broker.add("xp.signals", b"exp", msgspec.json.encode(msgspec.structs.replace(signal, id=one)))


def test_the_beginning_of_an_id_stands_for_it(broker: Broker) -> None:
    fill(broker)
    whole = decided(broker, parts(broker)).id
    with_ids(broker, "0" * 32 if whole[0] != "0" else "1" * 32)
    for length in (8, 9, 31, 32):
        assert only(verify(SETTINGS, whole[:length])).signal_id == whole
    with pytest.raises(ConfigError, match=r"holds no signal '.{7}' among 2; .* needs 8 characters"):
        verify(SETTINGS, whole[:7])
    with pytest.raises(ConfigError, match="holds no signal '' among 2"):
        verify(SETTINGS, "")
    with pytest.raises(ConfigError, match=r"holds no signal 'zzzzzzzz' among 2$"):
        verify(SETTINGS, "z" * 8)


def test_a_beginning_that_two_ids_have_is_ambiguous(broker: Broker) -> None:
    fill(broker)
    whole = decided(broker, parts(broker)).id
    beside = whole[:10] + "zz"
    with_ids(broker, beside, whole[:10])
    with pytest.raises(ConfigError) as raised:
        verify(SETTINGS, whole[:9])
    assert str(raised.value) == (
        f"3 signals of xp.signals have an id that begins with {whole[:9]!r}: "
        f"{', '.join(map(repr, sorted((whole[:10], whole, beside))))}; write out more of it"
    )
    # One that is an id itself is that one, and one that stands twice is not two.
    assert {one.signal_id for one in verify(SETTINGS, whole[:10])} == {whole[:10]}
    longer = whole[:11]
    broker.logs["xp.signals", 0] *= 2
    assert {one.signal_id for one in verify(SETTINGS, longer)} == {whole}
    with_many = [f"{whole[:10]}y{n}" for n in range(9)]
    broker.logs["xp.signals", 0] = broker.logs["xp.signals", 0][:1]
    with_ids(broker, *with_many)
    with pytest.raises(ConfigError, match=r"10 signals .*(?:'[^']+', ){5}\.\.\.; write out more"):
        verify(SETTINGS, whole[:8])


def test_it_derives_at_the_offsets_of_the_signal_and_not_at_the_end_of_the_log(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    broker.add("xp.exposures", b"u0", b"{", at_ms=T + 10**6)
    broker.add("xp.rewards", b"u1", b"{", at_ms=T + 10**6, partition=1)
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL


def test_the_settings_of_the_signal_count_and_not_those_of_the_command(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    other = Settings(
        allowed_lateness_ms=1, activation_delay_ms=10**6, idle_grace_ms=0, max_record_bytes=1_024
    )
    assert only(verify(other, signal.id)).verdict is Verdict.EQUAL


def folded(broker: Broker, *, max_units: int) -> list[PartitionStatistics]:
    """What the engine publishes of all that is there."""
    found = []
    for partition in (0, 1):
        entry = Entry(offset=0, experiment="exp", in_force_ms=T - 900, record=RECORD)
        state = PartitionState(
            partition,
            Registry([entry]),
            allowed_lateness_ms=SETTINGS.allowed_lateness_ms,
            max_units=max_units,
        )
        for topic in (EXPOSURES, REWARDS):
            log = broker.logs[f"xp.{topic}", partition]
            n = len(log)
            _, stamps, keys, values, headers = zip(*log, strict=True)
            block = Block(topic, partition, 0, n, list(range(n)), stamps, keys, values, list(headers))
            if topic == EXPOSURES:
                seen, _ = exposure_columns(block, state.registry, floor_ms=0, limits=Limits())
                state.apply_exposures(seen, next_offset=n)
            else:
                heard, _ = reward_columns(block, state.registry, floor_ms=0, limits=Limits())
                state.apply_rewards(heard, next_offset=n)
        state.advance(T + 9_000)
        rules = msgspec.structs.replace(rules_of(SETTINGS), max_units=max_units)
        found.append(msgspec.structs.replace(state.record(state.registry.slots[0]), rules=rules))
    return found


def lift(part: PartitionStatistics, max_units: int | None) -> PartitionStatistics:
    """The same, said to be of another bound."""
    assert part.rules is not None
    return msgspec.structs.replace(part, rules=msgspec.structs.replace(part.rules, max_units=max_units))


def test_an_engine_whose_bound_was_reached_is_derived_under_its_bound(broker: Broker) -> None:
    fill(broker, arms="aaab")
    published = folded(broker, max_units=200)
    assert [part.statistics.over_limit for part in published] == [160, 40]
    signal = decided(broker, published)
    assert signal.data.decision.action is Action.STOP
    assert any("200 exposures refused" in why for why in signal.data.result.invalid)
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    for bound in (None, 199, 201):
        offsets = {
            key: msgspec.structs.replace(one, rules=lift(published[0], bound).rules)
            for key, one in signal.data.result.offsets.items()
        }
        rewrite(broker, with_result(signal, offsets=offsets))
        found = only(verify(SETTINGS, signal.id))
        assert found.verdict is Verdict.DIFFERENT
        assert "statistics_hash" in [one.what for one in found.lines if one.equal is False]


@pytest.mark.parametrize(("named", "equal"), [(200, True), (201, False), (None, False)])
def test_the_oracle_takes_the_bound_that_the_statistics_name(
    broker: Broker, named: int | None, *, equal: bool
) -> None:
    fill(broker)
    for part in folded(broker, max_units=200):
        broker.add("xp.stats", b"exp/%d" % part.partition, msgspec.json.encode(lift(part, named)))
    report = oracle_module.examine(SETTINGS)
    assert (report.equal, report.checked) == (equal, 2)
    assert f"max_units {named} (here {SETTINGS.max_units})" in report.notes[0]


def test_a_bound_that_was_moved_where_it_does_not_show_leaves_the_oracle_sure(broker: Broker) -> None:
    fill(broker, units=60)
    part, other = folded(broker, max_units=200)
    broken = msgspec.structs.replace(
        part, statistics=msgspec.structs.replace(part.statistics, crossover_units=1)
    )
    earlier = msgspec.structs.replace(lift(part, 100), watermark_ms=T + 8_000)
    for one in (earlier, broken, other):
        broker.add("xp.stats", b"exp/%d" % one.partition, msgspec.json.encode(one))
    (found,) = oracle_module.examine(SETTINGS).differences
    assert (found.what, found.unsure) == ("crossover_units", False)


def test_statistics_that_name_no_settings_are_of_a_worker_without_a_bound(broker: Broker) -> None:
    fill(broker)
    for part in folded(broker, max_units=10**6):
        nameless = msgspec.structs.replace(part, rules=None)
        broker.add("xp.stats", b"exp/%d" % part.partition, msgspec.json.encode(nameless))
    assert oracle_module.examine(msgspec.structs.replace(SETTINGS, max_units=5)).equal


def test_weight_epochs_that_came_after_the_signal_change_nothing(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    after = WeightEpoch(epoch=1, weights={"a": 0.9, "b": 0.1}, effective_ms=T + 10**6)
    later = msgspec.structs.replace(RECORD, epochs=(*RECORD.epochs, after))
    broker.add("xp.experiments", b"exp", msgspec.json.encode(later), at_ms=T + 10**6)
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL


def test_the_weight_epochs_of_the_look_count_where_the_statistics_were_ahead(broker: Broker) -> None:
    after = WeightEpoch(epoch=1, weights={"a": 0.1, "b": 0.9}, effective_ms=T)
    ahead = msgspec.structs.replace(RECORD, epochs=(*RECORD.epochs, after))
    broker.add("xp.experiments", b"exp", msgspec.json.encode(ahead), at_ms=T - 1_000)
    for n in range(500):
        unit, epoch = f"u{n}", int(n >= 400)
        event = {"id": unit, "time": T, "unit": unit, "experiment": "exp", "arm": "a", "weight_epoch": epoch}
        broker.add("xp.exposures", unit.encode(), json.dumps(event).encode())
    published = [part for part in parts(broker) if part.partition == 0]
    signal = decided(broker, published, record=RECORD)
    assert signal.data.decision.action is Action.STOP
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    # A signal that does not say how many is tried with each number.
    rewrite(broker, with_result(signal, weight_epochs=None))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    rewrite(broker, with_result(signal, weight_epochs=2))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.DIFFERENT


def tampered_log_e(signal: Signal) -> Signal:
    first, *rest = signal.data.result.metrics
    assert first.effect is not None
    effect = msgspec.structs.replace(first.effect, log_e=first.effect.log_e + 1e-6)
    return with_result(signal, metrics=(msgspec.structs.replace(first, effect=effect), *rest))


def moved_back(signal: Signal) -> Signal:
    offsets = dict(signal.data.result.offsets)
    assert offsets["1"].rewards is not None
    offsets["1"] = msgspec.structs.replace(offsets["1"], rewards=offsets["1"].rewards - 3)
    return with_result(signal, offsets=offsets)


def early(signal: Signal) -> Signal:
    offsets = {
        key: msgspec.structs.replace(one, watermark_ms=T) for key, one in signal.data.result.offsets.items()
    }
    return with_result(signal, offsets=offsets)


@pytest.mark.parametrize(
    ("tamper", "what"),
    [
        (tampered_log_e, "metrics click b effect log_e"),
        (lambda signal: with_result(signal, statistics_hash="0" * 64), "statistics_hash"),
        (lambda signal: with_result(signal, runtime_ms=1), "runtime_ms"),
        (lambda signal: with_result(signal, crossover_units=1), "crossover_units"),
        (moved_back, "signal id"),
        (early, "signal id"),
        (lambda signal: msgspec.structs.replace(signal, subject="other"), "signal subject"),
        (
            lambda signal: msgspec.structs.replace(
                signal,
                data=msgspec.structs.replace(
                    signal.data, decision=msgspec.structs.replace(signal.data.decision, arm="a")
                ),
            ),
            "signal arm",
        ),
    ],
)
def test_a_tampered_signal_is_named(broker: Broker, tamper: Any, what: str) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    rewrite(broker, tamper(signal))
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.DIFFERENT
    assert found.first_difference is not None
    assert found.first_difference.what == what


def test_a_watermark_that_the_records_forbid_is_named(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    rewrite(broker, early(signal))
    wrong = [one.what for one in only(verify(SETTINGS, signal.id)).lines if one.equal is False]
    assert "watermark of partition 0" in wrong
    assert "statistics_hash" in wrong


def test_a_reward_that_was_counted_twice_is_seen_in_the_hash(broker: Broker) -> None:
    fill(broker)
    first, *rest = parts(broker)
    cell = next(row for row in first.statistics.moments if row.metric == "click" and row.arm == "b")
    wrong = msgspec.structs.replace(cell, s=str(int(cell.s) + 1), q=str(int(cell.q) + 1))
    moments = tuple(wrong if row == cell else row for row in first.statistics.moments)
    broken = msgspec.structs.replace(
        first, statistics=msgspec.structs.replace(first.statistics, moments=moments)
    )
    signal = decided(broker, [broken, *rest])
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.DIFFERENT
    assert "statistics_hash" in [one.what for one in found.lines if one.equal is False]


# What nobody can say


def test_an_unknown_signal_is_refused(broker: Broker) -> None:
    fill(broker)
    decided(broker, parts(broker))
    broker.add("xp.signals", b"exp", b"{")
    with pytest.raises(ConfigError, match=r"no signal 'nope' among 1; 1 records there are no signals"):
        verify(SETTINGS, "nope")


@pytest.mark.parametrize(("begin", "reason"), [(1, "begins at offset 1"), (None, "ends")])
def test_a_log_that_does_not_hold_the_records_is_no_difference(
    broker: Broker, begin: int | None, reason: str
) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    broker.begin = begin or 0
    if begin is None:
        del broker.logs["xp.rewards", 1][-1]
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.UNKNOWN
    assert found.reason is not None
    assert reason in found.reason


def test_other_methods_are_said_and_no_difference(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    monkeypatch.setattr("stream_xp.domain.experiment.METHODS", 99)
    monkeypatch.setattr(module, "METHODS", 99)
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.UNKNOWN
    assert "METHODS is 99" in (found.reason or "")


def test_a_spec_that_is_gone_is_said(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    broker.logs["xp.experiments", 0] = []
    assert "no longer on its topic" in (only(verify(SETTINGS, signal.id)).reason or "")


def as_before(signal: Signal) -> Signal:
    """A signal of a version that did not say yet under what it was made."""
    offsets = {
        key: PartitionOffsets(exposures=one.exposures, rewards=one.rewards, watermark_ms=one.watermark_ms)
        for key, one in signal.data.result.offsets.items()
    }
    return with_result(signal, offsets=offsets, weight_epochs=None, spread_ms=None, monitors=None)


def test_an_older_signal_is_derived_with_the_settings_of_the_command(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    rewrite(broker, as_before(signal))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    other = msgspec.structs.replace(SETTINGS, allowed_lateness_ms=8_500)
    found = only(verify(other, signal.id))
    assert found.verdict is Verdict.UNKNOWN
    assert "does not say the settings of the worker, the first offsets, the weight epochs" in (
        found.reason or ""
    )


def test_a_latch_of_before_is_taken_and_what_is_proven_now_is_derived(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    crossovers, *stalls = signal.data.result.monitors or ()
    assert [(one.monitor, one.state) for one in (crossovers, *stalls)] == [
        ("crossovers", "quiet"),
        ("exposure_stall", "quiet"),
        ("exposure_stall", "quiet"),
    ]
    reason = "crossovers: proven before, and nobody has resumed or reset since"
    latched = msgspec.structs.replace(crossovers, latched=True, state=MonitorState.INVALID, reason=reason)
    invalid = (*signal.data.result.invalid, reason)
    rewrite(broker, with_result(signal, monitors=(latched, *stalls), invalid=invalid))
    held = only(verify(SETTINGS, signal.id))
    # Nothing ships while a latch holds it; the latch itself cannot be derived.
    assert {one.what for one in held.lines if not one.equal and not one.what.startswith("code")} >= {
        "signal action",
        "decision action",
    }
    assert all(one.equal for one in held.lines if one.what.startswith(("monitors", "invalid")))
    forged = msgspec.structs.replace(crossovers, log_e=1.0)
    rewrite(broker, with_result(signal, monitors=(forged, *stalls)))
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.DIFFERENT
    assert found.first_difference is not None
    assert found.first_difference.what == "monitors crossovers log_e"


def test_records_written_before_the_new_fields_are_still_read() -> None:
    old = {"exposures": 2, "rewards": None, "watermark_ms": None}
    offsets = msgspec.convert(old, PartitionOffsets)
    assert msgspec.to_builtins(offsets) == old


def test_two_records_under_one_id_are_both_derived(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    broker.add("xp.signals", b"exp", msgspec.json.encode(signal))
    broker.add("xp.signals", b"exp", msgspec.json.encode(tampered_log_e(signal)))
    right, wrong = verify(SETTINGS, signal.id)
    assert (right.verdict, wrong.verdict) == (Verdict.EQUAL, Verdict.DIFFERENT)
    assert wrong.place.offset == 2
    assert "2 different records" in wrong.notes[0]
    assert "came first" in wrong.notes[1]


# The command


def run(*options: str) -> Any:
    where = {"STREAM_XP_ALLOWED_LATENESS_MS": "1000", "STREAM_XP_ACTIVATION_DELAY_MS": "100"}
    return CliRunner().invoke(main, ["verify", *options], env=where)


def test_the_command_shows_recorded_and_derived(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    done = run(signal.id)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].split() == ["what", "recorded", "derived"]
    assert "metrics click b effect log_e" in done.stdout
    assert f"equal: signal {signal.id} at xp.signals[0] offset 0 (exp version 1)" in done.stdout
    assert json.loads(run(signal.id, "--json").stdout)["verdict"] == "equal"


def test_the_command_ends_with_1_on_a_difference_and_2_where_it_cannot_say(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    rewrite(broker, tampered_log_e(signal))
    done = run(signal.id)
    assert done.exit_code == 1
    assert "metrics click b effect log_e: recorded" in done.stdout.splitlines()[-1]
    broker.begin = 1
    assert run(signal.id).exit_code == 2
    unknown = run("nope", "--json")
    assert unknown.exit_code == 2
    assert json.loads(unknown.stdout)["verdict"] == "unknown"


# Comparing values


@pytest.mark.parametrize(
    ("recorded", "derived", "equal"),
    [
        (1.0, 1.0 + 1e-12, True),
        (1.0, 1.0 + 1e-8, False),
        (0.0, 1e-300, True),
        (None, 0.0, False),
        (1, 1.0, False),
        (True, 1, False),
        ("a", "a", True),
    ],
)
def test_values_are_the_same_but_for_rounding(recorded: object, derived: object, equal: bool) -> None:
    assert line("x", recorded, derived).equal is equal


def test_an_advance_is_derived_again(broker: Broker) -> None:
    stages = [{"coverage": 0.25, "minimum_units": 400}, {"coverage": 1.0}]
    guardrail = {
        "key": "errors",
        "kind": "conversion",
        "role": "guardrail",
        "direction": "decrease",
        "attribution_window": "1s",
        "margin": {"absolute": 0.3},
    }
    given = msgspec.to_builtins(SPEC)
    given |= {"ramp": {"stages": stages}, "metrics": [*given["metrics"], guardrail]}
    spec = msgspec.convert(given, ExperimentSpec)
    first = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0, coverage=0.25)
    record = ExperimentRecord(spec=spec, epochs=(first,), design_hash=spec.design_hash())
    fill(broker, record=record)
    signal = decided(broker, parts(broker), record=record)
    assert (signal.data.decision.action, signal.data.decision.stage) == (Action.ADVANCE, 1)
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    forged = msgspec.structs.replace(signal.data.decision, stage=0)
    data = msgspec.structs.replace(with_result(signal, decision=forged).data, decision=forged)
    rewrite(broker, msgspec.structs.replace(signal, data=data))
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.DIFFERENT
    assert found.first_difference is not None
    assert found.first_difference.what == "signal stage"


def test_an_order_is_no_unreadable_signal(broker: Broker) -> None:
    order = Order(experiment="exp", version=1, action=OperatorAction.STOP, actor="kim", reason="so")
    said = OrderSignal(id="o", source="/people", subject="exp", time="t", data=order)
    for value in (msgspec.json.encode(said), b"{"):
        broker.add("xp.signals", b"exp", value)
    passed_over = PassedOver()
    assert module.read_signals(broker, SETTINGS, passed_over) == []  # type: ignore[arg-type]
    assert passed_over.counts == {"xp.signals": 1}


def test_every_field_of_a_result_is_compared_but_telemetry(broker: Broker) -> None:
    fill(broker)
    result = decided(broker, parts(broker)).data.result
    compared = {one.what.split(" ")[0] for one in result_lines(result, result)}
    named = set(Result.__struct_fields__) - {"segments"}
    assert named - compared == {
        "look",
        "evaluated_ms",
        "code_version",
        "offsets",
        "schema",
        "weight_epochs",
        "spread_ms",
        "rollout",
    } | ({"invalid"} - compared)


CONTEXTS = ("ios", "web")
GUARDRAIL = {
    "key": "errors",
    "kind": "conversion",
    "role": "guardrail",
    "direction": "decrease",
    "attribution_window": "1s",
    "margin": {"absolute": 0.1},
}


def adaptive(policy: str, **fields: Any) -> ExperimentRecord:
    """Three arms whose weights follow clicks, after two weight epochs."""
    given = msgspec.to_builtins(SPEC)
    allocation = {
        "policy": policy,
        "metric": "click",
        "interval": "1m",
        "burn_in": {"units": 20, "conversions": 2},
    }
    given |= {
        "arms": [{"key": arm, "weight": 1 / 3, "control": arm == "a"} for arm in "abc"],
        "metrics": [given["metrics"][0], GUARDRAIL],
        "allocation": allocation | fields,
        "minimum_runtime": "1h",
    }
    if policy == "contextual":
        given |= {
            "segments": {"platform": CONTEXTS},
            "allocation": given["allocation"] | {"context": "platform"},
        }
    spec = msgspec.convert(given, ExperimentSpec)
    moved = {"a": 0.3, "b": 0.4, "c": 0.3}
    contexts = dict.fromkeys(CONTEXTS, moved) if policy == "contextual" else {}
    epochs = (
        WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0),
        WeightEpoch(epoch=1, weights=moved, effective_ms=1, contexts=contexts, signal_id="before"),
    )
    return ExperimentRecord(spec=spec, epochs=epochs, design_hash=spec.design_hash())


def fill_epochs(broker: Broker, record: ExperimentRecord, *, harmful: str = "") -> None:
    """Units of two weight epochs; b clicks most on one platform, c on the other one; `harmful` errs."""
    dice = random.Random(5)
    broker.add("xp.experiments", b"exp", msgspec.json.encode(record), at_ms=T - 1_000)
    for n in range(900):
        epoch, platform, unit = int(n >= 300), CONTEXTS[n % 2], f"u{n}"
        weights = record.epochs[epoch].weights
        (arm,) = dice.choices(list(weights), weights=list(weights.values()))
        event = {"time": T + n, "unit": unit}
        placed = {"experiment": "exp", "arm": arm, "weight_epoch": epoch, "segments": {"platform": platform}}
        best = {"ios": "b", "web": "c"}[platform]
        values = [("exposures", event | placed | {"id": f"e{n}"})]
        if dice.random() < (0.5 if arm == best else 0.2):
            values.append(("rewards", event | {"metric": "click", "id": f"c{n}"}))
        if dice.random() < (0.7 if arm == harmful else 0.05):
            values.append(("rewards", event | {"metric": "errors", "id": f"x{n}"}))
        for topic, value in values:
            broker.add(
                f"xp.{topic}", unit.encode(), json.dumps(value).encode(), at_ms=T + n, partition=n % 3 % 2
            )


def forged(signal: Signal, **fields: Any) -> Signal:
    decision = msgspec.structs.replace(signal.data.decision, **fields)
    data = msgspec.structs.replace(with_result(signal, decision=decision).data, decision=decision)
    return msgspec.structs.replace(signal, data=data)


@pytest.mark.parametrize("policy", ["thompson", "top_two", "contextual"])
def test_an_allocation_is_derived_again_with_its_weights(broker: Broker, policy: str) -> None:
    record = adaptive(policy, prior={"worth": 5, "scores": {"a": 0.2, "b": 0.3, "c": 0.3}})
    fill_epochs(broker, record)
    signal = decided(broker, parts(broker), record=record)
    decision = signal.data.decision
    assert decision.action is Action.ALLOCATE
    assert decision.weights not in (None, record.epochs[-1].weights)
    assert set(decision.contexts) == (set(CONTEXTS) if policy == "contextual" else set())
    found = only(verify(SETTINGS, signal.id))
    assert (found.verdict, found.reason) == (Verdict.EQUAL, None)
    by_name = {one.what: one for one in found.lines}
    assert by_name["statistics_hash"].derived == signal.data.result.statistics_hash
    assert by_name["signal weights"].derived == str(decision.weights)
    assert by_name["signal contexts"].derived == str(decision.contexts)
    assert decision.weights is not None
    other = decision.weights | {"b": decision.weights["b"] - 0.001, "c": decision.weights["c"] + 0.001}
    for name, value in (("weights", other), ("contexts", {"ios": other})):
        rewrite(broker, forged(signal, **{name: value}))
        found = only(verify(SETTINGS, signal.id))
        assert found.verdict is Verdict.DIFFERENT
        assert found.first_difference is not None
        assert found.first_difference.what == f"signal {name}"


def test_the_closing_of_an_arm_that_harms_is_derived_again(broker: Broker) -> None:
    record = adaptive("thompson")
    fill_epochs(broker, record, harmful="b")
    signal = decided(broker, parts(broker), record=record)
    decision = signal.data.decision
    assert decision.action is Action.ALLOCATE
    assert decision.weights is not None
    assert decision.weights["b"] == 0.0
    assert decision.reason.startswith("harm is proven, no more units for b; ")
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    # On the weight epochs of before another one follows: what a signal says of them is part of what is derived.
    rewrite(broker, with_result(signal, weight_epochs=1))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.DIFFERENT


def test_a_refused_record_that_came_later_is_not_what_was_decided_on(broker: Broker) -> None:
    record = adaptive("thompson")
    fill_epochs(broker, record)
    signal = decided(broker, parts(broker), record=record)
    spec = msgspec.structs.replace(record.spec, alpha=0.2)
    hand_made = msgspec.structs.replace(record, spec=spec, design_hash=spec.design_hash())
    even = msgspec.structs.replace(record.epochs[1], weights=record.epochs[0].weights)
    late = msgspec.structs.replace(record, epochs=(record.epochs[0], even))
    for refused in (hand_made, late):
        broker.add("xp.experiments", b"exp", msgspec.json.encode(refused))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL


# Effects by age, and a segment that is registered.
AGED = msgspec.structs.replace(
    SPEC,
    segments={"device": ("tv",)},
    ages=Ages(metrics=("spend", "click"), until=("100ms", "200ms", "300ms")),
)
AGED_RECORD = msgspec.structs.replace(RECORD, spec=AGED, design_hash=AGED.design_hash())


def test_effects_by_age_are_derived_too(broker: Broker) -> None:
    fill(broker, record=AGED_RECORD)
    signal = decided(broker, parts(broker), record=AGED_RECORD)
    spend, click = signal.data.result.ages
    assert (spend.metric, click.metric) == ("spend", "click")
    assert spend.control_units == spend.arm_units == 300
    found = only(verify(SETTINGS, signal.id))
    assert (found.verdict, found.first_difference) == (Verdict.EQUAL, None)
    by_name = {one.what for one in found.lines}
    assert {f"ages click b buckets {at} arm_units" for at in (100, 200, 300)} <= by_name
    assert "ages spend b buckets 100 effect log_e" in by_name
    assert click.change is not None
    wrong = msgspec.structs.replace(click, change=msgspec.structs.replace(click.change, log_e=9.0))
    rewrite(broker, with_result(signal, ages=(spend, wrong)))
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.DIFFERENT
    assert "ages click b change log_e" in str(found.first_difference)


def test_a_worker_that_did_not_say_standard_errors_of_segments_is_taken_at_its_word(broker: Broker) -> None:
    fill(broker, record=AGED_RECORD)
    signal = decided(broker, parts(broker), record=AGED_RECORD)
    segments = signal.data.result.segments
    assert any(one.standard_error for one in segments)
    older = tuple(msgspec.structs.replace(one, standard_error=None) for one in segments)
    rewrite(broker, with_result(signal, segments=older))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    wrong = tuple(
        msgspec.structs.replace(one, standard_error=one.standard_error and 2 * one.standard_error)
        for one in segments
    )
    rewrite(broker, with_result(signal, segments=wrong))
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.DIFFERENT
