"""Nodes that registered here."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import NodeId, NodeLabel, UserName
from kachery_lab.errors import InvalidInput
from kachery_lab.http.admin.room import LABEL, NODE, OTHER_NODE_ID, ROOT, TIME, USER, body_of_request
from kachery_lab.http.bodies import optional, required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, flag, nullable, record
from kachery_lab.node import Node
from kachery_lab.services.access_data import NodeRecord

_ADD = {"nodeId": required(str), "label": required(str), "owner": optional(str)}
_CHANGE = {"approved": optional(bool), "label": optional(str), "owner": optional(str)}


def to_json(hub: Node, found: NodeRecord) -> dict[str, Any]:
    """A node as shown. `connectedAt`: since when it hears the bands of this hub's channels; null while it does not."""
    return {
        "nodeId": found.node_id,
        "owner": found.owner,
        "label": found.label,
        "createdAt": found.created_at,
        "approvedAt": found.approved_at,
        "reportedAt": found.reported_at,
        "connectedAt": hub.hub_bands.connected_at(NodeId(found.node_id)),
    }


def node_id_of(request: Request) -> NodeId:
    """The node that the path names. Raises InvalidInput."""
    return NodeId.parse(request.path_params["nodeId"], "nodeId")


async def list_all(request: Request) -> Response:
    """All nodes for an admin, their own for others."""
    actor, hub = authenticate(request), node_of(request)
    return JSONResponse({"nodes": [to_json(hub, node) for node in hub.nodes.list(actor)]})


async def show(request: Request) -> Response:
    """One node."""
    actor, hub = authenticate(request), node_of(request)
    return JSONResponse(to_json(hub, hub.nodes.require_speaker(actor, node_id_of(request))))


async def add(request: Request) -> Response:
    """Register a node, approved."""
    actor, body = authenticate(request), await body_of_request(request, _ADD)
    node_id, label = NodeId.parse(body["nodeId"], "nodeId"), NodeLabel.parse(body["label"], "label")
    owner = UserName.parse(body.get("owner", actor.owner_name), "owner")
    hub = node_of(request)
    return JSONResponse(to_json(hub, await hub.nodes.add(actor, node_id, owner, label)), 201)


async def change(request: Request) -> Response:
    """Approve a node, or give it another label or owner."""
    actor, node_id, body = authenticate(request), node_id_of(request), await body_of_request(request, _CHANGE)
    owner = UserName.parse(body["owner"], "owner") if "owner" in body else None
    label = NodeLabel.parse(body["label"], "label") if "label" in body else None
    hub = node_of(request)
    nodes = hub.nodes
    if not body.get("approved", True):
        raise InvalidInput("approved: a node is let in by true; to keep it out, remove it")
    if "approved" in body:
        await nodes.approve(actor, node_id)
    if owner is not None or label is not None or not body:
        await nodes.update(actor, node_id, owner, label)
    return JSONResponse(to_json(hub, nodes.require_speaker(actor, node_id)))


async def remove(request: Request) -> Response:
    """The node, with its memberships and authorizations, goes."""
    await node_of(request).nodes.remove(authenticate(request), node_id_of(request))
    return Response(status_code=204)


_WHO = ("admin", "channel-owner")
_SHOWN = record(
    nodeId=NODE,
    owner=USER,
    label=LABEL,
    createdAt=TIME,
    approvedAt=nullable(TIME),
    reportedAt=nullable(TIME),
    connectedAt=nullable(TIME),
)
_ONE = {"nodeId": NODE}
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/nodes",
        list_all,
        "All nodes for an admin, their own for others",
        _WHO,
        {200: record(nodes=array(_SHOWN))},
    ),
    Operation(
        "POST",
        f"{ROOT}/nodes",
        add,
        "Register a node, approved. Only an admin may name another owner than themselves",
        _WHO,
        {201: _SHOWN},
        body_of(_ADD, nodeId={**NODE, "examples": [OTHER_NODE_ID]}, label=LABEL, owner=USER),
        refusals=(409,),
    ),
    Operation("GET", f"{ROOT}/nodes/{{nodeId}}", show, "One node", _WHO, {200: _SHOWN}, None, _ONE, refusals=(404,)),
    Operation(
        "PATCH",
        f"{ROOT}/nodes/{{nodeId}}",
        change,
        "Change the label; an admin may also approve a node that waits (`approved: true`) and give it another owner",
        _WHO,
        {200: _SHOWN},
        {**body_of(_CHANGE, approved=flag(True), label=LABEL, owner=USER), "examples": [{"label": "rig-2"}]},
        _ONE,
        refusals=(404, 409),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/nodes/{{nodeId}}",
        remove,
        "Remove a node with its memberships and authorizations; its blobs stay",
        _WHO,
        {204: None},
        None,
        _ONE,
        refusals=(404, 409),
    ),
)
