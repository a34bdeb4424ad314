"""`stream-xp bench`: measure the engine on this machine."""

from __future__ import annotations

import click

from stream_xp.cli.common import CommandGroup, examples, json_option, print_json
from stream_xp.services.bench.evaluation import EvaluationReport, bench_evaluation
from stream_xp.services.bench.gate import GateReport, bench_gate
from stream_xp.services.bench.recovery import Job, bench_recovery, table
from stream_xp.services.bench.service import MAX_EVENTS, IngestReport, bench_ingest


@click.group(cls=CommandGroup, epilog=examples("stream-xp bench ingest"))
def bench() -> None:
    """Measure the engine on this machine. Figures of one run compare; single ones depend on the machine."""


@bench.command(
    epilog=examples("stream-xp bench ingest", "stream-xp bench ingest --events 100000 --rounds 1 --json")
)
@click.option(
    "--events",
    "count",
    type=click.IntRange(1_000, MAX_EVENTS),
    default=400_000,
    show_default=True,
    help="Events for the engine.",
)
@click.option(
    "--baseline-events",
    type=click.IntRange(500, MAX_EVENTS),
    default=40_000,
    show_default=True,
    help="Events for the agent per event; at most --events.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 20), default=3, show_default=True, help="Both in turn, so often."
)
@json_option
def ingest(count: int, baseline_events: int, rounds: int, *, as_json: bool) -> None:
    """Run the engine and, in the same run, a plain Faust agent per event that does the same job.

    Both are processes of their own that read the same events from an embedded broker; CPU is user and system
    time of the whole process. The ratio is taken within each round.
    """
    report = bench_ingest(
        count=count,
        baseline_count=min(baseline_events, count),
        rounds=rounds,
        progress=lambda text: click.echo(text, err=True),
    )
    if as_json:
        print_json(report)
    else:
        click.echo(_table(report))


@bench.command(
    epilog=examples("stream-xp bench evaluate", "stream-xp bench evaluate --experiments 100 --json")
)
@click.option("--experiments", type=click.IntRange(1, 100_000), default=1_000, show_default=True)
@click.option("--metrics", type=click.IntRange(3, 64), default=20, show_default=True, help="Per experiment.")
@click.option("--rounds", type=click.IntRange(1, 20), default=3, show_default=True)
@json_option
def evaluate(experiments: int, metrics: int, rounds: int, *, as_json: bool) -> None:
    """Evaluate simulated experiments of three arms together, and in the same run one after the other."""
    report = bench_evaluation(experiments=experiments, metrics=metrics, rounds=rounds)
    if as_json:
        print_json(report)
    else:
        click.echo(_evaluation_lines(report))


@bench.command(
    epilog=examples("stream-xp bench recovery", "stream-xp bench recovery --rows 1000000 --rows 10000000")
)
@click.option(
    "--rows",
    "sizes",
    type=click.IntRange(1_000, 100_000_000),
    multiple=True,
    default=(1_000_000,),
    show_default=True,
    help="(Unit, experiment) pairs before the traffic; may be given again, each runs by itself.",
)
@click.option(
    "--ten-million", is_flag=True, help="Also 10,000,000 rows: about 4 GB, and ten minutes with --rounds 1."
)
@click.option(
    "--events",
    type=click.IntRange(1_000, 5_000_000),
    default=500_000,
    show_default=True,
    help="Of a round: about what a worker reads in 2 s.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 20), default=3, show_default=True, help="Of each figure, the median."
)
@click.option(
    "--bootstrap",
    metavar="HOST:PORT,...",
    help="An Apache Kafka that takes the snapshots; else they stay in memory.",
)
@json_option
def recovery(
    sizes: tuple[int, ...],
    events: int,
    rounds: int,
    bootstrap: str | None,
    *,
    ten_million: bool,
    as_json: bool,
) -> None:
    """Fill a partition with units, take snapshots of what changed and, in the same run, of all, and recover.

    The share of ingest is CPU time to write a snapshot by CPU time to decode, join and count the events since the
    one before, in one process, for a worker that reads without end. As in the worker, the next snapshot is due 2 s
    after the last one began, or 20 times as long as that took, if that is more. Fetching from Kafka is not counted
    as ingest. With --bootstrap, sending is counted as snapshot. Units have values from the beginning; rewards are
    of the newest 5 % of the units, or of any: then nearly every page of the values changes.

    "After every" so many events says what a snapshot would cost as a share of one round, if none ever waited
    longer. Recovery is wall time: to read the state topic, to restore the state, and to apply the next block.

    The embedded broker keeps only 5 MB of a partition, so snapshots stay in memory unless a Kafka is given.
    """
    rows = (*sizes, 10_000_000) if ten_million else sizes
    jobs = [Job(rows=size, events=events, rounds=rounds, bootstrap=bootstrap) for size in rows]
    reports = bench_recovery(jobs, progress=lambda text: click.echo(text, err=True))
    if as_json:
        print_json(reports)
    else:
        click.echo(table(reports))


