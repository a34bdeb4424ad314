"""An Apache Kafka that only talks over TLS and only to accounts it knows: certificates, broker, settings.

Its certificate names 127.0.0.1 and nothing else. Accounts prove themselves with SCRAM-SHA-512 or PLAIN. What an
account may do is what its ACLs say; only `admin` may do everything.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from kafka_node import KafkaNode, Unavailable, free_ports

from stream_xp.settings import KafkaSecurity, Secret, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

CANARY: Final = "canary-7d1f0c55e2"
"""The password of every account; no output may ever hold it."""

ACCOUNTS: Final = ("admin", "worker")

PROPERTIES: Final = """\
listeners=SASL_SSL://127.0.0.1:{broker},INTERNAL://127.0.0.1:{internal},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=SASL_SSL://127.0.0.1:{broker},INTERNAL://127.0.0.1:{internal}
listener.security.protocol.map=SASL_SSL:SASL_SSL,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=INTERNAL
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:admin;User:ANONYMOUS
sasl.enabled.mechanisms=SCRAM-SHA-512,PLAIN
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required {plain_users};
ssl.keystore.type=PEM
ssl.keystore.location={folder}/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/ca.pem
"""


@dataclass(frozen=True, slots=True)
class SecureKafka:
    """A running broker.

    Attributes:
        port: of its SASL_SSL listener.
        folder: holds `ca.pem`, that signed the broker's certificate, and `other_ca.pem`, that did not.
    """

    port: int
    folder: Path

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    def settings(self, prefix: str, account: str = "worker", **security: object) -> Settings:
        """Settings of one account."""
        trusted = KafkaSecurity(
            security_protocol="SASL_SSL",
            ssl_ca_file=str(self.folder / "ca.pem"),
            sasl_username=account,
            sasl_password=Secret(CANARY),
        )
        return Settings(
            bootstrap=self.bootstrap,
            prefix=prefix,
            partitions=1,
            group_id=f"{prefix}workers",
            flush_interval_ms=100,
            snapshot_interval_ms=250,
            allowed_lateness_ms=1_000,
            activation_delay_ms=100,
            idle_grace_ms=300,
            session_timeout_ms=3_000,
            security=msgspec.structs.replace(trusted, **security),
        )


@contextlib.contextmanager
def running(folder: Path) -> Iterator[SecureKafka]:
    """Give a broker for the block; raises `kafka_node.Unavailable` where there is none."""
    make_certificates(folder)
    broker, internal, controller = free_ports(3)
    users = " ".join(f'user_{name}="{CANARY}"' for name in ACCOUNTS)
    properties = PROPERTIES.format(
        broker=broker, internal=internal, controller=controller, folder=folder, plain_users=users
    )
    scram = [("--add-scram", f"SCRAM-SHA-512=[name={name},password={CANARY}]") for name in ACCOUNTS]
    node = KafkaNode(
        folder, properties, controller=controller, heap_mb=384, format_options=[*itertools.chain(*scram)]
    )
    found = SecureKafka(broker, folder)
    try:
        node.start(broker, **found.settings("", "admin").kafka_python_options())
        yield found
    finally:
        node.stop()


def make_certificates(folder: Path) -> None:
    """Write `ca.pem`, `other_ca.pem`, and `broker.pem` for 127.0.0.1 only, signed by the first."""
    for name in ("ca", "other_ca"):
        _openssl(folder, f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name}", f"{name}.key", name)
    (folder / "names.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    _run(folder, "req -newkey rsa:2048 -nodes -subj /CN=broker -keyout broker.key -out broker.csr")
    _run(
        folder,
        "x509 -req -in broker.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names.ext -out broker.crt",
    )
    key = (folder / "broker.key").read_text()
    (folder / "broker.pem").write_text(key + (folder / "broker.crt").read_text())


def _openssl(folder: Path, command: str, key: str, name: str) -> None:
    _run(folder, f"{command} -keyout {key} -out {name}.pem")


def _run(folder: Path, command: str) -> None:
    try:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True, timeout=60)
    except FileNotFoundError as error:
        raise Unavailable("no openssl on PATH to make certificates") from error
