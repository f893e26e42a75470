"""Buckets of channels, for all generations of clients.

| route | who | answer |
|---|---|---|
| `GET`, `HEAD /bucket/{channel}/{path}` | anyone, in public channels | the object; ranges, ETag, 304; else 404 |
| `GET`, `HEAD /bucket/~{capability}/{channel}/{path}` | the reader whom it names | the same; 403 without the role |
| `PUT /bucket/upload/{ticket}` | who holds the ticket | exactly 200 when the object is durable |

Of `GET` and `HEAD` unknown query parameters are ignored; a `PUT` with any is refused.
"""

from __future__ import annotations

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.routing import BaseRoute, Route

from kachery_lab.http.buckets import objects


class _Everything(StringConvertor):
    """All of the rest of a path. The usual `path` convertor drops a newline at its end, and a wrong name gets right."""

    regex = "(?s:.*)"


register_url_convertor("everything", _Everything())


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [
        Route("/bucket/upload/{ticket}", objects.put, methods=["PUT"]),
        Route("/bucket/~{capability}/{channel}/{path:everything}", objects.read_with_capability, methods=["GET"]),
        Route("/bucket/{channel}/{path:everything}", objects.read_public, methods=["GET"]),
    ]
