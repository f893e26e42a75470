"""Reindex of a running server."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.errors import InvalidInput
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.maintenance.reindex import reindex


async def run(request: Request) -> Response:
    """`?dry_run=true` only reports."""
    authenticate(request).require("admin")
    dry_run = request.query_params.get("dry_run", "false")
    if dry_run not in ("true", "false"):
        raise InvalidInput("dry_run: expected true or false")
    return JSONResponse((await reindex(node_of(request), dry_run == "true")).to_json())
