"""Reads what the engine says: the newest result of each experiment, and the signals."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from stream_xp.adapters.topic_reader import TopicReader, TopicRecord
from stream_xp.domain.decision import Result, Signal
from stream_xp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stream_xp.settings import Settings

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
    return tuple(_standing(_decoded(record, Result), now_ms) for _, record in sorted(newest.items()))


def read_signals(
    settings: Settings, *, experiment: str | None = None, limit: int | None = None, follow: bool = False
) -> Iterator[Signal]:
    """Give the newest `limit` signals (all, without one) by time, then new ones forever if `follow`.

    A signal that stands on the topic twice (same `source` and `id`) is given once.

    Raises:
        ConfigError: the topic is missing.
        DependencyError: a broker did not answer.
    """
    with TopicReader(settings, settings.topic("signals")) as reader:
        seen: set[tuple[str, str]] = set()
        past = sorted(_fresh(reader.backlog(), seen, experiment), key=lambda signal: (signal.time, signal.id))
        yield from past if limit is None else past[max(0, len(past) - limit) :]
        if follow:
            yield from _fresh(reader.follow(), seen, experiment)


def _fresh(
    records: Iterable[TopicRecord], seen: set[tuple[str, str]], experiment: str | None
) -> Iterator[Signal]:
    for record in records:
        if record.value is None:
            continue
        signal = _decoded(record, Signal)
        identity = (signal.source, signal.id)
        if identity not in seen and experiment in (None, signal.data.result.experiment):
            seen.add(identity)
            yield signal


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


def _decoded(record: TopicRecord, kind: type[Record]) -> Record:
    try:
        return msgspec.json.decode(record.value or b"", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{record.place} is no {kind.__name__}: {error}") from error
