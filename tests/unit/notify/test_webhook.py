"""Signatures, addresses, and what is sent to and believed of a server that stands on loopback."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import http.server
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stream_xp.adapters import webhook
from stream_xp.adapters.webhook import (
    Endpoint,
    Refused,
    Sender,
    endpoint,
    may_connect,
    signed_headers,
    signing_keys,
)
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.settings import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOW = dt.datetime(2026, 11, 2, 10, 30, tzinfo=dt.UTC)
# The example of the reference libraries of Standard Webhooks.
KNOWN_KEY = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
KNOWN = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}


# --- signing -------------------------------------------------------------------------------------------------


def known(keys: tuple[bytes, ...]) -> dict[str, str]:
    return signed_headers(
        b'{"test": 2432232314}',
        message_id=KNOWN["webhook-id"],
        timestamp_s=int(KNOWN["webhook-timestamp"]),
        keys=keys,
    )


def test_a_signature_is_that_of_the_standard() -> None:
    assert known(signing_keys(Secret(KNOWN_KEY))) == KNOWN


def test_the_prefix_of_a_key_may_be_left_out() -> None:
    assert known(signing_keys(Secret(KNOWN_KEY.removeprefix("whsec_")))) == KNOWN


def test_each_key_signs_so_that_keys_can_be_changed() -> None:
    new = "whsec_" + base64.b64encode(b"n" * 32).decode()
    signatures = known(signing_keys(Secret(f"{new}\n{KNOWN_KEY}\n")))["webhook-signature"].split(" ")
    assert len(signatures) == 2
    assert signatures[1] == KNOWN["webhook-signature"]
    assert signatures[0] != signatures[1]


def test_without_a_key_there_is_no_signature() -> None:
    assert known(()) == {name: text for name, text in KNOWN.items() if name != "webhook-signature"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "hunter2hunter2",
        base64.b64encode(b"x" * 23).decode(),
        base64.b64encode(b"x" * 65).decode(),
        "ключ",
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        signing_keys(Secret(text))
    assert not text.strip() or text not in str(refused.value)


def test_the_recipe_of_the_page_verifies() -> None:
    page = (Path(__file__).parents[3] / "docs" / "notify.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)  # what a reader copies
    new = "whsec_" + base64.b64encode(b"n" * 32).decode()
    now_s = int(time.time())
    keys = signing_keys(Secret(f"{new}\n{KNOWN_KEY}"))
    for secret in (new, KNOWN_KEY):
        headers = signed_headers(b"{}", message_id="id-1", timestamp_s=now_s, keys=keys)
        assert names["verified"](headers, b"{}", secret)
        assert not names["verified"](headers, b"{ }", secret)
        assert not names["verified"](headers | {"webhook-id": "id-2"}, b"{}", secret)
    old = signed_headers(b"{}", message_id="id-1", timestamp_s=now_s - 3600, keys=keys)
    assert not names["verified"](old, b"{}", KNOWN_KEY)


# --- addresses -----------------------------------------------------------------------------------------------


def test_an_address_is_taken_apart() -> None:
    assert tuple(endpoint("https://Hooks.Example.com/a/b?c=d")) == (
        True,
        "hooks.example.com",
        443,
        "/a/b?c=d",
    )
    assert tuple(endpoint("http://[::1]:8080")) == (False, "::1", 8080, "/")
    assert endpoint("http://[::1]:8080").host_header == "[::1]:8080"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "example.com",
        "https://",
        "https://me:pass@example.com/",
        "https://good.example\\@evil.example/",
        "https://evil.example\\.good.example/",
        "https://example.com:0/",
        "https://example.com:x/",
        "https://example.com/#part",
        "https://exämple.com/",
        "https://example.com./",
        "https://a..example.com/",
        "https://" + "a" * 64 + ".example.com/",
        "https://../",
        "https://[dead:beef]/",
        "https://example.com/a\r\nHost: evil",
        "https://[::1",
    ],
)
def test_a_bad_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        endpoint(url)
    assert url not in str(refused.value)


def test_the_path_of_an_endpoint_does_not_show_itself() -> None:
    where = endpoint("https://hooks.example.com/services/T0/B0/canary")
    assert "canary" not in repr(where) + str(where) + f"{where}" + repr([where])


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_may_be_connected_to(address: str) -> None:
    assert may_connect(address, allow_private=False)
    assert may_connect(address, allow_private=True)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.31.0.1",
        "192.168.1.1",
        "::1",
        "fd00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
    ],
)
def test_private_addresses_need_to_be_allowed(address: str) -> None:
    assert not may_connect(address, allow_private=False)
    assert may_connect(address, allow_private=True)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "100.64.0.1",
        "192.0.2.1",
        "ff02::1",
        "2001:db8::1",
        "::127.0.0.1",
        "168.63.129.16",
        "::ffff:168.63.129.16",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fd00:42::42",
        "nonsense",
    ],
)
def test_other_addresses_are_never_connected_to(address: str) -> None:
    assert not may_connect(address, allow_private=False)
    assert not may_connect(address, allow_private=True)


# --- sending -------------------------------------------------------------------------------------------------


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what it is sent and answers as told.

    Attributes:
        got: path, headers, body of each request.
        answers: status and headers of the next answers; 204 after the last.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.body = b""

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, {name.lower(): text for name, text in self.headers.items()}, body))
        status, headers = self.server.answers.pop(0) if self.server.answers else (204, {})
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def to(server: Receiver, path: str = "/hook", **options: Any) -> Sender:
    where = endpoint(f"http://hooks.test:{server.port}{path}")
    return Sender(where, **{"allow_private": True, "resolve": lambda *_: ["127.0.0.1"], **options})


def test_a_body_arrives_as_it_was_signed(receiver: Receiver) -> None:
    body, keys = b'{"a": 1}', signing_keys(Secret(KNOWN_KEY))
    headers = signed_headers(body, message_id="id-1", timestamp_s=1_793_615_400, keys=keys)
    answer = to(receiver, "/hook?x=1").post(body, headers, now=NOW)
    assert answer == (204, None)
    [(path, got, sent)] = receiver.got
    assert (path, sent, got["host"]) == ("/hook?x=1", body, f"hooks.test:{receiver.port}")
    # As a receiver would: from the bytes and headers that came.
    content = f"{got['webhook-id']}.{got['webhook-timestamp']}.".encode() + sent
    key = base64.b64decode(KNOWN_KEY.removeprefix("whsec_"))
    expected = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    assert got["webhook-signature"] == f"v1,{expected}"


def test_a_redirect_is_an_answer_and_not_followed(receiver: Receiver) -> None:
    receiver.answers = [(307, {"Location": f"http://127.0.0.1:{receiver.port}/elsewhere"})]
    assert to(receiver).post(b"{}", {}, now=NOW).status == 307
    assert [path for path, _, _ in receiver.got] == ["/hook"]


def test_proxies_of_the_environment_are_not_asked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert to(receiver).post(b"{}", {}, now=NOW).status == 204


def test_nothing_is_sent_to_a_private_address(receiver: Receiver) -> None:
    with pytest.raises(Refused, match=r"127\.0\.0\.1, which is not public"):
        to(receiver, allow_private=False).post(b"{}", {}, now=NOW)
    with pytest.raises(Refused, match=r"169\.254\.169\.254"):
        to(receiver, resolve=lambda *_: ["127.0.0.1", "169.254.169.254"]).post(b"{}", {}, now=NOW)
    assert receiver.got == []


def test_a_name_is_looked_up_once_and_that_address_is_connected_to(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that answers with another address the second time gains nothing."""
    asked: list[str] = []

    def answers(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    found: list[Any] = []
    stock = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: found.append(host) or stock(host, *rest, **more)
    )
    assert to(receiver, resolve=answers).post(b"{}", {}, now=NOW).status == 204
    assert asked == ["hooks.test"]
    assert set(found) == {"127.0.0.1"}


