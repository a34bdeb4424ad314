"""The calculator: what it accepts, what it answers, and that docs/infer.md shows what it does."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from click.testing import CliRunner, Result

from stream_xp.cli import main
from stream_xp.services.infer import METHODS, answer, answer_lines
from stream_xp.services.infer.answers import _ANSWERS
from stream_xp.services.infer.questions import ANY_QUESTION
from stream_xp.stats.shrinkage import shrink_groups

DOCS = Path(__file__).parents[3] / "docs" / "infer.md"
COMMAND = re.compile(r"^\$ echo ('.*') \| stream-xp infer\n(.*)$", re.MULTILINE)
EXAMPLES = [(shlex.split(said)[0], answered) for said, answered in COMMAND.findall(DOCS.read_text())]

ARM = {"n": 100, "mean": 1.0, "variance": 2.0}
RATIO_ARM = {"n": 100, "mean_m": 1.0, "mean_d": 2.0, "var_m": 1.0, "var_d": 1.0, "cov_md": 0.5}
EPOCHS = [{"weights": [0.5, 0.5], "counts": [60, 50]}]
CONVERSIONS = [
    {
        "weights": {"a": 0.5, "b": 0.5},
        "counts": {"a": {"n": 100, "successes": 10}, "b": {"n": 110, "successes": 20}},
    }
]
SUMS = {"n": 200, "psi": 20.0, "psi_squares": 900.0, "control_inverse": 400.0, "treatment_inverse": 400.0}
LINES: dict[str, dict[str, Any]] = {
    "normal_mixture": {"estimate": 0.1, "variance": 0.01, "n": 100, "n_star": 1000},
    "mean_difference": {"control": ARM, "treatment": ARM, "n_star": 1000},
    "ratio_difference": {"control": RATIO_ARM, "treatment": RATIO_ARM, "n_star": 1000},
    "bernoulli_mean": {"n": 100, "successes": 12, "t_opt": 100},
    "conversion_difference": {"epochs": CONVERSIONS, "control": "a"},
    "counts": {"counts": [30, 40], "weights": [0.5, 0.5], "k": 100},
    "sample_ratio": {"epochs": EPOCHS, "mixture": "tilt"},
    "bounded_mean": {"values": [0.1, 0.9, 0.4, 0.5], "construction": "betting"},
    "quantile": {"values": [float(i) for i in range(200)], "q": 0.5},
    "quantile_difference": {
        "control": {"values": [float(i) for i in range(200)]},
        "treatment": {"values": [float(i) for i in range(50, 250)]},
        "q": 0.5,
    },
    "distribution_band": {"n": 1000, "t_min": 100},
    "group_sequential": {"information": [0.5, 1.0], "spending": "pocock"},
    "linear_model": {"t": 2.5, "df_residual": 97, "n": 100, "g": 1},
    "bayes": {"estimate": 0.1, "variance": 0.01, "prior_mean": 0.0, "prior_variance": 0.04},
    "multiplicity": {"e_values": [30.0, 1.0], "procedure": "e_bh"},
    "segments": {"effects": [0.3, 0.0, 0.1], "standard_errors": [0.1, 0.05, 0.2]},
    "adaptive": {"sums": SUMS, "control": ARM, "treatment": ARM, "n_star": 1000},
}
BOUNDED = {"estimate", "lower", "upper", "log_e", "p"}
FIELDS = {
    "bernoulli_mean": {"estimate", "lower", "upper"},
    "bounded_mean": {"estimate", "lower", "upper"},
    "quantile": {"estimate", "lower", "upper"},
    "conversion_difference": {"estimate", "log_e", "p"},
    "sample_ratio": BOUNDED | {"observed_shares", "expected_shares"},
    "distribution_band": {"radius"},
    "group_sequential": {"z", "alpha_spent"},
    "linear_model": {"log_e", "p", "radius"},
    "bayes": {"posterior_mean", "posterior_sd", "prob_better", "loss_ship", "loss_keep"},
    "multiplicity": {"rejected", "adjusted"},
    "segments": {"label", "effects", "sds", "weights", "mean", "mean_sd"},
}


def one(line: dict[str, Any]) -> dict[str, Any]:
    (answered,) = answer_lines([json.dumps(line).encode()])
    return answered


def ask(method: str, **fields: Any) -> dict[str, Any]:
    """Answer the method's line with some fields changed, or taken out by None."""
    line = {"method": method, **LINES[method], **fields}
    return one({name: value for name, value in line.items() if value is not None})


