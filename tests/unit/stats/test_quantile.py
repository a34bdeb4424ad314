from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats._boundaries import beta_binomial_boundary, beta_binomial_log_e, tuned_concentration
from stream_xp.stats.distribution import (
    LEVELS,
    distribution_band,
    distribution_difference,
    distribution_log_e,
)
from stream_xp.stats.log_histogram import LogHistogram, lower_edge
from stream_xp.stats.normal_mixture import Undetermined
from stream_xp.stats.quantile import (
    NO_VALUES,
    Sample,
    quantile,
    quantile_concentration,
    quantile_difference,
    quantile_difference_log_e,
    quantile_log_e,
)

SIDES = ("both", "above", "below")
COMBINATIONS = ("average", "product")
K = quantile_concentration(60, 0.2)
VALUES = st.lists(st.integers(0, 12), min_size=1, max_size=60)
Q = st.sampled_from([0.1, 0.5, 0.8])


def evidence(k, n, q, side, concentration=K):
    """Log e-value of k of n values below the quantile; "above" gains from few."""
    tail = {"both": "both", "above": "below", "below": "above"}[side]
    k, n, q, c = (np.asarray(float(i)) for i in (k, n, q, concentration))
    return float(beta_binomial_log_e(k, n, p=q, concentration=c, side=tail))


def at(values, x, q, side):
    """The log e-value of x by the definition: the count below x that refutes least."""
    values = np.asarray(values)
    counts = range(int((values < x).sum()), int((values <= x).sum()) + 1)
    return min(evidence(k, len(values), q, side) for k in counts)


def difference_by_search(control, treatment, q, *, shift, side, combination):
    """The infimum over every x that could matter: the values themselves and the gaps between them."""
    opposite = {"both": "both", "above": "below", "below": "above"}[side]
    points = sorted({*control, *(shift.inverse(t) for t in treatment)})
    gaps = [(a + b) / 2 for a, b in itertools.pairwise(points)]
    found = []
    for x in [points[0] - 1, *points, *gaps, points[-1] + 1]:
        pair = at(control, x, q, opposite), at(treatment, shift(x), q, side)
        found.append(sum(pair) if combination == "product" else np.logaddexp(*pair) - math.log(2))
    return min(found)


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x + self.by

    def inverse(self, y):
        return y - self.by


# For each p: lower and upper end by the published rule, from the two boundaries of the beta-binomial mixture.
@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [30, 1000])
def test_the_sequence_is_that_of_the_boundaries(q, n):
    values = np.random.default_rng(1).normal(size=n)
    ordered, k = np.sort(values), tuned_concentration(100, 0.05)
    found = quantile(Sample.from_values(values), q, alpha=0.05, concentration=float(k))
    below, above = (
        float(beta_binomial_boundary(np.asarray(n), p=np.asarray(p), concentration=k, alpha=np.asarray(0.05)))
        for p in (1 - q, q)
    )
    low, high = n * q - below, n * q + above
    assert found.lower == (ordered[math.ceil(low) - 1] if low >= 0 else -math.inf)
    assert found.upper == (ordered[math.floor(high)] if high < n else math.inf)


def test_too_few_values_for_a_far_quantile_have_no_upper_end():
    sample = Sample.from_values(np.arange(50.0))
    found = quantile(sample, 0.99, alpha=0.05, concentration=quantile_concentration(1000, 0.05))
    assert found.upper == math.inf
    assert math.isfinite(found.lower)
    assert quantile(sample, 0.01, alpha=0.05, concentration=10).lower == -math.inf


