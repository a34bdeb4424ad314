"""The oracle: the statistics of partitions add up to those of all records."""

from __future__ import annotations

import random

import pytest

from stream_xp.domain.experiment import Adjustment, Aggregation, Covariate, Denominator
from stream_xp.domain.statistics import merge
from tests.unit.oracle.recompute_world import Case, T, count, latency, mean, metric, published, ratio, spec


# Laws
def random_case(seed: int, *, records: int) -> tuple[Case, list[str]]:
    dice = random.Random(seed)
    case = Case(
        published(
            spec(
                metric(),
                mean(aggregation=Aggregation.LAST, adjustment=Adjustment.CUPED),
                count(key="clicks", event="click"),
                latency(event="spend"),
                ratio(Denominator(event="click", bound=2)),
                covariate=Covariate(scale=0.1, bound=5),
            ),
            effective=(0, T + records // 2),
        )
    )
    names = [f"unit-{n}" for n in range(max(2, records // 4))]
    for n in range(records):
        unit = dice.choice(names)
        time_ms = T + n - dice.randrange(3)
        if dice.random() < 0.5:
            case.exposures.add(time_ms, at=T + n, unit=unit, arm="ab"[hash_of(unit) % 2], covariate=n % 7)
        else:
            name = dice.choice(["click", "spend", "noise"])
            case.rewards.add(time_ms, at=T + n, unit=unit, metric=name, value=dice.choice([0, 1, 0.25, 3.5]))
    return case, names


def hash_of(unit: str) -> int:
    return sum(unit.encode())


def part(case: Case, chosen: set[str]) -> Case:
    """The records of some units, as another partition would hold them."""
    other = Case(*case.specs)
    for log, mine in ((case.exposures, other.exposures), (case.rewards, other.rewards)):
        mine.records += [one for one in log.records if (one.key or b"").decode() in chosen]
    return other


@pytest.mark.parametrize("seed", range(5))
def test_partitions_add_up(seed: int) -> None:
    case, names = random_case(seed, records=300)
    whole = case.run().statistics["exp", 1]
    half = set(names[::2])
    parts = [part(case, chosen).run().statistics["exp", 1] for chosen in (half, set(names) - half)]
    assert merge(parts).canonical() == whole.canonical()


@pytest.mark.slow
def test_fifty_thousand_records() -> None:
    """So many that work which grows with their square would not end in time."""
    case, _ = random_case(1, records=50_000)
    case.run(T + 25_000)
