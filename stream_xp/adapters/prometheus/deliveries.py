"""What `stream-xp notify` knows of its targets, as series of `stream_xp.domain.metric_defs`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from stream_xp.adapters.prometheus.families import Cells, family
from stream_xp.domain.metric_defs import OF_NOTIFIERS, PREFIX


class Deliveries(Collector):
    """The series of one notifier, in a registry of its own; couriers tell it in their threads.

    Every target has every series from the start, at 0, and nothing else can become a label.

    Args:
        targets: names of all that there are.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._cells: dict[str, Cells] = {
            one.name: {(target,): 0.0 for target in targets} for one in OF_NOTIFIERS
        }
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def delivered(self, target: str) -> None:
        """A target has taken a message."""
        self._add("notify_delivered_total", target)

    def failed(self, target: str) -> None:
        """An attempt failed."""
        self._add("notify_failed_total", target)

    def given_up(self, target: str) -> None:
        """A message will not be tried again."""
        self._add("notify_given_up_total", target)

    def waiting(self, target: str, *, waits: bool) -> None:
        """Whether a message of a target waits for its next attempt."""
        with self._lock:
            self._of("notify_waiting", target)[target,] = float(waits)

    def collect(self) -> Iterator[Metric]:
        """Every series, as it stands now."""
        with self._lock:
            cells = {name: dict(held) for name, held in self._cells.items()}
        for definition in OF_NOTIFIERS:
            yield family(definition, cells[definition.name])

    def describe(self) -> Iterable[Metric]:
        """Nothing: what is there is told by `collect`."""
        return ()

    def _add(self, name: str, target: str) -> None:
        with self._lock:
            self._of(name, target)[target,] += 1

    def _of(self, name: str, target: str) -> Cells:
        held = self._cells[PREFIX + name]
        if (target,) not in held:
            raise KeyError(target)
        return held
