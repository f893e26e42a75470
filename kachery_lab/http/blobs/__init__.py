"""Files by their hash, for all generations of clients.

| route | who | answer |
|---|---|---|
| `GET`, `HEAD /sha1/{hash}` | anyone, where it lies in a public channel | the file; ranges, ETag, 304; else 404 |
| `... ?ticket=...` | whoever has a ticket for it | the same, as far as the ticket's reader may read now; else 403 |
| `... Authorization: Bearer ...` | a token that may read it in some channel | the same; else 404 |
| `GET`, `HEAD /sha1/{hash}/{name}` | the same | the same; the name is for programs that look at it |

With `?download` the answer asks a browser to save the file, under the name. Other parameters are ignored. What is put
into channels goes to `PUT /bucket/upload/{ticket}`.
"""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from kachery_lab.http.blobs.files import read


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [Route("/sha1/{hash}", read, methods=["GET"]), Route("/sha1/{hash}/{name}", read, methods=["GET"])]
