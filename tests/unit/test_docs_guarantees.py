"""docs/guarantees.md names tests that exist, and shows the last run of the chaos suite as it was."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from chaos.report import PAGE, last_run, section, shown  # noqa: E402

CHAOS = ROOT / "tests" / "chaos"
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text())))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[f"{file}-{test}" for file, test in NAMED])
def test_every_named_test_exists(file: str, test: str) -> None:
    tree = ast.parse((CHAOS / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_chaos_test_is_named() -> None:
    chaotic = {
        (path.name, node.name)
        for path in CHAOS.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any("mark.chaos" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert chaotic == set(NAMED)


def test_the_table_is_that_of_the_last_run() -> None:
    assert shown(PAGE.read_text()) == section(last_run())


def test_the_last_run_failed_nowhere() -> None:
    results = last_run()
    if results is not None:
        assert not results.failed
        assert all(one.differences == 0 for one in results.classes)
