"""`stream-xp gate`: its exit codes are answers, and whatever goes wrong is none."""

from __future__ import annotations

import socket
import threading
from typing import Any, Self

import pytest
from click.testing import CliRunner
from gate_world import world_in

from stream_xp.adapters import topic_reader
from stream_xp.cli import gate as gate_command
from stream_xp.cli import main
from stream_xp.domain.gate import Cause, Verdict
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.api import ask as asking
from stream_xp.settings import Settings


@pytest.mark.parametrize(
    ("state", "code", "word"),
    [("pass", 0, "pass"), ("stop", 1, "stop"), ("paused", 2, "continue"), ("no data", 3, "invalid")],
)
def test_the_exit_code_is_the_verdict(
    state: str, code: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = world_in(state).view
    monkeypatch.setattr(gate_command, "ask", lambda _, experiment, arm, **__: view.verdict(experiment, arm))
    plain = CliRunner().invoke(main, ["gate", "checkout", "--arm", "canary"])
    assert (plain.exit_code, plain.stdout.partition(":")[0]) == (code, word)
    as_json = CliRunner().invoke(main, ["gate", "checkout", "--json"])
    assert (as_json.exit_code, f'"verdict": "{word}"' in as_json.stdout) == (code, True)


@pytest.mark.parametrize(
    "error",
    [ConfigError("no topic"), DependencyError("no broker"), RuntimeError("a bug"), KeyboardInterrupt()],
)
def test_whatever_goes_wrong_is_no_answer(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(gate_command, "ask", fail)
    ended = CliRunner().invoke(main, ["gate", "checkout"])
    assert (ended.exit_code, ended.stdout) == (3, "")


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--timeout", "-1"], ["a", "--no"]])
def test_a_wrong_argument_is_no_answer(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, ["gate", *arguments]).exit_code == 3


def test_without_wait_it_answers_at_once_and_with_it_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    def answer(*_: Any, wait_s: float) -> Any:
        waits.append(wait_s)
        return world_in("pass").view.verdict("checkout")

    monkeypatch.setattr(gate_command, "ask", answer)
    for arguments in ([], ["--wait"], ["--wait", "--timeout", "5"], ["--timeout", "5"]):
        assert CliRunner().invoke(main, ["gate", "checkout", *arguments]).exit_code == 0
    assert waits == [0.0, 600.0, 5.0, 0.0]


def test_where_no_broker_answers_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(asking, "LOAD_S", 0.3)
    # A reader that outlived this test would draw random numbers while hypothesis does in another.
    monkeypatch.setattr(topic_reader, "CONNECT_TIMEOUT_MS", 300)
    told = asking.ask(Settings(bootstrap=f"127.0.0.1:{port}"), "checkout", None, wait_s=0.0)
    assert (told.verdict, told.cause) == (Verdict.INVALID, Cause.STARTING)
    assert "stream-xp-follower" not in {thread.name for thread in threading.enumerate()}


def test_a_verdict_that_comes_while_it_waits_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_in("continue")

    class Fed:
        failure = None
        read_ms = world.read_ms

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...
        def wait(self, timeout_s: float) -> bool:
            return True

    verdicts = [
        world.view.verdict("checkout"),
        world.view.verdict("checkout"),
        world_in("stop").view.verdict("checkout"),
    ]

    class Told:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def follow_clock_of(self, _: Any) -> None: ...
        def take(self, *_: Any) -> None: ...
        def verdict(self, *_: Any) -> Any:
            return verdicts.pop(0)

    monkeypatch.setattr(asking, "Follower", Fed)
    monkeypatch.setattr(asking, "View", Told)
    pauses: list[float] = []
    told = asking.ask(Settings(), "checkout", None, wait_s=60.0, pause=pauses.append)
    assert (told.verdict, len(pauses)) == (Verdict.STOP, 2)
