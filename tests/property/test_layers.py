"""Layers: what is accepted beside each other is disjoint, and the overlap matrix is symmetric."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.domain.assignment import layer_config, slot_of
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.domain.experiment_rules import rules
from stream_xp.domain.layer_rules import Relation, collisions, relation
from stream_xp.domain.layers import Layer, free_slots, shared_slots

OF = 12
NAMES = ("a", "b", "c")
LAYERS = ("x", "y")


def spec(experiment: str, **fields: Any) -> ExperimentSpec:
    return msgspec.convert(
        {
            "experiment": experiment,
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
            "metrics": [
                {
                    "key": "click",
                    "kind": "conversion",
                    "role": "primary",
                    "direction": "increase",
                    "attribution_window": "1s",
                }
            ],
            **fields,
        },
        ExperimentSpec,
    )


def layer_of(name: str, slots: set[int]) -> dict[str, Any]:
    """The slots as ranges: neighbours in one."""
    ranges: list[list[int]] = []
    for slot in sorted(slots):
        if ranges and ranges[-1][1] == slot - 1:
            ranges[-1][1] = slot
        else:
            ranges.append([slot, slot])
    return {"name": name, "slots": [f"{a}-{b}" if a < b else f"{a}" for a, b in ranges], "of": OF}


slots = st.sets(st.integers(0, OF - 1), min_size=1)


@given(slots, slots)
def test_two_experiments_of_a_layer_are_accepted_exactly_if_they_share_no_slot(
    one: set[int], two: set[int]
) -> None:
    a, b = spec("a", layer=layer_of("x", one)), spec("b", layer=layer_of("x", two))
    assert rules(a) == rules(b) == []
    assert (collisions(a, [b], complete=True) == []) == one.isdisjoint(two)
    # Exactly what is shared and what is free is said.
    assert a.layer is not None
    assert b.layer is not None
    said = {slot for first, last in shared_slots(a.layer, b.layer) for slot in range(first, last + 1)}
    free = {slot for first, last in free_slots([a.layer, b.layer], OF) for slot in range(first, last + 1)}
    assert said == one & two
    assert free == set(range(OF)) - one - two


@given(slots, slots, st.lists(st.text(min_size=1, max_size=20), max_size=20))
def test_a_unit_is_in_both_of_two_accepted_experiments_never(
    one: set[int], two: set[int], units: list[str]
) -> None:
    both = [msgspec.convert(layer_of("x", taken), Layer) for taken in (one, two - one)] if two - one else []
    for unit in units:
        slot = slot_of("x", unit, OF)
        inside = [
            any(first <= slot <= last for first, last in known.slots)
            for known in map(layer_config, both)
            if known is not None
        ]
        assert sum(inside) <= 1


@st.composite
def worlds(draw: st.DrawFn) -> list[ExperimentSpec]:
    """Experiments with layers, rows of the matrix, and sometimes a holdout and its program."""
    found = []
    for name in NAMES:
        fields: dict[str, Any] = {}
        if draw(st.booleans()):
            fields["layer"] = layer_of(draw(st.sampled_from(LAYERS)), draw(slots))
        if draw(st.booleans()):
            fields["overlap"] = {
                "forbidden": draw(st.lists(st.sampled_from(NAMES), max_size=2)),
                "forbidden_layers": draw(st.lists(st.sampled_from(LAYERS), max_size=1)),
            }
        fields["holdout"] = draw(st.sampled_from((None, None, True)))
        fields["program"] = draw(st.sampled_from((None, *NAMES)))
        found.append(spec(name, **fields))
    return found


@given(worlds())
def test_the_matrix_is_symmetric_and_so_is_what_is_refused(world: list[ExperimentSpec]) -> None:
    for one in world:
        for two in world:
            if one.experiment == two.experiment:
                continue
            assert relation(one, two) is relation(two, one)
            refused = [bool(collisions(a, [b], complete=False)) for a, b in ((one, two), (two, one))]
            assert refused[0] == refused[1], (one, two)
            if relation(one, two) is Relation.FORBIDDEN:
                assert refused[0]


@given(worlds())
def test_who_is_beside_oneself_is_passed_over(world: list[ExperimentSpec]) -> None:
    for one in world:
        assert [
            found
            for found in collisions(one, [one], complete=True)
            if not (found.other is None and one.program is not None)
        ] == []
