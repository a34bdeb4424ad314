"""`stream-xp api`: the HTTP API and the gates."""

from __future__ import annotations

import click

from stream_xp.adapters.logs import configure_logs
from stream_xp.cli.common import examples, with_settings
from stream_xp.services.api.server import run_until_signal
from stream_xp.settings import Settings


@click.command(
    epilog=examples(
        "stream-xp api",
        "STREAM_XP_API_TOKEN_FILE=/run/secrets/api-token stream-xp api --api-port 8081",
        "curl -s localhost:8080/api/v1/experiments/checkout-canary/gate",
    ),
)
@with_settings("bootstrap", "broker", "prefix", "api_host", "api_port", "api_allowed_hosts")
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
    default="INFO",
    show_default=True,
    help="What is logged, as JSON on standard error.",
)
def api(settings: Settings, *, log_level: str) -> None:
    """Serve experiments, evidence and deployment gates over HTTP, until SIGTERM or SIGINT.

    It reads the topics into memory and keeps nothing; any number of them may run. It only reads, unless
    STREAM_XP_API_TOKEN or STREAM_XP_API_TOKEN_FILE gives a token that write requests must carry.
    """
    configure_logs(log_level)
    run_until_signal(settings)
