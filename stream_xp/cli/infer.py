"""`stream-xp infer`: the methods as a calculator."""

from __future__ import annotations

import inspect

import click
import msgspec

from stream_xp.cli.common import EXIT_FAILED, examples
from stream_xp.services.infer import METHODS, answer_lines


@click.command(
    epilog=examples(
        """echo '{"method": "sample_ratio", "epochs": [{"weights": [0.5, 0.5], "counts": [510, 440]}]}'"""
        " | stream-xp infer",
        "stream-xp infer < questions.jsonl | jq .log_e",
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Changes nothing: the answers are JSON in any case.")
def infer(*, as_json: bool) -> None:  # noqa: ARG001 (every command has it)
    """Answer each line of standard input, a JSON object with a method and its inputs, by one line of JSON.

    An answer has estimate, lower, upper, log_e and p where they apply; null is an unbounded end. A line that
    is wrong is answered by an error, the rest go on, and the exit code is 1. docs/infer.md has an example of
    each method.
    """
    failed = False
    for answer in answer_lines(click.get_binary_stream("stdin")):
        failed = failed or "error" in answer
        click.echo(msgspec.json.encode(answer))
    if failed:
        raise click.exceptions.Exit(EXIT_FAILED)


infer.help = f"{inspect.cleandoc(infer.help or '')}\n\nMethods: {', '.join(METHODS)}."
