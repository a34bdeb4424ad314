"""Compile the kernels before anything depends on their speed."""

from __future__ import annotations

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import (
    Arm,
    Direction,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
    WeightEpoch,
)
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState


def warm_up() -> None:
    """Fold one exposure and one reward; seconds the first time on a machine, then read from numba's cache."""
    spec = ExperimentSpec(
        experiment="warm-up",
        owner="-",
        hypothesis="-",
        unit="-",
        planned_sample=100,
        arms=(Arm(key="control", weight=0.5, control=True), Arm(key="treatment", weight=0.5)),
        metrics=(
            Metric(
                key="conversion",
                kind=MetricKind.CONVERSION,
                role=Role.PRIMARY,
                direction=Direction.INCREASE,
                attribution_window="1s",
            ),
        ),
    )
    epochs = (WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0),)
    record = ExperimentRecord(spec=spec, epochs=epochs, design_hash=spec.design_hash())
    registry = Registry([Entry(offset=0, experiment="warm-up", in_force_ms=0, record=record)])
    state = PartitionState(0, registry, allowed_lateness_ms=0)
    exposures, _ = exposure_columns(_block(EXPOSURES, _EXPOSURE), registry, floor_ms=0, limits=Limits())
    state.apply_exposures(exposures, next_offset=1)
    rewards, _ = reward_columns(_block(REWARDS, _REWARD), registry, floor_ms=0, limits=Limits())
    state.apply_rewards(rewards, next_offset=1)
    decode_snapshot(encode_snapshot(state), Registry(), allowed_lateness_ms=0)


_EXPOSURE = b'{"id":"1","time":1,"experiment":"warm-up","unit":"u","arm":"control"}'
_REWARD = b'{"id":"1","time":2,"unit":"u","metric":"conversion"}'


def _block(topic: str, value: bytes) -> Block:
    return Block(topic, 0, 0, 1, [0], [2], [b"u"], [value], [()])
