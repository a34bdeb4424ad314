"""Records as columns, and the names of their topics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Booleans: TypeAlias = NDArray[np.bool_]

EXPOSURES: Final = "exposures"
REWARDS: Final = "rewards"
TOPICS: Final = (EXPOSURES, REWARDS)
EXPOSURE, REWARD = 0, 1
"""Where the topics stand in `TOPICS`."""

FOREVER: Final = 2**62
NOWHERE: Final = -1
"""A field without a meaning in a record."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Records as columns of one length; times in milliseconds from the start.

    A field without a meaning in a record is -1. A record and its copy have the same `identity`; `malformed`
    is a position in the corpus.
    """

    topic: Integers
    experiment: Integers
    unit: Integers
    arm: Integers
    epoch: Integers
    segment: Integers
    metric: Integers
    value: Floats
    event_ms: Integers
    send_ms: Integers
    identity: Integers
    malformed: Integers

    def __len__(self) -> int:
        return len(self.topic)

    def take(self, rows: Integers | Booleans | slice) -> Columns:
        """Return some of the records."""
        return Columns(*(getattr(self, name)[rows] for name in self.__slots__))


def concatenate(parts: list[Columns]) -> Columns:
    """Records one after the other."""
    return Columns(*(np.concatenate([getattr(p, name) for p in parts]) for name in Columns.__slots__))


def columns(count: int, **given: NDArray[np.generic] | int) -> Columns:
    """Columns with the given fields, arrays or one value for all, and -1 in the others."""

    def column(name: str) -> Any:
        kind = np.float64 if name == "value" else np.int64
        return np.broadcast_to(np.asarray(given.get(name, NOWHERE), dtype=kind), count)

    return Columns(*map(column, Columns.__slots__))
