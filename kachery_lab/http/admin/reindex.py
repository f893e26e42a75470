"""Reindex of an open node."""

from __future__ import annotations

from dataclasses import fields

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.errors import InvalidInput
from kachery_lab.http.admin.room import ROOT, known_parameters
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, choice, flag, record, whole
from kachery_lab.maintenance.reindex import Report, reindex


async def run(request: Request) -> Response:
    """`?dry_run=true` only reports. An index that was rebuilt is this volume's from then on."""
    actor, node = authenticate(request), node_of(request)
    async with node.audit.action(actor, "reindex", node.volume_id) as act:
        actor.require("admin")
        known_parameters(request, "dry_run")
        dry_run = request.query_params.get("dry_run", "false")
        if dry_run not in ("true", "false"):
            raise InvalidInput("dry_run: expected true or false")
        act(f"dry_run={dry_run}")
        report = await reindex(node, dry_run == "true")
        if dry_run == "false":
            await node.acknowledge_volume()
    return JSONResponse(report.to_json())


_COUNTS = {one.name: whole(0) for one in fields(Report) if one.name != "dry_run"}
OPERATIONS = (
    Operation(
        "POST",
        f"{ROOT}/reindex",
        run,
        "Verify what the volume holds and make the index agree with it; answers when it is done",
        ("admin",),
        {200: record(**_COUNTS, dry_run=flag(True))},
        query={"dry_run": choice("true", "false")},
    ),
)
