"""What a running worker makes of topics that change under it."""

from __future__ import annotations

from typing import Any

import pytest

from stream_xp.adapters import kafka_admin
from stream_xp.adapters.kafka_admin import Drift, declared_topics, require_shapes
from stream_xp.errors import ConfigError
from stream_xp.settings import Settings


def drifts(monkeypatch: pytest.MonkeyPatch, *found: Drift) -> None:
    monkeypatch.setattr(kafka_admin, "check_topics", lambda *_: list(found))


def test_more_partitions_and_missing_topics_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = None
    drifts(
        monkeypatch,
        Drift("xp.rewards", "partitions", "4", "5"),
        Drift("xp.state", "topic", "present", "missing"),
    )
    with pytest.raises(ConfigError) as refused:
        require_shapes(client, declared_topics(Settings()))
    assert "xp.rewards: partitions: wanted 4, found 5" in str(refused.value)
    assert "xp.state: topic: wanted present, found missing" in str(refused.value)


def test_a_setting_may_change_under_a_running_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = None
    drifts(monkeypatch, Drift("xp.rewards", "retention.ms", "1", "2"))
    require_shapes(client, declared_topics(Settings()))
