"""docs/metrics.md from the definitions: `python -m stream_xp.services.metrics_page --write`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from stream_xp.domain.metric_defs import DEFINITIONS, LABELS, NOTIFY, Kind, MetricDef, Overflow

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_HEAD = Path(__file__).with_name("metrics_page.md")
_SECTIONS = (
    ("Of every worker", None, False),
    ("Of workers that ingest", "ingest", False),
    ("Of workers that decide", "decide", False),
    ("Of each experiment", None, True),
    ("Of `stream-xp notify`", NOTIFY, False),
)


def page() -> str:
    """The whole page."""
    return "\n".join([_HEAD.read_text(), *_sections(), *_label_table(), ""])


def _sections() -> Iterator[str]:
    for title, role, of_experiments in _SECTIONS:
        chosen = [
            one
            for one in DEFINITIONS
            if (one.overflow is not None) == of_experiments and (of_experiments or one.role == role)
        ]
        yield f"## {title}\n"
        yield from _table(chosen, of_experiments=of_experiments)
        yield ""


def _table(definitions: Iterable[MetricDef], *, of_experiments: bool) -> Iterator[str]:
    last = " | beyond the bound |" if of_experiments else " |"
    yield "| name | type | unit | labels | meaning" + last
    yield "| --- | --- | --- | --- | ---" + (" | --- |" if of_experiments else " |")
    for one in definitions:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        row = f"| `{one.name}` | {one.kind} | {one.unit} | {labels} | {_meaning(one)}"
        yield row + (f" | {_OVERFLOWS[one.overflow]} |" if one.overflow is not None else " |")


_OVERFLOWS = {
    Overflow.SUM: "sum",
    Overflow.MAX: "largest",
    Overflow.MIN: "least",
    Overflow.LEFT_OUT: "left out",
}


def _meaning(one: MetricDef) -> str:
    roles = "" if one.overflow is None or one.role == "decide" else " Of workers that ingest."
    bounds = ", ".join(f"{bound:g}" for bound in one.buckets)
    buckets = f" Buckets up to {bounds}." if one.kind is Kind.HISTOGRAM else ""
    return one.help + roles + buckets


def _label_table() -> Iterator[str]:
    yield "## Labels\n"
    yield "| label | meaning | values |"
    yield "| --- | --- | --- |"
    for name, label in LABELS.items():
        values = "open" if label.values is None else ", ".join(f"`{value}`" for value in label.values)
        yield f"| `{name}` | {label.help} | {values} |"


@click.command()
@click.option("--check", "action", flag_value="check", default=True, help="Exit 1 if it is not as generated.")
@click.option("--write", "action", flag_value="write", help="Write it.")
def main(action: str) -> None:
    """Check or write docs/metrics.md."""
    if action == "write":
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        click.echo(
            f"{PAGE}: not as generated; run python -m stream_xp.services.metrics_page --write", err=True
        )
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
