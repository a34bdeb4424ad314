"""Effects inside registered segments, drawn towards what the values of their segment have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stream_xp.domain.decision import SegmentResult, ShrunkSegment
from stream_xp.stats.shrinkage import shrink_groups

_LEAST, _MOST = 1e-50, 1e50
"""Sizes of estimates and standard errors that can be shrunk."""


def shrunk_segments(found: Sequence[SegmentResult]) -> tuple[ShrunkSegment, ...]:
    """The shrunk effect in every value of a segment that has a standard error, in the order of `found`.

    The values of one segment, `other` among them, hold every unit once and are one family, for each metric and arm.
    Where fewer than two of them have a standard error nothing says what they should be drawn to, and none is shrunk.
    This takes milliseconds, so it is done where a result is read and not at every look.
    """
    families: dict[tuple[str, str, str], list[tuple[int, float, float]]] = {}
    for at, one in enumerate(found):
        error, estimate = one.standard_error, None if one.effect is None else one.effect.estimate
        if error is not None and estimate is not None and _LEAST <= error <= _MOST and abs(estimate) <= _MOST:
            name, _, _ = one.segment.partition("=")
            families.setdefault((one.metric, one.arm, name), []).append((at, estimate, error))
    shrunk = _shrunk(found, [family for family in families.values() if len(family) > 1])
    return tuple(shrunk[at] for at in sorted(shrunk))


def _shrunk(
    found: Sequence[SegmentResult], families: Sequence[Sequence[tuple[int, float, float]]]
) -> dict[int, ShrunkSegment]:
    """By place; all families at once, short ones filled up with values without data."""
    if not families:
        return {}
    size = max(map(len, families))
    estimates = [[*(y for _, y, _ in one), *[0.0] * (size - len(one))] for one in families]
    errors = [[*(se for _, _, se in one), *[math.inf] * (size - len(one))] for one in families]
    groups = shrink_groups(estimates, errors)
    return {
        at: ShrunkSegment(
            metric=found[at].metric,
            arm=found[at].arm,
            segment=found[at].segment,
            raw=estimate,
            standard_error=error,
            effect=float(groups.effect[row, place]),
            sd=float(groups.sd[row, place]),
            weight=float(groups.weight[row, place]),
        )
        for row, family in enumerate(families)
        for place, (at, estimate, error) in enumerate(family)
    }
