"""One signed POST to an address on the outside: what is sent, to whom, and how little is believed of the answer.

Signed as Standard Webhooks 1.0.0 has it (github.com/standard-webhooks/standard-webhooks, spec), so that its libraries
verify it. http.client is used because it neither follows redirects nor reads proxies from the environment.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime as dt
import email.utils
import errno
import hashlib
import hmac
import http.client
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from stream_xp import __version__
from stream_xp.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stream_xp.settings import Secret

TIMEOUT_S: Final = 5.0
"""From connecting to the end of the answer."""
LOOKUP_S: Final = 5.0
"""For looking a name up, which comes before it."""
MAX_ANSWER_BYTES: Final = 65_536
MAX_ADDRESSES: Final = 4
"""Addresses of a name that are tried, within the time of one attempt."""
MIN_KEY_BYTES: Final = 24
MAX_KEY_BYTES: Final = 64
KEY_PREFIX: Final = "whsec_"

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve: TypeAlias = "Callable[[str, int], Sequence[str]]"

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_PRIVATE: Final[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]] = (
    *(ipaddress.IPv4Network(one) for one in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8")),
    *(ipaddress.IPv6Network(one) for one in ("fc00::/7", "::1/128")),
)
_OF_CLOUDS: Final = frozenset(
    ipaddress.ip_address(one)
    for one in (
        "168.63.129.16",
        "fd00:42::42",
        "fd00:c1::a9fe:a9fe",
        "fd00:ec2::23",
        "fd00:ec2::254",
        "fd20:ce::254",
    )
)
"""Where clouds keep credentials beside link-local addresses: of Azure's host, which looks public, and those in private
networks of Scaleway, Oracle, Amazon (tasks and machines) and Google."""
_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?)*"
)
_PATH: Final = re.compile(r"[!-~]*")


class Endpoint(NamedTuple):
    """Where a target listens. Its path may be what proves the sender, so it does not show itself.

    Attributes:
        host: lower case, an address of IPv6 without brackets.
        path: with the query.
    """

    tls: bool
    host: str
    port: int
    path: str

    def __repr__(self) -> str:
        return f"Endpoint({'https' if self.tls else 'http'}://{self.host}:{self.port}/***)"

    def __str__(self) -> str:
        return repr(self)

    @property
    def host_header(self) -> str:
        """What stands in the Host header."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == (443 if self.tls else 80) else f"{name}:{self.port}"


