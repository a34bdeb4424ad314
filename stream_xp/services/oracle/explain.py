"""Looks for what would make wrong statistics right: one record lost, doubled or let in, or another prefix.

Statistics are sums over units, so a record that is left out or applied twice moves only what its unit adds.
Each guess is therefore tried on one unit, and only what fits the whole difference is computed in full.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

import msgspec

from stream_xp.domain.statistics import ArmUnits
from stream_xp.services.oracle.recompute import (
    EXPOSURES,
    REWARDS,
    Admitted,
    Fate,
    Lateness,
    Screened,
    Screening,
    StreamName,
    VersionKey,
    aged,
    bounded,
    members_of,
    statistics_of,
    streams,
    version_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from stream_xp.domain.events import Exposure, Reward
    from stream_xp.domain.statistics import ExperimentStatistics, Outcomes
    from stream_xp.services.oracle.compare import Mismatch

MAX_TRIALS: Final = 100_000
"""Guesses that are tried on a unit before the search gives up, and says so."""
MAX_CUTS: Final = 5_000
"""Records by which a prefix is made shorter or longer, in each direction."""
MAX_SUSPECTS: Final = 3
"""Single records that are named; the others are counted."""
MAX_LISTED: Final = 20
"""Offsets of a cell's records that are named; the others are counted."""

Cells: TypeAlias = dict[tuple[Any, ...], int]


class Effect(StrEnum):
    """What an engine may have done with a record."""

    LOST = "lost"
    DOUBLED = "doubled"
    LET_IN = "let_in"


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """One record that alone explains every byte of the difference.

    Attributes:
        effect: lost; counted twice; or counted although it is a duplicate or late (`let_in`).
        topic: `exposures` or `rewards`.
        fate: what the oracle says of the record.

    """

    effect: Effect
    topic: str
    offset: int
    fate: str


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """A prefix: applied offset of each topic, None before the first record."""

    exposures: int | None
    rewards: int | None


