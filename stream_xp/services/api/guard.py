"""The edge of the API: who may call it by which name, with which token, and how much they may send."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
from starlette.requests import ClientDisconnect

from stream_xp.errors import ConfigError
from stream_xp.settings import variable_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from stream_xp.settings import Secret, Settings

log = structlog.get_logger(__name__)

MAX_BODY_BYTES: Final = 65_536
MAX_HEADER_BYTES: Final = 16_384
BODY_TIMEOUT_S: Final = 10.0
LOGGED_PER_SECOND: Final = 10
REASONS: Final = (
    "host",
    "origin",
    "token",
    "headers",
    "body_size",
    "content_type",
    "bad_request",
    "not_found",
    "method",
    "timeout",
    "busy",
    "conflict",
    "unavailable",
    "error",
)
"""Why a request was refused: a closed set, so that no client can add one."""
PROBES: Final = frozenset({"/healthz", "/readyz"})
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST: Final = re.compile(r"([a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?")
"""A Host header in small letters, and the name in it; an address of IPv6 keeps its brackets."""
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_TOKEN: Final = re.compile(r"(?:([A-Za-z0-9][A-Za-z0-9._-]{0,99}):)?([A-Za-z0-9_.~+/=-]{32,512})")


class Refused(Exception):
    """A request that is not answered as it asked.

    Attributes:
        status: of HTTP.
        reason: one of `REASONS`.
        detail: one sentence for the client: no path of a file, no stack, no secret.
    """

    def __init__(self, status: int, reason: str, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}


class Refusals:
    """Counts what was refused, and logs it: all reasons for ever, some lines each second."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._now_s = now_s
        self._second = -1
        self._logged = 0

    def note(self, refused: Refused, scope: Scope) -> None:
        """Count a refusal; a flood of them must not fill a log."""
        self.counts[refused.reason] += 1
        second = int(self._now_s())
        if second != self._second:
            self._second, self._logged = second, 0
        self._logged += 1
        if self._logged > LOGGED_PER_SECOND:
            return
        client = scope.get("client") or ("", 0)
        log.warning(
            "request refused",
            reason=refused.reason,
            status=refused.status,
            detail=plain(refused.detail),
            method=scope.get("method", ""),
            path=plain(scope.get("path", "")),
            client=client[0],
        )


