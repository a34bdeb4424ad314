"""What the tests of the oracle and of `verify` share: true statistics of raw records, tampered ones, the commands.

`recompute` stands in for an engine without a fault; that the engine agrees with it is what other tests hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from click.testing import CliRunner

from stream_xp.cli import main
from stream_xp.domain.codec import Limits
from stream_xp.domain.statistics import PartitionStatistics, Progress
from stream_xp.services.oracle.recompute import recompute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stream_xp.domain.experiment import ExperimentSpec
    from stream_xp.domain.statistics import Rules
    from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec
    from stream_xp.settings import Settings


def published_part(
    spec: ExperimentSpec,
    exposures: Sequence[LoggedRecord],
    rewards: Sequence[LoggedRecord],
    specs: Sequence[LoggedSpec],
    *,
    settings: Settings,
    partition: int,
    watermark_ms: int,
    counted: Sequence[LoggedRecord] | None = None,
    rules: Rules | None = None,
) -> PartitionStatistics:
    """What a worker publishes of all these records of a source partition.

    Args:
        counted: the rewards as a worker with a fault saw them, in the place of the true ones.
        rules: what the record says it was computed under.
    """
    done = recompute(
        list(exposures),
        list(rewards if counted is None else counted),
        list(specs),
        partition=partition,
        watermark_ms=watermark_ms,
        allowed_lateness_ms=settings.allowed_lateness_ms,
        activation_delay_ms=settings.activation_delay_ms,
        limits=Limits(),
        behind_watermark={},
    )
    return PartitionStatistics(
        experiment=spec.experiment,
        version=spec.version,
        design_hash=spec.design_hash(),
        partition=partition,
        exposures=Progress(first_offset=0, applied_offset=len(exposures) - 1),
        rewards=Progress(first_offset=0, applied_offset=len(rewards) - 1),
        watermark_ms=watermark_ms,
        allowed_lateness_ms=settings.allowed_lateness_ms,
        statistics=done.statistics[spec.experiment, spec.version],
        exposure_outcomes=done.exposure_outcomes,
        reward_outcomes=done.reward_outcomes,
        rules=rules,
    )


def with_one_more(part: PartitionStatistics, *, arm: str = "a") -> PartitionStatistics:
    """The same with a sum that is 1 too large: of the first metric, in one arm."""
    cell = next(row for row in part.statistics.moments if row.arm == arm)
    wrong = msgspec.structs.replace(cell, s=str(int(cell.s) + 1))
    moments = tuple(wrong if row == cell else row for row in part.statistics.moments)
    return msgspec.structs.replace(part, statistics=msgspec.structs.replace(part.statistics, moments=moments))


def run(command: str, settings: Settings, *options: str) -> Any:
    """Run a command of ours on the topics of these settings."""
    where = ["--bootstrap", settings.bootstrap, "--broker", settings.broker, "--prefix", settings.prefix]
    return CliRunner().invoke(main, [command, *options, *where])
