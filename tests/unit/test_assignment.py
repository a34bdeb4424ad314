"""The reference by which applications assign: known answers, evenness, and independence of its hashes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import msgspec
import pytest
from scipy.stats import chi2, chi2_contingency

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.domain.assignment import (
    HASH,
    NO_PART,
    Assigned,
    assigned,
    drawn,
    drawn_in_two_steps,
    fraction,
    hash48,
    held_out,
    in_slots,
    slot_of,
)
from stream_xp.domain.decision import ConfigRecord, LayerConfig, RolloutStatus

VECTORS = json.loads((topics_dir() / "vectors" / "assignment.v1.json").read_bytes())
UNITS = [f"member-{n}" for n in range(40_000)]
LEVEL = 1e-6
"""Level of each test of evenness. The hash does not change, so what passes once passes for good."""


def config(**fields: Any) -> ConfigRecord:
    plain = {
        "experiment": "exp",
        "version": 1,
        "status": RolloutStatus.RUNNING,
        "weights": {"a": 0.5, "b": 0.5},
        "weight_epoch": 0,
        "effective_ms": 0,
        "config_version": 1,
    }
    return ConfigRecord(**{**plain, **fields})


def layer(*slots: tuple[int, int], salt: str = "one", of: int = 1000) -> LayerConfig:
    return LayerConfig(name=salt, salt=salt, of=of, slots=slots, hash=HASH)


HOLDOUT = config(
    experiment="quarter", weights={"holdout": 0.05, "program": 0.95}, layer=layer((0, 49)), holdout=True
)


class TestKnownAnswers:
    """topics/vectors/assignment.v1.json was computed from the formulas on the page, not by the code."""

    def test_hashes(self) -> None:
        assert VECTORS["hash"] == HASH
        assert [hash48(one["text"]) for one in VECTORS["hashes"]] == [
            one["hash"] for one in VECTORS["hashes"]
        ]

    def test_the_hash_of_no_text_is_the_begin_of_the_well_known_sha_256(self) -> None:
        assert hash48("") == 0xE3B0C44298FC

    def test_slots(self) -> None:
        for one in VECTORS["slots"]:
            assert slot_of(one["salt"], one["unit"], one["of"]) == one["slot"], one

    def test_arms(self) -> None:
        for one in VECTORS["arms"]:
            known = config(experiment=one["experiment"], version=one["version"], weights=one["weights"])
            assert fraction("arm", known, one["unit"]) == one["fraction"]
            assert assigned(known, one["unit"]).arm == one["arm"], one

    def test_a_config_as_it_stands_on_the_topic(self) -> None:
        known = msgspec.convert(VECTORS["config"], ConfigRecord)
        assert known.layer is not None
        for one in VECTORS["assigned"]:
            assert slot_of(known.layer.salt, one["unit"], known.layer.of) == one["slot"]
            assert fraction("coverage", known, one["unit"]) == one["coverage_fraction"]
            assert assigned(known, one["unit"]).arm == one["arm"], one
        assert {one["arm"] for one in VECTORS["assigned"]} == {None, "small", "large"}


def even(counts: Counter[Any], cells: int) -> float:
    """The p-value of evenness: Pearson's chi-squared over all cells, empty ones too."""
    expected = sum(counts.values()) / cells
    statistic = sum((counts[cell] - expected) ** 2 / expected for cell in range(cells))
    return float(chi2.sf(statistic, cells - 1))


def independent(one: list[int], other: list[int]) -> float:
    """The p-value of independence of two numbers of each unit."""
    table = Counter(zip(one, other, strict=True))
    rows, columns = max(one) + 1, max(other) + 1
    return float(chi2_contingency([[table[r, c] for c in range(columns)] for r in range(rows)]).pvalue)


