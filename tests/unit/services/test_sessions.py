"""Sessions with Kafka: which failures are followed by another session, and which are the end."""

from __future__ import annotations

from typing import Any

import pytest
from kafka.errors import KafkaError

from stream_xp.errors import ConfigError, DependencyError, StateError
from stream_xp.services import sessions as module
from stream_xp.services.sessions import Sessions


class Consumer:
    def __init__(self) -> None:
        self.closed: list[bool] = []

    def close(self, *, autocommit: bool) -> None:
        self.closed.append(autocommit)


class Broker:
    """Opens consumers, and fails as it is told: while one is opened, or while one is worked with."""

    def __init__(self, *, connecting: list[Exception], working: list[Exception]) -> None:
        self.connecting, self.working = connecting, working
        self.opened: list[Consumer] = []
        self.told: list[tuple[str, BaseException]] = []
        self.sessions = Sessions(
            "test",
            connect=self.connect,
            work=self.work,
            interrupted=lambda error: self.told.append(("interrupted", error)),
            ended=lambda error: self.told.append(("ended", error)),
        )

    def connect(self) -> Consumer:
        if self.connecting:
            raise self.connecting.pop(0)
        self.opened.append(Consumer())
        return self.opened[-1]

    def work(self, consumer: Any) -> None:
        assert [one.closed for one in self.opened] == [[False]] * (len(self.opened) - 1) + [[]]
        assert consumer is self.opened[-1]
        if self.working:
            raise self.working.pop(0)
        self.sessions.stop()

    def run(self) -> None:
        self.sessions.start()
        self.sessions.join(60)
        assert not self.sessions._thread.is_alive()
        assert [one.closed for one in self.opened] == [[False]] * len(self.opened)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


def test_a_failure_of_the_broker_is_followed_by_another_session() -> None:
    lost: list[Exception] = [DependencyError("no broker"), KafkaError("went"), DependencyError("gone")]
    broker = Broker(connecting=lost[:1], working=lost[1:])
    broker.run()
    assert len(broker.opened) == 3
    assert broker.told == [("interrupted", error) for error in lost]
    assert broker.sessions.failure is None


@pytest.mark.parametrize("connecting", [True, False])
@pytest.mark.parametrize("error", [ConfigError("no topic"), StateError("a hole"), ValueError("a defect")])
def test_everything_else_is_the_end(error: Exception, *, connecting: bool) -> None:
    broker = Broker(connecting=[error] * connecting, working=[error] * (not connecting))
    broker.run()
    assert len(broker.opened) == (not connecting)
    assert broker.told == [("ended", error)]
    assert broker.sessions.failure is error
