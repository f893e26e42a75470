"""A server's admin endpoints, as the CLI uses them: over its admin socket, over the network, or inside this process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from kachery_lab.client.problems import error_from_problem
from kachery_lab.errors import Unavailable

App = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]
"""An ASGI application."""


class OperatorClient:
    """Requests to one server. An async context manager; made by `over_socket`, `to_server` or `in_process`."""

    def __init__(self, transport: httpx2.AsyncBaseTransport, url: str, token: str | None = None) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._url = url
        # Operations run to their end before they answer, a reindex for hours.
        timeout = httpx2.Timeout(None, connect=10.0)
        self._http = httpx2.AsyncClient(transport=transport, base_url=url, timeout=timeout, headers=headers)

    @classmethod
    def over_socket(cls, path: Path) -> Self:
        """The Unix socket that only the server's own user can open."""
        return cls(httpx2.AsyncHTTPTransport(uds=str(path)), "http://localhost")

    @classmethod
    def to_server(cls, url: str, token: str | None) -> Self:
        """A server by its URL, with a token."""
        return cls(httpx2.AsyncHTTPTransport(), url.rstrip("/"), token)

    @classmethod
    def in_process(cls, app: App) -> Self:
        """An application in this process."""
        return cls(httpx2.ASGITransport(app), "http://localhost")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def answers(self) -> bool:
        """Whether a server listens; a socket file outlives a killed one."""
        try:
            return (await self._http.get("/livez", timeout=5.0)).status_code == 200
        except httpx2.TransportError:
            return False

    async def request(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """The JSON object that is answered, {} without one. Raises the error that the server answered, Unavailable when
        it does not answer."""
        try:
            response = await self._http.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise Unavailable(f"{self._url} does not answer: {error}", hint="Is the URL right?") from error
        found = _json(response)
        if response.status_code >= 400:
            raise error_from_problem(response.status_code, found)
        return found


def _json(response: httpx2.Response) -> dict[str, Any]:
    try:
        found = response.json() if response.content else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
