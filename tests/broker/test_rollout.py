"""Whole rollouts on the embedded broker: an application that follows its config, and a worker that moves it."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition
from worker_process import DEADLINE_S

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.decision import Action, ConfigRecord, MonitorName, Result, RolloutStatus, Signal
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.services.verify.service import Verdict, verify
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

TICK_S = 0.05
UNITS_PER_TICK = 40
SAFE_S = 20.0
"""From evidence to coverage 0, on whatever machine; what it really took is printed."""
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
STAGES = [{"coverage": share, "minimum_units": 300, "minimum_time": "200ms"} for share in SHARES]


def spec(**fields: Any) -> ExperimentSpec:
    metric = {"kind": "conversion", "attribution_window": "100ms"}
    return msgspec.convert(
        {
            "experiment": "rollout",
            "owner": "tests",
            "hypothesis": "a rollout comes to its end by itself",
            "unit": "member",
            "planned_sample": 4000,
            "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
            "metrics": [
                metric | {"key": "click", "role": "primary", "direction": "increase"},
                metric
                | {
                    "key": "error",
                    "role": "guardrail",
                    "direction": "decrease",
                    "margin": {"absolute": 0.1},
                },
            ],
        }
        | fields,
        ExperimentSpec,
    )


class Rollout:
    """An application with traffic, which follows the config of its experiment and remembers what was said.

    Attributes:
        click, error: rates of the new arm; those of the old one are 0.2 and 0.05.
        per_tick: units that come, of both arms together.
        dead: the units of the new arm do not come.
        configs, signals, records: as they came, each with the broker's time of it.
    """

    def __init__(self, settings: Settings, design: ExperimentSpec) -> None:
        self.settings, self.design = settings, design
        self.click, self.error = 0.4, 0.05
        self.per_tick, self.dead = UNITS_PER_TICK, False
        self.configs: list[tuple[int, ConfigRecord]] = []
        self.signals: list[tuple[int, Signal]] = []
        self.records: list[tuple[int, ExperimentRecord]] = []
        self.results: list[Result] = []
        self._dice = random.Random(7)
        self._units = 0
        self._kinds: dict[str, tuple[list[Any], type[Any]]] = {
            settings.topic("config"): (self.configs, ConfigRecord),
            settings.topic("signals"): (self.signals, Signal),
            settings.topic("experiments"): (self.records, ExperimentRecord),
        }

    def apply(self, writer: TopicWriter) -> None:
        """What `stream-xp apply` does: the first weight epoch, and the config that says so."""
        design = self.design
        coverage = 1.0 if design.ramp is None else design.ramp.stages[0].coverage
        epoch = WeightEpoch(epoch=0, weights=design.weights, effective_ms=now_ms() + 500, coverage=coverage)
        record = ExperimentRecord(spec=design, epochs=(epoch,), design_hash=design.design_hash())
        config = ConfigRecord(
            experiment=design.experiment,
            version=1,
            status=RolloutStatus.RUNNING,
            weights=epoch.weights,
            weight_epoch=0,
            effective_ms=epoch.effective_ms,
            config_version=1,
            coverage=coverage,
        )
        for topic, value in (("experiments", record), ("config", config)):
            writer.send(self.settings.topic(topic), key=b"rollout", value=msgspec.json.encode(value))
            writer.flush()

    def order(self, writer: TopicWriter, action: OperatorAction, **fields: Any) -> None:
        """What a person does."""
        data = Order(
            experiment="rollout", version=1, action=action, actor="kim", reason="the test says so", **fields
        )
        said = OrderSignal(id=f"order-{action}", source="/people", subject="rollout", time="t", data=data)
        writer.send(self.settings.topic("signals"), key=b"rollout", value=msgspec.json.encode(said))
        writer.flush()

    @property
    def config(self) -> ConfigRecord | None:
        """The config that the application follows now."""
        begun = [one for _, one in self.configs if one.effective_ms <= now_ms()]
        return begun[-1] if begun else None

    @property
    def coverages(self) -> list[float]:
        """Those of the configs, in order, each once."""
        listed = [one.coverage for _, one in self.configs]
        return [at for n, at in enumerate(listed) if n == 0 or listed[n - 1] != at]

    def run(
        self,
        consumer: Any,
        writer: TopicWriter,
        worker: WorkerThread,
        until: Callable[[Rollout], bool],
    ) -> None:
        """Send units by the config in force until something has come."""
        deadline = time.monotonic() + DEADLINE_S
        while not until(self):
            assert time.monotonic() < deadline, self.results[-1:] and self.results[-1].decision
            worker.check()
            began = time.monotonic()
            self._read(consumer)
            self._send(writer)
            time.sleep(max(0.0, TICK_S - (time.monotonic() - began)))

    def _read(self, consumer: Any) -> None:
        for records in consumer.poll(timeout_ms=5).values():
            for record in records:
                if record.topic == self.settings.topic("results"):
                    self.results.append(msgspec.json.decode(record.value, type=Result))
                elif b"operator.v1" not in record.value:
                    kept, kind = self._kinds[record.topic]
                    kept.append((record.timestamp, msgspec.json.decode(record.value, type=kind)))

    def _send(self, writer: TopicWriter) -> None:
        config = self.config
        if config is None or config.status is not RolloutStatus.RUNNING or config.coverage == 0:
            return
        for _ in range(self.per_tick):
            self._units += 1
            arm = "old" if self._dice.random() < config.weights["old"] else "new"
            if arm == "new" and self.dead:
                continue
            event = {"unit": f"u{self._units}", "time": now_ms(), "source": "/app"}
            exposure = {"experiment": "rollout", "arm": arm, "weight_epoch": config.weight_epoch}
            events = [("exposures", event | exposure | {"id": f"e{self._units}"})]
            rates = (
                {"click": self.click, "error": self.error} if arm == "new" else {"click": 0.2, "error": 0.05}
            )
            events += [
                ("rewards", event | {"metric": metric, "id": f"{metric}{self._units}"})
                for metric, rate in rates.items()
                if self._dice.random() < rate
            ]
            for topic, body in events:
                writer.send(
                    self.settings.topic(topic), key=body["unit"].encode(), value=msgspec.json.encode(body)
                )
        writer.flush()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def following(settings: Settings, *topics: str) -> Iterator[Any]:
    """Every record of some topics, from their beginnings."""
    consumer = KafkaConsumer(
        **settings.kafka_python_options(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=20,
    )
    names = [settings.topic(topic) for topic in topics]
    consumer.assign(
        [TopicPartition(name, at) for name in names for at in sorted(consumer.partitions_for_topic(name))]
    )
    try:
        yield consumer
    finally:
        consumer.close(autocommit=False)


@contextmanager
def running(
    broker: EmbeddedBroker, design: ExperimentSpec
) -> Iterator[tuple[Rollout, Callable[..., None], Any]]:
    """A worker, and an application with an applied experiment."""
    settings = Settings(
        bootstrap=broker.bootstrap,
        broker="embedded",
        partitions=2,
        allowed_lateness_ms=300,
        activation_delay_ms=500,
        idle_grace_ms=500,
    )
    for topic in declared_topics(settings):
        broker.create_topic(topic.name, topic.partitions)
    rollout = Rollout(settings, design)
    with TopicWriter(settings) as writer:
        rollout.apply(writer)
        topics = ("config", "signals", "experiments", "results")
        with WorkerThread(settings) as worker, following(settings, *topics) as consumer:

            def until(condition: Callable[[Rollout], bool]) -> None:
                rollout.run(consumer, writer, worker, condition)

            yield rollout, until, writer


def concluded(rollout: Rollout) -> bool:
    """Whether the config says so, and the signal and the weight epoch that it follows from have come too."""
    if not (rollout.configs and rollout.signals and rollout.records):
        return False
    config, epoch = rollout.configs[-1][1], rollout.records[-1][1].epochs[-1]
    if config.status is RolloutStatus.RUNNING:
        return False
    return epoch.signal_id == config.signal_id and config.signal_id in {
        signal.id for _, signal in rollout.signals
    }


def actions(rollout: Rollout) -> list[str]:
    return [signal.data.decision.action for _, signal in rollout.signals]


def test_a_ramp_from_one_percent_ends_in_ship(embedded_broker: EmbeddedBroker) -> None:
    with running(embedded_broker, spec(ramp={"stages": STAGES})) as (rollout, until, _):
        until(concluded)
        verdicts = [
            verdict for _, signal in rollout.signals for verdict in verify(rollout.settings, signal.id)
        ]
    assert rollout.coverages == list(SHARES)
    # Each advance and the ship, from the raw topics: the same statistics, the same decision.
    assert [(one.verdict, one.first_difference) for one in verdicts] == [(Verdict.EQUAL, None)] * 6
    assert actions(rollout) == [Action.ADVANCE] * 5 + [Action.SHIP]
    config = rollout.configs[-1][1]
    assert (config.status, config.weights) == (RolloutStatus.SHIPPED, {"old": 0.0, "new": 1.0})
    epochs = rollout.records[-1][1].epochs
    assert [epoch.signal_id for epoch in epochs] == [None, *(signal.id for _, signal in rollout.signals)]
    assert [epoch.final for epoch in epochs] == [False] * 6 + [True]


def test_harm_at_a_quarter_returns_the_ramp_to_nothing(embedded_broker: EmbeddedBroker) -> None:
    stages = [stage | {"minimum_units": 10**6} if stage["coverage"] == 0.25 else stage for stage in STAGES]
    with running(embedded_broker, spec(ramp={"stages": stages})) as (rollout, until, _):
        until(lambda one: one.config is not None and one.config.coverage == 0.25)
        rollout.error = 0.6
        until(concluded)
        seen_ms = now_ms()
    (signal_ms, signal), (record_ms, record), (config_ms, config) = (
        rollout.signals[-1],
        rollout.records[-1],
        rollout.configs[-1],
    )
    assert rollout.coverages == [0.01, 0.05, 0.1, 0.25, 0.0]
    assert actions(rollout) == [Action.ADVANCE] * 3 + [Action.STOP]
    assert (signal.data.decision.arm, signal.data.decision.metric) == ("new", "error")
    assert (config.status, config.coverage, config.weights) == (
        RolloutStatus.STOPPED,
        0.0,
        {"old": 1.0, "new": 0.0},
    )
    assert config.signal_id == record.epochs[-1].signal_id == signal.id
    assert record.epochs[-1].final
    assert signal_ms <= record_ms <= config_ms
    evidence_ms = signal.data.result.evaluated_ms
    assert config.effective_ms <= evidence_ms + SAFE_S * 1000
    assert seen_ms <= evidence_ms + SAFE_S * 1000
    print(
        f"\nevidence of harm at 0 ms: signal {signal_ms - evidence_ms} ms, weight epoch {record_ms - evidence_ms} ms, "
        f"config with coverage 0 {config_ms - evidence_ms} ms, seen by the application {seen_ms - evidence_ms} ms"
    )


def test_a_ship_waits_for_its_approval(embedded_broker: EmbeddedBroker) -> None:
    with running(embedded_broker, spec(conclusion={"mode": "approve"})) as (rollout, until, writer):
        until(lambda one: bool(one.signals))
        ((_, signal),) = rollout.signals
        assert (signal.data.decision.action, signal.data.proposed) == (Action.SHIP, True)
        until(lambda one: is_waiting(one, signal))
        looks = len(rollout.results)
        until(lambda one: len(one.results) > looks + 5)
        assert [one.status for _, one in rollout.configs] == [RolloutStatus.RUNNING]
        waiting = rollout.results[-1]
        assert waiting.rollout is not None
        assert (waiting.decision.action, waiting.rollout.proposed) == (Action.HOLD, signal.id)
        rollout.order(writer, OperatorAction.APPROVE, signal_id=signal.id)
        until(concluded)
    config = rollout.configs[-1][1]
    assert (config.status, config.weights) == (RolloutStatus.SHIPPED, {"old": 0.0, "new": 1.0})
    assert config.signal_id == signal.id
    assert len(rollout.signals) == 1


def is_waiting(rollout: Rollout, signal: Signal) -> bool:
    """Whether the newest result knows of a proposal; those of before the signal can be read after it."""
    waiting = rollout.results[-1].rollout if rollout.results else None
    return waiting is not None and waiting.proposed == signal.id


def latched(rollout: Rollout) -> bool:
    monitors = (rollout.results[-1].monitors if rollout.results else None) or ()
    return any(one.latched for one in monitors)


def test_an_arm_that_gets_no_units_holds_the_ramp_until_a_person_has_looked(
    embedded_broker: EmbeddedBroker,
) -> None:
    stages = [
        {"coverage": 0.05, "minimum_units": 1000},
        {"coverage": 0.5, "minimum_units": 3000},
        {"coverage": 1.0, "minimum_units": 10**6},
    ]
    # The sample ratio of so few units would stop it, sooner or later; here it is to be held.
    design = spec(ramp={"stages": stages}, sample_ratio_alpha=1e-12)
    with running(embedded_broker, design) as (rollout, until, writer):
        until(lambda one: one.config is not None and one.config.coverage == 0.5)
        rollout.dead, rollout.per_tick = True, 4
        until(latched)
        seen = rollout.results[-1]
        (stall,) = [one for one in seen.monitors or () if one.latched]
        assert (stall.monitor, stall.arm) == (MonitorName.EXPOSURE_STALL, "new")
        assert stall.reason in seen.invalid
        # The arm comes back, and the stage is due: but for the latch the ramp would go on.
        rollout.dead, rollout.per_tick = False, UNITS_PER_TICK
        until(lambda one: due_but_for_the_monitors(one.results[-1]))
        looks = len(rollout.results)
        until(lambda one: len(one.results) > looks + 5)
        held = rollout.results[-1]
        assert due_but_for_the_monitors(held)
        assert held.invalid == (
            "exposure stall of new: proven before, and nobody has resumed or reset since",
        )
        assert (actions(rollout), rollout.coverages) == ([Action.ADVANCE], [0.05, 0.5])
        rollout.order(writer, OperatorAction.RESET, monitors=True)
        until(lambda one: one.config is not None and one.config.coverage == 1.0)
        assert actions(rollout) == [Action.ADVANCE, Action.ADVANCE]
        assert not latched(rollout)
        assert {one.since for one in rollout.results[-1].monitors or ()} == {"order-reset"}
        (found,) = verify(rollout.settings, rollout.signals[-1][1].id)
        assert found.verdict is Verdict.EQUAL, found


def due_but_for_the_monitors(result: Result) -> bool:
    """Whether nothing but invalid data keeps the ramp where it is."""
    return result.rollout is not None and result.rollout.waits == ("the data are invalid",)
