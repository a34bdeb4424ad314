"""`python -m tests.simulation.cluster`, as it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_several_processes_run_all_schedules() -> None:
    command = [sys.executable, "-m", "tests.simulation.cluster", "--schedules", "60", "--steps", "5"]
    done = subprocess.run(
        [*command, "--processes", "2"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1].startswith("60 schedules, 0 broken, "), done.stdout
