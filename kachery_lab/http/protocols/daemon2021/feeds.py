"""Feeds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kachery_lab.core.ids import FeedId, FeedName, RequestId, SubfeedHash, parse_whole_number
from kachery_lab.errors import InvalidInput
from kachery_lab.http.bodies import optional, require_fields, required
from kachery_lab.http.context import node_of
from kachery_lab.http.protocols.daemon2021.auth import browser_class, local_class
from kachery_lab.http.protocols.daemon2021.translate import JSON_TYPE, Answer, body_of, fields_of, watches
from kachery_lab.services.watches import Span, WatchService

_CREATE = {"feedName": optional(str)}
_FEED = {"feedId": required(str)}
_NAME = {"feedName": required(str)}
_SUBFEED = {"feedId": required(str), "subfeedHash": required(str)}
_APPEND = {**_SUBFEED, "messages": required(list), "expectedPosition": optional(float), "requestId": optional(str)}
_WATCH = {
    "subfeedWatches": required(dict),
    "waitMsec": required(float),
    "maxNumMessages": optional(float),
    "signed": optional(bool),
}


async def create_feed(request: Request) -> Response:
    """A new feed, writeable here."""
    local_class(request)
    fields = await fields_of(request, _CREATE)
    name = FeedName.parse(fields["feedName"], "feedName") if "feedName" in fields else None
    return Answer({"success": True, "feedId": await node_of(request).feeds.create(name)})


async def delete_feed(request: Request) -> Response:
    """Gone, with its messages; also true of what was never here."""
    local_class(request)
    fields = await fields_of(request, _FEED)
    await node_of(request).feeds.delete(FeedId.parse(fields["feedId"], "feedId"))
    return Answer({"success": True})


async def get_feed_id(request: Request) -> Response:
    """The feed of a name; an unknown name is an answer, not an error."""
    browser_class(request)
    fields = await fields_of(request, _NAME)
    feed_id = await node_of(request).feeds.id_for_name(FeedName.parse(fields["feedName"], "feedName"))
    return Answer({"success": feed_id is not None, "feedId": feed_id})


async def get_feed_info(request: Request) -> Response:
    """Whether messages can be appended here; False for unknown feeds."""
    browser_class(request)
    fields = await fields_of(request, _FEED)
    writeable = await node_of(request).feeds.is_writeable(FeedId.parse(fields["feedId"], "feedId"))
    return Answer({"success": True, "isWriteable": writeable})


async def append_messages(request: Request) -> Response:
    """All messages or none. `position` is the number of the first one."""
    # Before the body: what is not taken need not be read.
    with node_of(request).appends.take(browser_class(request).share):
        return await _append(request)


async def _append(request: Request) -> Response:
    async with body_of(request) as body:
        fields = require_fields(body, _APPEND)
        expected = None
        if "expectedPosition" in fields:
            expected = parse_whole_number(fields["expectedPosition"], "expectedPosition")
        appended = await node_of(request).feeds.append(
            FeedId.parse(fields["feedId"], "feedId"),
            SubfeedHash.parse(fields["subfeedHash"], "subfeedHash"),
            fields["messages"],
            expected_position=expected,
            request_id=RequestId.parse(fields["requestId"], "requestId") if "requestId" in fields else None,
        )
    return Answer({"success": True, "position": appended.position})


async def get_num_local_messages(request: Request) -> Response:
    """0 for what was never mentioned."""
    browser_class(request)
    fields = await fields_of(request, _SUBFEED)
    count = await node_of(request).watches.num_messages(
        FeedId.parse(fields["feedId"], "feedId"), SubfeedHash.parse(fields["subfeedHash"], "subfeedHash")
    )
    return Answer({"success": True, "numMessages": count})


async def watch_for_new_messages(request: Request) -> Response:
    """Long poll. At once: only the watches with messages; after waiting: all names, empty lists included. `problems` is
    there only when a channel gave what was refused: a text by watch name."""
    caller = browser_class(request)
    async with body_of(request) as body:
        fields = require_fields(body, _WATCH)
        wanted, channels = watches(fields["subfeedWatches"])
    if fields["waitMsec"] < 0:
        raise InvalidInput("waitMsec: expected a number of milliseconds from 0")
    service = node_of(request).watches
    found, waited, problems = await node_of(request).feed_requests.watch(
        wanted,
        channels,
        caller,
        wait_ms=fields["waitMsec"],
        max_messages=parse_whole_number(fields.get("maxNumMessages", 0), "maxNumMessages"),
    )
    spans: dict[str, Span | None] = {name: found.get(name) for name in wanted} if waited else dict(found)
    return StreamingResponse(_messages(service, spans, fields.get("signed", False), problems), media_type=JSON_TYPE)


async def _messages(
    service: WatchService, spans: Mapping[str, Span | None], signed: bool, problems: Mapping[str, str]
) -> AsyncIterator[str]:
    """The answer, page by page: memory does not grow with a feed."""
    yield '{"success":true,"messages":{'
    for number, (name, span) in enumerate(spans.items()):
        yield f"{',' if number else ''}{json.dumps(name)}:["
        if span is not None:
            separator = ""
            async for page in service.read(span, signed=signed):
                yield separator + ",".join(page)
                separator = ","
        yield "]"
    yield "}" + (f',"problems":{json.dumps(problems)}' if problems else "") + "}"
