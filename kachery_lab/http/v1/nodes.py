"""What other nodes ask of this hub, in requests that they sign."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core import strict_json
from kachery_lab.core.ids import ChannelName, NodeId, NodeLabel, Sha1, UserName, parse_whole_number
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import NAMES, role_names
from kachery_lab.errors import InvalidInput, NotFound, TooLarge
from kachery_lab.http.bodies import optional, require_fields, required
from kachery_lab.http.context import node_of
from kachery_lab.http.describe import Operation, array, body_of, choice, flag, nullable, record, text, whole
from kachery_lab.http.public_url import hub_url
from kachery_lab.services.node_requests import HEADER
from kachery_lab.services.subjects import Subject

MAX_BODY = 64 * 1024
_REPORT = {"label": required(str), "owner": required(str)}
_UPLOAD = {"sha1": required(str), "size": required(int), "onDemand": optional(bool)}


async def signed(request: Request, max_body: int = MAX_BODY) -> tuple[Subject, Any]:
    """The node that signed, and the JSON body ({} without one)."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_body:
            raise TooLarge(f"more than {max_body} bytes")
    target = request.scope["raw_path"].decode("latin-1")
    if request.scope["query_string"]:
        target += "?" + request.scope["query_string"].decode("latin-1")
    subject = node_of(request).node_requests.verify(request.headers.get(HEADER), request.method, target, bytes(body))
    return subject, strict_json.loads(bytes(body)) if body else {}


async def report(request: Request) -> Response:
    """A node tells its label and owner; an unknown one is noted and waits for approval."""
    subject, body = await signed(request)
    fields = require_fields(body, _REPORT)
    approved = await node_of(request).nodes.report(
        NodeId(subject.name), UserName.parse(fields["owner"], "owner"), NodeLabel.parse(fields["label"], "label")
    )
    return JSONResponse({"approved": approved})


async def memberships(request: Request) -> Response:
    """The node's channels here, its effective roles, and where their buckets are."""
    subject, _ = await signed(request)
    node = node_of(request)
    node.node_requests.require_approved(subject)
    base = hub_url(request)
    found = []
    for (channel, node_id), membership in sorted(node.data.memberships.items()):
        if node_id == subject.name:
            capability = node.uploads.capability(channel, subject)
            found.append(
                {
                    "channel": channel,
                    "public": node.data.channel(channel).public,
                    "asked": role_names(membership.asked),
                    "roles": role_names(node.roles.roles(subject, channel)),
                    "offer": membership.offer,
                    "bucketUrl": f"{base}/bucket/~{capability}/{channel}",
                }
            )
    return JSONResponse({"memberships": found}, headers={"cache-control": "no-store"})


async def upload(request: Request) -> Response:
    """An upload URL for a file, or the news that it is there already. Needs provideFiles.

    What is there only because somebody asked is no upload yet.
    """
    subject, body = await signed(request)
    node = node_of(request)
    node.node_requests.require_approved(subject)
    channel = ChannelName.parse(request.path_params["channel"], "channel")
    fields = require_fields(body, _UPLOAD)
    path = ObjectPath.parse(file_path(Sha1.parse(fields["sha1"], "sha1")))
    size = parse_whole_number(fields["size"], "size")
    if (channel, subject.name) not in node.data.memberships:
        raise NotFound(f"there is no channel {channel!r} of this node")
    if size < 0:
        raise InvalidInput("size: expected a number of bytes")
    on_demand = fields.get("onDemand", False)
    segment = node.uploads.issue(channel, path, size, subject, on_demand=on_demand)
    if on_demand:
        await node.buckets.require_not_deleted(channel, path)
    found = await node.buckets.find(channel, path.text)
    if found is not None and (on_demand or not found.on_demand):
        return JSONResponse({"alreadyUploaded": True, "url": None})
    return JSONResponse({"alreadyUploaded": False, "url": f"{hub_url(request)}/bucket/upload/{segment}"})


_SHA1 = text("4686d99b87d3a76d666fb39441ca8770ab9e9eb2", pattern="^[0-9a-f]{40}$")
_ROLES = array(choice(*NAMES))
_MEMBERSHIP = record(
    channel=text("rig-data"),
    public=flag(False),
    asked=_ROLES,
    roles=_ROLES,
    offer=choice("local", "uploaded"),
    bucketUrl=text("https://lab.example.org/bucket/~.../rig-data"),
)
OPERATIONS = (
    Operation(
        "POST",
        "/api/v1/nodes/report",
        report,
        "A node tells its label and owner; an unknown one waits for approval",
        ("node",),
        {200: record(approved=flag(True))},
        body=body_of(_REPORT, label=text("rig-1"), owner=text("alice")),
        refusals=(409,),
    ),
    Operation(
        "GET",
        "/api/v1/nodes/memberships",
        memberships,
        "The signing node's channels here, its effective roles, and where their buckets are",
        ("node",),
        {200: record(memberships=array(_MEMBERSHIP))},
        refusals=(409,),
    ),
    Operation(
        "POST",
        "/api/v1/channels/{channel}/uploads",
        upload,
        "An upload URL for a file; needs the role provideFiles",
        ("node",),
        {200: record(alreadyUploaded=flag(False), url=nullable(text("https://lab.example.org/bucket/upload/...")))},
        body=body_of(_UPLOAD, sha1=_SHA1, size=whole(12), onDemand=flag(False)),
        parameters={"channel": text("rig-data")},
        refusals=(404, 409, 413),
    ),
)
