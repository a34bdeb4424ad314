"""The hot path of the fold: compiled loops over columns.

Plain loops over arrays, compiled by numba (cached, without the GIL). What the loops compute is defined in
docs/semantics.md; `stream_xp.engine.state` owns the arrays and sees that they are large enough before a call.
All hashes, times and counts are int64; sums and sums of squares are 128-bit in two int64 words.

One file, long as it is: a loop has compiled into it what it calls, and the cache of numba notices a change of the
loop's own file only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Int64 = npt.NDArray[np.int64]

NEVER = -(2**62)
OVERFLOW = 2**61
"""A unit's sum beyond this would let its square leave 128 bits; MAX_STEPS makes it take 2**21 rewards."""

# Where the scalars stand in State.scalars.
(
    LOG_EXPOSURES,
    LOG_REWARDS,
    WATERMARK,
    ROWS,
    VALUES,
    DUE,
    WAITING,
    FREE,
    POOL,
    IDS_EXPOSURES,
    IDS_REWARDS,
    FAULT,
    FRESH,
) = range(13)
SCALARS = 13

# Where the outcomes stand in State.exposure_outcomes and reward_outcomes; the order of domain.statistics.Outcomes.
(
    READ,
    COUNTED,
    DUPLICATE,
    LATE,
    UNATTRIBUTED,
    UNKNOWN_EXPERIMENT,
    INACTIVE_EXPERIMENT,
    CROSSOVER,
    DEAD_LETTERED,
    WAITS,
    OVER_LIMIT,
) = range(11)
OUTCOMES = 11

AGG_ANY, AGG_COUNT, AGG_SUM, AGG_MAX, AGG_LAST, AGG_FIRST = range(6)
VALUE_WIDTH = (1, 1, 1, 2, 3, 1)
"""int64 words of a unit's value per aggregation.

Any 0/1; how many are not 0; sum; max and count; last, its time and its offset + 1; first + 1, 0 if there is none.
"""

MOMENTS, PRODUCTS, EVENTS, HISTOGRAM = range(4)
CELL_WORDS = (5, 11, 2)
"""int64 words of a cell per kind: n and the 128-bit sums of y, y * y; and of x, x * x, x * y; units and events.

A histogram has a word for each of its bins.
"""

AT_ONCE = -1
NO_STAGE = 2**31 - 1
"""Stages beside those of windows: of what counts as soon as it is settled, of what has no cells of its own."""


SLOT = np.dtype(
    [
        ("width", "i8"),
        ("cells", "i8"),
        ("arms", "i8"),
        ("covariate", "i8"),
        ("metric_start", "i8"),
        ("stage_start", "i8"),
        ("interval_start", "i8"),
        ("dimension_start", "i8"),
        ("epoch_start", "i8"),
    ]
)
METRIC = np.dtype(
    [
        ("aggregation", "i8"),
        ("scale", "f8"),
        ("max_steps", "f8"),
        ("least", "f8"),
        ("from_ms", "i8"),
        ("window_ms", "i8"),
        ("word", "i8"),
        ("kind", "i8"),
        ("words", "i8"),
        ("cells", "i8"),
        ("stage", "i8"),
        ("other", "i8"),
        ("counts_for", "i8"),
    ]
)
STAGE = np.dtype([("window_ms", "i8"), ("metric_start", "i8")])
INTERVAL = np.dtype([("from_ms", "i8"), ("until_ms", "i8")])
DIMENSION = np.dtype([("size", "i8"), ("cell", "i8")])
EPOCH = np.dtype([("units", "i8"), ("moments", "i8")])
LISTENER = np.dtype([("slot", "i8"), ("metric", "i8")])


class Layout(NamedTuple):
    """The registry as arrays; a ``*_start`` column spans from its row to the next, so those tables end in a spare row.

    Attributes:
        slots: words of values per unit, segment cells, arms, the row of its covariate among the metrics (-1 if it
            has none), and where its rows in the other tables start.
        metrics: of all slots in turn, each with its denominators, buckets of age and covariate behind its metrics.
            Rewards count from `from_ms` after t0 on, before `window_ms` after it. `word` is the place in a unit's
            values, `cells` where the cells of `words` words each begin in an epoch's block, `stage` what it matures
            in, `other` the row of the second value of `PRODUCTS`, `counts_for` the row that refusals are counted in.
        stages: the distinct ends of windows and buckets of a slot, ascending; `stage_metric` lists what matures in
            each.
        intervals: log times in which a slot is in force.
        dimensions: registered segments of a slot, with the first cell of each.
        epochs: weight epochs of a slot, with their base in the units and moments pools (in words).
        listener_start: per event code, the first of the `listeners` it reaches.
    """

    slots: npt.NDArray[np.void]
    metrics: npt.NDArray[np.void]
    stages: npt.NDArray[np.void]
    stage_metric: Int64
    intervals: npt.NDArray[np.void]
    dimensions: npt.NDArray[np.void]
    epochs: npt.NDArray[np.void]
    listener_start: Int64
    listeners: npt.NDArray[np.void]