class Contributors(msgspec.Struct, frozen=True, kw_only=True):
    """Records that take part in the value that differs: the first offsets, and how many there are."""

    exposures: tuple[int, ...] = ()
    rewards: tuple[int, ...] = ()
    exposure_count: int = 0
    reward_count: int = 0


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What would explain a difference; each finding alone reproduces the published statistics byte for byte.

    Attributes:
        suspects: single records, at most `MAX_SUSPECTS` of them.
        more_suspects: how many others would explain it as well.
        prefix: the nearest other prefix to which the published statistics belong.
        watermark_ms: another watermark at which they are right.
        exhaustive: whether every single record was tried.
        contributors: records of the value that differs.

    """

    suspects: tuple[Suspect, ...] = ()
    more_suspects: int = 0
    prefix: Cut | None = None
    watermark_ms: int | None = None
    exhaustive: bool = True
    contributors: Contributors = Contributors()


def cells(statistics: ExperimentStatistics) -> Cells:
    """Return the numbers of statistics that add up over units, zeros left out."""
    found: Cells = {}
    for units in statistics.units:
        found |= {(name, *_key(units)): getattr(units, name) for name in _OF_UNITS}
    for table in ("moments", "products", "events"):
        for row in getattr(statistics, table):
            names = row.__struct_fields__[4:]
            found |= {(table, *_key(row)[:4], name): int(getattr(row, name)) for name in names}
    for histogram in statistics.histograms:
        found |= {("histograms", *_key(histogram)[:4], at): count for at, count in histogram.bins}
    found |= {("out_of_range", metric): count for metric, count in statistics.out_of_range.items()}
    found["crossover_units",] = statistics.crossover_units
    found["over_limit",] = statistics.over_limit
    return {key: number for key, number in found.items() if number}


def _key(row: msgspec.Struct) -> tuple[Any, ...]:
    """Return the key of a row; units have no metric."""
    fields: tuple[Any, ...] = msgspec.structs.astuple(row)
    return fields[:3] if isinstance(row, ArmUnits) else fields[:4]


def minus(left: Cells, right: Cells) -> Cells:
    """Return the cells of `left` less those of `right`."""
    found = Counter(left)
    found.subtract(right)
    return {key: number for key, number in found.items() if number}


class Case(NamedTuple):
    """Published statistics that differ from the raw topics.

    Attributes:
        screening: of the prefix, and of what the log holds after it, if that was read.
        end: the prefix that the statistics claim.

    """

    version: VersionKey
    published: ExperimentStatistics
    screening: Screening
    end: Cut

    def cut(self, end: Cut) -> Screening:
        """Return the screened records of a prefix."""
        seen, heard = self.screening.seen, self.screening.heard
        return self.screening._replace(seen=_until(seen, end.exposures), heard=_until(heard, end.rewards))

    def fits(self, screening: Screening) -> bool:
        """Whether the published statistics are those of `screening`."""
        return statistics_of(screening, self.version).canonical() == self.published.canonical()


def _until(screened: Screened[Any], last: int | None) -> Screened[Any]:
    if last is None:
        return Screened()
    return Screened(
        {offset: fate for offset, fate in screened.fates.items() if offset <= last},
        screened.reasons,
        [one for one in screened.admitted if one.offset <= last],
        [one for one in screened.refused if one.offset <= last],
        [one for one in screened.over if one.offset <= last],
    )


class _Unit(NamedTuple):
    """The records of one unit that take part, and those that were refused, or kept out by the bound of units."""

    exposures: tuple[Admitted[Exposure], ...]
    rewards: tuple[Admitted[Reward], ...]
    refused_exposures: tuple[Admitted[Exposure], ...] = ()
    refused_rewards: tuple[Admitted[Reward], ...] = ()
    over: tuple[Admitted[Exposure], ...] = ()


class Search:
    """The search for what explains a case."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._cut = case.cut(case.end)
        self._experiment = case.version[0]
        design = case.screening.timeline.designs[case.version]
        self._metrics = {
            metric.key: {one.fields.listens_to for one in streams(metric)} for metric in design.metrics
        } | {one.name[1]: {metric.listens_to} for metric in design.metrics for one in aged(design, metric)}
        own = statistics_of(self._cut, case.version)
        self._wanted = minus(cells(case.published), cells(own))
        self._at_bound = bool(case.published.over_limit or own.over_limit)

    def suspects(self, *, first: Collection[str] = ()) -> tuple[list[Suspect], bool]:
        """Return every single record that fits the numbers, and whether all were tried.

        `first` are units to begin with. Where the bound of units was reached, a lost exposure lets another unit in:
        that is not tried, as it does not show on one unit alone.
        """
        units = _by_unit(self._cut, self._case.version)
        order = [unit for unit in first if unit in units]
        order += [unit for unit in units if unit not in set(order)]
        found: list[Suspect] = []
        trials = 0
        for unit in order:
            of_unit = units[unit]
            if not self._concerns(of_unit):
                continue
            base = self._cells(of_unit)
            for suspect, changed in self._guesses(of_unit):
                trials += 1
                if minus(self._cells(changed), base) == self._wanted:
                    found.append(suspect)
            if trials >= MAX_TRIALS:
                return found, False
        return found, not self._at_bound

    def confirmed(self, suspect: Suspect) -> bool:
        """Whether the published statistics are, byte for byte, those with this one change."""
        seen, heard = self._cut.seen, self._cut.heard
        if suspect.topic == EXPOSURES:
            seen = bounded(_changed(seen, suspect), self._cut.timeline, self._cut.max_units)
        else:
            heard = _changed(heard, suspect)
        return self._case.fits(self._cut._replace(seen=seen, heard=heard))

    def prefix(self) -> Cut | None:
        """Return the nearest other prefix to which the published statistics belong."""
        found = [cut for topics in _ORDERS for cut in self._walks(topics)]
        end = self._case.end
        sizes = {cut: abs(_sum(cut) - _sum(end)) for cut in found}
        near = sorted(found, key=lambda cut: (sizes[cut], _sum(cut)))
        return next((cut for cut in near if self._case.fits(self._case.cut(cut))), None)

    def watermark(self, candidates: Collection[int]) -> int | None:
        """Return the first of some watermarks at which the published statistics are right."""
        for watermark_ms in sorted(candidates):
            rules = Lateness(self._cut.rules.allowed_ms, watermark_ms)
            if self._case.fits(self._cut._replace(rules=rules)):
                return watermark_ms
        return None

    # --- guesses on one unit ----------------------------------------------------------------------------

    def _cells(self, unit: _Unit) -> Cells:
        alone = self._cut._replace(
            seen=Screened(admitted=list(unit.exposures), over=list(unit.over)),
            heard=Screened(admitted=list(unit.rewards)),
        )
        return cells(statistics_of(alone, self._case.version))

    def _concerns(self, unit: _Unit) -> bool:
        """Whether a change of the unit can move an arm that differs."""
        arms = {key[-4] if key[0] not in _OF_UNITS else key[1] for key in self._wanted if _has_arm(key)}
        own = {one.event.arm for one in (*unit.exposures, *unit.refused_exposures)}
        return not arms or bool(arms & own)

    def _guesses(self, unit: _Unit) -> Iterator[tuple[Suspect, _Unit]]:
        yield from self._exposure_guesses(unit)
        heard = self._heard()
        for at, one in enumerate(unit.rewards):
            if one.event.metric in heard:
                rest = unit.rewards[:at] + unit.rewards[at + 1 :]
                yield self._suspect(Effect.LOST, REWARDS, one), unit._replace(rewards=rest)
                yield (
                    self._suspect(Effect.DOUBLED, REWARDS, one),
                    unit._replace(rewards=(*unit.rewards, one)),
                )
        for one in unit.refused_rewards:
            if one.event.metric in heard:
                yield self._suspect(Effect.LET_IN, REWARDS, one), unit._replace(rewards=(*unit.rewards, one))

    def _exposure_guesses(self, unit: _Unit) -> Iterator[tuple[Suspect, _Unit]]:
        counts = any(key[0] in (*_OF_UNITS, "crossover_units") for key in self._wanted)
        if counts or len(unit.exposures) > 1:
            for at, one in enumerate(unit.exposures):
                rest = unit.exposures[:at] + unit.exposures[at + 1 :]
                yield self._suspect(Effect.LOST, EXPOSURES, one), unit._replace(exposures=rest)
        if ("over_limit",) in self._wanted:
            for at, one in enumerate(unit.over):
                rest = unit.over[:at] + unit.over[at + 1 :]
                yield self._suspect(Effect.LOST, EXPOSURES, one), unit._replace(over=rest)
                yield self._suspect(Effect.DOUBLED, EXPOSURES, one), unit._replace(over=(*unit.over, one))
        for one in unit.refused_exposures:
            if unit.over:
                yield self._suspect(Effect.LET_IN, EXPOSURES, one), unit._replace(over=(*unit.over, one))
                continue
            more = tuple(sorted((*unit.exposures, one), key=lambda exposure: exposure.offset))
            yield self._suspect(Effect.LET_IN, EXPOSURES, one), unit._replace(exposures=more)

    def _heard(self) -> set[str]:
        """Names of rewards that can move a value that differs."""
        keys = {key[1] for key in self._wanted if key[0] in (*_TABLES, "out_of_range")}
        return set().union(*(self._metrics.get(key, set()) for key in keys))

    def _suspect(self, effect: Effect, topic: str, one: Admitted[Any]) -> Suspect:
        screened: Screened[Any] = self._cut.seen if topic == EXPOSURES else self._cut.heard
        fate = screened.fates.get(one.offset, Fate.COUNTED)
        return Suspect(effect=effect, topic=topic, offset=one.offset, fate=str(fate))

    # --- other prefixes -----------------------------------------------------------------------------------

    def _walks(self, topics: Collection[str]) -> Iterator[Cut]:
        """Make the prefix shorter and longer, record by record, and give the first cut of each that fits."""
        for step in (-1, 1):
            walk = _Walk(self._case, self._cut, topics, step)
            found = walk.first(dict(self._wanted), self._cells)
            if found is not None:
                yield found


