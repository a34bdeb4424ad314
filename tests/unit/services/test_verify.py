"""Verify: a signal follows from the raw topics, or the first value that does not is named."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.cli import main
from stream_xp.domain.decision import Action, Result, Signal
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.errors import ConfigError
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.verify import service as module
from stream_xp.services.verify.compare import line, result_lines
from stream_xp.services.verify.service import Verdict, verify
from stream_xp.settings import Settings
from tests.unit.services.verify_world import (
    AGED_RECORD,
    SETTINGS,
    Broker,
    T,
    adaptive,
    decided,
    fill,
    fill_epochs,
    only,
    parts,
    rewrite,
    signals,
    with_result,
)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()
    broker.serve(monkeypatch)
    return broker


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


def test_a_spec_that_is_gone_is_said(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    broker.logs["xp.experiments", 0] = []
    assert "no longer on its topic" in (only(verify(SETTINGS, signal.id)).reason or "")


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
