"""What is refused at the edge of the API, that it is counted, and that nothing of it breaks a gate."""

from __future__ import annotations

import json
import logging
import socket
from typing import TYPE_CHECKING, Any

import pytest
from api_process import BEARER, SERVER, TOKEN, serving
from gate_world import World, record, spec, world_in

from stream_xp.domain.operator import OperatorAction
from stream_xp.errors import ConfigError
from stream_xp.services.api import guard
from stream_xp.services.api.guard import MAX_BODY_BYTES, REASONS, Refusals, Refused, Tokens, check_names
from stream_xp.services.api.server import listen
from stream_xp.settings import Secret, Settings

if TYPE_CHECKING:
    import httpx

XSS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)//",
    "'-alert(1)-'",
    "</title><svg/onload=alert(1)>",
    "{{constructor.constructor('alert(1)')()}}",
    "%3Cscript%3E",
    "\u202eevil\u0000\u001b[2J",
    "a\r\nSet-Cookie: x=1",
)
GATES = ("/gate", "/analysis")


def refused(client: httpx.Client) -> dict[str, int]:
    counts = client.get("/api/v1/service").json()["refused"]
    assert set(counts) == set(REASONS)
    return {reason: count for reason, count in counts.items() if count}


def raw(request: bytes) -> bytes:
    """The answer to bytes as they are."""
    host, port = SERVER.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    return answer


@pytest.mark.parametrize("name", XSS)
def test_hostile_names_come_back_as_data_or_not_at_all(name: str) -> None:
    with serving(world_in("pass")) as (client, _):
        answers = [client.get("/api/v1/experiments/checkout/gate", params={"arm": name})]
        answers += [client.post("/flagger/rollback", json={"metadata": {"experiment": name, "arm": name}})]
        answers += [client.get("/canaryConfig", params={"application": name})]
        answers += [client.get("/api/v1/experiments", params={"after": name})]
        for answer in answers:
            assert answer.status_code in (200, 403)
            assert answer.headers["content-type"].partition(";")[0] in ("application/json", "text/plain")
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "set-cookie" not in answer.headers
        # A line for a terminal and a log has no letter that steers one.
        assert answers[1].text.rstrip("\n").isprintable()


def test_hostile_prose_of_a_spec_is_shown_as_json() -> None:
    world = World()
    world.put("experiments", record(spec(owner=XSS[0], hypothesis=XSS[1])))
    world.read()
    with serving(world) as (client, _):
        answer = client.get("/api/v1/experiments/checkout")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["record"]["spec"]["owner"] == XSS[0]


def test_another_host_is_refused_and_probes_are_not() -> None:
    with serving(world_in("pass", api_allowed_hosts=("gates.internal",))) as (client, _):
        for host in (
            "evil.example",
            "127.0.0.1.evil.example",
            "",
            "localhost@evil.example",
            "[::1",
            "[::2]:80",
        ):
            answer = client.get("/api/v1/experiments", headers={"host": host})
            assert answer.status_code == 421, host
            assert "evil" not in answer.text
            assert client.get("/healthz", headers={"host": host}).status_code == 200
        for host in (
            "localhost",
            "localhost:8080",
            "127.0.0.1:1",
            "[::1]:8080",
            "gates.internal",
            "GATES.internal:80",
        ):
            assert client.get("/api/v1/experiments", headers={"host": host}).status_code == 200, host
        assert refused(client) == {"host": 6}
    two = raw(b"GET /api/v1/service HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n")
    assert two.startswith((b"HTTP/1.1 400", b"HTTP/1.1 421"))


def test_any_host_may_be_allowed() -> None:
    with serving(world_in("pass", api_allowed_hosts=("*",))) as (client, _):
        assert client.get("/readyz", headers={"host": "10.0.0.7:8080"}).status_code == 200
        assert client.get("/api/v1/experiments", headers={"host": "10.0.0.7"}).status_code == 200


def test_pages_of_another_origin_are_refused() -> None:
    allowed = "https://board.example"
    with serving(world_in("pass", api_allowed_origins=(allowed,))) as (client, _):
        own = str(client.base_url).rstrip("/")
        for origin, status in (("https://evil.example", 403), ("null", 403), (allowed, 200), (own, 200)):
            answer = client.get("/api/v1/experiments/checkout/gate", headers={"origin": origin})
            assert answer.status_code == status, origin
            assert "access-control-allow-origin" not in answer.headers
        assert refused(client) == {"origin": 2}


