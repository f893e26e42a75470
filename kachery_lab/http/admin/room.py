"""What every noun of this room needs: bodies, parameters, values of the documents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.core.roles import NAMES
from kachery_lab.errors import Forbidden, InvalidInput, NotFound
from kachery_lab.http.bodies import Field, read_json, require_fields
from kachery_lab.http.context import authenticate, budget_of, node_of
from kachery_lab.http.describe import Handler, array, choice, text, whole

ROOT = "/api/admin/v1"
MAX_BODY = 1_000_000
NODE_ID = "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c"
OTHER_NODE_ID = "8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b394"

CHANNEL = text("recordings", pattern="^[A-Za-z0-9_.-]{2,100}$")
USER = text("ann", pattern="^[!-.0-9;-~]{1,80}$")
NODE = text(NODE_ID, pattern="^[0-9a-f]{64}$")
LABEL = text("rig-1", minLength=1, maxLength=20)
NOTE = text("acquisition", maxLength=100)
TIME = whole(1_700_000_000_000)
FUTURE = whole(4_102_444_800_000)
ROLES = array(choice(*NAMES))
ASKED_ROLES = array(choice(*NAMES, "all"))
LIMIT = whole(100, 1, 1000)


def audited(handler: Handler) -> Handler:
    """A handler that only looks, whose refusals are recorded too. Services record those of changes themselves."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except (Forbidden, NotFound) as error:
            actor = authenticate(request)
            await node_of(request).audit.record(actor, "read", request.url.path, error.code, error.message)
            raise

    return endpoint


async def body_of_request(request: Request, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON body: exactly these fields. Raises InvalidInput, TooLarge."""
    found = await read_json(request.scope, request.receive, budget_of(request), max_bytes=MAX_BODY)
    return require_fields(found, fields)


def known_parameters(request: Request, *names: str) -> None:
    """Raises InvalidInput for a query parameter that this route does not have, or that comes twice."""
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in names or given.count(name) > 1:
            raise InvalidInput(f"{name[:80]!a}: expected at most one each of {', '.join(names) or 'no parameter'}")


def number(request: Request, name: str, default: int, lowest: int, highest: int) -> int:
    """A whole number of the query. Raises InvalidInput."""
    given = request.query_params.get(name)
    if given is None:
        return default
    if given.isascii() and given.isdigit() and len(given) <= 16 and lowest <= int(given) <= highest:
        return int(given)
    raise InvalidInput(f"{name}: expected a number from {lowest} to {highest}")