class TestEvenness:
    @pytest.mark.parametrize("of", [2, 7, 100, 1000])
    def test_slots_are_even(self, of: int) -> None:
        assert even(Counter(slot_of("layer", unit, of) for unit in UNITS), of) > LEVEL

    def test_a_hash_that_is_not_even_is_told(self) -> None:
        assert even(Counter(slot_of("layer", unit, 128) % 101 for unit in UNITS), 101) < LEVEL

    def test_fractions_are_even(self) -> None:
        for purpose in ("coverage", "arm"):
            assert even(Counter(int(100 * fraction(purpose, config(), unit)) for unit in UNITS), 100) > LEVEL

    def test_slot_coverage_and_arm_are_independent_of_one_another_and_of_other_experiments(self) -> None:
        other, newer = config(experiment="other"), config(version=2)
        tens = {
            "slot": [slot_of("one", unit, 10) for unit in UNITS],
            "slot of another layer": [slot_of("two", unit, 10) for unit in UNITS],
            "coverage": [int(10 * fraction("coverage", config(), unit)) for unit in UNITS],
            "arm": [int(10 * fraction("arm", config(), unit)) for unit in UNITS],
            "arm of another experiment": [int(10 * fraction("arm", other, unit)) for unit in UNITS],
            "arm of another version": [int(10 * fraction("arm", newer, unit)) for unit in UNITS],
        }
        for one, two in itertools.combinations(tens, 2):
            assert independent(tens[one], tens[two]) > LEVEL, (one, two)

    def test_dependence_is_told(self) -> None:
        slots = [slot_of("one", unit, 100) for unit in UNITS]
        assert independent([slot // 10 for slot in slots], [(slot + 5) // 11 for slot in slots]) < LEVEL


class TestArms:
    def test_an_arm_gets_its_share(self) -> None:
        weights = {"c": 0.2, "a": 0.3, "b": 0.5}
        counts = Counter(assigned(config(weights=weights), unit).arm for unit in UNITS)
        for arm, weight in weights.items():
            assert counts[arm] == pytest.approx(weight * len(UNITS), abs=5 * (len(UNITS) / 4) ** 0.5)

    def test_arms_stand_in_the_order_of_their_keys_whatever_that_of_the_record_is(self) -> None:
        assert [drawn({"b": 0.5, "a": 0.5}, x) for x in (0.0, 0.499, 0.5, 0.999)] == ["a", "a", "b", "b"]
        assert drawn({"A": 0.5, "a": 0.25, "B": 0.25}, 0.6) == "B"  # of bytes, not of a language

    def test_an_arm_of_weight_0_is_never_drawn(self) -> None:
        assert drawn({"a": 0.0, "b": 1.0}, 0.0) == "b"
        assert drawn({"a": 1.0, "b": 0.0}, 1 - 2**-48) == "a"

    def test_what_rounding_leaves_over_falls_to_the_last_arm_with_a_weight(self) -> None:
        weights = {"a": 0.1, "b": 0.2, "c": 0.6999999999999, "d": 0.0}
        assert drawn(weights, 1 - 2**-48) == "c"

    def test_no_weight_at_all_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no arm has a weight"):
            drawn({"a": 0.0}, 0.5)

    def test_the_propensity_is_the_weight(self) -> None:
        found = assigned(config(weights={"a": 0.25, "b": 0.75}), "u")
        assert found.propensity == {"a": 0.25, "b": 0.75}[found.arm or ""]
        assert found.exposed

    def test_a_context_has_weights_of_its_own(self) -> None:
        contextual = config(contexts={"tv": {"a": 1.0, "b": 0.0}}, weights={"a": 0.0, "b": 1.0})
        assert assigned(contextual, "u", context="tv") == Assigned("a", exposed=True, propensity=1.0)
        assert assigned(contextual, "u", context="phone").arm == "b"

    def test_who_took_part_still_does_when_the_coverage_grows(self) -> None:
        small = {unit: assigned(config(coverage=0.1), unit) for unit in UNITS[:2000]}
        large = {unit: assigned(config(coverage=0.3), unit) for unit in UNITS[:2000]}
        assert all(large[unit] == found for unit, found in small.items() if found.exposed)
        assert sum(found.exposed for found in small.values()) == pytest.approx(200, abs=70)
        assert sum(found.exposed for found in large.values()) == pytest.approx(600, abs=100)


class TestLayers:
    def test_two_experiments_of_a_layer_share_no_unit_and_leave_none_out(self) -> None:
        one = config(experiment="one", layer=layer((0, 299), (999, 999)))
        two = config(experiment="two", layer=layer((300, 998)))
        for unit in UNITS[:5000]:
            assert assigned(one, unit).exposed != assigned(two, unit).exposed

    def test_a_unit_in_another_slot_has_no_part(self) -> None:
        known = config(layer=layer((0, 499)))
        for unit in UNITS[:500]:
            assert (assigned(known, unit) == NO_PART) == (slot_of("one", unit, 1000) > 499)

    def test_slots_do_not_matter_once_it_ended(self) -> None:
        ended = config(layer=layer((0, 0)), status=RolloutStatus.SHIPPED, weights={"a": 0.0, "b": 1.0})
        assert {assigned(ended, unit) for unit in UNITS[:200]} == {Assigned("b")}

    def test_a_hash_of_the_future_is_refused(self) -> None:
        with pytest.raises(ValueError, match="hashed by 'sha512-64'"):
            in_slots(msgspec.structs.replace(layer((0, 999)), hash="sha512-64"), "u")


class TestHoldout:
    def test_its_arm_is_the_slot(self) -> None:
        for unit in UNITS[:2000]:
            found = assigned(HOLDOUT, unit)
            assert found.exposed
            assert (found.arm == "holdout") == (slot_of("one", unit, 1000) < 50)
            assert found.propensity == HOLDOUT.weights[found.arm or ""]

    def test_it_keeps_its_units_from_the_program_also_from_what_ships(self) -> None:
        running = config(program="quarter", layer=layer((0, 999), salt="two"))
        shipped = msgspec.structs.replace(running, status=RolloutStatus.SHIPPED, weights={"a": 0.0, "b": 1.0})
        held = [unit for unit in UNITS[:4000] if held_out(HOLDOUT, unit)]
        assert len(held) == pytest.approx(200, abs=70)
        for unit in UNITS[:4000]:
            away = unit in held
            assert (assigned(running, unit, holdout=HOLDOUT) == NO_PART) == away
            assert assigned(shipped, unit, holdout=HOLDOUT) == (NO_PART if away else Assigned("b"))

    @pytest.mark.parametrize(
        ("status", "weights", "out"),
        [
            (RolloutStatus.SHIPPED, {"holdout": 0.0, "program": 1.0}, False),
            (RolloutStatus.STOPPED, {"holdout": 1.0, "program": 0.0}, True),
        ],
    )
    def test_it_ends_by_letting_all_in_or_none(
        self, status: RolloutStatus, weights: dict[str, float], out: bool
    ) -> None:
        ended = msgspec.structs.replace(HOLDOUT, status=status, weights=weights)
        assert {held_out(ended, unit) for unit in UNITS[:300]} == {out}

    @pytest.mark.parametrize("given", [None, config(experiment="other", holdout=True, layer=layer((0, 9)))])
    def test_without_its_config_nobody_is_assigned(self, given: ConfigRecord | None) -> None:
        with pytest.raises(ValueError, match="needs the config of the holdout quarter"):
            assigned(config(program="quarter"), "u", holdout=given)

    def test_an_experiment_that_names_none_takes_none(self) -> None:
        with pytest.raises(ValueError, match="needs the config of the holdout None"):
            assigned(config(), "u", holdout=HOLDOUT)

    def test_what_is_no_holdout_is_refused(self) -> None:
        with pytest.raises(ValueError, match="quarter is no holdout"):
            assigned(config(program="quarter"), "u", holdout=config(experiment="quarter"))


class TestUniformSlice:
    def test_known_answers(self) -> None:
        known = VECTORS["uniform"]
        followed = config(
            **{
                name: known[name]
                for name in ("experiment", "version", "weights", "uniform_slice", "uniform_segment")
            }
        )
        assert {one["uniform"] for one in known["assigned"]} == {True, False}
        for one in known["assigned"]:
            assert fraction("uniform", followed, one["unit"]) == one["uniform_fraction"]
            found = assigned(followed, one["unit"])
            assert (found.arm, found.uniform) == (one["arm"], one["uniform"]), one
            assert found.propensity == known["weights"][one["arm"]]

    def test_all_units_have_the_weights_and_those_in_the_slice_are_even(self) -> None:
        weights = {"a": 0.1, "b": 0.6, "c": 0.3, "d": 0.0}
        followed = config(weights=weights, uniform_slice=0.3, uniform_segment="draw")
        found = [assigned(followed, unit) for unit in UNITS]
        arms = Counter(one.arm for one in found)
        inside = Counter(one.arm for one in found if one.uniform)
        statistic = sum(
            (arms[arm] - len(UNITS) * weights[arm]) ** 2 / (len(UNITS) * weights[arm]) for arm in "abc"
        )
        assert chi2.sf(statistic, 2) > LEVEL
        total = inside.total()
        assert chi2.sf(sum((inside[arm] - total / 3) ** 2 / (total / 3) for arm in "abc"), 2) > LEVEL
        assert abs(total / len(UNITS) - 0.3) < 0.02
        assert arms["d"] == 0
        # What has no more than the slice is met in it alone.
        assert {one.arm for one in found if not one.uniform} == {"b", "c"}

    def test_weights_that_are_the_slice_alone(self) -> None:
        thirds = dict.fromkeys("abc", 1 / 3)
        assert drawn_in_two_steps(thirds, 0.99, share=0.9999999999999999, inside=False) in thirds
        assert drawn_in_two_steps({"a": 1.0, "b": 0.0}, 0.5, share=0.3, inside=True) == "a"
        with pytest.raises(ValueError, match="no arm has a weight"):
            drawn_in_two_steps({"a": 0.0}, 0.5, share=0.3, inside=True)

    def test_contexts_have_the_slice_too(self) -> None:
        contexts = {"tv": {"a": 0.15, "b": 0.85}}
        followed = config(contexts=contexts, context="os", uniform_slice=0.3, uniform_segment="draw")
        inside = [assigned(followed, unit, context="tv") for unit in UNITS[:4000]]
        assert all(one.uniform for one in inside if one.arm == "a")

    def test_a_concluded_experiment_has_none(self) -> None:
        over = config(status=RolloutStatus.SHIPPED, weights={"a": 0.0, "b": 1.0}, uniform_slice=0.0)
        assert assigned(over, "member-17") == Assigned("b")
