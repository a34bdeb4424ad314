"""What the demo found, beside what is true."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from stream_xp.domain.decision import Decision, MetricResult, Result
from stream_xp.domain.experiment import Role
from stream_xp.domain.statistics import Outcomes
from stream_xp.services.demo.world import is_right

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.services.demo.board import Board, Delays
    from stream_xp.services.demo.world import World
    from stream_xp.simulator import Truth


class ExperimentReport(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment of the demo. Times count from the start of the traffic.

    Attributes:
        expected: the right decision, in words.
        signals: how many stop or ship signals there were.
        evidence: the metric that decided, or the first primary metric at the end, with its tests.
        onset_ms: when the effect began; None if there is none.
        decided_ms: when the signal was seen; None without one.
        detection_delay_ms: from the onset to the signal.
        units: exposed units per arm that the decision stands on, or all of them without one.
        look: running number of the evaluation that decided, or of the last one.

    """

    experiment: str
    expected: str
    decision: Decision
    right: bool
    signals: int
    evidence: MetricResult
    onset_ms: int | None
    decided_ms: int | None
    detection_delay_ms: int | None
    units: dict[str, int]
    look: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """From the sending of an event to the first result of its experiment that covers it, as a reader saw it.

    Attributes:
        samples: events measured; without any there are no times.
        open: sampled events that no result covered.

    """

    samples: int
    open: int
    p50_ms: float | None = None
    p99_ms: float | None = None
    longest_ms: float | None = None


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole demo.

    Attributes:
        right: every decision is right, every record is accounted for, and all counts equal the truth.
        events: records sent and acknowledged.
        events_per_s: the pace at which they were sent; the service could do more.
        engine_s: how long the worker ran.
        exposures, rewards: outcomes of the records.
        conserved: each record has exactly one outcome, and every record was read.
        dead_letters: "topic reason" to count.
        differences: each count of the service that is not that of the simulator, in words.

    """

    right: bool
    seed: int
    duration_ms: int
    engine_s: float
    events: int
    events_per_s: float
    latency: Latency
    experiments: tuple[ExperimentReport, ...]
    exposures: Outcomes
    rewards: Outcomes
    conserved: bool
    dead_letters: dict[str, int]
    differences: tuple[str, ...]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What the run measured beside the records; `start_s` is the start of the traffic, monotonic."""

    start_s: float
    start_ms: int
    engine_s: float
    sent: dict[str, int]
    dead_letters: dict[str, int]


def build_report(world: World, board: Board, delays: Delays, measured: Measured) -> DemoReport:
    """Compare what was heard with what is true; every experiment must have a result."""
    experiments = tuple(
        _experiment_report(world, board, experiment, measured.start_s) for experiment in world.expected
    )
    last = board.results[experiments[0].experiment]
    truth = world.traffic.truth(measured.start_ms)
    conserved = _conserved(board, measured)
    differences = tuple(_differences(truth, board, measured))
    duration_s = world.traffic.last_send_ms / 1000
    events = sum(measured.sent.values())
    return DemoReport(
        right=all(report.right for report in experiments) and conserved and not differences,
        seed=world.traffic.seed,
        duration_ms=world.traffic.scenario.duration_ms,
        engine_s=measured.engine_s,
        events=events,
        events_per_s=events / duration_s,
        latency=_latency(delays),
        experiments=experiments,
        exposures=last.exposure_outcomes,
        rewards=last.reward_outcomes,
        conserved=conserved,
        dead_letters=measured.dead_letters,
        differences=differences,
    )


def _experiment_report(world: World, board: Board, experiment: str, start_s: float) -> ExperimentReport:
    expected, heard = world.expected[experiment], board.heard(experiment)
    result = board.results[experiment] if heard is None else heard.signal.data.result
    decision = None if heard is None else heard.signal.data.decision
    decided_ms = None if heard is None else round(1000 * (heard.seen_s - start_s))
    signals = len(board.signals.get(experiment, ()))
    onset_ms = expected.onset_ms
    return ExperimentReport(
        experiment=experiment,
        expected=" ".join(filter(None, (expected.action.value, expected.arm))),
        decision=result.decision,
        right=is_right(expected, decision, decided_ms) and signals <= 1,
        signals=signals,
        evidence=evidence_of(result),
        onset_ms=onset_ms,
        decided_ms=decided_ms,
        detection_delay_ms=None if decided_ms is None or onset_ms is None else decided_ms - onset_ms,
        units={arm.arm: arm.units for arm in result.arms},
        look=result.look,
    )


def evidence_of(result: Result) -> MetricResult:
    """Return the metric and arm that decided; without a decision the first primary metric, or the first."""
    decision = result.decision
    for metric in result.metrics:
        if (metric.metric, metric.arm) == (decision.metric, decision.arm):
            return metric
    return next((m for m in result.metrics if m.role == Role.PRIMARY), result.metrics[0])


def _latency(delays: Delays) -> Latency:
    samples, open_ = len(delays.covered_s), delays.open
    if not samples:
        return Latency(samples=0, open=open_)
    p50, p99, longest = (1000 * np.quantile(delays.covered_s, [0.5, 0.99, 1.0])).tolist()
    return Latency(samples=samples, open=open_, p50_ms=p50, p99_ms=p99, longest_ms=longest)


def _conserved(board: Board, measured: Measured) -> bool:
    return all(
        outcomes.conserved() and outcomes.read == sent
        for result in board.results.values()
        for outcomes, sent in zip(
            (result.exposure_outcomes, result.reward_outcomes), measured.sent.values(), strict=True
        )
    )


def _differences(truth: Truth, board: Board, measured: Measured) -> Iterator[str]:
    for experiment, statistics in truth.statistics.items():
        result = board.results[experiment]
        yield from _outcome_differences(
            f"{experiment}: exposures", result.exposure_outcomes, truth.exposure_outcomes
        )
        yield from _outcome_differences(
            f"{experiment}: rewards", result.reward_outcomes, truth.reward_outcomes
        )
        if result.statistics_hash != statistics.digest():
            yield f"{experiment}: the statistics are not those of the simulator"
    simulated = {f"{topic} {reason}": count for (topic, reason), count in truth.dead_letters.items()}
    for name in sorted(simulated.keys() | measured.dead_letters.keys()):
        found, true = measured.dead_letters.get(name, 0), simulated.get(name, 0)
        if found != true:
            yield f"dead letters, {name}: {found:,} instead of {true:,}"


def _outcome_differences(where: str, found: Outcomes, true: Outcomes) -> Iterator[str]:
    for name in Outcomes.__struct_fields__:
        if getattr(found, name) != getattr(true, name):
            yield f"{where} {name}: {getattr(found, name):,} instead of {getattr(true, name):,}"
