"""`stream-xp signals`: the decisions of the service, and the orders of people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from stream_xp.cli.common import examples, json_option, with_settings
from stream_xp.cli.consoles import plain
from stream_xp.domain.operator import OrderSignal
from stream_xp.services.evidence import read_signals

if TYPE_CHECKING:
    from stream_xp.domain.decision import Signal
    from stream_xp.services.signal_records import SignalRecord
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
    """Show every decision and every order once, oldest first; with --json each is one line, a CloudEvent.

    PROPOSED decisions wait for `stream-xp approve` or `reject`. Orders say who gave them, and why. The last column is
    the id, which `stream-xp verify` takes of a decision.
    """
    try:
        for signal in read_signals(settings, experiment=experiment, limit=limit, follow=follow):
            click.echo(msgspec.json.encode(signal) if as_json else _line(signal))
    except KeyboardInterrupt:
        # Ctrl-C is how following ends.
        if not follow:
            raise


def _line(record: SignalRecord) -> str:
    word, colour, text = _order(record) if isinstance(record, OrderSignal) else _decision(record)
    action = click.style(f"{word:<4}", fg=colour, bold=True)
    # A name or a reason must not be able to steer a terminal.
    return f"{plain(record.time)}  {action}  {plain(text)}  {plain(record.id)}"


def _decision(signal: Signal) -> tuple[str, str | None, str]:
    """The word, its colour, and what follows it."""
    decision, result = signal.data.decision, signal.data.result
    about = ", ".join(part for part in (decision.arm, decision.metric) if part)
    word = f"PROPOSED {decision.action.upper()}" if signal.data.proposed else decision.action.upper()
    where = f"{result.experiment} version {result.version}{f' ({about})' if about else ''}"
    return word, _COLOURS.get(decision.action), f"{where}: {decision.reason}"


def _order(signal: OrderSignal) -> tuple[str, str | None, str]:
    """The word, its colour, and what follows it."""
    order = signal.data
    parts = (
        order.arm,
        None if order.stage is None else f"stage {order.stage}",
        None if order.signal_id is None else f"signal {order.signal_id[:8]}",
    )
    about = ", ".join(part for part in parts if part is not None)
    word = f"ORDER {order.action.upper().replace('_', ' ')}"
    where = f"{order.experiment} version {order.version}{f' ({about})' if about else ''}"
    return word, _COLOURS.get(order.action), f"{where}: {order.actor}: {order.reason}"
