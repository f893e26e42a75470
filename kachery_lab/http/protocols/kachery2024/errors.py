"""Errors as kachery 2 reads them: the status of our table and `{"error": text}`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.errors import KacheryLabError
from kachery_lab.http.errors import problem_headers, status_of

Handler = Callable[[Request], Awaitable[Response]]


def to_response(error: KacheryLabError) -> Response:
    """An error as this room answers it."""
    text = f"{error.message}. {error.hint}" if error.hint else error.message
    # Escaped: an identifier with half a character in it must not fail to encode here.
    body = {"error": text.encode("utf-8", "replace").decode()}
    return JSONResponse(body, status_of(error), problem_headers(error))


def answers(handler: Handler) -> Handler:
    """A handler whose errors are answered in this room's shape."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except KacheryLabError as error:
            return to_response(error)

    return endpoint
