"""`stream-xp plan`, and that docs/planning.md shows what it prints."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stream_xp.cli import main

ROOT = Path(__file__).parents[2]
CANARY = str(ROOT / "examples" / "canary" / "spec.yaml")
GIVEN = ("--given", "errors:rate=0.02")
PAGE = ROOT / "docs" / "planning.md"
PICTURE = ROOT / "docs" / "images" / "plan-order.svg"

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs the extra `plot`"
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_a_table_a_chart_and_no_files() -> None:
    result = run(CANARY, *GIVEN)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "checkout-canary version 1: 20,000 units planned; stable 0.9, canary 0.1; power 0.8"
    assert [line.split()[:3] for line in lines[2:4]] == [["1", "errors", "harm"], ["2", "errors", "safety:"]]
    assert "^ planned sample, 20,000" in result.stdout
    assert "days:" not in result.stdout
    assert "days: for the power" in run(CANARY, *GIVEN, "--traffic", "1000").stdout


def test_json_to_standard_output_and_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    shown, written = run(CANARY, *GIVEN, "--json", "-"), run(CANARY, *GIVEN, "--json", str(file))
    assert (shown.exit_code, written.exit_code) == (0, 0)
    assert json.loads(shown.stdout) == json.loads(file.read_bytes())
    plan = json.loads(shown.stdout)
    harm = plan["tests"][0]
    assert (plan["experiment"], len(plan["design_hash"]), harm["test"]) == ("checkout-canary", 64, "harm")
    assert harm["baseline"] == {"rate": 0.02}
    curve = harm["curve"]
    assert {len(column) for column in curve.values()} == {len(curve["units"])}
    assert all(
        low <= high + 1e-9 for low, high in zip(curve["sequential"], curve["sequential"][1:], strict=False)
    )
    assert all(s <= f + 1e-9 for s, f in zip(curve["sequential"], curve["fixed"], strict=True))
    assert run(CANARY, *GIVEN, "--json", str(tmp_path / "no" / "plan.json")).exit_code == 2


@needs_matplotlib
def test_a_plot(tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    assert run(CANARY, *GIVEN, "--plot", str(file)).exit_code == 0
    assert file.read_text().count("half width") == 2


def test_faults_are_one_line_each_and_exit_2(tmp_path: Path) -> None:
    for arguments, message in (
        ((CANARY,), "errors: no baseline: a conversion needs rate"),
        ((CANARY, *GIVEN, "--plot", "a.pdf"), "a plot is .svg or .png"),
        ((CANARY, *GIVEN, "--power", "1"), "power must lie between"),
        ((CANARY, *GIVEN, "--effect", "0"), "an effect is a number above 0"),
        ((str(tmp_path / "none.yaml"),), "cannot be read"),
        ((CANARY, "--baseline", str(tmp_path / "none.yaml")), "cannot be read"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


# The page ---------------------------------------------------------------------------------------------


def example(folder: Path) -> tuple[list[str], str]:
    """The arguments of the page's command with its files written, and the output that it shows."""
    text = PAGE.read_text()
    for name, body in re.findall(r"```yaml\n# (\S+)\n(.*?)```", text, flags=re.DOTALL):
        (folder / name).write_text(body)
    (block,) = re.findall(r"```console\n\$ stream-xp plan (.*?)```", text, flags=re.DOTALL)
    command, _, output = block.partition("\n")
    return command.split(), output


def test_the_page_shows_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, shown = example(tmp_path)
    monkeypatch.chdir(tmp_path)
    at = arguments.index("--plot")
    result = run(*arguments[:at], *arguments[at + 2 :])
    assert result.exit_code == 0, result.output
    assert [line.rstrip() for line in result.stdout.splitlines()] == shown.splitlines()


@needs_matplotlib
def test_the_page_shows_the_picture_that_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, _ = example(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(*arguments).exit_code == 0
    drawn = tmp_path / arguments[arguments.index("--plot") + 1]
    assert drawn.name == PICTURE.name
    # Curves may differ in the last digit from one version of matplotlib to the next; words may not.
    assert words(drawn) == words(PICTURE)


def words(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text())
