"""The endless traffic on the embedded broker: what docker-compose.yml shows comes true."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from worker_process import DEADLINE_S, WorkerProcess, now_ms, wait_for

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.domain.decision import Action, Signal
from stream_xp.services.evidence import read_signals, read_standings
from stream_xp.services.traffic import WORLD
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(500)]

CANARY = "checkout-canary"
COMMAND = ["traffic", "--seed", "3", "--units-per-s", "2000", "--harm-after", "0"]


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker) -> Settings:
    found = Settings(
        bootstrap=embedded_broker.bootstrap,
        broker="embedded",
        prefix="traffic.",
        # A busy machine is late in sending, and what is late counts for nothing.
        allowed_lateness_ms=3_000,
        activation_delay_ms=500,
        idle_grace_ms=500,
    )
    for topic in declared_topics(found):
        embedded_broker.create_topic(topic.name, topic.partitions)
    return found


def test_the_canary_is_stopped_and_left_alone(settings: Settings, tmp_path: Path) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith("STREAM_XP_")}
    environment = {
        **others,
        "STREAM_XP_BOOTSTRAP": settings.bootstrap,
        "STREAM_XP_BROKER": "embedded",
        "STREAM_XP_PREFIX": settings.prefix,
    }
    said = tmp_path / "traffic.out"
    with WorkerProcess(settings, tmp_path) as worker, said.open("w") as out:
        worker.wait_started()
        traffic = subprocess.Popen(
            [sys.executable, "-u", "-m", "stream_xp", *COMMAND],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(lambda: bool(decided(settings)), "the canary is stopped")
            wait_for(lambda: f"{CANARY} stopped" in said.read_text(), "the traffic leaves it alone")
            assert traffic.poll() is None, said.read_text()
        finally:
            traffic.terminate()
            traffic.wait(timeout=DEADLINE_S)
        worker.terminate()
    (stop, *_) = decided(settings)
    assert (stop.data.decision.action, stop.data.decision.arm) == (Action.STOP, "canary")
    found = {one.result.experiment: one.result for one in read_standings(settings, now_ms=now_ms())}
    assert found.keys() == WORLD.keys()
    assert found["aa"].decision.action is Action.HOLD
    assert all(one.exposure_outcomes.dead_lettered == 0 for one in found.values())
    # Both get as many units until the stop; then only the picture does.
    units = {name: sum(arm.units for arm in one.arms) for name, one in found.items()}
    assert units[CANARY] < units["artwork"] or found["artwork"].decision.action is Action.SHIP


def decided(settings: Settings) -> list[Signal]:
    return [one for one in read_signals(settings) if isinstance(one, Signal) and one.subject == CANARY]
