"""The oracle names the first value that differs."""

from __future__ import annotations

import pytest

from stream_xp.domain.statistics import ExperimentStatistics, Outcomes, build
from stream_xp.services.oracle.compare import Mismatch, first_mismatch, outcome_mismatch

TABLES = {
    "units": {("a", 0, ""): 2, ("b", 0, ""): 3},
    "moments": {("click", "a", 0, ""): (2, 1, 1), ("click", "b", 0, ""): (3, 2, 2)},
    "products": {("click", "a", 0, ""): (5, 25, 7), ("click", "b", 0, ""): (0, 0, 0)},
    "events": {("errors", "a", 0, ""): (1, 2)},
    "histograms": {("wait", "a", 0, ""): {3: 1, 70: 2}},
    "crossover_units": 1,
    "first_exposure_ms": 5,
    "out_of_range": {"spend": 1},
}


def statistics(**changes: object) -> ExperimentStatistics:
    return build(**{**TABLES, **changes})


def test_equal_statistics_have_no_mismatch() -> None:
    assert first_mismatch(statistics(), statistics()) is None


@pytest.mark.parametrize(
    ("changes", "mismatch"),
    [
        ({"units": {("a", 0, ""): 2}}, Mismatch("units", "3", "0", arm="b", epoch=0, segment="")),
        (
            {"moments": {**TABLES["moments"], ("click", "b", 0, ""): (3, 2, 3)}},
            Mismatch("moments", "n=3 s=2 q=2", "n=3 s=2 q=3", "click", "b", 0, ""),
        ),
        (
            {"moments": {("click", "b", 0, ""): (3, 2, 2)}},
            Mismatch("moments", "n=2 s=1 q=1", "n=0 s=0 q=0", "click", "a", 0, ""),
        ),
        (
            {"products": {**TABLES["products"], ("click", "a", 0, ""): (5, 25, 8)}},
            Mismatch("products", "x=5 xx=25 xy=7", "x=5 xx=25 xy=8", "click", "a", 0, ""),
        ),
        ({"events": {}}, Mismatch("events", "units=1 events=2", "units=0 events=0", "errors", "a", 0, "")),
        (
            {"histograms": {("wait", "a", 0, ""): {3: 1, 71: 2}}},
            Mismatch("histogram bin 70", "2", "0", "wait", "a", 0, ""),
        ),
        (
            {"histograms": {**TABLES["histograms"], ("wait", "b", 0, ""): {0: 1}}},
            Mismatch("histogram bin 0", "0", "1", "wait", "b", 0, ""),
        ),
        ({"crossover_units": 0}, Mismatch("crossover_units", "1", "0")),
        ({"first_exposure_ms": None}, Mismatch("first_exposure_ms", "5", "None")),
        ({"out_of_range": {}}, Mismatch("out_of_range", "1", "0", metric="spend")),
    ],
)
def test_first_mismatch_names_the_place(changes: dict[str, object], mismatch: Mismatch) -> None:
    assert first_mismatch(statistics(), statistics(**changes)) == mismatch


def test_outcomes_differ_by_name() -> None:
    ours = Outcomes(read=2, counted=2)
    assert outcome_mismatch("rewards", ours, ours) is None
    theirs = Outcomes(read=2, counted=1, late=1)
    assert outcome_mismatch("rewards", theirs, ours) == Mismatch("rewards counted", "1", "2")
