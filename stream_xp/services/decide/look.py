"""One look at an experiment: the statistics that were kept of it, its record, and what the look came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import structlog

from stream_xp.domain.decision import Action, Result
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.fit import check_fit
from stream_xp.domain.statistics import ExperimentStatistics, PartitionStatistics, merge
from stream_xp.engine.registry import Registry
from stream_xp.engine.standing import Standing
from stream_xp.engine.steering import Steering

log = structlog.get_logger(__name__)

Version: TypeAlias = tuple[str, int]
"""An experiment and its version."""


@dataclass(slots=True)
class Watched:
    """One experiment of this worker.

    Attributes:
        newest: newest statistics per source partition, of the newest version seen.
        changed: whether there is something to evaluate.
        old_from_ms: wall clock from which its data are too old, without a record that would bring a look; None where
            they are already, or nobody asks.
        fitting: those of the newest that are known to fit the spec.
    """

    experiment: str
    newest: dict[int, PartitionStatistics] = field(default_factory=dict)
    changed: bool = False
    old_from_ms: int | None = None
    fitting: dict[int, PartitionStatistics] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The newest version that has statistics."""
        return max(record.version for record in self.newest.values())

    def is_due(self, now_ms: int) -> bool:
        """Whether it is to be evaluated."""
        return self.changed or (self.old_from_ms is not None and now_ms >= self.old_from_ms)

    def take(self, record: PartitionStatistics) -> None:
        """Keep a record if it is newer than what is held for its partition."""
        held = self.newest.get(record.partition)
        if held is None or record.newer_than(held):
            self.newest[record.partition] = record
            self.changed = True

    def current(self) -> list[PartitionStatistics]:
        """The records of the newest version, by partition."""
        version = self.version
        return [record for _, record in sorted(self.newest.items()) if record.version == version]

    def look(self, registry: Registry) -> Look | None:
        """All there is of it by now; None where the spec is not known yet, or is not what was counted by."""
        self.changed = False
        record = registry.newest(self.experiment, self.version)
        if record is None:
            # Another worker's statistics can be here before the spec; it is looked for again.
            self.changed = True
            log.debug("statistics without a spec", experiment=self.experiment, version=self.version)
            return None
        parts = self.current()
        if not all(self._fits(part, record) for part in parts):
            return None
        return Look(self, record, parts, merge(part.statistics for part in parts))

    def _fits(self, part: PartitionStatistics, record: ExperimentRecord) -> bool:
        """Whether a partition's statistics are of this spec; without them the experiment would be another one."""
        if self.fitting.get(part.partition) is part:
            return True
        try:
            check_fit(part.statistics, record.spec)
        except ValueError as error:
            where = {"experiment": self.experiment, "partition": part.partition}
            log.error("statistics refused: not of this spec", **where, error=str(error))
            return False
        self.fitting[part.partition] = part
        return True


class Look(NamedTuple):
    """One evaluation of an experiment: its newest record, and what is known of it by then."""

    watched: Watched
    record: ExperimentRecord
    parts: list[PartitionStatistics]
    statistics: ExperimentStatistics

    @property
    def version(self) -> Version:
        """The experiment and its version."""
        return self.record.spec.experiment, self.record.spec.version


class Conclusion(NamedTuple):
    """What one look came to."""

    look: Look
    known: Standing
    steering: Steering
    result: Result

    @property
    def is_news(self) -> bool:
        """Whether it is to be signalled."""
        return self.known.latched is None and self.steering.decision.action is not Action.HOLD
