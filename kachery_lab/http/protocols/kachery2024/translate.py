"""Between the JSON of kachery 2 and our types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import ChannelName, Sha1
from kachery_lab.errors import InvalidInput
from kachery_lab.http.bodies import Field, read_json, require_fields
from kachery_lab.http.context import budget_of, node_of

MAX_BODY = 1_000_000
NO_STORE = {"cache-control": "no-store"}


async def body_of(request: Request, kind: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The known fields of a request `{kind}Request`; others are ignored. Raises InvalidInput that names the field,
    InvalidJson, TooLarge, Unavailable."""
    limit = min(MAX_BODY, node_of(request).settings.max_json)
    value = await read_json(request.scope, request.receive, budget_of(request), max_bytes=limit)
    if not isinstance(value, dict) or value.get("type") != f"{kind}Request":
        raise InvalidInput(f"expected a JSON object with type '{kind}Request'")
    return require_fields({name: found for name, found in value.items() if name in fields}, fields)


def answer(kind: str, **fields: Any) -> Response:
    """The response of a request `kind`; a field without a value is left out."""
    shown = {name: found for name, found in fields.items() if found is not None}
    return JSONResponse({"type": f"{kind}Response", **shown}, headers=NO_STORE)


def hash_of(body: dict[str, Any]) -> Sha1:
    """Raises InvalidInput."""
    if body["hashAlg"] != "sha1":
        raise InvalidInput("hashAlg: expected 'sha1'")
    return Sha1.parse(body["hash"], "hash")


def zone_of(body: dict[str, Any]) -> ChannelName:
    """The channel of a zone. Raises InvalidInput."""
    return ChannelName.parse(body["zoneName"], "zoneName")


def size_of(body: dict[str, Any]) -> int:
    """A whole number of bytes; JavaScript writes 2 and Python may write 2.0. Raises InvalidInput."""
    size = body["size"]
    if size < 0 or size != size // 1 or size > 2**53:
        raise InvalidInput("size: expected a whole number of bytes, not negative")
    return int(size)
