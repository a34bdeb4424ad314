"""`stream-xp traffic`: what an application would send, without one."""

from __future__ import annotations

import click

from stream_xp.cli.common import examples, json_option, print_json, with_settings
from stream_xp.services.traffic import Sent, send_traffic
from stream_xp.settings import Settings


@click.command(
    epilog=examples(
        "stream-xp traffic --bootstrap 127.0.0.1:9092", "stream-xp traffic --units-per-s 5000 --duration 60"
    ),
)
@with_settings("bootstrap", "broker", "prefix", "activation_delay_ms")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of the traffic.")
@click.option(
    "--units-per-s",
    type=click.FloatRange(min=0, min_open=True, max=50_000),
    default=1_000.0,
    show_default=True,
    help="New units a second, of all experiments together.",
)
@click.option(
    "--harm-after",
    "harm_after_s",
    metavar="S",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds after which the canary begins to harm.",
)
@click.option(
    "--duration",
    "duration_s",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds of traffic; until it is ended without.",
)
@json_option
def traffic(
    settings: Settings,
    *,
    seed: int,
    units_per_s: float,
    harm_after_s: float,
    duration_s: float | None,
    as_json: bool,
) -> None:
    """Apply the demo's three experiments and send their traffic to a broker, for as long as you like.

    The errors of the checkout canary rise from 1 % to 3 %, one of three pictures is better, and an A/A test finds
    nothing. Units follow the weights on the config topic; what is stopped or shipped is exposed no more.
    """
    sent = send_traffic(
        settings,
        seed=seed,
        units_per_s=units_per_s,
        harm_after_s=harm_after_s,
        duration_s=duration_s,
        report=lambda so_far: None if as_json else click.echo(_line(so_far)),
    )
    if as_json:
        print_json(sent._asdict())
    else:
        click.echo(_line(sent))


def _line(sent: Sent) -> str:
    status = ", ".join(f"{name} {status}" for name, status in sorted(sent.status.items()))
    return f"sent {sent.exposures:,} exposures and {sent.rewards:,} rewards; {status}"
