"""Numbers of other packages: each case is one line for `stream-xp infer` and what the package says to it.

tests/golden/inference has one file per package. A case records the package, its version, the code that was
run (`line` is the input; the names in `expected` are the variables that the code left behind), and how close
the answers must be, relative to the expected value.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_xp.services.infer import METHODS, answer_lines

FILES = sorted((Path(__file__).parent / "inference").glob("*.json"))
CASES: list[dict[str, Any]] = [case for file in FILES for case in json.loads(file.read_text())]
# Results of 0 are exact in every package; this is for what stands in for 0 after rounding.
ZERO = 1e-12


def close(answer: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, list):
        pairs = zip(answer, expected, strict=True)
        return all(close(a, e, tolerance) for a, e in pairs)
    if expected is None or isinstance(expected, bool):
        return answer is expected
    return math.isclose(answer, expected, rel_tol=tolerance, abs_tol=ZERO)


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{i}-{case['package']}-{case['input']['method']}" for i, case in enumerate(CASES)]
)
def test_a_package_agrees(case: dict[str, Any]) -> None:
    (given,) = answer_lines([json.dumps(case["input"]).encode()])
    answer = msgspec.to_builtins(given)
    for field, expected in case["expected"].items():
        assert field in answer, answer
        assert close(answer[field], expected, case["tolerance"]), (field, answer[field], expected)


def test_there_are_enough_and_each_says_where_it_is_from() -> None:
    assert len(CASES) >= 120
    assert len({case["package"] for case in CASES}) >= 8
    for case in CASES:
        assert list(case) == ["package", "version", "call", "input", "expected", "tolerance"]
        assert case["expected"]
        assert 0 <= case["tolerance"] <= 1e-4
        assert all(field in case["call"] for field in case["expected"])


def test_every_method_has_one() -> None:
    assert {case["input"]["method"] for case in CASES} == set(METHODS)
