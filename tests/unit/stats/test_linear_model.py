from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import Evidence, Undetermined, log_e_two_sided, radius_multiplier_two_sided
from stream_xp.stats.linear_model import (
    coefficient_test,
    exact_prior_k,
    f_statistic,
    fit_from_gram,
    g_prior_k,
    log_e_f,
    log_e_t,
    radius_multiplier_t,
)

K = st.floats(1e-6, 1e9)
NU = st.floats(1, 1e12)
ALPHA = st.floats(1e-9, 0.99)


def in_r(t2, r, d, nu):
    """The published form, in r and with two logarithms."""
    t2, r, d, nu = (mpmath.mpf(v) for v in (t2, r, d, nu))
    logs = mpmath.log1p(t2 / nu) - mpmath.log1p(r * t2 / nu)
    return float(d / 2 * mpmath.log(r) + (nu + d) / 2 * logs)


# ---- formulas ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(t=st.floats(-1e4, 1e4), k=K, nu=NU)
def test_log_e_t_is_the_published_form(t, k, nu):
    with mpmath.workdps(60):
        expected = in_r(mpmath.mpf(t) ** 2, 1 / (1 + mpmath.mpf(k)), 1, nu)
    assert log_e_t(t, k, residual_df=nu) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None)
@given(f=st.floats(0, 1e6), k=K, nu=NU, d=st.integers(1, 40))
def test_log_e_f_is_the_published_form(f, k, nu, d):
    with mpmath.workdps(60):
        expected = in_r(d * mpmath.mpf(f), 1 / (1 + mpmath.mpf(k)), d, nu)
    assert log_e_f(f, k, model_df=d, residual_df=nu) == pytest.approx(expected, rel=1e-12, abs=1e-11)


def test_both_priors_give_their_r():
    assert 1 / (1 + g_prior_k(400, 25)) == pytest.approx(25 / (25 + 400))
    assert 1 / (1 + exact_prior_k(90.0, 7.0)) == pytest.approx(7 / (7 + 90))
    assert g_prior_k(np.array([1.0, 2.0]), 2.0).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("t", "k", "nu"), [(0.0, 4.0, 7), (2.5, 4.0, 7), (-3.0, 0.5, 30), (1.0, 50.0, 3)])
def test_log_e_t_is_the_bayes_factor_of_the_invariant_statistic(t, k, nu):
    # The likelihood ratio of t: noncentral t mixed over N(0, k) noncentrality, against central t.
    with mpmath.workdps(30):
        noise = mpmath.quad(lambda s: s**nu * mpmath.exp(-(s * s) * (nu + t * t) / 2), [0, 1, 3, 10])
        mixed = mpmath.quad(lambda s: s**nu * mpmath.exp(-s * s * (nu + t * t / (1 + k)) / 2), [0, 1, 3, 10])
        expected = float(mpmath.log(mixed / noise) - mpmath.log1p(k) / 2)
    assert log_e_t(t, k, residual_df=nu) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(t=st.floats(-30, 30), k=K, nu=NU)
def test_f_of_one_coefficient_is_t_squared(t, k, nu):
    one = log_e_f(t * t, k, model_df=1, residual_df=nu)
    assert one == pytest.approx(log_e_t(t, k, residual_df=nu), rel=1e-12, abs=1e-12)


@settings(deadline=None)
@given(z=st.floats(-30, 30), k=st.floats(1e-3, 1e6), alpha=st.floats(1e-6, 0.9))
def test_many_degrees_of_freedom_give_the_normal_mixture(z, k, alpha):
    assert log_e_t(z, k, residual_df=1e12) == pytest.approx(log_e_two_sided(z, k), rel=1e-6, abs=1e-6)
    assert radius_multiplier_t(k, alpha, residual_df=1e12) == pytest.approx(
        radius_multiplier_two_sided(k, alpha), rel=1e-6
    )


