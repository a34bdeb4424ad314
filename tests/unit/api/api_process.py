"""The real application over a real socket, on a view that was fed by hand."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import httpx

from stream_xp.services.api.app import create_app
from stream_xp.services.api.endpoints import Api, Progress
from stream_xp.services.api.guard import Tokens
from stream_xp.services.api.orders import Orders
from stream_xp.services.api.server import ServerThread
from stream_xp.services.operate import place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gate_world import World
    from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN = "t0ken-" + "x" * 40
BEARER = {"authorization": f"Bearer {TOKEN}"}


def api_of(world: World, **given: Any) -> Api:
    return Api(
        settings=world.settings,
        view=world.view,
        tokens=Tokens(world.settings.api_token),
        orders=Orders(world.settings, world.view, clock=world.clock, place=given.pop("place", place)),
        progress=lambda: Progress(world.read_ms, world.clock.now_ms(), 0, failed=False),
        **given,
    )


class Switch:
    """An application that hands on to the one that is chosen."""

    chosen: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.chosen(scope, receive, send)


SWITCH = Switch()
SERVER = ServerThread(SWITCH)
"""Entered by the fixture of `conftest.py`."""


@contextlib.contextmanager
def serving(world: World, **given: Any) -> Iterator[tuple[httpx.Client, Api]]:
    """A client of the server in a thread, and what the server answers from."""
    api = api_of(world, **given)
    SWITCH.chosen = create_app(api)
    with httpx.Client(base_url=SERVER.url, timeout=60, trust_env=False, verify=False) as client:
        yield client, api
