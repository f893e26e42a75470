"""Single task functions of a channel: who may use them, and for how long a backend may keep a task."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.roles import parse_roles, role_names
from kachery_lab.http.admin.room import CHANNEL, ROOT, USER, body_of_request
from kachery_lab.http.bodies import required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, choice, nullable, record, text, whole
from kachery_lab.services.subjects import KINDS
from kachery_lab.services.task_functions import EVERY, MAX_RUN_SECONDS, TaskFunction

_LIMIT = {"maxRunSeconds": required(int, nullable=True)}
_GRANT = {"roles": required(list)}


def to_json(function: TaskFunction) -> dict[str, Any]:
    """A function's settings as shown."""
    grants = [
        {"kind": kind, "subject": subject, "roles": role_names(roles)} for kind, subject, roles in function.grants
    ]
    return {"functionId": function.function_id, "maxRunSeconds": function.max_run_seconds, "grants": grants}


async def list_all(request: Request) -> Response:
    """Functions for which something is set."""
    found = node_of(request).task_functions.list(authenticate(request), request.path_params["channel"])
    return JSONResponse({"functions": [to_json(one) for one in found]})


async def limit(request: Request) -> Response:
    """Set the maximum run time; null: what `*` has."""
    actor, body, path = authenticate(request), await body_of_request(request, _LIMIT), request.path_params
    functions = node_of(request).task_functions
    found = await functions.limit(actor, path["channel"], path["function"], body["maxRunSeconds"])
    return JSONResponse(to_json(found))


async def grant(request: Request) -> Response:
    """Set what a subject may do with a function, in place of what it was."""
    actor, body, path = authenticate(request), await body_of_request(request, _GRANT), request.path_params
    found = await node_of(request).task_functions.grant(
        actor, path["channel"], path["function"], path["kind"], path["subject"], parse_roles(body["roles"])
    )
    return JSONResponse(to_json(found))


async def revoke(request: Request) -> Response:
    """Remove an entry of a subject."""
    actor, path = authenticate(request), request.path_params
    functions = node_of(request).task_functions
    await functions.revoke(actor, path["channel"], path["function"], path["kind"], path["subject"])
    return Response(status_code=204)


_WHO = ("admin", "channel-owner")
_FUNCTION = text("add.1", pattern=r"^([A-Za-z0-9@_-]+(\.[A-Za-z0-9@_-]+)*|\*)$", maxLength=400)
_NAMED = text("add.1", pattern=r"^[A-Za-z0-9@_-]+(\.[A-Za-z0-9@_-]+)*$", maxLength=400)
_KIND = choice("user", *(kind for kind in KINDS if kind != "user"))
_SIDES = array(choice("requestTasks", "provideTasks"), minItems=1)
_SECONDS = whole(7200, 1, MAX_RUN_SECONDS)
_SHOWN = record(
    functionId=_FUNCTION,
    maxRunSeconds=nullable(_SECONDS),
    grants=array(record(kind=_KIND, subject=USER, roles=_SIDES)),
)
_ONE = {"channel": CHANNEL, "function": _NAMED, "kind": _KIND, "subject": USER}
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/channels/{{channel}}/functions",
        list_all,
        "Task functions of a channel for which something is set",
        _WHO,
        {200: record(functions=array(_SHOWN))},
        None,
        {"channel": CHANNEL},
        refusals=(404,),
    ),
    Operation(
        "PUT",
        f"{ROOT}/channels/{{channel}}/functions/{{function}}",
        limit,
        f"Set for how long a backend may keep a task of this function; `{EVERY}`: of all functions without a limit of "
        "their own. Null takes the limit away; without any it is 24 hours",
        _WHO,
        {200: _SHOWN},
        body_of(_LIMIT, maxRunSeconds=_SECONDS),
        {"channel": CHANNEL, "function": _FUNCTION},
        refusals=(404, 409),
    ),
    Operation(
        "PUT",
        f"{ROOT}/channels/{{channel}}/functions/{{function}}/grants/{{kind}}/{{subject}}",
        grant,
        "Let a node, a user or a client key request or provide a function, in place of what was set for it. As soon as "
        "a function has an entry with a role, only the subjects of such entries have that role for it",
        _WHO,
        {200: _SHOWN},
        body_of(_GRANT, roles=_SIDES),
        _ONE,
        refusals=(404, 409),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/channels/{{channel}}/functions/{{function}}/grants/{{kind}}/{{subject}}",
        revoke,
        "Remove an entry. Without any for a role, the roles in the channel decide again",
        _WHO,
        {204: None},
        None,
        _ONE,
        refusals=(404,),
    ),
)
