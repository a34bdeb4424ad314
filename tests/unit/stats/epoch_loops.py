"""Sums over weight epochs one epoch after the other, as they are defined; and how much faster whole arrays are.

`python -m tests.unit.stats.epoch_loops` measures one evaluation both ways in the same run.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import numpy as np

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import ExperimentStatistics, build
from stream_xp.engine.evaluate import evaluate
from stream_xp.stats import conversion_difference
from stream_xp.stats.batch import means as batch_means

if TYPE_CHECKING:
    from collections.abc import Callable

ARMS = ("a", "b", "c")


def sum_over_epochs(values: Any) -> Any:
    """Sum2 of the sorted terms."""
    ordered = np.sort(values, axis=-1)
    total, lost = np.zeros(values.shape[:-1]), np.zeros(values.shape[:-1])
    for epoch in range(values.shape[-1]):
        term = ordered[..., epoch]
        raised = total + term
        moved = raised - total
        lost = lost + ((total - (raised - moved)) + (term - moved))
        total = raised
    return np.asarray(total + lost)


def mixed(observed: Any, share: Any, grid: Any, side: Any) -> Any:
    """The mixture of each comparison, one term after the other."""
    points = conversion_difference._points(grid, side)
    weights, index = np.unique(share, return_inverse=True)
    factors, rows = conversion_difference._log_factors(weights, points), index.reshape(share.shape)
    logs = np.zeros((len(observed), len(points[0])))
    for epoch in range(share.shape[1]):
        of_epoch = factors[rows[:, epoch]]
        for outcome in range(4):
            logs += observed[:, epoch, outcome, np.newaxis] * of_epoch[:, outcome]
    return conversion_difference._log_mean_exp(logs)


def as_loops() -> Any:
    """While it is entered, evaluations add up epoch after epoch."""
    return mock.patch.multiple(batch_means, sum_over_epochs=sum_over_epochs), mock.patch.multiple(
        conversion_difference, _mixed=mixed
    )


def experiment(epochs: int, *, seed: int = 1) -> tuple[ExperimentRecord, ExperimentStatistics]:
    """Three arms whose weights change again and again; a conversion, a mean and a guardrail."""
    metric = {"role": "primary", "direction": "increase", "attribution_window": "1h"}
    spec = msgspec.convert(
        {
            "experiment": "many",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1_000_000,
            "arms": [{"key": arm, "weight": 1 / 3, "control": arm == "a"} for arm in ARMS],
            "metrics": [
                metric | {"key": "click", "kind": "conversion"},
                metric | {"key": "spend", "kind": "mean", "role": "secondary", "scale": 0.01, "bound": 100},
                metric
                | {"key": "error", "kind": "conversion", "role": "guardrail", "direction": "decrease"}
                | {"margin": {"absolute": 0.05}},
            ],
        },
        ExperimentSpec,
    )
    dice = random.Random(seed)
    listed, units, moments = [], {}, {}
    for at in range(epochs):
        drawn = [dice.uniform(0.5, 1.5) for _ in ARMS]
        weights = {arm: one / sum(drawn) for arm, one in zip(ARMS, drawn, strict=True)}
        listed.append(WeightEpoch(epoch=at, weights=weights, effective_ms=at))
        for arm in ARMS:
            n = units[arm, at, ""] = round(1000 * weights[arm]) + dice.randrange(20)
            for key, rate in (("click", 0.1), ("error", 0.02)):
                hits = sum(dice.random() < rate for _ in range(n))
                moments[key, arm, at, ""] = (n, hits, hits)
            values = [dice.randrange(10_000) for _ in range(n)]
            moments["spend", arm, at, ""] = (n, sum(values), sum(value * value for value in values))
    record = ExperimentRecord(spec=spec, epochs=tuple(listed), design_hash=spec.design_hash())
    found = build(units=units, moments=moments, crossover_units=0, first_exposure_ms=0, out_of_range={})
    return record, found


def _cpu_s(work: Callable[[], object]) -> float:
    took = []
    for _ in range(5):
        began_s = time.process_time()
        work()
        took.append(time.process_time() - began_s)
    return min(took)


def main() -> None:
    """Print CPU times of one evaluation."""
    for epochs in (1, 20, 100, 500):
        look = experiment(epochs)
        now_s = _cpu_s(lambda look=look: evaluate(*look))
        sums, mixtures = as_loops()
        with sums, mixtures:
            loops_s = _cpu_s(lambda look=look: evaluate(*look))
        print(
            f"{epochs} epochs: {1e3 * loops_s:.1f} ms as loops, {1e3 * now_s:.1f} ms, {loops_s / now_s:.1f} times"
        )


if __name__ == "__main__":
    main()