@bench.command(
    epilog=examples("stream-xp bench gate", "stream-xp bench gate --rate 1000 --seconds 30 --json")
)
@click.option("--url", metavar="URL", help="What is asked.  [default: an API and a worker of its own]")
@click.option(
    "--rate", type=click.FloatRange(1.0, 100_000.0), default=500.0, show_default=True, help="Per second."
)
@click.option("--connections", type=click.IntRange(1, 500), default=50, show_default=True)
@click.option("--seconds", type=click.FloatRange(1.0, 3600.0), default=10.0, show_default=True)
@click.option(
    "--events",
    "events_per_s",
    type=click.IntRange(1, 20_000),
    default=500,
    show_default=True,
    help="Exposures per second that its worker ingests meanwhile.",
)
@json_option
def gate(
    url: str | None, *, rate: float, connections: int, seconds: float, events_per_s: int, as_json: bool
) -> None:
    """Ask a gate at a steady rate, while a worker ingests; times run from when a request was due."""
    report = bench_gate(
        url=url, rate=rate, connections=connections, seconds=seconds, events_per_s=events_per_s
    )
    if as_json:
        print_json(report)
    else:
        click.echo(_gate_lines(report))


def _gate_lines(report: GateReport) -> str:
    statuses = ", ".join(f"{count:,} x {status}" for status, count in sorted(report.statuses.items()))
    return (
        f"{report.answered_per_s:.0f} requests/s of {report.rate:.0f} over {report.connections} connections: "
        f"p50 {report.p50_ms:.1f} ms, p99 {report.p99_ms:.1f} ms, longest {report.max_ms:.1f} ms; {statuses}; "
        f"{report.events:,} events meanwhile"
    )


def _evaluation_lines(report: EvaluationReport) -> str:
    size = f"{report.experiments:,} experiments x {report.metrics} metrics x {report.arms} arms"
    return (
        f"{size}: {report.together_s:.2f} s of CPU together, {report.alone_s:.2f} s one after the other, "
        f"ratio {report.ratio:.1f} (least of {report.rounds})"
    )


def _table(report: IngestReport) -> str:
    lines = [f"{'':24}{'events':>10}{'events/s':>12}{'CPU µs/event':>15}{'RSS MB':>9}"]
    for name, summary in (
        ("stream_xp engine", report.engine),
        ("Faust agent per event", report.agent_per_event),
    ):
        lines.append(
            f"{name:24}{summary.events:>10,}{summary.events_per_s:>12,.0f}"
            f"{summary.cpu_us_per_event:>15.2f}{summary.rss_mb:>9.0f}"
        )
    lines.append(
        f"\nCPU ratio {report.ratio:.1f} (median of {report.rounds}, {report.ratio_min:.1f} to "
        f"{report.ratio_max:.1f}); {report.event_bytes:.0f} bytes per event"
    )
    return "\n".join(lines)
