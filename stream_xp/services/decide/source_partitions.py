"""What the source partitions of an experiment say together of how far they are."""

from __future__ import annotations

from collections.abc import Sequence

from stream_xp.domain.decision import MonitorResult, PartitionOffsets
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.rollout import Monitors
from stream_xp.domain.statistics import PartitionStatistics, add_outcomes
from stream_xp.engine.monitors import Beside
from stream_xp.engine.stalls import DataTime

SPREAD_MS = 5_000
"""Beyond the idle grace, how far the watermarks of source partitions may be apart for an arm to ship."""


def apart(parts: Sequence[PartitionStatistics], spread_ms: int) -> tuple[str, ...]:
    """Why nothing may ship where the source partitions have come unequally far: units of different times.

    All partitions at one watermark are what traffic had brought by then, a path that the tests follow look
    by look. One partition an hour ahead of the others is on no such path.
    """
    watermarks = [part.watermark_ms for part in parts]
    if None in watermarks:
        return ("a source partition has no watermark yet",)
    apart_ms = max(watermarks, default=0) - min(watermarks, default=0)  # type: ignore[type-var, operator]
    return () if apart_ms <= spread_ms else (f"the source partitions are {apart_ms / 1000:.1f} s apart",)


def least_watermark(parts: Sequence[PartitionStatistics]) -> int | None:
    """The watermark of the partition that is furthest behind; None before each has one."""
    watermarks = [part.watermark_ms for part in parts if part.watermark_ms is not None]
    return min(watermarks) if watermarks and len(watermarks) == len(parts) else None


def runtime(parts: Sequence[PartitionStatistics], first_exposure_ms: int | None) -> int:
    """Milliseconds from the first exposure to the watermark of the partition that is furthest behind."""
    watermark_ms = least_watermark(parts)
    return (
        0 if first_exposure_ms is None or watermark_ms is None else max(0, watermark_ms - first_exposure_ms)
    )


def old_from(record: ExperimentRecord, parts: Sequence[PartitionStatistics]) -> int | None:
    """Wall clock from which the data of an experiment are older than it allows; None where it allows any age."""
    limit, watermark_ms = (record.spec.monitors or Monitors()).data_age, least_watermark(parts)
    return None if limit is None or watermark_ms is None else watermark_ms + duration_ms(limit) + 1


def beside(
    parts: Sequence[PartitionStatistics],
    now_ms: int,
    *,
    before: tuple[MonitorResult, ...],
    opened: str | None,
) -> Beside:
    """What monitors need to know beside the statistics; the arguments are those of `Beside`."""
    watermark_ms = least_watermark(parts)
    newest_ms = max((part.watermark_ms for part in parts if part.watermark_ms is not None), default=0)
    lateness_ms = max((part.allowed_lateness_ms for part in parts), default=0)
    return Beside(
        add_outcomes(part.exposure_outcomes for part in parts),
        add_outcomes(part.reward_outcomes for part in parts),
        # A broker's clock may be ahead of this one.
        None if watermark_ms is None else max(0, now_ms - watermark_ms),
        before,
        opened,
        None if watermark_ms is None else DataTime(watermark_ms, newest_ms, lateness_ms),
    )


def offsets_of(part: PartitionStatistics) -> PartitionOffsets:
    """Up to where the statistics of a partition were counted, and by which rules: what a result says of it."""
    return PartitionOffsets(
        exposures=part.exposures.applied_offset,
        rewards=part.rewards.applied_offset,
        watermark_ms=part.watermark_ms,
        exposures_from=part.exposures.first_offset,
        rewards_from=part.rewards.first_offset,
        allowed_lateness_ms=part.allowed_lateness_ms,
        rules=part.rules,
        behind_watermark=part.behind_watermark,
    )
