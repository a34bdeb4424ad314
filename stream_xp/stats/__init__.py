"""Exact mergeable statistics and always-valid tests: pure functions on numpy and scipy."""

from stream_xp.stats.adjusted_difference import ancova_arrays, cuped_arrays
from stream_xp.stats.arm_stall import ArmStall, arm_stall
from stream_xp.stats.assignment import assignment_deviance
from stream_xp.stats.bernoulli import bernoulli_pair_log_e
from stream_xp.stats.conversion_difference import (
    Sides,
    conversion_log_e,
    success_ratio,
    success_ratio_log_e,
)
from stream_xp.stats.cross_moments import CrossMoments
from stream_xp.stats.distribution import DistributionDifference, distribution_difference
from stream_xp.stats.early_evidence import EXACT_SHARE, early_one_sided, early_two_sided
from stream_xp.stats.futility import Futility, futility, inside
from stream_xp.stats.interaction import any_interaction_log_e, interaction, interaction_means
from stream_xp.stats.log_histogram import LogHistogram
from stream_xp.stats.log_loss import LogLoss, log_loss
from stream_xp.stats.mean_difference import (
    NO_VARIANCE,
    TOO_FEW_UNITS,
    UNBOUNDED_LIFT,
    ArmMeans,
    MarginKind,
    Side,
    Stratum,
    fieller_bounds,
    guarded_variance,
    mean_difference,
    one_sided_test,
    relative_lift,
    summarise,
)
from stream_xp.stats.moments import EMPTY, Moments
from stream_xp.stats.normal_mixture import (
    Evidence,
    Undetermined,
    log_e_one_sided,
    log_e_two_sided,
    one_sided_rho2,
    p_always_valid,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
    tuned_rho2,
)
from stream_xp.stats.novelty import EffectChange, effect_change, effects_by_age
from stream_xp.stats.quantile import (
    NO_VALUES,
    QuantileSequence,
    Sample,
    quantile,
    quantile_concentration,
    quantile_difference,
    quantile_difference_log_e,
)
from stream_xp.stats.rate_monitor import detector_log, detector_step, rate_detector
from stream_xp.stats.ratio_difference import ratio_means_arrays
from stream_xp.stats.sample_ratio import (
    NO_UNITS,
    LogRatio,
    SampleRatio,
    sample_ratio,
    sample_ratio_dirichlet,
    sample_ratio_log_e,
)
from stream_xp.stats.selection import (
    DesignErrors,
    PastPrior,
    SelectedEffect,
    design_errors,
    prior_from_past,
    selected_effect,
    stopped_design_errors,
)
from stream_xp.stats.shrinkage import BetweenVariance, ShrunkGroups, between_variance, shrink_groups

__all__ = [
    "EMPTY",
    "EXACT_SHARE",
    "NO_UNITS",
    "NO_VALUES",
    "NO_VARIANCE",
    "TOO_FEW_UNITS",
    "UNBOUNDED_LIFT",
    "ArmMeans",
    "ArmStall",
    "BetweenVariance",
    "CrossMoments",
    "DesignErrors",
    "DistributionDifference",
    "EffectChange",
    "Evidence",
    "Futility",
    "LogHistogram",
    "LogLoss",
    "LogRatio",
    "MarginKind",
    "Moments",
    "PastPrior",
    "QuantileSequence",
    "Sample",
    "SampleRatio",
    "SelectedEffect",
    "ShrunkGroups",
    "Side",
    "Sides",
    "Stratum",
    "Undetermined",
    "ancova_arrays",
    "any_interaction_log_e",
    "arm_stall",
    "assignment_deviance",
    "bernoulli_pair_log_e",
    "between_variance",
    "conversion_log_e",
    "cuped_arrays",
    "design_errors",
    "detector_log",
    "detector_step",
    "distribution_difference",
    "early_one_sided",
    "early_two_sided",
    "effect_change",
    "effects_by_age",
    "fieller_bounds",
    "futility",
    "guarded_variance",
    "inside",
    "interaction",
    "interaction_means",
    "log_e_one_sided",
    "log_e_two_sided",
    "log_loss",
    "mean_difference",
    "one_sided_rho2",
    "one_sided_test",
    "p_always_valid",
    "prior_from_past",
    "quantile",
    "quantile_concentration",
    "quantile_difference",
    "quantile_difference_log_e",
    "radius_multiplier_one_sided",
    "radius_multiplier_two_sided",
    "rate_detector",
    "ratio_means_arrays",
    "relative_lift",
    "sample_ratio",
    "sample_ratio_dirichlet",
    "sample_ratio_log_e",
    "selected_effect",
    "shrink_groups",
    "stopped_design_errors",
    "success_ratio",
    "success_ratio_log_e",
    "summarise",
    "tuned_rho2",
]
