"""Orders and decision records on the embedded broker, with a worker that enacts what is ordered."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from embedded_world import apply, send, settings_with_topics, until
from worker_process import DEADLINE_S, now_ms

from stream_xp.domain.decision import ConfigRecord, Signal
from stream_xp.domain.operator import OperatorAction
from stream_xp.services.evidence import read_signals, read_standings
from stream_xp.services.memo import Memo
from stream_xp.services.operate import Call, Fate, place, wait
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

METRIC = {"kind": "conversion", "attribution_window": "100ms"}
DESIGN = {
    "experiment": "exp",
    "owner": "tests",
    "hypothesis": "people know better",
    "unit": "member",
    "planned_sample": 4000,
    "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
    "metrics": [
        METRIC | {"key": "click", "role": "primary", "direction": "increase"},
        METRIC | {"key": "error", "role": "guardrail", "direction": "decrease", "margin": {"absolute": 0.1}},
    ],
    # No stage is ever over by itself.
    "ramp": {
        "stages": [
            {"coverage": 0.1, "minimum_units": 10**9},
            {"coverage": 0.5, "minimum_units": 10**9},
            {"coverage": 1.0},
        ]
    },
}


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker) -> Iterator[Settings]:
    """A worker, and an experiment with its first result."""
    found = settings_with_topics(embedded_broker)
    apply(found, DESIGN)
    with WorkerThread(found) as worker:
        time.sleep(1.0)  # the spec must govern before its first exposure
        expose(found, range(40))
        until(lambda: read_standings(found, now_ms=0), worker=worker)
        yield found
        worker.check()


def expose(settings: Settings, units: range, *, harmed: bool = False) -> None:
    """Expose units; those of the new arm all have an error, if it is harmed."""
    send(settings, units, experiment="exp", arms=("old", "new"), harm="error" if harmed else None)


def order(settings: Settings, action: str, **fields: Any) -> ConfigRecord:
    """Give an order and wait for it; the config that came of it."""
    call = Call(
        experiment="exp", action=OperatorAction(action), actor="kim", reason="the test says so", **fields
    )
    placed = place(settings, call, now_ms=now_ms(), nonce=action)
    outcome = wait(settings, placed, timeout_s=DEADLINE_S)
    assert outcome.fate is Fate.ENACTED, outcome
    assert outcome.config is not None
    return outcome.config


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own: the worker of this one writes its log to standard output."""
    shared = ("--bootstrap", settings.bootstrap, "--broker", "embedded")
    return subprocess.run(
        [sys.executable, "-m", "stream_xp", *arguments, *shared], capture_output=True, text=True, check=False
    )


def test_every_order_is_enacted_and_told(settings: Settings) -> None:
    def told(config: ConfigRecord) -> tuple[str, float, bool]:
        return config.status, config.coverage, config.paused

    assert told(order(settings, "pause")) == ("running", 0.1, True)
    assert told(order(settings, "resume")) == ("running", 0.1, False)
    assert told(order(settings, "set_stage", stage=1)) == ("running", 0.5, False)
    stopped = order(settings, "stop")
    assert told(stopped) == ("stopped", 0.0, False)
    assert stopped.weights == {"old": 1.0, "new": 0.0}
    # After a stop the ramp begins again at its first stage.
    again = order(settings, "reset", signal=(stopped.signal_id or "")[:8])
    assert told(again) == ("running", 0.1, False)
    assert again.weights == {"old": 0.5, "new": 0.5}
    ended = command(
        settings, "ship", "exp", "--reason", "enough", "--actor", "jo", "--wait", "--timeout", "120"
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "shipped, coverage 1, old 0, new 1" in ended.stdout
    refused = command(settings, "pause", "exq", "--reason", "r")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "Error: exq: no such experiment on xp.experiments; there is exp\n"
    shown = command(settings, "signals", "exp")
    actions = [line.split("  ")[1] for line in shown.stdout.splitlines()]
    words = ("PAUSE", "RESUME", "SET STAGE", "STOP", "RESET", "SHIP")
    assert (shown.returncode, shown.stderr, actions) == (0, "", [f"ORDER {word}" for word in words])


def test_an_experiment_that_harmed_has_its_memo(settings: Settings, tmp_path: Path) -> None:
    none_yet = command(settings, "memo", "exp")
    assert (none_yet.returncode, none_yet.stdout) == (2, "")
    assert "version 1 has no stop or ship yet" in none_yet.stderr
    expose(settings, range(40, 640), harmed=True)
    until(lambda: list(read_signals(settings)))
    told = command(settings, "memo", "exp", "--json")
    assert told.returncode == 0, told.stderr
    memo = msgspec.json.decode(told.stdout, type=Memo)
    (signal,) = read_signals(settings)
    assert isinstance(signal, Signal)
    assert (memo.decided.signal_id, memo.decided.action, memo.decided.metric) == (signal.id, "stop", "error")
    assert memo.statistics_hash == signal.data.result.statistics_hash
    assert [(one.metric, one.state) for one in memo.metrics][1] == ("error", "harmed")
    written = command(settings, "memo", "exp", "--out", str(tmp_path / "memos"))
    assert written.returncode == 0, written.stderr
    page = Path(written.stdout.strip())
    assert page.read_text().startswith("# exp, version 1: stop (new, error)\n")
    assert page.with_suffix(".json").is_file()
