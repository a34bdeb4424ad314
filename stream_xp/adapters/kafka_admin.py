"""Topics as they are declared, and as a broker has them: create, compare, describe."""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import (
    KafkaError,
    NoError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from msgspec import Meta, Struct

from stream_xp.errors import ConfigError, DependencyError
from stream_xp.link import check_link, hint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stream_xp.settings import Settings

CONNECT_TIMEOUT_MS: Final = 10_000
RETRY_PAUSE_S: Final = 0.1
REQUEST_TIMEOUT_MS: Final = 20_000
MAX_FILE_BYTES: Final = 1_048_576
KEEP_FOREVER: Final = -1

TimestampType = Literal["LogAppendTime", "CreateTime"]


class TopicConfig(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    rename=lambda name: name.replace("_", "."),
):
    """The broker's settings of one topic, under the broker's own names."""

    cleanup_policy: Literal["compact", "delete"]
    retention_ms: Annotated[int, Meta(ge=-1)]
    retention_bytes: Annotated[int, Meta(ge=-1)]
    message_timestamp_type: TimestampType
    compression_type: Literal["producer", "lz4", "zstd", "snappy", "gzip", "uncompressed"]
    max_message_bytes: Annotated[int, Meta(ge=1_024, le=16_777_216)]
    segment_bytes: Annotated[int, Meta(ge=1_048_576)] | None = None
    min_compaction_lag_ms: Annotated[int, Meta(ge=0)] | None = None
    min_cleanable_dirty_ratio: Annotated[float, Meta(ge=0, le=1)] | None = None


class TopicSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One topic as `topics.yaml` declares it.

    Attributes:
        name: without the prefix.
        description: what its records are.
        key: what its keys are made of.
        partitions: a number, or `events` for the configured number.
        config: settings of the topic.
    """

    name: Annotated[str, Meta(pattern=r"^[a-z]+$")]
    description: Annotated[str, Meta(min_length=1)]
    key: Annotated[str, Meta(min_length=1)]
    partitions: Annotated[int, Meta(ge=1)] | Literal["events"]
    config: TopicConfig


class TopicsFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole of `topics.yaml`."""

    version: Literal[1]
    topics: tuple[TopicSpec, ...]


class Topic(Struct, frozen=True, kw_only=True):
    """One topic, ready to be created: full name, numbers, and every setting as the broker writes it."""

    name: str
    description: str
    key: str
    partitions: int
    replication: int
    config: dict[str, str]


class FoundTopic(Struct, frozen=True, kw_only=True):
    """One topic as a broker has it; `config` holds every setting, defaults included."""

    name: str
    partitions: int
    replication: int
    config: dict[str, str]


class Drift(Struct, frozen=True):
    """One difference between the declaration and the broker."""

    topic: str
    field: str
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.topic}: {self.field}: wanted {self.wanted}, found {self.found}"


class Creation(Struct, frozen=True, kw_only=True):
    """What :func:`create_topics` did."""

    created: tuple[str, ...]
    existing: tuple[str, ...]


def topics_dir() -> Path:
    """Return the folder with `topics.yaml`, the JSON Schemas and the samples.

    A wheel carries it as `stream_xp/_topics`; a source checkout has it beside the package.
    """
    package = Path(str(resources.files("stream_xp")))
    for folder in (package / "_topics", package.parent / "topics"):
        if (folder / "topics.yaml").is_file():
            return folder
    raise ConfigError("topics/topics.yaml is missing: install stream-xp again, or run from a whole checkout")


def parse_topics(raw: bytes) -> TopicsFile:
    """Decode the text of a topics file.

    Raises:
        ConfigError: names the field and the rule.
    """
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"topics.yaml must be at most {MAX_FILE_BYTES} bytes, found {len(raw)}")
    try:
        file = msgspec.yaml.decode(raw, type=TopicsFile)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"topics.yaml: {error}") from error
    names = [spec.name for spec in file.topics]
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"topics.yaml: topic {name} is declared {names.count(name)} times")
    return file


