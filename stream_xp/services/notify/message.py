"""What a target is sent: a signal as a CloudEvent without its bulk, or as a line for a chat."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Final, NamedTuple

import msgspec

from stream_xp.domain.operator import OrderSignal
from stream_xp.services.notify.targets import Format
from stream_xp.services.signal_records import SignalRecord

MAX_TEXT: Final = 2_000
BULK: Final = (
    "offsets",
    "metrics",
    "segments",
    "monitors",
    "looks",
    "ages",
    "exposure_outcomes",
    "reward_outcomes",
    "champion",
    "decision",
)
"""Fields of a result that are left out: `stream-xp signals` and the API have them. Its decision stands beside it."""
_ACTIVE: Final = re.compile(r"(?<=:)(?=//)|(?<=\])(?=\()|(?<=\bwww)(?=\.)|(?<=(?<!\w)@)", re.IGNORECASE)
"""Where a space of no width takes the life out of an address, a link of Markdown, and a call."""
_SAFE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")


class Message(NamedTuple):
    """What is posted, the same at every attempt.

    Attributes:
        id: of the signal.
        body: bytes as they are signed.
    """

    id: str
    body: bytes
    content_type: str


def message(record: SignalRecord, form: Format) -> Message:
    """The message that tells of a record."""
    if form is Format.SLACK:
        return Message(
            message_id(record),
            msgspec.json.encode({"text": text_of(record)}),
            "application/json; charset=utf-8",
        )
    return Message(message_id(record), msgspec.json.encode(event(record)), "application/cloudevents+json")


def message_id(record: SignalRecord) -> str:
    """The id of a signal.

    An id that does not fit a header is hashed; no dot may be in it, since dots part what is signed.
    """
    if _SAFE_ID.fullmatch(record.id):
        return record.id
    return hashlib.sha256(record.id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def event(record: SignalRecord) -> dict[str, Any]:
    """The CloudEvent of a record, as it is on the topic, without `BULK`."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    result = fields["data"].get("result")
    if result is not None:
        fields["data"]["result"] = {name: value for name, value in result.items() if name not in BULK}
    return fields


def text_of(record: SignalRecord) -> str:
    """One line that says what a record says; names and prose in it cannot call people or make links."""
    word, about, who, reason = _order(record) if isinstance(record, OrderSignal) else _decision(record)
    details = f" ({_plain(about)})" if about else ""
    return f"*{word}* {_plain(who)}{details}: {_plain(reason)}"[:MAX_TEXT]


def _decision(record: Any) -> tuple[str, str, str, str]:
    decision, result = record.data.decision, record.data.result
    about = [
        decision.arm,
        decision.metric,
        None if decision.stage is None else f"stage {decision.stage}",
        f"signal {record.id}" if record.data.proposed else None,
    ]
    word = f"PROPOSED {decision.action.upper()}" if record.data.proposed else decision.action.upper()
    return (
        word,
        ", ".join(filter(None, about)),
        f"{result.experiment} version {result.version}",
        decision.reason,
    )


def _order(record: OrderSignal) -> tuple[str, str, str, str]:
    order = record.data
    about = [
        order.arm,
        None if order.stage is None else f"stage {order.stage}",
        None if order.signal_id is None else f"signal {order.signal_id}",
    ]
    word = f"ORDER {order.action.upper().replace('_', ' ')}"
    who = f"{order.experiment} version {order.version}"
    return word, ", ".join(filter(None, about)), who, f"{order.actor}: {order.reason}"


def _plain(text: str) -> str:
    """Text without controls, and without what a chat reads as a link or a call to everybody (@channel)."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    escaped = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _ACTIVE.sub("\u200b", escaped)
