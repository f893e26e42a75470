"""Authorizations: what the owner of a channel grants to nodes, users and client keys."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.roles import Role, parse_roles, role_names
from kachery_lab.http.admin.room import ASKED_ROLES, CHANNEL, ROLES, ROOT, USER, body_of_request
from kachery_lab.http.bodies import required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, choice, record
from kachery_lab.services.subjects import KINDS

_GRANT = {"roles": required(list)}


def to_json(kind: str, subject: str, roles: Role) -> dict[str, Any]:
    """An authorization as shown."""
    return {"kind": kind, "subject": subject, "roles": role_names(roles)}


async def list_all(request: Request) -> Response:
    """What a channel grants."""
    actor = authenticate(request)
    found = node_of(request).authorizations.granted(actor, request.path_params["channel"])
    return JSONResponse({"authorizations": [to_json(*one) for one in found]})


async def grant(request: Request) -> Response:
    """Set what a subject is granted, in place of what it was."""
    actor, body = authenticate(request), await body_of_request(request, _GRANT)
    roles, path = parse_roles(body["roles"]), request.path_params
    await node_of(request).authorizations.grant(actor, path["channel"], path["kind"], path["subject"], roles)
    return JSONResponse(to_json(path["kind"], path["subject"], roles))


async def revoke(request: Request) -> Response:
    """Take away what a subject was granted."""
    actor, path = authenticate(request), request.path_params
    await node_of(request).authorizations.revoke(actor, path["channel"], path["kind"], path["subject"])
    return Response(status_code=204)


_WHO = ("admin", "channel-owner")
_KIND = choice("user", *(kind for kind in KINDS if kind != "user"))
_SHOWN = record(kind=_KIND, subject=USER, roles=ROLES)
_ONE = {"channel": CHANNEL, "kind": _KIND, "subject": USER}
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/channels/{{channel}}/authorizations",
        list_all,
        "What a channel grants, and to whom",
        _WHO,
        {200: record(authorizations=array(_SHOWN))},
        None,
        {"channel": CHANNEL},
        refusals=(404,),
    ),
    Operation(
        "PUT",
        f"{ROOT}/channels/{{channel}}/authorizations/{{kind}}/{{subject}}",
        grant,
        "Set what a node, a user or a client key is granted, in place of what it was",
        _WHO,
        {200: _SHOWN},
        body_of(_GRANT, roles={**ASKED_ROLES, "minItems": 1}),
        _ONE,
        refusals=(404, 409),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/channels/{{channel}}/authorizations/{{kind}}/{{subject}}",
        revoke,
        "Take away what was granted; works at once, open connections included",
        _WHO,
        {204: None},
        None,
        _ONE,
        refusals=(404,),
    ),
)