def test_addresses_are_tried_in_turn(receiver: Receiver) -> None:
    answer = to(receiver, resolve=lambda *_: ["127.0.0.9", "127.0.0.1"]).post(b"{}", {}, now=NOW)
    assert answer.status == 204


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        ("Mon, 02 Nov 2026 10:31:30 GMT", 90.0),
        ("Mon, 02 Nov 2026 09:00:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("9" * 40, None),
    ],
)
def test_a_wish_to_be_left_alone(receiver: Receiver, text: str, seconds: float | None) -> None:
    receiver.answers = [(503, {"Retry-After": text})]
    assert to(receiver).post(b"{}", {}, now=NOW) == (503, seconds)


def test_a_long_answer_is_read_to_its_bound(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    stock = webhook.http.client.HTTPResponse.read1
    monkeypatch.setattr(
        webhook.http.client.HTTPResponse,
        "read1",
        lambda self, amount: read.append(len(found := stock(self, amount))) or found,
    )
    receiver.body = b"x" * 1_000_000
    receiver.answers = [(200, {})]
    assert to(receiver).post(b"{}", {}, now=NOW).status == 200
    assert sum(read) == 65_536


def raw_server(serve: Callable[[socket.socket], None]) -> tuple[int, threading.Thread]:
    listening = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listening:
            one, _ = listening.accept()
            with one:
                serve(one)

    thread = threading.Thread(target=run)
    thread.start()
    return listening.getsockname()[1], thread


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 "])
def test_a_server_that_never_ends_is_left_in_time(first: bytes) -> None:
    """One byte after the other would renew a timeout of the socket for ever."""
    left = threading.Event()

    def drip(one: socket.socket) -> None:
        one.recv(65_536)
        try:
            one.sendall(first)
            while not left.wait(0.02):
                if first:
                    one.sendall(b"1")
        except OSError:
            pass

    port, thread = raw_server(drip)
    sender = Sender(
        endpoint(f"http://hooks.test:{port}/"),
        allow_private=True,
        resolve=lambda *_: ["127.0.0.1"],
        timeout_s=0.3,
    )
    try:
        with pytest.raises(DependencyError, match="no answer in time"):
            sender.post(b"{}", {}, now=NOW)
    finally:
        left.set()
        thread.join()


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"\r\n"])
def test_a_flood_is_not_read_whatever_length_it_claims(head: bytes) -> None:
    """A chunk of a negative size would be read to its end, into memory."""
    sent, flood = 0, b"x" * 65_536

    def pour(one: socket.socket) -> None:
        nonlocal sent
        one.recv(65_536)
        one.sendall(b"HTTP/1.1 200 OK\r\n" + head)
        with contextlib.suppress(OSError):
            while sent < 64 * 2**20:
                one.sendall(flood)
                sent += len(flood)

    port, thread = raw_server(pour)
    sender = Sender(
        endpoint(f"http://hooks.test:{port}/"), allow_private=True, resolve=lambda *_: ["127.0.0.1"]
    )
    assert sender.post(b"{}", {}, now=NOW).status == 200
    thread.join()
    # What the sockets of both sides hold is no concern of ours.
    assert sent < 32 * 2**20


