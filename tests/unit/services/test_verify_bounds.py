"""Signals and statistics of engines with a bound of units."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.codec import Limits
from stream_xp.domain.decision import Action
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import Entry, Registry
from stream_xp.engine.state import EXPOSURES, REWARDS, PartitionState
from stream_xp.services.oracle import service as oracle_module
from stream_xp.services.oracle.prefixes import rules_of
from stream_xp.services.verify.service import Verdict, verify
from tests.unit.services.verify_world import (
    RECORD,
    SETTINGS,
    Broker,
    T,
    decided,
    fill,
    only,
    rewrite,
    with_result,
)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()
    broker.serve(monkeypatch)
    return broker


def folded(broker: Broker, *, max_units: int) -> list[PartitionStatistics]:
    """What the engine publishes of all that is there."""
    found = []
    for partition in (0, 1):
        entry = Entry(offset=0, experiment="exp", in_force_ms=T - 900, record=RECORD)
        state = PartitionState(
            partition,
            Registry([entry]),
            allowed_lateness_ms=SETTINGS.allowed_lateness_ms,
            max_units=max_units,
        )
        for topic in (EXPOSURES, REWARDS):
            log = broker.logs[f"xp.{topic}", partition]
            n = len(log)
            _, stamps, keys, values, headers = zip(*log, strict=True)
            block = Block(topic, partition, 0, n, list(range(n)), stamps, keys, values, list(headers))
            if topic == EXPOSURES:
                seen, _ = exposure_columns(block, state.registry, floor_ms=0, limits=Limits())
                state.apply_exposures(seen, next_offset=n)
            else:
                heard, _ = reward_columns(block, state.registry, floor_ms=0, limits=Limits())
                state.apply_rewards(heard, next_offset=n)
        state.advance(T + 9_000)
        rules = msgspec.structs.replace(rules_of(SETTINGS), max_units=max_units)
        found.append(msgspec.structs.replace(state.record(state.registry.slots[0]), rules=rules))
    return found


def lift(part: PartitionStatistics, max_units: int | None) -> PartitionStatistics:
    """The same, said to be of another bound."""
    assert part.rules is not None
    return msgspec.structs.replace(part, rules=msgspec.structs.replace(part.rules, max_units=max_units))


def test_an_engine_whose_bound_was_reached_is_derived_under_its_bound(broker: Broker) -> None:
    fill(broker, arms="aaab")
    published = folded(broker, max_units=200)
    assert [part.statistics.over_limit for part in published] == [160, 40]
    signal = decided(broker, published)
    assert signal.data.decision.action is Action.STOP
    assert any("200 exposures refused" in why for why in signal.data.result.invalid)
    assert only(verify(SETTINGS, signal.id)).verdict is Verdict.EQUAL
    for bound in (None, 199, 201):
        offsets = {
            key: msgspec.structs.replace(one, rules=lift(published[0], bound).rules)
            for key, one in signal.data.result.offsets.items()
        }
        rewrite(broker, with_result(signal, offsets=offsets))
        found = only(verify(SETTINGS, signal.id))
        assert found.verdict is Verdict.DIFFERENT
        assert "statistics_hash" in [one.what for one in found.lines if one.equal is False]


@pytest.mark.parametrize(("named", "equal"), [(200, True), (201, False), (None, False)])
def test_the_oracle_takes_the_bound_that_the_statistics_name(
    broker: Broker, named: int | None, *, equal: bool
) -> None:
    fill(broker)
    for part in folded(broker, max_units=200):
        broker.add("xp.stats", b"exp/%d" % part.partition, msgspec.json.encode(lift(part, named)))
    report = oracle_module.examine(SETTINGS)
    assert (report.equal, report.checked) == (equal, 2)
    assert f"max_units {named} (here {SETTINGS.max_units})" in report.notes[0]


def test_a_bound_that_was_moved_where_it_does_not_show_leaves_the_oracle_sure(broker: Broker) -> None:
    fill(broker, units=60)
    part, other = folded(broker, max_units=200)
    broken = msgspec.structs.replace(
        part, statistics=msgspec.structs.replace(part.statistics, crossover_units=1)
    )
    earlier = msgspec.structs.replace(lift(part, 100), watermark_ms=T + 8_000)
    for one in (earlier, broken, other):
        broker.add("xp.stats", b"exp/%d" % one.partition, msgspec.json.encode(one))
    (found,) = oracle_module.examine(SETTINGS).differences
    assert (found.what, found.unsure) == ("crossover_units", False)


def test_statistics_that_name_no_settings_are_of_a_worker_without_a_bound(broker: Broker) -> None:
    fill(broker)
    for part in folded(broker, max_units=10**6):
        nameless = msgspec.structs.replace(part, rules=None)
        broker.add("xp.stats", b"exp/%d" % part.partition, msgspec.json.encode(nameless))
    assert oracle_module.examine(msgspec.structs.replace(SETTINGS, max_units=5)).equal
