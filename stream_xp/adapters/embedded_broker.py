"""A Kafka protocol broker inside this process, for the demo and quick tests: librdkafka's mock cluster."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from stream_xp.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from types import TracebackType

AUTO_CREATED_PARTITIONS: Final = 4
START_TIMEOUT_S: Final = 10

_ERROR_BYTES: Final = 512
_NO_ERROR: Final = 0
_TOPIC_EXISTS: Final = 36
_PRODUCER: Final = 0
# The mock cluster's own client has no brokers to connect to and says so at level 5.
_CRITICAL_ONLY: Final = b"2"


class EmbeddedBroker:
    """One broker on a free port of 127.0.0.1, without Java and without Docker.

    ::

        with EmbeddedBroker() as broker:
            broker.create_topic("xp.exposures", 4)
            settings = Settings(bootstrap=broker.bootstrap, broker="embedded")

    Measured with confluent-kafka 2.16.1, kafka-python 3.0.12 and aiokafka 0.14.0. What works: producing and
    consuming with keys, headers and the producer's timestamps, offsets, commits, and consumer groups of
    one member. What is different from a broker that keeps data:

    - Topics appear on first use with 4 partitions, for which librdkafka has no setting.
      :meth:`create_topic` makes one with another (1,000 partitions were tried).
    - There is no topic administration: creating topics and reading their settings fails.
    - A partition keeps about 5 MB (5.2 MB with 10 kB records); older records go and the log start moves.
    - Nothing is compacted, nothing is on disk, and retention by time does not exist.
    - Records keep the timestamp of the producer, type CreateTime: there is no LogAppendTime. An
      acknowledgement always says timestamp 1234, and offsets cannot be looked up by time.
    - kafka-python has to be told `api_version=(2, 3, 0)`, which `Settings(broker="embedded")` does; without
      it, it does not connect.
    - One member per consumer group, hence one worker. A second member whose SyncGroup comes after the
      leader's is answered InvalidRequestError. aiokafka does not survive that (always within one event loop,
      in 3 of 5 trials with two processes); kafka-python joins again, but in 9 of 12 trials one of two members
      had no partition after 25 s. The delay before a group's first rebalance made no difference.

    Raises:
        ConfigError: confluent-kafka is not installed.
        DependencyError: the broker did not start.
    """

    def __init__(self) -> None:
        self._cluster: _Cluster | None = _start()
        self.bootstrap: Final[str] = self._cluster.bootstrap

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def create_topic(self, name: str, partitions: int) -> None:
        """Make a topic before its first use.

        Raises:
            ConfigError: the topic exists, or this build of librdkafka makes topics with 4 partitions only.
        """
        if self._cluster is None:
            raise ConfigError("the embedded broker is closed")
        self._cluster.create_topic(name, partitions)

    def close(self) -> None:
        """Stop the broker and forget every record; a second call does nothing."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close()


class _Cluster(Protocol):
    bootstrap: str

    def create_topic(self, name: str, partitions: int) -> None: ...

    def close(self) -> None: ...


def _start() -> _Cluster:
    try:
        extension = importlib.import_module("confluent_kafka.cimpl")
    except ImportError as error:
        raise ConfigError(
            "the embedded broker needs confluent-kafka: pip install 'stream-xp[embedded]'"
        ) from error
    try:
        library = _declare(ctypes.CDLL(extension.__file__))
    except (OSError, AttributeError):
        # A build that does not export the mock functions still has the mock cluster behind a setting.
        return _ClusterByConfig()
    return _ClusterByLibrary.start(library)


@dataclass(slots=True)
class _ClusterByLibrary:
    """The mock cluster through librdkafka's public C functions, as `rdkafka_mock.h` declares them."""

    library: ctypes.CDLL
    client: int
    cluster: int
    bootstrap: str

    @classmethod
    def start(cls, library: ctypes.CDLL) -> Self:
        text = ctypes.create_string_buffer(_ERROR_BYTES)
        conf = library.rd_kafka_conf_new()
        library.rd_kafka_conf_set(conf, b"log_level", _CRITICAL_ONLY, text, _ERROR_BYTES)
        client = library.rd_kafka_new(_PRODUCER, conf, text, _ERROR_BYTES)
        if not client:
            raise DependencyError(f"the embedded broker did not start: {text.value.decode()}")
        cluster = library.rd_kafka_mock_cluster_new(client, 1)
        if not cluster:
            library.rd_kafka_destroy(client)
            raise DependencyError("the embedded broker did not start: no loopback port to listen on")
        # The default of 3 s would be added to the start of every consumer group.
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 0)
        bootstrap = library.rd_kafka_mock_cluster_bootstraps(cluster).decode()
        return cls(library=library, client=client, cluster=cluster, bootstrap=bootstrap)

    def create_topic(self, name: str, partitions: int) -> None:
        code = self.library.rd_kafka_mock_topic_create(self.cluster, name.encode(), partitions, 1)
        if code == _TOPIC_EXISTS:
            raise ConfigError(f"topic {name} exists on the embedded broker")
        if code != _NO_ERROR:
            raise ConfigError(f"the embedded broker refused topic {name}: error code {code}")

    def close(self) -> None:
        self.library.rd_kafka_mock_cluster_destroy(self.cluster)
        self.library.rd_kafka_destroy(self.client)


class _ClusterByConfig:
    """The mock cluster that a producer of confluent-kafka starts when its configuration says so."""

    def __init__(self) -> None:
        producer = importlib.import_module("confluent_kafka").Producer(
            {"test.mock.num.brokers": 1, "log_level": 2}
        )
        brokers = producer.list_topics(timeout=START_TIMEOUT_S).brokers
        self._producer: Any = producer
        self.bootstrap = ",".join(f"{broker.host}:{broker.port}" for broker in brokers.values())

    def create_topic(self, name: str, partitions: int) -> None:
        if partitions != AUTO_CREATED_PARTITIONS:
            raise ConfigError(
                f"topic {name}: this build of librdkafka makes topics with {AUTO_CREATED_PARTITIONS} "
                f"partitions only, wanted {partitions}"
            )
        if name in self._producer.list_topics(timeout=START_TIMEOUT_S).topics:
            raise ConfigError(f"topic {name} exists on the embedded broker")
        self._producer.list_topics(name, timeout=START_TIMEOUT_S)

    def close(self) -> None:
        # The mock cluster ends with the client that started it, when nothing refers to it any more.
        self._producer = None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions their C signatures.

    Raises:
        AttributeError: the library does not export one of them.
    """
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("rd_kafka_conf_new", pointer, []),
        ("rd_kafka_conf_set", number, [pointer, text, text, text, ctypes.c_size_t]),
        ("rd_kafka_new", pointer, [number, pointer, text, ctypes.c_size_t]),
        ("rd_kafka_destroy", None, [pointer]),
        ("rd_kafka_mock_cluster_new", pointer, [pointer, number]),
        ("rd_kafka_mock_cluster_destroy", None, [pointer]),
        ("rd_kafka_mock_cluster_bootstraps", text, [pointer]),
        ("rd_kafka_mock_group_initial_rebalance_delay_ms", None, [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_topic_create", number, [pointer, text, number, number]),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
