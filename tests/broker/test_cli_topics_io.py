"""apply, produce, status and signals on a broker: what goes in comes out."""

from __future__ import annotations

import gc
import json
import threading
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from kafka import KafkaProducer
from kafka.partitioner import murmur2

from stream_xp.adapters.kafka_admin import connect, create_topics, declared_topics, topics_dir
from stream_xp.adapters.topic_reader import TopicReader, TopicRecord
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.cli import main
from stream_xp.domain.codec import RawRecord, decode_exposure
from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.experiment import ExperimentRecord, Status
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = pytest.mark.broker

CANARY = Path(__file__).parents[2] / "examples" / "canary" / "spec.yaml"
GOLDEN = topics_dir() / "golden"


def run(settings: Settings, *arguments: str, stdin: bytes | None = None) -> Result:
    options = ["--bootstrap", settings.bootstrap, "--broker", settings.broker, "--prefix", settings.prefix]
    return CliRunner().invoke(main, [arguments[0], *options, *arguments[1:]], input=stdin)


def ok(settings: Settings, *arguments: str, stdin: bytes | None = None) -> str:
    result = run(settings, *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def records(settings: Settings, topic: str) -> list[TopicRecord]:
    with TopicReader(settings, settings.topic(topic)) as reader:
        return list(reader.backlog())


def write(settings: Settings, topic: str, *pairs: tuple[bytes, bytes | None]) -> None:
    with TopicWriter(settings) as writer:
        for key, value in pairs:
            writer.send(settings.topic(topic), key=key, value=value)


@pytest.fixture
def embedded(embedded_broker: EmbeddedBroker, topic_prefix: str) -> Settings:
    return Settings(bootstrap=embedded_broker.bootstrap, broker="embedded", prefix=topic_prefix)


@pytest.fixture(params=["embedded", pytest.param("apache", marks=pytest.mark.kafka)])
def settings(request: pytest.FixtureRequest, topic_prefix: str) -> Iterator[Settings]:
    if request.param == "embedded":
        yield request.getfixturevalue("embedded")
        return
    apache = Settings(bootstrap=request.getfixturevalue("apache_kafka"), prefix=topic_prefix)
    topics = declared_topics(apache)
    with connect(apache) as client:
        create_topics(client, topics)
    yield apache
    with connect(apache) as client:
        client.delete_topics([topic.name for topic in topics])


def spec_file(folder: Path, **edits: str) -> str:
    text = CANARY.read_text()
    for name, new in edits.items():
        old = {"stable": "weight: 0.9", "canary": "weight: 0.1", "version": "version: 1", "sample": "20_000"}[
            name
        ]
        assert old in text
        text = text.replace(old, new)
    path = folder / "spec.yaml"
    path.write_text(text)
    return str(path)


def test_apply_again_ramp_and_archive(settings: Settings, tmp_path: Path) -> None:
    first = json.loads(ok(settings, "apply", str(CANARY), "--json"))
    assert (first["published"], first["record"]["epochs"][0]["epoch"]) == (True, 0)
    assert "nothing" in ok(settings, "apply", str(CANARY))
    ramped = spec_file(tmp_path, stable="weight: 0.75", canary="weight: 0.25")
    assert "would change: weight epoch 1" in ok(settings, "apply", ramped, "--dry-run")
    assert len(records(settings, "experiments")) == 1
    assert "changed: weight epoch 1: stable 0.75, canary 0.25" in ok(settings, "apply", ramped)
    assert "archived" in ok(settings, "apply", "--archive", "checkout-canary")
    assert "nothing" in ok(settings, "apply", "--archive", "checkout-canary")

    history = [
        msgspec.json.decode(r.value or b"", type=ExperimentRecord) for r in records(settings, "experiments")
    ]
    assert [(record.status, len(record.epochs)) for record in history] == [
        (Status.ACTIVE, 1),
        (Status.ACTIVE, 2),
        (Status.ARCHIVED, 2),
    ]
    assert {record.key for record in records(settings, "experiments")} == {b"checkout-canary"}
    configs = [msgspec.json.decode(r.value or b"", type=ConfigRecord) for r in records(settings, "config")]
    assert [(config.config_version, config.weight_epoch, config.status) for config in configs] == [
        (1, 0, RolloutStatus.RUNNING),
        (2, 1, RolloutStatus.RUNNING),
    ]
    assert configs[1].weights == {"stable": 0.75, "canary": 0.25}


def test_new_weights_take_effect_after_the_activation_delay(embedded: Settings) -> None:
    before_ms = time.time_ns() // 1_000_000
    record = json.loads(ok(embedded, "apply", str(CANARY), "--json"))["record"]
    delay_ms = record["epochs"][0]["effective_ms"] - before_ms
    assert embedded.activation_delay_ms <= delay_ms < embedded.activation_delay_ms + 60_000


def test_a_new_design_needs_a_new_version(embedded: Settings, tmp_path: Path) -> None:
    ok(embedded, "apply", str(CANARY))
    refused = run(embedded, "apply", spec_file(tmp_path, sample="30_000"))
    assert refused.exit_code == 2
    assert "these fields changed: planned_sample; raise `version` to 2" in refused.stderr
    assert refused.stderr.count("\n") == 1
    raised = json.loads(
        ok(embedded, "apply", spec_file(tmp_path, sample="30_000", version="version: 2"), "--json")
    )
    assert raised["changes"] == [
        "new version 2, in place of 1",
        "applications follow config version 2, running",
    ]
    assert run(embedded, "apply", str(CANARY)).exit_code == 2


def test_a_config_that_was_not_written_is_written_the_next_time(embedded: Settings) -> None:
    ok(embedded, "apply", str(CANARY))
    write(embedded, "config", (b"checkout-canary", None))
    assert "applications follow config version 1" in ok(embedded, "apply", str(CANARY))
    assert len(records(embedded, "experiments")) == 1


def test_new_weights_do_not_undo_a_stop(embedded: Settings, tmp_path: Path) -> None:
    ok(embedded, "apply", str(CANARY))
    stopped = json.loads((GOLDEN / "config.v1.json").read_bytes()) | {"weight_epoch": 0}
    write(embedded, "config", (b"checkout-canary", json.dumps(stopped).encode()))
    refused = run(embedded, "apply", spec_file(tmp_path, stable="weight: 0.5", canary="weight: 0.5"))
    assert "was stopped by signal checkout-canary/1/stop" in refused.stderr
    assert len(records(embedded, "experiments")) == 1


def test_archiving_what_is_not_there(embedded: Settings) -> None:
    refused = run(embedded, "apply", "--archive", "nothing")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "no such experiment" in refused.stderr


def test_a_record_of_another_release_is_not_overwritten(embedded: Settings) -> None:
    write(embedded, "experiments", (b"checkout-canary", b'{"schema": 2}'))
    refused = run(embedded, "apply", str(CANARY))
    assert refused.exit_code == 2
    assert "partition 0 offset 0 is no ExperimentRecord" in refused.stderr or "offset 0" in refused.stderr
    assert len(records(embedded, "experiments")) == 1


EVENTS = [
    {"id": "1", "time": 1793611800000, "experiment": "e", "unit": "u-é", "arm": "a", "extra": [1]},
    {"type": "reward", "id": "2", "time": "2026-11-02T09:30:05Z", "unit": "u-é", "metric": "m", "value": 2.5},
    {"id": "3", "time": 1793611800000, "unit": "v", "metric": "m"},
]


def ndjson(*events: object) -> bytes:
    return b"\n".join(json.dumps(event).encode() for event in events)


def test_what_is_produced_is_read_back(settings: Settings) -> None:
    text = ok(settings, "produce", "-", "--json", stdin=ndjson(*EVENTS))
    assert json.loads(text) == {"exposures": 1, "rewards": 2, "bad_lines": 0}
    (exposure,) = records(settings, "exposures")
    assert json.loads(exposure.value or b"") == EVENTS[0]
    assert exposure.key == "u-é".encode()
    assert exposure.partition == (murmur2(exposure.key) & 0x7FFFFFFF) % 4
    raw = RawRecord(exposure.key, exposure.value, exposure.headers, 1793611800000)
    assert decode_exposure(raw).arm == "a"
    rewards = {record.key: record for record in records(settings, "rewards")}
    assert json.loads(rewards["u-é".encode()].value or b"") == {
        k: v for k, v in EVENTS[1].items() if k != "type"
    }
    assert rewards["u-é".encode()].partition == exposure.partition


def test_bad_lines_are_named_and_passed_over(embedded: Settings, tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    no_id = {name: value for name, value in EVENTS[0].items() if name != "id"}
    no_time = {name: value for name, value in EVENTS[0].items() if name != "time"}
    path.write_bytes(
        ndjson(EVENTS[0], no_id, no_time, EVENTS[1])
        + b"\n\n{\n"
        + b"x" * 200_000
        + b"\n[]\n"
        + ndjson(EVENTS[2])
    )
    result = run(embedded, "produce", str(path))
    assert result.exit_code == 1
    assert "sent 1 exposures and 2 rewards; 5 bad lines" in result.stdout
    lines = result.stderr.splitlines()
    assert [line.removeprefix(f"{path}:").partition(":")[0] for line in lines] == ["2", "3", "6", "7", "8"]
    assert "`id` is missing" in lines[0]
    assert "`time` is missing" in lines[1]
    assert "--now" in lines[1]
    assert (len(records(embedded, "exposures")), len(records(embedded, "rewards"))) == (1, 2)


def test_strict_stops_at_the_first_bad_line(embedded: Settings) -> None:
    result = run(embedded, "produce", "--strict", stdin=ndjson(EVENTS[0]) + b"\n{\n" + ndjson(EVENTS[1]))
    assert result.exit_code == 1
    assert result.stderr.startswith("-:2: ")
    assert (len(records(embedded, "exposures")), len(records(embedded, "rewards"))) == (1, 0)


def test_now_fills_a_missing_time(embedded: Settings) -> None:
    no_time = {name: value for name, value in EVENTS[0].items() if name != "time"}
    ok(embedded, "produce", "--now", stdin=ndjson(no_time, {**EVENTS[0], "id": "x"}))
    values = {(v := json.loads(r.value or b""))["id"]: v["time"] for r in records(embedded, "exposures")}
    assert abs(values["1"] - time.time_ns() // 1_000_000) < 60_000
    assert values["x"] == 1793611800000


def test_topics_that_cannot_be_joined_are_refused(
    embedded_broker: EmbeddedBroker, embedded: Settings
) -> None:
    embedded_broker.create_topic(embedded.topic("exposures"), 3)
    result = run(embedded, "produce", stdin=ndjson(EVENTS[0]))
    assert result.exit_code == 2
    assert "must have the same number" in result.stderr
    assert records(embedded, "exposures") == []


def result_record(**edits: Any) -> bytes:
    return json.dumps(json.loads((GOLDEN / "result.v1.json").read_bytes()) | edits).encode()


def test_status_shows_the_newest(settings: Settings) -> None:
    assert ok(settings, "status") == "no experiment has a result yet\n"
    write(
        settings,
        "results",
        (b"checkout-canary", (GOLDEN / "result.undetermined.v1.json").read_bytes()),
        (b"checkout-canary", result_record()),
        (b"artwork", result_record(experiment="artwork", look=7)),
        (b"gone", result_record(experiment="gone")),
        (b"gone", None),
    )
    shown = json.loads(ok(settings, "status", "--json"))
    assert [(entry["result"]["experiment"], entry["result"]["look"]) for entry in shown] == [
        ("artwork", 7),
        ("checkout-canary", 412),
    ]
    assert shown[0]["watermark_ms"] == 1793615400000
    assert shown[0]["data_age_ms"] - shown[0]["evaluated_age_ms"] == 250
    text = ok(settings, "status", "checkout-canary")
    for word in (
        "STOP canary, errors",
        "9,260",
        "harmed",
        "0.02096 [0.0031, 0.0388]",
        "harm log_e 4.75 of 3.00",
        "4.25",
        "no mismatch",
        "1,045 in",
        "look 412",
    ):
        assert word in text
    assert "artwork" not in text


def test_status_of_an_unknown_experiment(embedded: Settings) -> None:
    result = run(embedded, "status", "nothing")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no result on" in result.stderr


def test_a_hostile_name_is_shown_as_text(embedded: Settings) -> None:
    write(embedded, "results", (b"x", result_record(experiment="[bold]x[/nope]")))
    assert "[bold]x[/nope]" in ok(embedded, "status")


def signal_record(identity: str, second: int, **edits: Any) -> bytes:
    signal = json.loads((GOLDEN / "signal.v1.json").read_bytes())
    signal["data"]["result"] |= edits
    return json.dumps(signal | {"id": identity, "time": f"2026-11-02T10:30:{second:02}Z"}).encode()


def test_signals_are_shown_once_in_the_order_of_time(settings: Settings) -> None:
    write(
        settings,
        "signals",
        (b"checkout-canary", signal_record("b", 2)),
        (b"artwork", signal_record("a", 1, experiment="artwork")),
        (b"checkout-canary", signal_record("b", 2)),
        (b"checkout-canary", signal_record("c", 3, version=2)),
    )
    lines = [json.loads(line) for line in ok(settings, "signals", "--json").splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["specversion"] == "1.0"
    newest = ok(settings, "signals", "--limit", "1", "--json").splitlines()
    assert [json.loads(line)["id"] for line in newest] == ["c"]
    assert ok(settings, "signals", "--limit", "0") == ""
    (text,) = ok(settings, "signals", "artwork").splitlines()
    assert text.startswith("2026-11-02T10:30:01Z  STOP  artwork version 1 (canary, errors): errors is proven")
    ids = [line.rsplit("  ", 1)[1] for line in ok(settings, "signals").splitlines()]
    assert ids == ["a", "b", "c"]


def test_following_gives_the_past_and_then_what_comes(embedded: Settings) -> None:
    from stream_xp.services.evidence import read_signals  # noqa: PLC0415

    write(embedded, "signals", (b"k", signal_record("a", 1)))

    def later() -> None:
        time.sleep(0.5)
        write(
            embedded,
            "signals",
            (b"k", signal_record("a", 1)),
            (b"other", signal_record("b", 0, experiment="other")),
        )

    thread = threading.Thread(target=later)
    thread.start()
    followed = [signal.id for signal in islice(read_signals(embedded, follow=True), 2)]
    thread.join()
    assert followed == ["a", "b"]


def test_following_waits_for_a_topic_of_the_embedded_broker(embedded: Settings) -> None:
    thread = threading.Timer(0.5, write, (embedded, "signals", (b"k", b"v")))
    with TopicReader(embedded, embedded.topic("signals")) as reader:
        assert list(reader.backlog()) == []
        thread.start()
        assert next(reader.follow()).value == b"v"
    thread.join()


def test_a_reader_leaves_what_came_later_for_following(embedded: Settings) -> None:
    write(embedded, "config", *((b"k%d" % n, b"1") for n in range(50)))
    with TopicReader(embedded, embedded.topic("config")) as reader:
        backlog = reader.backlog()
        first = next(backlog)
        write(embedded, "config", *((b"k%d" % n, b"2") for n in range(50)))
        past = [first, *backlog]
        assert {record.value for record in past} == {b"1"}
        assert len(past) == 50
        assert {record.value for record in islice(reader.follow(), 50)} == {b"2"}


def test_a_reader_gives_headers_and_times(embedded: Settings) -> None:
    producer = KafkaProducer(**embedded.kafka_python_options())
    producer.send(
        embedded.topic("x"), value=b"v", headers=[("ce_id", b"1")], timestamp_ms=5, partition=2
    ).get(10)
    producer.close()
    (record,) = records(embedded, "x")
    assert record == TopicRecord(embedded.topic("x"), 2, 0, 5, None, b"v", (("ce_id", b"1"),))
    assert record.place == f"{embedded.topic('x')} partition 2 offset 0"


@pytest.mark.kafka
@pytest.mark.parametrize("command", ["status", "signals", "produce", "apply"])
def test_a_missing_topic_is_one_clear_line(command: str, apache_kafka: str, topic_prefix: str) -> None:
    settings = Settings(bootstrap=apache_kafka, prefix=topic_prefix)
    arguments = [str(CANARY)] if command == "apply" else []
    result = run(settings, command, *arguments, stdin=b"")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert "does not exist" in result.stderr
    with connect(settings) as client:
        assert not [name for name in client.list_topics() if str(name).startswith(topic_prefix)]


@pytest.mark.kafka
@pytest.mark.parametrize("settings", ["apache"], indirect=True)
def test_a_writer_reports_what_the_broker_refused(settings: Settings) -> None:
    with pytest.raises(DependencyError, match="failed"), TopicWriter(settings) as writer:
        writer.send(settings.topic("exposures"), key=b"k", value=b"x" * 2_000_000)


# kafka-python leaves the socket of an attempt that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("command", ["status", "signals", "apply", "produce"])
def test_no_broker_is_one_clear_line(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("topic_reader", "topic_writer"):
        monkeypatch.setattr(f"stream_xp.adapters.{module}.CONNECT_TIMEOUT_MS", 300)
    arguments = [str(CANARY)] if command == "apply" else []
    result = run(Settings(bootstrap="127.0.0.1:1"), command, *arguments, stdin=b"")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.output
    assert "no broker answered at 127.0.0.1:1 within 300 ms" in result.stderr
    del result
    gc.collect()


def test_a_broker_that_stalls_is_given_up(embedded: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write(embedded, "config", (b"k", b"v"))
    monkeypatch.setattr(TopicReader, "_poll", lambda self: iter(()))
    reader = TopicReader(embedded, embedded.topic("config"), stall_timeout_ms=50)
    with reader, pytest.raises(DependencyError, match="came for 50 ms"):
        list(reader.backlog())


def test_a_missing_topic_of_a_real_broker_is_a_config_error(
    embedded: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = embedded.kafka_python_options()
    monkeypatch.setattr(Settings, "kafka_python_options", lambda self: options)
    apache = msgspec.structs.replace(embedded, broker="apache")
    with pytest.raises(ConfigError, match="topic none does not exist"), TopicReader(apache, "none"):
        pass
