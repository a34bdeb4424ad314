"""A command whose output finds no room ends with one line and an exit code that is no answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_full_disk_is_one_line_and_exit_code_2() -> None:
    spec = min(EXAMPLES.rglob("*.yaml"))
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stream_xp", "validate", str(spec)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == "Error: the output could not be written: No space left on device\n"
    assert done.returncode == 2
