"""Rules of layers, overlaps, holdouts and champions: in one file, and of files beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.cli import main
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.experiment_rules import rules
from stream_xp.domain.layer_rules import Relation, collisions, decisive, no_champion, relation
from stream_xp.domain.layers import Champion, Layer, SlotRange, free_slots, listed, shared_slots, slot_range
from stream_xp.services.spec_file import SpecFaults, load_located, parse_spec
from stream_xp.services.spec_files import collision_faults

EXAMPLES = Path(__file__).parents[2] / "examples" / "many-experiments"
FILES = sorted(EXAMPLES.glob("*.yaml"))
BUTTON, DELIVERY, HOLDOUT, SEARCH = (file.read_text() for file in FILES)


def spec(text: str, **fields: Any) -> ExperimentSpec:
    found = parse_spec(text.encode(), "f.yaml")
    return msgspec.convert({**msgspec.to_builtins(found), **fields}, ExperimentSpec)


def faults_of(text: str) -> list[tuple[int, str, str]]:
    try:
        parse_spec(text.encode(), "f.yaml")
    except SpecFaults as error:
        return [(fault.line, fault.path, fault.message) for fault in error.faults]
    return []


# In one file --------------------------------------------------------------------------------------

CASES = {
    "beyond the layer": (
        BUTTON,
        "[0-499]",
        "[0-1000]",
        ("slots:", "layer.slots[0]", "the slots 0-999, 0-1000"),
    ),
    "backwards": (
        BUTTON,
        "[0-499]",
        "[5-4]",
        ("slots:", "layer.slots[0]", "the first slot is over the last"),
    ),
    "twice": (
        BUTTON,
        "[0-499]",
        "[0-9, 9-20]",
        ("slots:", "layer.slots[1]", "must grow from one to the next"),
    ),
    "no slot": (BUTTON, "[0-499]", "[]", ("slots:", "layer.slots", "needs at least 1")),
    "slots of text": (BUTTON, "[0-499]", "[half]", ("slots:", "layer.slots[0]", "such as 17 or 0-499")),
    "a bare slot": (BUTTON, "[0-499]", "[7]", ("slots:", "layer.slots[0]", "put it in quotes")),
    "one slot in all": (
        BUTTON,
        "  slots: [0-499]",
        "  slots: ['0']\n  of: 1",
        ("of:", "layer.of", "at least 2"),
    ),
    "a salt with a colon": (
        BUTTON,
        "  slots: [0-499]",
        "  slots: [0-499]\n  salt: 'a:b'",
        ("salt:", "layer.salt", "letters"),
    ),
    "forbids itself": (
        SEARCH,
        "[search-suggestions]",
        "[search-ranking]",
        ("forbidden:", "overlap.forbidden[0]", "is the experiment itself"),
    ),
    "forbids its layer": (
        SEARCH,
        "  forbidden: [search-suggestions]",
        "  forbidden_layers: [search]",
        ("forbidden_layers:", "overlap.forbidden_layers[0]", "is its own layer"),
    ),
    "forbidden and decisive": (
        SEARCH,
        "[search-suggestions]",
        "[checkout-button]",
        ("decisive:", "overlap.decisive", "shares no unit"),
    ),
    "decisive by itself": (
        SEARCH,
        "{mode: approve}",
        "{mode: auto}",
        ("decisive:", "overlap.decisive", "mode: approve"),
    ),
    "a false holdout": (
        HOLDOUT,
        "holdout: true",
        "holdout: false",
        ("holdout:", "holdout", "can only be true"),
    ),
    "a holdout without end": (
        HOLDOUT,
        "maximum_runtime: 13w\n",
        "",
        ("holdout:", "holdout", "needs a maximum_runtime"),
    ),
    "other arms": (
        HOLDOUT,
        "key: program",
        "key: rest",
        ("arms:", "arms", "the two arms holdout (the control) and program"),
    ),
    "the wrong control": (
        HOLDOUT,
        "weight: 0.05, control: true}\n  - {key: program, weight: 0.95}",
        "weight: 0.05}\n  - {key: program, weight: 0.95, control: true}",
        ("arms:", "arms", "holdout (the control)"),
    ),
    "another share": (HOLDOUT, "[0-49]", "[0-48]", ("arms:", "arms", "share of its slots, 0.049")),
    "a guardrail": (
        HOLDOUT,
        "role: primary",
        "role: guardrail\n    margin: {absolute: 1}",
        ("metrics:", "metrics", "has no guardrail"),
    ),
    "concludes by itself": (
        HOLDOUT,
        "conclusion: {mode: approve}\n",
        "",
        ("experiment:", "conclusion", "mode: approve"),
    ),
    "a holdout of a holdout": (
        HOLDOUT,
        "holdout: true",
        "holdout: true\nprogram: other",
        ("program:", "program", "is in no program"),
    ),
    "a holdout's champion": (
        HOLDOUT,
        "holdout: true",
        "holdout: true\nchampion: {experiment: x, version: 1, arm: y}",
        ("champion:", "champion", "has no champion"),
    ),
    "a champion of the future": (
        BUTTON,
        "unit: member",
        "unit: member\nchampion: {experiment: checkout-button, version: 1, arm: y}",
        ("champion:", "champion.version", "before this version, 1"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_rule_is_named_with_its_line(case: str) -> None:
    text, old, new, (begin, path, message) = CASES[case]
    assert old in text
    lines = text.replace(old, new).splitlines()
    (found,) = [fault for fault in faults_of("\n".join(lines)) if fault[1] == path]
    # A field that is missing is named where the file begins.
    assert lines[found[0] - 1].strip().startswith(begin)
    assert message in found[2]


def test_the_examples_are_valid() -> None:
    assert [faults_of(text) for text in (BUTTON, DELIVERY, HOLDOUT, SEARCH)] == [[]] * 4


def test_a_holdout_without_a_layer() -> None:
    text = HOLDOUT.replace("layer:\n  name: program\n  slots: [0-49]\n  of: 1000\n", "")
    assert [fault[1:] for fault in faults_of(text)] == [
        ("holdout", "needs a layer, whose slots are the units that are held out")
    ]


def test_a_broken_layer_is_named_beside_what_cannot_be_read() -> None:
    text = BUTTON.replace("[0-499]", "[9-1]").replace("40_000", "few")
    assert {fault[1] for fault in faults_of(text)} == {"layer.slots[0]", "planned_sample"}


def test_sections_change_the_design_and_their_absence_does_not() -> None:
    plain = spec(BUTTON, layer=None, program=None)
    changed = [
        spec(BUTTON, layer=None),
        spec(BUTTON, program=None),
        spec(BUTTON, layer=None, program=None, overlap={"forbidden": ["x"]}),
        spec(BUTTON, layer=None, program=None, champion={"experiment": "x", "version": 1, "arm": "y"}),
    ]
    assert len({one.design_hash() for one in (plain, *changed)}) == 5
    without = msgspec.to_builtins(plain)
    for name in ("layer", "overlap", "holdout", "program", "champion"):
        del without[name]
    assert msgspec.convert(without, ExperimentSpec).design_hash() == plain.design_hash()


# Slots --------------------------------------------------------------------------------------------


def layer(*slots: str, name: str = "checkout", of: int = 10, salt: str | None = None) -> dict[str, Any]:
    return {"name": name, "slots": list(slots), "of": of, "salt": salt}


def taken(*slots: str) -> Layer:
    return msgspec.convert(layer(*slots), Layer)


def test_slots_are_counted_shared_and_free() -> None:
    one, two = taken("0-2", "5"), taken("2-4", "9")
    assert (one.size, one.share, one.seed) == (4, 0.4, "checkout")
    assert slot_range("7") == SlotRange(7, 7)
    assert shared_slots(one, two) == (SlotRange(2, 2),)
    assert free_slots([one, two], 10) == (SlotRange(6, 8),)
    assert free_slots([taken("0-9")], 10) == ()
    assert free_slots([], 10) == (SlotRange(0, 9),)
    assert listed(()) == "none"
    assert listed((SlotRange(0, 1), SlotRange(3, 3)), most=1) == "0-1 and more"


# Beside others ------------------------------------------------------------------------------------


def button(**fields: Any) -> ExperimentSpec:
    return spec(BUTTON, **{"program": None, "layer": layer("0-4"), **fields})


def other(**fields: Any) -> ExperimentSpec:
    return button(**{"experiment": "other", **fields})


def holdout(**fields: Any) -> ExperimentSpec:
    return spec(HOLDOUT, **fields)


def said(one: ExperimentSpec, *others: ExperimentSpec, complete: bool = False) -> list[tuple[str, str]]:
    found = collisions(one, others, complete=complete)
    return [(".".join(map(str, fault.path)), fault.message) for fault in found]


BESIDE = {
    "slots": (
        other(layer=layer("4-9")),
        "layer.slots",
        "other takes 4 of layer checkout already; free are 0-3",
    ),
    "another size": (other(layer=layer("5-9", of=20)), "layer.of", "has 20 slots in other, 10 here"),
    "another salt": (
        other(layer=layer("5-9", salt="s")),
        "layer.salt",
        "is hashed with s in other, checkout here",
    ),
    "another unit": (
        other(layer=layer("5-9"), unit="session"),
        "unit",
        "of 'session' in other, of 'member' here",
    ),
    "a layer of the same salt": (
        other(layer=layer("0", name="x", salt="checkout")),
        "layer.salt",
        "not independent",
    ),
    "forbidden by the other": (
        other(layer=None, overlap={"forbidden": ["checkout-button"]}),
        "experiment",
        "other may share no unit with it",
    ),
    "its layer forbidden": (
        other(layer=layer("0", name="x"), overlap={"forbidden_layers": ["checkout"]}),
        "experiment",
        "give them slots of one layer",
    ),
    "no holdout": (
        other(layer=None, program="checkout-button"),
        "holdout",
        "names this experiment as its holdout",
    ),
    "a holdout in its layer": (
        holdout(layer={"name": "checkout", "slots": ["5"], "of": 10}),
        "layer",
        "holds out units of it",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_cannot_run_beside_another_is_named(case: str) -> None:
    beside, path, message = BESIDE[case]
    (found,) = said(button(), beside)
    assert found[0] == path
    assert message in found[1]
    # Whichever comes later is refused.
    assert len(said(beside, button())) == 1


def test_who_may_run_beside_another() -> None:
    for beside in (
        other(layer=layer("5-9")),
        other(layer=None),
        other(layer=layer("0-4", name="search")),
        other(layer=layer("5-9"), overlap={"forbidden": ["checkout-button"]}),
        button(version=2),
    ):
        assert said(button(), beside) == []


def test_a_program_needs_its_holdout() -> None:
    away = button(program="program-2026-q4")
    assert said(away) == []  # among files: it may stand on the topic
    assert said(away, complete=True) == [("program", "no holdout program-2026-q4 runs")]
    assert said(away, holdout(), complete=True) == []
    assert said(holdout(), away, complete=True) == []
    assert said(away, other(experiment="program-2026-q4", layer=None)) == [
        ("program", "program-2026-q4 is no holdout")
    ]
    (wrong,) = said(button(program="program-2026-q4", unit="session"), holdout())
    assert wrong[0] == "unit"


def test_in_the_layer_of_a_holdout_an_experiment_names_one() -> None:
    quarter = holdout(layer={"name": "checkout", "slots": ["5"], "of": 10})
    assert said(quarter, button())[0][1].startswith("checkout-button is in this layer and names no holdout")
    assert said(button(program="program-2026-q4"), quarter) == []
    assert said(button(program="the-quarter-before"), quarter) == []
    inside = button(program="program-2026-q4", layer=layer("5-6"))
    assert [path for path, _ in said(inside, quarter)] == ["layer.slots"]


def test_relations() -> None:
    quarter, away = holdout(), button(program="program-2026-q4")
    assert relation(button(), other(layer=layer("5-9"))) is Relation.DISJOINT
    assert relation(button(), other(layer=None)) is Relation.FREE
    assert (
        relation(button(), other(layer=None, overlap={"forbidden": ["checkout-button"]}))
        is Relation.FORBIDDEN
    )
    assert relation(quarter, away) is relation(away, quarter) is Relation.HELD_OUT
    assert relation(quarter, button()) is Relation.FREE
    ranks = other(overlap={"decisive": ["checkout-button"]})
    assert (decisive(ranks, button()), decisive(button(), ranks)) == (True, False)


# Champions ----------------------------------------------------------------------------------------

CHAMPION = Champion(experiment="checkout-button", version=1, arm="large")


def concluded(arm: str | None) -> ExperimentRecord:
    design = button()
    epochs = [WeightEpoch(epoch=0, weights=design.weights, effective_ms=0)]
    if arm is not None:
        weights = {key: float(key == arm) for key in design.weights}
        epochs.append(WeightEpoch(epoch=1, weights=weights, effective_ms=1, final=True, signal_id="s"))
    return ExperimentRecord(spec=design, epochs=tuple(epochs), design_hash=design.design_hash())


@pytest.mark.parametrize(
    ("record", "champion", "message"),
    [
        (concluded("large"), CHAMPION, None),
        (None, CHAMPION, "there is no checkout-button version 1"),
        (concluded(None), CHAMPION, "has not ended"),
        (concluded("small"), CHAMPION, "did not ship large: it was stopped"),
        (
            concluded("small"),
            msgspec.structs.replace(CHAMPION, arm="small"),
            "did not ship small: it was stopped",
        ),
        (
            concluded("large"),
            msgspec.structs.replace(CHAMPION, arm="huge"),
            "has no arm huge; it has small, large",
        ),
    ],
)
def test_a_champion_is_an_arm_that_shipped(
    record: ExperimentRecord | None, champion: Champion, message: str | None
) -> None:
    found = no_champion(champion, record)
    assert found is None if message is None else message in (found or "")


# Files --------------------------------------------------------------------------------------------


def test_files_that_collide_are_refused_with_both_places(tmp_path: Path) -> None:
    third = tmp_path / "third.yaml"
    third.write_text(DELIVERY.replace("checkout-delivery", "third").replace("500-999", "450-600"))
    done = CliRunner().invoke(main, ["validate", *map(str, FILES), str(third)])
    assert done.exit_code == 1
    free = "of layer checkout already; free are none"
    assert done.stderr.splitlines() == [
        f"{third}:8:3: layer.slots: checkout-button takes 450-499 {free} ({EXAMPLES / 'button.yaml'}:11)",
        f"{third}:8:3: layer.slots: checkout-delivery takes 500-600 {free} ({EXAMPLES / 'delivery.yaml'}:8)",
    ]
    assert done.stdout.count("is valid") == 4


def test_the_versions_of_an_experiment_do_not_collide_and_the_newest_counts(tmp_path: Path) -> None:
    texts = {
        "old": BUTTON,
        "new": BUTTON.replace("[0-499]", "[0-99]").replace("owner:", "version: 2\nowner:"),
        "other": BUTTON.replace("checkout-button", "other").replace("[0-499]", "[100-499]"),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    read = [load_located(tmp_path / name) for name in texts]
    assert collision_faults(read) == [[], [], []]
    # Without the newer one the slots are taken.
    assert [len(found) for found in collision_faults([read[0], read[2]])] == [0, 1]


def test_a_file_with_faults_of_its_own_does_not_hide_the_others(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.yaml", tmp_path / "good.yaml"
    bad.write_text("experiment: x\n")
    good.write_text(BUTTON.replace("checkout-button", "other"))
    done = CliRunner().invoke(main, ["validate", str(FILES[0]), str(bad), str(good)])
    assert done.exit_code == 1
    assert f"{good}:11:3: layer.slots: checkout-button takes 0-499 of layer checkout already" in done.stderr
    assert f"{bad}:1:1: arms: required field is missing" in done.stderr


def test_no_rule_is_broken_by_the_examples_beside_each_other() -> None:
    assert collision_faults([load_located(file) for file in FILES]) == [[]] * 4
    assert [rules(load_located(file).spec) for file in FILES] == [[]] * 4