def plain(text: str, *, most: int = 200) -> str:
    """The begin of a text from outside, without the letters that steer a terminal or a log."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


class Tokens:
    """The tokens of write requests: any of them does, so that a new one can be handed out before the old one goes.

    Raises:
        ConfigError: a line is no token; the message does not show it.
    """

    def __init__(self, secret: Secret | None) -> None:
        self._names: list[tuple[str, bytes]] = []
        lines = [] if secret is None else [line.strip() for line in secret.reveal().splitlines()]
        for number, line in enumerate(filter(None, lines), start=1):
            found = _TOKEN.fullmatch(line)
            if found is None:
                raise ConfigError(
                    f"{variable_of('api_token')}: token {number} must be 32 to 512 letters, digits or _.~+/=-, "
                    "with a name and a colon before it or not"
                )
            self._names.append((found[1] or "api", _digest(found[2])))
        if secret is not None and not self._names:
            raise ConfigError(f"{variable_of('api_token')} must hold a token")

    def __bool__(self) -> bool:
        return bool(self._names)

    def name_of(self, authorization: str) -> str | None:
        """The name of the bearer; None where the token is none of ours. It takes as long for any."""
        scheme, _, presented = authorization.partition(" ")
        digest, name = _digest(presented.strip()), None
        for candidate, held in self._names:
            if hmac.compare_digest(digest, held) and name is None:
                name = candidate
        return name if scheme.lower() == "bearer" else None

    def bearer(self, request: Request) -> str:
        """The name of who asks.

        Raises:
            Refused: without a token of ours.
        """
        shown = request.headers.getlist("authorization")
        # Of two, a proxy may have looked at the other one.
        name = self.name_of(shown[0]) if len(shown) == 1 else None
        if name is None:
            raise Refused(401, "token", "a bearer token of this service is needed", www_authenticate="Bearer")
        return name


def _digest(token: str) -> bytes:
    # Of one length whatever is presented.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def check_names(settings: Settings) -> None:
    """Refuse to listen where no name is allowed by which it could be called.

    Raises:
        ConfigError: names the setting.
    """
    if not is_loopback(settings.api_host) and not settings.api_allowed_hosts:
        raise ConfigError(
            f"{variable_of('api_allowed_hosts')} must name the hosts by which clients call the API "
            f"(or be *), since {variable_of('api_host')} is {settings.api_host}, not loopback"
        )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Checks host and origin before anything else, and gives every answer the headers that keep it data.

    Args:
        app: what is guarded.
        settings: the names that are allowed; the check of the host is what DNS rebinding fails at.
        refusals: told of each request that is refused.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, refusals: Refusals) -> None:
        self._app = app
        self._refusals = refusals
        self._hosts = _LOOPBACK | {name.lower() for name in settings.api_allowed_hosts}
        self._origins = frozenset(settings.api_allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            self._check(scope)
        except Refused as refused:
            self._refusals.note(refused, scope)
            await answer(refused, with_headers)
            return
        await self._app(scope, receive, with_headers)

    def _check(self, scope: Scope) -> None:
        # What comes at once is past the server's own limit, which is one of what it waits for.
        sent = sum(len(name) + len(value) for name, value in scope["headers"])
        if sent + len(scope.get("raw_path", b"")) + len(scope["query_string"]) > MAX_HEADER_BYTES:
            raise Refused(431, "headers", f"address and headers may have {MAX_HEADER_BYTES} bytes")
        _check_reading(scope)
        if scope["path"] in PROBES:
            return  # A probe calls by the address of the machine; there is nothing in the answer.
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value.lower() for name, value in headers if name == b"host"]
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None or ("*" not in self._hosts and found[1] not in self._hosts):
            raise Refused(421, "host", "this service is not called by that name")
        host = found[0]
        own = f"{scope['scheme']}://{host}"
        for name, value in headers:
            if name == b"origin" and value != own and value not in self._origins:
                raise Refused(403, "origin", "pages of that origin may not call this service")


def _check_reading(scope: Scope) -> None:
    """Refuse what a proxy before us may have read as another request: it may have let that one pass.

    Raises:
        Refused: of two lengths of a body, and of a path that can be read in two ways.
    """
    names = {name.lower() for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise Refused(400, "bad_request", "a body has one length", connection="close")
    path: str = scope["path"]
    encoded = scope.get("raw_path", b"").lower()
    if b"%2f" in encoded or "\\" in path or not {".", ".."}.isdisjoint(path.split("/")):
        raise Refused(400, "bad_request", "the path can be read in two ways")


async def answer(refused: Refused, send: Send) -> None:
    """Send a refusal as JSON."""
    body = msgspec.json.encode({"error": refused.detail})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), text.encode()) for name, text in refused.headers.items()]
    start: Message = {"type": "http.response.start", "status": refused.status, "headers": headers}
    for message in (start, {"type": "http.response.body", "body": body}):
        await send(message)


async def read_body(request: Request, *, most_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body of a request, if it is not too long and comes in time.

    Raises:
        Refused: otherwise; what it announces is believed, and what comes is counted.
    """
    announced = request.headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdigit()) or int(announced[:20]) > most_bytes:
        raise _too_long(most_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise _too_long(most_bytes)
    except ClientDisconnect:
        raise Refused(400, "bad_request", "the body broke off") from None
    except TimeoutError:
        raise Refused(408, "timeout", f"the body did not come within {BODY_TIMEOUT_S:.0f} s") from None
    return bytes(body)


def _too_long(most_bytes: int) -> Refused:
    return Refused(413, "body_size", f"a body may have {most_bytes} bytes", connection="close")


def require_json(request: Request) -> None:
    """Refuse a body that does not say it is JSON: a form of a foreign page cannot say so unasked.

    Raises:
        Refused: of another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "content_type", "the content type must be application/json")
