"""Which spec is in force when, and which records are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream_xp.domain.codec import Limits
from stream_xp.domain.events import Exposure, Reward
from stream_xp.domain.experiment import (
    Adjustment,
    Covariate,
    ExperimentRecord,
    ExperimentSpec,
    Status,
    WeightEpoch,
)
from stream_xp.engine.columns import Block, exposure_columns, reward_columns
from stream_xp.engine.registry import DEAD, FOREVER, INACTIVE, NO_EVENT, UNKNOWN, Entry, Registry
from stream_xp.errors import Reason, RecordRejected


def spec(version: int = 1, experiment: str = "exp", window: str = "1s", **fields: Any) -> ExperimentSpec:
    return msgspec.convert(
        {
            "experiment": experiment,
            "version": version,
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
            "metrics": [
                {
                    "key": "spend",
                    "kind": "mean",
                    "role": "primary",
                    "direction": "increase",
                    "attribution_window": window,
                    "event": "order",
                    "bound": 10,
                }
            ],
            **fields,
        },
        ExperimentSpec,
    )


def entry(
    offset: int,
    in_force_ms: int,
    design: ExperimentSpec | None,
    *,
    epochs: int = 1,
    status: Status = Status.ACTIVE,
) -> Entry:
    if design is None:
        return Entry(offset=offset, experiment="exp", in_force_ms=in_force_ms, record=None)
    record = ExperimentRecord(
        spec=design,
        epochs=tuple(
            WeightEpoch(epoch=at, weights=design.weights, effective_ms=1_000 * at) for at in range(epochs)
        ),
        design_hash=design.design_hash(),
        status=status,
    )
    return Entry(offset=offset, experiment=design.experiment, in_force_ms=in_force_ms, record=record)


def version_at(registry: Registry, log_ms: int, experiment: str = "exp") -> int:
    found = registry.in_force(experiment, log_ms)
    return found if isinstance(found, int) else found[0].version


def exposure(**fields: Any) -> Exposure:
    return msgspec.convert(
        {"id": "1", "time": 1_500, "experiment": "exp", "unit": "u", "arm": "a", **fields}, Exposure
    )


def reward(**fields: Any) -> Reward:
    return msgspec.convert({"id": "1", "time": 1_500, "unit": "u", "metric": "order", **fields}, Reward)


def test_a_spec_is_in_force_from_its_time_on_and_not_before() -> None:
    registry = Registry([entry(0, 100, spec())])
    assert [version_at(registry, at) for at in (0, 99, 100, 10**15)] == [UNKNOWN, UNKNOWN, 1, 1]
    assert version_at(registry, 100, "other") == UNKNOWN


def test_a_new_version_takes_over_and_the_old_one_keeps_its_past() -> None:
    registry = Registry([entry(0, 100, spec(1)), entry(1, 200, spec(2, window="2s"))])
    assert [version_at(registry, at) for at in (150, 199, 200)] == [1, 1, 2]
    first, second = registry.slots
    assert [(i.from_ms, i.until_ms) for i in first.intervals] == [(100, 200)]
    assert second.in_force(199) is None
    assert second.in_force(200) is not None


@pytest.mark.parametrize("over", [entry(1, 200, None), entry(1, 200, spec(), status=Status.ARCHIVED)])
def test_a_tombstone_and_an_archived_record_end_it(over: Entry) -> None:
    registry = Registry([entry(0, 100, spec()), over])
    assert [version_at(registry, at) for at in (199, 200)] == [1, INACTIVE]
    assert registry.listeners("order", 199, None) != []
    assert registry.listeners("order", 200, None) == []
    assert registry.route_reward(reward(experiment="exp"), 200) == INACTIVE - 10
    # What has ended does not come back: its units may be forgotten. A new version can follow.
    (refused,) = registry.add([entry(2, 300, spec())])
    assert refused.rule == "version 1 has ended: to start again needs a new version"
    assert version_at(registry, 300) == INACTIVE
    assert registry.add([entry(3, 400, spec(), status=Status.ARCHIVED), entry(4, 500, spec(2))]) == []
    assert [version_at(registry, at) for at in (400, 500)] == [INACTIVE, 2]
    assert [slot.ended_ms for slot in registry.slots] == [200, FOREVER]


def test_what_was_archived_before_it_was_ever_active_is_inactive() -> None:
    registry = Registry([entry(0, 100, spec(), status=Status.ARCHIVED)])
    assert version_at(registry, 100) == INACTIVE
    assert Registry([entry(0, 100, None)]).in_force("exp", 100) == INACTIVE


def test_another_design_under_a_known_version_is_refused() -> None:
    registry = Registry([entry(0, 100, spec())])
    (refused,) = registry.add([entry(1, 200, spec(window="2s"))])
    assert refused.entry.offset == 1
    assert "version 1 is frozen" in refused.rule
    assert version_at(registry, 300) == 1
    assert registry.slots[0].spec == spec()


def test_a_version_does_not_go_back() -> None:
    registry = Registry([entry(0, 100, spec(2))])
    (refused,) = registry.add([entry(1, 200, spec(1, window="2s"))])
    assert refused.entry.offset == 1
    assert version_at(registry, 300) == 2


def test_what_is_refused_changes_nothing() -> None:
    registry = Registry([entry(0, 100, spec())])
    before = (registry.generation, registry.entries)
    registry.add([entry(1, 200, spec(window="2s"))])
    assert (registry.generation, registry.entries) == before


def test_an_entry_is_taken_in_once() -> None:
    entries = [entry(0, 100, spec(1)), entry(1, 200, spec(2, window="2s"))]
    registry = Registry(entries)
    generation = registry.generation
    assert registry.add(entries) == []
    assert registry.generation == generation
    assert len(registry.slots[0].intervals) == 1


def test_the_order_of_arrival_does_not_matter_within_one_call() -> None:
    entries = [entry(0, 100, spec(1)), entry(1, 200, spec(2, window="2s")), entry(2, 300, None)]
    one, other = Registry(entries), Registry(reversed(entries))
    for at in (50, 150, 250, 350):
        assert version_at(one, at) == version_at(other, at)
    assert one.entries == other.entries


def test_new_weights_are_an_epoch_of_the_same_slot() -> None:
    registry = Registry([entry(0, 100, spec()), entry(1, 200, spec(), epochs=2)])
    (slot,) = registry.slots
    assert [len(interval.epochs) for interval in slot.intervals] == [1, 2]
    assert registry.route_exposure(exposure(time=1_500), 150)[2] == 0
    assert registry.route_exposure(exposure(time=1_500), 250)[2] == 1
    assert registry.route_exposure(exposure(time=500), 250)[2] == 0
    with pytest.raises(RecordRejected) as refused:
        registry.route_exposure(exposure(weight_epoch=1), 150)
    assert refused.value.reason is Reason.UNKNOWN_WEIGHT_EPOCH


def with_epochs(offset: int, in_force_ms: int, *epochs: dict[str, Any], **fields: Any) -> Entry:
    """An entry whose epochs begin at 0, 1000, 2000, …, but for what is given."""
    one = entry(offset, in_force_ms, spec(), epochs=len(epochs), **fields)
    assert one.record is not None
    made = tuple(
        msgspec.structs.replace(epoch, **given)
        for epoch, given in zip(one.record.epochs, epochs, strict=True)
    )
    return msgspec.structs.replace(one, record=msgspec.structs.replace(one.record, epochs=made))


FINAL = {"final": True, "weights": {"a": 1.0, "b": 0.0}, "coverage": 0.0, "signal_id": "s"}
APART = {
    "one is missing": (({}, {}), "epoch 2 is missing"),
    "another time": (({}, {"effective_ms": 1_001}, {}), "epoch 1 is another than the one known"),
    "another coverage": (({}, {}, {"coverage": 0.5}, {}), "epoch 2 is another than the one known"),
    "another signal": (({"signal_id": "s"}, {}, {}, {}), "epoch 0 is another than the one known"),
    "no longer final": (({}, {}, FINAL, {}), "epoch 2 is another than the one known"),
}


@pytest.mark.parametrize("case", APART)
def test_epochs_are_only_ever_added(case: str) -> None:
    epochs, rule = APART[case]
    registry = Registry([with_epochs(0, 100, {}, {}, {})])
    (refused,) = registry.add([with_epochs(1, 200, *epochs)])
    assert refused.rule == f"weight epochs of version 1 are only ever added: {rule}"
    assert [len(interval.epochs) for interval in registry.slots[0].intervals] == [3]
    # The writer that came second derives again from what stands.
    assert registry.add([with_epochs(2, 300, {}, {}, {}, {"coverage": 0.5})]) == []
    assert registry.add([with_epochs(3, 400, {}, {}, {}, {"coverage": 0.5})]) == []
    newest = registry.newest("exp", 1)
    assert newest is not None
    assert [epoch.coverage for epoch in newest.epochs] == [1.0, 1.0, 1.0, 0.5]


def test_of_two_writers_at_once_the_first_on_the_topic_wins() -> None:
    second = with_epochs(2, 150, {}, {"coverage": 0.25})
    entries = [with_epochs(0, 100, {}), with_epochs(1, 150, {}, {"coverage": 0.5}), second]
    registry = Registry()
    assert [refused.entry for refused in registry.add(reversed(entries))] == [second]
    assert registry.slots[0].epochs[1].coverage == 0.5


def test_who_archives_need_not_know_the_newest_epoch() -> None:
    registry = Registry([with_epochs(0, 100, {}, {}, {})])
    ended = with_epochs(1, 200, {}, {}, status=Status.ARCHIVED)
    assert registry.add([ended]) == []
    assert version_at(registry, 200) == INACTIVE
    newest = registry.newest("exp", 1)
    assert newest is not None
    assert (newest.status, len(newest.epochs)) == (Status.ARCHIVED, 3)
    assert len(registry.slots[0].epochs) == 3
    other = with_epochs(2, 300, {}, {"effective_ms": 7}, status=Status.ARCHIVED)
    assert [refused.entry for refused in registry.add([other])] == [other]


@pytest.mark.parametrize(
    ("time_ms", "named", "epoch"),
    [
        *[(1_999, None, 1), (2_000, None, None), (2_999, None, None), (3_000, None, 3)],
        *[(2_500, 1, 1), (500, 2, None), (5_000, 2, None), (500, 3, 3)],
    ],
)
def test_an_exposure_of_a_final_epoch_is_inactive(time_ms: int, named: int | None, epoch: int | None) -> None:
    registry = Registry([with_epochs(0, 100, {}, {}, FINAL, {})])
    one = exposure(time=time_ms, weight_epoch=named)
    assert registry.route_exposure(one, 200) == ((INACTIVE, 0, 0, 0) if epoch is None else (0, 0, epoch, 0))
    # What is not of the experiment is refused first, and rewards go on.
    with pytest.raises(RecordRejected) as refused:
        registry.route_exposure(exposure(time=time_ms, weight_epoch=named, arm="zz"), 200)
    assert refused.value.reason is Reason.UNKNOWN_ARM
    assert registry.route_reward(reward(), 200) == registry.events["order"]


def test_an_arm_must_be_one_of_the_spec_in_force() -> None:
    registry = Registry([entry(0, 100, spec())])
    assert registry.route_exposure(exposure(arm="b"), 100)[:2] == (0, 1)
    assert registry.route_exposure(exposure(arm="nobody"), 99)[0] == UNKNOWN
    with pytest.raises(RecordRejected) as refused:
        registry.route_exposure(exposure(arm="nobody"), 100)
    assert refused.value.reason is Reason.UNKNOWN_ARM


def test_a_reward_is_refused_only_if_every_listener_refuses_it() -> None:
    wide = spec(experiment="wide")
    wide = msgspec.structs.replace(wide, metrics=(msgspec.structs.replace(wide.metrics[0], bound=100),))
    registry = Registry([entry(0, 100, spec()), entry(1, 200, wide)])
    assert registry.route_reward(reward(value=50.0), 200) == registry.events["order"]
    for log_ms, fields in ((150, {}), (200, {"experiment": "exp"}), (200, {"value": 101.0})):
        with pytest.raises(RecordRejected) as refused:
            registry.route_reward(reward(**{"value": 50.0, **fields}), log_ms)
        assert refused.value.reason is Reason.VALUE_OUT_OF_RANGE
    assert registry.route_reward(reward(value=50.0), 50) == NO_EVENT
    assert registry.route_reward(reward(experiment="nobody"), 200) == UNKNOWN - 10


LATENCY = {
    "key": "wait",
    "kind": "latency",
    "role": "primary",
    "direction": "decrease",
    "attribution_window": "1s",
    "event": "order",
    "scale": 1.0,
    "bound": 50.0,
}
RATIO = {
    **LATENCY,
    "key": "ratio",
    "kind": "ratio",
    "event": "visit",
    "bound": 5.0,
    "denominator": {"event": "order", "bound": 20.0},
}


def routed(registry: Registry, value: float, metric: str = "order") -> bool:
    """Whether a reward is routed by the engine's short cut and by the long way alike; False: both refuse it."""
    block = Block(
        "rewards",
        0,
        0,
        1,
        [0],
        [2_000],
        [b"u"],
        [msgspec.json.encode({"id": "1", "time": 1_500, "unit": "u", "metric": metric, "value": value})],
        [()],
    )
    columns, letters = reward_columns(block, registry, floor_ms=0, limits=Limits())
    try:
        code = registry.route_reward(reward(metric=metric, value=value), 2_000)
    except RecordRejected:
        assert [letter.reason for letter in letters] == [Reason.VALUE_OUT_OF_RANGE]
        return False
    assert (letters, columns.event.tolist()) == ([], [code])
    return True


