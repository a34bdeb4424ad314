"""A recorded file through a broker and the whole service."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.cli import main
from stream_xp.services.replay.rows import Columns, Row, read_rows
from stream_xp.services.replay.service import embedded, own_run, replay
from stream_xp.services.spec_file import load_spec
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from stream_xp.domain.experiment import ExperimentSpec

pytestmark = [pytest.mark.broker, pytest.mark.slow]

EXAMPLE = Path(__file__).parents[2] / "examples/open-bandit"

SMALL_SPEC = """\
experiment: small
owner: tests
hypothesis: three arms, a mean and segments come through
unit: member
arms:
  - {key: a, weight: 0.5, control: true}
  - {key: b, weight: 0.25}
  - {key: c, weight: 0.25}
metrics:
  - {key: take, kind: conversion, role: primary, direction: increase, attribution_window: 1h}
  - key: spend
    kind: mean
    role: secondary
    direction: increase
    attribution_window: 2h
    scale: 0.5
    bound: 10
segments:
  device: [tv]
planned_sample: 100
"""


@pytest.fixture(scope="module")
def example() -> tuple[ExperimentSpec, list[Row]]:
    return load_spec(EXAMPLE / "spec.yaml"), read_rows(EXAMPLE / "open-bandit-men.csv.gz", Columns())


@pytest.fixture(scope="module")
def on_embedded_broker(example: tuple[ExperimentSpec, list[Row]]) -> dict[str, Any]:
    with embedded(own_run(Settings())) as settings:
        return replay(*example, settings, seed=1)


def test_the_open_bandit_file_comes_out_right(on_embedded_broker: dict[str, Any]) -> None:
    report = on_embedded_broker
    arms = {key: (arm["exposures"], arm["successes"], arm["mature"]) for key, arm in report["arms"].items()}
    assert arms == {"random": (10_000, 46, 10_000), "bts": (10_000, 69, 10_000)}
    click = report["metrics"]["click"]
    assert click["estimate"] == pytest.approx(0.0023)
    assert click["lower"] < 0 < click["upper"]
    assert report["srm"]["mismatch"] is False
    assert report["decision"] == "hold"
    assert report["fixed_sample"]["click"]["p"] == pytest.approx(0.0315, abs=1e-4)
    assert report["records"]["in"] == report["records"]["counted"] == 20_115
    assert report["oracle"] == "equal"


@pytest.mark.kafka
def test_a_real_kafka_gives_the_same_bytes(
    example: tuple[ExperimentSpec, list[Row]], on_embedded_broker: dict[str, Any], apache_kafka: str
) -> None:
    report = replay(*example, own_run(Settings(bootstrap=apache_kafka)), seed=2)
    same = ("statistics", "statistics_hash", "records", "arms", "decision")
    assert {key: report[key] for key in same} == {key: on_embedded_broker[key] for key in same}
    assert report["oracle"] == "equal"


def test_a_small_file_with_three_arms_a_mean_and_segments(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SMALL_SPEC)
    lines = ["cell,member,at,take,spend,device"]
    for n in range(60):
        # Out of the order of time, with two copies of one row and an arm that does not exist.
        arm = "aabc"[n % 4] if n != 7 else "zz"
        time = f"2024-03-01 10:{(n * 37) % 60:02d}:00.5+00:00"
        lines.append(f"{arm},m{n},{time},{n % 3 == 0:d},{n % 5},{'tv' if n % 2 else 'x'}")
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress("\n".join([*lines, lines[1]]).encode()))
    options = ["--arm-column", "cell", "--unit-columns", "member", "--time-column", "at"]
    out = tmp_path / "out.json"
    done = CliRunner().invoke(
        main,
        ["replay", str(tmp_path / "spec.yaml"), str(tmp_path / "log.csv.gz"), "--json", str(out), *options],
        env={"STREAM_XP_BOOTSTRAP": "127.0.0.1:1"},
    )
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_bytes())
    assert {key: arm["exposures"] for key, arm in report["arms"].items()} == {"a": 30, "b": 15, "c": 14}
    assert report["records"]["dead"] == 1
    # The repeated row is a copy of an exposure and of a reward for `take`; `spend` is 0 there.
    assert report["records"]["duplicate"] == 2
    assert report["arms"]["a"]["by_metric"]["spend"]["sum"] == 2 * sum(n % 5 for n in range(60) if n % 4 < 2)
    assert {row[2] for row in report["statistics"]["units"]} == {"", "device=tv", "device=other"}
    assert set(report["metrics"]["spend"]["comparisons"]) == {"b", "c"}
    assert report["oracle"] == "equal"
    assert msgspec.json.decode(out.read_bytes())["experiment"] == "small"


def test_a_replay_goes_on_among_records_that_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spec.yaml").write_text(SMALL_SPEC)
    rows = [Row(1_700_000_000_000 + n, f"m{n}", "abc"[n % 3], (("take", 1.0),), ()) for n in range(30)]
    with embedded(own_run(Settings())) as settings:
        with TopicWriter(settings) as writer:
            for topic in ("stats", "results"):
                for value in (b"{", b"\xff", b"[" * 5_000, b'{"experiment": "small"}'):
                    writer.send(settings.topic(topic), key=b"small", value=value)
        report = replay(load_spec(tmp_path / "spec.yaml"), rows, settings)
    assert report["records"]["counted"] == 60
    assert report["oracle"] == "equal"
    for topic in ("stats", "results"):
        assert f"passed over: 4 records of {settings.topic(topic)} in all" in caplog.messages


def test_a_fault_of_the_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("policy,row,timestamp,click\nbts,1,noon,0\n")
    done = CliRunner().invoke(main, ["replay", str(EXAMPLE / "spec.yaml"), str(tmp_path / "log.csv")])
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert "log.csv:2: column timestamp: must be a time" in line
