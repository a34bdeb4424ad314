"""What the oracle answers, as values and as lines for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from stream_xp.services.oracle.explain import Contributors, Cut, Effect, Explanation, Suspect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.services.oracle.compare import Mismatch

_LISTED = 8
_EFFECTS = {
    Effect.LOST: "is not counted",
    Effect.DOUBLED: "is counted twice",
    Effect.LET_IN: "is counted although it is",
}


class OffsetRange(msgspec.Struct, frozen=True, kw_only=True):
    """Offsets of one source topic's partition, both inclusive; None before the first record."""

    first: int | None
    last: int | None


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a record stands."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}] offset {self.offset}"


class Narrowed(msgspec.Struct, frozen=True, kw_only=True):
    """What the earlier records under the same key, as far as they still stand on ``xp.stats``, tell.

    Attributes:
        records: how many there are, the newest one included.
        right: the newest one before `wrong`, which equals the raw topics; None if `wrong` is the oldest of all.
        right_until: the prefix of `right`.
        wrong: the first one that differs.
        wrong_until: its prefix.
        first: the first value in which that one differs.

    """

    records: int
    wrong: Place
    wrong_until: Cut
    first: str
    right: Place | None = None
    right_until: Cut | None = None


class Difference(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first value in which one statistics record and the raw topics disagree.

    Attributes:
        what: the value: `units`, `moments`, an outcome such as `rewards late`, …
        engine: what stands on ``xp.stats``.
        oracle: what the raw topics come to.
        exposures, rewards: the offsets that both were computed from; the cause is among them.
        published: where the statistics record stands.
        narrowed: where the difference came in, by the earlier records.
        explanation: what explains the statistics of `narrowed.wrong`, or else of this record; None where nothing
            was looked for.
        unsure: whether the worker's settings changed in between, so that nobody can say which is right.
        notes: what the reader should know before believing it.

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
    published: Place | None = None
    narrowed: Narrowed | None = None
    explanation: Explanation | None = None
    unsure: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        about = f"{self.experiment} version {self.version}, partition {self.partition}{value_text(self)}"
        seen, heard = self.exposures, self.rewards
        return f"{about} (exposures {seen.first} to {seen.last}, rewards {heard.first} to {heard.last})"

    def details(self, prefix: str) -> Iterator[str]:
        """Give a line for each thing known beyond the first; `prefix` is that of the topics."""
        if self.published is not None:
            yield f"published at {self.published}"
        if self.narrowed is not None:
            yield _narrowed_line(self.narrowed, prefix, self.partition)
            if self.narrowed.wrong != self.published:
                yield f"there: {self.narrowed.first}"
        if self.explanation is not None:
            yield from _explanation_lines(self.explanation, prefix, self.partition)
        yield from self.notes


class Unchecked(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of a source partition that could not be compared, and why."""

    partition: int
    experiments: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"partition {self.partition} ({', '.join(self.experiments)}): {self.reason}"


class OracleReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the oracle found.

    Attributes:
        equal: whether every statistics record was checked and equals the raw topics byte for byte.
        checked: statistics records compared.
        exposures, rewards: raw records read.
        differences: the first difference of each statistics record that has one.
        unchecked: what could not be compared.
        notes: settings of the workers that are not the oracle's, and the like.

    """

    equal: bool
    checked: int
    exposures: int
    rewards: int
    experiments: tuple[str, ...]
    differences: tuple[Difference, ...]
    unchecked: tuple[Unchecked, ...] = ()
    notes: tuple[str, ...] = ()


def value_text(value: Mismatch | Difference) -> str:
    """Say which value differs, and how."""
    named = (("metric", value.metric), ("arm", value.arm), ("epoch", value.epoch), ("segment", value.segment))
    where = "".join(f", {name} {one}" for name, one in named if one not in (None, ""))
    return f"{where}: {value.what}: engine {value.engine}, oracle {value.oracle}"


def _narrowed_line(narrowed: Narrowed, prefix: str, partition: int) -> str:
    wrong = narrowed.wrong_until
    if narrowed.right is None or narrowed.right_until is None:
        return (
            f"of {narrowed.records} records of it still on the topic already the oldest, {narrowed.wrong}, "
            f"differs ({_cut(wrong, prefix, partition)})"
        )
    spans = [
        f"{prefix}{topic}[{partition}] {_span(getattr(narrowed.right_until, topic), getattr(wrong, topic))}"
        for topic in ("exposures", "rewards")
    ]
    return (
        f"came in after {narrowed.right}, which is equal, with {narrowed.wrong}: by {' or '.join(spans)}, "
        "or by what matured then"
    )


def _span(after: int | None, last: int | None) -> str:
    first = 0 if after is None else after + 1
    if last is None or last < first:
        return "(nothing new)"
    return f"offset {first}" if first == last else f"offsets {first} to {last}"


def _cut(cut: Cut, prefix: str, partition: int) -> str:
    at = f"[{partition}]"
    return f"{prefix}exposures{at} up to {cut.exposures}, {prefix}rewards{at} up to {cut.rewards}"


def _explanation_lines(found: Explanation, prefix: str, partition: int) -> Iterator[str]:
    for suspect in found.suspects:
        yield f"explained to the byte if {_suspect(suspect, prefix, partition)}"
    if found.more_suspects:
        yield f"explained as well by {found.more_suspects} other single records"
    if found.prefix is not None:
        yield f"explained to the byte by another prefix: {_cut(found.prefix, prefix, partition)}"
    if found.watermark_ms is not None:
        yield f"explained to the byte by another watermark: {found.watermark_ms}"
    if not (found.suspects or found.prefix or found.watermark_ms is not None):
        tried = "no single record" if found.exhaustive else "no single record of those that were tried"
        yield f"{tried} explains it, neither lost nor doubled nor let in, and no other prefix nearby"
    yield from _contributor_lines(found.contributors, prefix, partition)


def _suspect(suspect: Suspect, prefix: str, partition: int) -> str:
    effect = _EFFECTS[suspect.effect] + (f" {suspect.fate}" if suspect.effect is Effect.LET_IN else "")
    return f"{prefix}{suspect.topic}[{partition}] offset {suspect.offset} {effect}"


def _contributor_lines(found: Contributors, prefix: str, partition: int) -> Iterator[str]:
    for topic, offsets, count in (
        ("exposures", found.exposures, found.exposure_count),
        ("rewards", found.rewards, found.reward_count),
    ):
        if offsets:
            more = f", … ({count} in all)" if count > min(len(offsets), _LISTED) else ""
            listed = ", ".join(map(str, offsets[:_LISTED]))
            yield f"takes part in this value: {prefix}{topic}[{partition}] {listed}{more}"
