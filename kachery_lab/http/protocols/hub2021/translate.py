"""Between the hub's JSON of 2021 and our types. A field without a value is left out; null is never sent."""

from __future__ import annotations

from starlette.requests import Request

from kachery_lab.core.ids import ChannelName, NodeId
from kachery_lab.core.roles import role_flags
from kachery_lab.errors import NotFound
from kachery_lab.http.bodies import read_json
from kachery_lab.http.context import budget_of, node_of
from kachery_lab.http.public_url import hub_url
from kachery_lab.node import Node
from kachery_lab.services.access_data import Channel, Membership, NodeRecord
from kachery_lab.services.subjects import Subject

MAX_BODY = 10_000_000
SHORTEST, LONGEST = 3, 27
"""Names of channels that nodes of 2021 can join; the daemon hangs on longer ones."""


async def body_of(request: Request) -> object:
    """The JSON body. Raises InvalidJson, TooLarge, Unavailable."""
    limit = min(MAX_BODY, node_of(request).settings.max_json)
    return await read_json(request.scope, request.receive, budget_of(request), max_bytes=limit)


def joinable(channel: str) -> bool:
    """Whether nodes of 2021 can join a channel of this name."""
    return SHORTEST <= len(channel) <= LONGEST


def member_channel(node: Node, name: object, node_id: NodeId) -> Channel:
    """The channel, for an approved member of it. Raises InvalidInput, NotFound: to others it does not exist."""
    channel = ChannelName.parse(name)
    record, found = node.data.nodes.get(node_id), node.data.channels.get(channel)
    approved = record is not None and record.approved_at is not None
    if found is None or not approved or (channel, node_id) not in node.data.memberships or not joinable(channel):
        raise NotFound(
            f"there is no channel {str(channel)!r} for the node {node_id}",
            hint="A channel of this hub shows itself to its members only",
        )
    return found


def bucket_base_url(request: Request, channel: Channel, node_id: NodeId) -> str:
    """Where a node reads a channel's bucket. Of a private channel the address itself is the node's permission."""
    base = f"{hub_url(request)}/bucket"
    if channel.public:
        return base
    return f"{base}/~{node_of(request).uploads.capability(channel.name, Subject('node', node_id))}"


def authorization(node: Node, channel: str, node_id: NodeId) -> dict[str, object]:
    """What a node may do in a channel now."""
    permissions = role_flags(node.data.node_roles(channel, node_id))
    return {"channelName": channel, "nodeId": node_id, "permissions": permissions}


def node_config(request: Request, record: NodeRecord) -> dict[str, object]:
    """The answer's `nodeConfig`, a closed object."""
    node, node_id = node_of(request), NodeId(record.node_id)
    mine = [found for (name, member), found in node.data.memberships.items() if member == node_id and joinable(name)]
    config: dict[str, object] = {
        "nodeId": node_id,
        "ownerId": record.owner,
        "channelMemberships": [_membership(request, found) for found in sorted(mine, key=lambda one: one.channel)],
    }
    if record.reported_at is not None:
        config["lastNodeReport"] = {"nodeId": node_id, "ownerId": record.owner, "nodeLabel": record.label}
        config["lastNodeReportTimestamp"] = record.reported_at
    return config


def _membership(request: Request, membership: Membership) -> dict[str, object]:
    node, node_id = node_of(request), NodeId(membership.node_id)
    channel = node.data.channel(membership.channel)
    return {
        "nodeId": node_id,
        "channelName": channel.name,
        # The daemon discards the whole answer without it, and ignores what is in it.
        "roles": {},
        "authorization": authorization(node, channel.name, node_id),
        "channelResourceId": channel.resource_id,
        "channelBucketBaseUrl": bucket_base_url(request, channel, node_id),
    }


def channel_config(request: Request, channel: Channel, node_id: NodeId) -> dict[str, object]:
    """The answer's `channelConfig`: no secrets, and no other nodes than the one that asks."""
    return {
        "channelName": channel.name,
        "ownerId": channel.owner,
        "bitwooderResourceId": channel.resource_id,
        "bucketBaseUrl": bucket_base_url(request, channel, node_id),
        "authorizedNodes": [authorization(node_of(request), channel.name, node_id)],
    }
