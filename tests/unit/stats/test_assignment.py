from __future__ import annotations

import math

import numpy as np
import pytest

from stream_xp.stats import assignment_deviance, conversion_log_e


def test_it_is_the_largest_likelihood_ratio_of_the_labels():
    n = np.array([[[30, 50], [7, 0]]])
    found = assignment_deviance(n, [[0.5, 0.5], [0.9, 0.1]])
    shares = np.linspace(1e-9, 1 - 1e-9, 400_001)
    first = 30 * np.log((1 - shares) / 0.5) + 50 * np.log(shares / 0.5)
    second = 7 * np.log((1 - shares) / 0.9)
    assert found == pytest.approx([first.max() + second.max()], rel=1e-6)


def test_expected_shares_cost_nothing_and_empty_epochs_neither():
    assert assignment_deviance([[90, 10], [0, 0]], [[0.9, 0.1], [0.0, 0.0]]) == pytest.approx(0.0, abs=1e-12)


def test_it_stays_finite_for_large_counts():
    assert assignment_deviance([[10**12, 10**12 + 10**6]], [[0.5, 0.5]]) == pytest.approx(0.25, rel=1e-5)


def test_a_wrong_sample_ratio_alone_is_no_evidence_of_an_effect():
    """52 to 48 instead of equal shares, and outcomes that do not depend on the arm, looked at every 100 units."""
    rng = np.random.default_rng(5)
    paths, looks = 300, 200
    n1 = rng.binomial(100, 0.48, (paths, looks))
    n = np.stack((100 - n1, n1), axis=-1)
    s = np.cumsum(rng.binomial(n, 0.2), axis=1)[:, :, np.newaxis]
    n = np.cumsum(n, axis=1)[:, :, np.newaxis]
    raw = conversion_log_e(n, s, weights=[[0.5, 0.5]])
    robust = raw - assignment_deviance(n, [[0.5, 0.5]])
    threshold = math.log(1 / 0.05)
    assert (raw.max(axis=1) >= threshold).mean() > 0.9
    assert (robust.max(axis=1) >= threshold).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / paths)


def test_units_where_the_weight_is_0_are_refused():
    with pytest.raises(ValueError, match="weights"):
        assignment_deviance([[5, 5]], [[1.0, 0.0]])
