"""Errors as nodes of 2021 read them: a line of text; 400 malformed, 404 unknown or forbidden."""

from __future__ import annotations

from functools import wraps

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.errors import Forbidden, KacheryLabError, NotFound
from kachery_lab.http.context import node_of
from kachery_lab.http.describe import Handler
from kachery_lab.http.errors import answering, line_of_text


def to_response(_request: Request, error: KacheryLabError) -> Response:
    """An error as this room answers it."""
    return line_of_text(error, status=404 if isinstance(error, Forbidden | NotFound) else None)


def answers(handler: Handler) -> Handler:
    """A handler whose errors are answered in this room's shape, where nodes of 2021 are welcome at all."""

    @wraps(handler)
    async def where_welcome(request: Request) -> Response:
        if not node_of(request).settings.legacy_nodes:
            raise Forbidden(
                "nodes of 2021 may not use this hub",
                hint="KACHERY_LAB_LEGACY_NODES=true allows it; kachery-lab nodes use /api/v1",
            )
        return await handler(request)

    return answering(where_welcome, to_response)
