"""Experiments beside each other on the embedded broker: `apply` refuses, `overlap` counts, a holdout has a result."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner
from oracle_world import run
from worker_process import DEADLINE_S

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.cli import main
from stream_xp.domain.assignment import assigned, slot_of
from stream_xp.domain.decision import ConfigRecord
from stream_xp.services.evidence import read_standings
from stream_xp.services.overlap import OverlapReport
from stream_xp.services.publish import Collides, known_records, plan_application, publish
from stream_xp.services.spec_file import load_spec
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from stream_xp.adapters.embedded_broker import EmbeddedBroker
    from stream_xp.domain.experiment import ExperimentSpec

pytestmark = [pytest.mark.broker, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples" / "many-experiments"
NAMES = ("holdout", "button", "delivery", "search")
UNITS = 1_000
LATENESS_MS = 10_000
"""A loaded machine takes its time between the clock and the log."""


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker) -> Settings:
    found = Settings(
        bootstrap=embedded_broker.bootstrap,
        broker="embedded",
        partitions=2,
        allowed_lateness_ms=LATENESS_MS,
        activation_delay_ms=500,
        idle_grace_ms=500,
    )
    for topic in declared_topics(found):
        embedded_broker.create_topic(topic.name, topic.partitions)
    return found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The examples, with windows that end while the test runs."""
    found = {}
    for name in NAMES:
        text = (EXAMPLES / f"{name}.yaml").read_text()
        for window in ("24h", "28d"):
            text = text.replace(f"attribution_window: {window}", "attribution_window: 100ms")
        found[name] = tmp_path / f"{name}.yaml"
        found[name].write_text(text)
    return found


def apply(settings: Settings, file: Path) -> tuple[int, str]:
    options = ["--bootstrap", settings.bootstrap, "--broker", "embedded"]
    done = CliRunner().invoke(main, ["apply", str(file), *options])
    return done.exit_code, done.stderr


def overlap(settings: Settings) -> tuple[int, OverlapReport]:
    options = ["--allowed-lateness-ms", str(LATENESS_MS), "--activation-delay-ms", "500", "--json"]
    done = run("overlap", settings, *options)
    return done.exit_code, msgspec.json.decode(done.stdout, type=OverlapReport)


def configs(settings: Settings) -> dict[str, ConfigRecord]:
    """What an application reads: the newest config of each experiment."""
    with TopicReader(settings, settings.topic("config")) as reader:
        newest = reader.newest_by_key()
    found = [msgspec.json.decode(one.value or b"", type=ConfigRecord) for one in newest.values()]
    return {one.experiment: one for one in found}


def expose(settings: Settings, exposures: list[tuple[str, str, str]]) -> None:
    """Send exposures of (experiment, unit, arm), all of now."""
    with TopicWriter(settings) as writer:
        now_ms = time.time_ns() // 1_000_000
        for experiment, unit, arm in exposures:
            event = {
                "id": f"{experiment}/{unit}/{arm}",
                "time": now_ms,
                "experiment": experiment,
                "unit": unit,
                "arm": arm,
            }
            writer.send(settings.topic("exposures"), key=unit.encode(), value=json.dumps(event).encode())


def assign(known: dict[str, ConfigRecord], units: range) -> list[tuple[str, str, str]]:
    found = []
    for config in known.values():
        holdout = None if config.program is None else known[config.program]
        for n in units:
            got = assigned(config, f"member-{n}", holdout=holdout)
            if got.exposed and got.arm is not None:
                found.append((config.experiment, f"member-{n}", got.arm))
    return found


