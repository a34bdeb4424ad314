"""The checks after every fault. Each finding is one sentence; none is the proof that nothing was lost or doubled."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
from broker.worker_process import committed, ends, statistics
from chaos.traffic import account

from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.domain.dead_letter import RAW_LIMIT_BYTES, DeadLetter, dead_letter_key
from stream_xp.domain.decision import Action, ConfigRecord, Result, RolloutStatus, Signal
from stream_xp.services.oracle.reading import open_reader
from stream_xp.services.oracle.service import check

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chaos.traffic import Account, Sent

    from stream_xp.domain.statistics import Outcomes, PartitionStatistics
    from stream_xp.services.oracle.recompute import LoggedRecord
    from stream_xp.settings import Settings

TOPICS: Final = ("exposures", "rewards")
TAIL_RECORDS: Final = 60
"""Of the state topic, where the newest manifest mostly is; workers that were killed can have left more behind it."""


def audit(settings: Settings, sent: Iterable[Sent] | None) -> list[str]:
    """Everything that is wrong once all traffic is applied: what the tests of every fault want to be empty.

    Args:
        sent: what each source of traffic put on the raw topics; None where other traffic is there too.
    """
    parts = statistics(settings)
    accounts = account(settings)
    return [
        *_against_oracle(settings),
        *_against_ends(settings, parts),
        *_against_account(parts, accounts),
        *([] if sent is None else _against_sent(accounts, list(sent))),
        *against_commits(settings),
        *_against_dead_letters(settings, accounts),
        *against_decisions(settings),
    ]


def _against_oracle(settings: Settings) -> Iterator[str]:
    """I2: the statistics are those of the raw topics, byte for byte."""
    report = check(settings)
    yield from map(str, report.differences)
    if not report.checked:
        yield "there is no statistics record"


def _against_ends(settings: Settings, parts: list[PartitionStatistics]) -> Iterator[str]:
    """I1 and completeness: each record up to the end of the log has exactly one outcome."""
    ends_now = ends(settings)
    seen: set[tuple[str, int]] = set()
    for part, topic, counted in _outcomes(parts):
        progress = getattr(part, topic)
        place = f"{part.experiment} {topic} {part.partition}"
        seen.add((topic, part.partition))
        if progress.next_offset is None:
            if ends_now[topic, part.partition]:
                yield f"{place}: nothing is applied"
            continue
        if not counted.conserved():
            yield f"{place}: outcomes do not add up: {counted}"
        if counted.read != progress.next_offset - progress.first_offset:
            yield (
                f"{place}: {counted.read} records read from {progress.first_offset} to "
                f"{progress.applied_offset}"
            )
        if progress.next_offset != ends_now[topic, part.partition]:
            yield f"{place}: applied to {progress.next_offset} of {ends_now[topic, part.partition]}"
        if part.behind_watermark:
            yield f"{place}: records behind the watermark: {part.behind_watermark}"
    yield from (
        f"{topic} {partition}: {end} records and no statistics"
        for (topic, partition), end in ends_now.items()
        if end and (topic, partition) not in seen
    )


def _against_account(
    parts: list[PartitionStatistics], accounts: dict[tuple[str, int], Account]
) -> Iterator[str]:
    """Injected duplicates, late, unknown and bad records are in their counters, each exactly once."""
    for part, topic, counted in _outcomes(parts):
        wanted = accounts[topic, part.partition].outcomes
        place = f"{part.experiment} {topic} {part.partition}"
        for outcome in ("dead_lettered", "unknown_experiment", "late", "duplicate"):
            if getattr(counted, outcome) != wanted[outcome]:
                yield f"{place}: {outcome} {getattr(counted, outcome)}, the account has {wanted[outcome]}"
        if counted.read != wanted.total():
            yield f"{place}: {counted.read} records read, the account has {wanted.total()}"


def _against_sent(accounts: dict[tuple[str, int], Account], sent: list[Sent]) -> Iterator[str]:
    """The broker has what was sent, no more and no less: otherwise the account would be about other traffic."""
    for topic in TOPICS:
        mine = [one for (name, _), one in accounts.items() if name == topic]
        found = sum(one.outcomes.total() for one in mine), sum(one.copies for one in mine)
        wanted = tuple(sum(getattr(one, field)[topic] for one in sent) for field in ("records", "copies"))
        if found != wanted:
            yield f"{topic}: {found} records and copies on the broker, {wanted} were sent"
    bad = Counter(reason for one in accounts.values() for reason, _, _ in one.bad.values())
    wanted_bad = sum((one.bad for one in sent), Counter())
    if bad != wanted_bad:
        yield f"bad records on the broker: {dict(bad)}, {dict(wanted_bad)} were sent"


def against_commits(settings: Settings) -> Iterator[str]:
    """I3: no committed offset is ahead of the newest snapshot."""
    # The commits first: what is committed between the two reads has its snapshot by the second.
    offsets, durable = committed(settings), durable_offsets(settings)
    if any(offset > durable[place] for place, offset in offsets.items()):
        durable = durable_offsets(settings, whole=True)
    for place, offset in sorted(offsets.items()):
        if offset > (durable[place]):
            yield f"{place}: committed {offset}, the newest snapshot stands at {durable[place]}"


def durable_offsets(settings: Settings, *, whole: bool = False) -> dict[tuple[str, int], int]:
    """Next offset of each partition that the newest manifests on the state topic stand at.

    Only the end of the topic is read, unless `whole`: it is what a run writes most of.
    """
    found: dict[tuple[str, int], int] = {}
    with open_reader(settings) as reader:
        for partition in range(settings.partitions):
            begin, end = reader.bounds(settings.topic("state"), partition)
            first = begin if whole else max(begin, end - TAIL_RECORDS)
            tail = (
                reader.read_span(settings.topic("state"), partition, first=first, last=end - 1)
                if end > begin
                else []
            )
            for topic in TOPICS:
                found[topic, partition] = max(map(partial(_next_offset, topic), tail), default=0)
    return found


def _next_offset(topic: str, record: LoggedRecord) -> int:
    """Where a manifest stands, 0 for any other record."""
    if record.value is None or not record.value.startswith(b"{"):
        return 0
    try:
        applied = msgspec.json.decode(record.value)[topic]["applied_offset"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return 0
    return 0 if applied is None else int(applied) + 1


def _against_dead_letters(settings: Settings, accounts: dict[tuple[str, int], Account]) -> Iterator[str]:
    """I7: every bad record has a dead letter with its reason and raw bytes; a repeat of one is the same."""
    wanted = {
        f"{settings.topic(topic)}/{partition}/{offset}".encode(): bad
        for (topic, partition), one in accounts.items()
        for offset, bad in one.bad.items()
    }
    found: dict[bytes, DeadLetter] = {}
    for key, value in _read(settings, "deadletter"):
        letter = msgspec.json.decode(value, type=DeadLetter)
        if found.setdefault(key, letter) != letter or dead_letter_key(letter) != key:
            yield f"dead letter {key!r} is there twice and differs"
    for key in sorted(wanted.keys() ^ found.keys()):
        yield f"dead letter {key!r} is {'missing' if key in wanted else 'of a good record'}"
    for key in sorted(wanted.keys() & found.keys()):
        letter, (reason, raw_key, raw_value) = found[key], wanted[key]
        if (letter.reason, letter.key, letter.value) != (
            reason,
            raw_key,
            None if raw_value is None else raw_value[:RAW_LIMIT_BYTES],
        ):
            yield f"dead letter {key!r} has reason {letter.reason}, wanted {reason}, or other bytes"


def against_decisions(settings: Settings) -> list[str]:
    """I9: one decision per experiment version, of one look, with one payload, and the config follows it.

    What stands on the topic twice counts as one if it is the same byte for byte; readers know it by its id.
    """
    found: list[str] = []
    payloads: dict[str, set[bytes]] = defaultdict(set)
    decisions: dict[tuple[str, int], list[Signal]] = defaultdict(list)
    for _, value in _read(settings, "signals"):
        signal = msgspec.json.decode(value, type=Signal)
        if value not in payloads[signal.id]:
            decisions[signal.data.result.experiment, signal.data.result.version].append(signal)
        payloads[signal.id].add(value)
    found += [f"signal {name} has {len(all_)} payloads" for name, all_ in payloads.items() if len(all_) > 1]
    for (experiment, version), signals in sorted(decisions.items()):
        if len(signals) > 1:
            looks = [signal.data.result.look for signal in signals]
            found.append(f"{experiment} version {version}: {len(signals)} decisions, at looks {looks}")
    return [*found, *_against_config(settings, decisions), *_against_results(settings, decisions)]


def _against_config(settings: Settings, decisions: dict[tuple[str, int], list[Signal]]) -> Iterator[str]:
    """What applications follow never says anything but what was decided."""
    newest: dict[str, int] = {}
    for _, value in _read(settings, "config"):
        config = msgspec.json.decode(value, type=ConfigRecord)
        if config.config_version < newest.get(config.experiment, 0):
            yield f"config of {config.experiment} went back to version {config.config_version}"
        newest[config.experiment] = config.config_version
        if config.status is RolloutStatus.RUNNING or config.signal_id is None:
            continue
        known = {signal.id for signal in decisions.get((config.experiment, config.version), [])}
        if config.signal_id not in known:
            yield f"config of {config.experiment} follows signal {config.signal_id}, which is not there"


def _against_results(settings: Settings, decisions: dict[tuple[str, int], list[Signal]]) -> Iterator[str]:
    """Where a result carries a stop or ship, it is the one that was signalled."""
    for _, value in _read(settings, "results"):
        result = msgspec.json.decode(value, type=Result)
        if result.decision.action is Action.HOLD:
            continue
        known = [signal.data.decision for signal in decisions.get((result.experiment, result.version), [])]
        if result.decision not in known:
            yield f"{result.experiment} look {result.look}: decision {result.decision.action} was not signalled"


def _outcomes(parts: list[PartitionStatistics]) -> Iterator[tuple[PartitionStatistics, str, Outcomes]]:
    for part in parts:
        yield part, "exposures", part.exposure_outcomes
        yield part, "rewards", part.reward_outcomes


def _read(settings: Settings, name: str) -> Iterator[tuple[bytes, bytes]]:
    with TopicReader(settings, settings.topic(name)) as reader:
        for record in reader.backlog():
            if record.value is not None:
                yield record.key or b"", record.value
