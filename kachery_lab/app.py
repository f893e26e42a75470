"""The application: routes, middleware, lifespan. No logic."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from kachery_lab.http import admin, blobs, buckets, health, openapi, v1
from kachery_lab.http.application import Application
from kachery_lab.http.context import SOCKET_STATE
from kachery_lab.http.middleware import Cors, Errors, HostCheck, RequestLog
from kachery_lab.http.paths import PathTable
from kachery_lab.http.protocols import ably2021, daemon2021, figurl_local, gateway2022, hub2021, kachery2024
from kachery_lab.node import Node


def create_app(node: Node) -> Application:
    """The application of an open node; starting and closing the node is its lifespan."""

    @asynccontextmanager
    async def lifespan(app: Application) -> AsyncIterator[None]:
        await node.start()
        try:
            yield
        finally:
            await node.close()
            app.budget.close()

    settings = node.settings
    own_names = _own_names(settings.public_url, settings.allowed_hosts)
    return Application(
        node,
        routes=[
            PathTable(
                [
                    *daemon2021.routes(),
                    *hub2021.routes(),
                    *gateway2022.routes(),
                    *kachery2024.routes(),
                    *ably2021.routes(),
                    *buckets.routes(),
                    *blobs.routes(),
                    *v1.routes(),
                    *admin.routes(),
                    *health.routes(node.problems),
                    *openapi.routes(),
                ]
            )
        ],
        middleware=_middleware(own_names, origins=settings.cors_origins),
        lifespan=lifespan,
    )


def create_figurl_app(node: Node) -> Application:
    """What figurl finds on a person's own machine, for the listener of its own; the node is started by the other."""
    return Application(
        node,
        routes=[PathTable(figurl_local.routes())],
        middleware=_middleware([], origins=node.settings.figurl_origins, open_to_pages=()),
    )


def _middleware(own_names: list[str], **cors: Any) -> list[Middleware]:
    return [
        Middleware(RequestLog),
        Middleware(Cors, **cors),
        Middleware(HostCheck, allowed=own_names),
        Middleware(Errors),
    ]


def _own_names(public_url: str | None, configured: tuple[str, ...]) -> list[str]:
    """Names under which this machine may be addressed. In a container its host's names have to be configured."""
    names = [socket.gethostname(), socket.getfqdn(), *configured]
    if public_url and (name := urlsplit(public_url).hostname):
        names.append(name)
    return names


class AdminSocket:
    """The same application for the socket that only the server's own user can open: its callers are the operator."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope.setdefault("state", {})[SOCKET_STATE] = True
        await self._app(scope, receive, send)
