"""An experiment file for sections that make buckets, its faults, and whether the rows of all buckets find room."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from stream_xp.domain.buckets import kept_buckets
from stream_xp.domain.fit import check_fit
from stream_xp.domain.statistics import build
from stream_xp.domain.statistics_size import most_epochs, row_bytes
from tests.unit.spec_file_world import faults_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from stream_xp.domain.experiment import ExperimentSpec

FILE = """\
experiment: e
owner: o
hypothesis: h
unit: u
planned_sample: 1000
arms:
  - {key: a, weight: 0.5, control: true}
  - {key: b, weight: 0.5}
metrics:
  - {key: click, kind: conversion, role: primary, direction: increase, attribution_window: 1d}
  - {key: spend, kind: mean, role: secondary, direction: increase, attribution_window: 1d, bound: 100}
"""


def faults(text: str | bytes) -> list[str]:
    return [f"{one.line}: {one.path}: {one.message}" for one in faults_of(text)]


def assert_room(
    made: ExperimentSpec, plain: ExperimentSpec, *, products: Collection[str], largest: int
) -> None:
    """Every row filled with 10**7 units of the largest value stays below what is reckoned.

    Args:
        made: with buckets.
        plain: the same without.
        products: names of the buckets that have rows of products.
        largest: value of a unit, in steps.
    """
    n, y = 10**7, largest
    names = [one.name for one in kept_buckets(made)]
    assert set(products) < set(names)
    keys = [(name, arm, 0, "") for name in names for arm in ("a", "b")]
    found = build(
        units={},
        moments=dict.fromkeys(keys, (n, n * y, n * y * y)),
        products={key: (n * y, n * y * y, n * y * y) for key in keys if key[0] in products},
        crossover_units=0,
        first_exposure_ms=0,
        out_of_range={},
    )
    rows = len(found.canonical()) - len(msgspec.structs.replace(found, moments=(), products=()).canonical())
    assert rows <= row_bytes(made) - row_bytes(plain)
    assert most_epochs(made) < most_epochs(plain)
    check_fit(found, made)
    with pytest.raises(ValueError, match="no metric with moments"):
        check_fit(found, plain)
