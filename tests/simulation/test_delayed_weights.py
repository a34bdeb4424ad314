"""Weights under delayed conversions: what is lost by waiting, and what counting open units as failures favours.

Units arrive once an hour and convert after exponential delays inside a window of 24 hours; the sums that the fold
would have go through the policy of the spec every hour. What is compared sees the same kind of data:

* waiting: mature units alone, as without the section `delay`;
* delayed: with the section;
* naive: each unit counts from its exposure on, converted or not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import ExperimentStatistics, build
from stream_xp.engine.allocation import BurnIn, Constraints, Conversions, Evidence, Policy, allocate
from stream_xp.engine.evaluate import Evaluation
from stream_xp.engine.weights_by_policy import weights_by_policy
from tests.simulation.runs import runs

WINDOW_H = 24
AGES_H = (1, 3, 6, 12)
HOURS_MS = 3_600_000
NO_HARM = Evaluation(arms=(), metrics=(), sample_ratio=None, invalid=())
"""No guardrail closes an arm here."""


def spec_of(*, delay: bool, shares: Sequence[float] | None = None) -> ExperimentSpec:
    """Two arms, and weights that follow the conversions."""
    ages: dict[str, Any] = {"ages": [f"{age}h" for age in AGES_H]}
    if shares is not None:
        ages["shares"] = list(shares)
    return msgspec.convert(
        {
            "experiment": "e",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 10_000,
            "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
            "metrics": [
                {
                    "key": "order",
                    "kind": "conversion",
                    "role": "primary",
                    "direction": "increase",
                    "attribution_window": f"{WINDOW_H}h",
                }
            ],
            "allocation": {
                "policy": "thompson",
                "metric": "order",
                "maximum_change": 0.2,
                "burn_in": {"units": 100, "conversions": 10},
                **({"delay": ages} if delay else {}),
            },
        },
        ExperimentSpec,
    )


@dataclass
class Run:
    """One experiment, hour by hour; `by` has units and conversions by each age of every hour, epoch and arm."""

    spec: ExperimentSpec
    rates: Sequence[float]
    delays_h: Sequence[float]
    rng: np.random.Generator
    drift: float = 0.0
    cohorts: list[tuple[int, int, str, int, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        epoch = WeightEpoch(epoch=0, weights=self.spec.weights, effective_ms=0)
        self.record = ExperimentRecord(spec=self.spec, epochs=(epoch,), design_hash=self.spec.design_hash())
        self.units: dict[str, int] = defaultdict(int)

    def expose(self, hour: int, units: int) -> None:
        """The units of an hour, drawn with the weights in force, and all that they will do."""
        newest = self.record.epochs[-1]
        counts = self.rng.multinomial(units, [newest.weights[arm] for arm in "ab"])
        for arm, count, rate, mean in zip("ab", counts.tolist(), self.rates, self.delays_h, strict=True):
            self.units[arm] += count
            ages = (*AGES_H, WINDOW_H)
            converted, total = [0] * len(ages), self.rng.binomial(count, rate * (1 + self.drift * hour))
            for at in reversed(range(len(ages))):
                older = ages[at + 1] if at + 1 < len(ages) else WINDOW_H
                share = -math.expm1(-ages[at] / mean) / -math.expm1(-older / mean)
                total = converted[at] = int(self.rng.binomial(total, min(1.0, share)))
            self.cohorts.append((hour, newest.epoch, arm, count, converted))

    def statistics(self, hour: int) -> ExperimentStatistics:
        """What the fold has at the end of an hour."""
        moments: dict[Any, list[int]] = defaultdict(lambda: [0, 0, 0])
        products: dict[Any, list[int]] = defaultdict(lambda: [0, 0, 0])
        units: dict[Any, int] = defaultdict(int)
        for begun, epoch, arm, count, converted in self.cohorts:
            units[arm, epoch, ""] += count
            before = 0
            for at, (age, by) in enumerate(zip((*AGES_H, WINDOW_H), converted, strict=True), start=1):
                if hour - begun < age:
                    break
                names = [f"order@by{at}"] if self.spec.allocation.delay else []
                for name in [*names, "order"] if age == WINDOW_H else names:
                    key = (name, arm, epoch, "")
                    moments[key] = [x + y for x, y in zip(moments[key], (count, by, by), strict=True)]
                    if at > 1 and name != "order":
                        products[key] = [x + before for x in products[key]]
                before = by
        return build(
            units=units,
            moments={key: tuple(sums) for key, sums in moments.items()},
            products={key: tuple(sums) for key, sums in products.items()},
            crossover_units=0,
            first_exposure_ms=0,
            out_of_range={},
        )

    def naive(self, hour: int) -> dict[str, float]:
        """Weights of who counts every unit from its exposure on, with the conversions that have come by now."""
        rows = [Evidence(arm, Conversions(0, 0)) for arm in "ab"]
        for begun, epoch, arm, count, converted in self.cohorts:
            by = [c for age, c in zip((*AGES_H, WINDOW_H), converted, strict=True) if hour - begun >= age]
            rows.append(Evidence(arm, Conversions(count, by[-1] if by else 0), epoch))
        burn_in = BurnIn(units=100, conversions=10, even=False)
        limits = Constraints(floor=0.05, maximum_change=0.2, minimum_change=0.01, burn_in=burn_in)
        current = self.record.epochs[-1].weights
        return allocate(Policy.THOMPSON, rows, current, control="a", constraints=limits).weights

    def move(self, hour: int, *, naive: bool = False) -> None:
        """The weights of the next hour."""
        newest = self.record.epochs[-1]
        if naive:
            weights = self.naive(hour)
        else:
            found = self.statistics(hour)
            wanted = weights_by_policy(self.record, found, NO_HARM)
            weights = wanted.weights or newest.weights
        if weights != newest.weights:
            epoch = WeightEpoch(epoch=newest.epoch + 1, weights=weights, effective_ms=hour * HOURS_MS)
            self.record = msgspec.structs.replace(self.record, epochs=(*self.record.epochs, epoch))


def shares_of_b(how: str, runs: int, **world: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of each run, the share of all units that b got, and its weight at the end."""
    hours, units = world.pop("hours"), world.pop("units")
    found = []
    spec = spec_of(delay=how == "delayed", shares=world.pop("shares", None))
    for seed in range(runs):
        run = Run(spec, rng=np.random.default_rng(seed), **world)
        for hour in range(hours):
            run.expose(hour, units)
            run.move(hour + 1, naive=how == "naive")
        found.append((run.units["b"] / sum(run.units.values()), run.record.epochs[-1].weights["b"]))
    shares = np.array(found)
    return shares[:, 0], shares[:, 1]


