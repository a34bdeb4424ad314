"""`python -m tests.chaos [short|full|dev]`: the chaos suite and its table.

A full run takes most of an hour and writes `results.json` and the table of docs/guarantees.md. A short one is the
classes that stand for the others; `dev` is every class with the fewest faults. Further arguments go to pytest.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def main() -> int:
    """Run the suite; pytest's exit code."""
    intensity, *arguments = sys.argv[1:] or ["full"]
    if intensity not in ("dev", "short", "full"):
        intensity, arguments = "full", sys.argv[1:]
    os.environ["STREAM_XP_TEST_CHAOS"] = intensity
    if intensity == "full" and not arguments:
        os.environ.setdefault("STREAM_XP_TEST_CHAOS_RESULTS", str(FOLDER / "results.json"))
    return pytest.main([str(FOLDER), "-m", "chaos", "-p", "no:randomly", *arguments])


if __name__ == "__main__":
    sys.exit(main())
