"""The traffic of the ingest benchmark: many experiments, 12 % exposures, the rest rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np

from stream_xp.domain.experiment import (
    Aggregation,
    Arm,
    Direction,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
    WeightEpoch,
)

EXPERIMENTS = 20
ARMS = ("control", "blue", "green")
METRICS = ("play", "spend", "minutes")
EXPOSURE_SHARE = 0.12
SPAN_MS = 60_000


class Produced(NamedTuple):
    """One record to produce: topic without prefix, key and value."""

    topic: str
    key: bytes
    value: bytes


def experiment_records(*, window: str = "10s") -> list[ExperimentRecord]:
    """The specs: a conversion and two means each; every experiment has its own event names."""
    return [_record(at, window) for at in range(EXPERIMENTS)]


def _record(at: int, window: str) -> ExperimentRecord:
    play, spend, minutes = (f"{name}-{at}" for name in METRICS)
    common: dict[str, Any] = {"direction": Direction.INCREASE, "attribution_window": window}
    metrics = (
        Metric(key=play, kind=MetricKind.CONVERSION, role=Role.PRIMARY, **common),
        Metric(key=spend, kind=MetricKind.MEAN, role=Role.SECONDARY, scale=0.01, bound=1e5, **common),
        Metric(
            key=minutes,
            kind=MetricKind.MEAN,
            role=Role.SECONDARY,
            aggregation=Aggregation.MAX,
            scale=0.001,
            bound=1e5,
            **common,
        ),
    )
    spec = ExperimentSpec(
        experiment=f"bench-{at}",
        owner="bench",
        hypothesis="none",
        unit="member",
        planned_sample=100_000,
        arms=(
            Arm(key="control", weight=0.4, control=True),
            Arm(key="blue", weight=0.3),
            Arm(key="green", weight=0.3),
        ),
        metrics=metrics,
    )
    epochs = (WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0),)
    return ExperimentRecord(spec=spec, epochs=epochs, design_hash=spec.design_hash())


def events(count: int, *, start_ms: int, seed: int) -> Iterator[Produced]:
    """`count` events in time order over a minute; every reward is of a unit that was exposed before it."""
    rng = np.random.default_rng(seed)
    times = (start_ms + np.arange(count) * SPAN_MS // count).tolist()
    exposed = max(1, int(count * EXPOSURE_SHARE))
    is_exposure = rng.random(count) < EXPOSURE_SHARE
    is_exposure[0] = True
    members = (np.cumsum(is_exposure) - 1).tolist()
    chosen = (rng.random(count) * np.minimum(np.cumsum(is_exposure), exposed)).astype(int).tolist()
    arms = rng.choice(3, size=count, p=[0.4, 0.3, 0.3]).tolist()
    metrics = rng.integers(0, 3, size=count).tolist()
    values = np.round(rng.lognormal(2.0, 1.0, size=count), 15).tolist()
    encode = msgspec.json.encode
    for at, exposure in enumerate(is_exposure.tolist()):
        member = members[at] if exposure else chosen[at]
        unit = f"member-{member:016d}"
        if exposure:
            body = {
                "id": f"e-{at:020d}",
                "source": "app/checkout",
                "time": times[at],
                "experiment": f"bench-{member % EXPERIMENTS}",
                "unit": unit,
                "arm": ARMS[arms[at]],
                "propensity": 0.3,
            }
        else:
            body = {
                "id": f"r-{at:020d}",
                "source": "app/player",
                "time": times[at],
                "unit": unit,
                "metric": f"{METRICS[metrics[at]]}-{member % EXPERIMENTS}",
                "value": values[at],
                "country": "NL",
                "session": f"s-{member:012d}",
            }
        yield Produced("exposures" if exposure else "rewards", unit.encode(), encode(body))
