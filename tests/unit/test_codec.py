"""From bytes to events: every rule of the codec, in its order, and a batch as one by one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stream_xp.domain import codec
from stream_xp.domain.codec import (
    Limits,
    RawColumns,
    RawRecord,
    decode_experiment,
    decode_exposure,
    decode_own,
    decode_reward,
)
from stream_xp.domain.dead_letter import DeadLetter
from stream_xp.domain.decision import ConfigRecord, Result, Signal
from stream_xp.domain.events import Exposure, Reward, epoch_ms
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.errors import ConfigError, Reason, RecordRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def columns(records: Sequence[RawRecord]) -> RawColumns:
    return RawColumns(*map(list, zip(*records, strict=True))) if records else RawColumns([], [], [], [])


def decode_exposures(
    records: Sequence[RawRecord], limits: codec.Limits | None = None
) -> list[Exposure | RecordRejected]:
    return codec.decode_exposures(columns(records), limits or codec.Limits())


def decode_rewards(
    records: Sequence[RawRecord], limits: codec.Limits | None = None
) -> list[Reward | RecordRejected]:
    return codec.decode_rewards(columns(records), limits or codec.Limits())


LOG_MS = 1_793_611_800_000
LIMITS = Limits()
REWARD = {"id": "1", "time": LOG_MS, "unit": "u", "metric": "click"}
EXPOSURE = {"id": "1", "time": LOG_MS, "unit": "u", "experiment": "e", "arm": "a"}
YEAR_3000_MS = 32_503_680_000_000

STRUCTURED = (("content-type", b"application/cloudevents+json; charset=UTF-8"),)
BINARY = (
    ("ce_specversion", b"1.0"),
    ("ce_id", b"9"),
    ("ce_source", b"/web"),
    ("ce_type", b"com.streamxp.reward.v1"),
    ("content-type", b"application/json"),
)
ENVELOPE = {"specversion": "1.0", "id": "9", "source": "/web", "type": "com.streamxp.reward.v1"}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def encoded(fields: object) -> bytes:
    return json.dumps(fields).encode()


def reward_text(field: bytes) -> bytes:
    """Give a reward with one more field, written as it is."""
    return encoded(REWARD)[:-1] + b"," + field + b"}"


def raw(
    value: bytes | None, *, key: bytes | None = b"u", headers: Any = (), log_ms: int = LOG_MS
) -> RawRecord:
    return RawRecord(key, value, headers, log_ms)


def refusal(record: RawRecord, decode: Callable[..., object] = decode_reward) -> RecordRejected:
    with pytest.raises(RecordRejected) as caught:
        decode(record, LIMITS)
    return caught.value


def attempts(records: Sequence[RawRecord], decode: Callable[..., Any]) -> list[Any]:
    def attempt(record: RawRecord) -> Any:
        try:
            return decode(record, LIMITS)
        except RecordRejected as rejection:
            return rejection

    return [comparable(attempt(record)) for record in records]


def comparable(outcome: object) -> object:
    return (outcome.reason, outcome.detail) if isinstance(outcome, RecordRejected) else outcome


def test_a_plain_exposure() -> None:
    fields = {**EXPOSURE, "source": "web", "propensity": 0.5, "segments": {"d": "tv"}, "extra": [1]}
    assert decode_exposure(raw(encoded(fields))) == Exposure(
        id="1",
        time=LOG_MS,
        unit="u",
        experiment="e",
        arm="a",
        source="web",
        propensity=0.5,
        segments={"d": "tv"},
    )


def test_a_plain_reward() -> None:
    assert decode_reward(raw(encoded(REWARD))) == Reward(id="1", time=LOG_MS, unit="u", metric="click")


@pytest.mark.parametrize(
    ("time", "expected_ms"),
    [
        (0, 0),
        ("2026-11-02T09:30:00Z", LOG_MS),
        ("2026-11-02T09:30:00.250Z", LOG_MS + 250),
        ("2026-11-02T09:30:00.0009Z", LOG_MS),
        ("2026-11-02T10:30:00+01:00", LOG_MS),
        ("2026-11-02t09:30:00z", LOG_MS),
        ("1970-01-01T00:00:00Z", 0),
    ],
)
def test_times(time: object, expected_ms: int) -> None:
    assert epoch_ms(decode_reward(raw(encoded({**REWARD, "time": time}))).time) == expected_ms


def test_headers_of_others_do_no_harm() -> None:
    for headers in (
        (("traceparent", b"00-1"),),
        (("content-type", b"application/json"),),
        (("ce_id", None),),
    ):
        assert decode_reward(raw(encoded(REWARD), headers=headers)) == decode_reward(raw(encoded(REWARD)))


MALFORMED: dict[str, tuple[RawRecord, Reason]] = {
    "null": (raw(None), Reason.EMPTY_VALUE),
    "empty": (raw(b""), Reason.EMPTY_VALUE),
    "2 MB": (raw(b'{"a":"' + b"x" * 2_000_000 + b'"}'), Reason.TOO_LARGE),
    "one byte too long": (raw(reward_text(b'"x":"%s"' % (b"x" * 65_536))[:65_537]), Reason.TOO_LARGE),
    "too long before no key": (raw(b"x" * 65_537, key=None), Reason.TOO_LARGE),
    "null key": (raw(encoded(REWARD), key=None), Reason.MISSING_KEY),
    "empty key": (raw(encoded(REWARD), key=b""), Reason.MISSING_KEY),
    "no key before no JSON": (raw(b"{", key=b""), Reason.MISSING_KEY),
    "another key": (raw(encoded(REWARD), key=b"v"), Reason.KEY_MISMATCH),
    "key with a space": (raw(encoded(REWARD), key=b"u "), Reason.KEY_MISMATCH),
    "key in another encoding": (
        raw(encoded({**REWARD, "unit": "é"}), key="é".encode("latin-1")),
        Reason.KEY_MISMATCH,
    ),
    "broken JSON": (raw(b'{"id": '), Reason.INVALID_JSON),
    "no JSON": (raw(b"hello"), Reason.INVALID_JSON),
    "blank": (raw(b" "), Reason.INVALID_JSON),
    "two objects": (raw(encoded(REWARD) + encoded(REWARD)), Reason.INVALID_JSON),
    "two lines": (raw(encoded(REWARD) + b"\n" + encoded(REWARD)), Reason.INVALID_JSON),
    "byte order mark": (raw(b"\xef\xbb\xbf" + encoded(REWARD)), Reason.INVALID_JSON),
    "comment": (raw(encoded(REWARD) + b"//"), Reason.INVALID_JSON),
    "trailing comma": (raw(encoded(REWARD)[:-1] + b",}"), Reason.INVALID_JSON),
    "single quotes": (raw(b"{'id': '1'}"), Reason.INVALID_JSON),
    "raw newline in text": (raw(reward_text(b'"source":"a\nb"')), Reason.INVALID_JSON),
    "not UTF-8": (raw(reward_text(b'"source":"\xff"')), Reason.INVALID_JSON),
    "half a surrogate": (raw(reward_text(b'"source":"\\ud800"')), Reason.INVALID_JSON),
    "NaN": (raw(reward_text(b'"value":NaN')), Reason.INVALID_JSON),
    "Infinity": (raw(reward_text(b'"value":Infinity')), Reason.INVALID_JSON),
    "nested objects": (raw(b'{"a":' * 10_000), Reason.INVALID_JSON),
    "nested in an unknown field": (
        raw(reward_text(b'"x":' + b"[" * 10_000 + b"]" * 10_000)),
        Reason.INVALID_JSON,
    ),
    "nested lists": (raw(b"[" * 10_000), Reason.INVALID_FIELD),
    "a list": (raw(b"[]"), Reason.INVALID_FIELD),
    "a number": (raw(b"1"), Reason.INVALID_FIELD),
    "the word null": (raw(b"null"), Reason.INVALID_FIELD),
    "1e999": (raw(reward_text(b'"value":1e999')), Reason.INVALID_FIELD),
    "long integer": (raw(reward_text(b'"value":1' + b"0" * 400)), Reason.INVALID_FIELD),
    "boolean value": (raw(reward_text(b'"value":true')), Reason.INVALID_FIELD),
    "text value": (raw(reward_text(b'"value":"1"')), Reason.INVALID_FIELD),
    "null value": (raw(reward_text(b'"value":null')), Reason.INVALID_FIELD),
    "no unit": (raw(encoded(without(REWARD, "unit"))), Reason.INVALID_FIELD),
    "no id": (raw(encoded(without(REWARD, "id"))), Reason.INVALID_FIELD),
    "no time": (raw(encoded(without(REWARD, "time"))), Reason.INVALID_FIELD),
    "no metric": (raw(encoded(without(REWARD, "metric"))), Reason.INVALID_FIELD),
    "number for unit": (raw(encoded({**REWARD, "unit": 5}), key=b"5"), Reason.INVALID_FIELD),
    "empty unit": (raw(encoded({**REWARD, "unit": ""})), Reason.INVALID_FIELD),
    "long unit": (raw(encoded({**REWARD, "unit": "u" * 257}), key=b"u" * 257), Reason.INVALID_FIELD),
    "empty id": (raw(encoded({**REWARD, "id": ""})), Reason.INVALID_FIELD),
    "empty metric": (raw(encoded({**REWARD, "metric": ""})), Reason.INVALID_FIELD),
    "boolean time": (raw(encoded({**REWARD, "time": True})), Reason.INVALID_FIELD),
    "float time": (raw(encoded({**REWARD, "time": 1.5})), Reason.INVALID_FIELD),
    "negative time": (raw(encoded({**REWARD, "time": -1})), Reason.INVALID_FIELD),
    "time in microseconds": (raw(encoded({**REWARD, "time": LOG_MS * 1000})), Reason.INVALID_FIELD),
    "time without offset": (raw(encoded({**REWARD, "time": "2026-11-02T09:30:00"})), Reason.INVALID_FIELD),
    "time in words": (raw(encoded({**REWARD, "time": "yesterday"})), Reason.INVALID_FIELD),
    "time as text": (raw(encoded({**REWARD, "time": str(LOG_MS)})), Reason.INVALID_FIELD),
    "fields before the key": (raw(encoded(without(REWARD, "id")), key=b"v"), Reason.INVALID_FIELD),
    "year 3000": (raw(encoded({**REWARD, "time": "3000-01-01T00:00:00Z"})), Reason.TIME_OUT_OF_RANGE),
    "year 3000 in ms": (raw(encoded({**REWARD, "time": YEAR_3000_MS})), Reason.TIME_OUT_OF_RANGE),
    "before 1970": (raw(encoded({**REWARD, "time": "1969-12-31T23:59:59.999Z"})), Reason.TIME_OUT_OF_RANGE),
    "year 1": (raw(encoded({**REWARD, "time": "0001-01-01T00:00:00+14:00"})), Reason.TIME_OUT_OF_RANGE),
    "key before time": (raw(encoded({**REWARD, "time": YEAR_3000_MS}), key=b"v"), Reason.KEY_MISMATCH),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_records_have_one_reason(case: str) -> None:
    record, reason = MALFORMED[case]
    assert refusal(record).reason is reason
    (batched,) = decode_rewards([record])
    assert comparable(batched) == comparable(refusal(record))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arm", None),
        ("arm", ""),
        ("experiment", ""),
        ("experiment", "e" * 101),
        ("weight_epoch", -1),
        ("weight_epoch", 1.5),
        ("weight_epoch", True),
        ("propensity", 0),
        ("propensity", 1.01),
        ("propensity", True),
        ("segments", {"": "x"}),
        ("segments", {"d": 1}),
        ("segments", {"d": "x" * 101}),
        ("segments", []),
        ("covariate", "1"),
    ],
)
def test_fields_of_an_exposure(field: str, value: object) -> None:
    record = raw(encoded({**EXPOSURE, field: value}))
    assert refusal(record, decode_exposure).reason is Reason.INVALID_FIELD


def test_the_limit_of_the_future_is_inclusive() -> None:
    at = raw(encoded({**REWARD, "time": LOG_MS + LIMITS.future_ms}))
    over = raw(encoded({**REWARD, "time": LOG_MS + LIMITS.future_ms + 1}))
    assert decode_rewards([at]) == [decode_reward(at)]
    assert refusal(over).reason is Reason.TIME_OUT_OF_RANGE
    assert [comparable(outcome) for outcome in decode_rewards([at, over])] == attempts(
        [at, over], decode_reward
    )


def test_limits_are_what_is_given() -> None:
    record = raw(encoded(REWARD), log_ms=LOG_MS - 10)
    with pytest.raises(RecordRejected, match="10 ms ahead of the broker, the limit is 9 ms"):
        decode_reward(record, Limits(future_ms=9))
    with pytest.raises(RecordRejected, match=r"too_large: value has \d+ bytes, the limit is 20"):
        decode_reward(record, Limits(record_bytes=20))
    (batched,) = decode_rewards([record], Limits(future_ms=9))
    assert isinstance(batched, RecordRejected)


def test_a_refusal_names_no_unit() -> None:
    unit = "secret-unit"
    for fields in ({**REWARD, "unit": unit, "time": YEAR_3000_MS}, {**REWARD, "unit": unit, "value": "x"}):
        assert unit not in str(refusal(raw(encoded(fields), key=unit.encode())))
    assert unit not in str(refusal(raw(encoded({**REWARD, "unit": unit}))))


def test_the_last_of_equal_names_wins() -> None:
    assert decode_reward(raw(reward_text(b'"value":1,"value":2'))).value == 2.0


def test_headers_are_bounded_before_they_are_looked_at() -> None:
    cases: list[tuple[codec.Headers, str]] = [
        ([("x", b"y")] * 101, "101 headers, the limit is 100"),
        ([("x", b"y" * 16_384)], "headers have 16385 bytes, the limit is 16384"),
        ([("x" * 16_385, None)], "headers have 16385 bytes"),
    ]
    for headers, detail in cases:
        record = raw(encoded(REWARD), headers=headers)
        assert refusal(record).reason is Reason.TOO_LARGE
        assert detail in refusal(record).detail
        (batched,) = decode_rewards([record])
        assert comparable(batched) == comparable(refusal(record))
    for allowed in ([("x", b"y")] * 100, [("x", b"y" * 16_383)]):
        assert decode_reward(raw(encoded(REWARD), headers=allowed)).metric == "click"


HOSTILE = {
    "empty": b"",
    "no JSON": b"hello",
    "not UTF-8": b'{"experiment":"\xff"}',
    "half a surrogate": b'{"experiment":"\\ud800"}',
    "deep": b'{"x":' * 50_000,
    "deep list": b"[" * 50_000,
    "long number": b'{"look":' + b"9" * 5_000 + b"}",
    "1e999": b'{"evaluated_ms":1e999}',
    "another kind": b'{"schema":2}',
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("kind", [Signal, Result, ConfigRecord, PartitionStatistics, DeadLetter])
def test_a_record_of_our_own_is_refused_with_a_reason(kind: type, case: str) -> None:
    with pytest.raises(ConfigError, match=f"no {kind.__name__}: "):
        decode_own(HOSTILE[case], kind)
    with pytest.raises(ConfigError, match="experiment record of e: "):
        decode_experiment("e", HOSTILE[case])


# CloudEvents


def test_a_structured_event() -> None:
    event = {
        **ENVELOPE,
        "time": "2026-11-02T09:30:00Z",
        "subject": "x",
        "data": without(REWARD, "id", "time"),
    }
    decoded = decode_reward(raw(encoded(event), headers=STRUCTURED))
    assert (decoded.id, decoded.source, decoded.unit, decoded.metric) == ("9", "/web", "u", "click")
    assert epoch_ms(decoded.time) == LOG_MS


def test_a_binary_event() -> None:
    headers = (*BINARY, ("ce_time", b"2026-11-02T09:30:00Z"), ("ce_subject", b"x"))
    event = decode_reward(raw(encoded(without(REWARD, "id", "time")), headers=headers))
    assert (event.id, event.source, epoch_ms(event.time)) == ("9", "/web", LOG_MS)


def test_the_envelope_has_the_identity_and_the_data_the_time() -> None:
    data = {**REWARD, "source": "inner", "time": LOG_MS + 7}
    structured = raw(encoded({**ENVELOPE, "time": "2026-11-02T09:30:00Z", "data": data}), headers=STRUCTURED)
    binary = raw(encoded(data), headers=(*BINARY, ("ce_time", b"2026-11-02T09:30:00Z")))
    for record in (structured, binary):
        event = decode_reward(record)
        assert (event.id, event.source, event.time) == ("9", "/web", LOG_MS + 7)


def test_header_names_have_no_case() -> None:
    headers = tuple((name.upper(), value) for name, value in BINARY)
    assert decode_reward(raw(encoded(REWARD), headers=headers)).id == "9"
    upper = (("Content-Type", b"Application/CloudEvents+JSON"),)
    assert decode_reward(raw(encoded({**ENVELOPE, "data": REWARD}), headers=upper)).id == "9"


@pytest.mark.parametrize("attribute", ["specversion", "id", "source", "type"])
def test_an_envelope_without_an_attribute(attribute: str) -> None:
    for envelope in (without(ENVELOPE, attribute), {**ENVELOPE, attribute: ""}, {**ENVELOPE, attribute: 1}):
        record = raw(encoded({**envelope, "data": REWARD}), headers=STRUCTURED)
        assert refusal(record).reason is Reason.INVALID_ENVELOPE
    headers = tuple((name, value) for name, value in BINARY if name != f"ce_{attribute}")
    assert refusal(raw(encoded(REWARD), headers=headers)).reason is Reason.INVALID_ENVELOPE


def structured(**fields: object) -> RawRecord:
    return raw(encoded({**ENVELOPE, **fields}), headers=STRUCTURED)


BAD_ENVELOPES = {
    "no data": (structured(), Reason.INVALID_ENVELOPE),
    "data is text": (structured(data="x"), Reason.INVALID_ENVELOPE),
    "data is null": (structured(data=None), Reason.INVALID_ENVELOPE),
    "data in base64": (structured(data_base64="e30="), Reason.INVALID_ENVELOPE),
    "version 2": (structured(specversion="2.0", data=REWARD), Reason.INVALID_ENVELOPE),
    "binary version 2": (
        raw(encoded(REWARD), headers=(("ce_specversion", b"2"), *BINARY[1:])),
        Reason.INVALID_ENVELOPE,
    ),
    "header not UTF-8": (raw(encoded(REWARD), headers=(*BINARY, ("ce_x", b"\xff"))), Reason.INVALID_ENVELOPE),
    "broken JSON": (raw(b"{", headers=STRUCTURED), Reason.INVALID_JSON),
    "NaN": (raw(b'{"data":NaN}', headers=STRUCTURED), Reason.INVALID_JSON),
    "nested": (raw(b'{"data":' * 8_000, headers=STRUCTURED), Reason.INVALID_JSON),
    "a batch": (
        raw(b"[]", headers=(("content-type", b"application/cloudevents-batch+json"),)),
        Reason.INVALID_FIELD,
    ),
    "binary nested": (raw(b'{"a":' * 8_000, headers=BINARY), Reason.INVALID_JSON),
    "no time": (structured(data=without(REWARD, "time")), Reason.INVALID_FIELD),
    "time of the envelope": (structured(time="x", data=without(REWARD, "time")), Reason.INVALID_FIELD),
    "boolean value": (structured(data={**REWARD, "value": True}), Reason.INVALID_FIELD),
    "text value": (structured(data={**REWARD, "value": "1"}), Reason.INVALID_FIELD),
    "long integer": (structured(data={**REWARD, "value": 10**400}), Reason.INVALID_FIELD),
    "long source": (structured(source="s" * 201, data=REWARD), Reason.INVALID_FIELD),
    "another key": (structured(data={**REWARD, "unit": "v"}), Reason.KEY_MISMATCH),
    "year 3000": (structured(data={**REWARD, "time": YEAR_3000_MS}), Reason.TIME_OUT_OF_RANGE),
}


@pytest.mark.parametrize("case", BAD_ENVELOPES)
def test_bad_envelopes(case: str) -> None:
    record, reason = BAD_ENVELOPES[case]
    assert refusal(record).reason is reason


# Batches

WHOLE = encoded(REWARD)
SMUGGLED = {
    "a whole one and half of another": [WHOLE + b'{"id":"2",', WHOLE[1:]],
    "the same with a space": [WHOLE + b' {"id":"2",', WHOLE[1:]],
    "two and a blank": [WHOLE + WHOLE, b" "],
    "two and an empty line": [WHOLE + b"\n" + WHOLE, b""],
    "cut at the end": [WHOLE[:-1], b"}" + WHOLE],
    "cut in the middle": [b'{"id":"1",', WHOLE[1:] + WHOLE],
    "a newline inside, and one too few": [b"{\n" + WHOLE[1:], WHOLE],
    "a newline as white space": [WHOLE + b"\n", WHOLE],
    "cut inside text": [WHOLE + b'{"id":"a}', b'{b"' + WHOLE[8:]],
    "cut inside nested objects": [WHOLE + b'{"x":{}', b"{}" + WHOLE],
    "a list of two": [b"[" + WHOLE + b"," + WHOLE + b"]", WHOLE],
    "lists across records": [b"[" + WHOLE, WHOLE + b"]"],
    "null between": [WHOLE, b"null", WHOLE],
}


@pytest.mark.parametrize("case", SMUGGLED)
def test_pieces_of_two_records_do_not_pass_for_whole_ones(case: str) -> None:
    records = [raw(value) for value in SMUGGLED[case]]
    assert [comparable(outcome) for outcome in decode_rewards(records)] == attempts(records, decode_reward)


def test_a_clean_batch_is_decoded_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_attempt", None)
    records = [raw(encoded({**REWARD, "id": str(n)})) for n in range(100)]
    assert [event.id for event in decode_rewards(records) if isinstance(event, Reward)] == list(
        map(str, range(100))
    )
    assert decode_exposures([raw(encoded(EXPOSURE))]) == [decode_exposure(raw(encoded(EXPOSURE)))]
    assert decode_rewards([]) == []


def test_one_bad_record_does_not_hide_the_others() -> None:
    records = [raw(WHOLE), raw(b"{"), raw(WHOLE, key=b"v"), raw(None), raw(b"x" * 70_000), raw(WHOLE)]
    outcomes = decode_rewards(records)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [
        None,
        Reason.INVALID_JSON,
        Reason.KEY_MISMATCH,
        Reason.EMPTY_VALUE,
        Reason.TOO_LARGE,
        None,
    ]


def test_an_envelope_among_plain_records() -> None:
    records = [raw(WHOLE), structured(data=REWARD), raw(WHOLE, headers=BINARY), raw(WHOLE)]
    assert [getattr(event, "id", None) for event in decode_rewards(records)] == ["1", "9", "9", "1"]


PIECES = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\n",
        b" ",
        b"null",
        b'{"x":{}',
        b'"id":"2"',
        WHOLE,
        WHOLE[1:],
        WHOLE[:-1],
    ]
)
VALUES = st.one_of(
    st.none(),
    st.just(WHOLE),
    st.binary(max_size=20),
    st.lists(PIECES, max_size=5).map(b"".join),
    st.sampled_from([record.value for record, _ in MALFORMED.values() if len(record.value or b"") < 5_000]),
)
RECORDS = st.builds(
    raw,
    VALUES,
    key=st.sampled_from([b"u", b"u", b"u", b"v", b"", None]),
    headers=st.sampled_from([(), (), (), BINARY, STRUCTURED]),
    log_ms=st.sampled_from([LOG_MS, 0, YEAR_3000_MS]),
)


@given(st.lists(RECORDS, max_size=6))
@example([raw(WHOLE), raw(WHOLE)])
def test_a_batch_is_as_one_by_one(records: list[RawRecord]) -> None:
    assert [comparable(outcome) for outcome in decode_rewards(records)] == attempts(records, decode_reward)
    assert [comparable(outcome) for outcome in decode_exposures(records)] == attempts(
        records, decode_exposure
    )


@given(st.lists(st.lists(PIECES, min_size=1, max_size=6).map(b"".join), min_size=2, max_size=4))
def test_a_batch_of_pieces_is_as_one_by_one(values: list[bytes]) -> None:
    records = [raw(value) for value in values]
    assert [comparable(outcome) for outcome in decode_rewards(records)] == attempts(records, decode_reward)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (b'{"status":"unit-7"}', "Invalid enum value - at `$.status`"),
        (b'{"status":"a - at `$.b`"}', "Invalid enum value - at `$.status`"),
        (b'{"spec":{"arms":"unit-7"}}', "Expected `array`, got `str` - at `$.spec.arms`"),
        (b'"unit-7"', "Expected `object`, got `str`"),
    ],
)
def test_what_is_said_of_an_unreadable_record_does_not_quote_it(value: bytes, rule: str) -> None:
    with pytest.raises(ConfigError) as refused:
        decode_experiment("e", value)
    assert str(refused.value) == f"experiment record of e: {rule}"
    with pytest.raises(ConfigError) as refused:
        decode_own(value, ExperimentRecord)
    assert str(refused.value) == f"no ExperimentRecord: {rule}"
