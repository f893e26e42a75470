"""Errors as the daemon's clients read them: the status of our table and a line of text.

The 2021 client distinguishes 200 from everything else. A missing or wrong code is 403 here, as the older daemon says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kachery_lab.errors import Conflict, FeedPosition, KacheryLabError, Unauthenticated
from kachery_lab.http.errors import problem_headers, status_of

Handler = Callable[[Request], Awaitable[Response]]


def to_text(error: KacheryLabError) -> str:
    """What was wrong, and what to do."""
    return f"{error.message}. {error.hint}" if error.hint else error.message


def to_response(error: KacheryLabError) -> Response:
    """An error as this room answers it."""
    headers = problem_headers(error)
    if isinstance(error, Conflict):
        body: dict[str, object] = {"success": False, "error": to_text(error), "code": error.code}
        if isinstance(error, FeedPosition):
            body |= {"numMessages": error.num_messages, "headSignature": error.head_signature}
        return JSONResponse(body, status_of(error), headers)
    status = 403 if isinstance(error, Unauthenticated) else status_of(error)
    return PlainTextResponse(to_text(error), status, headers)


def answers(handler: Handler) -> Handler:
    """A handler whose errors are answered in this room's shape."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except KacheryLabError as error:
            return to_response(error)

    return endpoint
