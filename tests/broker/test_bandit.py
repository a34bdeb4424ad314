"""A contextual bandit on the embedded broker: an application that draws by the published weights, and a worker."""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from test_rollout import following, now_ms, spec
from worker_process import DEADLINE_S

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain import rollout_rules
from stream_xp.domain.decision import ConfigRecord, Result, RolloutStatus
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.domain.publication import next_config, next_record
from stream_xp.domain.statistics import PartitionStatistics, add_outcomes
from stream_xp.services.verify.service import Verdict, verify
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

TICK_S = 0.05
UNITS_PER_TICK = 20
CONTEXT = "platform"
BEST = {"ios": "new", "android": "old"}
"""The arm that converts more in each context, by so much that no seed can hide it."""
GOOD, BAD = 0.6, 0.2
FLOOR = 0.1
MOST = 0.7
SLICE = 0.1

METRIC = {
    "key": "click",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": "100ms",
}
ALLOCATION = {
    "policy": "contextual",
    "metric": "click",
    "context": CONTEXT,
    "floor": FLOOR,
    "maximum_change": 0.15,
    "uniform_slice": SLICE,
    "burn_in": {"units": 100, "conversions": 20},
    "interval": "1s",
}


class Application:
    """Draws each unit's arm by the weights of its context that are published, and logs what it drew with.

    Attributes:
        configs, results: as they came.
        drawn: units per arm, weight epoch and context.
    """

    def __init__(self, settings: Settings, design: ExperimentSpec) -> None:
        self.settings, self.design = settings, design
        self.configs: list[ConfigRecord] = []
        self.results: list[Result] = []
        self.statistics: dict[tuple[str, int], PartitionStatistics] = {}
        self.drawn: Counter[tuple[str, int, str]] = Counter()
        self._dice = random.Random(11)
        self._followed = 0

    def apply(self, writer: TopicWriter) -> None:
        """What `stream-xp apply` does."""
        record = next_record(None, self.design, effective_ms=now_ms() + self.settings.lead_ms)
        for topic, value in (("experiments", record), ("config", next_config(None, record))):
            self._put(writer, topic, self.design.experiment, value)
            writer.flush()

    @property
    def config(self) -> ConfigRecord | None:
        """The config that is followed now."""
        return self.configs[self._followed - 1] if self._followed else None

    def _follow(self) -> None:
        """Follow the next config that has begun: one after the other, so that none is left out after a pause."""
        if self._followed < len(self.configs) and self.configs[self._followed].effective_ms <= now_ms():
            self._followed += 1

    def tick(self, consumer: Any, writer: TopicWriter, *, sending: bool = True) -> None:
        """Take in what is new, and send some units."""
        began = time.monotonic()
        self._read(consumer)
        self._follow()
        config = self.config
        if sending and config is not None and config.status is RolloutStatus.RUNNING:
            for _ in range(UNITS_PER_TICK):
                self._unit(writer, config)
            writer.flush()
        time.sleep(max(0.0, TICK_S - (time.monotonic() - began)))

    def _read(self, consumer: Any) -> None:
        for records in consumer.poll(timeout_ms=5).values():
            for record in records:
                kind = record.topic.removeprefix(self.settings.prefix)
                if kind == "config":
                    self.configs.append(msgspec.json.decode(record.value, type=ConfigRecord))
                elif kind == "results":
                    self.results.append(msgspec.json.decode(record.value, type=Result))
                else:
                    self._counted(msgspec.json.decode(record.value, type=PartitionStatistics))

    def _counted(self, part: PartitionStatistics) -> None:
        key = (part.experiment, part.partition)
        held = self.statistics.get(key)
        if held is None or part.newer_than(held):
            self.statistics[key] = part

    def _unit(self, writer: TopicWriter, config: ConfigRecord) -> None:
        context = self._dice.choice(sorted(BEST))
        weights = config.contexts.get(context, config.weights)
        (arm,) = self._dice.choices(list(weights), weights=list(weights.values()))
        self.drawn[arm, config.weight_epoch, context] += 1
        name = f"u{self.drawn.total()}"
        event = {"unit": name, "time": now_ms(), "source": "/app"}
        exposure = {
            "id": f"e{name}",
            "experiment": self.design.experiment,
            "arm": arm,
            "weight_epoch": config.weight_epoch,
            "propensity": weights[arm],
            "segments": {CONTEXT: context},
        }
        self._put(writer, "exposures", name, event | exposure)
        if self._dice.random() < (GOOD if arm == BEST[context] else BAD):
            self._put(writer, "rewards", name, event | {"id": f"r{name}", "metric": "click"})

    def _put(self, writer: TopicWriter, topic: str, key: str, value: Any) -> None:
        writer.send(self.settings.topic(topic), key=key.encode(), value=msgspec.json.encode(value))

    @property
    def counted(self) -> Counter[tuple[str, int, str]]:
        """Units per arm, weight epoch and context, as the engine has them."""
        counted: Counter[tuple[str, int, str]] = Counter()
        for part in self.statistics.values():
            for row in part.statistics.units:
                if row.segment:
                    counted[row.arm, row.epoch, row.segment.removeprefix(f"{CONTEXT}=")] += row.units
        return counted


