"""The ramp: whether its next stage is due, or why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stream_xp.domain.decision import MetricState
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.statistics import ALL, ExperimentStatistics
from stream_xp.engine.conclusion import guardrails, invalid
from stream_xp.engine.evaluate import Evaluation


class Step(NamedTuple):
    """Where a ramp stands.

    Attributes:
        stage: its stage, from 0; None where the coverage in force is that of no stage.
        next_stage: the stage that is due; None while one of `waits` holds it, and at the last.
        over: whether the last stage has had all that a stage needs before it is left.
        waits: one sentence for each condition that is not met.
    """

    stage: int | None
    next_stage: int | None = None
    over: bool = False
    waits: tuple[str, ...] = ()


def stage_of(spec: ExperimentSpec, epoch: WeightEpoch) -> int | None:
    """The stage whose coverage a weight epoch has: coverage grows from stage to stage, so there is one at most."""
    stages = () if spec.ramp is None else spec.ramp.stages
    return next((at for at, stage in enumerate(stages) if stage.coverage == epoch.coverage), None)


def epochs_of_stage(epochs: Sequence[WeightEpoch]) -> Sequence[WeightEpoch]:
    """The newest epochs that have one coverage: the present visit to a stage, whatever its weights did."""
    start = len(epochs) - 1
    while start > 0 and epochs[start - 1].coverage == epochs[-1].coverage and not epochs[start - 1].final:
        start -= 1
    return epochs[start:]


def ramp_step(
    record: ExperimentRecord,
    evaluation: Evaluation,
    statistics: ExperimentStatistics,
    *,
    watermark_ms: int | None,
    paused: bool,
) -> Step:
    """Whether the next stage of the ramp is due; of an experiment that is not concluded.

    A stage is left when its units and its time are over, the data are valid, every guardrail of every treatment arm
    is proven non-inferior now, and nobody holds it. The proof is about all weight epochs: stages differ in who
    takes part, and a guardrail that was safe at 5 % is watched with the units of 25 %.

    Args:
        record: the experiment with all its weight epochs.
        evaluation: its evidence.
        statistics: what the evidence is of.
        watermark_ms: the least of all source partitions; None before each has one.
        paused: whether a person holds it.
    """
    ramp = record.spec.ramp
    stage = stage_of(record.spec, record.epochs[-1])
    if ramp is None or stage is None:
        return Step(stage, over=ramp is None)
    visit = epochs_of_stage(record.epochs)
    of_visit = {epoch.epoch for epoch in visit}
    units = sum(row.units for row in statistics.units if row.segment == ALL and row.epoch in of_visit)
    least = ramp.stages[stage]
    passed_ms = -1 if watermark_ms is None else watermark_ms - visit[0].effective_ms
    conditions = (
        (paused, "the ramp is paused"),
        (bool(invalid(evaluation)), "the data are invalid"),
        (units < least.minimum_units, f"stage {stage} has {units} of {least.minimum_units} units"),
        (
            passed_ms < duration_ms(least.minimum_time),
            f"stage {stage} has not lasted {least.minimum_time} of watermark time",
        ),
        (_unproven(evaluation) != "", _unproven(evaluation)),
    )
    waits = tuple(words for holds, words in conditions if holds)
    last = stage == len(ramp.stages) - 1
    due = None if waits or last else stage + 1
    return Step(stage, next_stage=due, over=last and not waits, waits=waits)


def _unproven(evaluation: Evaluation) -> str:
    open_ = [r for r in guardrails(evaluation) if r.state is not MetricState.SAFE]
    listed = ", ".join(f"{r.metric} in {r.arm}" for r in open_)
    return f"not yet proven non-inferior: {listed}" if open_ else ""
