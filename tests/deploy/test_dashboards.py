"""The dashboards of deploy/grafana: every query can be parsed, and asks for what workers serve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import DEPLOY, faults, known_series
from test_rules import promtool

from stream_xp.domain.metric_defs import DEFINITIONS

GRAFANA = DEPLOY / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
BUILT_IN = {"__rate_interval": "5m"}


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def queries(file: Path) -> Iterator[str]:
    for panel in read(file)["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def variables(file: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in read(file)["templating"]["list"]}


ALL = [(file, query) for file in DASHBOARDS for query in queries(file)]


def test_there_are_the_three() -> None:
    assert [file.stem for file in DASHBOARDS] == ["experiment", "fleet", "operations"]
    assert len({read(file)["uid"] for file in DASHBOARDS}) == 3


@pytest.mark.parametrize(("file", "query"), ALL, ids=[f"{file.stem}-{n}" for n, (file, _) in enumerate(ALL)])
def test_a_query_asks_for_what_workers_serve(file: Path, query: str) -> None:
    assert faults(query) == []
    for name in re.findall(r"\$\{?(\w+)", query):
        assert name in BUILT_IN or name in variables(file)


def test_prometheus_can_parse_every_query(tmp_path: Path) -> None:
    recorded = []
    for n, (_, query) in enumerate(ALL):
        for name, value in BUILT_IN.items():
            query = query.replace(f"${name}", value)  # noqa: PLW2901
        recorded.append({"record": f"q{n}", "expr": re.sub(r"\$\w+", "x", query)})
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}))
    assert f"SUCCESS: {len(ALL)} rules found" in promtool("check", "rules", file)


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_variables_ask_for_labels_that_are_there(file: Path) -> None:
    for name, one in variables(file).items():
        if one["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", one["definition"]).groups()
            assert one["query"]["query"] == one["definition"]
            assert faults(series) == []
            assert label == name
            assert label in known_series()[series.partition("{")[0]]


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_stand_beside_one_another_and_say_what_they_show(file: Path) -> None:
    panels = read(file)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        assert panel["title"]
        assert at["x"] + at["w"] <= 24
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


def test_every_metric_is_shown_somewhere() -> None:
    text = "\n".join(query for _, query in ALL)
    rules = (DEPLOY / "prometheus" / "rules" / "records.yml").read_text()
    used = set(re.findall(r"streamxp_[a-z0-9_]+", text))
    recorded = set(re.findall(r"\w+:streamxp_\w+:\w+", text))
    for name in recorded:
        used |= set(
            re.findall(
                r"streamxp_[a-z0-9_]+", rules.partition(f"record: {name}\n")[2].partition("- record")[0]
            )
        )
    missing = {one.name for one in DEFINITIONS if not used & {one.name, *one.samples}}
    assert missing == set()


def test_grafana_is_told_where_they_and_prometheus_are() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "stream-xp.yml").read_text())[
        "providers"
    ]
    assert provider["type"] == "file"
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"][
        "scrape_interval"
    ]
    assert source["jsonData"]["timeInterval"] == scraped
