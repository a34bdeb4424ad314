"""Lines of JSON as events, checked as the worker will."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.domain.codec import Limits, RawRecord, decode_exposure, decode_reward
from stream_xp.errors import RecordRejected
from stream_xp.services.event_lines import BadLine, EventLine, parse_event, read_events

NOW_MS = 1_793_611_800_000
LIMITS = Limits(record_bytes=1_000)
EXPOSURE = {"id": "1", "time": NOW_MS, "unit": "u", "experiment": "e", "arm": "a"}
REWARD = {"id": "1", "time": NOW_MS, "unit": "u", "metric": "m", "value": 0.1}


def parsed(fields: object, *, fill_time: bool = False) -> EventLine:
    return parse_event(json.dumps(fields).encode(), LIMITS, now_ms=NOW_MS, fill_time=fill_time)


def read(raw: bytes) -> list[EventLine | BadLine]:
    return list(read_events(io.BytesIO(raw), LIMITS, now_ms=lambda: NOW_MS))


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (EXPOSURE, "exposure"),
        (REWARD, "reward"),
        ({**EXPOSURE, "type": "exposure"}, "exposure"),
        ({**REWARD, "type": "reward"}, "reward"),
        ({**EXPOSURE, "metric": "m", "type": "exposure"}, "exposure"),
        ({**EXPOSURE, "metric": "m", "type": "reward"}, "reward"),
    ],
)
def test_type_says_the_kind_or_arm_and_metric_do(fields: dict[str, Any], kind: str) -> None:
    event = parsed(fields)
    assert (event.kind, event.key) == (kind, b"u")
    assert json.loads(event.value) == without(fields, "type")


def test_a_line_without_type_is_sent_as_it_is() -> None:
    line = b' {"id":"1", "time":1, "unit":"u","metric":"m","x":1e400 ,"x":0.10}\r'
    assert (
        parse_event(line.replace(b"1e400", b"1.50"), LIMITS, now_ms=NOW_MS).value
        == line.replace(b"1e400", b"1.50").strip()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (without(EXPOSURE, "arm"), "neither or both of `arm` and `metric`"),
        ({**EXPOSURE, "metric": "m"}, "neither or both of `arm` and `metric`"),
        ({**EXPOSURE, "type": "click"}, "`type` must be exposure or reward"),
        ({**EXPOSURE, "type": 1}, "`type` must be exposure or reward"),
        (
            without(EXPOSURE, "id"),
            "`id` is missing; without it an event that is sent twice would count twice",
        ),
        (without(EXPOSURE, "time"), "`time` is missing; give it, or take the present with --now"),
        (without(EXPOSURE, "unit"), "missing required field `unit`"),
        ({**EXPOSURE, "unit": ""}, "`$.unit`"),
        ({**EXPOSURE, "unit": 5}, "Expected `str`, got `int` - at `$.unit`"),
        (without(EXPOSURE, "experiment"), "missing required field `experiment`"),
        ({**REWARD, "value": "1"}, "at `$.value`"),
        ({**REWARD, "value": True}, "at `$.value`"),
        ({**REWARD, "time": NOW_MS + LIMITS.future_ms + 1}, "ms ahead of the broker"),
        ({**REWARD, "time": "1950-01-01T00:00:00Z"}, "before 1970"),
        ({**REWARD, "x": "y" * 1_000}, "is longer than 1000 bytes"),
        ([], "is no JSON object"),
        (None, "is no JSON object"),
    ],
)
def test_what_a_bad_line_is_told(fields: object, message: str) -> None:
    with pytest.raises(RecordRejected) as caught:
        parsed(fields)
    assert message in caught.value.detail


@pytest.mark.parametrize(
    "line", [b"{", b'{"a":NaN}', b'{"a":1e999}', b'{"a":' * 190, b"\xff", b'{"id":"\xff"}']
)
def test_lines_that_are_no_json(line: bytes) -> None:
    with pytest.raises(RecordRejected, match="is no JSON object"):
        parse_event(line, LIMITS, now_ms=NOW_MS)


def test_the_present_fills_a_missing_time_only_if_asked() -> None:
    filled = parsed(without(REWARD, "time"), fill_time=True)
    assert json.loads(filled.value) == REWARD
    assert json.loads(parsed({**REWARD, "time": 7}, fill_time=True).value)["time"] == 7
    with pytest.raises(RecordRejected, match=r"\$\.time"):
        parsed({**REWARD, "time": None}, fill_time=True)


def test_lines_are_numbered_and_empty_ones_passed_over() -> None:
    good = json.dumps(REWARD).encode()
    long_line = b'{"x":"' + b"y" * 5_000 + b'"}'
    outcomes = read(b"\n".join([good, b"", b"  ", b"{", long_line, good + b"\r", long_line]))
    assert [outcome.number for outcome in outcomes if isinstance(outcome, BadLine)] == [4, 5, 7]
    assert [outcome.key for outcome in outcomes if isinstance(outcome, EventLine)] == [b"u", b"u"]
    assert read(b"") == read(b"\n\n") == []


@pytest.mark.parametrize("over", range(-2, 5))
def test_a_line_at_the_limit(over: int) -> None:
    bare = json.dumps({**REWARD, "x": ""}).encode()
    line = json.dumps({**REWARD, "x": "y" * (LIMITS.record_bytes - len(bare) + over)}).encode()
    first, second = read(line + b"\n" + json.dumps(REWARD).encode())
    assert isinstance(first, BadLine) == (over > 0)
    assert isinstance(second, EventLine)


@given(st.lists(st.one_of(st.binary(max_size=40), st.just(json.dumps(REWARD).encode())), max_size=5))
def test_whatever_is_sent_is_what_the_worker_takes(lines: list[bytes]) -> None:
    for outcome in read(b"\n".join(lines)):
        if isinstance(outcome, EventLine):
            decode = decode_exposure if outcome.kind == "exposure" else decode_reward
            assert (
                decode(RawRecord(outcome.key, outcome.value, (), NOW_MS), LIMITS).unit.encode() == outcome.key
            )
