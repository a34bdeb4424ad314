"""`stream-xp gate`: the verdict of every gate as an exit code."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, Final

import click

from stream_xp.cli.common import examples, json_option, print_json, with_settings
from stream_xp.errors import StreamXpError
from stream_xp.services.api.ask import ask
from stream_xp.services.api.gates import EXIT_CODES, line

if TYPE_CHECKING:
    from stream_xp.settings import Settings

EXIT_NO_ANSWER: Final = 3
WAIT_S: Final = 600.0


class GateCommand(click.Command):
    """A command whose exit codes are answers: whatever goes wrong is no answer, never a stop or a pass."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.exit_code = EXIT_NO_ANSWER
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except StreamXpError as error:
            click.echo(f"Error: {error}", err=True)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
        except Exception:  # noqa: BLE001 (Python would end with 1, which is an answer)
            traceback.print_exc()
        raise click.exceptions.Exit(EXIT_NO_ANSWER)


@click.command(
    cls=GateCommand,
    epilog=examples(
        "stream-xp gate checkout-canary --arm canary",
        "stream-xp gate checkout-canary --arm canary --wait --timeout 1800",
    ),
)
@with_settings("bootstrap", "broker", "prefix")
@click.argument("experiment")
@click.option("--arm", metavar="ARM", help="A treatment arm.  [default: all of them]")
@click.option("--wait", "waits", is_flag=True, help="Wait until it is safe or stopped.")
@click.option(
    "--timeout",
    "timeout_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0.0),
    default=WAIT_S,
    show_default=True,
    help="How long --wait waits.",
)
@json_option
def gate(
    settings: Settings, *, experiment: str, arm: str | None, waits: bool, timeout_s: float, as_json: bool
) -> None:
    """Tell by the exit code whether an experiment may go on.

    \b
    0  safe: every guardrail is proven non-inferior, or the arm has shipped
    1  stop: it is stopped, until a person resets it
    2  inconclusive: not known yet, or a person holds it
    3  no data: nothing valid is known, or no broker answers
    """  # noqa: D301 (click's own escape)
    told = ask(settings, experiment, arm, wait_s=timeout_s if waits else 0.0)
    if as_json:
        print_json(told)
    else:
        click.echo(line(told))
    raise click.exceptions.Exit(EXIT_CODES[told.verdict])
