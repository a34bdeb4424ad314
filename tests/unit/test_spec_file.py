"""Experiment files: what is valid is read, and each fault has its place."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.spec_file import parse_spec
from tests.unit.spec_file_world import VALID, edited, faults_of


def test_a_valid_file_is_the_spec() -> None:
    spec = parse_spec(VALID.encode(), "f.yaml")
    assert isinstance(spec, ExperimentSpec)
    assert spec.weights == {"old": 0.9, "new": 0.1}
    assert spec.planned_sample == 20_000
    assert spec.metrics[1].bound == 100.0
    assert spec.segments == {"device": ("tv", "web")}
    assert spec == msgspec.yaml.decode(VALID, type=ExperimentSpec)


def test_a_byte_order_mark_and_carriage_returns_do_no_harm() -> None:
    assert parse_spec(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode(), "f") == parse_spec(
        VALID.encode(), "f"
    )


# (what is replaced, by what, then each fault as line, column, path and a part of the message)
CASES: dict[str, tuple[str, str, tuple[int, int, str, str]]] = {
    "unknown field": ("alpha: 0.05", "alhpa: 0.05", (27, 1, "alhpa", "unknown field, did you mean alpha?")),
    "unknown field, no guess": ("alpha: 0.05", "zzz: 0.05", (27, 1, "zzz", "unknown field")),
    "unknown field inside": ("weight: 0.1", "weigth: 0", (10, 5, "arms[1].weigth", "did you mean weight?")),
    "name is no text": ("alpha: 0.05", "[a]: 1", (27, 1, "", "a field name must be text")),
    "merge key": ("alpha: 0.05", "<<: {alpha: 0.1}", (27, 1, "<<", "unknown field")),
    "missing": ("owner: a@example.com\n", "", (1, 1, "owner", "required field is missing")),
    "missing inside": ("    direction: decrease\n", "", (12, 5, "metrics[0].direction", "is missing")),
    "twice": ("owner: a@example.com", "unit: a", (4, 1, "unit", "given twice, first on line 2")),
    "number for text": ("unit: member", "unit: 5", (4, 7, "unit", "got the number '5'; put it in quotes")),
    "boolean for text": (
        "- key: new",
        "- key: no",
        (9, 10, "arms[1].key", "got the boolean 'no'; put it in"),
    ),
    "date for text": ("unit: member", "unit: 2026-01-01", (4, 7, "unit", "got the date '2026-01-01'; put")),
    "nothing for text": ("unit: member", "unit:", (4, 6, "unit", "expected text, got nothing")),
    "list for text": ("unit: member", "unit: [a]", (4, 7, "unit", "expected text, got a list")),
    "fields for text": ("unit: member", "unit: {a: 1}", (4, 7, "unit", "expected text, got fields")),
    "text for number": ("alpha: 0.05", 'alpha: "0.05"', (27, 8, "alpha", "take the quotes away")),
    "words for number": ("alpha: 0.05", "alpha: small", (27, 8, "alpha", "a number, got the text 'small'")),
    "boolean for number": (
        "alpha: 0.05",
        "alpha: yes",
        (27, 8, "alpha", "expected a number, got the boolean"),
    ),
    "nothing for number": ("alpha: 0.05", "alpha: null", (27, 8, "alpha", "expected a number, got nothing")),
    "list for number": ("alpha: 0.05", "alpha: [0.05]", (27, 8, "alpha", "expected a number, got a list")),
    "not a number": ("alpha: 0.05", "alpha: .nan", (27, 8, "alpha", "must be finite, got .nan")),
    "infinity": ("bound: 100", "bound: .inf", (24, 12, "metrics[1].bound", "must be finite, got .inf")),
    "minus infinity": ("bound: 100", "bound: -.INF", (24, 12, "metrics[1].bound", "must be finite")),
    "too large": ("bound: 100", "bound: 1.0e+400", (24, 12, "metrics[1].bound", "is too large for a number")),
    "exponent": (
        "alpha: 0.05",
        "alpha: 5e-2",
        (27, 8, "alpha", "without point and sign as text, write 0.05"),
    ),
    "huge exponent": ("alpha: 0.05", "alpha: 1e-999", (27, 8, "alpha", "an exponent without point and sign")),
    "octal": (
        "planned_sample: 20_000",
        "planned_sample: 020000",
        (26, 17, "planned_sample", "plain decimals"),
    ),
    "hexadecimal": (
        "planned_sample: 20_000",
        "planned_sample: 0xFFF",
        (26, 17, "planned_sample", "decimals"),
    ),
    "base 60": (
        "planned_sample: 20_000",
        "planned_sample: 5:30",
        (26, 17, "planned_sample", "plain decimals"),
    ),
    "base 60 for a duration": (
        "minimum_runtime: 1d",
        "minimum_runtime: 1:30",
        (28, 18, "minimum_runtime", "text"),
    ),
    "fraction": (
        "planned_sample: 20_000",
        "planned_sample: 200.5",
        (26, 17, "planned_sample", "a whole number"),
    ),
    "whole float": ("planned_sample: 20_000", "planned_sample: 200.0", (26, 17, "planned_sample", "a whole")),
    "long integer": (
        "planned_sample: 20_000",
        f"planned_sample: {'9' * 5000}",
        (26, 17, "planned_sample", "is too large for a number: 999"),
    ),
    "text for boolean": (
        "control: true",
        "control: 'true'",
        (8, 14, "arms[0].control", "true or false, got"),
    ),
    "number for boolean": (
        "control: true",
        "control: 1",
        (8, 14, "arms[0].control", "expected true or false"),
    ),
    "too small": ("planned_sample: 20_000", "planned_sample: 99", (26, 17, "planned_sample", "at least 100")),
    "too big": ("weight: 0.1", "weight: 1.5", (10, 13, "arms[1].weight", "must be at most 1.0, got 1.5")),
    "at an open limit": ("alpha: 0.05", "alpha: 0", (27, 8, "alpha", "must be greater than 0.0, got 0.0")),
    "at another": ("alpha: 0.05", "alpha: 1", (27, 8, "alpha", "must be less than 1.0, got 1.0")),
    "key": ("experiment: canary", "experiment: can ary", (1, 13, "experiment", "got 'can ary'")),
    "key with a newline": (
        "experiment: canary",
        'experiment: "canary\\n"',
        (1, 13, "experiment", r"'canary\\n'"),
    ),
    "long key": ("experiment: canary", f"experiment: {'k' * 101}", (1, 13, "experiment", "1 to 100 letters")),
    "empty text": ("unit: member", 'unit: ""', (4, 7, "unit", "has 0 characters, needs at least 1")),
    "long text": (
        "unit: member",
        f"unit: {'m' * 101}",
        (4, 7, "unit", "has 101 characters, may have at most 100"),
    ),
    "half a surrogate": ("unit: member", 'unit: "a\\ud800"', (4, 7, "unit", "half a surrogate pair")),
    "duration": (
        "attribution_window: 10m",
        "attribution_window: ten",
        (16, 25, "metrics[0].attribution_window", "7d"),
    ),
    "duration with a newline": (
        "minimum_runtime: 1d",
        'minimum_runtime: "1d\\n"',
        (28, 18, "minimum_runtime", "7d"),
    ),
    "choice": (
        "kind: mean",
        "kind: meen",
        (20, 11, "metrics[1].kind", "count, latency, got 'meen', did you mean"),
    ),
    "choice, no guess": ("role: secondary", "role: x", (21, 11, "metrics[1].role", "must be one of primary")),
    "empty event": ("scale: 0.01", 'event: ""', (25, 12, "metrics[1].event", "has 0 characters")),
    "empty list": ("  device: [tv, web]", "  device: []", (31, 11, "segments.device", "has 0 entries")),
    "list item": (
        "  device: [tv, web]",
        "  device: [tv, 4]",
        (31, 16, "segments.device[1]", "put it in quotes"),
    ),
    "segment name": ("  device: [tv, web]", "  a b: [tv]", (31, 3, "segments.a b", "1 to 100 letters")),
    "segment number": (
        "  device: [tv, web]",
        "  1: [tv]",
        (31, 3, "segments.1", "got the number '1'; put it"),
    ),
    "no list": (
        "  device: [tv, web]",
        "  device: tv",
        (31, 11, "segments.device", "expected a list, got the text 'tv'"),
    ),
    "no fields": (
        "      absolute: 0.005",
        "      0.005",
        (18, 7, "metrics[0].margin", "expected fields, got the"),
    ),
    "a tag": (
        "unit: member",
        "unit: !!python/name:os.system x",
        (4, 7, "unit", "python/name:os.system: 'x'"),
    ),
    "another tag": ("alpha: 0.05", "alpha: !secret 0.05", (27, 8, "alpha", "a value tagged !secret: '0.05'")),
    "an alias": (
        "owner: a@example.com",
        "owner: &o x\nhypothesis: *o",
        (3, 13, "", "aliases (*name) are not"),
    ),
    "both sizes": (
        "absolute: 0.005",
        "{absolute: 1, relative: 1}",
        (18, 7, "metrics[0].margin", "exactly one"),
    ),
    "no size": (
        "    margin:\n      absolute: 0.005",
        "    margin: {}",
        (17, 13, "metrics[0].margin", "exactly one"),
    ),
    # the rules across fields
    "weights": ("weight: 0.1", "weight: 0.2", (5, 1, "arms", "weights must sum to 1, they sum to 1.1")),
    "two controls": (
        "weight: 0.1",
        "weight: 0.1\n    control: true",
        (5, 1, "arms", "exactly one arm must have"),
    ),
    "same key": ("- key: new", "- key: old", (9, 10, "arms[1].key", "'old' is used twice")),
    "no margin": ("    margin:\n      absolute: 0.005\n", "", (14, 11, "metrics[0].role", "needs a margin")),
    "margin elsewhere": (
        "scale: 0.01",
        "margin: {relative: 1}",
        (25, 5, "metrics[1].margin", "only a guardrail"),
    ),
    "no bound": ("    bound: 100\n", "", (20, 11, "metrics[1].kind", "a mean needs a bound")),
    "steps": ("scale: 0.01", "scale: 1.0e-15", (25, 12, "metrics[1].scale", "must be at most 2**40")),
    "empty window": (
        "attribution_window: 10m",
        "attribution_window: 0s",
        (16, 25, "metrics[0].attribution_window", "0"),
    ),
    "runtime": (
        "maximum_runtime: 7d",
        "maximum_runtime: 24h",
        (29, 18, "maximum_runtime", "longer than minimum"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_has_its_place(case: str) -> None:
    old, new, (line, column, path, message) = CASES[case]
    found = [fault for fault in faults_of(edited(old, new)) if (fault.line, fault.column) == (line, column)]
    assert any(fault.path == path and message in fault.message for fault in found), faults_of(
        edited(old, new)
    )


@pytest.mark.parametrize("case", [name for name in CASES if "twice" not in name and "missing" not in name])
def test_one_fault_brings_no_others(case: str) -> None:
    """A fault of one field is no fault of its neighbours; leaving a field out may be a second one."""
    old, new, _ = CASES[case]
    others = [fault for fault in faults_of(edited(old, new)) if "missing" not in fault.message]
    expected = 2 if case == "an alias" else 1
    assert len(others) == expected, others
