"""Errors as kachery 2 reads them: the status of our table and `{"error": text}`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.errors import KacheryLabError
from kachery_lab.http.describe import Handler
from kachery_lab.http.errors import answering, problem_headers, status_of


def to_response(_request: Request, error: KacheryLabError) -> Response:
    """An error as this room answers it."""
    # Escaped: an identifier with half a character in it must not fail to encode here.
    body = {"error": error.text.encode("utf-8", "replace").decode()}
    return JSONResponse(body, status_of(error), problem_headers(error))


def answers(handler: Handler) -> Handler:
    """A handler whose errors are answered in this room's shape."""
    return answering(handler, to_response)
