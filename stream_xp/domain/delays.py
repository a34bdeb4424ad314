"""Units whose attribution window is open, as weights count them: what they had done by registered ages."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from stream_xp.domain.ages import Bucket
from stream_xp.domain.fields import Fault, broken, duration_ms
from stream_xp.domain.rollout import Delay, Policy

if TYPE_CHECKING:
    from stream_xp.domain.experiment import ExperimentSpec, Metric

MARK: Final = "@by"
"""Between a metric's key and the number of an age, in the names of rows; no key has an `@`."""


def delay_buckets(spec: ExperimentSpec) -> list[tuple[Metric, Bucket]]:
    """The span from first exposure to each age of `allocation.delay`, then the whole window; empty without one.

    Every one begins at the first exposure, so that each holds the one before.
    """
    delay = None if spec.allocation is None else spec.allocation.delay
    metric = _followed(spec)
    if delay is None or metric is None:
        return []
    ends_ms = [*map(duration_ms, delay.ages), metric.window_ms]
    return [(metric, Bucket(at, 0, end_ms, MARK)) for at, end_ms in enumerate(ends_ms, start=1)]


def delay_faults(spec: ExperimentSpec) -> list[Fault]:
    """Every rule that `allocation.delay` breaks."""
    delay = None if spec.allocation is None else spec.allocation.delay
    if spec.allocation is None or delay is None:
        return []
    where, metric = ("allocation", "delay"), _followed(spec)
    found = broken(
        (
            spec.allocation.policy is Policy.FIXED,
            "",
            "only where weights follow the evidence, fixed ones do not",
        ),
        (
            metric is not None and not metric.zero_or_one,
            "",
            "needs a metric that folds by any: what an open unit will still bring is learned of 0 and 1 alone",
        ),
    )
    window_ms = None if metric is None else metric.window_ms
    return [*(Fault(where, rule) for _, rule in found), *_age_faults(delay, window_ms), *_share_faults(delay)]


def _age_faults(delay: Delay, window_ms: int | None) -> list[Fault]:
    ages_ms = [duration_ms(age) for age in delay.ages]
    where = ("allocation", "delay", "ages")
    faults = [
        Fault((*where, at), "must be longer than the one before, the first longer than 0")
        for at, (before, age) in enumerate(itertools.pairwise([0, *ages_ms]))
        if age <= before
    ]
    last = len(ages_ms) - 1
    if window_ms is not None and ages_ms[last] >= window_ms:
        faults.append(Fault((*where, last), "must be shorter than the attribution window of the metric"))
    return faults


def _share_faults(delay: Delay) -> list[Fault]:
    shares, where = delay.shares or (), ("allocation", "delay", "shares")
    if delay.shares is not None and len(shares) != len(delay.ages):
        return [Fault(where, f"must be as many as ages, {len(delay.ages)}, found {len(shares)}")]
    return [
        Fault((*where, at), "must not be below the one before")
        for at, (before, share) in enumerate(itertools.pairwise(shares), start=1)
        if share < before
    ]


def _followed(spec: ExperimentSpec) -> Metric | None:
    """The metric that weights follow; one that is not there is a fault of the spec."""
    key = None if spec.allocation is None else spec.allocation.metric
    return next((metric for metric in spec.metrics if metric.key == key), None)