def run(*lines: str) -> Result:
    return CliRunner().invoke(main, ["infer"], input="\n".join(lines) + "\n")


def same(answered: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return answered.keys() == expected.keys() and all(same(answered[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return len(answered) == len(expected) and all(map(same, answered, expected))
    if isinstance(expected, float):
        return math.isclose(answered, expected, rel_tol=1e-9, abs_tol=1e-12)
    return bool(answered == expected)


def test_every_method_has_a_line_here_and_an_answer() -> None:
    assert set(LINES) == set(METHODS)
    assert set(_ANSWERS) == set(get_args(ANY_QUESTION))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_answers_in_its_fields(method: str) -> None:
    assert ask(method).keys() == FIELDS.get(method, BOUNDED)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_takes_alpha(method: str) -> None:
    assert "error" not in ask(method, alpha=0.1)
    for alpha in (0, 1, -0.1, 2):
        assert re.match(r"alpha: expected `float` [<>]", ask(method, alpha=alpha)["error"])


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_field_is_an_error(method: str) -> None:
    assert ask(method, alhpa=0.1)["error"] == "alhpa: unknown field"


@pytest.mark.parametrize(
    ("method", "field"),
    [(method, field) for method, line in LINES.items() for field in line if field not in {"k", "mixture"}],
)
def test_a_missing_field_is_named(method: str, field: str) -> None:
    error = ask(method, **{field: None})["error"]
    # Of alternatives the first is named.
    named = {"values": "values", "t": "t", "g": "g", "t_opt": "t_opt"}.get(field, field)
    assert re.match(rf"{named}: (required field is missing|give exactly one of |.* go together)", error)


@pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method, line in LINES.items() for field in line]
)
def test_a_wrong_type_is_named(method: str, field: str) -> None:
    error = ask(method, **{field: {"no": 1}})["error"]
    assert re.match(rf"{field}(: |\.)", error), error


@pytest.mark.parametrize(
    ("method", "fields", "error"),
    [
        ("normal_mixture", {"rho2": 0.1}, "n_star: give exactly one of n_star and rho2"),
        ("normal_mixture", {"variance": 0}, "variance: expected `float` > 0.0"),
        ("normal_mixture", {"n": 2.5}, "n: expected `int`, got `float`"),
        ("normal_mixture", {"n": 2**53}, "n: expected `int` <= 9007199254740991"),
        ("normal_mixture", {"side": "above"}, "side: only with sides 1"),
        ("normal_mixture", {"sides": 3}, "sides: must be one of 1, 2"),
        ("normal_mixture", {"sides": 1, "side": "up"}, "side: must be one of above, below"),
        (
            "normal_mixture",
            {"sides": 1, "alpha": 0.6},
            "alpha: must be below 0.5 with sides 1",
        ),
        ("mean_difference", {"relative": "fieller", "sides": 1}, "relative: a lift has 2 sides here"),
        (
            "mean_difference",
            {"adjustment": "cuped"},
            "control.covariate: goes together with adjustment 'cuped' or 'ancova'",
        ),
        ("mean_difference", {"relative": "log"}, "relative: must be one of delta, fieller, none"),
        ("mean_difference", {"control": ARM | {"n": 0}}, "control.n: expected `int` >= 1"),
        ("mean_difference", {"control": ARM | {"sd": 1}}, "control.sd: unknown field"),
        ("mean_difference", {"control": {"n": 5, "mean": 1}}, "control.variance: required field is missing"),
        (
            "ratio_difference",
            {"treatment": RATIO_ARM | {"var_d": -1}},
            "treatment.var_d: expected `float` >= 0.0",
        ),
        ("bernoulli_mean", {"a": 1, "b": 1}, "t_opt: give exactly one of t_opt and a"),
        ("bernoulli_mean", {"t_opt": None, "a": 1}, "b: a and b go together"),
        ("linear_model", {"f": 3.0, "df_model": 2}, "t: give exactly one of t and f"),
        ("linear_model", {"t": None, "f": 3.0}, "df_model: f and df_model go together"),
        ("linear_model", {"g": None, "phi": 1}, "z2: phi and z2 go together"),
        ("linear_model", {"n": 97}, "n: must be above df_residual"),
        ("conversion_difference", {"control": "c"}, "control: must be an arm that weights names"),
        (
            "conversion_difference",
            {"epochs": [{"weights": {"a": 1}, "counts": {}}]},
            "epochs: weights must name at least two arms",
        ),
        (
            "conversion_difference",
            {"epochs": [CONVERSIONS[0] | {"counts": {"c": {"n": 1, "successes": 1}}}]},
            "epochs[0].counts: arm 'c' has no weight",
        ),
        ("counts", {"counts": [1, -1]}, "counts[1]: expected `int` >= 0"),
        (
            "counts",
            {"weights": [0.5, 0.4]},
            "weights must lie in [0, 1] and each row must sum to 1 within 1e-9",
        ),
        ("sample_ratio", {"k": 100}, "k: only with mixture dirichlet"),
        ("sample_ratio", {"mixture": "dirichlet", "s": 0.1}, "s: only with mixture tilt"),
        (
            "sample_ratio",
            {"epochs": [*EPOCHS, {"weights": [0.5, 0.5], "counts": [1, 2, 3]}]},
            "epochs[1].counts: must have 2 arms, as the first weights",
        ),
        ("bounded_mean", {"n_star": 100}, "n_star: only with construction hoeffding or empirical_bernstein"),
        ("quantile", {"edges": [1, 2], "counts": [3]}, "values: give exactly one of values and edges"),
        ("quantile", {"values": None, "edges": [1, 2]}, "counts: edges and counts go together"),
        ("quantile_difference", {"control": {}}, "control.values: give exactly one of values and edges"),
        (
            "group_sequential",
            {"spending": "linear"},
            "spending: must be one of classic_obrien_fleming, classic_pocock, obrien_fleming, pocock, power",
        ),
        ("adaptive", {"treatment": None}, "treatment: sums and control and treatment go together"),
        ("adaptive", {"epochs": []}, "epochs: expected `array` of length >= 1"),
        (
            "adaptive",
            {
                "sums": None,
                "control": None,
                "treatment": None,
                "epochs": [{"control": {"n": 2, "mean": 1}, "treatment": {"n": 0}}],
            },
            "epochs[0].control.variance: required unless n is 0 or 1",
        ),
        (
            "adaptive",
            {
                "sums": None,
                "control": None,
                "treatment": None,
                "epochs": [{"control": {"n": 1}, "treatment": {"n": 0}}],
            },
            "epochs[0].control.mean: required unless n is 0",
        ),
    ],
)
def test_a_broken_rule_names_the_field(method: str, fields: dict[str, Any], error: str) -> None:
    assert ask(method, **fields) == {"line": 1, "error": error}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "no JSON object: Input data was truncated"),
        ("5", "no JSON object: Expected `object`, got `int`"),
        ("[1]", "no JSON object: Expected `object`, got `array`"),
        (
            '{"method": "bayes", "estimate": NaN}',
            "no JSON object: JSON is malformed",
        ),
        ('{"method": "bayes", "estimate": 1e999}', "estimate: number out of range"),
        ('{"method": "t_test"}', f"method: must be one of {', '.join(METHODS)}"),
        ('{"estimate": 1}', f"method: must be one of {', '.join(METHODS)}"),
        ('{"method": 1}', f"method: must be one of {', '.join(METHODS)}"),
        ("[" * 100_000, "no JSON object"),
        ("\udce9", "no JSON object"),
    ],
)
def test_a_line_that_is_no_question(line: str, error: str) -> None:
    (answered,) = answer_lines([line.encode(errors="surrogateescape")])
    assert answered.keys() == {"line", "error"}
    assert answered["error"].startswith(error)