ROW = np.dtype(
    [
        ("unit0", "i8"),
        ("unit1", "i8"),
        ("t0_low", "u4"),
        ("values", "u4"),
        ("exposures", "u4"),
        ("segment", "i4"),
        ("t0_high", "i2"),
        ("slot", "u2"),
        ("epoch", "u2"),
        ("arm", "u1"),
        ("stage", "u1"),
    ]
)
CROSSED = 255
"""The arm of a unit that was seen in two."""
MAX_SLOTS = MAX_EPOCHS = 2**16
MAX_WORDS = 2**32
MAX_ROWS = 2**31 - 2
"""What the fields of a row, and of the hash table of rows, can hold."""
TIMED = np.dtype([("ms", "i8"), ("at", "i4")])
REWARD = np.dtype(
    [
        ("unit0", "i8"),
        ("unit1", "i8"),
        ("offset", "i8"),
        ("log_ms", "i8"),
        ("time_ms", "i8"),
        ("value", "f8"),
        ("event", "i4"),
        ("experiment", "i4"),
    ]
)
IDENTITY = np.dtype([("id0", "i8"), ("id1", "i8"), ("ms", "i8")])
TALLY = np.dtype(
    [
        ("crossover_units", "i8"),
        ("first_exposure_ms", "i8"),
        ("dirty", "i8"),
        ("units", "i8"),
        ("rows", "i8"),
        ("over_limit", "i8"),
        ("last_exposure_ms", "i8"),
    ]
)

DTYPES: dict[str, np.dtype[Any]] = {
    "lookup": np.dtype(np.int32),
    "rows": ROW,
    "due": TIMED,
    "fresh": TIMED,
    "waiting": TIMED,
    "pool": REWARD,
    "exposure_ids": IDENTITY,
    "reward_ids": IDENTITY,
    "exposure_table": np.dtype(np.int32),
    "reward_table": np.dtype(np.int32),
    "tallies": TALLY,
}
"""Types of the arrays of State; int64 where none is named."""


class State(NamedTuple):
    """The arrays of one partition's state.

    Attributes:
        scalars: see the constants above.
        lookup: open addressing, row + 1 of a (slot, unit); 0 is empty.
        rows: (slot, unit) pairs in order of first sight, 40 bytes each. `values` is where the unit's words begin.
        values: the quantised values of all rows, `slots.width` words each.
        fresh: heap of units that are not settled, by the time of their first exposure; `at` is their row.
        due: heap of when the other rows mature next. No unit does before it is settled, so none is in both.
        waiting: heap of rewards by event time; `at` is their place in `pool`. Unused places of the pool are in
            `free` and have the event time NEVER.
        exposure_ids, reward_ids: ids seen with their event time, in order of first sight.
        exposure_table, reward_table: open addressing, place + 1 of an id; 0 is empty.
        units: units per (slot, epoch, arm, segment cell).
        unsettled: those of them that are not settled, at the same places.
        moments: the words of a cell (CELL_WORDS) per (slot, epoch, metric, arm, segment cell).
        tallies: per slot; `units` is how many there have been, `rows` how many of them are held, `over_limit` how
            many exposures were refused because there were too many. out_of_range: per row of `Layout.metrics`.
    """

    scalars: Int64
    lookup: npt.NDArray[np.int32]
    rows: npt.NDArray[np.void]
    values: Int64
    due: npt.NDArray[np.void]
    fresh: npt.NDArray[np.void]
    waiting: npt.NDArray[np.void]
    free: Int64
    pool: npt.NDArray[np.void]
    exposure_ids: npt.NDArray[np.void]
    reward_ids: npt.NDArray[np.void]
    exposure_table: npt.NDArray[np.int32]
    reward_table: npt.NDArray[np.int32]
    units: Int64
    unsettled: Int64
    moments: Int64
    tallies: npt.NDArray[np.void]
    out_of_range: Int64
    exposure_outcomes: Int64
    reward_outcomes: Int64


def _compiled(function: Any) -> Any:
    # No kernel allocates, so reference counts are left out (_nrt=False): counting the arrays of a NamedTuple at
    # every access took two thirds of the time. Inlining spares passing them, 25 arrays to a call.
    return njit(cache=True, nogil=True, boundscheck=False, forceinline=True, _nrt=False)(function)


# --- exact 128-bit sums ------------------------------------------------------------------------------------


@_compiled
def _below(a, b):  # unsigned a < b
    sign = np.int64(-(2**63))
    return (a ^ sign) < (b ^ sign)


