"""One real Apache Kafka for the tests: given, in Docker, or from Maven's jars; the first that is to be had.

It is a program of its own, so that parallel test processes share one broker: tests/conftest.py starts it when
the first test asks. It runs until its input ends, hence also when the tests are killed. By hand, to keep a
broker while working on a test (it prints the address; end it with Ctrl-D):

    .venv/bin/python tests/broker/apache_kafka.py
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parents[2]
POM: Final = Path(__file__).with_name("pom.xml")
CACHE: Final = ROOT / ".cache" / "kafka"
BOOTSTRAP_VARIABLE: Final = "STREAM_XP_TEST_BOOTSTRAP"
DOCKER_IMAGE: Final = "apache/kafka:3.9.1"

RESOLVE_TIMEOUT_S: Final = 600
START_TIMEOUT_S: Final = 60
STOP_TIMEOUT_S: Final = 20

LOG4J = """\
log4j.rootLogger=WARN, file
log4j.appender.file=org.apache.log4j.FileAppender
log4j.appender.file.File={log}
log4j.appender.file.layout=org.apache.log4j.PatternLayout
log4j.appender.file.layout.ConversionPattern=%d %p %m (%c)%n
"""

SERVER = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{broker}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
num.partitions=1
default.replication.factor=1
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
num.network.threads=2
num.io.threads=2
background.threads=2
log.cleaner.threads=1
"""


class Unavailable(Exception):
    """No Apache Kafka is to be had; the text says why."""


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
    except Exception:
        return False
    finally:
        client.close()


@contextlib.contextmanager
def _in_java() -> Iterator[Broker]:
    java = _find_java()
    classpath = _classpath()
    with tempfile.TemporaryDirectory(prefix="stream-xp-kafka-") as name:
        folder = Path(name)
        broker, controller = _free_ports(2)
        properties = _write_config(folder, broker=broker, controller=controller)
        logging = f"-Dlog4j.configuration=file:{folder / 'log4j.properties'}"
        command = [java, "-Xmx512m", "-XX:+UseSerialGC", logging, "-cp", classpath]
        _format_storage(command, folder)
        with _server([*command, "kafka.Kafka", str(properties)], folder) as process:
            _wait_until_ready(process, broker, folder)
            yield Broker(f"127.0.0.1:{broker}", f"Apache Kafka {_kafka_version()} (Java, KRaft, one node)")


def _find_java() -> str:
    java = shutil.which("java")
    if java is None:
        raise Unavailable("no java on PATH")
    answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r'version "(\d+)', answer.stderr)
    if match is None or int(match[1]) < 17:
        raise Unavailable(f"java on PATH is older than 17: {answer.stderr.splitlines()[:1]}")
    return java


def _kafka_version() -> str:
    match = re.search(r"<artifactId>kafka_2\.13</artifactId>\s*<version>([^<]+)<", POM.read_text())
    return match[1] if match else "unknown"


def _classpath() -> str:
    """Return the jars of the broker, resolved by Maven once per version of the pom."""
    digest = hashlib.sha256(POM.read_bytes()).hexdigest()[:16]
    cached = CACHE / f"classpath-{digest}.txt"
    if cached.is_file():
        classpath = cached.read_text().strip()
        # Somebody may have emptied Maven's repository since.
        if all(Path(jar).is_file() for jar in classpath.split(os.pathsep)):
            return classpath
    maven = shutil.which("mvn")
    if maven is None:
        raise Unavailable("no mvn on PATH to fetch the jars of Apache Kafka")
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = CACHE / f"classpath-{digest}.{os.getpid()}.tmp"
    command = [maven, "-q", "-B", "-f", str(POM), "dependency:build-classpath", f"-Dmdep.outputFile={fresh}"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=RESOLVE_TIMEOUT_S, check=False, cwd=CACHE
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"mvn did not fetch the jars within {RESOLVE_TIMEOUT_S} s") from error
    if answer.returncode != 0 or not fresh.is_file():
        lines = (answer.stdout + answer.stderr).strip().splitlines()
        raise Unavailable(f"mvn could not fetch the jars of Apache Kafka: {lines[:1]}")
    fresh.replace(cached)
    return cached.read_text().strip()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _write_config(folder: Path, *, broker: int, controller: int) -> Path:
    (folder / "log4j.properties").write_text(LOG4J.format(log=folder / "kafka.log"))
    path = folder / "server.properties"
    path.write_text(SERVER.format(broker=broker, controller=controller, data=folder / "data"))
    return path


def _format_storage(command: list[str], folder: Path) -> None:
    cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    # A leading dash would be read as an option.
    cluster = "x" + cluster[1:]
    arguments = ["kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(folder / "server.properties")]
    answer = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
    )
    if answer.returncode != 0:
        raise Unavailable(f"Kafka's storage could not be formatted: {answer.stderr.strip()[-500:]}")


@contextlib.contextmanager
def _server(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "output.log").open("wb") as output:
        # A session of its own: an interrupt of the tests must not stop the broker before their clean-up.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    from kafka import KafkaAdminClient  # noqa: PLC0415 - only this way of getting a broker needs it
    from kafka.errors import KafkaError  # noqa: PLC0415

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Unavailable(f"Kafka stopped at once: {_last_lines(folder)}")
        if _listens(port):
            with contextlib.suppress(KafkaError):
                client = KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}", bootstrap_timeout_ms=10_000)
                client.close()
                return
        time.sleep(0.1)
    raise Unavailable(f"Kafka was not ready within {START_TIMEOUT_S} s: {_last_lines(folder)}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _last_lines(folder: Path) -> str:
    texts = [(folder / name).read_text() for name in ("output.log", "kafka.log") if (folder / name).is_file()]
    return " | ".join("\n".join(texts).strip().splitlines()[-5:])


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
