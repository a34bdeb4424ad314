"""Row a6: t and F tests of a Gaussian linear model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stream_xp.services.calibrate.case import PLANNED
from stream_xp.services.calibrate.data import BoolArray, FloatArray, IntArray, Sample
from stream_xp.services.calibrate.running import Looks, totals
from stream_xp.stats.linear_model import (
    LinearFit,
    exact_prior_k,
    f_statistic,
    fit_from_gram,
    g_prior_k,
    log_e_f,
    log_e_t,
)
from stream_xp.stats.normal_mixture import tuned_rho2

# Units of each arm before a model is fitted: below, its columns may not be of full rank.
_FEWEST = 3


@dataclass(frozen=True, slots=True)
class TTest:
    """t test of treatment in y = constant + treatment + noise, with a normal prior on the coefficient."""

    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the test ever rejects."""
        where, fit = _fits(drawn, self.looks.at(drawn.n), covariate=False)
        share = float(drawn.arms.weight.mean())
        phi = share * (1.0 - share) / tuned_rho2(PLANNED, alpha)
        t = fit.coefficients[:, 1] / fit.standard_errors[:, 1]
        log_e = log_e_t(t, exact_prior_k(fit.z2[:, 1], phi), residual_df=fit.residual_df)
        return _any(where, np.asarray(log_e) >= -math.log(alpha))


@dataclass(frozen=True, slots=True)
class FTest:
    """F test of treatment and covariate together, with a g-prior."""

    looks: Looks

    def __call__(self, drawn: Sample, alpha: float) -> BoolArray:
        """Whether the test ever rejects."""
        where, fit = _fits(drawn, self.looks.at(drawn.n), covariate=True)
        k = g_prior_k(fit.n, 1.0 / tuned_rho2(PLANNED, alpha))
        log_e = log_e_f(f_statistic(fit, [1, 2]), k, model_df=2.0, residual_df=fit.residual_df)
        return _any(where, np.asarray(log_e) >= -math.log(alpha))


def _fits(drawn: Sample, at: IntArray, *, covariate: bool) -> tuple[BoolArray, LinearFit]:
    # Where there are enough units of both arms, and the fits there, in one row each.
    columns = [np.ones(drawn.y.shape), drawn.arms.treated.astype(np.float64)]
    columns += [drawn.second] if covariate else []
    treated = totals(columns[1], at)
    where = np.minimum(treated, at - treated) >= _FEWEST
    products = [[totals(a * b, at)[where] for b in columns] for a in columns]
    fit = fit_from_gram(
        np.moveaxis(np.array(products), -1, 0),
        np.stack([totals(a * drawn.y, at)[where] for a in columns], axis=-1),
        yty=totals(drawn.y * drawn.y, at)[where],
        n=np.broadcast_to(at.astype(np.float64), where.shape)[where],
    )
    return where, fit


def _any(where: BoolArray, rejected: FloatArray | BoolArray) -> BoolArray:
    every = np.zeros(where.shape, np.bool_)
    every[where] = rejected
    return np.asarray(every.any(axis=1))
