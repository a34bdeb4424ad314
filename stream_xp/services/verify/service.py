"""Derives a decision again: statistics by the oracle from the raw topics, evidence by the engine's tests."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from stream_xp import __version__
from stream_xp.domain.codec import decode_own
from stream_xp.domain.decision import Action, LookTaken, PartitionOffsets, Result, SegmentResult, Signal
from stream_xp.domain.experiment import METHODS, ExperimentRecord
from stream_xp.domain.experiment_rules import record_rules
from stream_xp.domain.operator import OrderSignal
from stream_xp.domain.statistics import (
    ExperimentStatistics,
    PartitionStatistics,
    Progress,
    add_outcomes,
    merge,
)
from stream_xp.engine.conclusion import guarantee, information, looked
from stream_xp.engine.evaluate import Evaluation, evaluate
from stream_xp.engine.monitors import with_monitors
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.standing import NOTHING_SAID
from stream_xp.engine.steering import Seen, steer
from stream_xp.engine.weights_by_policy import weights_by_policy
from stream_xp.errors import ConfigError
from stream_xp.services.decide.signals import signal_id
from stream_xp.services.decide.source_partitions import SPREAD_MS, apart, beside, least_watermark, runtime
from stream_xp.services.oracle.prefixes import (
    Logs,
    Prefix,
    earliest_watermark,
    read_logs,
    screened,
    unsaid_rules,
    within,
)
from stream_xp.services.oracle.reading import LogReader, LogSpanError, ReadStep, open_reader
from stream_xp.services.oracle.recompute import EXPOSURES, LoggedSpec, conclude
from stream_xp.services.oracle.report import Place
from stream_xp.services.oracle.service import read_specs
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.verify.compare import Line, line, result_lines, same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stream_xp.settings import Settings


MIN_ID_CHARACTERS: Final = 8
"""Shortest beginning of an id that stands for it."""
MAX_NAMED: Final = 5


class Verdict(StrEnum):
    """What a verification came to."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """One signal and what was derived.

    Attributes:
        place: where the signal stands.
        lines: every value compared, the decisive ones first; empty where nothing could be derived.
        reason: why nobody can say, if the verdict is `unknown`.
        notes: what else the reader should know.

    """

    signal_id: str
    experiment: str
    version: int
    place: Place
    verdict: Verdict
    lines: tuple[Line, ...] = ()
    reason: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Line | None:
        """The first value that differs."""
        return next((one for one in self.lines if one.equal is False), None)


class Standing(NamedTuple):
    """A signal, and where it stands."""

    place: Place
    signal: Signal


class Derived(NamedTuple):
    """The statistics of one source partition at a signal's offsets, and the earliest watermark possible there."""

    part: PartitionStatistics
    earliest_ms: int | None


class _Unknown(Exception):
    """Nobody can say."""


def verify(
    settings: Settings, signal: str, *, progress: Callable[[ReadStep], None] | None = None
) -> list[Verification]:
    """Derive the signal of an id again; more than one record can stand under it.

    Args:
        settings: brokers and prefix; the others stand in for what a signal does not say.
        signal: an id, or at least `MIN_ID_CHARACTERS` of its beginning if no other id begins so.
        progress: told how far the reading has come.

    Raises:
        ConfigError: no such signal stands on the topic, or more than one id begins so.
        DependencyError: the broker did not answer in time.

    """
    with open_reader(settings, progress=progress) as reader, PassedOver() as passed_over:
        standing = read_signals(reader, settings, passed_over)
        topic = settings.topic("signals")
        found = _distinct(_under(standing, signal, topic))
        if not found:
            unreadable = passed_over.counts[topic]
            beside = f"; {unreadable} records there are no signals" if unreadable else ""
            short = f"; the beginning of an id needs {MIN_ID_CHARACTERS} characters"
            raise ConfigError(
                f"{topic} holds no signal {signal!r} among {len(standing)}{beside}"
                f"{short if len(signal) < MIN_ID_CHARACTERS else ''}"
            )
        specs = read_specs(reader, settings, passed_over)
        notes = [f"{len(found)} different records stand under this id"] if found[1:] else []
        return [
            _verification(reader, settings, one, specs, notes=(*notes, *_superseded(one, standing)))
            for one in found
        ]


