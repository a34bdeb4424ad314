"""The rules of deploy/: each alert fires and keeps quiet where it should, asks for what is there, and has its pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import DEPLOY, ROOT, alerts, faults, records, rules

PROMETHEUS = DEPLOY / "prometheus"
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
LATCHED = {"StreamxpGuardrailBreached", "StreamxpSampleRatioMismatch", "StreamxpArmStalled"}
RUNBOOKS = "https://github.com/stream-xp/stream-xp/blob/main/docs/runbooks/"


def promtool(*arguments: object, program: str = "promtool") -> str:
    """Run it; what it says if it finds a fault fails the test."""
    if shutil.which(program) is None:
        pytest.skip(f"no {program} on PATH: install Debian's prometheus and prometheus-alertmanager")
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def cases() -> list[dict[str, Any]]:
    return [case for file in TESTS for case in yaml.safe_load(file.read_text())["tests"]]


def test_promtool_finds_no_fault_in_the_rules() -> None:
    said = promtool("check", "rules", *sorted((PROMETHEUS / "rules").glob("*.yml")))
    assert said.count("SUCCESS") == 4


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_every_case_of_the_rules_comes_out(file: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", file)


def test_the_cases_can_fail(tmp_path: Path) -> None:
    shutil.copytree(PROMETHEUS, tmp_path / "p")
    wrong = tmp_path / "p" / "rules" / "experiments.yml"
    wrong.write_text(
        wrong.read_text().replace("(streamxp_guardrail_breached) == 1", "(streamxp_guardrail_breached) == 2")
    )
    with pytest.raises(AssertionError, match="StreamxpGuardrailBreached"):
        promtool("test", "rules", tmp_path / "p" / "tests" / "experiments.yml")


def test_prometheus_and_alertmanager_accept_their_files() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert "2 receivers" in promtool(
        "check-config", DEPLOY / "alertmanager" / "alertmanager.yml", program="amtool"
    )


@pytest.mark.parametrize("alert", list(alerts()))
def test_every_alert_has_cases_in_which_it_fires_and_in_which_it_does_not(alert: str) -> None:
    of_alert = [one for case in cases() for one in case["alert_rule_test"] if one["alertname"] == alert]
    assert any(one["exp_alerts"] for one in of_alert)
    assert any(not one["exp_alerts"] for one in of_alert)


@pytest.mark.parametrize("rule", list(rules()), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_workers_serve(rule: dict[str, Any]) -> None:
    assert faults(rule["expr"]) == []


def test_queries_for_what_is_not_there_are_found() -> None:
    assert faults("sum(streamxp_nothing)") == ["streamxp_nothing: no such series", "it asks for no series"]
    assert faults("sum by (arm) (streamxp_units)") == ["no label arm"]
    assert faults('streamxp_units{arm="a"}') == ["streamxp_units: no label arm"]
    assert faults('streamxp_decision_state{state="over"}') == [
        "streamxp_decision_state: state is never 'over'"
    ]
    assert faults("topic:streamxp_nothing:sum") == [
        "topic:streamxp_nothing:sum: no such series",
        "it asks for no series",
    ]
    assert faults('streamxp_decision_state{experiment="$experiment", state="stopped"} == 1') == []


@pytest.mark.parametrize("record", list(records()))
def test_a_recording_rule_names_its_level_metric_and_operation(record: str) -> None:
    level, metric, operation = record.split(":")
    grouped = re.search(r"by \(([^)]*)\)", records()[record])
    if grouped is not None:
        assert grouped[1].replace(", ", "_") == level
    assert metric.startswith("streamxp_")
    assert operation


@pytest.mark.parametrize("alert", list(alerts()))
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(alert: str) -> None:
    rule = alerts()[alert]
    assert re.fullmatch(r"Streamxp[A-Z][A-Za-z]+", alert)
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"{RUNBOOKS}{alert}.md"
    page = (ROOT / "docs" / "runbooks" / f"{alert}.md").read_text()
    assert page.startswith(f"# {alert}\n")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["What it means", "What to look at", "What to do"]


@pytest.mark.parametrize("alert", list(alerts()))
def test_what_is_proven_fires_at_once_and_bridges_a_restart_and_all_else_waits(alert: str) -> None:
    rule = alerts()[alert]
    assert ("for" in rule) == (alert not in LATCHED)
    assert ("keep_firing_for" in rule) == (alert in LATCHED)


def test_there_is_a_page_for_every_alert_and_for_no_other() -> None:
    assert {page.stem for page in (ROOT / "docs" / "runbooks").glob("*.md")} == set(alerts())


def test_alerts_md_lists_every_alert_with_its_severity_and_its_wait() -> None:
    text = (ROOT / "docs" / "alerts.md").read_text()
    rows = re.findall(
        r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| (\w+) \| (at once|\d+m) \|", text, re.MULTILINE
    )
    wanted = {(a, a, rule["labels"]["severity"], rule.get("for", "at once")) for a, rule in alerts().items()}
    assert set(rows) == wanted
    assert len(rows) == len(wanted)


def test_the_alerts_that_are_routed_and_inhibited_exist() -> None:
    text = (DEPLOY / "alertmanager" / "alertmanager.yml").read_text()
    named = set(re.findall(r"Streamxp[A-Z]\w+", text.split("receivers:\n")[0]))
    assert named <= set(alerts())
    assert named >= LATCHED


def test_the_operators_resource_is_as_generated() -> None:
    program = PROMETHEUS / "prometheus_rule.py"
    done = subprocess.run(
        [sys.executable, program, "--check"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load((DEPLOY / "kubernetes" / "prometheusrule.yaml").read_text())
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["metadata"]["labels"]
    assert [rule for group in made["spec"]["groups"] for rule in group["rules"]] == list(rules())
    allowed = {"alert", "record", "expr", "for", "keep_firing_for", "labels", "annotations"}
    for group in made["spec"]["groups"]:
        assert group.keys() <= {"name", "interval", "limit", "rules"}
        for rule in group["rules"]:
            assert rule.keys() <= allowed
