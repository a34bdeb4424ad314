"""Checks every statistics record that stands on ``xp.stats`` against the raw topics."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from stream_xp.domain.codec import decode_own
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.statistics import Outcomes, PartitionStatistics, Rules
from stream_xp.errors import ConfigError
from stream_xp.services.oracle.compare import Mismatch, first_mismatch, outcome_mismatch
from stream_xp.services.oracle.explain import (
    Case,
    Explanation,
    explain,
    first_wrong,
    outcome_contributors,
)
from stream_xp.services.oracle.prefixes import (
    Logs,
    Prefix,
    earliest_watermark,
    prefix_of,
    read_logs,
    read_on,
    rules_of,
    screened,
    since,
    unsaid_rules,
    within,
)
from stream_xp.services.oracle.reading import LogReader, LogSpanError, ReadStep, open_reader
from stream_xp.services.oracle.recompute import (
    EXPOSURES,
    REWARDS,
    LoggedSpec,
    Recomputed,
    VersionKey,
    conclude,
    log_times,
)
from stream_xp.services.oracle.report import (
    Difference,
    Narrowed,
    OffsetRange,
    OracleReport,
    Place,
    Unchecked,
    value_text,
)
from stream_xp.services.passed_over import PassedOver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stream_xp.settings import Settings

__all__ = ["Difference", "OracleReport", "check", "examine", "read_specs", "read_statistics"]

MAX_EXPLAINED: Final = 3
"""Differences that are explained; the others are only named."""
READ_AHEAD: Final = 2_000
"""Records after the applied offset that are searched for another prefix."""


class Published(NamedTuple):
    """A statistics record, and where it stands."""

    place: Place
    key: bytes | None
    record: PartitionStatistics


def check(settings: Settings, *, progress: Callable[[ReadStep], None] | None = None) -> OracleReport:
    """Recompute every statistics record from the raw topics and compare byte for byte; all or nothing.

    Raises:
        ConfigError: ``xp.stats`` is empty: there is nothing to check.
        LogTruncatedError: the raw topics no longer reach back to the records that were counted.
        LogShortError: they end before the records that were counted.
        DependencyError: the broker did not answer in time.

    """
    return _examination(settings, progress, _raise)


def examine(settings: Settings, *, progress: Callable[[ReadStep], None] | None = None) -> OracleReport:
    """Recompute what can be recomputed, and name what cannot.

    Memory grows with the raw records of one source partition, which are held as they are read.

    Raises:
        ConfigError: ``xp.stats`` is empty: there is nothing to check.
        DependencyError: the broker did not answer in time.

    """
    return _examination(settings, progress, lambda _: None)


def _raise(error: LogSpanError) -> None:
    raise error


def _examination(
    settings: Settings,
    progress: Callable[[ReadStep], None] | None,
    on_gap: Callable[[LogSpanError], None],
) -> OracleReport:
    with open_reader(settings, progress=progress) as reader, PassedOver() as passed_over:
        published = read_published(reader, settings, passed_over)
        if not published:
            raise ConfigError(f"{settings.topic('stats')} holds no statistics: there is nothing to check")
        examination = _Examination(reader, settings, published, on_gap, passed_over)
        return examination.report()


class _Examination:
    """One run of the oracle over all source partitions."""

    def __init__(
        self,
        reader: LogReader,
        settings: Settings,
        published: Sequence[Published],
        on_gap: Callable[[LogSpanError], None],
        passed_over: PassedOver,
    ) -> None:
        self._passed_over = passed_over
        self._reader = reader
        self._settings = settings
        self._published = published
        self._on_gap = on_gap
        self._own_rules = rules_of(settings)
        self._unsaid = unsaid_rules(settings)
        self._specs = read_specs(reader, settings, passed_over)
        self._read = {EXPOSURES: 0, REWARDS: 0}
        self._checked = 0
        self._differences: list[Difference] = []
        self._unchecked: list[Unchecked] = []
        self._unpublished: list[Difference] = []

    def report(self) -> OracleReport:
        """Check every source partition that has statistics."""
        partitions: dict[int, list[Published]] = defaultdict(list)
        for one in self._published:
            partitions[one.record.partition].append(one)
        for partition, group in sorted(partitions.items()):
            self._check_partition(partition, group)
        if self._unpublished:
            self._differences += self._still_unpublished()
        return OracleReport(
            equal=not self._differences and not self._unchecked,
            checked=self._checked,
            exposures=self._read[EXPOSURES],
            rewards=self._read[REWARDS],
            experiments=tuple(sorted({one.record.experiment for one in self._published})),
            differences=tuple(sorted(self._differences, key=lambda one: (one.experiment, one.partition))),
            unchecked=tuple(self._unchecked),
            notes=tuple(self._notes(partitions)),
        )

    def _check_partition(self, partition: int, group: Sequence[Published]) -> None:
        prefixes: dict[Prefix, list[Published]] = defaultdict(list)
        for one in group:
            prefixes[self._prefix(one.record)].append(one)
        try:
            logs = read_logs(self._reader, self._settings, list(prefixes))
        except LogSpanError as error:
            self._on_gap(error)
            names = tuple(sorted({one.record.experiment for one in group}))
            self._unchecked.append(Unchecked(partition=partition, experiments=names, reason=str(error)))
            return
        for topic, records in logs.items():
            self._read[topic] += len(records)
        truths = {prefix: self._truth(prefix, logs) for prefix in prefixes}
        for prefix, members in prefixes.items():
            self._check_prefix(prefix, members, truths[prefix], logs)
        earliest = min(prefixes, key=lambda one: (one.exposures[1] or 0) + (one.rewards[1] or 0))
        self._unpublished += _without_record(earliest, truths[earliest], [one.record for one in group])

    def _check_prefix(
        self, prefix: Prefix, members: Sequence[Published], truth: Recomputed, logs: Logs
    ) -> None:
        earliest_ms = earliest_watermark(within(prefix, logs))
        for one in members:
            self._checked += 1
            mismatch = _mismatch(one.record, truth, earliest_ms)
            if mismatch is None:
                continue
            difference = _difference(one, mismatch, notes=_rule_notes(one.record, self._unsaid))
            if len(self._differences) < MAX_EXPLAINED:
                difference = self._explained(difference, one, logs)
            self._differences.append(difference)

    def _prefix(self, record: PartitionStatistics) -> Prefix:
        return prefix_of(record, self._unsaid)

    def _truth(self, prefix: Prefix, logs: Logs) -> Recomputed:
        return conclude(screened(prefix, within(prefix, logs), self._specs), partition=prefix.partition)

    # --- why -----------------------------------------------------------------------------------------------

    def _explained(self, difference: Difference, newest: Published, logs: Logs) -> Difference:
        """Go back to the first record that differs, and look for what explains it."""
        history = self._history(newest)
        at = first_wrong(len(history), lambda place: self._found(history[place].record, logs) is not None)
        wrong, right = history[at], history[at - 1] if at else None
        mismatch, changed = self._found(wrong.record, logs), _changed_rules(history)
        assert mismatch is not None  # noqa: S101 (it is the first wrong one)
        return msgspec.structs.replace(
            difference,
            narrowed=self._narrowed(len(history), wrong, right, mismatch) if history[1:] else None,
            explanation=self._explanation(wrong, mismatch, right, logs),
            notes=(*difference.notes, *([_CHANGED] if changed else [])),
            unsure=changed,
        )

    def _history(self, newest: Published) -> list[Published]:
        """Return what was published under the key and still stands there, from the same first offsets on."""
        place = newest.place
        begun = (newest.record.exposures.first_offset, newest.record.rewards.first_offset)
        found = {newest.record.position(): newest}
        for one in _published(self._reader, self._settings, place.partition, key=newest.key):
            began = (one.record.exposures.first_offset, one.record.rewards.first_offset)
            known = all(first in (None, other) for first, other in zip(began, begun, strict=True))
            if known and one.record.version == newest.record.version and newest.record.newer_than(one.record):
                found.setdefault(one.record.position(), one)
        return [one for _, one in sorted(found.items())]

    def _found(self, record: PartitionStatistics, logs: Logs) -> Mismatch | None:
        prefix = self._prefix(record)
        return _mismatch(record, self._truth(prefix, logs), earliest_watermark(within(prefix, logs)))

    def _narrowed(
        self, records: int, wrong: Published, right: Published | None, mismatch: Mismatch
    ) -> Narrowed:
        return Narrowed(
            records=records,
            wrong=wrong.place,
            wrong_until=self._prefix(wrong.record).end,
            first=value_text(mismatch).removeprefix(", ").removeprefix(": "),
            right=None if right is None else right.place,
            right_until=None if right is None else self._prefix(right.record).end,
        )

    def _explanation(
        self, wrong: Published, mismatch: Mismatch, right: Published | None, logs: Logs
    ) -> Explanation | None:
        record, prefix = wrong.record, self._prefix(wrong.record)
        before = None if right is None else self._prefix(right.record).end
        version = (record.experiment, record.version)
        truth = self._truth(prefix, logs)
        if version not in truth.statistics or mismatch.what in ("watermark_ms", "conservation"):
            return None
        if record.statistics == truth.statistics[version]:
            return _outcome_explanation(record, truth, mismatch)
        further = read_on(self._reader, self._settings, prefix.partition, logs, most=READ_AHEAD)
        case = Case(
            version, record.statistics, screened(prefix, since(prefix, further), self._specs), prefix.end
        )
        watermarks = {
            earliest_watermark(within(prefix, logs)),
            None if right is None else right.record.watermark_ms,
        }
        known = set() if record.behind_watermark else {one for one in watermarks if one is not None}
        return explain(case, mismatch, since=before, watermarks=known)

    # --- what else is to be said -------------------------------------------------------------------------

    def _still_unpublished(self) -> list[Difference]:
        """Return the versions without statistics that have none now either: records are written in turn."""
        now = {
            (one.record.experiment, one.record.partition)
            for one in read_published(self._reader, self._settings)
        }
        return [one for one in self._unpublished if (one.experiment, one.partition) not in now]

    def _notes(self, partitions: dict[int, list[Published]]) -> Iterable[str]:
        for topic, count in sorted(self._passed_over.counts.items()):
            yield f"{count} records of {topic} cannot be read and were passed over, as the worker does"
        named = {one.record.rules for one in self._published if one.record.rules is not None}
        for rules in sorted(named - {self._own_rules}, key=str):
            yield (
                f"a worker's settings are not those of this command, and were used in their place: "
                f"{_rule_text(rules, self._own_rules)}"
            )
        lateness = {one.record.allowed_lateness_ms for one in self._published}
        for allowed_ms in sorted(lateness - {self._settings.allowed_lateness_ms}):
            yield (
                f"a worker's allowed lateness of {allowed_ms} ms is not that of this command "
                f"({self._settings.allowed_lateness_ms} ms), and was used in its place"
            )
        if any(one.record.rules is None for one in self._published):
            yield (
                "some statistics do not say under which activation delay, future tolerance and record limit they "
                "were computed; those of this command were used"
            )
        topic = self._settings.topic(EXPOSURES)
        for partition in self._reader.partitions(topic):
            if partition not in partitions and self._reader.bounds(topic, partition)[1] > 0:
                yield f"{topic}[{partition}] has records, and no statistics were published from it"


def _without_record(
    prefix: Prefix, truth: Recomputed, records: Sequence[PartitionStatistics]
) -> list[Difference]:
    """Return a difference for each experiment that has units in the prefix and no statistics at all."""
    published = {record.experiment for record in records}
    newest: dict[str, VersionKey] = {}
    for version, statistics in sorted(truth.statistics.items()):
        if version[0] not in published and (statistics.units or statistics.crossover_units):
            newest[version[0]] = version
    return [
        Difference(
            experiment=experiment,
            version=version[1],
            partition=prefix.partition,
            what="statistics",
            engine="none",
            oracle=f"{sum(row.units for row in truth.statistics[version].units if not row.segment)} units",
            exposures=OffsetRange(first=prefix.exposures[0], last=prefix.exposures[1]),
            rewards=OffsetRange(first=prefix.rewards[0], last=prefix.rewards[1]),
        )
        for experiment, version in newest.items()
    ]


def _rule_notes(record: PartitionStatistics, assumed: Rules) -> tuple[str, ...]:
    if record.rules is not None:
        return ()
    named = {name: value for name, value in msgspec.structs.asdict(assumed).items() if value is not None}
    used = ", ".join(f"{name} {value}" for name, value in named.items())
    note = (
        f"computed with the settings of this command ({used}), because the record names none: a worker with "
        "other settings looks like this, too"
    )
    return (note,)


def _changed_rules(history: Sequence[Published]) -> bool:
    # A worker whose bound of units changed does not start where that would show.
    bound_apart = [
        one.record.rules and msgspec.structs.replace(one.record.rules, max_units=None) for one in history
    ]
    lateness = {one.record.allowed_lateness_ms for one in history}
    return len(set(bound_apart)) > 1 or len(lateness) > 1


_CHANGED: Final = (
    "cannot say: the worker's settings changed between these records; what was applied before is counted under "
    "the old ones, which the newest record no longer names"
)


def _rule_text(rules: Rules, own: Rules) -> str:
    theirs, ours = msgspec.structs.asdict(rules), msgspec.structs.asdict(own)
    return ", ".join(
        f"{name} {value} (here {ours[name]})" for name, value in theirs.items() if value != ours[name]
    )


def _outcome_explanation(record: PartitionStatistics, truth: Recomputed, mismatch: Mismatch) -> Explanation:
    topic = mismatch.what.partition(" ")[0]
    seen = topic == EXPOSURES
    contributors = outcome_contributors(
        topic,
        record.exposure_outcomes if seen else record.reward_outcomes,
        truth.exposure_outcomes if seen else truth.reward_outcomes,
        truth.exposure_fates if seen else truth.reward_fates,
    )
    return Explanation(contributors=contributors)


def read_specs(
    reader: LogReader, settings: Settings, passed_over: PassedOver | None = None
) -> list[LoggedSpec]:
    """Return all of ``xp.experiments``, each record with its log time; what cannot be decoded is passed over."""
    passed_over = passed_over or PassedOver()
    topic = settings.topic("experiments")
    specs: list[LoggedSpec] = []
    for partition in reader.partitions(topic):
        records = reader.read_all(topic, partition)
        for one, log_ms in zip(records, log_times([one.timestamp_ms for one in records]), strict=True):
            place = str(Place(topic=topic, partition=partition, offset=one.offset))
            if not one.key:
                passed_over.note("without a key", topic=topic, place=place)
                continue
            record = None
            if one.value is not None:
                record = passed_over.decoded(one.value, ExperimentRecord, topic=topic, place=place)
                if record is None:
                    continue
            specs.append(LoggedSpec(log_ms, one.key.decode(errors="replace"), record, partition))
    return specs


def read_statistics(reader: LogReader, settings: Settings) -> list[PartitionStatistics]:
    """Return the newest record under each key of ``xp.stats``; what is none is reported and left out."""
    with PassedOver() as passed_over:
        return [one.record for one in read_published(reader, settings, passed_over)]


def read_published(
    reader: LogReader, settings: Settings, passed_over: PassedOver | None = None
) -> list[Published]:
    """Return the newest record under each key of ``xp.stats``, and where it stands."""
    newest: dict[bytes | None, Published] = {}
    for partition in reader.partitions(settings.topic("stats")):
        for one in _published(reader, settings, partition, forget=newest, passed_over=passed_over):
            if one.key not in newest or one.record.newer_than(newest[one.key].record):
                newest[one.key] = one
    return sorted(
        newest.values(), key=lambda one: (one.record.experiment, one.record.version, one.record.partition)
    )


def _published(
    reader: LogReader,
    settings: Settings,
    partition: int,
    *,
    key: bytes | None = None,
    forget: dict[bytes | None, Published] | None = None,
    passed_over: PassedOver | None = None,
) -> Iterable[Published]:
    """Give the statistics records of a partition, of one key if it is given; a tombstone empties `forget`.

    What is no record is passed over. Where the topic is read again, nobody counts that again.
    """
    topic = settings.topic("stats")
    for one in reader.read_all(topic, partition):
        if key is not None and one.key != key:
            continue
        if not one.value:
            if forget is not None:
                forget.pop(one.key, None)
            continue
        place = Place(topic=topic, partition=partition, offset=one.offset)
        try:
            record = decode_own(one.value, PartitionStatistics)
        except ConfigError as error:
            # The decide stage passes over it too, so no decision rests on it.
            if passed_over is not None:
                passed_over.note(str(error), topic=topic, place=str(place))
            continue
        yield Published(place, one.key, record)


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


def _difference(one: Published, mismatch: Mismatch, *, notes: tuple[str, ...]) -> Difference:
    record = one.record
    return Difference(
        experiment=record.experiment,
        version=record.version,
        partition=record.partition,
        exposures=OffsetRange(first=record.exposures.first_offset, last=record.exposures.applied_offset),
        rewards=OffsetRange(first=record.rewards.first_offset, last=record.rewards.applied_offset),
        published=one.place,
        notes=notes,
        **mismatch._asdict(),
    )
