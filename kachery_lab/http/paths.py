"""Routes by path: only those that can match are tried, however many there are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Match, NoMatchFound, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send


class PathTable(BaseRoute):
    """Stands for routes without middleware of their own. A path is looked up as it is, then by the longest beginning
    that ends where a parameter of some route begins; of the routes found the first that matches counts."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self.routes = [route for route in routes if isinstance(route, (Route, WebSocketRoute))]
        if len(self.routes) != len(routes):
            raise TypeError("routes with a path of their own only")
        beginnings = {_beginning(route.path) for route in self.routes if route.param_convertors}
        self._whole = {route.path: self._at(route.path) for route in self.routes if not route.param_convertors}
        # Of all beginnings of one path each shorter one begins each longer one: its routes are among theirs.
        self._below = {name: self._below_any(name) for name in beginnings}
        self._longest = max(map(len, beginnings), default=0)
        self._plain = {id(route) for route in self.routes if inspect.iscoroutinefunction(route.endpoint)}

    def _at(self, path: str) -> list[Route | WebSocketRoute]:
        return [route for route in self.routes if route.path == path]

    def _below_any(self, name: str) -> list[Route | WebSocketRoute]:
        return [route for route in self.routes if route.param_convertors and name.startswith(_beginning(route.path))]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path: str = scope["path"]
        match, found = self._first(self._whole.get(path, ()), scope)
        if match is not Match.NONE:
            return match, found
        end = path.rfind("/", 0, self._longest)
        while end >= 0:
            routes = self._below.get(path[: end + 1])
            if routes is not None:
                return self._first(routes, scope)
            end = path.rfind("/", 0, end)
        return Match.NONE, {}

    def _first(self, routes: Sequence[Route | WebSocketRoute], scope: Scope) -> tuple[Match, Scope]:
        partial: Scope | None = None
        for route in routes:
            match, found = route.matches(scope)
            if match is Match.FULL:
                return match, {**found, "route": route}
            if match is Match.PARTIAL and partial is None:
                partial = {**found, "route": route}
        return (Match.NONE, {}) if partial is None else (Match.PARTIAL, partial)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["route"]
        if id(route) in self._plain and scope["type"] == "http" and scope["method"] in route.methods:
            # Starlette would handle exceptions here and again around all routes, with the same handlers.
            response = await route.endpoint(Request(scope, receive, send))
            await response(scope, receive, send)
        else:
            await route.handle(scope, receive, send)

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        raise NoMatchFound(name, path_params)


def _beginning(path: str) -> str:
    """What precedes the first part of a path that holds a parameter."""
    literal = path.partition("{")[0]
    return literal[: literal.rfind("/") + 1]
