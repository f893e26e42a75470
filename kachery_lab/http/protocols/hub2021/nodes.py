"""`/api/kacheryNode`: what nodes ask, signed with their keys."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import NodeId, NodeLabel, UserName
from kachery_lab.errors import Forbidden
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.protocols.hub2021.auth import is_registered, open_envelope
from kachery_lab.http.protocols.hub2021.translate import body_of, channel_config, member_channel, node_config

NO_STORE = {"cache-control": "no-store"}


async def kachery_node(request: Request) -> Response:
    """A signed request. It carries neither time nor nonce: a repeat gets the rights of its moment and nothing more."""
    node_id, fields = open_envelope(await body_of(request))
    kind = fields["type"]
    if kind == "getNodeConfig":
        answer = _get_node_config(request, node_id, fields)
    elif kind == "getChannelConfig":
        channel = member_channel(node_of(request), fields["channelName"], node_id)
        answer = {"found": True, "channelConfig": channel_config(request, channel, node_id)}
    elif kind == "getBitwooderCertForChannel":
        answer = await _get_certificate(request, node_id, fields)
    else:
        answer = await _report(request, node_id, fields)
    return JSONResponse(answer, headers=NO_STORE)


def _get_node_config(request: Request, node_id: NodeId, fields: dict[str, str]) -> dict[str, object]:
    node = node_of(request)
    if not is_registered(node, node_id, fields["ownerId"]):
        return {"found": False}
    return {"found": True, "nodeConfig": node_config(request, node.data.nodes[node_id])}


async def _get_certificate(request: Request, node_id: NodeId, fields: dict[str, str]) -> dict[str, object]:
    node = node_of(request)
    channel = member_channel(node, fields["channelName"], node_id)
    async with node.audit.refusals(f"node:{node_id}", peer_of(request), "certificate.issue", channel.name):
        if not is_registered(node, node_id, fields["ownerId"]):
            raise Forbidden(f"the node {node_id} is registered for another owner")
        certificate, key = node.certificates.issue(channel, node_id)
    return {"cert": certificate, "key": key}


async def _report(request: Request, node_id: NodeId, fields: dict[str, str]) -> dict[str, object]:
    owner = UserName.parse(fields["ownerId"], "ownerId")
    label = NodeLabel.parse(fields["nodeLabel"], "nodeLabel")
    return {"success": True, "found": await node_of(request).nodes.report(node_id, owner, label)}
