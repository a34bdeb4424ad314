"""What `apply` refuses because of the experiments that stand on the topic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.adapters.topic_reader import TopicRecord
from stream_xp.cli import main
from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.domain.publication import archived_record, next_record
from stream_xp.engine.standing import NOTHING_SAID
from stream_xp.engine.steering import config_after
from stream_xp.errors import ConfigError
from stream_xp.services import publish as module
from stream_xp.services.publish import Collides, known_records, plan_application, publish
from stream_xp.services.spec_file import load_spec
from stream_xp.settings import Settings

EXAMPLES = Path(__file__).parents[3] / "examples" / "many-experiments"
T = 1_000_000


def spec(name: str, **fields: Any) -> ExperimentSpec:
    found = load_spec(EXAMPLES / f"{name}.yaml")
    return msgspec.convert({**msgspec.to_builtins(found), **fields}, ExperimentSpec)


def record(design: ExperimentSpec, *, shipped: str | None = None) -> ExperimentRecord:
    found = next_record(None, design, effective_ms=T)
    if shipped is None:
        return found
    weights = {arm: float(arm == shipped) for arm in design.weights}
    last = WeightEpoch(epoch=1, weights=weights, effective_ms=T, final=True, signal_id="s")
    return msgspec.structs.replace(found, epochs=(*found.epochs, last))


class Topics(list[tuple[bytes, bytes | None]]):
    """The topic of experiments; every other one is empty."""

    def put(self, *records: ExperimentRecord) -> None:
        self.extend((one.spec.experiment.encode(), msgspec.json.encode(one)) for one in records)

    def reader(self, settings: Settings, topic: str) -> Topic:
        return Topic(topic, self if topic == "xp.experiments" else [])


class Topic:
    def __init__(self, name: str, values: list[tuple[bytes, bytes | None]]) -> None:
        self._records = [TopicRecord(name, 0, at, T, *pair, ()) for at, pair in enumerate(values)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def backlog(self) -> Iterator[TopicRecord]:
        yield from self._records


@pytest.fixture
def topics(monkeypatch: pytest.MonkeyPatch) -> Topics:
    topics = Topics()
    monkeypatch.setattr(module, "TopicReader", topics.reader)
    return topics


class Writer:
    """Puts records on the topics; what it wrote is kept by topic."""

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self.wrote: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def send(self, topic: str, *, key: bytes, value: bytes) -> None:
        self.wrote.append(f"{topic} {key.decode()}")
        if topic == "xp.experiments":
            self._topics.append((key, value))

    def flush(self) -> None:
        pass


@pytest.fixture
def writer(topics: Topics, monkeypatch: pytest.MonkeyPatch) -> Writer:
    writer = Writer(topics)
    monkeypatch.setattr(module, "TopicWriter", lambda _: writer)
    return writer


def refusal(design: ExperimentSpec) -> str | None:
    try:
        plan_application(Settings(), design, now_ms=T)
    except Collides as error:
        return str(error)
    return None


OUTSIDE = {"program": None}


def test_slots_that_another_experiment_takes_are_refused_until_it_is_archived(topics: Topics) -> None:
    running = record(spec("button", **OUTSIDE))
    topics.put(running)
    other = spec("button", **OUTSIDE, experiment="other")
    assert "checkout-button takes 0-499 of layer checkout already" in str(refusal(other))
    assert refusal(spec("delivery", **OUTSIDE)) is None
    # A stop or ship can be reset, so it keeps its slots.
    topics.put(record(running.spec, shipped="large"))
    assert refusal(other) is not None
    topics.put(archived_record(record(running.spec, shipped="large")))
    assert refusal(other) is None


def test_of_two_who_apply_at_once_whoever_writes_second_takes_it_back(writer: Writer) -> None:
    one, two = spec("button", **OUTSIDE), spec("button", **OUTSIDE, experiment="other")
    both = [plan_application(Settings(), design, now_ms=T) for design in (one, two)]
    publish(Settings(), both[0])
    with pytest.raises(
        Collides, match=r"checkout-button takes 0-499 .* version 1 is archived .* to 2 to apply"
    ):
        publish(Settings(), both[1])
    # No application ever heard of the second.
    assert writer.wrote == [
        "xp.experiments checkout-button",
        "xp.config checkout-button",
        "xp.experiments other",
        "xp.experiments other",
    ]
    known = known_records(Settings())
    assert [design.experiment for design in known.running] == ["checkout-button"]
    assert known.newest["other"].status is Status.ARCHIVED


def test_of_two_designs_of_one_experiment_the_second_is_not_in_force(writer: Writer) -> None:
    one = spec("button", **OUTSIDE)
    both = [
        plan_application(Settings(), design, now_ms=T)
        for design in (one, msgspec.structs.replace(one, minimum_runtime="3d"))
    ]
    publish(Settings(), both[0])
    with pytest.raises(
        ConfigError, match="another design, version 1, is in force; version 1 was not published"
    ):
        publish(Settings(), both[1])
    assert writer.wrote[-1] == "xp.experiments checkout-button"
    assert known_records(Settings()).newest["checkout-button"].spec == one


def test_what_stands_already_is_not_asked_again_and_a_new_version_is(topics: Topics) -> None:
    one, two = spec("button", **OUTSIDE), spec("button", **OUTSIDE, experiment="other")
    topics.put(record(one), record(two))  # two people applied at once
    lighter = msgspec.structs.replace(
        one,
        arms=(
            msgspec.structs.replace(one.arms[0], weight=0.9),
            msgspec.structs.replace(one.arms[1], weight=0.1),
        ),
    )
    assert refusal(lighter) is None
    assert "other takes 0-499" in str(refusal(msgspec.structs.replace(one, version=2)))
    topics.put(archived_record(record(one)))
    assert refusal(one) is None  # it stays archived
    assert "other takes 0-499" in str(refusal(msgspec.structs.replace(one, version=2)))


def test_a_record_that_the_engine_refuses_takes_no_slots(topics: Topics) -> None:
    good = record(spec("button", **OUTSIDE))
    topics.put(msgspec.structs.replace(good, design_hash="0" * 64))
    topics += [(b"other", b"{"), (b"", b"{}")]
    assert known_records(Settings()).running == []
    assert refusal(spec("button", **OUTSIDE, experiment="another")) is None


def test_a_tombstone_frees_the_slots(topics: Topics) -> None:
    topics.put(record(spec("button", **OUTSIDE)))
    topics.append((b"checkout-button", None))
    assert refusal(spec("button", **OUTSIDE, experiment="other")) is None


def test_a_program_needs_a_holdout_that_runs(topics: Topics) -> None:
    assert "no holdout program-2026-q4 runs" in str(refusal(spec("button")))
    topics.put(record(spec("holdout")))
    assert refusal(spec("button")) is None
    topics.put(archived_record(record(spec("holdout"))))
    assert "no holdout program-2026-q4 runs" in str(refusal(spec("button")))


def test_a_champion_must_have_shipped(topics: Topics) -> None:
    old = spec("button", **OUTSIDE)
    new = spec(
        "button",
        **OUTSIDE,
        version=2,
        champion={"experiment": "checkout-button", "version": 1, "arm": "large"},
    )
    assert "there is no checkout-button version 1" in str(refusal(new))
    topics.put(record(old))
    assert "has not ended" in str(refusal(new))
    topics.put(record(old, shipped="large"))
    assert refusal(new) is None
    # Of a version that ended and was archived the topic still says so.
    topics.put(archived_record(record(old, shipped="large")))
    assert refusal(new) is None


def test_the_file_and_the_line_are_named(topics: Topics, tmp_path: Path) -> None:
    topics.put(record(spec("button", **OUTSIDE)), record(spec("holdout")))
    file = tmp_path / "other.yaml"
    file.write_text((EXAMPLES / "button.yaml").read_text().replace("checkout-button", "other"))
    done = CliRunner().invoke(main, ["apply", str(file), "--dry-run"])
    assert done.exit_code == 2
    assert done.stderr == (
        f"{file}:11:3: layer.slots: checkout-button takes 0-499 of layer checkout already; free are 500-999 "
        "(xp.experiments)\n"
    )


def test_applications_get_what_they_need_from_apply_and_from_the_worker(topics: Topics) -> None:
    topics.put(record(spec("holdout")))
    applied = plan_application(Settings(), spec("search"), now_ms=T)
    assert applied.config_after is not None
    moved = config_after(applied.after, NOTHING_SAID, config_version=7, lead_ms=0)
    for config in (applied.config_after, moved):
        assert config.layer is not None
        assert (config.layer.name, config.layer.salt, config.layer.slots) == ("search", "search", ((0, 999),))
        assert (config.program, config.holdout) == ("program-2026-q4", False)
    quarter = config_after(record(spec("holdout")), NOTHING_SAID, config_version=1, lead_ms=0)
    assert (quarter.holdout, quarter.program, quarter.status) == (True, None, RolloutStatus.RUNNING)
    assert msgspec.json.decode(msgspec.json.encode(quarter), type=ConfigRecord) == quarter


def test_known_records_hold_the_version_with_most_epochs(topics: Topics) -> None:
    old = spec("button", **OUTSIDE)
    topics.put(record(old), record(old, shipped="large"))
    newer = record(msgspec.structs.replace(old, version=2))
    topics.put(newer)
    known = known_records(Settings())
    assert known.newest == {"checkout-button": newer}
    assert known.versions["checkout-button", 1].epochs[-1].final
    assert [one.version for one in known.running] == [2]
    assert known.newest["checkout-button"].status is Status.ACTIVE