@_compiled
def _add(pool, at, low, high):
    """Add the 128-bit number (low, high) to the two words at `at`."""
    total = pool[at] + low
    pool[at + 1] += high + np.int64(_below(total, low))
    pool[at] = total


@_compiled
def _add_moments(moments, at, y, sign):
    """Add sign * (1, y, y * y) to the five words (n, sum low, high, squares low, high) at `at`; |y| < 2**62."""
    moments[at] += sign
    signed = y * sign
    _add(moments, at + 1, signed, signed >> np.int64(63))
    a = np.abs(y)
    a1 = a >> np.int64(31)
    a0 = a & np.int64(2**31 - 1)
    _add_signed(moments, at + 3, (a1 * a1) << np.int64(62), (a1 * a1) >> np.int64(2), sign)
    cross = a1 * a0
    _add_signed(moments, at + 3, cross << np.int64(32), cross >> np.int64(32), sign)
    _add_signed(moments, at + 3, a0 * a0, np.int64(0), sign)


@_compiled
def _add_product(pool, at, x, y, sign):
    """Add sign * x * y to the two words at `at`; |x|, |y| < 2**62."""
    if (x < 0) != (y < 0):
        sign = -sign
    a = np.abs(x)
    a1 = a >> np.int64(31)
    a0 = a & np.int64(2**31 - 1)
    b = np.abs(y)
    b1 = b >> np.int64(31)
    b0 = b & np.int64(2**31 - 1)
    _add_signed(pool, at, (a1 * b1) << np.int64(62), (a1 * b1) >> np.int64(2), sign)
    # Each of the two is below 2**62, so their sum still has its sign bit clear.
    cross = a1 * b0 + a0 * b1
    _add_signed(pool, at, cross << np.int64(31), cross >> np.int64(33), sign)
    _add_signed(pool, at, a0 * b0, np.int64(0), sign)


@_compiled
def _add_products(moments, at, x, y, sign):
    """Add sign * (x, x * x, x * y) to the six words at `at`."""
    signed = x * sign
    _add(moments, at, signed, signed >> np.int64(63))
    _add_product(moments, at + 2, x, x, sign)
    _add_product(moments, at + 4, x, y, sign)


@_compiled
def _add_signed(pool, at, low, high, sign):
    if sign > 0:
        _add(pool, at, low, high)
    else:
        negative = -low
        _add(pool, at, negative, ~high + np.int64(low == 0))


# --- a binary heap of (ms, at), smallest time first -----------------------------------------------------


@_compiled
def _push(heap, n, ms, at):
    """Add an entry to a heap of n. A reward comes after all of its time: it has the largest offset so far."""
    i = n
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent].ms <= ms:
            break
        heap[i].ms = heap[parent].ms
        heap[i].at = heap[parent].at
        i = parent
    heap[i].ms = ms
    heap[i].at = at


@_compiled
def _before(heap, i, ms, at, pool):
    """Whether entry i comes before (ms, at); rewards of one time by their offsets, rows as they come."""
    if pool is None or heap[i].ms != ms:
        return heap[i].ms < ms
    return pool[heap[i].at].offset < pool[at].offset


@_compiled
def _pop(heap, n, pool):
    """Remove the top of a heap of n; the caller has read it and now counts n - 1. `pool`: of rewards, else None."""
    last = n - 1
    ms = heap[last].ms
    at = heap[last].at
    i = 0
    while True:
        child = 2 * i + 1
        if child >= last:
            break
        if child + 1 < last and _before(heap, child + 1, heap[child].ms, heap[child].at, pool):
            child += 1
        if not _before(heap, child, ms, at, pool):
            break
        heap[i].ms = heap[child].ms
        heap[i].at = heap[child].at
        i = child
    heap[i].ms = ms
    heap[i].at = at


# --- open addressing -----------------------------------------------------------------------------------------


@_compiled
def _home(size, slot, u0):
    """The cell of a table of `size` < 2**31 cells at which the search for (slot, unit) begins."""
    mixed = u0 + slot * np.int64(-7046029254386353131)
    return (((mixed >> np.int64(32)) & np.int64(0xFFFFFFFF)) * size) >> np.int64(32)


@_compiled
def _find(state, slot, u0, u1):
    """The lookup cell of (slot, unit): it holds row + 1, or 0 where the row would go."""
    size = state.lookup.shape[0]
    at = _home(size, slot, u0)
    while True:
        row = state.lookup[at] - 1
        if row < 0:
            return at
        if state.rows[row].unit0 == u0 and state.rows[row].unit1 == u1 and state.rows[row].slot == slot:
            return at
        at = at + 1 if at + 1 < size else 0


@_compiled
def enter_rows(lookup, rows, n):
    """Enter the first n rows into an empty lookup."""
    size = lookup.shape[0]
    for row in range(n):
        at = _home(size, np.int64(rows[row].slot), rows[row].unit0)
        while lookup[at] != 0:
            at = at + 1 if at + 1 < size else 0
        lookup[at] = row + 1