def test_numbers_out_of_range_are_an_error_and_end_nothing() -> None:
    assert "error" in ask("normal_mixture", estimate=1e300, variance=1e-300)
    overflow = ask("mean_difference", control=ARM | {"mean": 1e300}, treatment=ARM | {"mean": -1e300})
    assert overflow["error"].startswith("the numbers are out of range: overflow")


def test_lines_are_numbered_and_blank_ones_passed_over() -> None:
    question = json.dumps({"method": "distribution_band", **LINES["distribution_band"]})
    answered = list(answer_lines([b"\n", b"x\n", b"  \n", question.encode(), b"y"]))
    assert [line.get("line") for line in answered] == [2, None, 5]
    assert "radius" in answered[1]


def test_too_few_units_are_an_answer() -> None:
    assert ask("mean_difference", control=ARM | {"n": 10}) == {
        "undetermined": "an arm has fewer than 25 units"
    }
    empty = [{"weights": [0.5, 0.5], "counts": [0, 0]}]
    assert ask("sample_ratio", epochs=empty) == {"undetermined": "no unit has been counted"}
    assert ask("counts", counts=[0, 0]) == {"undetermined": "no event has been counted"}
    same_value = ARM | {"variance": 0.0}
    for fields in ({}, {"sums": None, "epochs": [{"control": same_value, "treatment": same_value}]}):
        given = (
            {"control": same_value, "treatment": same_value}
            if not fields
            else {"control": None, "treatment": None}
        )
        assert ask("adaptive", **fields, **given) == {"undetermined": "no unit differs from another"}


