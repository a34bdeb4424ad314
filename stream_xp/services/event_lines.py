"""Events as lines of JSON: each is checked by the rules that the worker will hold it to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeAlias

import msgspec

from stream_xp.domain.codec import Limits, RawRecord, decode_exposure, decode_reward
from stream_xp.errors import Reason, RecordRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EventKind: TypeAlias = Literal["exposure", "reward"]


class EventLine(NamedTuple):
    """One event, ready to be written: its topic's kind, the Kafka key and the value."""

    kind: EventKind
    key: bytes
    value: bytes


class BadLine(NamedTuple):
    """One line that is no event.

    Attributes:
        number: of the line, from 1.
        message: the rule it breaks.
    """

    number: int
    message: str


_OBJECT = msgspec.json.Decoder(dict[str, Any])
# A record that names no unit gets past the key's check with this, and is told that its unit is missing.
_NO_KEY = b"-"


def read_events(
    lines: BinaryIO, limits: Limits, *, now_ms: Callable[[], int], fill_time: bool = False
) -> Iterator[EventLine | BadLine]:
    """Give each line of `lines` as an event or with what is wrong with it; empty lines are passed over.

    Args:
        lines: binary stream; a line over the limit is not held in memory.
        limits: the worker's bounds.
        now_ms: wall clock, against which event times are checked; the broker's will be a little later.
        fill_time: whether an event without `time` gets the present time.
    """
    for number, line in enumerate(_lines(lines, limits.record_bytes), start=1):
        if not line.strip():
            continue
        try:
            yield parse_event(line, limits, now_ms=now_ms(), fill_time=fill_time)
        except RecordRejected as rejection:
            yield BadLine(number, rejection.detail)


def parse_event(line: bytes, limits: Limits, *, now_ms: int, fill_time: bool = False) -> EventLine:
    """Return the event in one line of JSON; raises RecordRejected with the first rule it breaks.

    `type` says whether it is an exposure or a reward and is not sent; without it, `arm` makes it an exposure
    and `metric` a reward.
    """
    if len(line) > limits.record_bytes:
        raise RecordRejected(Reason.TOO_LARGE, f"is longer than {limits.record_bytes} bytes")
    fields = _fields(line)
    kind = _kind(fields)
    value = _value(line, fields, now_ms=now_ms if fill_time else None)
    key = _key(fields)
    decode = decode_exposure if kind == "exposure" else decode_reward
    decode(RawRecord(key, value, (), now_ms), limits)
    return EventLine(kind, key, value)


def _lines(stream: BinaryIO, limit_bytes: int) -> Iterator[bytes]:
    while line := stream.readline(limit_bytes + 2):
        yield line.removesuffix(b"\n").removesuffix(b"\r")
        while not line.endswith(b"\n") and len(line) == limit_bytes + 2:
            line = stream.readline(limit_bytes + 2)


def _fields(line: bytes) -> dict[str, Any]:
    try:
        return _OBJECT.decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RecordRejected(Reason.INVALID_JSON, f"is no JSON object: {error}") from error


def _kind(fields: dict[str, Any]) -> EventKind:
    match fields.get("type"):
        case "exposure":
            return "exposure"
        case "reward":
            return "reward"
        case None if ("arm" in fields) != ("metric" in fields):
            return "exposure" if "arm" in fields else "reward"
        case None:
            detail = "has neither or both of `arm` and `metric`; say `type`: exposure or reward"
            raise RecordRejected(Reason.INVALID_FIELD, detail)
    raise RecordRejected(Reason.INVALID_FIELD, "`type` must be exposure or reward")


def _value(line: bytes, fields: dict[str, Any], *, now_ms: int | None) -> bytes:
    if "id" not in fields:
        detail = "`id` is missing; without it an event that is sent twice would count twice"
        raise RecordRejected(Reason.INVALID_FIELD, detail)
    if "time" not in fields and now_ms is None:
        raise RecordRejected(
            Reason.INVALID_FIELD, "`time` is missing; give it, or take the present with --now"
        )
    if "type" not in fields and "time" in fields:
        return line.strip()
    sent = {name: value for name, value in fields.items() if name != "type"}
    return msgspec.json.encode({"time": now_ms, **sent})


def _key(fields: dict[str, Any]) -> bytes:
    unit = fields.get("unit")
    return unit.encode() if isinstance(unit, str) and unit else _NO_KEY
