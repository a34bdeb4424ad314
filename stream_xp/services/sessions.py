"""One session with Kafka after another, each with a consumer of its own, in a thread of their own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from kafka.errors import KafkaError

from stream_xp.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Callable

PAUSE_S: Final = 1.0


class Sessions:
    """Opens a consumer and works with it, and after a failure of the broker's with another, until it is stopped.

    What the broker or the way to it does is no end; everything else ends the thread.

    Args:
        name: of the thread.
        connect: opens a consumer.
        work: works with it until it fails or `stopped` is set.
        interrupted: told what a session failed of, before the next one.
        ended: told what ended the thread.

    Attributes:
        stopped: set by `stop`.
        failure: what ended the thread; None while it goes on.
    """

    def __init__(
        self,
        name: str,
        *,
        connect: Callable[[], Any],
        work: Callable[[Any], None],
        interrupted: Callable[[Exception], None],
        ended: Callable[[BaseException], None],
    ) -> None:
        self._connect = connect
        self._work = work
        self._interrupted = interrupted
        self._ended = ended
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self.stopped = threading.Event()
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End as soon as the work lets go."""
        self.stopped.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._thread.join(timeout_s)

    def _main(self) -> None:
        try:
            while not self.stopped.is_set():
                self._session()
        except BaseException as error:  # noqa: BLE001 (whoever waits raises it)
            self._ended(error)
            self.failure = error

    def _session(self) -> None:
        consumer: Any = None
        try:
            consumer = self._connect()
            self._work(consumer)
        except (KafkaError, DependencyError) as error:
            self._interrupted(error)
            self.stopped.wait(PAUSE_S)
        finally:
            if consumer is not None:
                consumer.close(autocommit=False)
