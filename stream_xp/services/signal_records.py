"""The records of ``xp.signals``: decisions of the service and orders of people, told apart by `type`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import msgspec

from stream_xp.domain.codec import decode_own
from stream_xp.domain.decision import Signal
from stream_xp.domain.operator import OPERATOR_TYPE, OrderSignal
from stream_xp.errors import ConfigError

if TYPE_CHECKING:
    from stream_xp.services.passed_over import PassedOver

SignalRecord: TypeAlias = Signal | OrderSignal


class _Typed(msgspec.Struct):
    """What tells the records apart; one without a type is taken for a decision, which says what it lacks."""

    type: str = ""


def experiment_of(record: SignalRecord) -> str:
    """The experiment that a record is about."""
    return record.data.experiment if isinstance(record, OrderSignal) else record.data.result.experiment


def version_of(record: SignalRecord) -> int:
    """The version of the experiment that a record is about."""
    return record.data.version if isinstance(record, OrderSignal) else record.data.result.version


def readable(passed_over: PassedOver, value: bytes | None, *, topic: str, place: str) -> SignalRecord | None:
    """Return the record, or None where the value is none; `passed_over` counts it then.

    Args:
        passed_over: what the reader has passed over so far.
        value: of a record of the topic.
        topic: full name.
        place: topic, partition and offset, for the message.
    """
    if is_order(value):
        return passed_over.decoded(value, OrderSignal, topic=topic, place=place)
    return passed_over.decoded(value, Signal, topic=topic, place=place)


def is_order(value: bytes | None) -> bool:
    """Whether a value says that it is an order of a person."""
    try:
        return decode_own(value or b"", _Typed).type == OPERATOR_TYPE
    except ConfigError:
        return False
