"""Puts mutated records through every decoder of the service and accounts for each of them.

Exposures and rewards go the way of the worker: a block, its columns, the fold. What comes of it must be one
outcome for each record, and a dead letter for exactly those that were refused, with the record's own bytes. Records
of the service's own topics go through the functions that read them there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import msgspec
from mutations import Mutator

from stream_xp.adapters.clock import ManualClock
from stream_xp.domain.codec import Limits, decode_experiment, decode_own
from stream_xp.domain.dead_letter import RAW_LIMIT_BYTES, DeadLetter, dead_letter_key
from stream_xp.domain.decision import ConfigRecord, Result, Signal
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.errors import ConfigError, StateError
from stream_xp.services.decide import Decide, chain, heard, look, service
from stream_xp.services.decide import records as own_records
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec, recompute
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parents[2] / "topics" / "golden"
LOG_MS = 1_793_611_800_000
LATENESS_MS = 60_000
LIMITS = Limits()
BLOCK_RECORDS = 400
STATE_RECORDS = 20_000
"""Records after which a partition's state begins anew, so that memory stays flat."""

SHARES = {
    "exposures": 0.40,
    "rewards": 0.40,
    "experiments": 0.06,
    "stats": 0.04,
    "results": 0.03,
    "signals": 0.03,
    "config": 0.02,
    "deadletter": 0.01,
    "state": 0.01,
}

DECIDED = ("stats", "results", "signals", "config")
"""Topics of the service's own that the decide stage reads."""


def golden(*names: str) -> list[bytes]:
    """Golden samples, without the blanks that make mutations miss."""
    return [msgspec.json.format((GOLDEN / name).read_bytes(), indent=-1) for name in names]


@dataclass
class Account:
    """What became of the records of one topic."""

    records: int = 0
    became: Counter[str] = field(default_factory=Counter)

    def add(self, what: str) -> None:
        self.records += 1
        self.became[what] += 1


# Exposures and rewards -----------------------------------------------------------------------------------

EXPOSURE = {"id": "1", "time": LOG_MS, "unit": "u1", "experiment": "checkout", "arm": "a"}
REWARD = {"id": "1", "time": LOG_MS, "unit": "u1", "metric": "spend", "value": 2.5}
ENVELOPE = {"specversion": "1.0", "id": "9", "source": "/web", "type": "t", "time": "2026-11-02T09:30:00Z"}
STRUCTURED = [("content-type", b"application/cloudevents+json")]
BINARY = [("ce_specversion", b"1.0"), ("ce_id", b"9"), ("ce_source", b"s"), ("ce_type", b"t")]
HEADERS: list[Any] = [
    STRUCTURED,
    BINARY,
    BINARY[:2],
    [("ce_id", b"\xff"), *BINARY],
    [("ce_id", None), *BINARY],
    [("content-type", b"\xff\xfe"), ("\ufffd", b"1")],
    [("x", b"y")] * 101,
    [("x", b"y" * 20_000)],
    [("traceparent", None)],
]


def registry() -> Registry:
    """Specs that the mutated records can reach: the golden ones, and one whose weights changed."""
    records = [
        msgspec.json.decode(golden("experiment.v1.json")[0], type=ExperimentRecord),
        in_force(golden("experiment-spec.kinds.v1.json")[0]),
        checkout(),
    ]
    return Registry(
        Entry(offset=at, experiment=record.spec.experiment, in_force_ms=0, record=record)
        for at, record in enumerate(records)
    )


def in_force(written: bytes, epochs: int = 1) -> ExperimentRecord:
    """The record of a spec, its weights published anew in each epoch."""
    spec = msgspec.json.decode(written, type=ExperimentSpec)
    return ExperimentRecord(
        spec=spec,
        epochs=tuple(
            WeightEpoch(epoch=epoch, weights=spec.weights, effective_ms=10 * epoch) for epoch in range(epochs)
        ),
        design_hash=spec.design_hash(),
    )


