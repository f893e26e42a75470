"""Blobs by SHA-1. Without a channel these routes speak for the node itself."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import Sha1
from kachery_lab.errors import Forbidden, InvalidInput
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import BYTES, Operation, array, flag, nullable, record, text, whole
from kachery_lab.http.responses import blob_response, etag
from kachery_lab.services.blobs import Claim
from kachery_lab.services.principals import Principal

MAX_LIMIT = 1000


def _speaker(request: Request) -> Principal:
    """The caller, who may speak for the node. An additional code may not: it is for pages that know what they ask."""
    principal = authenticate(request)
    principal.require("client", "admin")
    if principal.kind == "browser":
        raise Forbidden(
            "an additional code may not do this", hint="Use the code from <storage>/client-auth, or a token"
        )
    return principal


def _sha1(request: Request) -> Sha1:
    return Sha1.parse(request.path_params["sha1"])


async def read(request: Request) -> Response:
    """GET and HEAD."""
    _speaker(request)
    sha1 = _sha1(request)
    return blob_response(sha1, await node_of(request).blobs.open(sha1), request.headers)


async def put(request: Request) -> Response:
    """Store bytes that must have the SHA-1 of the path."""
    principal, sha1 = _speaker(request), _sha1(request)
    declared = request.headers.get("content-length")
    claim = Claim(sha1=sha1, size=int(declared) if declared is not None else None)
    stored = await node_of(request).blobs.store(request.stream(), claim, principal)
    answer = {"sha1": stored.sha1, "size": stored.size, "manifestSha1": stored.manifest_sha1, "new": stored.new}
    return JSONResponse(answer, 201 if stored.new else 200, {"etag": etag(sha1)})


async def remove(request: Request) -> Response:
    """Take a blob away for everybody; its file goes to the trash."""
    actor, node, sha1 = authenticate(request), node_of(request), _sha1(request)
    async with node.audit.action(actor, "blob.delete", sha1):
        actor.require("admin")
        await node.blobs.delete(sha1)
    return Response(status_code=204)


async def list_blobs(request: Request) -> Response:
    """Index rows after a name, in order; `next` is the `after` of the next page, null at the end."""
    _speaker(request)
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


_WHO = ("client", "admin")
_NAME = text("a9993e364706816aba3e25717850c26c9cd0d89d", pattern="^[0-9a-f]{40}$")
_SHA256 = text("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", pattern="^[0-9a-f]{64}$")
_STORED = record(sha1=_NAME, size=whole(3), manifestSha1=nullable(_NAME), new=flag(True))
_ROW = record(
    sha1=_NAME,
    size=whole(3),
    sha256=nullable(_SHA256),
    manifestSha1=nullable(_NAME),
    storedAt=whole(1_700_000_000_000),
    storedBy=text("local"),
    origin=text("local"),
)
OPERATIONS = (
    Operation(
        "GET",
        "/api/v1/blobs",
        list_blobs,
        "Index rows in order; `next` is the `after` of the next page",
        _WHO,
        {200: record(blobs=array(_ROW), next=nullable(_NAME))},
        query={"after": _NAME, "limit": whole(100, 1, MAX_LIMIT)},
    ),
    Operation(
        "GET",
        "/api/v1/blobs/{sha1}",
        read,
        "The bytes, or one range of them; `If-None-Match` gives 304. HEAD answers the same without them",
        _WHO,
        {200: BYTES, 206: BYTES, 304: None},
        None,
        {"sha1": _NAME},
        refusals=(404, 410, 416),
    ),
    Operation(
        "PUT",
        "/api/v1/blobs/{sha1}",
        put,
        "Store bytes that have the SHA-1 of the path",
        _WHO,
        {200: _STORED, 201: _STORED},
        BYTES,
        {"sha1": _NAME},
        refusals=(409, 422),
    ),
    Operation(
        "DELETE",
        "/api/v1/blobs/{sha1}",
        remove,
        "Take a blob away for everybody; its file goes to the trash",
        ("admin",),
        {204: None},
        None,
        {"sha1": _NAME},
        refusals=(404,),
    ),
)
