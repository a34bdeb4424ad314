"""One node of Apache Kafka from the jars of Maven: its files, and how it starts, is known to be ready, and ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).resolve().parents[2]
POM: Final = Path(__file__).with_name("pom.xml")
CACHE: Final = ROOT / ".cache" / "kafka"

RESOLVE_TIMEOUT_S: Final = 600
START_TIMEOUT_S: Final = 240
STOP_TIMEOUT_S: Final = 20

LOG4J: Final = """\
log4j.rootLogger=WARN, file
log4j.appender.file=org.apache.log4j.FileAppender
log4j.appender.file.File={log}
log4j.appender.file.layout=org.apache.log4j.PatternLayout
log4j.appender.file.layout.ConversionPattern=%d %p %m (%c)%n
"""

COMMON: Final = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
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


_PORTS: Final = range(20_000, 32_000)


class Unavailable(Exception):
    """No Apache Kafka is to be had; the text says why."""


class KafkaNode:
    """A node that is broker and controller, formatted and ready to start; it may be killed and started again.

    Args:
        folder: of its own; configuration, data and logs stay there.
        properties: what is not in `COMMON`, in the syntax of server.properties: listeners above all.
        controller: port of its controller, whose listener is called CONTROLLER.
        heap_mb: memory of its heap.
        format_options: further arguments of the tool that formats the storage.

    Raises:
        Unavailable: there is no Java 17, or no jars, or the storage was not formatted.
    """

    def __init__(
        self,
        folder: Path,
        properties: str,
        *,
        controller: int,
        heap_mb: int = 512,
        format_options: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        java, classpath = _find_java(), _classpath()
        (folder / "log4j.properties").write_text(LOG4J.format(log=folder / "kafka.log"))
        self._properties = folder / "server.properties"
        self._properties.write_text(COMMON.format(controller=controller, data=folder / "data") + properties)
        # The compiler for what runs long is left out: these brokers do not.
        machine = (f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
        logging = f"-Dlog4j.configuration=file:{folder / 'log4j.properties'}"
        self._command = [java, *machine, logging, "-cp", classpath]
        self._format_storage(format_options)

    def start(self, port: int, **options: Any) -> None:
        """Start it, and wait until it answers.

        Args:
            port: of the listener that is asked.
            options: of the KafkaAdminClient that asks, where more than the address is needed.

        Raises:
            Unavailable: it stopped, or gave no answer within `START_TIMEOUT_S`.
        """
        with (self._folder / "output.log").open("ab") as output:
            # A session of its own: an interrupt of the tests must not stop the broker before their clean-up.
            self._process = subprocess.Popen(
                [*self._command, "kafka.Kafka", str(self._properties)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self._folder,
            )
        self._wait_until_ready(self._process, port, {"bootstrap_servers": f"127.0.0.1:{port}", **options})

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it; nothing happens if it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def _format_storage(self, options: Sequence[str]) -> None:
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # A leading dash would be read as an option.
        tool = ["kafka.tools.StorageTool", "format", "-t", "x" + cluster[1:], "-c", str(self._properties)]
        answer = subprocess.run(
            [*self._command, *tool, *options],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        if answer.returncode != 0:
            raise Unavailable(f"Kafka's storage could not be formatted: {answer.stderr.strip()[-500:]}")

    def _wait_until_ready(self, process: subprocess.Popen[bytes], port: int, options: dict[str, Any]) -> None:
        from kafka import KafkaAdminClient  # noqa: PLC0415 - only this way of getting a broker needs it
        from kafka.errors import KafkaError  # noqa: PLC0415

        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Unavailable(f"Kafka stopped at once: {self._last_lines()}")
            if _listens(port):
                with contextlib.suppress(KafkaError):
                    KafkaAdminClient(**options, bootstrap_timeout_ms=10_000).close()
                    return
            time.sleep(0.1)
        raise Unavailable(f"Kafka was not ready within {START_TIMEOUT_S} s: {self._last_lines()}")

    def _last_lines(self) -> str:
        files = [self._folder / name for name in ("output.log", "kafka.log")]
        texts = [file.read_text() for file in files if file.is_file()]
        return " | ".join("\n".join(texts).strip().splitlines()[-5:])


def kafka_version() -> str:
    """Return the version of Kafka whose jars are used."""
    match = re.search(r"<artifactId>kafka_2\.13</artifactId>\s*<version>([^<]+)<", POM.read_text())
    return match[1] if match else "unknown"


def free_ports(count: int) -> list[int]:
    """Return ports on loopback that nobody listens on.

    They lie below those that systems give to outgoing connections: while a node is away, a client that calls its port
    again and again would in the end be given that very port, be connected with itself, and keep the node from it.
    """
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):  # whatever seeds the tests set
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise Unavailable(f"no {count} free ports between {_PORTS.start} and {_PORTS.stop - 1}")


def _find_java() -> str:
    java = shutil.which("java")
    if java is None:
        raise Unavailable("no java on PATH")
    answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r'version "(\d+)', answer.stderr)
    if match is None or int(match[1]) < 17:
        raise Unavailable(f"java on PATH is older than 17: {answer.stderr.splitlines()[:1]}")
    return java


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


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
