"""Memberships: what the owners of nodes ask for in channels."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.roles import Role, parse_roles, role_names
from kachery_lab.errors import InvalidInput
from kachery_lab.http.admin.nodes import node_id_of
from kachery_lab.http.admin.room import ASKED_ROLES, CHANNEL, NODE, ROLES, ROOT, TIME, body_of_request
from kachery_lab.http.bodies import optional
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, choice, flag, record, text
from kachery_lab.node import Node
from kachery_lab.services.access_data import Membership

_JOIN = {
    "asked": optional(list),
    "offer": optional(str),
    "publicLocal": optional(bool),
    "passcodes": optional(list),
}


def to_json(node: Node, found: Membership) -> dict[str, Any]:
    """A membership as shown: what is asked, what the channel grants, and what is in force."""
    return {
        "channel": found.channel,
        "nodeId": found.node_id,
        "asked": role_names(found.asked),
        "granted": role_names(node.data.node_grant(found.channel, found.node_id)),
        "effective": role_names(node.data.node_roles(found.channel, found.node_id)),
        "offer": found.offer,
        "createdAt": found.created_at,
    }


async def of_channel(request: Request) -> Response:
    """For the channel's owner."""
    actor, node = authenticate(request), node_of(request)
    found = node.authorizations.memberships(actor, request.path_params["channel"], None)
    return JSONResponse({"memberships": [to_json(node, one) for one in found]})


async def of_node(request: Request) -> Response:
    """For the node's owner."""
    actor, node = authenticate(request), node_of(request)
    found = node.authorizations.memberships(actor, None, node_id_of(request))
    return JSONResponse({"memberships": [to_json(node, one) for one in found]})


async def join(request: Request) -> Response:
    """Ask for a part in a channel, in place of an older request."""
    actor, node_id, body = authenticate(request), node_id_of(request), await body_of_request(request, _JOIN)
    shown = body.get("passcodes", [])
    if not all(isinstance(passcode, str) for passcode in shown):
        raise InvalidInput("passcodes: expected a list of texts")
    node = node_of(request)
    found = await node.authorizations.join(
        actor,
        request.path_params["channel"],
        node_id,
        parse_roles(body["asked"], "asked") if "asked" in body else Role.ALL,
        offer=body.get("offer"),
        public_local=body.get("publicLocal", False),
        shown=shown,
    )
    return JSONResponse(to_json(node, found))


async def leave(request: Request) -> Response:
    """Give up a membership."""
    actor = authenticate(request)
    await node_of(request).authorizations.leave(actor, request.path_params["channel"], node_id_of(request))
    return Response(status_code=204)


_WHO = ("admin", "channel-owner")
_SHOWN = record(
    channel=CHANNEL,
    nodeId=NODE,
    asked=ROLES,
    granted=ROLES,
    effective=ROLES,
    offer=choice("local", "uploaded"),
    createdAt=TIME,
)
_MANY = {200: record(memberships=array(_SHOWN))}
_ONE = {"channel": CHANNEL, "nodeId": NODE}
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/channels/{{channel}}/memberships",
        of_channel,
        "Members of a channel, for its owner",
        _WHO,
        _MANY,
        None,
        {"channel": CHANNEL},
        refusals=(404,),
    ),
    Operation(
        "GET",
        f"{ROOT}/nodes/{{nodeId}}/memberships",
        of_node,
        "Channels of a node, for its owner",
        _WHO,
        _MANY,
        None,
        {"nodeId": NODE},
        refusals=(404,),
    ),
    Operation(
        "PUT",
        f"{ROOT}/channels/{{channel}}/memberships/{{nodeId}}",
        join,
        "Let a node of one's own ask for roles in a channel (without `asked`: all six), in place of what it asked "
        "before. It gives only what the channel's owner grants",
        _WHO,
        {200: _SHOWN},
        body_of(
            _JOIN,
            asked=ASKED_ROLES,
            offer=choice("local", "uploaded"),
            publicLocal=flag(False),
            passcodes=array(text("pass-correct-horse", minLength=6, maxLength=40)),
        ),
        _ONE,
        refusals=(404, 409),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/channels/{{channel}}/memberships/{{nodeId}}",
        leave,
        "End a membership; the node's owner and the channel's may",
        _WHO,
        {204: None},
        None,
        _ONE,
        refusals=(404,),
    ),
)
