"""Errors as the daemon's clients read them: the status of our table and a line of text.

The 2021 client distinguishes 200 from everything else. A missing or wrong code is 403 here, as the older daemon says.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.errors import Conflict, FeedPosition, KacheryLabError, Unauthenticated
from kachery_lab.http.describe import Handler
from kachery_lab.http.errors import answering, line_of_text, problem_headers, status_of


def to_response(_request: Request, error: KacheryLabError) -> Response:
    """An error as this room answers it."""
    if isinstance(error, Conflict):
        body: dict[str, object] = {"success": False, "error": error.text, "code": error.code}
        if isinstance(error, FeedPosition):
            body |= {"numMessages": error.num_messages, "headSignature": error.head_signature}
        return JSONResponse(body, status_of(error), problem_headers(error))
    return line_of_text(error, status=403 if isinstance(error, Unauthenticated) else None)


def answers(handler: Handler) -> Handler:
    """A handler whose errors are answered in this room's shape."""
    return answering(handler, to_response)
