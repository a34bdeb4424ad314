"""`stream-xp validate`: check experiment files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from stream_xp.cli.common import EXIT_FAILED, examples, json_option, print_json
from stream_xp.services.spec_file import LocatedSpec, SpecFault, SpecFaults, load_located
from stream_xp.services.spec_files import collision_faults


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one file; `experiment` and the rest are None if it has faults."""

    file: str
    valid: bool
    experiment: str | None = None
    version: int | None = None
    design_hash: str | None = None
    faults: tuple[dict[str, str | int], ...] = ()


@click.command(
    epilog=examples(
        "stream-xp validate examples/canary/spec.yaml", "stream-xp validate experiments/*.yaml --json"
    ),
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def validate(files: tuple[Path, ...], *, as_json: bool) -> None:
    """Check experiment files; print every fault with its line and exit 1 if there is one.

    Several files are also checked beside each other: slots that two of them take, units that they may not
    share. Asks no broker; what runs already is checked by `apply --dry-run`.
    """
    read = [_read(file) for file in files]
    beside = iter(collision_faults([found for found in read if isinstance(found, LocatedSpec)]))
    verdicts = [
        _verdict(file, found, next(beside) if isinstance(found, LocatedSpec) else [], echo=not as_json)
        for file, found in zip(files, read, strict=True)
    ]
    if as_json:
        print_json(verdicts)
    if not all(verdict.valid for verdict in verdicts):
        raise click.exceptions.Exit(EXIT_FAILED)


def _read(file: Path) -> LocatedSpec | SpecFaults:
    try:
        return load_located(file)
    except SpecFaults as error:
        return error


def _verdict(
    file: Path, found: LocatedSpec | SpecFaults, beside: Sequence[SpecFault], *, echo: bool
) -> Verdict:
    error = SpecFaults(str(file), beside) if isinstance(found, LocatedSpec) else found
    if isinstance(found, SpecFaults) or beside:
        for line in error.lines() if echo else ():
            click.echo(line, err=True)
        return Verdict(file=str(file), valid=False, faults=tuple(map(_fault, error.faults)))
    spec = found.spec
    if echo:
        click.echo(f"{file}: {spec.experiment} version {spec.version} is valid")
    return Verdict(
        file=str(file),
        valid=True,
        experiment=spec.experiment,
        version=spec.version,
        design_hash=spec.design_hash(),
    )


def _fault(fault: SpecFault) -> dict[str, str | int]:
    return fault._asdict()
