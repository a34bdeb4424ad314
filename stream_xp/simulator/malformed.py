"""The corpus of malformed records."""

from __future__ import annotations

from typing import Final, NamedTuple

from stream_xp.errors import Reason
from stream_xp.simulator.columns import EXPOSURES, REWARDS


class Malformed(NamedTuple):
    """A record that the engine must refuse.

    Attributes:
        reason: of its dead letter; None if it is no dead letter but counts as unknown_experiment.
        template: the value, with %-fields id, time, unit, experiment, arm and metric.
        key: the Kafka key, with the same fields; None for a null key.
    """

    name: str
    topic: str
    reason: Reason | None
    template: str
    key: str | None = "%(unit)s"


_WHO = '"id":"%(id)s","time":%(time)d,"unit":"%(unit)s"'
_SAW = f'{_WHO},"experiment":"%(experiment)s","arm":"%(arm)s"'
_DID = f'{_WHO},"metric":"%(metric)s"'
_DEEP = '"deep":' + "[" * 10_000 + "]" * 10_000
_YEAR_3000 = '"id":"%(id)s","time":"3000-01-01T00:00:00Z","unit":"%(unit)s"'

MALFORMED: Final = (
    Malformed("broken JSON", EXPOSURES, Reason.INVALID_JSON, '{"id":"%(id)s","time":%(time)d,"unit":'),
    Malformed("broken JSON", REWARDS, Reason.INVALID_JSON, f"{{{_DID}"),
    Malformed(
        "wrong type", EXPOSURES, Reason.INVALID_FIELD, f'{{{_WHO},"experiment":"%(experiment)s","arm":7}}'
    ),
    Malformed("wrong type", REWARDS, Reason.INVALID_FIELD, f'{{{_DID},"value":"1"}}'),
    Malformed("NaN", EXPOSURES, Reason.INVALID_JSON, f'{{{_SAW},"covariate":NaN}}'),
    Malformed("NaN", REWARDS, Reason.INVALID_JSON, f'{{{_DID},"value":NaN}}'),
    Malformed("1e999", EXPOSURES, Reason.INVALID_FIELD, f'{{{_SAW},"covariate":1e999}}'),
    Malformed("1e999", REWARDS, Reason.INVALID_FIELD, f'{{{_DID},"value":1e999}}'),
    Malformed(
        "missing unit",
        EXPOSURES,
        Reason.INVALID_FIELD,
        '{"id":"%(id)s","time":%(time)d,"experiment":"%(experiment)s","arm":"%(arm)s"}',
    ),
    Malformed(
        "missing unit", REWARDS, Reason.INVALID_FIELD, '{"id":"%(id)s","time":%(time)d,"metric":"%(metric)s"}'
    ),
    Malformed(
        "unknown experiment", EXPOSURES, None, f'{{{_WHO},"experiment":"no-such-test","arm":"%(arm)s"}}'
    ),
    Malformed("unknown experiment", REWARDS, None, f'{{{_DID},"experiment":"no-such-test"}}'),
    Malformed(
        "unknown arm",
        EXPOSURES,
        Reason.UNKNOWN_ARM,
        f'{{{_WHO},"experiment":"%(experiment)s","arm":"no-such-arm"}}',
    ),
    Malformed("unknown epoch", EXPOSURES, Reason.UNKNOWN_WEIGHT_EPOCH, f'{{{_SAW},"weight_epoch":999999}}'),
    Malformed("nested 10,000 deep", EXPOSURES, Reason.INVALID_JSON, f"{{{_SAW},{_DEEP}}}"),
    Malformed("nested 10,000 deep", REWARDS, Reason.INVALID_JSON, f"{{{_DID},{_DEEP}}}"),
    Malformed(
        "year 3000",
        EXPOSURES,
        Reason.TIME_OUT_OF_RANGE,
        f'{{{_YEAR_3000},"experiment":"%(experiment)s","arm":"%(arm)s"}}',
    ),
    Malformed("year 3000", REWARDS, Reason.TIME_OUT_OF_RANGE, f'{{{_YEAR_3000},"metric":"%(metric)s"}}'),
    Malformed("empty key", EXPOSURES, Reason.MISSING_KEY, f"{{{_SAW}}}", key=""),
    Malformed("null key", REWARDS, Reason.MISSING_KEY, f"{{{_DID}}}", key=None),
    Malformed("key of another unit", EXPOSURES, Reason.KEY_MISMATCH, f"{{{_SAW}}}", key="other-%(unit)s"),
    Malformed("empty value", REWARDS, Reason.EMPTY_VALUE, ""),
)
"""The corpus; the faults of a scenario go through it again and again, in this order."""
