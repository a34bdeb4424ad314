"""A broker that goes away while it is asked which topics it has: an error with its address, never an endless wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stream_xp.adapters import topic_reader
from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.errors import DependencyError
from stream_xp.services.oracle.reading import open_reader
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.timeout(60)]


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(topic_reader, "TOPICS_TIMEOUT_MS", 500)
    return Settings(bootstrap=embedded_broker.bootstrap, broker="embedded")


def test_partitions_of_a_topic_are_not_waited_for_without_an_end(
    embedded_broker: EmbeddedBroker, settings: Settings
) -> None:
    def ask() -> None:
        with open_reader(settings) as reader:
            embedded_broker.close()
            reader.partitions("xp.exposures")

    with pytest.raises(DependencyError, match=rf"{settings.bootstrap} .*within 500 ms which topics"):
        ask()


def test_a_reader_of_a_topic_that_was_not_there_gives_up_too(
    embedded_broker: EmbeddedBroker, settings: Settings
) -> None:
    with TopicReader(settings, "xp.results") as reader:
        embedded_broker.close()
        with pytest.raises(DependencyError, match=settings.bootstrap):
            next(reader.follow())
