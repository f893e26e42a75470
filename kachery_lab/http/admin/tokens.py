"""Tokens: listing, making, revoking."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import UserName
from kachery_lab.errors import InvalidInput
from kachery_lab.http.bodies import optional, read_json, require_fields, required
from kachery_lab.http.context import authenticate, budget_of, node_of
from kachery_lab.services.tokens import Token

_CREATE = {
    "user": required(str),
    "scopes": required(list),
    "label": optional(str),
    "expiresAt": optional(int, nullable=True),
}


def to_json(token: Token) -> dict[str, Any]:
    """A token as it is shown."""
    return {
        "id": token.id,
        "user": token.user,
        "label": token.label,
        "scopes": list(token.scopes),
        "createdAt": token.created_at,
        "expiresAt": token.expires_at,
        "revokedAt": token.revoked_at,
    }


async def list_tokens(request: Request) -> Response:
    """All tokens, the oldest first."""
    authenticate(request).require("admin")
    return JSONResponse({"tokens": [to_json(token) for token in await node_of(request).tokens.list()]})


async def create(request: Request) -> Response:
    """A new token for a user, who is made when absent."""
    authenticate(request).require("admin")
    body = require_fields(await read_json(request.scope, request.receive, budget_of(request)), _CREATE)
    if not all(isinstance(scope, str) for scope in body["scopes"]):
        raise InvalidInput("scopes: expected a list of texts")
    token, secret = await node_of(request).tokens.create(
        UserName.parse(body["user"], "user"), body["scopes"], body.get("label", ""), body.get("expiresAt")
    )
    return JSONResponse({**to_json(token), "token": secret}, 201, {"cache-control": "no-store"})


async def revoke(request: Request) -> Response:
    """The token opens nothing from now on."""
    authenticate(request).require("admin")
    return JSONResponse(to_json(await node_of(request).tokens.revoke(request.path_params["id"])))