def test_a_latency_alone_refuses_negative_values() -> None:
    registry = Registry([entry(0, 100, spec(metrics=[LATENCY]))])
    assert [routed(registry, value) for value in (-1e-9, -0.0, 0.0, 50.5, 50.6)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_a_negative_value_is_for_those_that_take_it() -> None:
    other = spec(experiment="other")
    registry = Registry([entry(0, 100, spec(metrics=[LATENCY])), entry(1, 100, other)])
    assert [routed(registry, value) for value in (-1.0, -11.0, 11.0, 51.0)] == [True, False, True, False]


def test_a_ratio_listens_with_two_streams() -> None:
    registry = Registry([entry(0, 100, spec(metrics=[LATENCY, RATIO]))])
    heard = {
        event: [(one.at, one.stream.metric.key) for one in registry.all_listeners(event)]
        for event in registry.events
    }
    assert heard == {"order": [(0, "wait"), (2, "ratio")], "visit": [(1, "ratio")]}
    assert [routed(registry, value) for value in (-20.4, -20.6, 20.6, 50.6)] == [True, False, True, False]
    assert [routed(registry, value, "visit") for value in (-5.4, 5.6)] == [True, False]


def test_a_count_refuses_nothing() -> None:
    count = {**LATENCY, "kind": "count", "scale": None, "bound": None}
    registry = Registry([entry(0, 100, spec(metrics=[count]))])
    assert all(routed(registry, value) for value in (0.0, -1.0, 1e300))


@pytest.mark.parametrize(
    ("given", "steps"), [(1.0, 2), (0.75, 2), (None, -6), (1e308, 40), (-1e308, -40), (20.1, 40), (-0.0, 0)]
)
def test_covariates_become_whole_steps_where_they_are_used(given: float | None, steps: int) -> None:
    adjusted = spec().metrics[0]
    adjusted = msgspec.structs.replace(adjusted, adjustment=Adjustment.CUPED)
    covariate = Covariate(scale=0.5, bound=20.0, missing=-3.1)
    using = msgspec.structs.replace(spec(), metrics=(adjusted,), covariate=covariate)
    plain = msgspec.structs.replace(spec(experiment="plain"), covariate=covariate)
    registry = Registry([entry(0, 100, using), entry(1, 100, plain)])
    events = [
        {"id": name, "time": 1_500, "experiment": name, "unit": "u", "arm": "a"}
        for name in ("exp", "plain", "?")
    ]
    for event in events:
        event["covariate"] = given
    values = [*map(msgspec.json.encode, events), b"{"]
    block = Block("exposures", 0, 0, 4, [0, 1, 2, 3], [2_000] * 4, [b"u"] * 4, values, [()] * 4)
    columns, _ = exposure_columns(block, registry, floor_ms=0, limits=Limits())
    assert columns.covariate.tolist() == [steps, 0, 0, 0]


def test_segments_that_are_not_registered_are_other() -> None:
    registry = Registry([entry(0, 100, spec(segments={"device": ["ios", "web"], "plan": ["free"]}))])
    (slot,) = registry.slots
    assert slot.segments.labels == ["", "device=ios", "device=web", "device=other", "plan=free", "plan=other"]
    codes = {
        slot.segments.code({"device": device, "plan": plan})
        for device in ("ios", "web", "x")
        for plan in ("free", "")
    }
    assert codes == set(range(6))
    assert slot.segments.code({}) == slot.segments.code({"device": "tv", "plan": "paid", "age": "9"})


SPANS = {
    "one epoch": [{}],
    "several": [{}, {}, {}, {}],
    "a final one": [{}, {}, FINAL],
    "a way back": [{}, FINAL, {}],
    "the first one final": [FINAL, {}],
    "two at once": [{}, {"effective_ms": 2_000}, {}, {}],
    "one that begins before the one it follows": [{}, {}, {"effective_ms": 9_500}, {"effective_ms": 1_450}],
    "none at 0": [{"effective_ms": 1_200}, {"effective_ms": 1_400}],
}


@pytest.mark.parametrize(
    "segments", [{}, {"device": ["tv", "web"], "plan": ["free"]}], ids=["plain", "segments"]
)
@pytest.mark.parametrize("case", SPANS)
def test_a_block_is_routed_as_each_of_its_exposures_is(case: str, segments: dict[str, Any]) -> None:
    """The router of a block remembers what the registry says; it must say the same of everything."""
    design = spec(segments=segments)
    epochs = SPANS[case]
    first = with_epochs(0, 100, *epochs)
    assert first.record is not None
    record = msgspec.structs.replace(first.record, spec=design, design_hash=design.design_hash())
    last = record.epochs[-1]
    added = msgspec.structs.replace(
        last, epoch=len(epochs), effective_ms=last.effective_ms + 700, final=False
    )
    longer = msgspec.structs.replace(record, epochs=(*record.epochs, added))
    registry = Registry(
        [
            msgspec.structs.replace(first, record=record),
            Entry(offset=1, experiment="exp", in_force_ms=50_000, record=longer),
            Entry(offset=2, experiment="exp", in_force_ms=70_000, record=None),
        ]
    )
    events = [
        exposure(time=time_ms, arm=arm, weight_epoch=named, segments=of_unit)
        for time_ms in (0, 999, 1_000, 1_199, 1_200, 1_450, 1_500, 2_000, 2_499, 2_500, 3_000, 9_000)
        for arm in ("a", "b", "zz")
        for named in (None, 0, 1, 3, 4, 9)
        for of_unit in ({}, {"device": "web"}, {"device": "x", "plan": "free"})
    ]
    stamps = [at for at in (50, 100, 40_000, 60_000, 80_000) for _ in events]
    values = [msgspec.json.encode(event) for event in events] * 5
    keys = [b"u"] * len(values)
    block = Block(
        "exposures", 0, 0, len(values), range(len(values)), stamps, keys, values, [()] * len(values)
    )
    columns, letters = exposure_columns(block, registry, floor_ms=0, limits=Limits())
    refused = {letter.offset: letter.reason for letter in letters}
    for at, (event, log_ms) in enumerate(zip(events * 5, stamps, strict=True)):
        found = tuple(int(getattr(columns, name)[at]) for name in ("slot", "arm", "epoch", "segment"))
        if found[0] == DEAD:
            with pytest.raises(RecordRejected) as rejection:
                registry.route_exposure(event, log_ms)
            assert refused.pop(at) is rejection.value.reason
        else:
            assert found == registry.route_exposure(event, log_ms)
    assert refused == {}
