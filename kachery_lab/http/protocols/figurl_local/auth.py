"""Whose pages may ask, and with whose roles."""

from __future__ import annotations

from starlette.requests import Request

from kachery_lab.core.ids import ChannelName
from kachery_lab.errors import Forbidden
from kachery_lab.http.context import node_of
from kachery_lab.services.subjects import Subject

ZONE = ChannelName("default")


def require_page(request: Request) -> None:
    """Raises Forbidden unless a listed page asks. A browser names the page's origin in every request that the page may
    read the answer of, and in every POST; a page cannot forge it."""
    settings = node_of(request).settings
    if request.headers.get("origin") not in settings.figurl_origins:
        raise Forbidden(
            "this port answers the pages of some origins only",
            hint="KACHERY_LAB_FIGURL_ORIGINS lists them; other programs use the server's own port",
        )


def subject_of(request: Request) -> Subject:
    """The configured user. Raises Forbidden when a page that is not listed asks, or no user is configured."""
    require_page(request)
    user = node_of(request).settings.figurl_user
    if user is None:
        raise Forbidden("no user is configured for this port", hint="Set KACHERY_LAB_FIGURL_USER")
    return Subject("user", user)
