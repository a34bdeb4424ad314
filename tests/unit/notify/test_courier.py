"""What a courier sends and commits while partitions come and go, with a consumer that does as it is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from kafka import TopicPartition

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.prometheus import Deliveries
from stream_xp.adapters.webhook import Answer, endpoint
from stream_xp.domain.decision import Signal
from stream_xp.errors import ConfigError
from stream_xp.services.notify import courier as module
from stream_xp.services.notify.courier import Courier
from stream_xp.services.notify.targets import Event, Format, Keys, Target
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parents[3] / "topics" / "golden" / "signal.v1.json"
BEGAN_MS = 1_793_615_400_000
TARGET = Target(
    "ci",
    endpoint("https://ci.example.com/"),
    Keys(),
    frozenset({Event.STOP}),
    "*",
    Format.CLOUDEVENT,
    allow_private=False,
    ca_file=None,
)


def at(partition: int) -> TopicPartition:
    return TopicPartition("xp.signals", partition)


def record(
    partition: int, offset: int, identity: str, *, age_ms: int = -1, experiment: str | None = None
) -> Any:
    signal = msgspec.json.decode(GOLDEN.read_bytes(), type=Signal)
    result = msgspec.structs.replace(signal.data.result, experiment=experiment or f"exp-{identity}")
    told = msgspec.structs.replace(
        signal, id=identity, data=msgspec.structs.replace(signal.data, result=result)
    )
    return SimpleNamespace(
        topic="xp.signals",
        partition=partition,
        offset=offset,
        timestamp=BEGAN_MS - age_ms,
        key=b"k",
        value=msgspec.json.encode(told),
        headers=[],
    )


class Consumer:
    """Two partitions, one record of each partition a poll; before a poll the next thing of a script happens.

    Attributes:
        stored: offsets that the group has committed.
        commits: partition and offset of each commit of this member.
        polls_ms: how long each poll would have waited.
    """

    def __init__(self, *records: Any, stored: dict[int, int], script: list[Callable[[], None]]) -> None:
        self.log = {number: [one for one in records if one.partition == number] for number in (0, 1)}
        self.stored, self.script = stored, script
        self.held: set[TopicPartition] = set()
        self.paused: set[TopicPartition] = set()
        self.positions: dict[TopicPartition, int] = {}
        self.commits: list[tuple[int, int]] = []
        self.polls_ms: list[int] = []
        self.stop: Callable[[], None] = lambda: None

    def give(self, *partitions: int) -> None:
        """Assign partitions, at the offsets that are committed, as Kafka does."""
        self.held, self.paused = {at(number) for number in partitions}, set()
        self.positions = {one: self.stored.get(one.partition, 0) for one in self.held}
        self.listener.on_partitions_assigned(self.held)

    def subscribe(self, _topics: list[str], *, listener: Any) -> None:
        self.listener = listener

    def assignment(self) -> set[TopicPartition]:
        return set(self.held)

    def pause(self, *partitions: TopicPartition) -> None:
        self.paused |= set(partitions)

    def resume(self, *partitions: TopicPartition) -> None:
        self.paused -= set(partitions)

    def poll(self, timeout_ms: int) -> dict[TopicPartition, list[Any]]:
        self.polls_ms.append(timeout_ms)
        if self.script:
            self.script.pop(0)()
        found = {}
        for one in sorted(self.held - self.paused):
            if batch := self.log[one.partition][self.positions[one] : self.positions[one] + 1]:
                found[one] = batch
                self.positions[one] += 1
        if not found and not self.script and not self.paused:
            self.stop()
        return found

    def end_offsets(self, partitions: list[TopicPartition], *, timeout_ms: int) -> dict[TopicPartition, int]:
        return {one: len(self.log[one.partition]) for one in partitions}

    def committed(self, partition: TopicPartition, *, timeout_ms: int) -> int | None:
        return self.stored.get(partition.partition)

    def seek_to_beginning(self, partition: TopicPartition) -> None:
        self.positions[partition] = 0

    def position(self, partition: TopicPartition, *, timeout_ms: int) -> int:
        return self.positions[partition]

    def commit(self, offsets: dict[TopicPartition, Any], *, timeout_ms: int) -> None:
        for one, offset in offsets.items():
            assert one in self.held
            self.stored[one.partition] = offset.offset
            self.commits.append((one.partition, offset.offset))


class Server:
    """Takes everything but what it is told to fail; keeps the ids."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.failing: set[str] = set()

    def post(self, _body: bytes, headers: dict[str, str], *, now: object) -> Answer:
        self.sent.append(headers["webhook-id"])
        return Answer(503 if headers["webhook-id"] in self.failing else 204)


def follow(consumer: Consumer, server: Server, clock: ManualClock | None = None) -> None:
    courier = Courier(
        Settings(),
        TARGET,
        sender=server,
        clock=clock or ManualClock(BEGAN_MS),
        chance=lambda: 0.5,
        deliveries=Deliveries(["ci"]),
    )
    consumer.stop = courier.stop
    courier._follow(consumer)