_OF_UNITS = ("units", "settled")
"""The numbers of a row of units."""
_TABLES = ("moments", "products", "events", "histograms")
_ORDERS = ((REWARDS,), (EXPOSURES,), (EXPOSURES, REWARDS))


def _has_arm(key: tuple[Any, ...]) -> bool:
    return key[0] in _OF_UNITS or key[0] in _TABLES


def _sum(cut: Cut) -> int:
    return sum(-1 if last is None else last for last in (cut.exposures, cut.rewards))


class _Walk:
    """A prefix of some topics that grows or shrinks a record at a time, in the order of log times."""

    def __init__(self, case: Case, cut: Screening, topics: Collection[str], step: int) -> None:
        self._case = case
        self._step = step
        self._at = {EXPOSURES: case.end.exposures, REWARDS: case.end.rewards}
        self._steps = [one for topic in topics for one in self._beyond(topic)]
        self._steps.sort(key=lambda one: (one[0], one[1], one[2]), reverse=step < 0)
        self._over = {one.offset for one in case.screening.seen.over}
        self._units: dict[str, tuple[list[Admitted[Any]], ...]] = {
            unit: (list(held.exposures), list(held.rewards), list(held.over))
            for unit, held in _by_unit(cut, case.version).items()
        }

    def _beyond(self, topic: str) -> Iterator[tuple[int, str, int, Admitted[Any]]]:
        screening = self._case.screening
        screened: Screened[Any] = screening.seen if topic == EXPOSURES else screening.heard
        last = -1 if self._at[topic] is None else self._at[topic]
        assert last is not None  # noqa: S101 (for mypy)
        for one in (*screened.admitted, *screened.over):
            if (one.offset > last) == (self._step > 0) and _is_of(screening, one, topic, self._case.version):
                yield one.log_ms, topic, one.offset, one

    def first(self, wanted: Cells, cells_of: Callable[[_Unit], Cells]) -> Cut | None:
        """Return the first cut at which nothing is wanted any more."""
        known: dict[str, Cells] = {}
        for _, topic, offset, one in self._steps[:MAX_CUTS]:
            unit = one.event.unit
            held = self._units.setdefault(unit, ([], [], []))
            before = known[unit] if unit in known else cells_of(_held(held))
            logs = held[1 if topic == REWARDS else 2 if offset in self._over else 0]
            if self._step < 0:
                logs.remove(one)
            else:
                logs.append(one)
            known[unit] = after = cells_of(_held(held))
            wanted = minus(wanted, minus(after, before))
            self._at[topic] = offset if self._step > 0 else (offset - 1 if offset > 0 else None)
            if not wanted:
                return Cut(exposures=self._at[EXPOSURES], rewards=self._at[REWARDS])
        return None


