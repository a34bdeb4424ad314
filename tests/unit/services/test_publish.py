"""What `apply` takes for published, whatever stands last on the topics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import msgspec
import pytest

from stream_xp.adapters.topic_reader import TopicRecord
from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.errors import ConfigError
from stream_xp.services import publish as module
from stream_xp.services.publish import plan_application, plan_archiving
from stream_xp.settings import Settings

T = 1_000_000


def spec(version: int = 1, *, weight: float = 0.5) -> ExperimentSpec:
    return msgspec.convert(
        {
            "experiment": "exp",
            "version": version,
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": [
                {"key": "a", "weight": weight, "control": True},
                {"key": "b", "weight": 1.0 - weight},
            ],
            "metrics": [
                {
                    "key": "click",
                    "kind": "conversion",
                    "role": "primary",
                    "direction": "increase",
                    "attribution_window": f"{version}s",
                }
            ],
        },
        ExperimentSpec,
    )


def record(version: int = 1, *, status: Status = Status.ACTIVE) -> ExperimentRecord:
    design = spec(version)
    return ExperimentRecord(
        spec=design,
        epochs=(WeightEpoch(epoch=0, weights=design.weights, effective_ms=0),),
        design_hash=design.design_hash(),
        status=status,
    )


def config(config_version: int, *, status: RolloutStatus = RolloutStatus.RUNNING) -> ConfigRecord:
    return ConfigRecord(
        experiment="exp",
        version=1,
        status=status,
        weights={"a": 0.5, "b": 0.5},
        weight_epoch=0,
        effective_ms=0,
        config_version=config_version,
    )


class Topics:
    """Topics as lists of values, all of them under the key of one experiment or under another's."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[bytes, bytes | None]]] = {"xp.experiments": [], "xp.config": []}

    def put(self, topic: str, *values: Any, key: bytes = b"exp") -> None:
        encoded = [v if v is None or isinstance(v, bytes) else msgspec.json.encode(v) for v in values]
        self.values[topic] += [(key, value) for value in encoded]

    def reader(self, settings: Settings, topic: str) -> Topic:
        return Topic(topic, self.values[topic])


class Topic:
    """A `TopicReader` of one of them."""

    def __init__(self, name: str, values: list[tuple[bytes, bytes | None]]) -> None:
        self.records = [TopicRecord(name, 0, at, T, key, value, ()) for at, (key, value) in enumerate(values)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def backlog(self) -> Iterator[TopicRecord]:
        yield from self.records

    def newest_by_key(self) -> dict[bytes | None, TopicRecord]:
        return {record.key: record for record in self.records if record.value is not None}


@pytest.fixture
def topics(monkeypatch: pytest.MonkeyPatch) -> Topics:
    topics = Topics()
    monkeypatch.setattr(module, "TopicReader", topics.reader)
    return topics


def test_the_config_of_the_highest_version_counts_not_the_last(topics: Topics) -> None:
    topics.put("xp.experiments", record())
    topics.put("xp.config", config(1), config(3, status=RolloutStatus.STOPPED), config(2))
    topics.put("xp.config", config(9), key=b"other")
    publication = plan_archiving(Settings(), "exp")
    assert publication.config_before == config(3, status=RolloutStatus.STOPPED)
    # What was stopped is not undone by new weights.
    with pytest.raises(ConfigError, match="version 1 was stopped"):
        plan_application(Settings(), spec(weight=0.25), now_ms=T)


def test_the_next_config_is_above_all_that_were_ever_written(topics: Topics) -> None:
    topics.put("xp.experiments", record())
    topics.put("xp.config", config(4), config(2))
    publication = plan_application(Settings(), spec(weight=0.25), now_ms=T)
    assert publication.config_after is not None
    assert publication.config_after.config_version == 5


def test_an_experiment_record_that_the_engine_refuses_is_not_in_force(topics: Topics) -> None:
    rewritten = msgspec.structs.replace(record(2), design_hash="another")
    topics.put("xp.experiments", record(1), record(2), record(1), rewritten)
    assert plan_archiving(Settings(), "exp").before == record(2)
    ended = record(2, status=Status.ARCHIVED)
    topics.put("xp.experiments", ended, record(2))
    assert plan_application(Settings(), spec(2), now_ms=T).after == ended


@pytest.mark.parametrize(("topic", "value"), [("xp.experiments", record()), ("xp.config", config(1))])
def test_a_record_that_cannot_be_read_stops_only_if_it_came_after_the_one_that_counts(
    topics: Topics, topic: str, value: Any
) -> None:
    other = ({"xp.experiments": record(), "xp.config": config(1)}.keys() - {topic}).pop()
    topics.put(other, record() if other == "xp.experiments" else config(1))
    topics.put(topic, b"?", value)
    assert plan_archiving(Settings(), "exp").before == record()
    topics.put(topic, b"?")
    with pytest.raises(ConfigError, match=f"{topic} partition 0 offset 2 is no "):
        plan_archiving(Settings(), "exp")


def test_after_a_tombstone_there_is_nothing(topics: Topics) -> None:
    topics.put("xp.experiments", record(), None)
    topics.put("xp.config", config(7), None)
    publication = plan_application(Settings(), spec(2), now_ms=T)
    assert (publication.before, publication.config_before) == (None, None)
