"""Effective settings."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.http.admin.room import ROOT
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, record, text
from kachery_lab.settings import Settings, shown, variable


async def show(request: Request) -> Response:
    """Every setting, its value (secrets are masked) and where it came from."""
    authenticate(request).require("admin")
    settings = node_of(request).settings
    found = [
        {
            "variable": variable(name),
            "value": shown(settings, name),
            "origin": settings.origin(name),
            "description": field.description,
        }
        for name, field in Settings.model_fields.items()
    ]
    return JSONResponse({"settings": found})


_SHOWN = record(
    variable=text("KACHERY_LAB_AUDIT_DAYS"),
    value=text("365"),
    origin=text("default"),
    description=text("Days that audit entries are kept"),
)
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/settings",
        show,
        "Effective settings and where each came from (`flag`, a variable, `default`); secrets are masked",
        ("admin",),
        {200: record(settings=array(_SHOWN))},
    ),
)
