"""What the stages tell of themselves, and to whom: a port, with values of the domain only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from stream_xp.domain.decision import Action, Result
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.metric_defs import DecisionState
from stream_xp.domain.statistics import Outcomes
from stream_xp.domain.tracing import Delivery


class BlockReport(NamedTuple):
    """One block that was applied.

    Attributes:
        topic: without the prefix.
        lags_ms: broker append time minus event time of a sample of its records.
        dead_letters: records per reason.
        exposures: valid exposures per (experiment, arm).
    """

    topic: str
    lags_ms: Sequence[int]
    dead_letters: Mapping[str, int]
    exposures: Mapping[tuple[str, str], int]


class PartitionReport(NamedTuple):
    """One source partition after a flush.

    Attributes:
        applied: per topic, the last offset applied; before the first, the one before it.
        lags: per topic, records not applied yet; topics whose end is not known are left out.
        watermark_ms: None before there is one.
        covered_ms: when the newest snapshot was last known to hold all that was applied; None if never.
        units: (unit, experiment version) pairs held.
        outcomes: per topic, of every record since its log began.
    """

    partition: int
    applied: Mapping[str, int]
    lags: Mapping[str, int]
    watermark_ms: int | None
    covered_ms: int | None
    units: int
    outcomes: Mapping[str, Outcomes]


class ExperimentReport(NamedTuple):
    """One experiment after an evaluation.

    Attributes:
        breached: (metric, arm) of guardrails with proven harm, latched.
        mismatch: a sample-ratio mismatch is proven, latched.
    """

    result: Result
    state: DecisionState
    breached: frozenset[tuple[str, str]]
    mismatch: bool


class Telemetry:
    """Whoever shows how a worker stands; this one shows nothing.

    Nothing depends on what it does. It is told per block, flush and evaluation, never per event.
    """

    def registered(self, records: Sequence[ExperimentRecord], *, owned: Collection[str]) -> None:
        """The experiments that are not archived, in order of registration, and those this worker decides on."""

    def block_applied(self, report: BlockReport) -> None:
        """A block was applied."""

    def partition_flushed(self, report: PartitionReport) -> None:
        """A partition was flushed."""

    def flushed(self, *, took_s: float, at_ms: int) -> None:
        """All partitions were flushed."""

    def snapshot_written(self, *, took_s: float) -> None:
        """A snapshot became durable."""

    def hole_found(self, topic: str) -> None:
        """A block began after the next offset; topic without the prefix."""

    def partitions_left(self) -> None:
        """This worker holds no partition any more."""

    def evaluated(self, *, took_s: float, at_ms: int, experiments: int) -> None:
        """An evaluation ended; `experiments` are those with statistics here."""

    def experiments_evaluated(self, reports: Sequence[ExperimentReport]) -> None:
        """These experiments have a new result."""

    def decided(self, action: Action, *, at_ms: int, first_exposure_ms: int | None) -> None:
        """A decision was signalled."""

    def experiments_left(self) -> None:
        """This worker decides on no experiment any more."""

    def spans_ended(self, delivery: Delivery, spans: int) -> None:
        """So many spans of traces were handed over, or were not; told from another thread."""