def checkout() -> ExperimentRecord:
    spec = {
        "experiment": "checkout",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
        "segments": {"device": ["ios", "web"]},
        "covariate": {"scale": 0.25, "bound": 1000.0},
        "metrics": [
            _metric("click", "conversion", role="primary"),
            _metric("spend", "mean", scale=0.01, bound=100.0, adjustment="cuped"),
            _metric("wait", "latency", scale=0.5, bound=60.0),
            _metric("visits", "count"),
            _metric(
                "ratio", "ratio", event="spend", bound=100.0, denominator={"event": "visits", "bound": 9}
            ),
        ],
    }
    return in_force(msgspec.json.encode(spec), epochs=2)


def _metric(key: str, kind: str, **fields: Any) -> dict[str, Any]:
    about = {"key": key, "kind": kind, "role": "secondary", "direction": "increase"}
    return {**about, "attribution_window": "10s", **fields}


class Events:
    """Mutated events of both source topics through columns and fold, block by block."""

    def __init__(self, seed: int, *, oracle: bool) -> None:
        self.accounts = {EXPOSURES: Account(), REWARDS: Account()}
        self.reasons: Counter[str] = Counter()
        self._oracle = oracle
        self._mutators = {
            EXPOSURES: Mutator(seed, self._corpus(EXPOSURE, "exposure")),
            REWARDS: Mutator(seed + 1, self._corpus(REWARD, "reward")),
        }
        self._begin()

    @staticmethod
    def _corpus(plain: dict[str, Any], name: str) -> list[bytes]:
        full = {**plain, "source": "s", "weight_epoch": 1, "segments": {"device": "ios"}, "covariate": 1.5}
        full["propensity"] = 0.5
        made = [{**one, "unit": f"u{n}", "id": str(n)} for one in (plain, full) for n in range(4)]
        made += [{**plain, "metric": metric, "value": 1} for metric in ("click", "wait", "visits")]
        made.append({**ENVELOPE, "data": plain})
        plain_texts = [json.dumps(one, separators=(",", ":")).encode() for one in made]
        return plain_texts + golden(
            f"{name}.v1.json", f"{name}.minimal.v1.json", f"{name}-cloudevent.v1.json"
        )

    def run(self, topic: str, records: int) -> None:
        """Fold so many mutated records of one topic."""
        while records:
            size = min(records, BLOCK_RECORDS)
            self._fold(topic, self._block(topic, size))
            records -= size
            if sum(len(log) for log in self._logs.values()) >= STATE_RECORDS:
                self.finish()

    def _begin(self) -> None:
        self._state = PartitionState(0, registry(), allowed_lateness_ms=LATENESS_MS)
        self._logs: dict[str, list[LoggedRecord]] = {EXPOSURES: [], REWARDS: []}
        self._letters: dict[tuple[str, int], DeadLetter] = {}

    def _block(self, topic: str, size: int) -> Block:
        mutator, log = self._mutators[topic], self._logs[topic]
        first = len(log)
        for offset in range(first, first + size):
            log_ms = LOG_MS + offset * 20 + mutator.random.randrange(2000)
            value = self._anew(mutator, mutator.record(), log_ms)
            log.append(LoggedRecord(offset, log_ms, self._key(mutator, value), value, self._headers(mutator)))
        rows = log[first:]
        # Names by place, for a block holds the same five columns that a logged record has.
        offsets, stamps, keys, values, headers = (list(column) for column in zip(*rows, strict=True))
        return Block(topic, 0, first, first + size, offsets, stamps, keys, values, headers)

    @staticmethod
    def _anew(mutator: Mutator, value: bytes | None, log_ms: int) -> bytes | None:
        """Mostly another event, of another unit and now, or all good records would be duplicates and late."""
        if value is None or mutator.random.random() < 0.1:
            return value
        value = value.replace(b"%d" % LOG_MS, b"%d" % (log_ms - mutator.random.randrange(4000)), 1)
        if mutator.random.random() < 0.02:
            value = value.replace(b'"arm":"a"', b'"arm":"b"')
        value = value.replace(b'"id":"', b'"id":"%d-' % mutator.random.randrange(10**6), 1)
        return value.replace(b'"unit":"u', b'"unit":"u%d' % mutator.random.randrange(100), 1)

    @staticmethod
    def _key(mutator: Mutator, value: bytes | None) -> bytes | None:
        if mutator.random.random() < 0.05:
            return mutator.random.choice([None, b"", b"\xff", b"u", b"u1 ", b"k" * 5000])
        try:
            unit = json.loads(value or b"")["unit"]
        except (ValueError, KeyError, TypeError, RecursionError, IndexError):
            return b"u1"
        return unit.encode(errors="replace") if isinstance(unit, str) else b"u1"

    @staticmethod
    def _headers(mutator: Mutator) -> Any:
        return mutator.random.choice(HEADERS) if mutator.random.random() < 0.04 else ()

    def _fold(self, topic: str, block: Block) -> None:
        state = self._state
        floor_ms = state.log_ms(topic)
        if topic == EXPOSURES:
            exposures, letters = exposure_columns(block, state.registry, floor_ms=floor_ms, limits=LIMITS)
            state.apply_exposures(exposures, next_offset=block.next_offset)
        else:
            rewards, letters = reward_columns(block, state.registry, floor_ms=floor_ms, limits=LIMITS)
            state.apply_rewards(rewards, next_offset=block.next_offset)
        for letter in letters:
            self._keep(block, letter)
        self._check(topic)

    def _keep(self, block: Block, letter: DeadLetter) -> None:
        """A dead letter is the only one of its record, and has its bytes."""
        place = (letter.topic, letter.offset)
        assert place not in self._letters, place
        self._letters[place] = letter
        row = letter.offset - block.fetch_offset
        value, key = block.values[row], block.keys[row]
        assert letter.value == (None if value is None else value[:RAW_LIMIT_BYTES])
        assert letter.key == (None if key is None else key[:RAW_LIMIT_BYTES])
        assert letter.value_sha256 == hashlib.sha256(value or b"").hexdigest()
        assert letter.detail
        assert dead_letter_key(letter) == f"{block.topic}/0/{letter.offset}".encode()
        again = msgspec.json.decode(msgspec.json.encode(letter), type=DeadLetter)
        assert again == letter
        self.reasons[letter.reason] += 1

    def _check(self, topic: str) -> None:
        """Conservation: one outcome for each record, and as many dead letters as are counted."""
        outcomes = self._state.outcomes(topic)
        assert outcomes.conserved(), outcomes
        assert outcomes.read == len(self._logs[topic]), outcomes
        assert outcomes.dead_lettered == sum(place[0] == topic for place in self._letters), outcomes

    def finish(self) -> None:
        """Account for what was folded, compare it with the oracle if wanted, and begin anew."""
        for topic, account in self.accounts.items():
            for name, count in msgspec.structs.asdict(self._state.outcomes(topic)).items():
                if name == "read":
                    account.records += count
                elif count:
                    account.became[name] += count
        if self._oracle:
            self._compare()
        decode_snapshot(encode_snapshot(self._state), Registry(), allowed_lateness_ms=LATENESS_MS)
        self._begin()

    def _compare(self) -> None:
        state = self._state
        found = recompute(
            self._logs[EXPOSURES],
            self._logs[REWARDS],
            [LoggedSpec(0, entry.experiment, entry.record) for entry in state.registry.entries],
            partition=0,
            watermark_ms=state.watermark_ms,
            allowed_lateness_ms=LATENESS_MS,
            activation_delay_ms=0,
            limits=LIMITS,
            behind_watermark=state.behind,
        )
        for slot in state.registry.slots:
            theirs = found.statistics[slot.experiment, slot.version]
            assert state.statistics(slot).canonical() == theirs.canonical()
        for topic, theirs_of in ((EXPOSURES, found.exposure_outcomes), (REWARDS, found.reward_outcomes)):
            assert state.outcomes(topic) == theirs_of
        letters = {place: letter.reason for place, letter in self._letters.items()}
        assert letters == found.dead_letters


