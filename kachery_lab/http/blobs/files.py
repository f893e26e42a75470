"""Reading files by their hash."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.core.ids import Sha1
from kachery_lab.http.context import caller, node_of, peer_of
from kachery_lab.http.responses import blob_response
from kachery_lab.services.principals import Principal
from kachery_lab.services.subjects import subject_of
from kachery_lab.services.usage import ANYBODY

PUBLIC = "public, max-age=31536000, immutable"
PRIVATE = "private, no-store"
SAFE = {"content-security-policy": "sandbox"}
_LONGEST_NAME = 255


async def read(request: Request) -> Response:
    """GET and HEAD. A ticket in the address is all that counts then; else a credential, if one is sent."""
    sha1 = Sha1.parse(request.path_params["hash"])
    ticket = request.query_params.get("ticket")
    if ticket is not None:
        return await _by_ticket(request, sha1, ticket)
    node, principal = node_of(request), caller(request)
    if principal is not None and _speaks_for_node(principal):
        content = await node.blobs.open(sha1)
        return blob_response(sha1, content, request.headers, cache_control=PRIVATE, more=_more(request, sha1))
    reader = None if principal is None else subject_of(principal, node.identity.node_id)
    if principal is not None and principal.kind == "browser":
        # An additional code is for pages that know what they ask; it does not stand for the node here.
        reader = None
    reference, public, content = await node.channel_files.open_anywhere(sha1, reader)
    who = ANYBODY if reader is None else str(reader)
    return blob_response(
        sha1,
        content,
        request.headers,
        cache_control=PUBLIC if public else PRIVATE,
        more=_more(request, sha1),
        sent=lambda size: node.usage.downloaded(reference.channel, who, size),
    )


def _speaks_for_node(principal: Principal) -> bool:
    return principal.kind != "browser" and (principal.may("client") or principal.may("admin"))


async def _by_ticket(request: Request, sha1: Sha1, text: str) -> Response:
    node = node_of(request)
    ticket = node.uploads.open_read(text, request.method)
    channel, _, reader = ticket
    async with node.audit.refusals(str(reader), peer_of(request), "file.read", channel):
        content = await node.channel_files.open_by_ticket(ticket, sha1)
    return blob_response(
        sha1,
        content,
        request.headers,
        cache_control=PRIVATE,
        more=_more(request, sha1),
        sent=lambda size: node.usage.downloaded(channel, str(reader), size),
    )


def _more(request: Request, sha1: Sha1) -> dict[str, str]:
    if "download" not in request.query_params:
        return SAFE
    name = request.path_params.get("name", sha1)[:_LONGEST_NAME]
    # Percent-encoded from UTF-8, so no text of a client is a header.
    encoded = quote(name.encode("utf-8", "replace"), safe="")
    return {**SAFE, "content-disposition": f"attachment; filename*=UTF-8''{encoded}"}
