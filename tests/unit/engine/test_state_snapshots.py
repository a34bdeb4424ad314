"""A snapshot holds everything the fold needs, and nothing damaged or foreign is restored."""

from __future__ import annotations

import base64
import json
import random
import struct
from pathlib import Path

import msgspec
import pytest
import xxhash

from stream_xp.domain.statistics import Rules
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.snapshot import decode_snapshot, encode_snapshot, parts_of, state_of
from stream_xp.engine.snapshot_log import KeyedRecord, whole_snapshots
from stream_xp.engine.state import EXPOSURES, REWARDS, SPARE_SHARE, PartitionState
from stream_xp.errors import ConfigError, StateError
from tests.unit.engine.state_world import (
    COVARIATE,
    KINDS,
    LATENESS_MS,
    RULES,
    T,
    again,
    canonical,
    entry,
    expose,
    exposure_of,
    reward,
    reward_of,
    spec,
)


@pytest.fixture(scope="module")
def held() -> PartitionState:
    """A state with something in every array: open windows, waiting rewards, crossovers, segments, two epochs."""
    design = spec("one", 1, *KINDS, covariate=COVARIATE)
    registry = Registry([entry(0, design, epochs=2), entry(1, spec("two")), entry(2, spec("two", 2))])
    state = PartitionState(3, registry, allowed_lateness_ms=LATENESS_MS, rules=RULES)
    seen = [
        exposure_of(n, weight_epoch=n % 2, segments={"device": ["ios", "tv"][n % 3 % 2]}, covariate=n % 9)
        for n in range(60)
    ]
    seen += [exposure_of(n, "two") for n in range(20)] + [{**exposure_of(4, arm="b"), "id": "crossed"}]
    seen += [{**exposure_of(n), "time": T + 1_200, "id": f"again{n}"} for n in range(5)]
    expose(state, 0, seen)
    reward(state, 0, [reward_of(n, 1.5) for n in range(70)])
    reward(state, 70, [reward_of(n, n * 1.5, "wait") for n in range(50)])
    reward(state, 120, [reward_of(n, 1.0, "error") for n in range(50)])
    waiting = [
        reward_of(n, 2.0, metric) for n in range(100, 109) for metric in ("order", "one-click", "wait")
    ]
    waiting += [{**reward_of(n, 3.0), "experiment": "one"} for n in range(109, 115)]
    reward(state, 170, [{**event, "time": T + 1_100} for event in waiting])
    state.behind[REWARDS] = [7, 9]
    return state


def assert_same(one: PartitionState, other: PartitionState) -> None:
    assert one.partition == other.partition
    assert (one.progress, one.behind, one.watermark_ms) == (other.progress, other.behind, other.watermark_ms)
    for slot in one.registry.slots:
        again = other.registry.slot(slot.experiment, slot.version)
        assert one.record(slot) == other.record(again)


def go_on(state: PartitionState) -> dict[tuple[str, int], bytes]:
    """Statistics after more has come: units that rewards waited for, rewards of open units, and every end."""
    units = [{**exposure_of(n), "time": T + 1_050} for n in range(99, 120)]
    expose(state, state.progress[EXPOSURES].next_offset or 0, units)
    more = [{**reward_of(n, 2.5), "id": f"more{n}", "time": T + 999} for n in range(50)]
    reward(state, state.progress[REWARDS].next_offset or 0, more)
    state.advance(T + 60_000)
    return canonical(state)


def test_a_snapshot_holds_everything_the_fold_needs(held: PartitionState) -> None:
    assert_same(held, again(held))
    wanted = go_on(again(held))
    assert go_on(again(again(held))) == wanted != canonical(held)
    assert held.outcomes(REWARDS).waiting > 0
    found = go_on(again(held))["one", 1]
    assert all(f'"{table}":[[' in found.decode() for table in ("moments", "products", "events", "histograms"))
    assert held.statistics(held.registry.slots[0]).crossover_units == 1


def test_a_snapshot_does_not_change_what_it_is_made_of(held: PartitionState) -> None:
    before = canonical(held)
    encode_snapshot(held)
    assert canonical(held) == before


