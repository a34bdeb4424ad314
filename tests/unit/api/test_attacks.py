"""What an attacker sends who knows HTTP better than a browser does: each was answered, held or logged once."""

from __future__ import annotations

import hmac
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from api_process import BEARER, SERVER, TOKEN, serving
from gate_world import NOW_MS, world_in

from stream_xp.services.api import connection, endpoints
from stream_xp.services.api.guard import Refusals, Tokens
from stream_xp.services.api.server import ServerThread
from stream_xp.settings import Secret

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

GATE = "/api/v1/experiments/checkout/gate"
REPLY_S = 20.0


@contextmanager
def connected(server: ServerThread = SERVER) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=REPLY_S) as found:
        yield found


def told(request: bytes) -> bytes:
    """All that the server sends until it closes."""
    with connected() as link:
        link.sendall(request)
        return until_closed(link)


def until_closed(link: socket.socket) -> bytes:
    answer = b""
    try:
        while chunk := link.recv(65_536):
            answer += chunk
    except ConnectionResetError:
        pass
    return answer


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode("latin-1")


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "localhost:evil.example",
        "localhost:80@evil.example",
        "[::1].evil.example",
        "[::1]@evil.example:80",
        "localhost:80:90",
        "localhost:",
        "localhost:123456",
    ],
)
def test_a_host_that_only_begins_with_a_name_of_ours_is_refused(host: str) -> None:
    with serving(world_in("pass")) as (client, _):
        answer = client.get("/spinnaker/checkout", headers={"host": host})
        assert answer.status_code == 421
        assert "evil" not in answer.text + str(answer.headers)


@pytest.mark.parametrize("host", ["a b", "evil/path", "x@y", 'a"b', "a\\b", "", "<script>"])
def test_where_any_host_may_call_it_is_still_a_host(host: str) -> None:
    with serving(world_in("pass", api_allowed_hosts=("*",))) as (client, _):
        assert client.get("/spinnaker/checkout", headers={"host": host}).status_code == 421


def test_forwarded_names_are_not_believed() -> None:
    forged = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "https", "forwarded": "host=evil"}
    with serving(world_in("pass")) as (client, _):
        answer = client.get("/spinnaker/checkout", headers=forged)
        assert answer.json()["statusUrl"] == f"{client.base_url}/spinnaker/checkout".replace("//sp", "/sp")


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/experiments/checkout%2Fgate",
        "/api/v1/experiments/checkout%2fgate",
        "/api/v1/experiments/a%5Cgate",
        "/api/v1/experiments/%2e%2e/gate",
        "/api/v1/experiments/../gate",
        "/api/v1/experiments/./gate",
        "/flagger%2Frollback",
    ],
)
def test_a_path_has_one_reading(path: str) -> None:
    """What a proxy before it takes for one route must not be another one here."""
    with serving(world_in("stop")) as (client, api):
        answer = told(head("GET", path, "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 400"), answer[:200]
        assert api.refusals.counts["bad_request"] == 1
        assert client.get(GATE).status_code == 200


@pytest.mark.parametrize("path", ["checkout%00/gate", "checkout%0d%0aSet-Cookie:%20x=1/gate", "%ff%fe/gate"])
def test_bytes_that_are_no_name_are_an_unknown_experiment(path: str) -> None:
    with serving(world_in("pass")) as (client, _):
        answer = client.get(f"/api/v1/experiments/{path}")
        assert (answer.json()["cause"], "set-cookie" in answer.headers) == ("unknown_experiment", False)
        moved = client.get(f"/spinnaker/{path.removesuffix('/gate')}")
        assert moved.headers["location"].isascii()
        assert moved.json()["statusUrl"] == moved.headers["location"]


def test_no_header_and_no_field_changes_the_method() -> None:
    override = {"x-http-method-override": "DELETE", "x-method-override": "PUT", "x-http-method": "POST"}
    world = world_in("pass", api_token=Secret(TOKEN))
    with serving(world) as (client, _):
        assert client.get(GATE, headers=override, params={"_method": "DELETE"}).json()["verdict"] == "pass"
        url = "/api/v1/experiments/checkout/orders/stop"
        answer = client.get(url, headers={**BEARER, "x-http-method-override": "POST"})
        assert answer.status_code == 405


def test_a_page_size_is_a_number_to_its_end() -> None:
    with serving(world_in("pass")) as (client, _):
        for limit in (
            "1" * 5_000,
            "0000000001" + "9" * 5_000,
            "0000000500999",
            "00000000001",
            "1_0",
            "+1",
            "१",
        ):
            answer = client.get("/api/v1/experiments", params={"limit": limit})
            assert answer.status_code == 400, limit[:20]
        assert client.get("/api/v1/experiments", params={"limit": "007"}).status_code == 200


# --- requests in requests ------------------------------------------------------------------------------------------


def test_a_body_of_two_lengths_is_refused_and_what_follows_is_no_request() -> None:
    smuggled = head("GET", GATE)
    with serving(world_in("pass")) as (_, api):
        for lines in (
            ("Content-Length: 5", "Transfer-Encoding: chunked"),
            ("Transfer-Encoding: chunked", f"Content-Length: {len(smuggled) + 5}"),
        ):
            request = head("POST", "/spinnaker/checkout", *lines) + b"0\r\n\r\n" + smuggled
            answer = told(request)
            assert answer.count(b"HTTP/1.1 ") == 1, answer
            assert answer.startswith(b"HTTP/1.1 400")
        assert api.refusals.counts["bad_request"] == 2
        assert api.answered["spinnaker"] == api.answered["gate"] == 0
        for lines in (
            ("Content-Length: 5", "Content-Length: 6"),
            ("Content-Length: +5",),
            ("Transfer-Encoding: xchunked",),
            ("Transfer-Encoding: chunked, identity",),
            ("Content-Length : 5",),
        ):
            answer = told(head("POST", "/spinnaker/checkout", *lines) + b"12345" + smuggled)
            assert answer.count(b"HTTP/1.1 ") == 1, lines
            assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), lines


