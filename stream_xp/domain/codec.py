"""From the bytes of a Kafka record to an exposure or a reward, or to the reason why not.

A record carries JSON, plain or in a CloudEvents envelope: binary (attributes in ``ce_`` headers) or
structured (``content-type: application/cloudevents+json``, the event as the value). The checks run in a fixed
order, so that a record always gets the same reason: size (of the value, then of the headers), emptiness, key,
envelope, JSON, fields, key equals unit, time. Of two JSON fields or headers of one name the last one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import msgspec

from stream_xp.domain.events import Exposure, Reward, epoch_ms
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.experiment_rules import record_rules
from stream_xp.errors import ConfigError, Reason, RecordRejected

Headers: TypeAlias = Sequence[tuple[str, bytes | None]]
Event = TypeVar("Event", Exposure, Reward)

_STRUCTURED = b"application/cloudevents"
_ENVELOPE_FIELDS = ("id", "source", "time")


class Limits(NamedTuple):
    """Bounds that hold before and after decoding.

    Attributes:
        record_bytes: longest value that is decoded.
        future_ms: how far event time may be ahead of the broker's append time.
        headers: most headers of a record that are looked at.
        header_bytes: longest names and values of all headers together.
    """

    record_bytes: int = 65_536
    future_ms: int = 300_000
    headers: int = 100
    header_bytes: int = 16_384


class RawRecord(NamedTuple):
    """One Kafka record: key and value as bytes, append time in epoch milliseconds."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    log_time_ms: int


_EXPOSURES = msgspec.json.Decoder(Exposure)
_REWARDS = msgspec.json.Decoder(Reward)
_EXPERIMENTS = msgspec.json.Decoder(ExperimentRecord)
_OBJECT = msgspec.json.Decoder(dict[str, Any])
_QUOTING = ("Invalid enum value", "Invalid value", "Object contains unknown field")
"""How errors of decoding begin that go on with what stood in the record."""


def decode_exposure(record: RawRecord, limits: Limits = Limits()) -> Exposure:  # noqa: B008 (immutable)
    """The exposure in `record`; raises RecordRejected with the first rule it breaks."""
    return _decode(record, limits, _EXPOSURES, Exposure)


def decode_reward(record: RawRecord, limits: Limits = Limits()) -> Reward:  # noqa: B008 (immutable)
    """The reward in `record`; raises RecordRejected with the first rule it breaks."""
    return _decode(record, limits, _REWARDS, Reward)


class RawColumns(NamedTuple):
    """Kafka records, a column for each field of `RawRecord`; all of one length."""

    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Sequence[Headers]
    log_times_ms: Sequence[int]

    def record(self, row: int) -> RawRecord:
        """One row."""
        return RawRecord(self.keys[row], self.values[row], self.headers[row], self.log_times_ms[row])


Record = TypeVar("Record")


def decode_own(value: bytes, kind: type[Record]) -> Record:
    """A record of one of the service's own topics, which anybody with a right to write there may have written.

    Raises:
        ConfigError: it is none; who reads it decides what follows. The text holds no byte of the record.
    """
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"no {kind.__name__}: {_rule(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"no {kind.__name__}: JSON is nested too deep") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"no {kind.__name__}: value is not UTF-8, or a number too long to read") from error


def _rule(error: Exception) -> str:
    """What an error of decoding says, without the value that it quotes: that can be anything, a unit too."""
    said, at, place = str(error).rpartition(" - at `")
    said = said or place
    quoting = next((start for start in _QUOTING if said.startswith(start)), said)
    return f"{quoting}{at}{place}" if at else quoting


def decode_experiment(experiment: str, value: bytes) -> ExperimentRecord:
    """The experiment record under a key of ``xp.experiments``.

    Raises:
        ConfigError: it cannot be decoded, or breaks a rule; the last good record stays in force.
    """
    try:
        record = _EXPERIMENTS.decode(value)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"experiment record of {experiment}: {_rule(error)}") from error
    broken = record_rules(record, experiment)
    if broken:
        raise ConfigError(f"experiment record of {experiment}: {'; '.join(broken)}")
    return record


