"""`stream-xp verify`: a past decision, derived again from the raw topics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
from rich.table import Table
from rich.text import Text

from stream_xp.cli.common import (
    EXIT_FAILED,
    EXIT_UNKNOWN,
    OneLineError,
    examples,
    json_option,
    print_json,
    with_settings,
)
from stream_xp.cli.consoles import plain, reading_shown, table_console
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.verify.service import Verdict, Verification
from stream_xp.services.verify.service import verify as derive

if TYPE_CHECKING:
    from stream_xp.services.verify.compare import Line
    from stream_xp.settings import Settings

PIPE_WIDTH: Final = 160
_DECISIVE: Final = ("signal ", "code version", "watermark", "design_hash", "statistics_hash", "runtime_ms")
_EVIDENCE: Final = (" log_e", " lower", " upper")


@click.command(
    epilog=examples(
        "stream-xp verify 3f9c2a71d0b84e5f9a1c6d2e7b408f13",
        "stream-xp signals --json | jq -r .id | xargs -n 1 stream-xp verify",
    ),
)
@with_settings(
    "bootstrap",
    "broker",
    "prefix",
    "allowed_lateness_ms",
    "activation_delay_ms",
    "future_tolerance_ms",
    "max_record_bytes",
    "idle_grace_ms",
)
@click.argument("signal_id")
@json_option
def verify(settings: Settings, *, signal_id: str, as_json: bool) -> None:
    """Derive a decision again from the raw topics, and compare all of it.

    The statistics are computed by the oracle at exactly the offsets and watermarks that the signal names, and must
    have the same hash; then every test is computed again. Exits 0 if the signal follows from the raw topics, 1 if
    a value differs, 2 if nobody can say: no such signal, no broker, records deleted, or other methods.

    SIGNAL_ID is in the last column of `stream-xp signals`; its first 8 characters will do, if no other id has them.
    A signal names the settings it was made under; the options for them are only used where it names none.
    """
    try:
        with reading_shown() as show:
            found = derive(settings, signal_id, progress=show)
    except (DependencyError, ConfigError) as error:
        if as_json:
            print_json({"verdict": Verdict.UNKNOWN, "reason": str(error)})
        raise OneLineError(error, exit_code=EXIT_UNKNOWN) from error
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
    else:
        for one in found:
            _print(one)
    if code := exit_code(found):
        raise click.exceptions.Exit(code)


def exit_code(found: list[Verification]) -> int:
    """Return 0 if every record follows from the raw topics, 1 if one does not, else 2."""
    verdicts = {one.verdict for one in found}
    if Verdict.DIFFERENT in verdicts:
        return EXIT_FAILED
    return EXIT_UNKNOWN if Verdict.UNKNOWN in verdicts else 0


def _print(one: Verification) -> None:
    console = table_console(PIPE_WIDTH)
    if one.lines:
        console.print(_table(one))
    for note in one.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    console.print(Text(_verdict(one)), soft_wrap=True)


def _table(one: Verification) -> Table:
    # Text, never markup: names come from files and events.
    table = Table("what", "recorded", "derived", "", box=None, pad_edge=False, header_style="bold")
    shown = [line for line in one.lines if line.equal is False or _is_shown(line)]
    for line in shown:
        mark = {True: "equal", False: "DIFFERENT", None: "not compared"}[line.equal]
        style = "bold red" if line.equal is False else ""
        table.add_row(*(Text(plain(text), style) for text in (line.what, line.recorded, line.derived, mark)))
    return table


def _is_shown(line: Line) -> bool:
    """Whether a value is shown though it is equal: the decisive ones, and the evidence with its bounds."""
    evidence = line.what.startswith(("metrics", "sample_ratio")) and line.what.endswith(_EVIDENCE)
    return line.what.startswith(_DECISIVE) or (evidence and line.recorded != "-")


def _verdict(one: Verification) -> str:
    about = f"signal {one.signal_id} at {one.place} ({one.experiment} version {one.version})"
    if one.reason is not None:
        return f"cannot say: {about}: {one.reason}"
    first = one.first_difference
    if first is None:
        compared = sum(line.equal is not None for line in one.lines)
        return f"equal: {about} follows from the raw topics, {compared} values compared"
    return f"different: {about}: {first.what}: recorded {first.recorded}, derived {first.derived}"
