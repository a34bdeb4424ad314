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
    units, ours = ({row[:-1]: row[-1] for row in _rows(one.units)} for one in (engine, oracle))
    for arm, epoch, segment in sorted(units.keys() | ours.keys()):
        found = units.get((arm, epoch, segment), 0), ours.get((arm, epoch, segment), 0)
        if found[0] != found[1]:
            yield Mismatch("units", str(found[0]), str(found[1]), arm=arm, epoch=epoch, segment=segment)
    cells, ours = ({row[:4]: row[4:] for row in _rows(one.moments)} for one in (engine, oracle))
    for metric, arm, epoch, segment in sorted(cells.keys() | ours.keys()):
        n_s_q = [_moments_text(side.get((metric, arm, epoch, segment))) for side in (cells, ours)]
        if n_s_q[0] != n_s_q[1]:
            yield Mismatch("moments", n_s_q[0], n_s_q[1], metric, arm, epoch, segment)
    for name in ("crossover_units", "first_exposure_ms"):
        theirs, own = getattr(engine, name), getattr(oracle, name)
        if theirs != own:
            yield Mismatch(name, str(theirs), str(own))
    for one in _keyed("", engine.out_of_range, oracle.out_of_range):
        yield Mismatch("out_of_range", one.engine, one.oracle, metric=one.what)


def _rows(rows: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return [msgspec.structs.astuple(row) for row in rows]


def _moments_text(moments: tuple[int, str, str] | None) -> str:
    n, s, q = moments or (0, "0", "0")
    return f"n={n} s={s} q={q}"


def _keyed(prefix: str, engine: Mapping[str, int], oracle: Mapping[str, int]) -> Iterator[Mismatch]:
    for name in sorted(engine.keys() | oracle.keys()):
        theirs, ours = engine.get(name, 0), oracle.get(name, 0)
        if theirs != ours:
            yield Mismatch(f"{prefix}{name}", str(theirs), str(ours))