def endpoint(url: str) -> Endpoint:
    """Take an address apart.

    Raises:
        ConfigError: names the rule and never shows the address.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise ConfigError("is no address") from None
    if parts.scheme not in ("https", "http"):
        raise ConfigError("must start with https:// (or http://, with allow_http)")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("must hold no user name and no password")
    if parts.fragment:
        raise ConfigError("must have no fragment")
    if not _is_host(host) or _PATH.fullmatch(url) is None:
        raise ConfigError(
            "must have a plain host and printable ASCII alone (write a name with others as xn--...)"
        )
    if port == 0:
        raise ConfigError("must have a port from 1 to 65535, or none")
    tls = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Endpoint(tls, host, port or (443 if tls else 80), path)


def _is_host(host: str) -> bool:
    """Whether it is a name that can be looked up, or an address of IPv6."""
    if ":" not in host:
        return _NAME.fullmatch(host) is not None
    try:
        return "%" not in host and bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False


class Refused(DependencyError):
    """Nothing was sent: the name stands for an address that the target may not have."""


class Answer(NamedTuple):
    """What a target said.

    Attributes:
        status: of HTTP.
        retry_after_s: how long it asks to be left alone; None without a wish that can be read.
    """

    status: int
    retry_after_s: float | None = None


# --- signing -------------------------------------------------------------------------------------------------


def signing_keys(secret: Secret) -> tuple[bytes, ...]:
    """The keys of a secret, one a line: each signs, so that a new one can be handed out before the old one goes.

    Raises:
        ConfigError: a line is no key; the message does not show it.
    """
    lines = [line.strip() for line in secret.reveal().splitlines()]
    keys = tuple(_key(number, line) for number, line in enumerate(filter(None, lines), start=1))
    if not 1 <= len(keys) <= 4:
        raise ConfigError("must hold 1 to 4 keys, one a line")
    return keys


def _key(number: int, line: str) -> bytes:
    try:
        key = base64.b64decode(line.removeprefix(KEY_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ConfigError(
            f"key {number} must be {KEY_PREFIX} and the base64 of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} random bytes"
        )
    return key


def signed_headers(
    body: bytes, *, message_id: str, timestamp_s: int, keys: Sequence[bytes]
) -> dict[str, str]:
    """The three headers of a message; without a key there is no signature.

    Args:
        body: the bytes that are sent, exactly.
        message_id: the same at every attempt.
        timestamp_s: of this attempt, epoch seconds.
        keys: of :func:`signing_keys`.
    """
    headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp_s)}
    content = f"{message_id}.{timestamp_s}.".encode() + body
    signatures = (base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode() for key in keys)
    if keys:
        headers["webhook-signature"] = " ".join(f"v1,{one}" for one in signatures)
    return headers


# --- addresses -----------------------------------------------------------------------------------------------


def may_connect(address: str, *, allow_private: bool) -> bool:
    """Whether an address may be connected to.

    Public ones may; private ones and loopback where that is allowed. Those where clouds keep credentials (link-local
    ones, and a few others), multicast and reserved ones never, nor what embeds one of them in an address of IPv6.
    """
    try:
        found = _embedded(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return False
    if found in _OF_CLOUDS:
        return False
    if any(found in network for network in _PRIVATE if network.version == found.version):
        return allow_private
    if isinstance(found, ipaddress.IPv6Address) and found not in _UNICAST:
        return False
    return found.is_global and not found.is_multicast


def _embedded(address: IPAddress) -> IPAddress:
    """The address of IPv4 that one of IPv6 leads to, where it is of such a kind."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo is not None else None) or address