@contextmanager
def running(
    broker: EmbeddedBroker, design: ExperimentSpec
) -> Iterator[tuple[Application, Callable[..., None]]]:
    settings = Settings(
        bootstrap=broker.bootstrap,
        broker="embedded",
        partitions=2,
        # A pause of this process must not make an exposure late.
        allowed_lateness_ms=5_000,
        activation_delay_ms=500,
        idle_grace_ms=500,
    )
    for topic in declared_topics(settings):
        broker.create_topic(topic.name, topic.partitions)
    application = Application(settings, design)
    with TopicWriter(settings) as writer:
        application.apply(writer)
        with WorkerThread(settings) as worker, following(settings, "config", "results", "stats") as consumer:

            def until(condition: Callable[[Application], bool], *, sending: bool = True) -> None:
                deadline = time.monotonic() + DEADLINE_S
                while not condition(application):
                    last = application.results[-1] if application.results else None
                    assert time.monotonic() < deadline, last
                    worker.check()
                    application.tick(consumer, writer, sending=sending)

            yield application, until


def learned(application: Application) -> bool:
    config = application.config
    return config is not None and all(
        config.contexts.get(context, config.weights)[arm] >= MOST for context, arm in BEST.items()
    )


def test_a_contextual_bandit_finds_a_different_best_arm_in_two_contexts(
    embedded_broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hours of updates in seconds.
    monkeypatch.setattr(rollout_rules, "MINIMUM_INTERVAL_MS", 1_000)
    design = spec(
        metrics=[METRIC], segments={CONTEXT: sorted(BEST)}, allocation=ALLOCATION, minimum_runtime="1h"
    )
    with running(embedded_broker, design) as (application, until):
        until(learned)
        newest = application.config
        assert newest is not None
        # Units that are drawn with the learned weights.
        until(lambda one: one.drawn["new", newest.weight_epoch, "ios"] >= 50)
        until(lambda one: one.counted.total() >= one.drawn.total(), sending=False)
        signals = {config.signal_id for config in application.configs if config.signal_id is not None}
        verdicts = [verdict for name in sorted(signals) for verdict in verify(application.settings, name)]

    assert [one.weight_epoch for one in application.configs] == list(range(len(application.configs)))
    # At most 0.15 in one update: not learned at once, and learned step by step.
    assert newest.weight_epoch >= 2
    assert newest.context == CONTEXT
    for config in application.configs:
        for weights in (config.weights, *config.contexts.values()):
            assert min(weights.values()) >= FLOOR - 1e-9
            assert sum(weights.values()) == pytest.approx(1.0, abs=1e-9)
    outcomes = add_outcomes(part.exposure_outcomes for part in application.statistics.values())
    assert (outcomes.dead_lettered, outcomes.crossover, outcomes.late) == (0, 0, 0)
    # Every unit counts in the epoch and the context it was drawn in.
    assert application.counted == application.drawn
    assert {epoch for _, epoch, _ in application.drawn} >= set(range(newest.weight_epoch + 1))
    # From the raw topics: the same statistics, the same weights.
    assert len(verdicts) == len(application.configs) - 1
    assert {(one.verdict, one.first_difference) for one in verdicts} == {(Verdict.EQUAL, None)}
    weights_lines = [line for one in verdicts for line in one.lines if line.what == "signal contexts"]
    assert {line.derived for line in weights_lines} == {str(one.contexts) for one in application.configs[1:]}
    result = application.results[-1]
    assert result.sample_ratio is not None
    assert not result.sample_ratio.mismatch
    print(f"\nafter {newest.weight_epoch} updates and {application.drawn.total()} units: {newest.contexts}")
