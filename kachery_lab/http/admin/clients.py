"""Client keys of the newer clients, and codes that register one. For admins only."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import UserName
from kachery_lab.errors import InvalidInput
from kachery_lab.http.admin.room import FUTURE, NOTE, OTHER_NODE_ID, ROOT, TIME, USER, body_of_request
from kachery_lab.http.bodies import optional, required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, flag, nullable, record, text, whole
from kachery_lab.services.access_data import ClientRecord, EnrolmentCode
from kachery_lab.services.clients import MAX_USES

_ADD = {"clientId": required(str), "user": required(str), "label": optional(str)}
_CHANGE = {"approved": optional(bool), "user": optional(str), "label": optional(str)}
_CODE = {
    "user": required(str),
    "label": optional(str),
    "uses": optional(int),
    "expiresAt": optional(int, nullable=True),
}


def to_json(client: ClientRecord) -> dict[str, Any]:
    """A client key as shown."""
    return {
        "clientId": client.client_id,
        "user": client.user,
        "label": client.label,
        "createdAt": client.created_at,
        "approvedAt": client.approved_at,
        "askedAs": client.asked_as,
        "askedFrom": client.asked_from,
    }


def code_to_json(code: EnrolmentCode) -> dict[str, Any]:
    """An enrolment code as shown."""
    return {
        "id": code.id,
        "user": code.user,
        "label": code.label,
        "createdAt": code.created_at,
        "expiresAt": code.expires_at,
        "usesLeft": code.uses_left,
    }


async def list_all(request: Request) -> Response:
    """All client keys, the oldest first."""
    actor = authenticate(request)
    return JSONResponse({"clients": [to_json(one) for one in node_of(request).clients.list(actor)]})


async def show(request: Request) -> Response:
    """One client key."""
    actor = authenticate(request)
    return JSONResponse(to_json(node_of(request).clients.get(actor, request.path_params["clientId"])))


async def add(request: Request) -> Response:
    """Register a client key."""
    actor, body = authenticate(request), await body_of_request(request, _ADD)
    user = UserName.parse(body["user"], "user")
    found = await node_of(request).clients.add(actor, body["clientId"], user, body.get("label", ""))
    return JSONResponse(to_json(found), 201)


async def change(request: Request) -> Response:
    """Approve a client key that waits, or give it another label."""
    actor, body, client_id = authenticate(request), await body_of_request(request, _CHANGE), request.path_params
    clients, name = node_of(request).clients, client_id["clientId"]
    if not body.get("approved", True):
        raise InvalidInput("approved: a client is let in by true; to keep it out, remove it")
    if "approved" in body:
        await clients.approve(actor, name, UserName.parse(body["user"], "user") if "user" in body else None)
    elif "user" in body:
        raise InvalidInput("user: is said when a client is approved; to give it to another user, remove and add it")
    if "label" in body:
        await clients.relabel(actor, name, body["label"])
    return JSONResponse(to_json(clients.get(actor, name)))


async def remove(request: Request) -> Response:
    """The key opens nothing from now on."""
    await node_of(request).clients.remove(authenticate(request), request.path_params["clientId"])
    return Response(status_code=204)


async def list_codes(request: Request) -> Response:
    """All enrolment codes, without their texts."""
    actor = authenticate(request)
    return JSONResponse({"codes": [code_to_json(one) for one in node_of(request).clients.codes(actor)]})


async def add_code(request: Request) -> Response:
    """A new enrolment code."""
    actor, body = authenticate(request), await body_of_request(request, _CODE)
    code, secret = await node_of(request).clients.add_code(
        actor,
        UserName.parse(body["user"], "user"),
        body.get("label", ""),
        body.get("uses", 1),
        body.get("expiresAt"),
    )
    return JSONResponse({**code_to_json(code), "code": secret}, 201, {"cache-control": "no-store"})


async def remove_code(request: Request) -> Response:
    """The code registers nothing from now on."""
    await node_of(request).clients.remove_code(authenticate(request), request.path_params["id"])
    return Response(status_code=204)


_WHO = ("admin",)
_CLIENT = text(OTHER_NODE_ID, pattern="^[0-9a-f]{64}$")
_SHOWN = record(
    clientId=_CLIENT,
    user=nullable(USER),
    label=NOTE,
    createdAt=TIME,
    approvedAt=nullable(TIME),
    askedAs=text("ann", maxLength=80),
    askedFrom=nullable(text("192.0.2.7")),
)
_CODE_ID = text("0a1b2c3d")
_SHOWN_CODE = {
    "id": _CODE_ID,
    "user": USER,
    "label": NOTE,
    "createdAt": TIME,
    "expiresAt": FUTURE,
    "usesLeft": whole(1),
}
_ONE = {"clientId": _CLIENT}
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/clients",
        list_all,
        "All client keys; one without a time under `approvedAt` waits",
        _WHO,
        {200: record(clients=array(_SHOWN))},
    ),
    Operation(
        "POST",
        f"{ROOT}/clients",
        add,
        "Register a client key for a user, who is made when absent",
        _WHO,
        {201: _SHOWN},
        body_of(_ADD, clientId=_CLIENT, user=USER, label=NOTE),
        refusals=(409,),
    ),
    Operation(
        "GET",
        f"{ROOT}/clients/{{clientId}}",
        show,
        "One client key",
        _WHO,
        {200: _SHOWN},
        None,
        _ONE,
        refusals=(404,),
    ),
    Operation(
        "PATCH",
        f"{ROOT}/clients/{{clientId}}",
        change,
        "Approve a client key that waits (`approved: true`; `user` in place of the one that its holder named), or "
        "change its label",
        _WHO,
        {200: _SHOWN},
        {**body_of(_CHANGE, approved=flag(True), user=USER, label=NOTE), "examples": [{"label": "rig-2"}]},
        _ONE,
        refusals=(404, 409),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/clients/{{clientId}}",
        remove,
        "End a client key with its own authorizations; what it uploaded stays",
        _WHO,
        {204: None},
        None,
        _ONE,
        refusals=(404,),
    ),
    Operation(
        "GET",
        f"{ROOT}/enrolment-codes",
        list_codes,
        "All enrolment codes, without their texts",
        _WHO,
        {200: record(codes=array(record(**_SHOWN_CODE)))},
    ),
    Operation(
        "POST",
        f"{ROOT}/enrolment-codes",
        add_code,
        "Make a code that registers client keys of a user; its text is shown this once. Default: one key, one day",
        _WHO,
        {201: record(**_SHOWN_CODE, code=text("Zk3vQ2n8yP0aLwX5tRbC"))},
        {
            **body_of(_CODE, user=USER, label=NOTE, uses=whole(1, 1, MAX_USES), expiresAt=FUTURE),
            "examples": [{"user": "ann", "uses": 5}],
        },
    ),
    Operation(
        "DELETE",
        f"{ROOT}/enrolment-codes/{{id}}",
        remove_code,
        "End an enrolment code; the keys that it registered stay",
        _WHO,
        {204: None},
        None,
        {"id": _CODE_ID},
        refusals=(404,),
    ),
)
