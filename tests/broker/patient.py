"""`stream-xp` whose worker has as long to write everything out as tests wait for it, not the seconds a pod is given.

    python tests/broker/patient.py worker

Where its exit code tells that everything was written, a slow machine is no reason for another one. That it ends in
seconds, whatever is not written, has a test of its own, with the program as it is.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

from stream_xp.cli import main
from stream_xp.services import worker

LONG_S: Final = 240.0


def be_patient() -> None:
    """Put a long deadline in the place of those of a worker's end."""
    in_time = worker._in_time
    assert worker._EXIT_S < LONG_S

    async def in_long_time(work: Awaitable[None], deadline_s: float, what: str) -> None:
        await in_time(work, LONG_S if what == "write everything out" else deadline_s, what)

    worker._in_time = in_long_time
    worker._EXIT_S = 2 * LONG_S


if __name__ == "__main__":
    be_patient()
    main(prog_name="stream-xp")
