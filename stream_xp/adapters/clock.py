"""What time it is: the wall clock for telemetry and quiet partitions, or one that is moved by hand."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """A source of epoch milliseconds. No statistic depends on it but through a recorded watermark."""

    def now_ms(self) -> int:
        """Now."""
        ...

    def quiet_ms(self, observed_ms: int) -> int:
        """Up to when a partition is known to be quiet that was seen at its end at wall time `observed_ms`."""
        ...


class WallClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        """Now, epoch milliseconds."""
        return time.time_ns() // 1_000_000

    def quiet_ms(self, observed_ms: int) -> int:
        """The time of the observation: what is appended later has a later log time."""
        return observed_ms


class ManualClock:
    """A clock for history: it stands until it is moved on. Safe to use from several threads."""

    def __init__(self, start_ms: int) -> None:
        self._lock = threading.Lock()
        self._now_ms = start_ms

    def now_ms(self) -> int:
        """The time it was last moved to, epoch milliseconds."""
        with self._lock:
            return self._now_ms

    def quiet_ms(self, observed_ms: int) -> int:  # noqa: ARG002 (history has no observation time)
        """The time it was last moved to; whoever moves it knows that nothing older is still to come."""
        return self.now_ms()

    def advance_to(self, now_ms: int) -> None:
        """Move it on; it never goes back."""
        with self._lock:
            self._now_ms = max(self._now_ms, now_ms)