@pytest.mark.parametrize("method", ["normal_mixture", "mean_difference", "ratio_difference", "adaptive"])
def test_one_side_leaves_the_other_end_open(method: str) -> None:
    above, below = ask(method, sides=1), ask(method, sides=1, side="below")
    assert (above["side"], above["upper"], below["side"], below["lower"]) == ("above", None, "below", None)
    assert above["lower"] < above["estimate"] == below["estimate"] < below["upper"]
    # The same line as two sides of twice the level has the same tuning.
    both = ask(method, alpha=0.1)
    assert above["lower"] == pytest.approx(both["lower"], rel=0.1)


@pytest.mark.parametrize("method", ["bernoulli_mean", "bounded_mean"])
def test_one_side_of_a_bounded_mean_ends_at_the_bound(method: str) -> None:
    above, below = ask(method, sides=1), ask(method, sides=1, side="below")
    assert (above["upper"], below["lower"]) == (1.0, 0.0)
    assert above["lower"] <= above["estimate"] <= below["upper"]


def test_one_side_of_a_conversion() -> None:
    above, below = (ask("conversion_difference", sides=1, side=side) for side in ("above", "below"))
    assert above["log_e"] > below["log_e"]
    assert (above["side"], below["side"]) == ("above", "below")


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("bernoulli_mean", {}),
        ("bernoulli_mean", {"sides": 1}),
        ("bernoulli_mean", {"t_opt": None, "a": 1, "b": 1}),
        ("bounded_mean", {}),
        ("bounded_mean", {"construction": "hoeffding", "values": [0.2, 0.6] * 300}),
        ("bounded_mean", {"construction": "empirical_bernstein", "values": [0.2, 0.6] * 300, "n_star": 500}),
    ],
)
def test_a_null_is_outside_exactly_if_it_is_rejected(method: str, fields: dict[str, Any]) -> None:
    lower = ask(method, **fields)["lower"]
    for null, outside in ((lower - 1e-6, True), (lower + 1e-6, False)):
        if null > 0:
            assert (ask(method, **fields, null=null)["log_e"] >= math.log(20)) is outside


