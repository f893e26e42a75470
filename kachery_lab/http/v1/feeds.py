"""Where other nodes put messages of feeds."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import ChannelName, FeedId, SubfeedHash, parse_whole_number
from kachery_lab.core.objects import ObjectPath, subfeed_folder
from kachery_lab.errors import InvalidInput, NotFound
from kachery_lab.http.bodies import require_fields, required
from kachery_lab.http.context import node_of
from kachery_lab.http.describe import Operation, body_of, record, text, whole
from kachery_lab.http.public_url import hub_url
from kachery_lab.http.v1.nodes import signed

MAX_MESSAGES = 10_000
_UPLOAD = {
    "feedId": required(str),
    "subfeedHash": required(str),
    "start": required(int),
    "end": required(int),
    "size": required(int),
}


async def upload(request: Request) -> Response:
    """An upload URL for messages `start` to `end` (exclusive) of a subfeed, together `size` bytes of JSON.

    Needs provideFeeds.
    """
    subject, body = await signed(request)
    node = node_of(request)
    node.node_requests.require_approved(subject)
    channel = ChannelName.parse(request.path_params["channel"], "channel")
    fields = require_fields(body, _UPLOAD)
    feed_id, subfeed_hash = (
        FeedId.parse(fields["feedId"], "feedId"),
        SubfeedHash.parse(fields["subfeedHash"], "subfeedHash"),
    )
    start, end, size = (parse_whole_number(fields[name], name) for name in ("start", "end", "size"))
    if not 0 <= start < end <= start + MAX_MESSAGES or size < 0:
        raise InvalidInput(f"start, end, size: expected 1 to {MAX_MESSAGES} messages and a number of bytes")
    if (channel, subject.name) not in node.data.memberships:
        raise NotFound(f"there is no channel {channel!r} of this node")
    path = ObjectPath.parse(f"{subfeed_folder(feed_id, subfeed_hash)}/{start}-{end}")
    segment = node.uploads.issue(channel, path, size, subject)
    return JSONResponse({"url": f"{hub_url(request)}/bucket/upload/{segment}"})


OPERATIONS = (
    Operation(
        "POST",
        "/api/v1/channels/{channel}/feeds",
        upload,
        "An upload URL for consecutive messages of a subfeed; needs the role provideFeeds",
        ("node",),
        {200: record(url=text("https://lab.example.org/bucket/upload/..."))},
        body=body_of(
            _UPLOAD,
            feedId=text("7d0e" * 16, pattern="^[0-9a-f]{64}$"),
            subfeedHash=text("ab" * 20, pattern="^[0-9a-f]{40}$"),
            start=whole(0),
            end=whole(2, 1),
            size=whole(1200),
        ),
        parameters={"channel": text("rig-data")},
        refusals=(404, 409, 413),
    ),
)
