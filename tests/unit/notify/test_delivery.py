"""When a message is tried, when again, and when it is given up."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.prometheus import Deliveries
from stream_xp.adapters.webhook import Answer, endpoint
from stream_xp.errors import DependencyError
from stream_xp.services.notify.delivery import MAX_TRIES, MAX_WAIT_S, Delivery, Fate, wait_s
from stream_xp.services.notify.message import Message
from stream_xp.services.notify.targets import Event, Format, Keys, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

START_MS = 1_793_615_400_000
KEY = b"canary-canary-canary-canary"
TARGET = Target(
    "ci",
    endpoint("https://ci.example.com/canary-path"),
    Keys((KEY,)),
    frozenset({Event.STOP}),
    "*",
    Format.CLOUDEVENT,
    allow_private=False,
    ca_file=None,
)


class Server:
    """Answers in turn; keeps the headers of each attempt."""

    def __init__(self, *answers: Answer | DependencyError) -> None:
        self.answers = list(answers)
        self.headers: list[dict[str, str]] = []

    def post(self, body: bytes, headers: Mapping[str, str], *, now: dt.datetime) -> Answer:
        assert body == b"{}"
        assert now.tzinfo is not None
        self.headers.append(dict(headers))
        answer = self.answers.pop(0)
        if isinstance(answer, DependencyError):
            raise answer
        return answer


class World:
    """A delivery with a clock that is moved by hand."""

    def __init__(self, *answers: Answer | DependencyError, chance: float = 0.5) -> None:
        self.clock = ManualClock(START_MS)
        self.server = Server(*answers)
        self.deliveries = Deliveries(["ci"])
        self.delivery = Delivery(
            TARGET,
            Message("id-1", b"{}", "application/json"),
            sender=self.server,
            clock=self.clock,
            chance=lambda: chance,
            deliveries=self.deliveries,
        )

    def run(self) -> tuple[Fate, list[float]]:
        """The end, and the seconds waited before each further try."""
        waits = []
        while (fate := self.delivery.attempt()) is Fate.WAITING:
            waits.append((self.delivery.due_ms - self.clock.now_ms()) / 1000)
            self.clock.advance_to(self.delivery.due_ms)
        return fate, waits

    def count(self, name: str) -> float | None:
        return self.deliveries.registry.get_sample_value(f"streamxp_notify_{name}", {"target": "ci"})


def test_a_message_is_taken_at_once() -> None:
    world = World(Answer(200))
    assert world.run() == (Fate.TAKEN, [])
    assert (world.count("delivered_total"), world.count("failed_total"), world.count("given_up_total")) == (
        1,
        0,
        0,
    )


def test_a_message_is_tried_again_with_its_id_and_a_new_timestamp() -> None:
    world = World(DependencyError("gone"), Answer(503), Answer(204))
    assert world.run() == (Fate.TAKEN, [7.0, 14.0])
    assert [one["webhook-id"] for one in world.server.headers] == ["id-1"] * 3
    assert [int(one["webhook-timestamp"]) - START_MS // 1000 for one in world.server.headers] == [0, 7, 21]
    assert len({one["webhook-signature"] for one in world.server.headers}) == 3
    assert (world.count("delivered_total"), world.count("failed_total")) == (1, 2)


def test_a_dead_target_is_given_up_after_a_quarter_of_an_hour() -> None:
    world = World(*[DependencyError("gone")] * MAX_TRIES)
    fate, waits = world.run()
    assert fate is Fate.GIVEN_UP
    assert waits == [7.0, 14.0, 28.0, 56.0, 112.0, 224.0, 448.0]
    assert sum(waits) == 889
    assert (world.count("given_up_total"), world.count("failed_total"), world.count("waiting")) == (1, 8, 0)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
def test_what_may_be_temporary_is_tried_again(status: int) -> None:
    assert World(Answer(status), Answer(200)).run()[0] is Fate.TAKEN


@pytest.mark.parametrize("status", [100, 301, 302, 307, 400, 401, 403, 404, 410, 413, 422, 600])
def test_what_will_not_change_is_given_up_at_once(status: int) -> None:
    world = World(Answer(status))
    assert world.run() == (Fate.GIVEN_UP, [])
    assert world.count("given_up_total") == 1


@pytest.mark.parametrize(("asked", "waited"), [(3.0, 7.0), (60.0, 60.0), (1e9, MAX_WAIT_S), (None, 7.0)])
def test_a_target_may_ask_for_time_within_bounds(asked: float | None, waited: float) -> None:
    assert World(Answer(429, asked), Answer(200)).run() == (Fate.TAKEN, [waited])


def test_jitter_moves_a_wait_by_a_quarter() -> None:
    assert [wait_s(1, chance=chance) for chance in (0.0, 0.5, 1.0)] == [5.25, 7.0, 8.75]
    assert World(Answer(500), Answer(200), chance=0.0).run()[1] == [5.25]


def test_while_it_waits_that_is_shown() -> None:
    world = World(Answer(500), Answer(200))
    world.delivery.attempt()
    assert world.count("waiting") == 1
    world.delivery.attempt()
    assert world.count("waiting") == 0


def test_what_is_given_up_is_logged_without_path_and_key() -> None:
    with capture_logs() as logs:
        World(Answer(500), Answer(410)).run()
        World(Answer(200)).run()
    assert [(one["log_level"], one["event"]) for one in logs] == [
        ("warning", "message failed, it is tried again"),
        ("error", "message given up"),
        ("info", "message taken"),
    ]
    assert logs[1] | {"target": "ci", "id": "id-1", "why": "status 410", "tries": 2} == logs[1]
    assert "canary" not in repr(logs)
