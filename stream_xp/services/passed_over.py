"""Records of the service's own topics that are none: passed over by the commands, but never in silence."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Self, TypeVar

from stream_xp.domain.codec import decode_own
from stream_xp.domain.statistics import PartitionStatistics, merge
from stream_xp.errors import ConfigError

if TYPE_CHECKING:
    from types import TracebackType

# The standard library's: without a set-up it writes warnings to standard error, and output stays clean.
log = logging.getLogger(__name__)

Record = TypeVar("Record")


class PassedOver:
    """What one reader passed over: the first record of each topic is told at once, how many by `tell`.

    One record that is none must not hide all the others, nor fill a log with itself.

    Attributes:
        counts: how many of each topic.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tell()

    def tell(self) -> None:
        """Tell how many there were, where the first was not the only one; leaving the block does so too."""
        for topic, count in sorted(self.counts.items()):
            if count > 1:
                log.warning("passed over: %d records of %s in all", count, topic)

    def decoded(self, value: bytes | None, kind: type[Record], *, topic: str, place: str) -> Record | None:
        """Return the record, or None where the value is none.

        Args:
            value: of a record; null is none of any kind.
            kind: what it should be.
            topic: full name.
            place: topic, partition and offset, for the message.
        """
        try:
            record = decode_own(value or b"", kind)
            if isinstance(record, PartitionStatistics):
                _check_sums(record)
        except ConfigError as error:
            self.note(str(error), topic=topic, place=place)
            return None
        return record

    def note(self, what: str, *, topic: str, place: str) -> None:
        """Count a record that is passed over; `what` it is, is told of the first."""
        if not self.counts[topic]:
            # A name on a topic must not be able to steer a terminal.
            text = "".join(letter if letter.isprintable() else "?" for letter in what)
            log.warning("passed over: %s is %s", place, text)
        self.counts[topic] += 1


def _check_sums(record: PartitionStatistics) -> None:
    """Raise ConfigError where sums are no numbers: they are text in JSON."""
    try:
        merge((record.statistics,))
    except ValueError as error:
        raise ConfigError("no PartitionStatistics: a sum is no whole number") from error
