"""Traffic with faults in it, and an account of what must become of every record of it.

The account is kept from the log itself, record by record, by the few rules of docs/semantics.md that need no
join. It is the third one beside the engine's and the oracle's, and shares no code with either.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import Producer

from stream_xp.services.oracle.reading import open_reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stream_xp.services.oracle.recompute import LoggedRecord
    from stream_xp.settings import Settings

HOUR_MS: Final = 3_600_000
FLUSH_TIMEOUT_S: Final = 240.0
BAD: Final = "chaos-bad"
"""Header of a record that must be dead-lettered; its value is the reason."""

POISON: Final[dict[str, tuple[bytes, str]]] = {
    "no JSON": (b"{", "invalid_json"),
    "not UTF-8": (b'{"id": "\xff\xfe"}', "invalid_json"),
    "not an object": (b"[1, 2]", "invalid_field"),
    "deep": (b'{"a":' * 3_000 + b"1" + b"}" * 3_000, "invalid_json"),
    "wrong type": (b'{"id": 7, "unit": "p", "time": "now"}', "invalid_field"),
    "not a number": (
        b'{"id": "p", "unit": "p", "time": 1, "metric": "spend", "value": NaN, "arm": "a"}',
        "invalid_json",
    ),
    "too large": (b'{"id": "' + b"p" * 70_000 + b'"}', "too_large"),
    "empty": (b"", "empty_value"),
}


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of units that do what units should not.

    Attributes:
        duplicates: of records that are sent twice.
        reversed_order: rewards before the exposure.
        late, skewed, boundary, crossover, unknown, nobody, poison: of units; `boundary` events are as late as
            they may be, give or take some milliseconds.
    """

    duplicates: float = 0.05
    reversed_order: float = 0.3
    late: float = 0.02
    skewed: float = 0.02
    boundary: float = 0.0
    crossover: float = 0.02
    unknown: float = 0.01
    nobody: float = 0.01
    poison: float = 0.01


@dataclass(slots=True)
class Sent:
    """What was sent: records and copies of them per topic, poison per kind."""

    records: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)


class Traffic:
    """Exposures and rewards of one experiment, as a fleet of imperfect applications sends them.

    Args:
        settings: of the direct door: traffic flows on while workers are cut off.
        seed: of everything but the times.
        pad_bytes: so much longer is every record.
    """

    def __init__(
        self,
        settings: Settings,
        seed: str,
        *,
        mix: Mix = Mix(),
        experiment: str = "checkout",
        pad_bytes: int = 0,
    ) -> None:
        self.settings = settings
        self.experiment = experiment
        self.mix = mix
        self.sent = Sent()
        self._random = random.Random(seed)
        self._units = 0
        self._pad = "x" * pad_bytes
        self._failures: list[str] = []
        self._producer = Producer(
            {
                "bootstrap.servers": settings.bootstrap,
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "linger.ms": 2,
                "delivery.timeout.ms": int(FLUSH_TIMEOUT_S * 1000),
                "queue.buffering.max.messages": 2_000_000,
                "reconnect.backoff.max.ms": 500,
                "log_level": 2,
            }
        )

    def send(self, units: int) -> None:
        """Send some units, and wait until the broker has them."""
        for _ in range(units):
            self._send_unit()
            self._producer.poll(0)
        self.flush()

    def flush(self) -> None:
        """Wait until the broker has everything."""
        left = self._producer.flush(FLUSH_TIMEOUT_S)
        assert not left, f"{left} records were not acknowledged"
        assert not self._failures, self._failures[:3]

    @contextmanager
    def flowing(self, *, per_s: float = 150.0) -> Iterator[None]:
        """Send units in the background at an even rate, for as long as the block takes."""
        failed: list[BaseException] = []
        over = threading.Event()

        def run() -> None:
            try:
                self._flow(over, per_s)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="traffic")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        assert not failed, failed

    def _flow(self, over: threading.Event, per_s: float) -> None:
        begun, units = time.monotonic(), 0
        while not over.wait(0.02):
            due = int((time.monotonic() - begun) * per_s)
            # Where this thread was kept from running it does not make up for more than a second.
            units = max(units, due - int(per_s))
            for _ in range(due - units):
                self._send_unit()
            units = due
            self._producer.poll(0)
        self.flush()

    def send_poison(self) -> None:
        """Send one of each kind of poison, to both topics, and records without a key or with another's."""
        for topic in ("exposures", "rewards"):
            for kind in POISON:
                self._poison(topic, kind)
            good = json.dumps(
                {"id": f"k{self._next()}", "unit": "p", "time": _now_ms(), **_of(topic)}
            ).encode()
            self._bad(topic, b"", good, "missing_key")
            self._bad(topic, b"another", good, "key_mismatch")
            self._bad(topic, b"p", None, "empty_value")
        self.flush()

    def _send_unit(self) -> None:
        draw, mix = self._random, self.mix
        unit, time_ms = f"m{self._next()}", _now_ms() - draw.randint(0, 200)
        for topic, event, after_ms in self._events(unit):
            value = self._value(unit, event, time_ms + after_ms)
            copies = 2 if draw.random() < mix.duplicates else 1
            for _ in range(copies):
                self._produce(topic, unit.encode(), value)
            self.sent.copies[topic] += copies - 1
        self._send_strange(unit, time_ms)

    def _events(self, unit: str) -> list[tuple[str, dict[str, Any], int]]:
        draw, mix = self._random, self.mix
        exposure = {"id": f"x{unit}", "experiment": self.experiment, "arm": draw.choice("ab")}
        events: list[tuple[str, dict[str, Any], int]] = [("exposures", exposure, 0)]
        if draw.random() < 0.3:
            events.append(("rewards", {"id": f"c{unit}", "metric": "click"}, draw.randint(0, 450)))
        if draw.random() < 0.3:
            value = round(draw.uniform(-20, 500), 3)
            events.append(
                ("rewards", {"id": f"s{unit}", "metric": "spend", "value": value}, draw.randint(0, 450))
            )
        if draw.random() < mix.reversed_order:
            events.reverse()
        if draw.random() < mix.crossover:
            events.append(("exposures", {"id": f"y{unit}", "experiment": self.experiment, "arm": "b"}, 1))
        if draw.random() < mix.late:
            late_ms = -self.settings.allowed_lateness_ms - draw.randint(2_000, 9_000)
            events.append(("rewards", {"id": f"l{unit}", "metric": "click"}, late_ms))
        return events

    def _send_strange(self, unit: str, time_ms: int) -> None:
        draw, mix = self._random, self.mix
        key = unit.encode()
        if draw.random() < mix.boundary:
            limit_ms = _now_ms() - self.settings.allowed_lateness_ms + draw.randint(-2, 10)
            self._produce("rewards", key, self._value(unit, {"id": f"e{unit}", "metric": "click"}, limit_ms))
        if draw.random() < mix.unknown:
            unknown = {"id": f"u{unit}", "experiment": "nobody-applied-this", "arm": "a"}
            self._produce("exposures", key, self._value(unit, unknown, time_ms))
        if draw.random() < mix.skewed:
            skewed = {"id": f"h{unit}", "experiment": self.experiment, "arm": "a"}
            ahead = draw.random() < 0.5
            value = self._value(unit, skewed, time_ms + (HOUR_MS if ahead else -HOUR_MS))
            if ahead:
                self._bad("exposures", key, value, "time_out_of_range")
            else:
                self._produce("exposures", key, value)
        if draw.random() < mix.nobody:
            nobody = {"id": f"n{unit}", "experiment": self.experiment, "arm": "nobody"}
            self._bad("exposures", key, self._value(unit, nobody, time_ms), "unknown_arm")
        if draw.random() < mix.poison:
            self._poison(draw.choice(("exposures", "rewards")), draw.choice(list(POISON)))

    def _poison(self, topic: str, kind: str) -> None:
        value, reason = POISON[kind]
        self._bad(topic, b"p", value, reason)

    def _bad(self, topic: str, key: bytes, value: bytes | None, reason: str) -> None:
        self.sent.bad[reason] += 1
        self._produce(topic, key, value, headers=[(BAD, reason.encode())])

    def _value(self, unit: str, event: dict[str, Any], time_ms: int) -> bytes:
        pad = {"pad": self._pad} if self._pad else {}
        return json.dumps({**event, "unit": unit, "time": time_ms, **pad}).encode()

    def _produce(
        self, topic: str, key: bytes, value: bytes | None, *, headers: list[Any] | None = None
    ) -> None:
        self.sent.records[topic] += 1
        self._producer.produce(
            self.settings.topic(topic), value, key, headers=headers, on_delivery=self._note
        )

    def _note(self, error: Any, _: Any) -> None:
        if error is not None:
            self._failures.append(str(error))

    def _next(self) -> int:
        self._units += 1
        return self._units


