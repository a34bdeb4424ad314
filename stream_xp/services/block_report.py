"""What the ingest stage tells of a block and of a partition: a few array operations a block, none an event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from stream_xp.domain.dead_letter import DeadLetter
from stream_xp.domain.telemetry import BlockReport, PartitionReport
from stream_xp.engine.columns import ExposureColumns, RewardColumns
from stream_xp.engine.registry import DEAD, Registry
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState

SAMPLE = 32
"""Records of a block whose lag is looked at."""
_MOST_ARMS = 64


def block_report(
    topic: str,
    columns: ExposureColumns | RewardColumns,
    letters: Sequence[DeadLetter],
    registry: Registry,
) -> BlockReport:
    """What one block was; dead-lettered records have no event time, and so no lag."""
    return BlockReport(
        topic,
        lags_ms=_lags(columns),
        dead_letters=Counter(str(letter.reason) for letter in letters) if letters else {},
        exposures=_exposures(columns, registry) if isinstance(columns, ExposureColumns) else {},
    )


def _lags(columns: ExposureColumns | RewardColumns) -> list[int]:
    """Of at most SAMPLE records, evenly spread."""
    codes = columns.slot if isinstance(columns, ExposureColumns) else columns.event
    rows = slice(None, None, -(-len(codes) // SAMPLE) or 1)
    lags: list[int] = (columns.log_ms[rows] - columns.time_ms[rows])[codes[rows] != DEAD].tolist()
    return lags


def _exposures(columns: ExposureColumns, registry: Registry) -> dict[tuple[str, str], int]:
    """Records per experiment and arm; those of unknown and archived experiments have no slot."""
    known = columns.slot >= 0
    counts = np.bincount((columns.slot * _MOST_ARMS + columns.arm)[known])
    found: dict[tuple[str, str], int] = {}
    for at in np.flatnonzero(counts).tolist():
        slot = registry.slots[at // _MOST_ARMS]
        key = (slot.experiment, slot.spec.arms[at % _MOST_ARMS].key)
        found[key] = found.get(key, 0) + int(counts[at])
    return found


def partition_report(
    state: PartitionState,
    *,
    following: Mapping[str, int],
    ends: Mapping[str, int],
    covered_ms: int | None,
) -> PartitionReport:
    """Where one partition stands.

    Args:
        state: its fold.
        following: per topic, the offset to apply next.
        ends: per topic, the end of its partition, where it is known.
        covered_ms: as in `PartitionReport`.
    """
    return PartitionReport(
        state.partition,
        applied={topic: offset - 1 for topic, offset in following.items()},
        lags={topic: max(0, end - following[topic]) for topic, end in ends.items()},
        watermark_ms=state.watermark_ms,
        covered_ms=covered_ms,
        units=state.units,
        outcomes={topic: state.outcomes(topic) for topic in (EXPOSURES, REWARDS)},
    )
