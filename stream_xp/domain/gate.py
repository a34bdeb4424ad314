"""What a deployment gate says of an experiment: one verdict, whoever asks and however it is put."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from stream_xp.domain.decision import MetricState
from stream_xp.domain.experiment import Role


class Verdict(StrEnum):
    """The answer of every gate.

    stop: take it back; final until a person resets it. pass: it may go on. continue: keep the traffic as it is and
    ask again. invalid: nothing can be told of it now, so nothing moves.
    """

    PASS = "pass"  # noqa: S105 (no password)
    CONTINUE = "continue"
    STOP = "stop"
    INVALID = "invalid"


class Cause(StrEnum):
    """Why the verdict is what it is; a closed set.

    Of a pass: shipped, safe. Of a stop: stopped, another_arm (that one has shipped), closed (a policy gives the arm no
    units any more). Of a continue: inconclusive, held. All others of an invalid: starting (the topics are not read to
    their end yet), disconnected (they were, but not lately), and what their names say.
    """

    SHIPPED = "shipped"
    SAFE = "safe"
    STOPPED = "stopped"
    ANOTHER_ARM = "another_arm"
    CLOSED = "closed"
    INCONCLUSIVE = "inconclusive"
    HELD = "held"
    STARTING = "starting"
    DISCONNECTED = "disconnected"
    UNKNOWN_EXPERIMENT = "unknown_experiment"
    UNKNOWN_ARM = "unknown_arm"
    ARCHIVED = "archived"
    NO_DATA = "no_data"
    STALE_DATA = "stale_data"
    INVALID_DATA = "invalid_data"


class GateMetric(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The evidence of one metric in one arm; what does not exist is absent, never null.

    Attributes:
        estimate, lower, upper: effect with its confidence sequence, arm minus control, metric units.
        log_e: logarithm of the e-value: of harm for a guardrail, of any effect for others.
        threshold_log_e: proven at or above it.
        margin, relative_margin: the largest tolerable harm, in metric units or as a share of the control's mean.
    """

    name: str
    role: Role
    arm: str
    state: MetricState
    control_units: int
    arm_units: int
    estimate: float | msgspec.UnsetType = msgspec.UNSET
    lower: float | msgspec.UnsetType = msgspec.UNSET
    upper: float | msgspec.UnsetType = msgspec.UNSET
    log_e: float | msgspec.UnsetType = msgspec.UNSET
    threshold_log_e: float | msgspec.UnsetType = msgspec.UNSET
    margin: float | msgspec.UnsetType = msgspec.UNSET
    relative_margin: float | msgspec.UnsetType = msgspec.UNSET


class GateVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on the arms of an experiment, and what it rests on.

    Attributes:
        version: of the experiment; 0 while none is known.
        arms: the treatment arms that were asked for; all of them where none was named.
        reason: one sentence.
        decision_id: the signal or order in force; empty without one.
        data_age_ms: wall clock minus watermark; without data, since when there could have been some.
        invalid_ms: for how long nothing valid could be told; 0 unless the verdict is invalid.
        control_units, arm_units: units exposed to the control, and to the asked arm that has least.
        look: of the result it rests on; 0 without one.
    """

    experiment: str
    version: int
    arms: tuple[str, ...]
    verdict: Verdict
    cause: Cause
    reason: str
    decision_id: str
    data_age_ms: int
    invalid_ms: int
    control_units: int
    arm_units: int
    look: int
    metrics: tuple[GateMetric, ...] = ()
    schema: int = 1