@_compiled
def _t0_ms(state, row):
    """Event time of the unit's first exposure."""
    return (np.int64(state.rows[row].t0_high) << np.int64(32)) | np.int64(state.rows[row].t0_low)


@_compiled
def _set_t0_ms(state, row, time_ms):
    state.rows[row].t0_low = time_ms & np.int64(0xFFFFFFFF)
    state.rows[row].t0_high = time_ms >> np.int64(32)


@_compiled
def _seen(table, ids, scalars, counter, id0, id1, time_ms, log_ms, lateness_ms):
    """Whether the id is a duplicate now; if not, remember it. An entry ends at its event time + lateness."""
    mask = table.shape[0] - 1
    cell = id0 & mask
    while table[cell] != 0:
        at = table[cell] - 1
        if ids[at].id0 == id0 and ids[at].id1 == id1:
            if ids[at].ms + lateness_ms >= log_ms:
                return True
            ids[at].ms = time_ms
            return False
        cell = (cell + 1) & mask
    at = scalars[counter]
    ids[at].id0 = id0
    ids[at].id1 = id1
    ids[at].ms = time_ms
    table[cell] = at + 1
    scalars[counter] += 1
    return False


@_compiled
def keep_ids(ids, n, table, horizon_ms):
    """Move the first n ids that can still make a duplicate (event time >= horizon) together; how many.

    They are entered into `table`, which must be empty.
    """
    mask = table.shape[0] - 1
    kept = 0
    for i in range(n):
        if ids[i].ms < horizon_ms:
            continue
        ids[kept].id0 = ids[i].id0
        ids[kept].id1 = ids[i].id1
        ids[kept].ms = ids[i].ms
        cell = ids[kept].id0 & mask
        while table[cell] != 0:
            cell = (cell + 1) & mask
        kept += 1
        table[cell] = kept
    return kept


# --- what a unit contributes -----------------------------------------------------------------------------------


@_compiled
def _cells(layout, slot, segment, cells):
    """Fill `cells` with the segment cells of a unit; how many. Cell 0 holds every unit."""
    cells[0] = 0
    n = 1
    first = layout.slots[slot].dimension_start
    for d in range(layout.slots[slot + 1].dimension_start - 1, first - 1, -1):
        size = layout.dimensions[d].size
        cells[n] = layout.dimensions[d].cell + segment % size
        segment //= size
        n += 1
    return n


@_compiled
def _unit_cells(layout, state, row):
    """Where the units of the unit's epoch and arm begin."""
    slot = state.rows[row].slot
    base = layout.epochs[layout.slots[slot].epoch_start + state.rows[row].epoch].units
    return base + state.rows[row].arm * layout.slots[slot].cells


@_compiled
def _count_unit(layout, state, row, lateness_ms, cells, sign):
    """Add a unit to, or take it from, the units of its arm, epoch and segments."""
    slot = state.rows[row].slot
    base = _unit_cells(layout, state, row)
    unsettled = sign * np.int64(_t0_ms(state, row) + lateness_ms >= state.scalars[WATERMARK])
    for c in range(_cells(layout, slot, state.rows[row].segment, cells)):
        state.units[base + cells[c]] += sign
        state.unsettled[base + cells[c]] += unsettled
    state.tallies[slot].dirty = 1


@_compiled
def _unit_value(layout, state, row, metric):
    """A unit's value of a metric; 0 if there is none."""
    word = state.rows[row].values + layout.metrics[metric].word
    if layout.metrics[metric].aggregation == AGG_MAX and state.values[word + 1] == 0:
        return np.int64(0)
    return state.values[word]


@_compiled
def _latency(layout, state, row, metric):
    """A unit's value of a latency; -1 if there is none."""
    word = state.rows[row].values + layout.metrics[metric].word
    aggregation = layout.metrics[metric].aggregation
    if aggregation == AGG_FIRST:
        return state.values[word] - 1
    if state.values[word + (1 if aggregation == AGG_MAX else 2)] == 0:
        return np.int64(-1)
    return state.values[word]


@_compiled
def _bin(y):
    """The histogram bin of y >= 0: one to a step below 64, then 32 to each doubling."""
    doublings = np.int64(0)
    while y >> doublings >= 64:
        doublings += 1
    return 32 * doublings + (y >> doublings)


@_compiled
def _first_cell(layout, state, row, metric):
    """Where a metric's cells of the unit's epoch and arm begin."""
    slot = state.rows[row].slot
    base = layout.epochs[layout.slots[slot].epoch_start + state.rows[row].epoch].moments
    base += layout.metrics[metric].cells
    return base + state.rows[row].arm * layout.slots[slot].cells * layout.metrics[metric].words


