"""The oracle: weight epochs and segments."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.experiment import Status
from stream_xp.errors import Reason
from stream_xp.services.oracle.recompute import EXPOSURES, LoggedSpec
from tests.unit.oracle.recompute_world import Case, D, T, moments, published, spec, units


# Epochs and segments
@pytest.mark.parametrize(
    ("time_ms", "named", "epoch"),
    [(T - 1, None, 0), (T, None, 1), (T + 9, None, 1), (T + 10, None, 2), (T + 10, 0, 0), (T - 1, 2, 2)],
)
def test_weight_epoch_by_event_time_unless_named(time_ms: int, named: int | None, epoch: int) -> None:
    case = Case(published(spec(), effective=(T - 5, T, T + 10)))
    case.exposures.add(time_ms, weight_epoch=named)
    assert units(case.run()) == {("a", epoch, ""): 1}


def test_before_every_epoch_the_oldest_counts_and_an_unknown_one_is_refused() -> None:
    case = Case(published(spec(), effective=(T, T + 1)))
    case.exposures.add(T - 1)
    case.exposures.add(T, unit="v", weight_epoch=2)
    done = case.run()
    assert units(done) == {("a", 0, ""): 1}
    assert done.dead_letters == {(EXPOSURES, 1): Reason.UNKNOWN_WEIGHT_EPOCH}


def test_an_epoch_is_known_only_once_its_record_is_in_force() -> None:
    case = Case(published(spec()), published(spec(), at_ms=T, effective=(0, T)))
    case.exposures.add(T + D - 1)
    case.exposures.add(T + D, unit="v")
    case.exposures.add(T + D - 1, unit="w", at=T + D, weight_epoch=1)
    assert units(case.run()) == {("a", 0, ""): 1, ("a", 1, ""): 2}


def with_final(logged: LoggedSpec, final: int) -> LoggedSpec:
    """The record with one of its epochs final."""
    assert logged.record is not None
    epochs = tuple(
        msgspec.structs.replace(one, final=True, weights={"a": 1.0, "b": 0.0}) if one.epoch == final else one
        for one in logged.record.epochs
    )
    return logged._replace(record=msgspec.structs.replace(logged.record, epochs=epochs))


@pytest.mark.parametrize(
    ("time_ms", "named", "epoch"),
    [
        *[(T - 1, None, 0), (T, None, None), (T + 9, None, None), (T + 10, None, 2)],
        *[(T + 1, 0, 0), (T - 1, 1, None), (T + 20, 1, None), (T - 1, 2, 2)],
    ],
)
def test_an_exposure_of_a_final_epoch_is_inactive(time_ms: int, named: int | None, epoch: int | None) -> None:
    case = Case(with_final(published(spec(), effective=(T - 5, T, T + 10)), 1))
    case.exposures.add(time_ms, weight_epoch=named)
    case.rewards.add(time_ms)
    done = case.run()
    assert units(done) == ({} if epoch is None else {("a", epoch, ""): 1})
    assert done.exposure_fates[0] == ("counted" if epoch is not None else "inactive_experiment")
    assert done.reward_fates[0] == ("counted" if epoch is not None else "unattributed")


def test_a_final_epoch_makes_no_crossover_and_leaves_units_their_rewards() -> None:
    case = Case(published(spec()), with_final(published(spec(), at_ms=T, effective=(0, T + D)), 1))
    case.exposures.add(T, arm="b")
    case.exposures.add(T + D + 1, arm="a")
    case.rewards.add(T + D + 2)
    done = case.run()
    assert moments(done) == {("b", 0, ""): (1, 1, 1)}
    assert [done.exposure_fates[at] for at in (0, 1)] == ["counted", "inactive_experiment"]


def test_an_unknown_arm_or_epoch_is_refused_before_it_is_inactive() -> None:
    case = Case(with_final(published(spec(), effective=(0,)), 0))
    case.exposures.add(T, arm="zz")
    case.exposures.add(T, weight_epoch=1)
    assert set(case.run().dead_letters.values()) == {Reason.UNKNOWN_ARM, Reason.UNKNOWN_WEIGHT_EPOCH}


@pytest.mark.parametrize(
    ("effective", "status", "taken"),
    [
        ((0, T, T + 1), Status.ACTIVE, True),
        ((0, T), Status.ACTIVE, True),
        ((0,), Status.ACTIVE, False),
        ((0, T + 1), Status.ACTIVE, False),
        ((0, T + 1, T + 2), Status.ACTIVE, False),
        ((0,), Status.ARCHIVED, True),
        ((0, T, T + 1), Status.ARCHIVED, True),
        ((1,), Status.ARCHIVED, False),
    ],
)
def test_epochs_are_only_ever_added(effective: tuple[int, ...], status: Status, *, taken: bool) -> None:
    second = published(spec(), at_ms=T, status=status, effective=effective)
    third = published(spec(), at_ms=T + 3, effective=(0, T, T + 1))
    case = Case(published(spec(), effective=(0, T)), second, third)
    case.exposures.add(T + D + 2, weight_epoch=len(effective) - 1)
    case.exposures.add(T + D + 4, unit="v", weight_epoch=2)
    done = case.run()
    if taken and status is Status.ARCHIVED:
        assert set(done.exposure_fates.values()) == {"inactive_experiment"}
        return
    known = taken or len(effective) <= 2
    assert done.exposure_fates[0] == ("counted" if known else "dead_lettered")
    assert done.exposure_fates[1] == "counted"


def test_first_exposure_fixes_epoch_and_segments_smallest_offset_among_equals() -> None:
    case = Case(published(spec(segments={"device": ("tv", "phone")}), effective=(0, T)))
    case.exposures.add(T + 1, segments={"device": "tv"})
    case.exposures.add(T - 1, segments={"device": "phone"})
    case.exposures.add(T - 1, segments={"device": "tv"})
    assert units(case.run()) == {("a", 0, ""): 1, ("a", 0, "device=phone"): 1}


def test_segments_that_are_missing_or_not_registered_are_other() -> None:
    case = Case(published(spec(segments={"device": ("tv",), "land": ("de",)})))
    case.exposures.add(T, unit="1", segments={"device": "tv", "land": "de", "colour": "red"})
    case.exposures.add(T, unit="2", segments={"device": "TV"})
    case.exposures.add(T, unit="3", segments={"land": "other", "device": ""})
    done = case.run()
    assert units(done) == {
        ("a", 0, ""): 3,
        ("a", 0, "device=tv"): 1,
        ("a", 0, "device=other"): 2,
        ("a", 0, "land=de"): 1,
        ("a", 0, "land=other"): 2,
    }
    assert {key: n for key, (n, _, _) in moments(done).items()} == units(done)