def read_signals(reader: LogReader, settings: Settings, passed_over: PassedOver) -> list[Standing]:
    """Return every signal in the order of the log; records that are neither signals nor orders are passed over."""
    topic = settings.topic("signals")
    found: list[Standing] = []
    for partition in reader.partitions(topic):
        for one in reader.read_all(topic, partition):
            place = Place(topic=topic, partition=partition, offset=one.offset)
            signal = None
            if not _is_order(one.value or b""):
                signal = passed_over.decoded(one.value, Signal, topic=topic, place=str(place))
            if signal is not None:
                found.append(Standing(place, signal))
    return found


def _under(standing: Sequence[Standing], signal: str, topic: str) -> list[Standing]:
    """Return what stands under an id, or under the only id that begins so."""
    whole = [one for one in standing if one.signal.id == signal]
    if whole or len(signal) < MIN_ID_CHARACTERS:
        return whole
    found = [one for one in standing if one.signal.id.startswith(signal)]
    ids = sorted({one.signal.id for one in found})
    if len(ids) > 1:
        more = ", ..." if len(ids) > MAX_NAMED else ""
        raise ConfigError(
            f"{len(ids)} signals of {topic} have an id that begins with {signal!r}: "
            f"{', '.join(map(repr, ids[:MAX_NAMED]))}{more}; write out more of it"
        )
    return found


def _is_order(value: bytes) -> bool:
    try:
        decode_own(value, OrderSignal)
    except ConfigError:
        return False
    return True


def _distinct(standing: Sequence[Standing]) -> list[Standing]:
    first: dict[bytes, Standing] = {}
    for one in standing:
        first.setdefault(msgspec.json.encode(one.signal), one)
    return list(first.values())


def _superseded(one: Standing, standing: Sequence[Standing]) -> tuple[str, ...]:
    """Say so where another conclusion of the version came first: decisions latch, up to a reset."""
    if not _concludes(one.signal):
        return ()
    key = _latch(one.signal)
    held = [other for other in standing if _concludes(other.signal) and _latch(other.signal) == key]
    if not held or held[0].place == one.place:
        return ()
    return (f"not the decision in force: signal {held[0].signal.id} at {held[0].place} came first",)


def _concludes(signal: Signal) -> bool:
    return signal.data.decision.action in (Action.STOP, Action.SHIP) and not signal.data.proposed


def _latch(signal: Signal) -> tuple[str, int, str | None]:
    return signal.data.result.experiment, signal.data.result.version, signal.data.since


# --- one signal -------------------------------------------------------------------------------------------


def _verification(
    reader: LogReader,
    settings: Settings,
    one: Standing,
    specs: Sequence[LoggedSpec],
    *,
    notes: tuple[str, ...],
) -> Verification:
    result = one.signal.data.result
    lines: list[Line] = []
    reason: str | None = None
    try:
        records = _records(result, specs)
        derived = [_derived(reader, settings, result, key, specs) for key in sorted(result.offsets)]
        lines = _lines(one.signal, records, derived, settings)
    except (_Unknown, LogSpanError) as unknown:
        reason = str(unknown)
    different = any(line.equal is False for line in lines)
    if different and (assumed := _assumed(result)):
        reason = f"the values differ, but {assumed}"
    verdict = Verdict.UNKNOWN if reason else Verdict.DIFFERENT if different else Verdict.EQUAL
    return Verification(
        signal_id=one.signal.id,
        experiment=result.experiment,
        version=result.version,
        place=one.place,
        verdict=verdict,
        lines=tuple(lines),
        reason=reason,
        notes=notes,
    )


def _records(result: Result, specs: Sequence[LoggedSpec]) -> list[ExperimentRecord]:
    """Return the spec records that may have been evaluated, the likeliest first."""
    of_version = [
        one.record
        for one in specs
        if one.record is not None
        and one.experiment == result.experiment
        and one.record.spec.version == result.version
    ]
    if not of_version:
        raise _Unknown(f"the spec of {result.experiment} version {result.version} is no longer on its topic")
    good = [record for record in of_version if not record_rules(record, result.experiment)]
    if not good:
        raise _Unknown(
            f"the spec of {result.experiment} version {result.version} was hashed under other methods than these "
            f"(METHODS is {METHODS} in version {__version__}, the signal is of version {result.code_version}): "
            "verify it with that version"
        )
    newest = _in_force(good)
    counts = [result.weight_epochs] if result.weight_epochs else range(len(newest.epochs), 0, -1)
    return [msgspec.structs.replace(newest, epochs=newest.epochs[:count]) for count in counts]


