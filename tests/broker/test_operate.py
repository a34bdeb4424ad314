"""Orders by the command line on the embedded broker, enacted by a worker."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.cli import main
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.evidence import read_standings
from stream_xp.services.publish import plan_application, publish
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

WAIT_S = "120"
"""For whatever machine; the commands end as soon as the order is enacted."""
METRIC = {"kind": "conversion", "attribution_window": "100ms"}
DESIGN = {
    "experiment": "exp",
    "owner": "tests",
    "hypothesis": "people know better",
    "unit": "member",
    "planned_sample": 4000,
    "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
    "metrics": [
        METRIC | {"key": "click", "role": "primary", "direction": "increase"},
        METRIC | {"key": "error", "role": "guardrail", "direction": "decrease", "margin": {"absolute": 0.1}},
    ],
    # No stage is ever over by itself.
    "ramp": {
        "stages": [
            {"coverage": 0.1, "minimum_units": 10**9},
            {"coverage": 0.5, "minimum_units": 10**9},
            {"coverage": 1.0},
        ]
    },
}


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker) -> Iterator[Settings]:
    """A worker, and an experiment with its first results."""
    found = Settings(
        bootstrap=embedded_broker.bootstrap,
        broker="embedded",
        partitions=2,
        allowed_lateness_ms=300,
        activation_delay_ms=500,
        idle_grace_ms=500,
    )
    for topic in declared_topics(found):
        embedded_broker.create_topic(topic.name, topic.partitions)
    spec = msgspec.convert(DESIGN, ExperimentSpec)
    publish(found, plan_application(found, spec, now_ms=time.time_ns() // 1_000_000))
    with WorkerThread(found) as worker:
        time.sleep(1.0)  # the spec must govern before its first exposure
        expose(found)
        deadline = time.monotonic() + 120
        while not read_standings(found, now_ms=0):
            worker.check()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield found


def expose(settings: Settings) -> None:
    now_ms = time.time_ns() // 1_000_000
    with TopicWriter(settings) as writer:
        for unit in range(40):
            event = {"id": f"e{unit}", "time": now_ms, "source": "/app", "unit": f"u{unit}"}
            body = event | {"experiment": "exp", "arm": ("old", "new")[unit % 2], "weight_epoch": 0}
            writer.send(settings.topic("exposures"), key=f"u{unit}".encode(), value=msgspec.json.encode(body))


def order(settings: Settings, *arguments: str) -> dict[str, Any]:
    """Give an order and wait for it; the config that came of it."""
    shared = ("--bootstrap", settings.bootstrap, "--broker", "embedded", "--actor", "kim", "--reason", "r")
    result = CliRunner().invoke(main, [*arguments, *shared, "--wait", "--timeout", WAIT_S, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["fate"] == "enacted", answer
    config: dict[str, Any] = answer["config"]
    return config


def test_every_order_is_enacted_and_told(settings: Settings) -> None:
    def told(config: dict[str, Any]) -> tuple[str, float, bool]:
        return config["status"], config.get("coverage", 1.0), config.get("paused", False)

    assert told(order(settings, "pause", "exp")) == ("running", 0.1, True)
    assert told(order(settings, "resume", "exp")) == ("running", 0.1, False)
    assert told(order(settings, "set-stage", "exp", "--stage", "1")) == ("running", 0.5, False)
    stopped = order(settings, "stop", "exp")
    assert told(stopped) == ("stopped", 0.0, False)
    assert stopped["weights"] == {"old": 1.0, "new": 0.0}
    # After a stop the ramp begins again at its first stage.
    again = order(settings, "reset", "exp", "--signal", stopped["signal_id"][:8])
    assert told(again) == ("running", 0.1, False)
    assert again["weights"] == {"old": 0.5, "new": 0.5}
    shipped = order(settings, "ship", "exp", "--arm", "new")
    assert told(shipped) == ("shipped", 1.0, False)
    assert shipped["weights"] == {"old": 0.0, "new": 1.0}
    shared = ("--bootstrap", settings.bootstrap, "--broker", "embedded")
    refused = CliRunner().invoke(main, ["pause", "nobody", "--reason", "r", "--actor", "kim", *shared])
    assert (refused.exit_code, "nobody: no such experiment" in refused.stderr) == (2, True)
    shown = CliRunner().invoke(main, ["signals", "exp", *shared])
    actions = [line.split("  ")[1] for line in shown.stdout.splitlines()]
    words = ("PAUSE", "RESUME", "SET STAGE", "STOP", "RESET", "SHIP")
    assert (shown.exit_code, actions) == (0, [f"ORDER {word}" for word in words])
