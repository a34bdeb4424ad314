"""Topics as lists, what the decide stage signals of them, and signals that were tampered with."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from broker.oracle_world import published_part

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.kafka_log import LogRecord
from stream_xp.domain.ages import Ages
from stream_xp.domain.decision import Signal
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.engine.columns import Block
from stream_xp.engine.registry import Entry, Registry
from stream_xp.services.decide import Decide
from stream_xp.services.decide import topics as decide_topics
from stream_xp.services.oracle import service as oracle_module
from stream_xp.services.oracle.prefixes import rules_of
from stream_xp.services.oracle.reading import LogShortError, LogTruncatedError
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec
from stream_xp.services.verify import service as module
from stream_xp.services.verify.service import Verification
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator


T = 1_750_000_000_000
SETTINGS = Settings(allowed_lateness_ms=1_000, activation_delay_ms=100, idle_grace_ms=500, partitions=2)
SPEC = msgspec.convert(
    {
        "experiment": "exp",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
        "metrics": [
            {
                "key": "click",
                "kind": "conversion",
                "role": "primary",
                "direction": "increase",
                "attribution_window": "1s",
            },
            {
                "key": "spend",
                "kind": "mean",
                "role": "secondary",
                "direction": "increase",
                "attribution_window": "1s",
                "scale": 0.01,
                "bound": 100,
            },
            {
                "key": "wait",
                "kind": "latency",
                "role": "secondary",
                "direction": "decrease",
                "attribution_window": "1s",
                "scale": 0.1,
                "bound": 100,
            },
        ],
    },
    ExperimentSpec,
)


RECORD = ExperimentRecord(
    spec=SPEC,
    epochs=(WeightEpoch(epoch=0, weights=SPEC.weights, effective_ms=0),),
    design_hash=SPEC.design_hash(),
)


class Broker:
    """Topics as lists of records; reads as `LogReader` does and is written to as `LogWriter` is."""

    def __init__(self) -> None:
        self.logs: dict[tuple[str, int], list[LoggedRecord]] = defaultdict(list)
        self.begin = 0

    def serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have everybody read these lists."""

        @contextmanager
        def opened(settings: Settings, **_: Any) -> Iterator[Broker]:
            yield self

        monkeypatch.setattr(module, "open_reader", opened)
        monkeypatch.setattr(oracle_module, "open_reader", opened)
        monkeypatch.setattr(decide_topics, "read_all", self.read_everything)
        monkeypatch.setattr(decide_topics, "LogTail", lambda *_: Silence())

    def add(self, topic: str, key: bytes, value: bytes, *, at_ms: int = T, partition: int = 0) -> None:
        log = self.logs[topic, partition]
        log.append(LoggedRecord(len(log), at_ms, key, value))

    def partitions(self, topic: str) -> list[int]:
        return [0, 1] if topic in ("xp.exposures", "xp.rewards") else [0]

    def read_all(self, topic: str, partition: int) -> list[LoggedRecord]:
        return list(self.logs[topic, partition])

    def read_span(self, topic: str, partition: int, *, first: int, last: int) -> list[LoggedRecord]:
        if first < self.begin:
            raise LogTruncatedError(f"{topic}[{partition}] begins at offset {self.begin}")
        if last >= len(self.logs[topic, partition]):
            raise LogShortError(f"{topic}[{partition}] ends")
        return self.logs[topic, partition][first : last + 1]

    def read_after(self, topic: str, partition: int, *, last: int, most: int) -> list[LoggedRecord]:
        return self.logs[topic, partition][last + 1 : last + 1 + most]

    async def send(self, topic: str, *, key: bytes, value: bytes | None) -> None:
        self.add(topic, key, value or b"")

    async def durable(self, sent: Any, topic: str) -> None:
        pass

    async def read_everything(self, settings: Settings, topic: str, partitions: Any) -> list[LogRecord]:
        return [LogRecord(0, one.offset, T, one.key, one.value) for one in self.logs[topic, 0]]


class Silence:
    """`LogTail` of a topic on which nothing was said."""

    async def start(self) -> None:
        pass

    async def poll(self) -> tuple[list[LogRecord], bool]:
        return [], True


class Specs:
    def __init__(self, record: ExperimentRecord) -> None:
        self.registry = Registry([Entry(offset=0, experiment="exp", in_force_ms=0, record=record)])


def fill(
    broker: Broker, *, units: int = 600, seed: int = 1, record: ExperimentRecord = RECORD, arms: str = "ab"
) -> None:
    """Write the spec, and units of which b clicks far more often."""
    dice = random.Random(seed)
    broker.add("xp.experiments", b"exp", msgspec.json.encode(record), at_ms=T - 1_000)
    for n in range(units):
        arm, unit, at_ms = arms[n % len(arms)], f"u{n}", T + n
        where = {"at_ms": at_ms, "partition": n % 2 if n % 5 else 0}

        def send(
            topic: str, unit: str = unit, at_ms: int = at_ms, where: dict[str, int] = where, **fields: Any
        ) -> None:
            value = {"id": f"{unit}{fields}", "time": at_ms, "unit": unit, **fields}
            broker.add(f"xp.{topic}", unit.encode(), json.dumps(value).encode(), **where)

        send("exposures", experiment="exp", arm=arm)
        if dice.random() < (0.6 if arm == "b" else 0.1):
            send("rewards", metric="click")
        send("rewards", metric="spend", value=round(dice.uniform(-5, 50), 2))
        send("rewards", metric="wait", value=round(dice.uniform(0, 90), 1))


