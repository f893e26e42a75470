"""Routes by exact path: one look-up, however many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.routing import BaseRoute, Match, NoMatchFound, Route
from starlette.types import Receive, Scope, Send


class ExactPaths(BaseRoute):
    """Stands for routes without parameters, at most one for each path; of all others it says that they do not match."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = {route.path: route for route in routes}
        if len(self._routes) != len(routes) or any(route.param_convertors for route in routes):
            raise ValueError("one route for each path, without parameters")

    @property
    def routes(self) -> list[Route]:
        """What it stands for."""
        return list(self._routes.values())

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        return (Match.NONE, {}) if route is None else route.matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._routes[scope["path"]].handle(scope, receive, send)

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        raise NoMatchFound(name, path_params)


def flat(routes: Sequence[BaseRoute]) -> list[BaseRoute]:
    """The single routes again, as they were before `by_exact_path`."""
    return [one for route in routes for one in (route.routes if isinstance(route, ExactPaths) else [route])]


def by_exact_path(routes: Sequence[BaseRoute]) -> list[BaseRoute]:
    """The same routes; those without parameters, with a path of their own, are found by one look-up."""
    exact: dict[str, Route] = {}
    rest: list[BaseRoute] = []
    for route in routes:
        if isinstance(route, Route) and not route.param_convertors and route.path not in exact:
            exact[route.path] = route
        else:
            rest.append(route)
    return [ExactPaths(list(exact.values())), *rest]
