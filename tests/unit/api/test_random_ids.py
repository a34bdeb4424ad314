"""A hundred thousand names that nobody knows, through every route that takes one: refused, counted, and forgotten."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import msgspec
import pytest
from api_process import api_of, serving
from gate_world import NOW_MS, world_in

from stream_xp.services.api.app import create_app
from stream_xp.services.api.gates import FLAGGER, Execution, Thresholds
from stream_xp.services.api.guard import LOGGED_PER_SECOND, Refusals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Message

IDS = 100_000
SETTLED = 40_000
"""By then every bounded memory is full."""
OVER_SOCKET = 500
BLOCKS = 2_000
"""Blocks of memory that so many ids may leave; one block each would be sixty thousand."""
LETTERS = "abcXYZ0189._-<>\"'&%é漢😀 \u202e\x00\r\n"


class Ask(NamedTuple):
    """A request, and the statuses that refuse it or answer it for nobody."""

    method: str
    path: str
    body: bytes = b""
    statuses: tuple[int, ...] = (200,)


def name_of(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return f"{draw.getrandbits(64):x}"
    return (
        "".join(draw.choices(LETTERS, k=draw.randint(1, 40))).replace("/", "") + f"{draw.getrandbits(64):x}"
    )


def asks(seed: int) -> Iterator[Ask]:
    """Gate routes by turns, each with a name of its own."""
    draw, hooks = random.Random(seed), tuple(FLAGGER)
    while True:
        name = name_of(draw)
        kind, arm = draw.randrange(10), f"?arm={draw.getrandbits(40):x}"
        if kind < 3:
            metadata = {"experiment": name, "arm": name}
            body = msgspec.json.encode({"name": name, "checksum": name, "metadata": metadata})
            yield Ask("POST", f"/flagger/{draw.choice(hooks)}", body, (200, 403))
        elif kind < 5:
            yield Ask("GET", f"/api/v1/experiments/{encoded(name)}/gate{arm}")
        elif kind < 7:
            yield Ask("GET", f"/api/v1/experiments/{encoded(name)}/analysis{arm}")
        elif kind == 7:
            yield Ask(draw.choice(("GET", "POST")), f"/spinnaker/{encoded(name)}{arm}")
        elif kind == 8:
            yield Ask("POST", f"/canary/{encoded(name)}", b"{}", (404,))
        else:
            yield Ask("GET", f"/canary/{execution(f'{draw.getrandbits(64):x}')}", statuses=(200,))


def encoded(name: str) -> str:
    return "".join(f"%{byte:02X}" for byte in name.encode())


def execution(name: str) -> str:
    found = Execution(
        experiment=name, arm=None, application="a", thresholds=Thresholds(), start_ms=0, end_ms=NOW_MS * 2
    )
    return found.to_id()


async def status_of(app: ASGIApp, ask: Ask) -> int:
    """Ask the application itself."""
    path, _, query = ask.path.partition("?")
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope: dict[str, Any] = {
        "type": "http",
        "method": ask.method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": headers,
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
        "root_path": "",
    }
    found: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": ask.body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    await app(scope, receive, send)
    (status,) = found
    return status


def test_a_hundred_thousand_random_ids_leave_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    world = world_in("pass")
    api = api_of(world, refusals=Refusals(now_s=lambda: 0.0))
    app = create_app(api)
    source = asks(seed=7)

    async def ask(count: int) -> None:
        for one in (next(source) for _ in range(count)):
            status = await status_of(app, one)
            assert status in one.statuses, (status, one)

    def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    with asyncio.Runner() as runner:
        runner.run(ask(SETTLED))
        series, before = (set(api.refusals.counts), set(api.answered), set(api.gated)), blocks()
        runner.run(ask(IDS - SETTLED))
        grown = blocks() - before
    # None of them has become a series, a memory or a line.
    assert (set(api.refusals.counts), set(api.answered), set(api.gated)) == series
    assert grown < BLOCKS
    assert capsys.readouterr().out.count("\n") == LOGGED_PER_SECOND
    # Each was answered or refused, and counted as one.
    assert api.answered.total() + api.refusals.counts.total() == IDS
    assert api.refusals.counts["not_found"] > IDS // 20
    assert {word for word, count in api.gated.items() if count} == {"invalid"}
    assert api.view.names() == ["checkout"]
    assert api.view.verdict("checkout").verdict == "pass"


def test_some_of_them_over_a_socket() -> None:
    source = asks(seed=8)
    with serving(world_in("pass")) as (client, api):
        for ask in (next(source) for _ in range(OVER_SOCKET)):
            headers = {"content-type": "application/json"}
            answer = client.request(ask.method, ask.path, content=ask.body, headers=headers)
            assert answer.status_code in ask.statuses, ask
        assert api.answered.total() + api.refusals.counts.total() == OVER_SOCKET
        assert api.view.names() == ["checkout"]
