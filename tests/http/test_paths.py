"""The table of paths finds what Starlette's router finds in the same routes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from kachery_lab.http.paths import PathTable


def route(path: str, *methods: str) -> Route:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(f"{path} {methods} {request.path_params}")

    return Route(path, endpoint, methods=methods or ("GET",))


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close(4000)


ROUTES: list[BaseRoute] = [
    route("/"),
    WebSocketRoute("/", echo),
    route("/a"),
    route("/a", "POST"),
    route("/a/up/{id}", "PUT"),
    route("/a/~{key}/{name}/{rest:path}"),
    route("/a/{name}/{rest:path}"),
    route("/a/{id}"),
    route("/a/{id}", "DELETE"),
    route("/a/{id}/b", "POST"),
    route("/a/{id}/b/{sub}"),
    route("/ab/cd/{id:int}"),
    route("/{id}"),
]
PATHS = [
    "/", "", "//", "/a", "/a/", "/b", "/a/1", "/a/up", "/a/up/1", "/a/up/1/2", "/a/~k/n/r", "/a/~k/n", "/a/n/r/s",
    "/a/1/b", "/a/1/b/2", "/ab/cd/1", "/ab/cd/x", "/ab/cd/", "/ab", "/ab/cd", "/ab/cd/1/", "/c/d", "/" * 50,
    "/a" + "/x" * 50, "/a%2F1", "/a/1\n",
]  # fmt: skip


def ask(app: Starlette, method: str, path: str) -> tuple[Any, ...]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"} if method == "WEBSOCKET" else {"type": "http.request", "body": b""}

    scope: dict[str, Any] = {"type": "websocket" if method == "WEBSOCKET" else "http", "path": path, "headers": []}
    scope |= {"query_string": b"", "root_path": "", "server": ("localhost", 80), "scheme": "http", "method": method}
    asyncio.run(app(scope, receive, send))
    first = sent[0]
    body = b"".join(message.get("body", b"") for message in sent)
    kept = {
        name: set(value.split(b", ")) for name, value in first.get("headers", []) if name in (b"allow", b"location")
    }
    return first["type"], first.get("status"), kept, body


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "WEBSOCKET"])
@pytest.mark.parametrize("path", PATHS)
def test_it_finds_what_the_router_finds(method: str, path: str) -> None:
    assert ask(Starlette(routes=[PathTable(ROUTES)]), method, path) == ask(Starlette(routes=ROUTES), method, path)


def test_exceptions_are_handled_once() -> None:
    async def fails(request: Request) -> Response:
        raise HTTPException(418)

    seen = []

    async def handler(_request: Request, error: Exception) -> Response:
        seen.append(error)
        return PlainTextResponse("short and stout", 418)

    app = Starlette(routes=[PathTable([Route("/tea", fails)])], exception_handlers={HTTPException: handler})
    assert ask(app, "GET", "/tea")[1] == 418
    assert len(seen) == 1


def test_a_mount_has_no_path_of_its_own() -> None:
    with pytest.raises(TypeError):
        PathTable([Mount("/m", routes=[])])
