"""Columns to the records that are sent."""

from __future__ import annotations

import itertools
from typing import Any, Final, NamedTuple

import msgspec

from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.simulator.columns import EXPOSURES, REWARD, REWARDS, Columns
from stream_xp.simulator.malformed import MALFORMED
from stream_xp.simulator.scenario import Scenario

SOURCE: Final = "simulator"


class Event(NamedTuple):
    """One record to send: logical topic, time from the start in milliseconds, Kafka key and value."""

    topic: str
    send_ms: int
    key: bytes | None
    value: bytes


class _ExposureWire(msgspec.Struct, gc=False, omit_defaults=True):
    id: str
    time: int
    experiment: str
    unit: str
    arm: str
    source: str
    weight_epoch: int
    propensity: float | None
    segments: dict[str, str] = {}


class _RewardWire(msgspec.Struct, gc=False):
    id: str
    time: int
    unit: str
    metric: str
    source: str
    value: float


class Encoder:
    """Columns to records."""

    def __init__(self, scenario: Scenario, start_ms: int) -> None:
        self._start_ms = start_ms
        self._specs = [traffic.spec for traffic in scenario.experiments]
        self._encode = msgspec.json.Encoder().encode
        self._propensity = [
            [[epoch.weights[arm.key] for arm in traffic.spec.arms] for epoch in traffic.epochs(0)]
            for traffic in scenario.experiments
        ]
        self._segments = [_segment_values(spec) for spec in self._specs]

    def events(self, records: Columns) -> list[Event]:
        """Encode the records."""
        rows = zip(*(getattr(records, name).tolist() for name in Columns.__slots__), strict=True)
        return [self._event(row) for row in rows]

    def _event(self, row: tuple[Any, ...]) -> Event:
        (
            topic,
            experiment,
            unit,
            arm,
            epoch,
            segment,
            metric,
            value,
            event_ms,
            send_ms,
            identity,
            malformed,
        ) = row
        if malformed >= 0:
            return self._malformed(malformed, experiment, send_ms, identity)
        spec = self._specs[experiment]
        name, time_ms = f"{spec.experiment}-{unit}", self._start_ms + event_ms
        if topic == REWARD:
            event = spec.metrics[metric].listens_to
            reward = _RewardWire(f"r{identity}", time_ms, name, event, SOURCE, value)
            return Event(REWARDS, send_ms, name.encode(), self._encode(reward))
        exposure = _ExposureWire(
            f"x{identity}",
            time_ms,
            spec.experiment,
            name,
            spec.arms[arm].key,
            SOURCE,
            epoch,
            # An arm of weight 0 is met by crossovers only, and 0 is no propensity.
            self._propensity[experiment][epoch][arm] or None,
            self._segments[experiment][segment],
        )
        return Event(EXPOSURES, send_ms, name.encode(), self._encode(exposure))

    def _malformed(self, kind: int, experiment: int, send_ms: int, identity: int) -> Event:
        entry, spec = MALFORMED[kind], self._specs[experiment]
        fields = {
            "id": f"m{identity}",
            "time": self._start_ms + send_ms,
            "unit": f"malformed-{identity}",
            "experiment": spec.experiment,
            "arm": spec.control.key,
            "metric": spec.metrics[0].listens_to,
        }
        key = None if entry.key is None else (entry.key % fields).encode()
        return Event(entry.topic, send_ms, key, (entry.template % fields).encode())


def _segment_values(spec: ExperimentSpec) -> list[dict[str, str]]:
    """Segment values of each code; the first dimension varies fastest, as `_cells` takes it apart."""
    names = list(spec.segments)
    tuples = itertools.product(*(spec.segments[name] for name in reversed(names)))
    return [dict(zip(reversed(names), values, strict=True)) for values in tuples]
