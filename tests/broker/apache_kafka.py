"""One real Apache Kafka for the tests: given, in Docker, or from Maven's jars; the first that is to be had.

It is a program of its own, so that parallel test processes share one broker: tests/conftest.py starts it when
the first test asks. It runs until its input ends, hence also when the tests are killed. By hand, to keep a
broker while working on a test (it prints the address; end it with Ctrl-D):

    .venv/bin/python tests/broker/apache_kafka.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kafka_node import KafkaNode, Unavailable, free_ports, kafka_version

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOTSTRAP_VARIABLE: Final = "STREAM_XP_TEST_BOOTSTRAP"
DOCKER_IMAGE: Final = "apache/kafka:3.9.1"

LISTENERS: Final = """\
listeners=PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{broker}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
"""


@dataclass(frozen=True, slots=True)
class Broker:
    """A running broker: where it answers, and one line that says what it is."""

    bootstrap: str
    source: str


@contextlib.contextmanager
def running() -> Iterator[Broker]:
    """Give a broker for the block, and stop it afterwards unless it was given from outside."""
    given = os.environ.get(BOOTSTRAP_VARIABLE)
    if given:
        yield Broker(given, f"Apache Kafka from {BOOTSTRAP_VARIABLE}")
        return
    reasons = [f"{BOOTSTRAP_VARIABLE} is not set"]
    for start in (_in_docker, _in_java):
        with contextlib.ExitStack() as stack:
            try:
                broker = stack.enter_context(start())
            except Unavailable as error:
                reasons.append(str(error))
                continue
            yield broker
            return
    raise Unavailable("no Apache Kafka: " + "; ".join(reasons))


@contextlib.contextmanager
def _in_docker() -> Iterator[Broker]:
    if not _docker_answers():
        raise Unavailable("no Docker daemon answers")
    from testcontainers.kafka import KafkaContainer  # noqa: PLC0415 - slow, and needed only with Docker

    container = KafkaContainer(DOCKER_IMAGE).with_kraft()
    container.with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
    container.with_env("KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS", "0")
    container.with_env("KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS", "1000")
    try:
        container.start()
    except Exception as error:
        # Of Docker, of its HTTP client or of testcontainers, which name no common kind: then the next way is tried.
        raise Unavailable(f"Docker does not run {DOCKER_IMAGE}: {error}") from error
    try:
        yield Broker(container.get_bootstrap_server(), f"Apache Kafka in Docker ({DOCKER_IMAGE})")
    finally:
        container.stop()


def _docker_answers() -> bool:
    if shutil.which("docker") is None and not Path("/var/run/docker.sock").exists():
        return False
    import docker  # noqa: PLC0415 - comes with testcontainers

    try:
        client = docker.from_env(timeout=5)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.DockerException, OSError):  # the latter is what its HTTP client raises
        return False
    finally:
        client.close()


@contextlib.contextmanager
def _in_java() -> Iterator[Broker]:
    broker, controller = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="stream-xp-kafka-") as folder:
        properties = LISTENERS.format(broker=broker, controller=controller)
        node = KafkaNode(Path(folder), properties, controller=controller)
        try:
            node.start(broker)
            yield Broker(f"127.0.0.1:{broker}", f"Apache Kafka {kafka_version()} (Java, KRaft, one node)")
        finally:
            node.stop()


def _write_whole(path: Path, record: dict[str, str]) -> None:
    """Write a file that a reader sees whole or not at all."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(record))
    fresh.replace(path)


def serve(address: Path) -> None:
    """Run a broker until the end of input; until then the file holds its address, or why there is none."""
    try:
        with running() as broker:
            _write_whole(address, {"bootstrap": broker.bootstrap, "source": broker.source})
            sys.stdin.read()
    except Unavailable as error:
        _write_whole(address, {"unavailable": str(error)})
        sys.stdin.read()
    finally:
        address.unlink(missing_ok=True)


def main() -> None:
    """Run a broker: for the tests with `--address FILE`, otherwise for the person who typed this."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if sys.argv[1:2] == ["--address"]:
        serve(Path(sys.argv[2]))
        return
    with contextlib.suppress(KeyboardInterrupt), running() as broker:
        print(broker.source, file=sys.stderr)
        print(broker.bootstrap, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