def test_a_name_server_that_never_answers_is_left_in_time() -> None:
    """It would keep the thread longer than a member may be silent, and its messages would begin anew for ever."""
    left = threading.Event()

    def waits(*_: object) -> list[str]:
        left.wait()
        return ["127.0.0.1"]

    sender = Sender(endpoint("http://hooks.test:9/"), allow_private=True, resolve=waits, lookup_s=0.2)
    try:
        with pytest.raises(DependencyError, match=r"hooks\.test:9: its name was not found in time"):
            sender.post(b"{}", {}, now=NOW)
    finally:
        left.set()


def test_a_name_that_cannot_be_looked_up_is_a_failed_attempt() -> None:
    for fault in (socket.gaierror(-2, "Name or service not known"), UnicodeError("label empty or too long")):

        def fails(*_: object, fault: Exception = fault) -> list[str]:
            raise fault

        with pytest.raises(DependencyError, match=r"hooks\.test:9: "):
            Sender(endpoint("http://hooks.test:9/"), resolve=fails).post(b"{}", {}, now=NOW)


def test_what_a_server_says_instead_of_http_is_not_repeated() -> None:
    def talk(one: socket.socket) -> None:
        one.recv(65_536)
        one.sendall(b"canary-text\r\n\r\n")

    port, thread = raw_server(talk)
    sender = Sender(
        endpoint(f"http://hooks.test:{port}/secret-path"),
        allow_private=True,
        resolve=lambda *_: ["127.0.0.1"],
    )
    with pytest.raises(DependencyError) as failed:
        sender.post(b"{}", {}, now=NOW)
    thread.join()
    assert "no answer of HTTP" in str(failed.value)
    assert "canary" not in str(failed.value)
    assert "secret-path" not in str(failed.value)


def test_nobody_there_is_said_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(DependencyError, match=f"hooks.test:{port}: Connection refused"):
        Sender(
            endpoint(f"http://hooks.test:{port}/"), allow_private=True, resolve=lambda *_: ["127.0.0.1"]
        ).post(b"{}", {}, now=NOW)


# --- TLS -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for hooks.test that signs itself, with its key."""
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=hooks.test"
    command += " -addext subjectAltName=DNS:hooks.test"
    subprocess.run(
        [*command.split(), "-keyout", str(path), "-out", f"{path}.crt"], check=True, capture_output=True
    )
    path.write_text(path.read_text() + path.with_name("server.pem.crt").read_text())
    return path


@pytest.fixture
def secure(receiver: Receiver, certificate: Path) -> Receiver:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True, do_handshake_on_connect=False)
    return receiver


def over_tls(server: Receiver, host: str = "hooks.test", ca_file: Path | None = None) -> Sender:
    return Sender(
        endpoint(f"https://{host}:{server.port}/hook"),
        allow_private=True,
        resolve=lambda *_: ["127.0.0.1"],
        ca_file=None if ca_file is None else str(ca_file),
    )


def test_over_tls_with_the_name_of_the_address(secure: Receiver, certificate: Path) -> None:
    assert over_tls(secure, ca_file=certificate).post(b"{}", {}, now=NOW).status == 204
    assert len(secure.got) == 1


def test_a_certificate_of_another_name_or_authority_is_refused(secure: Receiver, certificate: Path) -> None:
    with pytest.raises(DependencyError, match="its certificate is refused: Hostname mismatch"):
        over_tls(secure, "other.test", certificate).post(b"{}", {}, now=NOW)
    with pytest.raises(DependencyError, match="its certificate is refused: self-signed certificate"):
        over_tls(secure).post(b"{}", {}, now=NOW)
    assert secure.got == []


def test_a_file_of_authorities_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load"):
        Sender(Endpoint(tls=True, host="a", port=443, path="/"), ca_file=str(tmp_path / "none.pem"))