def decode_exposures(
    raw: RawColumns,
    limits: Limits = Limits(),  # noqa: B008 (immutable)
) -> list[Exposure | RecordRejected]:
    """`decode_exposure` of each record, with a refusal in place of an exception."""
    return _decode_many(raw, limits, _EXPOSURES, decode_exposure)


def decode_rewards(
    raw: RawColumns,
    limits: Limits = Limits(),  # noqa: B008 (immutable)
) -> list[Reward | RecordRejected]:
    """`decode_reward` of each record, with a refusal in place of an exception."""
    return _decode_many(raw, limits, _REWARDS, decode_reward)


def _decode(
    record: RawRecord, limits: Limits, decoder: msgspec.json.Decoder[Event], event: type[Event]
) -> Event:
    value = _checked_value(record, limits)
    key = _checked_key(record)
    decoded = _guarded(lambda: _unwrap(value, record.headers, decoder, event))
    _check_key(key, decoded)
    _check_time(decoded, record.log_time_ms, limits)
    return decoded


def _decode_many(
    raw: RawColumns,
    limits: Limits,
    decoder: msgspec.json.Decoder[Event],
    decode_one: Callable[[RawRecord, Limits], Event],
) -> list[Event | RecordRejected]:
    events = _decode_clean(raw, limits, decoder)
    if events is None:
        return [_attempt(raw.record(row), limits, decode_one) for row in range(len(raw.values))]
    checked: list[Event | RecordRejected] = list(events)
    for row in _suspects(raw, events, limits):
        checked[row] = _attempt(raw.record(row), limits, decode_one)
    return checked


def _decode_clean(
    raw: RawColumns, limits: Limits, decoder: msgspec.json.Decoder[Event]
) -> list[Event] | None:
    """All values without a look at each, or None where any record needs the careful path."""
    if not all(raw.values) or any(raw.headers):
        return None
    values = cast("Sequence[bytes]", raw.values)
    if max(map(len, values), default=0) > limits.record_bytes:
        return None
    try:
        return list(map(decoder.decode, values))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def _suspects(raw: RawColumns, events: Sequence[Event], limits: Limits) -> list[int]:
    """The rows whose key or time breaks a rule; none, as a rule, found without a look at each key."""
    units = "\n".join([event.unit for event in events]).encode()
    keys = b"\n".join([key or b"" for key in raw.keys])
    # Equal joins with one newline between neighbours have equal parts.
    same = units == keys and keys.count(b"\n") == len(events) - 1
    ahead = limits.future_ms
    return [
        row
        for row, (event, log_time_ms) in enumerate(zip(events, raw.log_times_ms, strict=True))
        if not 0 <= epoch_ms(event.time) <= log_time_ms + ahead
        or not (same or raw.keys[row] == event.unit.encode())
    ]


def _attempt(
    record: RawRecord, limits: Limits, decode_one: Callable[[RawRecord, Limits], Event]
) -> Event | RecordRejected:
    try:
        return decode_one(record, limits)
    except RecordRejected as rejection:
        return rejection


def _checked_value(record: RawRecord, limits: Limits) -> bytes:
    if record.value is not None and len(record.value) > limits.record_bytes:
        detail = f"value has {len(record.value)} bytes, the limit is {limits.record_bytes}"
        raise RecordRejected(Reason.TOO_LARGE, detail)
    _check_headers(record.headers, limits)
    if not record.value:
        raise RecordRejected(Reason.EMPTY_VALUE, "value is empty or null")
    return record.value


