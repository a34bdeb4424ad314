"""How often pairs of experiments are said to interact, looking again and again, when none does."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.engine.interactions import Table, interactions

RUNS = 200
LOOKS = 8
PLANTED_RUNS = 40
UNITS_PER_LOOK = 400
PAIRS = 3
ALPHA = 0.05
SPEC: dict[str, Any] = {
    "owner": "o",
    "hypothesis": "h",
    "unit": "u",
    "planned_sample": 4000,
    "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
    "metrics": [
        {
            "key": "click",
            "kind": "conversion",
            "role": "primary",
            "direction": "increase",
            "attribution_window": "1h",
        }
    ],
}
FIRST, SECOND = (msgspec.convert(SPEC | {"experiment": key}, ExperimentSpec) for key in ("a", "b"))
ARMS = [("old", "old"), ("old", "new"), ("new", "old"), ("new", "new")]


def table(counts: np.ndarray, conversions: np.ndarray) -> Table:
    cells = {
        (*arms, 0, 0): (int(n), int(s), int(s)) for arms, n, s in zip(ARMS, counts, conversions, strict=True)
    }
    return Table(FIRST, SECOND, FIRST.metrics[0], cells)


def drawn(rng: np.random.Generator, interaction: float) -> tuple[np.ndarray, np.ndarray]:
    """Units and conversions of the four cells at every look.

    Both treatments move a rate of 20 % by 5 points, together by `interaction` more.
    """
    counts = rng.multinomial(UNITS_PER_LOOK, [0.25] * 4, size=LOOKS)
    conversions = rng.binomial(counts, [0.2, 0.25, 0.25, 0.3 + interaction])
    return counts.cumsum(axis=0), conversions.cumsum(axis=0)


def looks(rng: np.random.Generator, interaction: float) -> list[Table]:
    return [table(*both) for both in zip(*drawn(rng, interaction), strict=True)]


def ever_found(rng: np.random.Generator, planted: float) -> np.ndarray:
    """Of each pair, whether it was found at any look; the first has the planted interaction."""
    pairs = [looks(rng, planted if at == 0 else 0.0) for at in range(PAIRS)]
    found = np.zeros(PAIRS, dtype=bool)
    for at in range(LOOKS):
        found |= [one.found for one in interactions([[pair[at]] for pair in pairs], alpha=ALPHA)]
    return found


@pytest.mark.slow
def test_the_chance_that_any_pair_is_ever_found_wrongly_is_at_most_the_level() -> None:
    rng = np.random.default_rng(20261122)
    wrong = sum(ever_found(rng, 0.0).any() for _ in range(RUNS)) / RUNS
    error = math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
    print(f"any of {PAIRS} pairs found wrongly at any of {LOOKS} looks: {wrong:.4f} of {RUNS} runs")
    assert wrong <= ALPHA + 2 * error


def test_looking_again_and_again_at_a_fixed_sample_test_must_fail() -> None:
    rng = np.random.default_rng(20261122)
    wrong = 0
    for _ in range(RUNS):
        for _ in range(PAIRS):
            n, s = drawn(rng, 0.0)
            rate = s / n
            contrast = rate @ np.array([1.0, -1.0, -1.0, 1.0])
            if (np.abs(contrast) > 1.96 * np.sqrt((rate * (1 - rate) / n).sum(axis=1))).any():
                wrong += 1
                break
    print(f"the same by 1.96 standard errors: {wrong / RUNS:.4f}")
    assert wrong / RUNS > 3 * ALPHA


@pytest.mark.slow
def test_a_planted_interaction_is_found_beside_pairs_that_have_none() -> None:
    rng = np.random.default_rng(20261123)
    found = np.array([ever_found(rng, 0.15) for _ in range(PLANTED_RUNS)])
    rates = found.mean(axis=0)
    print(
        f"an interaction of 15 points found in {rates[0]:.2f} of {PLANTED_RUNS} runs, others in {rates[1:].tolist()}"
    )
    assert rates[0] > 0.8
    assert rates[1:].max() <= ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / PLANTED_RUNS)
