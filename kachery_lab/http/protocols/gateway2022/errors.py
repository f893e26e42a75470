"""Errors as kachery-cloud shows them: the gateway's as text, those of a resource as JSON."""

from __future__ import annotations

import time

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kachery_lab.errors import Forbidden, KacheryLabError, NotFound, TooManyRequests, Unauthenticated
from kachery_lab.http.errors import problem_headers, status_of
from kachery_lab.services.client_requests import moment


def status(error: KacheryLabError) -> int:
    """Ours, but never 404, which clients take for a missing file or a wrong address."""
    return 403 if isinstance(error, NotFound) else status_of(error)


def note(request: Request, **context: str | None) -> None:
    """Remember who asks for what, for the text of a refusal."""
    request.state.context = getattr(request.state, "context", {}) | context


def gateway_error(request: Request, error: KacheryLabError) -> Response:
    """A refusal also names the client, the zone and the server's time: one of them is what has to be mended."""
    text = f"Error: {error.text}"
    if isinstance(error, Unauthenticated | Forbidden | NotFound | TooManyRequests):
        known = getattr(request.state, "context", {})
        client, zone = known.get("client") or "none", known.get("zone") or "none"
        text += f" (client {client}, zone {zone}, server's time {moment(time.time() * 1000)})"
    return PlainTextResponse(text, status(error), problem_headers(error))


def resource_error(_request: HTTPConnection, error: KacheryLabError) -> Response:
    """As the resource proxy says it."""
    return JSONResponse({"message": error.text}, status(error), problem_headers(error))
