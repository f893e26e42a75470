"""Every address of the room."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route, WebSocketRoute

from kachery_lab.http.errors import answering
from kachery_lab.http.protocols.gateway2022 import pages
from kachery_lab.http.protocols.gateway2022.errors import gateway_error, resource_error
from kachery_lab.http.protocols.gateway2022.gateway import gateway
from kachery_lab.http.protocols.gateway2022.resource_providers import provide
from kachery_lab.http.protocols.gateway2022.resources import request_file


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [
        Route("/api/gateway", answering(gateway, gateway_error), methods=["POST"]),
        Route("/registerClient/{client_id}", answering(pages.link, pages.page_error), methods=["GET"]),
        Route("/registerClient/{client_id}", answering(pages.ask, pages.page_error), methods=["POST"]),
        Route("/client/{client_id}", answering(pages.client, pages.page_error), methods=["GET"]),
        Route("/r/{zone}", answering(request_file, resource_error), methods=["POST"]),
        Route("/p/{token}/r/{zone}", answering(request_file, resource_error), methods=["POST"]),
        WebSocketRoute("/p/{token}", provide),
    ]
