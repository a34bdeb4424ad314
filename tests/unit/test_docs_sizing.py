"""The tables of docs/sizing.md follow from its formulas, and its defaults are those of the chart and of compose."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sizing.md").read_text()
GIB = 1024**3
CHART = yaml.safe_load((ROOT / "deploy" / "helm" / "stream-xp" / "values.yaml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def memory_bytes(rows: float, words: int) -> float:
    return GIB + 2 * rows * (64 + 8 * words)


MEMORY = re.findall(r"^\| ([\d,]+) \| ([\d.]+) GiB \| ([\d.]+) GiB \|$", PAGE, re.MULTILINE)
DISK = re.findall(r"^\| ([\d,]+) \| ([\d.]+) TB \|$", PAGE, re.MULTILINE)


def test_the_tables_are_found() -> None:
    assert (len(MEMORY), len(DISK)) == (4, 3)


@pytest.mark.parametrize(("rows", "one", "four"), MEMORY)
def test_memory(rows: str, one: str, four: str) -> None:
    assert (one, four) == tuple(f"{memory_bytes(number(rows), words) / GIB:.1f}" for words in (1, 4))


@pytest.mark.parametrize(("rate", "terabytes"), DISK)
def test_disk(rate: str, terabytes: str) -> None:
    assert terabytes == f"{number(rate) * 200 * 90 * 86_400 * 3 / 1e12:.2g}"


def test_the_measured_peak_is_below_what_the_formula_gives() -> None:
    rows, peak_mb, given = re.findall(
        r"Measured: ([\d,]+) rows .* ([\d,]+) MB at the peak of a restore, where the formula gives ([\d.]+) GiB",
        PAGE,
    )[0]
    assert given == f"{memory_bytes(number(rows), 4) / GIB:.1f}"
    assert number(peak_mb) * 1e6 < memory_bytes(number(rows), 4)


def test_the_statistics_of_many_experiments() -> None:
    assert "With `X` = 1,000 and `P` = 12 that is 48,000 records and 96 MB a second" in PAGE
    assert (4 * 1_000 * 12, 4 * 1_000 * 12 * 2_000 / 1e6) == (48_000, 96.0)


def test_the_defaults_of_chart_and_compose() -> None:
    rows = dict(re.findall(r"^\| (partitions|workers|API) \| (.+) \|$", PAGE, re.MULTILINE))
    worker, api = CHART["worker"], CHART["api"]
    assert rows["partitions"].startswith(f"{CHART['kafka']['partitions']} | ")
    assert worker["resources"] == {
        "requests": {"cpu": "1", "memory": "2Gi"},
        "limits": {"memory": "4Gi"},
    }
    assert rows["workers"].startswith(
        f"{worker['replicas']}, of 1 core and 2 GiB, at most 4 GiB: 80,000 events"
    )
    assert memory_bytes(15_000_000, 4) < 4 * GIB
    assert COMPOSE["worker"]["mem_limit"] == "2g"
    assert rows["workers"].endswith("| 1, at most 2 GiB")
    assert rows["API"].startswith(f"{api['replicas']}, of a quarter of a core, at most 1 GiB")
    assert api["resources"]["limits"]["memory"] == "1Gi"
    assert COMPOSE["api"]["mem_limit"] == "512m"
    assert CHART["worker"]["autoscaling"]["enabled"] is False
    assert f"`{CHART['worker']['autoscaling']['metric']}`" in PAGE