def test_two_tokens_are_none() -> None:
    """A proxy may have looked at the other one."""
    world = world_in("pass", api_token=Secret(TOKEN))
    body = b'{"reason": "r"}'
    with serving(world) as (_, api):
        for first, second in ((TOKEN, "x" * 40), ("x" * 40, TOKEN)):
            lines = [f"Authorization: Bearer {one}" for one in (first, second)]
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"]
            answer = told(head("POST", "/api/v1/experiments/nobody/orders/stop", *lines) + body)
            assert answer.startswith(b"HTTP/1.1 401"), answer[:100]
        assert api.refusals.counts["token"] == 2


def test_every_token_is_compared_whatever_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(Secret("\n".join(f"n{one}:{one * 32}" for one in "abc")))
    compared: list[tuple[bytes, bytes]] = []
    stock = hmac.compare_digest

    def counted(shown: bytes, held: bytes) -> bool:
        compared.append((shown, held))
        return stock(shown, held)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for shown in ("a" * 32, "c" * 32, "x", "", "\xff" * 500):
        compared.clear()
        tokens.name_of(f"Bearer {shown}")
        # As many comparisons, of as many bytes.
        assert [(len(one), len(other)) for one, other in compared] == [(32, 32)] * 3


# --- time ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_S", 0.2)
    monkeypatch.setattr(connection, "WRITE_S", 0.2)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"G",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-A: ",
        # After an answer that needed no body, the body that was announced.
        head("POST", "/nothing", "Content-Length: 60000") + b"x",
        head("POST", "/nothing", "Transfer-Encoding: chunked") + b"1\r\nx\r\n",
        # After a whole request, half of the next one.
        head("GET", "/healthz") + b"GET /healthz HTT",
    ],
)
def test_a_request_that_never_ends_ends(begun: bytes) -> None:
    with serving(world_in("pass")) as (client, _), connected() as link:
        link.sendall(begun)
        # However often a byte more comes.
        link.settimeout(0.05)
        deadline_s = time.monotonic() + REPLY_S
        while not closed(link):
            assert time.monotonic() < deadline_s, "it is held for ever"
        assert client.get(GATE).status_code == 200


def closed(link: socket.socket) -> bool:
    """Send a byte more; whether there is nobody any more."""
    try:
        link.sendall(b"x")
        return link.recv(65_536) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.usefixtures("soon")
