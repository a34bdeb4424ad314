"""What a reader of `xp.signals` believes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import msgspec
import pytest

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.adapters.topic_reader import TopicRecord
from stream_xp.domain.decision import Action, Signal
from stream_xp.services import evidence
from stream_xp.services.evidence import read_signals
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = min((topics_dir() / "golden").rglob("*signal*.json"))


def signal(
    identity: str, *, action: Action = Action.STOP, version: int = 1, experiment: str = "exp"
) -> Signal:
    sample = msgspec.json.decode(GOLDEN.read_bytes(), type=Signal)
    decision = msgspec.structs.replace(sample.data.decision, action=action)
    result = msgspec.structs.replace(sample.data.result, experiment=experiment, version=version)
    data = msgspec.structs.replace(sample.data, decision=decision, result=result)
    return msgspec.structs.replace(sample, id=identity, time=identity, data=data)


def believed(monkeypatch: pytest.MonkeyPatch, *signals: Signal) -> list[str]:
    class Reader:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def backlog(self) -> Iterator[TopicRecord]:
            for offset, one in enumerate(signals):
                yield TopicRecord("xp.signals", 0, offset, 0, b"exp", msgspec.json.encode(one), ())

    monkeypatch.setattr(evidence, "TopicReader", Reader)
    return [one.id for one in read_signals(Settings())]


def test_the_first_stop_or_ship_of_a_version_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert believed(monkeypatch, signal("2"), signal("1", action=Action.SHIP)) == ["2"]


def test_a_repeated_signal_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert believed(monkeypatch, signal("1"), signal("1")) == ["1"]


def test_each_version_and_each_experiment_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    others = (signal("2", version=2), signal("3", experiment="other"))
    assert believed(monkeypatch, signal("1"), *others) == ["1", "2", "3"]


def test_a_hold_latches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held = (signal("1", action=Action.HOLD), signal("2", action=Action.HOLD))
    assert believed(monkeypatch, *held, signal("3")) == ["1", "2", "3"]


def test_what_is_not_final_latches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = (signal("1", action=Action.ADVANCE), signal("2", action=Action.ALLOCATE))
    asked = signal("3", action=Action.SHIP)
    asked = msgspec.structs.replace(asked, data=msgspec.structs.replace(asked.data, proposed=True))
    assert believed(monkeypatch, *moves, asked, signal("4"), signal("5")) == ["1", "2", "3", "4"]


def test_after_a_reset_there_is_another_conclusion(monkeypatch: pytest.MonkeyPatch) -> None:
    later = signal("2")
    later = msgspec.structs.replace(later, data=msgspec.structs.replace(later.data, since="order"))
    assert believed(monkeypatch, signal("1"), later, signal("3")) == ["1", "2"]