def parts(broker: Broker, *, watermark_ms: int = T + 9_000) -> list[PartitionStatistics]:
    """What ingest would publish of all that is there."""
    specs = [
        LoggedSpec(one.timestamp_ms, "exp", msgspec.json.decode(one.value or b"", type=ExperimentRecord))
        for one in broker.logs["xp.experiments", 0]
    ]
    newest = specs[-1].record
    assert newest is not None
    return [
        published_part(
            newest.spec,
            *(broker.logs[f"xp.{topic}", partition] for topic in ("exposures", "rewards")),
            specs,
            settings=SETTINGS,
            partition=partition,
            watermark_ms=watermark_ms,
            rules=rules_of(SETTINGS),
        )
        for partition in (0, 1)
    ]


def decided(
    broker: Broker, published: list[PartitionStatistics], *, record: ExperimentRecord = RECORD
) -> Signal:
    """Let the decide stage say what follows, and return its signal."""
    values = [msgspec.json.encode(part) for part in published]
    n = len(values)
    block = Block("xp.stats", 0, 0, n, list(range(n)), [T] * n, [b"exp"] * n, values, [()] * n)

    async def scenario() -> None:
        stage = Decide(
            SETTINGS,
            experiments=Specs(record),  # type: ignore[arg-type]
            writer=broker,  # type: ignore[arg-type]
            clock=ManualClock(T),
            partitions={"signals": 1, "config": 1, "results": 1, "stats": 1},
        )
        await stage.on_block(block)
        await stage.evaluate()

    asyncio.run(scenario())
    (signal,) = signals(broker)
    return signal


def signals(broker: Broker) -> list[Signal]:
    return [msgspec.json.decode(one.value or b"", type=Signal) for one in broker.logs["xp.signals", 0]]


def rewrite(broker: Broker, signal: Signal) -> None:
    """Put another signal in the place of the first."""
    broker.logs["xp.signals", 0] = []
    broker.add("xp.signals", b"exp", msgspec.json.encode(signal))


def with_result(signal: Signal, **changes: Any) -> Signal:
    result = msgspec.structs.replace(signal.data.result, **changes)
    return msgspec.structs.replace(signal, data=msgspec.structs.replace(signal.data, result=result))


def only(found: list[Verification]) -> Verification:
    (one,) = found
    return one


CONTEXTS = ("ios", "web")
GUARDRAIL = {
    "key": "errors",
    "kind": "conversion",
    "role": "guardrail",
    "direction": "decrease",
    "attribution_window": "1s",
    "margin": {"absolute": 0.1},
}


def adaptive(policy: str, **fields: Any) -> ExperimentRecord:
    """Three arms whose weights follow clicks, after two weight epochs."""
    given = msgspec.to_builtins(SPEC)
    allocation = {
        "policy": policy,
        "metric": "click",
        "interval": "1m",
        "burn_in": {"units": 20, "conversions": 2},
    }
    given |= {
        "arms": [{"key": arm, "weight": 1 / 3, "control": arm == "a"} for arm in "abc"],
        "metrics": [given["metrics"][0], GUARDRAIL],
        "allocation": allocation | fields,
        "minimum_runtime": "1h",
    }
    if policy == "contextual":
        given |= {
            "segments": {"platform": CONTEXTS},
            "allocation": given["allocation"] | {"context": "platform"},
        }
    spec = msgspec.convert(given, ExperimentSpec)
    moved = {"a": 0.3, "b": 0.4, "c": 0.3}
    contexts = dict.fromkeys(CONTEXTS, moved) if policy == "contextual" else {}
    epochs = (
        WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0),
        WeightEpoch(epoch=1, weights=moved, effective_ms=1, contexts=contexts, signal_id="before"),
    )
    return ExperimentRecord(spec=spec, epochs=epochs, design_hash=spec.design_hash())


def fill_epochs(broker: Broker, record: ExperimentRecord, *, harmful: str = "") -> None:
    """Units of two weight epochs; b clicks most on one platform, c on the other one; `harmful` errs."""
    dice = random.Random(5)
    broker.add("xp.experiments", b"exp", msgspec.json.encode(record), at_ms=T - 1_000)
    for n in range(900):
        epoch, platform, unit = int(n >= 300), CONTEXTS[n % 2], f"u{n}"
        weights = record.epochs[epoch].weights
        (arm,) = dice.choices(list(weights), weights=list(weights.values()))
        event = {"time": T + n, "unit": unit}
        placed = {"experiment": "exp", "arm": arm, "weight_epoch": epoch, "segments": {"platform": platform}}
        best = {"ios": "b", "web": "c"}[platform]
        values = [("exposures", event | placed | {"id": f"e{n}"})]
        if dice.random() < (0.5 if arm == best else 0.2):
            values.append(("rewards", event | {"metric": "click", "id": f"c{n}"}))
        if dice.random() < (0.7 if arm == harmful else 0.05):
            values.append(("rewards", event | {"metric": "errors", "id": f"x{n}"}))
        for topic, value in values:
            broker.add(
                f"xp.{topic}", unit.encode(), json.dumps(value).encode(), at_ms=T + n, partition=n % 3 % 2
            )


def forged(signal: Signal, **fields: Any) -> Signal:
    decision = msgspec.structs.replace(signal.data.decision, **fields)
    data = msgspec.structs.replace(with_result(signal, decision=decision).data, decision=decision)
    return msgspec.structs.replace(signal, data=data)


# Effects by age, and a segment that is registered.
AGED = msgspec.structs.replace(
    SPEC,
    segments={"device": ("tv",)},
    ages=Ages(metrics=("spend", "click"), until=("100ms", "200ms", "300ms")),
)


AGED_RECORD = msgspec.structs.replace(RECORD, spec=AGED, design_hash=AGED.design_hash())
