"""Units on their way: exposed in one stretch of time, counted or settled in a later one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stream_xp.services.scenarios.truths import Bools, Ints


class Crowd(NamedTuple):
    """Units of one stretch.

    Attributes:
        due_ms: when they arrive.
        epoch: weight epoch of each run when they were exposed.
        live: runs that were not concluded then.
        units: (runs, contexts, arms).
    """

    due_ms: int
    epoch: Ints
    live: Bools
    units: Ints

    def enter(self, table: Ints) -> None:
        """Add them to units by (run, epoch, arm, context)."""
        runs = np.flatnonzero(self.live)
        table[runs, self.epoch[runs]] += self.units[runs].transpose(0, 2, 1)


class Arrivals:
    """Units that arrive a fixed time after they were exposed.

    Args:
        delays_ms: of each arm.
    """

    def __init__(self, delays_ms: Sequence[int]) -> None:
        delays = np.array(delays_ms)
        self._queues: list[tuple[int, Bools, deque[Crowd]]] = [
            (int(delay), delays == delay, deque()) for delay in np.unique(delays)
        ]

    def expose(self, end_ms: int, epoch: Ints, live: Bools, units: Ints) -> None:
        """Take the units of a stretch that ends at a time."""
        for delay_ms, arms, queue in self._queues:
            queue.append(Crowd(end_ms + delay_ms, epoch.copy(), live.copy(), units * arms))

    def due(self, watermark_ms: int) -> Iterator[Crowd]:
        """Give those that have arrived by a watermark, each once."""
        for _, _, queue in self._queues:
            while queue and queue[0].due_ms <= watermark_ms:
                yield queue.popleft()
