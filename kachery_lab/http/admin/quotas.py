"""Quotas: what one user, node or client key may have in all channels together."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.http.admin.room import ROOT, body_of_request
from kachery_lab.http.bodies import required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, nullable, record, text, whole
from kachery_lab.services.access_data import Quota

_SET = {"maxBytes": required(int, nullable=True), "maxObjects": required(int, nullable=True)}


def to_json(quota: Quota) -> dict[str, Any]:
    """A quota as shown."""
    return {"subject": quota.subject, "maxBytes": quota.max_bytes, "maxObjects": quota.max_objects}


async def list_all(request: Request) -> Response:
    """All quotas."""
    actor = authenticate(request)
    return JSONResponse({"quotas": [to_json(quota) for quota in node_of(request).quotas.list(actor)]})


async def show(request: Request) -> Response:
    """The quota of a subject, and what counts towards it now."""
    quota, held = await node_of(request).quotas.get(authenticate(request), request.path_params["subject"])
    return JSONResponse({**to_json(quota), "bytes": held.bytes, "objects": held.objects})


async def put(request: Request) -> Response:
    """Set the quota of a subject."""
    actor, body = authenticate(request), await body_of_request(request, _SET)
    subject = request.path_params["subject"]
    quota = await node_of(request).quotas.set(actor, subject, body["maxBytes"], body["maxObjects"])
    return JSONResponse(to_json(quota))


async def remove(request: Request) -> Response:
    """No limit any more."""
    await node_of(request).quotas.remove(authenticate(request), request.path_params["subject"])
    return Response(status_code=204)


_SUBJECT = text("user:ann")
_FIELDS = {
    "subject": _SUBJECT,
    "maxBytes": nullable(whole(2_000_000_000_000)),
    "maxObjects": nullable(whole(1_000_000)),
}
_SHOWN = record(**_FIELDS)
_ONE = {"subject": _SUBJECT}
_ADMIN = ("admin",)
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/quotas",
        list_all,
        "Quotas of users, nodes and client keys",
        _ADMIN,
        {200: record(quotas=array(_SHOWN))},
    ),
    Operation(
        "GET",
        f"{ROOT}/quotas/{{subject}}",
        show,
        "The quota of `kind:name`, and what counts towards it, announced uploads included. The client keys of a user "
        "count for the user as well",
        _ADMIN,
        {200: record(**_FIELDS, bytes=whole(12345), objects=whole(3))},
        None,
        _ONE,
    ),
    Operation(
        "PUT",
        f"{ROOT}/quotas/{{subject}}",
        put,
        "Set what a subject may have in all channels together. What is over it stays",
        _ADMIN,
        {200: _SHOWN},
        body_of(_SET, maxBytes=whole(2_000_000_000_000), maxObjects=whole(1_000_000)),
        _ONE,
        refusals=(409,),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/quotas/{{subject}}",
        remove,
        "Remove a quota: no limit any more",
        _ADMIN,
        {204: None},
        None,
        _ONE,
        refusals=(404, 409),
    ),
)
