"""`stream-xp topics` against a real Apache Kafka."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from worker_process import DEADLINE_S

from stream_xp.adapters.kafka_admin import connect, declared_topics, describe_topics, ensure_topics
from stream_xp.cli.topics import topics
from stream_xp.errors import ConfigError
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.broker, pytest.mark.kafka, pytest.mark.xdist_group("apache_kafka")]

NAMES = [
    "config",
    "deadletter",
    "experiments",
    "exposures",
    "results",
    "rewards",
    "signals",
    "state",
    "stats",
]


def run(*arguments: str, settings: Settings) -> Result:
    environment = {
        "STREAM_XP_BOOTSTRAP": settings.bootstrap,
        "STREAM_XP_PREFIX": settings.prefix,
        "STREAM_XP_SECURITY_PROTOCOL": "PLAINTEXT",
    }
    return CliRunner().invoke(topics, arguments, env=environment)


def run_until(lines: int, *, settings: Settings) -> Result:
    """Check again until so many lines come: a broker takes a moment to show a change it has accepted."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        check = run("check", settings=settings)
        if len(check.output.splitlines()) >= lines or time.monotonic() > deadline:
            return check


@pytest.fixture
def settings(apache_kafka: str, topic_prefix: str) -> Settings:
    return Settings(bootstrap=apache_kafka, prefix=topic_prefix)


@pytest.fixture
def admin(apache_kafka: str) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=apache_kafka)
    yield client
    client.close()


def test_create_makes_every_topic_and_a_second_run_leaves_them(settings: Settings) -> None:
    full = [settings.topic(name) for name in NAMES]
    first = run("create", "--json", settings=settings)
    assert first.exit_code == 0, first.output
    assert json.loads(first.output) == {"created": full, "existing": []}

    second = run("create", settings=settings)
    assert second.exit_code == 0, second.output
    assert second.output.splitlines() == [f"exists   {name}" for name in full]

    check = run("check", settings=settings)
    assert (check.exit_code, check.output) == (0, "9 topics are as declared\n")


def test_create_adds_only_what_is_missing(settings: Settings, admin: KafkaAdminClient) -> None:
    admin.create_topics({settings.topic("exposures"): {"num_partitions": 3, "replication_factor": 1}})
    made = run("create", settings=settings)
    assert made.exit_code == 0
    assert f"exists   {settings.topic('exposures')}" in made.output
    check = run("check", settings=settings)
    assert check.exit_code == 1
    assert f"{settings.topic('exposures')}: partitions: wanted 4, found 3" in check.output.splitlines()


def test_check_names_every_drift(settings: Settings, admin: KafkaAdminClient) -> None:
    assert run("create", settings=settings).exit_code == 0
    exposures, rewards, state = (settings.topic(name) for name in ("exposures", "rewards", "state"))
    admin.alter_configs(
        [
            ConfigResource(
                ConfigResourceType.TOPIC, rewards, {"retention.ms": "60000", "cleanup.policy": "compact"}
            )
        ]
    )
    admin.create_partitions({exposures: 6})
    admin.delete_topics([state])

    check = run_until(4, settings=settings)
    assert check.exit_code == 1
    assert check.output.splitlines() == [
        f"{exposures}: partitions: wanted 4, found 6",
        f"{rewards}: cleanup.policy: wanted delete, found compact",
        f"{rewards}: retention.ms: wanted 7776000000, found 60000",
        f"{state}: topic: wanted present, found missing",
    ]
    listed = json.loads(run("check", "--json", settings=settings).output)
    assert {"topic": exposures, "field": "partitions", "wanted": "4", "found": "6"} in listed
    assert len(listed) == 4


def test_check_before_create_names_every_topic(settings: Settings) -> None:
    check = run("check", settings=settings)
    assert check.exit_code == 1
    assert sorted(check.output.splitlines()) == [
        f"{settings.topic(name)}: topic: wanted present, found missing" for name in NAMES
    ]


def test_ensure_refuses_a_wrong_partition_count(settings: Settings, admin: KafkaAdminClient) -> None:
    admin.create_topics({settings.topic("stats"): {"num_partitions": 1, "replication_factor": 1}})
    with (
        connect(settings) as client,
        pytest.raises(ConfigError, match=r"stats: partitions: wanted 4, found 1"),
    ):
        ensure_topics(client, declared_topics(settings))


def test_replay_topics_take_the_producers_time(settings: Settings) -> None:
    declared = declared_topics(settings, timestamp_type="CreateTime")
    with connect(settings) as client:
        ensure_topics(client, declared)
        found = describe_topics(client, [settings.topic("exposures")])[settings.topic("exposures")]
    assert found.partitions == 4
    assert found.config["message.timestamp.type"] == "CreateTime"
    assert found.config["retention.ms"] == "-1"


def test_too_many_copies_for_one_broker_is_one_line(settings: Settings) -> None:
    made = run("create", "--replication", "3", settings=settings)
    assert made.exit_code == 2
    assert made.output.startswith("Error: the broker refused to create ")
    assert settings.topic("state") in made.output
    assert "replication" in made.output.lower()