@_compiled
def _count_metric(layout, state, row, metric, cells, n, sign):
    """Add what a unit contributes to a metric to, or take it from, its `n` segment cells."""
    base = _first_cell(layout, state, row, metric)
    words = layout.metrics[metric].words
    kind = layout.metrics[metric].kind
    if kind == HISTOGRAM:
        latency = _latency(layout, state, row, metric)
        if latency >= 0:
            for c in range(n):
                state.moments[base + cells[c] * words + _bin(latency)] += sign
        return
    y = _unit_value(layout, state, row, metric)
    for c in range(n):
        at = base + cells[c] * words
        if kind == EVENTS:
            state.moments[at] += sign * np.int64(y > 0)
            state.moments[at + 1] += sign * y
            continue
        _add_moments(state.moments, at, y, sign)
        if kind == PRODUCTS:
            x = _unit_value(layout, state, row, layout.metrics[metric].other)
            _add_products(state.moments, at + 5, x, y, sign)


# --- exposures ---------------------------------------------------------------------------------------------------


@_compiled
def _await_maturity(layout, state, row, lateness_ms):
    """Note when the unit matures next, if it does."""
    slot = state.rows[row].slot
    stage = layout.slots[slot].stage_start + state.rows[row].stage
    if stage == layout.slots[slot + 1].stage_start:
        return
    due_ms = _t0_ms(state, row) + layout.stages[stage].window_ms + lateness_ms
    _push(state.due, state.scalars[DUE], due_ms, row)
    state.scalars[DUE] += 1


@_compiled
def _await_last_exposures(state, row):
    """Note that an exposure before the unit's first may still come: whoever counts the unit is at its t0."""
    _push(state.fresh, state.scalars[FRESH], _t0_ms(state, row), row)
    state.scalars[FRESH] += 1


@_compiled
def _new_row(layout, state, at, slot, u0, u1, arm, epoch, segment, time_ms):
    row = state.scalars[ROWS]
    state.scalars[ROWS] += 1
    state.lookup[at] = row + 1
    state.rows[row].unit0 = u0
    state.rows[row].unit1 = u1
    state.rows[row].slot = slot
    state.rows[row].arm = arm
    state.rows[row].epoch = epoch
    state.rows[row].segment = segment
    state.rows[row].stage = 0
    state.rows[row].exposures = 1
    _set_t0_ms(state, row, time_ms)
    state.rows[row].values = state.scalars[VALUES]
    width = layout.slots[slot].width
    for word in range(width):
        state.values[state.scalars[VALUES] + word] = 0
    state.scalars[VALUES] += width
    return row


@_compiled
def _cross_over(layout, state, row, lateness_ms, cells):
    """Take back all that the unit has contributed."""
    slot = state.rows[row].slot
    _count_unit(layout, state, row, lateness_ms, cells, -1)
    n = _cells(layout, slot, state.rows[row].segment, cells)
    for metric in range(layout.slots[slot].metric_start, layout.slots[slot + 1].metric_start):
        # Stages that are over, and all that counts at once.
        if layout.metrics[metric].stage < state.rows[row].stage:
            _count_metric(layout, state, row, metric, cells, n, -1)
    state.rows[row].arm = CROSSED
    state.tallies[slot].crossover_units += 1
    state.exposure_outcomes[COUNTED] -= state.rows[row].exposures
    state.exposure_outcomes[CROSSOVER] += state.rows[row].exposures


@_compiled
def _keep_covariate(layout, state, row, covariate):
    slot = state.rows[row].slot
    if layout.slots[slot].covariate >= 0:
        word = layout.metrics[layout.slots[slot].covariate].word
        state.values[state.rows[row].values + word] = covariate


