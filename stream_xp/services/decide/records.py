"""Whether a record on a topic of ours is one that we can have written: somebody else's bytes must stop nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
import structlog

from stream_xp.domain.codec import decode_own
from stream_xp.domain.decision import ConfigRecord, Result, Signal
from stream_xp.domain.operator import OrderSignal
from stream_xp.domain.statistics import ExperimentStatistics, PartitionStatistics
from stream_xp.errors import ConfigError
from stream_xp.services.signal_records import SignalRecord, is_order
from stream_xp.stats import CrossMoments, Moments

log = structlog.get_logger(__name__)

Own = TypeVar("Own", Signal, OrderSignal, Result, ConfigRecord)
NUMBERS: dict[type[Any], Callable[[Any], tuple[int | None, ...]]] = {
    OrderSignal: lambda order: (order.data.version,),
    Result: lambda result: (result.version, result.look, result.evaluated_ms),
    Signal: lambda signal: (signal.data.result.version, signal.data.result.evaluated_ms),
    ConfigRecord: lambda config: (config.version, config.config_version, config.effective_ms),
}
"""What goes on into records of ours."""
_LARGEST = 2**62
_LARGEST_COUNT = 2**39
"""Units or events of a row. The tests take counts below 2**53; that many partitions can be added."""


def statistics_or_none(value: bytes, where: Mapping[str, Any]) -> PartitionStatistics | None:
    """The statistics of a partition; what is none is reported, with where it stands, and left out."""
    try:
        record = decode_own(value, PartitionStatistics)
        _check_numbers(record)
        _check_rows(record.statistics)
    except (ConfigError, ValueError) as error:
        log.error("statistics record refused", **where, error=str(error))
        return None
    return record


def signal_or_none(value: bytes) -> SignalRecord | None:
    """A record of the topic of signals; what is none is reported and left out."""
    return own_or_none(value, OrderSignal) if is_order(value) else own_or_none(value, Signal)


def own_or_none(value: bytes, kind: type[Own]) -> Own | None:
    """A record of one kind; what is none is reported and left out."""
    try:
        record = decode_own(value, kind)
        check_range(*NUMBERS[kind](record))
    except (ConfigError, ValueError) as error:
        log.error("record refused", error=str(error))
        return None
    return record


def check_range(*numbers: int | None, least: int = -1, largest: int = _LARGEST) -> None:
    """Raise ValueError for a number out of range; an applied offset may be the one before the first."""
    for number in numbers:
        if number is not None and not least <= number < largest:
            raise ValueError(f"a number is below {least}, or {largest} or more")


def _check_numbers(record: PartitionStatistics) -> None:
    """Raise ValueError where a number is beyond what a partition can have counted."""
    statistics = record.statistics
    progress = (record.exposures, record.rewards)
    check_range(
        record.version,
        record.partition,
        record.allowed_lateness_ms,
        record.watermark_ms,
        statistics.first_exposure_ms,
        *statistics.out_of_range.values(),
        *(offset for one in progress for offset in (one.first_offset, one.applied_offset)),
        *(
            n
            for outcomes in (record.exposure_outcomes, record.reward_outcomes)
            for n in msgspec.structs.astuple(outcomes)
        ),
    )
    check_range(
        statistics.crossover_units,
        statistics.over_limit,
        *(number for row in statistics.units for number in (row.epoch, row.units, row.settled)),
        *(number for row in statistics.moments for number in (row.epoch, row.n)),
        *(number for row in statistics.events for number in (row.epoch, row.events)),
        *(number for row in statistics.histograms for pair in row.bins for number in pair),
        *(row.epoch for row in statistics.histograms),
        least=0,
        largest=_LARGEST_COUNT,
    )


def _check_rows(statistics: ExperimentStatistics) -> None:
    """Raise ValueError where numbers are none that units could have given."""
    if any(row.settled > row.units for row in statistics.units):
        raise ValueError("there cannot be more settled units than units")
    moments = {}
    for row in statistics.moments:
        moments[row.metric, row.arm, row.epoch, row.segment] = Moments(row.n, int(row.s), int(row.q))
    for pair in statistics.products:
        of_y = moments.get((pair.metric, pair.arm, pair.epoch, pair.segment))
        if of_y is None:
            raise ValueError("products stand without their moments")
        CrossMoments(n=of_y.n, sx=int(pair.x), sy=of_y.s, sxx=int(pair.xx), syy=of_y.q, sxy=int(pair.xy))
    for events in statistics.events:
        if not 0 <= events.units <= events.events:
            raise ValueError("there must be at least one event for each unit with events")
    for histogram in statistics.histograms:
        if any(at < 0 or count < 0 for at, count in histogram.bins):
            raise ValueError("bins and their counts must not be negative")
