"""The section `ages`: its faults with their lines, its buckets, and that their rows find room."""

from __future__ import annotations

import textwrap

import msgspec
import pytest

from stream_xp.domain.ages import Bucket, age_buckets, lengths
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.experiment_rules import record_rules
from stream_xp.services.spec_file import parse_spec
from tests.unit import bucket_world
from tests.unit.spec_file_world import faults_of

FILE = (
    bucket_world.FILE
    + """\
  - {key: top, kind: mean, role: secondary, direction: increase, attribution_window: 1d, bound: 9, aggregation: max}
  - {key: visits, kind: count, role: secondary, direction: increase, attribution_window: 1d}
  - {key: views, kind: count, role: secondary, direction: increase, attribution_window: 1d, aggregation: sum}
"""
)


def file(ages: str) -> bytes:
    return (FILE + "ages:\n" + textwrap.indent(textwrap.dedent(ages), "  ")).encode()


def spec(ages: str) -> ExperimentSpec:
    return parse_spec(file(ages), "f")


def test_buckets_begin_at_first_exposure_and_follow_each_other() -> None:
    made = spec("metrics: [spend, click]\nuntil: [1d, 3d, 4d]\n")
    day = 86_400_000
    buckets = (Bucket(1, 0, day), Bucket(2, day, 3 * day), Bucket(3, 3 * day, 4 * day))
    assert [(metric.key, bucket) for metric, bucket in age_buckets(made)] == [
        (key, bucket) for key in ("spend", "click") for bucket in buckets
    ]
    assert made.longest_window_ms == 4 * day
    assert buckets[1].name("spend") == "spend@age2"


def test_lengths_are_in_the_largest_unit_that_divides_both() -> None:
    assert lengths(Bucket(1, 0, 86_400_000), Bucket(3, 0, 7 * 86_400_000)) == (1, 7, 86_400_000)
    assert lengths(Bucket(1, 0, 400), Bucket(2, 400, 1000)) == (2, 3, 200)


@pytest.mark.parametrize(
    ("ages", "expected"),
    [
        ("metrics: [nobody]\nuntil: [1d, 2d]\n", ["16: ages.metrics[0]: is no metric of the experiment"]),
        ("metrics: [spend, spend]\nuntil: [1d, 2d]\n", ["16: ages.metrics[1]: is named twice"]),
        (
            "metrics: [top, visits]\nuntil: [1d, 2d]\n",
            [
                f"16: ages.metrics[{at}]: must be a conversion, a mean that folds by sum or any, or a count that "
                "folds by sum"
                for at in (0, 1)
            ],
        ),
        (
            "metrics: [views, click]\nuntil: [1d, 7d]\n",
            [
                (
                    "16: ages.metrics[1]: folds by any, so the first and the last bucket must be equally long to be "
                    "compared"
                )
            ],
        ),
        (
            "metrics: [spend]\nuntil:\n  - 2d\n  - 48h\n  - 3d\n",
            ["19: ages.until[1]: must be longer than the one before, the first longer than 0"],
        ),
        (
            "metrics: [spend]\nuntil: [0d, 1d]\n",
            ["17: ages.until[0]: must be longer than the one before, the first longer than 0"],
        ),
        (
            "metrics: [spend]\nuntil: [1ms, 1d]\n",
            [
                (
                    "17: ages.until: first and last bucket may be 10000 times as long as a length that divides both, "
                    "they are 86399999"
                )
            ],
        ),
        ("metrics: [spend]\nuntil: [1d]\n", ["17: ages.until: has 1 entries, needs at least 2"]),
        ("metrics: []\nuntil: [1d, 2d]\n", ["16: ages.metrics: has 0 entries, needs at least 1"]),
        ("metrics: [spend]\nend: [1d, 2d]\n", None),
    ],
)
def test_each_fault_is_named_with_its_line(ages: str, expected: list[str] | None) -> None:
    found = bucket_world.faults(file(ages))
    assert found == expected if expected is not None else any("unknown field" in one for one in found)


def test_a_metric_that_cannot_be_read_hides_no_fault_of_its_own() -> None:
    raw = file("metrics: [spend]\nuntil: [1d, 2d]\n").replace(
        b"key: spend, kind: mean", b"key: spend, kind: men"
    )
    assert [one.line for one in faults_of(raw)] == [11]


def test_a_record_on_a_topic_is_held_to_the_same_rules() -> None:
    good = spec("metrics: [spend]\nuntil: [1d, 2d]\n")
    assert good.ages is not None
    bad = msgspec.structs.replace(good, ages=msgspec.structs.replace(good.ages, metrics=("visits",)))
    for made, wrong in ((good, 0), (bad, 1)):
        epochs = (WeightEpoch(epoch=0, weights=made.weights, effective_ms=0),)
        record = ExperimentRecord(spec=made, epochs=epochs, design_hash=made.design_hash())
        assert len(record_rules(record, "e")) == wrong


def test_the_section_is_part_of_the_design_and_its_absence_is_none() -> None:
    plain = parse_spec(FILE.encode(), "f")
    hashes = {
        one.design_hash()
        for one in (
            plain,
            spec("metrics: [spend]\nuntil: [1d, 2d]\n"),
            spec("metrics: [spend]\nuntil: [1d, 3d]\n"),
        )
    }
    assert len(hashes) == 3
    assert msgspec.structs.replace(plain, ages=None).design_hash() == plain.design_hash()


def test_the_rows_of_all_buckets_find_room_in_a_record_and_are_of_the_spec() -> None:
    made = spec("metrics: [spend, click, views]\nuntil: [1d, 2d, 3d]\n")
    plain = msgspec.structs.replace(made, ages=None)
    products = ("spend@age3", "click@age3", "views@age3")
    bucket_world.assert_room(made, plain, products=products, largest=10**4)
