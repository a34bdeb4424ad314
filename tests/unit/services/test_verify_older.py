"""Signals that were written by older or other versions of the service."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.decision import MonitorState, PartitionOffsets, Signal
from stream_xp.services.verify import service as module
from stream_xp.services.verify.service import Verdict, verify
from tests.unit.services.verify_world import (
    AGED_RECORD,
    SETTINGS,
    Broker,
    decided,
    fill,
    only,
    parts,
    rewrite,
    with_result,
)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()
    broker.serve(monkeypatch)
    return broker


def test_other_methods_are_said_and_no_difference(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    monkeypatch.setattr("stream_xp.domain.experiment.METHODS", 99)
    monkeypatch.setattr(module, "METHODS", 99)
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.UNKNOWN
    assert "METHODS is 99" in (found.reason or "")


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


def test_a_signal_of_before_units_were_settled_is_unknown_and_no_difference(broker: Broker) -> None:
    fill(broker)
    signal = decided(broker, parts(broker))
    ratio = signal.data.result.sample_ratio
    assert ratio is not None
    assert ratio.counted_log_e is not None
    before = msgspec.structs.replace(ratio, counted_log_e=None)
    # Rows of units had no number of settled ones then, so the hash was that of other bytes.
    rewrite(broker, with_result(signal, sample_ratio=before, statistics_hash="0" * 64))
    found = only(verify(SETTINGS, signal.id))
    assert found.verdict is Verdict.UNKNOWN
    assert found.first_difference is not None
    assert "does not say the settled units; they were guessed" in (found.reason or "")
    # Of one that says them another hash is a difference.
    rewrite(broker, with_result(signal, statistics_hash="0" * 64))
    found = only(verify(SETTINGS, signal.id))
    assert (found.verdict, found.reason) == (Verdict.DIFFERENT, None)


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
