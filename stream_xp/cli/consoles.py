"""How commands write for people: tables that a pipe does not cut off, and how far a long reading has come."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stream_xp.services.oracle.reading import ReadStep


def table_console(pipe_width: int = 120) -> Console:
    """Standard output for tables.

    Args:
        pipe_width: characters of a line where standard output is no terminal. A file or a pipe has no width; lines that
            are cut off would lose numbers.
    """
    return Console(highlight=False, width=None if sys.stdout.isatty() else pipe_width)


def plain(text: str) -> str:
    """Return a line in which no name or reason of a topic can steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def words(text: str, style: str = "") -> Text:
    """Return a line for a table or a page: :func:`plain`, and never markup."""
    return Text(plain(text), style=style)


@contextlib.contextmanager
def reading_shown() -> Iterator[Callable[[ReadStep], None]]:
    """Show on standard error, for the block, what is told of how far raw topics are read."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("reading", total=None)

        def show(step: ReadStep) -> None:
            name = f"{step.topic}[{step.partition}]"
            display.update(task, description=name, completed=step.done, total=step.total)

        yield show
