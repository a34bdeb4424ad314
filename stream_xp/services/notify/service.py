"""The process `stream-xp notify`: a courier for each target, and what ends them."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import structlog

from stream_xp.adapters import health_file
from stream_xp.adapters.clock import Clock, WallClock
from stream_xp.adapters.prometheus import Deliveries, MetricsServer
from stream_xp.services.notify.courier import Courier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stream_xp.services.notify.targets import Target
    from stream_xp.settings import Settings

log = structlog.get_logger(__name__)

STUCK_MS: Final = 120_000
"""How long a courier may be in one round: longer than an attempt, a lookup of a name and a broker's timeout."""
JOIN_S: Final = 15.0


class Notifier:
    """Couriers, all or none.

    ::

        with Notifier(settings, targets) as notifier:
            notifier.run(stop)

    Args:
        settings: brokers, prefix and group.
        targets: of :func:`load_targets`.
        clock: wall clock.
    """

    def __init__(self, settings: Settings, targets: Sequence[Target], *, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock or WallClock()
        self.deliveries = Deliveries([target.name for target in targets])
        self._couriers = [
            Courier(
                settings,
                target,
                sender=target.sender(),
                clock=self._clock,
                # Nobody gains by guessing when a message is tried again.
                chance=random.random,
                deliveries=self.deliveries,
            )
            for target in targets
        ]

    def __enter__(self) -> Self:
        for courier in self._couriers:
            courier.start()
        return self

    def __exit__(self, *_: object) -> None:
        for courier in self._couriers:
            courier.stop()
        for courier in self._couriers:
            courier.join(JOIN_S)

    def run(self, stop: threading.Event) -> None:
        """Go on until told, or until a courier fails.

        Raises:
            StreamXpError: what a courier failed of.
        """
        while not stop.wait(health_file.BEAT_S):
            for courier in self._couriers:
                if courier.failure is not None:
                    raise courier.failure
            if self._settings.health_file is not None and self.goes_on():
                health_file.beat(Path(self._settings.health_file))

    def goes_on(self) -> bool:
        """Whether no courier is stuck."""
        now_ms = self._clock.now_ms()
        return all(now_ms - courier.moved_ms < STUCK_MS for courier in self._couriers)


def run_until_signal(settings: Settings, targets: Sequence[Target]) -> None:
    """Notify until SIGTERM or SIGINT.

    Raises:
        ConfigError: a topic or a setting is not what it must be.
        StreamXpError: a courier failed.
    """
    stop = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: stop.set())
    notifier = Notifier(settings, targets)
    with _metrics(settings, notifier), notifier:
        log.info("notifier started", targets=[f"{one.name} at {one.where.host_header}" for one in targets])
        notifier.run(stop)


@contextlib.contextmanager
def _metrics(settings: Settings, notifier: Notifier) -> Iterator[None]:
    if settings.metrics_port is None:
        yield
        return
    server = MetricsServer(
        notifier.deliveries.registry, host=settings.metrics_host, port=settings.metrics_port
    )
    log.info("metrics served", host=settings.metrics_host, port=server.port)
    try:
        yield
    finally:
        server.stop()
