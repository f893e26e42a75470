"""Between the daemon's JSON and our types."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from kachery_lab.core.ids import FeedId, SubfeedHash, parse_fields, parse_whole_number
from kachery_lab.errors import InvalidInput
from kachery_lab.http.bodies import Field, json_body, require_fields
from kachery_lab.http.context import budget_of, node_of
from kachery_lab.services.blobs import StoredBlob
from kachery_lab.services.watches import Watch

JSON_TYPE = "application/json; charset=utf-8"
_WATCH = frozenset({"feedId", "subfeedHash", "position", "channelName"})


class Answer(JSONResponse):
    """A JSON answer with the content type of the older daemon."""

    media_type = JSON_TYPE


@asynccontextmanager
async def body_of(request: Request) -> AsyncIterator[object]:
    """The JSON body: an object or an array. With another content type, or without a body, an empty object."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    empty = request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
    if kind != "application/json" or empty:
        yield {}
        return
    limit = node_of(request).settings.max_json
    async with json_body(request.scope, request.receive, budget_of(request), max_bytes=limit) as value:
        if not isinstance(value, dict | list):
            raise InvalidInput("the body: expected a JSON object")
        yield value


async def fields_of(request: Request, spec: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of the body, which from then on no longer counts as JSON in flight. Raises what `require_fields`
    raises."""
    async with body_of(request) as body:
        return require_fields(body, spec)


def stored(blob: StoredBlob) -> Answer:
    """Answer of `/store`, `/storeFile` and `/linkFile`."""
    return Answer({"success": True, "error": None, "sha1": blob.sha1, "manifestSha1": blob.manifest_sha1})


def frame(message: Mapping[str, object]) -> bytes:
    """One message in json-socket framing: decimal byte length, `#`, compact JSON."""
    text = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()
    return b"%d#%s" % (len(text), text)


def watches(value: object) -> tuple[dict[str, Watch], dict[str, str]]:
    """The subfeeds of a watch request, and their channels, by name. Raises InvalidInput."""
    if not isinstance(value, dict):
        raise InvalidInput("subfeedWatches: expected an object")
    found, channels = {}, {}
    for name, item in value.items():
        where = f"subfeedWatches.{name[:80]}"
        if not name:
            raise InvalidInput("subfeedWatches: a name must not be empty")
        fields = parse_fields(item, where, _WATCH, frozenset())
        if not isinstance(fields["channelName"], str):
            raise InvalidInput(f"{where}.channelName: expected a text")
        channels[name] = fields["channelName"]
        found[name] = Watch(
            FeedId.parse(fields["feedId"], f"{where}.feedId"),
            SubfeedHash.parse(fields["subfeedHash"], f"{where}.subfeedHash"),
            parse_whole_number(fields["position"], f"{where}.position"),
        )
    return found, channels
