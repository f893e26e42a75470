"""`/r/{zone}`: a client asks for a file that somebody's directory has: one of the server's own, or of a provider's."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import ChannelName, Sha1, parse_fields, parse_whole_number
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden, InvalidInput, Unauthenticated
from kachery_lab.http.bodies import read_json
from kachery_lab.http.context import budget_of, node_of, peer_of
from kachery_lab.http.protocols.gateway2022.errors import note
from kachery_lab.services.resources import Progress
from kachery_lab.services.subjects import subject_of

MAX_BODY = 100_000
MAX_WAIT_MS = 10_000
_NONE: frozenset[str] = frozenset()
_REQUEST = (frozenset({"type", "resourceName", "zone", "request", "timeoutMsec"}), _NONE)
_FILE = (frozenset({"type", "uri", "timeoutMsec"}), _NONE)
_URI = re.compile(r"sha1://([0-9a-f]{40})(?:/[^?]*)?(?:\?.*)?", re.ASCII | re.DOTALL)


async def request_file(request: Request) -> Response:
    """Says how far a file is; `completed` means that the zone has it now. Waits as long as asked, at most 10 s."""
    node = node_of(request)
    zone = ChannelName.parse(request.path_params["zone"], "zone")
    note(request, zone=zone)
    node.client_requests.check_rate(f"address {peer_of(request)}")
    await _require_reader(request, zone)
    limit = min(MAX_BODY, node.settings.max_json)
    value = await read_json(request.scope, request.receive, budget_of(request), max_bytes=limit)
    sha1, wait_ms = _parse(value, zone)
    progress = await node.resources.request(zone, sha1, wait_ms / 1000)
    answer = {"type": "responseToClient", "response": {"type": "fileUpload", "status": _status(progress)}}
    return JSONResponse(answer, headers={"cache-control": "no-store"})


async def _require_reader(request: Request, zone: ChannelName) -> None:
    """Anybody in a public zone; elsewhere a token in the address whose user may read. Raises Unauthenticated,
    Forbidden, TooManyRequests."""
    node, token = node_of(request), request.path_params.get("token")
    if token is not None:
        principal = node.access.by_token(token, peer_of(request))
        subject = subject_of(principal, node.identity.node_id)
        async with node.audit.refusals(str(subject), principal.peer, "resource.request", zone):
            if not principal.covers(zone):
                raise Forbidden(f"the token does not reach the zone {zone}")
            node.roles.require(subject, zone, Role.REQUEST_FILES)
        return
    channel = node.data.channels.get(zone)
    if channel is None or not channel.public:
        raise Unauthenticated(
            f"the zone {zone} is not open to everybody, or does not exist",
            hint=f"For a private zone the resource's address is <server>/p/<token>/r/{zone}",
        )


def _parse(value: object, zone: ChannelName) -> tuple[Sha1, int]:
    fields: dict[str, Any] = parse_fields(value, "the request", *_REQUEST)
    if fields["type"] != "requestFromClient":
        raise InvalidInput("type: expected requestFromClient")
    if fields["resourceName"] != zone or fields["zone"] != zone:
        raise InvalidInput(
            f"the address is that of the zone {zone}, the request names another",
            hint="KACHERY_RESOURCE_URL must end in the name that KACHERY_ZONE has",
        )
    parse_whole_number(fields["timeoutMsec"], "timeoutMsec")
    wanted: dict[str, Any] = parse_fields(fields["request"], "request", *_FILE)
    if wanted["type"] != "fileUpload":
        raise InvalidInput("request.type: expected fileUpload")
    match = _URI.fullmatch(wanted["uri"]) if isinstance(wanted["uri"], str) else None
    if match is None:
        raise InvalidInput("request.uri: expected sha1:// and 40 hex digits")
    wait = parse_whole_number(wanted["timeoutMsec"], "request.timeoutMsec")
    return Sha1(match.group(1)), min(wait, MAX_WAIT_MS)


def _status(progress: Progress) -> dict[str, object]:
    status: dict[str, object] = {"status": progress.state}
    if progress.size is not None:
        status["size"] = progress.size
    if progress.done is not None:
        status["bytesUploaded"] = progress.done
    if progress.error is not None:
        status["error"] = progress.error
    return status
