from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.stats._codec import pack
from stream_xp.stats.arm_counts import ArmCounts

ROW = st.tuples(*[st.integers(0, 10**20)] * 3)
SHARE = st.tuples(*[st.integers(0, 4)] * 3)
UNITS = st.dictionaries(st.integers(0, 5), ROW, max_size=4).map(lambda rows: ArmCounts.from_epochs(3, rows))


@st.composite
def successes(draw):
    rows = draw(st.dictionaries(st.integers(0, 5), st.tuples(ROW, SHARE), max_size=4))
    units = {epoch: row for epoch, (row, _) in rows.items()}
    wins = {
        epoch: tuple(n * k // 4 for n, k in zip(row, share, strict=True))
        for epoch, (row, share) in rows.items()
    }
    return ArmCounts.from_epochs(3, units, successes=wins)


BOTH = successes()
PLAIN = ArmCounts.from_epochs(2, {3: (5, 7), 1: (2, 0)}, successes={3: (1, 7)})


@given(UNITS, UNITS, UNITS)
def test_merging_is_a_commutative_monoid(a, b, c):
    assert a.merge(b) == b.merge(a) == a + b
    assert (a + b) + c == a + (b + c)
    assert a + ArmCounts.empty(3) == a


@given(BOTH, BOTH)
def test_successes_merge_with_their_units(a, b):
    merged = a + b
    assert merged == b + a
    assert a + ArmCounts.empty(3, with_successes=True) == a
    every = range(6)
    assert merged.units == (a + b).units
    for epoch in every:
        for table in ("units", "successes"):
            assert _row(merged, table, epoch) == tuple(
                x + y for x, y in zip(_row(a, table, epoch), _row(b, table, epoch), strict=True)
            )


def _row(counts, table, epoch):
    rows = dict(zip(counts.epochs, getattr(counts, table), strict=True))
    return rows.get(epoch, (0, 0, 0))


@given(BOTH, BOTH)
def test_units_can_be_taken_back_out(a, b):
    assert (a + b) - b == a
    assert (a - a) == ArmCounts.empty(3, with_successes=True)


@given(st.one_of(UNITS, BOTH))
def test_both_written_forms_round_trip(counts):
    assert ArmCounts.from_bytes(counts.to_bytes()) == counts
    assert ArmCounts.from_json(counts.to_json()) == counts


def test_the_written_forms_are_canonical():
    split = ArmCounts.from_epochs(2, {1: (2, 0)}, successes={}) + ArmCounts.from_epochs(
        2, {3: (5, 7), 4: (0, 0)}, successes={3: (1, 7)}
    )
    assert split == PLAIN
    assert split.to_bytes() == PLAIN.to_bytes()
    assert PLAIN.to_json() == {
        "version": 1,
        "arms": "2",
        "epochs": ["1", "3"],
        "units": [["2", "0"], ["5", "7"]],
        "successes": [["0", "0"], ["1", "7"]],
    }
    assert "successes" not in ArmCounts.empty(2).to_json()
    assert ArmCounts.empty(2).to_bytes() != ArmCounts.empty(2, with_successes=True).to_bytes()


def test_tables_follow_the_epochs_asked_for():
    assert PLAIN.unit_table().tolist() == [[2, 0], [5, 7]]
    assert PLAIN.unit_table([3, 2, 1]).tolist() == [[5, 7], [0, 0], [2, 0]]
    assert PLAIN.success_table([0, 1, 3]).tolist() == [[0, 0], [0, 0], [1, 7]]
    assert ArmCounts.empty(3).unit_table().shape == (0, 3)
    assert PLAIN.unit_table().dtype == np.int64


def reframed(*integers):
    return lambda: ArmCounts.from_bytes(pack("ACNT", 1, integers))


def from_json(**changes):
    return lambda: ArmCounts.from_json({**PLAIN.to_json(), **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ArmCounts.empty(0), "arms must be at least 1"),
        (lambda: ArmCounts.empty(True), "arms must be Python ints"),
        (lambda: ArmCounts(1, (2, 1), ((1,), (1,))), "epochs must be increasing"),
        (lambda: ArmCounts(1, (-1,), ((1,),)), "epochs must be at least 0"),
        (lambda: ArmCounts(1, (1,), ((0,),)), "units must have a unit in every epoch"),
        (lambda: ArmCounts(1, (1,), ()), "units must have a row per epoch"),
        (lambda: ArmCounts(2, (1,), ((1,),)), "units must have a row per epoch and a count per arm"),
        (lambda: ArmCounts(1, (1,), ((-1,),)), "units must be at least 0"),
        (lambda: ArmCounts(1, (1,), ((1.0,),)), "units must be Python ints"),
        (lambda: ArmCounts(1, (1,), ((1,),), ((2,),)), "successes must not exceed units"),
        (lambda: ArmCounts(1, (1,), ((1,),), ()), "successes must have a row per epoch"),
        (lambda: ArmCounts.from_epochs(2, {1: (1,)}), "units must have a row per epoch and a count per arm"),
        (lambda: ArmCounts.from_epochs(1, {1: (1,)}, successes={2: (0,)}), "successes must not have epochs"),
        (lambda: ArmCounts.from_epochs(1, {1: (0,)}, successes={1: (1,)}), "successes must not exceed units"),
        (lambda: ArmCounts.empty(1) + ArmCounts.empty(2), "arms must be equal to merge, got 1 and 2"),
        (lambda: PLAIN + ArmCounts.empty(2), "successes must be counted in both or in neither"),
        (lambda: ArmCounts.from_epochs(1, {1: (1,)}) - ArmCounts.from_epochs(1, {1: (2,)}), "units must be"),
        (lambda: ArmCounts.empty(1).success_table(), "successes must be counted to be listed"),
        (lambda: PLAIN.unit_table([1]), "epochs must list every epoch that has units"),
        (
            lambda: ArmCounts.from_epochs(1, {1: (2**53,)}).unit_table(),
            re.escape("units must be below 2**53"),
        ),
        (lambda: ArmCounts.from_bytes(b"no"), "data must be a whole binary statistic"),
        (reframed(), "data must hold the numbers of epochs and arms"),
        (reframed(1, 2, 0, 1, 5), "data must hold as many counts"),
        (reframed(0, 2, 5), "data must hold as many counts"),
        (reframed(1, 1, 0, 1, 0), "units must have a unit in every epoch"),
        (from_json(version=2), "version must be 1"),
        (from_json(epochs="1"), "epochs must be lists of counts"),
        (from_json(units=[["2", "0"], 5]), "units must be lists of counts"),
        (from_json(units=[["2", "0"], ["x", "7"]]), "units must be an integer"),
        (from_json(arms=3), "units must have a row per epoch and a count per arm"),
    ],
)
def test_bad_counts_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_counts_add_up():
    for operation in ("__add__", "__sub__"):
        assert getattr(PLAIN, operation)(1) is NotImplemented
