"""Mutables."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.http.bodies import optional, require_fields, required
from kachery_lab.http.context import node_of
from kachery_lab.http.protocols.daemon2021.auth import browser_class
from kachery_lab.http.protocols.daemon2021.translate import Answer, body_of, fields_of
from kachery_lab.services.mutables import OTHER_CODES

_KEY = {"key": required(object)}
_SET = {"key": required(object), "value": required(object), "update": optional(bool)}


async def get(request: Request) -> Response:
    """The value of a key; `""` when not found."""
    principal = browser_class(request)
    fields = await fields_of(request, _KEY)
    found, value = await node_of(request).mutables.get(fields["key"], principal)
    return Answer({"success": True, "found": found, "value": value if found else ""})


async def set_(request: Request) -> Response:
    """`success` is False only when `update` is off and the key exists."""
    principal = browser_class(request)
    node = node_of(request)
    async with body_of(request) as body:
        fields = require_fields(body, _SET)
        done = await node.mutables.set(fields["key"], fields["value"], principal, update=fields.get("update", True))
        if done and fields["key"] == OTHER_CODES:
            node.access.set_other_codes(fields["value"])
    return Answer({"success": done})


async def delete(request: Request) -> Response:
    """`success` says whether the key existed."""
    principal = browser_class(request)
    node = node_of(request)
    fields = await fields_of(request, _KEY)
    done = await node.mutables.delete(fields["key"], principal)
    if done and fields["key"] == OTHER_CODES:
        node.access.set_other_codes(None)
    return Answer({"success": done})