# Experiments ----------------------------------------------------------------------------------------------


class Specs:
    """Mutated experiment records: refused, or good enough for events, a snapshot and a layout."""

    def __init__(self, seed: int) -> None:
        self.account = Account()
        corpus = [*golden("experiment.v1.json"), msgspec.json.encode(checkout())]
        self._mutator = Mutator(seed, corpus)
        self._offset = 0
        self._begin()

    def _begin(self) -> None:
        self._registry = registry()
        self._state = PartitionState(0, self._registry, allowed_lateness_ms=LATENESS_MS)

    def run(self, records: int) -> None:
        for _ in range(records):
            self.account.add(self._one(self._mutator.record()))

    def _one(self, value: bytes | None) -> str:
        self._offset += 1
        if value is None:
            return "tombstone"
        experiment = self._mutator.random.choice(["checkout", "checkout-canary", "demo"])
        try:
            record = decode_experiment(experiment, value)
        except ConfigError:
            return "refused by the codec"
        entry = Entry(offset=1000 + self._offset, experiment=experiment, in_force_ms=0, record=record)
        if self._registry.add([entry]):
            return "refused by the registry"
        self._use()
        return "accepted"

    def _use(self) -> None:
        """What a worker does next with an accepted spec."""
        self._state.sync_registry()
        for slot in self._registry.slots:
            self._state.record(slot)
        decode_snapshot(encode_snapshot(self._state), Registry(), allowed_lateness_ms=LATENESS_MS)
        assert self._registry.newest("checkout", 1) is not None
        if len(self._registry.slots) > 4 or len(self._registry.entries) > 20:
            self._begin()


