"""The sign of progress that a worker gives, and the command that reads it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from stream_xp.adapters import health_file
from stream_xp.cli import main
from stream_xp.errors import ConfigError
from stream_xp.services.worker import Worker
from stream_xp.settings import Settings
from tests.unit.services.ingest_world import Log, Parts, T, exposures

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    log.serve(monkeypatch)
    return log


def test_a_partition_that_applies_nothing_is_stalled_until_it_goes_on(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        assert parts.ingest.stalled_s() == 0.0
        parts.source.ends = {"xp.exposures": (9, T), "xp.rewards": (0, T)}
        await parts.ingest.on_block(exposures(0, 2))
        await parts.ingest.flush()
        before = parts.ingest.stalled_s()
        await asyncio.sleep(0.05)
        await parts.ingest.flush()
        assert parts.ingest.stalled_s() - before >= 0.04
        await parts.ingest.on_block(exposures(2, 7))
        await parts.ingest.flush()
        assert parts.ingest.stalled_s() < 0.04
        parts.ingest.drop()
        assert parts.ingest.stalled_s() == 0.0

    asyncio.run(scenario())


def test_the_same_holds_where_the_flushing_itself_hangs(log: Log) -> None:
    async def scenario() -> None:
        parts = Parts(log)
        parts.source.ends = {"xp.exposures": (2, T), "xp.rewards": (0, T)}
        await parts.ingest.on_block(exposures(0, 2))
        await parts.ingest.flush()
        await asyncio.sleep(0.05)
        assert parts.ingest.stalled_s() >= 0.04

    asyncio.run(scenario())


def worker(path: Path, *, stalled_s: float, evaluated_ago_s: float, decides: bool = True) -> Any:
    """As much of a worker as gives a sign of progress."""
    return SimpleNamespace(
        settings=Settings(health_file=str(path)),
        ingest=SimpleNamespace(stalled_s=lambda: stalled_s),
        _stats={"xp.stats"} if decides else set(),
        _evaluated_s=time.monotonic() - evaluated_ago_s,
    )


@pytest.mark.parametrize(
    ("given", "beats"),
    [
        ({"stalled_s": 0.0, "evaluated_ago_s": 0.1}, True),
        ({"stalled_s": 31.0, "evaluated_ago_s": 0.1}, False),
        ({"stalled_s": 0.0, "evaluated_ago_s": 31.0}, False),
        ({"stalled_s": 0.0, "evaluated_ago_s": 31.0, "decides": False}, True),
    ],
    ids=["goes on", "a partition is stuck", "the evaluation is stuck", "it does not evaluate"],
)
def test_a_worker_gives_a_sign_only_while_it_goes_on(
    tmp_path: Path, given: dict[str, Any], *, beats: bool
) -> None:
    path = tmp_path / "health"
    asyncio.run(Worker._beat(worker(path, **given)))
    assert path.exists() is beats


def test_a_file_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"STREAM_XP_HEALTH_FILE: cannot write '.*no-folder/health'"):
        health_file.beat(tmp_path / "no-folder" / "health")


def test_the_command_says_how_old_the_sign_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "health"
    monkeypatch.setenv("STREAM_XP_HEALTH_FILE", str(path))
    run = CliRunner().invoke
    never = run(main, ["health"])
    assert (never.exit_code, "no worker has written" in never.output) == (1, True)
    health_file.beat(path)
    assert run(main, ["health"]).exit_code == 0
    old = time.time() - 40
    os.utime(path, (old, old))
    late = run(main, ["health"])
    assert (late.exit_code, "went on 40 s ago, over 30" in late.output) == (1, True)
    assert run(main, ["health", "--max-age", "60"]).exit_code == 0
    assert json.loads(run(main, ["health", "--json"]).stdout)["healthy"] is False
    monkeypatch.delenv("STREAM_XP_HEALTH_FILE")
    unset = run(main, ["health"])
    assert (unset.exit_code, "STREAM_XP_HEALTH_FILE is not set" in unset.output) == (2, True)
