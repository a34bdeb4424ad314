"""Faults put into the services on purpose, each of which the schedules must find.

A mutant replaces one function for as long as it is active. Those that can do without names inside of the services
do: they change what passes the seams (blocks, writes, offsets).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import msgspec

from stream_xp.adapters.kafka_log import LogWriter
from stream_xp.domain.decision import ConfigRecord
from stream_xp.domain.statistics import Progress
from stream_xp.engine import snapshot_log
from stream_xp.engine import standing as standing_module
from stream_xp.engine.columns import Block
from stream_xp.engine.standing import Demand, Latch, Said, Standing, said
from stream_xp.engine.state import EXPOSURES, PartitionState
from stream_xp.engine.steering import config_after, epoch_after
from stream_xp.services.decide import Decide, chain, service
from stream_xp.services.decide.heard import Heard
from stream_xp.services.decide.signals import signal_of
from stream_xp.services.experiments import Experiments
from stream_xp.services.ingest import Ingest
from stream_xp.services.signal_records import is_order

Patch = contextlib.AbstractContextManager[Any]

_on_block = Ingest.on_block
_durable = LogWriter.durable
_take = snapshot_log.SnapshotReader.take
_apply_exposures = PartitionState.apply_exposures


def _commit_before_snapshot() -> Patch:
    """Offsets count as durable as soon as their block is applied."""

    async def on_block(self: Ingest, block: Block) -> None:
        await _on_block(self, block)
        if block.partition in self.partitions:
            self._source.durable(block.topic, block.partition, block.next_offset)

    return mock.patch.object(Ingest, "on_block", on_block)


def _apply_after_a_hole() -> Patch:
    """A block that starts too far on is taken as if nothing were missing before it."""

    async def on_block(self: Ingest, block: Block) -> None:
        await _on_block(self, block._replace(fetch_offset=0) if block.offsets else block)

    return mock.patch.object(Ingest, "on_block", on_block)


def _apply_repeats() -> Patch:
    """What is applied already is applied again, under new offsets, so that the state does not notice."""

    def since(self: Block, offset: int) -> Block:
        return self

    def apply(self: PartitionState, columns: Any, *, next_offset: int) -> None:
        self.progress[EXPOSURES] = Progress(first_offset=self.progress[EXPOSURES].first_offset)
        _apply_exposures(self, columns, next_offset=next_offset)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(Block, "since", since))
    stack.enter_context(mock.patch.object(PartitionState, "apply_exposures", apply))
    return stack


def _no_wait_for_acknowledgement() -> Patch:
    """A write counts as durable when it is sent."""

    async def durable(self: LogWriter, sent: Any, topic: str) -> None:
        pass

    return mock.patch.object(LogWriter, "durable", durable)


def _no_wait_for_dead_letters() -> Patch:
    """A snapshot does not wait for the dead letters before it."""

    async def durable(self: LogWriter, sent: Any, topic: str) -> None:
        if not topic.endswith("deadletter"):
            await _durable(self, sent, topic)

    return mock.patch.object(LogWriter, "durable", durable)


def _manifest_before_chunks() -> Patch:
    """What makes a snapshot whole is acknowledged at once, its parts are only on their way."""

    async def durable(self: LogWriter, sent: Any, topic: str) -> None:
        if not topic.endswith("state"):
            await _durable(self, sent, topic)

    return mock.patch.object(LogWriter, "durable", durable)


def _oldest_snapshot() -> Patch:
    """Of the whole snapshots the oldest is taken."""
    newest_state: Callable[..., Any] = Ingest._newest_state

    def oldest(self: Ingest, partition: int, snapshots: list[Any]) -> Any:
        return newest_state(self, partition, snapshots[::-1])

    return mock.patch.object(Ingest, "_newest_state", oldest)


def _state_is_kept_at_a_rebalance() -> Patch:
    """A worker goes on with what it held before somebody else had the partition."""
    return mock.patch.object(Ingest, "drop", return_value=None)


def _no_latch() -> Patch:
    """A decision is made anew at each look."""
    made = service.steer

    def steer(record: Any, standing: Standing, *args: Any, **named: Any) -> Any:
        return made(record, dataclasses.replace(standing, latched=None), *args, **named)

    return mock.patch.object(service, "steer", steer)


def _signals_are_not_read() -> Patch:
    """Nobody looks what was decided before."""
    return mock.patch.object(Heard, "_take_signal", return_value=None)


def _config_before_signal() -> Patch:
    """Applications are told before the decision is on the log."""
    send_signals = Decide._send_signals

    async def early(self: Decide, news: Sequence[Any]) -> None:
        configs = [_config_of(self, one) for one in news]
        await self._topics.write("config", [(config.experiment, config) for config in configs])
        await send_signals(self, news)

    return mock.patch.object(Decide, "_send_signals", early)


def _config_of(decide: Decide, one: Any) -> ConfigRecord:
    """What follows from a conclusion once it is on the log."""
    signal, record = signal_of(one, group_id=decide._settings.group_id), one.look.record
    latch = Latch(signal.data.decision, signal.id)
    demand = Demand(signal.data.decision.action, signal.id, signal.data.decision)
    epoch = epoch_after(record, demand, effective_ms=one.result.evaluated_ms)
    moved = msgspec.structs.replace(record, epochs=(*record.epochs, epoch))
    return config_after(moved, Standing(latched=latch), config_version=1, lead_ms=0)


def _ownership_is_not_looked_at() -> Patch:
    """What was begun with a partition goes on as if it had not left."""
    return mock.patch.object(Ingest, "_owns", return_value=True)


def _no_cover() -> Patch:
    """Events are applied by the specs that happen to be known."""
    return mock.patch.object(Experiments, "cover", mock.AsyncMock(return_value=None))


def _begin_anew() -> Patch:
    """A worker counts from the beginning of the log although there is a snapshot."""
    return mock.patch.object(Ingest, "_newest_state", return_value=None)


def _any_beginning() -> Patch:
    """Where no snapshot can be read counting begins at what the log still has."""
    return mock.patch.object(Ingest, "_require_beginning", return_value=None)


def _own_signal() -> Patch:
    """Whoever writes a signal takes it for the first."""
    send_signals = Decide._send_signals

    async def first(self: Decide, news: Sequence[Any]) -> None:
        for one in news:
            signal = signal_of(one, group_id=self._settings.group_id)
            self._heard._said.setdefault(one.look.version, []).insert(0, said(signal))
        await send_signals(self, news)

    return mock.patch.object(Decide, "_send_signals", first)


def _damage_is_not_noticed() -> Patch:
    """Whatever lies under the key of a page is taken for the page."""
    manifests: Callable[..., Any] = snapshot_log.Manifest.page_keys

    def page_keys(self: snapshot_log.Manifest) -> Iterator[tuple[str, bytes, int]]:
        return ((part, key, 0) for part, key, _ in manifests(self))

    def take(self: snapshot_log.SnapshotReader, key: bytes | None, value: bytes | None) -> None:
        _take(self, key, value)
        for pages in self._pages.values():
            pages |= {name: (0, held) for name, (_, held) in pages.items()}

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(snapshot_log.Manifest, "page_keys", page_keys))
    stack.enter_context(mock.patch.object(snapshot_log.SnapshotReader, "take", take))
    return stack


def _orders_are_not_read() -> Patch:
    """People say what they want, and no worker listens."""
    take: Callable[..., None] = Heard._take_signal

    def take_signal(self: Heard, value: bytes) -> None:
        if not is_order(value):
            take(self, value)

    return mock.patch.object(Heard, "_take_signal", take_signal)


def _reset_is_not_looked_at() -> Patch:
    """A decision counts though it was made before a person took back what was in force."""
    decided: Callable[..., Standing | str] = standing_module._decided

    def whenever(spec: Any, now: Standing, one: Said, decision: Any) -> Standing | str:
        return decided(spec, now, one._replace(since=now.since), decision)

    return mock.patch.object(standing_module, "_decided", whenever)


def _pause_is_not_told() -> Patch:
    """Applications do not hear of a pause."""
    return mock.patch.object(chain, "config_after", _config_without_pause)


def _config_without_pause(*args: Any, **named: Any) -> ConfigRecord:
    return msgspec.structs.replace(config_after(*args, **named), paused=False)


MUTANTS: dict[str, Callable[[], Patch]] = {
    "commit before snapshot": _commit_before_snapshot,
    "apply after a hole": _apply_after_a_hole,
    "apply repeats": _apply_repeats,
    "no wait for acknowledgement": _no_wait_for_acknowledgement,
    "no wait for dead letters": _no_wait_for_dead_letters,
    "no wait for snapshots": _manifest_before_chunks,
    "oldest snapshot": _oldest_snapshot,
    "state is kept at a rebalance": _state_is_kept_at_a_rebalance,
    "no latch": _no_latch,
    "signals are not read": _signals_are_not_read,
    "config before signal": _config_before_signal,
    "ownership is not looked at": _ownership_is_not_looked_at,
    "no cover": _no_cover,
    "begin anew": _begin_anew,
    "any beginning": _any_beginning,
    "own signal": _own_signal,
    "damage is not noticed": _damage_is_not_noticed,
    "orders are not read": _orders_are_not_read,
    "reset is not looked at": _reset_is_not_looked_at,
    "pause is not told": _pause_is_not_told,
}


@contextlib.contextmanager
def active(name: str) -> Iterator[None]:
    """Put a fault into the services."""
    with MUTANTS[name]():
        yield
