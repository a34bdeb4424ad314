"""Signals of a topic become signed messages, once or again, whatever fails or ends in between."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from kafka import TopicPartition
from webhook_receiver import KEY, Receiver, receiving, targets_file

from stream_xp.adapters.topic_reader import open_consumer
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.decision import Signal
from stream_xp.services.notify import courier, delivery
from stream_xp.services.notify.service import Notifier
from stream_xp.services.notify.targets import Target, load_targets
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

GOLDEN = Path(__file__).parents[2] / "topics" / "golden" / "signal.v1.json"
DEADLINE_S = 180.0


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker) -> Settings:
    return Settings(
        bootstrap=embedded_broker.bootstrap, broker="embedded", notify_allowed_hosts=("127.0.0.1",)
    )


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_WAIT_S", 0.05)
    # The embedded broker takes one to let a member in after another has left.
    monkeypatch.setattr(courier, "SESSION_TIMEOUT_MS", 6_000)


def targets(settings: Settings, receiver: Receiver, folder: Path, *names: str) -> Sequence[Target]:
    path = targets_file(receiver, folder, *names, secret="secret_env: KEY")
    return load_targets(path, settings, {"KEY": KEY})


def say(settings: Settings, *identities: str, experiment: str | None = None) -> None:
    """Write a stop of an experiment of its own for each id, or of one experiment."""
    with TopicWriter(settings) as writer:
        for identity in identities:
            name = experiment or f"exp-{identity}"
            writer.send(
                settings.topic("signals"), key=name.encode(), value=msgspec.json.encode(stop(identity, name))
            )


def stop(identity: str, experiment: str) -> Signal:
    signal = msgspec.json.decode(GOLDEN.read_bytes(), type=Signal)
    result = msgspec.structs.replace(signal.data.result, experiment=experiment)
    data = msgspec.structs.replace(signal.data, result=result)
    return msgspec.structs.replace(signal, id=identity, subject=experiment, data=data)


def until(what: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def committed(settings: Settings, group: str) -> int:
    """Records of the topic that a group has dealt with."""
    consumer = open_consumer(settings, group_id=group)
    try:
        topic = settings.topic("signals")
        numbers = consumer.partitions_for_topic(topic) or ()
        return sum(consumer.committed(TopicPartition(topic, number)) or 0 for number in numbers)
    finally:
        consumer.close(autocommit=False)


def test_a_failing_target_is_sent_it_again_and_delays_no_other(
    settings: Settings, receiver: Receiver, tmp_path: Path
) -> None:
    say(settings, "before")
    receiver.answers["/flaky"] = [500, 503]
    receiver.dead = {"/dead"}
    with Notifier(settings, targets(settings, receiver, tmp_path, "dead", "flaky", "good")) as notifier:
        # What was said before a target was there is not news to it.
        until(lambda: committed(settings, "stream-xp-notify-good") == 1)
        say(settings, "one", "two")
        until(lambda: len(receiver.taken("/good")) == 2 and len(receiver.taken("/flaky")) == 4)
        until(lambda: committed(settings, "stream-xp-notify-flaky") == 3)
        assert sorted(receiver.taken("/good")) == ["one 204", "two 204"]
        flaky = receiver.taken("/flaky")
        # The first is sent until it is taken, and the other waits for it.
        assert flaky[:3] == [f"{flaky[0].split()[0]} {status}" for status in (500, 503, 204)]
        assert not any("before" in one for _, one in receiver.got)
        # A notification that the dead target owes is not committed.
        until(lambda: receiver.taken("/dead"))
        counts = notifier.deliveries.registry.get_sample_value
        assert counts("streamxp_notify_delivered_total", {"target": "flaky"}) == 2
        assert counts("streamxp_notify_delivered_total", {"target": "dead"}) == 0


def test_what_is_owed_is_sent_after_a_restart_and_what_was_taken_is_not(
    settings: Settings, receiver: Receiver, tmp_path: Path
) -> None:
    chosen = targets(settings, receiver, tmp_path, "ci")
    with Notifier(settings, chosen):
        say(settings, "one", experiment="exp")
        until(lambda: receiver.taken("/ci") == ["one 204"])
        until(lambda: committed(settings, "stream-xp-notify-ci") == 1)
        receiver.dead = {"/ci"}
        say(settings, "two", experiment="other")
        until(lambda: "two 503" in receiver.taken("/ci"))
    receiver.dead = set()
    # A second stop of an experiment that has stopped cannot count: it is that of a worker that had lost it.
    say(settings, "late", experiment="exp")
    say(settings, "three")
    with Notifier(settings, chosen):
        until(lambda: "three 204" in receiver.taken("/ci") and "two 204" in receiver.taken("/ci"))
        until(lambda: committed(settings, "stream-xp-notify-ci") == 4)
    taken = receiver.taken("/ci")
    assert [taken.count(f"{one} 204") for one in ("one", "two", "late", "three")] == [1, 1, 0, 1]


def test_a_record_that_is_none_is_passed_over(settings: Settings, receiver: Receiver, tmp_path: Path) -> None:
    with Notifier(settings, targets(settings, receiver, tmp_path, "ci")):
        with TopicWriter(settings) as writer:
            writer.send(settings.topic("signals"), key=b"exp", value=b"{")
        say(settings, "one", experiment="exp")
        until(lambda: receiver.taken("/ci") == ["one 204"])
        until(lambda: committed(settings, "stream-xp-notify-ci") == 2)
