"""The audit."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.http.admin.room import LIMIT, ROOT, TIME, known_parameters, number
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, nullable, record, text, whole
from kachery_lab.services.audit import Entry

_FILTERS = ("principal", "action", "object", "outcome")


def to_json(entry: Entry) -> dict[str, Any]:
    """An entry as shown."""
    return {
        "id": entry.id,
        "at": entry.at,
        "principal": entry.principal,
        "peer": entry.peer,
        "action": entry.action,
        "object": entry.object,
        "outcome": entry.outcome,
        "detail": entry.detail,
    }


async def list_all(request: Request) -> Response:
    """The newest entries first; `next` is the `before` of the next page, null at the end."""
    authenticate(request).require("admin")
    known_parameters(request, "before", "limit", *_FILTERS)
    limit = number(request, "limit", 100, 1, 1000)
    before = number(request, "before", 0, 1, 2**53) or None
    audit = node_of(request).audit
    found = await audit.list(before, limit, **{name: request.query_params.get(name) for name in _FILTERS})
    following = found[-1].id if len(found) == limit else None
    entries = [to_json(entry) for entry in found]
    return JSONResponse({"entries": entries, "next": following, "retentionDays": audit.retention_days})


_SHOWN = record(
    id=whole(17),
    at=TIME,
    principal=text("user:ann"),
    peer=nullable(text("192.0.2.7")),
    action=text("channel.create"),
    object=text("recordings"),
    outcome=text("done"),
    detail=text("owner ann"),
)
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/audit",
        list_all,
        "Changes and refusals, the newest first; kept for `KACHERY_LAB_AUDIT_DAYS` days. The filters are exact",
        ("admin",),
        {200: record(entries=array(_SHOWN), next=nullable(whole(17)), retentionDays=whole(365, 1))},
        query={
            "before": whole(1000, 1),
            "limit": LIMIT,
            "principal": text("user:ann"),
            "action": text("channel.create"),
            "object": text("recordings"),
            "outcome": text("done"),
        },
    ),
)
