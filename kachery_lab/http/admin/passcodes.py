"""Passcodes: what they grant, every membership that shows one has."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.roles import parse_roles, role_names
from kachery_lab.http.admin.room import ASKED_ROLES, CHANNEL, NOTE, ROLES, ROOT, TIME, body_of_request
from kachery_lab.http.bodies import optional, required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, record, text
from kachery_lab.services.access_data import Passcode

_ADD = {"roles": required(list), "label": optional(str), "passcode": optional(str)}


def to_json(found: Passcode) -> dict[str, Any]:
    """A passcode as shown: never its text."""
    return {
        "id": found.id,
        "label": found.label,
        "roles": role_names(found.granted),
        "createdAt": found.created_at,
    }


async def list_all(request: Request) -> Response:
    """The passcodes of a channel."""
    actor = authenticate(request)
    found = node_of(request).authorizations.passcodes(actor, request.path_params["channel"])
    return JSONResponse({"passcodes": [to_json(one) for one in found]})


async def add(request: Request) -> Response:
    """A new passcode; its text is shown this once."""
    actor, body = authenticate(request), await body_of_request(request, _ADD)
    roles = parse_roles(body["roles"])
    found, passcode = await node_of(request).authorizations.add_passcode(
        actor, request.path_params["channel"], roles, body.get("label", ""), body.get("passcode")
    )
    return JSONResponse({**to_json(found), "passcode": passcode}, 201, {"cache-control": "no-store"})


async def remove(request: Request) -> Response:
    """End a passcode for everybody who shows it."""
    actor, path = authenticate(request), request.path_params
    await node_of(request).authorizations.remove_passcode(actor, path["channel"], path["id"])
    return Response(status_code=204)


_WHO = ("admin", "channel-owner")
_FIELDS = {"id": text("0a1b2c3d"), "label": NOTE, "roles": ROLES, "createdAt": TIME}
_TEXT = text("pass-correct-horse", minLength=6, maxLength=40)
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/channels/{{channel}}/passcodes",
        list_all,
        "Passcodes of a channel, without their texts",
        _WHO,
        {200: record(passcodes=array(record(**_FIELDS)))},
        None,
        {"channel": CHANNEL},
        refusals=(404,),
    ),
    Operation(
        "POST",
        f"{ROOT}/channels/{{channel}}/passcodes",
        add,
        "Make a passcode that grants roles to every membership that shows it; its text is shown this once",
        _WHO,
        {201: record(**_FIELDS, passcode=_TEXT)},
        {
            **body_of(_ADD, roles={**ASKED_ROLES, "minItems": 1}, label=NOTE, passcode=_TEXT),
            "examples": [{"roles": ["requestFiles"], "label": "visitors"}],
        },
        {"channel": CHANNEL},
        refusals=(404, 409),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/channels/{{channel}}/passcodes/{{id}}",
        remove,
        "End a passcode for everybody who shows it",
        _WHO,
        {204: None},
        None,
        {"channel": CHANNEL, "id": text("0a1b2c3d")},
        refusals=(404,),
    ),
)
