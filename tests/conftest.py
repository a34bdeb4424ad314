"""Brokers for the tests: `embedded_broker` (in this process) and `apache_kafka` (one for all processes)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

BROKER_PROGRAM = Path(__file__).parent / "broker" / "apache_kafka.py"
# What `make test-broker` looks into; reading all the other tests to choose none of them takes half a minute.
BROKER_FOLDERS = ("broker", "deploy")
# Longer than the first fetch of Kafka's jars may take.
START_TIMEOUT_S = 700
STOP_TIMEOUT_S = 30

_FOLDER = pytest.StashKey[Path]()
_HOLD = pytest.StashKey[int]()
_SEEN = pytest.StashKey[dict[str, str]]()


# A busy machine is no reason for a property to fail.
settings.register_profile("default", settings(suppress_health_check=[HealthCheck.too_slow]))
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# kafka-python reads its own schemas with a function that Python 3.11 calls deprecated.
KAFKA_PYTHON_WARNING = "ignore:(read|open)_text is deprecated:DeprecationWarning"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", KAFKA_PYTHON_WARNING)
    # Parallel workers get the folder of the process that started them.
    if hasattr(config, "workerinput"):
        config.stash[_FOLDER] = Path(config.workerinput["broker_folder"])
        return
    folder = Path(tempfile.mkdtemp(prefix="stream-xp-tests-"))
    os.mkfifo(folder / "hold")
    config.stash[_FOLDER] = folder
    # The broker runs until nobody holds the other end of its input: it cannot outlive this process.
    config.stash[_HOLD] = os.open(folder / "hold", os.O_RDWR)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let no test be forgotten: `make test` runs those with a broker from their folders alone."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    if item.get_closest_marker("broker") and folder not in BROKER_FOLDERS:
        raise pytest.UsageError(f"{item.nodeid}: tests marked `broker` belong into tests/{BROKER_FOLDERS[0]}")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["broker_folder"] = str(node.config.stash[_FOLDER])


def pytest_report_header() -> str:
    return "Apache Kafka: started, or found, when the first test asks for it; the last lines say which"


def pytest_sessionfinish(session: pytest.Session) -> None:
    stash = session.config.stash
    if _HOLD not in stash:
        return
    address = stash[_FOLDER] / "address.json"
    stash[_SEEN] = _read(address) if address.is_file() else {}
    os.close(stash[_HOLD])
    del stash[_HOLD]
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while address.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    shutil.rmtree(stash[_FOLDER], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seen = config.stash.get(_SEEN, {})
    if "unavailable" in seen:
        terminalreporter.section("tests on Apache Kafka were SKIPPED", red=True)
        terminalreporter.write_line(seen["unavailable"])
    elif seen:
        terminalreporter.write_line(f"broker used: {seen['source']}, {seen['bootstrap']}")
    else:
        terminalreporter.write_line("broker used: no Apache Kafka, no test asked for it")


def _read(path: Path) -> dict[str, str]:
    record: dict[str, str] = json.loads(path.read_text())
    return record


def _start(folder: Path) -> None:
    # Not subprocess.Popen: the process that starts the broker is not the one that ends it.
    os.posix_spawn(
        sys.executable,
        [sys.executable, str(BROKER_PROGRAM), "--address", str(folder / "address.json")],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, str(folder / "hold"), os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(folder / "program.log"), os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


@pytest.fixture(scope="session")
def apache_kafka(request: pytest.FixtureRequest) -> str:
    """Address of a real Apache Kafka that all tests of this run share; skips where none is to be had.

    Use `topic_prefix`, so that tests do not meet.
    """
    folder = request.config.stash[_FOLDER]
    address = folder / "address.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.is_file():
            _start(folder)
            deadline = time.monotonic() + START_TIMEOUT_S
            while not address.is_file():
                if time.monotonic() > deadline:
                    pytest.fail(f"the test broker does not start: {(folder / 'program.log').read_text()}")
                time.sleep(0.05)
    record = _read(address)
    if "unavailable" in record:
        pytest.skip(record["unavailable"])
    return record["bootstrap"]


@pytest.fixture
def topic_prefix() -> str:
    """Return a prefix that no other test uses."""
    return f"t{uuid.uuid4().hex[:12]}."


@pytest.fixture
def embedded_broker() -> Iterator[EmbeddedBroker]:
    """Give a fresh embedded broker; `.bootstrap` is its address."""
    pytest.importorskip("confluent_kafka", reason="the extra `embedded` is not installed")
    from stream_xp.adapters.embedded_broker import EmbeddedBroker  # noqa: PLC0415

    with EmbeddedBroker() as broker:
        yield broker
