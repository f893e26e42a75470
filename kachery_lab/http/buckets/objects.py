"""Reading and writing objects of buckets."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.core.ids import ChannelName
from kachery_lab.core.objects import ObjectPath
from kachery_lab.errors import Forbidden
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.responses import blob_response
from kachery_lab.services.subjects import Subject
from kachery_lab.services.usage import ANYBODY


async def read_public(request: Request) -> Response:
    """An object of a public channel. One of a private channel is not there for callers without a capability."""
    return await _read(request, None)


async def read_with_capability(request: Request) -> Response:
    """An object for the reader whom the address names, as far as their roles reach now."""
    channel = ChannelName.parse(request.path_params["channel"], "channel")
    return await _read(request, node_of(request).uploads.reader(request.path_params["capability"], channel))


async def _read(request: Request, reader: Subject | None) -> Response:
    node = node_of(request)
    channel = ChannelName.parse(request.path_params["channel"], "channel")
    path = ObjectPath.parse(request.path_params["path"])
    async with node.audit.refusals(str(reader), peer_of(request), "bucket.read", channel):
        sha1, content = await node.buckets.open(channel, path, reader)
    # Whoever reads again asks again, so that a right that was taken away ends at once; what did not change is a 304.
    return blob_response(
        sha1,
        content,
        request.headers,
        media_type="application/octet-stream" if path.kind == "file" else "application/json",
        cache_control="private, no-cache" if path.immutable else "no-store",
        sent=lambda size: node.usage.downloaded(channel, ANYBODY if reader is None else str(reader), size),
    )


async def put(request: Request) -> Response:
    """Bytes for the one object that the ticket names. Sending the same bytes again is no error."""
    if request.scope["query_string"]:
        raise Forbidden("this URL was issued without parameters", hint="Use the URL exactly as it was given")
    node, peer = node_of(request), peer_of(request)
    declared = request.headers.get("content-length")
    size = int(declared) if declared is not None else None
    ticket, owner = node.uploads.open(request.path_params["ticket"])
    async with node.audit.refusals(str(owner), peer, "bucket.upload", ticket.channel):
        await node.uploads.honour(ticket, owner, request.stream(), size, peer)
    return Response(status_code=200)
