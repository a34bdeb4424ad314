"""Partial pooling: contexts with little data borrow, those with much stand alone, and intervals cover."""

from __future__ import annotations

import numpy as np
import pytest

from stream_xp.engine.allocation.contexts import pooled
from stream_xp.engine.allocation.evidence import Conversions, Values
from stream_xp.engine.allocation.posterior import NO_SPREAD, NO_UNITS, Prior
from stream_xp.engine.allocation.strata import APART
from stream_xp.stats import Undetermined


def rates(**contexts):
    """context=[(units, conversions) of arms a, b, ...]."""
    return {
        name: {arm: Conversions(*sums) for arm, sums in zip("abcdefgh", cells, strict=False)}
        for name, cells in contexts.items()
    }


def gap(posterior, one=0, other=1):
    return float(posterior.location[other] - posterior.location[one])


def test_a_single_context_is_its_own_whole():
    got = pooled(rates(x=[(1000, 100), (1000, 130)]), "ab", {})
    p = 231 / 2002
    for posterior in (got.by_context["x"], got.whole):
        assert gap(posterior) == pytest.approx(0.03)
        assert posterior.scale == pytest.approx([np.sqrt(p * (1 - p) / 1000)] * 2)
    assert got.interaction_variance == 0.0


def test_contexts_that_agree_are_pooled():
    got = pooled(rates(x=[(1000, 50), (1000, 60)], y=[(100, 20), (100, 21)]), "ab", {})
    assert got.interaction_variance == 0.0
    assert gap(got.by_context["x"]) == pytest.approx(gap(got.whole))
    assert gap(got.by_context["y"]) == pytest.approx(gap(got.whole))


def test_contexts_that_differ_stand_alone():
    got = pooled(rates(x=[(50_000, 2500), (50_000, 5000)], y=[(50_000, 5000), (50_000, 2500)]), "ab", {})
    assert got.interaction_variance > 0
    assert gap(got.by_context["x"]) == pytest.approx(0.05, rel=0.05)
    assert gap(got.by_context["y"]) == pytest.approx(-0.05, rel=0.05)


def test_an_empty_context_has_the_common_effect_and_the_interaction():
    cells = {"x": [(9000, 450), (9000, 900)], "y": [(9000, 900), (9000, 450)], "z": [(0, 0), (0, 0)]}
    got = pooled(rates(**cells), "ab", {})
    z = got.by_context["z"]
    assert z.location == pytest.approx(got.whole.location)
    assert z.scale**2 == pytest.approx(got.interaction_variance + got.whole.scale**2)


def test_mix_of_contexts_is_no_effect():
    # b is used where everybody converts, a where nobody does; inside contexts they are equal. Raw: 0.14 and 0.46.
    got = pooled(rates(x=[(900, 90), (100, 10)], y=[(100, 50), (900, 450)]), "ab", {})
    assert gap(got.whole) == pytest.approx(0.0, abs=1e-9)


def test_an_arm_without_conversions_is_not_certain():
    got = pooled(rates(x=[(30, 0), (3000, 300)]), "ab", {})
    assert got.by_context["x"].scale[0] > 0.04


def test_priors_hold_arms_without_units():
    cells = rates(x=[(1000, 100), (1000, 100), (0, 0)])
    assert pooled(cells, "abc", {}) == Undetermined(NO_UNITS)
    got = pooled(cells, "abc", {"c": Prior(0.2, 50.0)})
    assert got.whole.location[2] == pytest.approx(0.2)
    p = 201 / 2002
    assert got.whole.scale[2] == pytest.approx(np.sqrt(p * (1 - p) / 50))


def test_what_is_not_known_is_said():
    apart = {
        "x": dict.fromkeys("ab", Conversions(10, 1)) | dict.fromkeys("cd", Conversions(0, 0)),
        "y": dict.fromkeys("cd", Conversions(10, 1)) | dict.fromkeys("ab", Conversions(0, 0)),
    }
    assert pooled(apart, "abcd", {}) == Undetermined(APART)
    assert pooled({"x": {"a": Values(2, 2, 2)}}, "a", {}) == Undetermined(NO_SPREAD)


@pytest.mark.parametrize("tau", [0.0, 0.5], ids=["alike", "apart"])
def test_posteriors_cover_and_beat_the_contexts_own_means(tau):
    """Effects of arms in contexts drawn from the model; 90 % intervals of differences, and their squared errors."""
    rng = np.random.default_rng(17)
    arms, contexts, inside, ours, own = 3, 8, [], [], []
    for _ in range(300):
        level = rng.normal(0, 3, contexts)
        effect = rng.normal(0, 1, arms)
        truth = level + effect[:, None] + rng.normal(0, tau, (arms, contexts))
        n = rng.integers(5, 60, (arms, contexts))
        sums = {}
        for c in range(contexts):
            sums[str(c)] = {}
            for a in range(arms):
                y = rng.normal(truth[a, c], 1.0, n[a, c])
                sums[str(c)]["abc"[a]] = Values(int(n[a, c]), float(y.sum()), float(y @ y))
        got = pooled(sums, "abc", {})
        for c in range(contexts):
            posterior = got.by_context[str(c)]
            true = truth[1, c] - truth[0, c]
            sd = np.hypot(posterior.scale[0], posterior.scale[1])
            inside.append(abs(gap(posterior) - true) <= 1.645 * sd)
            ours.append((gap(posterior) - true) ** 2)
            own.append((sums[str(c)]["b"].mean - sums[str(c)]["a"].mean - true) ** 2)
    assert np.mean(ours) < np.mean(own) * (0.5 if tau == 0 else 0.95)
    # Given tau^2 and the levels, which are estimated: a few points of coverage are theirs.
    assert 0.85 <= np.mean(inside) <= 0.97
