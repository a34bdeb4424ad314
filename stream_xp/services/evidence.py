"""Reads what the engine says: the newest result of each experiment, and the signals."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import msgspec

from stream_xp.adapters.topic_reader import TopicReader, TopicRecord
from stream_xp.domain.codec import decode_own
from stream_xp.domain.decision import Action, Result, Signal
from stream_xp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stream_xp.settings import Settings

log = logging.getLogger(__name__)

Record = TypeVar("Record", Result, Signal)


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The newest evidence of one experiment, and how old it is.

    Attributes:
        watermark_ms: event time up to which the evidence is complete; None before the first record.
        data_age_ms: wall clock minus watermark; None before the first record.
        evaluated_age_ms: wall clock minus the time of the evaluation.
    """

    result: Result
    watermark_ms: int | None
    data_age_ms: int | None
    evaluated_age_ms: int


def read_standings(settings: Settings, *, now_ms: int, experiment: str | None = None) -> tuple[Standing, ...]:
    """Return the newest evidence of each experiment, or of the one named, in alphabetical order.

    Raises:
        ConfigError: the topic is missing, or the experiment has no result.
        DependencyError: a broker did not answer.
    """
    topic = settings.topic("results")
    with TopicReader(settings, topic) as reader:
        newest = reader.newest_by_key()
    if experiment is not None:
        newest = {key: record for key, record in newest.items() if key == experiment.encode()}
        if not newest:
            raise ConfigError(f"{experiment}: no result on {topic}; is it applied, and does a worker run?")
    readable = [_readable(record, Result) for _, record in sorted(newest.items())]
    if experiment is not None and readable == [None]:
        raise ConfigError(f"{experiment}: the newest result on {topic} cannot be read")
    return tuple(_standing(result, now_ms) for result in readable if result is not None)


def read_signals(
    settings: Settings, *, experiment: str | None = None, limit: int | None = None, follow: bool = False
) -> Iterator[Signal]:
    """Give the newest `limit` signals (all, without one) by time, then new ones forever if `follow`.

    A signal that stands on the topic twice (same `source` and `id`) is given once. So is the stop or ship of an
    experiment version: decisions latch, and a later one is that of a worker that had lost its partitions while
    it wrote. All signals of an experiment are in one partition, so every reader sees the same one first.
    A record that is no signal is reported in the log and passed over.

    Raises:
        ConfigError: the topic is missing.
        DependencyError: a broker did not answer.
    """
    with TopicReader(settings, settings.topic("signals")) as reader:
        believed = _Believed()
        past = sorted(believed.of(reader.backlog(), experiment), key=lambda signal: (signal.time, signal.id))
        yield from past if limit is None else past[max(0, len(past) - limit) :]
        if follow:
            yield from believed.of(reader.follow(), experiment)


class _Believed:
    """Which signals a reader believes: each once, and of an experiment version the first stop or ship."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._decided: dict[tuple[str, int], str] = {}

    def of(self, records: Iterable[TopicRecord], experiment: str | None) -> Iterator[Signal]:
        """The signals among records, of one experiment if it is named."""
        for record in records:
            if record.value is None:
                continue
            signal = _readable(record, Signal)
            if (
                signal is not None
                and experiment in (None, signal.data.result.experiment)
                and self._is_news(signal)
            ):
                yield signal

    def _is_news(self, signal: Signal) -> bool:
        identity = (signal.source, signal.id)
        if identity in self._seen:
            return False
        self._seen.add(identity)
        result = signal.data.result
        if signal.data.decision.action is Action.HOLD:
            return True
        return self._decided.setdefault((result.experiment, result.version), signal.id) == signal.id


def _standing(result: Result, now_ms: int) -> Standing:
    marks = [offsets.watermark_ms for offsets in result.offsets.values() if offsets.watermark_ms is not None]
    # The evidence is only as complete as its slowest partition.
    watermark_ms = min(marks, default=None)
    return Standing(
        result=result,
        watermark_ms=watermark_ms,
        data_age_ms=None if watermark_ms is None else now_ms - watermark_ms,
        evaluated_age_ms=now_ms - result.evaluated_ms,
    )


def _readable(record: TopicRecord, kind: type[Record]) -> Record | None:
    """The record, or None with a line on standard error: one that is none must not hide all the others."""
    try:
        return decode_own(record.value or b"", kind)
    except ConfigError as error:
        # The standard library's: without a set-up it writes warnings to standard error, and output stays clean.
        log.warning("passed over: %s is %s", record.place, error)
        return None