@_compiled
def _expose(
    layout, state, cells, slot, u0, u1, arm, epoch, segment, covariate, time_ms, lateness_ms, max_units
):
    at = _find(state, slot, u0, u1)
    row = state.lookup[at] - 1
    if row < 0 and state.tallies[slot].units >= max_units:
        state.tallies[slot].over_limit += 1
        state.tallies[slot].dirty = 1
        state.exposure_outcomes[OVER_LIMIT] += 1
        return
    state.tallies[slot].last_exposure_ms = max(state.tallies[slot].last_exposure_ms, time_ms)
    if time_ms < state.tallies[slot].first_exposure_ms:
        state.tallies[slot].first_exposure_ms = time_ms
        state.tallies[slot].dirty = 1
    if row < 0:
        row = _new_row(layout, state, at, slot, u0, u1, arm, epoch, segment, time_ms)
        _keep_covariate(layout, state, row, covariate)
        _count_unit(layout, state, row, lateness_ms, cells, 1)
        _await_last_exposures(state, row)
        state.tallies[slot].units += 1
        state.tallies[slot].rows += 1
        state.exposure_outcomes[COUNTED] += 1
        return
    if state.rows[row].arm != CROSSED and state.rows[row].arm != arm:
        _cross_over(layout, state, row, lateness_ms, cells)
    if state.rows[row].arm != CROSSED and time_ms < _t0_ms(state, row):
        # Nothing but the unit itself has been counted yet. This exposure was admitted, so time_ms + lateness >=
        # watermark. Every event that the unit has had settled happened at or after the old t0 > time_ms, and was
        # settled when its time + lateness was below the watermark: there is none. A stage that is over ended at
        # t0 + window + lateness <= watermark: there is none either. Nor is the unit settled, before or after.
        _count_unit(layout, state, row, lateness_ms, cells, -1)
        state.rows[row].epoch = epoch
        state.rows[row].segment = segment
        _keep_covariate(layout, state, row, covariate)
        _count_unit(layout, state, row, lateness_ms, cells, 1)
    if time_ms < _t0_ms(state, row):
        _set_t0_ms(state, row, time_ms)
        _await_last_exposures(state, row)
    state.rows[row].exposures += 1
    if state.rows[row].arm == CROSSED:
        state.exposure_outcomes[CROSSOVER] += 1
    else:
        state.exposure_outcomes[COUNTED] += 1


@_compiled
def fold_exposures(
    layout,
    state,
    offset,
    log_ms,
    time_ms,
    unit,
    event_id,
    slot,
    arm,
    epoch,
    segment,
    covariate,
    lateness_ms,
    max_units,
    cells,
    behind,
):
    """Apply exposures in offset order; `behind` gets the offsets refused by the watermark alone; how many."""
    scalars = state.scalars
    outcomes = state.exposure_outcomes
    refused = 0
    for i in range(offset.shape[0]):
        outcomes[READ] += 1
        scalars[LOG_EXPOSURES] = log_ms[i]
        if slot[i] < 0:
            outcomes[
                DEAD_LETTERED
                if slot[i] == -3
                else INACTIVE_EXPERIMENT
                if slot[i] == -2
                else UNKNOWN_EXPERIMENT
            ] += 1
        elif time_ms[i] + lateness_ms < log_ms[i]:
            outcomes[LATE] += 1
        elif time_ms[i] + lateness_ms < scalars[WATERMARK]:
            outcomes[LATE] += 1
            behind[refused] = offset[i]
            refused += 1
        elif _seen(
            state.exposure_table,
            state.exposure_ids,
            scalars,
            IDS_EXPOSURES,
            event_id[i, 0],
            event_id[i, 1],
            time_ms[i],
            log_ms[i],
            lateness_ms,
        ):
            outcomes[DUPLICATE] += 1
        else:
            _expose(
                layout,
                state,
                cells,
                slot[i],
                unit[i, 0],
                unit[i, 1],
                arm[i],
                epoch[i],
                segment[i],
                covariate[i],
                time_ms[i],
                lateness_ms,
                max_units,
            )
    return refused


# --- rewards -----------------------------------------------------------------------------------------------------


@_compiled
def _keep_waiting(state, unit, i, offset, log_ms, time_ms, event, experiment, value):
    scalars = state.scalars
    if scalars[FREE] > 0:
        scalars[FREE] -= 1
        at = state.free[scalars[FREE]]
    else:
        at = scalars[POOL]
        scalars[POOL] += 1
    state.pool[at].unit0 = unit[i, 0]
    state.pool[at].unit1 = unit[i, 1]
    state.pool[at].offset = offset[i]
    state.pool[at].log_ms = log_ms[i]
    state.pool[at].time_ms = time_ms[i]
    state.pool[at].event = event[i]
    state.pool[at].experiment = experiment[i]
    state.pool[at].value = value[i]
    _push(state.waiting, scalars[WAITING], time_ms[i], at)
    scalars[WAITING] += 1


@_compiled
def fold_rewards(
    layout, state, offset, log_ms, time_ms, unit, event_id, event, experiment, value, lateness_ms, behind
):
    """Take in rewards in offset order: they wait until the watermark passes; `behind` as in fold_exposures."""
    scalars = state.scalars
    outcomes = state.reward_outcomes
    refused = 0
    for i in range(offset.shape[0]):
        outcomes[READ] += 1
        scalars[LOG_REWARDS] = log_ms[i]
        if event[i] == -3:
            outcomes[DEAD_LETTERED] += 1
        elif event[i] == -11:
            outcomes[UNKNOWN_EXPERIMENT] += 1
        elif event[i] == -12:
            outcomes[INACTIVE_EXPERIMENT] += 1
        elif event[i] < 0:
            outcomes[UNATTRIBUTED] += 1
        elif time_ms[i] + lateness_ms < log_ms[i]:
            outcomes[LATE] += 1
        elif time_ms[i] + lateness_ms < scalars[WATERMARK]:
            outcomes[LATE] += 1
            behind[refused] = offset[i]
            refused += 1
        elif _seen(
            state.reward_table,
            state.reward_ids,
            scalars,
            IDS_REWARDS,
            event_id[i, 0],
            event_id[i, 1],
            time_ms[i],
            log_ms[i],
            lateness_ms,
        ):
            outcomes[DUPLICATE] += 1
        else:
            outcomes[WAITS] += 1
            _keep_waiting(state, unit, i, offset, log_ms, time_ms, event, experiment, value)
    return refused


