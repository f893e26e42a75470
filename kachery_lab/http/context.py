"""What every room needs of a request: the node, the caller's address and credentials."""

from __future__ import annotations

from starlette.requests import HTTPConnection

from kachery_lab.errors import Unauthenticated
from kachery_lab.http.application import Application
from kachery_lab.http.bodies import JsonBudget
from kachery_lab.node import Node
from kachery_lab.services.principals import OPERATOR, Principal

CODE_HEADER = "kachery-client-auth-code"
SOCKET_STATE = "from_admin_socket"
"""Set in the connection's state by the listener of the admin socket, and by nothing that a client sends."""


def application_of(request: HTTPConnection) -> Application:
    """The application that answers this request."""
    found: Application = request.scope["app"]
    return found


def node_of(request: HTTPConnection) -> Node:
    """The node that this application serves."""
    return application_of(request).node


def budget_of(request: HTTPConnection) -> JsonBudget:
    """The bound on JSON in memory, shared by all requests."""
    return application_of(request).budget


def peer_of(request: HTTPConnection) -> str | None:
    """The caller's address without its port."""
    client = request.scope.get("client")
    return client[0] if client else None


def bearer(request: HTTPConnection) -> str | None:
    """The token of an Authorization header, None when there is none of that kind."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" and value.strip() else None


def authenticate(request: HTTPConnection) -> Principal:
    """The caller, by token, client code or admin socket. Raises Unauthenticated or TooManyRequests."""
    if request.scope.get("state", {}).get(SOCKET_STATE):
        return OPERATOR
    access, peer = node_of(request).access, peer_of(request)
    token = bearer(request)
    if token is not None:
        return access.by_token(token, peer)
    code = request.headers.get(CODE_HEADER)
    if code:
        return access.by_code(code, peer)
    raise Unauthenticated(
        "this needs a credential", hint="Send `Authorization: Bearer <token>` or `KACHERY-CLIENT-AUTH-CODE: <code>`"
    )


def caller(request: HTTPConnection) -> Principal | None:
    """Like `authenticate`, but None when no credential of a kind that counts here is sent."""
    from_socket = request.scope.get("state", {}).get(SOCKET_STATE)
    if from_socket or bearer(request) is not None or request.headers.get(CODE_HEADER):
        return authenticate(request)
    return None