# Topics of our own -----------------------------------------------------------------------------------------


class Own:
    """Mutated records of one of the service's own topics through the function that reads it."""

    def __init__(self, seed: int, corpus: list[bytes], read: Callable[[bytes], object | None]) -> None:
        self.account = Account()
        self._mutator = Mutator(seed, corpus)
        self._read = read

    def run(self, records: int) -> None:
        for _ in range(records):
            value = self._mutator.record()
            # A tombstone never gets to a decoder.
            became = "tombstone" if value is None else "refused" if self._read(value) is None else "accepted"
            self.account.add(became)


class Reports:
    """Stands in for the log: what is refused must be said, once."""

    def __init__(self) -> None:
        self.errors = 0

    def error(self, *_: object, **__: object) -> None:
        self.errors += 1

    def info(self, *_: object, **__: object) -> None:
        """Decisions are told too; they do not count."""

    debug = info


def read_own(kind: Any) -> Callable[[bytes], object | None]:
    return lambda value: own_records.own_or_none(value, kind)


def read_letter(value: bytes) -> DeadLetter | None:
    try:
        return decode_own(value, DeadLetter)
    except ConfigError:
        return None


class Decisions:
    """Reads a statistics record as the decide stage does, and evaluates what it accepts."""

    def __init__(self, reports: Reports) -> None:
        self.reports = reports
        self._registry = registry()

    def read(self, value: bytes) -> object | None:
        decide = Decide(
            Settings(),
            experiments=cast("Any", self),
            writer=cast("Any", self),
            clock=ManualClock(LOG_MS),
            partitions=dict.fromkeys(("signals", "config", "results", "stats"), 1),
        )
        reported = self.reports.errors
        decide._take([value])
        asyncio.run(decide.evaluate())
        return decide.experiments if self.reports.errors == reported else None

    @property
    def registry(self) -> Registry:
        return self._registry

    async def send(self, topic: str, *, key: bytes, value: bytes) -> None:
        """Take what it writes, which must be readable again."""
        kind: Any = {"xp.results": Result, "xp.signals": Signal, "xp.config": ConfigRecord}[topic]
        own_records.check_range(*own_records.NUMBERS[kind](decode_own(value, kind)))

    async def durable(self, sent: Any, topic: str) -> None:
        """Everything is there at once."""


