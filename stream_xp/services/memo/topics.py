"""Reads what a memo needs: specs, signals and orders, and every result that is still there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.domain.decision import Action, Result, Signal
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.errors import ConfigError
from stream_xp.services.memo.build import Facts
from stream_xp.services.memo.worth import Past, past_effects
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.publish import published
from stream_xp.services.signal_records import SignalRecord, experiment_of, readable, version_of

if TYPE_CHECKING:
    from stream_xp.settings import Settings


def read_facts(settings: Settings, experiment: str, *, version: int | None = None) -> Facts:
    """Read what the topics say of an experiment version, and of all others for the prior.

    Args:
        settings: brokers and prefix.
        experiment: its key.
        version: absent: the newest.

    Raises:
        ConfigError: there is no such experiment or version, or its record is gone.
        DependencyError: a broker did not answer.
    """
    with PassedOver() as passed_over:
        records = _records(settings, passed_over)
        record = _record(settings, records, experiment, version)
        signals = _signals(settings, passed_over)
        results = _results(settings, passed_over)
    mine = (experiment, record.spec.version)
    records[mine] = record
    said = tuple(one for one in signals if (experiment_of(one), version_of(one)) == mine)
    heard = [one.data.result for one in said if isinstance(one, Signal)]
    looks = {one.look: one for one in (*heard, *(one for one in results if _version(one) == mine))}
    return Facts(
        record=record,
        records=said,
        results=tuple(looks[look] for look in sorted(looks)),
        past=tuple(past_effects(records, _at_their_stop(signals, results))),
    )


def read_past(settings: Settings) -> tuple[dict[tuple[str, int], ExperimentRecord], tuple[Past, ...]]:
    """Read the record of every experiment version, and what all of them have found.

    Raises:
        ConfigError: a topic is missing.
        DependencyError: a broker did not answer.
    """
    with PassedOver() as passed_over:
        records = _records(settings, passed_over)
        results = _at_their_stop(_signals(settings, passed_over), _results(settings, passed_over))
    return records, tuple(past_effects(records, results))


def _at_their_stop(signals: Iterable[SignalRecord], results: Iterable[Result]) -> list[Result]:
    """One result per experiment version: that of its first stop or ship, else the newest."""
    newest = {_version(result): result for result in sorted(results, key=lambda one: one.look)}
    stopped: dict[tuple[str, int], Result] = {}
    for signal in signals:
        if isinstance(signal, Signal) and signal.data.decision.action in (Action.STOP, Action.SHIP):
            stopped.setdefault(_version(signal.data.result), signal.data.result)
    return list((newest | stopped).values())


def _version(result: Result) -> tuple[str, int]:
    return result.experiment, result.version


def _record(
    settings: Settings,
    records: dict[tuple[str, int], ExperimentRecord],
    experiment: str,
    version: int | None,
) -> ExperimentRecord:
    newest, _ = published(settings, experiment)
    if newest is None:
        raise ConfigError(f"{experiment}: no such experiment on {settings.topic('experiments')}")
    if version in (None, newest.spec.version):
        return newest
    found = records.get((experiment, version or 0))
    if found is None:
        there = ", ".join(str(known) for name, known in sorted(records) if name == experiment)
        raise ConfigError(
            f"{experiment}: no record of version {version} on {settings.topic('experiments')}, which keeps the newest "
            f"for good and older ones for a while; there is {there}"
        )
    return found


def _records(settings: Settings, passed_over: PassedOver) -> dict[tuple[str, int], ExperimentRecord]:
    """The record of each experiment version that has most weight epochs; what is none is passed over."""
    topic = settings.topic("experiments")
    found: dict[tuple[str, int], ExperimentRecord] = {}
    with TopicReader(settings, topic) as reader:
        for one in reader.backlog():
            if one.value is None:
                continue
            record = passed_over.decoded(one.value, ExperimentRecord, topic=topic, place=one.place)
            if record is not None:
                key = (record.spec.experiment, record.spec.version)
                held = found.get(key)
                if held is None or len(record.epochs) >= len(held.epochs):
                    found[key] = record
    return found


def _signals(settings: Settings, passed_over: PassedOver) -> list[SignalRecord]:
    topic = settings.topic("signals")
    with TopicReader(settings, topic) as reader:
        found = [
            readable(passed_over, one.value, topic=topic, place=one.place)
            for one in reader.backlog()
            if one.value is not None
        ]
    return [one for one in found if one is not None]


def _results(settings: Settings, passed_over: PassedOver) -> list[Result]:
    topic = settings.topic("results")
    with TopicReader(settings, topic) as reader:
        found = [
            passed_over.decoded(one.value, Result, topic=topic, place=one.place)
            for one in reader.backlog()
            if one.value is not None
        ]
    return [one for one in found if one is not None]
