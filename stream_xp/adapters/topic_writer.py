"""Writes records keyed as the applications would: idempotent, acknowledged by all replicas, murmur2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from kafka import KafkaProducer
from kafka.errors import KafkaError

from stream_xp.errors import DependencyError
from stream_xp.link import check_link, hint

if TYPE_CHECKING:
    from types import TracebackType

    from stream_xp.settings import Settings

CONNECT_TIMEOUT_MS: Final = 10_000
REQUEST_TIMEOUT_MS: Final = 20_000
DELIVERY_TIMEOUT_MS: Final = 60_000
LINGER_MS: Final = 20
BATCH_BYTES: Final = 131_072
MAX_REQUEST_BYTES: Final = 1_048_576


class TopicWriter:
    """A producer that reports the first record that could not be written, at the latest by `flush`.

    Leaving the block without an error flushes; leaving it with one drops what is not sent yet.

    Raises:
        ConfigError: a topic is missing, or a record is longer than the broker takes.
        DependencyError: no broker answered, or a record was not acknowledged in time.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: Any = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._producer = _connect(self._settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self._producer.close(timeout=0 if error else REQUEST_TIMEOUT_MS / 1_000)

    def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has."""
        try:
            return len(self._producer.partitions_for(topic))
        except (KafkaError, TypeError) as error:
            # A topic that exists is known within a request; only a missing one is waited for to the end.
            raise self._settings.missing_topic(topic) from error

    def send(self, topic: str, *, key: bytes, value: bytes | None) -> None:
        """Queue a record; the partition follows from the key as with every Kafka client's default."""
        self._check()
        try:
            self._producer.send(topic, key=key, value=value).add_errback(self._note)
        except (KafkaError, ValueError) as error:
            raise self._failure(error) from error

    def flush(self) -> None:
        """Wait until every queued record is acknowledged."""
        try:
            self._producer.flush(DELIVERY_TIMEOUT_MS / 1_000)
        except KafkaError as error:
            raise self._failure(error) from error
        self._check()

    def _note(self, error: BaseException) -> None:
        self._error = self._error or error

    def _check(self) -> None:
        if self._error is not None:
            raise self._failure(self._error) from self._error

    def _failure(self, error: BaseException) -> DependencyError:
        return DependencyError(f"writing to {self._settings.bootstrap} failed: {error}")


def _connect(settings: Settings) -> Any:
    check_link(settings)
    try:
        return KafkaProducer(
            **settings.kafka_python_options(),
            acks="all",
            enable_idempotence=True,
            linger_ms=LINGER_MS,
            batch_size=BATCH_BYTES,
            max_request_size=MAX_REQUEST_BYTES,
            # A real broker would make the topic with settings that are not the declared ones.
            allow_auto_create_topics=settings.broker == "embedded",
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            max_block_ms=CONNECT_TIMEOUT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
        )
    except (KafkaError, OSError) as error:
        raise DependencyError(
            f"no broker answered at {settings.bootstrap} within {CONNECT_TIMEOUT_MS} ms: {error}{hint(settings)}"
        ) from error
