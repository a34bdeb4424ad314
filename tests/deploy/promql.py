"""What the files of deploy/ ask of Prometheus, held against what workers serve."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stream_xp.domain.metric_defs import DEFINITIONS, LABELS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules"
OF_TARGETS = {"instance", "job"}
"""Labels that every scraped series has."""
OF_PROCESS = {
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
    "process_start_time_seconds",
    "up",
}
_SERIES = re.compile(
    r"(?<![\w:\"])((?:[a-z_]+:)?(?:streamxp|process)_[a-z0-9_]+(?::[a-z0-9_]+)?|up\b|ALERTS\b)(\{[^}]*\})?"
)
_MATCHER = re.compile(r"([a-z_]+)\s*(=~|!~|!=|=)\s*\"([^\"]*)\"")
_STRING = re.compile(r"\"[^\"]*\"")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")


def rules() -> Iterator[dict[str, Any]]:
    """Every rule of every file."""
    for file in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def records() -> dict[str, str]:
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def known_series() -> dict[str, set[str]]:
    """Every name that a query can ask for, with its labels."""
    known = {sample: {*one.labels} for one in DEFINITIONS for sample in one.samples}
    known = {
        name: labels | OF_TARGETS | ({"le"} if name.endswith("_bucket") else set())
        for name, labels in known.items()
    }
    known |= {name: {*OF_TARGETS} for name in OF_PROCESS}
    # Prometheus' own, of the alerts that it has.
    known["ALERTS"] = {"alertname", "alertstate", "severity", *LABELS}
    for name in records():
        levels = name.partition(":")[0].split("_")
        known[name] = set() if levels == ["streamxp"] else set(levels)
    return known


def faults(query: str) -> list[str]:
    """What a query asks for that no worker serves: names, labels, and values of closed labels."""
    known, found, labels = known_series(), [], set()
    for name, matchers in _SERIES.findall(query):
        if name not in known:
            found.append(f"{name}: no such series")
            continue
        labels |= known[name]
        for label, operator, text in _MATCHER.findall(matchers):
            if label not in known[name]:
                found.append(f"{name}: no label {label}")
            elif operator in ("=", "!=") and not text.startswith("$"):
                closed = LABELS[label].values if label in LABELS else None
                if closed is not None and text not in closed:
                    found.append(f"{name}: {label} is never {text!r}")
    if not labels:
        found.append("it asks for no series")
    for group in _GROUPING.findall(_STRING.sub('""', query)):
        found += [
            f"no label {one}" for one in re.split(r"[,\s]+", group.strip()) if one and one not in labels
        ]
    return found