def _held(held: tuple[list[Admitted[Any]], ...]) -> _Unit:
    return _Unit(tuple(held[0]), tuple(held[1]), over=tuple(held[2]))


def _is_of(screening: Screening, one: Admitted[Any], topic: str, version: VersionKey) -> bool:
    if topic == REWARDS:
        return any(
            listener.version == version for listener in screening.timeline.at(one.log_ms).listeners(one.event)
        )
    if one.event.experiment != version[0]:
        return False
    return version_of(one, screening.timeline) == version


def _by_unit(screening: Screening, version: VersionKey) -> dict[str, _Unit]:
    """Return the records of each unit that belong to an experiment version."""
    found: dict[str, list[list[Admitted[Any]]]] = defaultdict(lambda: [[], [], [], [], []])
    logs = (
        (EXPOSURES, screening.seen.admitted),
        (REWARDS, screening.heard.admitted),
        (EXPOSURES, screening.seen.refused),
        (REWARDS, screening.heard.refused),
        (EXPOSURES, screening.seen.over),
    )
    for place, (topic, records) in enumerate(logs):
        for one in cast("Sequence[Admitted[Any]]", records):
            if _is_of(screening, one, topic, version):
                found[one.event.unit][place].append(one)
    return {unit: _Unit(*map(tuple, lists)) for unit, lists in found.items()}


def _changed(screened: Screened[Any], suspect: Suspect) -> Screened[Any]:
    every = {one.offset: one for one in (*screened.admitted, *screened.refused, *screened.over)}
    one = every[suspect.offset]
    admitted = [other for other in (*screened.admitted, *screened.over) if other.offset != one.offset]
    copies = {Effect.LOST: 0, Effect.LET_IN: 1, Effect.DOUBLED: 2}[suspect.effect]
    admitted = sorted([*admitted, *[one] * copies], key=lambda other: other.offset)
    return Screened(screened.fates, screened.reasons, admitted, screened.refused)


def explain(
    case: Case, mismatch: Mismatch, *, since: Cut | None = None, watermarks: Collection[int] = ()
) -> Explanation:
    """Look for what explains a difference of statistics.

    `since` is the newest prefix known to be right: its units are tried first, and only records after it are
    listed as contributors. `watermarks` are others that may have been used.
    """
    search = Search(case)
    found, exhaustive = search.suspects(first=_units_after(case, since))
    named = [one for one in sorted(found, key=_order) if search.confirmed(one)][:MAX_SUSPECTS]
    return Explanation(
        suspects=tuple(named),
        more_suspects=len(found) - len(named) if named else 0,
        prefix=search.prefix(),
        watermark_ms=search.watermark(watermarks),
        exhaustive=exhaustive,
        contributors=contributors(case, mismatch, since=since),
    )