def test_bodies_are_bounded_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"content-type": "application/json"}
    with serving(world_in("pass")) as (client, _):
        url, body = (
            "/flagger/rollback",
            json.dumps({"metadata": {"experiment": "x" * MAX_BODY_BYTES}}).encode(),
        )
        assert client.post(url, content=body, headers=headers).status_code == 413
        # Without a length announced it is what comes that counts.
        assert (
            client.post(url, content=iter([body[:30_000], body[30_000:]]), headers=headers).status_code == 413
        )
        deep = b'{"metadata":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
        for bad in (
            deep,
            b"",
            b"{",
            b"null",
            b'"a"',
            b'{"metadata": 1}',
            b"\xff\xfe",
            b'{"metadata":{"experiment":"\xff"}}',
        ):
            assert client.post(url, content=bad, headers=headers).status_code == 400, bad[:40]
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            answer = client.post(url, content=b"{}", headers={"content-type": kind})
            assert answer.status_code == 415, kind
        assert refused(client) == {"body_size": 2, "bad_request": 8, "content_type": 4}
        monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.05)
        slow = b"POST /flagger/rollback HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow += b"Content-Length: 9\r\n\r\n{"
        host, port = SERVER.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(slow)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 408")
        assert refused(client)["timeout"] == 1


def test_headers_are_bounded() -> None:
    with serving(world_in("pass")) as (client, _):
        answer = raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        assert client.get("/healthz", params={"a": "x" * 17_000}).status_code == 431
        assert client.get("/healthz").status_code == 200


def test_random_ids_leave_nothing_behind() -> None:
    with serving(world_in("pass")) as (client, api):
        before = client.get("/api/v1/service").json()
        for number in range(300):
            assert client.get(f"/api/v1/experiments/e{number}").status_code == 404
            assert client.get(f"/api/v1/experiments/e{number}/gate").json()["cause"] == "unknown_experiment"
            assert client.get(f"/nothing/{number}").status_code == 404
        after = client.get("/api/v1/service").json()
        assert set(after["refused"]) == set(before["refused"])
        assert set(after["gates"]) == set(before["gates"])
        assert set(after["answered"]) - set(before["answered"]) == {"gate", "service"}
        assert after["refused"]["not_found"] == 600
        assert api.view.names() == ["checkout"]


def test_rollouts_are_forgotten_before_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from stream_xp.services.api import endpoints  # noqa: PLC0415

    monkeypatch.setattr(endpoints, "ROLLOUTS_KEPT", 10)
    rollouts = endpoints.Rollouts()
    for number in range(100):
        assert rollouts.waiting_ms((str(number),), number) == 0
    assert len(rollouts) == 10
    assert rollouts.waiting_ms(("99",), 150) == 51


def test_refusals_are_logged_and_a_flood_of_them_is_only_counted(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    refusals = Refusals(now_s=lambda: now[0])
    scope: dict[str, Any] = {"method": "GET", "path": "/\x1b[2Jx", "client": ("10.0.0.1", 1)}
    for _ in range(100):
        refusals.note(Refused(404, "not_found", "there is no such route"), scope)
    first = capsys.readouterr().out.count("request refused")
    now[0] = 1.0
    refusals.note(Refused(404, "not_found", "there is no such route"), scope)
    assert (first, capsys.readouterr().out.count("request refused")) == (10, 1)
    assert refusals.counts["not_found"] == 101


def test_a_fault_of_ours_says_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(world_in("pass")) as (client, api):
        monkeypatch.setattr(api.view, "names", lambda: 1 / 0)
        answer = client.get("/api/v1/experiments")
        assert (answer.status_code, answer.json()) == (500, {"error": "a fault of this service"})
        assert api.refusals.counts["error"] == 1


def test_other_methods_are_refused() -> None:
    with serving(world_in("pass")) as (client, _):
        for method in ("DELETE", "PATCH", "OPTIONS", "TRACE"):
            answer = client.request(method, "/api/v1/experiments/checkout/gate")
            assert answer.status_code == 405
            assert answer.headers["allow"]


# --- tokens ------------------------------------------------------------------------------------------------------

ORDERS = [
    f"/api/v1/experiments/checkout/orders/{action.value.replace('_', '-')}" for action in OperatorAction
]


def test_without_a_token_there_are_no_write_routes() -> None:
    with serving(world_in("pass")) as (client, _):
        for path in (*ORDERS, "/api/v1/alertmanager"):
            answer = client.post(path, json={"reason": "r"}, headers=BEARER)
            assert answer.status_code == 404
        assert not any("orders" in path for path in client.get("/openapi.json").json()["paths"])
        assert client.get("/api/v1/service").json()["writes"] is False


def test_a_bad_token_is_refused_before_the_body_is_read() -> None:
    world = world_in("pass", api_token=Secret(TOKEN))
    bad = (
        "",
        "Bearer",
        "Bearer x",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer \xff",
    )
    with serving(world) as (client, _):
        for path in (*ORDERS, "/api/v1/alertmanager"):
            for shown in bad if path == ORDERS[0] else bad[:2]:
                headers = {"authorization": shown.encode("latin-1"), "content-type": "application/json"}
                answer = client.post(path, content=b"no json", headers=headers)  # type: ignore[arg-type]
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), shown
                assert TOKEN[:8] not in answer.text
        assert client.get("/api/v1/service").json()["refused"]["token"] == len(bad) + 2 * len(ORDERS)
        # A token in the address would stand in the log of every proxy.
        assert client.post(f"{ORDERS[0]}?token={TOKEN}", json={"reason": "r"}).status_code == 401


def test_tokens_have_names_and_rotate() -> None:
    old, new = "o" * 32, "n" * 32
    tokens = Tokens(Secret(f"\n{old}\n  ci:{new}  \n"))
    assert [tokens.name_of(f"Bearer {token}") for token in (old, new, "p" * 32)] == ["api", "ci", None]
    assert tokens.name_of(f"bearer {new}") == "ci"


@pytest.mark.parametrize("text", ["short", "", "\n", "a b" * 20, "na me:" + "x" * 32, "x" * 600])
def test_what_is_no_token_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="STREAM_XP_API_TOKEN") as caught:
        Tokens(Secret(text))
    assert text.strip() == "" or text not in str(caught.value)


