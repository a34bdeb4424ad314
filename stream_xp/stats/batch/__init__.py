"""Means of many comparisons at once: the array form of `mean_difference`, element by element the same.

One element is one comparison: a treatment arm against its control, for one metric of one experiment (and
segment). Arrays have any leading shape; exact moments have one more axis at the end, the weight epochs,
where an epoch that a comparison does not have is a 0 in every field.

An element that the data do not determine has the reason's code, a log e-value of 0 and the whole line as
its sequence; `at` gives one element in the form that the scalar functions return. Guarantees, assumptions
and sources are those of the scalar function of the same name.
"""

from stream_xp.stats.batch.arrays import (
    CODES,
    DENOMINATOR_NEAR_ZERO,
    REASONS,
    CrossArrays,
    EvidenceArrays,
    MeansArrays,
    MomentArrays,
    exact_columns,
    rounded_moments,
    used_columns,
)
from stream_xp.stats.batch.evidence import (
    excess_arrays,
    mean_difference_arrays,
    one_sided_test_arrays,
    relative_lift_arrays,
    relative_lift_delta_arrays,
)
from stream_xp.stats.batch.means import (
    ArmSummary,
    Strata,
    arm_means_of,
    exact_mean,
    means_of_summaries,
    pooled_product,
    stratified_means,
    sum_over_epochs,
    summarise_arrays,
)
from stream_xp.stats.batch.shapes import broadcast_summaries, one_comparison, shaped, steps_of, whole

__all__ = [
    "CODES",
    "DENOMINATOR_NEAR_ZERO",
    "REASONS",
    "ArmSummary",
    "CrossArrays",
    "EvidenceArrays",
    "MeansArrays",
    "MomentArrays",
    "Strata",
    "arm_means_of",
    "broadcast_summaries",
    "exact_columns",
    "exact_mean",
    "excess_arrays",
    "mean_difference_arrays",
    "means_of_summaries",
    "one_comparison",
    "one_sided_test_arrays",
    "pooled_product",
    "relative_lift_arrays",
    "relative_lift_delta_arrays",
    "rounded_moments",
    "shaped",
    "steps_of",
    "stratified_means",
    "sum_over_epochs",
    "summarise_arrays",
    "used_columns",
    "whole",
]