@settings(deadline=None, max_examples=50)
@given(VALUES, Q, st.sampled_from(SIDES), st.floats(-1, 13))
def test_log_e_is_its_definition_with_ties(values, q, side, x):
    sample = Sample.from_values(values)
    for null in (x, float(round(x))):
        found = quantile_log_e(sample, q, null=null, concentration=K, side=side)
        assert found == pytest.approx(at(values, null, q, side), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(VALUES, Q, st.sampled_from(SIDES), st.floats(0.02, 0.5))
def test_rejecting_is_leaving_the_sequence(values, q, side, alpha):
    sample = Sample.from_values(values)
    found = quantile(sample, q, alpha=alpha, concentration=K, side=side)
    for null in np.arange(-1, 14, 0.5):
        log_e = quantile_log_e(sample, q, null=null, concentration=K, side=side)
        assert (log_e >= math.log(1 / alpha)) == (not found.lower <= null <= found.upper)


@settings(deadline=None, max_examples=40)
@given(VALUES, Q, st.sampled_from(SIDES))
def test_bins_round_outward(values, q, side):
    exact = quantile(Sample.from_values(values), q, alpha=0.3, concentration=K, side=side)
    edges = np.array([0.0, 1.0, 3.0, 4.0, 8.0, 13.0])
    sample = Sample.from_bins(edges, np.histogram(values, edges)[0])
    binned = quantile(sample, q, alpha=0.3, concentration=K, side=side)
    assert binned.lower <= exact.lower
    assert binned.upper >= exact.upper
    for null in np.arange(-1, 14, 0.5):
        loose = quantile_log_e(sample, q, null=null, concentration=K, side=side)
        assert (
            loose
            <= quantile_log_e(Sample.from_values(values), q, null=null, concentration=K, side=side) + 1e-9
        )
        assert (loose >= math.log(1 / 0.3)) == (not binned.lower <= null < binned.upper)


@settings(deadline=None, max_examples=30)
@given(VALUES, VALUES, Q, st.sampled_from(SIDES), st.sampled_from(COMBINATIONS), st.integers(-4, 4))
def test_the_evidence_of_a_difference_is_the_least_over_common_values(a, b, q, side, combination, margin):
    found = quantile_difference_log_e(
        Sample.from_values(a),
        Sample.from_values(b),
        q,
        margin=margin,
        concentration=K,
        combination=combination,
        side=side,
    )
    expected = difference_by_search(a, b, q, shift=Shift(margin), side=side, combination=combination)
    assert found == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(VALUES, VALUES, Q, st.sampled_from(SIDES), st.sampled_from(COMBINATIONS), st.booleans())
def test_an_effect_is_rejected_where_it_lies_outside(a, b, q, side, combination, binned):
    if binned:
        control, treatment = (Sample.from_bins(np.arange(14.0), np.bincount(v, minlength=13)) for v in (a, b))
    else:
        control, treatment = Sample.from_values(a), Sample.from_values(b)
    options = {"concentration": K, "combination": combination, "side": side}
    found = quantile_difference(control, treatment, q, alpha=0.2, **options)
    for margin in np.arange(-14.25, 14.5, 1.25):
        log_e = quantile_difference_log_e(control, treatment, q, margin=margin, **options)
        assert (log_e >= math.log(5)) == (not found.lower <= margin <= found.upper)


@settings(deadline=None, max_examples=40)
@given(VALUES, VALUES, Q, st.sampled_from(SIDES), st.sampled_from(COMBINATIONS))
def test_a_relative_effect_is_rejected_where_it_lies_outside(a, b, q, side, combination):
    control, treatment = (Sample.from_values([v + 1 for v in values]) for values in (a, b))
    options = {"concentration": K, "combination": combination, "side": side, "relative": True}
    found = quantile_difference(control, treatment, q, alpha=0.2, **options)
    for margin in np.linspace(-0.987, 14.123, 17):
        log_e = quantile_difference_log_e(control, treatment, q, margin=margin, **options)
        assert (log_e >= math.log(5)) == (not found.lower <= margin <= found.upper)


@settings(deadline=None, max_examples=40)
@given(VALUES, VALUES, Q, st.floats(0.05, 0.6))
def test_the_average_lies_inside_the_box(a, b, q, alpha):
    control, treatment = Sample.from_values(a), Sample.from_values(b)
    found = quantile_difference(control, treatment, q, alpha=alpha, concentration=K)
    one, two = (quantile(s, q, alpha=alpha / 2, concentration=K) for s in (control, treatment))
    assert found.lower >= two.lower - one.upper
    assert found.upper <= two.upper - one.lower


@settings(deadline=None, max_examples=30)
@given(VALUES, VALUES, Q, st.sampled_from(COMBINATIONS))
def test_exchanged_arms_mirror_the_difference(a, b, q, combination):
    one = quantile_difference(
        Sample.from_values(a), Sample.from_values(b), q, alpha=0.2, concentration=K, combination=combination
    )
    two = quantile_difference(
        Sample.from_values(b), Sample.from_values(a), q, alpha=0.2, concentration=K, combination=combination
    )
    assert (one.lower, one.upper, one.estimate) == (-two.upper, -two.lower, -two.estimate)


def latencies(n, scale, seed):
    return np.random.default_rng(seed).lognormal(5, 1, n) * scale


@pytest.mark.parametrize("n", [40, 3000, 60_000])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_looking_at_few_cells_finds_what_looking_at_all_does(n, side, combination):
    module = importlib.import_module("stream_xp.stats.quantile")
    p, k, product = (
        np.array([0.05, 0.5, 0.9, 0.99]),
        quantile_concentration(3000, 0.05),
        combination == "product",
    )
    for scale in (1.0, 1.05, 1.6):
        arms = [
            Sample.from_histogram(LogHistogram.from_values([int(v) for v in latencies(m, s, seed)]), 1.0)
            for m, s, seed in ((n, 1.0, 1), (n // 4, scale, 2))
        ]
        both = module._arms(*arms, p, concentration=k, side=side)
        keys = arms[0].keys, arms[1].keys
        ends = module._difference_ends(*arms)
        log_e, exact = module._least_evidence(both, keys, product=product, whole=False)
        whole, _ = module._least_evidence(both, keys, product=product, whole=True)
        if exact:
            assert log_e == pytest.approx(whole, abs=1e-12)
        lower, upper, exact = module._effects(both, ends, math.log(20), product=product, whole=False)
        low, high, _ = module._effects(both, ends, math.log(20), product=product, whole=True)
        if exact:
            assert (lower.tolist(), upper.tolist()) == (low.tolist(), high.tolist())


def test_many_comparisons_at_once_are_one_by_one():
    edges, q = lower_edge(np.arange(401)).astype(float), [0.5, 0.9]
    rng = np.random.default_rng(3)
    counts = [rng.poisson(np.exp(-(((np.arange(400) - 200 - s) / 40) ** 2)), (3, 2, 400)) for s in (0, 5)]
    for arm in counts:
        arm[2, 1] = 0
    control, treatment = (Sample.from_bins(edges, c) for c in counts)
    options = {"concentration": (K, 2 * K), "side": "both"}
    many = quantile_difference(control, treatment, q, alpha=0.05, **options)
    log_e = quantile_difference_log_e(control, treatment, q, margin=0.1, relative=True, **options)
    assert many.lower.shape == log_e.shape == (3, 2, 2)
    assert many.determined.tolist() == [[[True] * 2] * 2, [[True] * 2] * 2, [[True] * 2, [False] * 2]]
    assert (log_e[2, 1].tolist(), many.lower[2, 1, 0], many.estimate[2, 1, 1]) == ([0.0, 0.0], -math.inf, 0.0)
    for i, j in ((0, 0), (1, 1), (2, 0)):
        one, two = (Sample.from_bins(edges, c[i, j]) for c in counts)
        for r, p in enumerate(q):
            found = quantile_difference(one, two, p, alpha=0.05, **options)
            assert (found.lower, found.upper) == (many.lower[i, j, r], many.upper[i, j, r])
            assert found.estimate == pytest.approx(many.estimate[i, j, r])
            alone = quantile_difference_log_e(one, two, p, margin=0.1, relative=True, **options)
            assert alone == pytest.approx(log_e[i, j, r], abs=1e-10)
    assert quantile(control, 0.5, alpha=0.05, concentration=K).lower.shape == (3, 2)
    assert quantile_log_e(control, 0.5, null=100.0, concentration=K).shape == (3, 2)
    assert distribution_log_e(control, treatment, concentration=K).shape == (3, 2)


def test_estimates():
    sample = Sample.from_values([3.0, 1.0, 2.0, 4.0])
    assert [quantile(sample, q, alpha=0.05, concentration=K).estimate for q in (0.25, 0.5, 0.51)] == [1, 2, 3]
    binned = Sample.from_bins([0.0, 10.0, 20.0], [4, 4])
    assert quantile(binned, [0.25, 0.75], alpha=0.05, concentration=K).estimate.tolist() == [5.0, 15.0]


def test_a_trillion_values():
    counts = np.array([10**12, 10**12 + 10**7, 10**12, 0])
    sample = Sample.from_bins(np.arange(5.0), counts)
    other = Sample.from_bins(np.arange(5.0), counts[::-1])
    found = quantile(sample, 0.5, alpha=0.05, concentration=1e6)
    assert (found.lower, found.upper) == (1.0, 2.0)
    log_e = quantile_difference_log_e(sample, other, [0.01, 0.5, 0.999], concentration=1e6)
    assert np.isfinite(log_e).all()
    assert log_e[0] > 1e9
    for side in SIDES:
        value = quantile_log_e(sample, 0.5, null=-1.0, concentration=1e6, side=side)
        assert math.isfinite(value)


def test_a_control_quantile_of_zero_leaves_the_ratio_open():
    control, treatment = Sample.from_values(np.zeros(200)), Sample.from_values(np.ones(200))
    found = quantile_difference(control, treatment, 0.5, alpha=0.05, concentration=K, relative=True)
    assert found.upper == math.inf
    assert math.isfinite(found.estimate)


def test_without_values_nothing_is_determined():
    empty, some = Sample.from_values([]), Sample.from_values([1.0, 2.0])
    assert quantile(empty, 0.5, alpha=0.05, concentration=K) == Undetermined(NO_VALUES)
    assert quantile_difference(empty, some, 0.5, alpha=0.05, concentration=K) == Undetermined(NO_VALUES)
    assert quantile_difference_log_e(some, empty, 0.5, concentration=K) == 0.0
    assert quantile_log_e(empty, 0.5, null=1.0, concentration=K) == 0.0
    found = distribution_difference(empty, some, alpha=0.05, n_min=1, concentration=K)
    assert found == Undetermined(NO_VALUES)
    histogram = Sample.from_histogram(LogHistogram.empty(), 1.0)
    assert quantile(histogram, 0.5, alpha=0.05, concentration=K) == Undetermined(NO_VALUES)


# Published: t = 1000, t_min = 100, alpha = 0.05 (Howard and Ramdas; confseq 0.0.11 empirical_process_lil_bound).
def test_the_radius_of_the_band():
    assert distribution_band(1000, n_min=100, alpha=0.05) == pytest.approx(0.08205, abs=5e-6)
    radii = distribution_band(np.array([[0, 99], [100, 1e12]]), n_min=100, alpha=0.05)
    assert radii.shape == (2, 2)
    assert radii[0].tolist() == [math.inf, math.inf]
    assert radii[1, 0] > radii[1, 1] > 0


@pytest.mark.parametrize("side", SIDES)
def test_bands_separate_where_the_distribution_functions_do(side):
    x, y = latencies(4000, 1.0, 1), latencies(3000, 1.3, 2)
    found = distribution_difference(
        Sample.from_values(x), Sample.from_values(y), alpha=0.05, n_min=50, concentration=K, side=side
    )
    grid = np.sort(np.concatenate([x, y]))
    f0, f1 = (np.searchsorted(np.sort(v), grid, side="right") / len(v) for v in (x, y))
    gaps = {"above": f0 - f1, "below": f1 - f0, "both": np.abs(f0 - f1)}[side]
    assert found.separation == pytest.approx(max(gaps.max(), 0.0), abs=1e-12)
    radius = sum(distribution_band(n, n_min=50, alpha=0.025) for n in (4000, 3000))
    assert found.radius == pytest.approx(radius)
    assert found.bands_separate == (side != "below")
    assert found.separated_from <= found.at <= found.separated_to
    if found.bands_separate:
        assert found.separated_from == pytest.approx(grid[gaps >= radius][0])
        assert found.p_always_valid < 1e-6


@pytest.mark.parametrize("scale", [1.15, 1.3, 2.0])
def test_the_p_of_the_bands_is_their_dual(scale):
    x, y = (Sample.from_values(latencies(2000, s, seed)) for s, seed in ((1.0, 1), (scale, 2)))
    found = distribution_difference(x, y, alpha=0.05, n_min=20, concentration=K)
    assert found.bands_separate == (found.band_log_p <= math.log(0.05))
    for factor in (0.9, 1.1):
        alpha = min(math.exp(found.band_log_p) * factor, 0.999)
        if found.band_log_p < 0:
            again = distribution_difference(x, y, alpha=alpha, n_min=20, concentration=K)
            assert again.bands_separate == (factor > 1)


def test_the_distribution_e_value_is_the_average_over_levels():
    x, y = (Sample.from_values(latencies(500, s, seed)) for s, seed in ((1.0, 1), (1.3, 2)))
    parts = [
        quantile_difference_log_e(x, y, q, concentration=K, combination="product", side="above")
        for q in LEVELS
    ]
    found = distribution_log_e(x, y, concentration=K, side="above")
    assert found == pytest.approx(np.logaddexp.reduce(parts) - math.log(len(LEVELS)))


def test_binned_bands_are_exact_at_shared_edges():
    edges = np.linspace(0, 5000, 200)
    values = [np.clip(latencies(1500, s, seed), 0, 4999) for s, seed in ((1.0, 1), (1.4, 2))]
    counts = [np.histogram(v, edges)[0] for v in values]
    x, y = (Sample.from_bins(edges, c) for c in counts)
    found = distribution_difference(x, y, alpha=0.05, n_min=20, concentration=K)
    expected = np.abs(np.cumsum(counts[0]) - np.cumsum(counts[1])).max() / 1500
    assert found.separation == pytest.approx(expected)


SAMPLE = Sample.from_values([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sample.from_values([[1.0]]), "values must be one-dimensional"),
        (lambda: Sample.from_values([math.nan]), "values must be finite"),
        (lambda: Sample.from_bins([0.0], [1]), "edges must be one-dimensional"),
        (lambda: Sample.from_bins([0.0, 0.0], [1]), "edges must be one-dimensional and strictly ascending"),
        (lambda: Sample.from_bins([0.0, 1.0], [1, 2]), "counts must have 1 bins"),
        (lambda: Sample.from_bins([0.0, 1.0], [-1]), "counts must not be negative"),
        (lambda: Sample.from_bins([0.0, 1.0], [0.5]), "counts must be integers"),
        (lambda: Sample.from_bins([0.0, 1.0, 2.0], [2**52, 2**52]), r"counts must sum to less than 2\*\*53"),
        (lambda: quantile_concentration(0, 0.05), "n_star must be greater than 0"),
        (lambda: quantile_concentration(10, 0.6, side="above"), "alpha must lie strictly between 0 and 0.5"),
        (lambda: quantile_concentration(10, 0.05, side="left"), "side must be"),
        (lambda: quantile(SAMPLE, 1.0, alpha=0.05, concentration=1), "q must lie strictly"),
        (lambda: quantile(SAMPLE, [[0.5]], alpha=0.05, concentration=1), "q must be a number or one-dim"),
        (lambda: quantile(SAMPLE, 0.5, alpha=0.0, concentration=1), "alpha must lie strictly"),
        (lambda: quantile(SAMPLE, 0.5, alpha=0.05, concentration=0), "concentration must be greater than 0"),
        (lambda: quantile(SAMPLE, 0.5, alpha=0.05, concentration=1, side="left"), "side must be"),
        (lambda: quantile_log_e(SAMPLE, 0.5, null=math.inf, concentration=1), "null must be finite"),
        (
            lambda: quantile_difference(SAMPLE, SAMPLE, 0.5, alpha=0.05, concentration=[1, 2, 3]),
            "concentration must be one number, or one for control",
        ),
        (
            lambda: quantile_difference(SAMPLE, SAMPLE, 0.5, alpha=0.05, concentration=1, combination="sum"),
            "combination must be 'average' or 'product'",
        ),
        (
            lambda: quantile_difference_log_e(
                Sample.from_values([-1.0]), SAMPLE, 0.5, concentration=1, relative=True
            ),
            "control must not hold negative values",
        ),
        (
            lambda: quantile_difference_log_e(SAMPLE, SAMPLE, 0.5, margin=-1, concentration=1, relative=True),
            "margin must be greater than -1",
        ),
        (
            lambda: quantile_difference_log_e(SAMPLE, SAMPLE, 0.5, margin=math.nan, concentration=1),
            "margin must be finite",
        ),
        (
            lambda: quantile_difference_log_e(
                SAMPLE, Sample.from_bins([0.0, 1.0], [[1], [2]]), 0.5, concentration=1
            ),
            "treatment must have as many samples as control",
        ),
        (lambda: distribution_band(-1, n_min=1, alpha=0.05), "n must not be negative"),
        (lambda: distribution_band(1, n_min=0.5, alpha=0.05), "n_min must be at least 1"),
        (lambda: distribution_band(1, n_min=1, alpha=1.0), "alpha must lie strictly"),
        (lambda: distribution_log_e(SAMPLE, SAMPLE, concentration=1, levels=[]), "levels must be one-dim"),
        (
            lambda: distribution_difference(
                Sample.from_bins([0.0, 1.0], [[1]]), SAMPLE, alpha=0.05, n_min=1, concentration=1
            ),
            "control and treatment must be one sample each",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
