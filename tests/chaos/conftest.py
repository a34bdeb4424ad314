"""The broker of the chaos tests, and the report of a run.

`python -m tests.chaos` runs them. They are left out of every other run, unless `-m chaos` asks for them.
"""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from broker.proxy import Proxy
    from chaos.harness import Rig
    from chaos.node import Node

# Everything that imports a Kafka client is imported late: the warnings of those imports are ignored only from
# the collection of tests on.
INTENSITIES = ("dev", "short", "full")

INTENSITY = os.environ.get("STREAM_XP_TEST_CHAOS", "dev")
SEED = int(os.environ.get("STREAM_XP_TEST_CHAOS_SEED", "1"))
RESULTS_VARIABLE = "STREAM_XP_TEST_CHAOS_RESULTS"
TIMEOUT_S = 3_600
WARM_UP = "from stream_xp.engine.warm_up import warm_up; warm_up()"

_RESULTS = pytest.StashKey[list[Any]]()
_FAILED = pytest.StashKey[list[Any]]()
_KAFKA = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    assert INTENSITY in INTENSITIES, f"STREAM_XP_TEST_CHAOS is one of {INTENSITIES}, found {INTENSITY}"
    config.addinivalue_line("markers", "chaos: injects faults into workers on a real Apache Kafka; minutes")
    config.stash[_RESULTS] = []
    config.stash[_FAILED] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("chaos"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    chosen = (
        list(filter(_is_wanted, items))
        if "chaos" in config.getoption("markexpr")
        else [item for item in items if not item.get_closest_marker("chaos")]
    )
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _is_wanted(item: pytest.Item) -> bool:
    """In a short run, the classes that stand for the others."""
    marker = item.get_closest_marker("chaos")
    return marker is None or INTENSITY != "short" or bool(marker.kwargs.get("short"))


@pytest.fixture(scope="session")
def _broker(request: pytest.FixtureRequest) -> Iterator[tuple[Node, Proxy]]:
    from broker.checksums import use_fast_checksums  # noqa: PLC0415
    from broker.kafka_node import Unavailable  # noqa: PLC0415
    from broker.proxy import Proxy  # noqa: PLC0415
    from chaos.node import Node  # noqa: PLC0415

    use_fast_checksums()
    # A folder of its own: pytest removes its own folders of earlier runs, also those of a run that goes on.
    with Proxy(seed=SEED) as proxy, tempfile.TemporaryDirectory(prefix="stream-xp-chaos-") as folder:
        try:
            node = Node(Path(folder), proxy.port)
        except Unavailable as error:
            pytest.skip(f"the chaos tests need Java 17 and the jars of Apache Kafka: {error}")
        proxy.upstream_port = node.proxied_port
        request.config.stash[_KAFKA] = node.version
        try:
            node.start()
            # Into numba's cache, so that no worker compiles while it is timed.
            subprocess.run([sys.executable, "-c", WARM_UP], check=True)
            yield node, proxy
        finally:
            node.stop()


@pytest.fixture
def rig(_broker: tuple[Node, Proxy], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """What a test of one class of faults works with; the marker `chaos` names the class."""
    from chaos.harness import Rig  # noqa: PLC0415

    node, proxy = _broker
    marker = request.node.get_closest_marker("chaos")
    rig = Rig(
        node,
        proxy,
        tmp_path,
        name=marker.args[0],
        prefix=f"c{uuid.uuid4().hex[:8]}.",
        intensity=INTENSITY,
        seed=SEED,
    )
    yield rig
    proxy.heal()
    request.config.stash[_RESULTS].append(rig.result())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    if report.failed and item.get_closest_marker("chaos"):
        item.config.stash[_FAILED].append(item.name)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(_RESULTS, [])
    if not found:
        return
    from chaos.report import PAGE, RESULTS, Results, by_class, encode, table, write_page  # noqa: PLC0415

    failed = config.stash[_FAILED]
    results = Results(
        seed=SEED,
        intensity=INTENSITY,
        kafka=config.stash[_KAFKA],
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        failed=sorted(set(failed)),
        classes=by_class(found),
    )
    terminalreporter.section("chaos")
    write: Callable[[str], None] = terminalreporter.write_line
    write(table(results))
    file = os.environ.get(RESULTS_VARIABLE)
    if file:
        Path(file).write_bytes(encode(results))
        write(f"written to {file}")
        if Path(file) == RESULTS:
            write_page(results)
            write(f"written to {PAGE}")
