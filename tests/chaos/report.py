"""`results.json`: what a run of the chaos suite came to, and the table of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

RESULTS: Final = Path(__file__).with_name("results.json")
PAGE: Final = Path(__file__).parents[2] / "docs" / "guarantees.md"
_MARKS: Final = ("<!-- results -->\n", "<!-- end of results -->")


class ClassResult(msgspec.Struct, kw_only=True):
    """One class of faults.

    Attributes:
        faults: how many were injected: kills, stops, cuts, stalls, joins and leaves, damaged records of ours.
        bad_records: bad records and repeats that the traffic itself had.
        events: records on the raw topics at the end.
        checks: full audits that were made.
        differences: findings of all audits.
        worst_recovery_s: from the end of a fault until the statistics cover all that was on the raw topics by then,
            at worst; None if not measured.
    """

    name: str
    faults: int
    bad_records: int
    events: int
    checks: int
    differences: int
    worst_recovery_s: float | None
    seconds: float


class Results(msgspec.Struct, kw_only=True):
    """One run.

    Attributes:
        intensity: `full` is what counts; `short` is for CI.
        failed: tests that failed.
    """

    seed: int
    intensity: str
    kafka: str
    date: str
    failed: list[str]
    classes: list[ClassResult]


def by_class(found: list[ClassResult]) -> list[ClassResult]:
    """One entry for each name: several tests may be of one class."""
    return [
        summed(name, [one for one in found if one.name == name])
        for name in sorted({one.name for one in found})
    ]


def summed(name: str, parts: list[ClassResult]) -> ClassResult:
    """The sum of some classes; of recovery times the worst."""
    recoveries = [one.worst_recovery_s for one in parts if one.worst_recovery_s is not None]
    return ClassResult(
        name=name,
        faults=sum(one.faults for one in parts),
        bad_records=sum(one.bad_records for one in parts),
        events=sum(one.events for one in parts),
        checks=sum(one.checks for one in parts),
        differences=sum(one.differences for one in parts),
        worst_recovery_s=max(recoveries, default=None),
        seconds=round(sum(one.seconds for one in parts), 1),
    )


def encode(results: Results) -> bytes:
    """The file, indented."""
    return msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n"


def decode(raw: bytes) -> Results:
    """The run in a file."""
    return msgspec.json.decode(raw, type=Results)


def table(results: Results) -> str:
    """The run as a table of Markdown, with a line of sums."""
    lines = [
        "| class of faults | faults | bad or repeated records | events | audits | differences | worst recovery, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_line(one) for one in results.classes),
    ]
    return "\n".join([*lines, _line(summed("**all**", results.classes))])


def last_run() -> Results | None:
    """The run in `results.json`, if there was one."""
    return decode(RESULTS.read_bytes()) if RESULTS.is_file() else None


def section(results: Results | None) -> str:
    """What the page shows of the run."""
    if results is None:
        return "No run is recorded yet.\n"
    minutes = sum(one.seconds for one in results.classes) / 60
    return (
        f"The last run: {results.date}, Apache Kafka {results.kafka}, intensity `{results.intensity}`, "
        f"seed {results.seed}, {minutes:.0f} minutes.\n\n{table(results)}\n"
    )


def shown(page: str) -> str:
    """What stands between the marks of the page."""
    return page.split(_MARKS[0])[1].split(_MARKS[1], maxsplit=1)[0]


def write_page(results: Results) -> None:
    """Put the run on the page."""
    page = PAGE.read_text()
    PAGE.write_text(
        page.replace(_MARKS[0] + shown(page) + _MARKS[1], _MARKS[0] + section(results) + _MARKS[1])
    )


def _line(one: ClassResult) -> str:
    recovery = "" if one.worst_recovery_s is None else f"{one.worst_recovery_s:.1f}"
    return (
        f"| {one.name} | {one.faults:,} | {one.bad_records:,} | {one.events:,} | {one.checks} | "
        f"{one.differences} | {recovery} |"
    )
