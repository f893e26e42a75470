"""What lies in a channel's bucket, for its owner."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.http.admin.room import CHANNEL, LIMIT, NOTE, ROOT, TIME, known_parameters, number
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, flag, nullable, record, text, whole
from kachery_lab.services.buckets import Reference


def to_json(found: Reference) -> dict[str, Any]:
    """An object as shown."""
    return {
        "path": found.path,
        "sha1": found.sha1,
        "size": found.size,
        "label": found.label,
        "principal": found.principal,
        "storedAt": found.stored_at,
        "onDemand": found.on_demand,
    }


async def list_all(request: Request) -> Response:
    """Objects after a path, in order; `next` is the `after` of the next page, null at the end."""
    actor = authenticate(request)
    known_parameters(request, "after", "limit")
    limit = number(request, "limit", 100, 1, 1000)
    after = request.query_params.get("after", "")
    found = await node_of(request).channels.objects(actor, request.path_params["channel"], after, limit)
    following = found[-1].path if len(found) == limit else None
    return JSONResponse({"objects": [to_json(one) for one in found], "next": following})


async def remove(request: Request) -> Response:
    """Delete an object in this channel."""
    actor, path = authenticate(request), request.path_params
    await node_of(request).channels.remove_object(actor, path["channel"], path["path"])
    return Response(status_code=204)


async def list_deletions(request: Request) -> Response:
    """What was deleted and can be restored, in order of the path."""
    actor = authenticate(request)
    known_parameters(request, "after", "limit")
    limit = number(request, "limit", 100, 1, 1000)
    after = request.query_params.get("after", "")
    found = await node_of(request).channels.deletions(actor, request.path_params["channel"], after, limit)
    shown = [{**to_json(one), "deletedAt": at, "deletedBy": by} for one, at, by in found]
    return JSONResponse({"deletions": shown, "next": found[-1][0].path if len(found) == limit else None})


async def restore(request: Request) -> Response:
    """Undo a deletion."""
    actor, path = authenticate(request), request.path_params
    found = await node_of(request).channels.restore_object(actor, path["channel"], path["path"])
    return JSONResponse(to_json(found))


_WHO = ("admin", "channel-owner")
_SHA1 = "a9993e364706816aba3e25717850c26c9cd0d89d"
_PATH = text(f"sha1/a9/99/3e/{_SHA1}")
SHOWN_FIELDS = {
    "path": _PATH,
    "sha1": text(_SHA1, pattern="^[0-9a-f]{40}$"),
    "size": whole(3),
    "label": NOTE,
    "principal": text("user:ann"),
    "storedAt": TIME,
    "onDemand": flag(False),
}
_SHOWN = record(**SHOWN_FIELDS)
_DELETED = record(**SHOWN_FIELDS, deletedAt=TIME, deletedBy=text("user:ann"))
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/channels/{{channel}}/objects",
        list_all,
        "Objects of a channel, by path: who stored them, when, under which label",
        _WHO,
        {200: record(objects=array(_SHOWN), next=nullable(_PATH))},
        None,
        {"channel": CHANNEL},
        {"after": text("sha1/"), "limit": LIMIT},
        refusals=(404,),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/channels/{{channel}}/objects/{{path:path}}",
        remove,
        "Delete an object in a channel. A tombstone keeps it from being offered on demand; the bytes stay",
        _WHO,
        {204: None},
        None,
        {"channel": CHANNEL, "path": _PATH},
        refusals=(404,),
    ),
    Operation(
        "GET",
        f"{ROOT}/channels/{{channel}}/deletions",
        list_deletions,
        "Deleted objects that can be restored, for `KACHERY_LAB_RESTORE_DAYS` days",
        _WHO,
        {200: record(deletions=array(_DELETED), next=nullable(_PATH))},
        None,
        {"channel": CHANNEL},
        {"after": text("sha1/"), "limit": LIMIT},
        refusals=(404,),
    ),
    Operation(
        "POST",
        f"{ROOT}/channels/{{channel}}/deletions/{{path:path}}/restore",
        restore,
        "Undo a deletion: the object is back with its uploader, label and time",
        _WHO,
        {200: _SHOWN},
        None,
        {"channel": CHANNEL, "path": _PATH},
        refusals=(404, 409, 507),
    ),
)
