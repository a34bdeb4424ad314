"""A broker's topics in memory, with everything that ever was on them beside what is there now."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple


class Record(NamedTuple):
    """One record; `sequence` orders everything that ever happened on the broker."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    sequence: int
    writer: str


_offset = attrgetter("offset")


@dataclass
class Partition:
    """`history` is what was ever appended, `live` what a consumer can read now, `changes` how often that changed."""

    history: list[Record] = field(default_factory=list)
    live: list[Record] = field(default_factory=list)
    start: int = 0
    changes: int = 0

    @property
    def end(self) -> int:
        """The offset of the next record."""
        return len(self.history)

    def read(self, offset: int, count: int) -> list[Record]:
        """The next records at or after `offset`."""
        first = bisect_left(self.live, offset, key=_offset)
        return self.live[first : first + count]


class Log:
    """Topics by name, each a list of partitions."""

    def __init__(self, partitions: dict[str, int]) -> None:
        self.topics = {name: [Partition() for _ in range(count)] for name, count in partitions.items()}
        self.sequence = 0

    def tick(self) -> int:
        """The number of the next thing that happens."""
        self.sequence += 1
        return self.sequence

    def append(
        self, topic: str, partition: int, *, key: bytes | None, value: bytes | None, now_ms: int, writer: str
    ) -> Record:
        """Append a record with the broker's append time."""
        held = self.topics[topic][partition]
        record = Record(held.end, now_ms, key, value, self.tick(), writer)
        held.history.append(record)
        held.live.append(record)
        held.changes += 1
        return record

    def compact(self, topic: str, partition: int, until: int) -> int:
        """Below offset `until` keep the newest record of each key; says how many went."""
        held = self.topics[topic][partition]
        newest = {record.key: record.offset for record in held.live}
        kept = [r for r in held.live if r.offset >= until or newest[r.key] == r.offset]
        gone = len(held.live) - len(kept)
        held.live = kept
        held.changes += 1
        return gone

    def truncate(self, topic: str, partition: int, start: int) -> None:
        """Delete everything below `start`, as retention does."""
        held = self.topics[topic][partition]
        held.start = max(held.start, min(start, held.end))
        held.live = [record for record in held.live if record.offset >= held.start]
        held.changes += 1

    def spoil(self, topic: str, partition: int, offset: int, value: bytes | None) -> None:
        """Put other bytes in the place of a record's value: a disk that does not keep what it was given."""
        held = self.topics[topic][partition]
        held.live = [r._replace(value=value) if r.offset == offset else r for r in held.live]
        held.changes += 1

    def history(self, topic: str) -> list[Record]:
        """Everything that was ever on a topic, in the order of all its partitions."""
        return sorted(
            (record for partition in self.topics[topic] for record in partition.history),
            key=lambda record: record.sequence,
        )
