"""`/api/resource` and `/api/getChannelBucketBaseUrl`."""

from __future__ import annotations

import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import ChannelName, NodeId, parse_fields
from kachery_lab.core.keys import PrivateKey
from kachery_lab.errors import InvalidInput
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.protocols.hub2021.nodes import NO_STORE
from kachery_lab.http.protocols.hub2021.translate import body_of
from kachery_lab.http.public_url import hub_url
from kachery_lab.services.certificates import Bearer

_NONE: frozenset[str] = frozenset()
_REQUEST = (frozenset({"type", "payload", "auth"}), _NONE)
_PAYLOADS = {
    "getUploadUrls": (frozenset({"type", "expires", "resourceId", "filePaths", "sizes"}), _NONE),
    "getAblyTokenRequest": (frozenset({"type", "expires", "resourceId", "capability"}), _NONE),
}
_INFO = (frozenset({"type"}), frozenset({"resourceId", "resourceKey"}))


async def get_channel_bucket_base_url(request: Request) -> Response:
    """The same for every well-formed name, so it tells nothing; what lies there are public channels only."""
    fields = parse_fields(await body_of(request), "the request", frozenset({"channelName"}), _NONE)
    ChannelName.parse(fields["channelName"])
    return JSONResponse({"url": f"{hub_url(request)}/bucket"}, headers=NO_STORE)


async def resource(request: Request) -> Response:
    """A request to the resource server, which is this server too."""
    value = await body_of(request)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "getResourceInfo":
        return JSONResponse({"type": kind, "resourceInfo": _info(request, value)}, headers=NO_STORE)
    if not isinstance(kind, str) or kind not in _PAYLOADS:
        raise InvalidInput(f"type: expected one of {', '.join(_PAYLOADS)}, getResourceInfo")
    fields = parse_fields(value, "the request", *_REQUEST)
    payload = parse_fields(fields["payload"], "payload", *_PAYLOADS[kind])
    if payload["type"] != kind:
        raise InvalidInput("payload.type: expected the type of the request")
    node = node_of(request)
    bearer = node.certificates.bearer(payload, fields["auth"])
    if kind == "getAblyTokenRequest":
        return JSONResponse(
            {"type": kind, "ablyTokenRequest": await _token(request, bearer, payload["capability"])}, headers=NO_STORE
        )
    async with node.audit.refusals(str(bearer.subject), peer_of(request), "upload.issue", bearer.channel.name):
        tickets = node.certificates.upload_tickets(bearer, payload["filePaths"], payload["sizes"])
    base = hub_url(request)
    urls = [f"{base}/bucket/upload/{ticket}" for ticket in tickets]
    return JSONResponse({"type": kind, "uploadUrls": urls}, headers=NO_STORE)


async def _token(request: Request, bearer: Bearer, wanted: object) -> dict[str, object]:
    """Token details of the provider's library, which takes them for a token when they have the member `issued`."""
    node = node_of(request)
    async with node.audit.refusals(str(bearer.subject), peer_of(request), "band.token", bearer.channel.name):
        text, token = node.band_tokens.issue(bearer, wanted)
    granted = json.dumps(token.capability, separators=(",", ":"))
    return {"token": text, "issued": token.issued, "expires": token.expires, "capability": granted}


def _info(request: Request, value: object) -> dict[str, object]:
    fields = parse_fields(value, "the request", *_INFO)
    resource_id = fields.get("resourceId")
    if "resourceKey" in fields:
        public = PrivateKey.from_seed(fields["resourceKey"]).public_hex
        if resource_id not in (None, public):
            raise InvalidInput("resourceKey: it does not belong to resourceId")
        resource_id = public
    channel = node_of(request).certificates.resource(NodeId.parse(resource_id, "resourceId"))
    return {
        "resourceId": channel.resource_id,
        "resourceType": "bucket",
        "bucketBaseUrl": f"{hub_url(request)}/bucket",
    }