class Snapshots:
    """Snapshots with changed bytes: restored only where nothing changed."""

    def __init__(self, seed: int) -> None:
        self.account = Account()
        self._good = encode_snapshot(PartitionState(0, registry(), allowed_lateness_ms=LATENESS_MS))
        self._mutator = Mutator(seed, [b"{}"])

    def run(self, records: int) -> None:
        for _ in range(records):
            damage = self._mutator.random.choice(self._mutator._by_bytes)
            value = damage(self._good) or b""
            restored = self._is_restored(value)
            assert restored == (value == self._good)
            self.account.add("restored" if restored else "passed over")

    @staticmethod
    def _is_restored(value: bytes) -> bool:
        try:
            decode_snapshot(value, Registry(), allowed_lateness_ms=LATENESS_MS)
        except (StateError, ConfigError):
            return False
        return True


# All of it ---------------------------------------------------------------------------------------------------


class Fuzz:
    """All topics; `run` may be called again and goes on with new records."""

    def __init__(self, seed: int, *, oracle: bool = False) -> None:
        self._reports = Reports()
        self.events = Events(seed, oracle=oracle)
        self.specs = Specs(seed + 2)
        statistics = golden("statistics.v1.json", "statistics.events.v1.json", "statistics.products.v1.json")
        results = golden("result.v1.json", "result.undetermined.v1.json")
        self.own: dict[str, Own | Snapshots] = {
            "stats": Own(seed + 3, statistics, Decisions(self._reports).read),
            "results": Own(seed + 4, results, read_own(Result)),
            "signals": Own(seed + 5, golden("signal.v1.json"), read_own(Signal)),
            "config": Own(seed + 6, golden("config.v1.json"), read_own(ConfigRecord)),
            "deadletter": Own(seed + 7, golden("deadletter.v1.json"), read_letter),
            "state": Snapshots(seed + 8),
        }

    def run(self, records: int) -> None:
        self._run_own(records)
        self.specs.run(round(records * SHARES["experiments"]))
        self._run_events(records)

    def _run_own(self, records: int) -> None:
        with contextlib.ExitStack() as replaced:
            for module in (chain, heard, look, own_records, service):
                replaced.enter_context(mock.patch.object(module, "log", self._reports))
            for topic, own in self.own.items():
                own.run(round(records * SHARES[topic]))
        refused = sum(self.own[topic].account.became["refused"] for topic in DECIDED)
        assert self._reports.errors == refused

    def _run_events(self, records: int) -> None:
        events = round(records * SHARES[EXPOSURES])
        # In turn, so that rewards meet exposures.
        for start in range(0, events, STATE_RECORDS // 4):
            size = min(STATE_RECORDS // 4, events - start)
            self.events.run(EXPOSURES, size)
            self.events.run(REWARDS, size)
        self.events.finish()

    def accounts(self) -> dict[str, Account]:
        return {
            **self.events.accounts,
            "experiments": self.specs.account,
            **{topic: own.account for topic, own in self.own.items()},
        }


def main() -> None:
    """Run it as a program and print what became of the records."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--records", type=int, default=1_000_000)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--oracle", action="store_true", help="compare events with the oracle too (slower)")
    chosen = options.parse_args()
    began = time.perf_counter()
    fuzz = Fuzz(chosen.seed, oracle=chosen.oracle)
    fuzz.run(chosen.records)
    took_s = time.perf_counter() - began
    total = 0
    for topic, account in fuzz.accounts().items():
        total += account.records
        assert account.records == sum(account.became.values()), (topic, account)
        print(f"{topic:12} {account.records:>9,}  {_listed(account.became)}")
    print(f"dead letters by reason: {_listed(fuzz.events.reasons)}")
    print(f"{total:,} records in {took_s:.0f} s, seed {chosen.seed}: no crash, every record has one outcome")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
