"""Errors as text: figurl looks for 200 only; the text is for the browser's console."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from kachery_lab.errors import KacheryLabError
from kachery_lab.http.errors import problem_headers, status_of

Handler = Callable[[Request], Awaitable[Response]]


def answers(handler: Handler) -> Handler:
    """A handler whose errors are answered in this room's shape."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except KacheryLabError as error:
            text = f"{error.message}. {error.hint}" if error.hint else error.message
            return PlainTextResponse(text, status_of(error), problem_headers(error))

    return endpoint
