"""`results.json`: what a run of the chaos suite came to, and the table of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from chaos.harness import ClassResult

RESULTS: Final = Path(__file__).with_name("results.json")


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


def encode(results: Results) -> bytes:
    """The file, indented."""
    return msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n"


def decode(raw: bytes) -> Results:
    """The run in a file."""
    return msgspec.json.decode(raw, type=Results)


def table(results: Results) -> str:
    """The run as a table of Markdown, with a line of sums."""
    lines = [
        "| faults of this class | faults | bad or repeated records | events | audits | differences | worst recovery, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_line(one) for one in results.classes),
    ]
    numbers = [one for one in results.classes if one.worst_recovery_s is not None]
    total = ClassResult(
        name="**all**",
        worst_recovery_s=max((one.worst_recovery_s or 0.0 for one in numbers), default=None),
        seconds=sum(one.seconds for one in results.classes),
        **{
            field: sum(getattr(one, field) for one in results.classes)
            for field in ("faults", "bad_records", "events", "checks", "differences")
        },
    )
    return "\n".join([*lines, _line(total)])


def _line(one: ClassResult) -> str:
    recovery = "" if one.worst_recovery_s is None else f"{one.worst_recovery_s:.1f}"
    return (
        f"| {one.name} | {one.faults:,} | {one.bad_records:,} | {one.events:,} | {one.checks} | "
        f"{one.differences} | {recovery} |"
    )
