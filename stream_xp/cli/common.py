"""What every command shares: options for settings, one-line errors with exit codes, JSON output."""

from __future__ import annotations

import errno
import functools
import os
import sys
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import click
import msgspec

from stream_xp.errors import ConfigError, DependencyError, StreamXpError
from stream_xp.settings import ENVIRONMENT_PREFIX, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2
EXIT_UNKNOWN: Final = 2
"""Of commands that compare: nobody can say."""
EXIT_UNWRITTEN: Final = 2
"""Not 1, which for `oracle` and others is an answer."""
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

P = ParamSpec("P")
R = TypeVar("R")

_SETTING_HELP: Final = {
    "bootstrap": ("HOST:PORT,...", "Brokers to ask first."),
    "broker": ("apache|embedded", "Kind of broker."),
    "prefix": ("TEXT", "What every topic name starts with."),
    "partitions": ("N", "Partitions of exposures, rewards and state."),
    "replication": ("N", "Copies of each partition."),
    "min_insync_replicas": ("N", "Copies that must have a write before it is acknowledged."),
    "group_id": ("TEXT", "Consumer group of the workers."),
    "roles": ("ingest,decide", "Stages that this worker runs."),
    "allowed_lateness_ms": ("MS", "Append time minus event time over which an event is late."),
    "activation_delay_ms": ("MS", "Append time from which a spec governs, after its own append time."),
    "future_tolerance_ms": ("MS", "Event time minus append time over which an event is dead-lettered."),
    "max_record_bytes": ("BYTES", "Longest record that is decoded."),
    "metrics_host": ("HOST", "Where metrics are served."),
    "metrics_port": ("PORT", "Port at which metrics are served; 0 for any that is free."),
    "api_host": ("ADDRESS", "Address that the API listens on."),
    "api_port": ("PORT", "Port of the API; 0 for any that is free."),
    "api_allowed_hosts": ("NAME,...", "Names by which clients may call the API, beside those of loopback."),
    "notify_allowed_hosts": ("NAME,...", "Hosts that may be sent to, by their exact names."),
    "idle_grace_ms": ("MS", "How long a quiet partition holds the watermark back."),
}


class OneLineError(click.ClickException):
    """An error shown as one line on standard error, with an exit code."""

    def __init__(self, error: StreamXpError, *, exit_code: int | None = None) -> None:
        super().__init__(str(error))
        usual = EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
        self.exit_code = usual if exit_code is None else exit_code


class CommandGroup(click.Group):
    """A group whose commands end with one line and an exit code instead of a traceback.

    A ConfigError exits 2, every other StreamXpError 1. Output for which there is no room exits 2.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except StreamXpError as error:
            raise OneLineError(error) from error
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _no_room(error) from error


def _no_room(error: OSError) -> OneLineError:
    # What stands in the buffer would be written again when the program ends, and fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    where = f" to {error.filename}" if error.filename else ""
    refusal = OneLineError(DependencyError(f"the output could not be written{where}: {error.strerror}"))
    refusal.exit_code = EXIT_UNWRITTEN
    return refusal


def examples(*lines: str) -> str:
    """Return the end of a help text, with one command per line."""
    # click joins the lines of a paragraph unless it starts with a backspace character.
    return "\b\nExamples:\n" + "\n".join("  " + line for line in lines)


def with_settings(*names: str) -> Callable[[Callable[Concatenate[Settings, P], R]], Callable[P, R]]:
    """Give a command one option per named setting, and the loaded Settings as its first argument.

    Secrets have no option: an argument list is readable by every process of a machine.
    """

    def decorate(command: Callable[Concatenate[Settings, P], R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            overrides = {name: kwargs.pop(name) for name in names}
            return command(Settings.load(os.environ, **overrides), *args, **kwargs)

        wrapped: Callable[P, R] = run
        for name in reversed(names):
            wrapped = _setting_option(name)(wrapped)
        return wrapped

    return decorate


def _setting_option(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    metavar, text = _SETTING_HELP[name]
    default = next(f.default for f in msgspec.structs.fields(Settings) if f.name == name)
    shown = ",".join(default) if isinstance(default, tuple) else default
    return click.option(
        "--" + name.replace("_", "-"),
        name,
        metavar=metavar,
        help=f"{text}  [{ENVIRONMENT_PREFIX}{name.upper()}; default: {shown}]",
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