@_compiled
def _in_force(layout, slot, log_ms):
    for i in range(layout.slots[slot].interval_start, layout.slots[slot + 1].interval_start):
        if layout.intervals[i].from_ms <= log_ms < layout.intervals[i].until_ms:
            return True
    return False


@_compiled
def _fold_value(layout, state, row, metric, value, time_ms, offset):
    """Fold one reward into the unit's value of one metric; the caller has checked window and bound."""
    word = state.rows[row].values + layout.metrics[metric].word
    aggregation = layout.metrics[metric].aggregation
    values = state.values
    if aggregation == AGG_ANY:
        if value != 0.0:
            values[word] = 1
        return
    if aggregation == AGG_COUNT:
        values[word] += np.int64(value != 0.0)
        return
    y = np.int64(np.rint(value / layout.metrics[metric].scale))
    if aggregation == AGG_SUM:
        values[word] += y
        if abs(values[word]) > OVERFLOW:
            state.scalars[FAULT] = 1
    elif aggregation == AGG_MAX:
        if values[word + 1] == 0 or y > values[word]:
            values[word] = y
        values[word + 1] += 1
    elif (
        values[word + 2] == 0
        or time_ms > values[word + 1]
        or (time_ms == values[word + 1] and offset >= values[word + 2])
    ):
        values[word] = y
        values[word + 1] = time_ms
        values[word + 2] = offset + 1


@_compiled
def _enter_event(layout, state, row, metric, value, cells):
    """Let an event count at once, a latency's only if it is the unit's first one; rewards come in order of time."""
    slot = state.rows[row].slot
    word = state.rows[row].values + layout.metrics[metric].word
    if state.rows[row].arm == CROSSED:
        return
    before = state.values[word]
    if layout.metrics[metric].kind == EVENTS:
        if value == 0.0:
            return
        state.values[word] += 1
        place, more = np.int64(1), np.int64(before == 0)
    else:
        if before != 0:
            return
        y = np.int64(np.rint(value / layout.metrics[metric].scale))
        state.values[word] = y + 1
        place, more = _bin(y), np.int64(0)
    base = _first_cell(layout, state, row, metric)
    for c in range(_cells(layout, slot, state.rows[row].segment, cells)):
        at = base + cells[c] * layout.metrics[metric].words
        state.moments[at] += more
        state.moments[at + place] += 1
    state.tallies[slot].dirty = 1


@_compiled
def _attribute(layout, state, at, time_ms, cells):
    """Give a reward to every listening metric in whose window it falls; whether there was one."""
    event = state.pool[at].event
    only = state.pool[at].experiment
    value = state.pool[at].value
    counted = False
    for i in range(layout.listener_start[event], layout.listener_start[event + 1]):
        slot = layout.listeners[i].slot
        if (only >= 0 and slot != only) or not _in_force(layout, slot, state.pool[at].log_ms):
            continue
        row = state.lookup[_find(state, slot, state.pool[at].unit0, state.pool[at].unit1)] - 1
        metric = layout.listeners[i].metric
        if (
            row < 0
            or time_ms < _t0_ms(state, row) + layout.metrics[metric].from_ms
            or time_ms >= _t0_ms(state, row) + layout.metrics[metric].window_ms
        ):
            continue
        counted = True
        if layout.metrics[metric].aggregation > AGG_COUNT and (
            value < layout.metrics[metric].least
            or abs(np.rint(value / layout.metrics[metric].scale)) > layout.metrics[metric].max_steps
        ):
            state.out_of_range[layout.metrics[metric].counts_for] += 1
            state.tallies[slot].dirty = 1
        elif layout.metrics[metric].stage == AT_ONCE:
            _enter_event(layout, state, row, metric, value, cells)
        else:
            _fold_value(layout, state, row, metric, value, time_ms, state.pool[at].offset)
    return counted


