"""Tokens: listing, making, revoking. For admins only."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kachery_lab.core.ids import UserName
from kachery_lab.http.admin.room import CHANNEL, FUTURE, NOTE, ROOT, TIME, USER, body_of_request
from kachery_lab.http.bodies import optional, required
from kachery_lab.http.context import authenticate, node_of
from kachery_lab.http.describe import Operation, array, body_of, choice, nullable, record, text
from kachery_lab.services.principals import SCOPES
from kachery_lab.services.tokens import Token

_CREATE = {
    "user": required(str),
    "scopes": required(list),
    "label": optional(str),
    "expiresAt": optional(int, nullable=True),
    "channels": optional(list, nullable=True),
}


def to_json(token: Token) -> dict[str, Any]:
    """A token as it is shown."""
    return {
        "id": token.id,
        "user": token.user,
        "label": token.label,
        "scopes": list(token.scopes),
        "channels": None if token.channels is None else sorted(token.channels),
        "createdAt": token.created_at,
        "expiresAt": token.expires_at,
        "revokedAt": token.revoked_at,
    }


async def list_all(request: Request) -> Response:
    """All tokens, the oldest first."""
    actor = authenticate(request)
    return JSONResponse({"tokens": [to_json(token) for token in node_of(request).tokens.list(actor)]})


async def show(request: Request) -> Response:
    """One token, without its secret."""
    actor = authenticate(request)
    return JSONResponse(to_json(node_of(request).tokens.get(actor, request.path_params["id"])))


async def create(request: Request) -> Response:
    """A new token for a user, who is made when absent."""
    actor, body = authenticate(request), await body_of_request(request, _CREATE)
    token, secret = await node_of(request).tokens.create(
        actor,
        UserName.parse(body["user"], "user"),
        body["scopes"],
        body.get("label", ""),
        body.get("expiresAt"),
        body.get("channels"),
    )
    return JSONResponse({**to_json(token), "token": secret}, 201, {"cache-control": "no-store"})


async def revoke(request: Request) -> Response:
    """The token opens nothing from now on."""
    actor = authenticate(request)
    return JSONResponse(to_json(await node_of(request).tokens.revoke(actor, request.path_params["id"])))


_ID = text("0a1b2c3d")
_FIELDS = {
    "id": _ID,
    "user": USER,
    "label": NOTE,
    "scopes": array(choice(*SCOPES)),
    "channels": nullable(array(CHANNEL)),
    "createdAt": TIME,
    "expiresAt": nullable(FUTURE),
    "revokedAt": nullable(TIME),
}
_SHOWN = record(**_FIELDS)
_SCOPES = array(choice("read", *(scope for scope in SCOPES if scope != "read")), minItems=1)
OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/tokens",
        list_all,
        "All tokens, without their secrets",
        ("admin",),
        {200: record(tokens=array(_SHOWN))},
    ),
    Operation(
        "POST",
        f"{ROOT}/tokens",
        create,
        "Make a token; its secret is shown this once. The user is made when absent. "
        "With `channels`, only for the scopes read, write and channel-owner, it reaches these channels only",
        ("admin",),
        {201: record(**_FIELDS, token=text("klk_2pq7xv5mzk3ld6yh4tw8ncr9bs"))},
        body_of(
            _CREATE,
            user=USER,
            scopes=_SCOPES,
            label=NOTE,
            expiresAt=FUTURE,
            channels=array(CHANNEL, minItems=1, maxItems=100),
        ),
        refusals=(409,),
    ),
    Operation(
        "GET",
        f"{ROOT}/tokens/{{id}}",
        show,
        "One token, without its secret",
        ("admin",),
        {200: _SHOWN},
        None,
        {"id": _ID},
        refusals=(404,),
    ),
    Operation(
        "DELETE",
        f"{ROOT}/tokens/{{id}}",
        revoke,
        "End a token now",
        ("admin",),
        {200: _SHOWN},
        None,
        {"id": _ID},
        refusals=(404, 409),
    ),
)
