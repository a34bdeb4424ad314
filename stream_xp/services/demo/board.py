"""What the service has said so far, and when it was seen."""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from stream_xp.domain.decision import Action, Result, Signal
from stream_xp.services.demo.tail import RESULTS
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.signal_records import readable
from stream_xp.simulator import EXPOSURES, REWARDS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stream_xp.adapters.load_generator import Sent
    from stream_xp.domain.decision import PartitionOffsets
    from stream_xp.services.demo.tail import Seen


class Heard(NamedTuple):
    """A signal, and when it was seen."""

    signal: Signal
    seen_s: float


class Delays(NamedTuple):
    """Seconds from the sending of a record to the first result that covers it; `open` were not covered."""

    covered_s: list[float]
    open: int


@dataclass(slots=True)
class _Coverage:
    """How far the results of one experiment covered one source partition, each time further than before."""

    offsets: list[int] = field(default_factory=list)
    seen_s: list[float] = field(default_factory=list)

    def reach(self, offset: int | None, seen_s: float) -> None:
        if offset is not None and (not self.offsets or offset > self.offsets[-1]):
            self.offsets.append(offset)
            self.seen_s.append(seen_s)

    def covers_since(self, offset: int) -> float | None:
        at = bisect.bisect_left(self.offsets, offset)
        return self.seen_s[at] if at < len(self.offsets) else None


class Board:
    """The newest result and the signals of each experiment.

    Attributes:
        results: newest result per experiment.
        signals: all stop and ship signals per experiment, in order; there should be one at most.
        passed_over: records that are none of either.

    """

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.signals: dict[str, list[Heard]] = defaultdict(list)
        self.passed_over = PassedOver()
        self._coverage: dict[tuple[str, str, str], _Coverage] = defaultdict(_Coverage)

    def take(self, seen: Seen) -> None:
        """Take in a record of the results or the signals."""
        if seen.topic == RESULTS:
            result = self.passed_over.decoded(seen.value, Result, topic=seen.topic, place=seen.place)
            if result is not None:
                self._take_result(result, seen.seen_s)
            return
        signal = readable(self.passed_over, seen.value, topic=seen.topic, place=seen.place)
        if isinstance(signal, Signal) and signal.data.decision.action in (Action.STOP, Action.SHIP):
            self.signals[signal.data.result.experiment].append(Heard(signal, seen.seen_s))

    def _take_result(self, result: Result, seen_s: float) -> None:
        self.results[result.experiment] = result
        for partition, offsets in result.offsets.items():
            self._cover(result.experiment, partition, offsets, seen_s)

    def heard(self, experiment: str) -> Heard | None:
        """Return the signal that counts, the first one."""
        return next(iter(self.signals.get(experiment, ())), None)

    def delays(self, samples: Iterable[Sent], prefix: str) -> Delays:
        """Measure, for each sampled record of an experiment, how soon a result of that experiment covered it.

        A unit's key begins with its experiment and a dash, so that a record of nobody's is left out.
        """
        covered: list[float] = []
        uncovered = 0
        names = {topic: prefix + topic for topic in (EXPOSURES, REWARDS)}
        topics = {name: topic for topic, name in names.items()}
        for sample in samples:
            experiment = (sample.key or b"").decode(errors="replace").rpartition("-")[0]
            if experiment not in self.results:
                continue
            at = self._coverage[experiment, topics[sample.topic], str(sample.partition)]
            seen_s = at.covers_since(sample.offset)
            if seen_s is None:
                uncovered += 1
            else:
                covered.append(seen_s - sample.sent_s)
        return Delays(covered, uncovered)

    def _cover(self, experiment: str, partition: str, offsets: PartitionOffsets, seen_s: float) -> None:
        self._coverage[experiment, EXPOSURES, partition].reach(offsets.exposures, seen_s)
        self._coverage[experiment, REWARDS, partition].reach(offsets.rewards, seen_s)
