"""Arms that get no units: the run of units in other arms since an arm's last one, whatever the order they come in.

Records of one arm may come in batches, or later than those of another: each server ships its own log. In the order of
counting such an arm has long runs without a stall. What is promised is only that a record is appended within the
allowed lateness of what it tells, or else it is late and not counted. So a run takes the units that no such record can
fall between: from an allowed lateness after the look at which the arm last got a unit (until then, units may come that
were exposed before that one), up to an allowed lateness before now (since then, one of the arm may be on its way). All
of them were exposed after the arm's last one, and every unit that the arm got among them would be here by now. In the
order of exposure it is a run of at least as many, and `stats.arm_stall` holds of it.

The begin and the ends of a run are looks, so it is never longer than the true one: conservative. What a look needs of
those before stands in `ArmRun`; giving it its own answer changes nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec
import numpy as np

from stream_xp import stats
from stream_xp.domain.decision import ArmCount, ArmRun, MonitorName, MonitorResult
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.rollout import Monitors
from stream_xp.domain.statistics import ALL, ExperimentStatistics
from stream_xp.engine.comparison import cells
from stream_xp.engine.evaluate import counted_by, unit_counts

MOST_MARKS = 8
"""Looks that wait to be an allowed lateness old."""
_MARKS_PER_LATENESS = 4


class DataTime(NamedTuple):
    """How far the source partitions of an experiment have come.

    Attributes:
        least_ms, newest_ms: watermarks of the partition that is furthest behind, and furthest ahead.
        lateness_ms: the allowed lateness.
    """

    least_ms: int
    newest_ms: int
    lateness_ms: int

    @property
    def settled_ms(self) -> int:
        """All that was exposed until then, and counts, is counted."""
        return self.least_ms - self.lateness_ms


def stalls(
    record: ExperimentRecord,
    statistics: ExperimentStatistics,
    time: DataTime | None,
    before: dict[str, ArmRun],
) -> list[MonitorResult]:
    """The monitor of each arm, without its latch; arms share the level.

    Args:
        record: the experiment.
        statistics: what was counted.
        time: None before every source partition has a watermark; nothing is proven then.
        before: arm key to its run, as of the look before or of this one.
    """
    counts, places = unit_counts(statistics), cells(record)
    rows, weights = (np.array(table) for table in counted_by(record.spec, places, counts))
    # An arm of weight 1 has no others, and one of weight 0 expects nothing.
    others = np.where(weights < 1, rows.sum(axis=-1, keepdims=True) - rows, 0).T
    rarity = np.asarray(stats.arm_stall(others, weights.T, units=0).log_rarity)
    at_ms = 0 if time is None else time.newest_ms
    found = []
    for at, arm in enumerate(record.spec.arms):
        units = sum(n for (key, _, segment), n in counts.items() if (key, segment) == (arm.key, ALL))
        seen = ArmCount(at_ms=at_ms, others=int(others[at].sum()), nats=float(rarity[at]))
        run = _run(before.get(arm.key), seen, units=units, time=time)
        # Crossovers may have been the arm's own once.
        found.append(_stall(record, arm.key, run, units=units + statistics.crossover_units))
    return found


def _stall(record: ExperimentRecord, arm: str, run: ArmRun, *, units: int) -> MonitorResult:
    length, nats = 0, 0.0
    if run.first is not None and run.last is not None:
        length = max(0, run.last.others - run.first.others)
        nats = max(0.0, run.last.nats - run.first.nats)
    return MonitorResult(
        monitor=MonitorName.EXPOSURE_STALL,
        arm=arm,
        value=float(length),
        log_e=_log_e(nats, units=units),
        threshold_log_e=math.log(len(record.spec.arms) / (record.spec.monitors or Monitors()).alpha),
        run=run,
        reason=f"{arm} gets no units: {length} in a row went to other arms",
    )


def _log_e(nats: float, *, units: int) -> float:
    """`stats.ArmStall.log_e` of a run that is known by its rarity.

    Args:
        nats: rarity of the run.
        units: that came to the arm, or more.
    """
    number = math.log(units + 1.0)
    return float(np.logaddexp(0.0, nats - number)) - math.log(units + 2.0)


# --- the run that is on now ----------------------------------------------------------------------------------


def _run(before: ArmRun | None, seen: ArmCount, *, units: int, time: DataTime | None) -> ArmRun:
    """A new run if the arm has got a unit since the look before; a unit lost is no sign of life."""
    if before is None or units > before.units:
        # An arm without any unit had none before the first of the others: its run begins with them.
        run = ArmRun(units=units, first=None if units else ArmCount())
    else:
        run = msgspec.structs.replace(before, units=units)
    return run if time is None else _moved_on(run, seen, time)


def _moved_on(run: ArmRun, seen: ArmCount, time: DataTime) -> ArmRun:
    since_ms = time.newest_ms if run.since_ms is None else run.since_ms
    run = msgspec.structs.replace(run, since_ms=since_ms)
    if run.first is None:
        if since_ms > time.settled_ms:
            return run
        run = msgspec.structs.replace(run, first=seen)
    run = _settled(run, time)
    if _is_news(run, seen, time):
        run = msgspec.structs.replace(run, marks=(*run.marks, seen))
    return _settled(run, time)


def _settled(run: ArmRun, time: DataTime) -> ArmRun:
    """The run with its end at the newest look that is an allowed lateness old."""
    old = [mark for mark in run.marks if mark.at_ms <= time.settled_ms]
    if not old:
        return run
    return msgspec.structs.replace(run, last=old[-1], marks=run.marks[len(old) :])


def _is_news(run: ArmRun, seen: ArmCount, time: DataTime) -> bool:
    """Whether a look is worth waiting for: there are more units, and it is far enough from the one before."""
    if len(run.marks) == MOST_MARKS:
        return False
    newest = run.marks[-1] if run.marks else run.last or run.first
    far = not run.marks or seen.at_ms - run.marks[-1].at_ms >= time.lateness_ms // _MARKS_PER_LATENESS
    return far and newest is not None and seen.others > newest.others


__all__ = ["MOST_MARKS", "DataTime", "stalls"]
