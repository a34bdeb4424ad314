"""The state of one source partition: units, waiting rewards, exact statistics, and the offsets they cover."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stream_xp.domain.statistics import (
    ExperimentStatistics,
    MetricKey,
    Outcomes,
    PartitionStatistics,
    Progress,
    Rules,
    UnitKey,
    build,
)
from stream_xp.engine import kernels
from stream_xp.engine.columns import ExposureColumns, RewardColumns
from stream_xp.engine.kernels import NEVER, Int64
from stream_xp.engine.layout import Pools, build_layout, cells_of
from stream_xp.engine.registry import FOREVER, Registry, Slot
from stream_xp.errors import StateError

EXPOSURES = "exposures"
REWARDS = "rewards"

MAX_UNITS = 20_000_000
"""Units of one experiment version that a partition holds, if nothing else is said."""
SPARE_SHARE = 8
"""A state that was restored has room for one row more for every so many, so that its first block need not make it."""
RELEASE_SHARE = 8
"""Rows that nothing can change are released once they are one in so many: to move the others takes time."""
BEHIND_LIMIT = 10_000
"""Offsets listed in behind_watermark; more means that clocks disagree grossly, and the partition stops."""

_GROWN_WITH_REGISTRY = ("units", "unsettled", "moments", "tallies", "out_of_range")


class PartitionState:
    """A fold over the exposures and rewards of one source partition.

    What it holds after any interleaving of the same two prefixes is the same (docs/semantics.md). It is changed in
    place: `apply_exposures`, `apply_rewards` and `advance` are the only ways.

    Args:
        partition: the source partition.
        registry: specs in force; shared, may grow between calls.
        allowed_lateness_ms: broker append time minus event time above which a record is late.
        max_units: units of one experiment version that are taken; exposures of further ones are refused.
        rules: under which its records get their outcomes; named in snapshots. None where nobody has to know.
    """

    def __init__(
        self,
        partition: int,
        registry: Registry,
        *,
        allowed_lateness_ms: int,
        max_units: int = MAX_UNITS,
        rules: Rules | None = None,
    ) -> None:
        self.partition = partition
        self.registry = registry
        self.allowed_lateness_ms = allowed_lateness_ms
        self.max_units = max_units
        self.rules = rules
        self.progress = {EXPOSURES: Progress(), REWARDS: Progress()}
        self.behind: dict[str, list[int]] = {EXPOSURES: [], REWARDS: []}
        self.pools = Pools()
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self._generation = -1
        self._layout: kernels.Layout
        self._cells = np.zeros(66, np.int64)
        for name in kernels.State._fields:
            # A table has twice as many cells as there are ids, so that looking for one ends.
            smallest = 32 if name.endswith("_table") else 16
            self.arrays[name] = _empty(name, 0 if name in _GROWN_WITH_REGISTRY else smallest)
        self.arrays["scalars"] = np.zeros(kernels.SCALARS, np.int64)
        for scalar in (kernels.LOG_EXPOSURES, kernels.LOG_REWARDS, kernels.WATERMARK):
            self.arrays["scalars"][scalar] = NEVER
        self.arrays["exposure_outcomes"] = np.zeros(kernels.OUTCOMES, np.int64)
        self.arrays["reward_outcomes"] = np.zeros(kernels.OUTCOMES, np.int64)
        self.sync_registry()

    # --- the fold ---------------------------------------------------------------------------------------

    def apply_exposures(self, columns: ExposureColumns, *, next_offset: int) -> None:
        """Apply exposures that follow the applied offset; `next_offset` is the one to read after them."""
        n = len(columns.offset)
        self._begin(EXPOSURES, columns.offset)
        self._make_room(rows=n, ids=("exposure_ids", kernels.IDS_EXPOSURES, kernels.LOG_EXPOSURES), events=n)
        behind = np.empty(n, np.int64)
        refused = kernels.fold_exposures(
            self._layout,
            self._state(),
            columns.offset,
            columns.log_ms,
            columns.time_ms,
            columns.unit,
            columns.event_id,
            columns.slot,
            columns.arm,
            columns.epoch,
            columns.segment,
            columns.covariate,
            self.allowed_lateness_ms,
            self.max_units,
            self._cells,
            behind,
        )
        self._finish(EXPOSURES, columns.offset, next_offset, behind[:refused])

    def apply_rewards(self, columns: RewardColumns, *, next_offset: int) -> None:
        """Apply rewards that follow the applied offset; `next_offset` is the one to read after them."""
        n = len(columns.offset)
        self._begin(REWARDS, columns.offset)
        self._make_room(rewards=n, ids=("reward_ids", kernels.IDS_REWARDS, kernels.LOG_REWARDS), events=n)
        behind = np.empty(n, np.int64)
        refused = kernels.fold_rewards(
            self._layout,
            self._state(),
            columns.offset,
            columns.log_ms,
            columns.time_ms,
            columns.unit,
            columns.event_id,
            columns.event,
            columns.experiment,
            columns.value,
            self.allowed_lateness_ms,
            behind,
        )
        self._finish(REWARDS, columns.offset, next_offset, behind[:refused])

    def advance(self, watermark_ms: int) -> None:
        """Move the watermark of a quiet partition on, by the clock; it never goes back."""
        self.sync_registry()
        kernels.advance(self._layout, self._state(), watermark_ms, self.allowed_lateness_ms, self._cells)
        self._check_fault()

    def sync_registry(self) -> None:
        """Take in specs that came since the last call."""
        if self._generation == self.registry.generation:
            return
        self._layout = build_layout(self.registry, self.pools)
        slots = len(self.registry.slots)
        metrics = len(self._layout.metrics)
        sizes = {
            "units": self.pools.units_size,
            "unsettled": self.pools.units_size,
            "moments": self.pools.moments_size,
            "out_of_range": metrics,
        }
        for name in _GROWN_WITH_REGISTRY:
            self._grow(name, sizes.get(name, slots), exact=True)
        self._generation = self.registry.generation

    # --- what it says -------------------------------------------------------------------------------------

    @property
    def watermark_ms(self) -> int | None:
        """The watermark, None before both topics have had a record."""
        watermark = self._scalar(kernels.WATERMARK)
        return None if watermark == NEVER else watermark

    def log_ms(self, topic: str) -> int:
        """Newest log time of a topic's partition, NEVER before the first record."""
        return self._scalar(kernels.LOG_EXPOSURES if topic == EXPOSURES else kernels.LOG_REWARDS)

    @property
    def units(self) -> int:
        """(unit, experiment version) pairs held; those of ended versions are given up in time."""
        return self._scalar(kernels.ROWS)

    def outcomes(self, topic: str) -> Outcomes:
        """What became of every record of a topic's partition."""
        counts = self.arrays["exposure_outcomes" if topic == EXPOSURES else "reward_outcomes"]
        return Outcomes(**dict(zip(Outcomes.__struct_fields__, counts.tolist(), strict=True)))

    def take_dirty(self) -> list[Slot]:
        """The slots whose statistics changed since the last call."""
        dirty = self.arrays["tallies"]["dirty"]
        changed = [self.registry.slots[index] for index in np.flatnonzero(dirty).tolist()]
        dirty[:] = 0
        return changed

    def statistics(self, slot: Slot) -> ExperimentStatistics:
        """Exact statistics of one experiment version in this partition."""
        first_ms = int(self.arrays["tallies"]["first_exposure_ms"][slot.index])
        first_metric = self.first_metric(slot)
        refused = self.arrays["out_of_range"][first_metric : first_metric + len(slot.spec.metrics)].tolist()
        units, settled = self._unit_tables(slot)
        return build(
            units=units,
            settled=settled,
            **self._metric_tables(slot),
            crossover_units=int(self.arrays["tallies"]["crossover_units"][slot.index]),
            first_exposure_ms=None if first_ms == FOREVER else first_ms,
            out_of_range=dict(zip([metric.key for metric in slot.spec.metrics], refused, strict=True)),
            over_limit=int(self.arrays["tallies"]["over_limit"][slot.index]),
        )

    def record(self, slot: Slot) -> PartitionStatistics:
        """The ``xp.stats`` record of one experiment version."""
        # Without a watermark nothing else takes in a weight epoch that came since the last record.
        self.sync_registry()
        return PartitionStatistics(
            experiment=slot.experiment,
            version=slot.version,
            design_hash=slot.design_hash,
            partition=self.partition,
            exposures=self.progress[EXPOSURES],
            rewards=self.progress[REWARDS],
            watermark_ms=self.watermark_ms,
            allowed_lateness_ms=self.allowed_lateness_ms,
            statistics=self.statistics(slot),
            exposure_outcomes=self.outcomes(EXPOSURES),
            reward_outcomes=self.outcomes(REWARDS),
            behind_watermark={topic: tuple(offsets) for topic, offsets in self.behind.items() if offsets},
        )

    def first_metric(self, slot: Slot) -> int:
        """Where the slot's metrics start among all metrics."""
        return int(self._layout.slots["metric_start"][slot.index])

    def restore(self, held: dict[str, npt.NDArray[Any]]) -> None:
        """Take over the arrays of a snapshot, and derive from them what it leaves out.

        Args:
            held: rows, values, ids, the rewards that wait in order of offset, scalars and outcomes.
        """
        self.arrays |= held
        # A snapshot of before a scalar was added: what follows from the rest has its place behind.
        self._grow("scalars", kernels.SCALARS, exact=True)
        self.arrays["scalars"][kernels.POOL] = len(held["pool"])
        for ids, counter in (("exposure_ids", kernels.IDS_EXPOSURES), ("reward_ids", kernels.IDS_REWARDS)):
            self.arrays["scalars"][counter] = len(held[ids])
            self._enter_ids(ids, counter, horizon_ms=NEVER)
        rows = self.units + self.units // SPARE_SHARE
        waiting = len(held["pool"])
        for name, size in (("due", rows), ("fresh", rows), ("waiting", waiting), ("free", waiting)):
            self.arrays[name] = _empty(name, size)
        self._grow("rows", rows)
        self._grow("values", self._scalar(kernels.VALUES) * rows // max(self.units, 1))
        self._enter_rows(rows * 10 // 6 + 1)
        self._await()
        kernels.await_settling(self._state())
        tallies = self.arrays["tallies"]
        tallies["dirty"] = tallies["first_exposure_ms"] != FOREVER

    # --- inside ---------------------------------------------------------------------------------------------

    def _scalar(self, at: int) -> int:
        return int(self.arrays["scalars"][at])

    def _state(self) -> kernels.State:
        return kernels.State(**self.arrays)

    def _begin(self, topic: str, offsets: npt.NDArray[np.int64]) -> None:
        applied = self.progress[topic].applied_offset
        if applied is not None and len(offsets) and offsets[0] <= applied:
            raise StateError(
                f"{topic} {self.partition}: offset {offsets[0]} is already applied (applied offset {applied})"
            )
        self.sync_registry()

    def _finish(
        self, topic: str, offsets: npt.NDArray[np.int64], next_offset: int, behind: npt.NDArray[np.int64]
    ) -> None:
        first = self.progress[topic].first_offset
        if first is None:
            first = int(offsets[0]) if len(offsets) else next_offset
        self.progress[topic] = Progress(first_offset=first, applied_offset=next_offset - 1)
        self.behind[topic] += behind.tolist()
        if len(self.behind[topic]) > BEHIND_LIMIT:
            raise StateError(
                f"{topic} {self.partition}: over {BEHIND_LIMIT} records are behind the watermark; "
                "do the clocks of broker and worker agree?"
            )
        self._check_fault()
        log_ms = min(self._scalar(kernels.LOG_EXPOSURES), self._scalar(kernels.LOG_REWARDS))
        if log_ms > NEVER:
            self.advance(log_ms)
            self._release(log_ms)

    def _release(self, log_ms: int) -> None:
        """Give up the rows of versions that have ended, once nothing admissible can change them.

        From the log time of its end on no exposure and no reward is governed by a version, and a version that has
        ended does not come back. What was governed by it and can still be attributed waits until the watermark
        has passed the last window by the lateness, and no longer.
        """
        tallies = self.arrays["tallies"]
        over = [
            slot.index
            for slot in self._ended()
            if tallies["rows"][slot.index]
            and slot.ended_ms <= log_ms
            and tallies["last_exposure_ms"][slot.index] + slot.longest_window_ms + self.allowed_lateness_ms
            <= self._scalar(kernels.WATERMARK)
        ]
        if int(tallies["rows"][over].sum()) * RELEASE_SHARE < max(1, self.units):
            return
        ended = np.zeros(len(tallies), np.int64)
        ended[over] = 1
        kernels.release(self._layout, self._state(), ended)
        self._enter_rows(len(self.arrays["lookup"]))
        self._await()

    def _await(self) -> None:
        """Note of every row when it is settled, and when it matures."""
        self.arrays["unsettled"][:] = 0
        kernels.await_units(self._layout, self._state(), self.allowed_lateness_ms, self._cells)

    def _ended(self) -> list[Slot]:
        """The versions whose end is known."""
        ended: list[Slot] | None = self.registry.memo.get("ended")
        if ended is None:
            ended = [slot for slot in self.registry.slots if slot.ended_ms < FOREVER]
            self.registry.memo["ended"] = ended
        return ended

    def _check_fault(self) -> None:
        if self._scalar(kernels.FAULT):
            raise StateError(f"partition {self.partition}: a unit's sum left its bound of 2**61 steps")

    def _check_bounds(self, rows: int, words: int) -> None:
        if rows > kernels.MAX_ROWS or words > kernels.MAX_WORDS:
            raise StateError(
                f"partition {self.partition}: {rows} rows with {words} words of values are more than one "
                f"partition holds ({kernels.MAX_ROWS} and {kernels.MAX_WORDS}); use more partitions"
            )

    def _unit_tables(self, slot: Slot) -> tuple[dict[UnitKey, int], dict[UnitKey, int]]:
        """Units by arm, epoch and segment, and those of them that are settled."""
        table: dict[UnitKey, int] = {}
        settled: dict[UnitKey, int] = {}
        for epoch, keys in enumerate(self._arm_cells(slot)):
            base = self.pools.units[slot.index, epoch]
            counts = self.arrays["units"][base : base + len(keys)]
            unsettled = self.arrays["unsettled"][base : base + len(keys)]
            for at in np.flatnonzero(counts).tolist():
                table[keys[at]] = int(counts[at])
                settled[keys[at]] = int(counts[at] - unsettled[at])
        return table, settled

    def _metric_tables(self, slot: Slot) -> dict[str, dict[MetricKey, Any]]:
        """The tables `moments`, `products`, `events` and `histograms` of `build`."""
        tables: dict[str, dict[MetricKey, Any]] = {
            "moments": {},
            "products": {},
            "events": {},
            "histograms": {},
        }
        for epoch, places in enumerate(self._arm_cells(slot)):
            base = self.pools.moments[slot.index, epoch]
            for name, kind, words, start in cells_of(slot.spec, len(places)):
                first = base + start
                cells = self.arrays["moments"][first : first + len(places) * words].reshape(-1, words)
                keyed = [(name, *place) for place in places]
                _READERS[kind](cells, keyed, tables)
        return tables

    def _arm_cells(self, slot: Slot) -> list[list[tuple[str, int, str]]]:
        """Per weight epoch, the (arm, epoch, segment) of every cell, in the order of the pools."""
        cells: dict[int, list[list[tuple[str, int, str]]]] = self.registry.memo.setdefault("cells", {})
        if slot.index not in cells:
            epochs = max(epoch.epoch for epoch in slot.epochs) + 1
            cells[slot.index] = [
                [(arm, epoch, segment) for arm in slot.arms for segment in slot.segments.labels]
                for epoch in range(epochs)
            ]
        return cells[slot.index]

    def _make_room(self, *, ids: tuple[str, int, int], events: int, rows: int = 0, rewards: int = 0) -> None:
        """See that the kernels find room for what a block can add; they never allocate."""
        if rows:
            needed = self._scalar(kernels.ROWS) + rows
            width = int(self._layout.slots["width"].max())
            self._check_bounds(needed, self._scalar(kernels.VALUES) + rows * width)
            self._grow("rows", needed)
            self._grow("values", self._scalar(kernels.VALUES) + rows * width)
            self._grow("due", needed)
            self._grow("fresh", self._scalar(kernels.FRESH) + rows)
            self._grow_lookup(needed)
        if rewards:
            for name in ("pool", "free", "waiting"):
                self._grow(name, self._scalar(kernels.POOL) + rewards)
        self._grow_ids(*ids, events=events)

    def _grow(self, name: str, size: int, *, exact: bool = False) -> None:
        held = self.arrays[name]
        if len(held) >= size:
            return
        grown = _empty(name, size if exact else max(size, len(held) * 3 // 2))
        grown[: len(held)] = held
        self.arrays[name] = grown

    def _grow_lookup(self, rows: int) -> None:
        size = len(self.arrays["lookup"])
        if rows * 10 > size * 6:
            # At most six in ten cells are used, and at least four and a half once it has grown.
            self._enter_rows(max(rows * 10 // 6 + 1, size * 4 // 3))

    def _enter_rows(self, cells: int) -> None:
        """Build the hash table of rows."""
        self.arrays["lookup"] = np.zeros(max(cells, 16), np.int32)
        kernels.enter_rows(self.arrays["lookup"], self.arrays["rows"], self.units)

    def _grow_ids(self, ids: str, counter: int, log: int, *, events: int) -> None:
        if self._scalar(counter) + events <= len(self.arrays[ids]):
            return
        horizon_ms = max(self._scalar(log) - self.allowed_lateness_ms, NEVER)
        live = int((self.arrays[ids]["ms"][: self._scalar(counter)] >= horizon_ms).sum())
        if (live + events) * 2 > len(self.arrays[ids]):
            # Room for as many again, so that the next look at all of them is far away.
            self._grow(ids, (live + events) * 2, exact=True)
        self._enter_ids(ids, counter, horizon_ms=horizon_ms)

    def _enter_ids(self, ids: str, counter: int, *, horizon_ms: int) -> None:
        """Forget the ids before the horizon, and build the hash table of the others."""
        table = ids.replace("ids", "table")
        self.arrays[table] = np.zeros(_power_of_two(len(self.arrays[ids]) * 2), np.int32)
        self.arrays["scalars"][counter] = kernels.keep_ids(
            self.arrays[ids], self._scalar(counter), self.arrays[table], horizon_ms
        )


def _empty(name: str, size: int) -> npt.NDArray[Any]:
    # Zeros come from the system a page at a time, as they are written: room that is not used takes no memory.
    array = np.zeros(size, kernels.DTYPES.get(name, np.dtype(np.int64)))
    if name == "tallies":
        array["first_exposure_ms"] = FOREVER
        array["last_exposure_ms"] = NEVER
    return array


def _power_of_two(n: int) -> int:
    return 1 << max(4, (n - 1).bit_length())


def _read_moments(cells: Int64, keys: list[MetricKey], tables: dict[str, dict[MetricKey, Any]]) -> None:
    for at in np.flatnonzero(cells[:, 0]).tolist():
        n, *sums = cells[at].tolist()
        wide = list(map(_wide, sums[::2], sums[1::2]))
        tables["moments"][keys[at]] = (n, *wide[:2])
        if wide[2:]:
            tables["products"][keys[at]] = tuple(wide[2:])


def _read_events(cells: Int64, keys: list[MetricKey], tables: dict[str, dict[MetricKey, Any]]) -> None:
    for at in np.flatnonzero(cells[:, 1]).tolist():
        tables["events"][keys[at]] = tuple(cells[at].tolist())


def _read_histograms(cells: Int64, keys: list[MetricKey], tables: dict[str, dict[MetricKey, Any]]) -> None:
    filled, bins = np.nonzero(cells)
    for at, place, units in zip(filled.tolist(), bins.tolist(), cells[filled, bins].tolist(), strict=True):
        tables["histograms"].setdefault(keys[at], {})[place] = units


_READERS = {
    kernels.MOMENTS: _read_moments,
    kernels.PRODUCTS: _read_moments,
    kernels.EVENTS: _read_events,
    kernels.HISTOGRAM: _read_histograms,
}


def _wide(low: int, high: int) -> int:
    """The signed 128-bit number of two int64 words."""
    return (high << 64) + (low & (2**64 - 1))
