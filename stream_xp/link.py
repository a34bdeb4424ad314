"""Asks a broker whether it takes our link, and says in one sentence why not.

The Kafka clients tell a foreign certificate, another host name and a wrong password alike: as a time-out after
many attempts, the cause being in their logs only. So the link is tried once before they are made: TCP, TLS, one
Kafka request, SASL. Only what waiting cannot mend is an error here; everything else is left to the clients.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from typing import TYPE_CHECKING, Any, Final

from stream_xp.errors import ConfigError
from stream_xp.settings import CLIENT_ID, variable_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.settings import KafkaSecurity, Settings

TIMEOUT_S: Final = 5.0
HINT_TIMEOUT_S: Final = 1.0

_API_VERSIONS: Final = 18
_SASL_HANDSHAKE: Final = 17
_SASL_AUTHENTICATE: Final = 36
_UNSUPPORTED_MECHANISM: Final = 33
_AUTHENTICATION_FAILED: Final = 58
_MAX_ANSWER_BYTES: Final = 65_536
_TLS_ALERT: Final = b"\x15"
# X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH.
_OTHER_NAME: Final = (62, 64)

_Link = socket.socket | ssl.SSLSocket


def check_link(settings: Settings) -> None:
    """Try the link to the first broker that answers; nothing is tried without TLS.

    Raises:
        ConfigError: the two will never trust each other with these settings; names the setting.
    """
    context = settings.security.ssl_context()
    if context is None:
        return
    for address in settings.bootstrap_servers():
        with contextlib.suppress(OSError, ValueError, struct.error), _connected(address, TIMEOUT_S) as plain:
            _check_trust(settings, address, plain, context)
            return


def hint(settings: Settings) -> str:
    """Return what else may be wrong when no client got through: a clause to append, or nothing."""
    tls = settings.security.security_protocol != "PLAINTEXT"
    for address in settings.bootstrap_servers():
        with (
            contextlib.suppress(OSError, ValueError, struct.error),
            _connected(address, HINT_TIMEOUT_S) as link,
        ):
            speaks_tls = _speaks_tls(link)
            if speaks_tls is tls:
                continue
            wanted = "SASL_SSL or SSL" if speaks_tls else "PLAINTEXT"
            found = "speaks" if speaks_tls else "does not speak"
            name = variable_of("security_protocol")
            return f"; {address} {found} TLS, which is {name}={wanted}"
    return ""


@contextlib.contextmanager
def _connected(address: str, timeout_s: float) -> Iterator[socket.socket]:
    with socket.create_connection(_host_and_port(address), timeout_s) as link:
        yield link


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _check_trust(settings: Settings, address: str, plain: socket.socket, context: ssl.SSLContext) -> None:
    try:
        with context.wrap_socket(plain, server_hostname=_host_and_port(address)[0]) as link:
            # With TLS 1.3 a refusal of our certificate comes with the first answer.
            _ask(link, _API_VERSIONS, 0, b"")
            if settings.security.sasl_password is not None:
                _authenticate(settings, address, link)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(_distrust(settings, address, error)) from error
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            raise
        raise ConfigError(
            f"the broker at {address} refuses our side of TLS ({error.reason}): check "
            f"{variable_of('ssl_cert_file')} and {variable_of('ssl_key_file')}"
        ) from error


def _distrust(settings: Settings, address: str, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _OTHER_NAME:
        return (
            f"the certificate of the broker at {address} is of another host ({error.verify_message}): "
            f"{variable_of('bootstrap')} must have a name that the certificate has"
        )
    return (
        f"the certificate of the broker at {address} is not trusted ({error.verify_message}): "
        f"{variable_of('ssl_ca_file')} ({settings.security.ssl_ca_file!r}) must hold the authority that signed it"
    )


def _authenticate(settings: Settings, address: str, link: _Link) -> None:
    # kafka-python takes long to import, and most commands fail, if at all, before they need it.
    from kafka.net.sasl import get_sasl_mechanism  # noqa: PLC0415

    security = settings.security
    answer = _ask(link, _SASL_HANDSHAKE, 1, _text(security.sasl_mechanism))
    if struct.unpack_from(">h", answer)[0] == _UNSUPPORTED_MECHANISM:
        raise ConfigError(
            f"the broker at {address} does not offer {variable_of('sasl_mechanism')}={security.sasl_mechanism}"
        )
    proof = get_sasl_mechanism(security.sasl_mechanism)(host=address, **security.client_options())
    while not proof.is_done():
        token = proof.auth_bytes()
        answer = _ask(link, _SASL_AUTHENTICATE, 0, struct.pack(">i", len(token)) + token)
        if struct.unpack_from(">h", answer)[0] == _AUTHENTICATION_FAILED:
            raise ConfigError(_refused_account(security, address))
        proof.receive(_token(answer))


def _refused_account(security: KafkaSecurity, address: str) -> str:
    password = variable_of("sasl_password")
    return (
        f"the broker at {address} refuses the account {security.sasl_username!r}: check "
        f"{variable_of('sasl_username')}, {password} (or {password}_FILE) and {variable_of('sasl_mechanism')}"
    )


def _token(answer: bytes) -> bytes:
    """Return the bytes after error code and error text of a SaslAuthenticate answer."""
    (text_bytes,) = struct.unpack_from(">h", answer, 2)
    at = 4 + max(0, text_bytes)
    (size,) = struct.unpack_from(">i", answer, at)
    return answer[at + 4 : at + 4 + size]


def _speaks_tls(link: socket.socket) -> bool:
    """Whether a listener answers a Kafka request in plain text with a TLS alert."""
    link.sendall(_request(_API_VERSIONS, 0, b""))
    return link.recv(1) == _TLS_ALERT


def _ask(link: _Link, api: int, version: int, body: bytes) -> bytes:
    """Return the answer to one request, without its correlation id."""
    link.sendall(_request(api, version, body))
    (size,) = struct.unpack(">i", _exactly(link, 4))
    if not 4 <= size <= _MAX_ANSWER_BYTES:
        raise ValueError(f"no Kafka answer has {size} bytes here")
    return _exactly(link, size)[4:]


def _request(api: int, version: int, body: bytes) -> bytes:
    message = struct.pack(">hhi", api, version, 0) + _text(CLIENT_ID) + body
    return struct.pack(">i", len(message)) + message


def _text(text: str) -> bytes:
    return struct.pack(">h", len(text.encode())) + text.encode()


def _exactly(link: _Link, size: int) -> bytes:
    parts: list[Any] = []
    while size:
        part = link.recv(size)
        if not part:
            raise ConnectionResetError("the broker closed the connection")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