def test_slots_and_events_are_renumbered_to_those_of_the_process(held: PartitionState) -> None:
    entries = {at.offset: at for at in held.registry.entries}
    zero = entry(9, spec("zero"))
    process = Registry()
    for known in (zero, entries[1], entries[2]):
        process.add([known])
    other = again(held, process)
    assert [slot.experiment for slot in other.registry.slots] == ["zero", "two", "two", "one"]
    assert list(other.registry.events) != list(held.registry.events)
    assert_same(held, other)
    straight = again(held)
    straight.registry.add([zero])
    assert go_on(other) == go_on(straight)


def test_a_snapshot_brings_versions_that_the_topic_no_longer_has(held: PartitionState) -> None:
    # The topic of specs is compacted: of two versions only the newest is there.
    process = Registry([entry(2, spec("two", 2))])
    assert_same(held, again(held, process))


def test_every_damage_of_a_snapshot_is_an_error_of_state(held: PartitionState) -> None:
    whole = encode_snapshot(held)
    draw = random.Random(11)
    places = [*range(24), *(draw.randrange(24, len(whole)) for _ in range(300)), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        with pytest.raises(StateError):
            decode_snapshot(bytes(damaged), Registry(), allowed_lateness_ms=LATENESS_MS)


@pytest.mark.parametrize("cut", [0, 3, 23, 24, 100, -1])
def test_a_snapshot_that_was_cut_is_an_error_of_state(held: PartitionState, cut: int) -> None:
    with pytest.raises(StateError):
        decode_snapshot(encode_snapshot(held)[:cut], Registry(), allowed_lateness_ms=LATENESS_MS)


def test_bytes_behind_a_snapshot_are_an_error_of_state(held: PartitionState) -> None:
    with pytest.raises(StateError):
        decode_snapshot(encode_snapshot(held) + b"x", Registry(), allowed_lateness_ms=LATENESS_MS)


def test_the_first_block_after_a_restore_moves_nothing_large(held: PartitionState) -> None:
    """It is applied on the event loop; the restore is not."""
    expose(held, 86, [exposure_of(n, time=T + 1_250) for n in range(100, 500)])
    state = again(held)
    before = {name: state.arrays[name] for name in ("rows", "values", "due", "lookup")}
    spare = state.units // SPARE_SHARE
    expose(state, 486, [exposure_of(n, time=T + 1_250) for n in range(600, 600 + spare)])
    assert state.units == held.units + spare
    assert [name for name, array in before.items() if state.arrays[name] is not array] == []


def test_another_schema_refuses_to_start(held: PartitionState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_xp.engine.snapshot.SCHEMA", 99)
    other = encode_snapshot(held)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="schema 99, this version reads schema 4: go back to the version"):
        decode_snapshot(other, Registry(), allowed_lateness_ms=LATENESS_MS)


def test_another_lateness_refuses_to_start(held: PartitionState) -> None:
    with pytest.raises(ConfigError, match="set it back, or start under a new prefix"):
        decode_snapshot(encode_snapshot(held), Registry(), allowed_lateness_ms=LATENESS_MS + 1)


@pytest.mark.parametrize("name", ["activation_delay_ms", "future_tolerance_ms", "max_record_bytes"])
def test_another_rule_of_outcomes_refuses_to_start(name: str) -> None:
    rules = Rules(activation_delay_ms=1, future_tolerance_ms=2, max_record_bytes=3, max_units=4)
    state = PartitionState(3, Registry([entry(0, spec("one"))]), allowed_lateness_ms=0, rules=rules)
    snapshot = encode_snapshot(state)
    assert decode_snapshot(snapshot, Registry(), allowed_lateness_ms=0, rules=rules).rules == rules
    # The bound of units may change while nothing shows.
    decode_snapshot(
        snapshot, Registry(), allowed_lateness_ms=0, rules=msgspec.structs.replace(rules, max_units=9)
    )
    other = msgspec.structs.replace(rules, **{name: 7})
    wanted = rf"partition 3: .* made with {name}={getattr(rules, name)}, the setting is 7; .* set it back"
    with pytest.raises(ConfigError, match=wanted):
        decode_snapshot(snapshot, Registry(), allowed_lateness_ms=0, rules=other)


def epoch_1_of(weight: float) -> Entry:
    found = entry(7, spec("one"), epochs=2)
    assert found.record is not None
    first, second = found.record.epochs
    other = msgspec.structs.replace(second, weights={"a": weight, "b": 1 - weight})
    return msgspec.structs.replace(found, record=msgspec.structs.replace(found.record, epochs=(first, other)))


@pytest.mark.parametrize(
    ("made", "now", "what"),
    [
        (entry(0, spec("one")), entry(7, spec("one", bound=9.0)), "design"),
        (epoch_1_of(0.9), epoch_1_of(0.8), "weight epochs"),
        (entry(0, spec("one"), epochs=3), epoch_1_of(0.8), "weight epochs"),
    ],
)
def test_another_record_of_the_same_version_refuses_to_start(made: Entry, now: Entry, what: str) -> None:
    """What compaction left can be another record than the one that the state was counted under."""
    snapshot = encode_snapshot(PartitionState(3, Registry([made]), allowed_lateness_ms=0))
    wanted = f"partition 3: the snapshot was made with another {what} of one version 1 than"
    with pytest.raises(ConfigError, match=wanted):
        decode_snapshot(snapshot, Registry([now]), allowed_lateness_ms=0)


@pytest.mark.parametrize("epochs", [(1, 3), (3, 1), (2, 2)])
def test_more_weight_epochs_on_either_side_are_no_other_ones(epochs: tuple[int, int]) -> None:
    made, now = (entry(at, spec("one"), epochs=n) for at, n in enumerate(epochs))
    snapshot = encode_snapshot(PartitionState(3, Registry([made]), allowed_lateness_ms=0))
    found = decode_snapshot(snapshot, Registry([now]), allowed_lateness_ms=0)
    assert len(found.registry.slot("one", 1).epochs) == max(epochs)


def test_the_specs_of_a_snapshot_grow_with_their_epochs_not_with_the_square_of_them() -> None:
    def head(changes: int) -> tuple[Registry, int]:
        registry = Registry()
        for n in range(changes):
            registry.add([entry(n, spec("one"), epochs=n + 1)])
        state = PartitionState(0, registry, allowed_lateness_ms=0)
        return registry, len(parts_of(state)["head"])

    registry, size = head(200)
    assert size < 2.5 * head(100)[1]
    found = again(PartitionState(0, registry, allowed_lateness_ms=0)).registry
    assert found.entries == registry.entries
    # Nor does memory: what a record repeats is held once.
    first = {id(found.entries[at].record.epochs[0]) for at in (0, 99, 199)}  # type: ignore[union-attr]
    assert len(first) == 1


def test_specs_that_share_little_are_kept_whole() -> None:
    one = entry(0, spec("one"), epochs=3)
    assert one.record is not None
    prose = msgspec.structs.replace(one.record.spec, owner="another")
    renamed = Entry(
        offset=2, experiment="one", in_force_ms=5, record=msgspec.structs.replace(one.record, spec=prose)
    )
    gone = Entry(offset=3, experiment="one", in_force_ms=9, record=None)
    registry = Registry([one, renamed, gone, entry(4, spec("one", 2))])
    found = again(PartitionState(0, registry, allowed_lateness_ms=0)).registry
    assert found.entries == [one, renamed, gone, entry(4, spec("one", 2))]


def test_the_hash_covers_the_packed_body_and_the_schema(held: PartitionState) -> None:
    whole = encode_snapshot(held)
    _, schema, size, digest = struct.unpack_from("<4sIQQ", whole)
    assert size == len(whole) - 24
    assert digest == xxhash.xxh3_64_intdigest(whole[24:], seed=schema)


def test_offsets_that_were_applied_are_not_applied_again(held: PartitionState) -> None:
    with pytest.raises(StateError, match="is already applied"):
        expose(again(held), 3, [exposure_of(500)])


def test_a_snapshot_of_this_schema_is_read_as_it_was_written() -> None:
    """A file from the day the schema was made: a change of what is written needs a new number, or must read it."""
    golden = json.loads((Path(__file__).parents[2] / "golden" / "state" / "schema4.json").read_text())
    records = [KeyedRecord(one["key"].encode(), base64.b64decode(one["value"])) for one in golden["records"]]
    (whole,) = whole_snapshots(3, records)
    state = state_of(whole.parts(), Registry(), allowed_lateness_ms=LATENESS_MS, rules=RULES)
    for found, wanted in ((canonical(state), "statistics"), (go_on(state), "later")):
        assert {f"{name}/{version}": raw.decode() for (name, version), raw in found.items()} == golden[wanted]
