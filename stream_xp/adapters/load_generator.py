"""Sends simulated traffic to a broker as fast as its own clock says, and remembers when each record left."""

from __future__ import annotations

import importlib
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from stream_xp.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from stream_xp.settings import Settings
    from stream_xp.simulator import Chunk, Event

LINGER_MS: Final = 2
DELIVERY_TIMEOUT_S: Final = 30.0
ROOM_TIMEOUT_S: Final = 30.0


class Sent(NamedTuple):
    """Where a record stands, its key, and when it was handed to the producer (`time.monotonic`)."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    sent_s: float


class LoadGenerator:
    """A producer of confluent-kafka that keeps to the time table of the traffic.

    ::

        with LoadGenerator(settings) as generator:
            generator.send(traffic.chunks(start_ms), start_ms=start_ms)

    The Kafka timestamp of a record is `start_ms + send_ms`, the time it is due, so that the outcome of the
    traffic does not depend on how busy this machine is. The producer is idempotent and keeps the order of
    every partition; keys choose partitions as with every Kafka client's default (murmur2).

    Args:
        settings: brokers, credentials and prefix.
        sample_every: one in so many deliveries is kept in `samples`.
        linger_ms: how long a batch waits for more records; longer makes larger batches.

    Attributes:
        delivered: acknowledged records per full topic name; read it from any thread.
        samples: some deliveries, in order of their acknowledgement.
        behind_ms: how far the sending was behind its time table at worst.

    Raises:
        ConfigError: confluent-kafka is not installed.
        DependencyError: a record was not acknowledged in time.
    """

    def __init__(self, settings: Settings, *, sample_every: int = 1, linger_ms: int = LINGER_MS) -> None:
        if sample_every < 1:
            raise ConfigError(f"sample_every must be at least 1, got {sample_every}")
        self.delivered: Counter[str] = Counter()
        self.samples: list[Sent] = []
        self.behind_ms = 0.0
        self._settings = settings
        self._sample_every = sample_every
        self._acknowledged = 0
        self._failure: str | None = None
        self._producer: Any = _producer(settings, linger_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._producer.purge()
        self._producer = None

    def send(self, chunks: Iterable[Chunk], *, start_ms: int, stop: threading.Event | None = None) -> bool:
        """Send each chunk once it is due, then wait for the acknowledgements.

        Args:
            chunks: in order of time.
            start_ms: wall clock time from which the chunks count, epoch milliseconds.
            stop: ends the sending early when it is set.

        Returns:
            Whether all chunks were sent.
        """
        stop = stop or threading.Event()
        for chunk in chunks:
            if self._wait_until(start_ms + chunk.due_ms, stop):
                self._flush()
                return False
            note = self._noting(time.monotonic())
            for event in chunk.events:
                self._produce(event, start_ms, note)
            self._producer.poll(0)
            self._check()
        self._flush()
        return True

    def _wait_until(self, due_ms: int, stop: threading.Event) -> bool:
        """Serve acknowledgements until the time has come; whether to stop."""
        while (left_s := due_ms / 1000 - time.time()) > 0 and not stop.is_set():
            self._producer.poll(0)
            stop.wait(min(left_s, 0.05))
        self.behind_ms = max(self.behind_ms, -left_s * 1000)
        return stop.is_set()

    def _produce(self, event: Event, start_ms: int, note: Callable[[Any, Any], None]) -> None:
        topic = self._settings.topic(event.topic)
        deadline = time.monotonic() + ROOM_TIMEOUT_S
        while True:
            try:
                self._producer.produce(
                    topic, event.value, event.key, timestamp=start_ms + event.send_ms, on_delivery=note
                )
            except BufferError as error:
                # The producer's queue is full: only acknowledgements make room.
                if time.monotonic() > deadline:
                    raise self._error("its queue stayed full") from error
                self._producer.poll(0.05)
            else:
                return

    def _noting(self, sent_s: float) -> Callable[[Any, Any], None]:
        def note(error: Any, message: Any) -> None:
            if error is not None:
                self._failure = self._failure or str(error)
                return
            topic = message.topic()
            self.delivered[topic] += 1
            self._acknowledged += 1
            if self._acknowledged % self._sample_every == 0:
                self.samples.append(Sent(topic, message.partition(), message.offset(), message.key(), sent_s))

        return note

    def _flush(self) -> None:
        unsent = self._producer.flush(DELIVERY_TIMEOUT_S)
        self._check()
        if unsent:
            raise self._error(f"{unsent} records were not acknowledged within {DELIVERY_TIMEOUT_S:.0f} s")

    def _check(self) -> None:
        if self._failure is not None:
            raise self._error(self._failure)

    def _error(self, why: str) -> DependencyError:
        return DependencyError(f"sending to {self._settings.bootstrap} failed: {why}")


def _producer(settings: Settings, linger_ms: int) -> Any:
    try:
        module = importlib.import_module("confluent_kafka")
    except ImportError as error:
        raise ConfigError(
            "the load generator needs confluent-kafka: pip install 'stream-xp[embedded]'"
        ) from error
    try:
        return module.Producer({**_options(settings), "linger.ms": linger_ms})
    except module.KafkaException as error:
        raise ConfigError(f"the load generator did not take its settings: {error}") from error


def _options(settings: Settings) -> dict[str, Any]:
    security = settings.security
    options = {
        "bootstrap.servers": settings.bootstrap,
        "client.id": "stream-xp-load",
        "enable.idempotence": True,
        "partitioner": "murmur2_random",
        "compression.type": "lz4",
        "delivery.timeout.ms": int(DELIVERY_TIMEOUT_S * 1000),
        # What goes wrong is raised; librdkafka would also write it on standard error.
        "log_level": 2,
        "security.protocol": security.security_protocol,
        "ssl.ca.location": security.ssl_ca_file,
        "ssl.certificate.location": security.ssl_cert_file,
        "ssl.key.location": security.ssl_key_file,
    }
    if security.sasl_password is not None:
        options["sasl.mechanism"] = security.sasl_mechanism
        options["sasl.username"] = security.sasl_username
        options["sasl.password"] = security.sasl_password.reveal()
    return {name: value for name, value in options.items() if value is not None}
