"""Users."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import UserName
from kachery_lab.http.admin.room import ROOT, TIME, USER, body_of_request
from kachery_lab.http.bodies import required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, record

_CREATE = {"name": required(str)}


def to_json(user: tuple[str, int]) -> dict[str, Any]:
    """A user as shown."""
    return {"name": user[0], "createdAt": user[1]}


async def list_all(request: Request) -> Response:
    """All users, by name."""
    actor = authenticate(request)
    return JSONResponse({"users": [to_json(user) for user in node_of(request).users.list(actor)]})


async def show(request: Request) -> Response:
    """One user."""
    actor = authenticate(request)
    return JSONResponse(to_json(node_of(request).users.get(actor, request.path_params["user"])))


async def create(request: Request) -> Response:
    """A new user."""
    actor, users = authenticate(request), node_of(request).users
    name = UserName.parse((await body_of_request(request, _CREATE))["name"], "name")
    await users.create(actor, name)
    return JSONResponse(to_json(users.get(actor, name)), 201)


async def remove(request: Request) -> Response:
    """The user, with tokens and authorizations, goes."""
    await node_of(request).users.remove(authenticate(request), request.path_params["user"])
    return Response(status_code=204)


_NAME = {**USER, "examples": ["carol"]}
_SHOWN = record(name=USER, createdAt=TIME)
_ONE = {"user": _NAME}
OPERATIONS = (
    Operation("GET", f"{ROOT}/users", list_all, "All users, by name", ("admin",), {200: record(users=array(_SHOWN))}),
    Operation(
        "POST",
        f"{ROOT}/users",
        create,
        "Make a user",
        ("admin",),
        {201: _SHOWN},
        body_of(_CREATE, name=_NAME),
        refusals=(409,),
    ),
    Operation(
        "GET", f"{ROOT}/users/{{user}}", show, "One user", ("admin",), {200: _SHOWN}, None, _ONE, refusals=(404,)
    ),
    Operation(
        "DELETE",
        f"{ROOT}/users/{{user}}",
        remove,
        "Remove a user with its tokens and authorizations; one who owns nodes or channels stays",
        ("admin",),
        {204: None},
        None,
        _ONE,
        refusals=(404, 409),
    ),
)
