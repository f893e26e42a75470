"""Blobs by SHA-1. Without a channel these routes speak for the node itself."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import Sha1
from kachery_lab.errors import InvalidInput
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.responses import blob_response, etag
from kachery_lab.services.blobs import Claim

MAX_LIMIT = 1000


def _sha1(request: Request) -> Sha1:
    return Sha1.parse(request.path_params["sha1"])


async def read(request: Request) -> Response:
    """GET and HEAD."""
    authenticate(request).require("client", "admin")
    sha1 = _sha1(request)
    return blob_response(sha1, await node_of(request).blobs.open(sha1), request.headers)


async def put(request: Request) -> Response:
    """Store bytes that must have the SHA-1 of the path."""
    principal = authenticate(request)
    principal.require("client", "admin")
    sha1 = _sha1(request)
    declared = request.headers.get("content-length")
    claim = Claim(sha1=sha1, size=int(declared) if declared is not None else None)
    stored = await node_of(request).blobs.store(request.stream(), claim, principal)
    answer = {"sha1": stored.sha1, "size": stored.size, "manifestSha1": stored.manifest_sha1, "new": stored.new}
    return JSONResponse(answer, 201 if stored.new else 200, {"etag": etag(sha1)})


async def remove(request: Request) -> Response:
    """Take a blob away for everybody; its file goes to the trash."""
    authenticate(request).require("admin")
    await node_of(request).blobs.delete(_sha1(request))
    return Response(status_code=204)


async def list_blobs(request: Request) -> Response:
    """Index rows after a name, in order; `next` is the `after` of the next page, null at the end."""
    authenticate(request).require("client", "admin")
    after = request.query_params.get("after", "")
    text = request.query_params.get("limit", "100")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_LIMIT):
        raise InvalidInput(f"limit: expected a number from 1 to {MAX_LIMIT}")
    if after:
        Sha1.parse(after, "after")
    rows = await node_of(request).blobs.list(after, int(text))
    items = [
        {
            "sha1": row.sha1,
            "size": row.size,
            "sha256": row.sha256,
            "manifestSha1": row.manifest_sha1,
            "storedAt": row.stored_at,
            "storedBy": row.stored_by,
            "origin": row.origin,
        }
        for row in rows
    ]
    return JSONResponse({"blobs": items, "next": rows[-1].sha1 if len(rows) == int(text) else None})
