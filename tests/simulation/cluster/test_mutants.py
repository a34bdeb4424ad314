"""Teeth: each fault that is put into the services is found by the schedules, from a seed that is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulation.cluster.mutants import MUTANTS, active
from tests.simulation.cluster.schedule import Schedule
from tests.simulation.cluster.watch import BrokenError
from tests.simulation.cluster.world import installed

SEEDS = {
    "any beginning": 2,
    "apply after a hole": 0,
    "apply repeats": 27,
    "begin anew": 0,
    "commit before snapshot": 0,
    "config before signal": 3,
    "damage is not noticed": 24,
    "orders are not read": 3,
    "pause is not told": 7,
    "reset is not looked at": 3,
    "no cover": 17,
    "no latch": 3,
    "no wait for acknowledgement": 0,
    "no wait for dead letters": 5,
    "no wait for snapshots": 0,
    "oldest snapshot": 0,
    "own signal": 3,
    "ownership is not looked at": 67,
    "signals are not read": 3,
    "state is kept at a rebalance": 24,
}
"""The first seed that finds each; after a change of the world it may be another, which `FURTHER` allows for."""
FURTHER = 60
HANGING = ("ownership is not looked at",)
"""Found where writes hang while partitions leave and come back."""
ORDERED = ("orders are not read", "pause is not told", "reset is not looked at")
"""Found where people order things."""


@pytest.fixture(autouse=True)
def cluster() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_fault_is_found(name: str) -> None:
    first = SEEDS[name]
    with active(name):
        for seed in range(first, first + FURTHER):
            try:
                Schedule(seed, hangs=name in HANGING, orders=name in ORDERED).run()
            except BrokenError as error:
                print(f"{name}: seed {seed}: {str(error)[:150]}")
                return
    pytest.fail(f"{name} was not found from seed {first} on")