# ---- duality -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(k=K, nu=NU, alpha=ALPHA)
def test_the_radius_is_the_root_of_the_log_e(k, nu, alpha):
    radius, target = radius_multiplier_t(k, alpha, residual_df=nu), math.log(1 / alpha)
    if math.isinf(radius):
        assert log_e_t(1e150, k, residual_df=nu) <= target * (1 + 1e-9)
    elif radius < 1e6:
        # Near the pole the radius is steep in everything; the log e-value there is flat.
        assert log_e_t(radius, k, residual_df=nu) == pytest.approx(target, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(t=st.floats(-50, 50), k=K, nu=NU, alpha=ALPHA)
def test_rejecting_is_leaving_the_sequence(t, k, nu, alpha):
    found = coefficient_test(t, 1.0, k=k, residual_df=nu, n=10, alpha=alpha)
    if math.isinf(found.upper) or abs(abs(t) - (found.upper - t)) > 1e-7 * (found.upper - t):
        assert (found.log_e >= math.log(1 / alpha)) == (not found.lower <= 0 <= found.upper)


def test_the_radius_is_infinite_where_q_does_not_exceed_r():
    k, nu = 20.0, np.arange(1, 12)
    radius = radius_multiplier_t(k, 0.05, residual_df=nu)
    r = 1 / (1 + k)
    q = (r * 0.05**2) ** (1 / (nu + 1))
    assert (np.isinf(radius) == (q <= r)).all()
    seen = q > r
    assert seen.any()
    assert not seen.all()
    expected = np.sqrt(nu[seen] * (1 - q[seen]) / (q[seen] - r))
    assert radius[seen] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("t", [0.0, 1e4, 1e150, -1e308])
@pytest.mark.parametrize("k", [5e-324, 1.0, 1e12, 1e308])
@pytest.mark.parametrize("nu", [1e-3, 1.0, 1e12])
def test_extremes_stay_finite(t, k, nu):
    assert math.isfinite(log_e_t(t, k, residual_df=nu))
    assert math.isfinite(log_e_f(abs(t), k, model_df=3, residual_df=nu))
    assert radius_multiplier_t(k, 1e-300, residual_df=nu) > 0


def test_arrays_broadcast_and_scalars_are_floats():
    t, nu = np.linspace(-3, 3, 4)[:, None], np.array([3.0, 30.0])
    table = log_e_t(t, 2.0, residual_df=nu)
    assert table.shape == (4, 2)
    assert table[1, 1] == log_e_t(float(t[1, 0]), 2.0, residual_df=30.0)
    assert type(log_e_t(1.0, 2.0, residual_df=3)) is float
    assert type(log_e_f(1.0, 2.0, model_df=2, residual_df=3)) is float
    assert type(radius_multiplier_t(1.0, 0.05, residual_df=30)) is float


# ---- least squares from sums -------------------------------------------------------------------------


def regression(seed=1, n=60):
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(n), rng.normal(size=n), rng.normal(size=n) * 1e4, rng.normal(size=n)])
    return x, x @ np.array([1.0, 0.5, 1e-4, 0.0]) + rng.normal(size=n)


def fit_of(x, y):
    return fit_from_gram(x.T @ x, x.T @ y, yty=y @ y, n=len(y))


def test_the_fit_is_least_squares():
    x, y = regression()
    fit = fit_of(x, y)
    expected, rss = np.linalg.lstsq(x, y, rcond=None)[:2]
    variance = rss[0] / (60 - 4)
    assert fit.coefficients == pytest.approx(expected, rel=1e-9)
    assert float(fit.residual_variance) == pytest.approx(variance, rel=1e-9)
    assert fit.standard_errors == pytest.approx(np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x))), rel=1e-9)
    others = x[:, [0, 2, 3]]
    left = x[:, 1] - others @ np.linalg.lstsq(others, x[:, 1], rcond=None)[0]
    assert fit.z2[1] == pytest.approx(left @ left, rel=1e-9)
    assert float(fit.residual_df) == 56


def test_the_f_statistic_compares_nested_models():
    x, y = regression()
    fit = fit_of(x, y)
    rss = [np.linalg.lstsq(x[:, c], y, rcond=None)[1][0] for c in ([0, 2], [0, 1, 2, 3])]
    expected = (rss[0] - rss[1]) / 2 / (rss[1] / 56)
    assert f_statistic(fit, [1, 3]) == pytest.approx(expected, rel=1e-9)
    t = float(fit.coefficients[2] / fit.standard_errors[2])
    assert f_statistic(fit, [2]) == pytest.approx(t * t, rel=1e-9)


def test_fits_of_many_models_at_once():
    data = [regression(seed) for seed in range(3)]
    grams = np.stack([x.T @ x for x, _ in data])
    crosses = np.stack([x.T @ y for x, y in data])
    fit = fit_from_gram(grams, crosses, yty=[y @ y for _, y in data], n=60)
    for i, (x, y) in enumerate(data):
        assert fit.coefficients[i] == pytest.approx(fit_of(x, y).coefficients, rel=1e-12)
        assert f_statistic(fit, [1, 2])[i] == pytest.approx(f_statistic(fit_of(x, y), [1, 2]), rel=1e-12)


