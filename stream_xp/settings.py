"""Settings of every stream_xp program: one frozen value, read once from the environment.

Each setting `name` has the variable `STREAM_XP_NAME`; what a command line gives wins over it. A variable
that starts with `STREAM_XP_` and is no setting is refused, because a misspelt one would be silent
otherwise; `STREAM_XP_TEST_*` and `STREAM_XP_BENCH_*` belong to the tests and the benchmarks.

One value maps to all three Kafka clients (:meth:`Settings.kafka_python_options`,
:meth:`Settings.aiokafka_options`, :meth:`Settings.faust_options`), so none of them can be left without
the security settings.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import ssl
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from stream_xp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

ENVIRONMENT_PREFIX: Final = "STREAM_XP_"
OTHER_PREFIXES: Final = ("STREAM_XP_TEST_", "STREAM_XP_BENCH_")
MAX_SECRET_BYTES: Final = 65_536
CLIENT_ID: Final = "stream-xp"

# The embedded broker answers no broker-version question that kafka-python understands.
EMBEDDED_API_VERSION: Final = (2, 3, 0)

Protocol = Literal["PLAINTEXT", "SSL", "SASL_SSL"]
Mechanism = Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"]
Broker = Literal["apache", "embedded"]
Role = Literal["ingest", "decide"]

ROLES: Final[tuple[Role, ...]] = ("ingest", "decide")

Count = Annotated[int, Meta(ge=1, le=10_000)]
Interval = Annotated[int, Meta(ge=1, le=3_600_000)]
Duration = Annotated[int, Meta(ge=0, le=31_536_000_000)]
TopicPrefix = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]*$", max_length=100)]
Host = Annotated[str, Meta(pattern=r"^[A-Za-z0-9.:-]+$", max_length=255)]
HostName = Annotated[str, Meta(pattern=r"^(\*|[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:]{2,45}\])$")]
TargetHost = Annotated[str, Meta(pattern=r"^([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])$")]
Origin = Annotated[str, Meta(pattern=r"^https?://[A-Za-z0-9._:\[\]-]{1,260}$")]
TracesUrl = Annotated[
    str,
    Meta(
        pattern=r"^https?://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:]{2,45}\])(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?$",
        max_length=500,
    ),
]
Identifier = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]+$", max_length=200)]


class Secret:
    """A text that never shows itself: `repr` and `str` are `***`; :meth:`reveal` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the text, as a `str` whose repr is masked.

        The clients log their options with `%s` of a dictionary, which prints the repr of its values.
        """
        return _MaskedStr(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "***"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Secret is not serialised")


class _MaskedStr(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


_REQUEST_LOGGERS: Final = ("aiokafka.conn", "kafka.net.connection")
"""Where the clients log each request at DEBUG; the one that proves a password by PLAIN holds it as it is."""


def _hide_proof(record: logging.LogRecord) -> bool:
    # Only loggers at DEBUG get here with a request, so it costs the others nothing.
    if record.levelno <= logging.DEBUG and "auth_bytes" in record.getMessage():
        record.msg, record.args = "a request or an answer of SASL, not shown", ()
    return True


class KafkaSecurity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a client and a broker trust each other.

    SASL without TLS is not offered: PLAIN would show the password, SCRAM the data.

    Attributes:
        security_protocol: PLAINTEXT, SSL or SASL_SSL.
        ssl_ca_file: PEM file with the authorities that may sign the brokers' certificates.
        ssl_cert_file: PEM file with the client's certificate, for mutual TLS.
        ssl_key_file: PEM file with the client's key.
        sasl_mechanism: how the password is proven.
        sasl_username: name of the client's account.
        sasl_password: its password.
    """

    security_protocol: Protocol = "PLAINTEXT"
    ssl_ca_file: str | None = None
    ssl_cert_file: str | None = None
    ssl_key_file: str | None = None
    sasl_mechanism: Mechanism = "SCRAM-SHA-512"
    sasl_username: str | None = None
    sasl_password: Secret | None = None

    def __post_init__(self) -> None:
        if self.security_protocol == "PLAINTEXT":
            self._refuse_unused()
        else:
            self._require_tls()

    def _refuse_unused(self) -> None:
        # A password beside PLAINTEXT means that somebody believes the link is protected.
        for name in ("ssl_ca_file", "ssl_cert_file", "ssl_key_file", "sasl_username", "sasl_password"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{variable_of(name)} has no effect with {variable_of('security_protocol')}=PLAINTEXT; "
                    "set the protocol to SSL or SASL_SSL, or remove it"
                )

    def _require_tls(self) -> None:
        needed = ["ssl_ca_file"]
        if self.security_protocol == "SASL_SSL":
            needed += ["sasl_username", "sasl_password"]
        for name in needed:
            if getattr(self, name) is None:
                raise ConfigError(
                    f"{variable_of(name)} is required with "
                    f"{variable_of('security_protocol')}={self.security_protocol}"
                )
        if (self.ssl_cert_file is None) != (self.ssl_key_file is None):
            raise ConfigError(
                f"{variable_of('ssl_cert_file')} and {variable_of('ssl_key_file')} go together: set both or none"
            )

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return the context of the TLS link (TLS 1.2 or newer, host names checked), None without TLS.

        Raises:
            ConfigError: a file is missing or is no PEM certificate.
        """
        if self.security_protocol == "PLAINTEXT":
            return None
        return _build_ssl_context(cast("str", self.ssl_ca_file), self.ssl_cert_file, self.ssl_key_file)

    def client_options(self) -> dict[str, Any]:
        """Return the security options, named alike in kafka-python and aiokafka."""
        options: dict[str, Any] = {"security_protocol": self.security_protocol}
        context = self.ssl_context()
        if context is not None:
            options["ssl_context"] = context
        if self.sasl_password is not None:
            options["sasl_mechanism"] = self.sasl_mechanism
            options["sasl_plain_username"] = self.sasl_username
            options["sasl_plain_password"] = self.sasl_password.reveal()
            for name in _REQUEST_LOGGERS:
                logging.getLogger(name).addFilter(_hide_proof)
        return options


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a program of stream_xp can be told from outside.

    Attributes:
        bootstrap: brokers to ask first, `host:port`, separated by commas.
        broker: `apache`, or `embedded` for librdkafka's mock cluster.
        prefix: what every topic name starts with.
        partitions: partitions of exposures, rewards and state; cannot change once there is data.
        replication: copies of each partition.
        min_insync_replicas: copies that must have a write before it is acknowledged.
        group_id: consumer group of the workers.
        roles: stages that this worker runs.
        flush_interval_ms: how often changed statistics are published.
        snapshot_interval_ms: how often changed state is written to the state topic.
        allowed_lateness_ms: broker append time minus event time beyond which an event is late.
        future_tolerance_ms: event time minus broker append time beyond which an event is rejected.
        max_record_bytes: longest record that is decoded.
        max_units: units of one experiment version that a partition takes; past it the experiment is invalid.
        activation_delay_ms: append time from which a changed experiment governs, after its own append time.
        idle_grace_ms: how long a quiet partition holds the watermark back.
        session_timeout_ms: how long a silent worker keeps its partitions.
        metrics_host: address at which a worker serves its metrics.
        metrics_port: port at which a worker serves its metrics; 0 for any that is free, None for no metrics.
        metrics_max_series: series of experiments that a worker serves; the experiments beyond are added up.
        api_host: address that the HTTP API listens on.
        api_port: port of the HTTP API; 0 for any that is free.
        api_allowed_hosts: names by which clients may call it; `*` for any. Those of loopback always may.
        api_allowed_origins: pages that may call it from a browser, beside its own.
        api_token: what write requests must carry, one token a line, `name:token` for a name in the audit trail; without
            one there are no write routes.
        gate_maximum_age_ms: wall clock minus watermark beyond which gates call data stale.
        gate_maximum_silence_ms: how long the brokers may be silent before gates say so.
        gate_no_data_deadline_ms: how long a rollout may go on without valid data before Flagger is told to fail it.
        notify_allowed_hosts: hosts that `stream-xp notify` may send to, by their exact names.
        health_file: what a worker touches while it goes on, for `stream-xp health`.
        traces_endpoint: URL that a worker sends its spans to by OTLP/HTTP; None for no traces.
        traces_sample_ratio: share of traces that is kept; those with a decision always are.
        traces_service_name: what a worker calls itself in its traces.
        security: how the client and the brokers trust each other.
    """

    bootstrap: str = "127.0.0.1:9092"
    broker: Broker = "apache"
    prefix: TopicPrefix = "xp."
    partitions: Count = 4
    replication: Annotated[int, Meta(ge=1, le=9)] = 1
    min_insync_replicas: Annotated[int, Meta(ge=1, le=9)] = 1
    group_id: Identifier = "stream-xp"
    roles: tuple[Role, ...] = ROLES
    flush_interval_ms: Interval = 250
    snapshot_interval_ms: Interval = 2_000
    allowed_lateness_ms: Duration = 60_000
    future_tolerance_ms: Duration = 300_000
    max_record_bytes: Annotated[int, Meta(ge=1_024, le=1_048_576)] = 65_536
    max_units: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 20_000_000
    activation_delay_ms: Duration = 5_000
    idle_grace_ms: Duration = 2_000
    session_timeout_ms: Annotated[int, Meta(ge=1_000, le=10_000)] = 10_000
    metrics_host: Host = "127.0.0.1"
    metrics_port: Annotated[int, Meta(ge=0, le=65_535)] | None = None
    metrics_max_series: Annotated[int, Meta(ge=0, le=1_000_000)] = 20_000
    api_host: Annotated[str, Meta(pattern=r"^[A-Za-z0-9.:_-]+$", max_length=253)] = "127.0.0.1"
    api_port: Annotated[int, Meta(ge=0, le=65_535)] = 8080
    api_allowed_hosts: tuple[HostName, ...] = ()
    api_allowed_origins: tuple[Origin, ...] = ()
    api_token: Secret | None = None
    gate_maximum_age_ms: Interval = 60_000
    gate_maximum_silence_ms: Interval = 15_000
    gate_no_data_deadline_ms: Duration = 900_000
    notify_allowed_hosts: tuple[TargetHost, ...] = ()
    health_file: Annotated[str, Meta(min_length=1)] | None = None
    traces_endpoint: TracesUrl | None = None
    traces_sample_ratio: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    traces_service_name: Identifier = "stream-xp"
    security: KafkaSecurity = KafkaSecurity()

    def __post_init__(self) -> None:
        for address in self.bootstrap_servers():
            _check_address(address)
        if self.min_insync_replicas > self.replication:
            raise ConfigError(
                f"{variable_of('min_insync_replicas')} must be at most {variable_of('replication')} "
                f"({self.replication}), found {self.min_insync_replicas}"
            )
        if self.snapshot_interval_ms < self.flush_interval_ms:
            raise ConfigError(
                f"{variable_of('snapshot_interval_ms')} must be at least {variable_of('flush_interval_ms')} "
                f"({self.flush_interval_ms}), found {self.snapshot_interval_ms}"
            )

    @classmethod
    def load(cls, environ: Mapping[str, str], **overrides: object) -> Settings:
        """Read the settings from environment variables; overrides that are not None win.

        Raises:
            ConfigError: names the variable (or the option, for an override) and the rule it breaks.
        """
        values = _from_environment(environ)
        for name, value in overrides.items():
            if name not in _FIELDS:
                raise ConfigError(f"{name} is not a setting{_suggest(name, _FIELDS)}")
            if value is not None:
                values[name] = _convert(name, value, label="--" + name.replace("_", "-"))
        return cls(
            **{name: value for name, value in values.items() if name not in _SECURITY_FIELDS},
            security=_security(values),
        )

    def topic(self, name: str) -> str:
        """Return the full name of a topic."""
        return self.prefix + name

    def bootstrap_servers(self) -> list[str]:
        """Return the brokers to ask first, one `host:port` each."""
        return [address.strip() for address in self.bootstrap.split(",")]

    @property
    def clocks_apart_ms(self) -> int:
        """How far the clocks of brokers and applications may be apart (ADR 5): half the activation delay."""
        return self.activation_delay_ms // 2

    @property
    def lead_ms(self) -> int:
        """From when a weight epoch is written until it begins: by then every worker knows it, by whatever clock."""
        return self.activation_delay_ms + self.clocks_apart_ms

    def missing_topic(self, topic: str) -> ConfigError:
        """Return the error that says that a topic, by its full name, does not exist."""
        return ConfigError(
            f"topic {topic} does not exist at {self.bootstrap}{self.account_note()}; "
            "`stream-xp topics create` makes it, --prefix chooses another"
        )

    def account_note(self) -> str:
        """Return what a broker that shows a topic only to some accounts adds to "does not exist"."""
        name = self.security.sasl_username
        return "" if name is None else f", or the account {name!r} may not see it"

    def kafka_python_options(self) -> dict[str, Any]:
        """Return the options that every client of kafka-python takes."""
        options = {
            "bootstrap_servers": self.bootstrap_servers(),
            "client_id": CLIENT_ID,
            **self.security.client_options(),
        }
        if self.broker == "embedded":
            options["api_version"] = EMBEDDED_API_VERSION
        return options

    def aiokafka_options(self) -> dict[str, Any]:
        """Return the options that every client of aiokafka takes."""
        return {
            "bootstrap_servers": self.bootstrap_servers(),
            "client_id": CLIENT_ID,
            **self.security.client_options(),
        }

    def faust_options(self) -> dict[str, Any]:
        """Return the options of `faust.App` that name the brokers and the credentials."""
        # Faust takes a second to import, and only the worker needs it.
        from faust.auth import SASLCredentials, SSLCredentials  # noqa: PLC0415

        security = self.security
        options: dict[str, Any] = {
            "broker": [f"kafka://{address}" for address in self.bootstrap_servers()],
            "broker_client_id": CLIENT_ID,
            "broker_session_timeout": self.session_timeout_ms / 1_000,
        }
        if security.security_protocol == "SSL":
            options["broker_credentials"] = SSLCredentials(security.ssl_context())
        if security.sasl_password is not None:
            options["broker_credentials"] = SASLCredentials(
                username=security.sasl_username,
                password=security.sasl_password.reveal(),
                ssl_context=security.ssl_context(),
                mechanism=security.sasl_mechanism,
            )
        return options


