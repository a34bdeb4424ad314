"""What must hold at the end of a schedule, judged by the oracle on everything that ever was on the log."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from stream_xp.domain.dead_letter import DeadLetter
from stream_xp.domain.decision import Action, ConfigRecord, Decision, Result, Signal
from stream_xp.domain.experiment import ExperimentRecord, Status
from stream_xp.domain.statistics import ExperimentStatistics, PartitionStatistics, merge
from stream_xp.engine.evaluate import evaluate
from stream_xp.engine.policy import decide
from stream_xp.services.decide.source_partitions import runtime
from stream_xp.services.oracle.recompute import (
    EXPOSURES,
    REWARDS,
    LoggedRecord,
    LoggedSpec,
    Recomputed,
    log_times,
    recompute,
)
from tests.simulation.cluster.orders import Ruling
from tests.simulation.cluster.shortcuts import decode_record
from tests.simulation.cluster.traffic import ACTIVATION_MS, LATENESS_MS
from tests.simulation.cluster.watch import BrokenError, has_lost_the_newest, load_now

_OLD_RECORDS = 6
"""Of the statistics that were replaced since, so many are checked too."""


class Verdict:
    """The checks of one world."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self._specs = _logged_specs(world)
        self._raw = {
            (name, at): [LoggedRecord(r.offset, r.timestamp_ms, r.key, r.value) for r in partition.history]
            for name in (EXPOSURES, REWARDS)
            for at, partition in enumerate(world.log.topics[f"xp.{name}"])
        }
        self._found: dict[tuple[Any, ...], Recomputed] = {}
        self._wholes: list[tuple[int, Recomputed]] = []
        self.newest = _newest(world.watch.published)

    def give(self, *, whole: bool) -> None:
        """Check everything; `whole` if nothing is left to be read."""
        self.check_statistics()
        self.check_signals()
        if whole:
            self.check_nothing_is_missing()
            self.check_dead_letters()
            self.check_split()
            self.check_restart()
            if "decide" in self._world.settings.roles:
                self.check_configs()

    # --- statistics ---------------------------------------------------------------------------------------------

    def check_statistics(self) -> None:
        """I1, I2: records on the topic of statistics are what the raw records come to."""
        published = self._world.watch.published
        step = max(1, len(published) // _OLD_RECORDS)
        for record in [*published[::step], *self.newest.values()]:
            self.check_record(record)

    def check_record(self, record: PartitionStatistics) -> None:
        """I1, I2 of one record."""
        truth = self._truth(record)
        found = truth.statistics.get((record.experiment, record.version))
        where = (
            f"{record.experiment} version {record.version} partition {record.partition} {record.position()}"
        )
        _require(found is not None, "I2", f"{where}: there is no such version")
        assert found is not None
        _require(
            found.canonical() == record.statistics.canonical(),
            "I2",
            f"{where}: engine {record.statistics.canonical()!r}, oracle {found.canonical()!r}",
        )
        for name, ours, theirs in (
            ("exposures", record.exposure_outcomes, truth.exposure_outcomes),
            ("rewards", record.reward_outcomes, truth.reward_outcomes),
        ):
            _require(ours == theirs, "I1", f"{where}: {name} engine {ours}, oracle {theirs}")

    def _truth(self, record: PartitionStatistics) -> Recomputed:
        spans = [(p.first_offset, p.applied_offset) for p in (record.exposures, record.rewards)]
        behind = record.behind_watermark
        key = (record.partition, *spans, record.watermark_ms, *sorted(behind.items()))
        if key not in self._found:
            exposures, rewards = (
                [one for one in self._raw[name, record.partition] if first <= one.offset <= last]
                if first is not None and last is not None
                else []
                for name, (first, last) in zip((EXPOSURES, REWARDS), spans, strict=True)
            )
            self._found[key] = self._recompute(
                exposures, rewards, record.partition, record.watermark_ms, behind
            )
        return self._found[key]

    def _recompute(
        self,
        exposures: Sequence[LoggedRecord],
        rewards: Sequence[LoggedRecord],
        partition: int,
        watermark_ms: int | None,
        behind: dict[str, tuple[int, ...]],
    ) -> Recomputed:
        return recompute(
            exposures,
            rewards,
            self._specs,
            partition=partition,
            watermark_ms=watermark_ms,
            allowed_lateness_ms=LATENESS_MS,
            activation_delay_ms=ACTIVATION_MS,
            limits=self._world.limits,
            behind_watermark=behind,
        )

    def check_nothing_is_missing(self) -> None:
        """The newest statistics of every experiment are those of the whole log, and no reward waits."""
        for record in self.newest.values():
            for name, progress, outcomes in (
                (EXPOSURES, record.exposures, record.exposure_outcomes),
                (REWARDS, record.rewards, record.reward_outcomes),
            ):
                end = len(self._raw[name, record.partition])
                _require(
                    (progress.next_offset or 0) == end,
                    "I2",
                    f"{name} of {record.partition}: {progress} of {end} records",
                )
                _require(
                    outcomes.waiting == 0, "I12", f"{name} of {record.partition}: {outcomes} still waits"
                )
        for partition, truth in self._final():
            for version, found in truth.statistics.items():
                published = (*version, partition) in self.newest or self._superseded(*version, partition)
                _require(
                    published or found == ExperimentStatistics(), "I2", f"{version} in {partition} is missing"
                )

    def _superseded(self, experiment: str, version: int, partition: int) -> bool:
        return any(key[0] == experiment and key[2] == partition and key[1] > version for key in self.newest)

    def _final(self) -> list[tuple[int, Recomputed]]:
        """The oracle on the whole log of each source partition, everything settled."""
        if not self._wholes:
            for at in range(self._world.settings.partitions):
                exposures, rewards = self._raw[EXPOSURES, at], self._raw[REWARDS, at]
                self._wholes.append((at, self._recompute(exposures, rewards, at, 2**50, {})))
        return self._wholes

    def check_split(self) -> None:
        """I5: partitions merged are what one partition with all their records comes to."""
        if any(record.behind_watermark for record in self.newest.values()) or self._world.skewed:
            return
        together = self._recompute(self._merged(EXPOSURES), self._merged(REWARDS), 0, 2**50, {})
        for version, found in together.statistics.items():
            parts = [record.statistics for key, record in self.newest.items() if key[:2] == version]
            if parts and not any(
                self._superseded(*version, record.partition) for record in self.newest.values()
            ):
                _require(
                    merge(parts).canonical() == found.canonical(),
                    "I5",
                    f"{version}: merged {merge(parts).canonical()!r}, in one {found.canonical()!r}",
                )

    def _merged(self, name: str) -> list[LoggedRecord]:
        history = self._world.log.history(f"xp.{name}")
        return [LoggedRecord(at, r.timestamp_ms, r.key, r.value) for at, r in enumerate(history)]

    # --- restart ------------------------------------------------------------------------------------------------

    def check_restart(self) -> None:
        """I13: whoever loads what is durable now has what was published last, and the same each time.

        Where damage took the newest snapshot it costs a replay and no truth: what is loaded is an earlier prefix of
        the log, and what comes of the rest is all there is.
        """
        watch = self._world.watch
        for partition in range(self._world.settings.partitions):
            found = watch.loaded(partition)
            for (experiment, version), record in found.statistics.items():
                last = self.newest.get((experiment, version, partition))
                if last is None or record == last:
                    continue
                where = f"{experiment} {version} in {partition}: loaded {record}, published {last}"
                _require(has_lost_the_newest(self._world, partition), "I13", where)
                _require(not record.newer_than(last), "I13", f"damage, and yet more is known: {where}")
                self.check_record(record)
                watch.replayed.add(partition)
        for partition in sorted(watch.replayed):
            self._check_replay(partition)
        watch.check()

    def _check_replay(self, partition: int) -> None:
        """I2, I13: a worker that goes on from an older snapshot counts everything, as it was counted before."""
        for record in load_now(self._world, partition, replays=True).statistics.values():
            for name, progress in ((EXPOSURES, record.exposures), (REWARDS, record.rewards)):
                end = len(self._raw[name, partition])
                _require((progress.next_offset or 0) == end, "I13", f"{name} replayed to {progress} of {end}")
            self.check_record(record)

    # --- dead letters -------------------------------------------------------------------------------------------

    def check_dead_letters(self) -> None:
        """I7: each refused record has one dead letter with its raw bytes, before its offset is committed."""
        history = self._world.log.history("xp.deadletter")
        letters = {record.key: msgspec.json.decode(record.value, type=DeadLetter) for record in history}
        first_at: dict[tuple[str, int, int], int] = {}
        for record in history:
            letter = letters[record.key]
            first_at.setdefault((letter.topic, letter.partition, letter.offset), record.sequence)
        wanted = {}
        for partition, truth in self._final():
            for (name, offset), reason in truth.dead_letters.items():
                wanted[f"xp.{name}", partition, offset] = (reason, self._raw[name, partition][offset])
        _require(
            wanted.keys() == first_at.keys(), "I7", f"letters {sorted(first_at)}, wanted {sorted(wanted)}"
        )
        for letter in letters.values():
            reason, raw = wanted[letter.topic, letter.partition, letter.offset]
            whole = hashlib.sha256(raw.value or b"").hexdigest() == letter.value_sha256
            same = (letter.reason, letter.key, letter.value) == (reason, raw.key, raw.value)
            _require(same and whole, "I7", f"{letter} is not of {raw}")
        for sequence, tp, committed in self._world.watch.commits:
            for (topic, partition, offset), at in first_at.items():
                if (topic, partition) == (tp.topic, tp.partition) and offset < committed:
                    _require(at < sequence, "I7", f"{tp} {committed} was committed before {offset}'s letter")

    # --- decisions ----------------------------------------------------------------------------------------------

    def check_signals(self) -> None:
        """I9: each signal follows from the statistics it names. That only one counts is looked at as they come."""
        for signal in self._world.watch.signals:
            self._check_signal(signal)

    def _check_signal(self, signal: Signal) -> None:
        result = signal.data.result
        parts = [self._part(result, int(at), used) for at, used in result.offsets.items()]
        statistics = merge(part.statistics for part in parts)
        for part in parts:
            self.check_record(part)
        _require(statistics.digest() == result.statistics_hash, "I9", f"{signal.id}: the hash is another")
        again: list[Decision] = []
        for record in self._records(result.experiment, result.version):
            evaluation = evaluate(record, statistics)
            runtime_ms = runtime(parts, statistics.first_exposure_ms)
            again.append(decide(record.spec, evaluation, runtime_ms=runtime_ms))
            if again[-1] == result.decision:
                return
        raise BrokenError(f"I9: {signal.id} says {result.decision}, again {again}")

    def _part(self, result: Any, partition: int, used: Any) -> PartitionStatistics:
        """The published statistics of a prefix that a result names."""
        for record in reversed(self._world.watch.published):
            named = (record.experiment, record.version, record.partition)
            prefix = (record.exposures.applied_offset, record.rewards.applied_offset, record.watermark_ms)
            if named == (result.experiment, result.version, partition) and prefix == (
                used.exposures,
                used.rewards,
                used.watermark_ms,
            ):
                return record
        raise BrokenError(f"I9: {used} of {partition} was never published")

    def _records(self, experiment: str, version: int) -> list[ExperimentRecord]:
        """Every record of a version: which of them a worker knew at a look is not written down."""
        of_version = [spec.record for spec in self._specs if spec.experiment == experiment and spec.record]
        return [record for record in of_version if record.spec.version == version]

    def check_configs(self) -> None:
        """I10: what is in force is what applications follow, and what is said last."""
        watch = self._world.watch
        results: dict[str, Result] = {}
        for _, _, result in watch.results:
            if result.experiment not in results or result.version >= results[result.experiment].version:
                results[result.experiment] = result
        configs: dict[str, ConfigRecord] = {}
        for config in sorted(watch.configs, key=lambda one: one.config_version):
            configs[config.experiment] = config
        for (experiment, version), ruling in watch.rulings.items():
            if experiment not in results or not self._is_newest(experiment, version, results[experiment]):
                continue
            where = f"{experiment} {version}"
            self._check_result(where, ruling, results[experiment].decision)
            config = configs.get(experiment)
            if ruling.latched is not None or not self._was_archived(experiment):
                # The first config of a version is that of `apply`, which nobody calls here.
                self._check_config(where, ruling, config if config and config.version == version else None)

    def _is_newest(self, experiment: str, version: int, result: Result) -> bool:
        applied = [
            one.record.spec.version for one in self._specs if one.experiment == experiment and one.record
        ]
        return result.version == version and max(applied) == version

    def _was_archived(self, experiment: str) -> bool:
        """Whether it was over for a while: then nobody is told of what is taken back or held."""
        records = [one.record for one in self._specs if one.experiment == experiment]
        return any(one is None or one.status is Status.ARCHIVED for one in records)

    def _check_result(self, where: str, ruling: Ruling, last: Decision) -> None:
        if ruling.latched is not None:
            wanted = ruling.latched.decision
            _require(last == wanted, "I10", f"{where}: in force is {wanted}, the last result says {last}")
        elif ruling.proposed is not None or ruling.paused:
            _require(last.action is Action.HOLD, "I10", f"{where}: {ruling}, and the last result says {last}")

    def _check_config(self, where: str, ruling: Ruling, config: ConfigRecord | None) -> None:
        if config is None:
            untold = ruling.demand is None and not ruling.paused
            _require(untold, "I10", f"{where}: no config follows from {ruling}")
            return
        told = (config.status, config.signal_id, config.paused)
        wanted = (ruling.status, ruling.demand, ruling.paused)
        _require(told == wanted, "I10", f"{where}: applications were told {told}, in force is {wanted}")


def _require(holds: bool, invariant: str, text: str) -> None:
    if not holds:
        raise BrokenError(f"{invariant}: {text}")


def _newest(published: list[PartitionStatistics]) -> dict[tuple[str, int, int], PartitionStatistics]:
    """The newest record of each experiment version and partition."""
    newest: dict[tuple[str, int, int], PartitionStatistics] = {}
    for record in published:
        key = (record.experiment, record.version, record.partition)
        if key not in newest or record.newer_than(newest[key]):
            newest[key] = record
    return newest


def _logged_specs(world: Any) -> list[LoggedSpec]:
    """The topic of experiments as the oracle reads it."""
    records = world.log.topics["xp.experiments"][0].history
    specs = []
    for one, log_ms in zip(records, log_times([one.timestamp_ms for one in records]), strict=True):
        try:
            record = None if one.value is None else decode_record(one.value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if one.key:
            specs.append(LoggedSpec(log_ms, one.key.decode(), record))
    return specs
