"""What a person decides: the record of an operator's action on ``xp.signals``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from stream_xp.domain.fields import Key

OPERATOR_TYPE = "com.streamxp.operator.v1"


class OperatorAction(StrEnum):
    """What a person may do.

    pause, resume: hold the ramp and the weights where they are, and go on. stop, ship: conclude, whatever the
    evidence says. approve, reject: answer a proposal. reset: take a stop, ship or proposal back, and open the latches
    of the monitors. set_stage: move the ramp.
    """

    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    SHIP = "ship"
    APPROVE = "approve"
    REJECT = "reject"
    RESET = "reset"
    SET_STAGE = "set_stage"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One action of a person on one experiment version.

    Attributes:
        actor: who, as they named themselves or as the API authenticated them.
        reason: why, in a sentence; shown wherever the action is.
        arm: of ship, the arm that gets all traffic.
        stage: of set_stage, its number from 0.
        signal_id: of approve and reject, the proposal that is answered; of reset, the signal that is taken back.
        monitors: of reset: it takes nothing back, and only opens the latches of the monitors.
    """

    experiment: Key
    version: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    action: OperatorAction
    actor: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    arm: Key | None = None
    stage: Annotated[int, msgspec.Meta(ge=0, le=19)] | None = None
    signal_id: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] | None = None
    monitors: bool = False


class OrderSignal(msgspec.Struct, frozen=True, kw_only=True):
    """A record of ``xp.signals`` from a person: a structured CloudEvent; `source` + `id` is the dedupe key."""

    id: str
    source: str
    subject: str
    time: str
    data: Order
    type: str = OPERATOR_TYPE
    specversion: str = "1.0"
    datacontenttype: str = "application/json"
