"""The exceptions of stream_xp; this module imports nothing of the project.

::

    StreamXpError
    ├── ConfigError       refuse to start: a setting, a spec or a topic is not what it must be
    ├── RecordRejected    one record is bad: dead-letter it with its reason and go on
    ├── StateError        the state of a partition cannot be trusted: drop it, restart from the log
    └── DependencyError   a broker or another service failed: retry with a deadline, then crash
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a record was dead-lettered; a closed set, used as a metric label."""

    TOO_LARGE = "too_large"
    EMPTY_VALUE = "empty_value"
    MISSING_KEY = "missing_key"
    KEY_MISMATCH = "key_mismatch"
    INVALID_ENVELOPE = "invalid_envelope"
    INVALID_JSON = "invalid_json"
    INVALID_FIELD = "invalid_field"
    TIME_OUT_OF_RANGE = "time_out_of_range"
    UNKNOWN_ARM = "unknown_arm"
    UNKNOWN_WEIGHT_EPOCH = "unknown_weight_epoch"
    VALUE_OUT_OF_RANGE = "value_out_of_range"


class StreamXpError(Exception):
    """Root of everything that stream_xp raises on purpose."""


class ConfigError(StreamXpError):
    """A setting, an experiment spec or a topic is not what it must be; the program refuses to start."""


class RecordRejected(StreamXpError):
    """One record cannot be used.

    Attributes:
        reason: the class of fault, from a closed set.
        detail: one sentence that names the field and the rule; holds no unit id.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class StateError(StreamXpError):
    """The state of a partition cannot be trusted; it is dropped and built again from the log."""


class DependencyError(StreamXpError):
    """A broker or another service did not do what was asked within the deadline."""
