"""One small function per method: the fields of a question into a function of `stream_xp.stats` and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import numpy as np
from msgspec import structs

from stream_xp.services.infer import questions as q
from stream_xp.stats.adaptive import (
    Effect,
    aipw_estimate,
    effect_evidence,
    effect_one_sided,
    stratified,
)
from stream_xp.stats.adjusted_difference import CovariateSummary, ancova_of, cuped_of
from stream_xp.stats.batch import ArmSummary, arm_means_of
from stream_xp.stats.bayes import posterior
from stream_xp.stats.bernoulli import BetaPrior, TunedPrior, bernoulli_bounds, bernoulli_log_e
from stream_xp.stats.bounded_mean import N_STAR, bounded_mean, bounded_mean_log_e
from stream_xp.stats.conversion_difference import conversion_difference, pair_weights
from stream_xp.stats.distribution import distribution_band
from stream_xp.stats.event_counts import event_counts
from stream_xp.stats.group_sequential import group_sequential
from stream_xp.stats.linear_model import exact_prior_k, g_prior_k, log_e_f, log_e_t, radius_multiplier_t
from stream_xp.stats.mean_difference import (
    ArmMeans,
    mean_difference,
    one_sided_test,
    relative_lift,
    relative_lift_delta,
)
from stream_xp.stats.multiplicity import e_bh, e_bonferroni, e_holm, log_e_values
from stream_xp.stats.normal_mixture import (
    Evidence,
    Undetermined,
    one_sided_rho2,
    p_always_valid,
    tuned_rho2,
)
from stream_xp.stats.quantile import (
    Sample,
    quantile,
    quantile_concentration,
    quantile_difference,
    quantile_difference_log_e,
    quantile_log_e,
)
from stream_xp.stats.ratio_difference import RatioSummary, ratio_means_of
from stream_xp.stats.sample_ratio import (
    CONCENTRATION,
    TILT_SD,
    LogRatio,
    SampleRatio,
    sample_ratio,
    sample_ratio_dirichlet,
    sample_ratio_log_odds,
)
from stream_xp.stats.shrinkage import shrink_groups

if TYPE_CHECKING:
    from collections.abc import Callable

Answer: TypeAlias = dict[str, Any]


def answer(question: q.Question) -> Answer:
    """Return the answer to a question, of JSON types only.

    Raises:
        ValueError: the inputs break a rule of the method.

    """
    return _ANSWERS[type(question)](question)


# ---- forms --------------------------------------------------------------------------------------------


def _undetermined(why: Undetermined) -> Answer:
    return {"undetermined": why.reason}


def _finite(value: float) -> float:
    # JSON has no infinity, and null means an unbounded end.
    if not math.isfinite(value):
        raise OverflowError("the result is not a finite number")
    return float(value)


def _bound(value: float) -> float | None:
    return None if math.isinf(value) else _finite(value)


def _tested(log_e: float) -> Answer:
    return {"log_e": _finite(log_e), "p": p_always_valid(_finite(log_e))}


def _bounded(estimate: float, lower: float, upper: float) -> Answer:
    return {"estimate": _bound(estimate), "lower": _bound(lower), "upper": _bound(upper)}


def _evidence(found: Evidence | Undetermined) -> Answer:
    if isinstance(found, Undetermined):
        return _undetermined(found)
    return _bounded(found.estimate, found.lower, found.upper) | _tested(found.log_e)


def _sided(question: q.SidedQuestion, result: Answer) -> Answer:
    return (
        result if question.sides == 2 or "undetermined" in result else result | {"side": question.tested_side}
    )


def _rho2(question: q.TunedQuestion) -> float:
    if question.n_star is None:
        return cast("float", question.rho2)
    tuned = tuned_rho2 if question.sides == 2 else one_sided_rho2
    return tuned(question.n_star, question.alpha)


# ---- means --------------------------------------------------------------------------------------------


def _normal_mixture(asked: q.NormalMixture) -> Answer:
    return _effect(asked, Effect(asked.estimate, asked.variance, asked.n))


def _effect(asked: q.TunedQuestion, effect: Effect) -> Answer:
    alpha, rho2 = asked.alpha, _rho2(asked)
    if asked.sides == 2:
        return _evidence(effect_evidence(effect, alpha=alpha, rho2=rho2))
    side = asked.tested_side
    found = effect_one_sided(effect, margin=0.0, side=side, alpha=alpha, rho2=rho2)
    return _sided(asked, _evidence(found))


def _difference(
    asked: q.TunedQuestion, arms: ArmMeans | Undetermined, *, relative: q.Relative = "none"
) -> Answer:
    if isinstance(arms, Undetermined):
        return _undetermined(arms)
    alpha, rho2 = asked.alpha, _rho2(asked)
    if asked.sides == 2:
        return _evidence(_TWO_SIDED[relative](arms, alpha=alpha, rho2=rho2))
    found = one_sided_test(
        arms, margin=0.0, margin_kind="absolute", side=asked.tested_side, alpha=alpha, rho2=rho2
    )
    return _sided(asked, _evidence(found))


_TWO_SIDED: Final[dict[q.Relative, Callable[..., Evidence | Undetermined]]] = {
    "none": mean_difference,
    "fieller": relative_lift,
    "delta": relative_lift_delta,
}


def _summary(arm: q.MeanArm) -> ArmSummary:
    return ArmSummary(n=arm.n, mean=arm.mean, variance=arm.variance)


def _with_covariate(arm: q.MeanArm) -> CovariateSummary:
    x = cast("q.CovariateMoments", arm.covariate)
    return CovariateSummary(
        n=arm.n,
        mean=arm.mean,
        variance=arm.variance,
        covariate_mean=x.mean,
        covariate_variance=x.variance,
        covariance=x.covariance,
    )


def _mean_difference(asked: q.MeanDifference) -> Answer:
    summary, adjusted = _ADJUSTMENTS[asked.adjustment]
    arms = adjusted(summary(asked.control), summary(asked.treatment), guard=asked.guard)
    return _difference(asked, arms, relative=asked.relative)


_ADJUSTMENTS: Final[dict[str, tuple[Callable[..., Any], Callable[..., ArmMeans | Undetermined]]]] = {
    "none": (_summary, arm_means_of),
    "cuped": (_with_covariate, cuped_of),
    "ancova": (_with_covariate, ancova_of),
}


def _ratio_difference(asked: q.RatioDifference) -> Answer:
    control, treatment = (RatioSummary(**structs.asdict(arm)) for arm in (asked.control, asked.treatment))
    return _difference(asked, ratio_means_of(control, treatment, guard=asked.guard), relative=asked.relative)


def _linear_model(asked: q.LinearModel) -> Answer:
    nu = asked.df_residual
    if asked.g is not None:
        k = g_prior_k(asked.n, asked.g)
    else:
        k = exact_prior_k(cast("float", asked.z2), cast("float", asked.phi))
    if asked.t is None:
        model_df = cast("int", asked.df_model)
        return _tested(float(log_e_f(cast("float", asked.f), k, model_df=model_df, residual_df=nu)))
    radius = float(radius_multiplier_t(k, asked.alpha, residual_df=nu))
    return _tested(float(log_e_t(asked.t, k, residual_df=nu))) | {"radius": _bound(radius)}


# ---- conversions and counts ---------------------------------------------------------------------------


def _bernoulli_mean(asked: q.BernoulliMean) -> Answer:
    n, successes, prior = asked.n, asked.successes, _prior(asked)
    lower, upper = bernoulli_bounds(n, successes, alpha=asked.alpha, prior=prior, side=asked.tail)
    result = _bounded(successes / n, float(lower), float(upper))
    if asked.null is not None:
        log_e = bernoulli_log_e(n, successes, mean=asked.null, prior=prior, side=asked.tail)
        result |= _tested(float(log_e))
    return _sided(asked, result)


def _prior(asked: q.BernoulliMean) -> BetaPrior | TunedPrior:
    if asked.t_opt is None:
        return BetaPrior(cast("float", asked.a), cast("float", asked.b))
    # A one-sided test is tuned as the two-sided one of twice its level.
    return TunedPrior(asked.t_opt, asked.alpha if asked.sides == 2 else 2 * asked.alpha)


def _conversion_difference(asked: q.ConversionDifference) -> Answer:
    others = [arm for arm in asked.arms if arm != asked.control]
    found = {arm: _one_conversion(asked, arm) for arm in others}
    return found[others[0]] if len(others) == 1 else {"arms": found}


def _one_conversion(asked: q.ConversionDifference, treatment: str) -> Answer:
    pair = (asked.control, treatment)
    nothing = q.Successes(n=0, successes=0)
    counts = [[epoch.counts.get(arm, nothing) for arm in pair] for epoch in asked.epochs]
    weights = [[epoch.weights.get(arm, 0.0) for arm in asked.arms] for epoch in asked.epochs]
    at = {arm: i for i, arm in enumerate(asked.arms)}
    found = conversion_difference(
        [[arm.n for arm in row] for row in counts],
        [[arm.successes for arm in row] for row in counts],
        weights=pair_weights(weights, control=at[asked.control], treatment=at[treatment]),
        side=asked.tail,
    )
    if isinstance(found, Undetermined):
        return _undetermined(found)
    return _sided(asked, {"estimate": _finite(found.estimate)} | _tested(found.log_e))


def _counts(asked: q.Counts) -> Answer:
    found = event_counts(asked.counts, asked.weights, alpha=asked.alpha, concentration=asked.k)
    if isinstance(found, Undetermined):
        return _undetermined(found)
    rows = zip(
        *(np.atleast_1d(v) for v in (found.estimate, found.lower, found.upper, found.arm_log_e)), strict=True
    )
    arms = [_bounded(*row[:3]) | _tested(row[3]) for row in rows]
    return arms[0] if len(arms) == 1 else _tested(float(found.log_e)) | {"arms": arms}


def _sample_ratio(asked: q.SampleRatio) -> Answer:
    counts, weights = [e.counts for e in asked.epochs], [e.weights for e in asked.epochs]
    if asked.mixture == "dirichlet":
        k = CONCENTRATION if asked.k is None else asked.k
        return _shares(sample_ratio_dirichlet(counts, weights, concentration=k))
    sd = TILT_SD if asked.s is None else asked.s
    shares = _shares(sample_ratio(counts, weights, sd=sd))
    if "undetermined" in shares or len(weights[0]) > 2:
        return shares
    odds = cast("LogRatio", sample_ratio_log_odds(counts, weights, alpha=asked.alpha, sd=sd))
    return _bounded(float(odds.estimate), float(odds.lower), float(odds.upper)) | shares


def _shares(found: SampleRatio | Undetermined) -> Answer:
    if isinstance(found, Undetermined):
        return _undetermined(found)
    shares = {"observed_shares": found.observed_shares, "expected_shares": found.expected_shares}
    return _tested(found.log_e) | shares


# ---- values and distributions -------------------------------------------------------------------------


def _bounded_mean(asked: q.BoundedMean) -> Answer:
    shared: dict[str, Any] = {
        "construction": asked.construction,
        "lower_bound": asked.lower_bound,
        "upper_bound": asked.upper_bound,
        "alpha": asked.alpha,
        "side": asked.tail,
    }
    if asked.n_star is not None:
        shared["n_star"] = asked.n_star
    found = bounded_mean(asked.values, **shared)
    if isinstance(found, Undetermined):
        return _undetermined(found)
    result = _bounded(found.estimate, found.lower, found.upper)
    if asked.null is not None:
        result |= _tested(bounded_mean_log_e(asked.values, asked.null, **shared))
    return _sided(asked, result)


def _sample(given: q.ArmSample | q.Quantile) -> Sample:
    if given.values is not None:
        return Sample.from_values(given.values)
    return Sample.from_bins(cast("tuple[float, ...]", given.edges), cast("tuple[int, ...]", given.counts))


def _quantile(asked: q.Quantile) -> Answer:
    sample, side = _sample(asked), asked.tail
    concentration = quantile_concentration(asked.n_star or N_STAR, asked.alpha, side=side)
    found = quantile(sample, asked.q, alpha=asked.alpha, concentration=concentration, side=side)
    if isinstance(found, Undetermined):
        return _undetermined(found)
    result = _bounded(float(found.estimate), float(found.lower), float(found.upper))
    if asked.null is not None:
        log_e = quantile_log_e(sample, asked.q, null=asked.null, concentration=concentration, side=side)
        result |= _tested(float(log_e))
    return _sided(asked, result)


def _quantile_difference(asked: q.QuantileDifference) -> Answer:
    arms = _sample(asked.control), _sample(asked.treatment)
    # An average needs each arm at half the level.
    share = asked.alpha / 2 if asked.combination == "average" else asked.alpha
    shared: dict[str, Any] = {
        "concentration": quantile_concentration(asked.n_star or N_STAR, share, side=asked.tail),
        "combination": asked.combination,
        "relative": asked.relative,
        "side": asked.tail,
    }
    found = quantile_difference(*arms, asked.q, alpha=asked.alpha, **shared)
    if isinstance(found, Undetermined):
        return _undetermined(found)
    log_e = float(quantile_difference_log_e(*arms, asked.q, **shared))
    bounds = _bounded(float(found.estimate), float(found.lower), float(found.upper))
    return _sided(asked, bounds | _tested(log_e))


def _distribution_band(asked: q.DistributionBand) -> Answer:
    return {"radius": _bound(float(distribution_band(asked.n, n_min=asked.t_min, alpha=asked.alpha)))}


# ---- designs and decisions ----------------------------------------------------------------------------


def _group_sequential(asked: q.GroupSequential) -> Answer:
    design = group_sequential(
        asked.information, alpha=asked.alpha, sides=asked.sides, spending=asked.spending, phi=asked.phi
    )
    return {"z": design.z, "alpha_spent": design.alpha_spent}


def _bayes(asked: q.Bayes) -> Answer:
    found = posterior(
        asked.estimate, asked.variance, prior_mean=asked.prior_mean, prior_variance=asked.prior_variance
    )
    return {
        "posterior_mean": found.mean,
        "posterior_sd": found.sd,
        "prob_better": found.prob_better,
        "loss_ship": found.loss_ship,
        "loss_keep": found.loss_keep,
    }


def _multiplicity(asked: q.Multiplicity) -> Answer:
    found = _PROCEDURES[asked.procedure](log_e_values(asked.e_values), alpha=asked.alpha)
    return {"rejected": found.rejected.tolist(), "adjusted": found.adjusted.tolist()}


_PROCEDURES: Final = {
    "e_bonferroni": e_bonferroni,
    "e_holm": e_holm,
    "e_bh": e_bh,
}


def _segments(asked: q.Segments) -> Answer:
    found = shrink_groups(asked.effects, asked.standard_errors)
    return {
        "label": "registered" if asked.registered else "exploratory",
        "effects": found.effect.tolist(),
        "sds": found.sd.tolist(),
        "weights": found.weight.tolist(),
        "mean": _finite(float(found.mean)),
        "mean_sd": _finite(float(found.mean_sd)),
    }


def _adaptive(asked: q.Adaptive) -> Answer:
    if asked.epochs is None:
        sums, arms = cast("q.ScoreSums", asked.sums), (asked.control, asked.treatment)
        return _scores(asked, sums, *cast("tuple[q.MeanArm, q.MeanArm]", arms))
    rows = [(epoch.control, epoch.treatment) for epoch in asked.epochs]
    means = stratified(
        [[arm.n for arm in row] for row in rows],
        [[arm.mean or 0.0 for arm in row] for row in rows],
        [[arm.variance or 0.0 for arm in row] for row in rows],
        guard=asked.guard,
        constant_spread=asked.constant_spread,
    )
    return _difference(asked, means)


def _scores(asked: q.Adaptive, sums: q.ScoreSums, control: q.MeanArm, treatment: q.MeanArm) -> Answer:
    arms = arm_means_of(_summary(control), _summary(treatment), guard=asked.guard)
    if isinstance(arms, Undetermined):
        return _undetermined(arms)
    estimate, variance = aipw_estimate(
        n=sums.n,
        psi=sums.psi,
        psi_squares=sums.psi_squares,
        control_inverse=sums.control_inverse,
        treatment_inverse=sums.treatment_inverse,
        # A variance of a mean times its units is that of one unit, guarded.
        control_variance=arms.control_variance * control.n,
        treatment_variance=arms.treatment_variance * treatment.n,
    )
    return _effect(asked, Effect(float(estimate), float(variance), sums.n))


_ANSWERS: Final[dict[type[q.Question], Callable[[Any], Answer]]] = {
    q.NormalMixture: _normal_mixture,
    q.MeanDifference: _mean_difference,
    q.RatioDifference: _ratio_difference,
    q.LinearModel: _linear_model,
    q.BernoulliMean: _bernoulli_mean,
    q.BoundedMean: _bounded_mean,
    q.Quantile: _quantile,
    q.QuantileDifference: _quantile_difference,
    q.DistributionBand: _distribution_band,
    q.ConversionDifference: _conversion_difference,
    q.Counts: _counts,
    q.SampleRatio: _sample_ratio,
    q.GroupSequential: _group_sequential,
    q.Bayes: _bayes,
    q.Multiplicity: _multiplicity,
    q.Segments: _segments,
    q.Adaptive: _adaptive,
}
