"""Looks of an experiment in bounded memory: all of its life, finer towards the end than a list of the last ones."""

from __future__ import annotations

from typing import Final

import msgspec

from stream_xp.domain.decision import Action, MetricState, Result

MAX_POINTS: Final = 256
MAX_VALUES: Final = 20_000
"""Metrics in all points of one experiment together; with many metrics there are fewer points."""


class HistoryMetric(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One metric in one arm at one look; bounds as in `Evidence`."""

    metric: str
    arm: str
    state: MetricState
    control_units: int
    arm_units: int
    estimate: float | None
    lower: float | None
    upper: float | None
    log_e: float | None


class HistoryPoint(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One look.

    Attributes:
        evaluated_ms: wall clock of the worker, epoch milliseconds.
        action: the decision in force at this look.
        weights, coverage: of the newest weight epoch then; None in results of workers that did not say so.
        units: arm to units exposed.
        invalid: why nothing could move.
    """

    version: int
    look: int
    evaluated_ms: int
    action: Action
    coverage: float | None
    weights: dict[str, float] | None
    units: dict[str, int]
    invalid: tuple[str, ...]
    sample_ratio_log_e: float | None
    metrics: tuple[HistoryMetric, ...]


def point_of(result: Result) -> HistoryPoint:
    """What is remembered of a result."""
    rollout = result.rollout
    return HistoryPoint(
        version=result.version,
        look=result.look,
        evaluated_ms=result.evaluated_ms,
        action=result.decision.action,
        coverage=None if rollout is None else rollout.coverage,
        weights=None if rollout is None else rollout.weights,
        units={one.arm: one.units for one in result.arms},
        invalid=result.invalid,
        sample_ratio_log_e=None if result.sample_ratio is None else result.sample_ratio.log_e,
        metrics=tuple(
            HistoryMetric(
                metric=one.metric,
                arm=one.arm,
                state=one.state,
                control_units=one.control_units,
                arm_units=one.arm_units,
                estimate=None if one.effect is None else one.effect.estimate,
                lower=None if one.effect is None else one.effect.lower,
                upper=None if one.effect is None else one.effect.upper,
                log_e=None if one.effect is None else one.effect.log_e,
            )
            for one in result.metrics
        ),
    )


class History:
    """The looks of one experiment, oldest first.

    When it is full every other point of the older three quarters goes, so that it reaches back to the first look
    that was read, and the newest ones are all there.
    """

    def __init__(self) -> None:
        self._points: list[HistoryPoint] = []

    def points(self) -> tuple[HistoryPoint, ...]:
        """The looks that are remembered."""
        return tuple(self._points)

    def add(self, point: HistoryPoint) -> None:
        """Remember a look; one that was read again takes the place of the first reading."""
        held = self._points
        if held and (held[-1].version, held[-1].look) == (point.version, point.look):
            held[-1] = point
            return
        held.append(point)
        most = max(8, min(MAX_POINTS, MAX_VALUES // max(1, len(point.metrics))))
        while len(held) > most:
            old = max(2, 3 * len(held) // 4)
            self._points = held = held[:old:2] + held[old:]