def test_a_new_group_is_told_what_comes_and_not_what_was() -> None:
    server = Server()
    consumer = Consumer(
        record(0, 0, "old", age_ms=60_000),
        record(0, 1, "older", age_ms=50_000),
        record(0, 2, "new"),
        record(1, 0, "past", age_ms=1),
        record(1, 1, "gone", age_ms=1),
        stored={},
        script=[lambda: consumer.give(0, 1)],
    )
    follow(consumer, server)
    assert server.sent == ["new"]
    # An offset amid what was there before would make the rest of it news after a restart.
    assert sorted(consumer.commits) == [(0, 3), (1, 2)]


def test_what_the_group_has_dealt_with_is_read_and_not_sent() -> None:
    """It tells which of the later ones count: a second stop of one experiment does not."""
    server = Server()
    consumer = Consumer(
        record(0, 0, "first", experiment="exp"),
        record(0, 1, "second", experiment="exp"),
        record(0, 2, "other"),
        record(0, 3, "other"),
        stored={0: 1},
        script=[lambda: consumer.give(0)],
    )
    follow(consumer, server)
    assert server.sent == ["other"]
    assert consumer.commits[-1] == (0, 4)
    assert min(offset for _, offset in consumer.commits) > 1


def test_an_old_record_that_is_owed_is_sent() -> None:
    server = Server()
    consumer = Consumer(record(0, 0, "one", age_ms=10**9), stored={0: 0}, script=[lambda: consumer.give(0)])
    follow(consumer, server)
    assert (server.sent, consumer.commits) == (["one"], [(0, 1)])


def test_a_message_that_waits_is_left_to_the_next_owner() -> None:
    server = Server()
    server.failing = {"one"}
    consumer = Consumer(
        record(0, 0, "one"),
        record(1, 0, "two"),
        stored={0: 0, 1: 0},
        script=[lambda: consumer.give(0), lambda: None, lambda: None, lambda: consumer.give(1)],
    )
    follow(consumer, server)
    assert server.sent == ["one", "two"]
    assert consumer.commits == [(1, 1)]


def test_a_partition_that_comes_back_goes_on_where_another_owner_ended() -> None:
    server = Server()
    server.failing = {"one"}

    def back() -> None:
        consumer.stored[0] = 2
        consumer.give(0)

    consumer = Consumer(
        record(0, 0, "one", experiment="exp"),
        record(0, 1, "by another"),
        record(0, 2, "late", experiment="exp"),
        record(0, 3, "three"),
        stored={0: 0},
        script=[lambda: consumer.give(0), lambda: None, lambda: None, back],
    )
    follow(consumer, server)
    assert server.sent == ["one", "three"]
    assert consumer.commits == [(0, 3), (0, 4)]


def test_nothing_is_fetched_while_a_message_waits_and_it_goes_first() -> None:
    server, clock = Server(), ManualClock(BEGAN_MS)
    server.failing = {"one"}

    def heal() -> None:
        assert consumer.positions[at(0)] == 1
        server.failing = set()
        clock.advance_to(BEGAN_MS + 7_000)

    consumer = Consumer(
        record(0, 0, "one"),
        record(0, 1, "two"),
        stored={0: 0},
        script=[lambda: consumer.give(0), lambda: None, lambda: None, lambda: None, heal],
    )
    follow(consumer, server, clock)
    assert server.sent == ["one", "one", "two"]
    assert consumer.commits == [(0, 1), (0, 2)]


def test_a_join_that_takes_longer_than_a_poll_is_waited_for() -> None:
    """An answer between two polls is thrown away by kafka-python, so with polls of one length none need ever count."""
    consumer = Consumer(record(0, 0, "one"), stored={0: 0}, script=[])

    def join_of(needed_ms: int) -> None:
        if consumer.polls_ms[-1] < needed_ms:
            consumer.script.insert(0, lambda: join_of(needed_ms))
        else:
            consumer.give(0)

    def revoke() -> None:
        consumer.listener.on_partitions_revoked(consumer.held)
        consumer.held = set()

    consumer.script = [lambda: join_of(6_000), revoke, lambda: join_of(1_500)]
    follow(consumer, Server())
    assert consumer.polls_ms[:7] == [1_000, 2_000, 4_000, 8_000, 200, 1_000, 2_000]
    assert set(consumer.polls_ms[7:]) == {200}


def test_without_the_topic_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(partitions_for_topic=lambda _: None, close=lambda **_: None)
    monkeypatch.setattr(module, "open_consumer", lambda *_, **__: nothing)
    courier = Courier(
        Settings(),
        TARGET,
        sender=Server(),
        clock=ManualClock(BEGAN_MS),
        chance=lambda: 0.5,
        deliveries=Deliveries(["ci"]),
    )
    courier.start()
    courier.join(60)
    assert isinstance(courier.failure, ConfigError)
    assert "topic xp.signals does not exist" in str(courier.failure)