_SECURITY_FIELDS: Final = get_type_hints(KafkaSecurity, include_extras=True)
_FIELDS: Final = {
    **{n: t for n, t in get_type_hints(Settings, include_extras=True).items() if n != "security"},
    **_SECURITY_FIELDS,
}
_SECRETS: Final = frozenset({"sasl_password", "api_token"})
_LISTS: Final = frozenset({"roles", "api_allowed_hosts", "api_allowed_origins", "notify_allowed_hosts"})


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the converted value of each variable that is set; an unknown variable is an error."""
    known = {variable_of(name): name for name in _FIELDS}
    files = {variable_of(name) + "_FILE": name for name in _SECRETS}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable.startswith(OTHER_PREFIXES):
            continue
        if variable in files:
            if variable_of(files[variable]) in environ:
                raise ConfigError(f"{variable} and {variable_of(files[variable])} are both set; set one")
            values[files[variable]] = read_secret(variable, Path(text))
        elif variable in known:
            values[known[variable]] = _convert(known[variable], text, label=variable)
        else:
            raise ConfigError(f"{variable} is not a setting{_suggest(variable, known | files)}")
    return values


def _convert(name: str, value: object, *, label: str) -> object:
    if name in _SECRETS:
        return value if isinstance(value, Secret) else Secret(str(value))
    if name in _LISTS and isinstance(value, str):
        value = [one.strip() for one in value.split(",")]
    if name == "sasl_mechanism" and value not in get_args(Mechanism):
        raise ConfigError(
            f"{label} must be one of {', '.join(get_args(Mechanism))}, found {value!r}{_no_token(value)}"
        )
    if name == "traces_endpoint" and "@" in str(value):
        # A password in it would stand in every message about it.
        raise ConfigError(f"{label} must hold no user name or password")
    try:
        return msgspec.convert(value, _FIELDS[name], strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{label}: {error}, found {value!r}") from error


def _no_token(mechanism: object) -> str:
    """Return why a mechanism of tokens is not offered: a clause to append, or nothing."""
    if str(mechanism).upper() not in ("OAUTHBEARER", "AWS_MSK_IAM", "GSSAPI"):
        return ""
    return (
        ": this version proves an account by its password, or by a certificate with SSL, and fetches no token"
    )


def read_secret(variable: str, path: Path) -> Secret:
    """Return the text of a file, without the line break at its end.

    Raises:
        ConfigError: it cannot be read, or is no text; names `variable` and the file, and nothing of what is in it.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SECRET_BYTES + 1)
        text = raw.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        # The text of a decoding error shows bytes of the secret, so only its class is told.
        detail = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ConfigError(f"{variable}: cannot read {str(path)!r}: {detail}") from None
    if not text or len(raw) > MAX_SECRET_BYTES:
        raise ConfigError(f"{variable}: {str(path)!r} must hold 1 to {MAX_SECRET_BYTES} bytes of text")
    return Secret(text)


def _security(values: Mapping[str, Any]) -> KafkaSecurity:
    chosen = {name: values[name] for name in _SECURITY_FIELDS if name in values}
    bootstrap = values.get("bootstrap", Settings.__struct_defaults__[0])
    if "security_protocol" not in chosen and not all(map(_is_loopback, str(bootstrap).split(","))):
        raise ConfigError(
            f"{variable_of('security_protocol')} must be written out for a broker that is not on loopback "
            f"({bootstrap}): SASL_SSL, SSL or PLAINTEXT"
        )
    return KafkaSecurity(**chosen)


def _check_address(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535):
        raise ConfigError(
            f"{variable_of('bootstrap')} must be host:port, several separated by commas, found {address!r}"
        )


def _is_loopback(address: str) -> bool:
    host = address.strip().rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _suggest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


@lru_cache(maxsize=8)
def _build_ssl_context(ca_file: str, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """Build a context once per set of files, so that all clients of a process share it."""
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{variable_of('ssl_ca_file')}: cannot load {ca_file!r}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file is not None:
        try:
            context.load_cert_chain(cert_file, key_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{variable_of('ssl_cert_file')}: cannot load {cert_file!r}: {error}"
            ) from error
    return context
