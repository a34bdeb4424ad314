"""Measures evaluation: many experiments tested together, against one after the other, in the same run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import ExperimentStatistics, build
from stream_xp.engine.evaluate import Look, evaluate, evaluate_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ARMS: Final = ("a", "b", "c")
ALONE_SHARE: Final = 20
"""One in so many experiments is also evaluated alone: all of them would take minutes."""
_SCALE: Final = 0.01


class EvaluationReport(msgspec.Struct, frozen=True, kw_only=True):
    """CPU of one evaluation of all experiments.

    Attributes:
        comparisons: metrics times treatment arms of all experiments.
        together_s: process CPU seconds for all experiments together, the least of the rounds.
        alone_s: the same one experiment after the other, scaled up from a share of them.
        ratio: of the two.
    """

    experiments: int
    metrics: int
    arms: int
    comparisons: int
    rounds: int
    together_s: float
    alone_s: float
    ratio: float


def bench_evaluation(*, experiments: int, metrics: int, rounds: int, seed: int = 1) -> EvaluationReport:
    """Evaluate simulated experiments of three arms; half of the metrics are conversions, half are means."""
    looks = [_look(f"e{at}", metrics, np.random.default_rng([seed, at])) for at in range(experiments)]
    some = looks[:: max(1, min(ALONE_SHARE, experiments))]
    evaluate_all(looks)  # imports and the designs of the experiments are paid before anything is measured
    together_s = min(_cpu_s(lambda: evaluate_all(looks)) for _ in range(rounds))
    alone_s = min(_cpu_s(lambda: _each(some)) for _ in range(rounds)) * len(looks) / len(some)
    return EvaluationReport(
        experiments=experiments,
        metrics=metrics,
        arms=len(ARMS),
        comparisons=experiments * metrics * (len(ARMS) - 1),
        rounds=rounds,
        together_s=together_s,
        alone_s=alone_s,
        ratio=alone_s / together_s,
    )


def _each(looks: Sequence[Look]) -> None:
    for look in looks:
        evaluate(*look)


def _cpu_s(work: Callable[[], object]) -> float:
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


def _look(name: str, metrics: int, rng: np.random.Generator) -> Look:
    spec = msgspec.convert(_spec(name, metrics), ExperimentSpec)
    epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
    record = ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())
    return record, _statistics(spec, rng)


def _spec(name: str, metrics: int) -> dict[str, Any]:
    weights = (0.34, 0.33, 0.33)
    return {
        "experiment": name,
        "owner": "bench",
        "hypothesis": "bench",
        "unit": "member",
        "planned_sample": 60_000,
        "arms": [
            {"key": key, "weight": weight, "control": key == ARMS[0]}
            for key, weight in zip(ARMS, weights, strict=True)
        ],
        "metrics": [_metric(at) for at in range(metrics)],
    }


def _metric(at: int) -> dict[str, Any]:
    """The first is the primary, the next two are guardrails; conversions and means in turn."""
    role = "primary" if at == 0 else "guardrail" if at < 3 else "secondary"
    metric: dict[str, Any] = {
        "key": f"m{at}",
        "kind": "mean" if at % 2 else "conversion",
        "role": role,
        "direction": "decrease" if role == "guardrail" else "increase",
        "attribution_window": "1h",
    }
    if at % 2:
        metric |= {"scale": _SCALE, "bound": 1000.0}
    if role == "guardrail":
        metric["margin"] = {"relative": 0.1}
    return metric


def _statistics(spec: ExperimentSpec, rng: np.random.Generator) -> ExperimentStatistics:
    units, moments = {}, {}
    for arm in ARMS:
        n = int(rng.integers(5_000, 30_000))
        units[arm, 0, ""] = n
        for metric in spec.metrics:
            moments[metric.key, arm, 0, ""] = _moments(n, rng, converts=metric.bound is None)
    return build(units=units, moments=moments, crossover_units=0, first_exposure_ms=0, out_of_range={})


def _moments(n: int, rng: np.random.Generator, *, converts: bool) -> tuple[int, int, int]:
    if converts:
        successes = int(rng.binomial(n, 0.05))
        return n, successes, successes
    mean, sd = 12.0 / _SCALE, 30.0 / _SCALE
    total = round(n * mean + rng.normal() * sd * n**0.5)
    return n, total, round(n * (mean**2 + sd**2))
