"""`/livez`: the event loop turns. `/readyz`: the node can do its work, or says why not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

NO_STORE = {"Cache-Control": "no-store"}


async def livez(_request: Request) -> Response:
    """200 whenever this process can answer at all; touches neither the volume nor the database."""
    return PlainTextResponse("ok", headers=NO_STORE)


def readyz(problems: Callable[[], Awaitable[Sequence[str]]]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint: 200 when `problems()` finds none, else 503 that lists them."""

    async def endpoint(_request: Request) -> Response:
        found = list(await problems())
        if found:
            return JSONResponse({"ready": False, "problems": found}, 503, {**NO_STORE, "Retry-After": "5"})
        return JSONResponse({"ready": True, "problems": []}, headers=NO_STORE)

    return endpoint


def routes(problems: Callable[[], Awaitable[Sequence[str]]]) -> list[Route]:
    """Both addresses."""
    return [Route("/livez", livez), Route("/readyz", readyz(problems))]