def load_topics(
    prefix: str,
    partitions: int,
    *,
    replication: int,
    min_insync_replicas: int = 1,
    timestamp_type: TimestampType | None = None,
) -> tuple[Topic, ...]:
    """Return every declared topic with its full name and numbers.

    Args:
        prefix: what every name starts with.
        partitions: the number that `partitions: events` stands for.
        replication: copies of each partition.
        min_insync_replicas: copies that must have a write before it is acknowledged.
        timestamp_type: `CreateTime` for the topics of a replay. They carry the append times of the original
            records, which are old, so their retention is without limit too.
    """
    file = parse_topics((topics_dir() / "topics.yaml").read_bytes())
    return tuple(
        Topic(
            name=prefix + spec.name,
            description=spec.description,
            key=spec.key,
            partitions=partitions if spec.partitions == "events" else spec.partitions,
            replication=replication,
            config={
                **_broker_texts(_with_timestamp_type(spec.config, timestamp_type)),
                "min.insync.replicas": str(min_insync_replicas),
            },
        )
        for spec in file.topics
    )


def declared_topics(settings: Settings, *, timestamp_type: TimestampType | None = None) -> tuple[Topic, ...]:
    """Return every declared topic for these settings; see :func:`load_topics`."""
    return load_topics(
        settings.prefix,
        settings.partitions,
        replication=settings.replication,
        min_insync_replicas=settings.min_insync_replicas,
        timestamp_type=timestamp_type,
    )


def _with_timestamp_type(config: TopicConfig, timestamp_type: TimestampType | None) -> TopicConfig:
    if timestamp_type is None:
        return config
    if timestamp_type == "LogAppendTime":
        return msgspec.structs.replace(config, message_timestamp_type=timestamp_type)
    return msgspec.structs.replace(config, message_timestamp_type=timestamp_type, retention_ms=KEEP_FOREVER)


def _broker_texts(config: TopicConfig) -> dict[str, str]:
    return {name: str(value) for name, value in msgspec.to_builtins(config).items()}


@contextmanager
def connect(settings: Settings) -> Iterator[KafkaAdminClient]:
    """Open an administration client; whatever Kafka says inside the block becomes a DependencyError.

    Raises:
        ConfigError: the embedded broker is configured, which has no topic administration.
        DependencyError: no broker answered, or a request failed.
    """
    if settings.broker == "embedded":
        raise ConfigError("the embedded broker has no topic administration: topics appear on first use")
    client = _open(settings)
    try:
        yield client
    except KafkaError as error:
        raise DependencyError(f"the broker at {settings.bootstrap} refused: {error}") from error
    finally:
        client.close()


def _open(settings: Settings) -> KafkaAdminClient:
    _wait_for_broker(settings)
    check_link(settings)
    try:
        return KafkaAdminClient(
            **settings.kafka_python_options(),
            bootstrap_timeout_ms=CONNECT_TIMEOUT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
    except (KafkaError, OSError) as error:
        raise DependencyError(
            f"the broker at {settings.bootstrap} does not talk to us: {error}{hint(settings)}"
        ) from error


def _wait_for_broker(settings: Settings) -> None:
    """Wait until an address accepts a connection.

    kafka-python tells a refused connection only after its whole deadline, as a time-out without a cause, and
    leaves the sockets of its attempts behind.
    """
    deadline = time.monotonic() + CONNECT_TIMEOUT_MS / 1_000
    while True:
        cause = _connection_error(settings.bootstrap_servers())
        if cause is None:
            return
        if time.monotonic() > deadline:
            raise DependencyError(
                f"no broker answered at {settings.bootstrap} within {CONNECT_TIMEOUT_MS} ms: {cause}"
            ) from cause
        time.sleep(RETRY_PAUSE_S)


def _connection_error(addresses: Sequence[str]) -> OSError | None:
    """Return None as soon as one address accepts a connection, otherwise why the last one did not."""
    cause: OSError | None = None
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_MS / 1_000).close()
        except OSError as error:
            cause = error
        else:
            return None
    return cause


def create_topics(client: KafkaAdminClient, topics: Sequence[Topic]) -> Creation:
    """Create the topics that do not exist yet; those that do are left as they are and reported.

    Raises:
        ConfigError: the broker refused a topic; names the topic and the broker's reason.
    """
    if not topics:
        return Creation(created=(), existing=())
    answer = client.create_topics(
        {
            topic.name: {
                "num_partitions": topic.partitions,
                "replication_factor": topic.replication,
                "configs": topic.config,
            }
            for topic in topics
        },
        raise_errors=False,
    )
    created, existing = _sort_answers(answer["topics"])
    if created:
        client.wait_for_topics(created)
    return Creation(created=tuple(sorted(created)), existing=tuple(sorted(existing)))


