"""The demo as a newcomer runs it: one command, on the embedded broker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.broker, pytest.mark.slow]

COMMAND = [sys.executable, "-c", "from stream_xp.cli import main; main()", "demo"]


@pytest.fixture(autouse=True)
def _confluent_kafka() -> None:
    pytest.importorskip("confluent_kafka", reason="the extra `embedded` is not installed")


def test_the_demo_comes_out_right(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [*COMMAND, "--duration", "20", "--seed", "3", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the demo came out right" in done.stdout
    assert "Traceback" not in done.stderr
    report = msgspec.json.decode(file.read_bytes())
    assert report["right"]
    assert report["conserved"]
    assert report["differences"] == []
    found = {
        e["experiment"]: (e["decision"]["action"], e["decision"].get("arm")) for e in report["experiments"]
    }
    assert found == {
        "checkout-canary": ("stop", "canary"),
        "artwork": ("ship", "cell-2"),
        "aa": ("hold", None),
    }
    assert all(experiment["right"] for experiment in report["experiments"])
    canary, artwork, aa = report["experiments"]
    assert canary["detection_delay_ms"] > 0
    assert artwork["decided_ms"] >= 12_000
    assert aa["look"] > 5
    assert report["exposures"]["in"] + report["rewards"]["in"] == report["events"] > 200_000
    for topic in ("exposures", "rewards"):
        assert all(report[topic][outcome] for outcome in ("duplicate", "late", "dead_lettered"))
    assert report["latency"]["samples"] > 10_000
    assert report["latency"]["open"] == 0


def test_an_interrupt_ends_the_demo_at_once() -> None:
    with subprocess.Popen(
        COMMAND,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("running"):
                break
        time.sleep(1)
        asked = time.monotonic()
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert demo.returncode == 1
    assert "Aborted!" in errors
    assert "Traceback" not in errors
