"""`stream-xp bench recovery` with its snapshots on a real Apache Kafka."""

from __future__ import annotations

import asyncio

import pytest

from stream_xp.adapters.kafka_admin import connect
from stream_xp.adapters.kafka_log import LogWriter
from stream_xp.errors import DependencyError
from stream_xp.services.bench.recovery import Job, measure
from stream_xp.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.kafka, pytest.mark.xdist_group("apache_kafka")]


def bench_topics(bootstrap: str) -> list[str]:
    with connect(Settings(bootstrap=bootstrap)) as client:
        return [name for name in client.list_topics() if name.startswith("bench-")]


def test_snapshots_are_read_back_from_the_broker_and_leave_nothing_there(apache_kafka: str) -> None:
    job = Job(rows=3_000, events=4_000, rounds=1, interval_s=0.05, bootstrap=apache_kafka)
    # The state that was read back gives the same bytes, or this would fail.
    found = asyncio.run(measure(job))
    assert found.log == f"Kafka at {apache_kafka}"
    assert found.rows > job.rows
    assert found.recent.incremental_mb > 0
    assert found.read_s > 0
    assert bench_topics(apache_kafka) == []


def test_one_that_cannot_start_leaves_nothing_there(
    apache_kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_: LogWriter) -> None:
        raise DependencyError("away")

    monkeypatch.setattr(LogWriter, "start", away)
    with pytest.raises(DependencyError, match="away"):
        asyncio.run(measure(Job(rows=1_000, events=1_000, rounds=1, bootstrap=apache_kafka)))
    assert bench_topics(apache_kafka) == []
