"""`stream-xp signals`: the decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from stream_xp.cli.common import examples, json_option, with_settings
from stream_xp.services.evidence import read_signals

if TYPE_CHECKING:
    from stream_xp.domain.decision import Signal
    from stream_xp.settings import Settings

_COLOURS = {"stop": "red", "ship": "green"}


@click.command(
    epilog=examples(
        "stream-xp signals checkout-canary --limit 1",
        "stream-xp signals --follow --json | jq -c '{id, action: .data.decision.action}'",
    ),
)
@with_settings("bootstrap", "broker", "prefix")
@click.argument("experiment", required=False)
@click.option("--follow", is_flag=True, help="Go on with new decisions until Ctrl-C.")
@click.option("--limit", metavar="N", type=click.IntRange(min=0), help="Only the newest N of the past ones.")
@json_option
def signals(
    settings: Settings, *, experiment: str | None, follow: bool, limit: int | None, as_json: bool
) -> None:
    """Show every decision once, oldest first; with --json each is one line, a CloudEvent.

    The last column is the id of the signal, which `stream-xp verify` takes.
    """
    try:
        for signal in read_signals(settings, experiment=experiment, limit=limit, follow=follow):
            click.echo(msgspec.json.encode(signal) if as_json else _line(signal))
    except KeyboardInterrupt:
        # Ctrl-C is how following ends.
        if not follow:
            raise


def _line(signal: Signal) -> str:
    decision, result = signal.data.decision, signal.data.result
    about = ", ".join(part for part in (decision.arm, decision.metric) if part)
    action = click.style(f"{decision.action.upper():<4}", fg=_COLOURS.get(decision.action), bold=True)
    text = f"{result.experiment} version {result.version}{f' ({about})' if about else ''}: {decision.reason}"
    # A name or a reason must not be able to steer a terminal.
    return f"{_plain(signal.time)}  {action}  {_plain(text)}  {_plain(signal.id)}"


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
