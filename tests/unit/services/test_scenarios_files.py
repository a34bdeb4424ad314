"""Scenarios: the examples, the page and the command."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from stream_xp.cli import main
from stream_xp.services.scenarios.measures import Measure, check_claims, summary
from stream_xp.services.scenarios.report import (
    WORDS,
    _value,
    complaints,
    page,
    read_results,
    results_path,
    said,
)
from stream_xp.services.scenarios.runs import Chunk
from stream_xp.services.scenarios.scenario import load_scenario
from tests.unit.services.scenarios_world import fields, write_and_load

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples" / "scenarios").glob("*.yaml"))
PAGE = ROOT / "docs" / "scenarios.md"


@pytest.fixture
def load(tmp_path):
    return partial(write_and_load, tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_scenarios_with_claims(path):
    world = load_scenario(path)
    assert world.scenario.scenario == path.stem
    assert world.scenario.claims


def test_the_page_is_that_of_its_results():
    results = read_results(results_path(PAGE))
    assert PAGE.read_text(encoding="utf-8") == page(results)
    assert [one.scenario for one in results.scenarios] == [path.stem for path in EXAMPLES]


def test_the_example_of_the_page_is_a_scenario(tmp_path):
    text = PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "scenario.yaml"
    path.write_text(text.replace("../canary", str(ROOT / "examples" / "canary")), encoding="utf-8")
    check_claims(load_scenario(path))


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 3
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_every_measure_has_words():
    results = read_results(results_path(PAGE))
    assert all(said(measure.name) for one in results.scenarios for measure in one.measures)
    assert {"delay_h_p95", "units_harmed_p95", "regret_share"} <= WORDS.keys()


def command(tmp_path, *arguments, **over):
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(fields(**over)), encoding="utf-8")
    return CliRunner().invoke(main, ["simulate", str(path), "--runs", "3", "--processes", "1", *arguments])


def test_command_writes_the_page_and_its_results(tmp_path):
    output = tmp_path / "found.md"
    done = command(tmp_path, "--write", str(output), "--json", claims=[{"measure": "shipped", "at_most": 0}])
    assert done.exit_code == 0, done.output
    results = read_results(tmp_path / "found.json")
    assert output.read_text(encoding="utf-8") == page(results)
    assert json.loads(done.stdout)["scenarios"][0]["runs"] == 3
    assert "**1 of 1 claims hold.**" in output.read_text(encoding="utf-8")


def test_command_fails_where_a_claim_does(tmp_path):
    done = command(tmp_path, claims=[{"measure": "shipped", "at_least": 0.5}])
    assert done.exit_code == 1
    assert "s: shipped is 0 ± 0.19, claimed at least 0.5" in done.stderr


def test_command_names_the_fault_of_a_file(tmp_path):
    done = command(tmp_path, looks="7m")
    assert done.exit_code == 2
    assert "horizon: must be a multiple of looks, 7m" in done.stderr


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.0512, 0.0034, "0.0512 ± 0.0034"),
        (11760.4, 350.2, "11,760 ± 350"),
        (11760.4, None, "11,760"),
        (78.5, None, "78.5"),
        (None, None, "beyond the horizon"),
    ],
)
def test_values_as_people_read_them(value, error, shown):
    assert _value(Measure(name="x", value=value, error=error, runs=100)) == shown


def test_complaints_are_of_claims_that_fail(load):
    claims = [{"measure": "shipped", "at_most": 0}, {"measure": "stopped", "at_least": 1}]
    world = load(claims=claims)
    found = complaints([summary(world, Chunk(world, 0, 2, 1).run())])
    assert [one.split(":")[1].split()[0] for one in found] == ["stopped"]
