"""What experiments share, counted by hand-made logs; and whether a planted interaction is found."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_xp.domain.assignment import assigned, slot_of
from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Metric
from stream_xp.domain.layer_rules import Relation
from stream_xp.domain.publication import next_config, next_record
from stream_xp.engine.interactions import Interaction, PairEvidence, Table, interactions
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec, Screening, screen
from stream_xp.services.overlap import service as module
from stream_xp.services.overlap.count import Counts
from stream_xp.services.overlap.report import OverlapReport, Pair
from stream_xp.services.overlap.service import _report, _running, decisive_interactions
from stream_xp.services.spec_file import load_spec
from stream_xp.settings import Settings

EXAMPLES = Path(__file__).parents[3] / "examples" / "many-experiments"
T = 1_000_000
WINDOW_MS = 1000
FAR = 10**9
CLICK = {
    "key": "click",
    "kind": "conversion",
    "role": "primary",
    "direction": "increase",
    "attribution_window": f"{WINDOW_MS}ms",
}


def spec(experiment: str, *metrics: dict[str, Any], **fields: Any) -> ExperimentSpec:
    plain = {
        "experiment": experiment,
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 4000,
        "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
        "metrics": list(metrics) or [CLICK],
    }
    return msgspec.convert({**plain, **fields}, ExperimentSpec)


def layer(name: str, *slots: str, of: int = 10) -> dict[str, Any]:
    return {"name": name, "slots": list(slots), "of": of}


class World:
    """Experiments, and the events of their units in one partition."""

    def __init__(self, *specs: ExperimentSpec) -> None:
        self.records = [next_record(None, one, effective_ms=0) for one in specs]
        self._exposures: list[LoggedRecord] = []
        self._rewards: list[LoggedRecord] = []

    def expose(self, experiment: str, unit: str, arm: str = "old", at_ms: int = T) -> None:
        self._add(self._exposures, unit, at_ms, experiment=experiment, arm=arm)

    def reward(self, unit: str, at_ms: int = T + 1, metric: str = "click", value: float = 1.0) -> None:
        self._add(self._rewards, unit, at_ms, metric=metric, value=value)

    def _add(self, log: list[LoggedRecord], unit: str, at_ms: int, **fields: Any) -> None:
        event = {"id": f"{len(log)}", "time": at_ms, "unit": unit, **fields}
        log.append(LoggedRecord(len(log), T, unit.encode(), json.dumps(event).encode()))

    def screening(self, watermark_ms: int = FAR) -> Screening:
        logged = [LoggedSpec(0, one.spec.experiment, one) for one in self.records]
        return screen(
            self._exposures,
            self._rewards,
            logged,
            watermark_ms=watermark_ms,
            allowed_lateness_ms=FAR // 10,
            activation_delay_ms=0,
            limits=Limits(),
            behind_watermark={},
        )

    def counts(self, watermark_ms: int = FAR) -> Counts:
        counts = Counts()
        counts.add(self.screening(watermark_ms), self.records)
        return counts

    def report(self, alpha: float = 0.05) -> OverlapReport:
        read = {"exposures": len(self._exposures), "rewards": len(self._rewards)}
        return _report(self.records, self.counts(), read=read, notes=[], alpha=alpha)


def only_pair(report: OverlapReport) -> Pair:
    (pair,) = report.pairs
    return pair


# Units --------------------------------------------------------------------------------------------


def test_shared_units_are_counted_and_expected() -> None:
    world = World(spec("a", layer=layer("x", "0-4")), spec("b", layer=layer("y", "0-1")))
    a, b = world.records[0].spec.layer, world.records[1].spec.layer
    assert a is not None
    assert b is not None
    for n in range(400):
        unit = f"u{n}"
        if slot_of("x", unit, 10) < 5:
            world.expose("a", unit)
        if slot_of("y", unit, 10) < 2:
            world.expose("b", unit)
    report = world.report()
    one, two = report.experiments
    pair = only_pair(report)
    assert (pair.first, pair.second, pair.relation, pair.violations) == ("a", "b", Relation.FREE, 0)
    assert pair.expected == min(one.units * 0.2, two.units * 0.5)
    assert pair.shared == sum(
        slot_of("x", f"u{n}", 10) < 5 and slot_of("y", f"u{n}", 10) < 2 for n in range(400)
    )
    # A binomial of about 40: five standard deviations.
    assert pair.shared == pytest.approx(pair.expected, abs=30)
    assert (one.share, one.layer, one.slots, one.outside) == (0.5, "x", ("0-4",), 0)
    assert report.clean


def test_units_outside_the_slots_are_counted() -> None:
    world = World(spec("a", layer=layer("x", "0-4")))
    for n in range(100):
        world.expose("a", f"u{n}")
    (found,) = world.report().experiments
    assert found.units == 100
    assert found.outside == sum(slot_of("x", f"u{n}", 10) > 4 for n in range(100)) > 0
    assert not world.report().clean


def test_units_of_two_experiments_of_a_layer_are_violations() -> None:
    world = World(spec("a", layer=layer("x", "0-4")), spec("b", layer=layer("x", "5-9")))
    for n in range(50):
        world.expose("a", f"u{n}")
        world.expose("b", f"u{n + 40}")
    pair = only_pair(world.report())
    assert (pair.relation, pair.shared, pair.expected, pair.violations) == (Relation.DISJOINT, 10, 0.0, 10)
    assert pair.interaction is None


def test_forbidden_units_are_violations_and_so_is_the_pair() -> None:
    world = World(spec("a", overlap={"forbidden": ["b"]}), spec("b"))
    for experiment in ("a", "b"):
        world.expose(experiment, "u")
    report = world.report()
    assert (only_pair(report).relation, only_pair(report).violations) == (Relation.FORBIDDEN, 1)
    assert report.collisions == (
        "b: a may share no unit with it, and both would run: give them slots of one layer, or let one end first",
    )


def test_units_that_are_held_out_are_counted_whether_the_holdout_saw_them_or_not() -> None:
    quarter = msgspec.convert(
        {**msgspec.to_builtins(load_spec(EXAMPLES / "holdout.yaml")), "experiment": "q", "unit": "u"},
        ExperimentSpec,
    )
    world = World(quarter, spec("a", program="q"), spec("b"))
    inside = [unit for unit in map(str, range(2000)) if slot_of("program", unit, 1000) < 50][:20]
    for unit in inside[:7]:
        world.expose("a", unit)
        world.expose("b", unit)
    world.expose("q", inside[0], "holdout")
    world.expose("q", inside[1], "program")
    report = world.report()
    assert {one.experiment: (one.units, one.outside, one.held_out) for one in report.experiments} == {
        "a": (7, 0, 7),
        "b": (7, 0, 0),  # it is not of the program
        "q": (2, 1, 0),  # an arm that is not that of the slot
    }
    relations = {(one.first, one.second): (one.relation, one.interaction is None) for one in report.pairs}
    assert relations == {
        ("a", "b"): (Relation.FREE, False),
        ("a", "q"): (Relation.HELD_OUT, True),
        ("b", "q"): (Relation.FREE, False),
    }
    assert not report.clean


def test_who_assigns_by_the_reference_breaks_nothing() -> None:
    specs = [load_spec(EXAMPLES / f"{name}.yaml") for name in ("button", "delivery", "holdout", "search")]
    world = World(*specs)
    configs = {one.spec.experiment: next_config(None, one) for one in world.records}
    for n in range(1500):
        for config in configs.values():
            holdout = None if config.program is None else configs[config.program]
            found = assigned(config, f"u{n}", holdout=holdout)
            if found.exposed:
                world.expose(config.experiment, f"u{n}", found.arm or "")
    report = world.report()
    assert report.clean
    units = {one.experiment: one.units for one in report.experiments}
    assert units["program-2026-q4"] == 1500
    held = sum(slot_of("program", f"u{n}", 1000) < 50 for n in range(1500))
    assert units["search-ranking"] == 1500 - held
    assert units["checkout-button"] + units["checkout-delivery"] == 1500 - held


def test_a_concluded_or_archived_experiment_does_not_run() -> None:
    first, second, third = World(spec("a"), spec("b"), spec("c")).records
    last = msgspec.structs.replace(first.epochs[0], epoch=1, weights={"old": 1.0, "new": 0.0}, final=True)
    concluded = msgspec.structs.replace(first, epochs=(*first.epochs, last))
    archived = msgspec.convert({**msgspec.to_builtins(second), "status": "archived"}, ExperimentRecord)
    logged = [LoggedSpec(0, one.spec.experiment, one) for one in (first, second, concluded, archived, third)]
    assert [one.spec.experiment for one in _running(logged, Settings())] == ["c"]


# Cells --------------------------------------------------------------------------------------------


def cells_of(
    world: World, watermark_ms: int = FAR, *, pair: tuple[str, str] = ("a", "b"), of: str = "a"
) -> Any:
    return world.counts(watermark_ms).cells.get((pair, of, "click"), {})


def test_cells_hold_the_units_of_both_with_their_values() -> None:
    world = World(spec("a"), spec("b"))
    for n, (first, second) in enumerate([("old", "old"), ("old", "new"), ("new", "new"), ("new", "new")]):
        world.expose("a", f"u{n}", first)
        world.expose("b", f"u{n}", second)
        if n in (1, 3):
            world.reward(f"u{n}")
    world.expose("a", "alone")
    assert cells_of(world) == {
        ("old", "old", 0, 0): (1, 0, 0),
        ("old", "new", 0, 0): (1, 1, 1),
        ("new", "new", 0, 0): (2, 1, 1),
    }


def test_a_mean_is_summed_in_steps() -> None:
    spend = {**CLICK, "key": "click", "kind": "mean", "bound": 10, "scale": 0.5}
    world = World(spec("a", spend), spec("b"))
    world.expose("a", "u")
    world.expose("b", "u")
    world.reward("u", value=2.0)
    world.reward("u", value=1.5)
    assert cells_of(world) == {("old", "old", 0, 0): (1, 7, 49)}


def test_crossovers_are_shared_and_in_no_cell() -> None:
    world = World(spec("a"), spec("b"))
    for arm in ("old", "new"):
        world.expose("a", "u", arm)
    world.expose("b", "u")
    assert only_pair(world.report()).shared == 1
    assert cells_of(world) == {}


@pytest.mark.parametrize(
    ("later_ms", "watermark_ms", "counted"),
    [
        (0, T + WINDOW_MS + FAR // 10, True),
        (0, T + WINDOW_MS + FAR // 10 - 1, False),  # the window of both is not over
        (400, T + WINDOW_MS + FAR // 10 + 399, False),  # that of the later one is not over
        (400, T + WINDOW_MS + FAR // 10 + 400, True),
        (WINDOW_MS - 1, FAR, True),
        (WINDOW_MS, FAR, False),  # what came after the window cannot have changed the value
    ],
)
def test_a_unit_enters_when_its_windows_in_both_are_over(
    later_ms: int, watermark_ms: int, counted: bool
) -> None:
    world = World(spec("a"), spec("b"))
    world.expose("a", "u", at_ms=T)
    world.expose("b", "u", at_ms=T + later_ms)
    assert bool(cells_of(world, watermark_ms)) == counted


def test_a_unit_that_met_the_other_long_before_counts() -> None:
    """What was seen before can change the value, however long ago."""
    world = World(spec("a"), spec("b"))
    world.expose("b", "u", at_ms=T - 10 * WINDOW_MS)
    world.expose("a", "u", at_ms=T)
    assert len(cells_of(world, of="a")) == 1
    assert len(cells_of(world, of="b")) == 0


def test_secondary_metrics_are_left_out_and_what_cannot_be_tested_is_named() -> None:
    rate = {**CLICK, "key": "errors", "kind": "count", "role": "primary"}
    seen = {**CLICK, "key": "seen", "role": "secondary"}
    world = World(spec("a", CLICK, rate, seen), spec("b"))
    found = only_pair(world.report()).interaction
    assert found is not None
    assert [(one.experiment, one.metric) for one in found.arms] == [("a", "click"), ("b", "click")]
    assert found.untested == ("a: errors",)


# Evidence -----------------------------------------------------------------------------------------


def crossed(interaction: float, seed: int = 1, units: int = 8000) -> Table:
    """Conversions of 20 %, 5 points more in either treatment, and `interaction` in both."""
    rng = random.Random(seed)
    cells: dict[tuple[str, str, int, int], tuple[int, int, int]] = {}
    for _ in range(units):
        first, second = rng.random() < 0.5, rng.random() < 0.5
        y = int(rng.random() < 0.2 + 0.05 * first + 0.05 * second + interaction * (first and second))
        key = (("old", "new")[first], ("old", "new")[second], rng.randrange(2), 0)
        n, s, q = cells.get(key, (0, 0, 0))
        cells[key] = (n + 1, s + y, q + y * y)
    metric: Metric = spec("a").metrics[0]
    return Table(spec("a"), spec("b"), metric, cells)


def test_a_planted_interaction_is_found_and_main_effects_are_none() -> None:
    strong, none = interactions([[crossed(0.2)], [crossed(0.0, seed=2)]], alpha=0.05)
    ((one,),) = strong.tables
    assert strong.found
    assert not none.found
    assert one.estimate == pytest.approx(0.2, abs=0.08)
    assert one.lower is not None
    assert one.upper is not None
    assert 0 < one.lower < one.upper
    assert one.units == 8000
    ((other,),) = none.tables
    assert other.lower is not None
    assert other.upper is not None
    assert other.lower < 0 < other.upper


def test_cells_enter_with_their_sign_and_place() -> None:
    means = {("old", "old"): 1, ("old", "new"): 2, ("new", "old"): 4, ("new", "new"): 9}
    cells = {(a, b, 0, 0): (100, 100 * mean, 100 * mean**2 + 100) for (a, b), mean in means.items()}
    spend = {**CLICK, "kind": "mean", "bound": 100, "scale": 0.5}
    table = Table(spec("a", spend), spec("b"), spec("a", spend).metrics[0], cells)
    ((found,),) = interactions([[table]], alpha=0.05)[0].tables
    assert found.estimate == pytest.approx(0.5 * (9 - 4 - 2 + 1))


def test_each_treatment_is_held_against_the_control_wherever_that_stands_in_the_file() -> None:
    arms = [
        {"key": "x", "weight": 0.3},
        {"key": "c", "weight": 0.4, "control": True},
        {"key": "y", "weight": 0.3},
    ]
    spend = {**CLICK, "kind": "mean", "bound": 100, "scale": 1}
    first = spec("a", spend, arms=arms)
    means = {"c": (1, 2), "x": (4, 9), "y": (8, 3)}
    cells = {
        (a, b, 0, 0): (100, 100 * mean, 100 * mean**2 + 100)
        for a, both in means.items()
        for b, mean in zip(("old", "new"), both, strict=True)
    }
    (found,) = interactions([[Table(first, spec("b"), first.metrics[0], cells)]], alpha=0.05)
    assert [(one.first_arm, one.second_arm, one.estimate) for one in found.tables[0]] == [
        ("x", "new", pytest.approx((9 - 4) - (2 - 1))),
        ("y", "new", pytest.approx((3 - 8) - (2 - 1))),
    ]


def test_the_evidence_of_a_pair_is_a_mean_and_pairs_share_the_level() -> None:
    one, two = crossed(0.2), crossed(0.0, seed=2)
    alone, beside = interactions([[one]], alpha=0.05)[0], interactions([[one, two]], alpha=0.05)[0]
    (first,), (second,) = beside.tables
    mean = math.log((math.exp(first.log_e) + math.exp(second.log_e)) / 2)
    assert beside.log_e == pytest.approx(mean)
    assert alone.log_adjusted == pytest.approx(alone.log_e)
    family = interactions([[one], [two], []], alpha=0.05)
    assert family[2].log_e == 0.0  # without a table: an e-value of 1
    assert not family[2].found
    # e-Holm averages with the smaller ones.
    values = sorted(math.exp(found.log_e) for found in family)
    assert family[0].log_adjusted == pytest.approx(math.log(sum(values) / 3))


def test_more_intervals_are_wider() -> None:
    def width(found: PairEvidence) -> float:
        one: Interaction = found.tables[0][0]
        assert one.upper is not None
        assert one.lower is not None
        return one.upper - one.lower

    table = crossed(0.0)
    assert width(interactions([[table]], alpha=0.05)[0]) < width(
        interactions([[table], [table]], alpha=0.05)[0]
    )
    assert width(interactions([[table]], alpha=0.025)[0]) == pytest.approx(
        width(interactions([[table], [table]], alpha=0.05)[0])
    )


def test_few_units_are_undetermined() -> None:
    ((found,),) = interactions([[crossed(0.0, units=40)]], alpha=0.05)[0].tables
    assert (found.estimate, found.log_e) == (None, 0.0)
    assert found.note
    (nobody,) = interactions([[Table(*crossed(0.0)[:3], {})]], alpha=0.05)
    assert nobody.tables[0][0].units == 0
    assert interactions([], alpha=0.05) == []


# Decisive -----------------------------------------------------------------------------------------


def interacting(*, decisive: Sequence[str] = ("b",), strength: float = 0.5) -> World:
    rng = random.Random(3)
    overlap = {"decisive": list(decisive)} if decisive else None
    world = World(spec("a", overlap=overlap, conclusion={"mode": "approve"}), spec("b"))
    for n in range(1200):
        first, second = rng.random() < 0.5, rng.random() < 0.5
        world.expose("a", f"u{n}", ("old", "new")[first])
        world.expose("b", f"u{n}", ("old", "new")[second])
        if rng.random() < 0.2 + strength * (first and second):
            world.reward(f"u{n}")
    return world


def test_a_decisive_interaction_is_not_clean_and_any_other_is_only_shown() -> None:
    decisive, shown = interacting().report(), interacting(decisive=()).report()
    for report in (decisive, shown):
        found = only_pair(report).interaction
        assert found is not None
        assert found.found
    assert not decisive.clean
    assert shown.clean
    assert interacting(strength=0.0).report().clean


def test_whose_ship_is_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world = interacting()
    monkeypatch.setattr(module, "overlaps", lambda settings: world.report())
    a, b = (record.spec for record in world.records)
    assert decisive_interactions(Settings(), a) == ["b"]
    assert decisive_interactions(Settings(), b) == []
    # One that interacts with another than it names is not kept back.
    others = interacting(decisive=("c",))
    monkeypatch.setattr(module, "overlaps", lambda settings: others.report())
    assert decisive_interactions(Settings(), others.records[0].spec) == []
    monkeypatch.setattr(module, "overlaps", lambda settings: interacting(strength=0.0).report())
    assert decisive_interactions(Settings(), a) == []