def test_an_answer_that_nobody_reads_is_not_kept() -> None:
    async def endless(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(1_000_000), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    with ServerThread(endless) as server, connected(server) as link:
        link.sendall(head("GET", "/"))
        deadline_s = time.monotonic() + REPLY_S
        while not server.open_connections():
            assert time.monotonic() < deadline_s
        while server.open_connections():
            assert time.monotonic() < deadline_s, "it is held for ever"
            time.sleep(0.02)


@pytest.mark.usefixtures("soon")
def test_who_is_slow_within_the_time_and_who_is_idle_is_answered() -> None:
    with serving(world_in("pass")), connected() as link:
        for _ in range(2):
            for piece in (b"GET /healthz HT", b"TP/1.1\r\nHost: ", b"localhost\r\n\r\n"):
                link.sendall(piece)
                time.sleep(0.02)
            assert link.recv(65_536).startswith(b"HTTP/1.1 200")
            time.sleep(0.4)  # nothing was begun: that is no slow request


# --- floods --------------------------------------------------------------------------------------------------------


def test_what_is_no_http_is_counted_and_a_flood_of_it_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    refusals = Refusals(now_s=lambda: 0.0)

    async def nothing(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with ServerThread(nothing, refusals=refusals) as server:
        for number in range(60):
            with connected(server) as link:
                websocket = ("Connection: Upgrade", "Upgrade: websocket")
                link.sendall(b"\x16\x03\x01\r\n\r\n" if number % 2 else head("GET", "/", *websocket))
                assert link.recv(65_536).startswith(b"HTTP/1.1 400" if number % 2 else b"HTTP/1.1 204")
    assert refusals.counts["bad_request"] == 30
    assert not [
        one for one in caplog.records if one.name.startswith("uvicorn") and one.levelno >= logging.WARNING
    ]


def test_too_many_connections_are_told_and_counted_and_probes_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    before = SERVER.refusals.counts["busy"]
    with serving(world_in("pass")) as (client, _):
        idle: list[Any] = [socket.create_connection(SERVER.address, timeout=REPLY_S) for _ in range(4)]
        try:
            wait_open(5)
            answer = client.get(GATE)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json() == {"error": "too many connections are open"}
            # A restart would help nobody.
            assert client.get("/healthz").status_code == 200
        finally:
            for one in idle:
                one.close()
        assert SERVER.refusals.counts["busy"] == before + 1


def wait_open(connections: int) -> None:
    deadline_s = time.monotonic() + REPLY_S
    while SERVER.open_connections() < connections - 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_made_up_rollouts_push_out_no_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever sends many would keep a rollout without data from ever reaching its deadline."""
    monkeypatch.setattr(endpoints, "ROLLOUTS_KEPT", 5)
    world = world_in("no data", gate_no_data_deadline_ms=60_000)
    hook: dict[str, Any] = {"name": "p", "namespace": "t", "checksum": "1"}
    with serving(world) as (client, api):

        def ask(experiment: str, checksum: str) -> int:
            body = hook | {"checksum": checksum, "metadata": {"experiment": experiment}}
            return client.post("/flagger/rollout", json=body).status_code

        assert ask("checkout", "real") == 200
        for number in range(20):
            ask(f"made-up-{number}", "\U0001f600" * 200)
        world.clock.advance_to(NOW_MS + 60_001)
        world.read()
        assert ask("checkout", "real") == 403
        assert len(api.rollouts) == 6


@pytest.mark.parametrize("broken", [b"", b"zz\r\n"], ids=["gone", "no chunk"])
def test_a_body_that_breaks_off_is_no_fault_of_ours(broken: bytes) -> None:
    """A trace for each would fill a log, and the count of faults is what somebody is woken by."""
    before = SERVER.refusals.counts.total()
    with serving(world_in("pass")) as (_, api):
        for _ in range(3):
            with connected() as link:
                lines = ("Content-Type: application/json", "Transfer-Encoding: chunked")
                link.sendall(head("POST", "/flagger/rollback", *lines) + b"1\r\n{\r\n" + broken)
        deadline_s = time.monotonic() + REPLY_S
        while api.refusals.counts.total() < 3:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert (api.refusals.counts["error"], api.refusals.counts["bad_request"]) == (0, 3)
        assert SERVER.refusals.counts.total() == before