def test_a_token_is_in_no_log_and_no_repr(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    world = world_in("pass", api_token=Secret(TOKEN))
    with serving(world) as (client, api):
        client.post(ORDERS[0], json={"no": "reason"}, headers=BEARER)
        client.post(ORDERS[0], json={"reason": "r"}, headers={"authorization": f"Bearer {TOKEN}x"})
        shown = [repr(api.tokens), repr(api), repr(world.settings), client.get("/api/v1/service").text]
    captured = capsys.readouterr()
    # What the test's own client logs is not the service's.
    ours = [entry.getMessage() for entry in caplog.records if entry.name.startswith("stream_xp")]
    assert not any(TOKEN in text for text in (*shown, captured.out, captured.err, *ours))


# --- the address -------------------------------------------------------------------------------------------------


def test_it_listens_on_loopback_unless_told_and_then_needs_names() -> None:
    assert Settings().api_host == "127.0.0.1"
    check_names(Settings())
    check_names(Settings(api_host="::1"))
    check_names(Settings(api_host="0.0.0.0", api_allowed_hosts=("gates",)))
    for host in ("0.0.0.0", "::", "10.0.0.1", "gates.internal"):
        with pytest.raises(ConfigError, match="STREAM_XP_API_ALLOWED_HOSTS"):
            check_names(Settings(api_host=host))


def test_a_port_that_is_taken_is_said() -> None:
    with listen(Settings(api_port=0)) as taken:
        # Without it asyncio leaves Nagle's algorithm on, and answers wait for acknowledgements.
        assert taken.proto == socket.IPPROTO_TCP
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            listen(Settings(api_port=port))


def test_settings_of_the_api_come_from_the_environment(tmp_path: Any) -> None:
    secret = tmp_path / "token"
    secret.write_text(f"ci:{TOKEN}\nold:{'o' * 32}\n")
    found = Settings.load(
        {
            "STREAM_XP_API_TOKEN_FILE": str(secret),
            "STREAM_XP_API_ALLOWED_HOSTS": "gates, [::1]",
            "STREAM_XP_API_ALLOWED_ORIGINS": "https://board.example",
            "STREAM_XP_GATE_MAXIMUM_AGE_MS": "30000",
        }
    )
    assert Tokens(found.api_token).name_of(f"Bearer {TOKEN}") == "ci"
    assert (found.api_allowed_hosts, found.gate_maximum_age_ms) == (("gates", "[::1]"), 30_000)
    assert TOKEN not in repr(found)
    for variable, text in (
        ("API_ALLOWED_HOSTS", "a b"),
        ("API_ALLOWED_ORIGINS", "board"),
        ("API_PORT", "70000"),
    ):
        with pytest.raises(ConfigError, match=variable):
            Settings.load({f"STREAM_XP_{variable}": text})