def _check_headers(headers: Headers, limits: Limits) -> None:
    if not headers:
        return
    if len(headers) > limits.headers:
        raise RecordRejected(Reason.TOO_LARGE, f"{len(headers)} headers, the limit is {limits.headers}")
    size = sum(len(name) + len(content or b"") for name, content in headers)
    if size > limits.header_bytes:
        raise RecordRejected(
            Reason.TOO_LARGE, f"headers have {size} bytes, the limit is {limits.header_bytes}"
        )


def _checked_key(record: RawRecord) -> bytes:
    if not record.key:
        raise RecordRejected(Reason.MISSING_KEY, "the Kafka key must be the unit, it is empty or null")
    return record.key


def _guarded(decode: Callable[[], Event]) -> Event:
    try:
        return decode()
    except msgspec.ValidationError as error:
        raise RecordRejected(Reason.INVALID_FIELD, str(error)) from error
    except msgspec.DecodeError as error:
        raise RecordRejected(Reason.INVALID_JSON, str(error)) from error
    except RecursionError as error:
        raise RecordRejected(Reason.INVALID_JSON, "JSON is nested too deep") from error
    except UnicodeDecodeError as error:
        raise RecordRejected(Reason.INVALID_JSON, "value is not UTF-8") from error


def _unwrap(
    value: bytes, headers: Headers, decoder: msgspec.json.Decoder[Event], event: type[Event]
) -> Event:
    named = {name.lower(): content for name, content in headers if content is not None}
    if named.get("content-type", b"").lower().startswith(_STRUCTURED):
        return _from_structured(value, event)
    if "ce_specversion" in named or "ce_id" in named:
        return _from_binary(value, named, event)
    return decoder.decode(value)


def _from_structured(value: bytes, event: type[Event]) -> Event:
    envelope = _OBJECT.decode(value)
    data = envelope.get("data")
    if not isinstance(data, dict):
        raise RecordRejected(Reason.INVALID_ENVELOPE, "a structured CloudEvent needs `data`, a JSON object")
    return _with_envelope(data, envelope, event)


def _from_binary(value: bytes, named: dict[str, bytes], event: type[Event]) -> Event:
    try:
        envelope = {name[3:]: content.decode() for name, content in named.items() if name.startswith("ce_")}
    except UnicodeDecodeError as error:
        raise RecordRejected(Reason.INVALID_ENVELOPE, "a CloudEvents header is not UTF-8") from error
    return _with_envelope(_OBJECT.decode(value), envelope, event)


def _with_envelope(data: dict[str, Any], envelope: dict[str, Any], event: type[Event]) -> Event:
    for attribute in ("specversion", "id", "source", "type"):
        if not isinstance(envelope.get(attribute), str) or not envelope[attribute]:
            raise RecordRejected(
                Reason.INVALID_ENVELOPE, f"CloudEvents attribute `{attribute}` is missing or empty"
            )
    if envelope["specversion"] != "1.0":
        raise RecordRejected(Reason.INVALID_ENVELOPE, "CloudEvents `specversion` must be 1.0")
    attributes = {name: envelope[name] for name in _ENVELOPE_FIELDS if name in envelope}
    # The envelope's id and source are the identity; the time in the data, if any, is the finer one.
    return msgspec.convert({**attributes, **data, "id": envelope["id"], "source": envelope["source"]}, event)


def _check_key(key: bytes, event: Exposure | Reward) -> None:
    if key != event.unit.encode():
        raise RecordRejected(
            Reason.KEY_MISMATCH, "the Kafka key must equal `unit`, or the two topics cannot be joined"
        )


def _check_time(event: Exposure | Reward, log_time_ms: int, limits: Limits) -> None:
    time_ms = epoch_ms(event.time)
    if time_ms < 0:
        raise RecordRejected(Reason.TIME_OUT_OF_RANGE, "`time` is before 1970")
    ahead_ms = time_ms - log_time_ms
    if ahead_ms > limits.future_ms:
        detail = f"`time` is {ahead_ms} ms ahead of the broker, the limit is {limits.future_ms} ms"
        raise RecordRejected(Reason.TIME_OUT_OF_RANGE, detail)
