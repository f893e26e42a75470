"""What this server is."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab import __version__
from kachery_lab.http.context import CODE_HEADER, authenticate, bearer, node_of


async def show(request: Request) -> Response:
    """Open to anyone; a caller with a credential (a wrong one is refused) also learns the storage directory."""
    node = node_of(request)
    answer: dict[str, object] = {
        "name": "kachery-lab",
        "version": __version__,
        "nodeId": node.identity.node_id,
        "label": node.identity.label,
        "publicUrl": node.settings.public_url,
        "durability": "a 2xx answer survives a process kill and a power cut",
        "maxJson": node.settings.max_json,
    }
    if bearer(request) or request.headers.get(CODE_HEADER):
        authenticate(request).require("client", "admin")
        answer["storageDir"] = str(node.settings.advertised)
        answer["volume"] = node.volume_id
    return JSONResponse(answer)