def _in_force(records: Sequence[ExperimentRecord]) -> ExperimentRecord:
    """Return the newest record of a version that the engine does not refuse, with all its weight epochs."""
    spec = records[0].spec
    registry = Registry(
        Entry(offset=at, experiment=spec.experiment, in_force_ms=at, record=record)
        for at, record in enumerate(records)
    )
    return registry.newest(spec.experiment, spec.version) or records[0]


def _assumed(result: Result) -> str | None:
    """Return what the signal does not say and had to be taken from elsewhere; None if it says everything."""
    silent = [
        name
        for name, missing in (
            (
                "the settings of the worker",
                any(one.rules is None or one.allowed_lateness_ms is None for one in result.offsets.values()),
            ),
            ("the first offsets", any(_without_start(one) for one in result.offsets.values())),
            ("the weight epochs", result.weight_epochs is None),
            (
                "the settled units",
                result.sample_ratio is not None and result.sample_ratio.counted_log_e is None,
            ),
        )
        if missing
    ]
    if not silent:
        return None
    return (
        f"this signal, of version {result.code_version}, does not say {', '.join(silent)}; they were guessed"
    )


def _without_start(offsets: PartitionOffsets) -> bool:
    spans = ((offsets.exposures_from, offsets.exposures), (offsets.rewards_from, offsets.rewards))
    return any(first is None and last is not None for first, last in spans)


def _prefix(result: Result, key: str, settings: Settings) -> Prefix:
    offsets = result.offsets[key]
    lateness_ms = offsets.allowed_lateness_ms
    return Prefix(
        partition=int(key),
        exposures=_span(offsets.exposures_from, offsets.exposures),
        rewards=_span(offsets.rewards_from, offsets.rewards),
        watermark_ms=offsets.watermark_ms,
        allowed_lateness_ms=settings.allowed_lateness_ms if lateness_ms is None else lateness_ms,
        rules=offsets.rules or unsaid_rules(settings),
        behind_watermark=tuple(sorted(offsets.behind_watermark.items())),
    )


def _span(first: int | None, last: int | None) -> tuple[int | None, int | None]:
    return (None, None) if last is None else (first or 0, last)


def _derived(
    reader: LogReader, settings: Settings, result: Result, key: str, specs: Sequence[LoggedSpec]
) -> Derived:
    """Compute one source partition by the oracle."""
    known = reader.partitions(settings.topic(EXPOSURES))
    if not key.isdecimal() or int(key) not in known:
        raise _Unknown(f"the signal names source partition {key!r}, and there are {len(known)}")
    prefix = _prefix(result, key, settings)
    logs: Logs = within(prefix, read_logs(reader, settings, [prefix]))
    truth = conclude(screened(prefix, logs, specs), partition=prefix.partition)
    version = (result.experiment, result.version)
    part = PartitionStatistics(
        experiment=result.experiment,
        version=result.version,
        design_hash=result.design_hash,
        partition=prefix.partition,
        exposures=Progress(first_offset=prefix.exposures[0], applied_offset=prefix.exposures[1]),
        rewards=Progress(first_offset=prefix.rewards[0], applied_offset=prefix.rewards[1]),
        watermark_ms=prefix.watermark_ms,
        allowed_lateness_ms=prefix.allowed_lateness_ms,
        statistics=truth.statistics.get(version, ExperimentStatistics()),
        exposure_outcomes=truth.exposure_outcomes,
        reward_outcomes=truth.reward_outcomes,
        behind_watermark=dict(prefix.behind_watermark),
        rules=prefix.rules,
    )
    return Derived(part, earliest_watermark(logs))


def _lines(
    signal: Signal, records: Sequence[ExperimentRecord], derived: Sequence[Derived], settings: Settings
) -> list[Line]:
    result = signal.data.result
    parts = [one.part for one in derived]
    attempts = (_result(result, record, parts, settings) for record in records)
    best: list[Line] = []
    for attempt in attempts:
        lines = [*_signal_lines(signal, attempt), *_watermark_lines(derived), *result_lines(result, attempt)]
        if not any(one.equal is False for one in lines):
            return lines
        best = best or lines
    return best


