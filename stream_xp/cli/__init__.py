"""The program `stream-xp`: one group, whose commands are imported when they are called.

`stream-xp validate` in an editor or a commit hook should answer at once, and the engine takes seconds to
import.
"""

from __future__ import annotations

import importlib
import logging
import re
from typing import Final

import click

from stream_xp.cli.common import CommandGroup, examples

# Name, module:attribute, and what `stream-xp --help` says of it without importing it.
COMMANDS: Final = {
    "demo": ("stream_xp.cli.demo:demo", "Watch the service decide three simulated experiments."),
    "worker": ("stream_xp.cli.worker:worker", "Run the engine: join, test, decide."),
    "health": ("stream_xp.cli.health:health", "Say whether the worker beside it goes on."),
    "topics": ("stream_xp.cli.topics:topics", "Create, check and show the topics."),
    "validate": (
        "stream_xp.cli.validate:validate",
        "Check experiment files; name every fault with its line.",
    ),
    "plan": ("stream_xp.cli.plan:plan", "Show what an experiment can find, and when it will."),
    "apply": ("stream_xp.cli.apply:apply", "Publish an experiment file, or archive an experiment."),
    "produce": ("stream_xp.cli.produce:produce", "Send exposures and rewards from a file or standard input."),
    "traffic": ("stream_xp.cli.traffic:traffic", "Send the traffic of the demo's experiments to a broker."),
    "status": ("stream_xp.cli.status:status", "Show the newest evidence of each experiment."),
    "signals": ("stream_xp.cli.signals:signals", "Show the decisions and the orders, and follow new ones."),
    "gate": ("stream_xp.cli.gate:gate", "Tell by the exit code whether an experiment may go on."),
    "api": ("stream_xp.cli.api:api", "Serve evidence and deployment gates over HTTP."),
    "notify": ("stream_xp.cli.notify:notify", "Tell chat and CI what is decided, by signed webhooks."),
    "pause": ("stream_xp.cli.operate:pause", "Hold an experiment where it is."),
    "resume": ("stream_xp.cli.operate:resume", "Let a paused experiment go on."),
    "stop": ("stream_xp.cli.operate:stop", "End an experiment: all units get the control."),
    "ship": ("stream_xp.cli.operate:ship", "End an experiment: all units get an arm."),
    "approve": ("stream_xp.cli.operate:approve", "Let a proposed stop or ship happen."),
    "reject": ("stream_xp.cli.operate:reject", "Refuse a proposed stop or ship."),
    "reset": ("stream_xp.cli.operate:reset", "Take back a stop, a ship or a proposal."),
    "set-stage": ("stream_xp.cli.operate:set_stage", "Move the ramp of an experiment to a stage."),
    "overlap": (
        "stream_xp.cli.overlap:overlap",
        "Show which experiments share units, and whether they interact.",
    ),
    "memo": ("stream_xp.cli.memo:memo", "Write the record of a decision: what was seen, and why."),
    "replay": ("stream_xp.cli.replay:replay", "Send a recorded file through a broker and the engine."),
    "oracle": (
        "stream_xp.cli.oracle:oracle",
        "Compute the statistics again from the raw topics and compare.",
    ),
    "verify": ("stream_xp.cli.verify:verify", "Derive a past decision again from the raw topics."),
    "simulate": ("stream_xp.cli.simulate:simulate", "Run scenarios with a known truth through the engine."),
    "infer": ("stream_xp.cli.infer:infer", "Compute any method on numbers of your own, a line of JSON each."),
    "bench": ("stream_xp.cli.bench:bench", "Measure the engine on this machine."),
    "calibrate": ("stream_xp.cli.calibrate:calibrate", "Measure the error rate of every method."),
}


def _keep_paragraphs(command: click.Command) -> None:
    r"""Turn each line `\b` of the help into the character that keeps click from filling what follows.

    A docstring with a backslash is raw, so it holds the escape and not the character.
    """
    if command.help:
        command.help = re.sub(r"^( *)\\b$", "\\1\b", command.help, flags=re.MULTILINE)
    if isinstance(command, click.Group):
        for child in command.commands.values():
            _keep_paragraphs(child)


class LazyGroup(CommandGroup):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """Return every name, in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return a command; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{attribute} is no command")
        _keep_paragraphs(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "stream-xp demo",
        "stream-xp validate checkout.yaml",
        "stream-xp worker --bootstrap kafka-1:9092",
        "stream-xp COMMAND --help",
    ),
)
@click.version_option(package_name="stream-xp", prog_name="stream-xp")
def main() -> None:
    """Stream sequential tests: exposures and rewards on Kafka in, stop and ship decisions on Kafka out."""
    # kafka-python logs each attempt to connect; a command says once, in one line, what did not work.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
