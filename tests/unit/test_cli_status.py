"""`stream-xp status`: what a person sees of the monitors, and of a champion."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.cli import main
from stream_xp.cli import status as module
from stream_xp.domain.decision import (
    MonitorName,
    MonitorResult,
    MonitorState,
    Result,
    SampleRatio,
    SegmentRatio,
)
from stream_xp.domain.layers import Champion
from stream_xp.services.evidence import Standing

GOLDEN = msgspec.json.decode((topics_dir() / "golden" / "result.v1.json").read_bytes(), type=Result)
STALL = MonitorResult(
    monitor=MonitorName.EXPOSURE_STALL,
    arm="[b]new",
    state=MonitorState.INVALID,
    value=40.0,
    log_e=12.514,
    threshold_log_e=7.6009,
    latched=True,
    reason="[b]new gets no units: 40 in a row went to other arms",
)
AGE = MonitorResult(
    monitor=MonitorName.DATA_AGE, state=MonitorState.INVALID, reason="the data are 61.0 s old, more than 1m"
)
DUPLICATES = MonitorResult(
    monitor=MonitorName.DUPLICATES,
    state=MonitorState.WARNING,
    log_e=9.0,
    threshold_log_e=6.9,
    reason="200 of 1000 records repeat another, more than 5 %",
)
QUIET = [
    MonitorResult(monitor=MonitorName.CROSSOVERS, log_e=-1.0, threshold_log_e=6.9),
    MonitorResult(monitor=MonitorName.REWARD_LOSS, arm="new", log_e=-1.0, threshold_log_e=6.9),
]


def shown(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> list[str]:
    result = msgspec.structs.replace(GOLDEN, **fields)
    standing = Standing(result=result, watermark_ms=None, data_age_ms=None, evaluated_age_ms=0)
    monkeypatch.setattr(module, "read_standings", lambda *_, **__: (standing,))
    done = CliRunner().invoke(main, ["status"])
    assert done.exit_code == 0, done.output
    return [line.strip("│ ") for line in done.output.splitlines()]


def test_a_monitor_that_holds_is_shown_with_its_evidence_and_what_opens_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = shown(monkeypatch, monitors=(STALL, *QUIET))
    at = lines.index(
        "monitor exposure stall of [b]new: invalid, latched, log_e 12.51 of 7.60: "
        "[b]new gets no units: 40 in a row went to"
    )
    assert lines[at + 1 : at + 4] == [
        "other arms",
        f"once it is mended: stream-xp reset {GOLDEN.experiment} --monitors",
        "quiet: crossovers, reward loss of new",
    ]


def test_what_has_no_latch_needs_nobody_to_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, monitors=(AGE, DUPLICATES))
    assert "monitor data age: invalid: the data are 61.0 s old, more than 1m" in lines
    assert (
        "monitor duplicates: warning, log_e 9.00 of 6.90: 200 of 1000 records repeat another, more than 5 %"
    ) in lines
    assert not any("reset" in line or line.startswith("quiet") for line in lines)


@pytest.mark.parametrize("monitors", [None, ()])
def test_without_monitors_nothing_is_said_of_them(
    monkeypatch: pytest.MonkeyPatch, monitors: tuple[()] | None
) -> None:
    lines = shown(monkeypatch, monitors=monitors)
    assert not any(line.startswith(("monitor", "quiet")) for line in lines)


def test_a_wrong_sample_ratio_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    where = SegmentRatio(segment="os=tv", units=1200, log_e=31.0, threshold_log_e=9.2)
    ratio = SampleRatio(
        log_e=20.0, p_always_valid=0.0, threshold_log_e=6.9, mismatch=True, diagnosis=(where,)
    )
    lines = shown(monkeypatch, sample_ratio=ratio)
    at = lines.index("sample ratio: MISMATCH, log_e 20.00 of 6.90")
    assert lines[at + 1] == "os=tv: 1,200 units, log_e 31.00 of 9.20"


def panel(result: Result) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    console.print(module._panel(Standing(result=result, watermark_ms=0, data_age_ms=0, evaluated_age_ms=0)))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_reason_cannot_steer_a_terminal() -> None:
    """Whoever may write to the topic of signals gives the words of an order, and those end up in a result."""
    decision = msgspec.structs.replace(GOLDEN.decision, reason="\x1b[2J\x1b]0;owned\x07 all is well")
    text = panel(msgspec.structs.replace(GOLDEN, decision=decision, invalid=("\x9b31m red",)))
    assert "?[2J?]0;owned? all is well" in text
    assert not {"\x1b", "\x9b", "\x07"} & set(text)


def test_the_champion_is_named_where_there_is_one() -> None:
    champion = Champion(experiment="colours", version=2, arm="[bold]green")
    text = panel(msgspec.structs.replace(GOLDEN, champion=champion))
    assert "champion, the control here: [bold]green of colours version 2" in text
    assert "champion" not in panel(GOLDEN)


UNIFORM = msgspec.json.decode((topics_dir() / "golden" / "result.uniform.v1.json").read_bytes(), type=Result)


def test_the_uniform_slice_has_a_line_for_each_effect() -> None:
    text = panel(UNIFORM)
    assert "0.02 [-0.03, 0.07], log_e -1.50 of 3.00, 590 / 592 units" in text
    assert "undetermined, 0 / 0 units" in text
    assert "uniform slice" not in panel(GOLDEN)
    assert "MISMATCH" not in text
    found = UNIFORM.uniform_slice
    assert found is not None
    assert found.sample_ratio is not None
    wrong = msgspec.structs.replace(found.sample_ratio, mismatch=True)
    odd = msgspec.structs.replace(found, sample_ratio=wrong)
    assert "uniform slice: MISMATCH" in panel(msgspec.structs.replace(UNIFORM, uniform_slice=odd))
