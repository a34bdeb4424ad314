"""A worker in this process on the embedded broker: its settings and topics, an experiment, and units that are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from worker_process import now_ms, wait_for

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.publish import plan_application, publish
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream_xp.adapters.embedded_broker import EmbeddedBroker
    from stream_xp.services.worker import WorkerThread


def settings_with_topics(broker: EmbeddedBroker, **changed: Any) -> Settings:
    """Settings of a worker that is quick, and all topics on the broker."""
    settings = Settings(
        bootstrap=broker.bootstrap,
        broker="embedded",
        **{
            "partitions": 2,
            # A pause between the clock and the log makes no event late.
            "allowed_lateness_ms": 2_000,
            "activation_delay_ms": 500,
            "idle_grace_ms": 500,
            **changed,
        },
    )
    for topic in declared_topics(settings):
        broker.create_topic(topic.name, topic.partitions)
    return settings


def apply(settings: Settings, design: dict[str, Any]) -> None:
    """Publish an experiment."""
    publish(settings, plan_application(settings, msgspec.convert(design, ExperimentSpec), now_ms=now_ms()))


def until(condition: Callable[[], object], *, worker: WorkerThread | None = None) -> None:
    """Wait until a condition holds, and see that the worker runs."""

    def holds() -> bool:
        if worker is not None:
            worker.check()
        return bool(condition())

    wait_for(holds, "what a worker on the embedded broker was to do")


def send(
    settings: Settings,
    units: range,
    *,
    experiment: str,
    arms: tuple[str, str],
    harm: str | None = None,
) -> None:
    """Expose units to two arms in turn; those of the second all give a reward for a metric, if one is named."""
    with TopicWriter(settings) as writer:
        for unit in units:
            arm = arms[unit % 2]
            event = {"time": now_ms(), "source": "/app", "unit": f"u{unit}"}
            shown = event | {"id": f"e{unit}", "experiment": experiment, "arm": arm, "weight_epoch": 0}
            sent = [("exposures", shown)]
            if harm is not None and arm == arms[1]:
                sent.append(("rewards", event | {"id": f"r{unit}", "metric": harm}))
            for topic, body in sent:
                writer.send(settings.topic(topic), key=f"u{unit}".encode(), value=msgspec.json.encode(body))
