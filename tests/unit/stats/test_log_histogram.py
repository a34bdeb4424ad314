from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats._codec import pack
from stream_xp.stats.log_histogram import LogHistogram, bin_of, bins_needed, lower_edge

STEPS = st.one_of(st.integers(0, 200), st.integers(0, 2**40), st.integers(0, 2**62 - 1))
VALUES = st.lists(STEPS, max_size=40)


def edges_by_octaves(count):
    """The edges written out: 0..31, then 32 equal bins for every octave."""
    edges, width, at = list(range(32)), 1, 32
    while len(edges) < count:
        edges += [at + i * width for i in range(32)]
        at, width = 2 * at, 2 * width
    return edges[:count]


def test_edges_are_those_written_out():
    written = edges_by_octaves(1857)
    assert [lower_edge(b) for b in range(1857)] == written
    assert lower_edge(np.arange(1857)).tolist() == written
    assert written[-1] == 2**62


@settings(deadline=None)
@given(STEPS)
def test_a_value_lies_in_its_bin(value):
    found = bin_of(value)
    assert lower_edge(found) <= value < lower_edge(found + 1)
    assert bins_needed(value) == found + 1
    assert bin_of(np.array([[value]])).tolist() == [[found]]


@settings(deadline=None)
@given(st.integers(64, 2**62 - 1))
def test_a_bin_is_narrow(value):
    found = bin_of(value)
    assert 32 * (lower_edge(found + 1) - lower_edge(found)) <= lower_edge(found)


def test_small_values_have_a_bin_of_their_own():
    assert [bin_of(v) for v in range(66)] == [*range(65), 64]
    assert (bin_of(2**40), bins_needed(2**40)) == (1152, 1153)


@settings(deadline=None)
@given(VALUES, VALUES, VALUES)
def test_merging_is_exact_associative_and_commutative(a, b, c):
    x, y, z = (LogHistogram.from_values(v) for v in (a, b, c))
    assert (x + y) + z == x + (y + z) == z.merge(y).merge(x) == LogHistogram.from_values(a + b + c)
    assert x + LogHistogram.empty() == x
    assert (x + y) - y == x
    assert x.n == len(a)


@settings(deadline=None)
@given(VALUES, st.integers(0, 1855))
def test_counts_are_exact_at_the_edges(values, at):
    histogram = LogHistogram.from_values(values)
    assert histogram.count_below(at) == sum(v < lower_edge(at) for v in values)
    assert histogram.dense(1856)[:at].sum() == histogram.count_below(at)


@settings(deadline=None)
@given(VALUES)
def test_written_forms_round_trip(values):
    histogram = LogHistogram.from_values(values)
    assert LogHistogram.from_bytes(histogram.to_bytes()) == histogram
    assert LogHistogram.from_json(histogram.to_json()) == histogram


def test_order_leaves_no_trace():
    values = [5, 70, 5, 2**40, 71, 0]
    assert LogHistogram.from_values(values).to_bytes() == LogHistogram.from_values(values[::-1]).to_bytes()
    assert LogHistogram.from_counts({3: 0, 1: 2}).bins == ((1, 2),)


def test_edges_and_counts():
    edges, counts = LogHistogram.from_values([64, 65, 70]).edges_and_counts(0.5)
    assert edges.tolist() == [32.0, 33.0, 34.0, 35.0, 36.0]
    assert counts.tolist() == [2, 0, 0, 1]
    edges, counts = LogHistogram.empty().edges_and_counts(2.0)
    assert (edges.tolist(), counts.tolist()) == ([0.0, 2.0], [0])


def test_counts_of_any_size():
    big = LogHistogram.from_counts({7: 10**30})
    assert LogHistogram.from_json(big.to_json()) == big == LogHistogram.from_bytes(big.to_bytes())
    assert (big + big).n == 2 * 10**30


def test_counts_agree_with_a_plain_count():
    rng = np.random.default_rng(4)
    values = rng.integers(0, 2**40, 2000)
    plain = Counter(bin_of(values).tolist())
    assert dict(LogHistogram.from_values(values.tolist()).bins) == plain


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bin_of(-1), "steps must not be negative"),
        (lambda: bin_of(2**62), "steps must not be negative and must be below"),
        (lambda: bin_of(1.5), "steps must be an integer"),
        (lambda: bin_of(np.array([1, -1])), "steps must not be negative"),
        (lambda: lower_edge(1857), "bin_ must not be negative and must be below 1857"),
        (lambda: lower_edge(np.array([0.5])), "bin_ must be an integer"),
        (lambda: bins_needed(2.0), "max_steps must be a Python int"),
        (lambda: bins_needed(-1), "max_steps must not be negative"),
        (lambda: LogHistogram(((1, 1, 1),)), "bins must be pairs"),
        (lambda: LogHistogram(((1, 1.0),)), "bins must be pairs of Python ints"),
        (lambda: LogHistogram(((2, 1), (1, 1))), "bins must ascend"),
        (lambda: LogHistogram(((1856, 1),)), "bins must ascend"),
        (lambda: LogHistogram(((1, 0),)), "bins must have counts above 0"),
        (lambda: LogHistogram.from_counts({1: -1}), "bins must have counts above 0"),
        (lambda: LogHistogram.from_values([1.0]), "values must be Python ints"),
        (lambda: LogHistogram.empty() - LogHistogram.from_values([1]), "other must be part of this"),
        (lambda: LogHistogram.from_values([9]).dense(9), "bins must be more than 9"),
        (lambda: LogHistogram.from_counts({1: 2**53}).dense(2), r"bins must hold fewer than 2\*\*53"),
        (lambda: LogHistogram.empty().edges_and_counts(0.0), "scale must lie between"),
        (lambda: LogHistogram.from_json({"version": 2}), "version must be 1"),
        (lambda: LogHistogram.from_json({"version": 1, "bins": [1]}), "bins must be a list of pairs"),
        (lambda: LogHistogram.from_json({"version": 1, "bins": [["1", "x"]]}), "count must be an integer"),
        (lambda: LogHistogram.from_bytes(b"1234567890"), "data must be a whole binary statistic"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_odd_number_of_integers_is_refused():
    with pytest.raises(ValueError, match="data must hold pairs"):
        LogHistogram.from_bytes(pack("LHST", 1, [1, 2, 3]))


def test_other_types_are_not_merged():
    with pytest.raises(TypeError):
        _ = LogHistogram.empty() + 1
    with pytest.raises(TypeError):
        _ = LogHistogram.empty() - 1
