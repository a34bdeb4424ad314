"""What a plan says: the records behind the table, the plot and the JSON."""

from __future__ import annotations

from typing import Any

import msgspec

GROUP_SEQUENTIAL = "5 equally spaced looks, O'Brien-Fleming type spending (Lan and DeMets)"


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """A size of effect, signed: treatment minus control.

    Attributes:
        absolute: metric units; of a count that folds by first, difference of the shares of units with an event.
        relative: as a share of the size of the control's mean; None where that is 0.
    """

    absolute: float
    relative: float | None


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """Probability of a right decision by the planned sample: of the engine's test, and of two others there."""

    sequential: float
    fixed: float
    group_sequential: float | None


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """Units of all arms, or the days in which they come and mature; None where it has no value (see the notes).

    Attributes:
        for_power: by then the test has decided rightly with the power aimed at.
        median: by then it has decided with probability 1/2.
        expected: on average, if nobody waits beyond the planned sample.
        expected_without_effect: the same if there is no effect (of a safety test: if the harm is the margin).
        fixed: sample of a test with that power that is looked at once.
        group_sequential: largest sample of a group sequential test with that power.
        group_sequential_expected: its expected sample.
    """

    for_power: float | None = None
    median: float | None = None
    expected: float | None = None
    expected_without_effect: float | None = None
    fixed: float | None = None
    group_sequential: float | None = None
    group_sequential_expected: float | None = None


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Power and half width over units of all arms; lists of one length.

    Attributes:
        sequential: probability that the sequence, tuned as the engine tunes it, has decided rightly by then.
        fixed, group_sequential: power of a test planned for that many units.
        half_width: of the confidence sequence, metric units (a count that folds by first: log rate ratio);
            of a one-sided sequence, from the estimate to its bound.
        half_width_fixed: of the confidence interval of one look.
    """

    units: tuple[float, ...]
    sequential: tuple[float, ...]
    fixed: tuple[float, ...]
    group_sequential: tuple[float, ...]
    half_width: tuple[float, ...]
    half_width_fixed: tuple[float, ...]


class PlannedTest(msgspec.Struct, frozen=True, kw_only=True):
    """One test of one metric, in arms with the same share of traffic.

    Attributes:
        test: effect (two-sided), harm or safety (one-sided, guardrails).
        quantile: which, of a latency.
        method: as in results.
        sides: 1 or 2.
        alpha: the test's error level.
        sequence_alpha: what of it the sequence has: less where it is averaged with an exact test, and where later
            weight epochs need a share.
        rho2: tuning constant of the normal mixture per unit of the pair of arms; None of quantiles.
        tuned_units: units of all arms at which the sequence is narrowest.
        share: probability that a unit of the pair is in the treatment arm.
        traffic_share: share of all units that are in the pair.
        first_units: units of all arms at the first look.
        planned_units: of all arms.
        baseline: the numbers used, and where they come from.
        null: edge of the null hypothesis.
        effect: true effect that is planned for.
        variance: n times the variance of the estimated excess, n units of the pair.
        detectable: effect that the planned sample finds with the power aimed at; of a safety test the margin that
            it could show; None where there is none.
        price: sample for the power, over that of a fixed test.
        half_width: of the sequence at the planned sample, as `Curve.half_width`; None before the first look.
    """

    metric: str
    kind: str
    role: str
    arms: tuple[str, ...]
    test: str
    quantile: float | None = None
    method: str
    sides: int
    alpha: float
    sequence_alpha: float
    rho2: float | None
    tuned_units: float
    share: float
    traffic_share: float
    first_units: float
    planned_units: int
    baseline: dict[str, Any]
    baseline_source: str
    null: Effect
    effect: Effect
    effect_source: str
    variance: float
    power: Power
    detectable: Effect | None
    units: Samples
    days: Samples | None
    price: float | None
    half_width: float | None
    notes: tuple[str, ...] = ()
    curve: Curve


class NotPlanned(msgspec.Struct, frozen=True, kw_only=True):
    """A metric, or a test of it, that has no plan, and why."""

    metric: str
    role: str
    arms: tuple[str, ...]
    reason: str


class ExperimentPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of an experiment.

    Attributes:
        power: aimed at.
        units_per_day: of all arms; None if not given.
    """

    experiment: str
    version: int
    design_hash: str
    planned_sample: int
    power: float
    units_per_day: float | None
    group_sequential: str = GROUP_SEQUENTIAL
    tests: tuple[PlannedTest, ...]
    not_planned: tuple[NotPlanned, ...]