def _of(topic: str) -> dict[str, str]:
    return {"experiment": "checkout", "arm": "a"} if topic == "exposures" else {"metric": "click"}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# The account ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Account:
    """What must have become of the records of one partition of a raw topic.

    Attributes:
        outcomes: dead_lettered, unknown_experiment, late, duplicate, and what is left, `rest`.
        bad: reason, key and value of each record to be dead-lettered, by offset.
        copies: records whose id came before.
        from_limit_ms: how far from the allowed lateness the records near it were: above 0 is late.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    bad: dict[int, tuple[str, bytes | None, bytes | None]] = field(default_factory=dict)
    copies: int = 0
    from_limit_ms: Counter[int] = field(default_factory=Counter)


def account(settings: Settings) -> dict[tuple[str, int], Account]:
    """The account of every partition of the raw topics, from offset 0 on."""
    with open_reader(settings) as reader:
        return {
            (topic, partition): _account(reader.read_all(settings.topic(topic), partition), settings)
            for topic in ("exposures", "rewards")
            for partition in range(settings.partitions)
        }


def _account(records: Sequence[LoggedRecord], settings: Settings) -> Account:
    found = Account()
    seen: set[str] = set()
    admitted: set[str] = set()
    log_ms = 0
    for record in records:
        log_ms = max(log_ms, record.timestamp_ms)
        reason = dict(record.headers).get(BAD)
        if reason is not None:
            found.bad[record.offset] = (reason.decode(), record.key, record.value)
            found.outcomes["dead_lettered"] += 1
            continue
        event = json.loads(record.value or b"")
        identity = event["id"]
        found.copies += identity in seen
        seen.add(identity)
        beyond_ms = log_ms - event["time"] - settings.allowed_lateness_ms
        if abs(beyond_ms) <= 3:
            found.from_limit_ms[beyond_ms] += 1
        found.outcomes[_outcome(identity, beyond_ms, admitted)] += 1
        if beyond_ms <= 0:
            admitted.add(identity)
    return found


def _outcome(identity: str, beyond_ms: int, admitted: set[str]) -> str:
    if identity.startswith("u"):
        return "unknown_experiment"
    if beyond_ms > 0:
        return "late"
    return "duplicate" if identity in admitted else "rest"
