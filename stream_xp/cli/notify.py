"""`stream-xp notify`: signed webhooks for chat and CI."""

from __future__ import annotations

import os
from pathlib import Path

import click

from stream_xp.adapters.logs import configure_logs
from stream_xp.cli.common import examples, with_settings
from stream_xp.services.notify.service import run_until_signal
from stream_xp.services.notify.targets import load_targets
from stream_xp.settings import Settings


@click.command(
    epilog=examples(
        "STREAM_XP_NOTIFY_ALLOWED_HOSTS=hooks.slack.com stream-xp notify --targets targets.yaml",
        "stream-xp notify --targets targets.yaml --notify-allowed-hosts ci.example.com --check",
    ),
)
@with_settings(
    "bootstrap", "broker", "prefix", "group_id", "notify_allowed_hosts", "metrics_host", "metrics_port"
)
@click.option(
    "--targets",
    "path",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Who is told what: a YAML file.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Only read the file and the secrets: say nothing if all is well, exit 2 if not.",
)
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
    default="INFO",
    show_default=True,
    help="What is logged, as JSON on standard error.",
)
def notify(settings: Settings, *, path: Path, check: bool, log_level: str) -> None:
    """Post decisions and orders to the targets of a file as signed webhooks, until SIGTERM or SIGINT.

    Each target is a consumer group of its own, so that none waits for another; several processes share the work. A
    message is sent at least once: again after a failure, up to 8 times in a quarter of an hour.
    """
    targets = load_targets(path, settings, os.environ)
    if check:
        return
    configure_logs(log_level)
    run_until_signal(settings, targets)