def _result(
    recorded: Result, record: ExperimentRecord, parts: Sequence[PartitionStatistics], settings: Settings
) -> Result:
    """Evaluate as the decide stage does; what does not follow from the raw topics is taken from the record."""
    statistics = merge(part.statistics for part in parts)
    spread_ms = settings.idle_grace_ms + SPREAD_MS if recorded.spread_ms is None else recorded.spread_ms
    evaluation = evaluate(record, statistics)
    evaluation = dataclasses.replace(evaluation, invalid=(*evaluation.invalid, *apart(parts, spread_ms)))
    evaluation = _watched(recorded, record, statistics, parts, evaluation)
    runtime_ms = runtime(parts, statistics.first_exposure_ms)
    looks = looked(record.spec, evaluation, _looks_before(recorded, record, evaluation))
    seen = Seen(statistics, watermark_ms=least_watermark(parts), runtime_ms=runtime_ms, looks=looks)
    return msgspec.structs.replace(
        recorded,
        design_hash=record.design_hash,
        statistics_hash=statistics.digest(),
        runtime_ms=runtime_ms,
        arms=evaluation.arms,
        crossover_units=statistics.crossover_units,
        metrics=evaluation.metrics,
        segments=_as_recorded(recorded, evaluation.segments),
        ages=evaluation.ages,
        uniform_slice=evaluation.uniform_slice,
        sample_ratio=evaluation.sample_ratio,
        invalid=evaluation.invalid,
        # Standing only ever holds a decision back: what was signalled follows from the evidence alone.
        decision=steer(record, NOTHING_SAID, evaluation, seen, allocator=weights_by_policy).decision,
        guarantee=guarantee(record.spec),
        looks=looks,
        monitors=evaluation.monitors,
        champion=record.spec.champion,
        exposure_outcomes=add_outcomes(part.exposure_outcomes for part in parts),
        reward_outcomes=add_outcomes(part.reward_outcomes for part in parts),
    )


def _as_recorded(recorded: Result, derived: tuple[SegmentResult, ...]) -> tuple[SegmentResult, ...]:
    """The segments without what an older worker did not say."""
    if any(one.standard_error is not None for one in recorded.segments):
        return derived
    return tuple(msgspec.structs.replace(one, standard_error=None) for one in derived)


def _watched(
    recorded: Result,
    record: ExperimentRecord,
    statistics: ExperimentStatistics,
    parts: Sequence[PartitionStatistics],
    evaluation: Evaluation,
) -> Evaluation:
    """Add what the monitors say; a worker that did not watch did not diagnose either.

    Latches of before and the age of the data are not in the raw topics. The recorded ones are taken as those of the
    look before: what is proven now must follow from the statistics all the same.
    """
    if recorded.monitors is None:
        ratio = evaluation.sample_ratio
        plain = None if ratio is None else msgspec.structs.replace(ratio, diagnosis=())
        return dataclasses.replace(evaluation, sample_ratio=plain)
    opened = recorded.monitors[0].since if recorded.monitors else None
    around = beside(parts, recorded.evaluated_ms, before=recorded.monitors, opened=opened)
    return with_monitors(record, statistics, evaluation, around)


def _looks_before(
    recorded: Result, record: ExperimentRecord, evaluation: Evaluation
) -> tuple[LookTaken, ...]:
    """The looks of a group sequential rule before this one, which may be the last of those recorded."""
    looks = recorded.looks
    mine = looks and same(looks[-1].information, information(record.spec, evaluation))
    return looks[:-1] if mine else looks


def _signal_lines(signal: Signal, derived: Result) -> Iterator[Line]:
    """Give what stands around the result."""
    yield line("signal id", signal.id, signal_id(derived, signal.data.since))
    yield line("signal subject", signal.subject, derived.experiment)
    recorded, ours = (msgspec.to_builtins(one) for one in (signal.data.decision, derived.decision))
    for name, value in recorded.items():
        yield line(f"signal {name}", value, ours[name])
    version = signal.data.result.code_version
    yield Line(what="code version", recorded=version, derived=__version__, equal=None)


def _watermark_lines(derived: Sequence[Derived]) -> Iterator[Line]:
    """Give the watermarks that the records forbid: the clock may only move one on."""
    for part, earliest_ms in derived:
        watermark_ms = part.watermark_ms
        if earliest_ms is not None and (watermark_ms is None or watermark_ms < earliest_ms):
            yield Line(
                what=f"watermark of partition {part.partition}",
                recorded=str(watermark_ms),
                derived=f"{earliest_ms} or later",
                equal=False,
            )


__all__ = ["Standing", "Verdict", "Verification", "read_signals", "verify"]
