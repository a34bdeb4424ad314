"""Names the first difference between published and recomputed statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stream_xp.domain.statistics import ExperimentStatistics, Outcomes


class Mismatch(NamedTuple):
    """One value that differs; the fields that do not apply to it are None."""

    what: str
    engine: str
    oracle: str
    metric: str | None = None
    arm: str | None = None
    epoch: int | None = None
    segment: str | None = None


def first_mismatch(engine: ExperimentStatistics, oracle: ExperimentStatistics) -> Mismatch | None:
    """Return the first value in which two statistics differ, None if their canonical bytes are equal."""
    if engine.canonical() == oracle.canonical():
        return None
    fallback = Mismatch("canonical bytes", engine.digest(), oracle.digest())
    return next(_mismatches(engine, oracle), fallback)


def outcome_mismatch(topic: str, engine: Outcomes, oracle: Outcomes) -> Mismatch | None:
    """Return the first outcome of a topic's records that differs in number."""
    ours, theirs = msgspec.to_builtins(oracle), msgspec.to_builtins(engine)
    return next(_keyed(f"{topic} ", theirs, ours), None)


def _mismatches(engine: ExperimentStatistics, oracle: ExperimentStatistics) -> Iterator[Mismatch]:
    units, ours = ({row[:3]: row[3:] for row in _rows(one.units)} for one in (engine, oracle))
    for arm, epoch, segment in sorted(units.keys() | ours.keys()):
        found = (side.get((arm, epoch, segment), (0, 0)) for side in (units, ours))
        for name, theirs, own in zip(("units", "settled"), *found, strict=True):
            if theirs != own:
                yield Mismatch(name, str(theirs), str(own), arm=arm, epoch=epoch, segment=segment)
    for table in ("moments", "products", "events"):
        yield from _cell_mismatches(table, getattr(engine, table), getattr(oracle, table))
    yield from _histogram_mismatches(engine, oracle)
    for name in ("crossover_units", "over_limit", "first_exposure_ms"):
        theirs, own = getattr(engine, name), getattr(oracle, name)
        if theirs != own:
            yield Mismatch(name, str(theirs), str(own))
    for one in _keyed("", engine.out_of_range, oracle.out_of_range):
        yield Mismatch("out_of_range", one.engine, one.oracle, metric=one.what)


def _cell_mismatches(table: str, engine: tuple[Any, ...], oracle: tuple[Any, ...]) -> Iterator[Mismatch]:
    cells, ours = ({row[:4]: row[4:] for row in _rows(rows)} for rows in (engine, oracle))
    names = next(row.__struct_fields__[4:] for row in (*engine, *oracle)) if cells or ours else ()
    for key in sorted(cells.keys() | ours.keys()):
        texts = [
            " ".join(f"{name}={value}" for name, value in zip(names, side.get(key, ("0",) * 3), strict=False))
            for side in (cells, ours)
        ]
        if texts[0] != texts[1]:
            yield Mismatch(table, texts[0], texts[1], *key)


def _histogram_mismatches(engine: ExperimentStatistics, oracle: ExperimentStatistics) -> Iterator[Mismatch]:
    cells, ours = (
        {(row.metric, row.arm, row.epoch, row.segment): dict(row.bins) for row in one.histograms}
        for one in (engine, oracle)
    )
    for key in sorted(cells.keys() | ours.keys()):
        theirs, own = cells.get(key, {}), ours.get(key, {})
        for place in sorted(theirs.keys() | own.keys()):
            found = theirs.get(place, 0), own.get(place, 0)
            if found[0] != found[1]:
                yield Mismatch(f"histogram bin {place}", str(found[0]), str(found[1]), *key)


def _rows(rows: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return [msgspec.structs.astuple(row) for row in rows]


def _keyed(prefix: str, engine: Mapping[str, int], oracle: Mapping[str, int]) -> Iterator[Mismatch]:
    for name in sorted(engine.keys() | oracle.keys()):
        theirs, ours = engine.get(name, 0), oracle.get(name, 0)
        if theirs != ours:
            yield Mismatch(f"{prefix}{name}", str(theirs), str(ours))
