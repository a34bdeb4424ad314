"""The ASGI application: the table of routes behind the guard."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router

from stream_xp.services.api import routes
from stream_xp.services.api.endpoints import Api, reply
from stream_xp.services.api.guard import Guard, Refused, answer, read_body, require_json
from stream_xp.services.api.openapi import document

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

log = structlog.get_logger(__name__)


def create_app(api: Api) -> ASGIApp:
    """The application; routes that write are there only where a token is configured."""
    table = _table(writes=bool(api.tokens))
    described = _described(writes=bool(api.tokens))

    async def openapi(_: Request) -> Response:
        return Response(described, media_type="application/json")

    router = Router(
        [
            StarletteRoute("/openapi.json", openapi, methods=["GET"], name="openapi"),
            *(
                StarletteRoute(one.path, _endpoint(api, one), methods=[one.method], name=one.name)
                for one in table
            ),
        ],
        # A redirect would bring a client without a config id to another route.
        redirect_slashes=False,
    )
    return Guard(_Refusing(router, api), settings=api.settings, refusals=api.refusals)


def _table(*, writes: bool) -> tuple[routes.Route, ...]:
    return (*routes.READS, *(routes.WRITES if writes else ()))


@lru_cache(maxsize=2)
def _described(*, writes: bool) -> bytes:
    """The OpenAPI document; most of a second to make."""
    return msgspec.json.encode(document(_table(writes=writes)))


def _endpoint(api: Api, route: routes.Route) -> Any:
    decoder: Any = None if route.body is None else msgspec.json.Decoder(route.body)

    async def endpoint(request: Request) -> Response:
        if route.writes:
            # Before anything of the body is looked at.
            api.tokens.bearer(request)
        body = None if decoder is None else await _decoded(request, decoder, most_bytes=route.body_bytes)
        response = await route.handler(api, request, body)
        api.answered[route.name] += 1
        return response

    return endpoint


async def _decoded(request: Request, decoder: Any, *, most_bytes: int) -> Any:
    require_json(request)
    body = await read_body(request, most_bytes=most_bytes)
    try:
        return decoder.decode(body)
    except RecursionError:
        raise Refused(400, "bad_request", "the body is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused(400, "bad_request", f"the body is refused: {_rule(error)}") from None


def _rule(error: Exception) -> str:
    return str(error)[:300] if isinstance(error, msgspec.MsgspecError) else "it is not UTF-8"


class _Refusing:
    """Turns what the routes raise into answers; nothing of a fault of ours reaches a client."""

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self._app = app
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        try:
            # Without it the router would answer by itself what it does not know.
            await self._app({**scope, "app": self} if scope["type"] == "http" else scope, receive, send)
        except Refused as refused:
            await self._answer(refused, scope, send)
        except HTTPException as error:
            await self._answer(_of_router(error), scope, send)
        except Exception:
            # Whatever it is, one request fails and is logged; the gates of all others go on.
            log.exception("request failed", path=scope["path"][:200])
            await self._answer(Refused(500, "error", "a fault of this service"), scope, send)

    async def _answer(self, refused: Refused, scope: Scope, send: Send) -> None:
        self._api.refusals.note(refused, scope)
        await answer(refused, send)


def _of_router(error: HTTPException) -> Refused:
    if error.status_code == 405:
        return Refused(405, "method", "that method is not answered here", **dict(error.headers or {}))
    return Refused(404, "not_found", "there is no such route")


__all__ = ["create_app", "reply"]
