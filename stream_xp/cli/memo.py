"""`stream-xp memo`: the record of a decision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from stream_xp.cli.common import examples, json_option, print_json, with_settings
from stream_xp.errors import ConfigError
from stream_xp.services.memo import Memo, conclusions, markdown, read_facts
from stream_xp.services.memo import memo as memo_of
from stream_xp.services.memo.plots import can_plot, write_plots

if TYPE_CHECKING:
    from stream_xp.settings import Settings


@click.command(
    epilog=examples(
        "stream-xp memo checkout-canary > memo.md",
        "stream-xp memo checkout-canary --version 3 --each --out decisions/",
        "stream-xp memo checkout-canary --json | jq '.metrics[].shrunk'",
    ),
)
@with_settings("bootstrap", "broker", "prefix")
@click.argument("experiment")
@click.option(
    "--version", metavar="N", type=click.IntRange(min=1), help="Of this version.  [default: the newest]"
)
@click.option("--each", is_flag=True, help="Every stop and ship of the version, not only the newest.")
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write Markdown, JSON and plots (extra `plot`) there instead.",
)
@json_option
def memo(
    settings: Settings,
    experiment: str,
    *,
    version: int | None,
    each: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write the record of the newest stop or ship: plan, evidence, decision, caveats, and who said what.

    Decisions of the service, proposals and orders of people all count. Plots need --out; they show the looks that
    the topic of results still holds, which is compacted.
    """
    found = _memos(settings, experiment, version)
    found = found if each else found[-1:]
    if out is not None:
        for one in found:
            _write(one, out)
    elif as_json:
        print_json(found if each else found[0])
    else:
        click.echo("\n".join(markdown(one) for one in found), nl=False)


def _memos(settings: Settings, experiment: str, version: int | None) -> list[Memo]:
    facts = read_facts(settings, experiment, version=version)
    found = conclusions(facts)
    where = f"{experiment}: version {facts.record.spec.version}"
    if not found:
        raise ConfigError(
            f"{where} has no stop or ship yet; `stream-xp status {experiment}` shows its evidence"
        )
    try:
        return [memo_of(facts, one) for one in found]
    except ValueError as error:
        raise ConfigError(f"{where} was ended before its first result: {error}") from error


def _write(found: Memo, out: Path) -> None:
    stem = f"{found.experiment}-v{found.version}-{_plain(found.decided.signal_id[:8])}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = write_plots(found, out, stem) if can_plot() else found
        (out / f"{stem}.md").write_text(markdown(drawn), encoding="utf-8")
        (out / f"{stem}.json").write_bytes(msgspec.json.format(msgspec.json.encode(drawn), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from error
    click.echo(out / f"{stem}.md")
    if not can_plot():
        click.echo("no plots: they need matplotlib, pip install 'stream-xp[plot]'", err=True)


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)
