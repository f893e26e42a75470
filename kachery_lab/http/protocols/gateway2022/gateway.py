"""`/api/gateway`: what kachery-cloud asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import ChannelName, Sha1, parse_whole_number
from kachery_lab.core.keys import PublicKey
from kachery_lab.core.objects import file_path
from kachery_lab.core.roles import Role
from kachery_lab.errors import InvalidInput, NotFound, Unauthenticated
from kachery_lab.http.bodies import read_json
from kachery_lab.http.context import budget_of, node_of, peer_of
from kachery_lab.http.protocols.gateway2022.auth import Asked, open_envelope, unregistered
from kachery_lab.http.protocols.gateway2022.errors import note
from kachery_lab.http.public_url import base_url, file_url, upload_url
from kachery_lab.services.channel_files import parse_object_key
from kachery_lab.services.client_requests import Answer

MAX_BODY = 100_000
NO_STORE = {"cache-control": "no-store"}


async def gateway(request: Request) -> Response:
    """One request of one of the published types."""
    limit = min(MAX_BODY, node_of(request).settings.max_json)
    value = await read_json(request.scope, request.receive, budget_of(request), max_bytes=limit)
    asked = open_envelope(request, value)
    return JSONResponse(await _ANSWERS[asked.kind](request, asked), headers=NO_STORE)


def _sha1(asked: Asked) -> Sha1:
    if asked.payload["hashAlg"] != "sha1":
        raise InvalidInput("hashAlg: expected sha1")
    return Sha1.parse(asked.payload["hash"], "hash")


async def _find_file(request: Request, asked: Asked) -> Answer:
    sha1, node = _sha1(asked), node_of(request)
    who = f"client:{asked.client_id}"
    async with node.audit.refusals(who, peer_of(request), "file.find", asked.zone):
        try:
            found = await node.channel_files.find(asked.zone, sha1, asked.subject)
        except Unauthenticated:
            raise unregistered(asked.client_id) from None
    if found is None:
        return {"type": "findFile", "found": False}
    return {
        "type": "findFile",
        "found": True,
        "url": file_url(request, found),
        "size": found.size,
        "bucketUri": "",
        "objectKey": found.object_key,
        "cacheHit": False,
    }


async def _initiate(request: Request, asked: Asked) -> Answer:
    subject, client_id, signature = asked.require_client()
    sha1, size = _sha1(asked), parse_whole_number(asked.payload["size"], "size")
    node = node_of(request)

    async def announce() -> Answer:
        announced = await node.channel_files.announce(asked.zone, sha1, size, subject)
        if announced.ticket is None:
            return {"type": "initiateFileUpload", "alreadyExists": True}
        return {
            "type": "initiateFileUpload",
            "alreadyExists": False,
            "objectKey": announced.object_key,
            "signedUploadUrl": upload_url(request, announced.ticket),
        }

    async with node.audit.refusals(f"client:{client_id}", peer_of(request), "upload.announce", asked.zone):
        # Before a kept answer is given again, too: a right may be gone meanwhile.
        node.roles.require(subject, asked.zone, Role.PROVIDE_FILES)
        return await node.client_requests.once(signature, asked.timestamp, announce)


async def _finalize(request: Request, asked: Asked) -> Answer:
    subject, client_id, signature = asked.require_client()
    sha1, size = _sha1(asked), parse_whole_number(asked.payload["size"], "size")
    zone, key_sha1 = parse_object_key(asked.payload["objectKey"])
    if key_sha1 != sha1 or (asked.zone_given and zone != asked.zone):
        raise InvalidInput("objectKey: it is that of another file or zone")
    # figurl's upload code leaves the zone out.
    note(request, zone=zone)
    node = node_of(request)

    async def finish() -> Answer:
        await node.channel_files.finish(zone, sha1, subject, size)
        return {"type": "finalizeFileUpload"}

    async with node.audit.refusals(f"client:{client_id}", peer_of(request), "upload.finish", zone):
        node.roles.require(subject, zone, Role.PROVIDE_FILES)
        return await node.client_requests.once(signature, asked.timestamp, finish)


async def _delete_file(request: Request, asked: Asked) -> Answer:
    _, client_id, signature = asked.require_client()
    sha1, node = _sha1(asked), node_of(request)
    async with node.audit.refusals(f"client:{client_id}", peer_of(request), "object.delete", asked.zone):
        owner = node.clients.as_owner(client_id, asked.zone, peer_of(request))

    async def delete() -> Answer:
        try:
            await node.channels.remove_object(owner, asked.zone, file_path(sha1))
        except NotFound:
            text = f"there is no file {sha1} in the zone {asked.zone}"
            return {"type": "deleteFile", "success": False, "error": text}
        return {"type": "deleteFile", "success": True}

    return await node.client_requests.once(signature, asked.timestamp, delete)


async def _get_client_info(request: Request, asked: Asked) -> Answer:
    client = node_of(request).clients.known(PublicKey.parse(asked.payload["clientId"], "clientId").hex)
    if client is None or client.user is None:
        return {"type": "getClientInfo", "found": False}
    shown = {
        "clientId": client.client_id,
        "ownerId": client.user,
        "timestampCreated": client.created_at,
        "label": client.label,
    }
    return {"type": "getClientInfo", "found": True, "client": shown}


async def _get_resource_info(request: Request, asked: Asked) -> Answer:
    """A resource has the name of its zone; it exists for those who may read there."""
    name, node = ChannelName.parse(asked.payload["resourceName"], "resourceName"), node_of(request)
    channel = node.data.channels.get(name)
    known = asked.subject is not None and bool(node.roles.roles(asked.subject, name) & Role.REQUEST_FILES)
    if channel is None or not node.resources.offers(name) or not (channel.public or known):
        return {"type": "getResourceInfo", "found": False}
    shown = {
        "resourceName": name,
        "ownerId": channel.owner,
        "timestampCreated": channel.created_at,
        "proxyUrl": base_url(request),
    }
    return {"type": "getResourceInfo", "found": True, "resource": shown}


async def _get_zone_info(request: Request, asked: Asked) -> Answer:
    """This server for every well-formed name, so it tells nothing."""
    ChannelName.parse(asked.payload["zoneName"], "zoneName")
    return {"type": "getZoneInfo", "found": True, "kacheryGatewayUrl": base_url(request)}


_ANSWERS: dict[str, Callable[[Request, Asked], Awaitable[Answer]]] = {
    "findFile": _find_file,
    "initiateFileUpload": _initiate,
    "finalizeFileUpload": _finalize,
    "deleteFile": _delete_file,
    "getClientInfo": _get_client_info,
    "getResourceInfo": _get_resource_info,
    "getZoneInfo": _get_zone_info,
}
