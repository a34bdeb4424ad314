"""What `stream-xp notify` knows of its targets, as series in a registry of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector

if TYPE_CHECKING:
    from collections.abc import Sequence


class Deliveries:
    """Counters by target, at 0 from the start; safe to use from several threads.

    Args:
        targets: names of all that there are.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._delivered = self._counter("delivered", "Messages that the target has taken.")
        self._failed = self._counter("failed", "Attempts that failed, tried again or not.")
        self._given_up = self._counter("given_up", "Messages that the target will not be sent again.")
        self._waiting = Gauge(
            "streamxp_notify_waiting",
            "Whether a message waits to be tried again.",
            ["target"],
            registry=self.registry,
        )
        for target in targets:
            for one in (self._delivered, self._failed, self._given_up, self._waiting):
                one.labels(target)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"streamxp_notify_{name}", text, ["target"], registry=self.registry)

    def delivered(self, target: str) -> None:
        """A target has taken a message."""
        self._delivered.labels(target).inc()

    def failed(self, target: str) -> None:
        """An attempt failed."""
        self._failed.labels(target).inc()

    def given_up(self, target: str) -> None:
        """A message will not be tried again."""
        self._given_up.labels(target).inc()

    def waiting(self, target: str, *, waits: bool) -> None:
        """Whether a message of a target waits for its next attempt."""
        self._waiting.labels(target).set(int(waits))
