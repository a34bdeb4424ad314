"""Statistics of partitions add up, in any order and grouping, to one canonical form."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
from hypothesis import given

from stream_xp.domain.statistics import ArmUnits, ExperimentStatistics, build, merge

ARMS = st.sampled_from(["a", "b"])
EPOCHS = st.integers(0, 1)
SEGMENTS = st.sampled_from(["", "device=tv"])
COUNTS = st.integers(0, 2**62)
SUMS = st.integers(-(2**126), 2**126)


def tables(cell: st.SearchStrategy, *metrics: str) -> st.SearchStrategy:
    return st.dictionaries(st.tuples(st.sampled_from(metrics), ARMS, EPOCHS, SEGMENTS), cell, max_size=6)


@st.composite
def statistics(draw: st.DrawFn) -> ExperimentStatistics:
    moments = draw(tables(st.tuples(st.integers(1, 9), SUMS, SUMS), "spend", "ratio"))
    units = draw(st.dictionaries(st.tuples(ARMS, EPOCHS, SEGMENTS), COUNTS, max_size=4))
    return build(
        units=units,
        settled={key: draw(st.integers(0, count)) for key, count in units.items()},
        moments=moments,
        products={key: draw(st.tuples(SUMS, SUMS, SUMS)) for key in moments if key[0] == "ratio"},
        events=draw(tables(st.integers(0, 9).map(lambda n: (n, 2 * n)), "errors")),
        histograms=draw(tables(st.dictionaries(st.integers(0, 1183), COUNTS, max_size=5), "wait")),
        crossover_units=draw(COUNTS),
        first_exposure_ms=draw(st.none() | st.integers(0, 2**40)),
        out_of_range=draw(st.dictionaries(st.sampled_from(["spend", "wait"]), COUNTS, max_size=2)),
        over_limit=draw(COUNTS),
    )


@given(statistics(), statistics(), statistics())
def test_merging_is_a_commutative_monoid(one, two, three) -> None:
    whole = merge([one, two, three])
    assert merge([three, one, two]).canonical() == whole.canonical()
    assert merge([merge([one, two]), three]).canonical() == whole.canonical()
    assert merge([one, merge([two, three])]).canonical() == whole.canonical()
    assert merge([one]) == merge([ExperimentStatistics(), one]) == one
    assert merge([]) == ExperimentStatistics()


@given(statistics())
def test_the_wire_keeps_everything(one) -> None:
    again = msgspec.json.decode(one.canonical(), type=ExperimentStatistics)
    assert again == one
    assert again.digest() == one.digest()


def test_units_of_a_worker_that_says_nothing_of_settled_ones_prove_nothing() -> None:
    older = msgspec.json.decode(b'{"units":[["a",0,"",7]]}', type=ExperimentStatistics)
    assert older.units == (ArmUnits("a", 0, "", 7, 0),)
    newer = build(
        units={("a", 0, ""): 7}, moments={}, crossover_units=0, first_exposure_ms=None, out_of_range={}
    )
    assert newer.units == (ArmUnits("a", 0, "", 7, 7),)
    assert merge([older, newer]).units == (ArmUnits("a", 0, "", 14, 7),)


def test_rows_are_sorted_and_rows_of_zeros_are_left_out() -> None:
    def key(metric: str, arm: str = "a") -> tuple[str, str, int, str]:
        return (metric, arm, 0, "")

    found = build(
        units={("b", 0, ""): 3, ("a", 0, ""): 0, ("c", 0, ""): 1},
        settled={("b", 0, ""): 2, ("a", 0, ""): 0},
        moments={key("r", "b"): (2, 0, 0), key("r"): (1, 3, 9), key("s"): (0, 0, 0)},
        products={key("r"): (0, 0, 0), key("r", "b"): (1, 1, 0), key("s"): (7, 7, 7), key("t"): (1, 1, 1)},
        events={key("e", "b"): (1, 2), key("e"): (0, 0)},
        histograms={key("h"): {70: 1, 3: 2, 5: 0}, key("h", "b"): {1: 0}, key("g"): {}},
        crossover_units=0,
        first_exposure_ms=None,
        out_of_range={"s": 0, "r": 1},
    )
    assert msgspec.json.decode(found.canonical()) == {
        "units": [["b", 0, "", 3, 2], ["c", 0, "", 1, 0]],
        "moments": [["r", "a", 0, "", 1, "3", "9"], ["r", "b", 0, "", 2, "0", "0"]],
        "products": [["r", "a", 0, "", "0", "0", "0"], ["r", "b", 0, "", "1", "1", "0"]],
        "events": [["e", "b", 0, "", 1, 2]],
        "histograms": [["h", "a", 0, "", [[3, 2], [70, 1]]]],
        "crossover_units": 0,
        "first_exposure_ms": None,
        "out_of_range": {"r": 1},
        "over_limit": 0,
    }
