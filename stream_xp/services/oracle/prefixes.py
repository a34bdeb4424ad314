"""A prefix of one source partition: what statistics are a function of, and its records."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from stream_xp.domain.codec import Limits
from stream_xp.domain.statistics import PartitionStatistics, Progress, Rules
from stream_xp.services.oracle.explain import Cut
from stream_xp.services.oracle.recompute import (
    EXPOSURES,
    REWARDS,
    LoggedRecord,
    LoggedSpec,
    Screening,
    log_times,
    screen,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stream_xp.services.oracle.reading import LogReader
    from stream_xp.settings import Settings

Logs = dict[str, list[LoggedRecord]]
"""Raw records by topic (`EXPOSURES`, `REWARDS`)."""


class Prefix(NamedTuple):
    """What the statistics of a source partition are a function of.

    Attributes:
        exposures, rewards: first and applied offset, both inclusive; None before the first record.

    """

    partition: int
    exposures: tuple[int | None, int | None]
    rewards: tuple[int | None, int | None]
    watermark_ms: int | None
    allowed_lateness_ms: int
    rules: Rules
    behind_watermark: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def end(self) -> Cut:
        """The applied offsets."""
        return Cut(exposures=self.exposures[1], rewards=self.rewards[1])


def rules_of(settings: Settings) -> Rules:
    """Return the rules that a worker of these settings would follow."""
    return Rules(
        activation_delay_ms=settings.activation_delay_ms,
        future_tolerance_ms=settings.future_tolerance_ms,
        max_record_bytes=settings.max_record_bytes,
        max_units=settings.max_units,
    )


def unsaid_rules(settings: Settings) -> Rules:
    """Return the rules to assume of a worker that names none: no worker had a bound of units before it said so."""
    return msgspec.structs.replace(rules_of(settings), max_units=None)


def prefix_of(record: PartitionStatistics, fallback: Rules) -> Prefix:
    """Return the prefix of a statistics record; `fallback` are the rules of one that names none."""
    return Prefix(
        partition=record.partition,
        exposures=_span(record.exposures),
        rewards=_span(record.rewards),
        watermark_ms=record.watermark_ms,
        allowed_lateness_ms=record.allowed_lateness_ms,
        rules=fallback if record.rules is None else record.rules,
        behind_watermark=tuple(sorted(record.behind_watermark.items())),
    )


def _span(progress: Progress) -> tuple[int | None, int | None]:
    return (progress.first_offset, progress.applied_offset)


def read_logs(reader: LogReader, settings: Settings, prefixes: Sequence[Prefix]) -> Logs:
    """Read each raw topic of one partition once, over all the spans that are needed of it.

    Raises:
        LogSpanError: the broker does not hold all of them.
        DependencyError: the broker stalls.

    """
    logs: Logs = {}
    for topic in (EXPOSURES, REWARDS):
        spans = [getattr(prefix, topic) for prefix in prefixes]
        known = [(first, last) for first, last in spans if first is not None and last is not None]
        logs[topic] = (
            reader.read_span(
                settings.topic(topic),
                prefixes[0].partition,
                first=min(first for first, _ in known),
                last=max(last for _, last in known),
            )
            if known
            else []
        )
    return logs


def read_on(reader: LogReader, settings: Settings, partition: int, logs: Logs, *, most: int) -> Logs:
    """Return the logs with up to about `most` records more of each topic, as far as there are any."""
    return {
        topic: records
        + reader.read_after(
            settings.topic(topic), partition, last=records[-1].offset if records else -1, most=most
        )
        for topic, records in logs.items()
    }


def within(prefix: Prefix, logs: Mapping[str, Sequence[LoggedRecord]]) -> Logs:
    """Return the records of the prefix."""
    found: Logs = {}
    for topic, records in logs.items():
        first, last = getattr(prefix, topic)
        known = first is not None and last is not None
        found[topic] = [one for one in records if first <= one.offset <= last] if known else []
    return found


def since(prefix: Prefix, logs: Mapping[str, Sequence[LoggedRecord]]) -> Logs:
    """Return the records of the prefix, and what follows it."""
    found: Logs = {}
    for topic, records in logs.items():
        first = getattr(prefix, topic)[0] or 0
        found[topic] = [one for one in records if one.offset >= first]
    return found


def screened(prefix: Prefix, logs: Logs, experiments: Sequence[LoggedSpec]) -> Screening:
    """Take the records through the first steps, under the prefix's watermark and rules."""
    rules = prefix.rules
    return screen(
        logs[EXPOSURES],
        logs[REWARDS],
        experiments,
        watermark_ms=prefix.watermark_ms,
        allowed_lateness_ms=prefix.allowed_lateness_ms,
        activation_delay_ms=rules.activation_delay_ms,
        limits=Limits(record_bytes=rules.max_record_bytes, future_ms=rules.future_tolerance_ms),
        behind_watermark=dict(prefix.behind_watermark),
        max_units=rules.max_units,
    )


def earliest_watermark(logs: Logs) -> int | None:
    """Return the watermark that the records alone give; the clock may only move it on."""
    if not all(logs.values()):
        return None
    return min(log_times([one.timestamp_ms for one in records])[-1] for records in logs.values())