def _sort_answers(answers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    created, existing, refused = [], [], []
    for answer in answers:
        error = for_code(answer["error_code"])
        if error is NoError:
            created.append(answer["name"])
        elif error is TopicAlreadyExistsError:
            existing.append(answer["name"])
        else:
            refused.append(f"{answer['name']}: {answer.get('error_message') or error.__name__}")
    if refused:
        raise ConfigError("the broker refused to create " + "; ".join(sorted(refused)))
    return created, existing


def describe_topics(client: KafkaAdminClient, names: Sequence[str]) -> dict[str, FoundTopic]:
    """Return the topics that the broker has among these names, by name.

    Raises:
        DependencyError: the broker does not show the settings of a topic.
    """
    shapes = {
        topic["name"]: topic["partitions"]
        for topic in client.describe_topics(list(names))
        if not _is_unknown(topic)
    }
    if not shapes:
        return {}
    resources_ = [ConfigResource(ConfigResourceType.TOPIC, name) for name in shapes]
    configs = client.describe_configs(resources_, config_filter="all")["topic"]
    for name in sorted(shapes):
        if not configs.get(name):
            # kafka-python drops the error code of this answer.
            raise DependencyError(
                f"the broker lists topic {name} but shows no settings of it: it has just been deleted, "
                "or this client may not describe its settings"
            )
    return {
        name: FoundTopic(
            name=name,
            partitions=len(partitions),
            # The thinnest partition counts: it is the one that can be lost.
            replication=min((len(partition["replica_nodes"]) for partition in partitions), default=0),
            config={field: str(entry["value"]) for field, entry in sorted(configs[name].items())},
        )
        for name, partitions in sorted(shapes.items())
    }


def _is_unknown(topic: Mapping[str, Any]) -> bool:
    error = for_code(topic["error_code"])
    if error is NoError:
        return False
    if error is UnknownTopicOrPartitionError:
        return True
    raise error(topic["name"])


def check_topics(client: KafkaAdminClient, topics: Sequence[Topic]) -> list[Drift]:
    """Return every difference between the declared topics and those of the broker, in declared order."""
    found = describe_topics(client, [topic.name for topic in topics])
    return [drift for topic in topics for drift in compare(topic, found.get(topic.name))]


def compare(topic: Topic, found: FoundTopic | None) -> list[Drift]:
    """Return every difference between one declared topic and what was found."""
    if found is None:
        return [Drift(topic.name, "topic", "present", "missing")]
    pairs = [
        ("partitions", str(topic.partitions), str(found.partitions)),
        ("replication", str(topic.replication), str(found.replication)),
        *(
            (field, wanted, found.config.get(field, "undefined"))
            for field, wanted in sorted(topic.config.items())
        ),
    ]
    return [Drift(topic.name, field, wanted, value) for field, wanted, value in pairs if wanted != value]


def require_topics(client: KafkaAdminClient, topics: Sequence[Topic]) -> None:
    """Refuse to go on unless every topic is as declared.

    Raises:
        ConfigError: names every difference.
    """
    drifts = check_topics(client, topics)
    if drifts:
        raise ConfigError(
            "the broker's topics are not as declared:\n  " + "\n  ".join(str(drift) for drift in drifts)
        )


def require_shapes(client: KafkaAdminClient, topics: Sequence[Topic]) -> None:
    """Refuse to go on where a topic is missing or has another number of partitions; settings may change.

    Raises:
        ConfigError: names every difference.
    """
    drifts = [drift for drift in check_topics(client, topics) if drift.field in ("topic", "partitions")]
    if drifts:
        raise ConfigError("topics changed under this worker:\n  " + "\n  ".join(map(str, drifts)))


def ensure_topics(client: KafkaAdminClient, topics: Sequence[Topic]) -> Creation:
    """Create what is missing, then refuse to go on unless every topic is as declared.

    Raises:
        ConfigError: names every difference.
    """
    creation = create_topics(client, topics)
    require_topics(client, topics)
    return creation
