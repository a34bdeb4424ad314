"""`stream-xp pause`, `resume`, `stop`, `ship`, `approve`, `reject`, `reset`, `set-stage`: what people order."""

from __future__ import annotations

import getpass
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import click

from stream_xp.cli.common import examples, json_option, print_json, with_settings
from stream_xp.domain.operator import OperatorAction
from stream_xp.errors import ConfigError
from stream_xp.services.operate import Call, Fate, Outcome, Placed, place, wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream_xp.settings import Settings

EXIT_NOT_ENACTED: Final = 3
WAIT_S: Final = 10.0

_signal_option = click.option(
    "--signal", metavar="ID", help="The beginning of the signal's id.  [default: the one that is there]"
)


def _command(
    name: str, action: OperatorAction, text: str, *options: Callable[[Any], Any], example: str = ""
) -> click.Command:
    """Make the command of an action: options that all of them have, and its own."""

    def run(settings: Settings, experiment: str, **given: Any) -> None:
        _run(settings, experiment, action, **given)

    run.__doc__ = text
    command: Any = with_settings("bootstrap", "broker", "prefix")(run)
    common = (
        click.argument("experiment"),
        *options,
        click.option(
            "--reason", required=True, help="Why, in a sentence; it is shown wherever the order is."
        ),
        click.option("--actor", help="Who orders it.  [default: the user name of this account]"),
        click.option("--wait", "waits", is_flag=True, help="Wait until it is enacted; exit 3 if it is not."),
        click.option(
            "--timeout",
            "timeout_s",
            metavar="SECONDS",
            type=click.FloatRange(min=0.0),
            default=WAIT_S,
            show_default=True,
            help="How long --wait waits.",
        ),
        json_option,
    )
    for option in reversed(common):
        command = option(command)
    shown = f"stream-xp {name} checkout-canary {example}".rstrip()
    epilog = examples(
        f'{shown} --reason "the pager rang"', f'{shown} --reason "as agreed" --actor kim --wait'
    )
    made: click.Command = click.command(name, help=text, epilog=epilog)(command)
    return made


def _run(
    settings: Settings,
    experiment: str,
    action: OperatorAction,
    *,
    reason: str,
    actor: str | None,
    waits: bool,
    timeout_s: float,
    as_json: bool,
    **about: Any,
) -> None:
    call = Call(experiment=experiment, action=action, actor=actor or _account(), reason=reason, **about)
    placed = place(settings, call, now_ms=time.time_ns() // 1_000_000, nonce=secrets.token_hex(16))
    if not as_json:
        order = placed.order.data
        click.echo(
            f"{experiment} version {order.version}: {_word(action)} ordered by {order.actor}: {placed.order.id}"
        )
    outcome = wait(settings, placed, timeout_s=timeout_s) if waits else None
    if as_json:
        print_json(_answer(placed, outcome))
    elif outcome is not None:
        click.echo(f"{outcome.fate}: {outcome.text}", err=outcome.fate is not Fate.ENACTED)
    if outcome is not None and outcome.fate is not Fate.ENACTED:
        raise click.exceptions.Exit(EXIT_NOT_ENACTED)


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise ConfigError("this account has no user name; --actor says who orders") from error


def _word(action: OperatorAction) -> str:
    return action.value.replace("_", "-")


def _answer(placed: Placed, outcome: Outcome | None) -> dict[str, object]:
    """What --json prints: the record, and with --wait what became of it."""
    answer: dict[str, object] = {"order": placed.order, "fate": None, "text": None, "config": None}
    if outcome is not None:
        answer |= {"fate": outcome.fate, "text": outcome.text, "config": outcome.config}
    return answer


pause = _command(
    "pause",
    OperatorAction.PAUSE,
    "Hold the ramp and the weights of an experiment where they are. Proven harm still stops it.",
)
resume = _command("resume", OperatorAction.RESUME, "Let a paused experiment go on.")
stop = _command(
    "stop",
    OperatorAction.STOP,
    "End an experiment at once, whatever the evidence says: all units get the control.",
)
ship = _command(
    "ship",
    OperatorAction.SHIP,
    "End an experiment at once, whatever the evidence says: all units get the arm.",
    click.option("--arm", metavar="ARM", help="The arm that wins.  [default: the only treatment]"),
    example="--arm canary",
)
approve = _command(
    "approve",
    OperatorAction.APPROVE,
    "Let the stop or ship happen that the service has proposed.",
    _signal_option,
    example="--signal 3f2a90c1",
)
reject = _command(
    "reject",
    OperatorAction.REJECT,
    "Refuse the stop or ship that the service has proposed; it is not proposed again before a reset.",
    _signal_option,
    example="--signal 3f2a90c1",
)
reset = _command(
    "reset",
    OperatorAction.RESET,
    "Take back a stop, a ship or a proposal, or open what monitors have latched. After a stop a ramp begins again at "
    "its first stage.",
    _signal_option,
    click.option(
        "--monitors",
        is_flag=True,
        help="Take nothing back, and only open what monitors have latched.  [default: where there is nothing else]",
    ),
)
set_stage = _command(
    "set-stage",
    OperatorAction.SET_STAGE,
    "Move the ramp of an experiment to a stage. The minimums of that stage begin anew.",
    click.option("--stage", metavar="N", type=int, required=True, help="Its number, from 0."),
    example="--stage 2",
)
