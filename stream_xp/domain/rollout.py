"""How an experiment moves: the rule that ships it, the stages of its ramp, and the policy of its weights."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec

from stream_xp.domain.fields import Duration, Key, Positive, Probability, Share, Weight

UNIFORM: Final = "uniform"
"""Value of `Allocation.uniform_segment` on the exposures of units of the slice."""


class Mode(StrEnum):
    """Who concludes: auto, the service by itself; approve, a person, and a stop or ship waits as proposed.

    A stop for proven harm is never held back: it protects.
    """

    AUTO = "auto"
    APPROVE = "approve"


class ShipRule(StrEnum):
    """What counts as better in a primary metric.

    `always_valid` and `group_sequential` hold their error level; `expected_loss` does not promise one
    (docs/decisions.md says what each guarantees).
    """

    ALWAYS_VALID = "always_valid"
    GROUP_SEQUENTIAL = "group_sequential"
    EXPECTED_LOSS = "expected_loss"


class Spending(StrEnum):
    """How a group sequential test spends its level over its looks."""

    OBRIEN_FLEMING = "obrien_fleming"
    POCOCK = "pocock"


class Conclusion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the experiment comes to its end.

    Attributes:
        mode: who concludes.
        rule: what counts as better in a primary metric.
        futility: conclude, with the control, once every primary is proven to stay below its minimum effect.
        looks: of a group sequential rule, shares of the planned sample at which it looks, growing, the last one 1.
        spending: of a group sequential rule, how its level is spent.
        maximum_loss: of the expected-loss rule, the loss (metric units) below which an arm ships.
    """

    mode: Mode = Mode.AUTO
    rule: ShipRule = ShipRule.ALWAYS_VALID
    futility: bool = False
    looks: Annotated[tuple[Share, ...], msgspec.Meta(min_length=1, max_length=50)] | None = None
    spending: Spending | None = None
    maximum_loss: Positive | None = None


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage of a ramp.

    Attributes:
        coverage: share of all units that take part; among them the arms keep their weights.
        minimum_units: units of all arms exposed in this stage before it may be left.
        minimum_time: watermark time in this stage before it may be left.
    """

    coverage: Share
    minimum_units: Annotated[int, msgspec.Meta(ge=0, le=10**12)] = 0
    minimum_time: Duration = "0s"


_USUAL_TIMES = {0.01: "30m", 0.05: "30m", 0.1: "1h", 0.25: "4h", 0.5: "24h", 1.0: "24h"}
DEFAULT_STAGES = tuple(
    Stage(coverage=share, minimum_units=1_000, minimum_time=time) for share, time in _USUAL_TIMES.items()
)
"""Of a ramp that lists none (docs/decisions.md says why these)."""


class Ramp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Coverage that grows from stage to stage while every guardrail is proven non-inferior.

    Attributes:
        stages: in the order of growing coverage; the last one covers all units.
    """

    stages: Annotated[tuple[Stage, ...], msgspec.Meta(min_length=1, max_length=20)] = DEFAULT_STAGES


class Policy(StrEnum):
    """How weights are chosen (docs/allocation.md)."""

    FIXED = "fixed"
    THOMPSON = "thompson"
    TOP_TWO = "top_two"
    CONTEXTUAL = "contextual"


class BurnIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every arm must have before weights move.

    Attributes:
        units: mature units of the arm.
        conversions: of them with a value that is not 0; of a conversion only.
    """

    units: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 100
    conversions: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 40


class Prior(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of the arms before their first unit: one of a mean, scores, and means of past arms.

    Attributes:
        worth: how many units this knowledge counts as.
        mean: expected value of every arm, metric units.
        scores: expected value of each arm, metric units, from a model of its quality.
        past: observed values of arms of past experiments, metric units; their mean is the expected value.
    """

    worth: Positive
    mean: float | None = None
    scores: dict[Key, float] | None = None
    past: Annotated[tuple[float, ...], msgspec.Meta(min_length=2, max_length=10_000)] | None = None


class Delay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ages at which a unit whose attribution window is still open is looked at, so that it counts for the weights.

    Attributes:
        ages: times since a unit's first exposure, growing, each shorter than the attribution window.
        shares: registered shares of all conversions that have come by these ages; absent: learned alone.
    """

    ages: Annotated[tuple[Duration, ...], msgspec.Meta(min_length=1, max_length=8)]
    shares: Annotated[tuple[Probability, ...], msgspec.Meta(min_length=1, max_length=8)] | None = None


class Allocation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights that follow the evidence.

    Attributes:
        policy: how weights are chosen.
        metric: key of the metric that is to grow, or shrink, as its direction says; a conversion or a mean.
        floor: smallest weight of an arm that its guardrails have not closed; at least 1 %, and 5 % for an interval
            of use.
        maximum_change: largest change of one arm's weight in one update.
        minimum_change: weights that would all move by less stay.
        burn_in: before it the weights of the file hold.
        uniform_slice: share of the units that is spread evenly whatever the evidence says.
        interval: watermark time between two updates.
        context: of a contextual policy, the registered segment whose values get weights of their own.
        prior: what is known before; absent: as good as nothing.
        delay: of a conversion, how units whose window is open count; absent: they do not.
        uniform_segment: the registered segment by which exposures of the uniform slice are told: its value there is
            `uniform`. Units are then drawn in two steps, and the effect of the slice alone is published.
    """

    policy: Policy
    metric: Key
    floor: Weight = 0.05
    maximum_change: Share = 0.1
    minimum_change: Weight = 0.01
    burn_in: BurnIn = BurnIn()
    uniform_slice: Weight = 0.0
    interval: Duration = "1h"
    context: Key | None = None
    prior: Prior | None = None
    delay: Delay | None = None
    uniform_segment: Key | None = None


class Monitors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is watched beside metrics (docs/decisions.md); absent fields watch nothing but what has a default.

    Attributes:
        alpha: level of each monitor that is a test.
        data_age: age of the watermark over which the experiment is invalid.
        crossovers: share of units seen in two arms over which it is invalid.
        duplicates: share of records that repeat another over which a warning is given.
        reward_loss: how many times fewer units of an arm than of the control may have a reward; beyond it rewards
            are lost, and it is invalid.
        exposure_stall: whether an arm that gets no more units makes it invalid.
    """

    alpha: Probability = 0.001
    data_age: Duration | None = None
    crossovers: Probability = 0.01
    duplicates: Probability | None = None
    reward_loss: Annotated[float, msgspec.Meta(gt=1.0, le=1000.0)] | None = None
    exposure_stall: bool = True