def resolve(host: str, port: int) -> tuple[str, ...]:
    """The addresses of a name.

    Raises:
        OSError: it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(one[4][0]) for one in found))


# --- sending -------------------------------------------------------------------------------------------------


class Sender:
    """Posts to one endpoint, each time over a connection of its own.

    The name is looked up once for each attempt, all its addresses are checked, and one of these very addresses is
    connected to: a name that changes its mind in between (DNS rebinding) gains nothing.

    Args:
        where: the endpoint.
        allow_private: whether it may be in a private network or on this machine.
        ca_file: PEM file with the authorities to believe instead of the system's.
        resolve: gives the addresses of a name.
        timeout_s: from connecting to the end of the answer.
        lookup_s: of looking the name up.

    Raises:
        ConfigError: `ca_file` cannot be read.
    """

    def __init__(
        self,
        where: Endpoint,
        *,
        allow_private: bool = False,
        ca_file: str | None = None,
        resolve: Resolve = resolve,
        timeout_s: float = TIMEOUT_S,
        lookup_s: float = LOOKUP_S,
    ) -> None:
        self.where = where
        self._allow_private = allow_private
        self._resolve = resolve
        self._timeout_s = timeout_s
        self._lookup_s = lookup_s
        self._context = _context(ca_file) if where.tls else None

    def post(self, body: bytes, headers: Mapping[str, str], *, now: dt.datetime) -> Answer:
        """Post a body; any status is an answer, and what the answer holds is thrown away.

        Args:
            body: to send.
            headers: beside those of HTTP.
            now: for a Retry-After that is a date.

        Raises:
            Refused: an address is none that may be connected to.
            DependencyError: no answer; says why in words that hold no path and no secret.
        """
        try:
            with self._connected() as connection:
                connection.request("POST", self.where.path, body, self._headers(headers))
                response = connection.getresponse()
                answer = Answer(response.status, _retry_after_s(response.getheader("Retry-After"), now))
                # What follows is read so that the other side sees no broken connection; the status stands already.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    _read_away(response)
                return answer
        except (OSError, http.client.HTTPException) as error:
            raise DependencyError(f"{self.where.host_header}: {_why(error)}") from None

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        own = {
            "Host": self.where.host_header,
            "User-Agent": f"stream-xp/{__version__}",
            "Connection": "close",
        }
        return {**headers, **own}

    def _addresses(self) -> Sequence[str]:
        found = self._looked_up()
        for address in found:
            if not may_connect(address, allow_private=self._allow_private):
                kind = "of a kind that is never connected to" if self._allow_private else "not public"
                raise Refused(f"{self.where.host_header} stands for {address}, which is {kind}")
        return found

    def _looked_up(self) -> Sequence[str]:
        """What the name stands for; in a thread, since there is no other way to leave a name server that is silent."""
        answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(self._resolve(self.where.host, self.where.port))
            except Exception as error:  # noqa: BLE001 (it is raised below)
                answers.put(error)

        threading.Thread(target=look_up, name="stream-xp-lookup", daemon=True).start()
        try:
            answer = answers.get(timeout=self._lookup_s)
        except queue.Empty:
            raise DependencyError(f"{self.where.host_header}: its name was not found in time") from None
        if isinstance(answer, UnicodeError):
            raise OSError(errno.EINVAL, "its name cannot be looked up") from answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    @contextlib.contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        addresses = self._addresses()
        until_s = time.monotonic() + self._timeout_s
        raw = _first_connection(addresses, self.where.port, until_s)
        with contextlib.ExitStack() as open_sockets:
            open_sockets.enter_context(raw)
            deadline = open_sockets.enter_context(_deadline(raw, until_s))
            try:
                if self._context is not None:
                    raw = self._context.wrap_socket(
                        raw, server_hostname=self.where.host, do_handshake_on_connect=False
                    )
                    open_sockets.enter_context(raw)
                    deadline.socket = raw
                    raw.do_handshake()
                connection = http.client.HTTPConnection(self.where.host, self.where.port)
                connection.sock = raw
                yield connection
            except (OSError, http.client.HTTPException) as error:
                raise (TimeoutError("timed out") if deadline.over else error) from None


def _read_away(response: http.client.HTTPResponse) -> None:
    """Read what follows to its bound, a piece at a time: `read` believes the size that a chunk claims, also below 0."""
    left = MAX_ANSWER_BYTES
    while left > 0 and (piece := response.read1(left)):
        left -= len(piece)


class _Deadline:
    """Ends a socket when its time is over: a timeout of the socket would begin anew with every byte."""

    def __init__(self, held: socket.socket) -> None:
        self.socket = held
        self.over = False

    def end(self) -> None:
        """Let whoever reads or writes see the end."""
        self.over = True
        with contextlib.suppress(OSError):
            # Not SSLSocket's own, which would forget that there is TLS.
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


def _first_connection(addresses: Sequence[str], port: int, until_s: float) -> socket.socket:
    failure: OSError = OSError("the name has no address")
    for left, address in zip(range(MAX_ADDRESSES, 0, -1), addresses, strict=False):
        share = min(left, len(addresses))
        try:
            # An address and no name: nothing is looked up again.
            return socket.create_connection((address, port), max(0.1, (until_s - time.monotonic()) / share))
        except OSError as error:
            failure = error
    raise failure


@contextlib.contextmanager
def _deadline(held: socket.socket, until_s: float) -> Iterator[_Deadline]:
    left_s = max(0.1, until_s - time.monotonic())
    deadline = _Deadline(held)
    # The timer is first; the socket's own is for the case that it is late.
    held.settimeout(2 * left_s)
    timer = threading.Timer(left_s, deadline.end)
    timer.daemon = True
    timer.start()
    try:
        yield deadline
    finally:
        timer.cancel()
        timer.join()


def _context(ca_file: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot load {ca_file!r}: {error.strerror or type(error).__name__}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _why(error: Exception) -> str:
    """One line of an error. Texts of http.client repeat what a server sent, so only their kind is told."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"no answer of HTTP ({type(error).__name__})"


def _retry_after_s(text: str | None, now: dt.datetime) -> float | None:
    """Seconds of a Retry-After header: a number of them, or a date (RFC 9110, section 10.2.3)."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or dt.UTC) - now).total_seconds())
