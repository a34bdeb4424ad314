"""Error rates and power of the decision layer as a whole, under continuous looks.

Each test draws experiments from a fixed seed, evaluates and decides every hundred units or so, lets decisions
latch, and compares the share of experiments that ever stop or ship with the budgets of the spec plus three
Monte Carlo standard errors. Thousands of experiments with hundreds of looks are too many for `evaluate`, one
at a time; `Course` is its vectorised counterpart, and the last test proves that the two agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
import pytest

from stream_xp.domain.decision import Action
from stream_xp.domain.experiment import Direction, ExperimentRecord, ExperimentSpec, Role, WeightEpoch
from stream_xp.domain.statistics import build
from stream_xp.engine.design import pair_sample
from stream_xp.engine.evaluate import evaluate
from stream_xp.engine.policy import decide
from stream_xp.stats import (
    assignment_deviance,
    bernoulli_pair_log_e,
    conversion_log_e,
    early_one_sided,
    early_two_sided,
    guarded_variance,
    one_sided_rho2,
    sample_ratio_log_e,
    tuned_rho2,
)
from tests.simulation.runs import runs as drawn_runs

ERRORS = {
    "key": "errors",
    "kind": "conversion",
    "role": "guardrail",
    "direction": "decrease",
    "attribution_window": "1s",
    "margin": {"absolute": 0.005},
    "critical": True,
}
PLAY = {
    "key": "play",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": "1s",
}
HOLD, STOP, SHIP = 0, 1, 2
ACTIONS = {Action.HOLD: HOLD, Action.STOP: STOP, Action.SHIP: SHIP}


def record(metrics, epochs, **fields):
    """Arm `a` is the control; `epochs` lists the weights of each epoch."""
    arms = "abcdef"[: len(epochs[0])]
    spec = {
        "experiment": "e",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 20_000,
        "arms": [{"key": k, "weight": w, "control": k == "a"} for k, w in zip(arms, epochs[-1], strict=True)],
        "metrics": metrics,
    } | fields
    spec = msgspec.convert(spec, ExperimentSpec)
    listed = [
        WeightEpoch(epoch=e, weights=dict(zip(arms, w, strict=True)), effective_ms=e)
        for e, w in enumerate(epochs)
    ]
    return ExperimentRecord(spec=spec, epochs=tuple(listed), design_hash=spec.design_hash())


@dataclass
class Proofs:
    """Log e-values over their thresholds, arrays (runs, looks); where undetermined, -inf."""

    better: np.ndarray
    worse: np.ndarray
    harm: np.ndarray
    safe: np.ndarray


@dataclass
class Course:
    """Many runs of one experiment, every unit mature at once.

    `n`: cumulative units (runs, looks, epochs, arms); `s`: metric key to successes, of the same shape.
    """

    record: ExperimentRecord
    n: np.ndarray
    s: dict[str, np.ndarray]
    kept: dict = field(default_factory=dict)

    @cached_property
    def actions(self):
        """The decision at every look, before latching, and its arm: two arrays (runs, looks)."""
        spec = self.record.spec
        tested = [[self.tested(metric, arm) for metric in spec.metrics] for arm in range(1, len(spec.arms))]
        harmed = np.any([test.harm >= 0 for arm in tested for test in arm], axis=0)
        gains = np.stack([self._gain(arm) for arm in tested])
        best = gains.argmax(axis=0)
        # Named arms matter to the tests of ships only; a stop's arm is checked where there is one treatment.
        action = np.where(harmed | self.mismatch, STOP, np.where(gains.max(axis=0) >= 0, SHIP, HOLD))
        return action, np.where(action == SHIP, best + 1, 0)

    def _gain(self, tests):
        spec = self.record.spec
        primary = [t for t, m in zip(tests, spec.metrics, strict=True) if m.role is Role.PRIMARY]
        guards = [t for t, m in zip(tests, spec.metrics, strict=True) if m.role is Role.GUARDRAIL]
        allowed = np.ones(self.n.shape[:2], bool)
        for test in guards:
            allowed &= test.safe >= 0
        for test in primary:
            allowed &= test.worse < 0
        gain = np.max([np.full(allowed.shape, -np.inf), *(test.better for test in primary)], axis=0)
        return np.where(allowed, gain, -np.inf)

    @cached_property
    def mismatch(self):
        weights = [list(epoch.weights.values()) for epoch in self.record.epochs]
        log_e = sample_ratio_log_e(self.n, weights)
        return log_e >= -math.log(self.record.spec.sample_ratio_alpha)

    @cached_property
    def first(self):
        """What latches in each run: (action, arm, units of all arms); a run without a decision holds."""
        action, arm = self.actions
        at = np.where((action != HOLD).any(axis=1), (action != HOLD).argmax(axis=1), action.shape[1] - 1)
        rows = np.arange(len(action))
        return action[rows, at], arm[rows, at], self.n.sum(axis=(2, 3))[rows, at]

    def share(self, action, arm=None):
        made, of, _ = self.first
        return float(((made == action) & (arm is None or of == arm)).mean())

    def tested(self, metric, arm):
        """One metric in one arm, kept because the last test asks for it again and again."""
        key = (metric.key, arm)
        if key not in self.kept:
            self.kept[key] = self._test(metric, arm)
        return self.kept[key]

    def _test(self, metric, arm):
        pair = [0, arm]
        n, s = self.n[..., pair], self.s[metric.key][..., pair]
        mean, variance, total, ready = summarised(n, s)
        spec, rises = self.record.spec, metric.direction is Direction.INCREASE
        treatments = len(spec.treatments)
        nowhere = np.full(total.shape, -np.inf)
        compared = (n.min(axis=-1) > 0).any(axis=-1)
        difference, se = mean[1] - mean[0], np.where(ready, np.sqrt(variance.sum(axis=0)), 0.0)
        exact = Exact(self.record, n, s, pair)
        if metric.role is Role.PRIMARY:
            alpha = spec.alpha / (len(spec.with_role(Role.PRIMARY)) * treatments)
            found = early_two_sided(
                difference,
                se,
                total * tuned_rho2(pair_sample(spec), alpha),
                alpha=alpha,
                log_e_above=exact.label("above"),
                log_e_below=exact.label("below"),
            )
            beyond = np.where(compared, found.log_e + math.log(alpha), -np.inf)
            good = (difference > 0) == rises
            return Proofs(np.where(good, beyond, -np.inf), np.where(good, -np.inf, beyond), nowhere, nowhere)
        margin = metric.margin.absolute * (-1 if rises else 1)
        alpha = spec.guardrail_alpha / (len(spec.with_role(Role.GUARDRAIL)) * treatments)

        def beyond(margin, alpha, *, above):
            found = early_one_sided(
                difference - margin,
                se,
                total * one_sided_rho2(pair_sample(spec), alpha),
                alpha=alpha,
                above=above,
                log_e_exact=exact.margin(margin, "above" if above else "below"),
            )
            return np.where(compared, found.log_e + math.log(alpha), -np.inf)

        harm = beyond(0.0 if metric.critical else margin, alpha, above=not rises)
        return Proofs(nowhere, nowhere, harm, beyond(margin, spec.alpha, above=rises))


class Exact:
    """The exact part of every test of two conversion rates, for all runs and looks."""

    def __init__(self, record, n, s, pair):
        weights = np.array([list(epoch.weights.values()) for epoch in record.epochs])[:, pair]
        self.weights = weights / weights.sum(axis=-1, keepdims=True)
        self.n, self.s = n.astype(np.int64), s.astype(np.int64)

    def label(self, side):
        log_e = conversion_log_e(self.n, self.s, weights=self.weights, side=side)
        return log_e - assignment_deviance(self.n, self.weights)

    def margin(self, margin, side):
        if margin == 0:
            return self.label(side)
        log_e = bernoulli_pair_log_e(self.n[..., 0, :], self.s[..., 0, :], margin=margin, side=side)
        return np.where(self.n[..., 1:, :].any(axis=(-2, -1)), -np.inf, log_e)


def summarised(n, s):
    """Vectorised counterpart of `stats.summarise` for 0 and 1: n and s (..., epochs, 2 arms).

    Returns means and variances (2, ...), units of both arms (...), and whether they are determined (...).
    """
    used = (n.min(axis=-1) > 0)[..., np.newaxis]
    n, s = np.where(used, n, 0).astype(float), np.where(used, s, 0).astype(float)
    safe, both = np.maximum(n, 1), np.maximum(n.sum(axis=-1), 1)
    epochs, total = used[..., 0].sum(axis=-1), np.maximum(n.sum(axis=(-2, -1)), 1)
    degrees = n.sum(axis=-2) - epochs[..., np.newaxis]
    own = (s - s * s / safe).sum(axis=-2) / np.maximum(degrees, 1)
    pooled = (s.sum(axis=-1) - s.sum(axis=-1) ** 2 / both).sum(axis=-1) / np.maximum(total - epochs, 1)
    unit = guarded_variance(
        np.maximum(own, 0), np.maximum(pooled, 0)[..., np.newaxis], degrees=np.maximum(degrees, 0)
    )
    size = np.where(used, n.sum(axis=-1, keepdims=True), 0)
    mean = (size * s / safe).sum(axis=-2) / total[..., np.newaxis]
    level = unit * (size**2 / safe).sum(axis=-2) / total[..., np.newaxis] ** 2
    pooled_e = np.where(used[..., 0], s.sum(axis=-1) - s.sum(axis=-1) ** 2 / both, 0) / np.maximum(
        both - 1, 1
    )
    free = np.maximum(n - 1, 0)
    base = (free * pooled_e[..., np.newaxis]).sum(axis=-2) / np.maximum(degrees, 1)
    ratio = np.where(base > 0, np.maximum(own, 0) / np.where(base > 0, base, 1), 1)
    ratio = guarded_variance(ratio, 1.0, degrees=np.maximum(degrees, 0))
    lent = 25 * ratio[..., np.newaxis, :] * pooled_e[..., np.newaxis]
    unit_e = (np.maximum(s - s * s / safe, 0) + lent) / (free + 25)
    by_epoch = (size**2 * unit_e / safe).sum(axis=-2) / total[..., np.newaxis] ** 2
    variance = np.where((epochs > 1)[..., np.newaxis], np.maximum(level, by_epoch), level)
    spent = np.where(epochs == 1, 0, epochs)
    ready = (n.sum(axis=-2).min(axis=-1) - spent >= 25) & (pooled > 1e-15)
    variance = np.where(ready[..., np.newaxis], variance, 1.0)
    return np.moveaxis(mean, -1, 0), np.moveaxis(variance, -1, 0), total, ready


def course(record, rates, *, runs, units, batch=100, seed, shares=None):
    """Draw runs. `rates`: metric key to the rate of each arm, or to rows of them, one per batch.

    The epochs of the record have equally many units; `shares` are the true ones, where the weights lie.
    """
    rng = np.random.default_rng(seed)
    epochs, looks = len(record.epochs), units // batch
    weights = [list(epoch.weights.values()) for epoch in record.epochs] if shares is None else shares
    arms = len(weights[0])
    of = np.arange(looks) * epochs // looks
    fresh = np.stack([rng.multinomial(batch, weights[epoch], size=runs) for epoch in of], axis=1)
    inside = (of[:, np.newaxis] == np.arange(epochs))[np.newaxis, :, :, np.newaxis]

    def along(counts):
        return np.cumsum(counts[:, :, np.newaxis, :] * inside, axis=1)

    by_batch = {key: np.broadcast_to(np.asarray(rate), (looks, arms)) for key, rate in rates.items()}
    s = {key: along(rng.binomial(fresh, rate[np.newaxis])) for key, rate in by_batch.items()}
    return Course(record, along(fresh), s)


def limit(alpha, runs):
    return alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def report(record_property, name, share, runs):
    record_property(name, share)
    print(f"{name}: {share:.4f} +- {math.sqrt(share * (1 - share) / runs):.4f}")
    return share


# ---- a canary ----------------------------------------------------------------------------------------

CANARY = record([ERRORS], [[0.9, 0.1]])


def test_a_healthy_canary_is_left_alone(record_property):
    runs = drawn_runs(1000, short=250)
    found = course(CANARY, {"errors": [0.01, 0.01]}, runs=runs, units=20_000, seed=1)
    assert report(record_property, "false stops", found.share(STOP), runs) <= limit(0.05, runs)
    assert found.share(SHIP) == 0


def test_a_harmful_canary_is_stopped(record_property):
    runs = 500
    found = course(CANARY, {"errors": [0.01, 0.03]}, runs=runs, units=20_000, seed=2)
    assert report(record_property, "stops", found.share(STOP), runs) > 0.95
    median = float(np.median(found.first[2]))
    record_property("median units", median)
    print(f"median units: {median:.0f}")
    assert median < 10_000


# ---- nothing to find ---------------------------------------------------------------------------------


def test_an_aa_test_is_left_alone(record_property):
    runs, margin = drawn_runs(1000, short=250), {"margin": {"absolute": 0.02}}
    found = course(
        record([PLAY, ERRORS | margin], [[0.5, 0.5]]),
        {"play": [0.2, 0.2], "errors": [0.02, 0.02]},
        runs=runs,
        units=20_000,
        seed=3,
    )
    wrong = report(record_property, "stops", found.share(STOP), runs)
    wrong += report(record_property, "ships", found.share(SHIP), runs)
    assert wrong <= limit(0.05 + 0.05 + 0.001, runs)


def test_many_metrics_and_arms_share_the_budgets(record_property):
    runs, weights = drawn_runs(300, short=150), [0.4, 0.2, 0.2, 0.2]
    metrics = [PLAY, PLAY | {"key": "take"}, ERRORS, ERRORS | {"key": "crash"}]
    found = course(
        record([m | {"margin": {"absolute": 0.1}} if "margin" in m else m for m in metrics], [weights]),
        {"play": [0.3] * 4, "take": [0.1] * 4, "errors": [0.05] * 4, "crash": [0.1] * 4},
        runs=runs,
        units=20_000,
        batch=200,
        seed=4,
    )
    wrong = report(record_property, "stops", found.share(STOP), runs)
    wrong += report(record_property, "ships", found.share(SHIP), runs)
    assert wrong <= limit(0.05 + 0.05 + 0.001, runs)


def test_a_ramp_with_a_drifting_baseline_is_left_alone(record_property):
    """10 % of the units, then half of them, while both rates climb threefold; pooled, b would look better."""
    runs, looks = drawn_runs(1000, short=250), 200
    climb = np.linspace(1, 3, looks)[:, np.newaxis]
    metrics = [PLAY, ERRORS | {"margin": {"absolute": 0.02}}]
    found = course(
        record(metrics, [[0.9, 0.1], [0.5, 0.5]]),
        {"play": climb * [0.1, 0.1], "errors": climb * [0.01, 0.01]},
        runs=runs,
        units=20_000,
        seed=5,
    )
    wrong = report(record_property, "stops", found.share(STOP), runs)
    wrong += report(record_property, "ships", found.share(SHIP), runs)
    assert wrong <= limit(0.05 + 0.05 + 0.001, runs)
    # The test has teeth: the same runs with their epochs pooled.
    pooled = Course(
        record(metrics, [[0.7, 0.3]]),
        found.n[:200].sum(axis=2, keepdims=True),
        {key: s[:200].sum(axis=2, keepdims=True) for key, s in found.s.items()},
    )
    assert report(record_property, "pooled", 1 - pooled.share(HOLD), 200) > 0.5


def test_an_arm_at_its_margin_is_neither_stopped_nor_shipped(record_property):
    """The primary is far better, the guardrail exactly as bad as is just not tolerable."""
    runs = drawn_runs(1000, short=250)
    guard = ERRORS | {"critical": False, "margin": {"absolute": 0.02}}
    found = course(
        record([PLAY, guard], [[0.5, 0.5]]),
        {"play": [0.2, 0.3], "errors": [0.05, 0.07]},
        runs=runs,
        units=20_000,
        seed=6,
    )
    assert report(record_property, "stops", found.share(STOP), runs) <= limit(0.05 + 0.001, runs)
    assert report(record_property, "ships", found.share(SHIP), runs) <= limit(0.05, runs)


# ---- something to find -------------------------------------------------------------------------------


def test_the_best_of_three_cells_ships(record_property):
    """Take rates of 1 : 1.14 : 1.06; after three fifths of the units, as in the demo, and at once."""
    runs, third = 300, 1 / 3
    found = course(
        record([PLAY], [[third, third, third]], planned_sample=40_000),
        {"play": [0.3, 0.342, 0.318]},
        runs=runs,
        units=48_000,
        batch=400,
        seed=7,
    )
    late = slice(int(0.6 * 120), None)
    patient = Course(found.record, found.n[:, late], {key: s[:, late] for key, s in found.s.items()})
    for name, of in (("at once", found), ("patient", patient)):
        assert report(record_property, f"second, {name}", of.share(SHIP, 1), runs) > 0.95
        assert report(record_property, f"third, {name}", of.share(SHIP, 2), runs) < 0.05


# ---- the sample ratio --------------------------------------------------------------------------------

HALVES = record([PLAY], [[0.5, 0.5]])
FLAT = {"play": [0.2, 0.2]}


def test_a_wrong_sample_ratio_stops(record_property):
    runs = 500
    found = course(HALVES, FLAT, runs=runs, units=20_000, seed=8, shares=[[0.52, 0.48]])
    assert report(record_property, "stops", found.share(STOP), runs) > 0.9


def test_the_right_sample_ratio_does_not(record_property):
    runs = 3000
    found = course(HALVES, FLAT, runs=runs, units=20_000, batch=250, seed=9)
    assert report(record_property, "stops", found.share(STOP), runs) <= limit(0.001, runs)


def test_a_fixed_sample_ratio_test_would(record_property):
    """The same kind of runs, peeked at with a chi-squared test of the same level: it errs many times as often."""
    runs = 1000
    n = course(HALVES, FLAT, runs=runs, units=20_000, seed=9).n[:, :, 0]
    z2 = (n[..., 0] - n[..., 1]) ** 2 / n.sum(axis=-1)
    assert report(record_property, "stops", float((z2 > 10.828).any(axis=1).mean()), runs) > 0.008


# ---- the vectorised decisions are those of the service -----------------------------------------------


def statistics_at(course, run, look):
    arms = [arm.key for arm in course.record.spec.arms]
    cells = np.ndindex(course.n.shape[2:])
    places = [(arms[arm], epoch, "", (run, look, epoch, arm)) for epoch, arm in cells]
    return build(
        units={(arm, epoch, seg): int(course.n[at]) for arm, epoch, seg, at in places},
        moments={
            (key, arm, epoch, seg): (int(course.n[at]), int(s[at]), int(s[at]))
            for arm, epoch, seg, at in places
            for key, s in course.s.items()
        },
        crossover_units=0,
        first_exposure_ms=0,
        out_of_range={},
    )


THREE = [0.4, 0.3, 0.3]
SAMPLED = {
    "canary": (CANARY, {"errors": [0.01, 0.03]}, None),
    "guarded": (
        record(
            [PLAY, ERRORS | {"critical": False, "direction": "increase", "margin": {"absolute": 0.05}}],
            [[0.5, 0.5]],
        ),
        {"play": [0.2, 0.25], "errors": [0.3, 0.27]},
        None,
    ),
    "ramp": (
        record(
            [PLAY, PLAY | {"key": "lag", "direction": "decrease"}, ERRORS | {"margin": {"absolute": 0.03}}],
            [[0.9, 0.1], [0.5, 0.5]],
        ),
        {"play": [0.2, 0.23], "lag": [0.3, 0.28], "errors": [0.02, 0.02]},
        None,
    ),
    "cells": (record([PLAY], [THREE, THREE]), {"play": [0.3, 0.342, 0.33]}, None),
    "skewed": (HALVES, {"play": [0.2, 0.22]}, [[0.53, 0.47]]),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_the_vectorised_decisions_are_those_of_the_service(name):
    of, rates, shares = SAMPLED[name]
    found = course(of, rates, runs=6, units=16_000, batch=40, seed=10, shares=shares)
    actions, arms = found.actions
    seen = set()
    # The first looks, where little is determined, the rest spread out, and both sides of the first decision.
    turns = (actions != HOLD).argmax(axis=1)
    for run in range(6):
        looks = {0, 1, 2, 5, 7, 10, 40, 100, 199, 200, 201, 210, 300, 399, turns[run], max(turns[run] - 1, 0)}
        for look in sorted(looks):
            evaluation = evaluate(of, statistics_at(found, run, look))
            decision = decide(of.spec, evaluation, runtime_ms=0)
            keys = [arm.key for arm in of.spec.arms]
            assert ACTIONS[decision.action] == actions[run, look], (run, look, decision)
            if decision.action is Action.SHIP:
                assert decision.arm == keys[arms[run, look]]
            seen.add(decision.action)
            for result in evaluation.metrics:
                check_evidence(found, result, run, look)
    assert len(seen) > 1


def check_evidence(course, result, run, look):
    spec = course.record.spec
    metric = next(metric for metric in spec.metrics if metric.key == result.metric)
    arm = [arm.key for arm in spec.arms].index(result.arm)
    test = course.tested(metric, arm)
    if metric.role is Role.PRIMARY:
        pairs = [(result.effect, np.maximum(test.better, test.worse))]
    else:
        pairs = [(result.harm, test.harm), (result.safety, test.safe)]
    for evidence, beyond in pairs:
        value = beyond[run, look]
        if evidence is None:
            assert value == -np.inf
        else:
            assert evidence.log_e - evidence.threshold_log_e == pytest.approx(value, rel=1e-6, abs=1e-6)
