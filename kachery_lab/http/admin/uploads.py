"""Uploads and what was moved: who, where, when."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import Sha1
from kachery_lab.errors import InvalidInput
from kachery_lab.http.admin.objects import SHOWN_FIELDS, to_json
from kachery_lab.http.admin.room import CHANNEL, LIMIT, NOTE, ROOT, TIME, known_parameters, number
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, nullable, record, text, whole
from kachery_lab.services.upload_search import UploadQuery, place_of, usage_place
from kachery_lab.services.usage import UsageDay

_LATEST = 2**53
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


async def list_uploads(request: Request) -> Response:
    """The newest first; `next` is the `before` of the next page, null at the end."""
    actor = authenticate(request)
    known_parameters(request, "channel", "principal", "label", "sha1", "since", "until", "before", "limit")
    given, limit = request.query_params, number(request, "limit", 100, 1, 1000)
    query = UploadQuery(
        channel=given.get("channel"),
        principal=given.get("principal"),
        label=given.get("label"),
        sha1=Sha1.parse(given["sha1"]) if "sha1" in given else None,
        since=number(request, "since", 0, 0, _LATEST) if "since" in given else None,
        until=number(request, "until", 0, 0, _LATEST) if "until" in given else None,
    )
    found = await node_of(request).search.uploads(actor, query, given.get("before", ""), limit)
    following = place_of(found[-1]) if len(found) == limit else None
    return JSONResponse({"uploads": [{"channel": one.channel, **to_json(one)} for one in found], "next": following})


def _usage(row: UsageDay) -> dict[str, Any]:
    return {
        "day": row.day,
        "channel": row.channel,
        "principal": row.principal or None,
        "uploads": row.uploads,
        "bytesUploaded": row.bytes_uploaded,
        "downloads": row.downloads,
        "bytesDownloaded": row.bytes_downloaded,
    }


def _day(request: Request, name: str) -> str:
    given = request.query_params.get(name, "")
    if given and not _DAY.fullmatch(given):
        raise InvalidInput(f"{name}: expected a day like 2026-01-31")
    return given


async def list_usage(request: Request) -> Response:
    """In order of day, channel and principal; `next` is the `after` of the next page, null at the end."""
    actor = authenticate(request)
    known_parameters(request, "channel", "principal", "since", "until", "after", "limit")
    given, limit = request.query_params, number(request, "limit", 100, 1, 1000)
    days = (_day(request, "since"), _day(request, "until"))
    search = node_of(request).search
    found = await search.usage(actor, given.get("channel"), given.get("principal"), days, given.get("after", ""), limit)
    following = usage_place(found[-1]) if len(found) == limit else None
    return JSONResponse({"usage": [_usage(row) for row in found], "next": following})


_WHO = ("admin", "channel-owner")
_COUNT, _BYTES = whole(3), whole(12345)
_PRINCIPAL = text("user:ann")
_SINCE, _UNTIL = text("2026-01-01"), text("2030-12-31")
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/uploads",
        list_uploads,
        "Uploads into channels, the newest first: who, where, when, under which label. `label` is a part of it. "
        "Owners see those into their own channels",
        _WHO,
        {200: record(uploads=array(record(channel=CHANNEL, **SHOWN_FIELDS)), next=nullable(text("")))},
        query={
            "channel": CHANNEL,
            "principal": _PRINCIPAL,
            "label": NOTE,
            "sha1": SHOWN_FIELDS["sha1"],
            "since": TIME,
            "until": whole(4_102_444_800_000),
            "before": text(f"1700000000000/recordings/sha1/a9/99/3e/{'a9993e' + '0' * 34}"),
            "limit": LIMIT,
        },
        refusals=(404,),
    ),
    Operation(
        "GET",
        f"{ROOT}/usage",
        list_usage,
        "What was uploaded into and downloaded from channels, by day (UTC), channel and principal (null: anybody). "
        "Owners see their own channels",
        _WHO,
        {
            200: record(
                usage=array(
                    record(
                        day=_SINCE,
                        channel=CHANNEL,
                        principal=nullable(_PRINCIPAL),
                        uploads=_COUNT,
                        bytesUploaded=_BYTES,
                        downloads=_COUNT,
                        bytesDownloaded=_BYTES,
                    )
                ),
                next=nullable(text("2026-01-01/recordings/user:ann")),
            )
        },
        query={
            "channel": CHANNEL,
            "principal": _PRINCIPAL,
            "since": _SINCE,
            "until": _UNTIL,
            "after": text("2026-01-01/recordings/user:ann"),
            "limit": LIMIT,
        },
        refusals=(404,),
    ),
)
