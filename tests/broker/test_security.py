"""The Kafka link on a broker that wants TLS, an account and ACLs: every client gets through, and no secret out."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import kafka_node
import msgspec
import pytest
import secure_kafka
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
)
from secure_kafka import CANARY, SecureKafka
from worker_process import DEADLINE_S, WorkerProcess, now_ms, wait_for

from stream_xp.adapters import topic_reader
from stream_xp.adapters.kafka_admin import connect
from stream_xp.adapters.load_generator import LoadGenerator
from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.cli.common import EXIT_CONFIG
from stream_xp.errors import DependencyError
from stream_xp.services.evidence import read_standings
from stream_xp.settings import KafkaSecurity, Secret, Settings
from stream_xp.simulator import Chunk, Event

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.broker, pytest.mark.kafka, pytest.mark.slow]

WRONG = "canary-that-is-wrong"
SHOWN = (CANARY, WRONG, base64.b64encode(CANARY.encode()).decode())
SPEC = """\
experiment: checkout
owner: tests
hypothesis: the link changes nothing
unit: member
planned_sample: 1000
arms:
  - {key: a, weight: 0.5, control: true}
  - {key: b, weight: 0.5}
metrics:
  - {key: click, kind: conversion, role: primary, direction: increase, attribution_window: 500ms}
"""

# What an account of a worker needs, and nothing else; docs/security.md has the same table.
WORKER_ACLS = {
    ("topic", "exposures"): "READ",
    ("topic", "rewards"): "READ",
    ("topic", "experiments"): "READ",
    ("topic", "state"): "READ WRITE",
    ("topic", "stats"): "READ WRITE",
    ("topic", "results"): "READ WRITE",
    ("topic", "signals"): "READ WRITE",
    ("topic", "config"): "READ WRITE",
    ("topic", "deadletter"): "WRITE",
    ("group", "workers"): "READ",
}


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    try:
        running = secure_kafka.running(tmp_path_factory.mktemp("secure"))
        with running as broker:
            yield broker
    except kafka_node.Unavailable as error:
        pytest.skip(f"no Apache Kafka with TLS: {error}")


def environment(settings: Settings) -> dict[str, str]:
    """The variables of these settings, the password in a file."""
    security = settings.security
    values = {
        name: value
        for one in (settings, security)
        for name, value in msgspec.structs.asdict(one).items()
        if isinstance(value, str | int)
    }
    variables = {f"STREAM_XP_{name.upper()}": str(value) for name, value in values.items()}
    if security.sasl_password is not None:
        file = Path(security.ssl_ca_file or "").parent / f"password-{abs(hash(security.sasl_password))}"
        file.write_text(str.__str__(security.sasl_password.reveal()) + "\n")
        variables["STREAM_XP_SASL_PASSWORD_FILE"] = str(file)
    return variables


def command(settings: Settings, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """One command of the CLI in a process of its own; its output is looked through for secrets."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("STREAM_XP_")}
    done = subprocess.run(
        [sys.executable, "-m", "stream_xp", *arguments],
        env={**others, **environment(settings)},
        input=given,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert_no_secret(done.stdout + done.stderr)
    return done


def assert_no_secret(text: str) -> None:
    assert not [secret for secret in SHOWN if secret in text]


def allow(admin: Settings, account: str, acls: dict[tuple[str, str], str]) -> None:
    with connect(admin) as client:
        client.create_acls(
            [
                ACL(
                    principal=f"User:{account}",
                    host="*",
                    operation=ACLOperation[operation],
                    permission_type=ACLPermissionType.ALLOW,
                    resource_pattern=ResourcePattern(
                        ResourceType[kind.upper()], admin.prefix + name, ACLResourcePatternType.LITERAL
                    ),
                )
                for (kind, name), operations in acls.items()
                for operation in [*operations.split(), "DESCRIBE", *["DESCRIBE_CONFIGS"] * (kind == "topic")]
            ]
        )


def events(units: int) -> str:
    lines = []
    for n in range(units):
        about = {"unit": f"m{n}"}
        lines.append({**about, "id": f"x{n}", "experiment": "checkout", "arm": "ab"[n % 2]})
        lines.append({**about, "id": f"r{n}", "metric": "click"})
    return "\n".join(map(json.dumps, lines)) + "\n"


def test_events_become_a_result_over_tls_with_the_least_rights(
    kafka: SecureKafka, topic_prefix: str, tmp_path: Path
) -> None:
    admin, worker = kafka.settings(topic_prefix, "admin"), kafka.settings(topic_prefix)
    assert command(admin, "topics", "create").returncode == 0
    allow(admin, "worker", WORKER_ACLS)
    (tmp_path / "spec.yaml").write_text(SPEC)
    applied = command(admin, "apply", str(tmp_path / "spec.yaml"))
    assert applied.returncode == 0, applied.stderr
    with SecureWorker(worker, tmp_path, "--log-level", "DEBUG") as process:
        process.wait_started()
        assert CANARY.encode() not in Path(f"/proc/{process.process.pid}/cmdline").read_bytes()
        assert command(admin, "produce", "--now", given=events(20)).returncode == 0
        wait_for(lambda: has_counted(worker, 20), "all units are in a result")
        assert process.terminate() == 0, process.log
        assert_no_secret(process.log)
    for arguments in (["topics", "check"], ["status", "--json"], ["signals"], ["oracle"]):
        done = command(admin, *arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)


class SecureWorker(WorkerProcess):
    """`stream-xp worker` with an account; its password comes from a file."""

    def __init__(self, settings: Settings, folder: Path, *options: str) -> None:
        self._log = folder / "worker.log"
        others = {name: value for name, value in os.environ.items() if not name.startswith("STREAM_XP_")}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, "worker", *options],
                env={**others, **environment(settings)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def has_counted(settings: Settings, units: int) -> bool:
    return any(
        sum(arm.units for arm in standing.result.arms) == units
        for standing in read_standings(settings, now_ms=now_ms())
    )


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ssl_ca_file": "other_ca.pem"}, "STREAM_XP_SSL_CA_FILE"),
        ({"sasl_password": Secret(WRONG)}, "STREAM_XP_SASL_PASSWORD"),
        ({"sasl_password": Secret(WRONG), "sasl_mechanism": "PLAIN"}, "STREAM_XP_SASL_PASSWORD"),
        ({"sasl_username": "nobody"}, "STREAM_XP_SASL_USERNAME"),
        ({"sasl_mechanism": "SCRAM-SHA-256"}, "STREAM_XP_SASL_MECHANISM"),
        ({"bootstrap": "localhost"}, "STREAM_XP_BOOTSTRAP"),
    ],
    ids=["authority", "password", "plain password", "account", "mechanism", "host name"],
)
def test_a_refused_link_names_the_setting(
    kafka: SecureKafka, topic_prefix: str, changed: dict[str, str], named: str
) -> None:
    changed = dict(changed)
    if "ssl_ca_file" in changed:
        changed["ssl_ca_file"] = str(kafka.folder / changed["ssl_ca_file"])
    host = changed.pop("bootstrap", "127.0.0.1")
    settings = msgspec.structs.replace(
        kafka.settings(topic_prefix, **changed), bootstrap=f"{host}:{kafka.port}"
    )
    refused = command(settings, "status")
    assert refused.returncode == EXIT_CONFIG, refused.stderr
    assert named in refused.stderr
    assert f"{host}:{kafka.port}" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_worker_with_a_wrong_password_ends_at_once(
    kafka: SecureKafka, topic_prefix: str, tmp_path: Path
) -> None:
    with SecureWorker(kafka.settings(topic_prefix, sasl_password=Secret(WRONG)), tmp_path) as worker:
        assert worker.wait_ended() == EXIT_CONFIG
        assert "STREAM_XP_SASL_PASSWORD" in worker.log
        assert "Traceback" not in worker.log
        assert_no_secret(worker.log)


