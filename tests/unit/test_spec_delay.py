"""The section `allocation.delay`: its faults with their lines, its buckets, and that their rows find room."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.ages import Bucket
from stream_xp.domain.buckets import kept_buckets
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.spec_file import parse_spec
from tests.unit import bucket_world

FILE = (
    bucket_world.FILE
    + """\
allocation:
  policy: thompson
  metric: click
"""
)
AGES = "  delay:\n    ages: [1h, 6h]\n"


def spec(delay: str = AGES) -> ExperimentSpec:
    return parse_spec((FILE + delay).encode(), "f")


def test_each_age_holds_the_one_before_and_stands_beside_it() -> None:
    hour = 3_600_000
    spans = [Bucket(1, 0, hour, "@by"), Bucket(2, 0, 6 * hour, "@by"), Bucket(3, 0, 24 * hour, "@by")]
    kept = kept_buckets(spec())
    assert [one.bucket for one in kept] == spans
    assert [one.beside for one in kept] == [None, *spans[:2]]
    assert [one.name for one in kept] == ["click@by1", "click@by2", "click@by3"]


def test_buckets_of_age_come_first() -> None:
    made = spec(AGES + "ages: {metrics: [click, spend], until: [1d, 2d]}\n")
    assert [(one.name, one.beside and one.beside.number) for one in kept_buckets(made)] == [
        ("click@age1", None),
        ("click@age2", 1),
        ("spend@age1", None),
        ("spend@age2", 1),
        ("click@by1", None),
        ("click@by2", 1),
        ("click@by3", 2),
    ]


GROWING = "must be longer than the one before, the first longer than 0"


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        ("  delay: {ages: [6h, 1h]}\n", [f"15: allocation.delay.ages[1]: {GROWING}"]),
        ("  delay: {ages: [0h, 1h]}\n", [f"15: allocation.delay.ages[0]: {GROWING}"]),
        (
            "  delay: {ages: [6h, 24h]}\n",
            ["15: allocation.delay.ages[1]: must be shorter than the attribution window of the metric"],
        ),
        (
            "  delay:\n    ages: [1h, 6h]\n    shares: [0.4]\n",
            ["17: allocation.delay.shares: must be as many as ages, 2, found 1"],
        ),
        (
            "  delay:\n    ages: [1h, 6h]\n    shares: [0.4, 0.3]\n",
            ["17: allocation.delay.shares[1]: must not be below the one before"],
        ),
        ("  delay: {ages: []}\n", ["15: allocation.delay.ages: has 0 entries, needs at least 1"]),
    ],
)
def test_each_fault_is_named_with_its_line(delay: str, expected: list[str]) -> None:
    assert bucket_world.faults(FILE + delay) == expected


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("thompson", "fixed", "only where weights follow the evidence, fixed ones do not"),
        (
            "metric: click",
            "metric: spend",
            "needs a metric that folds by any: what an open unit will still bring is learned of 0 and 1 alone",
        ),
    ],
)
def test_only_weights_that_follow_a_conversion_have_it(old: str, new: str, rule: str) -> None:
    assert bucket_world.faults(FILE.replace(old, new) + AGES) == [f"15: allocation.delay: {rule}"]


def test_the_section_is_part_of_the_design_and_its_absence_is_none() -> None:
    plain, one = spec(""), spec()
    assert plain.allocation is not None
    assert len({plain.design_hash(), one.design_hash(), spec("  delay: {ages: [1h]}\n").design_hash()}) == 3
    held = msgspec.structs.replace(plain.allocation, delay=None)
    assert msgspec.structs.replace(plain, allocation=held).design_hash() == plain.design_hash()


def test_the_rows_find_room_in_a_record_and_are_of_the_spec() -> None:
    bucket_world.assert_room(spec(), spec(""), products=("click@by2", "click@by3"), largest=1)
