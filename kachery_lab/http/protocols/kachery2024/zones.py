"""Zones: channels under the name that kachery 2 knows them by."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.core.ids import ChannelName, UserName
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden, InvalidInput, NotFound
from kachery_lab.http.bodies import optional, require_fields, required
from kachery_lab.http.context import node_of
from kachery_lab.http.protocols.kachery2024.auth import asker, known, subject
from kachery_lab.http.protocols.kachery2024.translate import answer, body_of, zone_of
from kachery_lab.node import Node
from kachery_lab.services.access_data import Channel
from kachery_lab.services.principals import Principal

MOST_ROWS = 10_000
_ONE = {"zoneName": required(str)}
_SET = {
    **_ONE,
    "users": optional(list),
    "publicDownload": optional(bool),
    "publicUpload": optional(bool),
    "bucketUri": optional(str),
    "directory": optional(str),
    "credentials": optional(str),
}
_USER = {
    "userId": required(str),
    "admin": optional(bool),
    "uploadFiles": optional(bool),
    "downloadFiles": optional(bool),
}
_HERE = ("bucketUri", "directory", "credentials")
"""Where a zone's files lie upstream; here they lie on this server."""


def _manages(actor: Principal | None, channel: Channel) -> bool:
    if actor is None or actor.may("admin"):
        return actor is not None
    return actor.may("channel-owner") and actor.name == channel.owner and actor.covers(channel.name)


def _shown(node: Node, channel: Channel, actor: Principal | None) -> dict[str, Any]:
    """A zone; who may do what in it is for its owner and admins."""
    granted = {
        name: roles
        for (zone, kind, name), roles in node.data.authorizations.items()
        if zone == channel.name and kind == "user"
    }
    users = [
        {
            "userId": name,
            "admin": False,
            "uploadFiles": bool(roles & Role.PROVIDE_FILES),
            "downloadFiles": bool(roles & Role.REQUEST_FILES),
        }
        for name, roles in sorted(granted.items())
    ]
    return {
        "zoneName": channel.name,
        "userId": channel.owner,
        "users": users if _manages(actor, channel) else [],
        "publicDownload": channel.public,
        "publicUpload": False,
    }


def _visible(request: Request, channel: Channel, actor: Principal | None) -> bool:
    if channel.public or _manages(actor, channel):
        return True
    return actor is not None and bool(node_of(request).roles.roles(subject(request, actor), channel.name))


async def add_zone(request: Request) -> Response:
    """A new zone, private until its owner opens it."""
    actor, body = known(request), await body_of(request, "addZone", {**_ONE, "userId": required(str)})
    owner = UserName.parse(body["userId"], "userId")
    await node_of(request).channels.create(actor, zone_of(body), owner)
    return answer("addZone")


async def get_zone(request: Request) -> Response:
    """One zone. What the caller may not see does not exist for it."""
    node, actor, body = node_of(request), asker(request), await body_of(request, "getZone", _ONE)
    channel = node.data.channels.get(zone_of(body))
    if channel is None or not _visible(request, channel, actor):
        raise NotFound("Zone not found")
    return answer("getZone", zone=_shown(node, channel, actor))


async def get_zones(request: Request) -> Response:
    """The zones that the caller may see, or those of them that a user owns."""
    node, actor, body = node_of(request), asker(request), await body_of(request, "getZones", {"userId": optional(str)})
    found = [
        channel
        for channel in sorted(node.data.channels.values(), key=lambda one: one.name)
        if body.get("userId", channel.owner) == channel.owner and _visible(request, channel, actor)
    ]
    return answer("getZones", zones=[_shown(node, channel, actor) for channel in found])


async def set_zone_info(request: Request) -> Response:
    """Who may upload and download, and whether anybody may read."""
    node, actor, body = node_of(request), known(request), await body_of(request, "setZoneInfo", _SET)
    channel = _owned(node, actor, zone_of(body))
    for name in _HERE:
        if body.get(name):
            raise InvalidInput(f"{name}: the files of a zone lie on this server and nowhere else", hint="Leave it out")
    if body.get("publicUpload"):
        raise InvalidInput("publicUpload: nobody uploads here without authority", hint="Name the users who may upload")
    users = None if "users" not in body else _users(channel, body["users"])
    if "publicDownload" in body:
        await node.channels.update(actor, channel.name, {"public": body["publicDownload"]})
    if users is not None:
        await node.authorizations.set_users(actor, channel.name, Role.REQUEST_FILES | Role.PROVIDE_FILES, users)
    return answer("setZoneInfo")


def _owned(node: Node, actor: Principal, name: ChannelName) -> Channel:
    """Raises Forbidden for a channel that the caller does not manage, there or not."""
    try:
        return node.channels.require_owner(actor, name)
    except NotFound as error:
        raise Forbidden(f"only its owner may do this to the zone {name}") from error


def _users(channel: Channel, given: list[Any]) -> dict[UserName, Role]:
    found: dict[UserName, Role] = {}
    for value in given:
        if not isinstance(value, dict):
            raise InvalidInput("users: expected a list of objects")
        one = require_fields({name: part for name, part in value.items() if name in _USER}, _USER)
        user = UserName.parse(one["userId"], "userId")
        if one.get("admin") and user != channel.owner:
            raise InvalidInput(
                f"users: only the owner {channel.owner} is admin of this zone",
                hint="`kachery-lab channel update` gives it another owner",
            )
        found[user] = (Role.PROVIDE_FILES if one.get("uploadFiles") else Role.NONE) | (
            Role.REQUEST_FILES if one.get("downloadFiles") else Role.NONE
        )
    return found


async def delete_zone(request: Request) -> Response:
    """The zone goes, with the rights and references in it."""
    node, actor, body = node_of(request), known(request), await body_of(request, "deleteZone", _ONE)
    channel = _owned(node, actor, zone_of(body))
    await node.channels.remove(actor, channel.name)
    return answer("deleteZone")


async def usage(request: Request) -> Response:
    """What a user moved on each day; everything, for admins."""
    fields = {"zoneName": optional(str), "userId": optional(str)}
    node, actor, body = node_of(request), known(request), await body_of(request, "usage", fields)
    user = body.get("userId")
    if not (actor.kind == "user" and user == actor.name):
        actor.require("admin")
    zones = frozenset({zone_of(body)}) if "zoneName" in body else actor.channels
    rows = await node.usage.days(MOST_ROWS, channels=zones, principal=None if user is None else f"user:{user}")
    shown = [
        {
            "day": row.day,
            "zoneName": row.channel,
            "userId": row.principal.removeprefix("user:"),
            "numDownloads": row.downloads,
            "numUploads": row.uploads,
            "numBytesDownloaded": row.bytes_downloaded,
            "numBytesUploaded": row.bytes_uploaded,
        }
        for row in rows
    ]
    return answer("usage", userZoneDayUsages=shown)
