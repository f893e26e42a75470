"""Every address of the room."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kachery_lab.errors import NotFound
from kachery_lab.http.describe import Handler
from kachery_lab.http.protocols.hub2021 import nodes, resources
from kachery_lab.http.protocols.hub2021.errors import answers


async def kachery_hub(request: Request) -> Response:
    """The older hub's own web page asked here; no program of 2021 does."""
    raise NotFound(
        "/api/kacheryHub is not served here",
        hint="Channels and nodes are managed with /api/admin/v1 or `kachery-lab channel|node`",
    )


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    posts: dict[str, Handler] = {
        "/api/kacheryNode": nodes.kachery_node,
        "/api/getChannelBucketBaseUrl": resources.get_channel_bucket_base_url,
        "/api/resource": resources.resource,
        "/api/kacheryHub": kachery_hub,
    }
    return [Route(path, answers(handler), methods=["POST"]) for path, handler in posts.items()]
