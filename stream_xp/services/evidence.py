"""Reads what the engine says: the newest result of each experiment, and the signals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from stream_xp.adapters.topic_reader import TopicReader, TopicRecord
from stream_xp.domain.decision import Action, Result, Signal
from stream_xp.errors import ConfigError
from stream_xp.services.passed_over import PassedOver

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stream_xp.settings import Settings


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

    A record that is no result is passed over; the log says so, and how many there were.

    Raises:
        ConfigError: the topic is missing, or the experiment has no result.
        DependencyError: a broker did not answer.
    """
    topic = settings.topic("results")
    with PassedOver() as passed_over:
        newest = _newest_results(settings, passed_over)
        return tuple(
            _standing(result, now_ms) for result in _readable(newest, topic, experiment, passed_over)
        )


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
) -> Iterator[Signal]:
    """Give the newest `limit` signals (all, without one) by time, then new ones forever if `follow`.

    A signal that stands on the topic twice (same `source` and `id`) is given once. So is the stop or ship of an
    experiment version: decisions latch, and a later one is that of a worker that had lost its partitions while
    it wrote. All signals of an experiment are in one partition, so every reader sees the same one first.
    A record that is no signal is passed over; the log says so, and how many there were.

    Raises:
        ConfigError: the topic is missing.
        DependencyError: a broker did not answer.
    """
    with TopicReader(settings, settings.topic("signals")) as reader, PassedOver() as passed_over:
        believed = _Believed(passed_over)
        past = sorted(believed.of(reader.backlog(), experiment), key=lambda signal: (signal.time, signal.id))
        yield from past if limit is None else past[max(0, len(past) - limit) :]
        if follow:
            yield from believed.of(reader.follow(), experiment)


class _Believed:
    """Which signals a reader believes: each once, and of an experiment version the first stop or ship after a reset."""

    def __init__(self, passed_over: PassedOver) -> None:
        self._passed_over = passed_over
        self._seen: set[tuple[str, str]] = set()
        self._decided: dict[tuple[str, int, str | None], str] = {}

    def of(self, records: Iterable[TopicRecord], experiment: str | None) -> Iterator[Signal]:
        """The signals among records, of one experiment if it is named."""
        for record in records:
            if record.value is None:
                continue
            signal = self._passed_over.decoded(record.value, Signal, topic=record.topic, place=record.place)
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
        data, result = signal.data, signal.data.result
        if data.proposed or data.decision.action not in (Action.STOP, Action.SHIP):
            return True
        key = (result.experiment, result.version, data.since)
        return self._decided.setdefault(key, signal.id) == signal.id


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
