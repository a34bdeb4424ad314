"""`stream-xp worker`: run the engine."""

from __future__ import annotations

import click

from stream_xp.adapters.logs import configure_logs
from stream_xp.cli.common import examples, with_settings
from stream_xp.services.worker import run_until_signal
from stream_xp.settings import Settings


@click.command(
    epilog=examples(
        "stream-xp worker --bootstrap kafka-1:9092",
        "stream-xp worker --roles ingest",
        "stream-xp worker --metrics-port 9464",
        "STREAM_XP_ALLOWED_LATENESS_MS=10000 stream-xp worker",
    ),
)
@with_settings(
    "bootstrap",
    "broker",
    "prefix",
    "partitions",
    "replication",
    "group_id",
    "roles",
    "metrics_host",
    "metrics_port",
)
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
    default="INFO",
    show_default=True,
    help="What is logged, as JSON on standard error.",
)
def worker(settings: Settings, *, log_level: str) -> None:
    """Join exposures and rewards, test, and decide, until SIGTERM or SIGINT.

    On a signal everything is written out within five seconds. Any other end is an error with a non-zero exit:
    start it again, and it goes on from the last snapshot. More workers of one group share the partitions.
    """
    configure_logs(log_level)
    run_until_signal(settings)
