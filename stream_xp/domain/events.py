"""Exposures and rewards: what applications put on Kafka."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec

EventId = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
UnitId = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Source = Annotated[str, msgspec.Meta(max_length=200)]
EpochMs = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799_999)]
Timestamp = EpochMs | Annotated[datetime, msgspec.Meta(tz=True)]
WeightEpochIndex = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Propensity = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]


class Exposure(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Unit met an arm; on the wire, key = unit. Unknown fields are ignored.

    Attributes:
        id: with `source` the dedupe key (CloudEvents `source` + `id`).
        time: event time, epoch milliseconds or RFC 3339 with offset.
        experiment: key of the experiment.
        unit: what is randomised; equals the Kafka key.
        arm: the arm the unit met.
        weight_epoch: epoch of the weights the arm was drawn with. Absent: the epoch in force at `time`.
        propensity: probability of this arm at assignment, in (0, 1].
        segments: registered segment name to value.
        covariate: pre-exposure covariate of the unit.
    """

    id: EventId
    time: Timestamp
    experiment: Name
    unit: UnitId
    arm: Name
    source: Source = ""
    weight_epoch: WeightEpochIndex | None = None
    propensity: Propensity | None = None
    segments: dict[Name, Annotated[str, msgspec.Meta(max_length=100)]] = {}
    covariate: float | None = None


class Reward(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Unit did something worth `value`; on the wire, key = unit. Unknown fields are ignored.

    A reward knows nothing of experiments: it reaches every metric that listens to `metric` in every
    experiment its unit is in, unless `experiment` narrows it to one.

    Attributes:
        id: with `source` the dedupe key (CloudEvents `source` + `id`).
        time: event time, epoch milliseconds or RFC 3339 with offset.
        unit: what is randomised; equals the Kafka key.
        metric: the event name that metrics listen to.
        value: in metric units; finite.
        experiment: the only experiment this reward is for, if it is for one.
    """

    id: EventId
    time: Timestamp
    unit: UnitId
    metric: Name
    source: Source = ""
    value: float = 1.0
    experiment: Name | None = None


_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


def epoch_ms(time: int | datetime) -> int:
    """Event time in epoch milliseconds; a fraction of a millisecond is cut off."""
    if isinstance(time, int):
        return time
    delta = time - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1000 + delta.microseconds // 1000
