"""Reads what the engine says: the newest result of each experiment, and the signals."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec

from stream_xp.adapters.topic_reader import TopicReader, TopicRecord
from stream_xp.domain.decision import Action, Result, ShrunkSegment, Signal
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.engine.segments import shrunk_segments
from stream_xp.errors import ConfigError
from stream_xp.services.memo.record import Shrunk
from stream_xp.services.memo.topics import read_past
from stream_xp.services.memo.worth import shrunk
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.signal_records import SignalRecord, experiment_of, readable, version_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stream_xp.settings import Settings


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The newest evidence of one experiment, and how old it is.

    Attributes:
        watermark_ms: event time up to which the evidence is complete; None before the first record.
        data_age_ms: wall clock minus watermark; None before the first record.
        evaluated_age_ms: wall clock minus the time of the evaluation.
        shrunk_segments: effects in registered segments after shrinkage; no tests.
        worth: of an experiment that has stopped or shipped, what its effects are worth; no tests either.
    """

    result: Result
    watermark_ms: int | None
    data_age_ms: int | None
    evaluated_age_ms: int
    shrunk_segments: tuple[ShrunkSegment, ...] = ()
    worth: tuple[Worth, ...] = ()


class Worth(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one arm after the winner's curse (docs/long-effects.md)."""

    metric: str
    arm: str
    raw: float | None
    shrunk: Shrunk


def read_standings(settings: Settings, *, now_ms: int, experiment: str | None = None) -> tuple[Standing, ...]:
    """Return the newest evidence of each experiment, or of the one named, in alphabetical order.

    A record that is no result is passed over; the log says so, and how many there were.

    Raises:
        ConfigError: the topic is missing, or the experiment has no result.
        DependencyError: a broker did not answer.
    """
    topic = settings.topic("results")
    with PassedOver() as passed_over:
        newest = _newest_results(settings, passed_over)
        results = _readable(newest, topic, experiment, passed_over)
    over = [one for one in results if one.decision.action in (Action.STOP, Action.SHIP)]
    worth = _worth(settings, over) if over else {}
    return tuple(_standing(result, now_ms, worth.get(result.experiment, ())) for result in results)


def _worth(settings: Settings, over: Iterable[Result]) -> dict[str, tuple[Worth, ...]]:
    """By experiment; one whose record is gone has none."""
    records, past = read_past(settings)
    return {
        result.experiment: tuple(
            Worth(
                metric=one.metric,
                arm=one.arm,
                raw=None if one.effect is None else one.effect.estimate,
                shrunk=shrunk(record, one, past),
            )
            for one in result.metrics
        )
        for result in over
        if (record := records.get((result.experiment, result.version))) is not None
    }


def _newest_results(settings: Settings, passed_over: PassedOver) -> dict[bytes, TopicRecord]:
    def note(record: TopicRecord) -> None:
        passed_over.note("without a key", topic=record.topic, place=record.place)

    with TopicReader(settings, settings.topic("results")) as reader:
        return reader.newest_by_key(keyless=note)


def _readable(
    newest: dict[bytes, TopicRecord], topic: str, experiment: str | None, passed_over: PassedOver
) -> list[Result]:
    if experiment is not None:
        newest = {key: record for key, record in newest.items() if key == experiment.encode()}
        if not newest:
            raise ConfigError(f"{experiment}: no result on {topic}; is it applied, and does a worker run?")
    found = [
        passed_over.decoded(record.value, Result, topic=topic, place=record.place)
        for _, record in sorted(newest.items())
    ]
    readable = [result for result in found if result is not None]
    if experiment is not None and not readable:
        raise ConfigError(f"{experiment}: the newest result on {topic} cannot be read")
    return readable


def read_signals(
    settings: Settings, *, experiment: str | None = None, limit: int | None = None, follow: bool = False
) -> Iterator[SignalRecord]:
    """Give the newest `limit` signals and orders (all, without one) by time, then new ones forever if `follow`.

    What stands on the topic twice (same `source` and `id`) is given once. A decision of the service that cannot
    count is left out: while a stop or ship is in force, or from before the newest reset, it is that of a worker that
    had lost its partitions while it wrote. All of an experiment is in one partition, so every reader sees the same one
    first. What people ordered is always given, also if it changed nothing.
    A record that is neither is passed over; the log says so, and how many there were.

    Raises:
        ConfigError: the topic is missing.
        DependencyError: a broker did not answer.
    """
    with TopicReader(settings, settings.topic("signals")) as reader, PassedOver() as passed_over:
        believed = Believed(passed_over)
        past = sorted(believed.of(reader.backlog(), experiment), key=lambda record: (record.time, record.id))
        yield from past if limit is None else past[max(0, len(past) - limit) :]
        if follow:
            yield from believed.of(reader.follow(), experiment)


class _Latch:
    """What is in force of one experiment version: enough of `engine.standing` to tell what cannot count.

    The spec is not read here, so that an order which its rules refuse is taken at its word.
    """

    def __init__(self) -> None:
        self._latched: str | None = None
        self._proposed: str | None = None
        self._resets: list[str | None] = [None]

    def counts(self, signal: Signal) -> bool:
        """Whether a decision can count where it stands; it is kept if so."""
        action = signal.data.decision.action
        if action is Action.HOLD:
            return True
        if signal.data.since not in self._resets:
            # The order itself is gone with the time that the topic keeps.
            self._reset(signal.data.since)
        if self._latched is not None or signal.data.since != self._resets[-1]:
            return False
        if action in (Action.STOP, Action.SHIP):
            if not signal.data.proposed:
                self._conclude(signal.id)
            elif self._proposed is not None:
                return False
            else:
                self._proposed = signal.id
        return True

    def ordered(self, order: Order, identity: str) -> None:
        """Take in what a person ordered."""
        if order.action is OperatorAction.RESET:
            if order.monitors:
                return  # It takes nothing back.
            held = self._latched or self._proposed
            if held is not None and order.signal_id in (None, held):
                self._reset(identity)
        elif order.action in (OperatorAction.STOP, OperatorAction.SHIP):
            if self._latched is None:
                self._conclude(identity)
        elif self._proposed is not None and order.signal_id == self._proposed:
            if order.action is OperatorAction.APPROVE:
                self._conclude(self._proposed)
            elif order.action is OperatorAction.REJECT:
                self._proposed = None
        elif order.action is OperatorAction.SET_STAGE and self._latched is None:
            self._proposed = None

    def _reset(self, identity: str | None) -> None:
        self._latched, self._proposed = None, None
        self._resets.append(identity)

    def _conclude(self, identity: str) -> None:
        self._latched, self._proposed = identity, None


class Believed:
    """Which records a reader believes: each once, and no decision that cannot count."""

    def __init__(self, passed_over: PassedOver) -> None:
        self._passed_over = passed_over
        self._seen: set[tuple[str, str]] = set()
        self._latches: defaultdict[tuple[str, int], _Latch] = defaultdict(_Latch)

    def of(self, records: Iterable[TopicRecord], experiment: str | None) -> Iterator[SignalRecord]:
        """The signals and orders among records, of one experiment if it is named."""
        for record in records:
            if record.value is None:
                continue
            said = readable(self._passed_over, record.value, topic=record.topic, place=record.place)
            if said is not None and experiment in (None, experiment_of(said)) and self._is_news(said):
                yield said

    def _is_news(self, said: SignalRecord) -> bool:
        identity = (said.source, said.id)
        if identity in self._seen:
            return False
        self._seen.add(identity)
        latch = self._latches[experiment_of(said), version_of(said)]
        if isinstance(said, OrderSignal):
            latch.ordered(said.data, said.id)
            return True
        return latch.counts(said)


def _standing(result: Result, now_ms: int, worth: tuple[Worth, ...]) -> Standing:
    marks = [offsets.watermark_ms for offsets in result.offsets.values() if offsets.watermark_ms is not None]
    # The evidence is only as complete as its slowest partition.
    watermark_ms = min(marks, default=None)
    return Standing(
        result=result,
        watermark_ms=watermark_ms,
        data_age_ms=None if watermark_ms is None else now_ms - watermark_ms,
        evaluated_age_ms=now_ms - result.evaluated_ms,
        shrunk_segments=shrunk_segments(result.segments),
        worth=worth,
    )
