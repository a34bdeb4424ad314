"""docs/many-experiments.md: its examples are what the code says, its links lead somewhere."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import msgspec
import yaml
from rich.console import Console

from stream_xp.cli import overlap as command
from stream_xp.domain.assignment import HASH, assigned, slot_of
from stream_xp.domain.codec import Limits
from stream_xp.domain.layer_rules import Relation
from stream_xp.domain.layers import Champion
from stream_xp.domain.publication import next_config, next_record
from stream_xp.services.oracle.recompute import LoggedRecord, LoggedSpec, screen
from stream_xp.services.overlap.count import Counts
from stream_xp.services.overlap.report import OverlapReport
from stream_xp.services.overlap.service import _report
from stream_xp.services.spec_file import load_spec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "many-experiments.md"
TEXT = PAGE.read_text()
ADR = ROOT / "docs" / "adr" / "0017-slots-are-the-applications-and-overlap-is-counted.md"
T = 1_000_000
FAR = 10**12
MEMBERS = 8_000


def reported() -> OverlapReport:
    """Four experiments on members who order; the larger button and the new ranking do better together.

    One application of the delivery experiment does not follow the slots.
    """
    rng = random.Random(17)
    names = ("button", "delivery", "holdout", "search")
    records = [
        next_record(None, load_spec(ROOT / f"examples/many-experiments/{name}.yaml"), effective_ms=0)
        for name in names
    ]
    configs = {one.spec.experiment: next_config(None, one) for one in records}
    exposures: list[LoggedRecord] = []
    rewards: list[LoggedRecord] = []

    def add(log: list[LoggedRecord], unit: str, **fields: object) -> None:
        event = {"id": f"{len(log)}", "time": T, "unit": unit, **fields}
        log.append(LoggedRecord(len(log), T, unit.encode(), json.dumps(event).encode()))

    for n in range(MEMBERS):
        unit, arms = f"member-{n}", set()
        for config in configs.values():
            holdout = None if config.program is None else configs[config.program]
            found = assigned(config, unit, holdout=holdout)
            if found.exposed:
                arms.add(found.arm)
                add(exposures, unit, experiment=config.experiment, arm=found.arm)
        if n < 100 and slot_of("checkout", unit, 1000) < 500:
            add(exposures, unit, experiment="checkout-delivery", arm="with")
        if rng.random() < (0.5 if {"large", "new"} <= arms else 0.2):
            add(rewards, unit, metric="order", value=1)
    counts = Counts()
    counts.add(
        screen(
            exposures,
            rewards,
            [LoggedSpec(0, one.spec.experiment, one) for one in records],
            watermark_ms=FAR,
            allowed_lateness_ms=FAR // 10,
            activation_delay_ms=0,
            limits=Limits(),
            behind_watermark={},
        ),
        records,
    )
    read = {"exposures": len(exposures), "rewards": len(rewards)}
    return _report(records, counts, read=read, notes=[], alpha=0.05)


def shown(report: OverlapReport) -> str:
    console = Console(file=io.StringIO(), width=command.PIPE_WIDTH, highlight=False)
    command.write(report, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def test_the_output_on_the_page_is_that_of_the_command() -> None:
    assert f"```text\n{shown(reported())}\n```" in TEXT


def test_the_page_names_every_relation_and_the_hash() -> None:
    assert all(f"| `{relation}` |" in TEXT for relation in Relation)
    assert HASH == "sha256-48"
    assert "the first 12 hexadecimal digits of SHA-256" in TEXT


def test_its_champion_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(champion: .*?)```", TEXT, re.DOTALL)
    assert msgspec.convert(yaml.safe_load(block)["champion"], Champion).arm == "green"


def test_links_lead_somewhere() -> None:
    for page in (PAGE, ADR):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target


if __name__ == "__main__":
    # python tests/unit/test_docs_many_experiments.py prints what belongs on the page.
    print(shown(reported()))
