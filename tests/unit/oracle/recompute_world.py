"""Small logs, specs, and what the oracle makes of them."""

from __future__ import annotations

import json
from typing import Any

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import (
    Arm,
    Denominator,
    Direction,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
    Status,
    WeightEpoch,
)
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec, Recomputed, recompute

L = 1_000
D = 500
T = 1_000_000
"""Log time at which the events of the tests begin; the specs are in force long before."""


WINDOW = 5_000
FAR = 10**9


def metric(key: str = "click", **changes: Any) -> Metric:
    plain = {
        "kind": MetricKind.CONVERSION,
        "role": Role.PRIMARY,
        "direction": Direction.INCREASE,
        "attribution_window": f"{WINDOW}ms",
    }
    return Metric(key=key, **{**plain, **changes})


def mean(key: str = "spend", **changes: Any) -> Metric:
    return metric(key, **{"kind": MetricKind.MEAN, "bound": 10.0, "scale": 0.5, **changes})


def spec(*metrics: Metric, key: str = "exp", version: int = 1, **changes: Any) -> ExperimentSpec:
    plain = {"arms": (Arm(key="a", weight=0.5, control=True), Arm(key="b", weight=0.5))}
    return ExperimentSpec(
        experiment=key,
        owner="team",
        hypothesis="better",
        unit="member",
        metrics=metrics or (metric(),),
        planned_sample=1000,
        version=version,
        **{**plain, **changes},
    )


def published(
    design: ExperimentSpec,
    *,
    at_ms: int = 0,
    status: Status = Status.ACTIVE,
    effective: tuple[int, ...] = (0,),
) -> LoggedSpec:
    epochs = tuple(
        WeightEpoch(epoch=index, weights=design.weights, effective_ms=ms)
        for index, ms in enumerate(effective)
    )
    record = ExperimentRecord(spec=design, epochs=epochs, design_hash=design.design_hash(), status=status)
    return LoggedSpec(at_ms, design.experiment, record)


class Log:
    """A raw topic partition that is written record by record."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        self.records: list[LoggedRecord] = []
        self._defaults = defaults

    def add(
        self, time_ms: int, *, at: int | None = None, unit: str = "u", raw: bytes | None = None, **fields: Any
    ) -> int:
        offset = len(self.records)
        event = {"id": f"i{offset}", "time": time_ms, "unit": unit, **self._defaults, **fields}
        value = json.dumps(event).encode() if raw is None else raw
        self.records.append(LoggedRecord(offset, time_ms if at is None else at, unit.encode(), value))
        return offset


class Case:
    """Exposures, rewards and specs, and what they come to."""

    def __init__(self, *specs: LoggedSpec) -> None:
        self.specs = list(specs) or [published(spec())]
        self.exposures = Log({"experiment": "exp", "arm": "a"})
        self.rewards = Log({"metric": "click", "value": 1})

    def run(
        self, watermark_ms: int | None = FAR, *, max_units: int | None = None, **behind: Any
    ) -> Recomputed:
        done = recompute(
            self.exposures.records,
            self.rewards.records,
            self.specs,
            partition=0,
            watermark_ms=watermark_ms,
            allowed_lateness_ms=L,
            activation_delay_ms=D,
            limits=Limits(),
            behind_watermark=behind,
            max_units=max_units,
        )
        assert done.exposure_outcomes.conserved()
        assert done.reward_outcomes.conserved()
        assert done.exposure_outcomes.read == len(self.exposures.records)
        assert done.reward_outcomes.read == len(self.rewards.records)
        return done


def moments(
    done: Recomputed, key: str = "click", version: int = 1
) -> dict[tuple[str, int, str], tuple[int, int, int]]:
    return {
        (row.arm, row.epoch, row.segment): (row.n, int(row.s), int(row.q))
        for row in done.statistics["exp", version].moments
        if row.metric == key
    }


def units(done: Recomputed, version: int = 1) -> dict[tuple[str, int, str], int]:
    return {(row.arm, row.epoch, row.segment): row.units for row in done.statistics["exp", version].units}


def ratio(denominator: Denominator, **changes: Any) -> Metric:
    return metric(
        "r", **{"kind": MetricKind.RATIO, "event": "spend", "bound": 10.0, **changes}, denominator=denominator
    )


# Counts and latencies
def count(**changes: Any) -> Metric:
    return metric(**{"kind": MetricKind.COUNT, **changes})


def latency(**changes: Any) -> Metric:
    return metric("wait", **{"kind": MetricKind.LATENCY, "scale": 0.5, "bound": 100.0, **changes})
