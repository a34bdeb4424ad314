"""Checks every statistics record that stands on ``xp.stats`` against the raw topics."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.statistics import Outcomes, PartitionStatistics, Progress
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.oracle.compare import Mismatch, first_mismatch, outcome_mismatch
from stream_xp.services.oracle.reading import LogReader, ReadStep, open_reader
from stream_xp.services.oracle.recompute import (
    EXPOSURES,
    REWARDS,
    LoggedRecord,
    LoggedSpec,
    Recomputed,
    log_times,
    recompute,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stream_xp.settings import Settings

_SPECS = msgspec.json.Decoder(ExperimentRecord)
_STATISTICS = msgspec.json.Decoder(PartitionStatistics)


class OffsetRange(msgspec.Struct, frozen=True, kw_only=True):
    """Offsets of one source topic's partition, both inclusive; None before the first record."""

    first: int | None
    last: int | None


class Difference(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first value in which one statistics record and the raw topics disagree.

    Attributes:
        what: the value: `units`, `moments`, an outcome such as `rewards late`, …
        engine: what stands on ``xp.stats``.
        oracle: what the raw topics come to.
        exposures, rewards: the offsets that both were computed from; the cause is among them.

    """

    experiment: str
    version: int
    partition: int
    what: str
    engine: str
    oracle: str
    exposures: OffsetRange
    rewards: OffsetRange
    metric: str | None = None
    arm: str | None = None
    epoch: int | None = None
    segment: str | None = None

    def __str__(self) -> str:
        named = (("metric", self.metric), ("arm", self.arm), ("epoch", self.epoch), ("segment", self.segment))
        where = "".join(f", {name} {value}" for name, value in named if value not in (None, ""))
        return (
            f"{self.experiment} version {self.version}, partition {self.partition}{where}: {self.what}: "
            f"engine {self.engine}, oracle {self.oracle} (exposures {self.exposures.first} to "
            f"{self.exposures.last}, rewards {self.rewards.first} to {self.rewards.last})"
        )


class OracleReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the oracle found.

    Attributes:
        equal: whether every checked record equals the raw topics byte for byte.
        checked: statistics records compared.
        exposures, rewards: raw records read.
        differences: the first difference of each statistics record that has one.

    """

    equal: bool
    checked: int
    exposures: int
    rewards: int
    experiments: tuple[str, ...]
    differences: tuple[Difference, ...]


class _Prefix(NamedTuple):
    """What the statistics of a source partition are a function of."""

    exposures: tuple[int | None, int | None]
    rewards: tuple[int | None, int | None]
    watermark_ms: int | None
    allowed_lateness_ms: int
    behind_watermark: tuple[tuple[str, tuple[int, ...]], ...]


_Group: TypeAlias = dict[_Prefix, list[PartitionStatistics]]


def check(settings: Settings, *, progress: Callable[[ReadStep], None] | None = None) -> OracleReport:
    """Recompute every statistics record from the raw topics and compare byte for byte.

    Memory grows with the raw records of one source partition, which are held as they are read.

    Raises:
        ConfigError: ``xp.stats`` is empty: there is nothing to check.
        LogTruncatedError: the raw topics no longer reach back to the records that were counted.
        DependencyError: the broker did not answer in time.

    """
    with open_reader(settings, progress=progress) as reader:
        experiments = read_specs(reader, settings)
        newest = read_statistics(reader, settings)
        if not newest:
            raise ConfigError(f"{settings.topic('stats')} holds no statistics: there is nothing to check")
        by_partition: dict[int, _Group] = defaultdict(lambda: defaultdict(list))
        for record in newest:
            by_partition[record.partition][_prefix(record)].append(record)
        found: list[Difference] = []
        read = {EXPOSURES: 0, REWARDS: 0}
        for partition, prefixes in sorted(by_partition.items()):
            logs = _read_logs(reader, settings, partition, list(prefixes))
            for topic, records in logs.items():
                read[topic] += len(records)
            for prefix, group in prefixes.items():
                found += _check_prefix(settings, partition, prefix, group, logs=logs, experiments=experiments)
    return OracleReport(
        equal=not found,
        checked=len(newest),
        exposures=read[EXPOSURES],
        rewards=read[REWARDS],
        experiments=tuple(sorted({record.experiment for record in newest})),
        differences=tuple(found),
    )


def read_specs(reader: LogReader, settings: Settings) -> list[LoggedSpec]:
    """Return all of ``xp.experiments``, each record with its log time; what cannot be decoded is left out."""
    topic = settings.topic("experiments")
    specs: list[LoggedSpec] = []
    for partition in reader.partitions(topic):
        records = reader.read_all(topic, partition)
        for one, log_ms in zip(records, log_times([one.timestamp_ms for one in records]), strict=True):
            try:
                record = _SPECS.decode(one.value) if one.value is not None else None
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue
            if one.key:
                specs.append(LoggedSpec(log_ms, one.key.decode(errors="replace"), record, partition))
    return specs


def read_statistics(reader: LogReader, settings: Settings) -> list[PartitionStatistics]:
    """Return the newest record under each key of ``xp.stats``."""
    topic = settings.topic("stats")
    newest: dict[bytes | None, PartitionStatistics] = {}
    for partition in reader.partitions(topic):
        for one in reader.read_all(topic, partition):
            if not one.value:
                newest.pop(one.key, None)
                continue
            try:
                record = _STATISTICS.decode(one.value)
            except msgspec.MsgspecError as error:
                raise DependencyError(f"{topic}[{partition}] offset {one.offset}: {error}") from error
            if one.key not in newest or record.newer_than(newest[one.key]):
                newest[one.key] = record
    return sorted(newest.values(), key=lambda record: (record.experiment, record.version, record.partition))


def _prefix(record: PartitionStatistics) -> _Prefix:
    return _Prefix(
        exposures=_span(record.exposures),
        rewards=_span(record.rewards),
        watermark_ms=record.watermark_ms,
        allowed_lateness_ms=record.allowed_lateness_ms,
        behind_watermark=tuple(sorted(record.behind_watermark.items())),
    )


def _span(progress: Progress) -> tuple[int | None, int | None]:
    return (progress.first_offset, progress.applied_offset)


def _read_logs(
    reader: LogReader, settings: Settings, partition: int, prefixes: Sequence[_Prefix]
) -> dict[str, list[LoggedRecord]]:
    """Read each raw topic once, over all the spans that are needed of it."""
    spans = {
        EXPOSURES: [prefix.exposures for prefix in prefixes],
        REWARDS: [prefix.rewards for prefix in prefixes],
    }
    logs: dict[str, list[LoggedRecord]] = {}
    for topic, wanted in spans.items():
        known = [(first, last) for first, last in wanted if first is not None and last is not None]
        logs[topic] = (
            reader.read_span(
                settings.topic(topic),
                partition,
                first=min(first for first, _ in known),
                last=max(last for _, last in known),
            )
            if known
            else []
        )
    return logs


def _within(records: list[LoggedRecord], span: tuple[int | None, int | None]) -> list[LoggedRecord]:
    first, last = span
    if first is None or last is None:
        return []
    return [record for record in records if first <= record.offset <= last]


def _check_prefix(
    settings: Settings,
    partition: int,
    prefix: _Prefix,
    group: Sequence[PartitionStatistics],
    *,
    logs: dict[str, list[LoggedRecord]],
    experiments: Sequence[LoggedSpec],
) -> list[Difference]:
    exposures = _within(logs[EXPOSURES], prefix.exposures)
    rewards = _within(logs[REWARDS], prefix.rewards)
    truth = recompute(
        exposures,
        rewards,
        experiments,
        partition=partition,
        watermark_ms=prefix.watermark_ms,
        allowed_lateness_ms=prefix.allowed_lateness_ms,
        activation_delay_ms=settings.activation_delay_ms,
        limits=Limits(record_bytes=settings.max_record_bytes, future_ms=settings.future_tolerance_ms),
        behind_watermark=dict(prefix.behind_watermark),
    )
    earliest_ms = _earliest_watermark(exposures, rewards)
    found = []
    for record in group:
        mismatch = _mismatch(record, truth, earliest_ms)
        if mismatch is not None:
            found.append(_difference(record, mismatch))
    return found


def _earliest_watermark(exposures: Sequence[LoggedRecord], rewards: Sequence[LoggedRecord]) -> int | None:
    """Return the watermark that the records alone give; the clock may only move it on."""
    if not exposures or not rewards:
        return None
    return min(log_times([one.timestamp_ms for one in records])[-1] for records in (exposures, rewards))


def _mismatch(record: PartitionStatistics, truth: Recomputed, earliest_ms: int | None) -> Mismatch | None:
    if earliest_ms is not None and (record.watermark_ms is None or record.watermark_ms < earliest_ms):
        return Mismatch("watermark_ms", str(record.watermark_ms), f"{earliest_ms} or later")
    ours = truth.statistics.get((record.experiment, record.version))
    if ours is None:
        return Mismatch("spec", f"version {record.version}", "no such version on the experiments topic")
    return (
        first_mismatch(record.statistics, ours)
        or outcome_mismatch(EXPOSURES, record.exposure_outcomes, truth.exposure_outcomes)
        or outcome_mismatch(REWARDS, record.reward_outcomes, truth.reward_outcomes)
        or _unconserved(record.exposure_outcomes, record.reward_outcomes)
    )


def _unconserved(*outcomes: Outcomes) -> Mismatch | None:
    broken = [one for one in outcomes if not one.conserved()]
    return Mismatch("conservation", str(msgspec.to_builtins(broken[0])), "a sum") if broken else None


def _difference(record: PartitionStatistics, mismatch: Mismatch) -> Difference:
    return Difference(
        experiment=record.experiment,
        version=record.version,
        partition=record.partition,
        exposures=OffsetRange(first=record.exposures.first_offset, last=record.exposures.applied_offset),
        rewards=OffsetRange(first=record.rewards.first_offset, last=record.rewards.applied_offset),
        **mismatch._asdict(),
    )