def _order(suspect: Suspect) -> tuple[str, int, str]:
    return suspect.topic, suspect.offset, suspect.effect


def _units_after(case: Case, since: Cut | None) -> dict[str, None]:
    """Return the units with records after a prefix, in the order of the log."""
    if since is None:
        return {}
    cut = case.cut(case.end)
    logs = ((cut.seen, since.exposures), (cut.heard, since.rewards))
    return {
        one.event.unit: None
        for screened, last in logs
        for one in (*screened.admitted, *screened.refused, *screened.over)
        if last is None or one.offset > last
    }


def contributors(case: Case, mismatch: Mismatch, *, since: Cut | None = None) -> Contributors:
    """Return the records that take part in the value that differs, those after `since` if that is given."""
    cut = case.cut(case.end)
    if mismatch.what == "over_limit":
        over = [one.offset for one in cut.seen.over if _is_of(cut, one, EXPOSURES, case.version)]
        return _listed(over, (), since)
    units, hits = members_of(cut, case.version)
    inside = {
        name
        for name, unit in units.items()
        if mismatch.arm in (None, unit.arm)
        and mismatch.epoch in (None, unit.epoch)
        and mismatch.segment in (None, *unit.segments)
        and (mismatch.arm is None or not unit.crossover)
    }
    exposures = [one.offset for one in cut.seen.admitted if _in_units(cut, one, inside, case.version)]
    rewards = {
        hit.offset
        for (stream, name), of_unit in hits.items()
        if name in inside and _counts_in(mismatch, stream)
        for hit in of_unit
    }
    return _listed(exposures, rewards, since)


def _counts_in(mismatch: Mismatch, stream: StreamName) -> bool:
    """Whether rewards of the stream take part in the value; those of a bucket of age have rows of their own."""
    metric, which = stream
    rows = metric if which in ("numerator", "denominator") or mismatch.what == "out_of_range" else which
    return mismatch.metric in (None, rows) and mismatch.what not in _OF_UNITS


def _in_units(screening: Screening, one: Admitted[Any], units: Collection[str], version: VersionKey) -> bool:
    return one.event.unit in units and _is_of(screening, one, EXPOSURES, version)


def _listed(exposures: Collection[int], rewards: Collection[int], since: Cut | None) -> Contributors:
    after = since or Cut(exposures=None, rewards=None)
    seen = sorted(offset for offset in exposures if after.exposures is None or offset > after.exposures)
    heard = sorted(offset for offset in rewards if after.rewards is None or offset > after.rewards)
    return Contributors(
        exposures=tuple(seen[:MAX_LISTED]),
        rewards=tuple(heard[:MAX_LISTED]),
        exposure_count=len(seen),
        reward_count=len(heard),
    )


def outcome_contributors(
    topic: str, published: Outcomes, ours: Outcomes, fates: dict[int, Fate], *, since: int | None = None
) -> Contributors:
    """Return the records whose outcome, by the oracle, is one of those that differ in number."""
    differ = {name for name in _outcome_names(ours) if getattr(published, name) != getattr(ours, name)}
    offsets = [offset for offset, fate in fates.items() if fate.value in differ]
    empty: list[int] = []
    cut = Cut(exposures=since, rewards=since)
    return _listed(offsets, empty, cut) if topic == EXPOSURES else _listed(empty, offsets, cut)


def _outcome_names(outcomes: Outcomes) -> tuple[str, ...]:
    return tuple(name for name in outcomes.__struct_fields__ if name != "read")


def first_wrong(count: int, wrong: Callable[[int], bool]) -> int:
    """Return a place in 0 … count - 1 that is wrong and whose predecessor, if any, is right.

    The last place is known to be wrong. What is wrong is taken to stay wrong, as sums do; where it does not, the
    answer still is a wrong place after a right one, but need not be the earliest.
    """
    right, bad = -1, count - 1
    while bad - right > 1:
        middle = (right + bad) // 2
        if wrong(middle):
            bad = middle
        else:
            right = middle
    return bad
