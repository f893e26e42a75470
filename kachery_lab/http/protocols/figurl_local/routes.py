"""Every address of the room."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from kachery_lab.http.protocols.figurl_local import files
from kachery_lab.http.protocols.figurl_local.errors import answers


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [
        Route("/probe", files.probe, methods=["GET"]),
        Route("/sha1/{hash}", answers(files.read), methods=["GET"]),
        Route("/upload/sha1/{hash}", answers(files.upload), methods=["POST"]),
    ]
