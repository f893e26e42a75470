"""Channels."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import ChannelName, UserName
from kachery_lab.http.admin.room import CHANNEL, ROOT, TIME, USER, body_of_request
from kachery_lab.http.bodies import optional, required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, flag, nullable, record, text, whole
from kachery_lab.services.access_data import Channel

_NAMES = {
    "owner": "owner",
    "public": "public",
    "publicLocal": "public_local",
    "maxBytes": "max_bytes",
    "maxObjectBytes": "max_object_bytes",
    "maxObjects": "max_objects",
    "retentionDays": "retention_days",
}
_LIMITS = {name: optional(int, nullable=True) for name in ("maxBytes", "maxObjectBytes", "maxObjects", "retentionDays")}
_CREATE = {"name": required(str), "owner": optional(str), "public": optional(bool), **_LIMITS}
_CHANGE = {"owner": optional(str), "public": optional(bool), "publicLocal": optional(bool), **_LIMITS}


def to_json(channel: Channel) -> dict[str, Any]:
    """A channel as shown."""
    values = {wire: getattr(channel, name) for wire, name in _NAMES.items()}
    return {"name": channel.name, **values, "resourceId": channel.resource_id, "createdAt": channel.created_at}


def _values(body: dict[str, Any]) -> dict[str, Any]:
    values = {_NAMES[wire]: value for wire, value in body.items()}
    if "owner" in values:
        values["owner"] = UserName.parse(values["owner"], "owner")
    return values


async def list_all(request: Request) -> Response:
    """All channels for an admin, their own for others."""
    actor = authenticate(request)
    return JSONResponse({"channels": [to_json(channel) for channel in node_of(request).channels.list(actor)]})


async def show(request: Request) -> Response:
    """One channel, how many bytes its objects have, and who provides files on demand now."""
    actor, node = authenticate(request), node_of(request)
    channel = node.channels.require_owner(actor, request.path_params["channel"])
    used, provider = await node.channels.used(actor, channel.name), node.resource_providers.of(channel.name)
    now = {"usedBytes": used, "resourceProvider": None if provider is None else str(provider)}
    return JSONResponse({**to_json(channel), **now})


async def create(request: Request) -> Response:
    """A new channel."""
    actor, body = authenticate(request), await body_of_request(request, _CREATE)
    name = ChannelName.parse(body.pop("name"), "name")
    return JSONResponse(to_json(await node_of(request).channels.create(actor, name, **_values(body))), 201)


async def change(request: Request) -> Response:
    """Other owner, other limits, public or not."""
    actor, body = authenticate(request), await body_of_request(request, _CHANGE)
    channels, name = node_of(request).channels, request.path_params["channel"]
    return JSONResponse(to_json(await channels.update(actor, name, _values(body))))


async def remove(request: Request) -> Response:
    """The channel goes, with everything that is only about it."""
    await node_of(request).channels.remove(authenticate(request), request.path_params["channel"])
    return Response(status_code=204)


_WHO = ("admin", "channel-owner")
_BYTES = whole(2_000_000_000_000, 1)
_OBJECTS = whole(1_000_000, 1)
_DAYS = whole(365, 1, 36_500)
_FIELDS = {
    "name": CHANNEL,
    "owner": USER,
    "public": flag(False),
    "publicLocal": flag(False),
    "maxBytes": nullable(_BYTES),
    "maxObjectBytes": nullable(_BYTES),
    "maxObjects": nullable(_OBJECTS),
    "retentionDays": nullable(_DAYS),
    "resourceId": text("7d0e" * 16),
    "createdAt": TIME,
}
_SHOWN = record(**_FIELDS)
_ONE = {"channel": CHANNEL}
_CHANGES = {
    "owner": USER,
    "public": flag(False),
    "maxBytes": _BYTES,
    "maxObjectBytes": _BYTES,
    "maxObjects": _OBJECTS,
    "retentionDays": _DAYS,
}
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/channels",
        list_all,
        "All channels for an admin, their own for others",
        _WHO,
        {200: record(channels=array(_SHOWN))},
    ),
    Operation(
        "POST",
        f"{ROOT}/channels",
        create,
        "Make a channel, private unless said. Only an admin may name another owner than themselves",
        _WHO,
        {201: _SHOWN},
        body_of(_CREATE, name={**CHANNEL, "examples": ["tracking"]}, **_CHANGES),
        refusals=(409,),
    ),
    Operation(
        "GET",
        f"{ROOT}/channels/{{channel}}",
        show,
        "One channel, how many bytes its objects have, and whose program provides files on demand now",
        _WHO,
        {200: record(**_FIELDS, usedBytes=whole(12345), resourceProvider=nullable(text("user:ann at 10.0.0.7")))},
        None,
        _ONE,
        refusals=(404,),
    ),
    Operation(
        "PATCH",
        f"{ROOT}/channels/{{channel}}",
        change,
        "Change a channel. Making it public drops what was only offered on demand and turns `local` offers of its "
        "members into `uploaded`, unless `publicLocal` is set with it. A limit of null is none",
        _WHO,
        {200: _SHOWN},
        body_of(_CHANGE, publicLocal=flag(False), **_CHANGES),
        _ONE,
        refusals=(404, 409),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/channels/{{channel}}",
        remove,
        "Remove a channel with memberships, rights and references; blobs that something else refers to stay",
        _WHO,
        {204: None},
        None,
        _ONE,
        refusals=(404, 409),
    ),
)
