"""Settings: defaults, the environment, refusals that name the variable, and what each client is given."""

from __future__ import annotations

import copy
import logging
import ssl
import subprocess
from typing import TYPE_CHECKING

import msgspec
import pytest

from stream_xp.errors import ConfigError
from stream_xp.settings import KafkaSecurity, Secret, Settings

if TYPE_CHECKING:
    from pathlib import Path

CANARY = "canary-0f6c1d"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate and its key in one folder."""
    folder = tmp_path_factory.mktemp("authority")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.pem")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl on PATH to make a certificate")
    return folder


@pytest.fixture
def sasl(authority: Path) -> dict[str, str]:
    return {
        "STREAM_XP_BOOTSTRAP": "kafka-1:9093,kafka-2:9093",
        "STREAM_XP_SECURITY_PROTOCOL": "SASL_SSL",
        "STREAM_XP_SSL_CA_FILE": str(authority / "ca.pem"),
        "STREAM_XP_SASL_USERNAME": "worker",
        "STREAM_XP_SASL_PASSWORD": CANARY,
    }


def refusal(environ: dict[str, str], **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Settings.load(environ, **overrides)
    return str(caught.value)


def test_defaults_are_the_empty_environment() -> None:
    settings = Settings.load(
        {"PATH": "/bin", "STREAM_XP_TEST_BOOTSTRAP": "x", "STREAM_XP_BENCH_SECONDS": "1"}
    )
    assert settings == Settings()
    assert settings.bootstrap == "127.0.0.1:9092"
    assert settings.security.security_protocol == "PLAINTEXT"
    assert settings.topic("exposures") == "xp.exposures"
    assert settings.roles == ("ingest", "decide")
    assert (settings.flush_interval_ms, settings.snapshot_interval_ms) == (250, 2_000)
    assert (settings.allowed_lateness_ms, settings.future_tolerance_ms) == (60_000, 300_000)
    assert (settings.max_record_bytes, settings.activation_delay_ms) == (65_536, 5_000)
    assert (settings.idle_grace_ms, settings.session_timeout_ms) == (2_000, 10_000)


def test_environment_is_converted_and_overrides_win() -> None:
    environ = {"STREAM_XP_PARTITIONS": "12", "STREAM_XP_PREFIX": "a.", "STREAM_XP_ROLES": "decide"}
    settings = Settings.load(environ, prefix="b.", replication=3, group_id=None)
    assert (settings.partitions, settings.prefix, settings.replication) == (12, "b.", 3)
    assert (settings.roles, settings.group_id) == (("decide",), "stream-xp")


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"STREAM_XP_PARTITIONS": "four"}, "STREAM_XP_PARTITIONS: Expected `int`, got `str`, found 'four'"),
        ({"STREAM_XP_PARTITIONS": "0"}, "STREAM_XP_PARTITIONS: Expected `int` >= 1, found '0'"),
        ({"STREAM_XP_PREFIX": "a b"}, "STREAM_XP_PREFIX: Expected `str` matching regex"),
        ({"STREAM_XP_ROLES": "ingest,cook"}, "STREAM_XP_ROLES: Invalid enum value 'cook'"),
        ({"STREAM_XP_SESSION_TIMEOUT_MS": "30000"}, "STREAM_XP_SESSION_TIMEOUT_MS: Expected `int` <= 10000"),
        ({"STREAM_XP_BROKER": "rabbit"}, "STREAM_XP_BROKER: Invalid enum value 'rabbit'"),
        (
            {"STREAM_XP_PARTITION": "4"},
            "STREAM_XP_PARTITION is not a setting; did you mean STREAM_XP_PARTITIONS?",
        ),
        ({"STREAM_XP_ZZZ": "4"}, "STREAM_XP_ZZZ is not a setting"),
        ({"STREAM_XP_BOOTSTRAP": "localhost"}, "STREAM_XP_SECURITY_PROTOCOL must be written out"),
        ({"STREAM_XP_BOOTSTRAP": "127.0.0.1:0"}, "STREAM_XP_BOOTSTRAP must be host:port"),
        ({"STREAM_XP_BOOTSTRAP": "127.0.0.1:9092,"}, "STREAM_XP_SECURITY_PROTOCOL must be written out"),
        (
            {"STREAM_XP_MIN_INSYNC_REPLICAS": "2"},
            "STREAM_XP_MIN_INSYNC_REPLICAS must be at most STREAM_XP_REPLICATION (1), found 2",
        ),
        (
            {"STREAM_XP_SNAPSHOT_INTERVAL_MS": "100"},
            "STREAM_XP_SNAPSHOT_INTERVAL_MS must be at least STREAM_XP_FLUSH_INTERVAL_MS (250), found 100",
        ),
    ],
)
def test_refusals_name_the_variable_and_the_rule(environ: dict[str, str], wanted: str) -> None:
    assert wanted in refusal(environ)


def test_a_bad_override_is_named_as_the_option() -> None:
    assert refusal({}, partitions="x").startswith("--partitions: Expected `int`")
    assert refusal({}, partition=4) == "partition is not a setting; did you mean partitions?"


@pytest.mark.parametrize(
    "bootstrap", ["127.0.0.1:9092", "localhost:9092", "[::1]:9092", "127.0.0.2:1, localhost:2"]
)
def test_loopback_needs_no_protocol(bootstrap: str) -> None:
    assert Settings.load({"STREAM_XP_BOOTSTRAP": bootstrap}).security == KafkaSecurity()


def test_another_host_needs_the_protocol_written_out() -> None:
    environ = {"STREAM_XP_BOOTSTRAP": "127.0.0.1:9092,kafka:9092"}
    assert "STREAM_XP_SECURITY_PROTOCOL must be written out" in refusal(environ)
    assert "STREAM_XP_SECURITY_PROTOCOL must be written out" in refusal({}, bootstrap="kafka:9092")
    settings = Settings.load(environ | {"STREAM_XP_SECURITY_PROTOCOL": "PLAINTEXT"})
    assert settings.bootstrap_servers() == ["127.0.0.1:9092", "kafka:9092"]


@pytest.mark.parametrize("mechanism", ["OAUTHBEARER", "oauthbearer", "GSSAPI"])
def test_a_mechanism_of_tokens_is_refused_by_name(sasl: dict[str, str], mechanism: str) -> None:
    assert refusal(sasl | {"STREAM_XP_SASL_MECHANISM": mechanism}) == (
        f"STREAM_XP_SASL_MECHANISM must be one of SCRAM-SHA-512, SCRAM-SHA-256, PLAIN, found {mechanism!r}: this "
        "version proves an account by its password, or by a certificate with SSL, and fetches no token"
    )


def test_a_misspelt_mechanism_is_told_those_there_are(sasl: dict[str, str]) -> None:
    assert refusal(sasl | {"STREAM_XP_SASL_MECHANISM": "SCRAM"}).endswith(
        "must be one of SCRAM-SHA-512, SCRAM-SHA-256, PLAIN, found 'SCRAM'"
    )


@pytest.mark.parametrize("missing", ["SSL_CA_FILE", "SASL_USERNAME", "SASL_PASSWORD"])
def test_sasl_needs_all_its_parts(sasl: dict[str, str], missing: str) -> None:
    del sasl[f"STREAM_XP_{missing}"]
    assert refusal(sasl) == f"STREAM_XP_{missing} is required with STREAM_XP_SECURITY_PROTOCOL=SASL_SSL"


def test_credentials_beside_plaintext_are_refused() -> None:
    environ = {"STREAM_XP_SASL_USERNAME": "worker"}
    assert "STREAM_XP_SASL_USERNAME has no effect" in refusal(environ)


def test_sasl_without_tls_is_not_offered(sasl: dict[str, str]) -> None:
    assert "Invalid enum value 'SASL_PLAINTEXT'" in refusal(
        sasl | {"STREAM_XP_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}
    )


def test_certificate_and_key_go_together(sasl: dict[str, str], authority: Path) -> None:
    sasl["STREAM_XP_SSL_CERT_FILE"] = str(authority / "ca.pem")
    assert "go together" in refusal(sasl)
    sasl["STREAM_XP_SSL_KEY_FILE"] = str(authority / "key.pem")
    assert isinstance(Settings.load(sasl).security.ssl_context(), ssl.SSLContext)


def test_a_missing_authority_is_named(sasl: dict[str, str]) -> None:
    settings = Settings.load(sasl | {"STREAM_XP_SSL_CA_FILE": "/nowhere/ca.pem"})
    with pytest.raises(ConfigError, match=r"STREAM_XP_SSL_CA_FILE: cannot load '/nowhere/ca\.pem'"):
        settings.kafka_python_options()


def test_password_from_a_file(sasl: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(CANARY + "\n")
    assert "both set" in refusal(sasl | {"STREAM_XP_SASL_PASSWORD_FILE": str(file)})
    del sasl["STREAM_XP_SASL_PASSWORD"]
    settings = Settings.load(sasl | {"STREAM_XP_SASL_PASSWORD_FILE": str(file)})
    assert settings.security.sasl_password == Secret(CANARY)
    file.write_text("\n")
    assert "must hold 1 to" in refusal(sasl | {"STREAM_XP_SASL_PASSWORD_FILE": str(file)})
    file.write_bytes(CANARY.encode() + b"\xff")
    message = refusal(sasl | {"STREAM_XP_SASL_PASSWORD_FILE": str(file)})
    assert "cannot read" in message
    assert CANARY not in message


def test_a_secret_never_shows_itself(sasl: dict[str, str]) -> None:
    settings = Settings.load(sasl)
    shown = [repr(settings), str(settings), f"{settings.security.sasl_password}", repr(settings.security)]
    shown += [repr(settings.kafka_python_options()), repr(settings.aiokafka_options())]
    assert not [text for text in shown if CANARY in text]
    assert settings.security.client_options()["sasl_plain_password"] == CANARY
    with pytest.raises(TypeError):
        copy.copy(Secret(CANARY))
    with pytest.raises(TypeError):
        msgspec.json.encode(settings)


def test_kafka_python_gets_the_security_settings_and_logs_no_secret(
    sasl: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer  # noqa: PLC0415
    from kafka.net.manager import KafkaConnectionManager  # noqa: PLC0415

    monkeypatch.setattr(KafkaConnectionManager, "bootstrap", lambda *_, **__: None)
    options = Settings.load(sasl).kafka_python_options()
    with caplog.at_level(logging.DEBUG):
        for kind in (KafkaAdminClient, KafkaConsumer, KafkaProducer):
            client = kind(**options, api_version=(3, 9))
            config = client.config
            client.close()
            assert config["security_protocol"] == "SASL_SSL"
            assert config["sasl_mechanism"] == "SCRAM-SHA-512"
            assert (config["sasl_plain_username"], config["sasl_plain_password"]) == ("worker", CANARY)
            assert config["ssl_context"].check_hostname
            assert config["ssl_context"].verify_mode is ssl.CERT_REQUIRED
            assert config["ssl_context"].minimum_version is ssl.TLSVersion.TLSv1_2
    assert CANARY not in caplog.text


def test_aiokafka_gets_the_security_settings(sasl: dict[str, str]) -> None:
    import asyncio  # noqa: PLC0415

    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer  # noqa: PLC0415

    options = Settings.load(sasl).aiokafka_options()

    async def main() -> None:
        consumer, producer = AIOKafkaConsumer(**options), AIOKafkaProducer(**options)
        for client in (consumer._client, producer.client):
            assert client._security_protocol == "SASL_SSL"
            assert client._sasl_mechanism == "SCRAM-SHA-512"
            assert (client._sasl_plain_username, client._sasl_plain_password) == ("worker", CANARY)
            assert client._ssl_context is options["ssl_context"]
            assert client.hosts == [("kafka-1", 9093, 0), ("kafka-2", 9093, 0)] or len(client.hosts) == 2
        await consumer.stop()
        await producer.stop()

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_faust_gets_the_security_settings(sasl: dict[str, str]) -> None:
    from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth  # noqa: PLC0415

    settings = Settings.load(sasl)
    options = settings.faust_options()
    assert options["broker"] == ["kafka://kafka-1:9093", "kafka://kafka-2:9093"]
    assert CANARY not in repr(options)
    auth = credentials_to_aiokafka_auth(options["broker_credentials"])
    wanted = {name: value for name, value in settings.security.client_options().items() if value is not None}
    assert {name: getattr(value, "value", value) for name, value in auth.items() if name in wanted} == wanted

    sasl["STREAM_XP_SECURITY_PROTOCOL"] = "SSL"
    del sasl["STREAM_XP_SASL_USERNAME"], sasl["STREAM_XP_SASL_PASSWORD"]
    tls = Settings.load(sasl)
    auth = credentials_to_aiokafka_auth(tls.faust_options()["broker_credentials"])
    assert getattr(auth["security_protocol"], "value", auth["security_protocol"]) == "SSL"
    assert auth["ssl_context"] is tls.security.ssl_context()
    assert "broker_credentials" not in Settings().faust_options()


def test_the_embedded_broker_has_its_api_version() -> None:
    assert Settings(broker="embedded").kafka_python_options()["api_version"] == (2, 3, 0)
    assert "api_version" not in Settings().kafka_python_options()
    assert "api_version" not in Settings(broker="embedded").aiokafka_options()


def test_requests_that_prove_a_password_are_not_logged(
    sasl: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    # aiokafka and kafka-python log each request whole at DEBUG, and PLAIN sends the password as it is.
    Settings.load(sasl).aiokafka_options()
    for name in ("aiokafka.conn", "kafka.net.connection"):
        with caplog.at_level(logging.DEBUG, logger=name):
            request = f"SaslAuthenticateRequest_v1(sasl_auth_bytes=b'worker\\x00worker\\x00{CANARY}')"
            logging.getLogger(name).debug("Request to %s %d: %s", "kafka-1:9093", 3, request)
            logging.getLogger(name).debug("Request to %s %d: %s", "kafka-1:9093", 4, "MetadataRequest_v1()")
    assert CANARY not in caplog.text
    assert caplog.text.count("not shown") == 2
    assert caplog.text.count("MetadataRequest_v1") == 2


def test_the_load_generator_gets_the_security_settings(sasl: dict[str, str], authority: Path) -> None:
    from stream_xp.adapters.load_generator import _options  # noqa: PLC0415

    options = _options(Settings.load(sasl))
    assert options["security.protocol"] == "SASL_SSL"
    assert options["ssl.ca.location"] == str(authority / "ca.pem")
    assert (options["sasl.mechanism"], options["sasl.username"]) == ("SCRAM-SHA-512", "worker")
    assert options["sasl.password"] == CANARY
    assert CANARY not in repr(options)


def test_no_command_takes_a_secret_as_an_argument() -> None:
    import click  # noqa: PLC0415

    from stream_xp.cli import COMMANDS, main  # noqa: PLC0415

    def options(command: click.Command) -> list[str]:
        own = [option for parameter in command.params for option in parameter.opts]
        children = command.commands.values() if isinstance(command, click.Group) else ()
        return own + [option for child in children for option in options(child)]

    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert not [option for option in options(command) if "password" in option or "secret" in option]


def test_metrics_are_served_only_where_told_and_then_on_loopback() -> None:
    assert (Settings().metrics_port, Settings().metrics_host) == (None, "127.0.0.1")
    told = Settings.load({"STREAM_XP_METRICS_PORT": "9464", "STREAM_XP_METRICS_HOST": "0.0.0.0"})
    assert (told.metrics_port, told.metrics_host) == (9464, "0.0.0.0")
    assert "STREAM_XP_METRICS_PORT: Expected `int` <= 65535" in refusal({"STREAM_XP_METRICS_PORT": "70000"})
    assert "STREAM_XP_METRICS_HOST: Expected" in refusal({"STREAM_XP_METRICS_HOST": "a b"})
