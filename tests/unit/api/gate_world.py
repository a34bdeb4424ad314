"""An experiment in every state that a gate can find it in, as records of the topics."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.topic_reader import TopicRecord
from stream_xp.domain.decision import (
    Action,
    ArmResult,
    ConfigRecord,
    Decision,
    Evidence,
    Method,
    MetricResult,
    MetricState,
    PartitionOffsets,
    Result,
    RolloutStatus,
    SampleRatio,
    Signal,
    SignalData,
)
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.domain.gate import Cause, Verdict
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.domain.statistics import Outcomes
from stream_xp.services.api.view import View
from stream_xp.services.operate import SOURCE
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

NOW_MS = 1_800_000_000_000
BEGUN_MS = NOW_MS - 3_600_000
NOTHING = Outcomes()
METRIC = {"kind": "conversion", "attribution_window": "10m"}
SPEC = {
    "experiment": "checkout",
    "owner": "tests",
    "hypothesis": "the canary is as good",
    "unit": "request",
    "planned_sample": 10_000,
    "arms": [
        {"key": "stable", "weight": 0.5, "control": True},
        {"key": "canary", "weight": 0.25},
        {"key": "rival", "weight": 0.25},
    ],
    "metrics": [
        METRIC | {"key": "buy", "role": "primary", "direction": "increase"},
        METRIC
        | {"key": "errors", "role": "guardrail", "direction": "decrease", "margin": {"absolute": 0.01}},
    ],
}


def spec(**fields: Any) -> ExperimentSpec:
    return msgspec.convert(SPEC | fields, ExperimentSpec)


def record(design: ExperimentSpec | None = None, *more: WeightEpoch, **fields: Any) -> ExperimentRecord:
    design = design or spec()
    first = WeightEpoch(epoch=0, weights=design.weights, effective_ms=BEGUN_MS)
    return ExperimentRecord(spec=design, epochs=(first, *more), design_hash=design.design_hash(), **fields)


def evidence(log_e: float) -> Evidence:
    return Evidence(0.004, -0.002, 0.009, log_e, min(1.0, 2.718**-log_e), 3.0)


def metric(key: str, arm: str, state: MetricState) -> MetricResult:
    guards = key == "errors"
    return MetricResult(
        metric=key,
        role="guardrail" if guards else "primary",
        arm=arm,
        state=state,
        method=Method.EXACT_THEN_ASYMPTOTIC,
        control_units=5000,
        arm_units=2400,
        effect=evidence(1.5),
        harm=evidence(-2.0) if guards else None,
        safety=evidence(4.0) if guards else None,
    )


def result(
    *,
    errors: MetricState = MetricState.SAFE,
    buy: MetricState = MetricState.INCONCLUSIVE,
    age_ms: int = 2_000,
    **fields: Any,
) -> Result:
    """A result of a moment ago; both treatments are alike."""
    arms = ("canary", "rival")
    metrics = [metric(key, arm, state) for arm in arms for key, state in (("buy", buy), ("errors", errors))]
    body: dict[str, Any] = {
        "experiment": "checkout",
        "version": 1,
        "design_hash": "d",
        "statistics_hash": "s",
        "code_version": "0",
        "look": 7,
        "offsets": {
            "0": PartitionOffsets(exposures=9, rewards=9, watermark_ms=NOW_MS - age_ms),
            "1": PartitionOffsets(exposures=9, rewards=9, watermark_ms=NOW_MS - age_ms + 500),
        },
        "runtime_ms": 3_000_000,
        "arms": (
            ArmResult(arm="stable", units=5000, expected_units=5000.0),
            ArmResult(arm="canary", units=2400, expected_units=2500.0),
            ArmResult(arm="rival", units=2600, expected_units=2500.0),
        ),
        "crossover_units": 0,
        "metrics": tuple(metrics),
        "sample_ratio": SampleRatio(log_e=-1.0, p_always_valid=1.0, threshold_log_e=6.9, mismatch=False),
        "invalid": (),
        "decision": Decision(action=Action.HOLD, reason="inconclusive"),
        "exposure_outcomes": NOTHING,
        "reward_outcomes": NOTHING,
        "evaluated_ms": NOW_MS - age_ms + 300,
    }
    return Result(**(body | fields))


def signal(
    action: Action, *, arm: str | None = "canary", proposed: bool = False, identity: str = "s1"
) -> Signal:
    decision = Decision(action=action, reason=f"{action} is proven", arm=arm)
    return Signal(
        id=identity,
        source="stream-xp/stream-xp",
        subject="checkout",
        time=dt.datetime.fromtimestamp(NOW_MS / 1000, dt.UTC).isoformat(),
        data=SignalData(decision=decision, result=result(), proposed=proposed),
    )


def order(action: OperatorAction, *, identity: str = "o1", **fields: Any) -> OrderSignal:
    body = Order(
        experiment="checkout", version=1, action=action, actor="kim", reason="the pager rang", **fields
    )
    return OrderSignal(
        id=identity, source=SOURCE, subject="checkout", time="2027-01-15T08:00:00+00:00", data=body
    )


def config(status: RolloutStatus, winner: str | None = None, **fields: Any) -> ConfigRecord:
    weights = {arm["key"]: arm["weight"] for arm in SPEC["arms"]}  # type: ignore[index, attr-defined]
    if winner is not None:
        weights = {arm: float(arm == winner) for arm in weights}
    body: dict[str, Any] = {
        "experiment": "checkout",
        "version": 1,
        "status": status,
        "weights": weights,
        "weight_epoch": 0,
        "effective_ms": BEGUN_MS,
        "config_version": 1,
    }
    return ConfigRecord(**(body | fields))


class World:
    """A view that was fed by hand, at a time that stands still."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.clock = ManualClock(NOW_MS - 1_000)
        self.read_ms: int | None = None
        self.view = View(self.settings, clock=self.clock, read_ms=lambda: self.read_ms)
        self.clock.advance_to(NOW_MS)
        self._offsets = 0

    def put(self, topic: str, value: msgspec.Struct | bytes | None, key: str = "checkout") -> None:
        self._offsets += 1
        body = msgspec.json.encode(value) if isinstance(value, msgspec.Struct) else value
        name = self.settings.topic(topic)
        place = TopicRecord(name, 0, self._offsets, NOW_MS - 2000, key.encode(), body, ())
        self.view.take(topic, place)

    def read(self, ago_ms: int = 200) -> World:
        """All topics were read to their end."""
        self.read_ms = self.clock.now_ms() - ago_ms
        return self


