"""`python -m tests.chaos [short|full]`: the chaos suite, its table, and `results.json` after a full run.

A full run takes most of an hour, a short one at most five minutes. Further arguments go to pytest.
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
