"""Error class -> status, in one table, and the forms in which an error reaches a client: our own problem document, a
line of text, or what a protocol room makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import wraps

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kachery_lab import errors
from kachery_lab.client.problems import extra_fields
from kachery_lab.errors import KacheryLabError
from kachery_lab.http.describe import Handler

PROBLEM_TYPE = "application/problem+json"
Form = Callable[[Request, KacheryLabError], Response]
"""How a room tells an error."""

STATUS: Mapping[type[KacheryLabError], int] = {
    KacheryLabError: 500,
    errors.InvalidInput: 400,
    errors.InvalidJson: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Collision: 409,
    errors.FeedPosition: 409,
    errors.FeedFork: 409,
    errors.RequestIdReused: 409,
    errors.Gone: 410,
    errors.Quarantined: 410,
    errors.LinkChanged: 410,
    errors.TooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.RangeNotSatisfiable: 416,
    errors.UnknownHost: 421,
    errors.ContentMismatch: 422,
    errors.TooManyRequests: 429,
    errors.HeadersTooLarge: 431,
    errors.Unavailable: 503,
    errors.StorageFull: 507,
}


def status_of(error: KacheryLabError) -> int:
    """The status of this error; a class that the table does not name has that of its nearest named base."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def problem_document(error: KacheryLabError, status: int) -> bytes:
    """The bytes of a problem document. ASCII only: no text in it can fail to encode or reach a terminal raw."""
    document: dict[str, object] = {
        "type": f"urn:kachery-lab:error:{error.code}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": status,
        "code": error.code,
        "detail": error.message,
    }
    if error.hint is not None:
        document["hint"] = error.hint
    document.update(extra_fields(error))
    return json.dumps(document, ensure_ascii=True).encode("ascii")


def problem_headers(error: KacheryLabError) -> dict[str, str]:
    """The headers that belong to an error. Numbers and constants only: no text of a client gets into a header."""
    headers = {}
    if isinstance(error, errors.TooManyRequests | errors.Unavailable):
        headers["Retry-After"] = str(int(error.retry_after))
    elif isinstance(error, errors.RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{int(error.size)}"
    elif isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


class _ProblemResponse(JSONResponse):
    media_type = PROBLEM_TYPE

    def render(self, content: bytes) -> bytes:
        return content


def problem(error: KacheryLabError, *, status: int | None = None) -> JSONResponse:
    """The answer for an error: `type, title, status, code, detail`, `hint` if any, and the fields of its class."""
    shown = status_of(error) if status is None else status
    return _ProblemResponse(problem_document(error, shown), shown, headers=problem_headers(error))


def line_of_text(error: KacheryLabError, *, status: int | None = None) -> Response:
    """The answer for an error where clients show the body to a person as it is."""
    return PlainTextResponse(error.text, status_of(error) if status is None else status, problem_headers(error))


def answering(handler: Handler, form: Form) -> Handler:
    """A handler whose errors are answered in the form of its room."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except KacheryLabError as error:
            return form(request, error)

    return endpoint


class _Unexpected(KacheryLabError):
    code = "internal_error"


def unexpected() -> JSONResponse:
    """The answer when this server failed: says nothing about what failed."""
    return problem(_Unexpected("The server failed; its log has the request id of this answer."), status=500)


class _NoSuchRoute(errors.NotFound):
    """Starlette's own refusals (no route, wrong method), in the one error shape."""


def answer_to(error: Exception) -> Response | None:
    """The answer to an exception of a route: ours, or Starlette's own (no route, wrong method). None for any other."""
    if isinstance(error, KacheryLabError):
        return problem(error)
    if not isinstance(error, HTTPException):
        return None
    if error.status_code in {204, 304} or error.status_code < 200:
        return Response(status_code=error.status_code, headers=error.headers)
    answer = problem(_NoSuchRoute(error.detail), status=error.status_code)
    answer.headers.update(error.headers or {})
    return answer
