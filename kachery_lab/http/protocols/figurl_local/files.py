"""Files of the zone `default`, for figures in the browser."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from kachery_lab.core.ids import Sha1
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.errors import NotFound
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.protocols.figurl_local.auth import ZONE, subject_of
from kachery_lab.http.responses import blob_response
from kachery_lab.services.channel_files import ON_DEMAND_SECONDS

_SAFE = {
    "content-security-policy": "sandbox",
    "cross-origin-resource-policy": "same-origin",
    "access-control-expose-headers": "Content-Length, Content-Range, Accept-Ranges, ETag",
}


async def probe(_request: Request) -> Response:
    """Somebody is here."""
    return PlainTextResponse("kachery-lab")


async def read(request: Request) -> Response:
    """GET and HEAD of a file; 404 lets figurl look elsewhere."""
    reader, sha1, node = subject_of(request), Sha1.parse(request.path_params["hash"]), node_of(request)
    async with node.audit.refusals(str(reader), peer_of(request), "file.read", ZONE):
        found = await node.channel_files.find(ZONE, sha1, reader, on_demand_wait=ON_DEMAND_SECONDS)
    if found is None:
        raise NotFound(f"there is no file {sha1} in the zone {ZONE}")
    content = await node.blobs.open(sha1)
    return blob_response(
        sha1,
        content,
        request.headers,
        cache_control="private, no-store",
        more=_SAFE,
        sent=lambda size: node.usage.downloaded(ZONE, str(reader), size),
    )


async def upload(request: Request) -> Response:
    """The body becomes a file of the zone, verified and durable before the answer; again is no error."""
    owner, sha1, node = subject_of(request), Sha1.parse(request.path_params["hash"]), node_of(request)
    declared, peer = request.headers.get("content-length"), peer_of(request)
    size = int(declared) if declared is not None else None
    async with node.audit.refusals(str(owner), peer, "bucket.upload", ZONE):
        ticket = node.uploads.issue(ZONE, ObjectPath.parse(file_path(sha1)), size, owner)
        await node.uploads.receive(ticket, request.stream(), size, peer)
    return PlainTextResponse("stored")
