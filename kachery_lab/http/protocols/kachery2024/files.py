"""The three calls about files."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.core.work_tokens import is_work_token
from kachery_lab.errors import InvalidInput
from kachery_lab.http.bodies import optional, required
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.protocols.kachery2024.auth import asker, known, subject
from kachery_lab.http.protocols.kachery2024.translate import answer, body_of, hash_of, size_of, zone_of
from kachery_lab.http.public_url import file_url, upload_url
from kachery_lab.services.channel_files import ON_DEMAND_SECONDS, parse_object_key

_FILE = {"hashAlg": required(str), "hash": required(str), "zoneName": required(str)}
_INITIATE = {**_FILE, "size": required(float), "workToken": required(str), "label": optional(str)}
_FINALIZE = {**_FILE, "size": required(float), "objectKey": required(str)}


async def initiate_file_upload(request: Request) -> Response:
    """Announce an upload; `alreadyExists`, or where its bytes go. Racing uploads of one file never wait."""
    owner = subject(request, known(request))
    body = await body_of(request, "initiateFileUpload", _INITIATE)
    node, sha1, zone, size = node_of(request), hash_of(body), zone_of(body), size_of(body)
    if node.settings.check_work_tokens and not is_work_token(sha1, body["workToken"]):
        raise InvalidInput("Invalid work token")
    async with node.audit.refusals(str(owner), peer_of(request), "upload.announce", zone):
        made = await node.channel_files.announce(zone, sha1, size, owner, label=body.get("label", ""))
    return answer(
        "initiateFileUpload",
        alreadyExists=made.exists,
        alreadyPending=False,
        signedUploadUrl=None if made.ticket is None else upload_url(request, made.ticket),
        objectKey=made.object_key,
    )


async def finalize_file_upload(request: Request) -> Response:
    """Make an upload whose bytes came a file of its zone."""
    owner = subject(request, known(request))
    body = await body_of(request, "finalizeFileUpload", _FINALIZE)
    node, sha1, zone, size = node_of(request), hash_of(body), zone_of(body), size_of(body)
    if parse_object_key(body["objectKey"]) != (zone, sha1):
        raise InvalidInput("objectKey: it is not of this zone and hash")
    async with node.audit.refusals(str(owner), peer_of(request), "upload.finish", zone):
        await node.channel_files.finish(zone, sha1, owner, size)
    return answer("finalizeFileUpload", success=True)


async def find_file(request: Request) -> Response:
    """Where a file of a zone can be read; not found is no error."""
    principal = asker(request)
    reader = None if principal is None else subject(request, principal)
    body = await body_of(request, "findFile", _FILE)
    node, sha1, zone = node_of(request), hash_of(body), zone_of(body)
    async with node.audit.refusals(str(reader), peer_of(request), "file.find", zone):
        found = await node.channel_files.find(zone, sha1, reader, on_demand_wait=ON_DEMAND_SECONDS)
    if found is None:
        return answer("findFile", found=False)
    return answer(
        "findFile",
        found=True,
        url=file_url(request, found),
        size=found.size,
        bucketUri="",
        objectKey=found.object_key,
        cacheHit=False,
    )