RUNS = runs(40, short=16)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and three times its Monte Carlo standard error."""
    return float(values.mean()), float(3 * values.std(ddof=1) / math.sqrt(len(values)))


@pytest.mark.slow
def test_open_units_lose_less_than_waiting() -> None:
    """The window is half of the run; regret is 0.03 for each unit that the better arm b did not get."""
    world = {"rates": (0.1, 0.13), "delays_h": (8.0, 8.0), "hours": 48, "units": 100}
    registered = [math.expm1(-age / 8) / math.expm1(-WINDOW_H / 8) for age in AGES_H]
    waiting, _ = shares_of_b("waiting", RUNS, **world)
    learned, _ = shares_of_b("delayed", RUNS, **world)
    known, _ = shares_of_b("delayed", RUNS, shares=registered, **world)
    for better, error in (interval(learned - waiting), interval(known - waiting)):
        assert better > error / 3, (better, error)
    assert known.mean() > waiting.mean() + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0.0, 0.03])
def test_the_faster_of_equal_arms_is_not_favoured(drift: float) -> None:
    """Both convert 10 % of their units, a after 12 and b after 3 hours on average; the baseline may rise."""
    world = {"rates": (0.1, 0.1), "delays_h": (12.0, 3.0), "hours": 48, "units": 100, "drift": drift}
    naive, at_end = shares_of_b("naive", RUNS, **world)
    share, error = interval(naive)
    assert share - error > 0.75
    assert at_end.mean() > 0.8
    delayed, at_end = shares_of_b("delayed", RUNS, **world)
    share, error = interval(delayed)
    assert abs(share - 0.5) < error + 0.05, (share, error)
    assert abs(at_end.mean() - 0.5) < interval(at_end)[1] + 0.05
