"""`bench ingest`: the engine against a Faust agent per event, in turn, on one embedded broker."""

from __future__ import annotations

import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from stream_xp.adapters.embedded_broker import EmbeddedBroker
from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.load_generator import LoadGenerator
from stream_xp.errors import DependencyError
from stream_xp.services.bench.children import Reading
from stream_xp.services.bench.load import SPAN_MS, events, experiment_records
from stream_xp.settings import ENVIRONMENT_PREFIX, Settings
from stream_xp.simulator import Chunk, Event

PARTITIONS = 12
"""An embedded broker keeps 5 MB and 100,000 records of a partition; this many hold what is produced."""
MAX_EVENTS = 800_000
_CHILD_DEADLINE_S = 150
_SPECS_AHEAD_MS = 120_000
_LINGER_MS = 300
"""An embedded broker answers a fetch with one batch, so batches have to be as large as Kafka's answers are."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the rounds of one consumer."""

    events: int
    events_per_s: float
    cpu_us_per_event: float
    rss_mb: float


class IngestReport(msgspec.Struct, frozen=True, kw_only=True):
    """Both consumers, and how many times less CPU the engine takes (median, least and most over the rounds)."""

    engine: Summary
    agent_per_event: Summary
    ratio: float
    ratio_min: float
    ratio_max: float
    rounds: int
    event_bytes: float


def bench_ingest(
    *, count: int, baseline_count: int, rounds: int, progress: Callable[[str], None]
) -> IngestReport:
    """Let both consumers read the same events from one broker, in turn, `rounds` times."""
    engine, plain = [], []
    total_bytes = 0
    for at in range(rounds):
        # A broker per round: on the same topics the engine would go on from its own snapshot.
        with EmbeddedBroker() as broker:
            settings = _settings(broker)
            progress(f"round {at + 1} of {rounds}: producing {count:,} events")
            total_bytes = _produce(settings, count)
            progress(f"round {at + 1} of {rounds}: Faust agent per event, {baseline_count:,} events")
            plain.append(_run_child("agent_per_event", settings, baseline_count))
            progress(f"round {at + 1} of {rounds}: engine, {count:,} events")
            engine.append(_run_child("engine", settings, count))
    ratios = [_cpu_us(slow) / _cpu_us(fast) for slow, fast in zip(plain, engine, strict=True)]
    return IngestReport(
        engine=_summary(engine),
        agent_per_event=_summary(plain),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        rounds=rounds,
        event_bytes=total_bytes / count,
    )


def _settings(broker: EmbeddedBroker) -> Settings:
    settings = Settings(
        bootstrap=broker.bootstrap,
        broker="embedded",
        prefix=f"bench-{secrets.token_hex(4)}.",
        partitions=PARTITIONS,
        activation_delay_ms=0,
    )
    for topic in declared_topics(settings):
        broker.create_topic(topic.name, topic.partitions)
    return settings


def _produce(settings: Settings, count: int) -> int:
    """Produce the specs, then the events; the bytes of the events."""
    now_ms = time.time_ns() // 1_000_000
    specs = [
        Event("experiments", -_SPECS_AHEAD_MS, record.spec.experiment.encode(), msgspec.json.encode(record))
        for record in experiment_records()
    ]
    load = [Event(e.topic, 0, e.key, e.value) for e in events(count, start_ms=now_ms - SPAN_MS, seed=1)]
    with LoadGenerator(settings, sample_every=count + 1, linger_ms=_LINGER_MS) as generator:
        for batch in (specs, load):
            generator.send([Chunk(due_ms=0, events=batch)], start_ms=now_ms)
    return sum(len(event.value) for event in load)


def _run_child(name: str, settings: Settings, goal: int) -> Reading:
    told = {
        "BOOTSTRAP": settings.bootstrap,
        "BROKER": "embedded",
        "PREFIX": settings.prefix,
        "PARTITIONS": str(settings.partitions),
        "ACTIVATION_DELAY_MS": "0",
        "GROUP_ID": f"bench-{name}",
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}
    environment |= {ENVIRONMENT_PREFIX + key: value for key, value in told.items()}
    command = [sys.executable, "-m", "stream_xp.services.bench.children", name, str(goal)]
    done = subprocess.run(  # noqa: S603 (our own interpreter and module)
        command, env=environment, capture_output=True, timeout=_CHILD_DEADLINE_S, check=False
    )
    if done.returncode != 0 or not done.stdout:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise DependencyError(f"the {name} process failed: {' '.join(last)}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Reading)


def _cpu_us(reading: Reading) -> float:
    return reading.cpu_s / reading.events * 1e6


def _summary(readings: list[Reading]) -> Summary:
    return Summary(
        events=readings[0].events,
        events_per_s=statistics.median(r.events / r.wall_s for r in readings),
        cpu_us_per_event=statistics.median(map(_cpu_us, readings)),
        rss_mb=max(reading.rss_mb for reading in readings),
    )
