"""One Apache Kafka with two doors: one through the proxy for workers, one direct for the test itself."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING, Final

from broker import apache_kafka

if TYPE_CHECKING:
    from pathlib import Path

SERVER: Final = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=DIRECT://127.0.0.1:{direct},PROXIED://127.0.0.1:{proxied},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=DIRECT://127.0.0.1:{direct},PROXIED://127.0.0.1:{proxy}
listener.security.protocol.map=DIRECT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=DIRECT
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
num.network.threads=2
num.io.threads=2
background.threads=2
log.cleaner.threads=1
"""


class Node:
    """A broker that can be killed, and started again on the same data.

    Args:
        folder: of its own; data and logs stay there.
        proxy_port: what the proxied door is advertised as.

    Raises:
        Unavailable: there is no Java 17, or no jars.
    """

    def __init__(self, folder: Path, proxy_port: int) -> None:
        self._folder = folder
        self._direct, self.proxied_port, controller = apache_kafka._free_ports(3)
        (folder / "log4j.properties").write_text(apache_kafka.LOG4J.format(log=folder / "kafka.log"))
        (folder / "server.properties").write_text(
            SERVER.format(
                direct=self._direct,
                proxied=self.proxied_port,
                proxy=proxy_port,
                controller=controller,
                data=folder / "data",
            )
        )
        logging = f"-Dlog4j.configuration=file:{folder / 'log4j.properties'}"
        self._command = [
            apache_kafka._find_java(),
            *("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", logging),
            *("-cp", apache_kafka._classpath()),
        ]
        apache_kafka._format_storage(self._command, folder)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def version(self) -> str:
        """The version of Kafka."""
        return apache_kafka._kafka_version()

    @property
    def direct(self) -> str:
        """The address that leads around the proxy."""
        return f"127.0.0.1:{self._direct}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._folder / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                [*self._command, "kafka.Kafka", str(self._folder / "server.properties")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self._folder,
            )
        apache_kafka._wait_until_ready(self._process, self._direct, self._folder)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart(self, *, away_s: float = 0.0) -> None:
        """SIGKILL, some time without it, and start again on the same data."""
        self.kill()
        time.sleep(away_s)
        self.start()

    def stop(self) -> None:
        """End it."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(apache_kafka.STOP_TIMEOUT_S)
            return
        self.kill()
