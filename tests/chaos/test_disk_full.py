"""No room on the disk: a worker needs none; a command that cannot write says so and fails."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from chaos.harness import Rig

FULL = Path("/dev/full")


@pytest.mark.chaos("disk full")
@pytest.mark.parametrize("full", ["log device", "file size"])
def test_a_worker_lives_on_a_full_disk(rig: Rig, full: str) -> None:
    rig.prepare()
    traffic = rig.traffic()
    options = {"log": FULL} if full == "log device" else {"faults": ("--file-bytes", "512")}
    for _ in range(rig.count(dev=1, short=1, full=3)):
        with rig.worker(**options) as worker:
            with traffic.flowing():
                time.sleep(rig.count(dev=5, short=5, full=10))
            rig.faulted()
            rig.check()
            assert not worker.ended()
            assert worker.terminate() == 0


@pytest.mark.chaos("disk full: oracle", short=True)
def test_the_oracle_fails_cleanly_on_a_full_disk(rig: Rig) -> None:
    rig.prepare()
    traffic = rig.traffic()
    with rig.worker():
        traffic.send(200)
        rig.check()
    command = [sys.executable, "-m", "stream_xp", "oracle", "--bootstrap", rig.settings.bootstrap]
    for extra in ([], ["--json"]):
        with FULL.open("wb") as full:
            done = subprocess.run(
                [*command, "--prefix", rig.settings.prefix, *extra],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        rig.faulted(recovers=False)
        assert done.returncode == 2, done.stderr
        assert (
            done.stderr.splitlines()[-1] == "Error: the output could not be written: No space left on device"
        )
        assert "Traceback" not in done.stderr


def test_the_wrapper_limits_file_sizes(tmp_path: Path) -> None:
    """The fault itself: what a child writes ends at the limit."""
    path = Path(__file__).with_name("child.py")
    log = tmp_path / "log"
    with log.open("wb") as output:
        subprocess.run(
            [sys.executable, str(path), "--file-bytes", "100", "--", "--help"],
            stdout=output,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    assert log.stat().st_size <= 100
