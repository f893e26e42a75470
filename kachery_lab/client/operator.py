"""The admin socket of a running server, as the CLI uses it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from kachery_lab.client.problems import error_from_problem


class OperatorClient:
    """Requests over a Unix socket that only the server's own user can open. An async context manager."""

    def __init__(self, path: Path) -> None:
        transport = httpx2.AsyncHTTPTransport(uds=str(path))
        # Operations run to their end before they answer, a reindex for hours.
        self._http = httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=None)

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

    async def get(self, path: str) -> dict[str, Any]:
        """Raises the error that the server answered."""
        return _answer(await self._http.get(path))

    async def post(self, path: str, body: object) -> dict[str, Any]:
        """Raises the error that the server answered."""
        return _answer(await self._http.post(path, json=body))

    async def delete(self, path: str) -> dict[str, Any]:
        """Raises the error that the server answered."""
        return _answer(await self._http.delete(path))


def _answer(response: httpx2.Response) -> dict[str, Any]:
    if response.status_code >= 400:
        raise error_from_problem(response.status_code, _json(response))
    return _json(response)


def _json(response: httpx2.Response) -> dict[str, Any]:
    try:
        found = response.json() if response.content else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
