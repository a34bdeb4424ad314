"""What `topics.yaml` declares, how it is read, and how differences are found."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.adapters import kafka_admin
from stream_xp.adapters.kafka_admin import (
    Drift,
    FoundTopic,
    Topic,
    compare,
    declared_topics,
    load_topics,
    parse_topics,
    topics_dir,
)
from stream_xp.cli.topics import topics
from stream_xp.errors import ConfigError
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

DAY_MS = 86_400_000


def declared(partitions: int = 4, **options: object) -> dict[str, Topic]:
    loaded = load_topics("", partitions, **{"replication": 1, **options})  # type: ignore[arg-type]
    return {topic.name: topic for topic in loaded}


def test_the_design_of_each_topic() -> None:
    shape = {name: (topic.config["cleanup.policy"], topic.partitions) for name, topic in declared(7).items()}
    assert shape == {
        "experiments": ("compact", 1),
        "exposures": ("delete", 7),
        "rewards": ("delete", 7),
        "deadletter": ("delete", 1),
        "state": ("compact", 7),
        "stats": ("compact", 4),
        "results": ("compact", 4),
        "signals": ("delete", 4),
        "config": ("compact", 1),
    }


def test_retention() -> None:
    retention = {name: int(topic.config["retention.ms"]) for name, topic in declared().items()}
    assert retention["exposures"] == retention["rewards"] >= 90 * DAY_MS
    assert retention["deadletter"] == 30 * DAY_MS
    assert retention["signals"] == -1
    assert {topic.config["retention.bytes"] for topic in declared().values()} == {"-1"}


def test_the_brokers_time_is_the_time_of_every_topic() -> None:
    assert {topic.config["message.timestamp.type"] for topic in declared().values()} == {"LogAppendTime"}


def test_replay_topics_keep_the_original_times_and_everything() -> None:
    replay = declared(timestamp_type="CreateTime").values()
    assert {topic.config["message.timestamp.type"] for topic in replay} == {"CreateTime"}
    assert {topic.config["retention.ms"] for topic in replay} == {"-1"}


def test_numbers_and_prefix_come_from_the_settings() -> None:
    settings = Settings(prefix="a.", partitions=9, replication=3, min_insync_replicas=2)
    topic = next(topic for topic in declared_topics(settings) if topic.name == "a.rewards")
    assert (topic.partitions, topic.replication, topic.config["min.insync.replicas"]) == (9, 3, "2")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (("retention.ms: -1", "retention.mss: -1"), "unknown field `retention.mss`"),
        (("cleanup.policy: compact", "cleanup.policy: shrink"), "Invalid enum value 'shrink'"),
        (("partitions: 1", "partitions: 0"), ">= 1"),
        (("name: rewards", "name: exposures"), "topic exposures is declared 2 times"),
        (("version: 1", "version: 2"), "version"),
        (("version: 1", "version: [1"), "topics.yaml:"),
    ],
)
def test_a_faulty_file_is_refused_with_the_rule(change: tuple[str, str], wanted: str) -> None:
    text = (topics_dir() / "topics.yaml").read_text()
    assert change[0] in text
    with pytest.raises(ConfigError) as caught:
        parse_topics(text.replace(change[0], change[1], 1).encode())
    assert wanted in str(caught.value)


def test_a_huge_file_is_refused_before_it_is_read() -> None:
    with pytest.raises(ConfigError, match="at most"):
        parse_topics(b"#" * 2_000_000)


def test_the_file_is_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = topics_dir() / "topics.yaml"
    package = tmp_path / "site" / "stream_xp"
    for folder in (package / "_topics", tmp_path / "site" / "topics"):
        folder.mkdir(parents=True)
        shutil.copy(source, folder)
    monkeypatch.setattr(kafka_admin.resources, "files", lambda _: package)
    assert topics_dir() == package / "_topics"
    shutil.rmtree(package / "_topics")
    assert topics_dir() == tmp_path / "site" / "topics"
    shutil.rmtree(tmp_path / "site" / "topics")
    with pytest.raises(ConfigError, match="is missing"):
        topics_dir()


def test_no_difference_and_every_difference() -> None:
    topic = declared()["stats"]
    same = FoundTopic(
        name=topic.name,
        partitions=topic.partitions,
        replication=topic.replication,
        config={**topic.config, "flush.ms": "1"},
    )
    assert compare(topic, same) == []
    config = dict(same.config)
    del config["segment.bytes"]
    config["cleanup.policy"] = "delete"
    other = msgspec.structs.replace(same, partitions=5, replication=2, config=config)
    assert compare(topic, other) == [
        Drift("stats", "partitions", "4", "5"),
        Drift("stats", "replication", "1", "2"),
        Drift("stats", "cleanup.policy", "compact", "delete"),
        Drift("stats", "segment.bytes", "67108864", "undefined"),
    ]
    assert [str(drift) for drift in compare(topic, None)] == ["stats: topic: wanted present, found missing"]


def test_show_asks_no_broker() -> None:
    result = CliRunner().invoke(topics, ["show", "--prefix", "a.", "--json"])
    assert result.exit_code == 0
    assert [topic["name"] for topic in json.loads(result.output)][:2] == ["a.experiments", "a.exposures"]
    text = CliRunner().invoke(topics, ["show", "--partitions", "6"])
    assert "xp.rewards\n" in text.output
    assert "  partitions: 6, replication: 1\n" in text.output


@pytest.mark.parametrize("command", [[], ["create"], ["check"], ["show"]])
def test_help_has_examples(command: list[str]) -> None:
    result = CliRunner().invoke(topics, [*command, "--help"])
    assert result.exit_code == 0
    assert "Examples:\n" in result.output
    assert "  stream-xp topics " in result.output


def test_a_wrong_setting_is_one_line_and_exit_2() -> None:
    result = CliRunner().invoke(topics, ["show", "--partitions", "none"])
    assert result.exit_code == 2
    assert result.stderr == "Error: --partitions: Expected `int`, got `str`, found 'none'\n"


def test_no_broker_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch, unused_port: int) -> None:
    monkeypatch.setattr(kafka_admin, "CONNECT_TIMEOUT_MS", 300)
    result = CliRunner().invoke(topics, ["check", "--bootstrap", f"127.0.0.1:{unused_port}"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: no broker answered at 127.0.0.1:{unused_port} within 300 ms")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def unused_port() -> int:
    import socket  # noqa: PLC0415

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