@_compiled
def _settle_rewards(layout, state, watermark_ms, lateness_ms, cells):
    """Attribute every reward that no admissible exposure can precede any more, in order of time, then offset."""
    scalars = state.scalars
    while scalars[WAITING] > 0 and state.waiting[0].ms + lateness_ms < watermark_ms:
        time_ms = state.waiting[0].ms
        at = state.waiting[0].at
        _pop(state.waiting, scalars[WAITING], state.pool)
        scalars[WAITING] -= 1
        state.reward_outcomes[WAITS] -= 1
        state.reward_outcomes[COUNTED if _attribute(layout, state, at, time_ms, cells) else UNATTRIBUTED] += 1
        state.pool[at].time_ms = NEVER
        state.free[scalars[FREE]] = at
        scalars[FREE] += 1


@_compiled
def _settle_units(layout, state, watermark_ms, lateness_ms, cells):
    """Let every unit be settled whose first exposure no admissible one can precede any more; then it can mature."""
    scalars = state.scalars
    while scalars[FRESH] > 0 and state.fresh[0].ms + lateness_ms < watermark_ms:
        t0_ms = state.fresh[0].ms
        row = state.fresh[0].at
        _pop(state.fresh, scalars[FRESH], None)
        scalars[FRESH] -= 1
        # An entry that no longer fits was left behind when an earlier exposure moved t0.
        if t0_ms != _t0_ms(state, row):
            continue
        _await_maturity(layout, state, row, lateness_ms)
        if state.rows[row].arm == CROSSED:
            continue
        slot = state.rows[row].slot
        base = _unit_cells(layout, state, row)
        for c in range(_cells(layout, slot, state.rows[row].segment, cells)):
            state.unsettled[base + cells[c]] -= 1
        state.tallies[slot].dirty = 1


@_compiled
def _mature_units(layout, state, watermark_ms, lateness_ms, cells):
    """Let every unit whose window is over enter the moments, once for each stage."""
    scalars = state.scalars
    while scalars[DUE] > 0 and state.due[0].ms <= watermark_ms:
        row = state.due[0].at
        _pop(state.due, scalars[DUE], None)
        scalars[DUE] -= 1
        slot = state.rows[row].slot
        stage = layout.slots[slot].stage_start + state.rows[row].stage
        if state.rows[row].arm != CROSSED:
            n = _cells(layout, slot, state.rows[row].segment, cells)
            for m in range(layout.stages[stage].metric_start, layout.stages[stage + 1].metric_start):
                _count_metric(layout, state, row, layout.stage_metric[m], cells, n, 1)
            state.tallies[slot].dirty = 1
        state.rows[row].stage += 1
        _await_maturity(layout, state, row, lateness_ms)


@_compiled
def advance(layout, state, watermark_ms, lateness_ms, cells):
    """Move the watermark on: settle units and rewards, then let units mature."""
    if watermark_ms <= state.scalars[WATERMARK]:
        return
    state.scalars[WATERMARK] = watermark_ms
    _settle_units(layout, state, watermark_ms, lateness_ms, cells)
    _settle_rewards(layout, state, watermark_ms, lateness_ms, cells)
    _mature_units(layout, state, watermark_ms, lateness_ms, cells)


# --- rows that nothing can change any more -------------------------------------------------------------------------


@_compiled
def release(layout, state, ended):
    """Drop the rows of the slots that `ended` says, and move the others together, in the same order.

    The hash table and the queue of what matures are to be built again.
    """
    scalars = state.scalars
    kept = 0
    words = 0
    for row in range(scalars[ROWS]):
        slot = state.rows[row].slot
        if ended[slot] != 0:
            state.tallies[slot].rows -= 1
            continue
        first = state.rows[row].values
        state.rows[kept] = state.rows[row]
        state.rows[kept].values = words
        for word in range(layout.slots[slot].width):
            state.values[words + word] = state.values[first + word]
        words += layout.slots[slot].width
        kept += 1
    scalars[ROWS] = kept
    scalars[VALUES] = words


# --- what a snapshot leaves out ------------------------------------------------------------------------------------


@_compiled
def await_units(layout, state, lateness_ms, cells):
    """Note of every row when it is settled, and of those that are when they mature next; count those that are not.

    None was counted before.
    """
    state.scalars[FRESH] = 0
    state.scalars[DUE] = 0
    for row in range(state.scalars[ROWS]):
        if _t0_ms(state, row) + lateness_ms < state.scalars[WATERMARK]:
            _await_maturity(layout, state, row, lateness_ms)
            continue
        _await_last_exposures(state, row)
        if state.rows[row].arm == CROSSED:
            continue
        base = _unit_cells(layout, state, row)
        for c in range(_cells(layout, state.rows[row].slot, state.rows[row].segment, cells)):
            state.unsettled[base + cells[c]] += 1


@_compiled
def await_settling(state):
    """Let every reward in the pool wait; all of its places are used, and none waited before."""
    state.scalars[WAITING] = 0
    state.scalars[FREE] = 0
    for at in range(state.scalars[POOL]):
        _push(state.waiting, state.scalars[WAITING], state.pool[at].time_ms, at)
        state.scalars[WAITING] += 1
