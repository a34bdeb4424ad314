"""How many runs a simulation draws: all that its docstring counts on with `make error-rates`, a part of them in CI.

The short number must leave the Monte Carlo error so small that a method that errs still fails.
"""

from __future__ import annotations

import os
from typing import Final

VARIABLE: Final = "STREAM_XP_TEST_ERROR_RATES"


def runs(full: int, *, short: int) -> int:
    """Return `full` where the variable says so, otherwise `short`."""
    return full if os.environ.get(VARIABLE) == "full" else short


__all__ = ["VARIABLE", "runs"]
