"""What a target is sent."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from stream_xp.domain.decision import Signal
from stream_xp.domain.operator import OrderSignal
from stream_xp.services.notify.message import BULK, MAX_TEXT, message, message_id, text_of
from stream_xp.services.notify.targets import Format

GOLDEN = Path(__file__).parents[3] / "topics" / "golden"


def decision(name: str = "signal.v1") -> Signal:
    return msgspec.json.decode((GOLDEN / f"{name}.json").read_bytes(), type=Signal)


def order(**changes: object) -> OrderSignal:
    found = msgspec.json.decode((GOLDEN / "operator.v1.json").read_bytes(), type=OrderSignal)
    return msgspec.structs.replace(found, data=msgspec.structs.replace(found.data, **changes))


def test_a_cloudevent_is_the_signal_without_its_bulk() -> None:
    sent = message(decision(), Format.CLOUDEVENT)
    assert sent.content_type == "application/cloudevents+json"
    found = json.loads(sent.body)
    stored = json.loads((GOLDEN / "signal.v1.json").read_text())
    assert {name: text for name, text in found.items() if name != "data"} == {
        name: text for name, text in stored.items() if name != "data"
    }
    assert found["data"]["decision"] == stored["data"]["decision"]
    result = stored["data"]["result"]
    assert found["data"]["result"] == {name: value for name, value in result.items() if name not in BULK}
    assert found["data"]["result"]["statistics_hash"] == result["statistics_hash"]
    assert len(sent.body) < 1_500


def test_an_order_is_sent_whole() -> None:
    assert json.loads(message(order(), Format.CLOUDEVENT).body) == json.loads(
        (GOLDEN / "operator.v1.json").read_text()
    )


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            decision(),
            "*STOP* checkout-canary version 1 (canary, errors): errors is proven to be harmed in canary",
        ),
        (
            decision("signal.proposed.v1"),
            (
                "*PROPOSED SHIP* player-ramp version 1 (player-9, watched, signal player-ramp/1/ship): "
                "watched is proven better in player-9"
            ),
        ),
        (
            order(),
            (
                "*ORDER APPROVE* player-ramp version 1 (signal player-ramp/1/ship): "
                "kim@example.com: support saw no complaints"
            ),
        ),
    ],
)
def test_a_chat_gets_a_line(record: Signal | OrderSignal, text: str) -> None:
    sent = message(record, Format.SLACK)
    assert json.loads(sent.body) == {"text": text}
    assert sent.content_type == "application/json; charset=utf-8"


def test_prose_calls_nobody_and_makes_no_link() -> None:
    text = text_of(
        order(actor="@here", reason="<!channel> <https://evil.example|login>\n@all & me@example.com")
    )
    assert "<" not in text
    assert "\n" not in text
    assert "&lt;!channel&gt; &lt;https:\u200b//evil.example|login&gt; @\u200ball &amp; me@example.com" in text
    assert "@\u200bhere" in text


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("see https://evil.example/login", "see https:\u200b//evil.example/login"),
        ("see HTTP://evil.example", "see HTTP:\u200b//evil.example"),
        ("see www.evil.example", "see www\u200b.evil.example"),
        ("[the memo](//evil.example)", "[the memo]\u200b(//evil.example)"),
        ("ratio 1:2, a/b, awww. [x] (y)", "ratio 1:2, a/b, awww. [x] (y)"),
    ],
)
def test_an_address_in_prose_is_no_link(reason: str, shown: str) -> None:
    """Chats make links of bare addresses too, and some of Markdown."""
    assert text_of(order(reason=reason)).endswith(f": {shown}")


def test_a_line_is_bounded() -> None:
    assert len(text_of(order(reason="&" * 2000))) == MAX_TEXT


@pytest.mark.parametrize(
    "identity", ["a.b", "checkout-canary/1/stop", "x\r\nHost: evil", "ключ", "a" * 101, ""]
)
def test_an_id_that_fits_no_header_is_hashed(identity: str) -> None:
    """A dot would let the id run into the timestamp in what is signed."""
    found = message_id(msgspec.structs.replace(decision(), id=identity))
    assert len(found) == 32
    assert found.isalnum()
    assert found == message_id(msgspec.structs.replace(decision(), id=identity))


def test_ids_of_the_service_are_sent_as_they_are() -> None:
    for identity in ("0123456789abcdef" * 2, "5d1bb6a0-2d68-4b52-a0f8-6fd2fdbd4a7e"):
        assert message_id(msgspec.structs.replace(decision(), id=identity)) == identity
