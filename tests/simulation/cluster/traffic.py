"""Records and specs: small numbers of units, ids and times, so that everything meets everything."""

from __future__ import annotations

import json
import zlib
from random import Random
from typing import Any

import msgspec

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch

LATENESS_MS = 100
FUTURE_MS = 150
ACTIVATION_MS = 150
GRACE_MS = 20
LONGEST_WINDOW_MS = 80
START_MS = 1_000_000


def _metric(key: str, kind: str, role: str, window_ms: int, **fields: Any) -> dict[str, Any]:
    return {
        "key": key,
        "kind": kind,
        "role": role,
        "direction": "increase",
        "attribution_window": f"{window_ms}ms",
        **fields,
    }


def _spec(experiment: str, version: int, metrics: list[dict[str, Any]], **fields: Any) -> ExperimentSpec:
    body = {
        "experiment": experiment,
        "version": version,
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [
            {"key": "a", "weight": 0.5, "control": True},
            {"key": "b", "weight": 0.5},
            # Whoever is seen there stops the experiment.
            {"key": "c", "weight": 0.0},
        ],
        "metrics": metrics,
        **fields,
    }
    return msgspec.convert(body, ExperimentSpec)


_CLICK = _metric("click", "conversion", "primary", 40)
_VISIT = _metric("visits", "count", "secondary", LONGEST_WINDOW_MS, event="order")
_SPEND = _metric("spend", "mean", "primary", 60, event="order", scale=0.5, bound=50.0, aggregation="last")


def _encoded(spec: ExperimentSpec, epochs: int, status: Status) -> bytes:
    record = ExperimentRecord(
        spec=spec,
        epochs=tuple(
            WeightEpoch(epoch=at, weights=spec.weights, effective_ms=START_MS + 100 * at)
            for at in range(epochs)
        ),
        design_hash=spec.design_hash(),
        status=status,
    )
    return msgspec.json.encode(record)


_ERRORS = _metric(
    "errors", "conversion", "guardrail", 10, event="order", direction="decrease", margin={"absolute": 0.1}
)
"""Harm stops however invalid the data are otherwise, and often is none any more at the next look."""


class Catalogue:
    """The specs of a world, and what may change on their topic.

    `guarded`: with a guardrail; `asks`: a person must approve what is concluded.

    Attributes:
        changes: of the topic of experiments: what, key, value.
    """

    def __init__(self, *, guarded: bool, asks: bool) -> None:
        guards = [_ERRORS] * guarded
        ends: dict[str, Any] = {"conclusion": {"mode": "approve"}} if asks else {}
        devices = {"device": ["ios"]}
        self._specs = {
            ("one", 1): _spec("one", 1, [_CLICK, *guards], **ends),
            ("one", 2): _spec("one", 2, [_CLICK, _VISIT, *guards], segments=devices, **ends),
            ("two", 1): _spec("two", 1, [_SPEND, _VISIT, *guards], **ends),
        }
        other_design = _spec("one", 1, [{**_CLICK, "attribution_window": "30ms"}, *guards], **ends)
        one, two = b"one", b"two"
        self.changes: list[tuple[str, bytes, bytes | None]] = [
            ("more weight epochs", one, self.record("one", 1, epochs=2)),
            ("still more weight epochs", one, self.record("one", 1, epochs=3)),
            ("a new version", one, self.record("one", 2)),
            ("another experiment", two, self.record("two", 1)),
            ("archived", one, self.record("one", 1, status=Status.ARCHIVED)),
            ("active again", one, self.record("one", 1)),
            ("tombstone", two, None),
            ("tombstone", one, None),
            ("malformed", one, b'{"spec":'),
            ("another design", one, _encoded(other_design, 1, Status.ACTIVE)),
            ("another key", two, self.record("one", 1)),
        ]

    def record(
        self, experiment: str, version: int, *, epochs: int = 1, status: Status = Status.ACTIVE
    ) -> bytes:
        """The bytes of a record on the topic of experiments."""
        return _encoded(self._specs[experiment, version], epochs, status)


CATALOGUES = {
    (guarded, asks): Catalogue(guarded=guarded, asks=asks)
    for guarded in (False, True)
    for asks in (False, True)
}