def until_counted(settings: Settings, worker: WorkerThread, units: dict[str, int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        worker.check()
        results = [standing.result for standing in read_standings(settings, now_ms=0)]
        counted = {one.experiment: sum(arm.units for arm in one.arms) for one in results}
        if all(counted.get(name, 0) >= number for name, number in units.items()):
            return
        assert time.monotonic() < deadline, counted
        time.sleep(0.2)


def test_apply_refuses_an_overlap_and_the_command_finds_shared_units(
    settings: Settings, files: dict[str, Path]
) -> None:
    # The program needs its holdout first.
    code, said = apply(settings, files["button"])
    assert (code, "no holdout program-2026-q4 runs (xp.experiments)" in said) == (2, True)
    for name in NAMES:
        assert apply(settings, files[name]) == (0, "")
    third = files["button"].with_name("third.yaml")
    third.write_text(
        files["button"].read_text().replace("checkout-button", "third").replace("0-499", "490-520")
    )
    code, said = apply(settings, third)
    assert code == 2
    assert said.splitlines() == [
        f"{third}:11:3: layer.slots: {one} of layer checkout already; free are none (xp.experiments)"
        for one in ("checkout-button takes 490-499", "checkout-delivery takes 500-520")
    ]

    known = configs(settings)
    assert set(known) == {"program-2026-q4", "checkout-button", "checkout-delivery", "search-ranking"}
    with WorkerThread(settings) as worker:
        time.sleep(1.0)  # the specs must govern before the first exposure
        honest = assign(known, range(UNITS))
        expose(settings, honest)
        counts = {name: sum(one[0] == name for one in honest) for name in known}
        until_counted(settings, worker, counts)

        code, report = overlap(settings)
        assert code == 0, report
        assert {one.experiment: one.units for one in report.experiments} == counts
        pairs = {(one.first, one.second): one for one in report.pairs}
        assert pairs["checkout-button", "checkout-delivery"].shared == 0
        both = pairs["checkout-button", "search-ranking"]
        assert both.shared == counts["checkout-button"]
        assert both.interaction is not None
        assert both.interaction.decisive == ("search-ranking",)
        holdout = next(one.result for one in read_standings(settings, now_ms=0, experiment="program-2026-q4"))
        assert {arm.arm: arm.units for arm in holdout.arms} == {
            "holdout": sum(slot_of("program", f"member-{n}", 1000) < 50 for n in range(UNITS)),
            "program": UNITS - sum(slot_of("program", f"member-{n}", 1000) < 50 for n in range(UNITS)),
        }

        # An application that does not keep to the slots.
        ours = [f"member-{n}" for n in range(UNITS)]
        astray = [unit for unit in ours if slot_of("checkout", unit, 1000) < 500][:9]
        expose(settings, [("checkout-delivery", unit, "with") for unit in astray])
        until_counted(settings, worker, {"checkout-delivery": counts["checkout-delivery"] + len(astray)})

    code, report = overlap(settings)
    assert code == 1
    outside = {one.experiment: one.outside for one in report.experiments if one.outside}
    assert outside == {"checkout-delivery": 9}
    pair = next(one for one in report.pairs if one.second == "checkout-delivery")
    held = sum(slot_of("program", unit, 1000) < 50 for unit in astray)
    # Who is held out met no experiment before, so is shared by none.
    assert (pair.first, pair.shared, pair.violations) == ("checkout-button", 9 - held, 9 - held)
    assert sum(one.held_out for one in report.experiments) == held
    text = run(
        "overlap", settings, "--allowed-lateness-ms", str(LATENESS_MS), "--activation-delay-ms", "500"
    ).stdout
    assert "not as the files say" in text


def test_the_command_needs_no_worker_and_says_what_it_cannot(
    settings: Settings, files: dict[str, Path]
) -> None:
    assert run("overlap", settings).stdout == "no experiment runs\n"
    for name in NAMES:
        apply(settings, files[name])
    known = configs(settings)
    time.sleep(1.0)
    expose(settings, assign(known, range(100)))
    code, report = overlap(settings)
    assert code == 0
    assert sum(one.units for one in report.experiments) == len(assign(known, range(100)))
    nobody = msgspec.structs.replace(settings, bootstrap="127.0.0.1:1", broker="apache")
    assert run("overlap", nobody).exit_code == 2


def test_of_two_who_apply_at_the_same_time_at_most_one_runs(settings: Settings) -> None:
    """Whichever way it goes: no slot is taken twice, and applications follow nothing that the engine does not."""
    specs = [taken("same-slots-1"), taken("same-slots-2")]
    start = threading.Barrier(len(specs))

    def apply(spec: ExperimentSpec) -> str | None:
        publication = plan_application(settings, spec, now_ms=time.time_ns() // 1_000_000)
        start.wait(DEADLINE_S)
        try:
            publish(settings, publication)
        except Collides as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(specs)) as pool:
        refused = dict(zip((spec.experiment for spec in specs), pool.map(apply, specs), strict=True))
    assert any(refused.values())
    assert all("raise `version` to 2" in error for error in refused.values() if error)
    went_on = {name for name, error in refused.items() if error is None}
    assert {spec.experiment for spec in known_records(settings).running} == went_on
    with TopicReader(settings, settings.topic("config")) as reader:
        assert {(record.key or b"").decode() for record in reader.backlog()} == went_on


def taken(name: str) -> ExperimentSpec:
    found = load_spec(EXAMPLES / "button.yaml")
    return msgspec.structs.replace(found, experiment=name, program=None)
