"""Long effects through the engine: the flag's false alarms under peeking, and what the effects of winners are worth.

Results are those of `evaluate` and `age_results` on exact sums, looked at again and again; past effects are those that
`stream-xp memo` would read. Every rate comes with its Monte Carlo standard error.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest

from stream_xp import stats
from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.domain.decision import AgeChange, Result, Signal
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import ExperimentStatistics, build
from stream_xp.engine.ages import age_results
from stream_xp.engine.evaluate import evaluate_all, proven
from stream_xp.services.memo.record import PriorSource
from stream_xp.services.memo.worth import past_effects, shrunk
from stream_xp.stats.batch import CrossArrays
from stream_xp.stats.novelty import CHANGES

Columns: TypeAlias = tuple[np.ndarray, ...]
PAST = msgspec.json.decode((topics_dir() / "golden" / "signal.v1.json").read_bytes(), type=Signal).data.result


def record(name: str, planned: int, **fields: Any) -> ExperimentRecord:
    body = {
        "experiment": name,
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": planned,
        "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
        "metrics": [
            {
                "key": "spend",
                "kind": "mean",
                "role": "primary",
                "direction": "increase",
                "attribution_window": "1d",
                "bound": 1000.0,
                "scale": 0.01,
            }
        ],
    }
    spec = msgspec.convert(body | fields, ExperimentSpec)
    epochs = (WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0),)
    return ExperimentRecord(spec=spec, epochs=epochs, design_hash=spec.design_hash())


def statistics(**tables: Any) -> ExperimentStatistics:
    units = {("a", 0, ""): 1, ("b", 0, ""): 1}
    return build(units=units, crossover_units=0, first_exposure_ms=0, out_of_range={}, **tables)


# --- the flag -------------------------------------------------------------------------------------------------

RUNS, LOOKS, STEP = 1000, 25, 60
AGED = record("aged", 2 * LOOKS * STEP, ages={"metrics": ["spend"], "until": ["1d", "6d", "8d"]})
ALPHA = 0.05


@cache
def drawn(seed: int, early: float, late: float) -> tuple[Columns, Columns]:
    """Sums over the units of each arm by every look: y, yy, x, xx, xy, each (runs, looks).

    Units have a level of their own, which the two windows share, and heavy tails; the effect is per day, of the late
    window of two days twice.
    """
    rng = np.random.default_rng(seed)
    found = []
    for of_arm in (0.0, 1.0):
        own = rng.gamma(2.0, 1.0, size=(RUNS, LOOKS * STEP))
        x, y = (
            rng.poisson(2.0 * days * (own + of_arm * effect)) * rng.integers(50, 200, size=own.shape)
            for days, effect in ((1, early), (2, late))
        )
        columns = (y, y * y, x, x * x, x * y)
        found.append(tuple(np.cumsum(column, axis=1)[:, STEP - 1 :: STEP] for column in columns))
    return found[0], found[1]


def flagged(seed: int, early: float, late: float, *, peeks: bool = True) -> np.ndarray:
    """What each run is flagged as at its first flag, by the code of `CHANGES`; only at the last look without `peeks`.

    `age_results` takes one experiment at a time; this is its counterpart for many, and a test shows that they agree.
    """
    arms = drawn(seed, early, late)
    first = np.zeros(RUNS, np.int8)
    for look in range(LOOKS) if peeks else (LOOKS - 1,):
        n = np.full((RUNS, 1), (look + 1) * STEP)
        y, yy, x, xx, xy = zip(*([column[:, look, None] for column in arm] for arm in arms), strict=True)
        found = stats.effect_change(
            *(CrossArrays(n, x[at], y[at], xx[at], yy[at], xy[at]) for at in (0, 1)),
            early_days=1,
            late_days=2,
            scale=0.01,
            alpha=ALPHA,
            rho2=stats.tuned_rho2(2 * LOOKS * STEP, ALPHA),
        )
        first = np.where(first == 0, found.kind, first)
    return first


def _look(arms: tuple[Columns, Columns], run: int, look: int) -> ExperimentStatistics:
    moments, products = {}, {}
    for arm, of_arm in zip("ab", arms, strict=True):
        s, q, x, xx, xy = (int(column[run, look]) for column in of_arm)
        moments["spend@age3", arm, 0, ""] = ((look + 1) * STEP, s, q)
        products["spend@age3", arm, 0, ""] = (x, xx, xy)
    return statistics(moments=moments, products=products)


def _share(found: np.ndarray) -> tuple[float, float]:
    """Share of runs that are flagged, and its Monte Carlo standard error at the level or more."""
    share = float((found > 0).mean())
    return share, math.sqrt(max(share * (1 - share), ALPHA * (1 - ALPHA)) / RUNS)


@pytest.mark.parametrize("effect", [0.0, 0.4])
def test_an_effect_that_lasts_is_flagged_at_most_at_its_level(effect: float) -> None:
    share, error = _share(flagged(1, effect, effect))
    print(f"lasting effect {effect}: flagged in {share:.4f} ± {error:.4f} of {RUNS} runs with {LOOKS} looks")
    assert share <= ALPHA + 3 * error


def test_a_test_that_is_not_always_valid_would_be_seen_here() -> None:
    """The same runs with a z test at every look: far above the level, so this simulation can fail."""
    arms = drawn(1, 0.4, 0.4)
    flags = np.zeros(RUNS, bool)
    for look in range(LOOKS):
        n = (look + 1) * STEP
        means, variances = [], []
        for y, yy, x, xx, xy in ([column[:, look].astype(float) for column in arm] for arm in arms):
            total, squares = y - 2 * x, yy - 4 * xy + 4 * xx
            means.append(total / n)
            variances.append((squares / n - (total / n) ** 2) / n)
        flags |= np.abs(means[1] - means[0]) > 1.959964 * np.sqrt(variances[0] + variances[1])
    assert flags.mean() > 3 * ALPHA


@pytest.mark.parametrize(
    ("early", "late", "kind"), [(0.6, 0.0, AgeChange.NOVELTY), (0.0, 0.6, AgeChange.HABITUATION)]
)
def test_an_effect_that_changes_is_flagged_by_its_name(early: float, late: float, kind: AgeChange) -> None:
    found = flagged(2, early, late)
    share, error = _share(found)
    print(f"effect {early} a day, then {late}: flagged in {share:.4f} ± {error:.4f}")
    assert share > 0.9
    # The change is what is proven; its name describes estimates, which at the first flag are still wide.
    named = float((found == CHANGES.index(str(kind))).sum() / (found > 0).sum())
    print(f"called {kind} in {named:.4f} of them at the first flag")
    assert named > 0.9
    last = flagged(2, early, late, peeks=False)
    assert (last == CHANGES.index(str(kind))).mean() > 0.99


def test_the_engine_flags_the_same() -> None:
    arms = drawn(2, 0.6, 0.0)
    wanted = flagged(2, 0.6, 0.0)
    for run in range(0, RUNS, RUNS // 10):
        looks = [(AGED, _look(arms, run, look)) for look in range(LOOKS)]
        kinds = [one.kind for (one,) in age_results(looks) if one.kind is not None]
        assert (str(kinds[0]) if kinds else "") == CHANGES[int(wanted[run])]


# --- winners --------------------------------------------------------------------------------------------------

EXPERIMENTS, PEEKS, GROUP = 1200, 10, 150
MEAN, NOISE, SPREAD = 10.0, 4.0, 0.4


@cache
def concluded() -> tuple[list[tuple[ExperimentRecord, Result]], list[float]]:
    """Experiments at their stop (the first look that proves an effect of either sign, else the last), and the truths.

    True effects are N(0, SPREAD^2), small beside the control mean. All begin at once and there are more of them than
    a prior is learned from: a bound that kept those that ended last would keep the small effects.
    """
    rng = np.random.default_rng(3)
    truths = rng.normal(0.0, SPREAD, EXPERIMENTS)
    records = [record(f"e{at}", 2 * PEEKS * GROUP) for at in range(EXPERIMENTS)]
    sums = []
    for shift in (np.zeros(EXPERIMENTS), truths):
        steps = np.rint(100 * rng.normal(MEAN + shift[:, None], NOISE, (EXPERIMENTS, PEEKS * GROUP))).astype(
            int
        )
        sums.append([np.cumsum(one, axis=1)[:, GROUP - 1 :: GROUP] for one in (steps, steps * steps)])
    stopped: dict[int, Result] = {}
    for look in range(PEEKS):
        live = [at for at in range(EXPERIMENTS) if at not in stopped]
        n = (look + 1) * GROUP
        looks = [
            (
                records[at],
                statistics(
                    moments={
                        ("spend", arm, 0, ""): (n, int(s[at, look]), int(q[at, look]))
                        for arm, (s, q) in zip("ab", sums, strict=True)
                    }
                ),
            )
            for at in live
        ]
        for at, found in zip(live, evaluate_all(looks), strict=True):
            effect = found.metrics[0].effect
            if (effect is not None and proven(effect)) or look == PEEKS - 1:
                stopped[at] = msgspec.structs.replace(
                    PAST,
                    experiment=f"e{at}",
                    version=1,
                    evaluated_ms=look,
                    runtime_ms=look,
                    metrics=found.metrics,
                )
    return [(records[at], stopped[at]) for at in range(EXPERIMENTS)], truths.tolist()


def errors(*, learned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Raw and shrunk estimate minus the truth, of every experiment that proved an increase."""
    found, truths = concluded()
    known = {(result.experiment, 1): made for made, result in found}
    past = past_effects(known, [result for _, result in found]) if learned else []
    raw, after = [], []
    for (made, result), truth in zip(found, truths, strict=True):
        (metric,) = result.metrics
        if metric.effect is None or not proven(metric.effect) or (metric.effect.estimate or 0.0) <= 0:
            continue
        worth = shrunk(made, metric, past)
        assert worth.prior is (PriorSource.LEARNED if learned else PriorSource.DEFAULT)
        assert worth.effect is not None
        raw.append((metric.effect.estimate or 0.0) - truth)
        after.append(worth.effect - truth)
    return np.array(raw), np.array(after)


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def test_winners_exaggerate_and_their_shrunk_effects_do_not() -> None:
    raw, after = errors(learned=True)
    bias, bias_error = _mean(raw)
    left, left_error = _mean(after)
    gain, gain_error = _mean(raw**2 - after**2)
    print(f"{len(raw)} winners of {EXPERIMENTS}")
    print(f"bias raw {bias:.4f} ± {bias_error:.4f}, shrunk {left:.4f} ± {left_error:.4f}")
    print(
        f"MSE raw {(raw**2).mean():.5f}, shrunk {(after**2).mean():.5f}, difference {gain:.5f} ± {gain_error:.5f}"
    )
    assert len(raw) > 100
    assert bias > 5 * bias_error
    assert abs(left) <= 3 * left_error
    assert gain > 3 * gain_error


def test_the_default_prior_does_no_harm_and_little_good() -> None:
    """Several times as wide as true effects scatter, it takes less than a tenth of the exaggeration away."""
    raw, after = errors(learned=False)
    assert np.all(after <= raw)
    assert float((raw - after).mean()) < 0.1 * float(raw.mean())
    assert (after**2).mean() <= (raw**2).mean()
