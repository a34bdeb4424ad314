"""The oracle finds what the simulator knows: two programs that were written apart from docs/semantics.md."""

from __future__ import annotations

from collections import Counter

import pytest

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import Arm, Direction, ExperimentSpec, Metric, MetricKind, Role
from stream_xp.domain.statistics import add_outcomes, merge
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec, Recomputed, recompute
from stream_xp.simulator import (
    EXPOSURES,
    REWARDS,
    START_MS,
    TOPICS,
    Conversion,
    ExperimentTraffic,
    Faults,
    LogNormal,
    Scenario,
    Since,
    Traffic,
    WeightChange,
    generate,
)

LATENESS_MS = 500
DELAY_MS = 2_000
FAR_MS = START_MS + 10**9
SPEC = ExperimentSpec(
    experiment="shop",
    owner="team",
    hypothesis="better",
    unit="member",
    arms=(Arm(key="old", weight=0.7, control=True), Arm(key="new", weight=0.3)),
    metrics=(
        Metric(
            key="order",
            kind=MetricKind.CONVERSION,
            role=Role.PRIMARY,
            direction=Direction.INCREASE,
            attribution_window="1s",
        ),
        Metric(
            key="revenue",
            event="payment",
            kind=MetricKind.MEAN,
            role=Role.SECONDARY,
            direction=Direction.INCREASE,
            attribution_window="2s",
            scale=0.01,
            bound=100.0,
        ),
    ),
    planned_sample=10_000,
    segments={"country": ("se", "us"), "device": ("tv", "web")},
)
FAULTS = Faults(
    duplicated=0.03,
    out_of_order=0.1,
    late=0.02,
    malformed=0.01,
    crossovers=0.02,
    reward_first=0.5,
    repeated=0.1,
    strays=0.05,
)


def drawn(seed: int) -> Traffic:
    order = {arm: (Since(outcome=Conversion(probability=0.3)),) for arm in ("old", "new")}
    revenue = {
        arm: (Since(outcome=LogNormal(log_mean=1.0, log_sd=1.0, probability=0.6)),) for arm in ("old", "new")
    }
    traffic = ExperimentTraffic(
        spec=SPEC,
        units_per_s=400,
        outcomes={"order": order, "revenue": revenue},
        weight_changes=(WeightChange(from_ms=2_000, weights={"old": 0.5, "new": 0.5}),),
    )
    scenario = Scenario(
        experiments=(traffic,), duration_ms=5_000, allowed_lateness_ms=LATENESS_MS, faults=FAULTS
    )
    return generate(scenario, seed)


def oracle_of(traffic: Traffic, partitions: int) -> list[Recomputed]:
    """One recomputation for each partition, units spread by their key."""
    logs: dict[tuple[str, int], list[LoggedRecord]] = {
        (topic, partition): [] for topic in TOPICS for partition in range(partitions)
    }
    for event in traffic.events(START_MS):
        log = logs[event.topic, sum(event.key or b"") % partitions]
        log.append(LoggedRecord(len(log), START_MS + event.send_ms, event.key, event.value))
    specs = [
        LoggedSpec(START_MS - DELAY_MS, one.spec.experiment, one.record(START_MS))
        for one in traffic.scenario.experiments
    ]
    return [
        recompute(
            logs[EXPOSURES, partition],
            logs[REWARDS, partition],
            specs,
            partition=partition,
            watermark_ms=FAR_MS,
            allowed_lateness_ms=LATENESS_MS,
            activation_delay_ms=DELAY_MS,
            limits=Limits(),
            behind_watermark={},
        )
        for partition in range(partitions)
    ]


@pytest.mark.parametrize(("seed", "partitions"), [(1, 1), (2, 3), (3, 8)])
def test_the_oracle_finds_the_truth(seed: int, partitions: int) -> None:
    traffic = drawn(seed)
    truth = traffic.truth(START_MS)
    parts = oracle_of(traffic, partitions)
    merged = merge(part.statistics["shop", 1] for part in parts)
    assert merged.canonical() == truth.statistics["shop"].canonical()
    assert add_outcomes(part.exposure_outcomes for part in parts) == truth.exposure_outcomes
    assert add_outcomes(part.reward_outcomes for part in parts) == truth.reward_outcomes
    letters = Counter((topic, reason) for part in parts for (topic, _), reason in part.dead_letters.items())
    assert letters == truth.dead_letters