class State(NamedTuple):
    """What every gate must say of the arm `canary`."""

    verdict: Verdict
    cause: Cause
    build: Callable[[World], object]


def _of(*records: tuple[str, msgspec.Struct | bytes | None]) -> Callable[[World], object]:
    def build(world: World) -> None:
        for topic, value in records:
            world.put(topic, value)
        world.read()

    return build


BASE = ("experiments", record())
EVIDENCE = ("results", result())
CLOSED = WeightEpoch(
    epoch=1,
    weights={"stable": 0.6, "canary": 0.0, "rival": 0.4},
    effective_ms=BEGUN_MS + 1000,
    signal_id="closing",
)


def _restarting(world: World) -> None:
    _of(BASE, EVIDENCE, ("signals", signal(Action.STOP)))(world)
    world.read_ms = None


def _disconnected(world: World) -> None:
    _of(BASE, EVIDENCE, ("signals", signal(Action.SHIP)))(world)
    world.read(ago_ms=16_000)


def _stopped_long_ago(world: World) -> None:
    """However old the data, and silent the brokers, a stop stands."""
    _of(BASE, ("results", result(age_ms=900_000)), ("signals", signal(Action.STOP)))(world)
    world.read(ago_ms=60_000)


V, C, S = Verdict, Cause, MetricState
STATES: dict[str, State] = {
    "pass": State(V.PASS, C.SAFE, _of(BASE, EVIDENCE)),
    "shipped": State(V.PASS, C.SHIPPED, _of(BASE, EVIDENCE, ("signals", signal(Action.SHIP)))),
    "shipped, data stale": State(
        V.PASS, C.SHIPPED, _of(BASE, ("results", result(age_ms=10**8)), ("signals", signal(Action.SHIP)))
    ),
    "continue": State(V.CONTINUE, C.INCONCLUSIVE, _of(BASE, ("results", result(errors=S.INCONCLUSIVE)))),
    "primary worse": State(V.CONTINUE, C.INCONCLUSIVE, _of(BASE, ("results", result(buy=S.WORSE)))),
    "harm seen, stop on its way": State(
        V.CONTINUE, C.INCONCLUSIVE, _of(BASE, ("results", result(errors=S.HARMED)))
    ),
    "guardrail without a line": State(
        V.CONTINUE,
        C.INCONCLUSIVE,
        _of(BASE, ("results", result(metrics=(metric("buy", "canary", S.BETTER),)))),
    ),
    "minimum runtime": State(
        V.CONTINUE, C.INCONCLUSIVE, _of(("experiments", record(spec(minimum_runtime="1h"))), EVIDENCE)
    ),
    "no guardrail": State(
        V.CONTINUE,
        C.INCONCLUSIVE,
        _of(("experiments", record(spec(metrics=SPEC["metrics"][:1]))), EVIDENCE),  # type: ignore[index]
    ),
    "paused": State(V.CONTINUE, C.HELD, _of(BASE, EVIDENCE, ("signals", order(OperatorAction.PAUSE)))),
    "proposed": State(
        V.CONTINUE, C.HELD, _of(BASE, EVIDENCE, ("signals", signal(Action.SHIP, proposed=True)))
    ),
    "reset on its way": State(
        V.CONTINUE,
        C.HELD,
        _of(
            BASE,
            EVIDENCE,
            ("signals", signal(Action.STOP)),
            ("signals", order(OperatorAction.RESET)),
            ("config", config(RolloutStatus.STOPPED, "stable")),
        ),
    ),
    "stop": State(V.STOP, C.STOPPED, _of(BASE, EVIDENCE, ("signals", signal(Action.STOP)))),
    "stop by hand": State(V.STOP, C.STOPPED, _of(BASE, EVIDENCE, ("signals", order(OperatorAction.STOP)))),
    "stopped long ago": State(V.STOP, C.STOPPED, _stopped_long_ago),
    "stop known by config alone": State(
        V.STOP, C.STOPPED, _of(BASE, EVIDENCE, ("config", config(RolloutStatus.STOPPED, "stable")))
    ),
    "another arm shipped": State(
        V.STOP, C.ANOTHER_ARM, _of(BASE, EVIDENCE, ("signals", signal(Action.SHIP, arm="rival")))
    ),
    "arm closed": State(V.STOP, C.CLOSED, _of(BASE, EVIDENCE, ("experiments", record(None, CLOSED)))),
    "invalid": State(
        V.INVALID, C.INVALID_DATA, _of(BASE, ("results", result(invalid=("an arm is stalled",))))
    ),
    "sample ratio not tested": State(
        V.INVALID, C.INVALID_DATA, _of(BASE, ("results", result(sample_ratio=None)))
    ),
    "unknown experiment": State(V.INVALID, C.UNKNOWN_EXPERIMENT, _of()),
    "archived": State(V.INVALID, C.ARCHIVED, _of(("experiments", record(status=Status.ARCHIVED)), EVIDENCE)),
    "no data": State(V.INVALID, C.NO_DATA, _of(BASE)),
    "data of another version": State(
        V.INVALID, C.NO_DATA, _of(("experiments", record(spec(version=2))), EVIDENCE)
    ),
    "stale data": State(V.INVALID, C.STALE_DATA, _of(BASE, ("results", result(age_ms=60_001)))),
    "service restarting": State(V.INVALID, C.STARTING, _restarting),
    "brokers silent": State(V.INVALID, C.DISCONNECTED, _disconnected),
}


def world_in(state: str, **settings: Any) -> World:
    world = World(**settings)
    STATES[state].build(world)
    return world
