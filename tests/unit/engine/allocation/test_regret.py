"""Batched bandits on known truths, from fixed seeds, with the Monte Carlo error of each comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stream_xp.engine.allocation import BurnIn, Constraints, Conversions, Evidence, Policy, allocate
from stream_xp.stats import (
    Moments,
    Stratum,
    Undetermined,
    conversion_log_e,
    mean_difference,
    summarise,
    tuned_rho2,
)

pytestmark = pytest.mark.slow
RUNS, BATCHES, BATCH = 24, 15, 400
TRUTH = {"a": 0.05, "b": 0.07, "c": 0.10, "d": 0.05}
CONSTRAINTS = Constraints(floor=0.025, maximum_change=0.2, burn_in=BurnIn(units=50, conversions=5))


def history(policy, rng, *, drift=0.0):
    """Conversions lost against the best arm over one run, and the weights at its end."""
    weights = dict.fromkeys(TRUTH, 0.25)
    rows, lost = [], 0.0
    for epoch in range(BATCHES):
        units = rng.multinomial(BATCH, list(weights.values()))
        shift = drift * epoch / BATCHES
        for (arm, rate), n in zip(TRUTH.items(), units, strict=True):
            rows.append(Evidence(arm, Conversions(int(n), int(rng.binomial(n, rate + shift))), epoch))
            lost += n * (max(TRUTH.values()) - rate)
        if policy is not None:
            weights = allocate(policy, rows, weights, control="a", constraints=CONSTRAINTS).weights
    return lost, weights


@pytest.mark.parametrize("drift", [0.0, 0.3], ids=["level", "drifting"])
def test_policies_lose_less_than_a_uniform_split(drift):
    lost = {}
    for policy in (None, Policy.THOMPSON, Policy.TOP_TWO):
        rng = np.random.default_rng(41)
        lost[policy] = np.array([history(policy, rng, drift=drift)[0] for _ in range(RUNS)])
    for policy, share in ((Policy.THOMPSON, 0.75), (Policy.TOP_TWO, 0.9)):
        saved = lost[None].mean() * share - lost[policy].mean()
        error = math.hypot(lost[None].std() * share, lost[policy].std()) / math.sqrt(RUNS)
        assert saved > 3 * error, (policy, lost[None].mean(), lost[policy].mean(), error)
    # Top-two pays for certainty.
    assert lost[Policy.THOMPSON].mean() < lost[Policy.TOP_TWO].mean()


def test_the_best_arm_ends_with_most_weight():
    rng = np.random.default_rng(43)
    leaders = [max((w := history(Policy.THOMPSON, rng)[1]), key=w.__getitem__) for _ in range(RUNS)]
    assert leaders.count("c") >= 0.85 * RUNS


def test_a_contextual_bandit_finds_another_best_arm_in_each_context():
    truth = {"x": {"a": 0.05, "b": 0.10}, "y": {"a": 0.14, "b": 0.09}}
    found, lost, lost_without = 0, [], []
    for run in range(20):
        for policy in (Policy.CONTEXTUAL, Policy.THOMPSON):
            rng = np.random.default_rng(1000 + run)
            weights = {context: {"a": 0.5, "b": 0.5} for context in truth}
            rows, cost = [], 0.0
            for epoch in range(12):
                for context, rates in truth.items():
                    units = rng.multinomial(300, list(weights[context].values()))
                    for (arm, rate), n in zip(rates.items(), units, strict=True):
                        sums = Conversions(int(n), int(rng.binomial(n, rate)))
                        rows.append(Evidence(arm, sums, epoch, context))
                        cost += n * (max(rates.values()) - rate)
                got = allocate(
                    policy,
                    rows,
                    weights["x"],
                    control="a",
                    constraints=CONSTRAINTS,
                    current_by_context=weights if policy is Policy.CONTEXTUAL else None,
                )
                inside = got.by_context or dict.fromkeys(truth, got)
                weights = {context: inside[context].weights for context in truth}
            if policy is Policy.CONTEXTUAL:
                lost.append(cost)
                found += weights["x"]["b"] > 0.7 and weights["y"]["a"] > 0.7
            else:
                lost_without.append(cost)
    assert found >= 17
    error = math.hypot(np.std(lost), np.std(lost_without)) / math.sqrt(20)
    assert np.mean(lost_without) - np.mean(lost) > 3 * error


def test_tests_inside_epochs_hold_their_level_while_weights_follow_the_outcomes():
    """No effect, a rate that drifts from 10 to 50 %, Thompson weights: looked at after every batch at 5 %."""
    runs, batches, batch, alpha = 60, 15, 200, 0.05
    rho2 = tuned_rho2(batches * batch, alpha)
    free = Constraints(floor=0.05, maximum_change=0.5, burn_in=BurnIn(units=50, conversions=5))
    erred = {"exact": 0, "stratified": 0, "pooled": 0}
    rng = np.random.default_rng(47)
    for _ in range(runs):
        weights, rows, log, ever = {"a": 0.5, "b": 0.5}, [], [], set()
        for epoch in range(batches):
            n = rng.multinomial(batch, list(weights.values()))
            c = rng.binomial(n, 0.1 + 0.4 * epoch / batches)
            log.append((n, c, tuple(weights.values())))
            rows += [Evidence(arm, Conversions(int(n[i]), int(c[i])), epoch) for i, arm in enumerate("ab")]
            ever |= rejections(log, rho2=rho2, alpha=alpha)
            weights = allocate(Policy.THOMPSON, rows, weights, control="a", constraints=free).weights
        for name in ever:
            erred[name] += 1
    limit = runs * alpha + 3 * math.sqrt(runs * alpha * (1 - alpha))
    assert erred["exact"] <= limit
    assert erred["stratified"] <= limit
    # The same paths through pooled means: the simulation has teeth.
    assert erred["pooled"] > 0.3 * runs


def rejections(log, *, rho2, alpha):
    """Which tests reject at this look."""
    n, c, weights = (np.array(column) for column in zip(*log, strict=True))
    strata = [Stratum(*(Moments(int(u), int(s), int(s)) for u, s in zip(*e[:2], strict=True))) for e in log]
    found = set()
    if conversion_log_e(n, c, weights=weights) >= -math.log(alpha):
        found.add("exact")
    means = summarise(strata, scale=1.0)
    if not isinstance(means, Undetermined) and mean_difference(
        means, alpha=alpha, rho2=rho2
    ).log_e >= -math.log(alpha):
        found.add("stratified")
    units, hits = n.sum(axis=0), c.sum(axis=0)
    rate = hits / units
    z = (rate[1] - rate[0]) / math.sqrt((rate * (1 - rate) / units).sum())
    if abs(z) > 1.96:
        found.add("pooled")
    return found
