"""What this server is."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab import __version__
from kachery_lab.http.context import CODE_HEADER, authenticate, bearer, node_of
from kachery_lab.http.describe import Operation, nullable, text, whole


async def show(request: Request) -> Response:
    """Open to anyone; a credential that does not exist is refused, one of a client or an admin also shows the storage
    directory."""
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
        caller = authenticate(request)
        if caller.may("client") or caller.may("admin"):
            answer["storageDir"] = str(node.settings.advertised)
            answer["volume"] = node.volume_id
    return JSONResponse(answer)


_FIELDS = {
    "name": text("kachery-lab"),
    "version": text(__version__),
    "nodeId": text("7d0e" * 16),
    "label": text("rig-1"),
    "publicUrl": nullable(text("https://lab.example.org")),
    "durability": text("a 2xx answer survives a process kill and a power cut"),
    "maxJson": whole(100_000_000),
    "storageDir": text("/data/kachery-storage"),
    "volume": text("0c1d2e3f"),
}
_CLOSED = ("storageDir", "volume")
OPERATIONS = (
    Operation(
        "GET",
        "/api/v1/info",
        show,
        "What this server is. A caller who may see the storage also learns where it is",
        (),
        {
            200: {
                "type": "object",
                "required": [name for name in _FIELDS if name not in _CLOSED],
                "properties": _FIELDS,
            }
        },
        refusals=(401, 429),
    ),
)
