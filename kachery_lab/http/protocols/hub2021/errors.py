"""Errors as nodes of 2021 read them: a line of text; 400 malformed, 404 unknown or forbidden."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from kachery_lab.errors import Forbidden, KacheryLabError, NotFound
from kachery_lab.http.context import node_of
from kachery_lab.http.errors import problem_headers, status_of

Handler = Callable[[Request], Awaitable[Response]]


def to_response(error: KacheryLabError) -> Response:
    """An error as this room answers it."""
    text = f"{error.message}. {error.hint}" if error.hint else error.message
    status = 404 if isinstance(error, Forbidden | NotFound) else status_of(error)
    return PlainTextResponse(text, status, problem_headers(error))


def answers(handler: Handler) -> Handler:
    """A handler whose errors are answered in this room's shape, where nodes of 2021 are welcome at all."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            if not node_of(request).settings.legacy_nodes:
                raise Forbidden(
                    "nodes of 2021 may not use this hub",
                    hint="KACHERY_LAB_LEGACY_NODES=true allows it; kachery-lab nodes use /api/v1",
                )
            return await handler(request)
        except KacheryLabError as error:
            return to_response(error)

    return endpoint
