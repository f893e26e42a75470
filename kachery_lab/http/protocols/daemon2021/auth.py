"""Who may call: the header of the 2021 client, or a token."""

from __future__ import annotations

from starlette.requests import Request

from kachery_lab.errors import Forbidden
from kachery_lab.http.context import CODE_HEADER, bearer, node_of, peer_of
from kachery_lab.services.principals import Principal


def browser_class(request: Request) -> Principal:
    """The caller of an endpoint that additional codes may use. Raises Unauthenticated, Forbidden, TooManyRequests."""
    access, peer = node_of(request).access, peer_of(request)
    token = bearer(request)
    principal = (
        access.by_token(token, peer) if token is not None else access.by_code(request.headers.get(CODE_HEADER), peer)
    )
    principal.require("client", "admin")
    return principal


def local_class(request: Request) -> Principal:
    """The caller of an endpoint that additional codes may not use."""
    principal = browser_class(request)
    if principal.kind == "browser":
        raise Forbidden("an additional code may not do this", hint="Use the code from <storage>/client-auth")
    return principal
