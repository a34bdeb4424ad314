"""Scenarios: what it is compared with, and what is measured."""

from __future__ import annotations

import math
from functools import partial

import msgspec
import numpy as np
import pytest

from stream_xp.domain.decision import Action
from stream_xp.services.scenarios.measures import _NOTHING, Measure, _holds, _quantile, _rate, summary
from stream_xp.services.scenarios.naive import rejected
from stream_xp.services.scenarios.world import HOUR_MS
from tests.unit.services.scenarios_world import MEAN, experiment, write_and_load


@pytest.fixture
def load(tmp_path):
    return partial(write_and_load, tmp_path)


def test_naive_z_test_is_that_of_the_values(load):
    world = load(experiment=experiment(metrics=[*experiment()["metrics"], {**MEAN, "role": "primary"}]),
                 truths={"errors": {"mean": 0.1}, "minutes": {"mean": 5, "sd": 1}})  # fmt: skip
    rng = np.random.default_rng(5)
    found, sizes = [], []
    for shift in np.linspace(0.0, 0.3, 40):
        cells = np.zeros((2, 3, 1, 2), np.int64)
        steps = [np.rint(rng.normal(5 + shift * arm, 1, 400) / 0.5).astype(np.int64) for arm in (0, 1)]
        for arm, one in enumerate(steps):
            cells[1, :, 0, arm] = len(one), one.sum(), (one * one).sum()
        values = [one * 0.5 for one in steps]
        error = math.sqrt(sum(one.var(ddof=1) / len(one) for one in values))
        z = (values[1].mean() - values[0].mean()) / error
        assert rejected(world.spec, cells).tolist() == [abs(z) > 1.959964]
        found.append(abs(z) > 1.959964)
        sizes.append(abs(z))
    assert {True, False} <= set(found)
    assert any(1.65 < one < 1.95 for one in sizes)


def test_naive_guardrail_is_one_sided_and_critical_has_no_margin(load):
    world = load()
    harmed, better = np.zeros((1, 3, 2, 2), np.int64)[:, :, :1], np.zeros((1, 3, 1, 2), np.int64)
    harmed[0, :, 0] = [[1000, 1000], [50, 75], [50, 75]]
    better[0, :, 0] = [[1000, 1000], [75, 50], [75, 50]]
    assert rejected(world.spec, harmed).tolist() == [True]
    assert rejected(world.spec, better).tolist() == [False]
    metric = {**experiment()["metrics"][0], "critical": False}
    tolerant = load(experiment=experiment(metrics=[metric]))
    assert rejected(tolerant.spec, harmed).tolist() == [False]


def test_quantiles_know_what_lies_beyond_the_horizon():
    assert _quantile("x", [1.0, 2.0, 3.0, math.inf], 0.5).value == 2.0
    assert _quantile("x", [1.0, math.inf, math.inf], 0.95).value is None
    exact = _quantile("x", [float(n) for n in range(1, 1001)], 0.95)
    assert (exact.value, round(exact.error, 1)) == (950.0, 6.5)


def test_a_rate_is_never_without_error():
    assert _rate("x", [False] * 500).error == pytest.approx(math.sqrt(0.5 / 501 * 500.5 / 501 / 500))


@pytest.mark.parametrize(
    ("value", "limit", "most", "promised", "holds"),
    [
        (0.06, 0.05, True, True, True),
        (0.09, 0.05, True, True, False),
        (0.06, 0.05, True, False, False),
        (0.9, 0.9, False, True, True),
        (0.89, 0.9, False, True, False),
        (None, 3.0, True, True, False),
        (3.0, None, True, False, True),
    ],
)
def test_claims(value, limit, most, promised, holds):
    measure = Measure(name="x", value=value, error=0.01, runs=100)
    assert _holds(measure, limit, most=most, promised=promised) is holds


def test_of_two_values_beyond_the_horizon_none_is_the_smaller_one():
    never = Measure(name="x", value=None, error=None, runs=100)
    assert not _holds(never, None, most=True, promised=False)
    assert not _holds(never, None, most=False, promised=False)
    assert _holds(never, 3.0, most=False, promised=True)
    assert not _holds(Measure(name="x", value=None, error=None, runs=0), 3.0, most=False, promised=True)


def test_delays_and_harm_are_of_the_runs_that_met_the_harm(load):
    """A run that was stopped before is a false stop; its delay is not the longest, and its 0 units no success."""
    world = load(
        truths={"errors": {"mean": 0.1, "arms": {"b": {"times": 2, "since": "2h"}}}}, comparisons=["peeked"]
    )

    def run(action, hours, harmed, peeked, **more):
        return msgspec.structs.replace(
            _NOTHING,
            action=action,
            ended_ms=hours * HOUR_MS,
            onset_ms=2.0 * HOUR_MS,
            harmed=harmed,
            naive={"peeked": (peeked * HOUR_MS, 10.0 * peeked)},
            **more,
        )

    runs = [
        run(Action.STOP, 3, 30.0, 4),
        run(Action.STOP, 1, 0.0, 1, false_stop=True),
        run(Action.SHIP, 1, 90.0, 2),
    ]
    found = {measure.name: measure for measure in summary(world, runs).measures}
    assert (found["delay_h_p50"].value, found["delay_h_p50"].runs) == (1.0, 2)
    assert found["delay_h_p95"].value is None
    assert [found[f"units_harmed_{p}"].value for p in ("p50", "p95")] == [30.0, 90.0]
    assert (found["peeked.false_stops"].value, found["peeked.delay_h_p95"].runs) == (pytest.approx(2 / 3), 1)
    assert (found["peeked.delay_h_p95"].value, found["peeked.units_harmed_p95"].value) == (2.0, 40.0)