def test_a_coefficient_from_sums_to_evidence():
    x, y = regression()
    fit = fit_of(x, y)
    found = coefficient_test(
        float(fit.coefficients[1]),
        float(fit.standard_errors[1]),
        k=exact_prior_k(float(fit.z2[1]), 1.0),
        residual_df=56,
        n=60,
        alpha=0.05,
    )
    assert isinstance(found, Evidence)
    assert found.lower < found.estimate < found.upper
    assert coefficient_test(1.0, 0.0, k=1.0, residual_df=5, n=9, alpha=0.05) == Undetermined(
        "no unit differs from another"
    )


def test_the_whole_line_while_nothing_could_reject():
    found = coefficient_test(3.0, 1.0, k=1.0, residual_df=1, n=3, alpha=0.05)
    assert (found.lower, found.upper) == (-math.inf, math.inf)
    assert found.log_e < math.log(20)


# ---- arguments ---------------------------------------------------------------------------------------

EYE = np.eye(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: g_prior_k(0, 1.0), "n must be greater than 0"),
        (lambda: g_prior_k(1, -1.0), "g must be greater than 0"),
        (lambda: g_prior_k(1e300, 1e-300), "n over g must be finite"),
        (lambda: exact_prior_k(1.0, 0.0), "phi must be greater than 0"),
        (lambda: exact_prior_k(math.nan, 1.0), "z2 must be finite"),
        (lambda: log_e_t(math.inf, 1.0, residual_df=3), "t must be finite"),
        (lambda: log_e_t(1.0, -1.0, residual_df=3), "k must not be negative"),
        (lambda: log_e_t(1.0, 1.0, residual_df=0), "residual_df must be greater than 0"),
        (lambda: log_e_f(-1.0, 1.0, model_df=2, residual_df=3), "f must not be negative"),
        (lambda: log_e_f(1.0, 1.0, model_df=0, residual_df=3), "model_df must be at least 1"),
        (lambda: radius_multiplier_t(0.0, 0.05, residual_df=3), "k must be greater than 0"),
        (lambda: radius_multiplier_t(1.0, 1.0, residual_df=3), "alpha must lie strictly between 0 and 1"),
        (
            lambda: coefficient_test(1.0, -1.0, k=1.0, residual_df=3, n=5, alpha=0.1),
            "se must not be negative",
        ),
        (lambda: coefficient_test(1.0, 0.0, k=1.0, residual_df=3, n=5, alpha=2.0), "alpha must lie"),
        (lambda: fit_from_gram([1.0], [1.0], yty=1.0, n=5), r"xtx must have the shape \(..., m, m\)"),
        (lambda: fit_from_gram(EYE, [1.0], yty=9.0, n=5), "xty must end in 2 columns"),
        (lambda: fit_from_gram([[1.0, 0.5], [0.0, 1.0]], [1.0, 1.0], yty=9.0, n=5), "xtx must be symmetric"),
        (
            lambda: fit_from_gram([[1.0, 0.0], [0.0, 0.0]], [1.0, 1.0], yty=9.0, n=5),
            "xtx must have a diagonal",
        ),
        (lambda: fit_from_gram(np.ones((2, 2)), [1.0, 1.0], yty=9.0, n=5), "xtx must be of full rank"),
        (lambda: fit_from_gram(EYE, [1.0, 1.0], yty=9.0, n=2), "n must be a whole number above"),
        (lambda: fit_from_gram(EYE, [1.0, 1.0], yty=9.0, n=5.5), "n must be a whole number above"),
        (lambda: fit_from_gram(EYE, [3.0, 1.0], yty=9.0, n=5), "yty must be at least"),
        (
            lambda: f_statistic(fit_from_gram(EYE, [1.0, 1.0], yty=9.0, n=5), []),
            "columns must name at least one",
        ),
        (lambda: f_statistic(fit_from_gram(EYE, [1.0, 1.0], yty=9.0, n=5), [0, 0]), "columns must name"),
        (lambda: f_statistic(fit_from_gram(EYE, [1.0, 1.0], yty=9.0, n=5), [2]), "columns must lie between"),
        (lambda: f_statistic(fit_from_gram(EYE, [1.0, 1.0], yty=2.0, n=5), [0]), "fit must have a residual"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