POISON: list[bytes | None] = [
    b"{",
    b"",
    None,
    b"[1]",
    b'{"id":"1"}',
    b"[" * 3000,
    b"\xff\xfe",
    b'{"id":"1","time":1e999,"unit":"u1","experiment":"one","arm":"a"}',
    b'{"id":"p","time":%d,"unit":"u1","metric":"order","value":NaN}' % START_MS,
    b'{"id":"p","time":%d,"unit":"u1","metric":"order","value":1e999}' % START_MS,
    b'{"id":"p","time":%d,"unit":"somebody else","metric":"click"}' % START_MS,
]


class Traffic:
    """A producer of exposures and rewards.

    Attributes:
        strays: share of exposures in an arm of weight 0: a sample-ratio mismatch at the first of them.
        two_armed: share of exposures in any arm, whichever the unit was in before.
        followed: share of rewards that are of a unit that was exposed before.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.strays = rng.choice([0.0, 0.0, 0.1, 0.3])
        self.followed = rng.choice([0.0, 0.8])
        self._units = rng.choice([4, 12, 60])
        self.two_armed = rng.choice([0.0, 0.0, 0.05])
        self._spoilt = rng.choice([0.0, 0.1, 0.3])
        self._repeated = rng.choice([0.0, 0.05, 0.3])
        self._made = 0
        self._exposed: list[str] = []
        self._sent: dict[str, list[tuple[bytes, bytes | None]]] = {"exposures": [], "rewards": []}

    def go_well(self) -> None:
        """Nothing that makes an experiment invalid, and many rewards: an arm is better soon."""
        self.strays, self.two_armed, self.followed = 0.0, 0.0, 0.8

    def record(self, topic: str, now_ms: int, *, kind: str | None = None) -> tuple[bytes, bytes | None]:
        """Key and value of the next record; `kind` is one of poison, repeat, late, early, or left to chance."""
        rng, sent = self._rng, self._sent[topic]
        chance = rng.random()
        if kind == "poison" or (kind is None and chance < self._spoilt):
            return b"u1", rng.choice(POISON)
        if sent and (kind == "repeat" or (kind is None and chance < self._spoilt + self._repeated)):
            return rng.choice(sent)
        body = self._exposure() if topic == "exposures" else self._reward()
        self._made += 1
        body |= {"id": str(self._made), "time": now_ms - self._delay_ms(kind)}
        made = (body["unit"].encode(), json.dumps(body).encode())
        sent.append(made)
        return made

    def _delay_ms(self, kind: str | None) -> int:
        rng = self._rng
        chance = rng.random()
        if kind == "late" or (kind is None and chance < 0.04):
            return LATENESS_MS + rng.choice([1, 2, 40])
        if kind == "early" or (kind is None and chance < 0.07):
            return -rng.choice([1, 10, FUTURE_MS - 1, FUTURE_MS, FUTURE_MS + 1])
        if chance < 0.15:
            return LATENESS_MS - rng.choice([0, 0, 1])
        return rng.randrange(LATENESS_MS) if chance < 0.3 else rng.randrange(15)

    def _unit(self) -> str:
        return f"u{self._rng.randrange(self._units)}"

    def _exposure(self) -> dict[str, Any]:
        rng, unit = self._rng, self._unit()
        self._exposed.append(unit)
        arm = "ab"[zlib.crc32(unit.encode()) // 7 % 2] if rng.random() >= self.strays else "c"
        if rng.random() < self.two_armed:
            arm = rng.choice(["a", "b", "none such"])
        body: dict[str, Any] = {
            "unit": unit,
            "experiment": rng.choice(["one"] * 5 + ["two", "nobody"]),
            "arm": arm,
        }
        if rng.random() < 0.05:
            body["weight_epoch"] = rng.randrange(3)
        if rng.random() < 0.2:
            body["segments"] = {"device": rng.choice(["ios", "web"])}
        return body

    def _reward(self) -> dict[str, Any]:
        rng = self._rng
        follows = self._exposed and rng.random() < self.followed
        body: dict[str, Any] = {
            "unit": rng.choice(self._exposed) if follows else self._unit(),
            "metric": rng.choice(["click", "click", "order", "order", "nothing"]),
        }
        if body["metric"] == "order":
            body["value"] = rng.choice([0.0, -0.0, 1.0, 0.25, -3.5, 50.0, 51.0, 5e-324, 1e300])
        if rng.random() < 0.1:
            body["experiment"] = rng.choice(["one", "two", "nobody"])
        return body