def test_plain_text_is_refused_and_the_broker_said_to_speak_tls(
    kafka: SecureKafka, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_reader, "CONNECT_TIMEOUT_MS", 1_500)
    settings = Settings(bootstrap=kafka.bootstrap, prefix=topic_prefix)
    reader = TopicReader(settings, settings.topic("results"))
    with (
        pytest.raises(DependencyError, match="speaks TLS, which is STREAM_XP_SECURITY_PROTOCOL=SASL_SSL"),
        reader,
    ):
        pass


def test_the_load_generator_has_the_same_link(kafka: SecureKafka, topic_prefix: str) -> None:
    pytest.importorskip("confluent_kafka", reason="the extra `embedded` is not installed")
    admin = kafka.settings(topic_prefix, "admin")
    assert command(admin, "topics", "create").returncode == 0
    chunk = Chunk(due_ms=0, events=[Event("rewards", 0, b"m1", b"{}")])
    with LoadGenerator(admin) as generator:
        assert generator.send([chunk], start_ms=now_ms())
    assert generator.delivered == {admin.topic("rewards"): 1}


def test_an_account_without_rights_is_told_so(kafka: SecureKafka, topic_prefix: str) -> None:
    assert command(kafka.settings(topic_prefix, "admin"), "topics", "create").returncode == 0
    refused = command(kafka.settings(topic_prefix), "signals")
    assert refused.returncode != 0
    assert "or the account 'worker' may not see it" in refused.stderr


def test_settings_show_no_secret_anywhere(kafka: SecureKafka, topic_prefix: str) -> None:
    settings = kafka.settings(topic_prefix)
    assert isinstance(settings.security, KafkaSecurity)
    shown = [repr(settings), str(settings), repr(settings.faust_options()), str(settings.aiokafka_options())]
    for text in shown:
        assert_no_secret(text)
