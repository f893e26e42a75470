"""Errors as text: figurl looks for 200 only; the text is for the browser's console."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.errors import KacheryLabError
from kachery_lab.http.describe import Handler
from kachery_lab.http.errors import answering, line_of_text


def to_response(_request: Request, error: KacheryLabError) -> Response:
    """An error as this room answers it."""
    return line_of_text(error)


def answers(handler: Handler) -> Handler:
    """A handler whose errors are answered in this room's shape."""
    return answering(handler, to_response)
