"""One Apache Kafka with two doors: one through the proxy for workers, one direct for the test itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from broker.kafka_node import KafkaNode, free_ports, kafka_version

if TYPE_CHECKING:
    from pathlib import Path

PROPERTIES: Final = """\
listeners=DIRECT://127.0.0.1:{direct},PROXIED://127.0.0.1:{proxied},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=DIRECT://127.0.0.1:{direct},PROXIED://127.0.0.1:{proxy}
listener.security.protocol.map=DIRECT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=DIRECT
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
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
        self._direct, self.proxied_port, controller = free_ports(3)
        properties = PROPERTIES.format(
            direct=self._direct, proxied=self.proxied_port, proxy=proxy_port, controller=controller
        )
        self._node = KafkaNode(folder, properties, controller=controller)

    @property
    def version(self) -> str:
        """The version of Kafka."""
        return kafka_version()

    @property
    def direct(self) -> str:
        """The address that leads around the proxy."""
        return f"127.0.0.1:{self._direct}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._node.start(self._direct)

    def kill(self) -> None:
        """SIGKILL."""
        self._node.kill()

    def restart(self, *, away_s: float = 0.0) -> None:
        """SIGKILL, some time without it, and start again on the same data."""
        self.kill()
        time.sleep(away_s)
        self.start()

    def stop(self) -> None:
        """End it."""
        self._node.stop()
