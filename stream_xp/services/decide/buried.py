"""What compaction would lose: experiment records in force that lie below one that was refused."""

from __future__ import annotations

from collections.abc import Container

import structlog

from stream_xp.engine.registry import Registry
from stream_xp.services.decide.topics import READ_BACK_MS, Topics

log = structlog.get_logger(__name__)


class Buried:
    """Writes the record in force once more where one that was refused came after it.

    The topic is compacted: only the refused one would be left, and who reads only that would go by it.
    """

    def __init__(self, topics: Topics, registry: Registry) -> None:
        self._topics = topics
        self._registry = registry
        self._restored_ms: dict[str, int] = {}

    async def restore(self, experiments: Container[str], *, now_ms: int) -> None:
        """Write the records of some experiments again, but for those that are on their way back already."""
        buried = [
            entry
            for entry in self._registry.buried()
            if entry.experiment in experiments
            and now_ms >= self._restored_ms.get(entry.experiment, 0) + READ_BACK_MS
        ]
        if not buried:
            return
        await self._topics.write("experiments", [(entry.experiment, entry.record) for entry in buried])
        for entry in buried:
            log.warning(
                "experiment record written again: a refused one came after it", experiment=entry.experiment
            )
        self._restored_ms |= {entry.experiment: now_ms for entry in buried}

    def drop(self) -> None:
        """Forget what is on its way back."""
        self._restored_ms.clear()
