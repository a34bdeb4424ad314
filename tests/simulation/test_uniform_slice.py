"""The uniform slice covers the truth while weights follow outcomes and the baseline drifts.

Units arrive in weight epochs; `thompson` moves the weights after each, and every sequence is looked at after each. A
pooled difference of all units, which weights and drift bias together, must fail where the slice does not.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import build
from stream_xp.engine.evaluate import evaluate_all
from stream_xp.engine.weights_by_policy import weights_by_policy
from tests.simulation.runs import runs as drawn_runs

RUNS, EPOCHS, UNITS, SHARE = drawn_runs(200, short=80), 15, 600, 0.3


def spec_of(level: float) -> ExperimentSpec:
    return msgspec.convert(
        {
            "experiment": "e",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "alpha": level,
            "planned_sample": EPOCHS * UNITS,
            "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
            "metrics": [
                {
                    "key": "order",
                    "kind": "conversion",
                    "role": "primary",
                    "direction": "increase",
                    "attribution_window": "1h",
                }
            ],
            "segments": {"draw": ["uniform"]},
            "allocation": {
                "policy": "thompson",
                "metric": "order",
                "maximum_change": 0.3,
                "uniform_slice": SHARE,
                "uniform_segment": "draw",
            },
        },
        ExperimentSpec,
    )


class Run:
    """One experiment; rates of an epoch are those of the control and of the arm."""

    def __init__(self, spec: ExperimentSpec, rng: np.random.Generator) -> None:
        epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
        self.record = ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())
        self.rng = rng
        self.units: Counter[Any] = Counter()
        self.orders: Counter[Any] = Counter()

    def expose(self, rates: tuple[float, float]) -> None:
        """Draw an epoch in two steps, as applications do."""
        newest = self.record.epochs[-1]
        inside = int(self.rng.binomial(UNITS, SHARE))
        rest = [(newest.weights[arm] - SHARE / 2) / (1 - SHARE) for arm in "ab"]
        for label, count, weights in (("uniform", inside, [0.5, 0.5]), ("other", UNITS - inside, rest)):
            for arm, n, rate in zip("ab", self.rng.multinomial(count, weights).tolist(), rates, strict=True):
                won = int(self.rng.binomial(n, rate))
                for segment in ("", f"draw={label}"):
                    self.units[arm, newest.epoch, segment] += n
                    self.orders[arm, newest.epoch, segment] += won

    def look(self) -> tuple[ExperimentRecord, Any]:
        moments = {("order", *key): (n, self.orders[key], self.orders[key]) for key, n in self.units.items()}
        found = build(
            units=self.units, moments=moments, crossover_units=0, first_exposure_ms=0, out_of_range={}
        )
        return self.record, found

    def move(self, found: Any, evaluation: Any) -> None:
        weights = weights_by_policy(self.record, found, evaluation).weights
        newest = self.record.epochs[-1]
        if weights and weights != newest.weights:
            epoch = WeightEpoch(epoch=newest.epoch + 1, weights=weights, effective_ms=newest.epoch + 1)
            self.record = msgspec.structs.replace(self.record, epochs=(*self.record.epochs, epoch))

    def pooled(self) -> tuple[float, float]:
        """Difference of all units together, and its standard error."""
        rates, spread = [], 0.0
        for arm in "ab":
            n = sum(count for (one, _, segment), count in self.units.items() if (one, segment) == (arm, ""))
            won = sum(
                count for (one, _, segment), count in self.orders.items() if (one, segment) == (arm, "")
            )
            rates.append(won / n)
            spread += rates[-1] * (1 - rates[-1]) / n
        return rates[1] - rates[0], math.sqrt(spread)


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.0, 0.05])
def test_the_slice_covers_the_truth_under_drift_and_moving_weights(effect: float) -> None:
    level = 0.2  # Large, so that runs that miss can be seen.
    runs = [Run(spec_of(level), np.random.default_rng([7, seed])) for seed in range(RUNS)]
    missed = np.zeros(RUNS, np.bool_)
    estimates = np.zeros(RUNS)
    for epoch in range(EPOCHS):
        base = 0.1 + 0.4 * epoch / (EPOCHS - 1)
        for run in runs:
            run.expose((base, base + effect))
        looks = [run.look() for run in runs]
        for at, (run, (_, found), one) in enumerate(zip(runs, looks, evaluate_all(looks), strict=True)):
            assert one.uniform_slice is not None
            assert one.uniform_slice.sample_ratio is not None
            shown = one.uniform_slice.effects[0].effect
            if shown is not None and shown.estimate is not None:
                below, above = shown.lower, shown.upper
                missed[at] |= (below is not None and below > effect) or (above is not None and above < effect)
                estimates[at] = shown.estimate
            run.move(found, one)
    error = math.sqrt(level * (1 - level) / RUNS)
    assert missed.mean() <= level + 3 * error
    bias, spread = estimates.mean() - effect, estimates.std(ddof=1) / math.sqrt(RUNS)
    assert abs(bias) < 4 * spread, (bias, spread)
    if effect:
        wrong = [abs(estimate - effect) > 1.96 * se for estimate, se in (run.pooled() for run in runs)]
        assert np.mean(wrong) > 0.5
    assert np.mean([len(run.record.epochs) for run in runs]) > 2
