"""What `stream-xp overlap` says; its JSON is these types."""

from __future__ import annotations

import msgspec

from stream_xp.domain.layer_rules import Relation


class ExperimentUnits(msgspec.Struct, frozen=True, kw_only=True):
    """The units of one running experiment, and those that should not be there.

    Attributes:
        layer, slots: as in its file; None and empty without a layer.
        share: of all units that its slots hold.
        units: with at least one exposure that was taken, crossovers too.
        outside: of them, those whose slot is none of its own; of a holdout, those whose arm is not that of their slot.
        held_out: of them, those that the holdout of its program, or of its layer, holds out.
    """

    experiment: str
    version: int
    layer: str | None
    slots: tuple[str, ...]
    share: float
    units: int
    outside: int = 0
    held_out: int = 0


class ArmsInteraction(msgspec.Struct, frozen=True, kw_only=True):
    """The interaction of two treatment arms in one metric, in metric units.

    Attributes:
        experiment, metric, role: the metric, and whose it is.
        units: common units of the four cells whose windows in both experiments are over.
        estimate, lower, upper: effect of the second arm within the first one minus its effect within the control;
            None while undetermined.
        note: why it is undetermined, if it is.
    """

    experiment: str
    metric: str
    role: str
    first_arm: str
    second_arm: str
    units: int
    estimate: float | None
    lower: float | None
    upper: float | None
    log_e: float
    note: str | None


class PairInteraction(msgspec.Struct, frozen=True, kw_only=True):
    """Whether two experiments interact in any of their primary metrics and guardrails.

    Attributes:
        log_e: of the pair; adjusted_log_e: by e-Holm over all pairs that may share units.
        threshold_log_e: an interaction is proven at or above this.
        decisive: for which of the two it keeps a ship from being approved.
        untested: metrics that are neither conversions nor means.
    """

    log_e: float
    adjusted_log_e: float
    threshold_log_e: float
    found: bool
    decisive: tuple[str, ...]
    arms: tuple[ArmsInteraction, ...]
    untested: tuple[str, ...] = ()


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """An element of the overlap matrix above its diagonal.

    Attributes:
        first, second: in alphabetical order.
        shared: units of both.
        expected: of them, at most, if assignments are independent: the smaller of the units of the one times the
            share of the other. It is reached where whoever meets the one meets the other. 0 where none may be shared.
        violations: units that they share and may not.
        interaction: None where they may share no unit, or one is a holdout of the other.
    """

    first: str
    second: str
    relation: Relation
    shared: int
    expected: float
    violations: int
    interaction: PairInteraction | None = None


class OverlapReport(msgspec.Struct, frozen=True, kw_only=True):
    """All running experiments, and all pairs of them.

    Attributes:
        collisions: rules that the experiments on the topic break beside each other, as when two were applied at once.
        exposures, rewards: raw records read.
        notes: what limits the answer.
    """

    experiments: tuple[ExperimentUnits, ...]
    pairs: tuple[Pair, ...]
    collisions: tuple[str, ...]
    exposures: int
    rewards: int
    notes: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing was found that should not be, a decisive interaction among it."""
        units = any(one.outside or one.held_out for one in self.experiments)
        pairs = any(
            pair.violations
            or (pair.interaction is not None and pair.interaction.found and pair.interaction.decisive)
            for pair in self.pairs
        )
        return not (units or pairs or self.collisions)
