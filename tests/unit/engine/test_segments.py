"""Effects in registered segments: which are shrunk, towards what, and that readers and `stats` agree."""

from __future__ import annotations

import pytest

from stream_xp.domain.decision import Evidence, SegmentResult
from stream_xp.engine.segments import shrunk_segments
from stream_xp.stats.shrinkage import shrink_groups


def one(segment: str, estimate: float | None, error: float | None, **fields: str) -> SegmentResult:
    effect = Evidence(estimate, None, None, 0.0, 1.0, 3.0)
    shared = {"metric": "click", "arm": "new", **fields}
    return SegmentResult(
        **shared, segment=segment, control_units=1, arm_units=1, effect=effect, standard_error=error
    )


def test_the_values_of_a_segment_are_drawn_towards_each_other() -> None:
    found = [one("os=ios", 0.3, 0.1), one("os=web", 0.0, 0.05), one("os=other", 0.1, 0.2)]
    groups = shrink_groups([0.3, 0.0, 0.1], [0.1, 0.05, 0.2])
    shrunk = shrunk_segments(found)
    assert [row.segment for row in shrunk] == ["os=ios", "os=web", "os=other"]
    for at, row in enumerate(shrunk):
        assert (row.effect, row.sd, row.weight) == pytest.approx(
            (groups.effect[at], groups.sd[at], groups.weight[at])
        )
        assert abs(row.effect - float(groups.mean)) < abs(row.raw - float(groups.mean))
    assert shrunk[0].effect < 0.3


def test_metrics_arms_and_segments_are_families_of_their_own() -> None:
    family = [one("os=ios", 0.3, 0.1), one("os=web", 0.0, 0.05)]
    others = [
        one("os=ios", 9.0, 0.1, arm="third"),
        one("os=web", -9.0, 0.1, arm="third"),
        one("os=ios", 5.0, 0.1, metric="spend"),
        one("plan=free", 7.0, 0.1),
        one("plan=paid", 8.0, 0.1),
        one("plan=other", 9.0, 0.1),
    ]
    alone = shrunk_segments(family)
    together = shrunk_segments([*others, *family])
    for mine, same in zip(together[-2:], alone, strict=True):
        assert (mine.segment, mine.effect, mine.sd) == (
            same.segment,
            pytest.approx(same.effect),
            pytest.approx(same.sd),
        )
    assert len(together) == len(others) - 1 + len(family)


@pytest.mark.parametrize(
    "spare", [one("os=web", None, 0.1), one("os=web", 0.1, None), one("os=web", 0.1, 1e-60)]
)
def test_one_value_alone_is_drawn_to_nothing(spare: SegmentResult) -> None:
    assert shrunk_segments([one("os=ios", 0.3, 0.1), spare]) == ()
    assert shrunk_segments([]) == ()
