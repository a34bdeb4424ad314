"""`stream-xp apply`: publish an experiment file, or archive an experiment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stream_xp.cli.common import EXIT_CONFIG, examples, json_option, print_json, with_settings
from stream_xp.services.publish import Collides, Publication, plan_application, plan_archiving, publish
from stream_xp.services.spec_file import SpecFaults, load_located
from stream_xp.services.spec_files import refused

if TYPE_CHECKING:
    from stream_xp.settings import Settings


@click.command(
    epilog=examples(
        "stream-xp apply examples/canary/spec.yaml --dry-run",
        "stream-xp apply examples/canary/spec.yaml --bootstrap kafka-1:9092",
        "stream-xp apply --archive checkout-canary",
    ),
)
@with_settings("bootstrap", "broker", "prefix")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--archive", metavar="EXPERIMENT", help="End an experiment instead; its weights stay.")
@click.option("--dry-run", is_flag=True, help="Say what would change, and publish nothing.")
@json_option
def apply(
    settings: Settings, *, file: Path | None, archive: str | None, dry_run: bool, as_json: bool
) -> None:
    """Publish an experiment file, or archive an experiment.

    The design of a version is frozen once it is published: then only weights, owner and hypothesis may
    change, and anything else needs a higher `version`. Applying the same file again changes nothing.

    A new design is refused where it cannot run beside the experiments that are not archived: slots that are
    taken, units that may not be shared, a holdout or a champion that is none.
    """
    if (file is None) == (archive is None):
        raise click.UsageError("give either FILE or --archive EXPERIMENT")
    if archive is not None:
        publication = plan_archiving(settings, archive)
        if not dry_run:
            publish(settings, publication)
    else:
        publication = _applied(settings, file or Path(), dry_run=dry_run)
    _report(publication, dry_run=dry_run, as_json=as_json)


def _applied(settings: Settings, file: Path, *, dry_run: bool) -> Publication:
    """Apply a file; a rule that it breaks beside others is told with its line."""
    try:
        found = load_located(file)
        try:
            publication = plan_application(settings, found.spec, now_ms=time.time_ns() // 1_000_000)
            if not dry_run:
                publish(settings, publication)
        except Collides as error:
            raise refused(found, error.found, error.where) from error
    except SpecFaults as error:
        for line in error.lines():
            click.echo(line, err=True)
        raise click.exceptions.Exit(EXIT_CONFIG) from error
    return publication


def _report(publication: Publication, *, dry_run: bool, as_json: bool) -> None:
    record, changes = publication.after, publication.changes()
    if as_json:
        print_json(
            {
                "experiment": record.spec.experiment,
                "version": record.spec.version,
                "published": bool(changes) and not dry_run,
                "changes": changes,
                "record": record,
                "config": publication.config_after,
            }
        )
        return
    verb = "would change" if dry_run else "changed"
    name = f"{record.spec.experiment} version {record.spec.version} ({record.status})"
    for change in changes or ("nothing",):
        click.echo(f"{name}: {verb}: {change}")