def test_more_than_two_arms() -> None:
    epochs = [
        {
            "weights": {"a": 0.5, "b": 0.25, "c": 0.25},
            "counts": {"a": {"n": 200, "successes": 20}, "b": {"n": 100, "successes": 20}},
        }
    ]
    answered = ask("conversion_difference", epochs=epochs)
    assert answered["arms"]["c"] == {"undetermined": "no weight epoch has units in both arms"}
    pair = [epochs[0] | {"weights": {"a": 2 / 3, "b": 1 / 3}}]
    assert same(answered["arms"]["b"], ask("conversion_difference", epochs=pair))
    counted = ask("counts", counts=[30, 20, 0], weights=[0.5, 0.25, 0.25])
    assert counted.keys() == {"log_e", "p", "arms"}
    assert [arm["estimate"] is None for arm in counted["arms"]] == [False, True]
    assert counted["arms"][1]["lower"] is None
    three = [{"weights": [0.5, 0.25, 0.25], "counts": [30, 20, 0]}]
    assert ask("sample_ratio", epochs=three).keys() == {"log_e", "p", "observed_shares", "expected_shares"}


def test_an_arm_may_be_missing_from_an_epoch() -> None:
    early = {"weights": {"a": 1.0}, "counts": {"a": {"n": 50, "successes": 5}}}
    alone = ask("conversion_difference")
    assert same(ask("conversion_difference", epochs=[*CONVERSIONS, early]), alone)


def test_an_empty_epoch_changes_nothing() -> None:
    epoch = {"control": ARM, "treatment": ARM | {"mean": 1.2}}
    one_sided = {"control": ARM, "treatment": {"n": 0}}
    fields = {"sums": None, "control": None, "treatment": None}
    assert same(
        ask("adaptive", **fields, epochs=[epoch, one_sided]), ask("adaptive", **fields, epochs=[epoch])
    )


def test_an_unbounded_radius_is_null() -> None:
    assert ask("distribution_band", n=99) == {"radius": None}
    assert ask("linear_model", df_residual=1, n=3)["radius"] is None


def test_a_lift_that_is_not_bounded_is_undetermined() -> None:
    near_zero = ARM | {"mean": 0.01}
    answered = ask("mean_difference", control=near_zero, relative="fieller")
    assert answered == {"undetermined": "the control mean is not separated from zero"}


def test_segments_are_shrunk_and_are_exploratory_unless_somebody_says_otherwise() -> None:
    answered = ask("segments")
    found = shrink_groups([0.3, 0.0, 0.1], [0.1, 0.05, 0.2])
    assert answered["effects"] == pytest.approx(found.effect.tolist())
    assert answered["sds"] == pytest.approx(found.sd.tolist())
    assert answered["label"] == "exploratory"
    assert ask("segments", registered=True)["label"] == "registered"
    assert ask("segments", effects=[0.3, 0.0])["error"] == "standard_errors: give as many as effects"


def test_answer_takes_a_question() -> None:
    question = msgspec.convert({"method": "multiplicity", **LINES["multiplicity"]}, ANY_QUESTION)
    assert answer(question)["rejected"] == [False, False]


def test_the_command_answers_and_exits_0() -> None:
    lines = [json.dumps({"method": method, **line}) for method, line in LINES.items()]
    result = run(*lines)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == len(lines)
    assert all("error" not in json.loads(line) for line in result.stdout.splitlines())


def test_the_command_exits_1_after_the_last_line() -> None:
    good = json.dumps({"method": "bayes", **LINES["bayes"]})
    result = run(good, "x", good)
    assert result.exit_code == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in line for line in answers] == [False, True, False]
    assert result.stderr == ""


def test_nothing_in_nothing_out() -> None:
    assert (run("").exit_code, run("").stdout) == (0, "")


def test_the_docs_have_an_example_of_each_method() -> None:
    assert {json.loads(said).get("method") for said, _ in EXAMPLES} == set(METHODS)
    for method in METHODS:
        assert f"### {method}\n" in DOCS.read_text()


@pytest.mark.parametrize(("said", "answered"), EXAMPLES)
def test_the_docs_show_the_answers(said: str, answered: str) -> None:
    assert same(msgspec.to_builtins(one(json.loads(said))), json.loads(answered))
